"""Can ReMaX learn 20 real images by heart? Trains on the first images of a COCO panoptic set, prints PQ.

    python benchmarks/overfit.py DIR [--images 20] [--size 257] [--repeats 10] [--epochs 24] [-o RUN]

What is measured is the training path on real annotations, not generalisation: PQ of the same 20 images, at
their own size. The network is a nano grown to 133 classes, from scratch.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from vitkit.data.coco import PanopticImage
from vitkit.data.coco.ids import read_ids
from vitkit.data.coco.read import read_split
from vitkit.data.coco.write import NewImage, write_panoptic_set
from vitkit.train import TrainConfig, train

OPTIONS = {
    "backbone": "mobilenetv3_small_100", "queries": 64, "query_width": 128, "mask_width": 64,
    "pixel_widths": (128, 128, 64, 32), "ffn_width": 512, "aspp_width": 64,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--model", default="remax_nano")
    parser.add_argument("--size", type=int, default=257)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--out", "-o", type=Path, default=Path("overfit"))
    given = parser.parse_args()
    full = read_split(given.data)
    chosen = full.images[: given.images]
    # Every image many times: an epoch ends with a measurement, which takes as long as training on them.
    splits = {"train": copies(chosen, given.repeats), "val": copies(chosen, 1)}
    config = TrainConfig(
        model=given.model,
        options={**OPTIONS, "image_size": given.size},
        epochs=given.epochs,
        batch_size=given.batch,
        lr=given.lr,
        weight_decay=0.0,
        warmup_epochs=1,
        clip_norm=float("inf"),
        flip=0.0,
        jitter=0.0,
        scale_min=1.0,
        scale_max=1.0,
        samples=512,
    )
    with tempfile.TemporaryDirectory() as work:
        data = write_panoptic_set(Path(work) / "data", full.categories, splits)
        train(config, data, given.out)


def copies(images: Sequence[PanopticImage], count: int) -> Iterator[NewImage]:
    for copy in range(count):
        for i, image in enumerate(images):
            name = f"{copy:03}_{image.file.name}"
            number = copy * len(images) + i
            yield NewImage(number, name, image.file, read_ids(image.mask), image.segments)


if __name__ == "__main__":
    main()
