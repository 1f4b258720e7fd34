from __future__ import annotations

import logging
import os

import numpy as np
import pytest
from PIL import Image

from vitkit.runtimes import BadInput
from vitkit.runtimes.image import read_image
from vitkit.runtimes.listing import _warn_once, find_images, image_suffixes, list_images


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def found(folder):
    return [path.relative_to(folder).as_posix() for path in list_images(folder).images]


def test_found_images_are_sorted_and_visible(tmp_path):
    make(tmp_path, "b/2.PNG", "a.jpg", "b/1.jpeg", ".hidden.jpg", ".cache/3.jpg", "b.d/x.png")
    assert found(tmp_path) == ["a.jpg", "b.d/x.png", "b/1.jpeg", "b/2.PNG"]
    assert list_images(tmp_path).note is None
    with pytest.raises(BadInput, match="nowhere"):
        find_images(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "suffix",
    [".jfif", ".jpe", ".pgm", ".pbm", ".avif", ".gif", ".jp2", ".tga", ".webp", ".tiff", ".bmp", ".qoi"],
)
def test_what_pillow_reads_is_found_and_read(tmp_path, suffix):
    if suffix not in image_suffixes():
        assert suffix in (".avif", ".qoi", ".jp2"), "only these are missing from some builds of Pillow"
        pytest.skip(f"this Pillow has no decoder for {suffix}")
    mode = {".pgm": "L", ".pbm": "1", ".gif": "P"}.get(suffix, "RGB")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / f"x{suffix}")
    (path,) = find_images(tmp_path)
    assert read_image(path).shape == (12, 16, 3)


@pytest.mark.parametrize(
    "suffix", [".pdf", ".eps", ".psd", ".pfm", ".ico", ".mpg", ".heic", ".h5", ".txt", ""]
)
def test_other_files_are_left_out_and_named(tmp_path, suffix, caplog):
    make(tmp_path, "good.jpg", f"a/other{suffix}")
    listing = list_images(tmp_path)
    assert [path.name for path in listing.images] == ["good.jpg"]
    (names,) = listing.left_out.values()
    assert names == (f"a/other{suffix}",)
    assert f"a/other{suffix}" in listing.note
    _warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "vitkit"):
        find_images(tmp_path)
        find_images(tmp_path)
    (record,) = caplog.records
    assert record.getMessage() == listing.note


def test_many_are_counted_and_some_named(tmp_path):
    make(tmp_path, "a.jpg", *(f"{i:02}.heic" for i in range(20)))
    assert list_images(tmp_path).note == (
        f"left out in {tmp_path}: 20 files .heic (00.heic, 01.heic, 02.heic, ...)"
    )


def test_thumbnails_of_systems_are_no_images(tmp_path):
    make(tmp_path, "a/1.jpg", "a/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/a/1.jpg", ".thumbnails/1.png")
    make(tmp_path, "a/Thumbs.db", "a/._1.jpg", "#recycle/2.jpg")
    assert found(tmp_path) == ["a/1.jpg"]
    (names,) = list_images(tmp_path).left_out.values()
    assert names == ("#recycle", "__MACOSX", "a/@eaDir")


def test_links_are_followed_to_each_folder_once(tmp_path):
    make(tmp_path, "set/a/1.jpg", "set/b/2.jpg", "away/deep/3.jpg")
    (tmp_path / "set" / "c").symlink_to(tmp_path / "away")
    (tmp_path / "set" / "a" / "again").symlink_to(tmp_path / "set" / "b")
    (tmp_path / "set" / "b" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "b" / "above").symlink_to("/")
    (tmp_path / "away" / "self").symlink_to(tmp_path / "away")
    (tmp_path / "set" / "b" / "file.jpg").symlink_to(tmp_path / "set" / "a" / "1.jpg")
    (tmp_path / "set" / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "set" / "b" / "fifo.jpg")
    listing = list_images(tmp_path / "set")
    assert found(tmp_path / "set") == ["a/1.jpg", "b/2.jpg", "b/file.jpg", "c/deep/3.jpg"]
    assert listing.left_out == {
        "broken links": ("b/gone.jpg",),
        "links to folders that are read already": ("a/again", "b/above", "b/up", "c/self"),
        "that are no regular files": ("b/fifo.jpg",),
    }
    assert found(tmp_path / "set" / "c") == ["deep/3.jpg"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may open every folder")
def test_folders_that_cannot_be_opened_are_named(tmp_path):
    make(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "b").chmod(0)
    try:
        assert list_images(tmp_path).left_out == {"folders that cannot be opened": ("b",)}
    finally:
        (tmp_path / "b").chmod(0o755)
