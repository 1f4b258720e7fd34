"""Paint the segments of a panoptic engine over an image: python overlay.py ARTIFACT IMAGE OUT.png"""

import sys

import numpy as np
from PIL import Image

import vitkit


def main(artifact: str, image: str, out: str) -> None:
    frame = np.asarray(Image.open(image).convert("RGB"))
    with vitkit.open_engine(artifact, task="panoptic", decode={"fast": True}) as engine:
        result = engine(frame)
    colours = np.random.default_rng(0).integers(0, 256, (len(result.segments) + 1, 3))
    overlay = frame.copy()
    for colour, segment in zip(colours, result.segments, strict=False):
        inside = result.ids == segment.id
        overlay[inside] = (frame[inside] + colour) // 2
        print(f"{segment.label}: {segment.area} pixels, score {segment.score:.2f}")
    Image.fromarray(overlay).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
