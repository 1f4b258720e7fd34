"""The tasks' decoding as the engine uses it: cards and options are checked before anything runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vitkit.runtimes import BadArtifact, BadRequest
from vitkit.runtimes.card import ImageSpec, ModelCard, TensorSpec
from vitkit.runtimes.image import placement
from vitkit.runtimes.panoptic import MergeParameters
from vitkit.runtimes.tasks import TASKS, decoder

IMAGE = ImageSpec((33, 33), fit="contain")
PIXELS = (TensorSpec("image", (1, 33, 33, 3), "uint8"),)
CLASSIFIER = ModelCard(
    "c",
    "classification",
    "onnx",
    "fp32",
    PIXELS,
    (TensorSpec("logits", (1, 3), "float32"), TensorSpec("points", (1, 4, 9, 2), "float32")),
    IMAGE,
    ("a", "b", "c"),
    decode={"logits": "logits", "points": "points"},
)
PANOPTIC = ModelCard(
    "p",
    "panoptic",
    "onnx",
    "fp32",
    PIXELS,
    (TensorSpec("masks", (1, 4, 9, 9), "float32"), TensorSpec("classes", (1, 4, 4), "float32")),
    IMAGE,
    ("cat", "dog", "sky"),
    decode={"masks": "masks", "classes": "classes", "things": [0, 1]},
)
SEMANTIC = ModelCard(
    "s",
    "semantic",
    "onnx",
    "fp32",
    PIXELS,
    (TensorSpec("logits", (1, 3, 9, 9), "float32"),),
    IMAGE,
    ("cat", "dog", "sky"),
)
TENSORS = ModelCard("t", "tensors", "onnx", "fp32", PIXELS, CLASSIFIER.outputs, IMAGE)
CARDS = {card.task: card for card in (CLASSIFIER, PANOPTIC, SEMANTIC, TENSORS)}


def test_every_task_decodes():
    assert set(CARDS) == set(TASKS)
    for card in CARDS.values():
        decoder(card)


@pytest.mark.parametrize("top", [0, -1, "x", 2.5, True, None, [1]])
def test_top_is_a_positive_integer(top):
    with pytest.raises(BadRequest, match=r"top is .*integer of at least 1"):
        decoder(CLASSIFIER, {"top": top})


@pytest.mark.parametrize("fast", [0, 1, "yes", None])
def test_fast_is_true_or_false(fast):
    with pytest.raises(BadRequest, match=r"fast is .*True or False"):
        decoder(PANOPTIC, {"fast": fast})


@pytest.mark.parametrize("options", [5, "top", [("top", 1)], True, 0])
def test_options_are_a_dictionary(options):
    with pytest.raises(BadRequest, match="must be a dictionary"):
        decoder(CLASSIFIER, options)


@pytest.mark.parametrize(("card", "name"), [(CLASSIFIER, "fast"), (PANOPTIC, "top"), (PANOPTIC, 3)])
def test_another_tasks_option_is_named(card, name):
    with pytest.raises(BadRequest, match=rf"decoding of {card.task} has no option {name!r}; it has"):
        decoder(card, {name: True})


def test_options_reach_the_decoding():
    outputs = {"logits": np.array([1, 3, 2], np.float32), "points": np.zeros((4, 9, 2), np.float32)}
    place = placement(33, 33, IMAGE)
    assert [label.name for label in decoder(CLASSIFIER, {"top": 2})(outputs, CLASSIFIER, place).top] == [
        "b",
        "c",
    ]
    assert len(decoder(CLASSIFIER)(outputs, CLASSIFIER, place).top) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"logits": "points"},
        {"logits": "absent"},
        {"logits": {}},
        {"points": "logits"},
        {"points": "absent"},
        {"points": 7},
        {"points": ["points"]},
    ],
)
def test_a_classifiers_outputs_must_fit(change):
    with pytest.raises(BadArtifact, match="is no output of shape"):
        decoder(replace(CLASSIFIER, decode={**CLASSIFIER.decode, **change}))


@pytest.mark.parametrize("shape", [(1, 4, 9), (1, 4, 9, 3), (1, 4, 9, None), (2,)])
def test_sampling_points_are_pairs(shape):
    outputs = (CLASSIFIER.outputs[0], TensorSpec("points", shape, "float32"))
    with pytest.raises(BadArtifact, match=r"points: float32 .* is no output of shape"):
        decoder(replace(CLASSIFIER, outputs=outputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": "classes"}, "wanted are outputs of shapes"),
        ({"classes": None}, "wanted are outputs of shapes"),
        ({"things": [0, 3]}, "list indices of labels"),
        ({"things": [-1]}, "list indices of labels"),
        ({"things": ["cat"]}, "list indices of labels"),
        ({"things": [True]}, "list indices of labels"),
        ({"things": [0.0]}, "list indices of labels"),
        ({"things": 1}, "list indices of labels"),
        ({"overlap": "most"}, "overlap is 'most'"),
        ({"overlap": float("nan")}, "overlap is nan"),
        ({"overlap": True}, "overlap is True"),
        ({"mask_power": 10**400}, "mask_power is 1000"),
        ({"class_power": -1}, "class_power is -1"),
        ({"thing_threshold": 70}, "thing_threshold is 70; it must be a number from 0 to 1"),
        ({"stuff_area": [3]}, "stuff_area is"),
    ],
)
def test_a_panoptic_cards_decoding_must_hold(change, message):
    with pytest.raises(BadArtifact, match=message):
        decoder(replace(PANOPTIC, decode={**PANOPTIC.decode, **change}))


def test_a_card_carries_another_data_sets_settings():
    masks = np.full((4, 9, 9), -9, np.float32)
    masks[0] = 1
    classes = np.full((4, 4), -9, np.float32)
    classes[:, 3] = 9
    # A thing of class probability 0.6: enough for Cityscapes and ADE20K, too little for COCO.
    classes[0] = np.log([0.6, 1e-9, 1e-9, 0.4])
    place = placement(33, 33, IMAGE)
    cityscapes = {"thing_threshold": 0.5, "stuff_threshold": 0.3, "overlap": 0.9, "mask_power": 0}
    ade20k = {"thing_threshold": 0.4, "stuff_threshold": 0.4}
    for settings, scores in (({}, []), (cityscapes, [0.6]), (ade20k, [0.6])):
        card = replace(PANOPTIC, decode={**PANOPTIC.decode, **settings})
        result = decoder(card)({"masks": masks, "classes": classes}, card, place)
        assert [round(s.score, 3) for s in result.segments] == scores
        assert MergeParameters(**settings).overlap == settings.get("overlap", 0.8)
