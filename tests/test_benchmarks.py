"""The scripts that print figures run end to end."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from vitkit.train import panoptic, panoptic_loss

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_training_throughput(tmp_path, monkeypatch, capsys):
    """The table is that of the raw times, whose parts add up; a step matches once."""
    out = tmp_path / "times.json"
    command = (
        "train.py --device cpu --models ps_vit_nano remax_nano --batch 3 --panoptic-batch 2 --size 65 "
        f"--images 10 --threads {torch.get_num_threads()} --workers 0 --rounds 2 --warmup 1 --steps 2 "
        f"--json {out}"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    # The script puts a clock around these.
    monkeypatch.setattr(panoptic, "match", panoptic.match)
    monkeypatch.setattr(panoptic_loss, "_assign", panoptic_loss._assign)
    runpy.run_path(str(SCRIPTS / "train.py"), run_name="__main__")
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    for model, batch, matchings in zip(written["models"], (3, 2), (0, 1), strict=True):
        assert [len(turn) for turn in model["turns_ns"]] == [3, 3]
        assert {row.pop("matchings") for turn in model["turns_ns"] for row in turn} == {matchings}
        parts = ("data", "forward", "backward", "optimiser")
        sums = [[sum(row[part] for part in parts) for row in turn] for turn in model["turns_ns"]]
        assert sum(map(sum, sums)) == pytest.approx(sum(model["walls_ns"]), rel=0.05)
        rate = median(batch * 1e9 / median(turn[1:]) for turn in sums)
        assert f"| {model['name']} | {batch} | {rate:.2f} |" in printed
        for row in (row for turn in model["turns_ns"] for row in turn):
            assert all(row[part] > 0 for part in parts)
            assert 0 <= row["assignment"] <= row["matching"] < row["forward"]


def test_training_beside_busy_processes(monkeypatch, capsys):
    command = "spin.py --busy 0 --values 1000 --threads 1 --seconds 0.01 --rounds 1"
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_path(str(SCRIPTS / "spin.py"), run_name="__main__")
    *_, row = capsys.readouterr().out.splitlines()
    _, busy, rate, _ = row.split("|")
    assert (int(busy), float(rate) > 0) == (0, True)
