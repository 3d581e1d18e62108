"""Which instances nobody owns any more, and their end: for the command line and the operator.

The cloud is asked first, and the owners afterwards. A run writes down that it will launch before
it does, so whatever was found in the cloud is in its journal by the time that is read; the other
way round, an instance that is launched in between would look like nobody's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Literal, Protocol, runtime_checkable

from spotfirst import events as e
from spotfirst.errors import FleetError, FormatError, UnknownRun
from spotfirst.run import Run
from spotfirst.spec import RunSpec, is_run_id
from spotfirst.state import Attempt, Phase, RunState
from spotfirst.storage import Storage
from spotfirst.wire import Clock, Record, utc_now
from spotfirst_airflow.fleets import Fleet, Instance
from spotfirst_airflow.fleets.base import KEEP_TAG, RUN_TAG, STORAGE_TAG
from spotfirst_airflow.outlook import passed

__all__ = ["Reaped", "Standing", "Tidies", "Verdict", "judge", "reap"]

Standing = Literal["live", "recent", "kept", "foreign", "unclear", "orphan"]
"""How an instance stands with its owner; only an ``orphan`` is ended.

``live``: an active run has an open attempt on it. ``recent``: nobody's, but only just. ``kept``:
for debugging, until the time that its tag says. ``foreign``: its run is in another storage, which
is not ours to read. ``unclear``: its run's files cannot be read.
"""

PAST_LIMIT_S = 180.0
"""At its deadline, and before its budget is spent, an instance stops by itself, with a checkpoint;
and when its run is stopped, its controller asks it to. So much later, neither has."""
PAST_LIFE_S = 900.0
"""An instance ends itself at its maximum life. So much later, it evidently could not."""
_PATIENCE_S = 20.0
"""A fleet may go on listing for some seconds what it has ended."""


class Verdict(Record):
    """What is known about one instance, and why it stays or goes."""

    instance: Instance
    run_id: str
    standing: Standing
    why: str

    @property
    def orphan(self) -> bool:
        """Whether it is to be ended: nobody has owned it for the grace time."""
        return self.standing == "orphan"


class Reaped(Record):
    """What a round found and did. ``left`` had been asked to end, and was still there after it.

    ``tidied`` counts what else the fleet removed: things that cost nothing and serve no run.
    ``untidy`` says why it could not; no instance is left for that.
    """

    verdicts: tuple[Verdict, ...]
    ended: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    tidied: int = 0
    untidy: str = ""
    dry_run: bool = False

    @property
    def orphans(self) -> tuple[Verdict, ...]:
        """What was, or in a dry run would have been, ended."""
        return tuple(verdict for verdict in self.verdicts if verdict.orphan)

    @property
    def saved_usd_h(self) -> Decimal:
        """What the orphans cost by the hour."""
        return sum((v.instance.price_usd_h for v in self.orphans), Decimal(0))


@runtime_checkable
class Tidies(Protocol):
    """A fleet that leaves more behind than instances, such as launch templates. Optional."""

    def tidy(self, is_over: Callable[[Mapping[str, str]], bool]) -> int:
        """Remove what serves only runs that are over; how many things were removed.

        ``is_over`` tells it from a thing's tags, and says no whenever it does not know.
        """


def reap(
    fleet: Fleet,
    storage: Storage,
    *,
    grace_s: float,
    dry_run: bool = False,
    clock: Clock = utc_now,
    sleep: Callable[[float], None] = time.sleep,
) -> Reaped:
    """Look at every instance of the fleet, and end those that no live run owns.

    Idempotent. Blocks until the ended ones are gone, for ``_PATIENCE_S`` at most. Raises
    :class:`~spotfirst.errors.FleetError` and :class:`~spotfirst.errors.StorageError` when it
    could not look, or was not allowed to end what it found.
    """
    owned = fleet.owned()
    owners = _Owners(storage, clock)
    verdicts = tuple(judge(owned, storage, now=clock(), grace_s=grace_s, owners=owners))
    if dry_run:
        return Reaped(verdicts=verdicts, dry_run=True)
    doomed = tuple(dict.fromkeys(v.instance.token for v in verdicts if v.orphan))
    left: set[str] = set()
    if doomed:
        fleet.terminate(doomed)
        left = _still_there(fleet, doomed, sleep)
    tidied, untidy = 0, ""
    if isinstance(fleet, Tidies):
        try:
            tidied = fleet.tidy(owners.are_over)
        except FleetError as error:
            untidy = str(error)
    return Reaped(
        verdicts=verdicts,
        ended=tuple(token for token in doomed if token not in left),
        left=tuple(sorted(left)),
        tidied=tidied,
        untidy=untidy,
    )


def judge(
    owned: Iterable[Instance],
    storage: Storage,
    *,
    now: datetime,
    grace_s: float,
    owners: _Owners | None = None,
) -> list[Verdict]:
    """What each instance's owner says about it. An instance names its owner in its tags.

    Raises :class:`~spotfirst.errors.StorageError`: without the journals nothing can be said.
    """
    owners = owners or _Owners(storage, lambda: now)
    found = []
    for instance in owned:
        standing, why = _judge_one(instance, owners, now, grace_s)
        run_id = instance.tags.get(RUN_TAG, "")
        found.append(Verdict(instance=instance, run_id=run_id, standing=standing, why=why))
    return found


class _Owners:
    """The runs of one storage, each read once."""

    def __init__(self, storage: Storage, clock: Clock) -> None:
        self._storage = storage
        self._clock = clock
        self._states: dict[str, RunState] = {}
        self._specs: dict[str, RunSpec | None] = {}

    def are_ours(self, tags: Mapping[str, str]) -> bool:
        """Whether the tags name a run of this storage."""
        here = _plain(tags.get(STORAGE_TAG, "")) == _plain(self._storage.url)
        return here and is_run_id(tags.get(RUN_TAG, ""))

    def are_over(self, tags: Mapping[str, str]) -> bool:
        """Whether the tags name a run of this storage that is over, with no instance left.

        One that is kept for debugging counts as left. A run whose files are gone is over, too: a
        run is created before anything is made for it. Read again, as it may have been reopened.
        """
        if not self.are_ours(tags):
            return False
        try:
            self._states.pop(tags[RUN_TAG], None)
            state = self.state(tags[RUN_TAG])
        except FormatError:
            return False
        now = self._clock()
        kept = any(
            a.ended and a.ended.kept_until and now < a.ended.kept_until for a in state.attempts
        )
        return (state.is_final or not state.seq) and not state.open_attempts and not kept

    def state(self, run_id: str) -> RunState:
        if run_id not in self._states:
            self._states[run_id] = Run(self._storage, run_id).journal().refresh()
        return self._states[run_id]

    def spec(self, run_id: str) -> RunSpec | None:
        if run_id not in self._specs:
            try:
                self._specs[run_id] = Run(self._storage, run_id).spec()
            except UnknownRun:
                self._specs[run_id] = None
        return self._specs[run_id]


def _judge_one(
    instance: Instance, owners: _Owners, now: datetime, grace_s: float
) -> tuple[Standing, str]:
    if not owners.are_ours(instance.tags):
        run_id, where = (instance.tags.get(tag, "") for tag in (RUN_TAG, STORAGE_TAG))
        if not where or not run_id:
            return "foreign", "it names no run and storage in its tags"
        return "foreign", f"it is of run {run_id} in {where}: reap it from there"
    run_id = instance.tags[RUN_TAG]
    try:
        state, spec = owners.state(run_id), owners.spec(run_id)
    except FormatError as error:
        return "unclear", f"the files of its run cannot be read: {error}"
    attempt = next((a for a in state.attempts if a.token == instance.token), None)
    if attempt is not None and attempt.is_open and not state.is_final:
        if why := _outlived(instance, attempt, state, spec, now=now, grace_s=grace_s):
            return "orphan", why
        return "live", f"attempt {attempt.number} of a run that is {state.phase}"
    since = instance.started_at
    if attempt is None:
        what = "its run knows nothing of it"
    elif attempt.ended is not None:
        what, since = f"attempt {attempt.number} has ended", max(since, attempt.ended.at)
    elif attempt.not_launched is not None:
        what = f"attempt {attempt.number} was given up: {attempt.not_launched.cause}"
        since = max(since, attempt.not_launched.at)
    else:
        what, since = f"its run has {state.phase}", max(since, state.updated_at or since)
    until, unreadable = _kept_until(instance)
    if until is None and attempt is not None and attempt.ended is not None:
        until = attempt.ended.kept_until  # a tag may take a while to be seen
    if until is not None and now < until:
        return "kept", f"{what}; kept for debugging until {until:%Y-%m-%d %H:%M:%S} UTC"
    what += unreadable
    # Its controller may be ending it this very moment.
    if now - since < timedelta(seconds=grace_s):
        return "recent", f"{what}, only {(now - since).total_seconds():.0f} s ago"
    return "orphan", what


def _outlived(
    instance: Instance,
    attempt: Attempt,
    state: RunState,
    spec: RunSpec | None,
    *,
    now: datetime,
    grace_s: float,
) -> str:
    """Why an instance of an active run should be gone all the same; empty when it should not.

    Whatever keeps its controller from doing it: there may be none any more.
    """
    earlier = now - timedelta(seconds=max(PAST_LIMIT_S, grace_s))
    if state.phase is Phase.STOPPING and state.stop is not None and state.stop.at < earlier:
        return f"its run was to stop at {state.stop.at:%Y-%m-%d %H:%M:%S} UTC: {state.stop.reason}"
    if spec is None:
        return ""
    age_s = (now - instance.started_at).total_seconds()
    if age_s > spec.max_life_s + max(PAST_LIFE_S, grace_s):
        return f"it outlived its maximum life of {spec.max_life_s / 3600:.4g} h"
    if attempt.launched is None:  # the fleet knows what the journal does not yet
        launched = e.Launched(
            at=now, attempt=attempt.number, instance_id=instance.instance_id,
            started_at=instance.started_at, price_usd_h=instance.price_usd_h,
            price_source=instance.price_source, price_at=now,
            on_demand_usd_h=instance.on_demand_usd_h, clock_rate=instance.clock_rate,
        )  # fmt: skip
        state = state.apply(launched)
    limits = passed(spec, state, now=earlier)
    if spec.on_budget == "alert":
        limits.pop("budget", None)
    return "; ".join(limits.values())


def _kept_until(instance: Instance) -> tuple[datetime | None, str]:
    """Until when people want it, or what is wrong with what the tag says."""
    text = instance.tags.get(KEEP_TAG, "").strip()
    if not text:
        return None, ""
    try:
        # Python 3.10 does not read the Z.
        until = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None, f"; its tag {KEEP_TAG} is {text!r}, which is no time in ISO 8601"
    return (until if until.tzinfo else until.replace(tzinfo=timezone.utc)), ""


def _still_there(fleet: Fleet, doomed: tuple[str, ...], sleep: Callable[[float], None]) -> set[str]:
    waited_s = 0.0
    while True:
        left = {instance.token for instance in fleet.owned()} & set(doomed)
        if not left or waited_s >= _PATIENCE_S:
            return left
        sleep(2.0)
        waited_s += 2.0


def _plain(url: str) -> str:
    """A folder has two names: its path, and its file URL."""
    return url.removeprefix("file://").rstrip("/")
