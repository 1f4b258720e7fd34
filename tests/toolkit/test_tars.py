from __future__ import annotations

import http.server
import io
import json
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_pictures
from PIL import Image
from test_cli import vitkit
from test_train import TINY

from vitkit.data import tars
from vitkit.data.pack import index_shards, write_shards
from vitkit.data.tars import ShardedImages, fetch, read_index
from vitkit.runtimes.card import sha256
from vitkit.runtimes.errors import BadArtifact, BadInput, BadRequest, DeviceError
from vitkit.train import train
from vitkit.train.image_source import find_images

webdataset = pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Classes whose names are numbers, in another order than their own: 26 images, 6 to validate."""
    return write_pictures(tmp_path_factory.mktemp("folders"), 13, 3, ("10", "2"))


@pytest.fixture(scope="module")
def packed(folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    write_shards(folders, out, per_shard=5)
    return out


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `cut` answers break off after so many bytes, then whole ones follow, with ranges."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cut, self.limit, self.ranges, self.asked = folder, 0, 700, True, []
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Server = self.server
        path = server.folder / self.path.lstrip("/")
        given = self.headers.get("Range")
        server.asked.append((path.name, given))
        if not path.is_file():
            self.send_error(404)
            return
        body, start = path.read_bytes(), 0
        if given and server.ranges:
            start = int(given.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if server.cut and path.suffix == ".tar":
            server.cut -= 1
            self.wfile.write(body[start : start + server.limit])
            self.close_connection = True
            return
        self.wfile.write(body[start:])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tars, "_PAUSE_S", 0.0)
    made = Server(packed)
    yield made
    made.shutdown()
    made.server_close()


def test_webdatasets_own_reader_finds_every_image_with_its_class(folders, packed):
    found = {}
    for path in sorted(packed.glob("train-*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            found[sample["png"]] = int(sample["cls"])
    expected = {
        path.read_bytes(): number
        for number, name in enumerate(("10", "2"))
        for path in (folders / "train" / name).iterdir()
    }
    assert found == expected
    assert [s.samples for s in read_index(packed).splits["train"]] == [5, 5, 5, 5, 5, 1]


def test_images_come_by_number_and_packing_again_gives_the_same_bytes(folders, packed, tmp_path):
    splits = find_images(packed, TINY)
    plain = find_images(folders, TINY)
    assert splits.classes == plain.classes == ("10", "2")
    for one, two in ((splits.train, plain.train), (splits.val, plain.val)):
        mine = sorted((photo.tobytes(), label) for photo, label in (one[i] for i in range(len(one))))
        assert mine == sorted((photo.tobytes(), label) for photo, label in (two[i] for i in range(len(two))))
    assert str(splits.train.files[6]) == "train-000001.tar/1"
    write_shards(folders, tmp_path / "again", per_shard=5)
    names = sorted(path.name for path in packed.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((packed / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


def test_training_from_a_url_equals_training_from_the_folder_of_shards(packed, server, tmp_path):
    config = replace(TINY, epochs=2, workers=1)
    one = train(config, packed, tmp_path / "disk", progress=False)
    server.cut = 3
    two = train(config, server.url, tmp_path / "net", progress=False)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    # What was cut off was gone on with, and each tar file came once.
    assert sum(given is not None for _, given in server.asked) == 3
    asked = [name for name, given in server.asked if not given and name.endswith(".tar")]
    assert sorted(asked) == sorted(path.name for path in packed.glob("*.tar"))


def test_a_server_that_stays_away_ends_training_with_a_resumable_checkpoint(
    packed, server, tmp_path, monkeypatch
):
    config = replace(TINY, epochs=3, shard_cache_gb=0.0)
    straight = train(config, packed, tmp_path / "straight", progress=False)
    fetched = tars.fetch

    def gone_later(url, target, digest):
        if (tmp_path / "run/checkpoint/last.safetensors").exists():
            server.cut = 10**6
            server.limit = 0
        fetched(url, target, digest)

    monkeypatch.setattr(tars, "fetch", gone_later)
    monkeypatch.setattr(tars, "_OPEN", 1)
    with pytest.raises(DeviceError, match="go on with --resume"):
        train(config, server.url, tmp_path / "run", progress=False)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server.cut = 0
    # Another size of the cache is no other training.
    config = replace(config, shard_cache_gb=1e-9)
    resumed = train(config, server.url, tmp_path / "run", progress=False, resume=True)
    assert (resumed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    # Nothing but the last one or two stays in a cache without room.
    assert len(list((tmp_path / "cache/vitkit/shards").glob("*.tar"))) <= 2


def test_downloads_check_what_came_and_survive_what_was_left(server, packed, tmp_path):
    name = "train-000000.tar"
    digest, target = sha256(packed / name), tmp_path / "got.tar"
    partial = tmp_path / "got.tar.partial"
    # A whole download, killed just before it got its name.
    partial.write_bytes((packed / name).read_bytes())
    fetch(f"{server.url}/{name}", target, digest)
    assert sha256(target) == digest
    target.unlink()
    # Another file's beginning, to which the rest is appended, is found out and thrown away.
    partial.write_bytes(b"x" * 300)
    fetch(f"{server.url}/{name}", target, digest)
    assert sha256(target) == digest
    target.unlink()
    server.ranges = False
    partial.write_bytes(b"x" * 300)
    fetch(f"{server.url}/{name}", target, digest)
    assert sha256(target) == digest
    with pytest.raises(DeviceError, match="bytes are not those that the index names"):
        fetch(f"{server.url}/{name}", tmp_path / "other.tar", "0" * 64)
    with pytest.raises(DeviceError, match="404"):
        fetch(f"{server.url}/nothing.tar", tmp_path / "other.tar", digest)
    assert not (tmp_path / "other.tar").exists()


def test_tar_files_of_other_tools_get_an_index(folders, tmp_path):
    for split in ("train", "val"):
        with webdataset.TarWriter(str(tmp_path / f"{split}-0.tar")) as tar:
            for i, path in enumerate(sorted((folders / split).rglob("*.png"))):
                tar.write(
                    {"__key__": f"dir.x/{i}", "png": path.read_bytes(), "cls": path.parent.name, "txt": "!"}
                )
    with webdataset.TarWriter(str(tmp_path / "val-1.tar")) as tar:
        tar.write({"__key__": "a", "jpg": jpeg(), "cls": "0"})
    assert index_shards(tmp_path).classes == tuple(map(str, range(11)))
    photos = find_images(tmp_path, TINY)
    assert {photos.train[i][1] for i in range(len(photos.train))} == {2, 10}
    assert photos.val[6][0].shape == (8, 8, 3)
    with pytest.raises(BadRequest, match="remove it"):
        index_shards(tmp_path)


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"x")], "1 samples lack an image or their cls"),
        ([("a.cls", b"0")], "1 samples lack an image or their cls"),
        ([("a.jpg", b"x"), ("a.cls", b"0")], "holds 1 samples, its index says 2"),
    ],
)
def test_a_tar_file_with_the_wrong_samples_is_named(members, message, packed, tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    body = json.loads((packed / "index.json").read_text())
    body["splits"]["train"] = [{"file": "train-0.tar", "samples": 2, "bytes": 1, "sha256": ""}]
    (tmp_path / "index.json").write_text(json.dumps(body))
    images = ShardedImages(read_index(tmp_path), "train", tmp_path / "cache", 1)
    with pytest.raises(BadArtifact, match=message):
        images[0]


def test_a_tar_file_that_is_cut_off_is_named(packed, tmp_path):
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "train-000000.tar").read_bytes()
    (tmp_path / "train-000000.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadArtifact, match=r"train-000000\.tar holds 3 samples, its index says 5"):
        train(TINY, tmp_path, tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format is 2"),
        ({"classes": ["one"]}, "1 classes"),
        ({"splits": {"train": []}}, "val"),
        ({"splits": {"train": [], "val": []}}, "without shards"),
        (
            {"splits": {"train": [{"file": "../a.tar", "samples": 1, "bytes": 1, "sha256": ""}], "val": []}},
            "plain",
        ),
        (
            {"splits": {"train": [{"file": "a.tar", "samples": 0, "bytes": 1, "sha256": ""}], "val": []}},
            "0 samples",
        ),
    ],
)
def test_a_wrong_index_says_what_is_wrong(change, message, packed, tmp_path):
    body = json.loads((packed / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**body, **change}))
    with pytest.raises(BadInput, match=message):
        read_index(tmp_path)


def test_the_commands_pack_and_index(folders, tmp_path):
    told = vitkit("data", "shards", folders, tmp_path / "out", "--per-shard", 20)[1]
    assert "26 train images in 2 tar files, 6 val images in 1 tar files, 2 classes" in told
    (tmp_path / "out" / "index.json").unlink()
    (tmp_path / "names.txt").write_text("ten\ntwo\n")
    vitkit("data", "index", tmp_path / "out", "--classes", tmp_path / "names.txt")
    assert read_index(tmp_path / "out").classes == ("ten", "two")
