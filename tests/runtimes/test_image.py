"""Image preparation against torchvision's transforms, which the papers' code evaluates with."""

from __future__ import annotations

import struct
import zlib
from importlib import import_module

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from vitkit.runtimes import BadInput, ImageSpec
from vitkit.runtimes.image import (
    find_images,
    generated_photos,
    placement,
    prepare,
    read_image,
    resize_and_crop,
)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), side=st.sampled_from([32, 64, 224]))
def test_square_preparation_equals_torchvision(height, width, side):
    import_module("vitkit.torchvision_shim")
    v2 = import_module("torchvision.transforms.v2")

    assume(max(height, width) <= 100 * min(height, width))
    spec = ImageSpec((side, side))
    image = noise(height, width)
    steps = v2.Compose(
        [v2.Resize(int(side / 0.9), interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(side)]
    )
    expected = np.asarray(steps(Image.fromarray(image)))
    assert np.array_equal(resize_and_crop(image, spec), expected)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    size=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    crop=st.floats(0.3, 1),
)
def test_any_shape_fits_and_the_placement_stays_inside(height, width, size, crop):
    assume(max(height, width) <= 100 * min(height, width))
    spec = ImageSpec(size, crop_pct=crop)
    assert prepare(noise(height, width), spec).shape == (*size, 3)
    corners = np.array([[-0.5, -0.5], [size[0] - 0.5, size[1] - 0.5]])
    (top, left), (bottom, right) = placement(height, width, spec).to_photo(corners)
    assert -0.51 <= top < bottom <= height - 0.49
    assert -0.51 <= left < right <= width - 0.49


def test_placement_finds_a_mark_again():
    photo = np.zeros((300, 500, 3), np.uint8)
    photo[140:160, 270:290] = 255
    spec = ImageSpec((100, 100))
    y, x = np.nonzero(prepare(photo, spec)[..., 0] > 128)
    found = placement(300, 500, spec).to_photo(np.array([y.mean(), x.mean()]))
    assert np.abs(found - [149.5, 279.5]).max() < 1.5


def test_float_input_is_normalised_nchw():
    image = noise(40, 40)
    spec = ImageSpec((40, 40), crop_pct=1, layout="NCHW", dtype="float32")
    pixels = image.astype(np.float64) / 255
    expected = ((pixels - spec.mean) / spec.std).transpose(2, 0, 1)
    prepared = prepare(image, spec)
    assert prepared.dtype == np.float32
    assert prepared.flags.c_contiguous
    assert np.abs(prepared - expected).max() < 1e-5
    bgr = prepare(image, ImageSpec((40, 40), crop_pct=1, colour="BGR"))
    assert np.array_equal(bgr, image[..., ::-1])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ([[1, 2, 3]], "list"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4), np.uint8), r"\(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"\(1, 4, 4, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((1, 5000, 3), np.uint8), "longer than wide"),
    ],
)
def test_what_is_no_image_is_refused(image, words):
    with pytest.raises(BadInput, match=words):
        prepare(image, ImageSpec((8, 8)))


def test_files_of_every_kind_become_upright_rgb(tmp_path):
    image = Image.fromarray(noise(20, 30))
    for mode, name in [("L", "l.png"), ("P", "p.png"), ("RGBA", "a.png"), ("CMYK", "c.jpg"), ("1", "b.png")]:
        image.convert(mode).save(tmp_path / name)
        assert read_image(tmp_path / name).shape == (20, 30, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(np.asarray(image), -1))


def test_unreadable_files_are_named(tmp_path):
    good = tmp_path / "good.jpg"
    Image.fromarray(noise(60, 60)).save(good)
    body = good.read_bytes()
    bad = {
        "cut.jpg": body[: len(body) // 2],
        "empty.png": b"",
        "text.jpg": b"hello",
        "head.png": b"\x89PNG\r\n\x1a\n" + b"\x00" * 40,
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=name):
            read_image(tmp_path / name)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(BadInput, match="8 bits"):
        read_image(tmp_path / "deep.png")
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    rows = zlib.compress((b"\x00" + b"\x12\x34" * 6) * 2)
    (tmp_path / "deep rgb.png").write_bytes(header + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    with pytest.raises(BadInput, match="8 bits"):
        read_image(tmp_path / "deep rgb.png")
    with pytest.raises(BadInput, match="nowhere"):
        read_image(tmp_path / "nowhere.png")


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_found_images_are_sorted_and_visible(tmp_path):
    for name in ("b/2.PNG", "a.jpg", "b/1.jpeg", ".hidden.jpg", ".cache/3.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)] == [
        "a.jpg",
        "b/1.jpeg",
        "b/2.PNG",
    ]
    with pytest.raises(BadInput, match="nowhere"):
        find_images(tmp_path / "nowhere")


def test_generated_photos_repeat_and_differ():
    first, again = generated_photos(3, seed=5), generated_photos(2, seed=5)
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], first[1])
    for photo in first:
        assert photo.dtype == np.uint8
        assert photo.std() > 15
