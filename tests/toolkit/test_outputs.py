"""Outputs between machines: every bit arrives, and nothing else is accepted."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vitkit.devices.outputs import fingerprint, pack, unpack
from vitkit.runtimes.card import DTYPES, TensorSpec

anything = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays.arrays(
        dtype,
        arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5).map(lambda shape: (3, *shape)),
        # Bit patterns, so that NaN of every kind are among them.
        elements=arrays.from_dtype(np.dtype(dtype)),
    )
)


def sent(outputs) -> tuple[list, bytes]:
    described, parts = pack(outputs)
    return described, b"".join(part.tobytes() for part in parts)


@settings(max_examples=60, deadline=None)
@given(anything, anything)
def test_every_bit_arrives(a, b):
    # Views of another order, such as vendors return.
    outputs = {"b": b, "a": np.asfortranarray(a)}
    specs = [TensorSpec(name, (None, *value.shape[1:]), value.dtype.name) for name, value in outputs.items()]
    described, data = sent(outputs)
    stream = io.BytesIO(data + b"next")
    found = unpack(described, stream, specs[::-1], 3)
    assert stream.read() == b"next"
    for name, value in outputs.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()
        assert found[name].flags.writeable
        assert fingerprint(found[name]) == fingerprint(value)


SPECS = [TensorSpec("logits", (1, 4), "float32"), TensorSpec("free", (1, None), "float32")]
OUTPUTS = {"logits": np.arange(8, dtype=np.float32).reshape(2, 4), "free": np.zeros((2, 6), np.float32)}


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        (0, {"name": "other"}, "outputs are"),
        (0, {"dtype": "float64"}, "float64"),
        (0, {"dtype": "object"}, "object"),
        (0, {"shape": [2, 5]}, r"\[2, 5\]"),
        (0, {"shape": [3, 4]}, r"\[3, 4\]"),
        (0, {"shape": [2, 4.0]}, "logits"),
        (0, {"shape": [2]}, "logits"),
        (0, {"sha256": "0"}, "damaged"),
        (1, {"shape": [2, -1]}, "free"),
        (1, {"shape": [2, 2**40]}, "free"),
    ],
)
def test_what_the_card_does_not_describe_is_refused(place, change, words):
    described, data = sent(OUTPUTS)
    described[place] = {**described[place], **change}
    with pytest.raises(ValueError, match=words):
        unpack(described, io.BytesIO(data), SPECS, 2)


def test_a_damaged_byte_and_a_broken_stream():
    described, data = sent(OUTPUTS)
    with pytest.raises(ValueError, match="'logits' arrived damaged"):
        unpack(described, io.BytesIO(bytes([data[0] ^ 1]) + data[1:]), SPECS, 2)
    with pytest.raises(EOFError):
        unpack(described, io.BytesIO(data[:-1]), SPECS, 2)
    with pytest.raises(ValueError, match="outputs are"):
        unpack(described[:1], io.BytesIO(data), SPECS, 2)
