"""A torch module of any origin as a source of exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import vitkit.calibration.openmp  # noqa: F401  (before torch)
from vitkit.exporters.source import Source
from vitkit.runtimes.image import generated_photos, prepare_batch
from vitkit.sources.card_values import CardValues, build_card

if TYPE_CHECKING:
    from torch import nn


def wrap_network(
    network: nn.Module,
    name: str,
    values: CardValues,
    origin: Mapping[str, Any],
    keep_float: Sequence[str] = (),
    batch: int | None = None,
) -> Source:
    """A checked network in eval mode with the card that `values` make.

    `origin` goes into the card's provenance. `keep_float` are glob patterns over its module paths. `batch` is
    1 for a network that takes one image at a time. Raises BadRequest for a network that cannot be exported
    (see `vitkit.exporters.foreign.check_network`) and for a card that lacks something.
    """
    image, _ = values.image()
    import torch

    from vitkit.exporters.foreign import ForeignModule, check_network

    inputs = torch.from_numpy(prepare_batch(generated_photos(2), image))
    outputs = check_network(network, inputs, values.outputs, batch)
    card = build_card(name, values, outputs, {"source": dict(origin)})
    module = ForeignModule(network, [spec.name for spec in outputs], keep_float, batch)
    return Source(module, card)
