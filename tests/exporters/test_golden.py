from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkit.exporters.golden import GOLDEN_FILE, MAX_PAIRS, read_golden, write_golden
from vitkit.runtimes import Artifact, BadArtifact, ImageSpec, ModelCard, TensorSpec

CARD = ModelCard(
    name="m",
    task="classification",
    target="onnx",
    precision="fp32",
    inputs=(TensorSpec("image", (None, 4, 6, 3), "uint8"),),
    outputs=(TensorSpec("logits", (None, 2), "float32"),),
    image=ImageSpec((4, 6)),
)
IMAGES = np.arange(3 * 4 * 6 * 3, dtype=np.uint8).reshape(3, 4, 6, 3)
LOGITS = np.arange(6, dtype=np.float32).reshape(3, 2)


def npy(array, version=None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), version=version)
    return buffer.getvalue()


def write(folder, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(folder / GOLDEN_FILE, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return Artifact(folder, CARD)


GOOD = {"input.image.npy": npy(IMAGES), "output.logits.npy": npy(LOGITS)}


@pytest.mark.parametrize("order", ["C", "F"])
def test_pairs_read_back_equal(tmp_path, order):
    write_golden(tmp_path, np.asarray(IMAGES, order=order), {"logits": np.asarray(LOGITS, order=order)})
    inputs, outputs = read_golden(Artifact(tmp_path, CARD))
    assert np.array_equal(inputs, IMAGES)
    assert outputs.keys() == {"logits"}
    assert np.array_equal(outputs["logits"], LOGITS)


LENGTH = 1 << 26
BOMBS = {
    "a tensor of other sizes": (lambda: npy(np.zeros((3, LENGTH // 3), np.uint8)), "the card says"),
    "many pairs": (lambda: npy(np.zeros((LENGTH // 72, 4, 6, 3), np.uint8)), f"at most {MAX_PAIRS}"),
    "bytes behind the tensor": (lambda: npy(IMAGES) + bytes(LENGTH), "does not describe"),
    "a long header": (lambda: b"\x93NUMPY\2\0" + struct.pack("<I", LENGTH) + b" " * LENGTH, "array header"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, kind):
    content, words = BOMBS[kind]
    artifact = write(tmp_path, {**GOOD, "input.image.npy": content()})
    assert (tmp_path / GOLDEN_FILE).stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(BadArtifact, match=words):
            read_golden(artifact)
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


def test_a_size_that_lies_is_refused(tmp_path):
    write(tmp_path, {**GOOD, "output.logits.npy": npy(LOGITS) + bytes(1 << 26)})
    body = bytearray((tmp_path / GOLDEN_FILE).read_bytes())
    true, said = struct.pack("<I", 128 + 24 + (1 << 26)), struct.pack("<I", 128 + 24)
    assert body.count(true) == 2
    (tmp_path / GOLDEN_FILE).write_bytes(body.replace(true, said))
    tracemalloc.start()
    try:
        with pytest.raises(BadArtifact, match="CRC"):
            read_golden(Artifact(tmp_path, CARD))
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("members", "method", "words"),
    [
        (GOOD, zipfile.ZIP_LZMA, "method 14"),
        (GOOD, zipfile.ZIP_BZIP2, "method 12"),
        (
            {"input.image": GOOD["input.image.npy"], "output.logits.npy": GOOD["output.logits.npy"]},
            8,
            "lacks",
        ),
        ({"input.image.npy": npy(IMAGES)}, 8, "lacks output.logits"),
        ({**GOOD, "output.logits.npy": npy(LOGITS[:2])}, 8, r"of \[2, 3\] images"),
        ({**GOOD, "output.logits.npy": npy(LOGITS[:0])}, 8, r"\[0, 2\]"),
        ({**GOOD, "output.logits.npy": npy(LOGITS.astype(np.float64))}, 8, "float64"),
        ({**GOOD, "output.logits.npy": npy(np.full((3, 2), None))}, 8, "object"),
        ({**GOOD, "output.logits.npy": npy(LOGITS, (3, 0))}, 8, "version"),
        ({**GOOD, "output.logits.npy": b"hello"}, 8, "magic"),
    ],
)
def test_an_archive_of_something_else_is_refused(tmp_path, members, method, words):
    with pytest.raises(BadArtifact, match=words):
        read_golden(write(tmp_path, members, method))


def test_an_archive_of_more_bytes_than_all_pairs_have_is_not_opened(tmp_path):
    write(tmp_path, {**GOOD, "more": bytes(2 << 20)}, zipfile.ZIP_STORED)
    with pytest.raises(BadArtifact, match="at most"):
        read_golden(Artifact(tmp_path, CARD))
    (tmp_path / GOLDEN_FILE).unlink()
    (tmp_path / GOLDEN_FILE).symlink_to("/dev/zero")
    with pytest.raises(BadArtifact, match="not a regular file"):
        read_golden(Artifact(tmp_path, CARD))


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.none() | st.integers(0, 10**6))
def test_damaged_bytes_give_the_pairs_or_an_error(tmp_path_factory, place, value, cut):
    folder = tmp_path_factory.mktemp("golden")
    write(folder, GOOD)
    body = bytearray((folder / GOLDEN_FILE).read_bytes())
    body[place % len(body)] = value
    (folder / GOLDEN_FILE).write_bytes(body[: None if cut is None else cut % len(body)])
    try:
        inputs, outputs = read_golden(Artifact(folder, CARD))
    except BadArtifact:
        return
    assert np.array_equal(inputs, IMAGES)
    assert np.array_equal(outputs["logits"], LOGITS)
