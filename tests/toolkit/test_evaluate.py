"""Accuracy on class folders: which class a folder is, and what the scores are worth."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image
from test_predict import classifier, run

from vitkit import BadArtifact, BadInput, BadRequest, ImageSpec, ModelCard, TensorSpec
from vitkit.data.coco import Category
from vitkit.data.folder import find_splits, labelled_images
from vitkit.evaluate import Network, class_indices
from vitkit.evaluate.accuracy import evaluate
from vitkit.evaluate.classes import matching_categories
from vitkit.evaluate.results import Table
from vitkit.report.results import read_results
from vitkit.runtimes import tasks
from vitkit.runtimes.errors import RunFailed
from vitkit.runtimes.image import prepare_batch, read_image

NFC, NFD = normalize("NFC", "café"), normalize("NFD", "café")
ONE_TO_TEN = tuple(sorted(str(i) for i in range(1, 11)))
ANIMALS = ("cat", "dog", "ape")


def card(labels, ids=None, outputs=(), decode=None) -> ModelCard:
    image = ImageSpec((8, 8), crop_pct=1.0, dtype="uint8")
    given = (TensorSpec("image", (None, 8, 8, 3), "uint8"),)
    outputs = outputs or (TensorSpec("logits", (None, len(labels)), "float32"),)
    return ModelCard(
        "m", "classification", "onnx", "fp32", given, outputs, image, labels, ids, decode=decode or {}
    )


@pytest.mark.parametrize(
    ("labels", "ids", "folders", "expected"),
    [
        (ONE_TO_TEN, None, ["1", "10", "2", "9"], [0, 1, 2, 9]),
        (ANIMALS, None, ["ape", "cat"], [2, 0]),
        (ANIMALS, None, ["0", "2"], [0, 2]),
        (ANIMALS, ("n2", "n1", "n0"), ["n0", "n1"], [2, 1]),
        (ANIMALS, ("n2", "n1", "n0"), ["cat", "dog"], [0, 1]),
        (ANIMALS, ("n2", "n1", "n0"), ["n0", "dog"], [2, 1]),
        # Label ids of COCO have gaps, so they are no places.
        (ANIMALS, ("1", "2", "21"), ["1", "21"], [0, 2]),
        # Only one of two ways of naming fits all folders.
        (("1", "2", "3"), ("0", "1", "2"), ["0", "1"], [0, 1]),
        (("1", "2", "3"), ("0", "1", "2"), ["1", "3"], [0, 2]),
        (("01", "1"), None, ["1", "01"], [1, 0]),
        (("-1", "1"), None, ["1", "-1"], [1, 0]),
        (("crane", "owl", "crane"), ("n0", "n1", "n2"), ["n0", "n2"], [0, 2]),
        (("crane", "owl", "crane"), None, ["owl"], [1]),
        (("Cat", "cat"), None, ["cat", "Cat"], [1, 0]),
        ((NFC, "tea"), None, [NFD], [0]),
        ((NFD, "tea"), None, ["tea", NFC], [1, 0]),
        (("a", "b"), (NFD, "tea"), [NFC], [0]),
    ],
)
def test_a_folder_is_the_class_that_its_name_means(labels, ids, folders, expected):
    assert class_indices(card(labels, ids), folders) == expected
    assert class_indices(card(labels, ids), folders * 2) == expected * 2


@pytest.mark.parametrize(
    ("labels", "ids", "folders", "words"),
    [
        (ONE_TO_TEN, None, ["0", "1", "2", "3"], r"'0'.*1, 10, 2"),
        (ANIMALS, ("1", "2", "21"), ["0", "1"], r"'0'.*1, 2, 21.*cat"),
        (ANIMALS, None, ["0", "3"], r"'3'.*0, 1, 2"),
        # A number among names is no place, and neither is one beside a label that is a number of any kind.
        (ANIMALS, None, ["cat", "1"], "'1'.*cat, dog, ape"),
        (("-1", "cat"), None, ["0", "1"], "'0', '1'"),
        (("２", "cat"), None, ["1"], "'1'"),
        (("½", "cat"), None, ["0"], "'0'"),
        (("2.5", "cat"), None, ["0"], "'0'"),
        # Other spellings of a number are names.
        (ANIMALS, None, ["01"], "'01'"),
        (ANIMALS, None, ["-1"], "'-1'"),
        (ANIMALS, None, ["１"], "'１'"),
        (("1", "2"), None, ["01"], "'01'"),
        # One class twice.
        (ANIMALS, ("n2", "n1", "n0"), ["n2", "cat"], "'cat' and 'n2' are one class"),
        ((NFC, "tea"), None, [NFC, NFD], "are one class"),
        # Several classes.
        (("crane", "owl", "crane"), None, ["crane"], r"'crane' fits several.*0, 2"),
        ((NFC, NFD), None, [NFC], "fits several"),
        (("1", "2", "3"), ("2", "3", "1"), ["1", "2"], "'1' fits several"),
        (ANIMALS, None, ["Cat"], r"'Cat' \(a class is 'cat'\)"),
        ((), None, ["cat"], "no labels"),
    ],
)
def test_a_folder_that_is_not_exactly_one_class_is_refused(labels, ids, folders, words):
    with pytest.raises(BadInput, match=words):
        class_indices(card(labels, ids), folders)


def test_a_card_without_labels_counts_its_scores():
    bare = card((), outputs=(TensorSpec("logits", (None, 4), "float32"),))
    assert class_indices(bare, ["3", "0"]) == [3, 0]
    with pytest.raises(BadInput, match="'4'"):
        class_indices(bare, ["4"])


def write_folders(folder: Path, *names: str) -> Path:
    """One image in each class folder, its red value the place of the name."""
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name / "a.png")
    return folder


def network(card, scores) -> Network:
    """Scores of an image by its red value."""
    names = [spec.name for spec in card.outputs]

    def predict(inputs):
        red = inputs[:, 0, 0, 0]
        return {name: np.asarray(scores[name], np.float32)[red] for name in names}

    return Network(card, predict, lambda: None)


def test_top_1_and_top_5(tmp_path):
    """Six classes, the true class at the ranks 0, 1, 4, 5, 0, 2."""
    labels = tuple("abcdef")
    scores = np.zeros((6, 6))
    for i, rank in enumerate((0, 1, 4, 5, 0, 2)):
        scores[i, [i, *(j for j in range(6) if j != i)]] = [0.5 - rank, *range(0, -5, -1)]
    found = evaluate(network(card(labels), {"logits": scores}), write_folders(tmp_path / "d", *labels))
    assert (found.images, found.top1, found.top5) == (6, pytest.approx(200 / 6), pytest.approx(500 / 6))
    assert found.predictions == (0, 0, 0, 0, 4, 0)


def test_the_scores_are_those_that_the_decoder_reads(tmp_path):
    outputs = (TensorSpec("features", (None, 2), "float32"), TensorSpec("p", (None, 2), "float32"))
    given = card(("a", "b"), outputs=outputs, decode={"probabilities": "p"})
    scores = {"features": [[0, 9], [9, 0]], "p": [[0.9, 0.1], [0.2, 0.8]]}
    assert evaluate(network(given, scores), write_folders(tmp_path / "d", "a", "b")).top1 == 100


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_the_networks_fault(tmp_path, value):
    data = write_folders(tmp_path / "d", "a", "b")
    with pytest.raises(RunFailed, match=r"m \(onnx fp32\).*'logits'.*b.a\.png"):
        evaluate(network(card(("a", "b")), {"logits": [[1, 0], [value, 0]]}), data)


def test_a_class_without_a_score_is_no_hit(tmp_path):
    data = write_folders(tmp_path / "d", "a", "c")
    with pytest.raises(BadArtifact, match="class 2"):
        evaluate(network(card(("a", "b", "c")), {"logits": [[1, 0], [1, 0]]}), data)


def test_numeric_folders_are_scored_as_their_own_labels(tmp_path):
    scores = np.eye(10)[[0, 2, 1]]
    data = write_folders(tmp_path / "d", "1", "2", "3")
    assert evaluate(network(card(ONE_TO_TEN), {"logits": scores}), data).top1 == pytest.approx(200 / 3)
    write_folders(tmp_path / "d", "0")
    with pytest.raises(BadInput, match="'0'"):
        evaluate(network(card(ONE_TO_TEN), {"logits": scores}), data)


def test_class_names_of_both_normal_forms_are_one_class(tmp_path):
    write_folders(tmp_path / "data" / "train", NFD, "tea")
    write_folders(tmp_path / "data" / "val", NFC)
    splits = find_splits(tmp_path / "data")
    assert splits.classes == (NFC, "tea")
    assert [name for _, name in splits.val] == [NFC]
    if not (tmp_path / "data" / "val" / NFD).exists():
        write_folders(tmp_path / "data" / "val", NFD)
        with pytest.raises(BadInput, match="normal form"):
            labelled_images(tmp_path / "data" / "val")


# --- a new task ----------------------------------------------------------------------------------------


@pytest.fixture
def brightness(monkeypatch):
    """A task made of one row and its modules: an image's mean, which a file's name gives as a number."""

    class Result:
        metric, settings = "error", {}

        def __init__(self, data, images, value):
            self.data, self.images, self.value = str(data), images, value

        def summary(self):
            return {"images": self.images}

        def shown(self, title):
            return [f"{title}: off by {self.value:.1f}", Table(("images",), [(self.images,)])]

    def evaluate(network, data, progress=lambda done, total: None, *, margin=0.0):
        paths = sorted(data.iterdir())
        inputs = prepare_batch(map(read_image, paths), network.card.image)
        found = network.predict(inputs)["logits"].mean(axis=1)
        wrong = np.abs(found - [int(path.stem) for path in paths]) - margin
        return Result(data, len(paths), float(wrong.mean()))

    parts = {
        "decode": {
            "decode": lambda outputs, card, place: float(outputs["logits"].mean()),
            "check_options": lambda: None,
            "check_card": lambda card: None,
        },
        "parity": {},
        "metric": {"evaluate": evaluate, "OPTIONS": ()},
        "picture": {
            "draw": lambda image, result: Image.new("L", (4, 4), round(result)),
            "describe": lambda result: f"{result:.0f} of 255",
            "to_json": lambda result: {"mean": result},
            "VIDEO_OPTIONS": None,
        },
    }
    for part, functions in parts.items():
        module = types.ModuleType(f"brightness_{part}")
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(tasks.TASKS.own, "brightness", tasks.Task(*(f"brightness_{part}" for part in parts)))


def test_a_task_is_one_row_and_its_modules(brightness, tmp_path):
    made = classifier(tmp_path / "engine")
    body = json.loads((made / "card.json").read_text())
    (made / "card.json").write_text(json.dumps({**body, "task": "brightness", "decode": {}}))
    data = tmp_path / "data"
    data.mkdir()
    for value in (100, 200):
        Image.new("RGB", (8, 8), (value - 20, value, value + 26)).save(data / f"{value}.png")
    assert run("predict", made, data, "-o", tmp_path / "out").splitlines() == [
        f"{data}/100.png: 102 of 255", f"{data}/200.png: 202 of 255"
    ]  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"100.png", "200.png"}
    with Image.open(tmp_path / "out" / "200.png") as picture:
        assert picture.getpixel((0, 0)) == 202
    (row, _) = json.loads(run("predict", made, data, "--json"))
    assert row["mean"] == 102
    assert "off by 2.0" in run("evaluate", made, "--data", data)
    result = json.loads(run("evaluate", made, "--data", data, "--json"))
    assert (result["metric"], result["value"], result["images"]) == ("error", 2.0, 2)
    (tmp_path / "result.json").write_text(json.dumps(result))
    (read,) = read_results([tmp_path / "result.json"]).evaluations
    assert (read.metric, read.value, read.low) == ("error", 2.0, None)
    with pytest.raises(BadRequest, match="fast is an option of panoptic; colours does brightness"):
        run("evaluate", made, "--data", data, "--fast")


# --- categories of panoptic sets -----------------------------------------------------------------------


def categories(*pairs):
    return [Category(number, name, True, (0, 0, 0)) for number, name in pairs]


@pytest.mark.parametrize(
    ("labels", "ids", "pairs", "expected"),
    [
        (("sky", "sea"), None, [(7, "sea"), (9, "sky"), (11, "land")], [9, 7]),
        # By name, though an id would say otherwise.
        (("sky", "sea"), ("7", "9"), [(7, "sea"), (9, "sky")], [9, 7]),
        (("tv", "sea"), ("7", "9"), [(7, "television"), (9, "sea")], [7, 9]),
        (("tv", "sky"), ("7", "9"), [(7, "television"), (9, "heaven")], [7, 9]),
        ((NFC, "sea"), None, [(1, NFD), (2, "sea")], [1, 2]),
        (("1", "2"), None, [(1, "a"), (2, "b")], [1, 2]),
    ],
)
def test_a_category_is_found_by_name_or_id(labels, ids, pairs, expected):
    found = matching_categories(card(labels, ids), categories(*pairs))
    assert [category.id for category in found] == expected


@pytest.mark.parametrize(
    ("labels", "ids", "pairs", "words"),
    [
        (("sky", "sea"), None, [(1, "sea")], "lacks 1 of the 2 classes of m: sky"),
        # The set numbers its categories otherwise, so its 7 is not the network's.
        (("person", "sea"), ("7", "9"), [(7, "dog"), (8, "sea"), (9, "cat")], "lacks 1 of the 2.*person"),
        (("sky", "sky"), None, [(1, "sky")], "0 and 1 of m.*one category"),
        (("sky", "heaven"), ("7", "7"), [(7, "air")], "0 and 1 of m.*one category"),
    ],
)
def test_a_class_without_a_category_of_its_own_is_refused(labels, ids, pairs, words):
    with pytest.raises(BadInput, match=words):
        matching_categories(card(labels, ids), categories(*pairs))
