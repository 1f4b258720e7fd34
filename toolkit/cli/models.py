"""`vitkit models`: the registered models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitkit.cli.arguments import JsonFlag
from vitkit.cli.show import print_json, print_table

if TYPE_CHECKING:
    pass


_ACCURACY = {"top-1": "top1", "PQ": "pq"}


def models(json: JsonFlag = False) -> None:
    """List the registered models: task, input, parameters, multiply-adds, the paper's accuracy.

    Parameters are the trainable ones of the network that is deployed; MACs are those of convolutions,
    linear layers and matrix products, for one image. Top-1 is on ImageNet, PQ on COCO.
    """
    import torch

    from vitkit.models import MODELS, build, count_macs, count_parameters

    rows: list[dict[str, Any]] = []
    for name, info in MODELS.items():
        with torch.device("meta"):
            model = build(name)
        side = info.config.image_size
        rows.append(
            {
                "name": name,
                "task": info.task,
                "input": [3, side, side],
                "params": count_parameters(model),
                "macs": count_macs(model),
                "top1": info.reported if info.task == "classification" else None,
                "pq": info.reported if info.task == "panoptic" else None,
                "source": info.source,
            }
        )
    if json:
        print_json(rows)
        return
    table = [
        (
            row["name"],
            row["task"],
            "x".join(map(str, row["input"][1:])),
            f"{row['params']:,}",
            f"{row['macs'] / 1e9:.3f} G",
            next((f"{name} {row[key]:.1f}" for name, key in _ACCURACY.items() if row[key]), "-"),
        )
        for row in rows
    ]
    print_table(("model", "task", "input", "parameters", "MACs", "published, %"), table)
