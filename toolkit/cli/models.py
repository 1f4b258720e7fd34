"""`vitkit models`: the registered models."""

from __future__ import annotations

from typing import Any

from vitkit.cli.arguments import JsonFlag
from vitkit.cli.show import print_json, print_table


def models(json: JsonFlag = False) -> None:
    """List the registered models: task, input, parameters, multiply-adds, the paper's accuracy.

    Parameters are the trainable ones of the network that is deployed; MACs are those of convolutions,
    linear layers and matrix products, for one image. Top-1 is on ImageNet, PQ on COCO.
    """
    import vitkit.calibration.openmp  # noqa: F401  (before torch)

    # isort: split
    import torch

    from vitkit.models import MODELS, build, count_macs, count_parameters
    from vitkit.runtimes.tasks import task_module

    metrics = {info.task: task_module(info.task, "metric") for info in MODELS.values()}
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
                **{m.METRIC: info.reported if task == info.task else None for task, m in metrics.items()},
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
            _accuracy(row, metrics[row["task"]]),
        )
        for row in rows
    ]
    print_table(("model", "task", "input", "parameters", "MACs", "published, %"), table)


def _accuracy(row: dict[str, Any], metric: Any) -> str:
    reported = row[metric.METRIC]
    return "-" if reported is None else f"{metric.UNIT} {reported:.1f}"
