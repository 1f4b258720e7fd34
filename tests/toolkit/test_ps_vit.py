"""PS-ViT against the published counts, and against a second implementation written from the equations."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import lively
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vitkit.models import MODELS, build, configure, count_macs, count_parameters
from vitkit.models.ps_vit import Sample, regular_grid
from vitkit.runtimes.errors import BadRequest

PARAMETERS = {"ti_14": 4_777_902, "ti_14_share": 3_666_798, "b": 21_344_302, "b_share": 16_910_254}
# Multiply-adds in billions, counted by the reference over convolutions, linear layers and products.
GIGA_MACS = {"ti_14": 1.565, "b_10": 3.091, "b_12": 4.115, "b_14": 5.380, "b_16": 6.911, "b_18": 8.741}


@pytest.mark.parametrize(
    "name", [n for n, info in MODELS.items() if info.task == "classification" and n != "ps_vit_nano"]
)
def test_counts_match_the_published_ones(name):
    with torch.device("meta"):
        model = build(name)
    short = name.removeprefix("ps_vit_")
    family = short if short.startswith("ti") else ("b_share" if short.endswith("share") else "b")
    assert count_parameters(model) == PARAMETERS[family]
    expected = GIGA_MACS[short.removesuffix("_share")] * 1e9
    assert abs(count_macs(model) / expected - 1) < 0.01


def reference_forward(state, images, config):
    """PS-ViT as plain functions over arrays, from equations 3.1 to 3.7; loops instead of matrices."""

    def norm(x, key):
        return F.layer_norm(x, x.shape[-1:], state[f"{key}.weight"], state[f"{key}.bias"], eps=1e-5)

    def batch_norm(x, key):
        mean, var = state[f"{key}.running_mean"], state[f"{key}.running_var"]
        weight, bias = state[f"{key}.weight"], state[f"{key}.bias"]
        shape = (1, -1, 1, 1)
        scaled = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + 1e-5)
        return scaled * weight.view(shape) + bias.view(shape)

    def block(x, key):
        y = F.relu(batch_norm(F.conv2d(x, state[f"{key}.conv1.weight"]), f"{key}.bn1"))
        y = F.relu(batch_norm(F.conv2d(y, state[f"{key}.conv2.weight"], padding=1), f"{key}.bn2"))
        y = batch_norm(F.conv2d(y, state[f"{key}.conv3.weight"]), f"{key}.bn3")
        if f"{key}.downsample.0.weight" in state:
            x = batch_norm(F.conv2d(x, state[f"{key}.downsample.0.weight"]), f"{key}.downsample.1")
        return F.relu(x + y)

    def encoder(tokens, key):
        size = config.dim // config.heads
        scale = (config.dim if config.qk_scale == "dim" else size) ** -0.5
        q, k, v = (norm(tokens, f"{key}.norm1") @ state[f"{key}.attn.qkv.weight"].T).split(config.dim, dim=1)
        heads = []
        for h in range(config.heads):
            part = slice(h * size, (h + 1) * size)
            weights = torch.softmax(q[:, part] @ k[:, part].T * scale, dim=1)
            heads.append(weights @ v[:, part])
        joined = torch.cat(heads, dim=1)
        tokens = tokens + joined @ state[f"{key}.attn.proj.weight"].T + state[f"{key}.attn.proj.bias"]
        hidden = norm(tokens, f"{key}.norm2") @ state[f"{key}.mlp.0.weight"].T + state[f"{key}.mlp.0.bias"]
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        return tokens + hidden @ state[f"{key}.mlp.3.weight"].T + state[f"{key}.mlp.3.bias"]

    results, traces = [], []
    for image in images:
        first = state["stem.0.weight"]
        x = F.conv2d(image[None], first, stride=2 if config.stride == 4 else 1, padding=first.shape[-1] // 2)
        x = F.relu(batch_norm(x, "stem.1"))
        if config.stride > 1:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        features = block(block(x, "stem.4"), "stem.5")[0]
        height, width = features.shape[1:]
        # Column-major, as the authors list their points: the logits must not depend on the order.
        points = torch.tensor(
            [
                [(i + 0.5) * height / config.n, (j + 0.5) * width / config.n]
                for j in range(config.n)
                for i in range(config.n)
            ]
        )
        tokens, trace = torch.zeros(config.n**2, config.dim), []
        for t in range(config.iterations):
            trace.append(points)
            sampled = torch.stack([bilinear(features, float(y), float(x)) for y, x in points])
            where = points / torch.tensor([height, width])
            position = where @ state["sampler.pos_layer.weight"].T + state["sampler.pos_layer.bias"]
            layer = 0 if config.share else t
            tokens = encoder(sampled + position + tokens, f"sampler.layers.{layer}")
            if t < config.iterations - 1:
                key = f"sampler.offset_layers.{t}"
                points = points + tokens @ state[f"{key}.weight"].T + state[f"{key}.bias"]
        tokens = torch.cat([state["cls_token"][0], tokens])
        for i in range(config.encoder_layers):
            tokens = encoder(tokens, f"encoder.{i}")
        results.append(norm(tokens, "norm")[0] @ state["head.weight"].T + state["head.bias"])
        traces.append(torch.stack(trace))
    return torch.stack(results), torch.stack(traces)


def bilinear(features, y, x):
    """One sample of a (C, H, W) map at pixel coordinates; pixels outside are zero."""
    total = torch.zeros(features.shape[0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < features.shape[1] and 0 <= column < features.shape[2]:
                total += features[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share": False, "qk_scale": "dim"},
        {"image_size": 50, "n": 5},
        {"image_size": 96, "n": 3, "iterations": 1, "num_classes": 3},
        {"n": 6, "iterations": 2, "encoder_layers": 0},
        {"image_size": 32, "n": 8, "stride": 2},
        {"image_size": 17, "n": 4, "stride": 1},
    ],
)
def test_forward_equals_the_equations(options):
    model = lively(build("ps_vit_nano", **options))
    side = model.config.image_size
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, points = model.deploy(images)
        expected, trace = reference_forward(model.state_dict(), images, model.config)
    assert torch.allclose(logits, expected, atol=2e-4, rtol=1e-4)
    n = model.config.n
    rows = torch.arange(n * n).reshape(n, n).T.flatten()
    assert torch.allclose(points, model.config.stride * trace[:, :, rows], atol=2e-3)
    if model.config.iterations > 1:
        assert (points[:, -1] - points[:, 0]).abs().mean() > 0.5, (
            "the points must move for this to test sampling"
        )


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    spread=st.floats(0, 20),
    seed=st.integers(0, 1000),
)
def test_both_forms_of_sampling_equal_the_definition(height, width, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 3, height, width, generator=generator)
    grid = regular_grid(3, height, width)
    shift = torch.randn(2, 9, 2, generator=generator) * spread
    expected = torch.cat(
        [
            torch.stack([bilinear(features[b], float(y), float(x)) for y, x in grid + shift[b]])
            for b in range(2)
        ]
    )
    assert torch.allclose(Sample()(features, grid, shift), expected, atol=1e-4)
    assert torch.allclose(Sample._gather(features, grid, shift), expected, atol=1e-4)


def authors_kernel(features, points, grad):
    """The authors' kernel in loops over points: samples, gradients of the features and of the points.

    Written from the description of their CUDA code: `bilinear_interpolate` reads zeros outside the map,
    `bilinear_interpolate_gradient` clamps the point, and merges its neighbours on the last pixel.
    """
    _, height, width = features.shape
    samples, learned, moved = [], torch.zeros_like(features), torch.zeros_like(points)
    for p, (y, x) in enumerate(points.tolist()):
        samples.append(bilinear(features, y, x))
        if y <= -1 or y >= height or x <= -1 or x >= width:
            continue
        at_y, at_x = max(y, 0.0), max(x, 0.0)
        y_low, x_low = int(at_y), int(at_x)
        y_high, x_high = y_low + 1, x_low + 1
        if y_low >= height - 1:
            y_high = y_low = height - 1
            at_y = float(y_low)
        if x_low >= width - 1:
            x_high = x_low = width - 1
            at_x = float(x_low)
        part_y, part_x = at_y - y_low, at_x - x_low
        learned[:, y_low, x_low] += grad[p] * (1 - part_y) * (1 - part_x)
        learned[:, y_low, x_high] += grad[p] * (1 - part_y) * part_x
        learned[:, y_high, x_low] += grad[p] * part_y * (1 - part_x)
        learned[:, y_high, x_high] += grad[p] * part_y * part_x
        # The point itself is not clamped here.
        north = features[:, y_low, x_high] * (x - x_low) + features[:, y_low, x_low] * (x_high - x)
        south = features[:, y_high, x_high] * (x - x_low) + features[:, y_high, x_low] * (x_high - x)
        west = features[:, y_high, x_low] * (y - y_low) + features[:, y_low, x_low] * (y_high - y)
        east = features[:, y_high, x_high] * (y - y_low) + features[:, y_low, x_high] * (y_high - y)
        moved[p, 0] = (grad[p] * (south - north)).sum()
        moved[p, 1] = (grad[p] * (east - west)).sum()
    return torch.stack(samples), learned, moved


def test_gradients_of_sampling_are_those_of_the_authors_kernel():
    """In the map, on the ring of a pixel around it, on its corners, exactly on its borders, outside."""
    height, width = 5, 7
    generator = torch.Generator().manual_seed(5)
    ys = [-2.0, -1.0, -0.6, 0.0, 0.3, 2.0, 3.7, 4.0, 4.4, 4.99, 5.0, 6.3]
    xs = [-1.5, -1.0, -0.2, 0.0, 1.5, 3.0, 5.9, 6.0, 6.5, 7.0, 9.0]
    points = torch.cartesian_prod(torch.tensor(ys), torch.tensor(xs)).double()
    features = torch.randn(2, 3, height, width, generator=generator).double().requires_grad_()
    shift = torch.stack([points, points.flip(0)]).requires_grad_()
    grad = torch.randn(2, len(points), 3, generator=generator).double()
    samples = Sample()(features, torch.zeros_like(points), shift).reshape(2, -1, 3)
    samples.backward(grad)
    for i in range(2):
        expected = authors_kernel(features[i].detach(), shift[i].detach(), grad[i])
        found = samples[i].detach(), features.grad[i], shift.grad[i]
        for name, one, other in zip(("samples", "features", "points"), found, expected, strict=True):
            assert torch.allclose(one, other.to(one), atol=1e-6), name


def test_gradients_of_sampling_inside_the_map_are_the_derivative():
    generator = torch.Generator().manual_seed(6)
    features = torch.randn(2, 3, 5, 7, generator=generator).double().requires_grad_()
    inside = torch.rand(2, 9, 2, generator=generator).double() * torch.tensor([4.0, 6.0])
    grid = torch.zeros(9, 2).double()
    assert torch.autograd.gradcheck(
        lambda f, s: Sample()(f, grid, s), (features, inside.requires_grad_()), eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_a_point_that_is_nowhere_spoils_no_memory(value):
    features = torch.randn(1, 2, 4, 4, requires_grad=True)
    shift = torch.full((1, 3, 2), value, requires_grad=True)
    Sample()(features, torch.zeros(3, 2), shift).nansum().backward()
    assert not features.grad.any()
    assert not shift.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_sampling_keep_their_types_in_mixed_precision(dtype):
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(2, 3, 5, 7, generator=generator).to(dtype).requires_grad_()
    shift = (torch.rand(2, 40, 2, generator=generator) * 8 - 1).requires_grad_()
    grad, grid = torch.randn(80, 3, generator=generator), torch.zeros(40, 2)
    with torch.autocast("cpu", dtype):
        Sample()(features, grid, shift).backward(grad)
    exact = [tensor.detach().float().requires_grad_() for tensor in (features, shift)]
    Sample()(exact[0], grid, exact[1]).backward(grad)
    for found, expected in zip((features, shift), exact, strict=True):
        assert found.grad.dtype == found.dtype
        assert torch.allclose(found.grad.float(), expected.grad, atol=0.02, rtol=0.01)


def test_offsets_learn_only_through_the_next_sampling():
    model = lively(build("ps_vit_nano", iterations=3))
    features = torch.randn(1, model.config.dim, 16, 16)
    sampled_shifts = []
    original = model.sampler.sample.forward

    def watch(features, grid, shift):
        if shift.requires_grad:
            shift.retain_grad()
            sampled_shifts.append(shift)
        return original(features, grid, shift)

    model.sampler.sample.forward = watch
    tokens, points = model.sampler(features)
    assert not points.requires_grad
    tokens.sum().backward()
    # The shift of the last sampling is a sum with the earlier, detached one: only its own offset layer learns
    # through it, and the first offset layer through the first sampling alone.
    moved = sampled_shifts
    assert len(moved) == 2
    last_bias = model.sampler.offset_layers[1].bias.grad
    assert torch.allclose(last_bias, moved[1].grad.sum((0, 1)), rtol=1e-4, atol=1e-5)
    first_bias = model.sampler.offset_layers[0].bias.grad
    assert torch.allclose(first_bias, moved[0].grad.sum((0, 1)), rtol=1e-4, atol=1e-5)


def test_options_come_as_text_and_bad_ones_are_named():
    config = configure("ps_vit_ti_14", {"n": "12", "share": "true", "qk_scale": "dim", "dropout": "0.1"})
    assert (config.n, config.share, config.qk_scale, config.dropout) == (12, True, "dim", 0.1)
    for options, word in [
        ({"nn": "1"}, "nn"),
        ({"n": "many"}, "n='many'"),
        ({"n": "0"}, "n is 0"),
        ({"qk_scale": "tim"}, "tim"),
        ({"share": "yes"}, "share"),
        ({"heads": "5"}, "heads 5"),
        ({"drop_path": "1.5"}, "drop_path"),
    ]:
        with pytest.raises(BadRequest, match=word):
            configure("ps_vit_ti_14", options)
    with pytest.raises(BadRequest, match="ps_vit_ti_14_share"):
        configure("resnet", {})


def test_drop_path_acts_on_whole_images_in_training_only():
    model = build("ps_vit_nano", drop_path=0.5, encoder_layers=3)
    images = torch.randn(4, 3, 64, 64)
    model.eval()
    assert torch.equal(model(images), model(images))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(images), model(images))


def test_config_is_plain_data():
    assert dataclasses.asdict(build("ps_vit_nano").config)["share"] is True
    assert np.isfinite(build("ps_vit_nano").head.weight.detach().numpy()).all()
