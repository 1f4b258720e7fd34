from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vitkit.cli.main import app
from vitkit.data.coco.check import check_panoptic
from vitkit.data.coco.ids import read_ids
from vitkit.data.coco.read import find_splits, read_split
from vitkit.data.convert import CITYSCAPES, CONVERTERS, convert_ade20k, convert_cityscapes
from vitkit.runtimes.errors import BadInput, BadRequest

HEIGHT, WIDTH = 8, 12


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def photo(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


@pytest.fixture
def cityscapes(tmp_path):
    values = np.full((HEIGHT, WIDTH), 7, np.uint16)  # road
    values[:3] = 23  # sky
    values[3, :4] = 26_000  # a car
    values[4, :4] = 26_012  # another
    values[3, 5:9] = 24  # a group of persons
    values[5, :] = 3  # out of the region of interest
    values[6, :6] = 29_001  # a caravan, which is not evaluated
    values[7, 0] = 65_535
    source = tmp_path / "cityscapes"
    for split, city, stem in (("train", "aachen", "a_0"), ("train", "ulm", "u_0"), ("val", "lindau", "l_0")):
        save(source / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png", values)
        save(source / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", values.astype(np.uint8))
        save(source / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", photo())
    return source


def test_cityscapes_becomes_a_clean_set(cityscapes, tmp_path):
    heard = []
    out = convert_cityscapes(cityscapes, tmp_path / "out", lambda done, total: heard.append((done, total)))
    assert heard == [(1, 3), (2, 3), (3, 3)]
    assert check_panoptic(out) == []
    assert [image.image_id for image in read_split(out, "train").images] == ["a_0", "u_0"]
    found = read_split(out, "val")
    assert found.categories == CITYSCAPES
    (image,) = found.images
    original = cityscapes / "leftImg8bit" / "val" / "lindau" / "l_0_leftImg8bit.png"
    assert os.stat(image.file).st_ino == os.stat(original).st_ino
    rows = sorted((s.id, s.category_id, s.area, s.crowd) for s in image.segments)
    assert rows == [
        (7, 7, 12 * 5 - 8 - 4 - 12 - 6 - 1, False),
        (23, 23, 36, False),
        (24, 24, 4, True),
        (26_000, 26, 4, False),
        (26_012, 26, 4, False),
    ]
    ids = read_ids(image.mask)
    assert ids[4, 0] == 26_012
    assert not ids[5].any()
    assert not ids[6, :6].any()
    assert ids[7, 0] == 0


def test_the_classes_of_cityscapes_are_those_of_its_evaluation():
    assert len(CITYSCAPES) == 19
    things = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    assert [category.name for category in CITYSCAPES if category.thing] == things
    assert len({category.colour for category in CITYSCAPES}) == 19


def test_a_split_that_is_absent_is_left_out(cityscapes, tmp_path):
    (cityscapes / "gtFine" / "val").rename(cityscapes / "gtFine" / "test")
    assert list(find_splits(convert_cityscapes(cityscapes, tmp_path / "out"))) == ["train"]


@pytest.fixture
def ade20k(tmp_path):
    source = tmp_path / "ade"
    source.mkdir()
    # As in the original: blanks here and there, synonyms after commas, names of several words.
    lines = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.1\t1\t1\twall", "2\t0.1\t1\t1\tbuilding, edifice"]
    lines += ["3 \t0.1\t1\t1\tpool table, billiard table", "4\t0.1\t1\t1\tbed "]
    (source / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    (source / "categoryMapping.txt").write_text(
        "Instance_100 Sceneparse_150 Name\n1\t4\tbed\n2\t3\tpool_table\n"
    )
    classes = np.full((HEIGHT, WIDTH), 1, np.uint8)
    classes[4:] = 2
    classes[2:6, 2:6] = 4  # a bed
    classes[2:6, 7:9] = 4  # another, which nobody outlined
    classes[0] = 0
    instances = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    instances[2:6, 2:4] = (1, 1, 0)
    instances[2:6, 4:6] = (1, 2, 0)
    instances[6, 0] = (2, 255, 0)  # over the building
    for folder, stem in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        (source / "images" / folder).mkdir(parents=True)
        Image.fromarray(photo()).save(source / "images" / folder / f"{stem}.jpg")
        save(source / "annotations" / folder / f"{stem}.png", classes)
        save(source / "annotations_instance" / folder / f"{stem}.png", instances)
    return source


def test_ade20k_becomes_a_clean_set(ade20k, tmp_path):
    heard = []
    out = convert_ade20k(ade20k, tmp_path / "out", lambda done, total: heard.append((done, total)))
    assert heard == [(1, 2), (2, 2)]
    assert check_panoptic(out) == []
    assert list(find_splits(out)) == ["train", "val"]
    found = read_split(out)
    assert [(c.id, c.name, c.thing) for c in found.categories] == [
        (1, "wall", False),
        (2, "building", False),
        (3, "pool table", True),
        (4, "bed", True),
    ]
    (image,) = found.images
    assert image.image_id == "ADE_val_00000001"
    rows = sorted((s.category_id, s.area) for s in image.segments)
    assert rows == [(1, 36 - 8 - 4), (2, 48 - 8 - 4 - 1), (3, 1), (4, 8), (4, 8)]
    ids = read_ids(image.mask)
    assert not ids[0].any()
    assert not ids[2:6, 7:9].any()


def rewrite(path, pixels):
    Image.fromarray(pixels).save(path)


CITY = "gtFine/val/lindau/l_0_gtFine_instanceIds.png"
CITY_FAULTS = {
    "no photo": (lambda p: (p / "leftImg8bit/val/lindau/l_0_leftImg8bit.png").unlink(), "l_0_leftImg8bit"),
    "colour": (lambda p: rewrite(p / CITY, photo()), "is of mode RGB"),
    "damaged": (lambda p: (p / CITY).write_bytes(b"x"), "l_0_gtFine_instanceIds.png cannot be read"),
    "size": (
        lambda p: rewrite(p / CITY, np.full((4, 4), 7, np.uint16)),
        "12 x 8, but its annotation is 4 x 4",
    ),
    "nothing": (lambda p: (p / "gtFine").rename(p / "gt"), "holds none of these images; wanted are gtFine"),
}
ADE = "annotations/training/ADE_train_00000001.png"
ADE_INSTANCES = "annotations_instance/training/ADE_train_00000001.png"
ADE_FAULTS = {
    "no names": (lambda p: (p / "objectInfo150.txt").unlink(), "comes with ADEChallengeData2016"),
    "no mapping": (lambda p: (p / "categoryMapping.txt").unlink(), "comes with the instance segmentation"),
    "empty mapping": (lambda p: (p / "categoryMapping.txt").write_text(""), "lists no classes"),
    "odd mapping": (lambda p: (p / "categoryMapping.txt").write_text("a\nb c d"), "'b c d' does not begin"),
    "far mapping": (lambda p: (p / "categoryMapping.txt").write_text("a\n1 9 x"), r"the classes \[9\]"),
    "odd names": (lambda p: (p / "objectInfo150.txt").write_text("a\tb\n1\t2"), "Idx and Name"),
    "gap": (lambda p: (p / "objectInfo150.txt").write_text("Idx\tName\n1\ta\n3\tb"), "without a gap"),
    "no truth": (lambda p: (p / ADE).unlink(), "ADE_train_00000001.png is missing; it belongs to"),
    "no instances": (lambda p: (p / ADE_INSTANCES).unlink(), "annotations_instance.*is missing"),
    "class": (lambda p: rewrite(p / ADE, np.full((HEIGHT, WIDTH), 5, np.uint8)), "the class 5; there are 4"),
    "thing": (lambda p: rewrite(p / ADE_INSTANCES, np.full((HEIGHT, WIDTH, 3), 3, np.uint8)), "the class 3"),
    "sizes": (lambda p: rewrite(p / ADE_INSTANCES, np.zeros((2, 2, 3), np.uint8)), "another size"),
    "grey": (lambda p: rewrite(p / ADE_INSTANCES, np.zeros((HEIGHT, WIDTH), np.uint8)), "of mode L"),
    "nothing": (lambda p: (p / "images").rename(p / "photos"), "holds none of these images"),
}


@pytest.mark.parametrize("name", CITY_FAULTS)
def test_faults_of_cityscapes_are_named_and_nothing_is_written(cityscapes, tmp_path, name):
    refused(convert_cityscapes, cityscapes, tmp_path / "out", *CITY_FAULTS[name])


@pytest.mark.parametrize("name", ADE_FAULTS)
def test_faults_of_ade20k_are_named_and_nothing_is_written(ade20k, tmp_path, name):
    refused(convert_ade20k, ade20k, tmp_path / "out", *ADE_FAULTS[name])


def refused(convert, source, out, change, words):
    change(source)
    with pytest.raises(BadInput, match=words):
        convert(source, out)
    assert sorted(path.name for path in out.parent.iterdir()) == [source.name]


@pytest.mark.parametrize("layout", CONVERTERS)
def test_a_folder_that_is_in_use_or_not_there_is_refused(layout, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(BadRequest, match="rm -r"):
        CONVERTERS[layout](tmp_path / "nowhere", tmp_path)
    with pytest.raises(BadInput, match="nowhere"):
        CONVERTERS[layout](tmp_path / "nowhere", tmp_path / "out")


def test_the_command_converts(cityscapes, tmp_path):
    arguments = ["data", "convert", "cityscapes", str(cityscapes), str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"vitkit data check {tmp_path / 'out'}" in result.stderr
    result = CliRunner().invoke(app, ["data", "convert", "voc", str(cityscapes), str(tmp_path / "other")])
    assert "cityscapes, ade20k" in str(result.exception)
