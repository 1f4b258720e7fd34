"""The demo's plan: what it shows while it runs."""

from __future__ import annotations

import pytest

from vitkit.demo import SIZES, _expected
from vitkit.demo.plan import Plan


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
    assert len(fresh) == 10
    assert all(fresh.values())
    (tmp_path / "panoptic/data").mkdir(parents=True)
    again = _expected(tmp_path, SIZES[size])
    assert {name for name in again if again[name] != fresh[name]} == {"panoptic: data"}
    assert again["panoptic: data"] == 0


def test_sizes_are_three_and_each_is_longer_than_the_one_before():
    totals = [sum(sum(work.seconds) for work in size.work.values()) for size in SIZES.values()]
    assert list(SIZES) == ["quick", "normal", "full"]
    assert totals == sorted(totals)
    # Of the eight minutes in which `make demo` is to end, the installation takes two.
    assert totals[1] <= 360
