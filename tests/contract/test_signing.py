"""Only what a controller wrote, and where it wrote it, is acted on."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst.errors import FormatError, InvalidSpec, UntrustedObject
from spotfirst.events import Attached, Created, Waiting
from spotfirst.run import Run, create_run
from spotfirst.signing import (
    KEY_VARIABLE,
    UNVERIFIED,
    ControlKeys,
    Seal,
    default_keys,
    generate_key,
    key_file,
)
from spotfirst.spec import RunSpec
from spotfirst.storage import Storage
from spotfirst.wire import encode
from tests.waiting import PATIENCE_S

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)
KEY, OTHER = "k" * 40, "o" * 40
_bytes = st.binary(max_size=200).map(lambda data: b'{"x":"%s"}' % data.hex().encode())


def _spec(run_id: str = "r", **changes: Any) -> RunSpec:
    fields = {"run_id": run_id, "created_at": NOW, "command": ("python", "train.py")}
    return RunSpec(**{**fields, **changes})


def _made(memory: Storage, run_id: str = "r") -> Run:
    """A run with a spec, two amendments and three events."""
    run = create_run(memory, _spec(run_id))
    for retries in (1, 2):
        run.amend(_spec(run_id, script_retries=retries))
    journal = run.journal(by="controller")
    journal.append(Created(at=NOW))
    for owner in ("one", "two"):
        journal.append(Attached(at=NOW, owner=owner))
    return run


@given(body=_bytes, other=_bytes, path=st.text(max_size=20), after=st.text(max_size=20))
def test_what_was_signed_opens_and_nothing_else(
    body: bytes, other: bytes, path: str, after: str
) -> None:
    seal = Seal(ControlKeys(KEY), "r", "memory://x")
    data, mac = seal.close(body, path=path, after=after)
    assert seal.open(data, path=path, after=after) == (body, mac)
    for path_2, after_2 in ((path + "x", after), (path, after + "x"), (after + "y", path)):
        with pytest.raises(UntrustedObject):
            seal.open(data, path=path_2, after=after_2)
    for elsewhere in (Seal(ControlKeys(KEY), "s", "x"), Seal(ControlKeys(OTHER), "r", "x")):
        with pytest.raises(UntrustedObject):
            elsewhere.open(data, path=path, after=after)
    if other != body:
        with pytest.raises(UntrustedObject):
            seal.open(data.replace(body[:-1], other[:-1]), path=path, after=after)


@given(place=st.integers(0), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unseen(place: int, bit: int) -> None:
    seal = Seal(ControlKeys(KEY), "r", "memory://x")
    data = bytearray(seal.close(b'{"v":1,"kind":"created"}', path="p")[0])
    data[place % len(data)] ^= 1 << bit
    # A damaged version number may be refused as a newer format: refused all the same.
    with pytest.raises(FormatError):
        seal.open(bytes(data), path="p")


_FORGERIES: dict[str, Callable[[Storage], None]] = {
    "an unsigned spec": lambda m: m.write("control/runs/r/spec.json", encode(_spec())),
    "an unsigned amendment": lambda m: m.write(
        "control/runs/r/amendments/00000003.json", encode(_spec())
    ),
    "a spec with another key": lambda m: m.write(
        "control/runs/r/spec.json",
        Seal(ControlKeys(OTHER), "r", "").close(encode(_spec()), path="spec.json")[0],
    ),
    "an older amendment again": lambda m: m.write(
        "control/runs/r/amendments/00000003.json",
        m.read("control/runs/r/amendments/00000001.json"),
    ),
    "the spec as an amendment": lambda m: m.write(
        "control/runs/r/amendments/00000003.json", m.read("control/runs/r/spec.json")
    ),
    "another run's amendment": lambda m: m.write(
        "control/runs/r/amendments/00000002.json",
        m.read("control/runs/s/amendments/00000002.json"),
    ),
    "another run's event": lambda m: m.write(
        "control/runs/r/journal/00000001.json", m.read("control/runs/s/journal/00000001.json")
    ),
    "events in another order": lambda m: _swap(m, 2, 3),
    "an event twice": lambda m: m.write(
        "control/runs/r/journal/00000004.json", m.read("control/runs/r/journal/00000003.json")
    ),
    "an event left out": lambda m: _drop(m, 2),
}


def _swap(memory: Storage, one: int, two: int) -> None:
    paths = [f"control/runs/r/journal/{number:08d}.json" for number in (one, two)]
    first, second = map(memory.read, paths)
    memory.write(paths[0], second)
    memory.write(paths[1], first)


def _drop(memory: Storage, number: int) -> None:
    paths = [f"control/runs/r/journal/{n:08d}.json" for n in (number, number + 1)]
    memory.write(paths[0], memory.read(paths[1]))
    memory.delete(paths[1])


@pytest.mark.parametrize("forge", _FORGERIES.values(), ids=_FORGERIES.keys())
def test_a_forgery_is_refused_by_every_reader_and_named(
    memory: Storage, forge: Callable[[Storage], None]
) -> None:
    _made(memory)
    _made(memory, "s")
    forge(memory)
    run = Run(memory, "r")
    with pytest.raises(UntrustedObject, match=r"control/runs/r/\S+\.json"):
        run.original_spec(), run.spec(), run.journal().refresh()
    assert Run(memory, "s").spec().script_retries == 2


def test_a_controller_whose_past_was_replaced_is_refused_by_the_others(memory: Storage) -> None:
    """Whoever removes the newest event and lets another controller write in its place."""
    run = _made(memory)
    old = run.journal()
    old.refresh()
    memory.delete("control/runs/r/journal/00000003.json")
    new = Run(memory, "r").journal()
    new.refresh()
    new.append(Waiting(at=NOW, reason="in its place"))
    new.append(Waiting(at=NOW, reason="and on"))
    with pytest.raises(UntrustedObject, match="replaced or removed"):
        old.refresh()


def test_a_removed_amendment_is_missed(memory: Storage) -> None:
    run = _made(memory)
    memory.delete("control/runs/r/amendments/00000002.json")
    with pytest.raises(UntrustedObject, match=r"has 1 entries.*number 2"):
        run.spec_and_digest(amendments=2)


def test_a_forged_pin_is_refused(memory: Storage) -> None:
    run = _made(memory)
    name = run.pin(3, by="s")
    assert run.pins() == {3: ["s"]}
    data = memory.read(f"control/runs/r/pins/{name}")
    memory.write(f"control/runs/r/pins/{name.replace('00000003', '00000004')}", data)
    with pytest.raises(UntrustedObject):
        run.pins()


def test_after_a_change_of_keys_both_are_read_and_the_new_one_signs(memory: Storage) -> None:
    memory.keys = ControlKeys(OTHER)
    _made(memory)
    memory.keys = ControlKeys.parse(f"{KEY} {OTHER}")
    run = Run(memory, "r")
    journal = run.journal()
    journal.refresh()
    journal.append(Waiting(at=NOW, reason="new"))
    memory.keys = ControlKeys(OTHER)
    with pytest.raises(UntrustedObject, match=rf"signed with key {ControlKeys(KEY).ids[0]}"):
        Run(memory, "r").journal().refresh()
    memory.keys = ControlKeys.parse(f"{OTHER}\n{KEY}")
    assert Run(memory, "r").journal().refresh().seq == 4


def test_an_instance_reads_without_a_key_and_cannot_write(
    memory: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    _made(memory)
    monkeypatch.setenv(KEY_VARIABLE, "short")  # any use of a key fails
    run = Run(memory, "r", keys=UNVERIFIED)
    assert run.spec().script_retries == 2
    assert run.journal().refresh().owner == "two"
    assert run.pinned() == set()
    for write in (
        lambda: run.journal().append(Waiting(at=NOW, reason="x")),
        lambda: run.amend(_spec()),
        lambda: run.create_spec(_spec()),
        lambda: run.pin(1, by="r"),
    ):
        with pytest.raises(UntrustedObject, match="holds no control key"):
            write()


def test_checkpoints_are_read_without_a_key(
    memory: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "short")
    assert Run(memory, "r").chain().refresh().newest() is None


@pytest.mark.parametrize("text", ["", " ", "short", "k" * 31, f"{KEY} short"])
def test_an_unusable_key_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(InvalidSpec, match=r"control key.*python -m spotfirst.signing") as raised:
        ControlKeys.parse(text)
    assert "short" not in str(raised.value)


# -- the user's own key ---------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_the_first_use_makes_a_key_that_only_its_owner_reads(home: Path) -> None:
    first = default_keys()
    assert default_keys().ids == first.ids
    assert key_file() == home / "spotfirst" / "control.key"
    assert key_file().stat().st_mode & 0o777 == 0o600
    assert [path.name for path in key_file().parent.iterdir()] == ["control.key"]


def _ids(_: int) -> tuple[str, ...]:
    return default_keys().ids


def test_racing_processes_make_one_key(home: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert len(set(pool.map_async(_ids, range(12)).get(timeout=PATIENCE_S))) == 1


def test_a_key_that_others_can_read_is_refused(home: Path) -> None:
    default_keys()
    key_file().chmod(0o640)
    with pytest.raises(InvalidSpec, match=r"chmod 600 .*control.key"):
        default_keys()


def test_where_no_key_can_be_made_it_is_said_what_to_do(home: Path) -> None:
    (home / "spotfirst").write_text("in the way")
    with pytest.raises(InvalidSpec, match=rf"{KEY_VARIABLE}.*python -m spotfirst.signing"):
        default_keys()


def test_the_environments_key_comes_before_the_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert default_keys().ids == ControlKeys(KEY).ids
    assert not (home / "spotfirst").exists()


def test_no_object_of_a_run_holds_the_key(memory: Storage) -> None:
    key = generate_key()
    memory.keys = ControlKeys(key)
    _made(memory)
    assert all(key.encode() not in memory.read(path) for path, _ in memory.walk(""))
    assert msgspec.json.decode(memory.read("control/runs/r/spec.json"))["mac"].count(".") == 1


def test_without_a_home_it_says_where_else_a_key_can_come_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A container whose user has no entry in /etc/passwd."""
    for name in (KEY_VARIABLE, "XDG_CONFIG_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    with pytest.raises(InvalidSpec, match=f"no control key.*Set {KEY_VARIABLE}"):
        default_keys()
