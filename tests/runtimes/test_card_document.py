"""The examples of docs/card.md, each beside a small engine of its own."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vitkit.runtimes import BadArtifact, Classification, ImageSpec, ModelCard, Semantic, Tensors, open_engine
from vitkit.runtimes.card import CARD_FILE, FORMAT
from vitkit.runtimes.panoptic.results import MergeParameters, Panoptic

TEXT = (Path(__file__).parents[2] / "docs" / "card.md").read_text(encoding="utf-8")
EXAMPLES = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)]
LOGITS, PROBABILITIES, PANOPTIC, SEMANTIC, TENSORS = EXAMPLES
KINDS = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def write(folder: Path, body: dict) -> Path:
    (folder / CARD_FILE).write_text(json.dumps(body), encoding="utf-8")
    return folder


def save_onnx(folder: Path, body: dict, constants: dict[str, np.ndarray]) -> None:
    """A graph with the card's input and outputs that returns constants, and reads its input."""
    (given,) = body["inputs"]
    nodes = [
        helper.make_node("Cast", [given["name"]], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["float"], ["one"], axes=[1, 2, 3]),
        helper.make_node("Mul", ["one", "zero"], ["nothing"]),
    ]
    values = [numpy_helper.from_array(np.float32(0), "zero")]
    for name, value in constants.items():
        kind = KINDS[str(value.dtype)]
        nodes.append(helper.make_node("Cast", ["nothing"], [f"{name}:cast"], to=kind))
        nodes.append(helper.make_node("Reshape", [f"{name}:cast", f"{name}:shape"], [f"{name}:nothing"]))
        nodes.append(helper.make_node("Add", [f"{name}:value", f"{name}:nothing"], [name]))
        values.append(numpy_helper.from_array(value, f"{name}:value"))
        values.append(numpy_helper.from_array(np.array([-1] + [1] * (value.ndim - 1)), f"{name}:shape"))
    infos = [
        [helper.make_tensor_value_info(t["name"], KINDS[t["dtype"]], t["shape"]) for t in body[side]]
        for side in ("inputs", "outputs")
    ]
    graph = helper.make_graph(nodes, "example", *infos, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")


def test_logits(tmp_path, photo):
    save_onnx(tmp_path, LOGITS, {"scores": np.array([[0, 2, 1]], np.float32)})
    with open_engine(write(tmp_path, LOGITS)) as engine:
        result = engine(photo)
    assert isinstance(result, Classification)
    assert [label.name for label in result.top] == ["dog", "horse", "cat"]
    assert result.probability == pytest.approx(np.exp(2) / (np.exp(2) + np.exp(1) + 1))


def test_probabilities(tmp_path, photo):
    import openvino
    from openvino import opset13 as op

    pixels = op.parameter([1, 32, 32, 3], np.uint8, name="pixels")
    nothing = op.multiply(op.reduce_max(op.convert(pixels, "f32"), [1, 2, 3]), np.float32(0))
    likely = op.add(op.constant(np.array([[0.1, 0.2, 0.7]], np.float32)), op.unsqueeze(nothing, 1))
    likely.output(0).set_names({"likely"})
    pixels.output(0).set_names({"pixels"})
    openvino.save_model(openvino.Model([likely], [pixels]), tmp_path / "model.xml", compress_to_fp16=False)
    with open_engine(write(tmp_path, PROBABILITIES)) as engine:
        result = engine(photo)
    assert [(label.name, round(label.probability, 4)) for label in result.top] == [
        ("horse", 0.7),
        ("dog", 0.2),
        ("cat", 0.1),
    ]


def test_panoptic(tmp_path, photo):
    masks = np.full((1, 8, 16, 16), -9, np.float32)
    masks[0, 3, :, :8], masks[0, 5, :, 8:] = 9, 9
    classes = np.zeros((1, 8, 4), np.float32)
    classes[0, :, 3], classes[0, 3], classes[0, 5] = 9, [9, 0, 0, 0], [0, 0, 9, 0]
    save_onnx(tmp_path, PANOPTIC, {"mask_logits": masks, "class_logits": classes})
    with open_engine(write(tmp_path, PANOPTIC)) as engine:
        result = engine(photo)
    assert isinstance(result, Panoptic)
    assert result.ids.shape == photo.shape[:2]
    assert sorted((segment.label, segment.thing) for segment in result.segments) == [
        ("person", True),
        ("sky", False),
    ]


@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize("name", [b"sc\xff\xfees", b"\xed\xa0\x80abc", b"a\x1b[2Jb"])
def test_a_tensor_whose_name_is_no_text_is_an_error_of_the_artifact(tmp_path, target, name):
    save_onnx(tmp_path, LOGITS, {"scores": np.array([[0, 2, 1]], np.float32)})
    content = (tmp_path / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(content.replace(b"scores", name))
    with pytest.raises(BadArtifact, match=r"not UTF-8|does not describe") as error:
        open_engine(write(tmp_path, {**LOGITS, "target": target}))
    assert str(error.value).isprintable()


def test_semantic(tmp_path, photo):
    scores = np.zeros((1, 3, 16, 16), np.float32)
    scores[0, 2, :8], scores[0, 0, 8:] = 9, 9
    save_onnx(tmp_path, SEMANTIC, {"scores": scores})
    with open_engine(write(tmp_path, SEMANTIC)) as engine:
        result = engine(photo)
    assert isinstance(result, Semantic)
    assert result.classes.shape == photo.shape[:2]
    assert {result.labels[i]: share for i, share in result.shares().items()} == {"road": 0.5, "sky": 0.5}


def test_tensors(tmp_path, photo):
    boxes, classes = np.random.default_rng(0).normal(size=(1, 10, 4)).astype(np.float32), np.arange(10)[None]
    save_onnx(tmp_path, TENSORS, {"boxes": boxes, "classes": classes})
    with open_engine(write(tmp_path, TENSORS)) as engine:
        result = engine(photo)
    assert isinstance(result, Tensors)
    assert np.array_equal(result["boxes"], boxes[0])
    assert np.array_equal(result["classes"], classes[0])


@pytest.mark.parametrize("body", EXAMPLES, ids=["logits", "probabilities", "panoptic", "semantic", "tensors"])
def test_every_required_field_is_named_when_it_lacks(tmp_path, body):
    needed = re.findall(r"^\| (`.*?) \| required \|", TEXT, re.M)
    names = [name for cell in needed for name in re.findall(r"`(\w+)`", cell)]
    assert {"format", "inputs", "image", "engine", "files"} <= set(names)
    assert len(names) == 10
    for name in (*names, "image.size", "inputs.shape"):
        changed = json.loads(json.dumps(body))
        place, _, key = name.rpartition(".")
        inner = changed[place] if place else changed
        del (inner[0] if isinstance(inner, list) else inner)[key]
        with pytest.raises(BadArtifact) as error:
            open_engine(write(tmp_path, changed))
        place = f"{place}[0]." if place == "inputs" else f"{place}." if place else ""
        assert f"'{place}{key}'" in str(error.value)
        assert name == "format" or "card.json lacks" in str(error.value)


@pytest.mark.parametrize("name", ["labels", "decode.masks", "decode.classes", "decode.things"])
def test_what_a_panoptic_card_lacks(tmp_path, name):
    changed = json.loads(json.dumps(PANOPTIC))
    place, _, key = name.rpartition(".")
    del (changed[place] if place else changed)[key]
    changed.pop("label_ids")
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(BadArtifact, match=rf"card\.json lacks '{name}'.*docs/card\.md"):
        open_engine(write(tmp_path, changed))


@pytest.mark.parametrize(("body", "key"), [(LOGITS, "logit"), (PANOPTIC, "thing_treshold")])
def test_a_misspelt_role_is_refused(tmp_path, body, key):
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(BadArtifact, match=rf"unknown fields 'decode\.{key}'"):
        open_engine(write(tmp_path, {**body, "decode": {**body["decode"], key: "scores"}}))


def test_the_document_names_every_field_and_default():
    described = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", TEXT, re.M))))
    known = {field.name for kind in (ModelCard, ImageSpec) for field in fields(kind)}
    assert described == known | {"format"}
    assert LOGITS["format"] == FORMAT
    settings = {key: value for key, value in PANOPTIC["decode"].items() if key in MergeParameters().__dict__}
    assert settings == MergeParameters().__dict__
    for key, value in {"crop_pct": 0.9, "pad": 0, "fit": "cover", "layout": "NHWC", "dtype": "uint8"}.items():
        assert getattr(ImageSpec((1, 1)), key) == value
        assert re.search(rf"^\| `{key}` \| `?{value}`? \|", TEXT, re.M)
