import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bench import report, write_artifact
from typer.testing import CliRunner

from vitkit.bench import measure
from vitkit.bench.frame_rate import describe, frame_rate
from vitkit.cli.main import app
from vitkit.runtimes.errors import BadRequest

FAST = [10_000_000] * 662
ENERGY = {"source": "RAPL, CPU packages", "joules": 331.0}


@given(st.integers(0, 2**32), st.integers(662, 800), st.integers(8, 400), st.integers(1, 4))
def test_it_holds_where_99_of_100_queries_are_in_time(seed, n, fps, batch):
    # Around the limit, so that both answers come.
    times = np.random.default_rng(seed).normal(0.9, 0.05, n) * batch * 1e9 / fps
    times = times.astype(int).tolist()
    found = frame_rate(report(times, batch=batch), fps)
    late = sum(time > batch * 1e9 / fps for time in times)
    assert found.holds == (late <= len(times) // 100)
    assert found.headroom == pytest.approx(1 - found.p99_ms / found.budget_ms)
    assert found.budget_ms == pytest.approx(batch * 1000 / fps)


def test_the_answers_in_words():
    holds = describe(report(FAST, energy=ENERGY), 30)
    assert holds == (
        "a (engine): holds 30 FPS at p99, p99 10.00 ms of 33.33 ms, 70% headroom; "
        "0.5 J a frame (RAPL, CPU packages; an estimate)."
    )
    slow = describe(report(FAST), 200)
    assert "does not hold 200 FPS at p99, p99 10.00 ms of 5.00 ms, 100% too slow; energy unknown" in slow


def test_a_p99_at_the_limit_holds():
    assert frame_rate(report(FAST), 100).holds
    assert not frame_rate(report([10_000_001] * 662), 100).holds


def test_too_few_samples_give_no_answer_but_the_way_to_one():
    few = report([10_000_000] * 100)
    assert frame_rate(few, 30).holds is None
    text = describe(few, 30)
    assert "n too small to know whether it holds 30 FPS at p99, 100 queries of 662" in text
    seconds = int(text.split("--duration ")[1].split(";")[0])
    assert 6.62 < seconds <= 8


def test_invalid_measurements_give_none():
    environment = {**report([1]).environment, "throttled": ["oc1"]}
    assert "no answer for 30 FPS" in describe(report(FAST, environment=environment), 30)


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf])
def test_frame_rates_that_are_none(fps):
    with pytest.raises(BadRequest, match="--fps-target is"):
        frame_rate(report(FAST), fps)


def test_the_command_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "WARMUP_S", 0.001)
    options = ["--scope", "engine", "--duration", "0.1", "--pool-size", "2", "--threads", "1"]
    command = ["bench", str(write_artifact(tmp_path / "means")), *options, "--fps-target"]
    done = CliRunner().invoke(app, [*command, "30"])
    assert done.exit_code == 0
    assert "means (engine): holds 30 FPS at p99" in done.stdout
    assert isinstance(CliRunner().invoke(app, [*command, "0"]).exception, BadRequest)
