"""The decoders of kMaX-DeepLab: pixels by axial attention, masks by k-means cross-attention.

Maps are (B, C, H, W). Queries of all images are rows of one matrix (B * N, C), image after image. Sizes are
32k + 1 pixels (641 -> 161, 81, 41, 21), so that the corners of every map fall on each other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.models.layers import (
    ChannelNorm,
    ConvNorm,
    DropPath,
    LinearNorm,
    batch_norm_1d,
    batch_norm_2d,
    init_normal,
    resize,
    scale_and_shift,
)

# The relative-position tables reach this far either way: maps of up to 255 pixels a side.
SPAN = 255
# The share of slots that a fresh class head gives to all classes together.
_CLASS_PRIOR = 0.1


class Prediction(NamedTuple):
    """What one predictor says: of a decoder block, or the final one.

    `masks` are logits (B, N, h, w), `classes` logits (B, N, K + 1) with void last, `pixels` the features
    (B, D, h, w), of length 1 at every pixel.
    """

    masks: Tensor
    classes: Tensor
    pixels: Tensor


class AxialAttention(nn.Module):
    """Attention along one axis of a map, with relative positions for queries, keys and values.

    `width_in` channels become 2 * `width`; keys have `width` channels, values twice as many.
    """

    def __init__(self, width_in: int, width: int, heads: int, axis: str) -> None:
        super().__init__()
        self.axis, self.heads = axis, heads
        self.key_depth, self.value_depth = width, 2 * width
        self.qkv = nn.Conv2d(width_in, 4 * width, 1, bias=False)
        self.qkv_norm = batch_norm_2d(4 * width)
        self.similarity_norm = batch_norm_2d(3 * heads)
        self.output_norm = batch_norm_1d(4 * width)
        rows = 2 * SPAN - 1
        self.query_table = nn.Parameter(torch.empty(rows, width // heads))
        self.key_table = nn.Parameter(torch.empty(rows, width // heads))
        self.value_table = nn.Parameter(torch.empty(rows, 2 * width // heads))
        init_normal(self.qkv.weight, width_in**-0.5)
        for table in (self.query_table, self.key_table, self.value_table):
            init_normal(table, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, 2 * width, H, W)."""
        batch, _, height, width = x.shape
        across = self.axis == "width"
        length = width if across else height
        y: Tensor = self.qkv_norm(self.qkv(x))
        lines = y.permute(0, 2, 3, 1) if across else y.permute(0, 3, 2, 1)
        lines = lines.reshape(-1, length, 2 * self.key_depth + self.value_depth)
        depths = [self.key_depth, self.key_depth, self.value_depth]
        q, k, v = (
            part.reshape(part.shape[0], length, self.heads, -1).transpose(1, 2)
            for part in torch.split(lines, depths, dim=2)
        )
        weights = torch.softmax(self._similarity(q, k, length), dim=3)
        out = self._retrieve(weights, v, length).reshape(batch, -1, length, self.value_depth)
        return out.permute(0, 3, 1, 2) if across else out.permute(0, 3, 2, 1)

    def _relative(self, table: Tensor, length: int) -> Tensor:
        """Rows of a table for every pair: (length, length, depth), first by query, then by key."""
        where = torch.arange(length, device=table.device)
        index = where[None, :] - where[:, None] + (SPAN - 1)
        # As index_select: OpenVINO reads table[index] wrongly without a word.
        rows = torch.index_select(table, 0, index.reshape(-1))
        return rows.reshape(length, length, -1)

    def _similarity(self, q: Tensor, k: Tensor, length: int) -> Tensor:
        """(L, heads, length, depth) queries and keys -> logits (L, heads, length, length)."""
        query_rows = self._relative(self.query_table, length).transpose(1, 2)
        key_rows = self._relative(self.key_table, length).permute(1, 2, 0)
        scale, _ = scale_and_shift(self.similarity_norm)
        content, by_query, by_key = scale.reshape(3, self.heads, 1, 1)
        if not self.training:
            # The norm's shift is the same for all keys, which softmax ignores.
            logits: Tensor = (q * content) @ k.transpose(2, 3) + _by_line(q * by_query, query_rows)
            return logits + _by_line(k * by_key, key_rows).transpose(2, 3)
        parts = (q @ k.transpose(2, 3), _by_line(q, query_rows), _by_line(k, key_rows).transpose(2, 3))
        normed: Tensor = self.similarity_norm(torch.cat(parts, dim=1))
        return normed.reshape(-1, 3, self.heads, length, length).sum(1)

    def _retrieve(self, weights: Tensor, v: Tensor, length: int) -> Tensor:
        """Weighted values and relative rows: (L, heads, length, length) -> (L, length, 2 * width)."""
        relative = _by_line(weights, self._relative(self.value_table, length))
        parts = [part.transpose(1, 2).flatten(2) for part in (weights @ v, relative)]
        if self.training:
            normed: Tensor = self.output_norm(torch.cat(parts, dim=2).flatten(0, 1))
            return normed.reshape(-1, length, 2, self.value_depth).sum(2)
        scale, shift = (vector.reshape(2, -1) for vector in scale_and_shift(self.output_norm))
        return parts[0] * scale[0] + parts[1] * scale[1] + shift.sum(0)


def _by_line(x: Tensor, rows: Tensor) -> Tensor:
    """(L, heads, length, a) times a matrix (a, b) for each place on the line, (length, a, b)."""
    _, heads, length, depth = x.shape
    y = x.permute(2, 0, 1, 3).reshape(length, -1, depth) @ rows
    return y.reshape(length, -1, heads, rows.shape[2]).permute(1, 2, 0, 3)


class AxialBlock(nn.Module):
    """Bottleneck whose 3x3 convolution is attention along the height, then along the width."""

    def __init__(self, width_in: int, width: int, heads: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width_in, 2 * width, act=True)
        self.height = AxialAttention(2 * width, width, heads, "height")
        self.width = AxialAttention(2 * width, width, heads, "width")
        self.conv3 = ConvNorm(2 * width, 4 * width, gamma=0.0)
        self.shortcut = ConvNorm(width_in, 4 * width) if width_in != 4 * width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, 4 * width, H, W), not activated."""
        x = F.gelu(x)
        y = self.width(self.height(self.conv1(x)))
        out: Tensor = self.conv3(F.gelu(y)) + self.shortcut(x)
        return out


class BottleneckBlock(nn.Module):
    """1x1, 3x3, 1x1 bottleneck on activated input."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width_in, width, act=True)
        self.conv2 = ConvNorm(width, width, 3, act=True)
        self.conv3 = ConvNorm(width, 4 * width, gamma=0.0)
        self.shortcut = ConvNorm(width_in, 4 * width) if width_in != 4 * width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, 4 * width, H, W), not activated."""
        x = F.gelu(x)
        out: Tensor = self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x)
        return out


class Fuse(nn.Module):
    """Adds a stage's map, brought to the next stride, to the backbone's map there."""

    def __init__(self, width_low: int, width_high: int, width: int) -> None:
        super().__init__()
        self.low = ConvNorm(width_low, width)
        self.high = ConvNorm(width_high, width) if width_high != width else None

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """(B, width_low, h, w) and (B, width_high, H, W) -> (B, width, H, W)."""
        size = (high.shape[2], high.shape[3])
        if self.high is not None:
            high = self.high(F.gelu(high))
        return resize(self.low(F.gelu(low)), size) + high


class PixelDecoder(nn.Module):
    """Maps of a backbone at strides 4, 8, 16, 32 -> decoded maps at strides 32, 16, 8, 4.

    Every level passes a layer norm; two axial stages, then two of bottlenecks. A stage of width f has 4f
    channels at its end, not activated.
    """

    def __init__(
        self, backbone_widths: tuple[int, ...], widths: tuple[int, ...], blocks: tuple[int, ...], heads: int
    ) -> None:
        super().__init__()
        deepest_first = backbone_widths[::-1]
        self.norms = nn.ModuleList(ChannelNorm(width) for width in deepest_first)
        self.stages, self.fuses = nn.ModuleList(), nn.ModuleList()
        width_in = deepest_first[0]
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            inputs = [width_in, *([4 * width] * (count - 1))]
            make = (lambda a, b: AxialBlock(a, b, heads)) if i < 2 else BottleneckBlock
            self.stages.append(nn.Sequential(*(make(a, width) for a in inputs)))
            if i + 1 < len(widths):
                width_in = widths[i + 1]
                self.fuses.append(Fuse(4 * width, deepest_first[i + 1], width_in))

    def layers(self) -> dict[str, nn.Module]:
        """The parts that follow each other from input to output, by name."""
        return {
            f"stages.{i}.{name}": block
            for i, stage in enumerate(self.stages)
            for name, block in stage.named_children()
        }

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Backbone maps, finest first -> decoded maps, coarsest first."""
        levels = [norm(x) for norm, x in zip(self.norms, features[::-1], strict=True)]
        x, out = levels[0], []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            out.append(x)
            if i < len(self.fuses):
                x = self.fuses[i](x, levels[i + 1])
        return out


class Predictor(nn.Module):
    """Mask and class logits of queries on a pixel map, equation by equation as kMaX-DeepLab's predictor."""

    def __init__(self, width: int, query_width: int, mask_width: int, classes: int) -> None:
        super().__init__()
        self.pixel_depthwise = ConvNorm(width, width, 5, act=True, groups=width)
        self.pixel_mix = ConvNorm(width, query_width, act=True)
        self.pixel_out = ConvNorm(query_width, mask_width, bias=True)
        self.mask_kernel = LinearNorm(query_width, mask_width)
        self.mask_norm = batch_norm_2d(1, gamma=0.1)
        self.class_head = nn.Linear(query_width, classes + 1)
        for layer in (self.pixel_out.conv, self.class_head):
            init_normal(layer.weight, 0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        # Not learned: a fresh network calls most slots void.
        prior = torch.zeros(classes + 1)
        prior[-1] = torch.log(torch.tensor(classes * (1 - _CLASS_PRIOR) / _CLASS_PRIOR))
        self.register_buffer("void_prior", prior, persistent=False)
        self.void_prior: Tensor

    def forward(self, x: Tensor, class_queries: Tensor, mask_queries: Tensor) -> Prediction:
        """(B, width, H, W) and two (B * N, query_width) -> the prediction of N slots."""
        pixels = _of_length_one(self.pixel_features(x))
        batch, depth, height, width = pixels.shape
        kernels = self.mask_kernel(mask_queries).reshape(batch, -1, depth)
        if self.training:
            masks = self.mask_norm((kernels @ pixels.flatten(2)).unsqueeze(1))
        else:
            scale, shift = scale_and_shift(self.mask_norm)
            masks = (kernels * scale) @ pixels.flatten(2) + shift
        return Prediction(
            masks.reshape(batch, -1, height, width), self.classify(class_queries, batch), pixels
        )

    def pixel_features(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, mask_width, H, W), not yet of length 1."""
        y: Tensor = self.pixel_out(self.pixel_mix(self.pixel_depthwise(x)))
        return y

    def classify(self, queries: Tensor, batch: int) -> Tensor:
        """(B * N, query_width) -> class logits (B, N, classes + 1)."""
        logits: Tensor = self.class_head(queries) + self.void_prior
        return logits.reshape(batch, -1, logits.shape[1])

    def closest(self, x: Tensor, mask_queries: Tensor) -> Tensor:
        """The best slot of every pixel, outside training: (B, 1, H * W) int64.

        Neither the length of a pixel's features nor the mask norm move an argmax over slots, except by a
        negative sign of the norm's scale.
        """
        pixels = self.pixel_features(x).flatten(2)
        kernels = self.mask_kernel(mask_queries) * torch.sign(self.mask_norm.weight)
        logits: Tensor = kernels.reshape(x.shape[0], -1, pixels.shape[1]) @ pixels
        return logits.argmax(dim=1, keepdim=True)


def _of_length_one(x: Tensor) -> Tensor:
    """Every pixel of a map (B, D, H, W) divided by its length; zeros stay zeros."""
    return x * torch.rsqrt(x.square().sum(dim=1, keepdim=True).clamp(min=1e-24))


def one_hot(slots: Tensor, count: int) -> Tensor:
    """(B, 1, L) numbers of slots -> (B, count, L) float32, a single one for each of L pixels."""
    # Not F.one_hot, which not every engine has; nor a comparison with the maximum, which assigns ties twice.
    return (slots == torch.arange(count, device=slots.device).reshape(-1, 1)).float()


class SelfAttention(nn.Module):
    """Attention among the queries of an image; logits and values are batch-normed, not scaled."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.key_depth = heads, width // 2
        self.qkv = LinearNorm(width, 2 * width, std=width**-0.5)
        self.similarity_norm = batch_norm_2d(heads)
        self.value_norm = batch_norm_1d(width)
        self.out = LinearNorm(width, width, gamma=0.0)

    def forward(self, x: Tensor, batch: int) -> Tensor:
        """(B * N, width) -> (B * N, width)."""
        depth = self.key_depth
        q, k, v = (
            part.reshape(batch, -1, self.heads, part.shape[1] // self.heads).transpose(1, 2)
            for part in torch.split(self.qkv(x), [depth, depth, 2 * depth], dim=1)
        )
        if self.training:
            logits = self.similarity_norm(q @ k.transpose(2, 3))
        else:
            # The norm's shift is the same for all keys, which softmax ignores.
            scale, _ = scale_and_shift(self.similarity_norm)
            logits = (q * scale.reshape(-1, 1, 1)) @ k.transpose(2, 3)
        y = (torch.softmax(logits, dim=3) @ v).transpose(1, 2).reshape(x.shape)
        out: Tensor = self.out(F.gelu(norm_rows(self.value_norm, y)))
        return out


def norm_rows(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """A batch norm over rows (L, channels), outside training in the form that engines fuse."""
    if norm.training:
        y: Tensor = norm(x)
        return y
    scale, shift = scale_and_shift(norm)
    return x * scale + shift


class BlockOptions(NamedTuple):
    """What the blocks of a transformer decoder have in common."""

    heads: int
    ffn_width: int
    drop_path: float


class BlockOutput(NamedTuple):
    """What a block says: new `queries` (B * N, width), and `slots`, the best one of every pixel (B, 1, L).

    While training also its `prediction`, and its pixels `keys` (B, width, h, w), which ReMask's head reads.
    """

    queries: Tensor
    slots: Tensor
    prediction: Prediction | None = None
    keys: Tensor | None = None


class KMeansBlock(nn.Module):
    """One k-means cross-attention block: queries take the sum of the pixels that are closest to them.

    The assignment always uses the raw mask logits: the relaxations of ReMaX do not reach it.
    """

    def __init__(self, pixel_width: int, width: int, mask_width: int, classes: int, options: BlockOptions):
        super().__init__()
        self.pixel_in = ConvNorm(pixel_width, width, act=True)
        self.query_in = LinearNorm(width, width, act=True)
        self.value = ConvNorm(width, width, std=width**-0.5)
        self.predictor = Predictor(width, width, mask_width, classes)
        self.update_norm = batch_norm_1d(width)
        self.update = LinearNorm(width, width, gamma=0.0)
        self.attention = SelfAttention(width, options.heads)
        self.ffn_in = LinearNorm(width, options.ffn_width, act=True)
        self.ffn_out = LinearNorm(options.ffn_width, width, gamma=0.0)
        self.drop_path = DropPath(options.drop_path)

    def forward(self, x: Tensor, queries: Tensor) -> BlockOutput:
        """(B, pixel_width, H, W) and (B * N, width)."""
        pixels, inner = self.pixel_in(F.gelu(x)), self.query_in(queries)
        if not self.training:
            slots = self.predictor.closest(pixels, inner)
            gathered = self._gather_late(pixels, slots, queries)
            return BlockOutput(self._step(queries, inner, gathered, x.shape[0]), slots)
        prediction = self.predictor(pixels, inner, inner)
        slots = prediction.masks.detach().flatten(2).argmax(dim=1, keepdim=True)
        gathered = self._gather(pixels, slots, queries)
        return BlockOutput(self._step(queries, inner, gathered, x.shape[0]), slots, prediction, pixels)

    def _gather(self, pixels: Tensor, slots: Tensor, queries: Tensor) -> Tensor:
        """The sum of the values of each slot's pixels, (B * N, width); of none, zero."""
        assigned = one_hot(slots, queries.shape[0] // pixels.shape[0])
        # A sum over up to a whole map: float32 whatever the rest is computed in.
        with torch.autocast(pixels.device.type, enabled=False):
            values: Tensor = self.value(pixels).flatten(2).transpose(1, 2).float()
            return (assigned @ values).flatten(0, 1)

    def _gather_late(self, pixels: Tensor, slots: Tensor, queries: Tensor) -> Tensor:
        """The same outside training, with the values taken of N sums rather than of H * W pixels."""
        assigned = one_hot(slots, queries.shape[0] // pixels.shape[0])
        sums = (assigned @ pixels.flatten(2).transpose(1, 2)).flatten(0, 1)
        scale, shift = scale_and_shift(self.value.norm)
        weight = self.value.conv.weight.flatten(1) * scale.unsqueeze(1)
        count = assigned.sum(dim=2).reshape(-1, 1)
        return F.linear(sums, weight) + count * shift

    def _step(self, queries: Tensor, inner: Tensor, gathered: Tensor, batch: int) -> Tensor:
        update = self.update(norm_rows(self.update_norm, gathered))
        queries = queries + self.drop_path(update, batch)
        queries = F.gelu(queries + self.drop_path(self.attention(inner, batch), batch))
        return F.gelu(queries + self.drop_path(self.ffn_out(self.ffn_in(queries)), batch))


class Decoded(NamedTuple):
    """What a transformer decoder says: masks on the finest map, and what each block said on the way."""

    final: Prediction
    blocks: list[BlockOutput]


class TransformerDecoder(nn.Module):
    """Queries through blocks on the maps at strides 32, 16 and 8, then masks on the finest map."""

    def __init__(
        self,
        pixel_widths: tuple[int, ...],
        blocks: tuple[int, ...],
        *,
        queries: int,
        width: int,
        mask_width: int,
        classes: int,
        options: BlockOptions,
    ) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.empty(queries, width))
        init_normal(self.centres, 1.0)
        self.levels = [level for level, count in enumerate(blocks) for _ in range(count)]
        self.blocks = nn.ModuleList(
            KMeansBlock(pixel_widths[level], width, mask_width, classes, options) for level in self.levels
        )
        self.class_embedding = LinearNorm(width, width, act=True)
        self.mask_embedding = LinearNorm(width, width, act=True)
        self.predictor = Predictor(pixel_widths[-1], width, mask_width, classes)

    def forward(self, maps: list[Tensor]) -> Decoded:
        """Decoded maps, coarsest first."""
        queries, blocks = self.centres.repeat(maps[0].shape[0], 1), []
        for level, block in zip(self.levels, self.blocks, strict=True):
            blocks.append(block(maps[level], queries))
            queries = blocks[-1].queries
        final = self.predictor(maps[-1], self.class_embedding(queries), self.mask_embedding(queries))
        return Decoded(final, blocks)
