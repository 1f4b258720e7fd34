"""The mask-wise merge against the published steps in float64, on made-up and on natural masks."""

from __future__ import annotations

import json
import tracemalloc
from statistics import median

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vitkit.runtimes import BadInput
from vitkit.runtimes.errors import BadRequest
from vitkit.runtimes.panoptic import MergeParameters, merge_masks

COCO = SHARED / "coco-panoptic-100"


def published_merge(class_logits, mask_logits, *, things, input_size, content, photo_size, parameters=None):
    """The published post-processing, step by step, in float64.

    Returns the ids by acceptance, [class, score, area] of each segment, and the pixels that are near a tie.
    """
    p = parameters or MergeParameters()
    masks = torch.tensor(mask_logits, dtype=torch.float64)[None]
    padded = F.interpolate(masks, size=input_size, mode="bilinear", align_corners=True)
    real = padded[:, :, : content[0], : content[1]]
    shares = F.interpolate(real, size=photo_size, mode="bilinear", align_corners=False)[0].softmax(0).numpy()
    binary = shares > p.mask_threshold
    near = (np.abs(shares - p.mask_threshold) < 1e-9).any(axis=0)

    probabilities = torch.tensor(class_logits, dtype=torch.float64).softmax(1).numpy()[:, :-1]
    cls, label = probabilities.max(axis=1), probabilities.argmax(axis=1)
    area = binary.sum(axis=(1, 2))
    mask = (shares * binary).sum(axis=(1, 2)) / np.maximum(area, 1)
    order = cls**p.class_power * mask**p.mask_power

    ids, segments, stuff_ids = np.zeros(photo_size, np.int32), [], {}
    for slot in sorted(range(len(cls)), key=lambda slot: -order[slot]):
        kind, thing = int(label[slot]), things[label[slot]]
        new = binary[slot] & (ids == 0)
        confident = cls[slot] > (p.thing_threshold if thing else p.stuff_threshold)
        if not (confident and new.sum() > p.overlap * area[slot]):
            continue
        if not thing and kind in stuff_ids:
            ids[new] = stuff_ids[kind]
            continue
        segments.append([kind, float(order[slot])])
        ids[new] = len(segments)
        if not thing:
            stuff_ids[kind] = len(segments)
    for number, segment in enumerate(segments, 1):
        segment.append(int((ids == number).sum()))
        if segment[2] < (p.thing_area if things[segment[0]] else p.stuff_area):
            ids[ids == number] = 0
    return ids, segments, near


def matched(ids, other):
    """Which segment of `other` each one of `ids` is, by most common pixels: array over 0..ids.max()."""
    common = np.zeros((ids.max() + 1, other.max() + 1), int)
    np.add.at(common, (ids, other), 1)
    table = common.argmax(axis=1)
    table[0] = 0
    return table


def assert_same(result, expected):
    """Same pixels, classes, areas and scores as the published merge, whose near ties may fall either way."""
    ids, segments, near = expected
    table = matched(result.ids, ids)
    assert not ((table[result.ids] != ids) & ~near).any()
    if near.any():
        return
    assert [s.id for s in result.segments] == list(range(1, len(result.segments) + 1))
    found = {int(table[s.id]): [s.index, s.area] for s in result.segments}
    assert len(found) == len(result.segments)
    assert found == {i: [c, area] for i, (c, _, area) in enumerate(segments, 1) if (ids == i).any()}
    for s in result.segments:
        assert s.score == pytest.approx(segments[table[s.id] - 1][1], abs=1e-5)
        assert s.area == (result.ids == s.id).sum()


def smooth(noise, times):
    """Blurred by [1 2 1] / 4 along both axes, `times` times."""
    for _ in range(times):
        for axis in (-2, -1):
            noise = (np.roll(noise, 1, axis) + 2 * noise + np.roll(noise, -1, axis)) / 4
    return noise


# Ranges of the confident slots' logits at the middle of their masks, over those of void slots.
FIRM, SOFT = (8, 12), (5.5, 7)


def like_network(regions, seed, slots=128, classes=133, peak=FIRM):
    """Logits as a trained network's from (n, h, w) bool masks: n confident slots, the rest void.

    Every tenth of the others is a weaker copy of a confident slot. With the `peak` of `SOFT` a mask's mean
    probability is about 0.7, and void slots have most of the rest.
    """
    rng = np.random.default_rng(seed)
    count, height, width = regions.shape
    scale = rng.uniform(*peak, (count, 1, 1))
    masks = rng.normal(-4, 1.5, (slots, height, width))
    noise = smooth(rng.normal(size=(count, height, width)), 2)
    real = scale * smooth(regions.astype(float), 1) - 4 + noise / noise.std()
    order = rng.permutation(slots)
    masks[order[:count]] = real
    copies = order[count::10]
    masks[copies] = real[rng.integers(count, size=len(copies))] - rng.uniform(3, 5, (len(copies), 1, 1))
    logits = rng.normal(0, 1, (slots, classes + 1))
    logits[:, -1] += 12
    logits[order[:count], -1] -= 12
    logits[order[:count], rng.integers(classes, size=count)] += rng.uniform(8, 12, count)
    return logits.astype(np.float32), masks.astype(np.float32)


def cut(regions, count):
    """The largest of the regions that are not empty is halved until there are `count`."""
    regions = [region for region in regions if region.any()]
    while len(regions) < count:
        region = regions.pop(max(range(len(regions)), key=lambda i: regions[i].sum()))
        places = np.argwhere(region)
        axis = int(np.ptp(places, axis=0).argmax())
        first = np.indices(region.shape)[axis] <= np.median(places[:, axis])
        regions += [region & first, region & ~first]
    return np.stack(regions)


def coco_regions(number, side=641, count=12):
    """The largest segments of an annotated photograph at stride 4 of a letterboxed input -> masks, sizes."""
    from PIL import Image

    annotations = json.loads((COCO / "annotations" / "panoptic_train2017.json").read_text())["annotations"]
    path = COCO / "annotations" / "panoptic_train2017" / annotations[number]["file_name"]
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.int32)
    ids = pixels @ np.array([1, 256, 65536], np.int32)
    photo = ids.shape
    content = tuple(max(1, round(n * side / max(photo))) for n in photo)
    y, x = (
        np.clip((np.arange((side - 1) // 4 + 1) * 4 + 0.5) * p / c - 0.5, 0, None).round().astype(int)
        for p, c in zip(photo, content, strict=True)
    )
    grid = np.full((len(y), len(x)), -1)
    grid[np.ix_(y < photo[0], x < photo[1])] = ids[np.ix_(y[y < photo[0]], x[x < photo[1]])]
    values, areas = np.unique(grid[grid > 0], return_counts=True)
    largest = values[np.argsort(-areas)][:count]
    return np.stack([grid == value for value in largest]), content, photo


def ellipses(seed, side=641, count=12):
    """What `coco_regions` gives, of drawn segments."""
    rng = np.random.default_rng(seed)
    size = (side - 1) // 4 + 1
    y, x = np.mgrid[:size, :size] / size
    regions, free = [], np.ones((size, size), bool)
    for _ in range(count):
        (top, left), (tall, wide) = rng.uniform(0, 1, 2), rng.uniform(0.1, 0.4, 2)
        inside = free & (((y - top) / tall) ** 2 + ((x - left) / wide) ** 2 < 1)
        regions.append(inside)
        free &= ~inside
    return np.stack(regions), (side, side), (side, side)


THINGS = np.array([True, True, False])
MORE_THINGS = np.array([True, False, True, False, True])
PUBLISHED = {
    "coco": MergeParameters(),
    "cityscapes": MergeParameters(
        thing_threshold=0.5, stuff_threshold=0.3, overlap=0.9, class_power=1, mask_power=0
    ),
    "ade20k": MergeParameters(thing_threshold=0.4, stuff_threshold=0.4),
}
SETTINGS = [
    *PUBLISHED.values(),
    MergeParameters(mask_threshold=0.1, thing_threshold=0.0, stuff_threshold=0.0, overlap=0.3),
    MergeParameters(mask_threshold=0.0, thing_threshold=0.0, stuff_threshold=0.0, overlap=0.0),
    MergeParameters(mask_threshold=0.55, thing_threshold=0.1, stuff_threshold=0.1, overlap=0.0),
    MergeParameters(thing_threshold=0.3, stuff_threshold=0.3, class_power=0.5, mask_power=2.0),
    MergeParameters(thing_threshold=0.2, stuff_threshold=0.2, class_power=0.0, mask_power=0.5),
    MergeParameters(thing_threshold=0.2, stuff_threshold=0.2, thing_area=40, stuff_area=90),
]
SIDES = st.one_of(st.integers(1, 12), st.integers(1, 90))


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    slots=st.one_of(st.integers(2, 8), st.integers(20, 40)),
    spread=st.sampled_from([0.3, 2.0, 10.0, 60.0, 500.0]),
    step=st.sampled_from([0.0, 0.5, 4.0]),
    confidence=st.sampled_from([0.0, 3.0, 8.0]),
    copies=st.integers(0, 3),
    content=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    photo=st.one_of(st.none(), st.tuples(SIDES, SIDES)),
    parameters=st.sampled_from(SETTINGS),
)
# A pixel that rounding could put into one mask or not, while another mask surely has it.
@example(
    seed=0,
    slots=6,
    spread=2.0,
    step=0.0,
    confidence=0.0,
    copies=0,
    content=(1, 32),
    photo=(1, 86),
    parameters=SETTINGS[1],
)
def test_equals_the_published_merge(
    seed, slots, spread, step, confidence, copies, content, photo, parameters
):
    rng = np.random.default_rng(seed)
    masks, logits = rng.normal(0, spread, (slots, 9, 9)), rng.normal(0, 1, (slots, len(MORE_THINGS) + 1))
    if step:
        masks = np.round(masks / step) * step
    logits[np.arange(slots), rng.integers(0, len(MORE_THINGS), slots)] += confidence
    copies = min(copies, slots // 2)
    masks[:copies], logits[:copies] = masks[copies : 2 * copies], logits[copies : 2 * copies]
    arguments = {
        "class_logits": logits.astype(np.float32),
        "mask_logits": masks.astype(np.float32),
        "things": MORE_THINGS,
        "input_size": (33, 33),
        "content": content,
        "photo_size": photo or content,
        "parameters": parameters,
    }
    assert_same(merge_masks(**arguments), published_merge(**arguments))
    quick = merge_masks(**arguments, fast=True)
    assert quick.ids.shape == (photo or content)
    assert set(np.unique(quick.ids)) - {0} == {s.id for s in quick.segments}


@pytest.mark.parametrize("parameters", PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize("peak", [FIRM, SOFT], ids=["firm", "soft"])
def test_many_slots_are_accepted_whatever_their_mean(peak, parameters):
    regions, content, _ = ellipses(4, 129)
    logits, masks = like_network(cut(regions, 33), 4, peak=peak)
    sizes = {"input_size": (129, 129), "content": content, "photo_size": (150, 200)}
    arguments = {"things": np.arange(133) % 2 == 0, **sizes, "parameters": parameters}
    expected = published_merge(logits, masks, **arguments)
    exact, fast = (merge_masks(logits, masks, **arguments, fast=fast) for fast in (False, True))
    assert_same(exact, expected)
    assert len(exact.segments) > 25
    assert parameters.mask_power == 0 or (median(s.score for s in exact.segments) < 0.7) == (peak == SOFT)
    # On so small an image a large share of the pixels are at borders.
    assert (matched(fast.ids, exact.ids)[fast.ids] != exact.ids).mean() < (3e-3 if peak == SOFT else 2e-3)


@pytest.mark.parametrize(
    ("cls", "mask", "segments"), [(0.9, 0.5, 1), (0.9, 0.7, 1), (0.71, 0.45, 1), (0.69, 0.99, 0)]
)
@pytest.mark.parametrize("fast", [False, True])
def test_the_class_probability_alone_accepts_a_slot(cls, mask, segments, fast):
    odds = [np.log(mask / (1 - mask)), 0]
    slots = flat(odds, [[np.log(cls), -99, -99, np.log(1 - cls)], [-9, -9, -9, 9]])
    result = merge_masks(**slots, fast=fast)
    assert len(result.segments) == segments
    if segments:
        assert result.segments[0].score == pytest.approx(cls * mask, abs=1e-6)
        assert (result.ids == 1).all()


@pytest.mark.parametrize("thing", [True, False])
def test_the_class_threshold_decides_to_the_last_digit(thing):
    classes = [[3, 0, 1, 0], [0, 0, 0, 9]] if thing else [[1, 0, 3, 0], [0, 0, 0, 9]]
    confidence = np.exp(3) / np.exp([3, 0, 1, 0]).sum()
    for relative, count in ((-1e-12, 1), (1e-12, 0)):
        limits = dict.fromkeys(("thing_threshold", "stuff_threshold"), 1.0)
        limits["thing_threshold" if thing else "stuff_threshold"] = confidence * (1 + relative)
        result = merge_masks(**flat([3, 0], classes), parameters=MergeParameters(**limits))
        assert len(result.segments) == count


@pytest.mark.parametrize("mask_power", [1, 0])
def test_powers_order_overlapping_slots(mask_power):
    # Both masks exceed 0.4 everywhere; one has the surer class, the other the surer mask.
    cls, mask = (0.95, 0.80), (0.45, 0.55)
    classes = [[np.log(cls[0]), -99, -99, np.log(1 - cls[0])], [-99, np.log(cls[1]), -99, np.log(1 - cls[1])]]
    (segment,) = merge_masks(
        **flat(np.log(mask), classes), parameters=MergeParameters(mask_power=mask_power)
    ).segments
    assert segment.index == (1 if mask_power else 0)


@pytest.mark.parametrize(
    ("coarse", "size"), [((1, 1), (1, 1)), ((1, 9), (5, 33)), ((9, 9), (30, 47)), ((9, 5), (7, 3))]
)
@pytest.mark.parametrize("photo", [(1, 1), (5, 3), (40, 61)])
def test_any_sizes(coarse, size, photo):
    rng = np.random.default_rng(coarse[0])
    arguments = {
        "class_logits": rng.normal(0, 4, (6, 4)).astype(np.float32),
        "mask_logits": rng.normal(0, 4, (6, *coarse)).astype(np.float32),
        "things": THINGS,
        "input_size": size,
        "content": (max(1, size[0] - 2), size[1]),
        "photo_size": photo,
        "parameters": MergeParameters(thing_threshold=0.2, stuff_threshold=0.2, overlap=0.1),
    }
    assert_same(merge_masks(**arguments), published_merge(**arguments))
    merge_masks(**arguments, fast=True)


def flat(values, classes, side=9):
    """Arguments of slots with one mask logit each, on a small image."""
    masks = np.broadcast_to(np.array(values, np.float32)[:, None, None], (len(values), side, side))
    sizes = dict.fromkeys(("input_size", "content", "photo_size"), (33, 33))
    return {"class_logits": np.array(classes, np.float32), "mask_logits": masks, "things": THINGS, **sizes}


@pytest.mark.parametrize("towards", [-1, 0, 1])
def test_the_last_bit_of_a_logit_decides_a_pixel(towards):
    # Probability 0.4 but for about 1e-8: float32 arithmetic could not tell.
    odd = np.float32(np.log(1.5))
    odd = np.nextafter(odd, np.float32(towards)) if towards else odd
    slots = flat([0, odd], [[20, 0, 0, 0], [0, 0, 0, 20]])
    probability = 1 / (1 + np.exp(np.float64(odd)))
    result = merge_masks(**slots, parameters=MergeParameters(thing_threshold=0.1))
    assert (result.ids == (probability > 0.4)).all()


@pytest.mark.parametrize("first", [True, False])
def test_the_last_bit_of_a_class_logit_decides_the_order(first):
    nearly = float(np.nextafter(np.float32(3), np.float32(2)))
    classes = [[3, 0, 0, 0], [0, nearly, 0, 0]] if first else [[nearly, 0, 0, 0], [0, 3, 0, 0]]
    slots = flat([0, 0], classes)
    result = merge_masks(**slots, parameters=MergeParameters(thing_threshold=0.1))
    assert [s.index for s in result.segments] == [0 if first else 1]


def test_the_last_digit_of_a_mask_decides_the_order():
    # The same slot twice, but for the last bit of one logit.
    kind = {**flat([0] * 5, [[3, 0, 0, 0], [0, 3, 0, 0], *[[0, 0, 0, 20]] * 3])}
    kind["parameters"] = MergeParameters(thing_threshold=0.1)
    winners = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        masks = rng.normal(-4, 1, (5, 9, 9)).astype(np.float32)
        masks[0] = masks[1] = rng.normal(3, 1, (9, 9))
        y, x = rng.integers(2, 7, 2)
        masks[seed % 2, y, x] = np.nextafter(masks[0, y, x], np.float32(99))
        result = merge_masks(**{**kind, "mask_logits": masks})
        assert_same(result, published_merge(**{**kind, "mask_logits": masks}))
        winners |= {s.index for s in result.segments}
    assert winners == {0, 1}


def test_stuff_merges_things_do_not_and_small_segments_go():
    masks = np.full((4, 9, 9), -9.0, np.float32)
    for i, part in enumerate((np.s_[:5, :4], np.s_[:5, 4:], np.s_[5:, :4], np.s_[5:, 4:])):
        masks[i][part] = 9
    kind = dict.fromkeys(("input_size", "content", "photo_size"), (33, 33))
    stuff, thing = [0, 0, 9, 0], [9, 0, 0, 0]
    classes = np.array([stuff, stuff, thing, thing], np.float32)
    result = merge_masks(classes, masks, things=THINGS, **kind, labels=("cat", "dog", "sky"))
    assert [(s.label, s.thing) for s in result.segments] == [("sky", False), ("cat", True), ("cat", True)]
    assert (result.ids == 1)[:17].mean() > 0.9
    few = MergeParameters(thing_area=250, stuff_area=10_000)
    smaller = merge_masks(classes, masks, things=THINGS, **kind, parameters=few)
    areas = [s.area for s in result.segments if s.thing]
    assert min(areas) < 250 <= max(areas)
    assert [s.area for s in smaller.segments] == [max(areas)]


def test_nothing_confident_gives_no_segments():
    slots = flat([1, 2, 3], np.zeros((3, 4)))
    for fast in (False, True):
        result = merge_masks(**slots, fast=fast)
        assert result.segments == ()
        assert not result.ids.any()
    # Confident, but no pixel is anyone's.
    slots = flat([0, 0, 0], [[9, 0, 0, 0]] * 3)
    assert merge_masks(**slots).segments == ()


def test_fast_is_close_on_drawn_masks():
    regions, content, photo = ellipses(1, 321)
    logits, masks = like_network(regions, 1)
    kind = {"things": np.arange(133) < 80, "input_size": content, "content": content, "photo_size": photo}
    exact, fast = (merge_masks(logits, masks, **kind, fast=fast) for fast in (False, True))
    assert len(exact.segments) > 5
    assert (matched(fast.ids, exact.ids)[fast.ids] != exact.ids).mean() < 5e-4
    for ours, theirs in zip(exact.segments, fast.segments, strict=True):
        assert ours.score == pytest.approx(theirs.score, abs=1e-2)


@pytest.mark.parametrize("fast", [False, True])
def test_memory_stays_far_below_the_enlarged_masks(fast):
    regions, content, photo = ellipses(2)
    logits, masks = like_network(regions, 2)
    kind = {"things": np.arange(133) < 80, "input_size": content, "content": content, "photo_size": photo}
    tracemalloc.start()
    merge_masks(logits, masks, **kind, fast=fast)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20


@pytest.mark.parametrize("number", [5, 60])
def test_natural_masks_equal_the_definition(number):
    if not COCO.is_dir():
        pytest.skip(f"annotated photographs are not at {COCO}")
    regions, content, photo = coco_regions(number, 257)
    logits, masks = like_network(regions, number, 64)
    kind = {"things": np.arange(133) < 80, "input_size": (257, 257), "content": content, "photo_size": photo}
    expected = published_merge(logits, masks, **kind)
    exact, fast = (merge_masks(logits, masks, **kind, fast=fast) for fast in (False, True))
    assert_same(exact, expected)
    assert (matched(fast.ids, exact.ids)[fast.ids] != exact.ids).mean() < 5e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_logits": np.zeros((4, 4), np.float32)}, "wanted"),
        ({"class_logits": np.zeros((3, 1), np.float32), "things": np.zeros(0, bool)}, "at least one slot"),
        ({"things": np.zeros(4, bool)}, "thing flags"),
        ({"labels": ("one",)}, "1 labels for 3"),
        ({"content": (34, 33)}, "do not fit"),
        ({"photo_size": (0, 5)}, "do not fit"),
        ({"class_logits": np.full((3, 4), np.nan, np.float32)}, "NaN"),
        ({"mask_logits": np.full((3, 9, 9), -np.inf, np.float32)}, "NaN or infinite"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    with pytest.raises(BadInput, match=message):
        merge_masks(**{**flat([1, 2, 3], np.zeros((3, 4))), **change})


def test_a_threshold_is_a_probability():
    with pytest.raises(BadRequest, match="mask_threshold is 40"):
        MergeParameters(mask_threshold=40)
