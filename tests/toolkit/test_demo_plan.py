"""The demo's plan: what it shows while it runs."""

from __future__ import annotations

import json

import pytest
from conftest import write_pictures

from vitkit.demo import SIZES, _expected
from vitkit.demo.plan import Plan
from vitkit.demo.training import Training, is_trained, train_side_by_side
from vitkit.runtimes.card import CARD_FILE
from vitkit.runtimes.errors import BadInput, BadRequest


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_the_time_left_starts_as_expected_and_follows_the_machine():
    clock = Clock()
    plan = Plan({"a": 100.0, "b": 200.0}, clock=clock)
    assert plan.left == pytest.approx(300)
    with plan.step("a"):
        clock.now += 400
    # Four times slower than expected: the 200 s that remain are about 800.
    assert 650 < plan.left < 800
    with plan.step("b") as progress:
        clock.now += 400
        progress(1, 2)
        assert 320 < plan.left < 400
    assert plan.left == 0
    assert plan.seconds == {"a": 400, "b": 400}


def test_every_change_is_shown_with_step_share_and_both_times():
    clock, lines = Clock(), []
    plan = Plan({"a": 60.0, "b": 60.0}, lambda plan: lines.append(str(plan)), clock)
    with plan.step("a"):
        clock.now += 60
    with plan.step("b") as progress:
        clock.now += 30
        progress(1, 2)
    assert lines[0] == "[1/2] a 0 %, 0:00 elapsed, about 2:00 left"
    assert "[2/2] b 50 %, 1:30 elapsed, about 0:30 left" in lines
    assert lines[-1].startswith("[2/2] done")


def test_a_step_that_is_not_in_the_plan_is_refused():
    with pytest.raises(KeyError), Plan({"a": 1.0}).step("b"):
        pass


@pytest.mark.parametrize("size", SIZES)
def test_what_an_earlier_demo_left_takes_no_time(size, tmp_path):
    fresh = _expected(tmp_path, SIZES[size])
    assert len(fresh) == 6
    assert all(fresh.values())
    for part in SIZES[size].work:
        (tmp_path / part.folder / "data").mkdir(parents=True)
        (tmp_path / part.folder / "run").mkdir()
        (tmp_path / part.folder / "run" / CARD_FILE).touch()
    again = _expected(tmp_path, SIZES[size])
    assert {name for name in again if again[name] != fresh[name]} == {
        "drawing images",
        "training both models",
    }
    assert again["drawing images"] == again["training both models"] == 0


def test_sizes_are_three_and_each_is_longer_than_the_one_before(tmp_path):
    totals = [sum(_expected(tmp_path, size).values()) for size in SIZES.values()]
    assert list(SIZES) == ["quick", "normal", "full"]
    assert totals == sorted(totals)
    # Of the eight minutes in which `make demo` is to end, the installation takes two.
    assert totals[1] <= 360


QUICK = {"epochs": 1, "batch_size": 8, "warmup_epochs": 0}


def test_trainings_run_at_once_and_the_slowest_is_what_is_shown(tmp_path):
    trainings = []
    for name, epochs in (("a", 1), ("b", 2)):
        write_pictures(tmp_path / name / "data")
        trainings.append(Training(tmp_path / name, "ps_vit_nano_demo", {**QUICK, "epochs": epochs}))
    shares = []
    train_side_by_side(trainings, lambda done, total: shares.append(done / total))
    assert all(is_trained(training.folder) for training in trainings)
    assert [len(json.loads((t.folder / "run/log.json").read_text())) for t in trainings] == [1, 2]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    # What is finished is not trained again.
    train_side_by_side(trainings, lambda done, total: pytest.fail("nothing is to be done"))


def test_what_a_training_raises_is_raised_and_stops_the_others(tmp_path):
    write_pictures(tmp_path / "good/data")
    long = Training(tmp_path / "good", "ps_vit_nano_demo", {**QUICK, "epochs": 10_000})
    lost = Training(tmp_path / "lost", "ps_vit_nano_demo", QUICK)
    with pytest.raises((BadRequest, BadInput), match="lost"):
        train_side_by_side([long, lost], lambda done, total: None)
    assert not is_trained(long.folder)
