"""A family of models is one row: what is added here as a row works everywhere a built-in family does."""

from __future__ import annotations

import ast
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from vitkit import BadArtifact, BadRequest
from vitkit.models import FAMILIES, MODELS, ModelInfo, build, configure, family_of, run_card
from vitkit.models.checkpoints import load_checkpoint
from vitkit.models.family import CardParts, Family, Labels, Layout, Model, ModelConfig, Place
from vitkit.runs import load_run, save_run
from vitkit.runtimes.card import ImageSpec, TensorSpec
from vitkit.runtimes.tasks import TASKS
from vitkit.train.task import open_task

TOOLKIT = Path(__file__).resolve().parents[2] / "toolkit"


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    width: int = 4


class Toy(Model):
    output_names = ("logits",)

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(3, config.width, 3)
        self.head = nn.Linear(config.width, config.num_classes)

    def deploy(self, images):
        return (self.head(self.stem(images).mean((2, 3))),)


def toy_card(config: ToyConfig, labels: Labels) -> CardParts:
    image = ImageSpec((config.image_size, config.image_size), layout="NCHW", dtype="float32")
    outputs = (TensorSpec("logits", (None, config.num_classes), "float32"),)
    return CardParts(outputs, image, {"logits": "logits"})


def only_seven() -> Labels:
    return Labels(tuple("abcdefg"))


@pytest.fixture
def toy(monkeypatch):
    layout = Layout(lambda config, key, shape: Place((f"net.{key}",), shape), heads=r"head\..*")
    row = Family(
        config=ToyConfig,
        module=Toy,
        task="classification",
        card=toy_card,
        training="test_families:ToyTraining",
        layouts={"toynet": layout},
        labels={7: only_seven},
    )
    monkeypatch.setitem(FAMILIES, "toy", row)
    monkeypatch.setitem(MODELS, "toy_small", ModelInfo(ToyConfig(num_classes=7, image_size=32)))
    return row


class ToyTraining:
    def __init__(self, config, data) -> None:
        self.given = config, data


def test_a_new_row_is_built_configured_saved_and_read_back(toy, tmp_path):
    config = configure("toy_small", {"width": "5"})
    model = build("toy_small", width="5")
    assert family_of(config) is toy
    assert model.stem.out_channels == 5
    card = run_card("toy_small", config)
    assert card.task == "classification"
    assert card.labels == tuple("abcdefg")
    assert run_card("toy_small", configure("toy_small", {"num_classes": 3})).labels == ("0", "1", "2")
    save_run(tmp_path / "run", model, card, {"model": "toy_small", "options": asdict(config)})
    images = torch.rand(1, 3, 32, 32)
    read = load_run(tmp_path / "run")
    assert torch.equal(read.model.deploy(images)[0], model.deploy(images)[0])


def test_a_new_rows_checkpoints_are_imported_and_others_refused(toy, tmp_path):
    model = build("toy_small")
    theirs = {f"net.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save(theirs, tmp_path / "a.pth")
    imported = load_checkpoint(tmp_path / "a.pth", "toynet", "toy_small", {})
    assert torch.equal(imported.model.head.weight, model.head.weight)
    with pytest.raises(BadRequest, match="holds no toy_small, use --format toynet"):
        load_checkpoint(tmp_path / "a.pth", "kmax", "toy_small", {})
    with pytest.raises(BadRequest, match="the formats are psvit, kmax, toynet"):
        load_checkpoint(tmp_path / "a.pth", "onnx", "toy_small", {})


def test_a_new_row_names_the_class_that_trains_it(toy):
    task = open_task(family_of(configure("toy_small", {})).training, "config", "data")
    assert task.given == ("config", "data")


def test_a_run_of_a_family_that_is_not_there_is_refused(toy, tmp_path, monkeypatch):
    model = build("toy_small")
    save_run(tmp_path / "run", model, run_card("toy_small", model.config), {})
    monkeypatch.delitem(MODELS, "toy_small")
    with pytest.raises(BadArtifact, match="no model 'toy_small'"):
        load_run(tmp_path / "run")


def test_every_family_has_a_task_and_a_config_of_its_own():
    assert {family.task for family in FAMILIES.values()} <= TASKS.keys()
    assert len({family.config for family in FAMILIES.values()}) == len(FAMILIES)
    assert {family_of(info.config).config for info in MODELS.values()} == {
        family.config for family in FAMILIES.values()
    }


def test_no_code_asks_for_the_type_of_a_config():
    """A switch over families anywhere would be a place that a new row does not reach."""
    for path in TOOLKIT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                assert not ast.unparse(node.args[1]).endswith("Config"), f"{path}:{node.lineno}"
