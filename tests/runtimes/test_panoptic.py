"""The mask-wise merge against its plain definition in float64, on made-up and on natural masks."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vitkit.runtimes import BadInput
from vitkit.runtimes.errors import BadRequest
from vitkit.runtimes.panoptic import MergeParameters, merge_masks

COCO = SHARED / "coco-panoptic-100"


def place(at, last):
    """Linear interpolation `at` places in 0..last: lower neighbour, upper neighbour, share of the upper."""
    low = np.minimum(np.floor(at).astype(int), last)
    return low, np.minimum(low + 1, last), at - low


def resample(image, ys, xs):
    """(h, w) at rows `ys` and columns `xs`, bilinear."""
    y0, y1, v = place(ys, image.shape[0] - 1)
    x0, x1, u = place(xs, image.shape[1] - 1)
    left, right = image[:, x0], image[:, x1]
    wide = left * (1 - u) + right * u
    return wide[y0] * (1 - v)[:, None] + wide[y1] * v[:, None]


def enlarge(mask, input_size, content, photo_size):
    """Mask logits of the whole input -> those of the photograph, in the published three steps."""
    aligned = [
        np.arange(n) * ((m - 1) / (n - 1) if n > 1 else 0)
        for n, m in zip(input_size, mask.shape, strict=True)
    ]
    real = resample(mask.astype(np.float64), *aligned)[: content[0], : content[1]]
    centres = [
        np.clip((np.arange(n) + 0.5) * m / n - 0.5, 0, m - 1)
        for n, m in zip(photo_size, content, strict=True)
    ]
    return resample(real, *centres)


def softmax(logits, axis):
    exp = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return exp / exp.sum(axis=axis, keepdims=True)


def plain_merge(class_logits, mask_logits, *, things, input_size, content, photo_size, parameters=None):
    """The definition, no tricks -> ids by acceptance, [class, score, area] of each, pixels near a tie."""
    p = parameters or MergeParameters()
    shares = softmax(np.stack([enlarge(m, input_size, content, photo_size) for m in mask_logits]), 0)
    inside = shares > p.mask_threshold
    near = (np.abs(shares - p.mask_threshold) < 1e-9).any(axis=0)
    classes = softmax(class_logits.astype(np.float64), 1)[:, :-1]
    label = classes.argmax(axis=1)
    means = np.array([s[b].mean() if b.any() else 0.0 for s, b in zip(shares, inside, strict=True)])
    with np.errstate(divide="ignore"):
        scores = classes.max(axis=1) ** p.class_power * means**p.mask_power
    ids, segments, stuff = np.zeros(photo_size, np.int32), [], {}
    for i in np.argsort(-scores, kind="stable"):
        thing = things[label[i]]
        free = inside[i] & (ids == 0)
        if not scores[i] > (p.thing_threshold if thing else p.stuff_threshold):
            continue
        if not free.sum() > p.overlap * inside[i].sum():
            continue
        if not thing and label[i] in stuff:
            ids[free] = stuff[label[i]]
            continue
        segments.append([int(label[i]), float(scores[i])])
        ids[free] = len(segments)
        if not thing:
            stuff[label[i]] = len(segments)
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
    """Same pixels, classes, areas and scores as the plain merge, whose near ties may fall either way."""
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


def like_network(regions, seed, slots=128, classes=133):
    """Logits as a trained network's from (n, h, w) bool masks: n confident slots, the rest void.

    Every tenth of the others is a weaker copy of a confident slot.
    """
    rng = np.random.default_rng(seed)
    count, height, width = regions.shape
    scale = rng.uniform(8, 12, (count, 1, 1))
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
SETTINGS = [
    MergeParameters(),
    MergeParameters(thing_threshold=0.5, stuff_threshold=0.3, overlap=0.9, mask_power=0.0),
    MergeParameters(thing_threshold=0.4, stuff_threshold=0.4),
    MergeParameters(mask_threshold=0.1, thing_threshold=0.0, stuff_threshold=0.0, overlap=0.3),
    MergeParameters(mask_threshold=0.0, thing_threshold=0.0, stuff_threshold=0.0, overlap=0.0),
    MergeParameters(mask_threshold=0.55, thing_threshold=0.1, stuff_threshold=0.1, overlap=-1.0),
    MergeParameters(thing_threshold=0.3, stuff_threshold=0.3, class_power=0.5, mask_power=2.0),
    MergeParameters(thing_threshold=0.2, stuff_threshold=0.2, class_power=-0.1, mask_power=-0.5),
    MergeParameters(thing_threshold=0.2, stuff_threshold=0.2, thing_area=40, stuff_area=90),
]
SIDES = st.one_of(st.integers(1, 12), st.integers(1, 90))


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
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
    spread=2.0,
    step=0.0,
    confidence=0.0,
    copies=0,
    content=(1, 32),
    photo=(1, 86),
    parameters=SETTINGS[1],
)
def test_equals_the_definition(seed, spread, step, confidence, copies, content, photo, parameters):
    rng = np.random.default_rng(seed)
    masks, logits = rng.normal(0, spread, (6, 9, 9)), rng.normal(0, 1, (6, 4))
    if step:
        masks = np.round(masks / step) * step
    logits[np.arange(6), rng.integers(0, 3, 6)] += confidence
    masks[:copies], logits[:copies] = masks[3 : 3 + copies], logits[3 : 3 + copies]
    arguments = {
        "class_logits": logits.astype(np.float32),
        "mask_logits": masks.astype(np.float32),
        "things": THINGS,
        "input_size": (33, 33),
        "content": content,
        "photo_size": photo or content,
        "parameters": parameters,
    }
    assert_same(merge_masks(**arguments), plain_merge(**arguments))
    quick = merge_masks(**arguments, fast=True)
    assert quick.ids.shape == (photo or content)
    assert set(np.unique(quick.ids)) - {0} == {s.id for s in quick.segments}


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
    assert_same(merge_masks(**arguments), plain_merge(**arguments))
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
        assert_same(result, plain_merge(**{**kind, "mask_logits": masks}))
        winners |= {s.index for s in result.segments}
    assert winners == {0, 1}


@pytest.mark.parametrize("above", [True, False])
def test_the_score_decides_to_the_last_digit(above):
    regions, content, photo = ellipses(3, 129, 4)
    logits, masks = like_network(regions, 3, 8, 3)
    kind = {"things": THINGS, "input_size": content, "content": content, "photo_size": photo}
    low = MergeParameters(thing_threshold=0.0, stuff_threshold=0.0, overlap=0.0)
    _, segments, _ = plain_merge(logits, masks, **kind, parameters=low)
    thing = next(s for s in segments if s[0] < 2)
    edge = MergeParameters(thing_threshold=thing[1] * (1 + (-1e-12 if above else 1e-12)), stuff_threshold=0.0)
    result = merge_masks(logits, masks, **kind, parameters=edge)
    assert_same(result, plain_merge(logits, masks, **kind, parameters=edge))
    assert any(s.score == pytest.approx(thing[1], abs=1e-9) for s in result.segments) == above


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
    expected = plain_merge(logits, masks, **kind)
    exact, fast = (merge_masks(logits, masks, **kind, fast=fast) for fast in (False, True))
    assert_same(exact, expected)
    assert (matched(fast.ids, exact.ids)[fast.ids] != exact.ids).mean() < 5e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_logits": np.zeros((4, 4), np.float32)}, "wanted"),
        ({"class_logits": np.zeros((3, 1), np.float32), "things": np.zeros(0, bool)}, "nothing there"),
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
