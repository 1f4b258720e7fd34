"""The training loop: images in memory, AdamW, a cosine, a checkpoint after each epoch, a run at the end."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from vitkit.models import Labels, build, configure, run_card
from vitkit.runs import CONFIG_FILE, WEIGHTS_FILE, write_run_files
from vitkit.runtimes.card import CARD_FILE, ImageSpec, ModelCard
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.runtimes.files import LOG_FILE
from vitkit.train import checkpoint
from vitkit.train.checkpoint import Record, Row
from vitkit.train.config import TrainConfig
from vitkit.train.images import ImageSet, Splits, augment, find_splits, fingerprint, load_images, normalise

_NAMED_FILES = 8
# Called after each step with the mean loss so far, the learning rate and the images per second.
Report = Callable[[float, float, float], None]


def train(config: TrainConfig, data: Path, out: Path, *, resume: bool = False, progress: bool = True) -> Path:
    """Train on the image folders `data/train` and `data/val`, and leave the best epoch as a run at `out`.

    After each epoch `out` holds a checkpoint, from which `resume` continues; on a CPU with the same number
    of threads the continued run equals the uninterrupted one bit for bit. `progress` prints a line for
    each epoch, and shows a bar where the output is a terminal. Returns `out`, which then holds the weights,
    settings and card of a run, and `log.json` with a row for each epoch.

    Raises BadRequest where `out` holds something already, where there is nothing to resume or it was
    made with other settings, and for a model, option or device that does not exist; BadInput where the
    data has not the right form or, naming files, where the loss or its gradient is no finite number.
    """
    checkpoint.check_out(out, resume)
    splits = find_splits(data)
    card = _card(config, splits)
    device = _device(config.device)
    identity = {**asdict(config), "options": card.provenance["options"], "data": fingerprint(data, splits)}
    images, val = (load_images(items, card.labels, card.image) for items in (splits.train, splits.val))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build(config.model, **card.provenance["options"]).to(device)
        # Convolutions are a third faster so; the stub of `to` does not know the argument.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = _optimizer(model, config)
        log = checkpoint.restore(out, model, optimizer, identity) if resume else []
        with _bar(config, len(images), len(log), progress) as bar:
            for epoch in range(len(log), config.epochs):
                row = train_epoch(model, optimizer, images, config, card.image, epoch, _reporter(bar, epoch))
                log.append({**row, "top1": accuracy(model, val, card.image)})
                checkpoint.save(out, model, optimizer, Record(identity, log))
                bar.console.print(_line(log[-1], config), soft_wrap=True, highlight=False)
    return _finish(out, card, identity, log)


def _card(config: TrainConfig, splits: Splits) -> ModelCard:
    classes = len(splits.classes)
    model = configure(config.model, {"num_classes": classes, **config.options})
    if model.num_classes != classes:
        raise BadRequest(f"num_classes is {model.num_classes}, but the data has {classes}; leave it out")
    card = run_card(config.model, model, Labels(splits.classes))
    provenance = {
        **card.provenance,
        "weights": "trained",
        "epochs": config.epochs,
        "seed": config.seed,
        "train_images": len(splits.train),
        "val_images": len(splits.val),
    }
    return replace(card, image=replace(card.image, crop_pct=config.crop_pct), provenance=provenance)


def _device(name: str) -> torch.device:
    try:
        if name == "meta":
            raise RuntimeError("it holds no data")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadRequest(f"the device {name!r} cannot be used: {error}") from None


def _optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = next((s for prefix, s in config.lr_scale.items() if name.startswith(prefix)), 1.0)
        # Biases and the scales of norms keep their size: decay is for matrices and kernels.
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return AdamW(
        [{"params": p, "lr_scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()],
        lr=config.lr,
        fused=True,
    )


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up to `config.lr`, then half a cosine towards zero; `step` counts from 0."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    images: ImageSet,
    config: TrainConfig,
    spec: ImageSpec,
    epoch: int,
    report: Report,
) -> Row:
    """One pass over the images in an order given by the seed and the epoch; returns the log's row, less top1.

    Raises BadInput, naming the files, where the loss of a batch, or its gradient, is no finite number.
    """
    seed = int(np.random.SeedSequence([config.seed, epoch]).generate_state(1)[0])
    # The model's own random numbers, of dropout, are drawn from the global generator.
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    batches = torch.randperm(len(images), generator=generator).tensor_split(
        math.ceil(len(images) / config.batch_size)
    )
    start, seen, total, lr = time.perf_counter(), 0, 0.0, 0.0
    model.train()
    for number, batch in enumerate(batches):
        lr = learning_rate(config, epoch * len(batches) + number, len(batches))
        pixels, targets = images.pixels[batch].to(device), images.targets[batch].to(device)
        inputs = augment(normalise(pixels, spec), config, generator)
        loss = _step(model, optimizer, inputs, targets, config, lr)
        if not math.isfinite(loss):
            raise BadInput(_not_finite(epoch, [images.files[i] for i in batch.tolist()]))
        seen, total = seen + len(batch), total + loss * len(batch)
        report(total / seen, lr, seen / (time.perf_counter() - start))
    seconds = time.perf_counter() - start
    return {
        "epoch": epoch + 1,
        "loss": total / seen,
        "lr": lr,
        "seconds": seconds,
        "images_per_second": seen / seconds,
    }


def _step(
    model: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor, config: TrainConfig, lr: float
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.zero_grad()
    loss = F.cross_entropy(model(inputs), targets, label_smoothing=config.label_smoothing)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    # Gradients can be infinite where the loss is not yet; a step along them would spoil the weights.
    if not torch.isfinite(norm):
        return math.nan
    optimizer.step()
    return loss.item()


def _not_finite(epoch: int, files: Sequence[Path]) -> str:
    names = ", ".join(str(path) for path in files[:_NAMED_FILES])
    more = f" and {len(files) - _NAMED_FILES} more" if len(files) > _NAMED_FILES else ""
    return (
        f"the loss or its gradient is no finite number in epoch {epoch + 1}, on {names}{more}; "
        "the checkpoint of the epoch before is kept. Look at these images, or train into a new folder "
        "with a lower learning rate: --set lr=..."
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet, spec: ImageSpec, batch_size: int = 256) -> float:
    """Top-1 accuracy in per cent, on images as the card prepares them."""
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        logits = model(normalise(images.pixels[part].to(device), spec))
        right += int((logits.argmax(1).cpu() == images.targets[part]).sum())
    return 100 * right / len(images)


def _finish(out: Path, card: ModelCard, identity: dict[str, Any], log: Sequence[Row]) -> Path:
    state, record = checkpoint.read_best(out)
    best = {"best_epoch": record.log[-1]["epoch"], "top1": record.log[-1]["top1"]}
    card = replace(card, provenance={**card.provenance, **best, "data": identity["data"]})
    with tempfile.TemporaryDirectory(prefix=".run.", dir=out) as work:
        write_run_files(Path(work), state, card, identity)
        (Path(work) / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
        # The card last: from then on, and not before, the folder is a run.
        for name in (WEIGHTS_FILE, CONFIG_FILE, LOG_FILE, CARD_FILE):
            (Path(work) / name).replace(out / name)
    checkpoint.remove(out)
    return out


def _bar(config: TrainConfig, images: int, epochs_done: int, progress: bool) -> Progress:
    console = Console(quiet=not progress)
    bar = Progress(
        TextColumn("epoch {task.fields[epoch]}/" + str(config.epochs)),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not (progress and console.is_terminal),
    )
    steps = math.ceil(images / config.batch_size)
    bar.add_task("", total=config.epochs * steps, completed=epochs_done * steps, epoch=epochs_done, state="")
    return bar


def _reporter(bar: Progress, epoch: int) -> Report:
    def report(loss: float, lr: float, rate: float) -> None:
        state = f"loss {loss:.3f}  lr {lr:.1e}  {rate:.0f} images/s"
        bar.update(bar.task_ids[0], advance=1, epoch=epoch + 1, state=state)

    return report


def _line(row: Row, config: TrainConfig) -> str:
    return (
        f"epoch {row['epoch']}/{config.epochs}  loss {row['loss']:.3f}  lr {row['lr']:.1e}  "
        f"top-1 {row['top1']:.1f} %  {row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s"
    )
