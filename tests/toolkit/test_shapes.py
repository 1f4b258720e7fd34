from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitkit.data.shapes import CLASSES, draw_shape, write_shapes
from vitkit.runtimes.errors import BadRequest


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "set", train=25, val=10, size=32)


def test_layout_is_balanced_class_folders_of_images_of_the_asked_size(small):
    assert sorted(p.name for p in small.iterdir()) == ["train", "val"]
    counts = {name: len(list((small / "train" / name).iterdir())) for name in CLASSES}
    assert sum(counts.values()) == 25
    assert set(counts.values()) == {2, 3}
    assert sorted(p.parent.name for p in (small / "val").rglob("*.png")) == sorted(CLASSES)
    for path in small.rglob("*.png"):
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((32, 32), "RGB")


def test_same_seed_same_bytes_and_more_images_leave_the_earlier_ones(small, tmp_path):
    first = contents(small)
    assert contents(write_shapes(tmp_path / "again", train=25, val=10, size=32)) == first
    more = contents(write_shapes(tmp_path / "more", train=40, val=20, size=32))
    assert {name: more[name] for name in first} == first
    other = contents(write_shapes(tmp_path / "other", train=25, val=10, size=32, seed=1))
    assert other.keys() == first.keys()
    assert not [name for name in first if other[name] == first[name]]


def test_no_image_of_val_is_in_train(small):
    images = contents(small)
    assert len(set(images.values())) == len(images)


def test_only_the_outline_tells_the_class():
    """With the same random numbers, two classes differ inside one disc and nowhere else."""
    size = 64
    for seed in range(5):
        images = [draw_shape(label, np.random.default_rng(seed), size) for label in range(len(CLASSES))]
        for one, other in itertools.combinations(images, 2):
            rows, columns = np.nonzero((one != other).any(axis=2))
            assert len(rows) >= 20
            assert max(np.ptp(rows), np.ptp(columns)) <= 2 * 0.36 * size + 2


def test_a_linear_model_on_pixels_cannot_solve_it():
    def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % len(CLASSES)
        images = [draw_shape(c, np.random.default_rng([seed, i]), 64) for i, c in enumerate(labels)]
        pixels = np.stack(images).reshape(count, -1).astype(np.float32) / 255 - 0.5
        return np.c_[pixels, np.ones(count, np.float32)], labels

    (x, y), (unseen, truth) = draw(1500, 1), draw(500, 2)
    right = []
    for strength in (1e1, 1e3, 1e5):
        # Ridge regression to one-hot targets, solved in its dual form.
        dual = np.linalg.solve(x @ x.T + strength * np.eye(len(x)), np.eye(len(CLASSES))[y])
        right.append((((unseen @ x.T) @ dual).argmax(axis=1) == truth).mean())
        if strength == 1e1:
            assert ((x @ x.T @ dual).argmax(axis=1) == y).mean() > 0.95, "the baseline does not even fit"
    assert max(right) < 0.4


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"train": 0}, "train"), ({"val": -1}, "val"), ({"size": 15}, "15"), ({"seed": -1}, "seed")],
)
def test_bad_numbers_are_refused(tmp_path, changes, named):
    with pytest.raises(BadRequest, match=named):
        write_shapes(tmp_path / "set", **{"train": 10, "val": 10, "size": 16, **changes})
    assert not any(tmp_path.iterdir())


def test_an_output_that_holds_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(BadRequest, match="rm -r"):
        write_shapes(tmp_path, train=10, val=10)
    with pytest.raises(BadRequest, match="is a file"):
        write_shapes(tmp_path / "keep.txt", train=10, val=10)
    assert contents(tmp_path) == {"keep.txt": b"mine"}


def test_an_empty_output_folder_is_used(tmp_path):
    (tmp_path / "set").mkdir()
    write_shapes(tmp_path / "set", train=10, val=10, size=16)
    assert len(contents(tmp_path / "set")) == 20


def test_interrupted_drawing_leaves_nothing(tmp_path):
    heard = []

    def stop(done: int, total: int) -> None:
        heard.append((done, total))
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "set", train=10, val=10, size=16, progress=stop)
    assert heard == [(done, 20) for done in range(1, 6)]
    assert not any(tmp_path.iterdir())
