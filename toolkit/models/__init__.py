"""The registry of models: `build(name, **options)` makes one, `MODELS` says what there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from vitkit.models.ps_vit import PSViT, PSViTConfig
from vitkit.runtimes.card import ImageSpec, ModelCard, TensorSpec
from vitkit.runtimes.errors import BadRequest

if TYPE_CHECKING:
    from torch import nn

_TI = PSViTConfig()
_B = PSViTConfig(dim=384, heads=6, encoder_layers=10, stem_mid=256)
_NANO = PSViTConfig(
    num_classes=10, image_size=64, n=7, dim=64, heads=2, encoder_layers=2, stem_width=32, stem_mid=64,
    share=True,
)  # fmt: skip


@dataclass(frozen=True)
class ModelInfo:
    """One registered model; `top1` is the paper's ImageNet accuracy in per cent, `source` its table."""

    config: PSViTConfig
    task: str = "classification"
    top1: float | None = None
    source: str = "not published"


MODELS: dict[str, ModelInfo] = {
    "ps_vit_ti_14": ModelInfo(_TI, top1=75.6, source="thesis chapter 3, table 3"),
    "ps_vit_ti_14_share": ModelInfo(replace(_TI, share=True), top1=74.1, source="thesis chapter 3, table 8"),
    "ps_vit_b_10": ModelInfo(replace(_B, n=10), top1=80.6, source="thesis chapter 3, table 3"),
    "ps_vit_b_12": ModelInfo(replace(_B, n=12), top1=81.3, source="thesis chapter 3, table 5"),
    "ps_vit_b_14": ModelInfo(_B, top1=81.7, source="thesis chapter 3, table 3"),
    "ps_vit_b_16": ModelInfo(replace(_B, n=16), top1=82.1, source="thesis chapter 3, table 5"),
    "ps_vit_b_18": ModelInfo(replace(_B, n=18), top1=82.3, source="thesis chapter 3, table 3"),
    "ps_vit_b_10_share": ModelInfo(
        replace(_B, n=10, share=True), top1=80.0, source="thesis chapter 3, table 8"
    ),
    "ps_vit_b_12_share": ModelInfo(
        replace(_B, n=12, share=True), top1=80.9, source="thesis chapter 3, table 8"
    ),
    "ps_vit_b_14_share": ModelInfo(replace(_B, share=True), top1=81.5, source="thesis chapter 3, table 8"),
    "ps_vit_nano": ModelInfo(_NANO, source="vitkit's own, for the demo"),
}


def model_info(name: str) -> ModelInfo:
    """The registry's entry; raises BadRequest for an unknown name."""
    if name not in MODELS:
        raise BadRequest(
            f"there is no model {name!r}; the models are {', '.join(MODELS)} (see: vitkit models)"
        )
    return MODELS[name]


def configure(name: str, options: Mapping[str, Any]) -> PSViTConfig:
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
            raise BadRequest(f"option {key}={value!r} is not a {known[key].__name__}") from None
    try:
        return replace(config, **values)
    except ValueError as error:
        raise BadRequest(f"{name}: {error}") from None


def _parse(value: Any, kind: Any) -> Any:
    if not isinstance(value, str):
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(value)
        return kind(value)
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(value)
        return value.lower() == "true"
    return kind(value)


def build(name: str, **options: Any) -> PSViT:
    """A freshly initialised model; `options` are fields of its config. Raises BadRequest."""
    return PSViT(configure(name, options))


def run_card(
    name: str, config: PSViTConfig, labels: tuple[str, ...] = (), label_ids: tuple[str, ...] | None = None
) -> ModelCard:
    """The card of a float model as torch runs it: normalised NCHW float32 input, any batch."""
    side = config.image_size
    outputs = (
        TensorSpec("logits", (None, config.num_classes), "float32"),
        TensorSpec("points", (None, config.iterations, config.n**2, 2), "float32"),
    )
    if not labels:
        labels = tuple(str(i) for i in range(config.num_classes))
    return ModelCard(
        name=name,
        task=model_info(name).task,
        target="torch",
        precision="fp32",
        inputs=(TensorSpec("image", (None, 3, side, side), "float32"),),
        outputs=outputs,
        image=ImageSpec((side, side), layout="NCHW", dtype="float32"),
        labels=labels,
        label_ids=label_ids,
        decode={"logits": "logits", "points": "points"},
        provenance={"model": name, "options": asdict(config)},
    )


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters; a layer shared by several iterations counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_macs(model: PSViT) -> int:
    """Multiply-adds of convolutions, linear layers and matrix products, for one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    side = model.config.image_size
    image = torch.zeros(1, 3, side, side, device=next(model.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return int(counter.get_total_flops()) // 2
