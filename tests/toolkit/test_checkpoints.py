"""Importing checkpoints in the authors' layout, built here from its description."""

from __future__ import annotations

import argparse
import json
import os
import pickle

import pytest
import torch
from conftest import lively
from safetensors.torch import save_file

from vitkit import BadInput, BadRequest
from vitkit.models import build
from vitkit.models.checkpoints import load_checkpoint

NANO = "ps_vit_nano"


def theirs(model) -> dict[str, torch.Tensor]:
    """The authors' names for a model's tensors, aliases and buffers included."""
    config, state, result = model.config, model.state_dict(), {}
    for key, tensor in state.items():
        key = key.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
        if key.startswith("sampler.pos_layer."):
            leaf = key.rsplit(".", 1)[1]
            result[f"pos_layer.{leaf}"] = tensor
            result.update({f"ps_layers.{t}.position_layer.{leaf}": tensor for t in range(config.iterations)})
        elif key.startswith("sampler.layers."):
            _, _, index, leaf = key.split(".", 3)
            for t in range(config.iterations) if config.share else [int(index)]:
                result[f"ps_layers.{t}.transformer_layer.{leaf}"] = tensor
        elif key.startswith("sampler.offset_layers."):
            _, _, index, leaf = key.split(".", 3)
            result[f"ps_layers.{index}.offset_layer.{leaf}"] = tensor
        else:
            result[key.replace("encoder.", "trans_layers.")] = tensor
    result["point_coord"] = torch.zeros(1, config.n**2, 2)
    return {name: tensor.clone() for name, tensor in result.items()}


@pytest.fixture(params=[False, True], ids=["plain", "share"])
def model(request):
    return lively(build(NANO, share=request.param))


def load(path, model, **options):
    options = {"share": model.config.share, **options}
    return load_checkpoint(path, "psvit", NANO, options)


@pytest.mark.parametrize("nest", [None, "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_arrive_from_every_nesting(tmp_path, model, nest, prefix):
    state = {prefix + name: tensor for name, tensor in theirs(model).items()}
    body = state if nest is None else {nest: state, "epoch": 3, "args": argparse.Namespace(lr=1)}
    torch.save(body, tmp_path / "a.pth")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "a.pth", model)(images), model(images))


def test_formats_that_store_shared_tensors_once_and_halves(tmp_path, model):
    state = theirs(model)
    slim = {n: t for n, t in state.items() if ".position_layer." not in n and "num_batches" not in n}
    del slim["point_coord"]
    save_file(slim, tmp_path / "a.safetensors")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "a.safetensors", model)(images), model(images))
        torch.save(
            {n: t.half() if t.is_floating_point() else t for n, t in state.items()}, tmp_path / "h.pth"
        )
        half = load(tmp_path / "h.pth", model)
        assert next(half.parameters()).dtype == torch.float32
        assert (half(images) - model(images)).abs().max() < 0.1


def test_the_softmax_scale_is_an_option(tmp_path, model):
    torch.save(theirs(model), tmp_path / "a.pth")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(load(tmp_path / "a.pth", model, qk_scale="dim")(images), model(images))


def test_every_wrong_tensor_is_named(tmp_path):
    model = lively(build(NANO, share=True))
    state = theirs(model)
    del state["norm.bias"]
    state["head.weight"] = state["head.weight"][:3]
    state["extra.weight"] = torch.zeros(2)
    state["ps_layers.2.transformer_layer.norm1.weight"] += 1
    state["ps_layers.1.position_layer.bias"] += 1
    state["trans_layers.0.norm1.bias"][0] = float("nan")
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(BadInput) as error:
        load(tmp_path / "a.pth", model)
    for words in (
        "norm.bias is missing",
        "head.weight is [3, ",
        "extra.weight is extra",
        "ps_layers.2.transformer_layer.norm1.weight differs from ps_layers.0.transformer_layer.norm1.weight",
        "ps_layers.1.position_layer.bias differs from pos_layer.bias",
        "trans_layers.0.norm1.bias holds NaN",
    ):
        assert words in str(error.value)


def test_only_plain_floats_are_weights(tmp_path, model):
    state = theirs(model)
    for name, value in {
        "int": state["head.weight"].to(torch.int8),
        "complex": state["head.weight"].to(torch.complex64),
        "huge": torch.full_like(state["head.weight"], 1e300, dtype=torch.float64),
        "sparse": state["head.weight"].to_sparse(),
    }.items():
        torch.save({**state, "head.weight": value}, tmp_path / f"{name}.pth")
        with pytest.raises(BadInput, match=r"head\.weight (is|holds)"):
            load(tmp_path / f"{name}.pth", model)
    torch.save({**state, "stem.1.running_var": -state["stem.1.running_var"]}, tmp_path / "negative.pth")
    with pytest.raises(BadInput, match="variance"):
        load(tmp_path / "negative.pth", model)
    endless: dict = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "endless.pth")
    with pytest.raises(BadInput, match="dictionary of tensors"):
        load(tmp_path / "endless.pth", model)


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


def test_no_code_runs_and_damaged_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "evil"))
    model = build(NANO)
    state = theirs(model)
    torch.save({"model": state, "note": Evil()}, tmp_path / "evil1.pth")
    torch.save({"model": state, "note": Evil()}, tmp_path / "evil2.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "evil3.pth").write_bytes(pickle.dumps(Evil()))
    torch.save(state, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(whole[:100])
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": {}}, tmp_path / "hollow.pth")
    torch.save({"model": {"a": 1}}, tmp_path / "numbers.pth")
    (tmp_path / "json.pth").write_text(json.dumps({"a": 1}))
    for path in sorted(tmp_path.iterdir()):
        if path.name != "whole.pth":
            with pytest.raises(BadInput, match=path.name):
                load(path, model)
    assert not (tmp_path / "evil").exists()
    with pytest.raises(BadInput, match=r"nowhere\.pth"):
        load(tmp_path / "nowhere.pth", model)
    with pytest.raises(BadRequest, match="kmaxx"):
        load_checkpoint(tmp_path / "whole.pth", "kmaxx", NANO, {})
