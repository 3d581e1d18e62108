"""Schedules: everything that happens to one run, drawn from one seed; and what must hold after it."""

from __future__ import annotations

import random
from collections import Counter
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from spotfirst.checkpoints.chain import Claim, Commit, Prune, Release, _AnyEntry, _decode
from spotfirst.events import Ended, Launched
from spotfirst.sequence import Sequence
from spotfirst.state import Attempt, Phase, RunState
from spotfirst_airflow.costs import bill
from tests.fakes.agent import Work
from tests.fakes.cloud import CloudInstance, Weather
from tests.fakes.faults import Rates
from tests.fakes.world import GRACE_S, SLACK_S, World

LIMIT_S = 6 * 3600
"""Simulated time after which a schedule that has not ended is stopped; what follows is calm."""


class Outcome:
    """What one schedule did. ``violations`` are sentences; there should be none."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.phase = ""
        self.faults: Counter[str] = Counter()
        self.calls = self.attempts = self.instances = self.interrupted = 0
        self.simulated_s = 0.0
        self.exact = self.estimated = 0
        """Charges that equal the cloud's own to the last digit, and those that may differ."""
        self.unpriced = 0
        """Charges at the on-demand price because nobody answered what spot cost."""
        self.untold = 0
        """Instances of attempts that were given up, whose launcher died before it could tell."""
        self.untold_usd = Decimal(0)
        self.reaped = 0
        self.fenced = 0
        """Attempts that wanted to commit when a newer one had the claim."""
        self.violations: list[str] = []


def world_of(seed: int) -> World:
    """The world of a seed: from calm to rough, in all ways at once."""
    draw, extra = random.Random(f"schedule/{seed}"), random.Random(f"schedule/{seed}/extra")
    rough = draw.choice((0.0, 0.3, 1.0))

    def rate(most: float) -> float:
        return draw.uniform(0, most) * rough

    weather = Weather(
        up_s=draw.choice((900, 3600, 4 * 3600)),
        down_s=draw.choice((0, 60, 600, 1800)),
        life_s=draw.choice((0, 900, 3600)),
        price_moves_s=draw.choice((0, 0, 900)),
        silent_share=draw.choice((0.0, 0.1, 0.4)),
        short_share=draw.choice((0.0, 0.2)),
        hidden_s=draw.choice((0, 0, 5, 30)),
        stale_s=draw.choice((0, 0, 20)),
        flicker_share=draw.choice((0.0, 0.0, 0.02)),
        dated_share=draw.choice((1.0, 1.0, 0.5)),
        boot_s=draw.choice((10, 60)),
        shutdown_s=draw.choice((5, 60)),
        event_lost_share=draw.choice((0.0, 0.2)),
        untag_s=draw.choice((30, 600)),
    )
    work = Work(
        total_steps=draw.choice((20, 60, 150)),
        step_s=draw.choice((4.0, 10.0)),
        checkpoint_every=draw.choice((5, 20)),
        checkpoint_s=draw.choice((1.0, 8.0, 40.0)),
        start_s=draw.choice((10.0, 60.0)),
        crash_share=rate(0.1),
        mute_share=rate(0.2),
        dud_share=rate(0.25),
        stall_share=extra.choice((0.0, 0.5)),
    )
    moves = extra.random() < 0.12
    if moves:  # a first instance on demand, whose last checkpoint comes after its successor's claim
        work.total_steps, work.step_s, work.stall_share = 150, 10.0, 1.0
    rates = Rates(refused=rate(0.1), lost=rate(0.1), died=rate(0.05), held_up=rate(0.01))
    if extra.random() < 0.3:
        rates.died = 0.0  # nobody begins anew: what a process gets wrong for good, stays wrong
    agent_rates = Rates(refused=rate(0.1), lost=rate(0.1))
    more: dict[str, Any] = {}
    if draw.random() < 0.15:
        more["budget_usd"] = Decimal(draw.choice(("0.05", "0.2", "0.6")))
    policy = draw.choice(("fallback", "fallback", "fallback", "spot_only", "on_demand"))
    policy_options = {"return_after_s": 300.0} if policy == "fallback" else {}
    if moves:
        policy, policy_options = "fallback", {"return_after_s": 30.0, "no_capacity_s": 0.0}
    if draw.random() < 0.2:
        more["max_life_s"] = draw.choice((900.0, 3600.0))
    world = World(
        seed,
        weather=weather,
        work=work,
        controllers=draw.choice((1, 1, 2, 3)),
        rates=rates,
        agent_rates=agent_rates,
        policy=policy,
        policy_options=policy_options,
        tick_s=draw.choice((1, 2, 5, 5)),
        zones=draw.choice((1, 2, 3)),
        script_retries=draw.choice((0, 5)),
        silence_s=draw.choice((120.0, 600.0)),
        span_s=LIMIT_S,
        **more,
    )
    if moves:
        for market in world.cloud.pools.values():
            market.close_until(300.0)
    if draw.random() < 0.25:
        world.stop_at = world.now + timedelta(
            seconds=draw.choice((0, 20, 300, 800)) + draw.random()
        )
    if draw.random() < 0.2:
        world.new_image_at = world.now + timedelta(seconds=draw.randrange(10, 800))
    if draw.random() < 0.1:
        world.template_gone_at = world.now + timedelta(seconds=draw.randrange(10, 800))
    if draw.random() < 0.15:
        gone_at = world.now + timedelta(seconds=draw.randrange(10, 800))
        away_s = draw.choice((300, 3000, 2 * 3600))
        world.outage = (gone_at, gone_at + timedelta(seconds=away_s))
    if draw.random() < 0.1:
        # The launch that comes true after the run was stopped, and its attempt given up.
        slow = world.processes[0].faults
        slow.hold_once, world.stop_at = "CreateFleet", world.now + timedelta(seconds=3)
        slow.die_after_hold = draw.random() < 0.5
    return world


def play(seed: int, *, limit_s: int = LIMIT_S) -> Outcome:
    """Run a schedule to its end, and judge it."""
    outcome = Outcome(seed)
    world = world_of(seed)
    try:
        try:
            _run(world, limit_s)
        except Exception as error:  # noqa: BLE001 - whatever a process dies of is a finding
            outcome.violations.append(f"{type(error).__name__}: {error}")
        else:
            outcome.violations += [*world.broken, *judge(world, outcome)]
        outcome.faults = world.faults()
        state = world.state
        outcome.phase = str(state.phase)
        outcome.attempts, outcome.instances = len(state.attempts), len(world.cloud.instances)
        instances = world.cloud.instances.values()
        outcome.interrupted = sum(1 for instance in instances if instance.ended_by == "aws")
        outcome.calls = world.cloud.calls.total()
        outcome.simulated_s = world.clock.since_start_s
        outcome.reaped = world.reaped
        outcome.fenced = sum(agent.was_fenced for agent in world.agents.values())
    finally:
        world.close()
    return outcome


def _run(world: World, limit_s: int) -> None:
    while not world.is_over():
        elapsed_s = world.clock.since_start_s
        if elapsed_s > limit_s:
            world.disarm()
            world.request_stop()
        if elapsed_s > limit_s + 3 * 3600:
            world.broken.append(f"not over {elapsed_s:.0f} s after its start")
            return
        world.tick()
    # What comes late: a controller that was held up, an orphan or a template that the reaper has
    # yet to see.
    world.come_back()
    over_at = world.now
    while (late_s := (world.now - over_at).total_seconds()) < GRACE_S + SLACK_S:
        if late_s >= GRACE_S:
            world.disarm()
        world.tick()
        if not world.cloud.running() and not world.cloud.templates:
            break


# -- what must hold at the end ----------------------------------------------------------------


def judge(world: World, outcome: Outcome) -> list[str]:
    """What is not as it must be, in sentences."""
    state = world.state
    return [
        *_one_committer(world, state),
        *_nothing_runs(world, state),
        *_journal_is_true(world, state, outcome),
        *_bill_is_true(world, state, outcome),
    ]


def _entries(world: World) -> list[_AnyEntry]:
    return [
        _decode(data, path) for path, data in Sequence(world.run.storage, "checkpoints").unread()
    ]


def _one_committer(world: World, state: RunState) -> list[str]:
    """Nobody commits without the claim, each goes on from what is there, and no step is lost."""
    found = []
    holder, free, step = 0, True, 0
    for entry in _entries(world):
        if isinstance(entry, Claim):
            if entry.attempt < holder:
                found.append(f"attempt {entry.attempt} claimed after attempt {holder}")
            holder, free = entry.attempt, False
        elif isinstance(entry, (Commit, Prune)):
            if entry.attempt != holder or free:
                found.append(f"attempt {entry.attempt} wrote while attempt {holder} held the chain")
            if isinstance(entry, Commit):
                if entry.step < step:
                    found.append(f"step {entry.step} was committed after step {step}")
                step = entry.step
        elif isinstance(entry, Release):
            free = free or entry.attempt == holder
    if state.phase is Phase.SUCCEEDED and step != world.work.total_steps:
        found.append(f"it succeeded at step {step} of {world.work.total_steps}")
    return found


def _nothing_runs(world: World, state: RunState) -> list[str]:
    found = [f"{i.instance_id} still runs" for i in world.cloud.running()]
    found += [f"the launch template {name} is left" for name in world.cloud.templates]
    if not state.is_final:
        found.append(f"the run is {state.phase}")
    return found


def _journal_is_true(world: World, state: RunState, outcome: Outcome) -> list[str]:
    """Every instance has an attempt that names it, and every attempt is as its instance is.

    One case is counted instead (``untold``): an attempt is given up while its launch is under way,
    and the process that launches dies before it can journal what it got.
    """
    found = []
    told_at = _told_at(world, Ended)
    by_token: dict[str, list[CloudInstance]] = {}
    for instance in world.cloud.instances.values():
        by_token.setdefault(instance.tags["spotfirst:token"], []).append(instance)
    for attempt in state.attempts:
        instances = by_token.pop(attempt.token, [])
        name = f"attempt {attempt.number}"
        if len(instances) > 1:
            found.append(f"{name} has {len(instances)} instances")
        elif attempt.is_open:
            found.append(f"{name} is open after the end")
        elif attempt.launched is None:
            # Whoever launched it died before it could tell: then it must at least not last.
            late = [
                each
                for each in instances
                if each.used_s() > GRACE_S + SLACK_S + world.helpless_s(each)
            ]
            found += [
                f"{name} was given up, and {i.instance_id} ran {i.used_s():.0f} s" for i in late
            ]
            outcome.untold += len(instances)
            outcome.untold_usd += sum((each.cost_usd() for each in instances), Decimal(0))
        elif not instances or instances[0].instance_id != attempt.launched.instance_id:
            found.append(f"{name} names {attempt.launched.instance_id}, which is not its instance")
        else:
            found += _attempt_is_true(attempt, instances[0], told_at[attempt.number])
    found += [f"no attempt has the token {token}" for token in by_token]
    return found


def _told_at(world: World, kind: type[Ended | Launched]) -> dict[int, datetime]:
    """When the journal truly was told of each attempt's start, or end."""
    journal = world.run.journal()
    journal.refresh()
    found: dict[int, datetime] = {}
    for number, event in enumerate(journal.events, 1):
        if isinstance(event, kind):
            path = f"{world.spec.run_id}/journal/{number:08d}.json"
            found.setdefault(event.attempt, world.created_at[path])
    return found


def _attempt_is_true(attempt: Attempt, instance: CloudInstance, told_at: datetime) -> list[str]:
    launched, ended = attempt.launched, attempt.ended
    assert launched is not None
    assert ended is not None
    name, found = f"attempt {attempt.number}", []
    if (attempt.pool.instance_type, attempt.pool.zone) != instance.pool:
        found.append(f"{name} is in {attempt.pool}, and its instance in {instance.pool}")
    if instance.ends_at is None or instance.ends_at > told_at:
        found.append(f"{name} was said to have ended at {told_at}, truly at {instance.ends_at}")
    told = not _is_forgotten(instance, ended.at)
    if ended.by_fleet != (instance.ended_by == "aws") and (told or ended.by_fleet):
        found.append(f"{name}: by_fleet is {ended.by_fleet}, ended by {instance.ended_by}")
    return found


def _bill_is_true(world: World, state: RunState, outcome: Outcome) -> list[str]:
    """The journal's bill is the cloud's own.

    Compared charge by charge, in dollars rounded to a hundredth of a cent as both are. A charge
    must be the same to the last digit, but for what AWS had not said when it was journalled: when
    the instance began or ended (then the journal may be late, up to when its event was written),
    who ended it (of what EC2 has forgotten, nobody knows whether it was free), and the price at its launch (then it is one that was in force until the event was written, or a
    minute before the launch, or the on-demand price, and the journal says so).
    """
    found = []
    total = truth = Decimal(0)
    all_exact = True
    ours = bill(state, now=world.now)
    starts, ends = _told_at(world, Launched), _told_at(world, Ended)
    by_token = {i.tags["spotfirst:token"]: i for i in world.cloud.instances.values()}
    for charge in ours.charges:
        attempt = state.attempt(charge.attempt)
        instance = by_token.get(attempt.token)
        if instance is None or attempt.ended is None or attempt.launched is None:
            continue  # told above
        total, truth = total + charge.cost_usd, truth + instance.cost_usd()
        name = f"attempt {charge.attempt}"
        if charge.price_usd_h != instance.price_usd_h:
            all_exact = False
            if "the spot price is not known" in charge.price_source:
                outcome.unpriced += 1
            elif charge.price_usd_h not in _prices_then(instance, starts[charge.attempt]):
                found.append(f"{name}: ${charge.price_usd_h}/h, truly ${instance.price_usd_h}/h")
            else:
                outcome.estimated += 1
            continue
        assert instance.ends_at is not None
        exact = (
            charge.start == instance.launched_at
            and charge.end == instance.ends_at
            and not _is_forgotten(instance, attempt.ended.at)
        )
        all_exact &= exact
        if exact:
            outcome.exact += 1
            if charge.cost_usd != instance.cost_usd():
                found.append(f"{name} cost ${charge.cost_usd}, truly ${instance.cost_usd()}")
            continue
        outcome.estimated += 1
        found += [
            f"{name} {verb} at {said}, truly at {true}"
            for verb, said, true, known, told_at in (
                ("began", charge.start, instance.launched_at, False, starts[charge.attempt]),
                ("ended", charge.end, instance.ends_at,
                 instance.is_dated and not _is_forgotten(instance, attempt.ended.at),
                 ends[charge.attempt]),
            )
            if said != true and (known or not _reported(world, attempt, true) <= said <= told_at)
        ]  # fmt: skip
    if all_exact and total != truth:
        found.append(f"the bill is ${total}, truly ${truth}")
    if total != ours.total_usd:
        found.append("the bill is not the sum of its charges")
    return found


def _is_forgotten(instance: CloudInstance, at: datetime) -> bool:
    """Whether AWS may have forgotten it by then, or before it was asked."""
    forget = timedelta(seconds=instance.cloud.weather.forget_s)
    return instance.gone_at is not None and at >= instance.gone_at + forget


def _reported(world: World, attempt: Attempt, at: datetime) -> datetime:
    """When its agent said its last word, or the controller's last look began, if before ``at``."""
    assert attempt.ended is not None
    report = world.run.exit_report(attempt.number)
    return min(at, attempt.ended.at, report.at if report else at)


def _prices_then(instance: CloudInstance, until: datetime) -> set[Decimal]:
    market = instance.cloud.pools[instance.pool]
    first = instance.launched_at - timedelta(seconds=60)
    later = {price for since, price in market.prices if first <= since <= until}
    return later | {market.spot_usd_h(first)}


def story(seed: int) -> str:
    """What happened in a schedule, a line each, for whoever looks for the cause."""
    world = world_of(seed)
    lines: list[str] = []
    began: datetime = world.now
    try:
        _run(world, LIMIT_S)
    except Exception as error:  # noqa: BLE001 - told as the last line
        lines.append(f"{type(error).__name__}: {error}")
    journal = world.run.journal()
    journal.refresh()
    lines += [f"{(event.at - began).total_seconds():7.0f} {event}" for event in journal.events]
    lines += [
        f"{instance.instance_id} {instance.pool} spot={instance.spot} "
        f"{instance.tags.get('spotfirst:attempt')} {instance.launched_at} {instance.ends_at} "
        f"{instance.ended_by} ${instance.cost_usd()}"
        for instance in world.cloud.instances.values()
    ]
    lines += [f"broken: {what}" for what in [*world.broken, *judge(world, Outcome(seed))]]
    world.close()
    return "\n".join(lines)
