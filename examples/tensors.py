"""Run an engine on raw tensors, without vitkit's preparation and decoding: python tensors.py ARTIFACT"""

import sys

import numpy as np

import vitkit


def main(artifact: str) -> None:
    card = vitkit.read_artifact(artifact).card
    random = np.random.default_rng(0)
    # An open dimension (None) is a free batch size.
    feeds = {
        spec.name: random.integers(0, 256, [size or 1 for size in spec.shape]).astype(spec.dtype)
        for spec in card.inputs
    }
    with vitkit.open_engine(artifact) as engine:
        for name, output in engine.run(feeds).items():
            print(name, output.dtype, output.shape)


if __name__ == "__main__":
    main(*sys.argv[1:])
