"""The training loop, on Accelerate: any device, precision and number of processes, a run at the end.

Everything random is drawn from the run's seed and its place in the training (`seeds.py`). So a checkpoint
after any step needs no generator's state, and a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vitkit.models import Model, build, model_info
from vitkit.models.remax import ReMaX
from vitkit.runs import CONFIG_FILE, WEIGHTS_FILE, write_run_files
from vitkit.runtimes.card import CARD_FILE, ModelCard
from vitkit.runtimes.errors import BadInput, BadRequest, DeviceError
from vitkit.runtimes.files import LOG_FILE
from vitkit.torchvision_shim import timm
from vitkit.train import checkpoint
from vitkit.train.checkpoint import Record, Row, State
from vitkit.train.config import TrainConfig
from vitkit.train.images import ClassificationTask
from vitkit.train.norms import synchronise
from vitkit.train.panoptic import PanopticTask
from vitkit.train.progress import Progress
from vitkit.train.schedule import make_optimizer, make_schedule
from vitkit.train.seeds import seed_of
from vitkit.train.shards import Shard, micro_batches
from vitkit.train.task import Batch, Task
from vitkit.train.transfer import freeze, initialise

_NAMED_FILES = 8
_TRIES = 10
# The share of the training images that may be unreadable.
_UNREADABLE = 0.01
# What a resumed training may do otherwise than before.
_FREE = ("device", "workers", "cache_mb", "save_minutes", "sources")
NOT_FINITE_FILE = "not_finite.json"


def train(
    config: TrainConfig,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    init: Path | None = None,
    backbone: str | None = None,
) -> Path:
    """Train on a data folder and leave the best epoch as a run at `out`.

    Classifiers take the image folders `data/train` and `data/val`; panoptic models COCO's layout, and are
    measured on the training images where there is no validation split. `init` is a run, or a run's weights,
    to start from (see `transfer.initialise`); `backbone` fills a panoptic model's
    backbone with ImageNet weights: a file in timm's or torchvision's names, or `timm` to download them.
    Under `accelerate launch` every process calls this alike.

    Every `save_minutes`, and after each epoch, `out` holds a checkpoint, from which `resume` continues; on
    a CPU with the same number of threads the continued run equals the uninterrupted one bit for bit.
    `progress` prints a line for each epoch, and shows a bar where the output is a terminal. Returns `out`,
    which then holds the weights, settings and card of a run, and `log.json` with a row for each epoch.

    Raises BadRequest where `out` holds something already, where there is nothing to resume or it was
    made with other settings, and for a model, option or device that does not exist; BadInput where the
    data has not the right form or, naming files, where the loss or its gradient is no finite number;
    DeviceError where another process of the training is gone.
    """
    checkpoint.check_out(out, resume)
    panoptic = model_info(config.model).task == "panoptic"
    if backbone is not None and not panoptic:
        raise BadRequest(f"{config.model} has no backbone that --backbone-weights could fill")
    accelerator = _accelerator(config)
    task: Task = (PanopticTask if panoptic else ClassificationTask)(config, data)
    options = task.card.provenance["options"]
    settings = {name: value for name, value in asdict(config).items() if name not in _FREE}
    identity = _plain({**settings, "options": options, "data": task.fingerprint})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build(config.model, **options)
        if backbone is not None:
            _load_backbone(network, backbone)
        fresh = [] if init is None else initialise(network, init)
        trainer = Trainer(config, task, network, accelerator, out, identity)
        if resume:
            trainer.restore()
        with Progress(config, task, trainer.steps, progress and accelerator.is_main_process) as shown:
            shown.fresh(fresh)
            _run(trainer, shown)
    if accelerator.is_main_process:
        _finish(out, task.card, identity)
    accelerator.wait_for_everyone()
    return out


def _run(trainer: Trainer, shown: Progress) -> None:
    try:
        trainer.run(shown)
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        if trainer.shard.count == 1 or not re.search("gloo|nccl|peer", reason, re.IGNORECASE):
            raise
        raise DeviceError(
            f"another process of this training is gone ({reason[:200]}); the last checkpoint in "
            f"{trainer.out} is kept: start all of them again with --resume"
        ) from None


class Trainer:
    """A training in progress: network, optimiser, and how far it has come."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        network: Model,
        accelerator: Accelerator,
        out: Path,
        identity: dict[str, Any],
    ) -> None:
        self.config, self.task, self.network, self.accelerator = config, task, network, accelerator
        self.out, self.identity = out, identity
        self.shard = Shard(accelerator.process_index, accelerator.num_processes, _summed(accelerator))
        # Convolutions are a third faster so; the stub of `to` does not know the argument.
        self.frozen = freeze(network, config.freeze)
        module = task.trainable(network).to(accelerator.device)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if accelerator.num_processes > 1:
            synchronise(module, accelerator.device)
        self.plain = module
        self.ema = timm.utils.ModelEmaV3(network, config.ema, use_warmup=True) if config.ema else None
        self.optimizer = make_optimizer(module, config)
        self.passes = len(self._plan(0))
        self.steps = self.passes // config.accumulate
        self.schedule = make_schedule(self.optimizer, config, self.steps)
        self.module, self.prepared = accelerator.prepare(module, self.optimizer)
        self.log: list[Row] = []
        self.state = State()
        self.saved = time.monotonic()
        self.unreadable: dict[str, str] = {}

    def _plan(self, epoch: int) -> list[list[int]]:
        seed = seed_of(self.config.seed, epoch)
        return micro_batches(
            len(self.task.files), self.config.batch_size, self.config.accumulate, self.shard, seed
        )

    def restore(self) -> None:
        """Go on from the last checkpoint; raises BadRequest and BadArtifact."""
        self.log, self.state = checkpoint.restore(
            self.out, self.plain, self.optimizer, self.ema and self.ema.module, self.identity
        )
        if self.accelerator.scaler is not None and self.state.scaler:
            self.accelerator.scaler.load_state_dict(self.state.scaler)

    def run(self, shown: Progress) -> None:
        """Train to the end, with a checkpoint after every epoch and every `save_minutes` in between."""
        shown.start(len(self.log) * self.steps + self.state.step)
        for epoch in range(len(self.log), self.config.epochs):
            row = self._epoch(epoch, shown)
            measured = self.task.measure(self._measured().eval(), self.shard)
            self.log.append({**row, **measured})
            self.state = State(scaler=self.state.scaler)
            self._save()
            shown.epoch(self.log[-1])
        shown.unreadable(self.unreadable)

    def _measured(self) -> nn.Module:
        """The network that a run keeps: the average of its weights where there is one."""
        return self.network if self.ema is None else self.ema.module

    def _save(self) -> None:
        self.saved = time.monotonic()
        if self.accelerator.is_main_process:
            if self.accelerator.scaler is not None:
                self.state.scaler = self.accelerator.scaler.state_dict()
            record = Record(self.identity, self.log, self.task.metric, self.state)
            average = self.ema.module if self.ema else None
            checkpoint.save(self.out, self.plain, self._measured(), average, self.optimizer, record)

    def _epoch(self, epoch: int, shown: Progress) -> Row:
        """The rest of an epoch; the row holds the mean of every scalar that the task's `losses` returns."""
        state, start = self.state, time.perf_counter()
        self.module.train()
        for part in self.frozen:
            part.eval()
        for passes in _grouped(self._batches(epoch, state.step), self.config.accumulate):
            lr = self._set_rate(epoch * self.steps + state.step)
            parts = self._step(epoch, passes)
            state.step += 1
            state.seen += sum(len(batch.files) for batch in passes) * self.shard.count
            for name, value in parts.items():
                state.sums[name] = state.sums.get(name, 0.0) + value
            state.seconds, start = state.seconds + time.perf_counter() - start, time.perf_counter()
            shown.step(epoch, state, lr)
            if time.monotonic() - self.saved >= 60 * self.config.save_minutes and state.step < self.steps:
                self._save()
        means = {name: value / self.steps for name, value in state.sums.items()}
        return {
            "epoch": epoch + 1,
            "loss": means.pop("total"),
            **means,
            "lr": lr,
            "seconds": state.seconds,
            "images_per_second": state.seen / state.seconds,
        }

    def _set_rate(self, step: int) -> float:
        self.schedule.step_update(step)
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def _batches(self, epoch: int, done: int) -> Iterator[Batch]:
        plan = self._plan(epoch)[done * self.config.accumulate :]
        samples = _Samples(self.task)
        loader: DataLoader[Any] = DataLoader(
            samples,
            batch_sampler=[[(i, seed_of(self.config.seed, epoch, i)) for i in part] for part in plan],
            num_workers=self.config.workers,
            collate_fn=samples.collate,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        for used, unreadable, data in loader:
            self.unreadable |= unreadable
            check_readable(self.unreadable, len(self.task.files))
            yield Batch(
                [self.task.files[i] for i in used], tuple(t.to(self.accelerator.device) for t in data)
            )

    def _step(self, epoch: int, passes: Sequence[Batch]) -> dict[str, float]:
        """One step down the loss; raises BadInput, and takes none, where it is no finite number."""
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(passes):
            seed = seed_of(self.config.seed, epoch, self.state.step, number, self.shard.rank)
            # The model's own random numbers, of dropout, are drawn from the global generator.
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(seed)
            with self.accelerator.accumulate(self.module):
                with self.accelerator.autocast():
                    losses = self.task.losses(self.module, batch.data, generator)
                self.accelerator.backward(losses["total"])
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.config.clip_norm)
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0) + loss.detach().float() / len(passes)
                self._check_finite(epoch, passes, sums, norm if self.accelerator.sync_gradients else None)
                self.prepared.step()
                self.prepared.zero_grad()
        if self.ema is not None:
            self.ema.update(self.network, step=self._global_step(epoch))
        values = self.shard.add(torch.stack(list(sums.values()))) / self.shard.count
        return dict(zip(sums, values.tolist(), strict=True))

    def _global_step(self, epoch: int) -> int:
        return epoch * self.steps + self.state.step

    def _check_finite(
        self, epoch: int, passes: Sequence[Batch], sums: dict[str, Tensor], norm: Tensor | None
    ) -> None:
        """Gradients can be infinite where the loss is not yet; a step along them would spoil the weights.

        Except in fp16, where a scale is tried that is too large now and then, and its step left out.
        """
        if norm is None:
            return
        wrong = ~torch.isfinite(sums["total"])
        if self.accelerator.scaler is None:
            wrong = wrong | ~torch.isfinite(norm)
        if not self.shard.add(wrong.float()).item():
            return
        files = [str(path) for batch in passes for path in batch.files]
        if wrong:
            folder = self.out / checkpoint.FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            (folder / NOT_FINITE_FILE).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
        raise BadInput(_not_finite(epoch, files))


class _Samples(Dataset[Any]):
    """A task's training images under (number, seed); for one that cannot be read, the next one that can."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, dict[str, str], Any]:
        first, seed = place
        unreadable: dict[str, str] = {}
        for step in range(_TRIES):
            index = (first + step) % len(self.task.files)
            try:
                return index, unreadable, self.task.sample(index, seed)
            except BadInput as error:
                unreadable[str(self.task.files[index])] = str(error)
        raise BadInput(f"{_TRIES} training images in a row cannot be read: {next(iter(unreadable.values()))}")

    def collate(self, samples: Sequence[tuple[int, dict[str, str], Any]]) -> tuple[Any, ...]:
        """(numbers, unreadable files with their errors, the task's batch)."""
        numbers, unreadable, found = zip(*samples, strict=True)
        return numbers, {k: v for part in unreadable for k, v in part.items()}, self.task.collate(found)


def check_readable(unreadable: dict[str, str], images: int) -> None:
    """Raise BadInput where more than one image in a hundred cannot be read."""
    if len(unreadable) > _UNREADABLE * images:
        raise BadInput(
            f"{len(unreadable)} of {images} training images cannot be read, over {_UNREADABLE:.0%}: "
            + "; ".join(list(unreadable.values())[:_NAMED_FILES])
        )


def _grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def _summed(accelerator: Accelerator) -> Any:
    return lambda tensor: accelerator.reduce(tensor.to(accelerator.device), "sum")


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
    try:
        return dict(timm.create_model(name, pretrained=True).state_dict())
    # The hub raises a dozen types for a missing network, a missing file and a missing package.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise BadRequest(
            f"the weights of {name} cannot be downloaded: {reason}. Name a file: --backbone-weights FILE"
        ) from None


def _accelerator(config: TrainConfig) -> Accelerator:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise BadRequest("the device 'cuda' cannot be used: torch sees none; leave --set device= out")
    if config.precision == "fp16" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise BadRequest("precision fp16 needs a GPU; bf16 and fp32 run everywhere")
    if not torch.distributed.is_initialized():
        # Accelerate keeps the first settings of a process, which may train more than once.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=config.device == "cpu",
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        gradient_accumulation_steps=config.accumulate,
        step_scheduler_with_optimizer=False,
    )


def _not_finite(epoch: int, files: Sequence[str]) -> str:
    more = f" and {len(files) - _NAMED_FILES} more" if len(files) > _NAMED_FILES else ""
    return (
        f"the loss or its gradient is no finite number in epoch {epoch + 1}, on "
        f"{', '.join(files[:_NAMED_FILES])}{more} (all in {checkpoint.FOLDER}/{NOT_FINITE_FILE}); the last "
        "checkpoint is kept. Look at these images, or train into a new folder with a lower learning rate: "
        "--set lr=..."
    )


def _finish(out: Path, card: ModelCard, identity: dict[str, Any]) -> None:
    state, record = checkpoint.read_best(out)
    log = checkpoint.read_log(out)
    best = {"best_epoch": record.log[-1]["epoch"], record.metric: record.log[-1][record.metric]}
    card = replace(card, provenance={**card.provenance, **best, "data": identity["data"]})
    with tempfile.TemporaryDirectory(prefix=".run.", dir=out) as work:
        write_run_files(Path(work), state, card, identity)
        (Path(work) / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
        # The card last: from then on, and not before, the folder is a run.
        for name in (WEIGHTS_FILE, CONFIG_FILE, LOG_FILE, CARD_FILE):
            (Path(work) / name).replace(out / name)
    checkpoint.remove(out)
