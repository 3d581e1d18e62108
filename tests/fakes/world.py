"""One run on the simulated EC2: controllers that fail, die and race, agents, and a reaper.

Controllers, policies, fleet, reaper, journal and chain are production's. Each process has its own
clients, caches and faults; time passes for all of them between their turns, and also while one of
them is held up in the middle of a call.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from spotfirst import events as e
from spotfirst.errors import FleetUnavailable, StorageUnavailable
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.state import RunState
from spotfirst.storage import Storage
from spotfirst_airflow.controller import Controller, Step
from spotfirst_airflow.fleets.ec2.fleet import Ec2Fleet
from spotfirst_airflow.policies import load_policy
from spotfirst_airflow.reaping import reap
from spotfirst_airflow.submission import request_stop
from tests.fakes.agent import SimulatedAgent, Work
from tests.fakes.clients import FakeAws
from tests.fakes.cloud import Cloud, CloudInstance, Weather
from tests.fakes.faults import Died, Faults, FaultyStorage, Rates
from tests.fakes.fleet import fleet_of, forget_processes, on_demand_usd_h
from tests.fakes.memory import QuickMemory

GRACE_S = 120.0
"""How long the reaper spares an instance that nobody owns."""
REAP_EVERY_S = 60.0
SLACK_S = 600.0
"""How long an orphan may outlive the grace time: rounds of the reaper that fail, or begin late."""
_TYPES = ("g6.xlarge", "g5.xlarge")


class Process:
    """A controller process: dies at a fault, and is started again."""

    def __init__(self, world: World, name: str, rates: Rates) -> None:
        self.world, self.name = world, name
        self.faults = Faults(f"{world.seed}/{name}", rates, hold_up=lambda: world.hold_up(self))
        self.due_at = world.now
        self.busy = False
        self._lives = 0
        self._controller: Controller | None = None

    def turn(self) -> Step | None:
        """One pass when it is due. ``None``: not due, failed, or dead."""
        if self.busy or self.world.now < self.due_at:
            return None
        self.busy = True
        try:
            if self._controller is None:
                self._controller = self._start()
            step = self._controller.step()
        except (FleetUnavailable, StorageUnavailable):
            self.due_at = self.world.now + timedelta(seconds=self.world.random.uniform(1, 10))
            return None
        except Died:
            self._controller = None
            self.due_at = self.world.now + timedelta(seconds=self.world.random.uniform(1, 60))
            return None
        finally:
            self.busy = False
        self.due_at = self.world.now + timedelta(seconds=step.wait_s)
        self.world.news.extend(f"{self.name}: {line}" for line in step.news)
        return step

    def _start(self) -> Controller:
        self._lives += 1
        world, name = self.world, f"{self.name}.{self._lives}"
        storage: Any = FaultyStorage(world.storage, self.faults)
        run = Run(storage, world.spec.run_id)
        fleet = world.fleet(name, self.faults, storage)
        return Controller(run, fleet, world.policy, clock=world.clock, by=name)


class Reaper:
    """``spotfirst reap`` from a schedule: a new process each time."""

    def __init__(self, world: World, rates: Rates) -> None:
        self.world = world
        self.faults = Faults(f"{world.seed}/reaper", rates, hold_up=lambda: world.hold_up(self))
        self.due_at = world.now + timedelta(seconds=world.random.uniform(0, REAP_EVERY_S))
        self.busy = False
        self._rounds = 0

    def turn(self) -> None:
        world = self.world
        if self.busy or world.now < self.due_at:
            return
        self.busy = True
        self._rounds += 1
        name = f"reaper.{self._rounds}"
        try:
            storage: Any = FaultyStorage(world.storage, self.faults)
            fleet = world.fleet(name, self.faults, storage)
            done = reap(fleet, storage, grace_s=GRACE_S, clock=world.clock, sleep=world.clock.sleep)
            world.reaped += len(done.orphans)
        except (FleetUnavailable, StorageUnavailable, Died):
            pass
        finally:
            self.busy = False
            self.due_at = world.now + timedelta(seconds=REAP_EVERY_S)


class World:
    """A cloud, a run in a storage in memory, and the processes that look after both."""

    def __init__(
        self,
        seed: object,
        *,
        weather: Weather | None = None,
        work: Work | None = None,
        controllers: int = 1,
        rates: Rates | None = None,
        agent_rates: Rates | None = None,
        policy: str = "fallback",
        policy_options: dict[str, Any] | None = None,
        tick_s: int = 1,
        zones: int = 2,
        span_s: float = 4 * 3600.0,
        url: str = "",
        options: dict[str, Any] | None = None,
        **spec: Any,
    ) -> None:
        self.seed, self.tick_s = seed, tick_s
        self.random = random.Random(f"{seed}/world")
        region = "us-east-1"
        subnets = {f"subnet-0000000000000000{n}": f"{region}{'abc'[n]}" for n in range(zones)}
        self.cloud = Cloud(
            seed, weather=weather, types=on_demand_usd_h(region, _TYPES), subnets=subnets, region=region,
            span_s=span_s,
        )  # fmt: skip
        self.clock = self.cloud.clock
        self.work = work or Work()
        self.created_at: dict[str, datetime] = {}
        """When each entry of journal and chain was written, by its path below ``runs/``."""
        self.storage: Storage = QuickMemory(
            url or f"memory://schedules/{seed}", f"schedules/{seed}", self.clock, self.created_at
        )
        self.spec = RunSpec(
            run_id="run", created_at=self.now, command=("python", "train.py"), fleet="ec2",
            fleet_options={
                "region": region, "subnets": sorted(subnets), "instance_profile": "spotfirst",
                "queue_url": f"https://sqs.{region}.amazonaws.com/123456789012/spotfirst",
                **(options or {}),
            },
            instance_types=_TYPES, policy=policy, policy_options=policy_options or {}, **spec,
        )  # fmt: skip
        self.policy = load_policy(policy, self.spec.policy_options)  # pure: one for all processes
        self.run = create_run(self.storage, self.spec)
        self.run.journal().append(e.Created(at=self.now))
        self._journal = self.run.journal()
        self.agents: dict[str, SimulatedAgent] = {}
        self.agent_rates = agent_rates or Rates()
        self.agent_faults: list[Faults] = []
        self.news: list[str] = []
        self.reaped = 0
        self.broken: list[str] = []
        """Violated while it ran."""
        self.stop_at: datetime | None = None
        """When a user stops the run."""
        self.new_image_at: datetime | None = None
        """When AWS publishes a newer image."""
        self.template_gone_at: datetime | None = None
        """When somebody deletes all launch templates."""
        self.outage: tuple[datetime, datetime] | None = None
        """From when to when no controller runs, and no reaper."""
        self._depth = 0
        self._unowned: dict[str, datetime] = {}
        self.processes = [
            Process(self, f"controller-{n}", rates or Rates()) for n in range(controllers)
        ]
        self.reaper = Reaper(self, rates or Rates())

    @property
    def now(self) -> datetime:
        return self.cloud.clock.now

    @property
    def state(self) -> RunState:
        """What the journal says, without any fault."""
        return self._journal.refresh()

    def fleet(self, process: str, faults: Faults, storage: Storage) -> Ec2Fleet:
        """The fleet of a process that has just begun, and knows nothing."""
        aws = FakeAws(self.cloud, faults, process=f"{self.seed}/{process}")
        return fleet_of(aws, self.spec.fleet_options, self.clock, storage, by=process)

    # -- time ---------------------------------------------------------------------------------

    def tick(self) -> None:
        """Time passes, and everybody who is not held up has a turn."""
        self.cloud.tick(self.tick_s)
        for instance in list(self.cloud.instances.values()):
            if instance.is_running and self.now >= instance.running_at:
                self._agent(instance).tick()
        self._happen()
        if self.outage is None or not self.outage[0] <= self.now < self.outage[1]:
            for process in self.random.sample(self.processes, len(self.processes)):
                process.turn()
            self.reaper.turn()
        self._watch()

    def _happen(self) -> None:
        """What other people do."""
        if self.stop_at is not None and self.now >= self.stop_at:
            self.stop_at = None
            self.request_stop()
        if self.new_image_at is not None and self.now >= self.new_image_at:
            self.new_image_at = None
            self.cloud.default_image = "ami-0fedcba9876543210"
        if self.template_gone_at is not None and self.now >= self.template_gone_at:
            self.template_gone_at = None
            self.cloud.templates.clear()

    def hold_up(self, _: object) -> None:
        """Somebody is stuck in a call: the others go on."""
        if self._depth >= 2:
            return
        self._depth += 1
        try:
            for _ in range(self.random.choice((1, 2, 5, 20, 60, 150)) // self.tick_s + 1):
                self.tick()
        finally:
            self._depth -= 1

    def come_back(self) -> None:
        """The outage is over, or will not be."""
        if self.outage is not None:
            gone_at, back_at = self.outage
            self.outage = (gone_at, min(back_at, max(gone_at, self.now)))

    def is_over(self) -> bool:
        """Whether the run is final, and nothing costs money any more."""
        if any(instance.is_running for instance in self.cloud.instances.values()):
            return False
        state = self.state
        return state.is_final and not state.open_attempts

    def request_stop(self) -> None:
        """A user stops the run."""
        request_stop(self.run, reason="stopped by hand", clock=self.clock)

    def close(self) -> None:
        """Forget what production shares within a process, and the files."""
        forget_processes()
        for path, _ in list(self.storage.walk("")):
            self.storage.delete(path)

    def _agent(self, instance: CloudInstance) -> SimulatedAgent:
        agent = self.agents.get(instance.instance_id)
        if agent is None:
            faults = Faults(f"{self.seed}/{instance.instance_id}", self.agent_rates)
            self.agent_faults.append(faults)
            # Its spec is read without faults: the real agent waits until it is answered.
            agent = SimulatedAgent(instance, self.storage, self.work)
            view: Any = FaultyStorage(self.storage, faults)
            agent.see_through(view)
            self.agents[instance.instance_id] = agent
        return agent

    # -- what must hold all the time ------------------------------------------------------------

    def _watch(self) -> None:
        """Note instances that nobody owns and that are not ended in time."""
        if int(self.clock.since_start_s) % 15 >= self.tick_s:
            return
        running = self.cloud.running()
        if not running:
            return
        state = self.state
        open_tokens = {} if state.is_final else {a.token: a for a in state.open_attempts}
        per_token: Counter[str] = Counter()
        for instance in running:
            token = instance.tags["spotfirst:token"]
            per_token[token] += 1
            attempt = open_tokens.get(token)
            named = attempt.launched.instance_id if attempt and attempt.launched else None
            if attempt is not None and named in {None, instance.instance_id}:
                self._unowned.pop(instance.instance_id, None)
                continue
            since = self._unowned.setdefault(instance.instance_id, self.now)
            if (self.now - since).total_seconds() > GRACE_S + SLACK_S + self.helpless_s(instance):
                self._break(f"{instance.instance_id} runs, and since {since} nobody owns it")
        for token, count in per_token.items():
            if count > 1:
                self._break(f"{count} instances have the token {token}")

    def helpless_s(self, instance: CloudInstance) -> float:
        """How long it lived when nobody could end it: it never booted, and Airflow was away."""
        agent = self.agents.get(instance.instance_id)
        if self.outage is None or agent is None or not agent.is_dud:
            return 0.0
        begun = max(self.outage[0], instance.running_at)
        over = min(self.outage[1], instance.ends_at or self.now)
        return max(0.0, (over - begun).total_seconds())

    def _break(self, what: str) -> None:
        if what not in self.broken:
            self.broken.append(what)

    # -- figures --------------------------------------------------------------------------------

    def all_faults(self) -> Iterator[Faults]:
        yield from (process.faults for process in self.processes)
        yield self.reaper.faults
        yield from self.agent_faults

    def faults(self) -> Counter[str]:
        """What was injected so far, by kind."""
        total: Counter[str] = Counter()
        for faults in self.all_faults():
            total.update(faults.injected)
        return total

    def disarm(self) -> None:
        """From now on nothing fails."""
        for faults in self.all_faults():
            faults.armed = False
        self.agent_rates = Rates()
