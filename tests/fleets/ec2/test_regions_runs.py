"""Whole runs over two regions of a simulated AWS, with production's controller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from spotfirst import events as e
from spotfirst.errors import FleetUnavailable, StorageUnavailable
from spotfirst.run import create_run
from spotfirst.spec import RunSpec
from spotfirst.state import Phase, RunState
from spotfirst.storage import open_storage
from spotfirst_airflow.controller import Controller
from spotfirst_airflow.costs import bill
from spotfirst_airflow.policies import load_policy
from tests.fakes.agent import SimulatedAgent, Work
from tests.fakes.cloud import CloudInstance
from tests.fakes.faults import Died, Faults, Rates
from tests.fakes.fleet import forget_processes
from tests.fleets.ec2.tworegions import HERE, THERE, TYPE, Regions

GB = 10**9
WAY = Decimal("0.02")


class World:
    """A run, its controller, and the agents of all its instances."""

    def __init__(self, name: str, *, rates: Rates | None = None, **spec: Any) -> None:
        self.aws = Regions()
        self.name = name
        self.faults = {
            region: Faults(f"{name}/{region}", rates or Rates()) for region in self.aws.clouds
        }
        for region, faults in self.faults.items():
            self.aws.faults[region].around = faults.around  # type: ignore[method-assign]
        self.storage = open_storage(f"memory://regions/{name}")
        self.run = create_run(
            self.storage,
            RunSpec(
                run_id="run", created_at=self.aws.clock.now, command=("train",), fleet="ec2",
                instance_types=(TYPE,), policy="fallback", **spec,
            ),
        )  # fmt: skip
        self.run.journal().append(e.Created(at=self.aws.clock.now))
        self.agents: dict[str, SimulatedAgent] = {}
        self.work = Work(total_steps=100, checkpoint_bytes=30 * GB, new_bytes=4 * GB)
        self.lives = 0
        self.controller = self.start()
        self.per_token: Counter[str] = Counter()

    def start(self) -> Controller:
        """A controller's process, that knows nothing."""
        self.lives += 1
        fleet = self.aws.fleet(f"{self.name}/{self.lives}")
        return Controller(
            self.run, fleet, load_policy("fallback", {}), clock=self.aws.clock, by="test"
        )

    def tick(self) -> bool:
        """A second; whether the run is over."""
        self.aws.tick()
        for cloud in self.aws.clouds.values():
            for instance in list(cloud.instances.values()):
                self._agent(instance)
        running = [i for found in self.aws.running().values() for i in found]
        for token, count in Counter(i.tags["spotfirst:token"] for i in running).items():
            self.per_token[token] = max(self.per_token[token], count)
        try:
            return self.controller.step().done and not running
        except (FleetUnavailable, StorageUnavailable):
            return False
        except Died:
            self.controller = self.start()
            return False

    def until(self, holds: Any, limit_s: int = 6000) -> None:
        for _ in range(limit_s):
            if self.tick() or holds():
                return
        raise AssertionError(f"not within {limit_s} s: {self.state}")

    @property
    def state(self) -> RunState:
        return self.run.journal().refresh()

    def truth_usd(self) -> Decimal:
        """What AWS bills for the instances."""
        instances = [i for cloud in self.aws.clouds.values() for i in cloud.instances.values()]
        return sum((i.cost_usd() for i in instances), Decimal(0))

    def truth_egress_usd(self) -> Decimal:
        """And for what they read and wrote from afar."""
        commits = [commit for _, commit in self.run.chain().refresh().commits]
        total = Decimal(0)
        for agent in self.agents.values():
            if agent.instance.cloud.region == HERE:
                continue
            mine = [commit for commit in commits if commit.attempt == agent.attempt]
            before = [commit for commit in commits if commit.attempt < agent.attempt]
            restored = 30 if before and agent.progress.start_step is not None else 0
            total += (restored + 4 * len(mine)) * WAY
        return total

    def _agent(self, instance: CloudInstance) -> None:
        if instance.is_running and self.aws.clock.now >= instance.running_at:
            if instance.instance_id not in self.agents:
                agent = SimulatedAgent(instance, self.storage, self.work)
                self.agents[instance.instance_id] = agent
            self.agents[instance.instance_id].tick()


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    forget_processes()
    yield
    forget_processes()


def interrupted(world: World) -> RunState:
    """The run's state after it was interrupted here, and there was only spot there."""
    world.aws.close(THERE)
    for cloud in world.aws.clouds.values():
        for market in cloud.pools.values():
            market.has_on_demand = False
    world.until(lambda: any((a.progress.checkpoint_step or 0) >= 30 for a in world.agents.values()))
    world.aws.close(HERE)
    for market in world.aws.clouds[THERE].pools.values():
        market.close_until(0)
    for instance in world.aws.running()[HERE]:
        instance.interrupt()
    world.until(lambda: False)
    return world.state


def test_a_run_that_is_interrupted_in_one_region_goes_on_in_another() -> None:
    world = World("calm")
    state = interrupted(world)
    assert state.phase is Phase.SUCCEEDED
    launched = [a for a in state.attempts if a.launched]
    assert [attempt.pool.zone[:-1] for attempt in launched] == [HERE, THERE]
    assert launched[1].ended is not None
    assert (launched[1].ended.start_step or 0) >= 30, "no step was lost that was checkpointed"
    account = bill(state, now=world.aws.clock.now)
    assert account.charges[1].egress_usd == world.truth_egress_usd() > 30 * WAY
    assert account.total_usd == world.truth_usd() + world.truth_egress_usd()


@pytest.mark.parametrize("seed", range(12))
def test_no_fault_launches_twice_or_changes_what_crossing_costs(seed: int) -> None:
    rates = Rates(lost=0.04, refused=0.04, died=0.02)
    world = World(f"faulty-{seed}", rates=rates)
    state = interrupted(world)
    assert state.phase is Phase.SUCCEEDED
    assert {attempt.pool.zone[:-1] for attempt in state.attempts if attempt.launched} == {
        HERE, THERE,
    }  # fmt: skip
    assert set(world.per_token.values()) == {1}
    for region, cloud in world.aws.clouds.items():
        for instance in cloud.instances.values():
            assert instance.pool[1].startswith(region)
    assert bill(state, now=world.aws.clock.now).egress_usd == world.truth_egress_usd()


def test_the_budget_holds_with_what_crosses_regions() -> None:
    world = World("poor", budget_usd=Decimal("1.20"))
    state = interrupted(world)
    assert state.phase is Phase.STOPPED
    assert state.stop is not None
    assert state.stop.cause == "budget"
    account = bill(state, now=world.aws.clock.now)
    assert account.egress_usd > Decimal("0.6"), "it went there, and had to stop early"
    assert account.total_usd <= Decimal("1.20")
