"""One run, played from its beginning to its end, from one event to the next.

The clock never ticks: it goes to the next moment at which anything can be different (an end, a
price, a moment that the policy named), so a quiet market costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Literal

from spotfirst import events as e
from spotfirst.market import Market, Notice
from spotfirst.state import Attempt, RunState
from spotfirst_airflow.asking import ask, carry_usd, open_usd, why_not_begin
from spotfirst_airflow.costs import bill, egress_usd
from spotfirst_airflow.fleets import Offer
from spotfirst_airflow.policies import Decision, Policy, View, Work
from spotfirst_airflow.simulation.task import Played, Task
from spotfirst_airflow.simulation.world import Place, World

__all__ = ["EPOCH", "simulate"]

EPOCH = datetime(2026, 1, 1, tzinfo=timezone.utc)
"""When simulated runs begin, unless something else is said."""
_SOON_S = 1.0
"""How long after a refusal the same pool may be asked again, whatever a policy thinks."""
_LONGEST_WAIT_S = 600.0
_LONGEST_DEADLINES = 10.0
"""A run without a deadline is given up after so many times its work and a month."""


def simulate(
    task: Task, world: World, policy: Policy, *, start_s: float = 0.0, epoch: datetime = EPOCH
) -> Played:
    """Play ``task`` in ``world`` from the market's second ``start_s`` on, decided by ``policy``."""
    return _Run(task, world, policy, start_s=start_s, epoch=epoch).play()


@dataclass
class _Live:
    """An instance. It trains from ``ready_s`` on, is short of capacity at ``short_s``."""

    number: int
    place: Place
    market: Market
    started_s: float
    ready_s: float
    short_s: float
    ends_s: float
    restored_bytes: int = 0
    done_at_start_s: float = 0.0
    trains_since_s: float | None = None
    is_leaving: bool = False


class _Run:
    def __init__(
        self, task: Task, world: World, policy: Policy, *, start_s: float, epoch: datetime
    ) -> None:
        self._task, self._world, self._policy = task, world, policy
        self._start_s, self._epoch = start_s, epoch
        self._now_s = 0.0
        self._done_s = 0.0
        self._idle_since_s = 0.0
        self._state = RunState()
        self._trainer: _Live | None = None
        self._successor: _Live | None = None
        self._checkpoint_region = ""
        self._refused_at: dict[object, float] = {}
        self._offers: tuple[Offer, ...] = ()
        self._offers_until_s = -1.0
        deadline_s = task.deadline_s
        self._deadline = None if deadline_s is None else self._at(deadline_s)
        self._horizon_s = (
            deadline_s
            if deadline_s is not None
            else _LONGEST_DEADLINES * task.work_s + 30 * 24 * 3600.0
        )

    def play(self) -> Played:
        self._append(e.Created(at=self._at(0.0)))
        finished_s: float | None = None
        while True:
            self._settle()
            if self._left_s() <= 1e-9:
                finished_s = self._now_s
                self._end_all("completed")
                self._append(
                    e.Succeeded(at=self._at(self._now_s), attempt=self._state.attempts[-1].number)
                )
                break
            if self._now_s >= self._horizon_s:
                self._end_all("handed_over")
                self._append(e.Stopped(at=self._at(self._now_s), reason="the deadline has passed"))
                break
            until_s = self._ask()
            if until_s is None:
                self._now_s += self._task.shutdown_s if self._trainer is not None else 0.0
                self._end_all("handed_over")
                break
            self._go_on(until_s)
        now = self._at(self._now_s)
        late = self._deadline is not None and finished_s is None and self._state.stop is None
        return Played(
            state=self._state,
            bill=bill(self._state, now=now, frozen_prices=self._world.frozen_prices),
            started_at=self._epoch,
            finished_s=finished_s,
            is_late=late,
        )

    # -- what happens by itself -------------------------------------------------------------

    def _go_on(self, until_s: float) -> None:
        """Let time pass until the next moment at which something happens, or ``until_s``."""
        moments = [until_s, self._horizon_s]
        if (trainer := self._trainer) is not None:
            moments += [trainer.short_s, trainer.ends_s]
            begins_s = max(trainer.ready_s, self._now_s)
            moments += [trainer.ready_s] if trainer.ready_s > self._now_s else []
            moments.append(begins_s + self._left_s())
        if (successor := self._successor) is not None:
            moments += [successor.short_s, successor.ends_s, successor.ready_s]
        next_s = min(moment for moment in moments if moment > self._now_s)
        if trainer is not None:
            self._train(trainer, next_s)
        self._now_s = next_s

    def _train(self, live: _Live, until_s: float) -> None:
        begins_s = max(self._now_s, live.ready_s)
        if until_s > begins_s:
            if live.trains_since_s is None:
                live.trains_since_s, live.done_at_start_s = begins_s, self._done_s
            left_s = self._left_s()
            trained_s = until_s - begins_s
            # Rounding must not leave a nanosecond of work for ever.
            self._done_s = (
                self._task.work_s if trained_s >= left_s - 1e-6 else self._done_s + trained_s
            )

    def _settle(self) -> None:
        """Notices, ends and handovers that are due now."""
        for live in (self._trainer, self._successor):
            if live is None:
                continue
            if live.short_s <= self._now_s < live.ends_s:
                self._notice(live)
            elif live.ends_s <= self._now_s:
                self._lose(live)
        successor = self._successor
        if successor is not None and successor.ready_s <= self._now_s:
            if self._trainer is not None:
                self._end(self._trainer, "handed_over")
            self._trainer, self._successor = successor, None
            self._keep_checkpoints_in(successor.place)

    def _notice(self, live: _Live) -> None:
        now = self._at(self._now_s)
        live.short_s, live.is_leaving = math.inf, True
        notice = Notice(kind="interruption", seen_at=now, time=self._at(live.ends_s))
        self._append(e.Noticed(at=now, attempt=live.number, notice=notice))

    def _lose(self, live: _Live) -> None:
        """An instance is gone; without a notice, also what it had not written yet."""
        period_s = self._task.checkpoint_period_s
        if self._task.notice_s <= 0 < period_s and live.trains_since_s is not None:
            self._done_s -= (self._done_s - live.done_at_start_s) % period_s
        self._end(live, "interrupted", by_fleet=True)
        if live is self._trainer:
            self._trainer, self._successor = self._successor, None
            if self._trainer is not None:
                self._keep_checkpoints_in(self._trainer.place)
        else:
            self._successor = None

    def _end_all(self, cause: e.EndCause) -> None:
        for live in (self._trainer, self._successor):
            if live is not None:
                self._end(live, cause)
        self._trainer = self._successor = None

    def _end(self, live: _Live, cause: e.EndCause, *, by_fleet: bool = False) -> None:
        now = self._at(self._now_s)
        began_s = live.trains_since_s
        trained = began_s is not None
        timeline: tuple[tuple[datetime, Decimal], ...] = ()
        if not self._world.frozen_prices and live.market is Market.SPOT:
            prices = live.place.prices(self._start_s + live.started_s, self._start_s + self._now_s)
            timeline = tuple((self._at(at - self._start_s), price) for at, price in prices)
        self._append(
            e.Ended(
                at=now, attempt=live.number, cause=cause, ended_at=now,
                by_fleet=by_fleet and self._world.first_hour_free,
                start_step=int(live.done_at_start_s) if trained else None,
                step=int(self._done_s) if trained else None,
                checkpoint_step=int(self._done_s) if trained else None,
                total_steps=int(self._task.work_s) if trained else None,
                training_s=self._now_s - began_s if began_s is not None else 0.0,
                startup_s=(began_s if began_s is not None else self._now_s) - live.started_s,
                restored_bytes=live.restored_bytes,
                price_timeline=timeline,
            )
        )  # fmt: skip
        self._idle_since_s = self._now_s

    # -- what is decided --------------------------------------------------------------------

    def _ask(self) -> float | None:
        """Ask the policy and do what it says; until when that holds. ``None`` ends the run."""
        spent_usd, stop_s = self._money()
        if stop_s <= self._now_s:
            return None
        trainer = self._trainer
        current = None
        if trainer is not None:
            if self._successor is not None or (
                trainer.ready_s > self._now_s and not trainer.is_leaving
            ):
                return stop_s
            current = None if trainer.is_leaving else self._state.attempt(trainer.number)
        budget, shutdown_s = self._task.budget, self._task.shutdown_s
        while True:
            view = self._view(current, spent_usd)
            if trainer is None and (
                why := why_not_begin(self._policy, budget, view, shutdown_s=shutdown_s)
            ):
                self._stop(why, "budget")
                return None
            decision = ask(self._policy, view, budget=budget, shutdown_s=shutdown_s)
            if decision.stop:
                self._stop(decision.reason, "policy")
                return None
            if decision.offer is None:
                return min(stop_s, self._until_s(decision))
            if self._launch(decision, decision.offer):
                _, stop_s = self._money()  # with one more instance it comes sooner
                return stop_s if stop_s > self._now_s else None
            key = (decision.offer.pool, decision.offer.market)
            if self._refused_at.get(key) == self._now_s:
                return min(stop_s, self._now_s + _SOON_S)
            self._refused_at[key] = self._now_s

    def _money(self) -> tuple[Decimal, float]:
        """What is spent, with what an end takes; and when the budget asks to stop, if it does."""
        budget = self._task.budget
        if budget is None:
            return Decimal(0), math.inf
        spent_usd = bill(self._state, now=self._at(self._now_s)).total_usd + self._open_egress_usd()
        shutdown_usd = open_usd(self._state, self._task.shutdown_s)
        why = budget.why_stop(
            spent_usd=spent_usd, committed_usd=Decimal(0), shutdown_usd=shutdown_usd
        )
        rate_usd_h = open_usd(self._state, 3600.0)
        if why and rate_usd_h:
            self._stop(why, "budget")
            return spent_usd, self._now_s
        if budget.on_budget == "alert" or not rate_usd_h:
            return spent_usd, math.inf
        left_h = float((budget.usd - spent_usd - shutdown_usd) / rate_usd_h)
        return spent_usd + shutdown_usd, self._now_s + max(left_h * 3600.0, 1e-3)

    def _stop(self, reason: str, cause: Literal["budget", "policy"]) -> None:
        self._append(e.StopRequested(at=self._at(self._now_s), reason=reason, cause=cause))

    def _until_s(self, decision: Decision) -> float:
        until_s = self._offers_until_s
        if decision.until is not None:
            until_s = min(until_s, (decision.until - self._epoch).total_seconds())
        elif self._trainer is None:  # a policy that does not say for how long it waits
            until_s = min(until_s, self._now_s + _LONGEST_WAIT_S)
        return max(until_s, self._now_s + 1e-3)

    def _view(self, current: Attempt | None, spent_usd: Decimal) -> View:
        left_s = self._left_s()
        now = self._at(self._now_s)
        if self._now_s >= self._offers_until_s:
            self._see(now)
        return View(
            now=now,
            idle_since=now if self._trainer is not None else self._at(self._idle_since_s),
            offers=self._offers,
            attempts=self._state.attempts,
            current=current,
            deadline=self._deadline,
            work=Work(likely_s=left_s, most_s=left_s),
            changeover_s=self._task.changeover_s,
            at_risk_s=self._task.checkpoint_period_s if self._task.notice_s <= 0 else 0.0,
            spent_usd=spent_usd,
            checkpoint_bytes=self._task.checkpoint_bytes,
            carry_usd=carry_usd(self._offers, self._task.checkpoint_bytes),
            began=self._epoch,
            done_share=self._done_s / self._task.work_s,
        )

    def _see(self, now: datetime) -> None:
        world, market_s = self._world, self._start_s + self._now_s
        end_s = self._start_s + self._horizon_s
        self._offers = tuple(
            offer
            for place in world.places
            for offer in place.offers(
                market_s, now, shows=world.shows, read_usd_gb=self._read_usd_gb(place)
            )
        )
        self._offers_until_s = (
            min(
                place.next_change(market_s, until_s=end_s, price_only=not world.shows)
                for place in world.places
            )
            - self._start_s
        )

    def _read_usd_gb(self, place: Place) -> Decimal:
        """The checkpoints lie where the run trained last, and were written there."""
        here = self._checkpoint_region
        if not here or here == place.region:
            return Decimal(0)
        return self._world.egress_usd_gb(here, place.region)

    def _open_egress_usd(self) -> Decimal:
        """What the instances that are there have read: the bill has it from their end on."""
        found = Decimal(0)
        for live in (self._trainer, self._successor):
            launched = self._state.attempt(live.number).launched if live else None
            if live and launched:
                read_bytes = live.restored_bytes
                found += egress_usd(launched, read_bytes=read_bytes, written_bytes=0)
        return found

    def _keep_checkpoints_in(self, place: Place) -> None:
        if place.region != self._checkpoint_region:
            self._checkpoint_region = place.region
            self._offers_until_s = -1.0  # it is elsewhere now that they have to be brought to

    def _launch(self, decision: Decision, offer: Offer) -> bool:
        """Whether there was an instance to be had."""
        place, number = self._world.by_pool[offer.pool], len(self._state.attempts) + 1
        now, market_s = self._at(self._now_s), self._start_s + self._now_s
        token = str(number)
        self._append(
            e.Launching(
                at=now, attempt=number, token=token, market=offer.market, pool=offer.pool,
                reason=decision.reason,
            )
        )  # fmt: skip
        there, price = place.at(market_s)
        is_spot = offer.market is Market.SPOT
        if is_spot and not there:
            self._append(
                e.NotLaunched(at=now, attempt=number, cause="no_capacity", message="no capacity")
            )
            return False
        self._append(
            e.Launched(
                at=now, attempt=number, instance_id=token, started_at=now,
                price_usd_h=price if is_spot else place.on_demand_usd_h, price_source="simulated",
                price_at=now, on_demand_usd_h=place.on_demand_usd_h,
                read_usd_gb=self._read_usd_gb(place),
            )
        )  # fmt: skip
        short_s = (
            place.next_shortage(market_s, until_s=self._start_s + self._horizon_s) - self._start_s
            if is_spot
            else math.inf
        )
        live = _Live(
            number=number, place=place, market=offer.market, started_s=self._now_s,
            ready_s=self._now_s + self._task.changeover_s, short_s=short_s,
            ends_s=short_s + self._task.notice_s,
            restored_bytes=self._task.checkpoint_bytes if self._done_s else 0,
        )  # fmt: skip
        if self._trainer is None:
            self._trainer = live
            self._keep_checkpoints_in(place)
        elif self._task.overlaps:
            self._successor = live
        else:
            self._end(self._trainer, "handed_over")
            self._trainer = live
            self._keep_checkpoints_in(place)
        return True

    # -- small ------------------------------------------------------------------------------

    def _left_s(self) -> float:
        return max(0.0, self._task.work_s - self._done_s)

    def _at(self, time_s: float) -> datetime:
        return self._epoch + timedelta(seconds=time_s)

    def _append(self, event: e.Event) -> None:
        self._state = self._state.apply(event)
