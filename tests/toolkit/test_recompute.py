from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from test_train import TINY, data  # noqa: F401
from torch import nn

from vitkit.models import build
from vitkit.models.remax import RelaxedTraining
from vitkit.runtimes.errors import BadRequest
from vitkit.train import train
from vitkit.train.recompute import recompute
from vitkit.train.schedule import make_optimizer

PANOPTIC = {
    "image_size": 65, "num_classes": 4, "pixel_widths": (8, 8, 8, 8), "queries": 4, "query_width": 8,
    "mask_width": 8, "ffn_width": 8, "aspp_width": 8, "heads": 2,
}  # fmt: skip


def kept_bytes(forward) -> int:
    """Bytes of all that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


@pytest.mark.parametrize("name", ["ps_vit_nano", "remax_nano"])
def test_recomputing_changes_neither_gradients_nor_statistics_and_keeps_less(name):
    torch.manual_seed(0)
    network = build(name, **(PANOPTIC if name == "remax_nano" else {"drop_path": 0.2, "dropout": 0.1}))
    module = RelaxedTraining(network) if name == "remax_nano" else network
    module.train()
    twin = copy.deepcopy(module)
    recompute((twin.model if name == "remax_nano" else twin).layers().values())
    images = torch.randn(2, 3, *[network.config.image_size] * 2)
    results, kept = [], []
    for one in (module, twin):

        def loss(one=one):
            torch.manual_seed(1)
            out = one(images)
            results.append(out if name == "ps_vit_nano" else out.final.masks + out.blocks[0].masks.mean())

        kept.append(kept_bytes(loss))
        torch.manual_seed(1)
        out = one(images)
        (
            out if name == "ps_vit_nano" else out.final.masks + out.blocks[0].masks.mean()
        ).square().mean().backward()
    assert torch.equal(results[0], results[1])
    assert kept[1] < 0.7 * kept[0]
    for (key, one), two in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), key
        assert one.grad is None or torch.allclose(one.grad, two.grad, atol=1e-7, rtol=1e-4), key
    for (key, one), two in zip(module.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, two), key


def test_training_with_recomputation_is_the_same_training(data, tmp_path):  # noqa: F811
    runs = [
        train(replace(TINY, ema=0.9, recompute=value), data, tmp_path / str(value), progress=False)
        for value in (False, True)
    ]
    one, two = ((run / "model.safetensors").read_bytes() for run in runs)
    assert one == two


def test_a_compiled_training_is_the_same_training(data, tmp_path):  # noqa: F811
    """Traced by torch.compile; its backend runs the operators as they are."""
    config = replace(TINY, epochs=1, options={**TINY.options, "iterations": 2, "encoder_layers": 0})
    logs = []
    for backend in ("", "eager"):
        run = train(replace(config, compile=backend), data, tmp_path / f"run{backend}", progress=False)
        logs.append(json.loads((run / "log.json").read_text())[-1])
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=1e-4)
    with pytest.raises(BadRequest, match=r"compile is 'indoctor'; torch has .*inductor"):
        train(replace(TINY, compile="indoctor"), data, tmp_path / "other", progress=False)


def test_layers_nearer_to_the_input_learn_more_slowly():
    network = build("ps_vit_nano", encoder_layers=3)
    config = replace(TINY, layer_decay=0.5, lr_scale={"head": 3.0})
    optimizer = make_optimizer(network, config, list(network.layers()))
    rate = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: rate[id(p)] for name, p in network.named_parameters()}
    assert rates["head.weight"] == 3
    assert rates["norm.weight"] == rates["cls_token"] == 1
    assert [rates[f"encoder.{i}.attn.qkv.weight"] for i in (2, 1, 0)] == [0.5, 0.25, 0.125]
    assert rates["sampler.offset_layers.0.weight"] == 0.5**4
    assert rates["stem.0.weight"] == 0.5**5


@pytest.mark.parametrize("name", ["ps_vit_nano", "remax_nano", "remax_m"])
def test_layers_are_parts_of_the_network_and_cover_most_of_it(name):
    with torch.device("meta"):
        network = build(name)
    modules = dict(network.named_modules())
    layers = network.layers()
    assert all(modules[key] is part for key, part in layers.items())
    inside = sum(p.numel() for part in layers.values() for p in part.parameters())
    assert 0.75 < inside / sum(p.numel() for p in network.parameters()) < 1
    assert all(isinstance(part, nn.Module) for part in layers.values())
