from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vitkit.data.folder import class_names, labelled_images
from vitkit.runtimes.errors import BadInput


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)
    return path


def test_the_first_folder_is_the_class_and_paths_are_sorted(tmp_path):
    zebra = image(tmp_path / "zebra" / "a.png")
    deep = image(tmp_path / "ape" / "young" / "b.jpg")
    ape = image(tmp_path / "ape" / "c.JPEG")
    image(tmp_path / ".cache" / "d.png")
    (tmp_path / "ape" / "notes.txt").write_text("no image")
    assert labelled_images(tmp_path) == [(ape, "ape"), (deep, "ape"), (zebra, "zebra")]


def test_class_names_are_sorted_and_single():
    items = [(Path("x"), "b"), (Path("y"), "a"), (Path("z"), "b")]
    assert class_names(items) == ("a", "b")
    assert class_names([]) == ()


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(BadInput, match="nowhere"):
        labelled_images(tmp_path / "nowhere")


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "ape").mkdir()
    with pytest.raises(BadInput, match="no images"):
        labelled_images(tmp_path)


def test_images_outside_class_folders_are_refused(tmp_path):
    image(tmp_path / "ape" / "a.png")
    image(tmp_path / "loose.png")
    with pytest.raises(BadInput, match=r"loose\.png"):
        labelled_images(tmp_path)
