"""Overlays of panoptic results: colours, edges, names, the legend, and every size of photograph."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import SHARED

from vitkit import BadInput
from vitkit.data.coco import Category, PanopticImage, SegmentInfo
from vitkit.data.coco.ids import describe_segments, write_ids
from vitkit.data.coco.read import read_split
from vitkit.evaluate.panoptic import truth_as_panoptic
from vitkit.pictures.drawing import class_colour
from vitkit.pictures.panoptic import draw, side_by_side
from vitkit.runtimes.image import read_image
from vitkit.runtimes.panoptic import Panoptic
from vitkit.runtimes.panoptic import Segment as Found

GREY = np.full((400, 600, 3), 100, np.uint8)


def bands(shape=(400, 600)) -> Panoptic:
    """Five columns: void, a box, a box, a ball, sky."""
    ids = np.repeat(np.arange(5, dtype=np.int32), -(-shape[1] // 5))[None, : shape[1]].repeat(
        shape[0], axis=0
    )
    area = int((ids == 1).sum())
    segments = (
        Found(1, 0, "box", True, 0.9, area),
        Found(2, 0, "box", True, 0.8, area),
        Found(3, 1, "ball", True, 0.7, area),
        Found(4, 2, "sky", False, 1.0, area),
    )
    return Panoptic(np.ascontiguousarray(ids), segments)


def pixels(picture):
    return np.asarray(picture).astype(int)


def test_segments_have_their_classes_colours():
    drawn = pixels(draw(GREY, bands(), alpha=0.5))
    top = drawn[10, [60, 180, 300, 420, 540]]
    assert (top[0] == 100).all(), "void stays as it was"
    for found, index, thing in ((top[1], 0, True), (top[3], 1, True), (top[4], 2, False)):
        assert np.abs(found - (100 + np.array(class_colour(index, thing))) / 2).max() <= 1
    assert np.abs(top[1] - top[2]).max() > 5, "instances differ in shade"
    red = pixels(draw(GREY, bands(), {0: (255, 0, 0)}, alpha=1.0))
    assert (red[10, 180] == (255, 0, 0)).all()
    assert (red[10, 540] == class_colour(2, False)).all()
    assert (pixels(draw(GREY, bands(), [(1, 2, 3)], alpha=1.0))[10, 180] == (1, 2, 3)).all()
    plain = pixels(draw(GREY, bands(), alpha=0.0))
    assert (plain[10, [60, 180, 300, 420, 540]] == 100).all()


def test_stuff_is_muted_and_colours_repeat():
    for index in range(200):
        vivid, muted = (np.array(class_colour(index, thing)) for thing in (True, False))
        assert np.ptp(muted) < np.ptp(vivid)
        assert class_colour(index, True) == class_colour(index, True)
    assert len({class_colour(index, True) for index in range(133)}) == 133


def test_things_have_edges_and_stuff_has_none():
    ids = np.zeros((400, 600), np.int32)
    ids[:, 300:] = 1
    drawn = pixels(draw(GREY, Panoptic(ids, (Found(1, 0, "box", True, 0.9, 1),)), alpha=0.0))
    assert (drawn[:400, 300] == 255).all()
    assert (drawn[:400, 299] == 0).all()
    assert (drawn[10, [298, 301]] == 100).all()
    drawn = pixels(draw(GREY, Panoptic(ids, (Found(1, 0, "sky", False, 0.9, 1),)), alpha=0.0))
    assert (drawn[:400] == 100).all()


def test_large_things_bear_their_names():
    plain = draw(GREY, bands(), alpha=0.0, scores=False, legend=False)
    scored = draw(GREY, bands(), alpha=0.0, legend=False)
    middle = pixels(scored)[180:220]
    for column, written in ((60, False), (180, True), (300, True), (420, True), (540, False)):
        assert (middle[:, column - 40 : column + 40] != 100).any() == written
    assert (pixels(plain) != pixels(scored)).any(), "scores change the text"
    small = np.zeros((400, 600), np.int32)
    small[100:106, 100:106] = 1
    drawn = pixels(draw(GREY, Panoptic(small, (Found(1, 0, "box", True, 0.9, 36),)), alpha=0.0))
    assert (drawn[101:105, 101:105] == 100).all(), "no room for text"


def test_the_legend_lies_below():
    picture = draw(GREY, bands())
    alone = draw(GREY, bands(), legend=False)
    assert alone.size == (600, 400)
    assert picture.width == 600
    assert picture.height > 400
    assert (pixels(picture)[:400] == pixels(alone)).all()
    strip = pixels(picture)[400:].reshape(-1, 3)
    for index, thing in ((0, True), (1, True), (2, False)):
        assert (strip == class_colour(index, thing)).all(axis=1).sum() > 60, "a swatch of each class"


def test_the_legend_wraps_and_keeps_its_height():
    many = [Found(i + 1, i, f"a class with a long name {i}", False, 1.0, 1) for i in range(40)]
    long = Panoptic(np.zeros((400, 600), np.int32), tuple(many))
    free = draw(GREY, long).height
    two = {draw(GREY, found, lines=2).height for found in (long, bands(), Panoptic(long.ids, ()))}
    assert len(two) == 1
    assert 400 < two.pop() < free
    endless = Panoptic(long.ids, (Found(1, 0, "x" * 1000 + "\n" + "y", True, 1.0, 1),))
    assert draw(GREY, endless).size == draw(GREY, bands()).size


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 1), (320, 320)),
        ((1, 100), (320, 3)),
        ((100, 1), (3, 320)),
        ((129, 129), (320, 320)),
        ((480, 640), (640, 480)),
        ((6000, 8000), (1600, 1200)),
        ((4000, 100), (40, 1600)),
    ],
)
def test_any_size(shape, size):
    photo = np.zeros((*shape, 3), np.uint8)
    ids = np.ones(shape, np.int32)
    result = Panoptic(ids, (Found(1, 0, "box", True, 0.9, ids.size),))
    assert draw(photo, result, legend=False).size == size
    picture = draw(photo, result)
    assert picture.width == max(size[0], 160)
    assert picture.height > size[1]
    assert max(draw(photo, Panoptic(ids * 0, ()), width=200, legend=False).size) == 200


def test_downscaled_ids_stay_in_place():
    photo = np.zeros((3000, 4000, 3), np.uint8)
    ids = np.zeros((3000, 4000), np.int32)
    ids[750:1500, 1000:3000] = 1
    result = Panoptic(ids, (Found(1, 0, "sky", False, 0.9, 1),))
    drawn = pixels(draw(photo, result, {0: (255, 255, 255)}, alpha=1.0, width=400, legend=False))
    expected = np.zeros((300, 400), bool)
    expected[75:150, 100:300] = True
    assert ((drawn[..., 0] == 255) == expected).all()


def test_a_result_of_another_size_is_refused():
    with pytest.raises(BadInput, match="400, 600"):
        draw(GREY[:100], bands())


def test_drawing_is_quick():
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 31, (12, 16), dtype=np.int32)
    ids = cells.repeat(40, axis=0).repeat(40, axis=1)
    result = Panoptic(ids, tuple(Found(i, i, f"class {i}", i % 2 == 0, 0.9, 9600) for i in range(1, 31)))
    photo = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        draw(photo, result)
        times.append(time.perf_counter() - start)
    # 25 ms on two cores that others use, too.
    assert min(times) < 0.1


CATEGORIES = (
    Category(23, "sky", False, (1, 1, 1)),
    Category(7, "ball", True, (2, 2, 2)),
    Category(9, "box", True, (3, 3, 3)),
)


def test_truth_in_the_form_of_a_result(tmp_path):
    ids = np.zeros((40, 60), np.int32)
    ids[:10], ids[10:30, :20], ids[10:30, 30:35] = 70000, 300, 5
    write_ids(tmp_path / "a.png", ids)
    segments = describe_segments(ids, {70000: 23, 300: 9, 5: 7}, crowds=[5])
    image = PanopticImage(1, tmp_path / "a.jpg", tmp_path / "a.png", 40, 60, segments)
    truth = truth_as_panoptic(image, CATEGORIES)
    assert [(s.id, s.index, s.label, s.thing, s.area) for s in truth.segments] == [
        (1, 0, "sky", False, 600),
        (2, 2, "box", True, 400),
        (3, 1, "ball", True, 100),
    ]
    for segment, old in zip(truth.segments, (70000, 300, 5), strict=True):
        assert ((truth.ids == segment.id) == (ids == old)).all()
    assert (truth.ids == 0).sum() == 40 * 60 - 1100
    strange = replace(image, segments=(*segments, SegmentInfo(8, 99, 1)))
    with pytest.raises(BadInput, match="99"):
        truth_as_panoptic(strange, CATEGORIES)


def test_side_by_side_has_three_panels():
    photo = np.random.default_rng(1).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    sheet = side_by_side(photo, bands(), bands())
    assert sheet.width == 3 * 600 + 12
    assert (np.asarray(sheet)[24:424, :600] == photo).all()
    shown = draw(photo, bands(), width=640)
    assert (np.asarray(sheet)[24:, 606:1206] == np.asarray(shown)).all()
    assert side_by_side(photo, bands(), bands(), width=200).width == 3 * 200 + 12


def test_real_photographs_and_their_truth():
    data = SHARED / "coco-panoptic-100"
    if not data.is_dir():
        pytest.skip(f"real photographs are not at {data}")
    truth = read_split(data)
    for image in truth.images[:6]:
        result = truth_as_panoptic(image, truth.categories)
        assert len(result.segments) == len(image.segments)
        assert [s.area for s in result.segments] == sorted((s.area for s in image.segments), reverse=True)
        picture = draw(read_image(image.file), result)
        assert picture.width == image.width
        assert picture.height > image.height
