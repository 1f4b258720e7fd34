"""The demo: every step of vitkit on generated data, and a report of what came out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vitkit.cli.show import progress_bar, say
from vitkit.evaluate import Accuracy, evaluate, open_network
from vitkit.runtimes.files import check_writable

if TYPE_CHECKING:
    from vitkit.bench import BenchReport
    from vitkit.exporters.parity import Parity

ENGINES = (
    ("onnx", "fp32"),
    ("onnx", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
RECIPE = "ps_vit_nano_demo"


class Made(NamedTuple):
    """One engine of the demo, with what was found about it."""

    path: Path
    target: str
    precision: str
    size_bytes: int
    parity: Parity
    accuracy: Accuracy


def run_demo(out: Path, *, quick: bool = False) -> Path:
    """Run every step below `out` and return the report's path; `quick` uses few images and epochs.

    Raises what the steps raise. A data set or a finished run from an earlier demo is used again.
    """
    seconds: dict[str, float] = {}
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    with _step("data", seconds):
        data = _data(out / "data", quick)
    with _step("training", seconds):
        run = _train(data, out / "run", quick)
    with _step("export, calibration, verification", seconds):
        made = _engines(run, data, out, quick)
    with _step("benchmark", seconds):
        reports = _bench(made, data, out, quick)
    with _step("pictures and report", seconds):
        _draw(made[0].path, data, out)
        _plot_training(run, out / "training.png")
        report = out / "report.md"
        report.write_text(_report(run, made, reports, seconds), encoding="utf-8")
    return report


@contextmanager
def _step(name: str, seconds: dict[str, float]) -> Iterator[None]:
    say(f"== {name}")
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _data(folder: Path, quick: bool) -> Path:
    from vitkit.data.shapes import write_shapes

    if not folder.is_dir():
        with progress_bar("drawing") as progress:
            sizes = {"train": 200, "val": 100} if quick else {}
            write_shapes(folder, progress=progress, **sizes)
    return folder


def _train(data: Path, run: Path, quick: bool) -> Path:
    from vitkit.runtimes.card import CARD_FILE
    from vitkit.train import has_checkpoint, recipe_named, train

    if (run / CARD_FILE).is_file():
        say(f"{run} is trained already")
        return run
    config = recipe_named(RECIPE)
    if quick:
        config = replace(config, epochs=1)
    return train(config, data, run, resume=has_checkpoint(run), progress=True)


def _engines(run_path: Path, data: Path, out: Path, quick: bool) -> list[Made]:
    from vitkit import exporters
    from vitkit.calibration.dataset import calibration_set
    from vitkit.exporters.source import Source
    from vitkit.runs import load_run
    from vitkit.runtimes.image import sample_photos

    run = load_run(run_path)
    source = Source(run.model, run.card)
    calibration = calibration_set(data / "train", 16 if quick else 256)
    photos = sample_photos(data / "val", 32 if quick else 1000)
    made = []
    for target, precision in ENGINES:
        if precision == "bf16" and not _has_bf16():
            say("openvino bf16: left out, this CPU has no bf16 instructions")
            continue
        path = out / f"{target}-{precision}"
        say(f"{path.name} ...")
        given = calibration if precision == "int8" else None
        artifact, checks = exporters.export(
            source, path, target=target, precision=precision, calibration=given, photos=photos
        )
        network = open_network(path)
        accuracy = evaluate(network, data / "val")
        network.close()
        made.append(Made(path, target, precision, artifact.size_bytes, checks[-1], accuracy))
    return made


def _has_bf16() -> bool:
    from vitkit.runtimes.openvino import capabilities

    return "BF16" in capabilities()["CPU"]


def _bench(made: list[Made], data: Path, out: Path, quick: bool) -> list[BenchReport]:
    from vitkit.bench import bench, save

    with progress_bar("measuring") as progress:
        reports = bench(
            [engine.path for engine in made],
            duration=0.2 if quick else 4.0,
            images=data / "val",
            progress=lambda text, fraction: progress(round(100 * fraction), 100),
        )
    save(reports, out / "bench.json")
    return reports


def _draw(artifact: Path, data: Path, out: Path) -> None:
    """`points.png`: validation images with the class and the paths of the sampling points."""
    from vitkit.draw import contact_sheet, draw_classification
    from vitkit.runtimes.engine import open_engine
    from vitkit.runtimes.image import sample_photos

    photos = [photo for _, photo in sample_photos(data / "val", 12)]
    with open_engine(artifact) as engine:
        pictures = [
            draw_classification(photo, result, width=320)
            for photo, result in zip(photos, engine(photos), strict=True)
        ]
    contact_sheet(pictures).save(out / "points.png")


def _plot_training(run: Path, path: Path) -> None:
    from matplotlib.figure import Figure

    log = json.loads((run / "log.json").read_text(encoding="utf-8"))
    figure = Figure(figsize=(7, 3), layout="constrained")
    loss = figure.add_subplot()
    epochs = range(1, len(log) + 1)
    loss.plot(epochs, [row["loss"] for row in log], color="tab:blue")
    loss.set_xlabel("epoch")
    loss.set_ylabel("training loss", color="tab:blue")
    top1 = loss.twinx()
    top1.plot(epochs, [row["top1"] for row in log], color="tab:orange")
    top1.set_ylabel("validation top-1, %", color="tab:orange")
    figure.savefig(path, dpi=120)


def _report(run: Path, made: list[Made], reports: list[BenchReport], seconds: dict[str, float]) -> str:
    from vitkit.bench import to_markdown
    from vitkit.runtimes.card import read_card

    card = read_card(run)
    rows = [
        f"| {m.target} | {m.precision} | {m.size_bytes / 1e6:.2f} | {m.accuracy.top1:.2f} | "
        f"{m.parity.agreement:.2%} | {m.parity.error:.2g} | {m.parity.others['points']:.3f} |"
        for m in made
    ]
    lines: list[str] = [
        "# vitkit demo",
        "",
        f"`{card.name}`, trained here on generated shapes: validation top-1 "
        f"**{card.provenance['top1']:.2f} %** in torch, float32.",
        "",
        "![Training](training.png)",
        "",
        "## Engines against the float model",
        "",
        "| target | precision | MB | top-1, % | same top-1 as float | logits error | points off by, px |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "The logits error is root mean square over the spread of the float logits.",
        "",
        "## Speed on this machine",
        "",
        to_markdown(reports),
        "",
        "## Where the model looks",
        "",
        "Each arrow is one sampling point, from its place in the regular grid (blue) to where its last",
        "token was read (red).",
        "",
        "![Sampling points](points.png)",
        "",
        "## Time spent",
        "",
        *[f"- {name}: {value:.0f} s" for name, value in seconds.items()],
        "",
    ]
    return "\n".join(lines)
