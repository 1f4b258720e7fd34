"""Training and inference throughput of vitkit's models beside DeiT and ResNet-50, and where a step goes.

    python benchmarks/train.py [--device auto] [--precision fp32] [--batch N] [--panoptic-batch N] [--size N]
                               [--threads N] [--workers N] [--rounds 3] [--models ...] [--json FILE]

What is timed is the product's own step: `Trainer` with the ImageNet recipe of PS-ViT-Ti, or the COCO recipe
of ReMaX-T, on generated images that loader workers decode and augment. Networks of timm take PS-ViT's place
in the same trainer. Models are measured in turns; each turn begins with a fresh loader and steps that do not
count. A step is made of `data` (waiting for the loader), `forward` (mixing, network, losses, matching),
`backward` and `optimiser` (finite check, AdamW, moving average, reading the losses). On a GPU the times are
those of its own time line, by events. Inference is of one batch that lies on the device, without autograd;
panoptic networks take one image. Batches are 128 and 16 on a GPU, 4 and 2 on a CPU; ReMaX takes images of 641
pixels there, 257 here.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from vitkit.bench.cpu import cpu_info, load_average
from vitkit.data.scenes import write_scenes
from vitkit.data.shapes import write_shapes
from vitkit.models import MODELS, build, model_info
from vitkit.torchvision_shim import timm
from vitkit.train import TrainConfig, panoptic, panoptic_loss, recipe_named
from vitkit.train.classification import ClassificationTraining
from vitkit.train.loop import Trainer, _accelerator
from vitkit.train.task import Batch

REFERENCE = "ps_vit_b_14"
# Images per second of thesis chapter 3, table 9: inference on a V100, batch 128. Its Ti does not share
# weights, which changes no computation.
THESIS = {
    "deit_small_patch16_224": 1018.2,
    "deit_base_patch16_224": 316.1,
    "ps_vit_ti_14_share": 1955.3,
    REFERENCE: 765.6,
}
CHOSEN = [
    "ps_vit_ti_14_share", REFERENCE, "deit_small_patch16_224", "deit_base_patch16_224", "resnet50",
    "remax_t", "remax_s",
]  # fmt: skip
PARTS = ("data", "forward", "backward", "optimiser")
# The share of a step that matching may take.
BAR = 0.05
POOL = 64
NEVER = 1e9


class Clock:
    """Seconds between moments on the device's own time line, and of wrapped functions.

    A moment is recorded without waiting for the device; `between` may be called once it is synchronised.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start

    def synchronise(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = function(*args, **kwargs)
            self.spans.append((name, start, self.now()))
            return result

        return run


class TimedTrainer(Trainer):
    """The product's trainer, on images drawn from the pool, that notes how long each step's parts take."""

    def __init__(self, clock: Clock, steps: int, *args: Any) -> None:
        self.clock, self.per_turn = clock, steps
        super().__init__(*args)
        self.task.losses = clock.timed("forward", self.task.losses)  # type: ignore[method-assign]

    def _plan(self, epoch: int) -> list[list[int]]:
        drawn = np.random.default_rng([self.config.seed, epoch])
        return drawn.integers(len(self.task.files), size=(self.per_turn, self.config.batch_size)).tolist()

    def turn(self, number: int) -> tuple[list[dict[str, float]], float]:
        """`per_turn` steps from a fresh loader: seconds of the parts of each, and of all together."""
        self.module.train()
        rows, begun = [], time.perf_counter()
        ended = begun
        for step, batch in enumerate(self._batches(number, 0)):
            self.state.step = step
            self._set_rate(number * self.per_turn + step)
            waited = time.perf_counter() - ended
            rows.append({"data": waited, **self._timed_step(number, batch)})
            ended = time.perf_counter()
        return rows, ended - begun

    def _timed_step(self, number: int, batch: Batch) -> dict[str, float]:
        self.clock.spans.clear()
        start = self.clock.now()
        self._step(number, [batch])
        end = self.clock.now()
        self.clock.synchronise()
        row = dict.fromkeys(("forward", "backward", "matching", "assignment", "matchings"), 0.0)
        for name, first, last in self.clock.spans:
            row[name] += self.clock.between(first, last)
            row["matchings"] += name == "matching"
        return {**row, "optimiser": self.clock.between(start, end) - row["forward"] - row["backward"]}


@dataclass
class Measured:
    """A model's raw seconds: the parts of each step of each turn, all of each turn, and each inference.

    `warmup` steps of a turn do not count.
    """

    name: str
    batch: int
    inference_batch: int
    warmup: int
    trainer: TimedTrainer
    turns: list[list[dict[str, float]]] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)
    inference: list[list[float]] = field(default_factory=list)

    @property
    def steps(self) -> list[list[dict[str, float]]]:
        """What counts of each turn."""
        return [turn[self.warmup :] for turn in self.turns]

    def training_rates(self) -> list[float]:
        """Images per second of each turn."""
        return [self.batch / median(total(row) for row in turn) for turn in self.steps]

    def inference_rates(self) -> list[float]:
        """Images per second of each turn."""
        return [self.inference_batch / median(turn) for turn in self.inference]

    def share(self, part: str) -> float:
        """The part of all steps' time that one part took, 0..1."""
        rows = [row for turn in self.steps for row in turn]
        return sum(row[part] for row in rows) / sum(map(total, rows))


def total(row: dict[str, float]) -> float:
    return sum(row[part] for part in PARTS)


def is_panoptic(name: str) -> bool:
    return name in MODELS and model_info(name).task == "panoptic"


def config_of(name: str, given: argparse.Namespace) -> TrainConfig:
    """The recipe with this run's sizes; a network of timm stands where its PS-ViT would."""
    changes = {
        "precision": given.precision, "device": given.device, "workers": given.workers,
        # Images are decoded each time, as those of a set are that memory cannot hold.
        "cache_mb": 0, "save_minutes": NEVER, "epochs": given.rounds,
    }  # fmt: skip
    if is_panoptic(name):
        config = recipe_named("remax_t_coco")
        options = {**config.options, "image_size": given.size}
        return replace(config, model=name, options=options, batch_size=given.panoptic_batch, **changes)
    config = recipe_named("psvit_ti_share_imagenet")
    return replace(config, model=name if name in MODELS else config.model, batch_size=given.batch, **changes)


def network_of(name: str, config: TrainConfig, options: dict[str, Any]) -> torch.nn.Module:
    if name in MODELS:
        return build(name, **options)
    # ResNets are trained without dropped paths.
    dropped = {"drop_path_rate": config.options["drop_path"]} if "deit" in name else {}
    network = timm.create_model(name, num_classes=options["num_classes"], **dropped)
    # The trainer asks for a network's layers, for options that are not in use here.
    network.layers = dict
    return network


def prepare(
    name: str, data: Path, accelerator: Accelerator, clock: Clock, given: argparse.Namespace
) -> Measured:
    config = config_of(name, given)
    if is_panoptic(name):
        task: Any = panoptic.PanopticTraining(config, data / "scenes")
    else:
        task = ClassificationTraining(config, data / "shapes")
    torch.manual_seed(0)
    network = network_of(name, config, task.card.provenance["options"])
    trainer = TimedTrainer(
        clock, given.warmup + given.steps, config, task, network, accelerator, data / "out", {}
    )
    inference_batch = 1 if is_panoptic(name) else given.batch
    return Measured(name, config.batch_size, inference_batch, given.warmup, trainer)


def infer(model: Measured, clock: Clock, given: argparse.Namespace) -> list[float]:
    """Seconds of each of `steps` inferences, after `warmup` ones that do not count."""
    trainer = model.trainer
    network = trainer.network.eval()
    side = trainer.task.card.image.size[0]
    images = torch.randn(model.inference_batch, 3, side, side, device=trainer.accelerator.device)
    images = images.contiguous(memory_format=torch.channels_last)
    seconds = []
    for _ in range(given.warmup + given.steps):
        start = time.perf_counter()
        with torch.no_grad(), trainer.accelerator.autocast():
            network(images)
        clock.synchronise()
        seconds.append(time.perf_counter() - start)
    return seconds[given.warmup :]


def measure(models: list[Measured], clock: Clock, given: argparse.Namespace) -> None:
    for number in range(given.rounds):
        for model in models:
            rows, wall = model.trainer.turn(number)
            model.turns.append(rows)
            model.walls.append(wall)
            model.inference.append(infer(model, clock, given))
            rate, inferred = model.training_rates()[-1], model.inference_rates()[-1]
            print(
                f"round {number + 1}, {model.name}: {rate:.2f} images/s, inference {inferred:.2f}", flush=True
            )


def ratio(mine: list[float], other: list[float]) -> str:
    """Median and range of the rounds' ratios."""
    ratios = [a / b for a, b in zip(mine, other, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def speeds(models: list[Measured]) -> str:
    lines = [
        f"| model | batch | training images/s | {' | '.join(PARTS)} | inference batch | inference images/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in models:
        parts = " | ".join(f"{100 * model.share(part):.1f} %" for part in PARTS)
        rates = median(model.training_rates()), median(model.inference_rates())
        row = f"| {model.name} | {model.batch} | {rates[0]:.2f} | {parts} "
        lines.append(f"{row}| {model.inference_batch} | {rates[1]:.2f} |")
    return "\n".join(lines)


def comparison(models: list[Measured]) -> str:
    """How fast the reference is, relative to each of the other classifiers."""
    by_name = {model.name: model for model in models}
    if REFERENCE not in by_name:
        return f"No ratios: {REFERENCE} is not among the models."
    mine = by_name.pop(REFERENCE)
    lines = [f"| {REFERENCE} against | training | inference | thesis table 9 |", "|---|---|---|---|"]
    for name, model in by_name.items():
        if not is_panoptic(name):
            training = ratio(mine.training_rates(), model.training_rates())
            inference = ratio(mine.inference_rates(), model.inference_rates())
            thesis = f"{THESIS[REFERENCE] / THESIS[name]:.2f}" if name in THESIS else "-"
            lines.append(f"| {name} | {training} | {inference} | {thesis} |")
    return "\n".join(lines)


def matching(models: list[Measured]) -> str:
    """How much of a panoptic step the matching takes: scores and assignment, and the assignment alone."""
    lines = []
    for model in models:
        if is_panoptic(model.name):
            rows = [row for turn in model.steps for row in turn]
            share, host = model.share("matching"), median(row["assignment"] for row in rows)
            verdict = "within" if share <= BAR else "OVER"
            lines.append(
                f"{model.name}: matching {100 * share:.2f} % of the step ({verdict} the bar of {BAR:.0%}), "
                f"the assignment on the host {1e3 * host / model.batch:.2f} ms an image, copies included"
            )
    return "\n".join(lines)


def coverage(models: list[Measured]) -> float:
    """The parts of all steps over the wall time of all turns; the stages of a measurement must add up."""
    parts = sum(total(row) for model in models for turn in model.turns for row in turn)
    return parts / sum(sum(model.walls) for model in models)


def raw(model: Measured) -> dict[str, Any]:
    """For JSON: times in nanoseconds, the first `warmup` steps of a turn among them."""

    def ns(row: dict[str, float]) -> dict[str, int]:
        return {k: int(v) if k == "matchings" else round(1e9 * v) for k, v in row.items()}

    return {
        "name": model.name,
        "batch": model.batch,
        "inference_batch": model.inference_batch,
        "turns_ns": [[ns(row) for row in turn] for turn in model.turns],
        "walls_ns": [round(1e9 * wall) for wall in model.walls],
        "inference_ns": [[round(1e9 * seconds) for seconds in turn] for turn in model.inference],
    }


def environment(device: torch.device, given: argparse.Namespace) -> dict[str, Any]:
    cpu = cpu_info()
    return {
        "command": shlex.join(["python", "benchmarks/train.py", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__,
        },
        "cpu": cpu["model"],
        "features": cpu["features"],
        "cores": cpu["usable_cores"],
        "governor": cpu["governor"],
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "load_average": [cpu["load_average"]],
        "settings": {key: value for key, value in vars(given).items() if key != "json"},
    }  # fmt: skip


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=CHOSEN, help="names of vitkit's, others are timm's")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--panoptic-batch", type=int)
    parser.add_argument("--size", type=int, help="side of panoptic images in pixels, 32k + 1")
    parser.add_argument("--images", type=int, default=POOL, help="generated images that batches draw from")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, help="processes that decode images (8 on a GPU, 1 on a CPU)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, help="first steps of a turn that do not count (20; 1)")
    parser.add_argument("--steps", type=int, help="steps of a turn that count (30; 2)")
    parser.add_argument("--json", type=Path, help="where the raw times go")
    return parser.parse_args()


def fill(given: argparse.Namespace, cuda: bool) -> None:
    """What is not given depends on the device."""
    # A loader has two batches ready for each worker: the warm-up uses them up.
    defaults = {
        "batch": (128, 4), "panoptic_batch": (16, 2), "size": (641, 257), "workers": (8, 1),
        "warmup": (20, 1), "steps": (30, 2),
    }  # fmt: skip
    for name, (gpu, cpu) in defaults.items():
        if getattr(given, name) is None:
            setattr(given, name, gpu if cuda else cpu)


def main() -> None:
    given = options()
    torch.set_num_threads(given.threads)
    # One for all: a process has one state of Accelerate.
    accelerator = _accelerator(TrainConfig(REFERENCE, device=given.device, precision=given.precision))
    device = accelerator.device
    fill(given, device.type == "cuda")
    facts, clock = environment(device, given), Clock(device)
    accelerator.backward = clock.timed("backward", accelerator.backward)  # type: ignore[method-assign]
    panoptic.match = clock.timed("matching", panoptic.match)
    panoptic_loss._assign = clock.timed("assignment", panoptic_loss._assign)
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        write_shapes(data / "shapes", train=given.images, val=10, size=256)
        if any(map(is_panoptic, given.models)):
            write_scenes(data / "scenes", train=given.images, val=1, size=given.size)
        models = [prepare(name, data, accelerator, clock, given) for name in given.models]
        measure(models, clock, given)
    facts["load_average"].append(load_average())
    print("\n".join(["", speeds(models), "", comparison(models), "", matching(models), ""]))
    print(f"The parts add up to {coverage(models):.2%} of the wall time.\n")
    print(json.dumps(facts, indent=1))
    if given.json:
        everything = {**facts, "models": [raw(model) for model in models]}
        given.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
