"""Raw tensors: every output by its name, as the engine returns it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import IMAGE, write_tiny

import vitkit
from vitkit import BadArtifact, BadRequest, Tensors
from vitkit.runtimes.card import ImageSpec, ModelCard, TensorSpec
from vitkit.runtimes.image import placement
from vitkit.runtimes.tasks import decoder

CARD = ModelCard(
    "d",
    "tensors",
    "onnx",
    "fp32",
    (TensorSpec("image", (2, 8, 8, 3), "uint8"),),
    (TensorSpec("boxes", (2, 5, 4), "float32"), TensorSpec("classes", (2, 5), "int64")),
    ImageSpec((8, 8)),
)


def test_outputs_come_by_name(tmp_path):
    made = write_tiny(tmp_path / "a", "onnx", task="tensors")
    with vitkit.open_engine(made, task="tensors") as engine:
        result = engine(IMAGE)
        both = engine([IMAGE, IMAGE[::-1]])
    assert isinstance(result, Tensors)
    assert np.array_equal(result["logits"], IMAGE.ravel())
    assert list(result.by_name) == ["logits"]
    assert np.array_equal(both[1]["logits"], IMAGE[::-1].ravel())
    with pytest.raises(KeyError, match="no output 'boxes'; there are logits"):
        result["boxes"]


def test_types_and_shapes_stay():
    outputs = {"boxes": np.ones((5, 4), np.float32), "classes": np.arange(5)}
    result = decoder(CARD)(outputs, CARD, placement(8, 8, CARD.image))
    assert result["classes"].dtype == np.int64
    assert result["boxes"] is outputs["boxes"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode": {"logits": "boxes"}}, "unknown fields 'decode.logits'"),
        ({"outputs": (TensorSpec("boxes", (100, 4), "float32"),)}, "does not go over the images"),
        ({"outputs": (TensorSpec("boxes", (), "float32"),)}, "does not go over the images"),
        ({"outputs": (TensorSpec("boxes", (None, 4), "float32"),)}, "does not go over the images"),
    ],
)
def test_a_card_that_does_not_hold(change, message):
    with pytest.raises(BadArtifact, match=message):
        decoder(replace(CARD, **change))


def test_there_are_no_options():
    with pytest.raises(BadRequest, match="decoding of tensors has no option 'top'; it has none"):
        decoder(CARD, {"top": 5})
