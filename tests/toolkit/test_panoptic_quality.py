from __future__ import annotations

import json
import time

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vitkit.data.coco import Category, SegmentInfo
from vitkit.data.coco.ids import describe_segments, read_ids
from vitkit.data.coco.read import read_split
from vitkit.data.coco.write import NewImage, write_panoptic_set, write_predictions
from vitkit.evaluate.panoptic_quality import PanopticQuality, Quality, evaluate_predictions
from vitkit.runtimes.errors import BadInput, BadRequest

COCO = SHARED / "coco-panoptic-100"
CATEGORIES = (
    Category(1, "cat", True, (0, 0, 0)),
    Category(4, "dog", True, (0, 0, 0)),
    Category(9, "sky", False, (0, 0, 0)),
)


def segments(ids, categories: dict[int, int], crowds=()) -> tuple[SegmentInfo, ...]:
    return describe_segments(np.asarray(ids), categories, crowds)


def quality(*images):
    total = PanopticQuality(CATEGORIES)
    for truth_ids, truth, ids, predicted in images:
        total.add(np.array(truth_ids), truth, np.array(ids), predicted, "photo.png")
    return total.report()


def pair(truth, ids, names=None, crowds=(), guess=None):
    """One image out of flat lists of ids; `names` maps truth ids to categories, `guess` predicted ones."""
    names, guess = names or {1: 1, 2: 4, 3: 9}, guess or {1: 1, 2: 4, 3: 9}
    truth, ids = np.array([truth]), np.array([ids])
    return truth, segments(truth, names, crowds), ids, segments(ids, guess)


# --- the definition once more, with sets of pixels and loops


def pixels_of(ids, segment) -> set[tuple[int, int]]:
    return {(y, x) for y in range(ids.shape[0]) for x in range(ids.shape[1]) if ids[y, x] == segment.id}


def by_definition(images) -> dict[int, dict[str, float]]:
    table = {c.id: {"tp": 0, "fp": 0, "fn": 0, "iou": 0.0, "both": 0, "either": 0} for c in CATEGORIES}
    for truth_ids, truth, ids, predicted in images:
        true = {s.id: pixels_of(truth_ids, s) for s in truth}
        found = {s.id: pixels_of(ids, s) for s in predicted}
        everywhere = {(y, x) for y in range(ids.shape[0]) for x in range(ids.shape[1])}
        void = everywhere - set().union(*true.values())
        matched: set[tuple[str, int]] = set()
        for t in truth:
            for p in predicted:
                if t.crowd or t.category_id != p.category_id:
                    continue
                overlap = len(true[t.id] & found[p.id]) / len((true[t.id] | found[p.id]) - void)
                if overlap > 0.5:
                    matched |= {("t", t.id), ("p", p.id)}
                    table[t.category_id]["tp"] += 1
                    table[t.category_id]["iou"] += overlap
        for t in truth:
            table[t.category_id]["fn"] += not t.crowd and ("t", t.id) not in matched
        for p in predicted:
            crowds = [true[t.id] for t in truth if t.crowd and t.category_id == p.category_id]
            excuse = void | (crowds[-1] if crowds else set())
            wrong = ("p", p.id) not in matched and 2 * len(found[p.id] & excuse) <= len(found[p.id])
            table[p.category_id]["fp"] += wrong
        for c in CATEGORIES:
            one = set().union(*(true[t.id] for t in truth if t.category_id == c.id))
            other = set().union(*(found[p.id] for p in predicted if p.category_id == c.id)) - void
            table[c.id]["both"] += len(one & other)
            table[c.id]["either"] += len(one | other)
    return table


def mean(values) -> float:
    values = list(values)
    return 100 * sum(values) / len(values) if values else 0.0


@st.composite
def one_image(draw):
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 6)))
    truth_ids = draw(arrays(np.int32, shape, elements=st.integers(0, 4)))
    changed = draw(arrays(np.bool_, shape))
    # Mostly as the truth: at random, next to nothing would match.
    ids = np.where(changed, draw(arrays(np.int32, shape, elements=st.integers(0, 4))), truth_ids)
    kinds = st.sampled_from([c.id for c in CATEGORIES])
    names = draw(st.fixed_dictionaries({i: kinds for i in range(1, 5)}))
    guess = names if draw(st.booleans()) else draw(st.fixed_dictionaries({i: kinds for i in range(1, 5)}))
    crowds = draw(st.sets(st.integers(1, 4), max_size=2))
    return truth_ids, segments(truth_ids, names, crowds), ids, segments(ids, guess)


@settings(max_examples=120, deadline=None)
@given(st.lists(one_image(), max_size=3))
def test_it_is_what_the_definition_says(images):
    report, table = quality(*images), by_definition(images)
    number = {c.id: (t := table[c.id])["tp"] + t["fp"] / 2 + t["fn"] / 2 for c in CATEGORIES}
    for name, kinds in (("all", (True, False)), ("things", (True,)), ("stuff", (False,))):
        occur = [table[c.id] | {"n": number[c.id]} for c in CATEGORIES if number[c.id] and c.thing in kinds]
        wanted = Quality(
            pq=mean(row["iou"] / row["n"] for row in occur),
            sq=mean(row["iou"] / row["tp"] if row["tp"] else 0 for row in occur),
            rq=mean(row["tp"] / row["n"] for row in occur),
            categories=len(occur),
        )
        got = getattr(report, name)
        assert got.categories == wanted.categories
        assert (got.pq, got.sq, got.rq) == pytest.approx((wanted.pq, wanted.sq, wanted.rq), abs=1e-9)
    ious = {c.name: table[c.id]["both"] / table[c.id]["either"] for c in CATEGORIES if table[c.id]["either"]}
    assert report.miou == pytest.approx(mean(ious.values()), abs=1e-9)
    assert report.images == len(images)
    assert set(report.classes) == {c.name for c in CATEGORIES if number[c.id]}
    for c in CATEGORIES:
        if number[c.id]:
            row = report.classes[c.name]
            assert (row.tp, row.fp, row.fn) == tuple(table[c.id][key] for key in ("tp", "fp", "fn"))
            assert row.iou == pytest.approx(100 * ious[c.name], abs=1e-9)


# --- its rules, one by one


def counts(report, name="cat"):
    row = report.classes[name]
    return row.tp, row.fp, row.fn


def test_half_an_overlap_is_no_match():
    assert counts(quality(pair([1, 1, 3, 3], [1, 3, 3, 3]))) == (0, 1, 1)
    assert counts(quality(pair([1, 1, 1, 3], [1, 1, 3, 3]))) == (1, 0, 0)


def test_predicted_pixels_on_void_do_not_count():
    report = quality(pair([1, 1, 0, 0, 0], [1, 1, 1, 1, 1]))
    assert counts(report) == (1, 0, 0)
    assert report.all.pq == report.miou == 100


def test_void_that_is_predicted_on_labelled_pixels_is_a_miss():
    report = quality(pair([1, 1, 1, 1], [1, 1, 1, 0]))
    assert (report.classes["cat"].sq, report.miou) == (75, 75)


def test_a_segment_mostly_on_void_is_no_false_positive():
    assert quality(pair([0, 0, 3, 3, 3, 3], [1, 1, 1, 3, 3, 3])).classes.keys() == {"sky"}
    # Exactly half is not mostly.
    assert counts(quality(pair([0, 0, 3, 3, 3, 3], [1, 1, 1, 1, 3, 3]))) == (0, 1, 0)


def test_a_crowd_excuses_its_own_category_only_and_is_never_missed():
    names = {1: 1, 3: 9}
    inside = pair([1, 1, 1, 1], [1, 1, 2, 2], names, {1}, guess={1: 1, 2: 4})
    report = quality(inside)
    assert report.classes.keys() == {"dog"}
    assert counts(report, "dog") == (0, 1, 0)
    # Not even a perfect overlap matches.
    assert quality(pair([1, 1, 3], [1, 1, 3], names, {1})).classes.keys() == {"sky"}


def test_of_two_crowds_of_a_category_the_last_counts():
    truth = np.array([[1, 1, 2, 2]])
    listed = segments(truth, {1: 1, 2: 1}, {1, 2})
    ids = np.array([[5, 5, 0, 0]])
    assert counts(quality((truth, listed, ids, segments(ids, {5: 1})))) == (0, 1, 0)
    assert not quality((truth, listed[::-1], ids, segments(ids, {5: 1}))).classes


def test_images_add_up_and_what_does_not_occur_is_left_out():
    right, wrong = pair([1, 1, 3, 3], [1, 1, 3, 3]), pair([1, 1, 3, 3], [2, 2, 3, 3])
    report = quality(right, wrong)
    assert counts(report) == (1, 0, 1)
    assert counts(report, "dog") == (0, 1, 0)
    assert report.things == Quality(pytest.approx(100 / 3), 50, pytest.approx(100 / 3), 2)
    assert report.stuff == Quality(100, 100, 100, 1)
    assert report.all.categories == 3
    # IoU: cat 2 of 4, dog 0 of 2, sky all.
    assert report.miou == pytest.approx(50)
    body = json.loads(json.dumps(report.summary()))
    assert body["images"] == 2
    assert body["stuff"]["pq"] == 100
    assert body["classes"]["cat"]["fn"] == 1


def test_nothing_at_all_is_zero():
    report = quality()
    assert report.all == report.things == report.stuff == Quality(0, 0, 0, 0)
    assert (report.images, report.miou, report.classes) == (0, 0, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, ts, p, ps: (t, ts, p, ps[:1]), r"photo\.png: the prediction has pixels of the ids \[3\]"),
        (
            lambda t, ts, p, ps: (t, ts, p, (*ps, SegmentInfo(8, 1, 1))),
            r"prediction lists the segments \[8\]",
        ),
        (lambda t, ts, p, ps: (t, ts, p, (*ps, ps[0])), "prediction lists a segment id twice"),
        (lambda t, ts, p, ps: (t, ts, p, (SegmentInfo(0, 1, 1), *ps)), "prediction lists.*not within 1"),
        (lambda t, ts, p, ps: (t, ts, p, (SegmentInfo(1, 5, 1), ps[1])), r"unknown categories: \[5\]"),
        (lambda t, ts, p, ps: (t, ts[:1], p, ps), r"the truth has pixels of the ids \[3\]"),
        (lambda t, ts, p, ps: (t, (*ts, SegmentInfo(8, 1, 1)), p, ps), r"the truth lists the segments \[8\]"),
        (lambda t, ts, p, ps: (t, ts, p.T, ps), r"the truth is \(1, 4\), the prediction \(4, 1\)"),
        (lambda t, ts, p, ps: (t, ts, p * 1.0, ps), "of float64"),
        (lambda t, ts, p, ps: (t, ts, p - 9, ps), "id -8 is outside"),
    ],
)
def test_what_does_not_fit_together_is_refused_and_not_counted(change, words):
    total = PanopticQuality(CATEGORIES)
    with pytest.raises(BadInput, match=words):
        total.add(*change(*pair([1, 1, 3, 3], [1, 1, 3, 3])), "photo.png")
    assert total.report().images == 0
    assert not total.report().classes


def test_categories_must_differ():
    for other in (Category(1, "new", True, (0, 0, 0)), Category(2, "cat", True, (0, 0, 0))):
        with pytest.raises(BadRequest, match="share"):
            PanopticQuality((*CATEGORIES, other))


# --- files


def test_predictions_are_evaluated_from_their_files(tmp_path):
    images = [pair([1, 1, 3, 3], [1, 1, 3, 3]), pair([1, 1, 3, 3], [2, 2, 3, 3])]
    photo = np.zeros((1, 4, 3), np.uint8)
    samples = [NewImage(i, f"{i}.png", photo, im[0], im[1]) for i, im in enumerate(images)]
    truth = read_split(write_panoptic_set(tmp_path / "set", CATEGORIES, {"val": samples}))
    write_predictions(tmp_path / "p.json", ((i, im[2], im[3]) for i, im in enumerate(images)))
    heard = []
    report = evaluate_predictions(truth, tmp_path / "p.json", lambda done, total: heard.append((done, total)))
    assert report == quality(*images)
    assert heard == [(1, 2), (2, 2)]
    write_predictions(tmp_path / "less.json", [(0, images[0][2], images[0][3])])
    with pytest.raises(
        BadInput, match=r"less\.json has no prediction for 1 of the 2 images, 1\.png \(id 1\)"
    ):
        evaluate_predictions(truth, tmp_path / "less.json")


@pytest.mark.skipif(not COCO.is_dir(), reason=f"real panoptic data is not at {COCO}")
def test_figures_of_the_official_code_on_real_data():
    """The truth sampled at every 8th pixel against the truth; figures by COCO's own panopticapi."""
    data = read_split(COCO)
    same, coarse = PanopticQuality(data.categories), PanopticQuality(data.categories)
    spent = []
    for image in data.images:
        ids = read_ids(image.mask)
        height, width = ids.shape
        sampled = ids[::8, ::8].repeat(8, 0).repeat(8, 1)[:height, :width]
        kept = set(np.unique(sampled).tolist())
        same.add(ids, image.segments, ids, image.segments)
        started = time.perf_counter()
        coarse.add(ids, image.segments, sampled, [s for s in image.segments if s.id in kept])
        spent.append(time.perf_counter() - started)
    report = same.report()
    assert (report.all.pq, report.things.pq, report.stuff.pq, report.miou) == (100, 100, 100, 100)
    report = coarse.report()
    got = [
        value for part in (report.all, report.things, report.stuff) for value in (part.pq, part.sq, part.rq)
    ]
    official = [66.450, 77.195, 80.975, 59.395, 75.574, 73.006, 76.187, 79.432, 91.973]
    assert got == pytest.approx(official, abs=5.1e-4)
    # Generous: the machine may be busy.
    assert np.median(spent) < 0.05
