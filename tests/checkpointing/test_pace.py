"""What a checkpoint costs is measured beside it, and an outlier does not count."""

from __future__ import annotations

import pytest

from spotfirst.checkpoints.pace import Pace
from spotfirst.checkpoints.saving import Saved


class Loop:
    """A training of steps with given lengths, with a save beside some of them."""

    def __init__(self) -> None:
        self.pace = Pace()
        self.now_s = self.waited_s = 0.0
        self.saves = 0
        self.last: Saved | None = None
        self.step(0.0)

    def step(self, took_s: float, *, saving: bool = False) -> bool:
        self.now_s += took_s
        return self.pace.boundary(self.now_s, saving=saving, waited_s=self.waited_s, last=self.last)

    def quiet(self, *took_s: float) -> None:
        for each in took_s:
            self.step(each)

    def save(
        self, *beside: float, stall_s: float = 0.0, took_s: float = 60.0, new_bytes: int = 100
    ) -> None:
        """The first of the steps ``beside`` includes the stall."""
        self.saves += 1
        self.pace.begin(self.saves, stall_s=stall_s, waited_s=self.waited_s)
        for each in beside[:-1]:
            self.step(each, saving=True)
        self.last = Saved(seq=self.saves, step=self.saves, took_s=took_s, new_bytes=new_bytes)
        assert self.step(beside[-1])


def test_the_cost_is_what_the_steps_beside_a_save_take_longer() -> None:
    loop = Loop()
    loop.quiet(1.0, 1.1, 0.9)
    loop.save(1.5, 1.2, 1.0)
    assert loop.pace.cost_s == pytest.approx(0.7)


def test_it_is_the_stall_at_least() -> None:
    loop = Loop()
    loop.quiet(1.0, 1.0, 1.0)
    loop.save(0.9, stall_s=0.3)
    assert loop.pace.cost_s == pytest.approx(0.3)


def test_nothing_is_known_without_steps_to_compare_with() -> None:
    loop = Loop()
    loop.quiet(1.0)
    loop.save(1.3, stall_s=0.3, took_s=2.0)
    assert loop.pace.cost_s is None
    assert loop.pace.durable_s == 2.0


def test_waiting_before_the_optimizer_is_stall() -> None:
    loop = Loop()
    loop.quiet(1.0, 1.0, 1.0)
    loop.pace.begin(1, stall_s=0.1, waited_s=0.0)
    loop.waited_s = 0.4
    loop.last = Saved(seq=1, step=1, took_s=1.0, new_bytes=1)
    loop.step(1.0)
    assert loop.pace.cost_s == pytest.approx(0.5)


def test_it_is_no_more_than_the_stall_and_the_time_of_the_save() -> None:
    loop = Loop()
    loop.quiet(1.0, 1.0, 1.0)
    loop.save(61.0, stall_s=0.1, took_s=0.5)  # a minute of evaluation
    assert loop.pace.cost_s == pytest.approx(0.6)


def test_one_odd_save_does_not_change_the_cost() -> None:
    loop = Loop()
    loop.quiet(1.0, 1.0, 1.0)
    for beside in (1.2, 1.2, 31.0, 1.2):
        loop.save(beside)
    assert loop.pace.cost_s == pytest.approx(0.2)


def test_quick_steps_beside_a_save_make_no_negative_cost() -> None:
    loop = Loop()
    loop.quiet(1.0, 1.0, 1.0)
    loop.save(0.5)
    assert loop.pace.cost_s == 0.0


def test_a_save_that_failed_is_no_measurement() -> None:
    loop = Loop()
    loop.quiet(1.0, 1.0, 1.0)
    loop.pace.begin(9, stall_s=0.1, waited_s=0.0)
    assert not loop.step(5.0)
    assert loop.pace.cost_s is None
    assert loop.pace.estimate is None


def test_standing_still_on_purpose_is_no_step() -> None:
    loop = Loop()
    loop.quiet(1.0, 1.0, 1.0)
    loop.pace.pause()
    loop.quiet(500.0, 1.0)
    loop.save(1.2)
    assert loop.pace.cost_s == pytest.approx(0.2)


def test_the_next_save_is_expected_to_have_the_new_bytes_of_the_last() -> None:
    loop = Loop()
    loop.save(1.0, took_s=60.0, new_bytes=6_000)  # everything is new
    loop.save(1.0, took_s=0.5, new_bytes=10)  # only an adapter has changed
    estimate = loop.pace.estimate
    assert estimate is not None
    assert (estimate.new_bytes, estimate.took_s) == (10, 0.5)


def test_a_lucky_last_save_is_not_believed() -> None:
    loop = Loop()
    for took_s in (2.0, 2.0, 0.5):
        loop.save(1.0, took_s=took_s, new_bytes=1_000)
    estimate = loop.pace.estimate
    assert estimate is not None
    assert estimate.took_s == pytest.approx(1.5)
    assert loop.pace.durable_s == 2.0
