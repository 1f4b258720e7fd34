"""The far end of a connection to a device: keeps files by their hash, diagnoses, runs a worker.

It ends when the connection does.
"""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

from vitkit.devices.worker import COMMAND, MARK, WORK
from vitkit.runtimes.card import sha256

# Home sends something at least every few seconds; after so much silence the link counts as lost.
SILENCE_S = 60
# Kept files are a cache: those that nothing has used for so long go.
KEPT_S = 30 * 24 * 3600.0
_PIECE = 1 << 20


def serve(folder: Path, wheel: Path) -> None:
    """Answer requests from standard input, a line of JSON each, until it ends.

    `folder` holds the files that are kept; `wheel` is the vitkit that runs here. A request names what to
    `do`; answers and events go to standard output, marked, a line of JSON each.
    """
    store = folder / "files"
    try:
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
        _drop_old([*store.iterdir(), *folder.glob("vitkit-*"), *folder.glob("run.*")])
        while line := _read_within_silence(sys.stdin.buffer.readline):
            if line.strip():
                _answer(json.loads(line), store, wheel)
    except BrokenPipeError:
        # Nobody listens any more.
        pass
    except OSError as error:
        _send(error=_explain(error, folder), kind="DeviceError")


def _answer(asked: Mapping[str, Any], store: Path, wheel: Path) -> None:
    if asked["do"] == "doctor":
        from vitkit import doctor
        from vitkit.bench.jetson import is_jetson

        _send(findings=doctor.to_json(doctor.diagnose()), jetson=is_jetson())
    elif asked["do"] == "stored":
        _send(stored=stored(store, asked["files"]), free=shutil.disk_usage(store).free)
    elif asked["do"] == "put":
        receive(store, asked["file"], asked["offset"], asked["size"])
        _send(put=asked["file"])
    elif asked["do"] in WORK:
        _work(asked, store, wheel)


def _send(**event: Any) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(event)}\n")
    sys.stdout.flush()


def _read_within_silence(read: Callable[[], bytes]) -> bytes:
    # The alarm ends this process: the link broke without a word.
    signal.alarm(SILENCE_S)
    data = read()
    signal.alarm(0)
    return data


def _explain(error: OSError, folder: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk that holds {folder} is full; free some, or name another folder of the device"
    return f"{folder} cannot be used: {error}"


def stored(store: Path, files: Mapping[str, int]) -> dict[str, int]:
    """Bytes that are here already of each wanted file, by its SHA-256 and size."""
    found = {}
    for name, size in files.items():
        whole, part = store / name, store / f"{name}.part"
        if whole.is_file() and whole.stat().st_size == size:
            os.utime(whole)
            found[name] = size
        else:
            found[name] = part.stat().st_size if part.is_file() and part.stat().st_size < size else 0
    return found


def receive(store: Path, name: str, offset: int, size: int) -> None:
    """Take the bytes of a file from standard input, from `offset` on; it gets its name once it is whole.

    A link that breaks leaves `name.part`, from which the next one goes on. Raises OSError if the bytes
    cannot be kept, or are not those of the SHA-256 `name`; no part stays then.
    """
    part, source = store / f"{name}.part", cast(BufferedReader, sys.stdin.buffer)
    try:
        with part.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.truncate()
            while offset < size:
                data = _read_within_silence(partial(source.read1, min(_PIECE, size - offset)))
                if not data:
                    return
                file.write(data)
                offset += len(data)
        if sha256(part) != name:
            raise OSError(errno.EIO, "a copied file arrived damaged; run the command again")
        part.replace(store / name)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _drop_old(paths: Iterable[Path]) -> None:
    for path in paths:
        # Another session may have been faster.
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > KEPT_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _work(asked: Mapping[str, Any], store: Path, wheel: Path) -> None:
    """Lay out the folders that the work needs, from kept files, and run a worker beside them."""
    run = Path(tempfile.mkdtemp(prefix="run.", dir=store.parent))
    try:
        for folder, files in asked["folders"].items():
            (run / folder).mkdir()
            for name, digest in files.items():
                os.link(store / digest, run / folder / name)
        body = {key: value for key, value in asked.items() if key != "folders"}
        code = _run_worker(json.dumps({**body, "folder": str(run)}).encode(), wheel)
        if code:
            _send(crashed=code)
    finally:
        shutil.rmtree(run, ignore_errors=True)


def _run_worker(body: bytes, wheel: Path) -> int:
    """Run the worker, whose events go straight home; it is killed when the link ends. Returns its code."""
    worker = subprocess.Popen(
        [sys.executable, *COMMAND],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        start_new_session=True,
    )
    threading.Thread(target=_kill_when_silent, args=(worker,), daemon=True).start()
    with suppress(BrokenPipeError):
        worker.communicate(body)
    return worker.wait()


def _kill_when_silent(worker: subprocess.Popen[bytes]) -> None:
    source = sys.stdin.fileno()
    while select.select([source], [], [], SILENCE_S)[0] and os.read(source, _PIECE):
        pass
    # Its group as well: a worker may have started tools of its own.
    if worker.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
