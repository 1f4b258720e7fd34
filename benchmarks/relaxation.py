"""Does relaxed training help? ReMaX nano against kMaX nano on generated scenes: same seeds, same budget.

    python benchmarks/relaxation.py SCENES OUT [--seeds 0 1 2] [--epochs 8] [--lr 0.012] [--batch 8]
        [--variants t_remax t_kmax]

Trains what OUT does not hold yet, then prints a table and writes OUT/relaxation.png: PQ over steps, and the
ratio of false-positive to false-negative loss in the last block (thesis chapter 6, figure 1). SCENES is made
by `vitkit data shapes --task panoptic SCENES`. Gradients are never clipped. The `high` pair has 3.3 times the
learning rate and the sigmoid loss; the `t` pair, which must be asked for, is ReMaX-T and kMaX-T on images of
129 pixels.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from vitkit.train import TrainConfig, recipe_named, train

# Name -> model, mask-ID loss, factor of the learning rate, colour.
VARIANTS = {
    "remax_sigmoid": ("remax_nano", "sigmoid", 1.0, "tab:red"),
    "remax_softmax": ("remax_nano", "softmax", 1.0, "tab:orange"),
    "kmax_softmax": ("kmax_nano", "softmax", 1.0, "tab:blue"),
    "kmax_sigmoid": ("kmax_nano", "sigmoid", 1.0, "tab:cyan"),
    "high_remax": ("remax_nano", "sigmoid", 10 / 3, "tab:purple"),
    "high_kmax": ("kmax_nano", "sigmoid", 10 / 3, "tab:gray"),
    "t_remax": ("remax_t", "softmax", 1.0, "tab:green"),
    "t_kmax": ("kmax_t", "softmax", 1.0, "tab:olive"),
}

# Of these one seed is enough.
ONCE = ("kmax_sigmoid", "high_remax", "high_kmax", "t_remax", "t_kmax")


def config_of(name: str, seed: int, given: argparse.Namespace) -> TrainConfig:
    model, mask_id, factor, _ = VARIANTS[name]
    return replace(
        recipe_named("remax_nano_demo"),
        model=model,
        options={"mask_id": mask_id, "image_size": 129},
        epochs=given.epochs,
        batch_size=given.batch,
        lr=given.lr * factor,
        seed=seed,
    )


def logs(given: argparse.Namespace) -> dict[str, list[list[dict[str, float]]]]:
    found: dict[str, list[list[dict[str, float]]]] = {}
    for name in given.variants:
        for seed in given.seeds[:1] if name in ONCE else given.seeds:
            run = given.out / f"{name}_{seed}"
            if not (run / "log.json").is_file():
                print(f"== {run.name}", flush=True)
                train(config_of(name, seed, given), given.scenes, run)
            found.setdefault(name, []).append(json.loads((run / "log.json").read_text()))
    return found


def plot(found: dict[str, list[list[dict[str, float]]]], path: Path, steps_per_epoch: int) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    quality, ratio = figure.subplots(1, 2)
    for name, runs in found.items():
        for i, log in enumerate(runs):
            steps = [row["epoch"] * steps_per_epoch for row in log]
            label = name.replace("_", " ") if i == 0 else None
            style = {"color": VARIANTS[name][3], "label": label, "linewidth": 1.2}
            quality.plot(steps, [row["pq"] for row in log], **style)
            ratio.plot(steps, [row["fp_ratio"] for row in log], **style)
    quality.set_ylabel("PQ on 100 scenes, %")
    ratio.set_ylabel("false-positive over false-negative loss, last block")
    ratio.set_yscale("log")
    for axes in (quality, ratio):
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scenes", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.2e-2)
    parser.add_argument("--batch", type=int, default=8)
    nano = [name for name, variant in VARIANTS.items() if variant[0].endswith("nano")]
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=nano)
    given = parser.parse_args()
    found = logs(given)
    print("| variant | PQ by seed | mean PQ | SQ | RQ | FP/FN first epoch | FP/FN last |")
    print("|---|---|---|---|---|---|---|")
    for name, runs in found.items():
        last = [log[-1] for log in runs]
        cells = [
            ", ".join(f"{row['pq']:.1f}" for row in last),
            *(f"{sum(row[key] for row in last) / len(last):.1f}" for key in ("pq", "sq", "rq")),
            f"{sum(log[0]['fp_ratio'] for log in runs) / len(runs):.1f}",
            f"{sum(row['fp_ratio'] for row in last) / len(last):.2f}",
        ]
        print(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    images = len(list((given.scenes / "train").iterdir()))
    plot(found, given.out / "relaxation.png", -(-images // given.batch))


if __name__ == "__main__":
    main()
