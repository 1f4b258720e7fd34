"""Label maps at the image's own size, against torch's interpolation and sampling, and transformers'."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkit import BadArtifact, Semantic
from vitkit.runtimes.card import ImageSpec, ModelCard, TensorSpec
from vitkit.runtimes.image import placement
from vitkit.runtimes.semantic import label_map
from vitkit.runtimes.tasks import decoder

STRETCH = ImageSpec((64, 48), fit="stretch")
CARD = ModelCard(
    "s",
    "semantic",
    "onnx",
    "fp32",
    (TensorSpec("image", (1, 64, 48, 3), "uint8"),),
    (TensorSpec("logits", (1, 3, 16, 12), "float32"),),
    STRETCH,
    ("road", "car", "sky"),
    decode={"logits": "logits"},
)


def random_logits(shape: tuple[int, int, int], seed: int, patches: bool) -> np.ndarray:
    """Noise; with `patches` upon areas of one class each, as a trained network has them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=shape).astype(np.float32)
    if patches:
        count, height, width = shape
        coarse = rng.integers(0, count, (-(-height // 4), -(-width // 4)))
        best = np.kron(coarse, np.ones((4, 4), int))[:height, :width]
        logits += 8 * (np.arange(count)[:, None, None] == best)
    return logits


def lead(values: torch.Tensor, chosen: np.ndarray) -> np.ndarray:
    """(K, H, W) -> by how much each pixel's best class is above the chosen one."""
    picked = values.gather(0, torch.from_numpy(chosen.astype(np.int64))[None])[0]
    return (values.max(0).values - picked).numpy()


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(2, 9),
    coarse=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    photo=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    seed=st.integers(0, 999),
    patches=st.booleans(),
)
def test_stretched_images_equal_torch(count, coarse, photo, seed, patches):
    logits = random_logits((count, *coarse), seed, patches)
    found = label_map(logits, placement(*photo, STRETCH))
    values = torch.nn.functional.interpolate(
        torch.from_numpy(logits)[None], photo, mode="bilinear", align_corners=False
    )[0]
    assert found.dtype == np.int32
    # Rounding may decide between equals.
    assert lead(values, found).max() < 1e-5
    assert (found != values.argmax(0).numpy()).sum() <= 1


@pytest.mark.parametrize("shape", [(21, 65, 65), (150, 32, 40)])
def test_a_large_image_equals_torch(shape):
    logits = random_logits(shape, 0, patches=True)
    found = label_map(logits, placement(1033, 771, STRETCH))
    values = torch.nn.functional.interpolate(torch.from_numpy(logits)[None], (1033, 771), mode="bilinear")
    assert np.mean(found != values[0].argmax(0).numpy()) < 1e-5


def test_equal_to_the_post_processing_of_transformers():
    pytest.importorskip("transformers", reason="transformers is not installed")
    # Before transformers' image processors, which import torchvision.
    import vitkit.torchvision_shim  # noqa: F401

    # isort: split
    from transformers import SegformerImageProcessor
    from transformers.modeling_outputs import SemanticSegmenterOutput

    processor = SegformerImageProcessor()
    logits = random_logits((150, 16, 12), 3, patches=False)
    outputs = SemanticSegmenterOutput(logits=torch.from_numpy(logits)[None])
    (want,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(333, 211)])
    found = label_map(logits, placement(333, 211, STRETCH))
    assert (found != want.numpy()).sum() <= 1


@settings(max_examples=80, deadline=None)
@given(
    fit=st.sampled_from(["cover", "contain", "stretch"]),
    size=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    stride=st.sampled_from([1, 4, 3]),
    photo=st.tuples(st.integers(3, 80), st.integers(3, 80)),
    crop=st.sampled_from([0.5, 0.875, 1.0]),
    seed=st.integers(0, 99),
)
def test_every_pixel_is_read_where_it_went_into_the_network(fit, size, stride, photo, crop, seed):
    spec = ImageSpec(size, fit=fit, crop_pct=crop)
    place = placement(*photo, spec)
    logits = random_logits((4, *(-(-side // stride) for side in size)), seed, patches=False)
    found = label_map(logits, place)
    # torch's own sampling, at the pixels' centres in the input as shares of its size.
    centres = np.stack(np.meshgrid(*map(np.arange, photo), indexing="ij"), axis=-1) + 0.5
    shares = (centres - place.offset) * place.scale / size
    grid = torch.from_numpy(2 * shares[..., ::-1].copy() - 1)[None]
    values = torch.nn.functional.grid_sample(
        torch.from_numpy(logits).double()[None], grid, padding_mode="border", align_corners=False
    )[0]
    seen = ((shares >= 0) & (shares <= 1)).all(axis=-1)
    near = np.abs(shares[..., None] - np.array([0, 1])).min(axis=(-1, -2)) < 1e-9
    assert ((found >= 0) == seen)[~near].all()
    # The crop may leave no pixel of a tiny image.
    assert lead(values, np.maximum(found, 0))[found >= 0].max(initial=0) < 1e-4
    assert seen.all() or fit == "cover"


def test_padding_is_in_no_label_map():
    place = placement(20, 80, ImageSpec((64, 64), fit="contain"))
    logits = np.zeros((2, 16, 16), np.float32)
    # The lower three quarters of the input are padding.
    logits[1, 4:] = 9
    logits[0, :4] = 9
    assert np.mean(label_map(logits, place) == 0) > 0.85
    logits[1, 5:] = 99
    assert np.mean(label_map(logits, place)[:17] == 0) == 1


def test_of_equal_classes_the_first_wins():
    logits = np.zeros((3, 4, 4), np.float32)
    logits[1:, :2] = 1
    found = label_map(logits, placement(64, 64, STRETCH))
    assert set(np.unique(found[:24])) == {1}
    assert set(np.unique(found[56:])) == {0}


def test_no_array_of_all_classes_at_the_size_of_the_image():
    logits = random_logits((64, 32, 32), 0, patches=False)
    tracemalloc.start()
    label_map(logits, placement(512, 512, STRETCH))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 512 * 512 * 64 * 4 / 8


def test_float16_logits():
    logits = random_logits((5, 9, 9), 0, patches=False).astype(np.float16)
    place = placement(40, 40, STRETCH)
    assert np.array_equal(label_map(logits, place), label_map(logits.astype(np.float32), place))


def test_a_result_has_shares_and_names():
    logits = np.zeros((3, 16, 12), np.float32)
    logits[2, :12], logits[1, 12:] = 9, 9
    result = decoder(CARD)({"logits": logits}, CARD, placement(64, 48, STRETCH))
    assert isinstance(result, Semantic)
    assert result.classes.shape == (64, 48)
    assert {result.labels[i]: share for i, share in result.shares().items()} == {"sky": 0.75, "car": 0.25}
    nameless = replace(CARD, labels=())
    assert decoder(nameless)({"logits": logits}, nameless, placement(64, 48, STRETCH)).labels == (
        "0",
        "1",
        "2",
    )


def test_shares_leave_out_what_was_not_seen():
    card = replace(CARD, image=ImageSpec((48, 48), fit="cover", crop_pct=1.0))
    logits = np.zeros((3, 12, 12), np.float32)
    result = decoder(card)({"logits": logits}, card, placement(48, 96, card.image))
    assert result.shares() == {0: 0.5}
    assert (result.classes[:, :24] == -1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode": {"logits": "absent"}}, "'absent', which is no output of shape"),
        ({"decode": {"logits": 7}}, "which is no output of shape"),
        ({"decode": {"masks": "logits"}}, "unknown fields 'decode.masks'"),
        ({"outputs": (TensorSpec("logits", (1, 16, 12), "int64"),)}, "which is no output of shape"),
        ({"outputs": (TensorSpec("logits", (1, None, 16, 12), "float32"),)}, "which is no output of shape"),
        ({"outputs": (TensorSpec("logits", (1, 1, 16, 12), "float32"),), "labels": ()}, '"task": "tensors"'),
        ({"labels": ("a", "b")}, "2 labels for the 3 maps"),
        ({"outputs": (TensorSpec("logits", (1, 16, 12, 3), "float32"),)}, "have the classes last"),
    ],
)
def test_a_cards_logits_must_fit(change, message):
    with pytest.raises(BadArtifact, match=message):
        decoder(replace(CARD, **change))
