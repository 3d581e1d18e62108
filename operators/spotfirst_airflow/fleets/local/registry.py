"""What is known about the instances of a local fleet, as files that any process may read.

``{root}/instances/{token}/`` belongs to one token for ever:

| file | created by | means |
|---|---|---|
| `claim.json` | whoever launches | the token has an instance; there with the folder, at once |
| `boot.json` | the supervisor, or whoever gives up on it | the supervisor lives, or never will |
| `alive` | the supervisor | locked for as long as it lives; touched every second |
| `running.json` | the supervisor | the agent was started |
| `notice.json` | the supervisor | the instance will be killed |
| `interrupt.json` | whoever interrupts | the supervisor is to act as if the market took it |
| `terminate.json` | whoever terminates | the supervisor is to end it |
| `terminated.json` | whoever saw it end | no process of it is left |

Every file but `alive` appears complete or not at all, and the first one to create it wins. So a
folder whose launcher died has no `boot.json`; whoever declares it dead creates that file, and a
supervisor that is late finds it and goes away. The lock says who lives, across pid namespaces and
reboots; a process id would not. `{root}/live/{token}` is there while the instance may live.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from spotfirst.errors import SpotfirstError
from spotfirst.market import Notice
from spotfirst.wire import Record, decode, encode
from spotfirst_airflow.fleets.base import EndedBy, LaunchRequest
from spotfirst_airflow.fleets.local.processes import ProcessRef

__all__ = [
    "Boot",
    "Claim",
    "Folder",
    "InterruptRequest",
    "Registry",
    "Running",
    "TerminateRequest",
    "Terminated",
    "is_token",
]

_TOKEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_KEEP_FILES_S = 24 * 3600.0
_KEEP_TOKEN_S = 30 * 24 * 3600.0
_PRUNE_EVERY_S = 600.0

_R = TypeVar("_R", bound=Record)


class Claim(Record):
    """What was launched. Holds no credentials: those only ever are in the environment."""

    instance_id: str
    request: LaunchRequest
    options: dict[str, Any]
    market_key: str
    claimed_at: datetime
    price_usd_h: Decimal
    price_source: str
    on_demand_usd_h: Decimal
    clock_rate: float


class Boot(Record):
    """``process`` is the supervisor; ``None`` means that there will never be one."""

    at: datetime
    process: ProcessRef | None = None


class Running(Record):
    """The agent runs, and its metadata service is at ``endpoint``."""

    at: datetime
    endpoint: str
    agent: ProcessRef | None = None


class TerminateRequest(Record):
    """Someone wants it gone."""

    at: datetime


class InterruptRequest(Record):
    """Someone wants to see the market take it, with the usual notice or without."""

    at: datetime
    notice: bool = True


class Terminated(Record):
    """The end. ``rejected`` says why the instance never was one, if it never was."""

    at: datetime
    by: EndedBy
    message: str = ""
    rejected: str = ""


_NAMES: dict[type[Record], str] = {
    Claim: "claim.json",
    Boot: "boot.json",
    Running: "running.json",
    Notice: "notice.json",
    TerminateRequest: "terminate.json",
    InterruptRequest: "interrupt.json",
    Terminated: "terminated.json",
}


class Folder:
    """One token's files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def log(self) -> Path:
        """What supervisor and agent print."""
        return self.path / "instance.log"

    @property
    def work(self) -> Path:
        """The instance's disk."""
        return self.path / "work"

    def read(self, kind: type[_R]) -> _R | None:
        """The record of this kind, if there is one."""
        path = self.path / _NAMES[kind]
        try:
            return decode(path.read_bytes(), kind, path=str(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def has(self, kind: type[Record]) -> bool:
        """Whether there is a record of this kind; cheaper than reading it."""
        return (self.path / _NAMES[kind]).exists()

    def create(self, record: Record) -> bool:
        """Write the record unless there is one of its kind; whether it was this one."""
        temporary = self.path / f".{uuid.uuid4().hex}"
        try:
            _write(temporary, encode(record))
            os.link(temporary, self.path / _NAMES[type(record)])
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def hold(self) -> int | None:
        """Lock the sign of life until this process ends, and return its descriptor.

        ``None`` when another supervisor has booted, or was told not to.
        """
        descriptor = os.open(self.path / "alive", os.O_RDWR | os.O_CREAT, 0o600)
        while not self.has(Boot):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            time.sleep(0.005)
        os.close(descriptor)
        return None

    def is_held(self) -> bool:
        """Whether the supervisor lives. Only means something after it has booted."""
        try:
            descriptor = os.open(self.path / "alive", os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def last_alive(self) -> datetime | None:
        """When the supervisor last showed a sign of life."""
        with contextlib.suppress(FileNotFoundError):
            return datetime.fromtimestamp((self.path / "alive").stat().st_mtime, timezone.utc)
        return None


class Registry:
    """All tokens of one root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._instances = root / "instances"
        self._live = root / "live"

    @property
    def cache(self) -> Path:
        """What instances may share, as machine images do."""
        return self.root / "cache"

    def folder(self, token: str) -> Folder:
        """The token's folder, which may not exist."""
        return Folder(self._instances / token)

    def claim(self, claim: Claim) -> bool:
        """Give the token an instance, unless it was given one or withdrawn; whether it was now."""
        token = claim.request.token
        self._prepare()
        # Before the claim, so that no instance is ever missing from the live ones.
        (self._live / token).touch(mode=0o600)
        return self._appear(token, claim)

    def withdraw(self, token: str, at: datetime) -> bool:
        """Make a token that was never launched unlaunchable; whether that is what it was."""
        if self.folder(token).path.exists():
            return False
        self._prepare()
        return self._appear(token, Terminated(at=at, by="request", rejected="withdrawn"))

    def live(self) -> list[str]:
        """The tokens that may have a living instance."""
        try:
            return sorted(path.name for path in self._live.iterdir())
        except FileNotFoundError:
            return []

    def forget(self, token: str) -> None:
        """Take a terminated token off the live ones."""
        (self._live / token).unlink(missing_ok=True)

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """Exclude other launches, so that what is counted stays true until the claim."""
        self._prepare()
        descriptor = os.open(self.root / "launch.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def prune(self, now: datetime, *, keep_files_s: float = _KEEP_FILES_S) -> None:
        """Delete the disks and logs of instances that ended a day ago, and old tokens entirely.

        A token outlives its files by a month, so that no late launch can give it a new instance.
        """
        for path in list(self._instances.iterdir()) if self._instances.is_dir() else []:
            folder = Folder(path)
            if path.name.startswith("."):  # left by someone who died before the claim
                age_s = now.timestamp() - path.stat().st_mtime
            else:
                ended = folder.read(Terminated)
                age_s = (now - ended.at).total_seconds() if ended else -1.0
            if age_s > keep_files_s:
                shutil.rmtree(folder.work, ignore_errors=True)
                folder.log.unlink(missing_ok=True)
            if age_s > _KEEP_TOKEN_S or (path.name.startswith(".") and age_s > keep_files_s):
                # Gone at once for everyone else, however long the deletion takes.
                doomed = path.with_name(f".{uuid.uuid4().hex}")
                with contextlib.suppress(OSError):
                    path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        for token in self.live():  # whoever announced it died before the claim
            mark = self._live / token
            if not self.folder(token).path.exists():
                with contextlib.suppress(FileNotFoundError):
                    if now.timestamp() - mark.stat().st_mtime > keep_files_s:
                        mark.unlink()

    def prune_sometimes(self, now: datetime) -> None:
        """Prune if nobody did so lately."""
        stamp = self.root / "pruned"
        with contextlib.suppress(FileNotFoundError):
            if abs(now.timestamp() - stamp.stat().st_mtime) < _PRUNE_EVERY_S:
                return
        with contextlib.suppress(OSError, SpotfirstError):
            stamp.touch()
            self.prune(now)

    def _prepare(self) -> None:
        for path in (self.root, self._instances, self._live, self.cache):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _appear(self, token: str, record: Record) -> bool:
        """Make the token's folder with this record in it, in one step; whether it was us."""
        made = self._instances / f".{uuid.uuid4().hex}"
        made.mkdir(mode=0o700)
        try:
            _write(made / _NAMES[type(record)], encode(record))
            # Never replaces a folder with something in it, and each has from its beginning.
            made.rename(self.folder(token).path)
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                return False
            raise
        return True


def is_token(token: str) -> bool:
    """Whether it can name a folder."""
    return _TOKEN.fullmatch(token) is not None


def _write(path: Path, data: bytes) -> None:
    """On disk before it gets its name: a power cut must not leave an empty record."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
