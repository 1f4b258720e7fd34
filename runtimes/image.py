"""Image preparation, once for all: training's eval transform, calibration, parity, evaluation, the app."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vitkit.runtimes.card import ImageSpec
from vitkit.runtimes.errors import BadInput, VitkitError
from vitkit.runtimes.listing import find_images
from vitkit.runtimes.pillow import pillow
from vitkit.runtimes.reading import open_file

Image = NDArray[np.uint8]

# Beyond it, a file is no image that Pillow would decode: it refuses more than 179 megapixels.
MAX_FILE_BYTES = 2 << 30
# EXIF's tag 274: how the stored image is turned to be upright (EXIF 2.32, section 4.6.4).
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# Beyond it, an image that covers the engine's input would not fit into memory.
MAX_ASPECT = 100
# Pixels of an image that is resized whole, in a few milliseconds.
_SMALL, _SMALLER = 1 << 19, 1.5
# Pixels that may be resized beyond each edge of a crop for an edge that float32 holds more exactly.
_SLACK = 16


@dataclass(frozen=True)
class Placement:
    """Where the prepared image lies in the photograph: photo = input / scale + offset, in pixels.

    `content` is the part of the input that the photograph fills, from its upper left corner; with `input`
    and `photo` a size as (height, width).
    """

    scale: tuple[float, float]
    offset: tuple[float, float]
    input: tuple[int, int]
    content: tuple[int, int]
    photo: tuple[int, int]

    def to_photo(self, points: NDArray[np.floating]) -> NDArray[np.floating]:
        """(..., 2) points as (y, x) in input pixels -> the same in pixels of the photograph."""
        # Pixel centres sit at +0.5, which is what makes the scaling exact.
        photo: NDArray[np.floating] = (points + 0.5) / np.asarray(self.scale) + np.asarray(self.offset) - 0.5
        return photo


def read_image(path: str | Path, content: bytes | None = None) -> Image:
    """Decode an image file, upright, to (H, W, 3) uint8 RGB; `content` are its bytes where they are at hand.

    An image whose EXIF header is damaged comes as it is stored. Raises BadInput where the file is missing,
    damaged, no regular file, or holds more than 8 bits a channel.
    """
    try:
        if content is not None:
            return _decoded(io.BytesIO(content), path)
        with open_file(path, MAX_FILE_BYTES) as file:
            return _decoded(file, path)
    except VitkitError:
        raise
    # Pillow's decoders raise many types on hostile bytes (SyntaxError, struct.error, ValueError, ...).
    except Exception as error:
        raise BadInput(f"{path} cannot be read as an image: {error}") from None


def _decoded(source: BinaryIO, path: str | Path) -> Image:
    pil = pillow()
    with warnings.catch_warnings(), pil.Image.open(source) as image:
        # From 90 megapixels on Pillow warns; it refuses what can only be an attack by itself.
        warnings.simplefilter("ignore")
        # Pillow calls 16-bit colour plain RGB; the decoder's raw mode tells.
        deep = any(";16" in str(tile[3]) for tile in image.tile)
        if deep or image.mode.startswith(("I", "F")):
            raise BadInput(f"{path} has more than 8 bits a channel ({image.mode}); convert it first")
        image.load()
        turned = _UPRIGHT.get(_orientation(image))
        upright = image.transpose(pil.Image.Transpose[turned]) if turned else image
        return np.asarray(upright.convert("RGB"))


def _orientation(image: Any) -> int:
    """EXIF's orientation of a loaded image, 1 (as it is stored) where there is none that can be read."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    # A damaged header raises as many types as a damaged image.
    except Exception:
        return 1
    return found if isinstance(found, int) else 1


def sample_photos(folder: Path, count: int) -> list[tuple[str, Image]]:
    """Up to `count` images of a folder with their relative paths, evenly spread over its sorted files.

    Raises BadInput where there is none, or one of them cannot be read.
    """
    found = find_images(folder)
    if not found:
        raise BadInput(f"{folder} holds no images")
    chosen = [found[i * len(found) // count] for i in range(count)] if len(found) > count else found
    return [(path.relative_to(folder).as_posix(), read_image(path)) for path in chosen]


def generated_photos(count: int, seed: int = 0, size: tuple[int, int] = (320, 400)) -> list[Image]:
    """Images with the broad statistics of photographs: smooth light, edges, grain; (H, W, 3) uint8 RGB."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width] / max(size)
    photos = []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        waves = rng.normal(0, 4, (6, 3, 2)) / np.arange(1, 7)[:, None, None] ** 0.5
        phases, strengths = rng.uniform(0, 6.3, (6, 3)), rng.uniform(5, 30, (6, 3))
        angles = waves[..., 0, None, None] * y * 6.3 + waves[..., 1, None, None] * x * 6.3
        light = (strengths[..., None, None] * np.sin(angles + phases[..., None, None])).sum(0)
        photo = 128 + light.transpose(1, 2, 0)
        for _ in range(8):
            top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
            tall, wide = rng.integers(8, height // 2), rng.integers(8, width // 2)
            photo[top : top + tall, left : left + wide] += rng.normal(0, 40, 3)
        photo += rng.normal(0, 6, photo.shape)
        photos.append(photo.clip(0, 255).astype(np.uint8))
    return photos


def check_image(image: object, what: str = "the image") -> Image:
    """Return a (H, W, 3) uint8 array unchanged; raises BadInput for anything else."""
    if not isinstance(image, np.ndarray):
        raise BadInput(f"{what} is a {type(image).__name__}; it must be a numpy array (H, W, 3) of uint8")
    if image.dtype != np.uint8:
        raise BadInput(f"{what} has dtype {image.dtype}; it must be uint8 with values 0 to 255")
    if image.ndim != 3 or image.shape[2] != 3:
        raise BadInput(f"{what} has shape {image.shape}; it must be (height, width, 3), RGB")
    if 0 in image.shape:
        raise BadInput(f"{what} has shape {image.shape}: it is empty")
    if max(image.shape[:2]) > MAX_ASPECT * min(image.shape[:2]):
        raise BadInput(f"{what} has shape {image.shape}: it is over {MAX_ASPECT} times longer than wide")
    return image


def _resized_size(height: int, width: int, spec: ImageSpec) -> tuple[int, int]:
    if spec.fit == "stretch":
        return spec.size
    if spec.fit == "contain":
        factor = min(spec.size[0] / height, spec.size[1] / width)
        # At most the input: a half may be rounded up on the side that sets the factor.
        tall, wide = (max(1, int(side * factor + 0.5)) for side in (height, width))
        return min(tall, spec.size[0]), min(wide, spec.size[1])
    target_h, target_w = (int(side / spec.crop_pct) for side in spec.size)
    # Truncation and the exact short side are torchvision's Resize, which the papers' code evaluates with.
    if target_h * width <= target_w * height:
        return max(int(target_w * height / width), target_h), target_w
    return target_h, max(int(target_h * width / height), target_w)


def _crop_origin(resized: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    if spec.fit == "contain":
        return 0, 0
    return round((resized[0] - spec.size[0]) / 2), round((resized[1] - spec.size[1]) / 2)


def placement(height: int, width: int, spec: ImageSpec) -> Placement:
    """Where `prepare` takes its pixels from in a photograph of the given size."""
    resized = _resized_size(height, width, spec)
    top, left = _crop_origin(resized, spec)
    scale = (resized[0] / height, resized[1] / width)
    content = (min(resized[0], spec.size[0]), min(resized[1], spec.size[1]))
    return Placement(scale, (top / scale[0], left / scale[1]), spec.size, content, (height, width))


def resize_and_crop(image: Image, spec: ImageSpec) -> Image:
    """(H, W, 3) RGB -> (size[0], size[1], 3) RGB uint8: cover and crop, contain and pad, or stretch.

    Of a large image only what the crop keeps is resized, as from a camera; single pixels differ then by one
    grey level from resizing the whole image, since Pillow takes the coordinates of a part as float32. Images
    of up to half a megapixel, which cost little, are equal to what torchvision makes of them.
    """
    resized = _resized_size(image.shape[0], image.shape[1], spec)
    origin = _crop_origin(resized, spec)
    if resized != image.shape[:2]:
        rows, columns = _resized_part(image.shape[:2], resized, origin, spec)
        image = _resize_part(image, resized, rows, columns, spec)
        origin = (origin[0] - rows[0], origin[1] - columns[0])
    if spec.fit == "contain" and resized != spec.size:
        padded = np.full((*spec.size, 3), spec.pad, np.uint8)
        padded[: resized[0], : resized[1]] = image
        return padded
    top, left = origin
    return image[top : top + spec.size[0], left : left + spec.size[1]]


def _resize_part(
    image: Image, resized: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int], spec: ImageSpec
) -> Image:
    """Those rows and columns of the image resized to `resized`."""
    pil = pillow()
    tall, wide = image.shape[0] / resized[0], image.shape[1] / resized[1]
    box = (columns[0] * wide, rows[0] * tall, columns[1] * wide, rows[1] * tall)
    size = (columns[1] - columns[0], rows[1] - rows[0])
    resample = pil.Image.Resampling[spec.interpolation.upper()]
    # Rounded, the last edge could lie a little outside.
    box = (*box[:2], min(box[2], image.shape[1]), min(box[3], image.shape[0]))
    return np.asarray(pil.Image.fromarray(image).resize(size, resample, box=box))


def _resized_part(
    shape: tuple[int, ...], resized: tuple[int, int], origin: tuple[int, int], spec: ImageSpec
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows and columns of the resized image to compute: all that the crop keeps, at times more."""
    # Scaled down less, single pixels would differ by two levels; the nearest pixel would jump.
    smaller = all(_SMALLER * resized[i] <= shape[i] for i in range(2))
    if smaller and shape[0] * shape[1] > _SMALL and spec.fit == "cover" and spec.interpolation != "nearest":
        for slack in (_SLACK, 0):
            rows, columns = (_span(shape[i], resized[i], origin[i], spec.size[i], slack) for i in range(2))
            kept = (rows[1] - rows[0], columns[1] - columns[0])
            # Pillow rounds between its passes, so that their order must be that of the whole image.
            if _vertical_first(shape, resized) == _vertical_first(shape, kept):
                return rows, columns
    return (0, resized[0]), (0, resized[1])


def _vertical_first(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether Pillow resizes rows before columns: ImagingResampleInner in the Resample.c of Pillow 13.

    Older versions never do, to which no order is different.
    """
    return shape[0] - size[0] > max(0, 2 * (shape[1] - size[1]))


def _span(length: int, resized: int, start: int, count: int, slack: int) -> tuple[int, int]:
    """A span of a resized axis around `count` places from `start`, its edges where float32 is most exact."""
    before = np.arange(start, max(0, start - slack) - 1, -1)
    after = np.arange(start + count, min(resized, start + count + slack) + 1)
    first, last = (int(p[np.argmin(_float32_error(p * length / resized))]) for p in (before, after))
    return first, last


def _float32_error(places: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.abs(places - places.astype(np.float32))


def prepare(image: Image, spec: ImageSpec) -> NDArray[Any]:
    """(H, W, 3) uint8 RGB of any size -> one input of the engine, without the batch dimension.

    Raises BadInput where the image is not such an array.
    """
    pixels: NDArray[Any] = resize_and_crop(check_image(image), spec)
    if spec.colour == "BGR":
        pixels = pixels[..., ::-1]
    if spec.dtype == "float32":
        scale = np.float32(1 / 255) / np.asarray(spec.std, np.float32)
        shift = np.asarray(spec.mean, np.float32) / np.asarray(spec.std, np.float32)
        pixels = pixels.astype(np.float32) * scale - shift
    if spec.layout == "NCHW":
        pixels = pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)


def prepare_batch(images: Iterable[Image], spec: ImageSpec) -> NDArray[Any]:
    """At least one image (H, W, 3) uint8 RGB, each of any size -> engine inputs (N, ...); see `prepare`."""
    return np.stack([prepare(image, spec) for image in images])
