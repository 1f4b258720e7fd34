from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkit.runtimes import BadArtifact, ImageSpec, ModelCard, TensorSpec, read_artifact
from vitkit.runtimes.card import CARD_FILE, FORMAT, read_card, write_card

NAMES = st.text(min_size=1, max_size=8).filter(lambda text: "\x00" not in text)


def example(**changes) -> ModelCard:
    fields = {
        "name": "m",
        "task": "classification",
        "target": "onnx",
        "precision": "fp32",
        "inputs": (TensorSpec("image", (None, 4, 6, 3), "uint8"),),
        "outputs": (TensorSpec("logits", (None, 2), "float32"),),
        "image": ImageSpec((4, 6)),
        "labels": ("a", "b"),
        "engine": "model.onnx",
        "files": {"model.onnx": None},
    }
    return ModelCard(**{**fields, **changes})


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(NAMES, max_size=4),
    shape=st.lists(st.none() | st.integers(1, 10**6), min_size=1, max_size=5),
    dtype=st.sampled_from(["uint8", "float32", "int64"]),
    crop=st.floats(0.01, 1),
    notes=st.dictionaries(NAMES, st.integers() | NAMES | st.lists(st.integers()), max_size=3),
)
def test_a_written_card_reads_back_equal(tmp_path_factory, labels, shape, dtype, crop, notes):
    folder = tmp_path_factory.mktemp("card")
    card = example(
        labels=tuple(labels),
        inputs=(TensorSpec("x", tuple(shape), dtype),),
        image=ImageSpec((4, 6), crop_pct=crop),
        provenance=notes,
    )
    write_card(card, folder)
    assert read_card(folder) == card


def write_body(folder, change):
    write_card(example(), folder)
    path = folder / CARD_FILE
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b.update(format=FORMAT + 1), "upgrade it with: pip install"),
        (lambda b: b.update(format="1"), "'format' is '1'"),
        (lambda b: b.pop("format"), "'format' is None"),
        (lambda b: b.pop("inputs"), "inputs"),
        (lambda b: b.update(surprise=1), "surprise"),
        (lambda b: b.update(inputs=[]), "inputs"),
        (lambda b: b["inputs"][0].update(shape=[0, 3]), "image"),
        (lambda b: b["inputs"][0].update(shape=[True, 3]), "image"),
        (lambda b: b["inputs"][0].update(dtype="bool"), "bool"),
        (lambda b: b["image"].update(size=[4]), "image.size"),
        (lambda b: b["image"].update(size=[4, -1]), "image.size"),
        (lambda b: b["image"].update(std=[0, 1, 1]), "image.std"),
        (lambda b: b["image"].update(crop_pct=0), "crop_pct"),
        (lambda b: b["image"].update(mean=[float("nan"), 0, 0]), "image.mean"),
        (lambda b: b.update(precision="int4"), "int4"),
        (lambda b: b.update(decode={"logits": {}}), "decode.logits"),
        (lambda b: b["image"].update(layout="HWC"), "HWC"),
        (lambda b: b.update(labels="ab"), "labels"),
        (lambda b: b.update(label_ids=["a"]), "2 labels but 1"),
        (lambda b: b.update(engine="other.onnx"), "other.onnx"),
        (lambda b: b.update(files={"../evil": None}), "../evil"),
        (lambda b: b.update(files={"model.onnx": 5}), "5"),
        (lambda b: b.update(name=7), "7"),
        (lambda b: b.update(image=None), "image"),
    ],
)
def test_a_bad_card_is_named(tmp_path, change, words):
    write_body(tmp_path, change)
    with pytest.raises(BadArtifact) as error:
        read_card(tmp_path)
    assert words in str(error.value)
    assert CARD_FILE in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"a": 1, "a": 2}', "\xff\xfe", '{"format": 1}']
)
def test_damaged_json_is_a_bad_artifact(tmp_path, text):
    (tmp_path / CARD_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(BadArtifact):
        read_card(tmp_path)


def test_folders_that_are_no_artifact(tmp_path, run_folder):
    with pytest.raises(BadArtifact, match="does not exist"):
        read_artifact(tmp_path / "nowhere")
    with pytest.raises(BadArtifact, match=r"holds no card\.json"):
        read_artifact(tmp_path)
    (tmp_path / "file.onnx").write_bytes(b"x")
    with pytest.raises(BadArtifact, match="is a file"):
        read_artifact(tmp_path / "file.onnx")
    with pytest.raises(BadArtifact, match="vitkit export"):
        read_artifact(run_folder)


def test_every_damaged_file_is_named(tmp_path, artifact_of):
    folder = tmp_path / "copy"
    shutil.copytree(artifact_of("openvino", "fp32"), folder)
    (folder / "model.bin").unlink()
    body = bytearray((folder / "model.xml").read_bytes())
    body[len(body) // 2] ^= 1
    (folder / "model.xml").write_bytes(bytes(body))
    with pytest.raises(BadArtifact) as error:
        read_artifact(folder)
    assert "model.bin is missing" in str(error.value)
    assert "model.xml" in str(error.value)
