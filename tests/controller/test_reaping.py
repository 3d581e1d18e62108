"""What is ended: what nobody owns; and what is spared, with the reason."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest

from spotfirst import events as e
from spotfirst.errors import FleetUnavailable, LaunchRejected, StorageUnavailable
from spotfirst.journal import Journal
from spotfirst.market import Market, Pool
from spotfirst.run import create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import Storage, open_storage
from spotfirst_airflow.fleets import Instance, InstanceState
from spotfirst_airflow.fleets.base import KEEP_TAG, RUN_TAG, STORAGE_TAG
from spotfirst_airflow.reaping import PAST_LIFE_S, Verdict, judge, reap
from tests.controller.world import Faults, FaultyStorage

NOW = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
HOUR = timedelta(hours=1)
POOL = Pool(instance_type="gpu", zone="zone-a")
_names = itertools.count()


@pytest.fixture
def storage() -> Storage:
    return open_storage(f"memory://reaping-{next(_names)}")


def a_run(storage: Storage, run_id: str = "run", *, attempts: int = 1, **limits: Any) -> Journal:
    spec = RunSpec(run_id=run_id, created_at=NOW - 9 * HOUR, command=("true",), **limits)
    journal = create_run(storage, spec).journal()
    journal.append(e.Created(at=NOW - 9 * HOUR))
    for number in range(1, attempts + 1):
        journal.append(
            e.Launching(
                at=NOW - 8 * HOUR, attempt=number, token=f"{run_id}-{number}", market=Market.SPOT,
                pool=POOL, reason="spot first",
            )
        )  # fmt: skip
    return journal


def end(journal: Journal, at: datetime, number: int = 1) -> Journal:
    journal.append(e.Ended(at=at, attempt=number, cause="lost", ended_at=at))
    return journal


def instance(
    here: Storage, token: str = "run-1", *, age: timedelta = 8 * HOUR, **tags: str
) -> Instance:
    """``keep_until``, ``run`` and ``storage`` are tags."""
    names = {"run": RUN_TAG, "storage": STORAGE_TAG, "keep_until": KEEP_TAG}
    mine = {RUN_TAG: token.rpartition("-")[0], STORAGE_TAG: here.url}
    return Instance(
        token=token, instance_id=f"i-{token}", state=InstanceState.RUNNING, market=Market.SPOT,
        pool=POOL, started_at=NOW - age, price_usd_h=Decimal("0.50"), price_source="test",
        on_demand_usd_h=Decimal(1), tags=mine | {names[name]: text for name, text in tags.items()},
    )  # fmt: skip


def verdict(
    storage: Storage, one: Instance, *, grace_s: float = 60, now: datetime = NOW
) -> Verdict:
    [found] = judge([one], storage, now=now, grace_s=grace_s)
    return found


class Cloud:
    """The calls of a fleet that a reaper makes. ``slow`` lists what it ended for a while yet."""

    def __init__(self, *instances: Instance, slow: int = 0) -> None:
        self.instances = {each.token: each for each in instances}
        self.ended: list[str] = []
        self.calls: list[str] = []
        self._slow = slow

    def owned(self) -> list[Instance]:
        self.calls.append("owned")
        if self.ended:
            self._slow -= 1
        gone = set() if self._slow >= 0 and self.ended else set(self.ended)
        return [each for token, each in self.instances.items() if token not in gone]

    def terminate(self, tokens: Collection[str]) -> None:
        self.calls.append("terminate")
        self.ended.extend(tokens)


# -- who owns what ------------------------------------------------------------------------------


def test_an_open_attempt_of_an_active_run_is_alive_however_old(storage: Storage) -> None:
    a_run(storage)
    found = verdict(storage, instance(storage))
    assert (found.standing, found.why) == ("live", "attempt 1 of a run that is active")


def test_an_attempt_that_is_stopping_still_owns_its_instance(storage: Storage) -> None:
    a_run(storage).append(e.StopRequested(at=NOW - timedelta(minutes=2), reason="enough"))
    assert verdict(storage, instance(storage)).standing == "live"


def test_an_attempt_that_should_have_stopped_long_ago_is_ended(storage: Storage) -> None:
    a_run(storage).append(e.StopRequested(at=NOW - HOUR, reason="enough"))
    found = verdict(storage, instance(storage))
    assert found.orphan
    assert "enough" in found.why
    patient = verdict(storage, instance(storage), grace_s=2 * 3600)
    assert patient.standing == "live"


@pytest.mark.parametrize("is_told", [False, True])
@pytest.mark.parametrize(
    ("limits", "orphan"),
    [
        ({}, False),
        ({"deadline": NOW + HOUR}, False),
        ({"deadline": NOW - timedelta(minutes=2)}, False),
        ({"deadline": NOW - timedelta(minutes=4)}, True),
        ({"budget_usd": Decimal("4.01")}, False),  # 8 h at $0.50
        ({"budget_usd": Decimal("3.99")}, False),
        ({"budget_usd": Decimal("3.90")}, True),
        ({"budget_usd": Decimal("3.90"), "on_budget": "continue_cheaper"}, True),
        ({"budget_usd": Decimal("3.90"), "on_budget": "alert"}, False),
        ({"budget_usd": Decimal("3.90"), "deadline": NOW - HOUR, "on_budget": "alert"}, True),
    ],
)
def test_deadline_and_budget_are_kept_when_no_controller_does(
    storage: Storage, limits: dict[str, Any], orphan: bool, is_told: bool
) -> None:
    journal = a_run(storage, **limits)
    one = instance(storage)
    if is_told:
        journal.append(
            e.Launched(
                at=one.started_at, attempt=1, instance_id="i-1", started_at=one.started_at,
                price_usd_h=one.price_usd_h, price_source="test", price_at=one.started_at,
                on_demand_usd_h=one.on_demand_usd_h,
            )
        )  # fmt: skip
    found = verdict(storage, one)
    assert found.orphan == orphan, found.why
    if orphan:
        assert ("deadline" in found.why) == ("deadline" in limits)


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (e.Failed(at=NOW - HOUR, message="gave up"), "its run has failed"),
        (e.Stopped(at=NOW - HOUR, reason="enough"), "its run has stopped"),
        (
            e.Ended(at=NOW - HOUR, attempt=1, cause="lost", ended_at=NOW - HOUR),
            "attempt 1 has ended",
        ),
        (
            e.NotLaunched(at=NOW - HOUR, attempt=1, cause="withdrawn", message="late"),
            "attempt 1 was given up: withdrawn",
        ),
    ],
)
def test_an_instance_whose_journal_is_done_with_it_is_an_orphan(
    storage: Storage, event: e.Event, why: str
) -> None:
    a_run(storage).append(event)
    found = verdict(storage, instance(storage))
    assert (found.orphan, found.why) == (True, why)


def test_an_instance_that_its_run_never_asked_for_is_an_orphan(storage: Storage) -> None:
    a_run(storage)
    assert verdict(storage, instance(storage, "run-7")).why == "its run knows nothing of it"
    assert verdict(storage, instance(storage, "deleted-1")).orphan


def test_nothing_is_ended_before_the_grace_time_is_over(storage: Storage) -> None:
    end(a_run(storage), NOW - timedelta(seconds=50))
    one = instance(storage)
    found = verdict(storage, one)
    assert (found.standing, found.why) == ("recent", "attempt 1 has ended, only 50 s ago")
    assert verdict(storage, one, now=NOW + timedelta(seconds=10)).orphan


def test_a_busy_run_does_not_prolong_the_grace_time_of_what_it_has_left(storage: Storage) -> None:
    journal = end(a_run(storage, attempts=2), NOW - HOUR)
    journal.append(e.Warned(at=NOW - timedelta(seconds=1), message="news of attempt 2"))
    assert verdict(storage, instance(storage)).orphan


def test_an_instance_of_another_storage_is_spared_and_its_owner_named(storage: Storage) -> None:
    found = verdict(storage, instance(storage, storage="s3://theirs/runs"))
    assert found.standing == "foreign"
    assert found.why == "it is of run run in s3://theirs/runs: reap it from there"


@pytest.mark.parametrize("tags", [{"run": ""}, {"storage": ""}, {"run": "../../etc"}])
def test_an_instance_that_names_no_owner_is_spared(storage: Storage, tags: dict[str, str]) -> None:
    assert verdict(storage, instance(storage, **tags)).standing == "foreign"


def test_a_folder_and_its_file_url_are_one_storage(tmp_path: object) -> None:
    storage = open_storage(str(tmp_path))
    assert verdict(storage, instance(storage, storage=f"file://{tmp_path}/")).orphan


def test_a_run_that_cannot_be_read_is_spared_and_does_not_save_the_others(storage: Storage) -> None:
    a_run(storage, "odd")
    storage.write("control/runs/odd/journal/00000003.json", b"{")
    end(a_run(storage), NOW - HOUR)
    found = judge(
        [instance(storage, "odd-1"), instance(storage)], storage, now=NOW, grace_s=60
    )  # fmt: skip
    assert [each.standing for each in found] == ["unclear", "orphan"]


def test_an_instance_that_outlived_its_own_end_is_an_orphan_of_a_live_run(storage: Storage) -> None:
    a_run(storage, max_life_s=7200.0)
    limit = timedelta(seconds=7200 + PAST_LIFE_S)
    assert verdict(storage, instance(storage, age=limit)).standing == "live"
    late = verdict(storage, instance(storage, age=limit + timedelta(seconds=1)))
    assert (late.orphan, late.why) == (True, "it outlived its maximum life of 2 h")


# -- kept for debugging -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["2026-01-01T13:00:00+00:00", "2026-01-01T13:00:00Z", "2026-01-01T13:00"]
)
def test_what_is_kept_is_spared_until_then_and_reaped_after(storage: Storage, form: str) -> None:
    end(a_run(storage), NOW - HOUR)
    one = instance(storage, keep_until=form)
    found = verdict(storage, one)
    assert found.standing == "kept"
    assert found.why == "attempt 1 has ended; kept for debugging until 2026-01-01 13:00:00 UTC"
    assert verdict(storage, one, now=NOW + HOUR).orphan


def test_the_journal_says_it_too_while_the_tag_is_not_seen_yet(storage: Storage) -> None:
    at = NOW - HOUR
    a_run(storage).append(
        e.Ended(
            at=at, attempt=1, cause="script_failed", ended_at=at,
            kept_until=NOW + timedelta(minutes=1),
        )
    )  # fmt: skip
    assert verdict(storage, instance(storage)).standing == "kept"
    shortened = instance(storage, keep_until=NOW.isoformat())
    assert verdict(storage, shortened).orphan, "people may change the tag"


def test_a_tag_that_is_no_time_keeps_nothing_and_is_named(storage: Storage) -> None:
    end(a_run(storage), NOW - HOUR)
    found = verdict(storage, instance(storage, keep_until="tomorrow"))
    assert found.orphan
    assert "'tomorrow', which is no time" in found.why


# -- a round ------------------------------------------------------------------------------------


def test_a_round_ends_the_orphans_and_nothing_else(storage: Storage) -> None:
    a_run(storage, "alive")
    end(a_run(storage, "over"), NOW - HOUR)
    cloud = Cloud(instance(storage, "alive-1"), instance(storage, "over-1"))
    done = reap(cloud, storage, grace_s=60, clock=lambda: NOW)
    assert cloud.ended == ["over-1"]
    assert (done.ended, done.left, done.saved_usd_h) == (("over-1",), (), Decimal("0.50"))


def test_a_dry_run_ends_nothing(storage: Storage) -> None:
    cloud = Cloud(instance(storage))
    done = reap(cloud, storage, grace_s=60, dry_run=True, clock=lambda: NOW)
    assert [each.instance.token for each in done.orphans] == ["run-1"]
    assert cloud.calls == ["owned"]


def test_the_cloud_is_asked_before_the_owners(storage: Storage) -> None:
    """A run that launches while the reaper looks is never taken for one that does not know."""

    class Launching(Cloud):
        def owned(self) -> list[Instance]:
            found = super().owned()
            if not self.ended:
                a_run(storage)
            return found

    cloud = Launching(instance(storage))
    done = reap(cloud, storage, grace_s=0, clock=lambda: NOW)
    assert [each.standing for each in done.verdicts] == ["live"]


def test_a_cloud_that_lists_what_is_ending_gets_some_seconds(storage: Storage) -> None:
    naps: list[float] = []
    cloud = Cloud(instance(storage), slow=3)
    done = reap(cloud, storage, grace_s=60, clock=lambda: NOW, sleep=naps.append)
    assert (done.ended, done.left, len(naps)) == (("run-1",), (), 3)
    stuck = Cloud(instance(storage), slow=10**6)
    done = reap(stuck, storage, grace_s=60, clock=lambda: NOW, sleep=naps.append)
    assert (done.ended, done.left) == ((), ("run-1",))


@pytest.mark.parametrize("error", [FleetUnavailable("throttled"), LaunchRejected("denied")])
def test_who_cannot_look_says_so(storage: Storage, error: Exception) -> None:
    class Away(Cloud):
        def owned(self) -> list[Instance]:
            raise error

    with pytest.raises(type(error)):
        reap(Away(), storage, grace_s=60)


def test_a_storage_that_does_not_answer_condemns_nobody(storage: Storage) -> None:
    cloud = Cloud(instance(storage))
    away = FaultyStorage(storage, Faults(refused=1.0))
    with pytest.raises(StorageUnavailable):
        reap(cloud, away, grace_s=60)
    assert cloud.ended == []


def test_what_serves_only_runs_that_are_over_is_tidied_up(storage: Storage) -> None:
    a_run(storage, "alive")
    a_run(storage, "over").append(e.Failed(at=NOW, message="gave up"))
    end(a_run(storage, "gone"), NOW).append(e.Stopped(at=NOW, reason="enough"))

    class Leaves(Cloud):
        left_behind = ("alive", "over", "gone", "deleted", "elsewhere")

        def tidy(self, is_over: Callable[[Mapping[str, str]], bool]) -> int:
            def tags(name: str) -> dict[str, str]:
                url = "s3://theirs" if name == "elsewhere" else storage.url
                return {RUN_TAG: name, STORAGE_TAG: url}

            self.left_behind = tuple(n for n in self.left_behind if not is_over(tags(n)))
            return 5 - len(self.left_behind)

    cloud = Leaves()
    assert reap(cloud, storage, grace_s=60).tidied == 2
    assert cloud.left_behind == ("alive", "over", "elsewhere")


def test_what_cannot_be_tidied_up_does_not_fail_the_round(storage: Storage) -> None:
    class Forbids(Cloud):
        def tidy(self, is_over: Callable[[Mapping[str, str]], bool]) -> int:
            raise LaunchRejected("ec2:DeleteLaunchTemplate is not allowed")

    done = reap(Forbids(instance(storage)), storage, grace_s=60, clock=lambda: NOW)
    assert done.ended == ("run-1",)
    assert "not allowed" in done.untidy
