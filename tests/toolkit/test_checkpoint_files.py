"""Checkpoints as people have them: how trainers nest and wrap weights, and files that are something else."""

from __future__ import annotations

import argparse
import collections
import datetime
import gzip
import io
import json
import pickle
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from vitkit import BadInput, BadRequest
from vitkit.models.state import read_tensors, read_weights

NAMES = ("stem.0.weight", "head.weight", "head.bias")


def state(seed: int = 0, prefix: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {prefix + name: torch.randn(3, generator=generator) for name in NAMES}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.stem(x))


def saved(tmp_path: Path, body: object, name: str = "a.pth") -> Path:
    torch.save(body, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize(
    "prefix",
    [
        "module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.",
        "module.model._orig_mod.", "model._orig_mod.module.", "model.model.", "module.module.",
        "_orig_mod._orig_mod.", "model._fsdp_wrapped_module._orig_mod.",
    ],
)  # fmt: skip
@pytest.mark.parametrize("expected", [(), NAMES])
def test_wrappers_come_off_in_any_order_and_number(tmp_path, prefix, expected):
    assert same(read_tensors(saved(tmp_path, state(0, prefix)), expected), state())


def test_wrappers_of_parts_come_off(tmp_path):
    compiled = {name.replace("head.", "head._orig_mod."): tensor for name, tensor in state().items()}
    assert same(read_tensors(saved(tmp_path, compiled)), state())


def test_a_network_that_has_a_part_called_model_keeps_its_name(tmp_path):
    own = {"model.0.weight": torch.ones(1), "model.1.bias": torch.ones(1)}
    assert same(read_tensors(saved(tmp_path, own), own), own)
    wrapped = {f"module.{name}": tensor for name, tensor in own.items()}
    assert same(read_tensors(saved(tmp_path, wrapped), own), own)


def test_what_lightning_keeps_beside_the_network_keeps_its_name(tmp_path):
    body = {
        "epoch": 3, "global_step": 100, "pytorch-lightning_version": "2.5", "loops": {"fit_loop": {}},
        "state_dict": {**state(0, "model."), "criterion.weight": torch.ones(2)},
        "optimizer_states": [{"state": {}, "param_groups": []}], "hyper_parameters": {"lr": 1e-3},
    }  # fmt: skip
    found = read_tensors(saved(tmp_path, body, "epoch=3.ckpt"), NAMES)
    assert same(found, {**state(), "criterion.weight": torch.ones(2)})


def test_torchs_own_average_loses_its_counter(tmp_path):
    """As AveragedModel of torch.compile of a module leaves it."""
    network = Numbers()
    average = torch.optim.swa_utils.AveragedModel(torch.compile(network))
    found = read_tensors(saved(tmp_path, average.state_dict()))
    assert same(found, network.state_dict())


TIMM = {"epoch": 9, "arch": "x", "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}, "version": 2}
EMA = {
    "timm": {**TIMM, "state_dict": state(1), "state_dict_ema": state(2, "module.")},
    "deit": {"model": state(1), "model_ema": state(2), "optimizer": {"state": {}}, "scaler": {}, "epoch": 1},
    "detectron2": {"model": state(1), "ema_state": state(2), "iteration": 7},
    "mmengine": {"meta": {"epoch": 1}, "state_dict": state(1), "ema_state_dict": state(2, "module.")},
    "nested": {"model": {"model": state(1), "ema": {"module": state(2)}}},
    "averaged": {"net": state(1), "ema_model": {**state(2, "module."), "n_averaged": torch.tensor(5)}},
    "lightning": {
        "state_dict": {
            **state(1, "model."), **state(2, "ema_model.module."), "ema_model.n_averaged": torch.tensor(5)
        }
    },
    "shadow": {"params": state(1), "ema": {"decay": 0.9, "shadow": state(2)}},
    "flat": {**state(1), **state(2, "ema.")},
}  # fmt: skip


@pytest.mark.parametrize("kind", EMA)
def test_averages_beside_plain_weights_are_named_and_chosen(tmp_path, kind):
    path = saved(tmp_path, EMA[kind])
    for chosen, seed in ((None, 1), ("plain", 1), ("ema", 2)):
        found = read_weights(path, chosen, NAMES)
        assert found.kinds == ("plain", "ema")
        assert found.kind == (chosen or "plain")
        assert same(found.tensors, state(seed))


def test_a_kind_of_weights_that_is_not_there_is_refused(tmp_path):
    plain, average = saved(tmp_path, {"model": state()}), saved(tmp_path, {"model_ema": state()}, "ema.pth")
    with pytest.raises(BadRequest, match="plain weights alone"):
        read_weights(plain, "ema")
    with pytest.raises(BadRequest, match=r"moving average \(ema\) alone"):
        read_weights(average, "plain")
    assert read_weights(average).kind == "ema"


@pytest.mark.parametrize(
    "body",
    [
        {"model": state(), "lr": torch.tensor(0.1)},
        {"model": {"name": "vit"}, "state_dict": state()},
        {"params": {"lr": 0.1}, "weights": state()},
        {"module": state(), "ds_version": "0.17", "optimizer": None},
        {**state(), "epoch": 7, "name": "x"},
    ],
)
def test_the_dictionary_with_the_tensors_is_found(tmp_path, body):
    assert same(read_tensors(saved(tmp_path, body), NAMES), state())


def test_two_networks_in_one_file_are_not_mixed(tmp_path):
    path = saved(tmp_path, {**state(1, "model."), **state(2, "module.")})
    with pytest.raises(BadInput, match=r"two networks.*model\.stem.*module\.stem"):
        read_tensors(path, NAMES)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    "beside",
    [
        np.float64(81.3), np.float32(1), np.int64(3), np.bool_(True), np.arange(3), np.dtype("f4"),
        np.array(["a", None], object), Path("runs/1"), {"rng": np.random.get_state()}, [np.float64(1)],
        np.random.default_rng(0), datetime.datetime(2026, 1, 2), types.SimpleNamespace(lr=0.1),
        collections.defaultdict(list, {"loss": [1.0]}), collections.deque([1.0, 2.0], 5),
        collections.OrderedDict(a=np.float32(1)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_numbers_of_numpy_beside_the_weights_do_no_harm(tmp_path, beside, old):
    path = tmp_path / "a.pth"
    torch.save({"model": state(), "best": beside}, path, _use_new_zipfile_serialization=not old)
    assert same(read_tensors(path), state())


def test_loggers_of_mmengine_beside_the_weights_are_not_imported(tmp_path, monkeypatch):
    """As its HistoryBuffer is stored: arrays, and functions of the class, by a package that is not here."""
    package = types.ModuleType("mmengine")
    buffers = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history = np.arange(3.0)
            self._statistics_methods = {"mean": HistoryBuffer.mean}

        def mean(self) -> None: ...

    HistoryBuffer.__module__ = buffers.__name__
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    HistoryBuffer.mean.__module__ = buffers.__name__
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    buffers.HistoryBuffer = HistoryBuffer
    with monkeypatch.context() as patch:
        for module in (package, types.ModuleType("mmengine.logging"), buffers):
            patch.setitem(sys.modules, module.__name__, module)
        hub = {"log_scalars": {"loss": HistoryBuffer()}}
        path = saved(tmp_path, {"state_dict": state(), "message_hub": hub, "meta": {"seed": np.int64(1)}})
    assert same(read_tensors(path), state())
    assert "mmengine" not in sys.modules


def test_a_kind_of_object_that_is_not_known_is_named_with_the_cure(tmp_path):
    class Trainer:
        pass

    Trainer.__module__, Trainer.__qualname__ = __name__, "Trainer"
    globals()["Trainer"] = Trainer
    path = saved(tmp_path, {"model": state(), "trainer": Trainer()})
    with pytest.raises(BadInput, match=r"without running its code.*Trainer.*torch\.save\(model\.state_dict"):
        read_tensors(path)
    whole = saved(tmp_path, Numbers(), "whole.pth")
    with pytest.raises(BadInput, match=r"it needs .*Numbers.*torch\.save\(model\.state_dict"):
        read_tensors(whole)


def test_a_placeholder_calls_nothing(tmp_path):
    class Seed:
        def __reduce__(self):
            return np.random.seed, (1234,)

    before = np.random.get_state()[1].copy()
    path = saved(tmp_path, {"model": state(), "note": Seed()})
    assert same(read_tensors(path), state())
    assert np.array_equal(np.random.get_state()[1], before)


def test_files_are_known_by_their_content_and_not_their_names(tmp_path):
    save_file(state(), tmp_path / "a.pth")
    save_file(state(), tmp_path / "a.bin")
    torch.save(state(), tmp_path / "b.safetensors")
    # As the training script of torchvision and many others call it.
    torch.save({"state_dict": state()}, tmp_path / "model_best.pth.tar")
    for path in tmp_path.iterdir():
        assert same(read_tensors(path), state()), path


def inside_zip(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def inside_tar(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def pickled(body: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(body, buffer)
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
SCRIPTED = io.BytesIO()
torch.jit.save(torch.jit.trace(Numbers(), torch.zeros(1, 2)), SCRIPTED)
ONNX = b"\x08\x0a\x12\x07pytorch\x1a\x052.13.0:\x10"
FOREIGN = {
    "pointer.pth": (POINTER, "Git LFS pointer.*git lfs pull"),
    "annex.pth": (b"/annex/objects/SHA256E-s12--ab.pth\n", "git-annex pointer.*git annex get"),
    "page.pth": (b"<!DOCTYPE html>\n<html><head>", "web page.*direct link"),
    "page.safetensors": (b"\n <html>\n<title>Sign in</title>", "web page"),
    "xml.pth": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "empty.pth": (b"", "is empty; copy or download"),
    "empty.safetensors": (b"", "is empty; copy or download"),
    "cut.pth": (pickled(state())[:500], "cut off.*500 bytes"),
    "cut-inside.safetensors": (save(state())[:-7], r"cut off: it has \d+ of \d+ bytes"),
    "cut-early.safetensors": (save(state())[:60], r"cut off: it has 60 of \d+ bytes"),
    "boxed.pth": (inside_zip("w/best.pth", pickled(state())), r"ZIP archive with w/best\.pth.*zipfile -e"),
    "boxed.zip": (inside_zip("readme.txt", b"hello"), "ZIP archive without a checkpoint"),
    "boxed.tar": (inside_tar("w/last.ckpt", pickled(state())), r"tar archive with w/last\.ckpt.*tarfile -e"),
    "boxed.pth.gz": (gzip.compress(pickled(state())), "compressed by gzip.*gunzip"),
    "scripted.pt": (SCRIPTED.getvalue(), r"TorchScript.*torch\.jit\.load"),
    "exported.pt2": (inside_zip("m/archive_format", b"pt2"), "exported program"),
    "keras.keras": (inside_zip("model.weights.h5", b"x"), "TensorFlow or Keras"),
    "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5.*Keras"),
    "model.ckpt-1.index": (b"\x00\x01\x02", "TensorFlow"),
    "model.ckpt.data-00000-of-00001": (b"\x00\x01\x02", "TensorFlow"),
    "saved_model.pb": (b"\x08\x01\x12", "TensorFlow"),
    "model.onnx": (ONNX, "ONNX model.*PyTorch checkpoint"),
    "renamed-onnx.pth": (ONNX, "ONNX model"),
    "model.tflite": (b"\x1c\x00\x00\x00TFL3" + bytes(50), "TFLite model"),
    "renamed-tflite.pth": (b"\x1c\x00\x00\x00TFL3" + bytes(50), "TFLite model"),
    "arrays.npz": (inside_zip("a.npy", b"\x93NUMPY"), "numpy arrays"),
    "array.npy": (b"\x93NUMPY\x01\x00", "numpy array"),
    "index.json": (json.dumps({"weight_map": {"a": "1.safetensors"}}).encode(), "split over several"),
    "error.pth": (b'{"message": "not found"}', "is text, not weights.*not found"),
    "plain.pkl": (pickle.dumps({"model": {"a": 1}}), "a pickle that torch.save did not write"),
    "noise.pth": (bytes(range(1, 255)) * 9, "is no checkpoint, or damaged"),
    "optimizer.bin": (pickled({"state": {0: {"a": 1}}, "param_groups": [{"lr": 1}]}), "optimiser"),
    "numpy.pth": (pickled({"model": {"a.weight": np.ones(3)}}), r"numpy must be tensors.*torch\.from_numpy"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_checkpoint_is_named_with_its_cause_and_cure(tmp_path, name):
    content, message = FOREIGN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput, match=f"(?s){message}") as error:
        read_tensors(path)
    assert str(path) in str(error.value)


def test_a_folder_names_the_file_of_its_weights(tmp_path):
    """As accelerate's save_state leaves it."""
    for name in ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadInput, match=r"is a folder.*/model\.safetensors"):
        read_tensors(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="folder without a checkpoint"):
        read_tensors(tmp_path / "empty")


def test_a_deep_and_wide_checkpoint_takes_no_time(tmp_path):
    """Dictionaries that share their parts: 2 ** 60 ways lead to the bottom, where there is no tensor."""
    body: dict = {"a": 1}
    for _ in range(60):
        body = {"model": body, "state_dict": body}
    with pytest.raises(BadInput, match="holds no weights"):
        read_tensors(saved(tmp_path, body))
