from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkit.runtimes import (
    BadArtifact,
    BadRequest,
    ImageSpec,
    ModelCard,
    TensorSpec,
    VitkitError,
    read_artifact,
)
from vitkit.runtimes.card import CARD_FILE, FORMAT, read_card, write_card
from vitkit.runtimes.image import prepare
from vitkit.runtimes.tasks import decoder

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)


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
    shape=st.lists(st.none() | st.integers(1, 60), min_size=1, max_size=5),
    dtype=st.sampled_from(["uint8", "float32", "int64"]),
    crop=st.floats(0.1, 1),
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


def write_body(folder, change, card=None):
    write_card(card or example(), folder)
    path = folder / CARD_FILE
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b.update(format=FORMAT + 1), "upgrade it with: pip install"),
        (lambda b: b.update(format="1"), "'format' is '1'"),
        (lambda b: b.pop("format"), "lacks 'format'"),
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
        (lambda b: b["image"].update(crop_pct=1e-320), "image.crop_pct is 1e-320"),
        (lambda b: b["image"].update(crop_pct=1e-3), "from 0.1 to 1"),
        (lambda b: b["image"].update(crop_pct=True), "image.crop_pct is True"),
        (lambda b: b["image"].update(crop_pct="0.9"), "image.crop_pct is '0.9'"),
        (lambda b: b["image"].update(size=[10**6, 4]), "a side of image.size is 1000000"),
        (lambda b: b["image"].update(size=[4.0, 6]), "a side of image.size is 4.0"),
        (lambda b: b["image"].update(size=[True, 6]), "a side of image.size is True"),
        (lambda b: b["image"].update(size=[10**400, 6]), "a side of image.size is 1000"),
        (lambda b: b["image"].update(mean=[10**400, 0, 0]), "an item of image.mean is 1000"),
        (lambda b: b["image"].update(mean=[1e30, 0, 0]), "image.mean is 1e+30"),
        (lambda b: b["image"].update(mean=[0, 0]), "image.mean is [0, 0], not 3"),
        (lambda b: b["image"].update(std=[1e-320, 1, 1]), "image.std is 1e-320"),
        (lambda b: b["image"].update(std=[-1, 1, 1]), "image.std is -1"),
        (lambda b: b["image"].update(std=[1e30, 1, 1]), "image.std is 1e+30"),
        (lambda b: b["image"].update(std=[False, 1, 1]), "image.std is False"),
        (lambda b: b["image"].update(pad=256), "image.pad is 256"),
        (lambda b: b["image"].update(pad=1.5), "image.pad is 1.5"),
        (lambda b: b["image"].update(fit=["cover"]), "image.fit is ['cover']"),
        (lambda b: b["image"].update(fit={}), "image.fit is {}"),
        (lambda b: b["inputs"][0].update(dtype=["uint8"]), "dtype of 'image' is ['uint8']"),
        (lambda b: b["inputs"][0].update(shape=[1, -3]), "positive integers"),
        (lambda b: b["inputs"][0].update(shape=[10**10, 10**10]), "elements"),
        (lambda b: b["inputs"][0].update(shape=[1] * 9), "9 dimensions"),
        (lambda b: b["inputs"][0].update(shape=[10**400]), "elements"),
        (lambda b: b["inputs"][0].update(shape=[2.0]), "positive integers"),
        (lambda b: b["inputs"][0].update(name=""), "'inputs[0].name' is empty"),
        (lambda b: b["outputs"][0].update(name="\ud800"), "is not UTF-8"),
        (lambda b: b["outputs"][0].update(name="\x1b[2J"), "control characters"),
        (lambda b: b["outputs"].append(b["outputs"][0]), "two items of 'outputs' have one name"),
        (lambda b: b.update(labels=["a", "b\n"]), "control characters"),
        (lambda b: b.update(labels=["a" * 5000, "b"]), "longer than 1000"),
        (lambda b: b.update(decode={"top": 10**400}), "decode.top' is 1000"),
        (lambda b: b.update(decode={"top": True}), "decode.top"),
        (lambda b: b.update(decode={"top": 1e300}), "decode.top"),
        (lambda b: b.update(decode={"things": [1.5]}), "decode.things"),
        (lambda b: b.update(decode={"things": [True]}), "decode.things"),
        (lambda b: b.update(engine="*", files={"*": None}), "'*', which is not a plain file name"),
        (lambda b: b.update(engine="m[a]", files={"m[a]": None}), "not a plain file name"),
        (lambda b: b.update(engine="..", files={"..": None}), "not a plain file name"),
        (lambda b: b.update(engine="a/b", files={"a/b": None}), "not a plain file name"),
        (lambda b: b.update(engine="a\\b", files={"a\\b": None}), "not a plain file name"),
        (lambda b: b.update(engine="a\0b", files={"a\0b": None}), "not a plain file name"),
        (lambda b: b.update(engine="m" * 5000, files={"m" * 5000: None}), "(5002 characters)"),
        (lambda b: b.update(engine="m" * 5000), "'files' does not list"),
        (lambda b: b.update(engine=["model.onnx"]), "'engine' is ['model.onnx']"),
        (lambda b: b.update(files={f"{i}": None for i in range(101)}), "101 files"),
        (lambda b: b.update(files={"model.onnx": "abc"}), "not a SHA-256"),
        (lambda b: b.update(precision=["fp32"]), "'precision' is ['fp32']"),
        (lambda b: b.update(task=None), "'task' is None"),
        (lambda b: b.update(options={"a": 1e999}), "beyond the range"),
        (lambda b: b.update(provenance={"\udcff": 1}), "cannot be written in UTF-8"),
    ],
)
def test_a_bad_card_is_named(tmp_path, change, words):
    write_body(tmp_path, change)
    with pytest.raises(BadArtifact) as error:
        read_card(tmp_path)
    assert words in str(error.value)
    assert CARD_FILE in str(error.value)


def test_what_a_card_lacks_is_said_in_those_words(tmp_path):
    write_body(tmp_path, lambda b: (b.pop("outputs"), b.pop("precision")))
    with pytest.raises(BadArtifact, match=r"card\.json lacks 'precision', 'outputs'; see docs/card\.md"):
        read_card(tmp_path)
    write_body(tmp_path, lambda b: b["image"].pop("size"))
    with pytest.raises(BadArtifact, match=r"card\.json lacks 'image\.size'"):
        read_card(tmp_path)
    write_body(tmp_path, lambda b: b["inputs"][0].pop("dtype"))
    with pytest.raises(BadArtifact, match=r"card\.json lacks 'inputs\[0\]\.dtype'"):
        read_card(tmp_path)


@pytest.mark.parametrize("place", [(), ("image",), ("inputs", 0)])
def test_unknown_fields_are_refused_but_provenance_is_free(tmp_path, place):
    def change(body):
        for key in place:
            body = body[key]
        body["crop_pc"] = 1

    write_body(tmp_path, change)
    with pytest.raises(BadArtifact, match=r"unknown fields .*crop_pc.*docs/card\.md"):
        read_card(tmp_path)
    notes = {"mine": {"any": ["thing", None, 1.5, True]}}
    write_body(tmp_path, lambda b: b.update(provenance=notes))
    assert read_card(tmp_path).provenance == notes


def test_endless_nesting_is_refused(tmp_path):
    nested = []
    for _ in range(100):
        nested = [nested]
    write_body(tmp_path, lambda b: b.update(provenance={"a": nested}))
    with pytest.raises(BadArtifact, match="levels deep"):
        read_card(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_card_of_another_editor_is_read(tmp_path, encoding):
    write_card(example(labels=("ä", "b")), tmp_path)
    text = (tmp_path / CARD_FILE).read_text(encoding="utf-8")
    (tmp_path / CARD_FILE).write_bytes(text.encode(encoding))
    assert read_card(tmp_path) == example(labels=("ä", "b"))


@pytest.mark.parametrize("card", [{"labels": ("\udcff", "b")}, {"image": ImageSpec((4, 6), std=(0, 1, 1))}])
def test_a_card_that_could_not_be_read_is_not_written(tmp_path, card):
    with pytest.raises(BadRequest, match="'m' cannot be written"):
        write_card(example(**card), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [CARD_FILE, "model.onnx"])
def test_only_regular_files_of_an_artifact_are_read(tmp_path, name):
    write_card(example(), tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"x")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(BadArtifact, match=f"{name} .*not a regular file"):
        read_artifact(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(BadArtifact, match=f"{name} .*not a regular file"):
        read_artifact(tmp_path)
    (tmp_path / name).unlink()
    with (tmp_path / name).open("wb") as file:
        file.truncate(5 << 30)
    with pytest.raises(BadArtifact, match=f"{name} has {5 << 30} bytes; at most"):
        read_artifact(tmp_path)


def test_files_beside_the_engine_that_no_card_lists_are_named(tmp_path):
    write_card(example(engine="a.onnx", files={"a.onnx": None}), tmp_path)
    for name in ("a.onnx", "a.data", "b.data"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadArtifact, match=r"a\.data is not in the card\. "):
        read_artifact(tmp_path)


NUMBERS = (10**400, -1, 0, 1e-320, 1e308, float("nan"), float("inf"), [10**9] * 3, [1e-9] * 3, [10**5] * 2)
OTHERS = (True, None, "", "x" * 5000, "\ud800", "*", "../x", "a\0", [], [[]], {}, {"": None}, [None] * 3)
ABSURD = st.sampled_from((*NUMBERS, *OTHERS))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_gives_a_card_that_prepares_and_decodes_or_an_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("card")
    (folder / "model.onnx").write_bytes(b"")
    body = json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(example())}))
    values = ABSURD | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda items: st.lists(items, max_size=4) | st.dictionaries(st.text(max_size=5), items, max_size=3),
        max_leaves=6,
    )
    for _ in range(data.draw(st.integers(1, 2))):
        place, key = body, data.draw(st.sampled_from(sorted(body)))
        while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        place[key] = copy.deepcopy(data.draw(values))
    (folder / CARD_FILE).write_text(json.dumps(body))
    try:
        card = read_artifact(folder).card
        decoder(card)
    except VitkitError:
        return
    height, width = card.image.size
    assert prepare(np.zeros((5, 7, 3), np.uint8), card.image).size == 3 * height * width
    write_card(card, folder)
    assert read_card(folder) == card


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
