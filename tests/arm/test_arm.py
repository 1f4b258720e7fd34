"""Engines on an emulated ARM processor against the same engines here; `make test-arm` prepares it."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

if "VITKIT_ARM" not in os.environ:
    pytest.skip("the emulated ARM machine is not prepared: make test-arm", allow_module_level=True)

import torch
from conftest import SHARED, lively
from outputs import outputs

from vitkit import exporters
from vitkit.bench import BenchOptions
from vitkit.calibration.dataset import calibration_set
from vitkit.devices.link import Link, bench_on
from vitkit.devices.registry import Device
from vitkit.exporters.source import Source
from vitkit.models import build, run_card
from vitkit.runtimes.card import read_card
from vitkit.runtimes.image import generated_photos, prepare_batch, sample_photos

PYTHON = Path(os.environ["VITKIT_ARM"]).resolve() / "python"
ROOT = Path(__file__).resolve().parents[2]
NETWORKS = (os.environ.get("VITKIT_ARM_NETWORKS") or "ps_vit_nano remax_nano").split()
# The Cortex-A72 is refused what OpenVINO quantised here.
KINDS = [(target, precision) for target in ("tflite", "onnx") for precision in ("fp32", "int8")]
ENGINES = [(network, *kind) for network in NETWORKS for kind in [*KINDS, ("openvino", "fp32")]]
# Without the dot products of later ARMs, as on a Raspberry Pi 4, and with all of them.
PROCESSORS = ("cortex-a72", "max")
IMAGES = 8


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """vitkit from its wheel, for the ARM side."""
    folder = tmp_path_factory.mktemp("arm") / "vitkit"
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder)]
    subprocess.run([sys.executable, *pip, str(ROOT)], check=True)
    return folder


@pytest.fixture(scope="session")
def photos() -> list[tuple[str, np.ndarray]]:
    """Real photographs where there are some, else generated ones."""
    folder = SHARED / "imagenet-sample"
    if folder.is_dir():
        return sample_photos(folder, IMAGES)
    return [(str(i), photo) for i, photo in enumerate(generated_photos(IMAGES, seed=3))]


@pytest.fixture(scope="session")
def exported(tmp_path_factory, photo_folder):
    """An artifact by network, target and precision; the networks have random weights, but alive."""
    sources: dict[str, Source] = {}
    calibration = calibration_set(photo_folder, 24)

    def make(network: str, target: str, precision: str) -> Path:
        if network not in sources:
            model = lively(build(network))
            for parameter in model.parameters():
                # TFLite's converter would leave out what a norm of zero silences. Little, so that which
                # slot a pixel belongs to stays clear in a network that learnt nothing.
                if not parameter.any():
                    torch.nn.init.uniform_(parameter, 0.02, 0.1)
            sources[network] = Source(model, run_card(network, model.config))
        out = tmp_path_factory.mktemp("engines") / f"{network}-{target}-{precision}"
        wanted = calibration if precision == "int8" else None
        exporters.export(sources[network], out, target=target, precision=precision, calibration=wanted)
        return out

    return make


@pytest.fixture(scope="session")
def artifacts(exported) -> dict[tuple[str, str, str], Path]:
    return {key: exported(*key) for key in ENGINES}


class Arm:
    """Runs artifacts on the ARM side, those asked for together in one process: its start takes seconds."""

    def __init__(self, installed: Path, folder: Path, photos: list[tuple[str, np.ndarray]]) -> None:
        self.installed, self.folder, self.photos = installed, folder, photos

    def pictures(self, artifact: Path) -> np.ndarray:
        return prepare_batch([photo for _, photo in self.photos], read_card(artifact).image)

    def run(self, artifacts: list[Path], processor: str) -> list[dict[str, np.ndarray]]:
        asked: list[Path] = []
        for number, artifact in enumerate(artifacts):
            asked += [self.folder / f"{number}.npy", artifact]
            np.save(asked[-2], self.pictures(artifact))
        script, out = Path(__file__).with_name("outputs.py"), self.folder / "outputs.npz"
        env = {**os.environ, "PYTHONPATH": str(self.installed), "ARM_CPU": processor}
        subprocess.run([PYTHON, script, out, *asked], env=env, check=True, stderr=subprocess.PIPE)
        answers: list[dict[str, np.ndarray]] = [{} for _ in artifacts]
        with np.load(out) as found:
            for key, values in found.items():
                number, name = key.split()
                answers[int(number)][name] = values
        return answers


@pytest.fixture(scope="session")
def arm(installed, tmp_path_factory, photos) -> Arm:
    return Arm(installed, tmp_path_factory.mktemp("feeds"), photos)


@pytest.fixture(scope="session")
def answers(arm, artifacts):
    """What every artifact answers on a processor."""

    @cache
    def of(processor: str) -> dict[tuple[str, str, str], dict[str, np.ndarray]]:
        return dict(zip(artifacts, arm.run(list(artifacts.values()), processor), strict=True))

    return of


def check(here: dict[str, np.ndarray], there: dict[str, np.ndarray], what: str) -> None:
    """Outputs of 8 images agree one by one, and so do the best classes."""
    assert here.keys() == there.keys()
    for name, values in here.items():
        a, b = (each.reshape(IMAGES, -1).astype(np.float64) for each in (values, there[name]))
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        print(f"{what} {name}: cosine at least {cosines.min():.6f}")
        assert cosines.min() >= 0.999
    scores = next(name for name in ("logits", "classes", "Identity") if name in here)
    assert np.array_equal(here[scores].argmax(-1), there[scores].argmax(-1))


def test_it_is_another_machine_with_nothing_but_the_runtime(installed):
    code = (
        "import platform, importlib.util as u, vitkit; print(platform.machine(), vitkit.__file__, "
        "[m for m in ('torch', 'timm', 'onnx') if u.find_spec(m)])"
    )
    env = {**os.environ, "PYTHONPATH": str(installed)}
    found = subprocess.run([PYTHON, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["aarch64", f"{installed}/vitkit/__init__.py", "[]"]


@pytest.mark.parametrize("engine", ENGINES, ids="-".join)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_engines_answer_as_here(arm, artifacts, answers, engine, processor):
    here = outputs(arm.pictures(artifacts[engine]), artifacts[engine])
    check(here, answers(processor)[engine], f"{' '.join(engine)} on {processor}")


@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_file_that_others_made_answers_as_here(arm, mobilenet, processor):
    (there,) = arm.run([mobilenet], processor)
    check(outputs(arm.pictures(mobilenet), mobilenet), there, f"mobilenet_v2 int8 on {processor}")


def test_what_openvino_cannot_open_there_is_told(arm, exported):
    with pytest.raises(subprocess.CalledProcessError) as found:
        arm.run([exported("ps_vit_nano", "openvino", "int8")], "cortex-a72")
    assert b"on ARM it takes few INT8 graphs: export with --target tflite or onnx" in found.value.stderr


def test_a_bench_there(artifacts, tmp_path):
    device = Device("arm", "local", python=str(PYTHON), folder=str(tmp_path / "kept"))
    with Link(device) as link:
        condition = link.check()
    checks = {one.name: one for one in condition.findings}
    assert all(checks[f"run {target}"].ok for target in ("onnx", "openvino", "tflite"))
    paths = [path for key, path in artifacts.items() if key[0] == NETWORKS[0]]
    options = BenchOptions(duration=0.05, pool_size=2, threads=1, scopes=("image",))
    reports = bench_on(device, paths, options)
    assert [(one.target, one.precision) for one in reports] == [key[1:] for key in ENGINES[: len(paths)]]
    assert {one.environment["cpu"]["architecture"] for one in reports} == {"aarch64"}
