"""ReMaX and kMaX against the published counts, and against a second implementation written from the text."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import SHARED
from torch import nn

from vitkit import BadInput, BadRequest
from vitkit.models import MODELS, build, configure, count_macs, count_parameters, run_card
from vitkit.models.backbones import build_backbone, load_backbone
from vitkit.models.kmax import (
    SPAN,
    AxialAttention,
    AxialBlock,
    BlockOptions,
    BottleneckBlock,
    Fuse,
    KMeansBlock,
    PixelDecoder,
    Predictor,
    TransformerDecoder,
    one_hot,
)
from vitkit.models.layers import ChannelNorm, DropPath
from vitkit.models.remax import RelaxedTraining
from vitkit.models.state import read_tensors

# Millions of parameters, and billions of multiply-adds as the thesis prints them.
PUBLISHED = {"t": (18.63, 18.8), "s": (22.00, 20.9), "m": (50.79, 67.8), "b": (56.58, 294.7)}


@pytest.mark.parametrize("size", PUBLISHED)
def test_counts_match_the_published_ones(size):
    with torch.device("meta"):
        model, twin = build(f"remax_{size}"), build(f"kmax_{size}")
    params, macs = PUBLISHED[size]
    assert model.config.image_size == (1281 if size == "b" else 641)
    assert abs(count_parameters(model) / 1e6 - params) < 0.05
    assert abs(count_macs(model) / 1e9 / macs - 1) < 0.05
    assert shapes(model) == shapes(twin)


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# --- the second implementation: arrays of float64, loops over positions ----------------------------------


def erf_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(logits):
    """Over keys, the third dimension."""
    weights = np.exp(logits - logits.max(2, keepdims=True))
    return weights / weights.sum(2, keepdims=True)


def array(tensor):
    return tensor.detach().double().numpy()


class Reference:
    """What the modules compute, in training with the statistics of the batch."""

    def __init__(self, training):
        self.training = training

    def norm(self, module, rows):
        """(L, channels); every batch norm is put into this form."""
        assert rows.shape[1] == len(module.weight)
        mean, var = array(module.running_mean), array(module.running_var)
        if self.training:
            mean, var = rows.mean(0), rows.var(0)
        return (rows - mean) / np.sqrt(var + 1e-3) * array(module.weight) + array(module.bias)

    def norm_map(self, module, x):
        batch, channels, height, width = x.shape
        rows = self.norm(module, x.transpose(0, 2, 3, 1).reshape(-1, channels))
        return rows.reshape(batch, height, width, channels).transpose(0, 3, 1, 2)

    def conv(self, module, x, activate=False):
        """Convolution with symmetric padding, batch norm, GELU where asked for."""
        weight = array(module.conv.weight)
        _, depth, kernel, _ = weight.shape
        batch, channels, height, width = x.shape
        padded = np.pad(x, ((0, 0), (0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2))
        y = np.zeros((batch, len(weight), height, width))
        for i in range(kernel):
            for j in range(kernel):
                part = padded[:, :, i : i + height, j : j + width]
                if depth == channels:
                    y += np.einsum("oc,bchw->bohw", weight[:, :, i, j], part)
                else:
                    assert depth == 1
                    y += weight[None, :, 0, i, j, None, None] * part
        if module.conv.bias is not None:
            y += array(module.conv.bias)[None, :, None, None]
        y = self.norm_map(module.norm, y)
        return erf_gelu(y) if activate else y

    def linear(self, module, rows, activate=False):
        assert module.linear.bias is None
        y = self.norm(module.norm, rows @ array(module.linear.weight).T)
        return erf_gelu(y) if activate else y

    def axial(self, module, x, axis, heads):
        """Attention along the columns (axis 2) or rows (axis 3) of a map, by pairs of places."""
        weight = array(module.qkv.weight)[:, :, 0, 0]
        qkv = self.norm_map(module.qkv_norm, np.einsum("oc,bchw->bohw", weight, x))
        channels, length = qkv.shape[1], x.shape[axis]
        keys, values = channels // 4, channels // 2
        lines = np.moveaxis(qkv, (1, axis), (-1, -2))
        shape = lines.shape
        lines = lines.reshape(-1, length, channels)
        q, k, v = lines[..., :keys], lines[..., keys : 2 * keys], lines[..., 2 * keys :]
        tables = [array(t) for t in (module.query_table, module.key_table, module.value_table)]
        assert all(len(table) == 509 for table in tables)

        logits = np.zeros((len(lines), length, length, 3, heads))
        part, wide = keys // heads, values // heads
        for h in range(heads):
            own, vown = slice(h * part, (h + 1) * part), slice(h * wide, (h + 1) * wide)
            for line in range(len(lines)):
                for i in range(length):
                    for j in range(length):
                        qi, kj = q[line, i, own], k[line, j, own]
                        logits[line, i, j, :, h] = (
                            qi @ kj, qi @ tables[0][j - i + 254], kj @ tables[1][j - i + 254]
                        )  # fmt: skip
        normed = self.norm(module.similarity_norm, logits.reshape(-1, 3 * heads)).reshape(logits.shape)
        weights = softmax(normed.sum(3))
        out = np.zeros((len(lines), length, 2, values))
        for h in range(heads):
            vown = slice(h * wide, (h + 1) * wide)
            for line in range(len(lines)):
                for i in range(length):
                    for j in range(length):
                        out[line, i, 0, vown] += weights[line, i, j, h] * v[line, j, vown]
                        out[line, i, 1, vown] += weights[line, i, j, h] * tables[2][j - i + 254]
        out = self.norm(module.output_norm, out.reshape(-1, 2 * values)).reshape(out.shape).sum(2)
        return np.moveaxis(out.reshape(*shape[:-1], values), (-1, -2), (1, axis))

    def block(self, module, x, heads=None):
        x = erf_gelu(x)
        y = self.conv(module.conv1, x, activate=True)
        if heads:
            y = erf_gelu(self.axial(module.width, self.axial(module.height, y, 2, heads), 3, heads))
        else:
            y = self.conv(module.conv2, y, activate=True)
        y = self.conv(module.conv3, y)
        return y + (x if x.shape == y.shape else self.conv(module.shortcut, x))

    def fuse(self, module, low, high):
        if module.high is not None:
            high = self.conv(module.high, erf_gelu(high))
        return enlarge(self.conv(module.low, erf_gelu(low)), *high.shape[2:]) + high

    def pixel_decoder(self, module, features, heads):
        levels = [channel_norm(norm, x) for norm, x in zip(module.norms, features[::-1], strict=True)]
        x, out = levels[0], []
        for i, stage in enumerate(module.stages):
            if i:
                x = self.fuse(module.fuses[i - 1], out[-1], levels[i])
            for block in stage:
                x = self.block(block, x, heads if i < 2 else None)
            out.append(x)
        return out

    def predictor(self, module, x, class_rows, mask_rows):
        """Masks (B, N, h, w), class logits (B * N, K + 1), features (B, D, h, w)."""
        y = self.conv(module.pixel_depthwise, x, activate=True)
        y = self.conv(module.pixel_out, self.conv(module.pixel_mix, y, activate=True))
        pixels = y / np.sqrt((y**2).sum(1, keepdims=True))
        kernels = self.linear(module.mask_kernel, mask_rows).reshape(len(x), -1, y.shape[1])
        masks = np.einsum("bnd,bdhw->bnhw", kernels, pixels)
        masks = self.norm(module.mask_norm, masks.reshape(-1, 1)).reshape(masks.shape)
        classes = class_rows @ array(module.class_head.weight).T + array(module.class_head.bias)
        classes[:, -1] += math.log((classes.shape[1] - 1) * 0.9 / 0.1)
        return masks, classes, pixels

    def self_attention(self, module, rows, batch, heads):
        qkv = self.linear(module.qkv, rows)
        rows_each, width = len(rows) // batch, rows.shape[1]
        deep, wide = width // 2 // heads, width // heads
        logits = np.zeros((batch, rows_each, rows_each, heads))
        for b in range(batch):
            own = qkv[b * rows_each : (b + 1) * rows_each]
            for h in range(heads):
                for i in range(rows_each):
                    for j in range(rows_each):
                        q = own[i, h * deep : (h + 1) * deep]
                        logits[b, i, j, h] = q @ own[j, width // 2 + h * deep : width // 2 + (h + 1) * deep]
        weights = self.norm(module.similarity_norm, logits.reshape(-1, heads)).reshape(logits.shape)
        weights = softmax(weights)
        out = np.zeros((batch, rows_each, width))
        for b in range(batch):
            values = qkv[b * rows_each : (b + 1) * rows_each, width:]
            for h in range(heads):
                part = slice(h * wide, (h + 1) * wide)
                out[b, :, part] = weights[b, :, :, h] @ values[:, part]
        return self.linear(module.out, erf_gelu(self.norm(module.value_norm, out.reshape(rows.shape))))

    def kmeans(self, module, x, queries, heads):
        """The seven steps; returns new queries, the aux prediction, the best slots (B, h * w)."""
        pixels = self.conv(module.pixel_in, erf_gelu(x), activate=True)
        inner = self.linear(module.query_in, queries, activate=True)
        values = self.conv(module.value, pixels)
        prediction = self.predictor(module.predictor, pixels, inner, inner)
        count = prediction[0].shape[1]
        slots = prediction[0].reshape(len(x), count, -1).argmax(1)
        gathered = np.zeros_like(queries)
        flat = values.reshape(*values.shape[:2], -1)
        for b in range(len(x)):
            for place, slot in enumerate(slots[b]):
                gathered[b * count + slot] += flat[b, :, place]
        queries = queries + self.linear(module.update, self.norm(module.update_norm, gathered))
        queries = erf_gelu(queries + self.self_attention(module.attention, inner, len(x), heads))
        step = self.linear(module.ffn_out, self.linear(module.ffn_in, queries, activate=True))
        return erf_gelu(queries + step), prediction, slots

    def decoder(self, module, maps, heads):
        queries = np.concatenate([array(module.centres)] * len(maps[0]))
        slots = []
        for level, block in zip(module.levels, module.blocks, strict=True):
            queries, _, best = self.kmeans(block, maps[level], queries, heads)
            slots.append(best)
        class_rows = self.linear(module.class_embedding, queries, activate=True)
        mask_rows = self.linear(module.mask_embedding, queries, activate=True)
        return self.predictor(module.predictor, maps[-1], class_rows, mask_rows), slots


def channel_norm(module, x):
    mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    weight, bias = (array(t)[None, :, None, None] for t in (module.weight, module.bias))
    return (x - mean) / np.sqrt(var + 1e-6) * weight + bias


def enlarge(x, height, width):
    """Bilinear, the corner pixels' centres on each other; one output pixel at a time."""
    out = np.zeros((*x.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            y, z = i * (x.shape[2] - 1) / (height - 1), j * (x.shape[3] - 1) / (width - 1)
            for row in range(x.shape[2]):
                for column in range(x.shape[3]):
                    share = max(0, 1 - abs(y - row)) * max(0, 1 - abs(z - column))
                    out[:, :, i, j] += share * x[:, :, row, column]
    return out


def lively(module, seed=0):
    """What training would leave: no scale of a norm is 1 or 0, some are negative, no statistic is neutral."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            fresh = torch.randn(tensor.shape, generator=generator)
            if name == "running_var":
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)) and name == "weight":
                tensor.data.copy_(torch.sign(fresh) * (0.5 + fresh.abs()))
            elif name in ("running_mean", "bias"):
                tensor.data.copy_(0.3 * fresh)
            elif tensor.is_floating_point() and name != "void_prior":
                tensor.data.copy_(fresh / max(1, tensor[0].numel() if tensor.ndim > 1 else 1) ** 0.5)
    return module


def near(ours, expected, within=1e-4):
    """Equality up to float32's rounding, relative to the largest number."""
    ours = ours.detach().double().numpy()
    assert ours.shape == expected.shape
    scale = np.abs(expected).max()
    assert scale > 0.01, "too little to compare"
    assert np.abs(ours - expected).max() < within * scale


def random_map(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@both_modes
@pytest.mark.parametrize("axis", ["height", "width"])
def test_axial_attention(axis, training):
    module = lively(AxialAttention(6, 8, heads=2, axis=axis)).train(training)
    x = random_map(2, 6, 4, 3)
    expected = Reference(training).axial(module, array(x), {"height": 2, "width": 3}[axis], heads=2)
    assert expected.shape == (2, 16, 4, 3)
    near(module(x), expected)


def test_relative_positions_reach_to_the_ends_of_the_tables():
    module = lively(AxialAttention(2, 2, heads=1, axis="width")).eval()
    rows = module._relative(module.query_table, SPAN)
    assert torch.equal(rows[0, SPAN - 1], module.query_table[-1])
    assert torch.equal(rows[SPAN - 1, 0], module.query_table[0])
    assert module(random_map(1, 2, 1, SPAN)).isfinite().all()


@both_modes
@pytest.mark.parametrize("width_in", [6, 16], ids=["projected", "identity"])
def test_blocks_of_the_pixel_decoder(width_in, training):
    x, reference = random_map(2, width_in, 3, 4), Reference(training)
    axial = lively(AxialBlock(width_in, 4, heads=2)).train(training)
    near(axial(x), reference.block(axial, array(x), heads=2))
    bottleneck = lively(BottleneckBlock(width_in, 4)).train(training)
    near(bottleneck(x), reference.block(bottleneck, array(x)))


@both_modes
@pytest.mark.parametrize("width_high", [6, 4], ids=["projected", "as it is"])
def test_fuse(width_high, training):
    module = lively(Fuse(8, width_high, 4)).train(training)
    low, high = random_map(2, 8, 3, 2), random_map(2, width_high, 5, 3, seed=6)
    near(module(low, high), Reference(training).fuse(module, array(low), array(high)))


@both_modes
def test_pixel_decoder(training):
    module = lively(PixelDecoder((3, 4, 5, 6), (8, 4, 4, 3), (1, 2, 1, 1), heads=2)).train(training)
    features = [random_map(2, 3 + i, size, size, seed=i) for i, size in enumerate((17, 9, 5, 3))]
    expected = Reference(training).pixel_decoder(module, [array(x) for x in features], heads=2)
    assert [x.shape for x in expected] == [(2, 32, 3, 3), (2, 16, 5, 5), (2, 16, 9, 9), (2, 12, 17, 17)]
    # Wide or not, the second backbone map here has the width that it is fused at.
    assert module.fuses[1].high is None
    for ours, theirs in zip(module(features), expected, strict=True):
        near(ours, theirs, within=1e-3)


def test_channel_norm():
    module = lively(ChannelNorm(5))
    x = random_map(2, 5, 3, 4) * 1e-3
    near(module(x), channel_norm(module, array(x)))


@both_modes
@pytest.mark.parametrize("sign", [1, -1])
def test_predictor(training, sign):
    module = lively(Predictor(6, 8, 5, classes=3)).train(training)
    module.mask_norm.weight.data.fill_(0.2 * sign)
    x, class_rows, mask_rows = random_map(2, 6, 4, 3), random_map(14, 8), random_map(14, 8, seed=6)
    masks, classes, pixels = Reference(training).predictor(module, *map(array, (x, class_rows, mask_rows)))
    ours = module(x, class_rows, mask_rows)
    near(ours.masks, masks)
    near(ours.classes, classes.reshape(2, 7, 4))
    near(ours.pixels, pixels)
    if not training:
        best = masks.reshape(2, 7, -1).argmax(1)
        assert len(np.unique(best)) > 2
        assert np.array_equal(module.closest(x, mask_rows)[:, 0].numpy(), best)


def kmeans_block(sign=1, drop_path=0.0):
    block = lively(KMeansBlock(6, 8, 5, classes=3, options=BlockOptions(2, 12, drop_path)))
    block.predictor.mask_norm.weight.data.fill_(0.2 * sign)
    return block


@both_modes
@pytest.mark.parametrize("sign", [1, -1])
def test_kmeans_block(training, sign):
    block = kmeans_block(sign).train(training)
    x, queries = random_map(2, 6, 4, 5), random_map(14, 8, seed=6)
    expected, (masks, classes, pixels), slots = Reference(training).kmeans(
        block, *map(array, (x, queries)), 2
    )
    ours = block(x, queries)
    assert np.array_equal(ours.slots[:, 0].numpy(), slots)
    assert len(np.unique(slots)) > 2
    assert all(len(np.unique(own)) < 7 for own in slots), "some slots must have no pixels"
    near(ours.queries, expected)
    if not training:
        assert ours.prediction is None
        return
    near(ours.prediction.masks, masks)
    near(ours.prediction.classes, classes.reshape(2, 7, 4))
    near(ours.prediction.pixels, pixels)
    near(ours.keys, Reference(training).conv(block.pixel_in, erf_gelu(array(x)), activate=True))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_deployed_form_of_a_block_equals_the_plain_one(sign):
    block = kmeans_block(sign).eval()
    x, queries = random_map(2, 6, 9, 9), random_map(14, 8, seed=6)
    with torch.no_grad():
        pixels, inner = block.pixel_in(nn.functional.gelu(x)), block.query_in(queries)
        plain = block.predictor(pixels, inner, inner).masks.flatten(2).argmax(dim=1, keepdim=True)
        ours = block(x, queries)
        assert torch.equal(ours.slots, plain)
        gathered, late = block._gather(pixels, plain, queries), block._gather_late(pixels, plain, queries)
        near(late, array(gathered))
        near(ours.queries, array(block._step(queries, inner, gathered, 2)))


def test_a_mask_norm_of_scale_zero_assigns_alike_in_both_forms():
    block = kmeans_block().eval()
    block.predictor.mask_norm.weight.data.zero_()
    x, queries = random_map(1, 6, 3, 3), random_map(7, 8, seed=6)
    with torch.no_grad():
        pixels, inner = block.pixel_in(nn.functional.gelu(x)), block.query_in(queries)
        plain = block.predictor(pixels, inner, inner).masks.flatten(2).argmax(dim=1, keepdim=True)
        assert torch.equal(block(x, queries).slots, plain)


@both_modes
def test_ties_are_assigned_once(training):
    block = kmeans_block().train(training)
    x, queries = random_map(2, 6, 4, 5), random_map(1, 8, seed=6).repeat(14, 1)
    with torch.no_grad():
        slots = block(x, queries).slots
    assigned = one_hot(slots, 7)
    assert torch.equal(assigned.sum(1), torch.ones(2, 20))
    assert torch.equal(assigned.argmax(1), slots[:, 0])
    assert torch.equal(one_hot(torch.tensor([[[2, 0]]]), 3), torch.tensor([[[0.0, 1], [0, 0], [1, 0]]]))


@both_modes
def test_transformer_decoder(training):
    widths = (6, 5, 4, 3)
    decoder = lively(
        TransformerDecoder(
            widths, (1, 2, 1), queries=7, width=8, mask_width=5, classes=3, options=BlockOptions(2, 12, 0.0)
        )
    ).train(training)
    for i, predictor in enumerate(m for m in decoder.modules() if isinstance(m, Predictor)):
        predictor.mask_norm.weight.data.fill_(0.3 * (-1) ** i)
    maps = [random_map(2, w, s, s, seed=w) for w, s in zip(widths, (3, 4, 5, 9), strict=True)]
    (masks, classes, pixels), slots = Reference(training).decoder(decoder, [array(x) for x in maps], heads=2)
    ours = decoder(maps)
    assert decoder.levels == [0, 1, 1, 2]
    for block, best in zip(ours.blocks, slots, strict=True):
        assert np.array_equal(block.slots[:, 0].numpy(), best)
    near(ours.final.masks, masks, within=1e-3)
    near(ours.final.classes, classes.reshape(2, 7, 4), within=1e-3)
    near(ours.final.pixels, pixels, within=1e-3)


def test_assignments_pass_no_gradient_and_everything_else_learns():
    block = kmeans_block().train()
    x, queries = random_map(2, 6, 4, 5).requires_grad_(), random_map(14, 8, seed=6)
    out = block(x, queries)
    assert not out.slots.requires_grad
    out.queries.square().sum().backward()
    # The new queries depend on masks through the assignment alone, so the predictor learns nothing of them.
    assert all(p.grad is None for p in block.predictor.parameters())
    others = {n: p for n, p in block.named_parameters() if not n.startswith("predictor.")}
    assert [n for n, p in others.items() if p.grad is None] == []
    assert x.grad is not None


def test_drop_path_drops_a_branch_of_whole_images_in_training_only():
    drop, rows = DropPath(0.5), torch.ones(400, 3)
    torch.manual_seed(0)
    images = drop(rows, 100).reshape(100, 12)
    assert torch.equal(images, images[:, :1].expand(-1, 12))
    assert set(images[:, 0].tolist()) == {0.0, 2.0}
    assert torch.equal(drop.eval()(rows, 100), rows)
    block = kmeans_block(drop_path=0.5)
    x, queries = random_map(2, 6, 4, 5), random_map(14, 8, seed=6)
    assert torch.equal(block.eval()(x, queries).queries, kmeans_block().eval()(x, queries).queries)


@pytest.fixture(scope="module")
def nano():
    return lively(build("remax_nano")).eval()


def test_norms_have_kmax_constants_and_fresh_branches_are_nothing(nano):
    norms = [m for m in nano.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}
    fresh = build("remax_nano")
    for name, module in fresh.named_modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and not name.startswith("backbone."):
            last = name.rsplit(".", 1)[0].endswith(("conv3", ".update", "attention.out", "ffn_out"))
            value = 0.0 if last else 0.1 if name.endswith("mask_norm") else 1.0
            assert (module.weight == value).all(), name
    decoder = fresh.train().decoder
    maps = [random_map(1, w, 3, 3) for w in (256, 256, 128, 64)]
    gelu = nn.functional.gelu
    assert torch.allclose(decoder.blocks[0](maps[0], decoder.centres).queries, gelu(gelu(decoder.centres)))


def test_the_network_is_its_parts(nano):
    images = random_map(2, 3, 129, 129)
    with torch.no_grad():
        masks, classes = nano.deploy(images)
        decoded = nano.decoder(nano.pixel_decoder(nano.backbone(images)))
        decisions = nano.decisions(images)
    assert masks.shape == (2, 24, 33, 33)
    assert classes.shape == (2, 24, 10)
    assert torch.equal(masks, decoded.final.masks)
    assert torch.equal(classes, decoded.final.classes)
    assert [slots.shape for slots in decisions.values()] == [(2, 1, 25), (2, 1, 81), (2, 1, 289)]


# --- backbones -------------------------------------------------------------------------------------------

WIDTHS = {
    "mobilenetv3_small_100": (16, 88, 144, 576),
    "mobilenetv3_large_100": (72, 120, 672, 960),
    "resnet50": (256, 512, 1024, 2048),
}
# timm's modules that compute the maps of strides 4, 8 and 16: norm and activation of the depthwise
# convolution in the last block of the stride.
TAPS = {
    "mobilenetv3_small_100": ("blocks.0.0.bn1", "blocks.1.1.bn2", "blocks.3.1.bn2", "blocks.5.0"),
    "mobilenetv3_large_100": ("blocks.1.1.bn2", "blocks.2.2.bn2", "blocks.4.1.bn2", "blocks.6.0"),
    "resnet50": ("layer1", "layer2", "layer3", "layer4"),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_maps_are_those_that_timm_computes(name):
    from vitkit.torchvision_shim import timm

    ours = settled(build_backbone(name, "hard_sigmoid"))
    theirs = timm.create_model(name, num_classes=0).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    missing, _ = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert all(key.startswith("conv_head") for key in missing)
    caught = {}
    for tap in TAPS[name]:
        theirs.get_submodule(tap).register_forward_hook(
            lambda m, x, y, tap=tap: caught.update({tap: y.clone()})
        )
    images = random_map(1, 3, 65, 65)
    with torch.no_grad():
        maps = ours(images)
        theirs.forward_features(images)
    assert ours.widths == WIDTHS[name]
    assert [tuple(x.shape) for x in maps] == [
        (1, width, side, side) for width, side in zip(WIDTHS[name], (17, 9, 5, 3), strict=True)
    ]
    for x, tap in zip(maps, TAPS[name], strict=True):
        near(x, array(caught[tap]), within=1e-5)


def settled(network):
    """Batch norms with statistics and scales of their own; the network's maps stay of ordinary size."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
        elif name.endswith("running_var") or tensor.ndim == 1:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return network.eval()


def test_the_gate_of_squeeze_and_excitation_is_an_option():
    networks = {gate: build_backbone("mobilenetv3_small_050", gate) for gate in ("hard_sigmoid", "sigmoid")}
    settled(networks["hard_sigmoid"])
    networks["sigmoid"].load_state_dict(networks["hard_sigmoid"].state_dict())
    images = random_map(1, 3, 65, 65)
    with torch.no_grad():
        maps = [networks[gate].eval()(images) for gate in ("hard_sigmoid", "sigmoid")]
    # The first map is taken before anything is squeezed.
    assert torch.equal(maps[0][0], maps[1][0])
    assert not torch.allclose(maps[0][1], maps[1][1], rtol=1e-3)
    for gate, kind in (("hard_sigmoid", "Hardsigmoid"), ("sigmoid", "Sigmoid")):
        gates = [type(m).__name__ for n, m in networks[gate].named_modules() if n.endswith("se.gate")]
        assert set(gates) == {kind}
        assert len(gates) == 9


def test_backbone_weights_under_timms_names():
    source, target = (settled(build_backbone("mobilenetv3_small_050", "hard_sigmoid")) for _ in range(2))
    tensors = source.state_dict()
    slim = {n: t.half() for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    load_backbone(
        target, {**slim, "conv_head.weight": torch.ones(3), "classifier.bias": torch.ones(3)}, "a.pth"
    )
    for name, tensor in slim.items():
        assert torch.equal(target.state_dict()[name], tensor.float()), name


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("mobilenetv3_small_100", "mobilenet_v3_small"),
        ("mobilenetv3_large_100", "mobilenet_v3_large"),
        ("resnet50", "resnet50"),
    ],
)
def test_backbone_weights_under_torchvisions_names(ours, theirs):
    from vitkit import torchvision_shim  # noqa: F401, I001
    import torchvision

    source = settled(getattr(torchvision.models, theirs)(weights=None))
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    # In any order: safetensors sorts.
    tensors = dict(sorted(source.state_dict().items()))
    network = build_backbone(ours, "hard_sigmoid").eval()
    load_backbone(network, tensors, "a.pth")
    images = random_map(1, 3, 65, 65)
    features = (
        source.features if hasattr(source, "features") else nn.Sequential(*list(source.children())[:-2])
    )
    with torch.no_grad():
        near(network(images)[-1], array(features(images)), within=1e-5)


def test_wrong_backbone_weights_are_named():
    network = build_backbone("mobilenetv3_small_050", "hard_sigmoid")
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in own.items()}
    wrong = dict(own)
    del wrong["conv_stem.weight"]
    wrong["bn1.weight"] = torch.ones(3)
    wrong["bn1.bias"] = own["bn1.bias"] + float("nan")
    wrong["bn1.running_var"] = -own["bn1.running_var"]
    wrong["blocks.0.0.bn1.bias"] = own["blocks.0.0.bn1.bias"].to(torch.int32)
    with pytest.raises(BadInput) as error:
        load_backbone(network, wrong, "a.pth")
    for words in (
        "a.pth does not hold",
        "conv_stem.weight is missing",
        "bn1.weight is [3], not [16]",
        "bn1.bias holds NaN",
        "bn1.running_var is negative",
        "blocks.0.0.bn1.bias is int32",
    ):
        assert words in str(error.value)
    with pytest.raises(
        BadInput, match=r"features\.0\.0\.weight is \[64, 3, 3, 3\].*features\.0\.1\.weight is m"
    ):
        load_backbone(network, {"features.0.0.weight": torch.zeros(64, 3, 3, 3)}, "vgg.pth")
    with pytest.raises(BadInput, match=r"conv_stem\.weight is missing.* more"):
        load_backbone(network, {"conv1.weight": torch.zeros(64, 3, 7, 7)}, "resnet.pth")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), "a refused file must change nothing"


def test_a_real_file_of_imagenet_weights_loads():
    path = SHARED / "weights" / "mobilenet_v3_small_imagenet_rot180.pth"
    if not path.is_file():
        pytest.skip(f"the weights are not at {path}")
    from vitkit import torchvision_shim  # noqa: F401, I001
    import torchvision

    tensors = read_tensors(path)
    network = build_backbone("mobilenetv3_small_100", "hard_sigmoid").eval()
    load_backbone(network, tensors, str(path))
    theirs = torchvision.models.mobilenet_v3_small(weights=None).features.eval()
    prefix = "features."
    theirs.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    images = random_map(1, 3, 129, 129)
    with torch.no_grad():
        near(network(images)[-1], array(theirs(images)), within=1e-5)


# --- what only training needs ----------------------------------------------------------------------------


def test_training_leaves_the_network_alone(nano):
    images = random_map(1, 3, 129, 129)
    with torch.no_grad():
        before = nano.deploy(images)
        keys = list(nano.state_dict())
        training = RelaxedTraining(nano)
        after = nano.deploy(images)
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first, second)
    extra = {name for name, _ in training.named_parameters() if not name.startswith("model.")}
    assert {name.split(".")[0] for name in extra} == {"semantic", "remask"}
    assert list(nano.state_dict()) == keys
    assert {f"model.{key}" for key in keys} == {k for k in training.state_dict() if k.startswith("model.")}
    ids = {id(p) for p in nano.parameters()}
    assert not any(id(p) in ids for name, p in training.named_parameters() if name in extra)
    assert count_parameters(training) > count_parameters(nano)


@pytest.mark.parametrize(("name", "heads"), [("remax_nano", 3), ("kmax_nano", 0)])
def test_what_training_sees(name, heads):
    training = RelaxedTraining(build(name)).train()
    seen = training(random_map(2, 3, 129, 129))
    assert len(training.remask) == len(seen.block_semantic) == heads
    assert [tuple(x.shape) for x in seen.block_semantic] == [(2, 9, s, s) for s in (5, 9, 17)[:heads]]
    assert seen.semantic.shape == (2, 10, 33, 33)
    assert [tuple(p.masks.shape) for p in seen.blocks] == [(2, 24, s, s) for s in (5, 9, 17)]
    assert seen.final.masks.shape == (2, 24, 33, 33)
    for prediction in [*seen.blocks, seen.final]:
        assert torch.allclose(prediction.pixels.norm(dim=1), torch.ones(()), atol=1e-5)


def test_the_exported_graph_holds_the_network_alone(nano):
    from vitkit.exporters.source import Source

    training = RelaxedTraining(nano)
    card = run_card("remax_nano", training.model.config)
    graph = Source(training.model, card).graph(card.image, 1, 20).graph
    names = [node.name for node in graph.node] + [weight.name for weight in graph.initializer]
    assert len(graph.node) > 100
    assert not any("semantic" in name or "remask" in name for name in names)
    assert [output.name for output in graph.output] == ["masks", "classes"]
    assert Counter(node.op_type for node in graph.node)["ArgMax"] == 3
    # Batch norms were folded; what the exporter adds are shapes and indices.
    stored = [math.prod(weight.dims) for weight in graph.initializer if weight.data_type == 1]
    assert count_parameters(nano) * 0.9 < sum(stored) <= sum(t.numel() for t in nano.state_dict().values())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_twins_are_one_network(nano):
    twin = build("kmax_nano").eval()
    assert str(twin) == str(nano)
    assert shapes(twin) == shapes(nano)
    operations = []
    for model in (nano, twin):
        traced = torch.jit.trace_module(model, {"deploy": torch.zeros(1, 3, 129, 129)}, check_trace=False)
        nodes = traced.deploy.inlined_graph.nodes()
        computed = [node for node in nodes if node.kind().startswith("aten::")]
        operations.append([(n.kind(), [str(o.type()) for o in n.outputs()]) for n in computed])
    assert len(operations[0]) > 500
    assert operations[0] == operations[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": "640"}, r"image_size is 640.*32k \+ 1"),
        ({"image_size": "1"}, "image_size is 1"),
        ({"image_size": "4097"}, "image_size is 4097"),
        ({"backbone": "resnet18"}, "backbone is 'resnet18'.*resnet50"),
        ({"se_gate": "relu"}, "se_gate is 'relu'"),
        ({"mask_id": "dice"}, "mask_id is 'dice'"),
        ({"pixel_widths": "512,256,128"}, "pixel_widths"),
        ({"pixel_widths": "512,256,128,x"}, "pixel_widths.*1,5,1,1"),
        ({"pixel_blocks": "1,0,1,1"}, "pixel_blocks"),
        ({"decoder_blocks": "1,1,1,1"}, "decoder_blocks.*3"),
        ({"pixel_widths": "512,250,128,64"}, "250.*heads 8"),
        ({"query_width": "200"}, "100.*heads 8"),
        ({"heads": "0"}, "heads is 0"),
        ({"queries": "0"}, "queries is 0"),
        ({"num_classes": "0"}, "num_classes is 0"),
        ({"ffn_width": "100000"}, "ffn_width is 100000"),
        ({"drop_path": "1"}, "drop_path is 1"),
        ({"reclass_eta": "1.5"}, "reclass_eta is 1.5"),
        ({"remask_blocks": "-1"}, "remask_blocks is -1"),
        ({"aspp_width": "4"}, "aspp_width is 4"),
        ({"points": "3"}, "no option 'points'.*pixel_widths"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(BadRequest, match=words):
        configure("remax_t", options)


def test_the_largest_image_fits_the_tables():
    assert configure("remax_t", {"image_size": "4065"}).image_size == 16 * (SPAN - 1) + 1
    assert configure("kmax_b", {"pixel_blocks": "1,2,3,4"}).pixel_blocks == (1, 2, 3, 4)


def test_twins_differ_in_training_alone():
    for size in (*PUBLISHED, "nano"):
        ours, twin = MODELS[f"remax_{size}"].config, MODELS[f"kmax_{size}"].config
        changed = {name for name in vars(ours) if getattr(ours, name) != getattr(twin, name)}
        assert changed == {"remask_blocks", "reclass_eta"}
