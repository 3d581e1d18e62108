"""Whoever can write to the bucket: every object changed, replaced, moved, or taken away.

What it may cost is the run that was tampered with. No controller executes, launches, ends or
pays for anything because of it, and the other runs go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import msgspec
import pytest

from spotfirst import events as e
from spotfirst.errors import FormatError, UntrustedObject
from spotfirst.events import encode_event
from spotfirst.run import Run, create_run, list_runs
from spotfirst.signing import ControlKeys, Seal
from spotfirst.storage import Storage
from tests.controller.world import World

CONTROL = "control/runs/run"
OTHER_KEY = ControlKeys("another key, of somebody who has none of ours")


def _world() -> World:
    """A run that trains, with an amendment, beside another run that is as honest."""
    world = World(budget_usd=None)
    for _ in range(30):
        world.reconcile()
        world.tick()
    world.run.amend(world.spec)
    other = create_run(world.storage, msgspec.structs.replace(world.spec, run_id="other"))
    other.amend(msgspec.structs.replace(world.spec, run_id="other"))
    journal = other.journal()
    journal.append(e.Created(at=world.now))
    journal.append(e.Attached(at=world.now, owner="other"))
    return world


def _resigned(storage: Storage, path: str) -> bytes:
    """The object with a key of the attacker's, signed in the right way otherwise."""
    body = storage.read(f"{CONTROL}/{path}").rpartition(b',"mac":')[0] + b"}"
    return Seal(OTHER_KEY, "run", "").close(body, path=path)[0]


def _edited(storage: Storage, path: str) -> bytes:
    """The object with its signature, and one letter of another value."""
    record = json.loads(storage.read(f"{CONTROL}/{path}"))
    record["at" if "at" in record else "created_at"] = "2020-01-01T00:00:00Z"
    return json.dumps(record, separators=(",", ":")).encode()


def _unsigned(storage: Storage, path: str) -> bytes:
    return storage.read(f"{CONTROL}/{path}").rpartition(b',"mac":')[0] + b"}"


_FORGERIES: dict[str, Callable[[Storage, str], bytes]] = {
    "garbage": lambda s, p: b"\0\xff" * 100,
    "nothing": lambda s, p: b"",
    "deep": lambda s, p: b"[" * 100_000,
    "unsigned": _unsigned,
    "edited": _edited,
    "signed with another key": _resigned,
    "another run's": lambda s, p: s.read(f"control/runs/other/{p}"),
    "of another place": lambda s, p: s.read(f"{CONTROL}/journal/00000001.json")
    if not p.endswith("1.json") else s.read(f"{CONTROL}/spec.json"),
}  # fmt: skip
_PATHS = ("spec.json", "amendments/00000001.json", "journal/00000001.json", "journal/00000002.json")


@pytest.mark.parametrize("forge", _FORGERIES.values(), ids=_FORGERIES.keys())
@pytest.mark.parametrize("path", _PATHS)
def test_a_forged_decision_makes_a_controller_do_nothing(
    path: str, forge: Callable[[Storage, str], bytes]
) -> None:
    world = _world()
    before = set(world.machines)
    world.storage.write(f"{CONTROL}/{path}", forge(world.storage, path))
    journal = world.storage.list(f"{CONTROL}/journal")
    if path == "spec.json":  # an amendment counts in its place, and is whole
        with pytest.raises(FormatError, match=r"spec\.json"):
            Run(world.storage, "run").original_spec()
    else:
        with pytest.raises(FormatError, match=path.replace(".", r"\.")):
            world.new_controller().step()
    assert set(world.machines) == before
    assert all(machine.ended_at is None for machine in world.machines.values())
    assert world.storage.list(f"{CONTROL}/journal") == journal


_EVENTS: dict[str, e.Event] = {
    "a success": e.Succeeded(at=World().now, attempt=1, step=10**6),
    "a stop": e.StopRequested(at=World().now, reason="by somebody"),
    "another owner": e.Attached(at=World().now, owner="eve"),
    "a reopening": e.Reopened(at=World().now, owner="eve", amendment=1),
    "an end": e.Ended(at=World().now, attempt=1, cause="completed", ended_at=World().now),
}


@pytest.mark.parametrize("event", _EVENTS.values(), ids=_EVENTS.keys())
def test_an_event_that_somebody_appends_is_refused_by_whoever_is_at_work(event: e.Event) -> None:
    world = _world()
    number = len(world.storage.list(f"{CONTROL}/journal")) + 1
    path = f"{CONTROL}/journal/{number:08d}.json"
    world.storage.write(path, encode_event(event, nonce="0" * 16))
    for controller in (world.controllers[0], world.new_controller()):
        with pytest.raises(UntrustedObject, match=rf"{number:08d}\.json carries no signature"):
            controller.step()
    assert all(machine.ended_at is None for machine in world.machines.values())
    world.storage.delete(path)
    assert world.until_done().state.result is not None


def test_a_run_that_somebody_makes_is_listed_and_not_acted_on() -> None:
    """A copy of a whole run under another name, say."""
    world = _world()
    for path, _ in list(world.storage.walk(CONTROL)):
        world.storage.write(f"control/runs/copy/{path}", world.storage.read(f"{CONTROL}/{path}"))
    assert list_runs(world.storage) == ["copy", "other", "run"]
    with pytest.raises(UntrustedObject, match=r"copy/amendments"):
        Run(world.storage, "copy").spec()
    with pytest.raises(UntrustedObject, match=r"copy/journal"):
        Run(world.storage, "copy").journal().refresh()
    assert Run(world.storage, "run").spec() == world.spec


def test_an_amendment_that_is_taken_away_is_missed() -> None:
    world = World()
    world.reconcile()
    journal = world.run.journal()
    journal.refresh()
    journal.append(e.Failed(at=world.now, message="x"))
    number = world.run.amend(world.spec)
    journal.append(e.Reopened(at=world.now, owner="me", amendment=number))
    world.storage.delete(f"{CONTROL}/amendments/00000001.json")
    with pytest.raises(UntrustedObject, match="names number 1: somebody removed it"):
        world.new_controller().step()


def test_a_pin_that_somebody_makes_keeps_a_checkpoint_and_does_no_more() -> None:
    world = _world()
    world.storage.write(f"{CONTROL}/pins/00000001-{'0' * 16}.json", b'{"v":1,"by":"eve"}')
    assert world.run.pinned() == {1}
    with pytest.raises(UntrustedObject, match="pins"):
        world.run.pins()
    assert world.until_done().state.result is not None


@pytest.mark.parametrize(
    "name", ["agent.json", "heartbeat.json", "handover.json", "exit.json", "log/00000001"]
)
@pytest.mark.parametrize("data", [b"", b"\0", b"{}", b"[" * 100_000, b'{"v":99}', b'{"v":1,"attempt":"x"}'],
                         ids=["empty", "zero", "{}", "deep", "newer", "odd"])  # fmt: skip
def test_what_is_written_over_an_attempts_files_costs_at_most_that_attempt(
    name: str, data: bytes
) -> None:
    """The controller neither stops looking nor believes it."""
    world = _world()
    spent = len(world.machines)
    world.storage.write(f"runs/run/attempts/1/{name}", data)
    for _ in range(5):
        world.reconcile()
    assert len(world.machines) == spent
    assert world.storage.read(f"{CONTROL}/spec.json")
