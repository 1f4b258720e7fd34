"""Speed of every engine of a ReMaX against torch eager, and what decoding adds; needs an idle machine.

    python benchmarks/remax.py [--model remax_t] [--calib DIR] [--threads 1 2] [--seconds 20] [--engines ...]

`engine` is the network alone, `image` a frame of 480x640 to its segments: with the exact decode, with the
fast one, and with neither (preparation and engine only). Rows are measured in turns; medians. The network has
random weights and 12 slots that are made confident, because the cost of decoding depends on them.
Cap the instruction set with ONEDNN_MAX_CPU_ISA and DNNL_MAX_CPU_ISA (AVX2, AVX2_VNNI, ...) for OpenVINO.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitkit import exporters
from vitkit.bench.cpu import cpu_info
from vitkit.calibration.dataset import calibration_set
from vitkit.exporters.source import Source
from vitkit.runs import untrained_run
from vitkit.runtimes.engine import Engine, Outputs, open_engine
from vitkit.runtimes.image import generated_photos, prepare_batch

ENGINES = [
    "onnx-fp32",
    "onnx-int8",
    "openvino-fp32",
    "openvino-bf16",
    "openvino-int8",
    "tflite-fp32",
    "tflite-int8",
]
CONFIDENT = 12


def confident(outputs: Outputs, scene: Outputs) -> Outputs:
    """The shapes of real outputs, with masks of 12 ellipses that the first slots are sure of."""
    return {name: scene[name].astype(outputs[name].dtype) for name in outputs}


def ellipses(masks: tuple[int, ...], classes: tuple[int, ...], seed: int = 0) -> Outputs:
    rng = np.random.default_rng(seed)
    height, width = masks[2:]
    y, x = np.mgrid[0:height, 0:width] / height
    logits = rng.normal(-4, 1.0, masks).astype(np.float32)
    for i in range(CONFIDENT):
        centre, radii = rng.uniform(0.1, 0.9, 2), rng.uniform(0.08, 0.3, 2)
        distance = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2
        logits[0, i] += 12 * np.exp(-distance)
    names = np.zeros(classes, np.float32)
    names[..., -1] = 12
    for i in range(CONFIDENT):
        names[0, i, -1], names[0, i, i % (classes[2] - 1)] = 0, 12
    return {"masks": logits, "classes": names}


def timed(rows: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each row, measured in turns with pauses."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for run in rows.values():
        run()
    end = time.perf_counter() + seconds * len(rows)
    while time.perf_counter() < end or len(times[next(iter(rows))]) < 5:
        for name, run in rows.items():
            # The vendors' thread pools spin for a while and would slow the next one.
            time.sleep(0.05)
            run()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(values)) for name, values in times.items()}


def image_rows(engine: Engine, fast: Engine, name: str, photo: np.ndarray) -> dict[str, Callable[[], object]]:
    scene = ellipses(
        *(tuple(d or 1 for d in spec.shape) for spec in engine.card.outputs),  # type: ignore[arg-type]
    )
    key = engine.card.inputs[0].name

    def frame(decoding: Engine | None) -> object:
        outputs = engine.run({key: engine.prepare([photo])})
        return decoding.decode(confident(outputs, scene), [photo]) if decoding else outputs

    return {
        f"{name} | image, no decode": lambda: frame(None),
        f"{name} | image, fast decode": lambda: frame(fast),
        f"{name} | image, exact decode": lambda: frame(engine),
    }


def let_through(module: torch.nn.Module) -> None:
    """Norms start at zero and silence their branch, which TFLite's converter would leave out.

    They let little through: which slot a pixel belongs to must stay clear in a network that learnt nothing.
    """
    for name, parameter in module.named_parameters():
        if name.endswith("weight") and not parameter.any():
            torch.nn.init.uniform_(parameter, 1e-4, 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="remax_t")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--engines", nargs="+", default=ENGINES)
    parser.add_argument("--no-torch", action="store_true")
    given = parser.parse_args()
    run = untrained_run(given.model, {})
    let_through(run.model)
    source = Source(run.model, run.card)
    photo = generated_photos(1, size=(480, 640))[0]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if given.calib is None:
            given.calib = work / "photos"
            given.calib.mkdir()
            for i, picture in enumerate(generated_photos(16, seed=1)):
                Image.fromarray(picture).save(given.calib / f"{i:02}.png")
        calibration = calibration_set(given.calib, 16)
        for row in given.engines:
            target, precision = row.split("-")
            calib = calibration if precision == "int8" else None
            exporters.export(source, work / row, target=target, precision=precision, calibration=calib)
        cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "nothing")
        print(f"{cpu_info()['model']}, capped to {cap}")
        for threads in given.threads:
            measure(given, source, work, threads, photo)


def measure(given: argparse.Namespace, source: Source, work: Path, threads: int, photo: np.ndarray) -> None:
    torch.set_num_threads(threads)
    rows: dict[str, Callable[[], object]] = {}
    if not given.no_torch:
        images = prepare_batch([photo], source.card.image)
        rows["torch eager | engine"] = lambda: source.predict(images)
    opened = []
    for name in given.engines:
        engine = open_engine(work / name, threads=threads)
        fast = open_engine(work / name, threads=threads, decode={"fast": True})
        opened += [engine, fast]
        feeds = {engine.card.inputs[0].name: engine.prepare([photo])}
        rows[f"{name} | engine"] = lambda engine=engine, feeds=feeds: engine.run(feeds)
        rows |= image_rows(engine, fast, name, photo)
    found = timed(rows, given.seconds)
    base = found.get("onnx-fp32 | engine", next(iter(found.values())))
    print(f"\n## {given.model}, batch 1, {threads} threads\n")
    print("| row | scope | ms | speed, onnx-fp32 engine = 1 |")
    print("|---|---|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.1f} | {base / value:.2f} |")
    for engine in opened:
        engine.close()


if __name__ == "__main__":
    main()
