"""The demo: every step of vitkit on generated data, and a report of what came out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import vitkit.calibration.openmp  # noqa: F401  (before torch)
from vitkit.demo.plan import Plan
from vitkit.demo.training import Training, is_trained, train_side_by_side
from vitkit.evaluate import evaluate, open_network
from vitkit.evaluate.results import to_json
from vitkit.report import write_report
from vitkit.runtimes.errors import ExportFailed
from vitkit.runtimes.files import check_writable, write_text

if TYPE_CHECKING:
    from vitkit.bench import BenchReport
    from vitkit.exporters.parity import ParityCheck

_log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


class Part(NamedTuple):
    """One model's way through the demo: its folder, recipe, data, and what its accuracy is called."""

    folder: str
    recipe: str
    title: str
    metric: str
    metric_name: str
    val_images: str


PANOPTIC = Part("panoptic", "remax_nano_demo", "Panoptic segmentation", "pq", "PQ", "val")
CLASSIFICATION = Part("classification", "ps_vit_nano_demo", "Classification", "top1", "top-1, %", "val")


class Work(NamedTuple):
    """How much is done for one part, and the seconds of each of its steps on two idle cores.

    `settings` are those of the training that differ from the part's recipe.
    """

    train: int
    val: int
    settings: dict[str, Any]
    data_s: float
    training_s: float
    export_s: float
    bench_s: float


class Size(NamedTuple):
    """One size of the demo: its engines, calibration images, images to compare, seconds of each benchmark."""

    engines: tuple[tuple[str, str], ...]
    calibration: int
    compared: int
    bench_s: float
    work: dict[Part, Work]


_DATA, _TRAINING = "drawing images", "training both models"
_EXPORT, _BENCH = "export and verification", "benchmark"
_ONNX = (("onnx", "fp32"), ("onnx", "int8"))
_OPENVINO = (("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8"))
_TFLITE = (("tflite", "fp32"), ("tflite", "int8"))
# With little time, small steps teach more, and images that vary less.
_SHORT = {"crop_min": 0.9, "batch_size": 16}
SIZES = {
    "quick": Size(
        (*_ONNX, *_OPENVINO),
        calibration=16,
        compared=32,
        bench_s=0.2,
        work={
            PANOPTIC: Work(64, 16, {"epochs": 1}, data_s=2, training_s=15, export_s=50, bench_s=8),
            CLASSIFICATION: Work(200, 100, {"epochs": 1}, data_s=1, training_s=15, export_s=30, bench_s=8),
        },
    ),
    "normal": Size(
        (*_ONNX, *_OPENVINO),
        calibration=128,
        compared=100,
        bench_s=0.7,
        work={
            PANOPTIC: Work(
                500,
                50,
                {"epochs": 3, "batch_size": 4},
                data_s=8,
                training_s=140,
                export_s=60,
                bench_s=15,
            ),
            CLASSIFICATION: Work(
                3000,
                400,
                {**_SHORT, "epochs": 5},
                data_s=5,
                training_s=140,
                export_s=40,
                bench_s=15,
            ),
        },
    ),
    "full": Size(
        (*_ONNX, *_OPENVINO, *_TFLITE),
        calibration=256,
        compared=1000,
        bench_s=3.0,
        work={
            PANOPTIC: Work(1000, 100, {}, data_s=15, training_s=800, export_s=150, bench_s=40),
            CLASSIFICATION: Work(4000, 1000, {}, data_s=8, training_s=550, export_s=90, bench_s=40),
        },
    ),
}


class Made(NamedTuple):
    """One engine of the demo, with what was found about it."""

    path: Path
    target: str
    precision: str
    size_bytes: int
    parity: ParityCheck
    accuracy: float


def run_demo(
    out: Path, *, size: str = "normal", changed: Callable[[Plan], object] = lambda plan: None
) -> Path:
    """Run every step below `out` and return the path of its report.md.

    `size` is one of `SIZES`. `changed` is called with the plan whenever it advances. Beside report.md is
    report.html, the page of `vitkit report` on what was measured.

    Raises what the steps raise. A data set or a finished run that an earlier demo of the same size left in
    `out` is used again.
    """
    chosen = SIZES[size]
    check_writable(out)
    for part in chosen.work:
        (out / part.folder).mkdir(parents=True, exist_ok=True)
    plan = Plan(_expected(out, chosen), changed)
    with plan.step(_DATA) as progress:
        _draw_data(out, chosen, progress)
    with plan.step(_TRAINING) as progress:
        train_side_by_side(_trainings(out, chosen), progress)
    sections = [section for part in chosen.work for section in _run_part(part, out, chosen, plan)]
    results = [path for part in chosen.work for path in _results(out / part.folder, chosen)]
    write_report(results, out / "report.html")
    report = out / "report.md"
    times = [f"- {name}: {value:.0f} s" for name, value in plan.seconds.items()]
    write_text(report, "\n".join(["# vitkit demo", "", *sections, "## Time spent", "", *times, ""]))
    return report


def _expected(out: Path, size: Size) -> dict[str, float]:
    """Seconds of every step; none for what an earlier demo left."""
    work = size.work.items()
    expected = {
        _DATA: sum(w.data_s for part, w in work if not (out / part.folder / "data").is_dir()),
        _TRAINING: max((w.training_s for part, w in work if not is_trained(out / part.folder)), default=0.0),
    }
    for part, w in work:
        expected[f"{part.folder}: {_EXPORT}"] = w.export_s
        expected[f"{part.folder}: {_BENCH}"] = w.bench_s
    return expected


def _results(folder: Path, size: Size) -> list[Path]:
    names = [f"{target}-{precision}-accuracy.json" for target, precision in size.engines]
    return [folder / "bench.json", *(folder / name for name in names if (folder / name).is_file())]


def _trainings(out: Path, size: Size) -> list[Training]:
    return [Training(out / part.folder, part.recipe, work.settings) for part, work in size.work.items()]


def _draw_data(out: Path, size: Size, progress: Progress) -> None:
    from vitkit.data.scenes import write_scenes
    from vitkit.data.shapes import write_shapes

    total = sum(work.train + work.val for work in size.work.values())
    before = 0

    def drawn(done: int, _: int) -> None:
        progress(before + done, total)

    for part, work in size.work.items():
        folder = out / part.folder / "data"
        if not folder.is_dir():
            write = write_scenes if part is PANOPTIC else write_shapes
            write(folder, train=work.train, val=work.val, progress=drawn)
        before += work.train + work.val


def _run_part(part: Part, out: Path, size: Size, plan: Plan) -> list[str]:
    place = out / part.folder
    data, run = place / "data", place / "run"
    with plan.step(f"{part.folder}: {_EXPORT}") as progress:
        made = _engines(part, run, data, place, size, progress)
    with plan.step(f"{part.folder}: {_BENCH}") as progress:
        reports = _bench(made, data / part.val_images, place, size, progress)
        _plot_training(part, run, place / "training.png")
        pictures = (_draw_segments if part is PANOPTIC else _draw_points)(made[0].path, data, place)
    return [*_section(part, run, made, reports), *pictures]


def _engines(part: Part, run_path: Path, data: Path, out: Path, size: Size, progress: Progress) -> list[Made]:
    from vitkit import exporters
    from vitkit.calibration.dataset import calibration_set
    from vitkit.exporters.source import Source
    from vitkit.runs import load_run
    from vitkit.runtimes.image import sample_photos

    run = load_run(run_path)
    trained = run.card.provenance[part.metric]
    _log.info("%s: %s %.1f on the validation images", run_path, part.metric_name, trained)
    source = Source(run.model, run.card)
    calibration = calibration_set(data / "train", size.calibration)
    images = sample_photos(data / part.val_images, size.compared)
    made = []
    for number, (target, precision) in enumerate(size.engines):
        progress(number, len(size.engines))
        if reason := _left_out(target, precision):
            _log.info("%s %s: left out, %s", target, precision, reason)
            continue
        path = out / f"{target}-{precision}"
        given = calibration if precision == "int8" else None
        try:
            artifact, checks = exporters.export(
                source,
                path,
                target=target,
                precision=precision,
                calibration=given,
                # On other images than its own the network is sure of nothing.
                golden=[image for _, image in images],
                images=images,
            )
        except ExportFailed as error:
            # INT8 of a shortly trained model may lose too much; its float engine may not.
            if precision != "int8":
                raise
            _log.warning("%s is left out: %s", path.name, error)
            continue
        measured = _accuracy(part, path, data)
        _log.info("%s: %.2f MB, %s %.1f", path, artifact.size_bytes / 1e6, part.metric_name, measured)
        made.append(Made(path, target, precision, artifact.size_bytes, checks[-1], measured))
    return made


def _accuracy(part: Part, path: Path, data: Path) -> float:
    network = open_network(path)
    found = evaluate(network, data if part is PANOPTIC else data / "val")
    body = to_json(path, network.card, found)
    network.close()
    write_text(path.with_name(f"{path.name}-accuracy.json"), json.dumps(body) + "\n")
    return found.value


def _left_out(target: str, precision: str) -> str | None:
    """Why an engine cannot be made here; None if it can."""
    from vitkit.runtimes.openvino import capabilities

    if precision == "bf16" and "BF16" not in capabilities()["CPU"]:
        return "this CPU has no bf16 instructions"
    if target == "tflite" and find_spec("litert_torch") is None:
        return "its converter is missing: pip install 'vitkit[tflite-export]'"
    return None


def _bench(
    made: Sequence[Made], images: Path, out: Path, size: Size, progress: Progress
) -> list[BenchReport]:
    from vitkit.bench import BenchOptions, bench, save

    reports = bench(
        [engine.path for engine in made],
        BenchOptions(duration=size.bench_s, images=images),
        progress=lambda text, fraction: progress(round(100 * fraction), 100),
    )
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
