from __future__ import annotations

import contextlib
import copy
import json
import os
from unicodedata import normalize

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitkit.data.coco import Category, SegmentInfo
from vitkit.data.coco.check import check_panoptic
from vitkit.data.coco.ids import MAX_ID, describe_segments, measure_segments, read_ids, write_ids
from vitkit.data.coco.read import find_splits, read_predictions, read_split
from vitkit.data.coco.write import NewImage, write_panoptic_set, write_predictions
from vitkit.runtimes.errors import BadInput, BadRequest

COCO = SHARED / "coco-panoptic-100"
SAMPLE = SHARED / "panopticapi-sample"
CATEGORIES = (
    Category(3, "cat", True, (200, 10, 10)),
    Category(7, "dog", True, (10, 200, 10)),
    Category(90, "grass", False, (10, 10, 200)),
    Category(92, "sky", False, (10, 200, 200)),
)
# Ids that a wrong byte order or a wrong type would show.
CAT, DOG, CROWD, GRASS, SKY = 5, 70_000, 300, MAX_ID, 0x0A0B0C
NAMES = {CAT: 3, DOG: 7, CROWD: 3, GRASS: 90, SKY: 92}


def picture(seed: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((10, 14), np.int32)
    ids[:4], ids[5:] = SKY, GRASS
    ids[2:6, 1:4], ids[6:9, 5 + seed : 9], ids[7:, 12:] = CAT, DOG, CROWD
    return np.random.default_rng(seed).integers(0, 256, (10, 14, 3), np.uint8), ids


def samples(count: int, start: int = 0):
    for i in range(start, start + count):
        pixels, ids = picture(i % 3)
        yield NewImage(i + 40, f"photo{i}.png", pixels, ids, describe_segments(ids, NAMES, {CROWD}))


@pytest.fixture
def data(tmp_path):
    return write_panoptic_set(tmp_path / "set", CATEGORIES, {"train": samples(3), "val": samples(2, 10)})


def edit(data, change, split="val"):
    path = data / "annotations" / f"panoptic_{split}.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


# --- segment ids


def test_ids_are_red_plus_256_green_plus_65536_blue(tmp_path):
    pixels = np.zeros((1, 4, 3), np.uint8)
    pixels[0] = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (3, 2, 1)]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    ids = read_ids(tmp_path / "a.png")
    assert ids.dtype == np.int32
    assert ids.tolist() == [[0, 1, 256, 3 + 2 * 256 + 65536]]
    write_ids(tmp_path / "b.png", ids)
    with Image.open(tmp_path / "b.png") as image:
        assert np.array_equal(np.asarray(image), pixels)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), height=st.integers(1, 9), width=st.integers(1, 9), few=st.booleans())
def test_ids_survive_a_file_and_are_measured_as_pixel_sets_are(tmp_path_factory, seed, height, width, few):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 4 if few else MAX_ID + 1, (height, width))
    path = tmp_path_factory.getbasetemp() / "ids.png"
    write_ids(path, ids)
    assert np.array_equal(read_ids(path), ids)
    measured = measure_segments(ids)
    assert measured.keys() == set(ids.ravel().tolist()) - {0}
    for number, (area, box) in measured.items():
        pixels = [(y, x) for y in range(height) for x in range(width) if ids[y, x] == number]
        y, x = zip(*pixels, strict=True)
        assert area == len(pixels)
        assert box == (min(x), min(y), max(x) - min(x) + 1, max(y) - min(y) + 1)


def test_alpha_and_orientation_tags_do_not_change_ids(tmp_path):
    _, ids = picture(0)
    write_ids(tmp_path / "a.png", ids)
    with Image.open(tmp_path / "a.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.convert("RGBA").save(tmp_path / "b.png", exif=exif)
    assert np.array_equal(read_ids(tmp_path / "b.png"), ids)


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16", "LA"])
def test_images_that_hold_no_ids_are_refused(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(BadInput, match=r"a\.png.*8 bits"):
        read_ids(tmp_path / "a.png")


def test_deep_and_damaged_images_are_refused(tmp_path):
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compress(b"".join(b"\0" + bytes(12) for _ in range(2)))
    head = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(whole)
    with pytest.raises(BadInput, match="8 bits"):
        read_ids(tmp_path / "deep.png")
    write_ids(tmp_path / "a.png", picture(0)[1])
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for name in ("cut.png", "missing.png"):
        with pytest.raises(BadInput, match=f"{name} cannot be read"):
            read_ids(tmp_path / name)


@pytest.mark.parametrize(
    "ids",
    [np.zeros((2, 2)), np.zeros(4, int), np.zeros((0, 2), int), np.full((2, 2), -1), np.full((2, 2), 2**24)],
    ids=["floats", "flat", "empty", "negative", "large"],
)
def test_ids_that_a_png_cannot_hold_are_refused_and_nothing_is_written(tmp_path, ids):
    with pytest.raises(BadInput):
        write_ids(tmp_path / "a.png", ids)
    assert not any(tmp_path.iterdir())


# --- reading a set


def test_a_set_is_read_as_it_was_written(data):
    found = read_split(data, "train")
    assert found.categories == CATEGORIES
    assert [image.file.name for image in found.images] == ["photo0.png", "photo1.png", "photo2.png"]
    for i, image in enumerate(found.images):
        pixels, ids = picture(i)
        assert (image.image_id, image.height, image.width) == (40 + i, 10, 14)
        assert np.array_equal(read_ids(image.mask), ids)
        assert np.array_equal(np.asarray(Image.open(image.file)), pixels)
        assert image.segments == describe_segments(ids, NAMES, {CROWD})
    crowd = next(segment for segment in found.images[0].segments if segment.crowd)
    assert crowd == SegmentInfo(CROWD, 3, 6, True, (12, 7, 2, 3))
    assert check_panoptic(data) == []


def test_the_split_is_chosen_or_named(data):
    assert list(find_splits(data)) == ["train", "val"]
    assert read_split(data).source.name == "panoptic_val.json"
    with pytest.raises(BadInput, match="no split 'test'; it has train, val"):
        read_split(data, "test")
    (data / "annotations" / "panoptic_val.json").rename(data / "annotations" / "panoptic_other.json")
    with pytest.raises(BadInput, match="other, train; name one"):
        read_split(data)


def test_a_folder_without_a_set_is_told_the_layout(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BadInput, match=r"annotations/panoptic_<split>\.json"):
            find_splits(folder)


def test_whole_floats_are_numbers_and_categories_need_no_colour(data):
    def change(body):
        for category in body["categories"]:
            del category["color"]
        segment = body["annotations"][0]["segments_info"][0]
        segment["area"] = float(segment["area"])
        segment["iscrowd"] = False

    edit(data, change)
    colours = [category.colour for category in read_split(data).categories]
    assert len(set(colours)) == len(colours)
    assert read_split(data).categories == read_split(data).categories
    assert check_panoptic(data) == []


def segment(body):
    return body["annotations"][1]["segments_info"][0]


# What is done to the JSON, and the words that must come back.
FAULTS = {
    "no categories": (lambda b: b.pop("categories"), "'categories' is missing"),
    "images no list": (lambda b: b.update(images={}), "'images' is an object"),
    "image no object": (lambda b: b["images"].append([1]), "images[2] is a list"),
    "segment no object": (lambda b: b["annotations"][0]["segments_info"].append("x"), "is a text"),
    "category id twice": (lambda b: b["categories"][1].update(id=3), "category id 3 occurs twice"),
    "category name twice": (lambda b: b["categories"][1].update(name="cat"), "name 'cat' occurs twice"),
    "category of no kind": (lambda b: b["categories"][1].pop("isthing"), "'isthing' is missing"),
    "category of odd kind": (lambda b: b["categories"][1].update(isthing=2), "'isthing' is 2"),
    "category without name": (lambda b: b["categories"][1].update(name=""), "'name' is ''"),
    "colour": (lambda b: b["categories"][1].update(color=[1, 2, 300]), "'color' is [1, 2, 300]"),
    "image id twice": (lambda b: b["images"][1].update(id=50), "image id 50 occurs twice"),
    "image id true": (lambda b: b["images"][1].update(id=True), "'id' is True"),
    "file twice": (lambda b: b["images"][1].update(file_name="photo10.png"), "occurs twice"),
    "file elsewhere": (lambda b: b["images"][1].update(file_name="../train/photo0.png"), "must be inside"),
    "file absolute": (lambda b: b["images"][1].update(file_name="/etc/passwd"), "must be inside"),
    "height": (lambda b: b["images"][1].update(height=0), "'height' is 0"),
    "width": (lambda b: b["images"][1].update(width="14"), "'width' is '14'"),
    "huge": (lambda b: b["images"][1].update(width=10**30), "'width' is 1000"),
    "image alone": (lambda b: b["annotations"].pop(), "'photo11.png' (id 51) has no annotation"),
    "annotation alone": (lambda b: b["annotations"][1].update(image_id=9), "there is no such image"),
    "annotated twice": (lambda b: b["annotations"].append(b["annotations"][0]), "another annotation"),
    "mask twice": (lambda b: b["annotations"][1].update(file_name="photo10.png"), "names the file"),
    "mask missing": (lambda b: b["annotations"][1].update(file_name="x.png"), "panoptic_val/x.png"),
    "photo missing": (lambda b: b["images"][1].update(file_name="x.png"), "val/x.png"),
    "segment id 0": (lambda b: segment(b).update(id=0), "'id' is 0"),
    "segment id large": (lambda b: segment(b).update(id=2**24), "'id' is 16777216"),
    "segment id twice": (
        lambda b: b["annotations"][1]["segments_info"].append(segment(b)),
        "segment id 5 occurs twice",
    ),
    "area": (lambda b: segment(b).update(area=0), "'area' is 0"),
    "box": (lambda b: segment(b).update(bbox=[1, 2, 3]), "'bbox' is [1, 2, 3]"),
    "crowd": (lambda b: segment(b).update(iscrowd="no"), "'iscrowd' is 'no'"),
    "unknown category": (lambda b: segment(b).update(category_id=4), "4, which is not among"),
    "fraction": (lambda b: segment(b).update(category_id=3.5), "'category_id' is 3.5"),
    "nothing": (lambda b: b.update(images=[], annotations=[]), "annotates no image"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_json_are_named_in_reading_and_in_checking(data, name):
    change, words = FAULTS[name]
    edit(data, change)
    with pytest.raises(BadInput) as caught:
        read_split(data)
    assert "val" in str(caught.value)
    assert words in str(caught.value)
    assert any(words in str(problem) for problem in check_panoptic(data))
    assert len(read_split(data, "train").images) == 3


def test_keys_that_other_tools_leave_out_are_done_without(data):
    """Area, box, crowd, sizes and the PNG's name follow from the PNGs and the image's name."""
    whole = read_split(data)

    def strip(body):
        for image, annotation in zip(body["images"], body["annotations"], strict=True):
            del image["height"], image["width"], annotation["file_name"]
            for i, info in enumerate(annotation["segments_info"]):
                del info["area"]
                info["bbox"] = (None, [])[i % 2]
                if not info["iscrowd"]:
                    del info["iscrowd"]

    edit(data, strip)
    assert check_panoptic(data) == []
    found = read_split(data)
    for image, full in zip(found.images, whole.images, strict=True):
        assert (image.image_id, image.file, image.mask) == (full.image_id, full.file, full.mask)
        assert (image.height, image.width) == (None, None)
        bare = [SegmentInfo(s.id, s.category_id, crowd=s.crowd) for s in full.segments]
        assert list(image.segments) == bare
    Image.new("RGB", (14, 9)).save(found.images[0].file)
    (problem,) = check_panoptic(data)
    assert problem.file == found.images[0].file
    assert problem.message == "the image is 14 x 9, in the PNG of its segments it is 14 x 10"


def test_sparse_segments_are_written_as_they_are(data, tmp_path):
    ids = picture(0)[1]
    bare = tuple(SegmentInfo(s.id, s.category_id) for s in describe_segments(ids, NAMES))
    write_panoptic_set(
        tmp_path / "bare", CATEGORIES, {"val": [NewImage(1, "a.png", picture(0)[0], ids, bare)]}
    )
    assert read_split(tmp_path / "bare").images[0].segments == bare


def test_names_that_begin_with_their_folder_are_found(data):
    def prefix(body):
        for image, annotation in zip(body["images"], body["annotations"], strict=True):
            image["file_name"] = f"val/{image['file_name']}"
            annotation["file_name"] = f"panoptic_val/{annotation['file_name']}"

    whole = read_split(data)
    edit(data, prefix)
    assert [(i.file, i.mask) for i in read_split(data).images] == [(i.file, i.mask) for i in whole.images]
    assert check_panoptic(data) == []


@pytest.mark.parametrize(("in_json", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_file_names_of_another_normal_form_are_found(data, in_json, on_disk):
    name = "dé/caf\u00e9"
    folders = {"images": data / "val", "annotations": data / "annotations" / "panoptic_val"}
    for folder in folders.values():
        path = folder / f"{normalize(on_disk, name)}.png"
        path.parent.mkdir()
        (folder / "photo11.png").rename(path)

    def rename(body):
        for key in folders:
            body[key][1]["file_name"] = f"{normalize(in_json, name)}.png"

    edit(data, rename)
    (image,) = (image for image in read_split(data).images if image.image_id == 51)
    assert image.file.is_file()
    assert image.mask.is_file()
    assert check_panoptic(data) == []
    source = data / "annotations" / "panoptic_val.json"
    assert {png.is_file() for png, _ in read_predictions(source).values()} == {True}


def test_category_names_that_differ_in_normal_form_alone_are_one(data):
    def rename(body):
        for category, form in zip(body["categories"], ("NFC", "NFD"), strict=False):
            category["name"] = normalize(form, "é")

    edit(data, rename)
    with pytest.raises(BadInput, match="occurs twice"):
        read_split(data)


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"images": NaN}', "\ufffe", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"]
)
def test_what_is_no_json_is_refused(data, text):
    path = data / "annotations" / "panoptic_val.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"panoptic_val\.json"):
        read_split(data)
    with pytest.raises(BadInput, match=r"panoptic_val\.json"):
        read_predictions(path)
    assert [problem.file for problem in check_panoptic(data)] == [path]


def places(node, path=()):
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def test_junk_in_any_place_is_either_taken_or_refused(tmp_path):
    data = write_panoptic_set(tmp_path / "set", CATEGORIES, {"val": samples(1)})
    path = data / "annotations" / "panoptic_val.json"
    body = json.loads(path.read_text())
    body["annotations"][0]["segments_info"] = body["annotations"][0]["segments_info"][:1]
    del body["categories"][1:]
    junk = (None, [], {}, -1, "x", 1e300, True, "\ud800", "a" * 5000, [[1]], {"id": 1})
    refused = 0
    for place in list(places(body))[1:]:
        for value in junk:
            changed = copy.deepcopy(body)
            node = changed
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = value
            path.write_text(json.dumps(changed))
            for problem in check_panoptic(data):
                str(problem).encode()
            try:
                read_split(data)
            except BadInput as error:
                str(error).encode()
                refused += 1
            with contextlib.suppress(BadInput):
                read_predictions(path)
    assert refused > 200


# --- checking


def test_every_problem_is_found_with_its_file(data):
    masks, photos = data / "annotations" / "panoptic_val", data / "val"
    ids = read_ids(masks / "photo10.png")
    ids[ids == DOG] = 1234
    ids[0, 0] = CAT
    write_ids(masks / "photo10.png", ids)
    write_ids(masks / "stranger.png", ids)
    Image.new("RGB", (14, 10)).save(photos / "stranger.png")
    Image.new("RGB", (10, 14)).save(photos / "photo11.png")
    Image.new("L", (14, 10)).save(masks / "photo11.png")
    write_ids(data / "annotations" / "panoptic_train" / "photo0.png", picture(0)[1][:-1])
    (data / "train" / "photo1.png").write_bytes(b"no image")
    (data / "annotations" / "panoptic_train" / "photo2.png").unlink()
    edit(data, lambda body: body["annotations"][1]["segments_info"][4].update(category_id=92))
    edit(data, lambda body: body["categories"][0].update(name="kitten"))

    heard = []
    found = check_panoptic(data, lambda done, total: heard.append((done, total)))
    assert heard == [(i, 5) for i in range(1, 6)]
    expected = [
        (masks / "photo10.png", "does not list the ids 1234"),
        (masks / "photo10.png", "segment 70000 of segments_info is not in the PNG"),
        (masks / "photo10.png", "segment 5 has 13 pixels, its 'area' is 12"),
        (masks / "photo10.png", "segment 5 has the box [0, 0, 4, 6], its 'bbox' is [1, 2, 3, 4]"),
        (masks / "photo10.png", "pixels, its 'area' is 50"),
        (masks / "stranger.png", "does not name it as a mask"),
        (photos / "stranger.png", "does not name it as an image"),
        (photos / "photo11.png", "the image is 10 x 14, in the JSON it is 14 x 10"),
        (masks / "photo11.png", "no image of segment ids"),
        (masks / "photo11.png", "2 segments are sky"),
        (data / "annotations" / "panoptic_train" / "photo0.png", "the PNG is 14 x 9"),
        (data / "train" / "photo1.png", "cannot be read as an image"),
        (data / "annotations" / "panoptic_train" / "photo2.png", "the file is missing"),
        (data / "annotations" / "panoptic_val.json", "categories differ from those of"),
    ]
    for file, words in expected:
        assert any(problem.file == file and words in problem.message for problem in found), (file, words)
    # What comes on top are the sizes of the segments that lost pixels with the last row of photo0.
    rest = [p for p in found if not any(p.file == file and words in p.message for file, words in expected)]
    assert {problem.file.name for problem in rest} == {"photo0.png"}


def test_missing_folders_are_one_problem_each(data):
    (data / "val").rename(data / "photos")
    (data / "annotations" / "panoptic_train").rename(data / "annotations" / "masks")
    assert [problem.file.name for problem in check_panoptic(data)] == ["panoptic_train", "val"]
    with pytest.raises(BadInput, match="val: the folder is missing"):
        read_split(data)


# --- writing


def test_photographs_given_as_files_are_linked_not_encoded(tmp_path):
    pixels, ids = picture(0)
    Image.fromarray(pixels).save(tmp_path / "real.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "real.jpg")
    sample = NewImage("one", "city/one.jpg", tmp_path / "link.jpg", ids, describe_segments(ids, NAMES))
    data = write_panoptic_set(tmp_path / "set", CATEGORIES, {"val": [sample]})
    (image,) = read_split(data).images
    assert image.mask == data / "annotations" / "panoptic_val" / "city" / "one.png"
    assert os.stat(image.file).st_ino == os.stat(tmp_path / "real.jpg").st_ino
    assert not image.file.is_symlink()
    assert check_panoptic(data) == []


def test_a_set_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(BadRequest, match="rm -r"):
        write_panoptic_set(tmp_path / "full", CATEGORIES, {"val": samples(1)})
    with pytest.raises(BadRequest, match="is a file"):
        write_panoptic_set(tmp_path / "full" / "mine.txt", CATEGORIES, {"val": samples(1)})
    with pytest.raises(BadInput, match=r"two images.*photo0\.png"):
        write_panoptic_set(tmp_path / "set", CATEGORIES, {"val": [*samples(1), *samples(1)]})
    _, ids = picture(0)
    with pytest.raises(BadRequest, match=r"cannot write.*a\.jpg"):
        write_panoptic_set(
            tmp_path / "set", CATEGORIES, {"val": [NewImage(1, "a.jpg", tmp_path / "none.jpg", ids, ())]}
        )
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    with pytest.raises(BadInput, match="16777215 in the map"):
        describe_segments(ids, {CAT: 3, DOG: 7, CROWD: 3, SKY: 92})


# --- predictions


def test_predictions_are_read_as_they_were_written(tmp_path):
    _, ids = picture(0)
    segments = describe_segments(ids, NAMES)
    scored = [SegmentInfo(s.id, s.category_id, s.area, box=s.box, score=0.5) for s in segments]
    write_predictions(tmp_path / "out.json", [(139, ids, scored), ("a/b", ids, segments)], CATEGORIES)
    assert (tmp_path / "out" / "000000000139.png").is_file()
    found = read_predictions(tmp_path / "out.json")
    assert found[139][1] == tuple(scored)
    assert found["a/b"][1] == segments
    for png, _ in found.values():
        assert np.array_equal(read_ids(png), ids)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.json"]


def test_sparse_predictions_beside_their_json_are_read(tmp_path):
    write_ids(tmp_path / "a.png", np.array([[1, 2]]))
    infos = [{"id": 1, "category_id": 3}, {"id": 2, "category_id": 99, "score": 1, "area": 1.0}]
    entry = {"image_id": 7, "file_name": "a.png", "segments_info": infos}
    (tmp_path / "p.json").write_text(json.dumps({"annotations": [entry]}))
    png, segments = read_predictions(tmp_path / "p.json")[7]
    assert png == tmp_path / "a.png"
    assert segments == (SegmentInfo(1, 3), SegmentInfo(2, 99, 1, score=1))
    for change, words in (
        ({"file_name": "b.png"}, r"b\.png is missing"),
        ({"image_id": None}, "'image_id' is None"),
        ({"segments_info": None}, "'segments_info' is missing"),
        ({"segments_info": [{"id": 1}]}, "'category_id' is missing"),
        ({"segments_info": [{"id": 0, "category_id": 3}]}, "'id' is 0"),
        ({"segments_info": [{"id": 1, "category_id": 3, "score": "high"}]}, "'score' is 'high'"),
        ({"segments_info": infos + infos}, "segment id 1 occurs twice"),
    ):
        (tmp_path / "p.json").write_text(json.dumps({"annotations": [entry | change]}))
        with pytest.raises(BadInput, match=rf"(p\.json|b\.png).*{words}|{words}"):
            read_predictions(tmp_path / "p.json")
    (tmp_path / "p.json").write_text(json.dumps({"annotations": [entry, entry]}))
    with pytest.raises(BadInput, match="image id 7 occurs twice"):
        read_predictions(tmp_path / "p.json")


def test_predictions_are_written_whole_or_not_at_all(tmp_path):
    _, ids = picture(0)
    (tmp_path / "old").mkdir()
    for name in ("out.txt", "old.json"):
        with pytest.raises(BadRequest, match=r"old|named"):
            write_predictions(tmp_path / name, [])
    with pytest.raises(BadInput, match="two predictions for the image 1"):
        write_predictions(tmp_path / "out.json", [(1, ids, ()), (1, ids, ())])

    def stopped():
        yield 1, ids, ()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(tmp_path / "out.json", stopped())
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


# --- real data


@pytest.mark.skipif(not COCO.is_dir(), reason=f"real panoptic data is not at {COCO}")
def test_real_coco_data_is_read_and_clean():
    found = read_split(COCO)
    assert (len(found.images), len(found.categories)) == (100, 133)
    assert sum(category.thing for category in found.categories) == 80
    assert sum(len(image.segments) for image in found.images) == 1111
    assert check_panoptic(COCO) == []


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"the sample of panopticapi is not at {SAMPLE}")
def test_the_layout_of_panopticapis_sample_is_read():
    assert list(find_splits(SAMPLE)) == ["examples"]
    found = read_split(SAMPLE)
    assert found.categories[0] == Category(1, "person", True, (220, 20, 60))
    assert [image.file.parent.name for image in found.images] == ["input_images"] * 2
    assert check_panoptic(SAMPLE) == []
    assert len(read_predictions(found.source)) == 2
