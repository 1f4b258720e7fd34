"""ReMaX: panoptic segmentation by kMaX-DeepLab's network, trained with relaxed masks and classes.

Thesis chapter 6. The network that is deployed is kMaX-DeepLab's; what only training needs lives in
`RelaxedTraining` around it, so that no run, engine or parameter count holds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitkit.models.backbones import BACKBONES, build_backbone
from vitkit.models.family import CardParts, Labels, Model, ModelConfig
from vitkit.models.kmax import SPAN, BlockOptions, Decoded, PixelDecoder, Prediction, TransformerDecoder
from vitkit.models.layers import ConvNorm, init_normal, resize
from vitkit.runtimes.card import ImageSpec, TensorSpec

MAX_OPTION = 10_000
# The strides of the pixel decoder's maps, in its order; the masks have the last one.
STRIDES = (32, 16, 8, 4)
_LIMITS = {
    "num_classes": (1, MAX_OPTION),
    "heads": (1, MAX_OPTION),
    "queries": (1, MAX_OPTION),
    "query_width": (2, MAX_OPTION),
    "mask_width": (1, MAX_OPTION),
    "ffn_width": (1, MAX_OPTION),
    "aspp_width": (8, MAX_OPTION),
    "image_size": (33, 16 * SPAN + 1),
    "drop_path": (0, 0.99),
    "reclass_eta": (0, 1),
    "remask_blocks": (0, MAX_OPTION),
}
_CHOICES = {
    "backbone": BACKBONES,
    "se_gate": ("hard_sigmoid", "sigmoid"),
    "mask_id": ("sigmoid", "softmax"),
}


@dataclass(frozen=True)
class ReMaXConfig(ModelConfig):
    """Architecture of one ReMaX; the defaults are ReMaX-T (thesis appendix of chapter 6, table B).

    `image_size` is 32k + 1 pixels. `pixel_widths` and `pixel_blocks` go over strides 32, 16, 8, 4,
    `decoder_blocks` over 32, 16, 8. `se_gate` is the gate of MobileNetV3's squeeze-and-excitation:
    `hard_sigmoid` (the paper's, which ImageNet weights were trained with) or `sigmoid` (deeplab2's).
    The rest matters in training alone: `remask_blocks` blocks have relaxed masks (0 for kMaX);
    `aspp_width` is that of their semantic heads and of the auxiliary one; `reclass_eta` is eta of equation
    6.4 (0 for kMaX); `mask_id` is the mask-ID loss, `softmax`, which trains better on generated scenes
    (docs/results/remax.md), or `sigmoid`, which the thesis found better on COCO.
    """

    num_classes: int = 133
    image_size: int = 641
    backbone: str = "mobilenetv3_small_100"
    se_gate: str = "hard_sigmoid"
    pixel_widths: tuple[int, ...] = (512, 256, 128, 64)
    pixel_blocks: tuple[int, ...] = (1, 1, 1, 1)
    decoder_blocks: tuple[int, ...] = (1, 1, 1)
    heads: int = 8
    queries: int = 128
    query_width: int = 256
    mask_width: int = 128
    ffn_width: int = 2048
    drop_path: float = 0.2
    remask_blocks: int = 4
    aspp_width: int = 256
    reclass_eta: float = 0.1
    mask_id: str = "softmax"

    def __post_init__(self) -> None:
        for name, length in {"pixel_widths": 4, "pixel_blocks": 4, "decoder_blocks": 3}.items():
            value = getattr(self, name)
            if len(value) != length or not all(1 <= item <= MAX_OPTION for item in value):
                raise ValueError(f"{name} is {value}; it must be {length} numbers from 1 to {MAX_OPTION}")
        for name, (low, high) in _LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {low} to {high}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {' or '.join(choices)}")
        if self.image_size % 32 != 1:
            raise ValueError(f"image_size is {self.image_size}; it must be 32k + 1, such as 641")
        for width in (*self.pixel_widths[:2], self.query_width // 2):
            if width % self.heads:
                raise ValueError(f"the width {width} is not a multiple of heads {self.heads}")


class ReMaX(Model):
    """The network that is deployed: backbone, pixel decoder, transformer decoder."""

    config: ReMaXConfig
    output_names = ("masks", "classes")

    def __init__(self, config: ReMaXConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.backbone, config.se_gate)
        self.pixel_decoder = PixelDecoder(
            self.backbone.widths, config.pixel_widths, config.pixel_blocks, config.heads
        )
        self.decoder = TransformerDecoder(
            tuple(4 * width for width in config.pixel_widths),
            config.decoder_blocks,
            queries=config.queries,
            width=config.query_width,
            mask_width=config.mask_width,
            classes=config.num_classes,
            options=BlockOptions(config.heads, config.ffn_width, config.drop_path),
        )

    @property
    def float_modules(self) -> tuple[str, ...]:
        """The k-means assignments and the mask logits: a flip there moves all that follows."""
        return ("decoder.blocks.?", "decoder.predictor")

    def forward(self, images: Tensor) -> Decoded:
        """Normalised (B, 3, H, W) images, of 32k + 1 pixels a side."""
        decoded: Decoded = self.decoder(self.pixel_decoder(self.backbone(images)))
        return decoded

    def deploy(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What an engine returns: mask logits (B, N, H/4, W/4) and class logits (B, N, K + 1)."""
        final = self(images).final
        return final.masks, final.classes

    def layers(self) -> dict[str, nn.Module]:
        """The parts that follow each other from input to output, by name."""
        pixels = self.pixel_decoder.layers().items()
        return {
            **{f"backbone.{name}": part for name, part in self.backbone.layers().items()},
            **{f"pixel_decoder.{name}": part for name, part in pixels},
            **{f"decoder.blocks.{i}": block for i, block in enumerate(self.decoder.blocks)},
        }

    def decisions(self, images: Tensor) -> dict[str, Tensor]:
        """What decides in between: every block's best slot of each pixel, by the node that computes it."""
        return {f"decoder.blocks.{i}/ArgMax": block.slots for i, block in enumerate(self(images).blocks)}


class Relaxed(NamedTuple):
    """What losses are taken of: predictions, and logits (B, K + 1 or K, h, w) of the semantic heads.

    Outside training there is the final prediction alone.
    """

    final: Prediction
    blocks: list[Prediction]
    semantic: Tensor | None
    block_semantic: list[Tensor]


class RelaxedTraining(nn.Module):
    """A ReMaX with what only training needs: the auxiliary semantic head, and ReMask's (equation 6.1)."""

    def __init__(self, model: ReMaX) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.semantic = SemanticDecoder(model.backbone.widths, config.num_classes + 1, config.aspp_width)
        count = min(config.remask_blocks, sum(config.decoder_blocks))
        self.remask = nn.ModuleList(
            nn.Sequential(
                ASPP(config.query_width, config.aspp_width), _logits(config.aspp_width, config.num_classes)
            )
            for _ in range(count)
        )

    def forward(self, images: Tensor) -> Relaxed:
        """Normalised (B, 3, H, W) images -> all that losses are taken of."""
        features = self.model.backbone(images)
        decoded: Decoded = self.model.decoder(self.model.pixel_decoder(features))
        predictions = [block.prediction for block in decoded.blocks if block.prediction is not None]
        if not self.training:
            return Relaxed(decoded.final, [], None, [])
        heads = zip(self.remask, decoded.blocks, strict=False)
        block_semantic = [head(block.keys) for head, block in heads]
        return Relaxed(decoded.final, predictions, self.semantic(features), block_semantic)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a pixel, its surroundings at three rates, the whole map."""

    rates = (6, 12, 18)

    def __init__(self, width_in: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.point = ConvNorm(width_in, width, act=True)
        self.around = nn.ModuleList(
            ConvNorm(width_in, width, 3, dilation=rate, act=True) for rate in self.rates
        )
        self.whole = ConvNorm(width_in, width, act=True)
        self.project = ConvNorm(width * (2 + len(self.rates)), width, act=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H, W)."""
        whole = self.whole(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        parts = [self.point(x), *(conv(x) for conv in self.around), whole]
        y: Tensor = self.dropout(self.project(torch.cat(parts, dim=1)))
        return y


class SemanticDecoder(nn.Module):
    """The auxiliary semantic head of kMaX-DeepLab, on the backbone's raw maps at strides 32, 8 and 4.

    Published with a `width` of 256; what joins from strides 8 and 4 has a quarter and an eighth of it.
    """

    def __init__(self, widths: tuple[int, ...], classes: int, width: int) -> None:
        super().__init__()
        self.aspp = ASPP(widths[3], width, dropout=0.1)
        self.project8 = ConvNorm(widths[1], width // 4, act=True)
        self.fuse8 = _separable(width + width // 4, width)
        self.project4 = ConvNorm(widths[0], width // 8, act=True)
        self.fuse4 = _separable(width + width // 8, width)
        self.head = _separable(width, width)
        self.out = _logits(width, classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Backbone maps, finest first -> semantic logits (B, classes, H/4, W/4)."""
        x = _join(self.aspp(features[3]), self.project8(features[1]))
        x = _join(self.fuse8(x), self.project4(features[0]))
        y: Tensor = self.out(self.head(self.fuse4(x)))
        return y


def _logits(width: int, classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(width, classes, 1)
    assert layer.bias is not None
    init_normal(layer.weight, 0.01)
    nn.init.zeros_(layer.bias)
    return layer


def _separable(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        ConvNorm(width_in, width_in, 5, groups=width_in, act=True), ConvNorm(width_in, width, act=True)
    )


def _join(low: Tensor, high: Tensor) -> Tensor:
    return torch.cat([resize(low, (high.shape[2], high.shape[3])), high], dim=1)


def card_parts(config: ReMaXConfig, labels: Labels) -> CardParts:
    """The ReMaX part of a card: mask and class logits of the slots; classes are things by default."""
    side = (config.image_size - 1) // STRIDES[-1] + 1
    outputs = (
        TensorSpec("masks", (None, config.queries, side, side), "float32"),
        TensorSpec("classes", (None, config.queries, config.num_classes + 1), "float32"),
    )
    # Pixels become -1..1. The published padding is 0 after that, half a grey value from 128.
    image = ImageSpec(
        (config.image_size, config.image_size),
        interpolation="bilinear",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        layout="NCHW",
        dtype="float32",
        fit="contain",
        pad=128,
    )
    things = labels.things or (True,) * len(labels.names)
    decode = {
        "masks": "masks",
        "classes": "classes",
        "things": [i for i, thing in enumerate(things) if thing],
    }
    return CardParts(outputs, image, decode)


def coco_labels() -> Labels:
    """COCO's 133 panoptic categories: 80 things, then 53 kinds of stuff."""
    from vitkit.data.coco.categories import IDS, NAMES, THINGS

    return Labels(NAMES, tuple(map(str, IDS)), tuple(i < THINGS for i in range(len(NAMES))))
