"""Can ReMaX learn 20 real images by heart? Trains on the first images of a COCO panoptic set, prints PQ.

    python benchmarks/overfit.py DIR [--images 20] [--model remax_t] [--size 257] [--epochs 200] [-o RUN]

What is measured is the training path on real annotations, not generalisation.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from vitkit.data.panoptic import Sample, read_ids, read_split, write_panoptic_set
from vitkit.train import TrainConfig, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--model", default="remax_t")
    parser.add_argument("--size", type=int, default=257)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--backbone")
    parser.add_argument("--out", "-o", type=Path, default=Path("overfit"))
    given = parser.parse_args()
    full = read_split(given.data)
    samples = (
        Sample(image.image_id, image.file.name, image.file, read_ids(image.mask), image.segments)
        for image in full.images[: given.images]
    )
    config = TrainConfig(
        model=given.model,
        options={"image_size": given.size, "drop_path": 0.0},
        epochs=given.epochs,
        batch_size=given.batch,
        lr=given.lr,
        weight_decay=0.0,
        warmup_epochs=3,
        clip_norm=float("inf"),
        jitter=0.05,
        scale_min=0.95,
        scale_max=1.05,
    )
    with tempfile.TemporaryDirectory() as work:
        data = write_panoptic_set(Path(work) / "data", full.categories, {"train": samples})
        train(config, data, given.out, backbone=given.backbone)


if __name__ == "__main__":
    main()
