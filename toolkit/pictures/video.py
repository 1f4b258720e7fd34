"""Videos, one frame at a time, by OpenCV, which is imported nowhere else."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.errors import BadInput, BadRequest, MissingBackend

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset((".mp4", ".avi", ".mov", ".mkv"))
# For files without a frame rate.
_FPS = 25.0


def is_video(path: Path) -> bool:
    """Whether the file's name is that of a video."""
    return path.suffix.lower() in SUFFIXES


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise MissingBackend("opencv-python-headless", "video", error) from None
    # Errors are raised here; FFmpeg's lines would be printed among them.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    with suppress(AttributeError):
        cv2.setLogLevel(0)
    return cv2


class Video:
    """An open video: frames a second, and the number of frames in its header (0: unknown)."""

    def __init__(self, cv2: Any, capture: Any, path: Path) -> None:
        fps, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.path = path
        self.fps = float(fps) if math.isfinite(fps) and 0 < fps <= 1000 else _FPS
        self.count = int(count) if math.isfinite(count) and 0 < count < 2**31 else 0
        self._capture = capture

    def frames(self, every: int = 1) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Every so many frames with their numbers, from 0, as (H, W, 3) uint8 RGB; only one is in memory.

        Raises BadInput if the file holds no frame.
        """
        number = 0
        while self._capture.grab():
            if number % every == 0:
                good, frame = self._capture.retrieve()
                if not good:
                    break
                yield number, np.ascontiguousarray(frame[..., ::-1])
            number += 1
        if number == 0:
            raise BadInput(f"{self.path} cannot be read as a video: no frame can be decoded")


@contextmanager
def open_video(path: Path) -> Iterator[Video]:
    """Open a video file. Raises BadInput if it is none, MissingBackend without OpenCV."""
    cv2 = _opencv()
    # OpenCV takes other names for addresses and cameras.
    if not path.is_file():
        raise BadInput(f"{path} cannot be read as a video: there is no such file")
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise BadInput(f"{path} cannot be read as a video: its format is unknown here, or it is damaged")
        yield Video(cv2, capture, path)
    finally:
        capture.release()


@contextmanager
def write_video(path: Path, fps: float) -> Iterator[Callable[[Image.Image], None]]:
    """A function that appends an RGB picture to a new MP4 file; all must be of the first one's size.

    The file appears whole, when the block ends well, or not at all. Raises BadRequest if it cannot be
    written, or OpenCV has no encoder for it.
    """
    cv2 = _opencv()
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    writer, size = None, (0, 0)

    def append(picture: Image.Image) -> None:
        nonlocal writer, size
        if writer is None:
            size = picture.size
            writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
            if not writer.isOpened():
                raise BadRequest(
                    f"{path} cannot be written: this OpenCV ({cv2.__version__}) has no encoder for MP4 "
                    "(mp4v); install one that has: pip install opencv-python-headless"
                )
        # OpenCV drops pictures of other sizes silently.
        if picture.size != size:
            raise BadInput(f"{path}: a frame has {picture.size} pixels, the first one {size}")
        writer.write(np.ascontiguousarray(np.asarray(picture)[..., ::-1]))

    try:
        try:
            yield append
        finally:
            if writer is not None:
                writer.release()
        if writer is not None:
            _put_in_place(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    try:
        if not temporary.stat().st_size:
            raise OSError("OpenCV wrote nothing")
        temporary.replace(path)
    except OSError as error:
        raise BadRequest(f"{path} cannot be written: {error}") from None
