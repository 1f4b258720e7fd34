"""The training loop: AdamW, a cosine, a checkpoint after each epoch, a run at the end."""

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
from torch.optim import AdamW, Optimizer

from vitkit.models import Model, build, model_info
from vitkit.models.remax import ReMaX
from vitkit.runs import CONFIG_FILE, WEIGHTS_FILE, write_run_files
from vitkit.runtimes.card import CARD_FILE, ModelCard
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.runtimes.files import LOG_FILE
from vitkit.train import checkpoint
from vitkit.train.checkpoint import Record, Row
from vitkit.train.config import TrainConfig
from vitkit.train.images import ClassificationTask
from vitkit.train.panoptic import PanopticTask
from vitkit.train.task import Batch, Task

_NAMED_FILES = 8
# Kept at their size, beside biases and norms: tables of relative positions, tokens and cluster centres.
_UNDECAYED = ("_table", "centres", "cls_token")
# Called after each step with the mean loss so far, the learning rate and the images per second.
Report = Callable[[float, float, float], None]


def train(
    config: TrainConfig,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    backbone: str | None = None,
) -> Path:
    """Train on a data folder and leave the best epoch as a run at `out`.

    Classifiers take the image folders `data/train` and `data/val`; panoptic models COCO's layout, and are
    measured on the training images where there is no validation split. `backbone` fills a panoptic model's
    backbone with ImageNet weights: a file in timm's or torchvision's names, or `timm` to download them.

    After each epoch `out` holds a checkpoint, from which `resume` continues; on a CPU with the same number
    of threads the continued run equals the uninterrupted one bit for bit. `progress` prints a line for
    each epoch, and shows a bar where the output is a terminal. Returns `out`, which then holds the weights,
    settings and card of a run, and `log.json` with a row for each epoch.

    Raises BadRequest where `out` holds something already, where there is nothing to resume or it was
    made with other settings, and for a model, option or device that does not exist; BadInput where the
    data has not the right form or, naming files, where the loss or its gradient is no finite number.
    """
    checkpoint.check_out(out, resume)
    panoptic = model_info(config.model).task == "panoptic"
    if backbone is not None and not panoptic:
        raise BadRequest(f"{config.model} has no backbone that --backbone-weights could fill")
    device = _device(config.device)
    task: Task = (PanopticTask if panoptic else ClassificationTask)(config, data)
    options = task.card.provenance["options"]
    identity = {**_plain(asdict(config)), "options": options, "data": task.fingerprint}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build(config.model, **options)
        if backbone is not None:
            _load_backbone(network, backbone)
        module = task.trainable(network).to(device)
        # Convolutions are a third faster so; the stub of `to` does not know the argument.
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = _optimizer(module, config)
        log = checkpoint.restore(out, module, optimizer, identity) if resume else []
        with _bar(config, len(task), len(log), progress) as bar:
            for epoch in range(len(log), config.epochs):
                row = train_epoch(module, optimizer, task, config, epoch, _reporter(bar, epoch))
                log.append({**row, **task.measure(network.eval())})
                checkpoint.save(out, module, network, optimizer, Record(identity, log, task.metric))
                bar.console.print(_line(log[-1], config, task), soft_wrap=True, highlight=False)
    return _finish(out, task.card, identity, log)


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back, so that a resumed run's settings compare equal."""
    return json.loads(json.dumps(value))


def _load_backbone(network: Model, source: str) -> None:
    from vitkit.models.backbones import load_backbone
    from vitkit.models.checkpoints import read_tensors

    assert isinstance(network, ReMaX)
    tensors = _download(network.config.backbone) if source == "timm" else read_tensors(Path(source))
    load_backbone(network.backbone, tensors, source)


def _download(name: str) -> dict[str, Tensor]:
    """A backbone's ImageNet weights from timm's hub; raises BadRequest where they cannot be had."""
    from vitkit.torchvision_shim import timm

    try:
        return dict(timm.create_model(name, pretrained=True).state_dict())
    # The hub raises a dozen types for a missing network, a missing file and a missing package.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise BadRequest(
            f"the weights of {name} cannot be downloaded: {reason}. Name a file: --backbone-weights FILE"
        ) from None


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
        kernel = parameter.ndim > 1 and not name.endswith(_UNDECAYED)
        decay = config.weight_decay if kernel else 0.0
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
    module: nn.Module,
    optimizer: Optimizer,
    task: Task,
    config: TrainConfig,
    epoch: int,
    report: Report,
) -> Row:
    """One pass over the images in an order given by the seed and the epoch; returns the log's row.

    The row holds the mean of every scalar that the task's `losses` returns, `total` as `loss`. Raises
    BadInput, naming the files, where the loss of a batch, or its gradient, is no finite number.
    """
    seed = int(np.random.SeedSequence([config.seed, epoch]).generate_state(1)[0])
    # The model's own random numbers, of dropout, are drawn from the global generator.
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    steps = _steps(task, config)
    start, seen, lr = time.perf_counter(), 0, 0.0
    sums: dict[str, float] = {}
    module.train()
    for number, batch in enumerate(task.batches(generator)):
        lr = learning_rate(config, epoch * steps + number, steps)
        parts = _step(module, optimizer, task, batch, generator, config, lr)
        if parts is None:
            raise BadInput(_not_finite(epoch, batch.files))
        seen += batch.size
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value * batch.size
        report(sums["total"] / seen, lr, seen / (time.perf_counter() - start))
    seconds = time.perf_counter() - start
    means = {name: value / seen for name, value in sums.items()}
    return {
        "epoch": epoch + 1,
        "loss": means.pop("total"),
        **means,
        "lr": lr,
        "seconds": seconds,
        "images_per_second": seen / seconds,
    }


def _steps(task: Task, config: TrainConfig) -> int:
    return math.ceil(len(task) / config.batch_size)


def _step(
    module: nn.Module,
    optimizer: Optimizer,
    task: Task,
    batch: Batch,
    generator: torch.Generator,
    config: TrainConfig,
    lr: float,
) -> dict[str, float] | None:
    """One step down the loss; None, and no step, where the loss or its gradient is no finite number."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.zero_grad()
    losses = task.losses(module, batch, generator)
    losses["total"].backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
    names = list(losses)
    values: Tensor = torch.stack([losses[name].detach() for name in names])
    # Gradients can be infinite where the loss is not yet; a step along them would spoil the weights.
    if not torch.isfinite(norm) or not torch.isfinite(losses["total"]):
        return None
    optimizer.step()
    return dict(zip(names, values.tolist(), strict=True))


def _not_finite(epoch: int, files: Sequence[Path]) -> str:
    names = ", ".join(str(path) for path in files[:_NAMED_FILES])
    more = f" and {len(files) - _NAMED_FILES} more" if len(files) > _NAMED_FILES else ""
    return (
        f"the loss or its gradient is no finite number in epoch {epoch + 1}, on {names}{more}; "
        "the checkpoint of the epoch before is kept. Look at these images, or train into a new folder "
        "with a lower learning rate: --set lr=..."
    )


def _finish(out: Path, card: ModelCard, identity: dict[str, Any], log: Sequence[Row]) -> Path:
    state, record = checkpoint.read_best(out)
    best = {"best_epoch": record.log[-1]["epoch"], record.metric: record.log[-1][record.metric]}
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


def _line(row: Row, config: TrainConfig, task: Task) -> str:
    return (
        f"epoch {row['epoch']}/{config.epochs}  loss {row['loss']:.3f}  lr {row['lr']:.1e}  "
        f"{task.unit} {row[task.metric]:.1f} %  {row['seconds']:.1f} s  "
        f"{row['images_per_second']:.0f} images/s"
    )
