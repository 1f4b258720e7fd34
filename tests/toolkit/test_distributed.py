"""Two processes on this machine, over gloo, against one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_pictures
from safetensors.torch import load_file

from vitkit.data.scenes import write_scenes
from vitkit.train import TrainConfig, checkpoint, train

PS_VIT = TrainConfig(
    model="ps_vit_nano",
    options={
        "image_size": 32, "n": 2, "dim": 8, "heads": 2, "iterations": 2, "encoder_layers": 1,
        "stem_width": 8, "stem_mid": 8,
    },
    epochs=1, batch_size=16, warmup_epochs=0, crop_pct=1.0, crop_min=0.6, device="cpu",
)  # fmt: skip
# What is drawn for a whole batch differs by process: no colours change, and all pixels are sampled.
REMAX = TrainConfig(
    model="remax_nano",
    options={
        "image_size": 65, "pixel_widths": [16, 16, 8, 8], "heads": 4, "queries": 12, "query_width": 16,
        "mask_width": 8, "ffn_width": 32, "aspp_width": 8, "drop_path": 0.0,
    },
    epochs=1, batch_size=8, warmup_epochs=0, samples=289, jitter=0.0, clip_norm=1e9, device="cpu",
)  # fmt: skip

# Saves the gradients of the first step, or the process' number so that it can be killed.
PROGRAM = """
import os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from vitkit.train import TrainConfig, loop

config, data, out = eval(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
check, epoch = loop.Trainer._check_finite, loop.Trainer._epoch

def dump(self, number, passes, sums, norm):
    check(self, number, passes, sums, norm)
    if self.shard.rank == 0 and not (out.parent / f"{out.name}.safetensors").exists():
        found = {name: p.grad for name, p in self.plain.named_parameters() if p.grad is not None}
        found = {name: gradient.contiguous() for name, gradient in found.items()}
        save_file(found, out.parent / f"{out.name}.safetensors")

def announce(self, number, shown):
    (out.parent / f"pid{self.shard.rank}").write_text(str(os.getpid()))
    return epoch(self, number, shown)

loop.Trainer._check_finite, loop.Trainer._epoch = dump, announce
torch.nn.Dropout.forward = lambda self, x: x

loop.train(config, data, out)
"""


RESUME = """
import sys
from pathlib import Path
from vitkit.train import TrainConfig, train

train(eval(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), resume=True)
"""


def launch(processes: int, program: str, config: TrainConfig, data: Path, out: Path) -> subprocess.Popen[str]:
    file = out.parent / "program.py"
    file.write_text(program)
    command = [sys.executable]
    if processes > 1:
        # Accelerate has a launcher of several processes for GPUs alone; the config then keeps to the CPU.
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "0"]
    command += [str(file), repr(config), str(data), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 8, 5)


@pytest.mark.parametrize("model", ["ps_vit", "remax"])
def test_two_processes_have_the_gradients_of_one_and_count_each_image_once(model, pictures, tmp_path):
    config, data = PS_VIT, pictures
    if model == "remax":
        config, data = REMAX, write_scenes(tmp_path / "scenes", train=8, val=3, size=65)
    gradients, logs = [], []
    for processes in (1, 2):
        out = tmp_path / f"run{processes}"
        started = launch(processes, PROGRAM, config, data, out)
        told, _ = started.communicate(timeout=300)
        assert started.returncode == 0, told
        gradients.append(load_file(tmp_path / f"{out.name}.safetensors"))
        logs.append(json.loads((out / "log.json").read_text()))
        assert told.count("epoch 1/1") == 1
        assert (tmp_path / f"pid{processes - 1}").exists()
    assert gradients[0].keys() == gradients[1].keys()
    # Relative to the largest gradient of the network; through 60 layers of norms over few pixels, float32's
    # rounding alone is some 1e-5.
    scale = max(float(g.abs().max()) for g in gradients[0].values())
    worst = max(float((gradients[0][n] - gradients[1][n]).abs().max()) for n in gradients[0]) / scale
    assert worst < (1e-4 if model == "remax" else 1e-6)
    metric = "pq" if model == "remax" else "top1"
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], rel=1e-5)
    assert logs[0][0][metric] == pytest.approx(logs[1][0][metric], abs=1e-3)


def test_the_loss_of_a_process_stops_all_and_leaves_a_checkpoint_to_resume(pictures, tmp_path):
    out = tmp_path / "run"
    config = replace(PS_VIT, epochs=100_000)
    started = launch(2, PROGRAM, config, pictures, out)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint" / "last.safetensors").exists():
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    started.communicate(timeout=120)
    assert started.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid0").read_text()), 0)
    state = load_file(out / "checkpoint" / "last.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint", "events"]


def test_a_stopped_training_of_two_goes_on_as_one(pictures, tmp_path, monkeypatch):
    def stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    save = checkpoint.save
    config = replace(PS_VIT, epochs=2)
    monkeypatch.setattr(checkpoint, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, pictures, tmp_path / "run")
    monkeypatch.undo()
    started = launch(2, RESUME, config, pictures, tmp_path / "run")
    told, _ = started.communicate(timeout=300)
    assert started.returncode == 0, told
    assert len(json.loads((tmp_path / "run" / "log.json").read_text())) == 2
