"""Names of files that are not UTF-8, as from an old zip or a Windows share, through all that reads images."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_pictures

from vitkit import exporters
from vitkit.calibration.dataset import calibration_set
from vitkit.data.folder import find_splits, listing_sha256
from vitkit.data.pack import write_shards
from vitkit.exporters.source import Source
from vitkit.runs import load_run
from vitkit.runtimes import BadInput, open_engine
from vitkit.runtimes.files import write_text
from vitkit.train import TrainConfig, train

TINY = TrainConfig(
    model="ps_vit_nano",
    options={
        "image_size": 32, "n": 2, "dim": 8, "heads": 2, "iterations": 2, "encoder_layers": 1,
        "stem_width": 8, "stem_mid": 8,
    },
    epochs=1, batch_size=8, warmup_epochs=0, crop_pct=1.0, crop_min=0.6, device="cpu",
)  # fmt: skip


def latin1(folder: Path, name: str) -> Path:
    return Path(os.fsdecode(os.path.join(os.fsencode(folder), name.encode("latin-1"))))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two classes of images, half of their names in Latin-1, in a folder whose name is Latin-1 too."""
    folder = latin1(tmp_path_factory.mktemp("names"), "donn\xe9es")
    folder.mkdir()
    write_pictures(folder, train=10, val=4)
    for path in sorted(folder.rglob("*.png"))[::2]:
        path.rename(latin1(path.parent, f"caf\xe9{path.stem}.png"))
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    return train(TINY, data, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def artifact(data, run, tmp_path_factory) -> Path:
    """An INT8 engine calibrated on the images, in a folder whose name is Latin-1."""
    out = latin1(tmp_path_factory.mktemp("artifacts"), "mod\xe8le")
    loaded, calibration = load_run(run), calibration_set(data / "train", 16)
    source = Source(loaded.model, loaded.card)
    exporters.export(source, out, target="onnx", precision="int8", calibration=calibration)
    return out


def vitkit(*arguments, locale="C.UTF-8") -> bytes:
    command = [sys.executable, "-c", "from vitkit.cli.main import main; main()", *map(os.fsencode, arguments)]
    environment = {**os.environ, "LC_ALL": locale, "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def test_calibration_names_every_file_in_json(data, artifact):
    files = json.loads((artifact / "calibration.json").read_bytes())["files"]
    assert len(files) == 16
    for item in files:
        content = (data / "train" / item["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == item["sha256"]
    assert any("\udce9" in item["path"] for item in files)


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_predictions_name_the_images(data, artifact, locale):
    (image,) = sorted((data / "val" / "dark").glob("caf*"))[:1]
    body = json.loads(vitkit("predict", artifact, image, "--json", locale=locale))
    assert image.name in json.dumps(body, ensure_ascii=False)
    table = vitkit("predict", artifact, image, locale=locale)
    assert b"caf\\udce9" in table.replace(b"\n", b"")


def test_evaluation_gives_json(data, artifact):
    body = json.loads(vitkit("evaluate", artifact, "--data", data / "val", "--json"))
    assert body["images"] == 8


def test_an_engine_opens_in_such_a_folder(data, artifact):
    with open_engine(artifact) as engine:
        results = engine(sorted((data / "val").rglob("*.png")))
    assert len(results) == 8


def test_shards_are_packed(data, tmp_path):
    pytest.importorskip("webdataset", reason="packing needs the extra shards")
    index = write_shards(data, tmp_path / "shards")
    assert [sum(shard.samples for shard in shards) for shards in index.splits.values()] == [20, 8]


def test_the_listing_is_hashed_as_bytes(tmp_path):
    (tmp_path / "ä.jpg").write_bytes(b"12")
    latin1(tmp_path, "\xe4.jpg").write_bytes(b"123")
    paths = [tmp_path / "ä.jpg", latin1(tmp_path, "\xe4.jpg")]
    expected = hashlib.sha256("ä.jpg\n2\n".encode() + b"\xe4.jpg\n3\n").hexdigest()
    assert listing_sha256(tmp_path, paths) == expected


def test_a_class_folder_that_cannot_be_a_label_is_refused_with_the_command_that_renames_it(tmp_path):
    write_pictures(tmp_path, 2, 1)
    for split in ("train", "val"):
        (tmp_path / split / "dark").rename(latin1(tmp_path / split, "for\xeat"))
    with pytest.raises(BadInput, match="is not UTF-8") as error:
        find_splits(tmp_path)
    command = str(error.value).partition("rename it: ")[2].replace("NAME", f"'{tmp_path}/train/forêt'")
    subprocess.run(["bash", "-c", command], check=True)
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["forêt", "light"]


def test_text_files_keep_such_names(tmp_path):
    write_text(tmp_path / "x.json", json.dumps(["caf\udce9", "ä"], ensure_ascii=False))
    assert json.loads((tmp_path / "x.json").read_bytes()) == ["caf\udce9", "ä"]
    assert "ä".encode() in (tmp_path / "x.json").read_bytes()
