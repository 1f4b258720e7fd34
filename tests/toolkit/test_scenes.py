from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from vitkit.cli.main import app
from vitkit.data.coco.check import check_panoptic
from vitkit.data.coco.read import read_split
from vitkit.data.scenes import CATEGORIES, THINGS, draw_scene, write_scenes
from vitkit.runtimes.errors import BadRequest
from vitkit.runtimes.image import read_image


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def scenes(count: int, size: int = 129):
    for seed in range(count):
        yield draw_scene(np.random.default_rng(seed), size)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "set", train=12, val=4, size=64)


def test_the_set_is_clean_and_has_its_layout(small):
    assert check_panoptic(small) == []
    assert sorted(p.name for p in small.iterdir()) == ["annotations", "train", "val"]
    for split, count in (("train", 12), ("val", 4)):
        found = read_split(small, split)
        assert found.categories == CATEGORIES
        assert [image.file.name for image in found.images] == [f"{i:06d}.png" for i in range(count)]
        assert {read_image(image.file).shape for image in found.images} == {(64, 64, 3)}


@pytest.mark.parametrize("size", [32, 33, 129, 200])
def test_any_size_gives_a_clean_set(tmp_path, size):
    data = write_scenes(tmp_path / "set", train=3, val=1, size=size, seed=size)
    assert check_panoptic(data) == []
    assert read_split(data).images[0].height == size


def test_same_seed_same_bytes_and_more_images_leave_the_earlier_ones(small, tmp_path):
    first = contents(small)
    assert contents(write_scenes(tmp_path / "again", train=12, val=4, size=64)) == first
    more = contents(write_scenes(tmp_path / "more", train=15, val=6, size=64))
    pictures = [name for name in first if name.endswith(".png")]
    assert {name: more[name] for name in pictures} == {name: first[name] for name in pictures}
    other = contents(write_scenes(tmp_path / "other", train=12, val=4, size=64, seed=1))
    assert not [name for name in first if other[name] == first[name]]
    assert len(set(first.values())) == len(first)


def test_every_class_occurs_and_stuff_has_two_or_three_regions():
    segments = [scene[2] for scene in scenes(60)]
    kinds = {segment.category_id for found in segments for segment in found}
    assert kinds == {category.id for category in CATEGORIES}
    things = {category.id for category in THINGS}
    assert {sum(s.category_id in things for s in found) for found in segments} >= set(range(1, 8))
    regions = {sum(s.category_id not in things for s in found) for found in segments}
    assert regions == {2, 3}
    assert min(s.area for found in segments for s in found) >= 0.001 * 129 * 129


def test_instances_of_a_class_that_touch_differ_in_colour():
    things = {category.id for category in THINGS}
    touching = 0
    for pixels, ids, segments in scenes(60):
        named = {s.id: s.category_id for s in segments if s.category_id in things}
        pairs = np.concatenate(
            [
                np.stack([ids[:, 1:].ravel(), ids[:, :-1].ravel()]),
                np.stack([ids[1:].ravel(), ids[:-1].ravel()]),
            ],
            axis=1,
        )
        for one, other in np.unique(pairs[:, pairs[0] < pairs[1]], axis=1).T.tolist():
            if named.get(one, -1) == named.get(other, -2):
                touching += 1
                colours = [np.median(pixels[ids == number], axis=0) for number in (one, other)]
                assert np.abs(colours[0] - colours[1]).max() > 30
    assert touching >= 10


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"train": 0}, "train"), ({"val": -1}, "val"), ({"size": 31}, "31"), ({"seed": -1}, "seed")],
)
def test_bad_numbers_are_refused(tmp_path, changes, named):
    with pytest.raises(BadRequest, match=named):
        write_scenes(tmp_path / "set", **{"train": 1, "val": 1, "size": 32, **changes})
    assert not any(tmp_path.iterdir())


def test_an_output_that_holds_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(BadRequest, match="rm -r"):
        write_scenes(tmp_path, train=1, val=1)
    with pytest.raises(BadRequest, match="is a file"):
        write_scenes(tmp_path / "keep.txt", train=1, val=1)
    assert contents(tmp_path) == {"keep.txt": b"mine"}


def test_interrupted_drawing_leaves_nothing(tmp_path):
    heard = []

    def stop(done: int, total: int) -> None:
        heard.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "set", train=3, val=3, size=32, progress=stop)
    assert heard == [(done, 6) for done in range(1, 4)]
    assert not any(tmp_path.iterdir())


# --- the commands


def vitkit(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_the_command_draws_scenes_and_finds_them_clean(tmp_path):
    drawn = vitkit("data", "shapes", "--task", "panoptic", "--train", 3, "--val", 2, tmp_path / "set")
    assert "3 training and 2 validation images" in drawn.stderr
    assert read_split(tmp_path / "set").images[0].width == 129
    clean = vitkit("data", "check", tmp_path / "set")
    assert clean.stdout == ""
    assert "no problem in 5 images" in clean.stderr
    assert json.loads(vitkit("data", "check", tmp_path / "set", "--json").stdout) == {"problems": []}


def test_the_command_lists_every_problem(tmp_path):
    data = write_scenes(tmp_path / "set", train=1, val=2, size=32)
    lost = [data / "val" / f"{i:06d}.png" for i in range(2)]
    for path in lost:
        path.unlink()
    lines = vitkit("data", "check", data, code=2).stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(path) for path in lost]
    body = json.loads(vitkit("data", "check", data, "--json", code=2).stdout)
    assert [row["file"] for row in body["problems"]] == [str(path) for path in lost]


def test_the_command_still_draws_a_classification_set(tmp_path):
    vitkit("data", "shapes", tmp_path / "set", "--train", 10, "--val", 10, "--size", 32)
    assert read_image(tmp_path / "set" / "val" / "ring" / "00000.png").shape == (32, 32, 3)
    refused = CliRunner().invoke(app, ["data", "shapes", "--task", "detection", str(tmp_path / "other")])
    assert isinstance(refused.exception, BadRequest)
    assert "classification, panoptic" in str(refused.exception)
