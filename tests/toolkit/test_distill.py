from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_pictures
from PIL import Image
from safetensors.torch import save_file
from test_train import TINY

from vitkit.models import Labels, build, configure, run_card
from vitkit.runtimes.errors import BadRequest
from vitkit.runtimes.image import prepare
from vitkit.torchvision_shim import timm
from vitkit.train import train
from vitkit.train.distill import Teacher, distillation_loss

CARD = run_card(
    "ps_vit_nano", configure("ps_vit_nano", {"num_classes": 2, "image_size": 32}), Labels(("a", "b"))
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes that brightness tells apart."""
    return write_pictures(tmp_path_factory.mktemp("data"), 16, 8)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_soft_loss_is_the_divergence_of_the_probabilities(temperature):
    generator = torch.Generator().manual_seed(0)
    own, told = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64).unbind()
    p, q = (torch.exp(x / temperature) for x in (told, own))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    assert float(distillation_loss(own, told, "soft", temperature)) == pytest.approx(float(expected), 1e-5)
    assert float(distillation_loss(told, told, "soft", temperature)) == pytest.approx(0, abs=1e-6)
    hard = -torch.log_softmax(own, 1)[torch.arange(5), told.argmax(1)].mean()
    assert float(distillation_loss(own, told, "hard", temperature)) == pytest.approx(float(hard))


def test_a_timm_teacher_sees_the_photograph_as_it_was_trained_to(tmp_path):
    # Seeded: the tolerance below depends on the weights.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("test_vit", num_classes=2)
    save_file(network.state_dict(), tmp_path / "teacher.safetensors")
    teacher = Teacher(f"timm:test_vit={tmp_path / 'teacher.safetensors'}", CARD)
    y, x = np.mgrid[:32, :32]
    photo = np.stack([64 + y * 4, 64 + x * 4, 64 + (x + y) * 2], axis=2).astype(np.uint8)
    seen = torch.from_numpy(prepare(photo, CARD.image))[None]
    known = timm.data.resolve_model_data_config(network)
    direct = timm.data.create_transform(**{**known, "crop_pct": 1.0, "interpolation": "bicubic"})
    with torch.no_grad():
        expected = network.eval()(direct(Image.fromarray(photo))[None])
    # Scaled as floats rather than bytes.
    assert torch.allclose(teacher.logits(seen), expected, atol=0.02)
    assert not any(p.requires_grad for p in teacher.network.parameters())


def test_a_student_comes_to_agree_with_its_teacher_against_the_labels(data, tmp_path):
    options = {**TINY.options, "dropout": 0.0, "drop_path": 0.0}
    config = replace(TINY, options=options, epochs=12, track="none")
    teacher = train(config, data, tmp_path / "teacher", progress=False)
    # The student's data name the classes the other way round, folder by folder.
    for split in ("train", "val"):
        for name, other in (("light", "dark"), ("dark", "light")):
            shutil.copytree(data / split / other, tmp_path / "swapped" / split / name)
    for kind in ("soft", "hard"):
        taught = replace(config, teacher=str(teacher), distill=kind, distill_weight=1.0, label_smoothing=0.0)
        run = train(taught, tmp_path / "swapped", tmp_path / kind, progress=False)
        log = json.loads((run / "log.json").read_text())
        assert log[-1]["top1"] < 20
        assert log[-1]["teacher"] < log[0]["teacher"]
        assert log[-1]["label"] > log[-1]["teacher"]
    both = replace(config, teacher=str(teacher), distill_weight=0.0)
    plain = train(both, data, tmp_path / "plain", progress=False)
    assert (plain / "model.safetensors").read_bytes() == (teacher / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("timm:no_such_net", "timm:no_such_net cannot be had"),
        ("timm:test_vit=missing.safetensors", r"missing\.safetensors"),
        ("nowhere", "nowhere"),
    ],
)
def test_a_teacher_that_there_is_not_says_so(teacher, message):
    with pytest.raises(Exception, match=message) as error:
        Teacher(teacher, CARD)
    assert type(error.value).__module__ == "vitkit.runtimes.errors"


def test_a_teacher_of_other_classes_is_refused(data, tmp_path):
    run = train(replace(TINY, epochs=1), data, tmp_path / "run", progress=False)
    with pytest.raises(BadRequest, match="knows the classes dark, light; the data has the classes a, b"):
        Teacher(str(run), CARD)
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "three.safetensors")
    with pytest.raises(BadRequest, match="test_vit"):
        Teacher(f"timm:test_vit={tmp_path / 'three.safetensors'}", CARD)
    assert build("ps_vit_nano").config.num_classes == 10
