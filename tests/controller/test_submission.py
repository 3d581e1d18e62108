"""Bad input is refused before anything is launched; retries, clears and replays mean one thing."""

from __future__ import annotations

import itertools
import re
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotfirst import events as e
from spotfirst.checkpoints.chain import CheckpointChain
from spotfirst.checkpoints.manifest import PackRef, StateManifest, write_manifest
from spotfirst.checkpoints.retention import Retention, collect
from spotfirst.errors import InvalidSpec, UnknownRun, UnsupportedStorage
from spotfirst.journal import Journal
from spotfirst.run import Run, create_run, list_runs
from spotfirst.spec import ResumeFrom, is_run_id
from spotfirst.state import Phase
from spotfirst.storage import Storage, open_storage
from spotfirst_airflow import submission
from spotfirst_airflow.submission import (
    Request,
    attach,
    base_run_id,
    is_run_of,
    mark_delivered,
    request_stop,
)

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
GOOD = Request(command=("python", "train.py"), instance_types=("g6.xlarge",))
_names = itertools.count()


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("SPOTFIRST_LOCAL_FLEET", str(tmp_path / "fleet"))
    return open_storage(str(tmp_path / "storage"))


def submit(storage: Storage, request: Request = GOOD, owner: str = "me", **more: Any) -> Run:
    more.setdefault("clock", lambda: NOW)
    return attach(storage, "run", request, owner=owner, environment={}, **more)


def succeed(run: Run) -> None:
    run.journal().decide(lambda state: None if state.is_final else e.Succeeded(at=NOW, attempt=1))


BAD_INPUT = {
    "unknown fleet": ({"fleet": "mars"}, "unknown fleet 'mars'"),
    "unknown policy": ({"policy": "hope"}, "unknown policy 'hope'"),
    "unknown policy option": ({"policy_options": {"losess": 3}}, "losess"),
    "unknown instance type": ({"instance_types": ("x1.huge",)}, "x1.huge"),
    "unknown market": ({"fleet_options": {"market": {"kind": "bazaar"}}}, "bazaar"),
    "unknown fleet option": ({"fleet_options": {"zoness": []}}, "zoness"),
    "unknown tag": ({"tags": {"colour": "red"}}, "colour"),
    "empty tag": ({"tags": {"team": " "}}, "team"),
    "no command": ({"command": ()}, "command"),
    "an empty word": ({"command": ("python", "")}, "empty"),
    "missing code": ({"code": "/nonexistent/training"}, "/nonexistent/training"),
    "deadline in the past": ({"deadline": NOW - timedelta(seconds=1)}, "deadline"),
    "no time at all": ({"deadline": timedelta(0)}, "deadline"),
    "no budget": ({"budget_usd": Decimal(0)}, "budget"),
    "unknown run": ({"resume_from": "nobody@3"}, "nobody"),
    "no step": ({"resume_from": "nobody"}, "RUN@STEP"),
    "unknown dataset": ({"dataset": "corpus@latest"}, "corpus"),
    "since without dataset": ({"dataset_since": "1"}, "dataset"),
    "negative retries": ({"script_retries": -1}, "script_retries"),
    "no checkpoint kept": ({"retention": Retention(last=0)}, "retention"),
    "no period": ({"checkpoint_period_s": 0.0}, "checkpoint_period_s"),
    "a secret": ({"env": {"WANDB_API_KEY": "x"}}, "WANDB_API_KEY"),
    "a secret by its value": ({"env": {"URL": "redis://:pw@h/0"}}, "'URL' .* URL with a password"),
    "a secret in the command": ({"command": ("train", "--api-key=x")}, "command .*by its name"),
    "a secret in a tag": ({"tags": {"team": "hf_abcdefghijklmnopqrst"}}, "tags 'team'"),
    "a secret in an option": (
        {"fleet_options": {"market": {"kind": "AKIAIOSFODNN7EXAMPLE"}}},
        "fleet_options .*AWS access key",
    ),
    "our own variable": ({"env": {"SPOTFIRST_RUN": "x"}}, "SPOTFIRST_RUN"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named_before_anything_is_written(storage: Storage, name: str) -> None:
    changes, said = BAD_INPUT[name]
    with pytest.raises(InvalidSpec, match=said.replace("(", r"\(")):
        submit(storage, msgspec.structs.replace(GOOD, **changes))
    assert list_runs(storage) == []


def test_a_deadline_needs_a_time_zone() -> None:
    with pytest.raises(ValueError, match="time zone"):
        Request(deadline=datetime(2027, 1, 1))  # noqa: DTZ001


def test_a_storage_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UnsupportedStorage, match="cannot be used"):
        submit(open_storage(str(tmp_path / "file" / "below")))


def test_an_unknown_step_lists_those_that_there_are(storage: Storage) -> None:
    run = submit(storage)
    chain = run.chain()
    chain.claim(1)
    chain.commit(1, step=10, manifest="m", digest="d", content="state")
    with pytest.raises(InvalidSpec, match=r"no checkpoint at 11; it has .*: 10"):
        attach(
            storage, "replay", msgspec.structs.replace(GOOD, resume_from="run@11"),
            owner="me", environment={}, clock=lambda: NOW,
        )  # fmt: skip


def test_a_replay_names_the_chain_entry_that_it_starts_from(storage: Storage) -> None:
    run = submit(storage)
    chain = run.chain()
    chain.claim(1)
    seq = chain.commit(1, step=10, manifest="m", digest="d", content="state")
    chain.commit(1, step=20, manifest="m", digest="d", content="state")
    for text, step in (("run@10", 10), ("run@latest", 20)):
        replay = attach(
            storage, f"replay-{step}", msgspec.structs.replace(GOOD, resume_from=text),
            owner="me", environment={}, clock=lambda: NOW,
        )  # fmt: skip
        found = replay.spec().resume_from
        assert found is not None
        assert (found.run_id, found.step) == ("run", step)
        assert step != 10 or found.seq == seq


def a_parent(storage: Storage, steps: int = 3) -> CheckpointChain:
    chain = submit(storage).chain()
    chain.claim(1)
    for number in range(1, steps + 1):
        chain.commit(
            1, step=10 * number, manifest=f"00000001/{number:06d}.json", digest="0", content="state",
            metrics={"loss": float(abs(number - 2))},
        )  # fmt: skip
    return chain


def replay(storage: Storage, text: str, run_id: str = "replay") -> Run:
    request = msgspec.structs.replace(GOOD, resume_from=text)
    return attach(storage, run_id, request, owner="me", environment={}, clock=lambda: NOW)


def test_a_replay_pins_its_checkpoint_before_it_begins(storage: Storage) -> None:
    chain = a_parent(storage)
    seen: list[set[int]] = []
    parent = Run(storage, "run")

    class Watching(Run):
        def journal(self, *, by: str = "") -> Journal:
            seen.append(parent.pinned())
            return super().journal(by=by)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            submission, "create_run", lambda s, spec: Watching(s, create_run(s, spec).run_id)
        )
        child = replay(storage, "run@20")
    [(seq, commit)] = [entry for entry in chain.commits if entry[1].step == 20]
    assert seen[0] == {seq}, "pinned when Created is written"
    assert parent.pins() == {seq: ["replay"]}
    assert child.spec().resume_from == ResumeFrom(
        run_id="run", step=20, seq=seq, digest=commit.digest
    )


def test_the_best_checkpoint_is_that_of_the_parents_retention(storage: Storage) -> None:
    a_parent(storage)
    found = replay(storage, "run@best").spec().resume_from
    assert found is not None
    assert found.step == 20


def test_a_pruned_checkpoint_is_refused_with_those_that_are_kept(storage: Storage) -> None:
    chain = a_parent(storage)
    chain.prune(1, [chain.commits[0][0]])
    with pytest.raises(UnknownRun, match=r"at step 10 was pruned.*kept are the steps 20, 30"):
        replay(storage, "run@10")
    assert list_runs(storage) == ["run"]


def test_a_checkpoint_that_is_pruned_before_it_was_pinned_is_refused(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = a_parent(storage)
    pin = Run.pin

    def pruned_first(self: Run, seq: int, *, by: str) -> str:
        chain.prune(1, [seq])
        return pin(self, seq, by=by)

    monkeypatch.setattr(Run, "pin", pruned_first)
    with pytest.raises(UnknownRun, match=r"step 20 was pruned just now; kept are the steps 10, 30"):
        replay(storage, "run@20")
    assert list_runs(storage) == ["run"], "nothing was begun"
    assert Run(storage, "run").pinned() == set()


def test_a_checkpoint_that_is_pruned_after_it_was_pinned_stays(storage: Storage) -> None:
    chain = a_parent(storage)
    packs = Run(storage, "run").packs()
    for number in (1, 2, 3):
        name = f"00000001/{number:06d}.json"
        pack = PackRef(name=f"00000001/{number:06d}-00000-000000", size_bytes=1)
        packs.write(pack.name, b"x")
        manifest = StateManifest(step=10 * number, packs=(pack,), arrays=(), objects={})
        digest, _ = write_manifest(packs, name, manifest)
        chain.commit(1, step=10 * number, manifest=name, digest=digest, content="state")
    first, second, _ = [seq for seq, _ in chain.commits][-3:]
    found = replay(storage, "run@10").spec().resume_from
    assert found is not None
    assert found.seq == first
    chain.prune(1, [seq for seq, _ in chain.commits[:-1]])
    assert second in chain.pruned
    collect(packs, chain, Run(storage, "run").pinned())
    assert {name for name, _ in packs.walk("") if "-" in name} == {
        "00000001/000001-00000-000000", "00000001/000003-00000-000000",
    }  # fmt: skip


def test_a_failed_replay_goes_on_although_its_checkpoint_was_pruned_since(storage: Storage) -> None:
    chain = a_parent(storage)
    child = replay(storage, "run@10")
    started_from = child.spec().resume_from
    child.journal().decide(
        lambda state: None if state.is_final else e.Failed(at=NOW, message="exit 1")
    )
    chain.prune(1, [chain.commits[0][0]])
    again = replay(storage, "run@10")
    assert again.journal().refresh().phase is Phase.ACTIVE
    assert again.spec().resume_from == started_from


def test_a_cleared_task_may_change_which_checkpoints_stay(storage: Storage) -> None:
    run = submit(storage, msgspec.structs.replace(GOOD, retention=Retention(last=2)))
    assert run.spec().retention == Retention(last=2)
    run.journal().decide(lambda s: None if s.is_final else e.Failed(at=NOW, message="exit 1"))
    changed = Retention(last=1, best=3)
    submit(storage, msgspec.structs.replace(GOOD, retention=changed), owner="try-2")
    assert run.spec().retention == changed


def test_a_retry_comes_back_to_the_run_that_is_active(storage: Storage) -> None:
    first = submit(storage, owner="try-1")
    again = submit(storage, msgspec.structs.replace(GOOD, command=("other",)), owner="try-2")
    assert again.run_id == first.run_id
    assert again.journal().refresh().owner == "try-2"
    assert again.spec().command == GOOD.command, "what is running is not changed under way"


def test_a_late_kill_of_the_former_owner_changes_nothing(storage: Storage) -> None:
    run = submit(storage, owner="try-1")
    submit(storage, owner="try-2")
    assert not request_stop(run, reason="killed", owner="try-1")
    assert run.journal().refresh().phase is Phase.ACTIVE


@pytest.mark.parametrize(
    "ending", [e.Stopped(at=NOW, reason="marked failed"), e.Failed(at=NOW, message="exit 1")]
)
def test_a_stopped_or_failed_run_goes_on_as_the_request_reads_now(
    storage: Storage, ending: e.Event
) -> None:
    run = submit(storage)
    run.journal().decide(lambda state: None if state.is_final else ending)
    later = NOW + timedelta(days=1)
    fixed = msgspec.structs.replace(
        GOOD, command=("python", "fixed.py"), deadline=timedelta(hours=1)
    )
    again = submit(storage, fixed, owner="try-2", clock=lambda: later)
    assert again.run_id == run.run_id
    state = again.journal().refresh()
    assert (state.phase, state.owner) == (Phase.ACTIVE, "try-2")
    assert again.spec().command == ("python", "fixed.py")
    assert again.spec().deadline == later + timedelta(hours=1)


def test_a_result_that_was_not_delivered_is_given_again(storage: Storage) -> None:
    run = submit(storage)
    succeed(run)
    assert submit(storage, owner="try-2").run_id == run.run_id


def test_after_delivery_it_runs_anew_and_the_old_generation_stays(storage: Storage) -> None:
    run = submit(storage)
    succeed(run)
    mark_delivered(run, "me")
    second = submit(storage, owner="cleared")
    assert second.run_id == "run.g2"
    assert run.journal().refresh().phase is Phase.SUCCEEDED
    succeed(second)
    assert submit(storage, owner="retry").run_id == "run.g2"
    mark_delivered(second, "cleared")
    assert submit(storage, owner="cleared again").run_id == "run.g3"


def test_a_retry_of_the_task_that_has_its_result_does_not_run_anew(storage: Storage) -> None:
    run = submit(storage)
    succeed(run)
    mark_delivered(run, "me")
    again = submit(storage, owner="me", is_same_task=lambda delivered_to: delivered_to == "me")
    assert again.run_id == run.run_id


def test_a_submitter_that_died_after_the_spec_is_finished_by_the_next(storage: Storage) -> None:
    run = submit(storage)
    storage.delete("control/runs/run/journal/00000001.json")
    storage.delete("control/runs/run/journal/00000002.json")
    assert submit(storage, owner="try-2").run_id == run.run_id
    state = run.journal().refresh()
    assert state.created_at == NOW
    assert state.owner == "try-2"


def test_run_ids_are_readable_stable_and_differ_by_map_index() -> None:
    ids = {
        base_run_id("dag", "manual__2026-01-01T00:00:00+00:00", "train", index)
        for index in (-1, 0, 1)
    }
    assert len(ids) == 3
    assert base_run_id("dag", "r", "train") == "dag--r--train"
    long = base_run_id("d" * 150, "r" * 150, "train")
    assert len(long) <= 200
    assert long != base_run_id("d" * 150, "r" * 151, "train"), "cutting must not merge two runs"


_IDS = st.one_of(
    st.text(min_size=1, max_size=250),
    st.text("ab.-_g2", min_size=1, max_size=12),
    st.from_regex(r"\A[a-z]{1,3}(--?[a-z0-9]{1,8}|\.g[0-9]|-[0-9a-f]{8})*\Z"),
)
_TASKS = st.tuples(_IDS, _IDS, _IDS, st.integers(-1, 3))


@settings(max_examples=500)
@given(st.lists(_TASKS, min_size=2, max_size=6, unique=True))
def test_different_tasks_have_different_run_ids(tasks: list[tuple[str, str, str, int]]) -> None:
    ids = [base_run_id(*task) for task in tasks]
    assert len(set(ids)) == len(tasks)
    for run_id in ids:
        assert is_run_id(run_id)
        assert is_run_id(f"{run_id}.g99999")
    for other in ids[1:]:
        assert not is_run_of(ids[0], other)


@given(_TASKS, st.integers(2, 10**6))
def test_no_task_has_the_run_id_of_a_later_generation(
    task: tuple[str, str, str, int], generation: int
) -> None:
    base_id = base_run_id(*task)
    assert not re.search(r"\.g\d+$", base_id)
    assert is_run_of(base_id, f"{base_id}.g{generation}")
    assert not is_run_of(base_id, f"{base_id}.gpu")
    assert not is_run_of(base_id, f"{base_id}.g01")


def test_tasks_whose_ids_differ_by_a_dot_or_a_dash_have_different_runs() -> None:
    tasks = ["t", "t.g2", "t-", "t.", "-t", "t--0", "group.t", "group-t", "group--t", "t!", "t?"]
    ids = {base_run_id("dag", "r", task) for task in tasks}
    ids |= {base_run_id("dag", "r--t", "0"), base_run_id("dag", "r", "t", 0)}
    ids |= {base_run_id("dag--r", "t", "0"), base_run_id("d", "ag", "r--t")}
    assert len(ids) == len(tasks) + 4


def test_a_new_run_may_not_be_called_like_a_later_generation(storage: Storage) -> None:
    for _ in range(2):  # whether there is a first generation or not
        with pytest.raises(InvalidSpec, match="ends like a later generation of run 'run'"):
            attach(storage, "run.g2", GOOD, owner="me", environment={})
        submit(storage)


def test_a_later_generation_is_gone_on_with_by_its_own_id_but_not_repeated(
    storage: Storage,
) -> None:
    first = submit(storage)
    succeed(first)
    mark_delivered(first, "me")
    second = submit(storage, owner="cleared")
    again = attach(storage, "run.g2", GOOD, owner="by hand", environment={}, clock=lambda: NOW)
    assert again.run_id == second.run_id
    succeed(second)
    mark_delivered(second, "me")
    with pytest.raises(InvalidSpec, match="generation 2 of 'run'"):
        attach(storage, "run.g2", GOOD, owner="by hand", environment={}, clock=lambda: NOW)
    assert list_runs(storage) == ["run", "run.g2"]
