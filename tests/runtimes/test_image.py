"""Image preparation against torchvision's transforms, which the papers' code evaluates with."""

from __future__ import annotations

import os
import struct
import zlib
from importlib import import_module

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, TiffImagePlugin

from vitkit.runtimes import BadInput, ImageSpec
from vitkit.runtimes.image import (
    _crop_origin,
    _resized_part,
    _resized_size,
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


def resized_whole(image, spec):
    """The whole image resized, then cropped: what `resize_and_crop` stands for."""
    resized = _resized_size(image.shape[0], image.shape[1], spec)
    whole = Image.fromarray(image).resize(resized[::-1], Image.Resampling[spec.interpolation.upper()])
    top, left = _crop_origin(resized, spec)
    return np.asarray(whole)[top : top + spec.size[0], left : left + spec.size[1]]


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(300, 1500),
    width=st.integers(300, 1500),
    size=st.tuples(*[st.sampled_from([1, 7, 32, 96, 224, 299, 518])] * 2),
    crop=st.sampled_from([0.4, 0.875, 0.9, 1.0]) | st.floats(0.4, 1),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic"]),
)
@example(1080, 1920, (224, 224), 0.9, "bicubic")
@example(1920, 1080, (224, 224), 0.9, "bicubic")
@example(2160, 1080, (224, 224), 0.875, "bicubic")
@example(1500, 1000, (64, 299), 0.5, "bilinear")
@example(1000, 1000, (64, 299), 0.9, "nearest")
def test_resizing_only_what_is_kept_equals_resizing_all(height, width, size, crop, interpolation):
    spec = ImageSpec(size, crop_pct=crop, interpolation=interpolation)
    assume(max(_resized_size(height, width, spec)) < 2500)
    image = noise(height, width)
    apart = resized_whole(image, spec).astype(int) - resize_and_crop(image, spec)
    assert np.abs(apart).max() <= (0 if interpolation == "nearest" else 1)
    assert np.count_nonzero(apart) <= max(3, 0.05 * apart.size)


@pytest.mark.parametrize(("height", "width"), [(1080, 1920), (1920, 1080), (3024, 4032)])
def test_a_frame_of_a_camera_is_not_resized_whole(height, width):
    spec = ImageSpec((224, 224))
    resized = _resized_size(height, width, spec)
    rows, columns = _resized_part((height, width), resized, _crop_origin(resized, spec), spec)
    computed = (rows[1] - rows[0]) * (columns[1] - columns[0])
    assert 224 * 224 <= computed < min(0.8 * resized[0] * resized[1], 1.2 * 224 * 224)


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


KINDS = ["png", "webp", "jpg", "tif"]


def damaged_exif(folder, kind, header):
    """A 30 x 20 image whose EXIF header is `header`."""
    path = folder / f"x.{kind}"
    image = Image.fromarray(noise(20, 30))
    if kind == "tif":
        # Tag 34665 points at EXIF's own directory: here beyond the file, or at nonsense.
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[34665] = int.from_bytes(header[:4], "little")
        image.save(path, tiffinfo=tags)
    else:
        image.save(path, exif=header, **({"lossless": True} if kind == "webp" else {}))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "header",
    [
        b"nonsense",
        b"Exif\0\0",
        b"Exif\0\0\0\x08\0\2\x01\x12\0\3\0\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\3\0",
        # The orientation, as text.
        b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\2\0\0\0006\0\0\0\0\0\0\0",
    ],
)
def test_a_damaged_exif_header_leaves_the_image_as_it_stands(tmp_path, kind, header):
    image = read_image(damaged_exif(tmp_path, kind, header))
    assert image.shape == (20, 30, 3)
    if kind != "jpg":
        assert np.array_equal(image, noise(20, 30))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_becomes_upright(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.kron(noise(2, 3), np.ones((16, 16, 1), np.uint8)))
    image.save(tmp_path / f"x.{kind}", exif=exif)
    with Image.open(tmp_path / f"x.{kind}") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    assert np.array_equal(read_image(tmp_path / f"x.{kind}"), expected)


def test_a_cut_image_with_a_damaged_exif_header_is_still_unreadable(tmp_path):
    path = damaged_exif(tmp_path, "jpg", b"nonsense")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadInput, match=r"x\.jpg"):
        read_image(path)


def test_only_regular_files_are_read_as_images(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zeros.png").symlink_to("/dev/zero")
    for name in ("fifo.png", "zeros.png"):
        with pytest.raises(BadInput, match=f"{name}.*not a regular file"):
            read_image(tmp_path / name)


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


def test_generated_photos_repeat_and_differ():
    first, again = generated_photos(3, seed=5), generated_photos(2, seed=5)
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], first[1])
    for photo in first:
        assert photo.dtype == np.uint8
        assert photo.std() > 15
