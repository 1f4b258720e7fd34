"""The registry of models: `build(name, **options)` makes one, `MODELS` says what there is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from vitkit.models.ps_vit import PSViT, PSViTConfig
from vitkit.models.remax import STRIDES, ReMaX, ReMaXConfig
from vitkit.runtimes.card import ImageSpec, ModelCard, TensorSpec
from vitkit.runtimes.errors import BadRequest

if TYPE_CHECKING:
    from torch import nn

Config = PSViTConfig | ReMaXConfig
Model = PSViT | ReMaX

_TI = PSViTConfig()
_B = PSViTConfig(dim=384, heads=6, encoder_layers=10, stem_mid=256)
_NANO = PSViTConfig(
    num_classes=10, image_size=64, n=7, dim=64, heads=2, encoder_layers=2, stem_width=32, stem_mid=64,
    share=True,
)  # fmt: skip


_T = ReMaXConfig()
_S = ReMaXConfig(backbone="mobilenetv3_large_100")
_M = ReMaXConfig(backbone="resnet50", pixel_blocks=(1, 5, 1, 1))
_BIG = replace(_M, decoder_blocks=(2, 2, 2), image_size=1281)
_PANOPTIC_NANO = ReMaXConfig(
    num_classes=9, image_size=129, backbone="mobilenetv3_small_050", pixel_widths=(64, 64, 32, 16),
    queries=24, query_width=64, mask_width=32, ffn_width=256, drop_path=0.0, aspp_width=32,
)  # fmt: skip


def _unrelaxed(config: ReMaXConfig) -> ReMaXConfig:
    """The kMaX twin: the same network, trained without ReMask and ReClass, by softmax as published."""
    return replace(config, remask_blocks=0, reclass_eta=0.0, mask_id="softmax")


@dataclass(frozen=True)
class ModelInfo:
    """One registered model.

    `reported` is the paper's accuracy in per cent, top-1 on ImageNet or PQ on COCO; `source` its table.
    """

    config: Config
    reported: float | None = None
    source: str = "not published"

    @property
    def task(self) -> str:
        """What the model does."""
        return "classification" if isinstance(self.config, PSViTConfig) else "panoptic"


MODELS: dict[str, ModelInfo] = {
    "ps_vit_ti_14": ModelInfo(_TI, reported=75.6, source="thesis chapter 3, table 3"),
    "ps_vit_ti_14_share": ModelInfo(
        replace(_TI, share=True), reported=74.1, source="thesis chapter 3, table 8"
    ),
    "ps_vit_b_10": ModelInfo(replace(_B, n=10), reported=80.6, source="thesis chapter 3, table 3"),
    "ps_vit_b_12": ModelInfo(replace(_B, n=12), reported=81.3, source="thesis chapter 3, table 5"),
    "ps_vit_b_14": ModelInfo(_B, reported=81.7, source="thesis chapter 3, table 3"),
    "ps_vit_b_16": ModelInfo(replace(_B, n=16), reported=82.1, source="thesis chapter 3, table 5"),
    "ps_vit_b_18": ModelInfo(replace(_B, n=18), reported=82.3, source="thesis chapter 3, table 3"),
    "ps_vit_b_10_share": ModelInfo(
        replace(_B, n=10, share=True), reported=80.0, source="thesis chapter 3, table 8"
    ),
    "ps_vit_b_12_share": ModelInfo(
        replace(_B, n=12, share=True), reported=80.9, source="thesis chapter 3, table 8"
    ),
    "ps_vit_b_14_share": ModelInfo(
        replace(_B, share=True), reported=81.5, source="thesis chapter 3, table 8"
    ),
    "ps_vit_nano": ModelInfo(_NANO, source="vitkit's own, for the demo"),
    "remax_t": ModelInfo(_T, reported=40.4, source="thesis chapter 6, section 4.2"),
    "remax_s": ModelInfo(_S, reported=44.6, source="thesis chapter 6, section 4.2"),
    "remax_m": ModelInfo(_M, reported=49.1, source="thesis chapter 6, section 4.2"),
    "remax_b": ModelInfo(_BIG, reported=54.2, source="thesis chapter 6, table 6"),
    "remax_nano": ModelInfo(_PANOPTIC_NANO, source="vitkit's own, for the demo"),
    "kmax_t": ModelInfo(_unrelaxed(_T)),
    "kmax_s": ModelInfo(_unrelaxed(_S)),
    "kmax_m": ModelInfo(_unrelaxed(_M)),
    "kmax_b": ModelInfo(_unrelaxed(_BIG), reported=53.0, source="thesis chapter 6, table 6"),
    "kmax_nano": ModelInfo(_unrelaxed(_PANOPTIC_NANO), source="vitkit's own, to compare with"),
}


def model_info(name: str) -> ModelInfo:
    """The registry's entry; raises BadRequest for an unknown name."""
    if name not in MODELS:
        raise BadRequest(
            f"there is no model {name!r}; the models are {', '.join(MODELS)} (see: vitkit models)"
        )
    return MODELS[name]


def configure(name: str, options: Mapping[str, Any]) -> Config:
    """A model's config with options changed, given as values or as text (`qk_scale="dim"`, `n="12"`).

    Raises BadRequest for an unknown model or option, and for a value that the option cannot take.
    """
    config = model_info(name).config
    known = {field.name: type(getattr(config, field.name)) for field in fields(config)}
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            raise BadRequest(f"{name} has no option {key!r}; the options are {', '.join(known)}")
        try:
            values[key] = _parse(value, known[key])
        except (ValueError, OverflowError):
            kind = "list such as 1,5,1,1" if known[key] is tuple else known[key].__name__
            raise BadRequest(f"option {key}={value!r} is not a {kind}") from None
    try:
        return replace(config, **values)
    except ValueError as error:
        raise BadRequest(f"{name}: {error}") from None


def _parse(value: Any, kind: Any) -> Any:
    if kind is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise ValueError(value)
        return tuple(_parse(item, int) for item in items)
    if not isinstance(value, str):
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(value)
        return kind(value)
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(value)
        return value.lower() == "true"
    return kind(value)


def build(name: str, **options: Any) -> Model:
    """A freshly initialised model; `options` are fields of its config. Raises BadRequest."""
    config = configure(name, options)
    return PSViT(config) if isinstance(config, PSViTConfig) else ReMaX(config)


@dataclass(frozen=True)
class Labels:
    """The classes of a data set: `names`, its own `ids` where they differ, and which are things."""

    names: tuple[str, ...]
    ids: tuple[str, ...] | None = None
    things: tuple[bool, ...] | None = None


def run_card(name: str, config: Config, labels: Labels | None = None) -> ModelCard:
    """The card of a float model as torch runs it: normalised NCHW float32 input, any batch.

    Without `labels` classes go by their numbers; those of a panoptic model with COCO's 133 by COCO's names.
    """
    card = _panoptic_card if isinstance(config, ReMaXConfig) else _classification_card
    if labels is None:
        labels = _coco_labels() if isinstance(config, ReMaXConfig) and config.num_classes == 133 else None
    numbered = Labels(tuple(str(i) for i in range(config.num_classes)))
    body = card(config, labels or numbered)  # type: ignore[arg-type,operator]
    side = config.image_size
    return ModelCard(
        name=name,
        task=model_info(name).task,
        target="torch",
        precision="fp32",
        inputs=(TensorSpec("image", (None, 3, side, side), "float32"),),
        labels=(labels or numbered).names,
        label_ids=(labels or numbered).ids,
        provenance={"model": name, "options": {k: _plain(v) for k, v in asdict(config).items()}},
        **body,
    )


def _plain(value: Any) -> Any:
    # As JSON reads it back, so that a card compares equal to itself.
    return list(value) if isinstance(value, tuple) else value


def _classification_card(config: PSViTConfig, labels: Labels) -> dict[str, Any]:
    outputs = (
        TensorSpec("logits", (None, config.num_classes), "float32"),
        TensorSpec("points", (None, config.iterations, config.n**2, 2), "float32"),
    )
    return {
        "outputs": outputs,
        "image": ImageSpec((config.image_size, config.image_size), layout="NCHW", dtype="float32"),
        "decode": {"logits": "logits", "points": "points"},
    }


def _panoptic_card(config: ReMaXConfig, labels: Labels) -> dict[str, Any]:
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
    return {"outputs": outputs, "image": image, "decode": decode}


def _coco_labels() -> Labels:
    from vitkit.data.coco.categories import IDS, NAMES, THINGS

    return Labels(NAMES, tuple(map(str, IDS)), tuple(i < THINGS for i in range(len(NAMES))))


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters; a layer shared by several iterations counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_macs(model: Model) -> int:
    """Multiply-adds of convolutions, linear layers and matrix products, for one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    side = model.config.image_size
    # Tensors without data: nothing is computed, and the model stays as it is.
    shadow = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(torch.zeros(1, 3, side, side, device="meta"))
    return int(counter.get_total_flops()) // 2
