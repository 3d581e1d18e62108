"""A run as files in one place: names, and who reads and writes which.

What controllers decide is kept apart from what instances write, which have no right to write
there, and it is signed (:mod:`spotfirst.signing`).

===================================== =================== ====================================
path below ``control/runs/{run_id}/`` written by          rule
===================================== =================== ====================================
``spec.json``                         who creates the run created once
``amendments/00000001.json`` …        who reopens the run append-only; the newest is the spec
``journal/00000001.json`` …           controllers         append-only sequence of events
``pins/{seq}-{nonce}.json``           who replays it      created once; keeps a checkpoint
===================================== =================== ====================================

================================ ======================== ==================================
path below ``runs/{run_id}/``    written by               rule
================================ ======================== ==================================
``attempts/{n}/agent.json``      the attempt's agent      created once: one agent per attempt
``attempts/{n}/heartbeat.json``  the attempt's agent      replaced
``attempts/{n}/handover.json``   controller, successor    created once
``attempts/{n}/exit.json``       the attempt's agent      created once
``attempts/{n}/log/00000001`` …  the attempt's agent      append-only, text
``checkpoints/00000001.json`` …  the claim's holder       append-only sequence
``packs/{claim}/{save}…``        the claim's holder       written once; removed when unneeded
================================ ======================== ==================================
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import secrets
from collections.abc import Callable
from typing import TypeVar

from spotfirst.checkpoints.chain import CheckpointChain
from spotfirst.errors import (
    CorruptObject,
    FormatError,
    InvalidSpec,
    ObjectMissing,
    UnknownRun,
    UntrustedObject,
)
from spotfirst.heartbeat import ExitReport, Handover, Heartbeat, clipped
from spotfirst.journal import Journal
from spotfirst.sequence import Sequence
from spotfirst.signing import UNVERIFIED, ControlKeys, Seal, default_keys
from spotfirst.spec import RunSpec, check_run_id, is_run_id
from spotfirst.storage import Storage
from spotfirst.wire import LIMIT_BYTES, Record, decode, encode

__all__ = ["Run", "create_run", "list_runs"]

_CONTROL = "control/runs"

SEGMENT_LIMIT_BYTES = 512 * 1024
"""Of one piece of an attempt's output: agents write half of it at most."""

_log = logging.getLogger(__name__)
_C = TypeVar("_C", Heartbeat, ExitReport)
_PIN = re.compile(r"(\d{8})-[0-9a-f]{16}\.json")


class Pin(Record):
    """Another run starts from the checkpoint that the object's name says: ``by``."""

    by: str


class Run:
    """The files of one run. Opening it touches nothing.

    ``spec_digest`` is for instances: the only spec that they take, from their launch.
    """

    @classmethod
    def on_instance(cls, storage: Storage, run_id: str, spec_digest: str) -> Run:
        """The run as an instance reads it: without a key, and with the spec of its launch only."""
        return cls(storage, run_id, keys=UNVERIFIED, spec_digest=spec_digest)

    def __init__(
        self,
        storage: Storage,
        run_id: str,
        *,
        keys: ControlKeys | None = None,
        spec_digest: str = "",
    ) -> None:
        self.root = storage
        """The storage that holds all runs."""
        self.run_id = check_run_id(run_id)
        self.storage = storage.child(f"runs/{run_id}")
        """What its instances write."""
        self.control = storage.child(f"{_CONTROL}/{run_id}")
        """What its controllers write."""
        self._keys = keys
        self._spec_digest = spec_digest

    @functools.cached_property
    def _seal(self) -> Seal:
        # Late, so that a reader of checkpoints needs no key.
        return Seal(self._keys or self.root.keys or default_keys(), self.run_id, self.control.url)

    @property
    def url(self) -> str:
        """Where the files of its instances are."""
        return self.storage.url

    def exists(self) -> bool:
        """Whether the run has been created."""
        return self.control.exists("spec.json")

    def spec(self) -> RunSpec:
        """What the run is asked to do: the newest amendment, or what it began with.

        Raises :class:`UnknownRun`.
        """
        return self.spec_and_digest()[0]

    def spec_and_digest(self, *, amendments: int = 0) -> tuple[RunSpec, str]:
        """The spec with the SHA-256 of its object, by which an instance knows that it is the same.

        Raises :class:`UntrustedObject` when fewer than ``amendments`` are there: somebody removed
        the newest, and an older one would be taken for it. On an instance, also for another spec
        than that of its launch.
        """
        path, data = self._newest_spec(amendments)
        digest = hashlib.sha256(data).hexdigest()
        if self._spec_digest not in {"", digest}:
            msg = (
                f"{self.control.url}/{path} has the SHA-256 {digest}, and this attempt was "
                f"launched for {self._spec_digest}: the run was amended since, or somebody changed "
                "the object. Nothing is run"
            )
            raise UntrustedObject(msg)
        return self._decode_spec(path, data), digest

    def _newest_spec(self, amendments: int) -> tuple[str, bytes]:
        found = Sequence(self.control, "amendments").read_new()
        if len(found) < amendments:
            msg = (
                f"{self.control.url}/amendments has {len(found)} entries, and the journal names "
                f"number {amendments}: somebody removed it. Restore it from an older version of "
                "the object"
            )
            raise UntrustedObject(msg)
        return found[-1] if found else ("spec.json", self._read_spec())

    def amend(self, spec: RunSpec) -> int:
        """Ask for other work from now on; the number of the amendment."""
        spec.check()
        amendments = Sequence(self.control, "amendments")
        while True:
            amendments.read_new()
            path = amendments.path(amendments.length + 1)
            if amendments.append(self._seal.close(encode(spec), path=path)[0]):
                return amendments.length

    def original_spec(self) -> RunSpec:
        """What the run was created with. Raises :class:`UnknownRun`."""
        return self._decode_spec("spec.json", self._read_spec())

    def create_spec(self, spec: RunSpec) -> bool:
        """Write what the run is created with; whether it was not there."""
        data, _ = self._seal.close(encode(spec), path="spec.json")
        return self.control.create("spec.json", data)

    def _read_spec(self) -> bytes:
        try:
            return self.control.read("spec.json", limit_bytes=LIMIT_BYTES)
        except ObjectMissing as error:
            msg = f"there is no run {self.run_id!r} in {self.root.url}; `spotfirst runs` lists them"
            raise UnknownRun(msg) from error

    def _decode_spec(self, path: str, data: bytes) -> RunSpec:
        body, _ = self._seal.open(data, path=path)
        spec = decode(body, RunSpec, path=f"{self.control.url}/{path}")
        if spec.run_id != self.run_id:
            msg = f"{self.control.url}/{path} is the spec of another run, {spec.run_id!r}"
            raise UntrustedObject(msg)
        return spec

    def journal(self, *, by: str = "") -> Journal:
        """A reader and writer of its journal; ``by`` is who writes, for the events."""
        return Journal(self.control, by=by, seal=self._seal)

    def chain(self) -> CheckpointChain:
        """A reader and writer of its checkpoint chain."""
        return CheckpointChain(self.storage)

    def packs(self) -> Storage:
        """Where the bytes of its checkpoints and their manifests are."""
        return self.storage.child("packs")

    def pin(self, seq: int, *, by: str) -> str:
        """Keep checkpoint ``seq`` for the run ``by``, which starts from it; the pin's name.

        Look at the chain *afterwards*: a checkpoint that is pruned by then may be gone. Every pin
        is an object of its own, so taking one back takes nothing from another submitter.
        """
        name = f"{seq:08d}-{secrets.token_hex(8)}.json"
        path = f"pins/{name}"
        data, _ = self._seal.close(encode(Pin(by=check_run_id(by))), path=path)
        self.control.create(path, data)
        return name

    def unpin(self, name: str) -> None:
        """Take back a pin, by what :meth:`pin` returned."""
        self.control.delete(f"pins/{name}")

    def pinned(self) -> set[int]:
        """The sequence numbers of the checkpoints that other runs start from."""
        names = self.control.list("pins")
        return {int(match[1]) for name in names if (match := _PIN.fullmatch(name))}

    def pins(self) -> dict[int, list[str]]:
        """The same with the runs that start from each, sorted."""
        names = [name for name in self.control.list("pins") if _PIN.fullmatch(name)]
        found = self.control.read_many([f"pins/{name}" for name in names], limit_bytes=LIMIT_BYTES)
        runs: dict[int, set[str]] = {}
        for name in names:
            path = f"pins/{name}"
            body, _ = self._seal.open(found[path], path=path)
            by = decode(body, Pin, path=f"{self.control.url}/{path}").by
            runs.setdefault(int(name[:8]), set()).add(by)
        return {seq: sorted(by) for seq, by in runs.items()}

    def attempt_path(self, number: int, name: str) -> str:
        """The path of one of an attempt's files, below :attr:`storage`."""
        return f"attempts/{number}/{name}"

    def heartbeat(
        self, attempt: int, *, warn: Callable[[str], object] = _log.warning
    ) -> Heartbeat | None:
        """The newest heartbeat of an attempt; ``None`` before the first.

        It is what an instance claims: one that cannot be read counts as none, and ``warn`` is
        called with what is wrong.
        """
        return self._claim(attempt, "heartbeat.json", Heartbeat, warn)

    def exit_report(
        self, attempt: int, *, warn: Callable[[str], object] = _log.warning
    ) -> ExitReport | None:
        """How an attempt ended, in its own words; ``None`` while it has not said so.

        As with :meth:`heartbeat`, one that cannot be read counts as none.
        """
        return self._claim(attempt, "exit.json", ExitReport, warn)

    def _claim(
        self, attempt: int, name: str, kind: type[_C], warn: Callable[[str], object]
    ) -> _C | None:
        path = self.attempt_path(attempt, name)
        try:
            data = self.storage.read_or_none(path, limit_bytes=LIMIT_BYTES)
            if data is None:
                return None
            told = decode(data, kind, path=f"{self.url}/{path}")
            if told.attempt != attempt:
                msg = f"{self.url}/{path} calls itself that of attempt {told.attempt}"
                raise CorruptObject(msg)
            return clipped(told)
        except FormatError as error:
            warn(str(error))
            return None

    def handover(self, attempt: int) -> Handover | None:
        """The request to an attempt to checkpoint and stop; ``None`` when there is none."""
        path = self.attempt_path(attempt, "handover.json")
        data = self.storage.read_or_none(path, limit_bytes=LIMIT_BYTES)
        return None if data is None else decode(data, Handover, path=f"{self.url}/{path}")

    def beat(self, heartbeat: Heartbeat) -> None:
        """Replace the attempt's heartbeat."""
        self.storage.write(
            self.attempt_path(heartbeat.attempt, "heartbeat.json"), encode(heartbeat)
        )

    def report_exit(self, report: ExitReport) -> None:
        """The first report stands; a second one is dropped."""
        self.storage.create(self.attempt_path(report.attempt, "exit.json"), encode(report))

    def request_handover(self, attempt: int, handover: Handover) -> None:
        """Ask an attempt to checkpoint and stop. The first request stands."""
        self.storage.create(self.attempt_path(attempt, "handover.json"), encode(handover))

    def log_path(self, attempt: int, segment: int) -> str:
        """The path of one piece of an attempt's output, below :attr:`storage`."""
        return self.attempt_path(attempt, f"log/{segment:08d}")

    def log_segment(self, attempt: int, segment: int) -> str | None:
        """One piece of an attempt's output, from 1 on; ``None`` when it is not there (yet).

        Of one that is larger than any that an agent writes, the beginning.
        """
        path = self.log_path(attempt, segment)
        try:
            data = self.storage.read_range(path, 0, SEGMENT_LIMIT_BYTES + 1)
        except ObjectMissing:
            return None
        text = data[:SEGMENT_LIMIT_BYTES].decode("utf-8", "replace")
        cut = f"\n[spotfirst] the rest of {self.url}/{path} is left out: it is too large\n"
        return text + cut if len(data) > SEGMENT_LIMIT_BYTES else text


def create_run(storage: Storage, spec: RunSpec) -> Run:
    """Write the spec of a new run; the run that is there when it asks for the same work.

    Raises :class:`InvalidSpec` when a different run has this id.
    """
    spec.check()
    run = Run(storage, spec.run_id)
    if not run.create_spec(spec):
        present = run.original_spec()
        if not present.same_work(spec):
            msg = (
                f"run {spec.run_id!r} exists in {storage.url} and asks for other work "
                "(another command, code, fleet, …); choose another run id"
            )
            raise InvalidSpec(msg)
    return run


def list_runs(storage: Storage) -> list[str]:
    """The ids of all runs in a storage, sorted."""
    return [name for name in storage.list(_CONTROL) if is_run_id(name)]
