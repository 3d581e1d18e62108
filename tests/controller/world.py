"""A small world for controllers: a clock that is stepped, a fleet, and instances that train.

Everything that decides is real (controller, policies, journal, chain, costs). What is simulated
is what cannot be stepped: machines. Faults come from a seeded source, at every call:
*applied, but the answer was lost*; *not applied*; *the controller died here*.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import msgspec

from spotfirst import events as e
from spotfirst.agent.limits import Purse
from spotfirst.agent.stopping import Watch
from spotfirst.checkpoints.chain import CheckpointChain
from spotfirst.checkpoints.restoring import crashed_with
from spotfirst.errors import (
    ClaimLost,
    FleetError,
    FleetUnavailable,
    NoCapacity,
    StorageUnavailable,
)
from spotfirst.heartbeat import ExitReport, Handover, Heartbeat, Progress, Timings
from spotfirst.market import Market, Notice, Pool
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import Storage, open_storage
from spotfirst_airflow.controller import Controller, Step
from spotfirst_airflow.fleets import Instance, InstanceState, LaunchRequest, Offer
from spotfirst_airflow.policies import Policy, load_policy

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
ON_DEMAND_USD_H = Decimal("1.00")
SPOT_USD_H = Decimal("0.30")
NOTICE_S = 120.0
BOOT_S = 10.0
GUARD_S = 20.0
LINGER_S = 30.0

_names = itertools.count()


class Died(BaseException):
    """The controller process is gone, right here."""


class Faults:
    """Draws a fault per call. ``rate`` 0 is a calm world; the same seed is the same story."""

    def __init__(
        self, seed: int = 0, *, lost: float = 0.0, refused: float = 0.0, died: float = 0.0
    ) -> None:
        self._random = random.Random(seed)
        self._rates = (lost, refused, died)
        self.injected = 0
        self.armed = True

    def around(self, action: Any, unavailable: type[Exception]) -> Any:
        if not self.armed:
            return action()
        draw, (lost, refused, died) = self._random.random(), self._rates
        if draw < refused:
            self.injected += 1
            raise unavailable("not applied")
        result = action()
        if draw > 1 - lost:
            self.injected += 1
            raise unavailable("applied, but the answer was lost")
        if draw > 1 - lost - died:
            self.injected += 1
            raise Died
        return result


class FaultyStorage:
    """The controller's view of a storage, with faults at every read and write."""

    def __init__(self, inner: Storage, faults: Faults) -> None:
        self._inner, self._faults = inner, faults
        self.url, self.keys = inner.url, inner.keys

    def child(self, path: str) -> FaultyStorage:
        return FaultyStorage(self._inner.child(path), self._faults)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._inner, name)
        return lambda *args, **more: self._faults.around(
            lambda: call(*args, **more), StorageUnavailable
        )


class World:
    """One run, its fleet and its clock. ``capacity`` says which zones have spot now.

    ``way_usd_gb``: by zone, what a GB costs that is read there from the storage, and written to it.
    Each checkpoint has ``checkpoint_bytes``, of which ``new_bytes`` are written.
    ``refuses``: by market, the error that every launch there ends with; ``refused`` has them.
    ``powers_off``: instances end themselves with their agent. ``poisoned`` are steps with whose
    checkpoints every attempt crashes at once, after a commit of the same step if ``logs_first``.
    A checkpoint takes ``checkpoint_s``, and a notice comes ``notice_s`` before the end.
    ``spot_usd_h`` is what spot costs that is launched now.
    """

    def __init__(
        self,
        *,
        total_steps: int = 60,
        checkpoint_every: int = 10,
        policy: str | Policy = "fallback",
        policy_options: Mapping[str, Any] | None = None,
        faults: Faults | None = None,
        **spec: Any,
    ) -> None:
        self.now = START
        self.faults = faults or Faults()
        self.total_steps, self.checkpoint_every = total_steps, checkpoint_every
        self.capacity = {"zone-a": True, "zone-b": True}
        self.on_demand = True
        self.refused: list[tuple[datetime, Market]] = []
        self.refuses: dict[Market, FleetError] = {}
        self.powers_off = True
        self.poisoned: set[int] = set()
        self.logs_first = False
        self.checkpoint_s, self.notice_s, self.spot_usd_h = 0.0, NOTICE_S, SPOT_USD_H
        self.way_usd_gb: dict[str, tuple[Decimal, Decimal]] = {}
        self.checkpoint_bytes = self.new_bytes = 0
        self.machines: dict[str, Machine] = {}
        self.buried: set[str] = set()
        self.storage = open_storage(f"memory://world-{next(_names)}")
        self.spec = RunSpec(
            run_id="run", created_at=START, command=("python", "train.py"), fleet="fake",
            policy=policy if isinstance(policy, str) else "fallback",
            policy_options=dict(policy_options or {}), heartbeat_s=5.0, **spec,
        )  # fmt: skip
        self.run = create_run(self.storage, self.spec)
        self.run.journal().append(e.Created(at=START))
        self.policy: Policy = (
            load_policy(policy, self.spec.policy_options) if isinstance(policy, str) else policy
        )
        self.controllers = [self.new_controller()]
        self.news: list[str] = []

    def clock(self) -> datetime:
        return self.now

    def new_controller(self) -> Controller:
        while True:
            try:
                run = Run(FaultyStorage(self.storage, self.faults), "run")
                return Controller(run, self.new_fleet(), self.policy, clock=self.clock, by="test")
            except (Died, StorageUnavailable):
                continue

    def new_fleet(self) -> FakeFleet:
        return FakeFleet(self)

    # -- time ---------------------------------------------------------------------------------

    def tick(self, seconds: float = 1.0) -> None:
        """Let time pass for all machines, a second at a time."""
        for _ in range(int(seconds)):
            self.now += timedelta(seconds=1)
            for machine in list(self.machines.values()):
                machine.tick()

    def reconcile(self, index: int = 0) -> Step | None:
        """One pass of a controller; ``None`` when it failed or died (a new one takes its place)."""
        try:
            step = self.controllers[index].step()
        except (FleetUnavailable, StorageUnavailable):
            return None
        except Died:
            self.controllers[index] = self.new_controller()
            return None
        self.news.extend(step.news)
        return step

    def until_done(self, *, limit_s: float = 3000) -> Step:
        """Reconcile and tick until the run is done."""
        for _ in range(int(limit_s)):
            for index in range(len(self.controllers)):
                step = self.reconcile(index)
                if step is not None and step.done:
                    return step
            self.tick()
        raise AssertionError("not done within the limit:\n" + "\n".join(self.news))

    # -- what happens to machines -------------------------------------------------------------

    def alive(self) -> list[Machine]:
        return [m for m in self.machines.values() if m.ended_at is None]

    def trainer(self) -> Machine:
        return next(m for m in reversed(self.alive()) if m.phase == "training")

    def trainer_step(self) -> int:
        return max((m.progress.step or 0 for m in self.alive()), default=0)

    def way(self, zone: str) -> dict[str, Decimal]:
        read, write = self.way_usd_gb.get(zone, (Decimal(0), Decimal(0)))
        return {"read_usd_gb": read, "write_usd_gb": write}

    def interrupt(self, machine: Machine, *, notice: bool = True) -> None:
        if notice:
            when = self.now + timedelta(seconds=self.notice_s)
            machine.notice = Notice(kind="interruption", seen_at=self.now, time=when)
        else:
            machine.die("fleet")

    def truth_usd(self) -> Decimal:
        """The fleet's own bill."""
        total = Decimal(0)
        for machine in self.machines.values():
            used_s = ((machine.ended_at or self.now) - machine.started_at).total_seconds()
            spot = machine.request.market is Market.SPOT
            if spot and machine.ended_by == "fleet" and used_s < 3600:
                continue
            total += (Decimal(repr(used_s)) * machine.price_usd_h / 3600).quantize(
                Decimal("0.0001"), ROUND_HALF_UP
            )
        return total

    def truth_commits(self) -> list[int]:
        return [commit.step for _, commit in self.run.chain().refresh().commits]


class Machine:
    """An instance with its agent and trainer: boots, claims, trains a step per second.

    Its agent keeps deadline and budget by itself, as the real one does: by the same ``Purse`` and
    ``Watch``.
    """

    def __init__(self, world: World, request: LaunchRequest) -> None:
        self.world, self.request = world, request
        self.run = Run(world.storage, request.run_id)
        self.started_at = world.now
        spot = request.market is Market.SPOT
        self.price_usd_h = world.spot_usd_h if spot else ON_DEMAND_USD_H
        self.ended_at: datetime | None = None
        self.ended_by: str | None = None
        self.notice: Notice | None = None
        self.phase = "booting"
        self.progress = Progress(total_steps=world.total_steps)
        self.beat = 0
        self.crash: int | None = None
        self.mute = False
        self.exited = False
        self.chain = CheckpointChain(self.run.storage, clock=world.clock)
        self._spec = self.run.spec()
        self._purse = Purse(self.run, request.attempt, self._spec, clock=world.clock)
        self._purse_at = world.now + timedelta(seconds=BOOT_S)
        self._saving_until: datetime | None = None

    def die(self, by: str) -> None:
        if self.ended_at is None:
            self.ended_at, self.ended_by = self.world.now, by

    def exit(self, cause: e.EndCause, code: int | None = None, message: str = "") -> None:
        self.run.report_exit(
            ExitReport(
                attempt=self.request.attempt, at=self.world.now, cause=cause, exit_code=code,
                message=message, progress=self.progress, log_tail=("last words",),
            )
        )  # fmt: skip
        self.exited, self.phase = True, "exited"
        self._beat()
        if self.notice is None and self.world.powers_off:
            self.die("itself")

    def tick(self) -> None:
        if self.ended_at is not None:
            return
        if self.notice and self.notice.time and self.world.now >= self.notice.time:
            self.die("fleet")
            return
        if self.exited:
            self._linger()
            return
        try:
            self._act()
        except ClaimLost:
            self.exit("handed_over")
            return
        self._beat()

    def _act(self) -> None:
        number, age_s = self.request.attempt, (self.world.now - self.started_at).total_seconds()
        if age_s < BOOT_S:
            return
        if self._ends_by_guard():
            return
        if self._saving_until is not None and self.world.now < self._saving_until:
            return
        is_to_stop = self._is_to_stop()
        if self.phase == "draining":
            self._commit()
            self.chain.release(number)
            self.exit("interrupted" if self.notice else "handed_over")
        elif self.phase == "training":
            if self._saving_until is not None:
                self._saving_until = None
                self._commit()
            if self.run.handover(number) is not None or is_to_stop:
                self.phase = "draining"
                self._save()
            else:
                self._train()
        elif is_to_stop:
            self.exit("handed_over")
        else:
            self.phase = "standby"
            self._claim(number)

    def _watch(self) -> Watch:
        return Watch(
            booted=self.started_at, life_ends=self.started_at + timedelta(days=1),
            deadline=self._spec.deadline, budget_ends=self._purse.empty_at,
            checkpoint_s=self._purse.checkpoint_s,
        )  # fmt: skip

    def _linger(self) -> None:
        """An interrupted one is left to the fleet, while the budget pays for it."""
        if self.notice is None or self.notice.time is None:
            return
        self._is_to_stop()  # it goes on looking
        empty_at = self._purse.empty_at
        is_late = self.world.now >= self.notice.time + timedelta(seconds=LINGER_S)
        if is_late or (empty_at is not None and self.world.now >= empty_at):
            self.die("itself")

    def _is_to_stop(self) -> bool:
        """Whether its agent ends it, for the deadline or the budget."""
        if self._purse.is_watched and self.world.now >= self._purse_at:
            self._purse_at = self.world.now + timedelta(seconds=self._purse.look())
        return self._watch().stop(self.world.now, self.progress, 1.0) is not None

    def _ends_by_guard(self) -> bool:
        """Whether the last checkpoint took so long that the guard has ended everything."""
        ends = self._watch().run_ends(self.progress, 1.0)
        if ends is None or self.world.now < ends + timedelta(seconds=GUARD_S):
            return False
        self.die("itself")
        return True

    def _claim(self, number: int) -> None:
        self.chain.refresh()
        holder = self.chain.holder
        if holder is not None and not self.chain.released and holder != number:
            state = self.run.journal().refresh()
            ended = holder <= len(state.attempts) and state.attempt(holder).ended is not None
            if not ended and self.run.exit_report(holder) is None:
                ask = Handover(reason="replaced", at=self.world.now, to=number)
                self.run.request_handover(holder, ask)
                return
        self.chain.claim(number)
        crashed = crashed_with(self.run, self.chain)
        commits = [commit for commit in self.chain.commits if commit[0] not in crashed]
        seq, step = (commits[-1][0], commits[-1][1].step) if commits else (None, 0)
        self.phase = "training"
        self._tell(
            start_step=step, step=step, restored_seq=seq,
            timings=Timings(first_step=self.world.now),
        )  # fmt: skip
        if seq is not None and step in self.world.poisoned:
            if self.world.logs_first:
                self._commit()
            self.exit("script_failed", 1, "the command exited with 1")

    def _train(self) -> None:
        if (self.progress.step or 0) >= self.world.total_steps:
            self.exit("completed", 0)  # it was drained after its last step
            return
        step = (self.progress.step or 0) + 1
        timings = msgspec.structs.replace(self.progress.timings, last_step=self.world.now)
        self._tell(step=step, timings=timings)
        if self.crash is not None and step - (self.progress.start_step or 0) >= self.crash:
            self.exit("script_failed", 1, "the command exited with 1")
        elif step >= self.world.total_steps:
            self._commit()
            self.exit("completed", 0)
        elif step % self.world.checkpoint_every == 0:
            self._save()

    def _save(self) -> None:
        """Checkpoint now, or begin to."""
        if self.world.checkpoint_s and self.progress.step != self.progress.checkpoint_step:
            self._saving_until = self.world.now + timedelta(seconds=self.world.checkpoint_s)
        elif self.phase == "training":
            self._commit()
        else:
            self._act()

    def _commit(self) -> None:
        step = self.progress.step or 0
        seq = self.chain.commit(
            self.request.attempt, step=step, manifest="m", digest="d", content="state",
            size_bytes=self.world.checkpoint_bytes, new_bytes=self.world.new_bytes,
        )  # fmt: skip
        self._tell(checkpoint_step=step, checkpoint_seq=seq)
        if self.world.checkpoint_s:
            self._tell(checkpoint_s=self.world.checkpoint_s)

    def _tell(self, **changes: Any) -> None:
        self.progress = msgspec.structs.replace(self.progress, **changes)

    def _beat(self) -> None:
        if self.mute:
            return
        self.beat += 1
        self.run.beat(
            Heartbeat(
                attempt=self.request.attempt, beat=self.beat, at=self.world.now, phase=self.phase,
                progress=self.progress, notice=self.notice,
            )
        )  # fmt: skip


class FakeFleet:
    """The controller's view of the world's machines, with faults at every call."""

    def __init__(self, world: World) -> None:
        self._world = world

    def check(self, spec: RunSpec) -> None: ...

    def offers(self, instance_types: Sequence[str]) -> list[Offer]:
        world = self._world
        spot = [
            Offer(
                pool=Pool(instance_type="gpu", zone=zone), market=Market.SPOT,
                price_usd_h=world.spot_usd_h, price_source="test", price_at=world.now, available=up,
                **world.way(zone),
            )
            for zone, up in world.capacity.items()
        ]  # fmt: skip
        on_demand = Offer(
            pool=Pool(instance_type="gpu", zone="zone-a"), market=Market.ON_DEMAND,
            price_usd_h=ON_DEMAND_USD_H, price_source="test", price_at=world.now,
            available=world.on_demand, **world.way("zone-a"),
        )  # fmt: skip
        return [*spot, on_demand]

    def launch(self, request: LaunchRequest) -> Instance:
        def apply() -> Instance:
            world = self._world
            if request.token not in world.machines:
                spot = request.market is Market.SPOT
                if (refusal := world.refuses.get(request.market)) is not None:
                    world.refused.append((world.now, request.market))
                    raise refusal
                if request.token in world.buried or (
                    not world.capacity[request.pool.zone] if spot else not world.on_demand
                ):
                    raise NoCapacity(f"no {request.market} capacity in {request.pool}")
                world.machines[request.token] = Machine(world, request)
            return self._instance(request.token)

        return self._world.faults.around(apply, FleetUnavailable)

    def describe(self, tokens: Collection[str]) -> dict[str, Instance]:
        known = [token for token in tokens if token in self._world.machines]
        return self._world.faults.around(
            lambda: {token: self._instance(token) for token in known}, FleetUnavailable
        )

    def terminate(self, tokens: Collection[str]) -> None:
        def apply() -> None:
            for token in tokens:
                self._world.buried.add(token)
                if token in self._world.machines:
                    self._world.machines[token].die("request")

        self._world.faults.around(apply, FleetUnavailable)

    def owned(self) -> list[Instance]:
        return [self._instance(m.request.token) for m in self._world.alive()]

    def _instance(self, token: str) -> Instance:
        machine = self._world.machines[token]
        return Instance(
            token=token, instance_id=f"i-{machine.request.attempt}", market=machine.request.market,
            state=InstanceState.TERMINATED if machine.ended_at else InstanceState.RUNNING,
            pool=machine.request.pool, started_at=machine.started_at,
            price_usd_h=machine.price_usd_h, price_source="test",
            on_demand_usd_h=ON_DEMAND_USD_H, notice=machine.notice, ended_at=machine.ended_at,
            ended_by=machine.ended_by, **self._world.way(machine.request.pool.zone),
        )  # fmt: skip
