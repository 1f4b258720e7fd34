"""The mask-wise merge of panoptic models: time, memory, and what the fast mode changes.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/decode.py [images]

Masks are made from annotated images if the machine has them, else from drawn ellipses: 12 or 33 confident
slots of 128 for a 641 x 641 input. Soft masks have a mean probability of about 0.7. Only the first ten images
are timed.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from vitkit.runtimes.panoptic import Panoptic, merge_masks

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "runtimes")]
from test_panoptic import (  # noqa: E402
    COCO,
    FIRM,
    SOFT,
    coco_regions,
    cut,
    ellipses,
    like_network,
    matched,
    published_merge,
)

SIDE, THINGS = 641, np.arange(133) < 80
# The image's size over that of its part of the input; None: its own size.
SIZES = {"own size": None, "scale 1": 1.0, "scale 2": 2.0, "scale 0.5": 0.5}
SLOTS = (12, 33)
TIMED, RUNS = 10, 15


def inputs(
    number: int,
    scale: float | None = None,
    *,
    drawn: bool = False,
    slots: int = 12,
    peak: tuple[float, float] = FIRM,
) -> dict[str, Any]:
    """Keyword arguments of the merge for one image."""
    make = coco_regions if COCO.is_dir() and not drawn else ellipses
    regions, content, photo = make(number, SIDE, slots)
    logits, masks = like_network(cut(regions, slots), number, peak=peak)
    size = photo if scale is None else tuple(round(n * scale) for n in content)
    sizes = {"input_size": (SIDE, SIDE), "content": content, "photo_size": size}
    return {"class_logits": logits, "mask_logits": masks, "things": THINGS, **sizes}


def milliseconds(call: Callable[[], object], runs: int) -> list[float]:
    """Processor time of each run, which on one thread is the time that it takes on an idle machine."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
    return times


def peak(call: Callable[[], object]) -> float:
    """MiB that a call needs at most beyond what is there."""
    tracemalloc.start()
    call()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 2**20


def changed(result: Panoptic, ids: np.ndarray) -> float:
    """Per cent of pixels in another segment."""
    return 100 * float((matched(result.ids, ids)[result.ids] != ids).mean())


def report(name: str, cases: list[dict[str, Any]]) -> None:
    exact = [merge_masks(**case) for case in cases]
    line = [f"{name}: {median(len(result.segments) for result in exact):g} segments;"]
    for mode, fast in (("exact", False), ("fast", True)):
        calls = [partial(merge_masks, **case, fast=fast) for case in cases[:TIMED]]
        times = [ms for call in calls for ms in milliseconds(call, RUNS)]
        memory = max(peak(call) for call in calls)
        line.append(f"{mode} {median(times):.1f} ms, {memory:.0f} MiB;")
    shares = [
        changed(merge_masks(**case, fast=True), result.ids) for case, result in zip(cases, exact, strict=True)
    ]
    print(*line, f"fast changes {mean(shares):.3f} % of pixels, at most {max(shares):.3f} %", flush=True)


def published(case: dict[str, Any]) -> None:
    ids, segments, _ = published_merge(**case)
    result = merge_masks(**case)
    same = (
        f"{changed(result, ids):.4f} % of pixels differ, {len(result.segments)} of {len(segments)} segments"
    )
    time_ms = milliseconds(lambda: published_merge(**case), 1)[0]
    print(f"published steps in float64: {time_ms:.0f} ms; exact: {same}")


def noise(case: dict[str, Any], spread: float) -> dict[str, Any]:
    """The same image from a network that learned nothing but its classes."""
    rng = np.random.default_rng(0)
    return {**case, "mask_logits": rng.normal(0, spread, case["mask_logits"].shape).astype(np.float32)}


def main(images: int) -> None:
    print(f"{images} {'annotated images' if COCO.is_dir() else 'drawings'}, numpy {np.__version__}")
    for slots in SLOTS:
        for kind, peak in (("firm", FIRM), ("soft", SOFT)):
            report(f"{slots} {kind} slots", [inputs(i, slots=slots, peak=peak) for i in range(images)])
            # Ellipses fill the whole input, which other images seldom do.
            drawn = [inputs(i, drawn=True, slots=slots, peak=peak) for i in range(min(images, TIMED))]
            report(f"{slots} {kind} slots, drawn, 641 x 641", drawn)
    for name, scale in SIZES.items():
        report(name, [inputs(i, scale) for i in range(min(images, TIMED))])
    for spread in (1.0, 50.0):
        report(f"noise of {spread:g}, 641 x 641", [noise(inputs(0, drawn=True), spread)])
    published(inputs(0, drawn=True))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
