from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

import numpy as np
import pytest

# Before any test module imports a vendor's package, which would report this run.
import vitkit.runtimes  # noqa: F401

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def write_pictures(
    folder: Path, train: int = 11, val: int = 5, names: tuple[str, ...] = ("dark", "light")
) -> Path:
    """Folders of classes that brightness tells apart, in noise; `train` and `val` images of each."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(80 + 90 * number, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def real_photos() -> Path:
    """300 real photographs in ImageNet's layout, where the machine has them."""
    folder = SHARED / "imagenet-sample"
    if not folder.is_dir():
        pytest.skip(f"real photographs are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def mobilenet(real_photos, tmp_path_factory) -> Path:
    """A TFLite file that Google made and Coral published, with a card written by hand."""
    import csv
    import shutil

    from vitkit.runtimes.card import ImageSpec, ModelCard, TensorSpec, write_card

    weights = SHARED / "weights" / "mobilenet_v2_imagenet_int8.tflite"
    if not weights.is_file():
        pytest.skip(f"the network is not at {weights}")
    with (real_photos / "classes.csv").open(newline="") as file:
        rows = {int(row["index"]): (row["wnid"], row["name"]) for row in csv.DictReader(file)}
    classes = [rows.get(i, (f"n{i}", f"class {i}")) for i in range(1000)]
    folder = tmp_path_factory.mktemp("mobilenet")
    shutil.copy(weights, folder / "model.tflite")
    card = ModelCard(
        name="mobilenet_v2",
        task="classification",
        target="tflite",
        precision="int8",
        inputs=(TensorSpec("input", (1, 224, 224, 3), "uint8"),),
        outputs=(TensorSpec("Identity", (1, 1001), "float32"),),
        image=ImageSpec((224, 224), crop_pct=0.875),
        # This network's class 0 is the background.
        labels=("background", *(name for _, name in classes)),
        label_ids=("background", *(wnid for wnid, _ in classes)),
        decode={"probabilities": "Identity"},
        engine="model.tflite",
        files={"model.tflite": None},
    )
    write_card(card, folder)
    return folder


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory) -> Path:
    """24 generated photographs of several sizes and formats, some in subfolders."""
    from PIL import Image

    from vitkit.runtimes.image import generated_photos

    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    sizes = [(48, 64), (64, 48), (100, 80)]
    for i in range(24):
        photo = generated_photos(1, seed=100 + i, size=sizes[i % 3])[0]
        name = f"more/{i:02}.png" if i % 4 == 0 else f"{i:02}.jpg"
        Image.fromarray(photo).save(folder / name, quality=95)
    return folder


def lively(model):
    """Give an untrained model what training would: BatchNorm statistics and offsets of several pixels."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_mean"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif "offset_layers" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif name == "head.weight":
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            elif "weight" in name and tensor.ndim == 2:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor.shape[1] ** -0.5)
    return model.eval()


@pytest.fixture(autouse=True)
def log_as_imported():
    """The command line shows the log by itself; in one process the next test would find it changed."""
    log = logging.getLogger("vitkit")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def one_conversion_each():
    """TFLite's converter takes many seconds for the smallest network, so each is converted once."""
    import vitkit.exporters.tflite as exporter

    convert, made = exporter.convert, {}

    def once(source, image, batch):
        # The module is kept with its result, so that no other takes its place in memory.
        key = (id(source.module), image, batch)
        if key not in made:
            made[key] = (source.module, convert(source, image, batch))
        return made[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "convert", once)
        yield


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """A run of the nano model whose sampling points move, as after training."""
    from vitkit.models import Labels, run_card
    from vitkit.runs import save_run, untrained_run

    run = untrained_run("ps_vit_nano", {})
    model = lively(run.model)
    card = run_card("ps_vit_nano", model.config, Labels(tuple(f"class {i}" for i in range(10))))
    config = {"model": "ps_vit_nano", "options": dataclasses.asdict(model.config)}
    return save_run(tmp_path_factory.mktemp("runs") / "nano", model, card, config)


@pytest.fixture(scope="session")
def source(run_folder):
    from vitkit.exporters.source import Source
    from vitkit.runs import load_run

    run = load_run(run_folder)
    return Source(run.model, run.card)


@pytest.fixture(scope="session")
def calibration(photo_folder):
    from vitkit.calibration.dataset import calibration_set

    return calibration_set(photo_folder, 24)


@pytest.fixture(scope="session")
def artifact_of(source, calibration, photo_folder, tmp_path_factory):
    """Artifacts of the nano run by (target, precision), made once, whatever the number of test processes."""
    from filelock import FileLock

    from vitkit import exporters

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "artifacts"
    folder.mkdir(exist_ok=True)

    def get(target: str, precision: str) -> Path:
        if precision == "bf16":
            skip_without_bf16()
        path = folder / f"{target}-{precision}"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                given = calibration if precision == "int8" else None
                exporters.export(source, path, target=target, precision=precision, calibration=given)
        return path

    return get


def skip_without_bf16() -> None:
    from vitkit.runtimes.openvino import capabilities

    if "BF16" not in capabilities()["CPU"]:
        pytest.skip("this CPU has no bf16 instructions")


@pytest.fixture
def photo() -> np.ndarray:
    from vitkit.runtimes.image import generated_photos

    return generated_photos(1, seed=7, size=(90, 120))[0]
