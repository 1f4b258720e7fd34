"""The demo: every step of vitkit on generated data, and a report of what came out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vitkit.cli.show import progress_bar, say, step_bar
from vitkit.evaluate import evaluate, open_network
from vitkit.evaluate.results import to_json
from vitkit.report import write_report
from vitkit.runtimes.files import check_writable, write_text

if TYPE_CHECKING:
    from vitkit.bench import BenchReport
    from vitkit.exporters.parity import Check

ENGINES = (
    ("onnx", "fp32"),
    ("onnx", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
    ("tflite", "fp32"),
    ("tflite", "int8"),
)


class Part(NamedTuple):
    """One model's way through the demo: its folder, recipe, data, and what its accuracy is called."""

    folder: str
    recipe: str
    title: str
    metric: str
    metric_name: str
    val_images: str


PARTS = (
    Part("panoptic", "remax_nano_demo", "Panoptic segmentation", "pq", "PQ", "val"),
    Part("classification", "ps_vit_nano_demo", "Classification", "top1", "top-1, %", "val"),
)


class Made(NamedTuple):
    """One engine of the demo, with what was found about it."""

    path: Path
    target: str
    precision: str
    size_bytes: int
    parity: Check
    accuracy: float


def run_demo(out: Path, *, quick: bool = False) -> Path:
    """Run every step below `out` and return the report's path.

    `quick` uses few images and epochs, and leaves TFLite out, whose converter is slow. Beside report.md
    lies report.html, the page of `vitkit report` on what was measured.

    Raises what the steps raise. A data set or a finished run from an earlier demo is used again.
    """
    seconds: dict[str, float] = {}
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    sections = [section for part in PARTS for section in _run_part(part, out, quick, seconds)]
    write_report([path for part in PARTS for path in _results(out / part.folder)], out / "report.html")
    report = out / "report.md"
    times = [f"- {name}: {value:.0f} s" for name, value in seconds.items()]
    report.write_text("\n".join(["# vitkit demo", "", *sections, "## Time spent", "", *times, ""]), "utf-8")
    return report


def _results(folder: Path) -> list[Path]:
    names = [f"{target}-{precision}-accuracy.json" for target, precision in ENGINES]
    return [folder / "bench.json", *(folder / name for name in names if (folder / name).is_file())]


def _run_part(part: Part, out: Path, quick: bool, seconds: dict[str, float]) -> list[str]:
    place = out / part.folder
    place.mkdir(exist_ok=True)
    with _step(f"{part.folder}: data", seconds):
        data = _data(part, place / "data", quick)
    with _step(f"{part.folder}: training", seconds):
        run = _train(part, data, place / "run", quick)
    with _step(f"{part.folder}: export, calibration, verification", seconds):
        made = _engines(part, run, data, place, quick)
    with _step(f"{part.folder}: benchmark", seconds):
        reports = _bench(made, data / part.val_images, place, quick)
    with _step(f"{part.folder}: pictures", seconds):
        _plot_training(part, run, place / "training.png")
        pictures = (_draw_segments if part.metric == "pq" else _draw_points)(made[0].path, data, place)
    return [*_section(part, run, made, reports), *pictures]


@contextmanager
def _step(name: str, seconds: dict[str, float]) -> Iterator[None]:
    say(f"== {name}")
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _data(part: Part, folder: Path, quick: bool) -> Path:
    from vitkit.data.scenes import write_scenes
    from vitkit.data.shapes import write_shapes

    if not folder.is_dir():
        with progress_bar("drawing") as progress:
            if part.metric == "pq":
                write_scenes(folder, progress=progress, **({"train": 64, "val": 16} if quick else {}))
            else:
                write_shapes(folder, progress=progress, **({"train": 200, "val": 100} if quick else {}))
    return folder


def _train(part: Part, data: Path, run: Path, quick: bool) -> Path:
    from vitkit.runtimes.card import CARD_FILE
    from vitkit.train import has_checkpoint, recipe_named, train

    if (run / CARD_FILE).is_file():
        say(f"{run} is trained already")
        return run
    config = recipe_named(part.recipe)
    if quick:
        config = replace(config, epochs=1)
    return train(config, data, run, resume=has_checkpoint(run), progress=True)


def _engines(part: Part, run_path: Path, data: Path, out: Path, quick: bool) -> list[Made]:
    from vitkit import exporters
    from vitkit.calibration.dataset import calibration_set
    from vitkit.exporters.source import Source
    from vitkit.runs import load_run
    from vitkit.runtimes.image import sample_photos

    run = load_run(run_path)
    source = Source(run.model, run.card)
    calibration = calibration_set(data / "train", 16 if quick else 256)
    photos = sample_photos(data / part.val_images, 32 if quick else 1000)
    made = []
    for target, precision in ENGINES:
        if reason := _left_out(target, precision, quick):
            say(f"{target} {precision}: left out, {reason}")
            continue
        path = out / f"{target}-{precision}"
        say(f"{path.name} ...")
        given = calibration if precision == "int8" else None
        artifact, checks = exporters.export(
            source, path, target=target, precision=precision, calibration=given, photos=photos
        )
        accuracy = _accuracy(part, path, data)
        made.append(Made(path, target, precision, artifact.size_bytes, checks[-1], accuracy))
    return made


def _accuracy(part: Part, path: Path, data: Path) -> float:
    network = open_network(path)
    found = evaluate(network, data if part.metric == "pq" else data / "val")
    body = to_json(path, network.card, found)
    network.close()
    write_text(path.with_name(f"{path.name}-accuracy.json"), json.dumps(body) + "\n")
    return found.value


def _left_out(target: str, precision: str, quick: bool) -> str | None:
    """Why an engine cannot or should not be made here; None where it should."""
    from vitkit.runtimes.openvino import capabilities

    if precision == "bf16" and "BF16" not in capabilities()["CPU"]:
        return "this CPU has no bf16 instructions"
    if target == "tflite" and quick:
        return "its converter is slow"
    if target == "tflite" and find_spec("litert_torch") is None:
        return "its converter is missing: pip install 'vitkit[tflite-export]'"
    return None


def _bench(made: list[Made], images: Path, out: Path, quick: bool) -> list[BenchReport]:
    from vitkit.bench import BenchOptions, bench, save

    options = BenchOptions(duration=0.2 if quick else 3.0, images=images)
    with step_bar() as progress:
        reports = bench([engine.path for engine in made], options, progress=progress)
    save(reports, out / "bench.json")
    return reports


def _draw_points(artifact: Path, data: Path, out: Path) -> list[str]:
    """`points.png`: validation images with the class and the paths of the sampling points."""
    from vitkit.pictures.classification import draw
    from vitkit.pictures.drawing import contact_sheet
    from vitkit.runtimes.engine import open_engine
    from vitkit.runtimes.image import sample_photos

    photos = [photo for _, photo in sample_photos(data / "val", 12)]
    with open_engine(artifact, task="classification") as engine:
        pictures = [
            draw(photo, result, width=320) for photo, result in zip(photos, engine(photos), strict=True)
        ]
    contact_sheet(pictures).save(out / "points.png")
    return [
        "### Where the model looks",
        "",
        "Each arrow is one sampling point, from its place in the regular grid (blue) to where its last",
        "token was read (red).",
        "",
        f"![Sampling points]({out.name}/points.png)",
        "",
    ]


def _draw_segments(artifact: Path, data: Path, out: Path) -> list[str]:
    """`segments.png`: validation images, what the engine finds in them, and the truth."""
    from vitkit.data.coco.read import read_split
    from vitkit.evaluate.panoptic import truth_as_panoptic
    from vitkit.pictures.drawing import contact_sheet
    from vitkit.pictures.panoptic import draw
    from vitkit.runtimes.engine import open_engine
    from vitkit.runtimes.image import read_image

    truth = read_split(data)
    pictures = []
    with open_engine(artifact, task="panoptic") as engine:
        for image in truth.images[:8]:
            photo = read_image(image.file)
            for result in (engine(photo), truth_as_panoptic(image, truth.categories)):
                pictures.append(draw(photo, result, width=240, legend=False))
    contact_sheet(pictures).save(out / "segments.png")
    return [
        "### What the engine sees",
        "",
        "Pairs of pictures: the engine's segments at the left, the truth at the right.",
        "",
        f"![Segments]({out.name}/segments.png)",
        "",
    ]


def _plot_training(part: Part, run: Path, path: Path) -> None:
    from matplotlib.figure import Figure

    log = json.loads((run / "log.json").read_text(encoding="utf-8"))
    figure = Figure(figsize=(7, 3), layout="constrained")
    loss = figure.add_subplot()
    epochs = range(1, len(log) + 1)
    loss.plot(epochs, [row["loss"] for row in log], color="tab:blue")
    loss.set_xlabel("epoch")
    loss.set_ylabel("training loss", color="tab:blue")
    accuracy = loss.twinx()
    accuracy.plot(epochs, [row[part.metric] for row in log], color="tab:orange")
    accuracy.set_ylabel(f"validation {part.metric_name}", color="tab:orange")
    figure.savefig(path, dpi=120)


def _section(part: Part, run: Path, made: list[Made], reports: list[BenchReport]) -> list[str]:
    from vitkit.bench import to_markdown
    from vitkit.runtimes.card import read_card

    card = read_card(run)
    rows = [
        f"| {m.target} | {m.precision} | {m.size_bytes / 1e6:.2f} | {m.accuracy:.2f} | {m.parity} |"
        for m in made
    ]
    return [
        f"## {part.title}",
        "",
        f"`{card.name}`, trained here on generated images: validation {part.metric_name} "
        f"**{card.provenance[part.metric]:.2f}** in torch, float32.",
        "",
        f"![Training]({part.folder}/training.png)",
        "",
        "### Engines against the float model",
        "",
        f"| target | precision | MB | {part.metric_name} | the engine beside the float model |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "### Speed on this machine",
        "",
        to_markdown(reports),
        "",
    ]
