"""PS-ViT from scratch on CIFAR-10, with TransMix and with plain CutMix labels.

    python benchmarks/cifar10.py CIFAR OUT [--recipe psvit_nano_cifar10] [--epochs N] [--seeds 0]

CIFAR holds train/CLASS and val/CLASS: the 50,000 training and the 10,000 test images. Trains what OUT does
not hold yet (what was stopped goes on), then prints a table of top-1 after each quarter of the training.
`--recipe psvit_ti_share_cifar10` is for a GPU.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from vitkit.train import has_checkpoint, recipe_named, train


def log_of(given: argparse.Namespace, transmix: bool, seed: int) -> list[dict[str, float]]:
    out: Path = given.out / f"{given.recipe}_{'transmix' if transmix else 'cutmix'}_{seed}"
    if not (out / "log.json").is_file():
        config = replace(recipe_named(given.recipe), transmix=transmix, seed=seed)
        config = replace(config, epochs=given.epochs or config.epochs)
        print(f"== {out.name}", flush=True)
        train(config, given.data, out, resume=has_checkpoint(out))
    log: list[dict[str, float]] = json.loads((out / "log.json").read_text())
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", default="psvit_nano_cifar10")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    logs = {
        (seed, transmix): log_of(given, transmix, seed) for seed in given.seeds for transmix in (True, False)
    }
    print("| labels | seed | top-1 after a quarter, half, three quarters, all | minutes | images/s |")
    print("|---|---|---|---|---|")
    for (seed, transmix), log in logs.items():
        quarters = [log[max(len(log) * part // 4, 1) - 1]["top1"] for part in (1, 2, 3, 4)]
        seconds = sum(row["seconds"] for row in log)
        speed = sum(row["images_per_second"] * row["seconds"] for row in log) / seconds
        top1 = ", ".join(f"{value:.2f}" for value in quarters)
        print(
            f"| {'TransMix' if transmix else 'CutMix'} | {seed} | {top1} | {seconds / 60:.1f} | {speed:.0f} |"
        )


if __name__ == "__main__":
    main()
