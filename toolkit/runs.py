"""Runs: the folder that a training run or an import leaves, safetensors and JSON only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vitkit.calibration.openmp  # noqa: F401  (before torch)
from vitkit.runtimes.card import ModelCard, check_files, read_card, sha256, write_card
from vitkit.runtimes.errors import BadArtifact, BadRequest
from vitkit.runtimes.files import atomic_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vitkit.exporters.foreign import ForeignModule
    from vitkit.models import Model

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Run:
    """A float model with its card; `path` is None for a model that was never saved."""

    model: Model | ForeignModule
    card: ModelCard
    path: Path | None = None


def write_run_files(
    folder: Path, state: Mapping[str, Tensor], card: ModelCard, config: Mapping[str, Any]
) -> None:
    """Write weights, config and card into an existing folder."""
    from safetensors.torch import save

    # Not save_file, which makes the file readable by its owner alone.
    (folder / WEIGHTS_FILE).write_bytes(save({name: tensor.contiguous() for name, tensor in state.items()}))
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    files = {name: sha256(folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE)}
    write_card(replace(card, files=files), folder)


def save_run(out: Path, model: nn.Module, card: ModelCard, config: Mapping[str, Any]) -> Path:
    """Write a run folder, whole or not at all. Raises BadRequest where `out` holds other files."""
    with atomic_folder(out) as folder:
        write_run_files(folder, model.state_dict(), card, config)
    return out


def load_run(path: Path) -> Run:
    """Read a run folder back: the model in eval mode with its weights.

    Raises BadArtifact where the folder is no run, is damaged, or does not fit its model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from vitkit.models import build, run_card

    card = read_card(path)
    if card.target != "torch":
        raise BadArtifact(
            f"{path} is an artifact for {card.target!r}; name the training run it was made from"
        )
    if WEIGHTS_FILE not in card.files:
        raise BadArtifact(f"{path}: the card does not list {WEIGHTS_FILE}")
    weights = check_files(path, card, keep=[WEIGHTS_FILE])[WEIGHTS_FILE]
    try:
        if "source" in card.provenance:
            return Run(_foreign(card, load(weights)), card, path)
        model = build(card.provenance["model"], **card.provenance["options"])
        model.load_state_dict(load(weights))
    except (KeyError, TypeError, ValueError, ArithmeticError, OSError, RuntimeError) as error:
        raise BadArtifact(f"{path} does not hold a whole run: {str(error)[:300]}") from None
    except (SafetensorError, BadRequest) as error:
        raise BadArtifact(f"{path} does not hold a whole run: {error}") from None
    own = run_card(card.name, model.config)
    if _described(card) != _described(own):
        raise BadArtifact(f"{path}: the card does not describe the model that it names")
    return Run(model.eval(), card, path)


def _foreign(card: ModelCard, weights: Mapping[str, Tensor]) -> ForeignModule:
    """The network of timm that a run was imported from."""
    from vitkit.exporters.foreign import ForeignModule
    from vitkit.models.timm_network import create_timm

    source = card.provenance["source"]
    network = create_timm(source["timm"], card.image.size, pretrained=False, classes=source["classes"])
    network.load_state_dict(weights)
    return ForeignModule(network.eval(), [spec.name for spec in card.outputs])


def _described(card: ModelCard) -> tuple[Any, ...]:
    """What of a run's card its model alone decides."""
    outputs = {name: value for name, value in card.decode.items() if isinstance(value, str)}
    return card.inputs, card.outputs, card.image.layout, card.image.dtype, card.image.fit, outputs


def untrained_run(name: str, options: Mapping[str, Any], seed: int = 0) -> Run:
    """A registered model with random weights, the same for the same seed; for trying out an export."""
    import torch

    from vitkit.models import build, configure, run_card

    config = configure(name, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(name, **options)
    card = run_card(name, config)
    provenance = {**card.provenance, "weights": f"untrained, seed {seed}"}
    return Run(model.eval(), replace(card, provenance=provenance))
