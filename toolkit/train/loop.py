"""The training loop, on Accelerate: any device, precision and number of processes, a run at the end.

Everything random is drawn from the run's seed and its place in the training (`seeds.py`). So a checkpoint
after any step needs no generator's state, and a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitkit.models import Model, build, family_of, model_info
from vitkit.runs import CONFIG_FILE, WEIGHTS_FILE, write_run_files
from vitkit.runtimes.card import CARD_FILE
from vitkit.runtimes.errors import BadInput, BadRequest, DeviceError, VitkitError
from vitkit.runtimes.files import CURVES_FILE, LOG_FILE, write_text
from vitkit.torchvision_shim import timm
from vitkit.train import checkpoint
from vitkit.train.checkpoint import Record, Row, State
from vitkit.train.config import TrainConfig
from vitkit.train.curves import draw_curves
from vitkit.train.norms import synchronise
from vitkit.train.progress import Progress
from vitkit.train.readable import check_readable
from vitkit.train.recompute import recompute
from vitkit.train.schedule import make_optimizer, make_schedule
from vitkit.train.seeds import seed_of
from vitkit.train.shards import Shard, micro_batches
from vitkit.train.task import Batch, TrainingTask, open_task
from vitkit.train.track import Tracker, find_tracker
from vitkit.train.training_images import TrainingImages
from vitkit.train.transfer import fill_backbone, freeze, initialise

_NAMED_FILES = 8
# What a resumed training may do otherwise than before.
_FREE = ("device", "workers", "cache_mb", "shard_cache_gb", "save_minutes", "track", "sources")
# Every process holds all weights.
_KINDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
NOT_FINITE_FILE = "not_finite.json"


def train(
    config: TrainConfig,
    data: str | Path,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    advanced: Callable[[int, int], object] = lambda done, total: None,
    init: Path | None = None,
    backbone: str | None = None,
) -> Path:
    """Train on a data folder and leave the best epoch as a run at `out`.

    Classifiers take the image folders `data/train` and `data/val`, or an index of shards, which may be a
    URL (`vitkit.data.tars`); panoptic models COCO's layout, and are measured on the training images where
    there is no validation split. `init` is a run, or a run's weights, to start from (see
    `transfer.initialise`); `backbone` fills a panoptic model's backbone with ImageNet weights: a file in
    timm's or torchvision's names, or `timm` to download them. Under `accelerate launch` every process calls
    this alike.

    Every `save_minutes`, and after each epoch, `out` holds a checkpoint, from which `resume` continues; on
    a CPU with the same number of threads the continued run equals the uninterrupted one bit for bit.
    `progress` prints a line for each epoch, and shows a bar where the output is a terminal; `advanced` is
    called after each step with (steps done, steps in all). Returns `out`,
    which then holds the weights, settings and card of a run, `log.json` with a row for each epoch,
    `curves.png` of the log, and `events/` for TensorBoard.

    Raises BadRequest where `out` holds something already, where there is nothing to resume or it was
    made with other settings, and for a model, option or device that does not exist; BadInput where the
    data has not the right form or, naming files, where the loss or its gradient is no finite number;
    DeviceError where another process of the training, or one that decodes, is gone; MissingBackend where
    the `track` asked for is not installed.
    """
    checkpoint.check_out(out, resume)
    track = find_tracker(config.track)
    model = model_info(config.model).config
    if backbone is not None and not hasattr(model, "backbone"):
        raise BadRequest(f"{config.model} has no backbone that --backbone-weights could fill")
    accelerator = _accelerator(config)
    task = open_task(family_of(model).training, config, data)
    options = task.card.provenance["options"]
    settings = {name: value for name, value in asdict(config).items() if name not in _FREE}
    identity = _plain({**settings, "options": options, "data": task.fingerprint})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build(config.model, **options)
        if backbone is not None:
            fill_backbone(network, backbone)
        fresh = [] if init is None else initialise(network, init)
        trainer = Trainer(config, task, network, accelerator, out, identity)
        if resume:
            trainer.restore()
        main = accelerator.is_main_process
        tracker = Tracker(track if main else "none", out, config)
        with Progress(config, task, trainer.steps, progress and main, tracker, advanced) as shown:
            shown.fresh(fresh)
            shown.notes(task.notes)
            _run(trainer, shown)
    if accelerator.is_main_process:
        _finish(out, task, identity)
    accelerator.wait_for_everyone()
    return out


def _run(trainer: Trainer, shown: Progress) -> None:
    try:
        trainer.run(shown)
    except DeviceError as error:
        raise DeviceError(f"{error}; {checkpoint.advice(trainer.out)}") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        lost = f"({reason[:200]}); {checkpoint.advice(trainer.out)}"
        if "DataLoader worker (pid" in reason:
            raise DeviceError(
                f"a process that decodes images is gone {lost}. If memory ran out, take fewer of them: "
                "--set workers=N"
            ) from None
        if trainer.shard.count == 1 or not re.search("gloo|nccl|peer", reason, re.IGNORECASE):
            raise
        raise DeviceError(f"another process of this training is gone {lost}, in all processes") from None


class Trainer:
    """A training in progress: network, optimiser, and how far it has come."""

    def __init__(
        self,
        config: TrainConfig,
        task: TrainingTask,
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
        self.optimizer = make_optimizer(module, config, list(network.layers()))
        self.passes = len(self._plan(0))
        self.steps = self.passes // config.accumulate
        self.schedule = make_schedule(self.optimizer, config, self.steps)
        # Behind the copy that averages: neither belongs into it.
        if config.recompute:
            recompute(network.layers().values())
        if config.compile:
            _compile(module, config)
        self.module, self.prepared = accelerator.prepare(module, self.optimizer)
        self.log: list[Row] = []
        self.state = State()
        self.saved = time.monotonic()
        self.unreadable: set[str] = set()

    def _plan(self, epoch: int) -> list[list[int]]:
        seed = seed_of(self.config.seed, epoch)
        return micro_batches(
            self.task.chunks, self.config.batch_size, self.config.accumulate, self.shard, seed
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
            try:
                row |= self.task.measure(self._measured().eval(), self.shard)
                # Before the checkpoint: what comes after it is not repeated by a resumed training.
                shown.measured(row)
            except Exception:
                # What the epoch learned is kept; a resumed training begins with the measure.
                self._save()
                raise
            self.log.append(row)
            self.state = State(scaler=self.state.scaler)
            self._save()
            shown.epoch(row)
            shown.unreadable(self.unreadable)
            shown.notes(self.task.notes)

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
        for passes in _grouped(self._batches(epoch, state.step), self.config.accumulate, state):
            lr = self._set_rate(self._global_step(epoch))
            parts = self._step(epoch, passes)
            state.step += 1
            state.seen += sum(len(batch.files) for batch in passes) * self.shard.count
            for name, value in parts.items():
                state.sums[name] = state.sums.get(name, 0.0) + value
            state.seconds, start = state.seconds + time.perf_counter() - start, time.perf_counter()
            shown.step(epoch, state, parts, lr)
            if time.monotonic() - self.saved >= 60 * self.config.save_minutes and state.step < self.steps:
                self._save()
        means = {name: value / self.steps for name, value in state.sums.items()}
        return {
            "epoch": epoch + 1,
            "loss": means.pop("total"),
            **means,
            # Of the last step, which may have been taken before this training was resumed.
            "lr": self._set_rate(self._global_step(epoch) - 1),
            "seconds": state.seconds,
            "images_per_second": state.seen / state.seconds,
            "data_share": state.waited / state.seconds,
        }

    def _set_rate(self, step: int) -> float:
        self.schedule.step_update(step)
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def _batches(self, epoch: int, done: int) -> Iterator[Batch]:
        plan = self._plan(epoch)[done * self.config.accumulate :]
        self.task.expect([i for part in plan for i in part])
        samples = TrainingImages(self.task)
        loader: DataLoader[Any] = DataLoader(
            samples,
            batch_sampler=[[(i, seed_of(self.config.seed, epoch, i)) for i in part] for part in plan],
            num_workers=self.config.workers,
            collate_fn=samples.collate,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        for used, unreadable, data in loader:
            if isinstance(data, VitkitError):
                raise data
            self.unreadable |= unreadable
            check_readable(len(self.unreadable), len(self.task.files), "training images", self.unreadable)
            yield Batch(
                [self.task.files[i] for i in used],
                tuple(t.to(self.accelerator.device, non_blocking=True) for t in data),
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
        # The gradient is no number in any process, whichever one's images are to blame.
        blamed = not torch.isfinite(sums["total"]).item()
        parts = gather_object([(blamed, [str(path) for batch in passes for path in batch.files])])
        files = [path for part in ([p for p in parts if p[0]] or parts) for path in part[1]]
        problem = _not_finite(epoch, files, self.out)
        if self.accelerator.is_main_process:
            try:
                write_text(self.out / checkpoint.FOLDER / NOT_FINITE_FILE, json.dumps(files, indent=1) + "\n")
            except BadRequest as error:
                problem += f". The list of them is lost: {error}"
        raise BadInput(problem)


def _compile(module: nn.Module, config: TrainConfig) -> None:
    backends = torch.compiler.list_backends(exclude_tags=())  # type: ignore[no-untyped-call]
    if config.compile not in backends:
        raise BadRequest(
            f"compile is {config.compile!r}; torch has {', '.join(backends)}, and nothing is compiled without"
        )
    module.compile(backend=config.compile)


def _grouped(batches: Iterator[Batch], size: int, state: State) -> Iterator[list[Batch]]:
    """Groups of batches; the seconds until each is there are added to `state.waited`."""
    group, start = [], time.perf_counter()
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            state.waited += time.perf_counter() - start
            yield group
            group, start = [], time.perf_counter()


def _summed(accelerator: Accelerator) -> Any:
    return lambda tensor: accelerator.reduce(tensor.to(accelerator.device), "sum")


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back, so that a resumed run's settings compare equal."""
    return json.loads(json.dumps(value))


def _accelerator(config: TrainConfig) -> Accelerator:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise BadRequest("the device 'cuda' cannot be used: torch sees none; leave --set device= out")
    if config.precision == "fp16" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise BadRequest("precision fp16 needs a GPU; bf16 and fp32 run everywhere")
    if not torch.distributed.is_initialized():
        # Accelerate keeps the first settings of a process, which may train more than once.
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        gradient_accumulation_steps=config.accumulate,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.distributed_type not in _KINDS:
        raise BadRequest(
            f"{accelerator.distributed_type.value} divides the weights, of which checkpoints here want all; "
            "these models fit a GPU whole: start the training with accelerate launch --multi_gpu"
        )
    return accelerator


def _not_finite(epoch: int, files: Sequence[str], out: Path) -> str:
    more = f" and {len(files) - _NAMED_FILES} more" if len(files) > _NAMED_FILES else ""
    return (
        f"the loss or its gradient is no finite number in epoch {epoch + 1}, on "
        f"{', '.join(files[:_NAMED_FILES])}{more} (all in {out / checkpoint.FOLDER / NOT_FINITE_FILE}). "
        "No step was taken along it. Look at these images, or train into a new folder with a lower learning "
        f"rate: --set lr=...{checkpoint.start_from_best(out)}"
    )


def _finish(out: Path, task: TrainingTask, identity: dict[str, Any]) -> None:
    state, record = checkpoint.read_best(out)
    log = checkpoint.read_log(out)
    best = {"best_epoch": record.log[-1]["epoch"], record.metric: record.log[-1][record.metric]}
    card = replace(task.card, provenance={**task.card.provenance, **best, "data": identity["data"]})
    work = out / ".run"
    try:
        # What a kill or a full disk left.
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        write_run_files(work, state, card, identity)
        (work / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
        draw_curves(work / CURVES_FILE, log, task.metric, task.unit, card.name)
        # The card last: from then on, and not before, the folder is a run.
        for name in (WEIGHTS_FILE, CONFIG_FILE, LOG_FILE, CURVES_FILE, CARD_FILE):
            (work / name).replace(out / name)
        work.rmdir()
        checkpoint.remove(out)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise BadRequest(
            f"all epochs are done, but the run in {out} cannot be written: {error}. Make room, or make the "
            f"folder writable; {checkpoint.advice(out)}"
        ) from None
