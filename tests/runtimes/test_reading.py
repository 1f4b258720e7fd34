from __future__ import annotations

import json
import os
import socket

import pytest

from vitkit.runtimes import VitkitError
from vitkit.runtimes.reading import open_file, read_file, read_json


@pytest.fixture
def odd_files(tmp_path):
    """What is no regular file, by kind."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    return tmp_path


@pytest.mark.parametrize("name", ["fifo", "folder", "zeros", "socket", "gone", "loop", "nowhere"])
def test_only_regular_files_are_read(odd_files, name):
    with pytest.raises(OSError, match=name):
        read_file(odd_files / name, 10)
    with pytest.raises(OSError, match=name), open_file(odd_files / name, None):
        pass


def test_a_file_is_read_up_to_its_limit(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_file(file, 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes; at most 4"):
        read_file(file, 4)
    (tmp_path / "link").symlink_to(file)
    assert read_file(tmp_path / "link", 5) == b"12345"


def test_a_file_that_claims_to_be_empty_is_limited_too():
    if not os.path.exists("/proc/self/environ"):
        pytest.skip("this system has no /proc")
    assert len(read_file("/proc/self/maps", 1 << 20)) > 10
    with pytest.raises(OSError, match="over 10 bytes"):
        read_file("/proc/self/maps", 10)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_is_read_in_what_editors_write(tmp_path, encoding):
    (tmp_path / "x.json").write_bytes(json.dumps({"ä": [1, 2.5]}, ensure_ascii=False).encode(encoding))
    assert read_json(tmp_path / "x.json") == {"ä": [1, 2.5]}


def test_endless_integers_are_read_at_once(tmp_path):
    (tmp_path / "x.json").write_text(f"[{10**400}, {-(10**18)}, 1{'0' * 5000}, -1{'0' * 1_000_000}]")
    assert read_json(tmp_path / "x.json") == [10**400, -(10**18), float("inf"), -float("inf")]
    (tmp_path / "twice.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match="twice"):
        read_json(tmp_path / "twice.json")


def test_every_reader_of_json_takes_regular_files_alone(odd_files):
    from vitkit.bench.report import load
    from vitkit.cli.import_ import _read_categories
    from vitkit.data.tars import read_index
    from vitkit.devices.registry import read_devices
    from vitkit.report.results import read_results
    from vitkit.runs import load_run
    from vitkit.train.checkpoint import _read

    for name in ("fifo", "zeros"):
        folder = odd_files / f"run {name}"
        folder.mkdir()
        (folder / "card.json").symlink_to(odd_files / name)
        (odd_files / f"{name}.json").symlink_to(odd_files / name)
        for read in (load, _read_categories, read_devices, _read):
            with pytest.raises(VitkitError, match="not a regular file"):
                read(odd_files / name)
        for read, path in ((read_index, odd_files / f"{name}.json"), (load_run, folder)):
            with pytest.raises(VitkitError, match="not a regular file"):
                read(path)
        with pytest.raises(VitkitError, match="not a regular file"):
            read_results([odd_files / f"{name}.json"])
