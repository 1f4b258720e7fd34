"""The registry of models: `MODELS` lists them by name, `build(name, **options)` makes one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import vitkit.calibration.openmp  # noqa: F401  (before torch)
from vitkit.models.families import FAMILIES, family_of
from vitkit.models.family import Family, Labels, Model, ModelConfig
from vitkit.models.ps_vit import PSViTConfig
from vitkit.models.remax import ReMaXConfig
from vitkit.runtimes.card import ModelCard, TensorSpec
from vitkit.runtimes.errors import BadRequest

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "FAMILIES",
    "MODELS",
    "Family",
    "Labels",
    "Model",
    "ModelConfig",
    "ModelInfo",
    "build",
    "configure",
    "count_macs",
    "count_parameters",
    "family_of",
    "model_info",
    "run_card",
]

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

    config: ModelConfig
    reported: float | None = None
    source: str = "not published"

    @property
    def task(self) -> str:
        """The task, a key of `vitkit.runtimes.tasks.TASKS`."""
        return family_of(self.config).task


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


def configure(name: str, options: Mapping[str, Any]) -> ModelConfig:
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
    return family_of(config).module(config)


def run_card(name: str, config: ModelConfig, labels: Labels | None = None) -> ModelCard:
    """The card of a float model as torch runs it: normalised NCHW float32 input, any batch.

    Without `labels`, classes go by the names of the family's published data set if their number fits
    (COCO's 133 of a panoptic model), else by their numbers.
    """
    family, count, side = family_of(config), config.num_classes, config.image_size
    if labels is None:
        published = family.labels.get(count)
        labels = published() if published else Labels(tuple(map(str, range(count))))
    parts = family.card(config, labels)
    return ModelCard(
        name=name,
        task=family.task,
        target="torch",
        precision="fp32",
        inputs=(TensorSpec("image", (None, 3, side, side), "float32"),),
        outputs=parts.outputs,
        image=parts.image,
        labels=labels.names,
        label_ids=labels.ids,
        decode=parts.decode,
        provenance={"model": name, "options": {k: _as_json(v) for k, v in asdict(config).items()}},
    )


def _as_json(value: Any) -> Any:
    # As JSON reads it back, so that a card compares equal to itself.
    return list(value) if isinstance(value, tuple) else value


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
