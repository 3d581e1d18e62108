"""Checkpoints of scripts that only write files: the agent keeps a directory safe for them.

A capture is a snapshot of one instant: the script stands still while its folder is looked at and
what changed is copied, and runs on while the copy is stored. What is being rewritten at that
instant stays as it was captured before (:mod:`spotfirst.checkpoints.settling`), and so does a
folder of several files that is not complete yet (:mod:`spotfirst.checkpoints.foldersets`). As long
as there is such a file, what was removed just before stays too: perhaps in favour of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from spotfirst.checkpoints.claiming import wait_for_claim
from spotfirst.checkpoints.containers import wholeness
from spotfirst.checkpoints.filepacks import (
    EMPTY,
    Captured,
    Chunk,
    Content,
    Hole,
    Save,
    Snapshot,
    Unsure,
    comes_further,
    content_of,
    locations,
    manifest_of,
    sparse,
)
from spotfirst.checkpoints.foldersets import (
    FolderSets,
    Unit,
    is_log_name,
    missing_shards,
    unit_of,
)
from spotfirst.checkpoints.inventory import (
    Inventory,
    link_goes_to,
    list_folder,
    warn_of_losses,
)
from spotfirst.checkpoints.manifest import FilesManifest, FolderRef, LinkRef, write_manifest
from spotfirst.checkpoints.mirroring import mirror
from spotfirst.checkpoints.packs import PACK_BYTES, Location, chunk_digest
from spotfirst.checkpoints.restoring import load_newest
from spotfirst.checkpoints.retention import Retention, tidy
from spotfirst.checkpoints.settling import Settling, Signature, same_bytes, signature
from spotfirst.checkpoints.staging import Copied, PauseTooLong, Staging, extents, read_at
from spotfirst.checkpoints.writers import Inode, find_writers, inode_of
from spotfirst.errors import StorageError
from spotfirst.patience import Sleep
from spotfirst.run import Run
from spotfirst.wire import Clock, utc_now

__all__ = ["FILE_CHUNK_BYTES", "FileCheckpoints", "Freeze"]

_log = logging.getLogger(__name__)

Freeze = Callable[[], AbstractContextManager[Collection[int] | None]]
"""Inside of it the script's processes stand still; it gives their ids, or ``None`` where none are
stopped: then only files count that have been unchanged for a while."""

FILE_CHUNK_BYTES = 1 << 20
"""A file that grew, or was rewritten in part, moves those of its pieces that changed."""

_TRIES = 4
_MOST_WARNINGS = 20
_SMALL_BYTES = 1 << 20
"""A smaller file is copied while the script stands still; a larger one that is closed is read
afterwards, and copied the next time when it was changed meanwhile."""
_MOST_OPEN = 256
_POINTER_BYTES = 4096
_TORN_S = 60.0
_SQLITE_PARTS = ("-journal", "-wal", "-shm")

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Without following links, and without waiting for the other end of a pipe."""

_Verdict = Literal["same", "whole", "log", "before"]


class _Changed(Exception):
    """A file was changed while it was read."""

    def __init__(self, path: str, inode: Inode) -> None:
        super().__init__(path)
        self.path, self.inode = path, inode


@dataclass
class _Decision:
    """What to keep of a folder, as of one instant."""

    inventory: Inventory
    verdicts: dict[str, _Verdict] = field(default_factory=dict)
    held: dict[str, bool] = field(default_factory=dict)
    """Folders that are not complete, and whether nothing of them has been kept."""

    @property
    def waiting(self) -> set[str]:
        """Files that changed and are not taken."""
        return {path for path, verdict in self.verdicts.items() if verdict == "before"}

    def is_in_new(self, path: str) -> bool:
        """Whether a path is, or is in, a folder of which nothing is kept."""
        return any(
            is_new and (path == folder or path.startswith(f"{folder}/"))
            for folder, is_new in self.held.items()
        )


@dataclass(frozen=True)
class _Source:
    """A file that is taken: a copy of its bytes, or a descriptor to read them from."""

    status: os.stat_result
    copied: Copied | None
    descriptor: int = -1
    is_clone: bool = False


class FileCheckpoints:
    """Captures ``folder`` into the run's checkpoints, and restores it.

    For one thread; but :meth:`note_writers` may be called beside a capture.

    ``freeze`` stops those who write; without it, a closed file must have been unchanged for
    ``settle_s``. Of a file that is larger than ``chunk_bytes``, only pieces of that size that
    changed are written. The step of a checkpoint is the number of captures so far in which more
    than logs had changed: a newer one of the same step has newer logs.
    """

    def __init__(
        self,
        run: Run,
        attempt: int,
        folder: Path,
        *,
        settle_s: float = 1.0,
        chunk_bytes: int = FILE_CHUNK_BYTES,
        freeze: Freeze = contextlib.nullcontext,
        most_pause_s: float = 20.0,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Sleep = time.sleep,
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._folder = folder.absolute()
        self._freeze = freeze
        self._most_pause_s = most_pause_s
        self._clock, self._monotonic, self._sleep = clock, monotonic, sleep
        self._settling = Settling(self._folder, settle_s, clock=clock, monotonic=monotonic)
        self._sets = FolderSets(monotonic)
        self._lock = threading.Lock()
        self._chain = run.chain()
        self._packs = run.packs()
        self._chunk_bytes = chunk_bytes
        self._retention = Retention()
        self._claim = 0
        self._saves = 0
        self._captured: dict[str, Captured] = {}
        # Of every chunk in _captured; and of what a capture that failed has written.
        self._where: dict[str, Location] = {}
        self._committed: Content | None = None
        self._unsure: Unsure | None = None
        self._unreported_bytes = 0
        self._gone: dict[str, set[str]] = {}
        self._restless: set[Inode] = set()
        self._cut: dict[str, Signature] = {}
        self._cut_folders: dict[str, frozenset[tuple[str, Signature]]] = {}
        self._last_look: tuple[dict[str, _Verdict], float] = ({}, 0.0)
        self._logs: set[str] = set()
        self._warned: set[str] = set()
        self.step = 0
        """Captures of more than logs so far, in the run and in the checkpoint it started from."""
        self.pause_s = 0.0
        """How long the script stood still for the last capture."""
        self.restored_seq: int | None = None
        """The chain's number of the checkpoint that this run was restored from."""
        self.is_waiting = False
        """Whether the last look found something that is still being written."""
        self.saved_at: float | None = None
        """When the script last completed a file that is no log, as seconds since the epoch."""
        self.warnings: tuple[str, ...] = ()
        """What people should look at."""

    def restore(self, *, leave: Callable[[], bool] = lambda: False) -> int | None:
        """Claim the run's checkpoints, and make the folder what the newest whole one holds.

        The claim is waited for as in :func:`wait_for_claim`. The result is the step, 0 without a
        checkpoint, or ``None`` when ``leave`` said to stop waiting. Raises :class:`ClaimLost`,
        :class:`CorruptObject` when there are checkpoints and none is whole, and
        :class:`StorageUnavailable`: call it again.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        claimed = wait_for_claim(
            self._run, self._chain, self._attempt, leave=leave, clock=self._clock,
            monotonic=self._monotonic, sleep=self._sleep,
        )  # fmt: skip
        if not claimed:
            return None
        self._claim = self._chain.claims[-1]
        spec = self._run.spec()
        self._retention = spec.retention
        restored = load_newest(
            self._run, self._chain, lambda packs, commit: mirror(packs, commit, self._folder), content="files",
            resume_from=spec.resume_from, warn=self._warn,
        )  # fmt: skip
        if restored is None:
            return 0
        self.step = restored.commit.step
        self.restored_seq = restored.seq
        if restored.seq is not None:
            self._remember(restored.value)
        return self.step

    def capture(self, *, final: bool = False) -> int | None:
        """Commit what is whole in the folder; the entry's number, or ``None`` when nothing is new.

        ``final``: the script has ended, so everything is taken, but for what
        :meth:`note_writers` saw being written.
        Raises :class:`StorageUnavailable`, when a later call goes on where this one stopped, and
        :class:`ClaimLost`.
        """
        seq = self._hear()
        save = Save(self._packs, self._claim, self._saves + 1, self._well_used())
        done: dict[str, Captured] = {}
        try:
            snapshot = self._snapshot(save, done, final=final)
            if snapshot is None or (content := content_of(snapshot)) == (self._committed or EMPTY):
                if snapshot is not None:
                    self._captured = dict(snapshot.files)
                self._discard(save)
                return seq
            self._thin(snapshot, save)
            return self._commit(snapshot, content, save)
        except BaseException:
            # What is written need not be written again; the rest is not known to be anywhere.
            self._where |= save.written()
            self._unreported_bytes += save.writer.new_bytes
            self._captured |= {
                path: entry for path, entry in done.items() if self._is_stored(entry)
            }
            raise

    def look(
        self,
        pids: Collection[int] | None = None,
        *,
        is_running: Callable[[], bool] = lambda: True,
    ) -> None:
        """Look at the folder without copying anything, so that the next capture knows more.

        ``pids`` are the processes that may write to it; ``None`` for all of this user. When they
        have ended meanwhile, nothing is learned. Cheap enough for every second.
        """
        with self._lock:
            looked_at = self._clock().timestamp()
            decision = self._decide(pids, frozen=True, final=False, is_look=True)
            if not is_running():
                return
            self._remember_look(decision, looked_at)
        self.is_waiting = bool(decision.waiting or decision.held)

    def note_writers(self, pids: Collection[int] | None = None) -> None:
        """To be called while the script stands still and is about to be sent a signal.

        What it is writing then stays half-written, unless it changes afterwards.
        """
        with self._lock:
            decision = self._decide(pids, frozen=True, final=False)
        files = decision.inventory.files
        # What an earlier signal cut off has no writer any more, and looks whole.
        before = {p: cut for p, cut in self._cut.items() if p in files}
        self._cut = {p: cut for p, cut in before.items() if same_bytes(cut, signature(files[p]))}
        self._cut |= {
            path: signature(files[path])
            for path in decision.waiting
            if not decision.is_in_new(path) or self._settling.writers_of(files[path])
        }
        self._cut_folders |= {folder: _content(folder, files) for folder in decision.held}

    def note_death(self) -> None:
        """To be called when the script was ended by someone else, so nobody saw it stand still.

        Whatever changed since the last look may be half-written, unless it is a log, or its format
        says that it is whole.
        """
        last, looked_at = self._last_look
        with self._lock:
            decision = self._decide((), frozen=True, final=False)
        files = decision.inventory.files
        self._cut = {}
        for path, verdict in decision.verdicts.items():
            known = last.get(path)
            is_old = files[path].st_mtime < looked_at - 1.0 and known != "before"
            is_log = path in self._logs or is_log_name(path)
            if verdict == "whole" and not (is_log or is_old or self._has_end(path)):
                self._cut[path] = signature(files[path])
        self._cut_folders = {folder: _content(folder, files) for folder in decision.held}

    def forget_writers(self) -> None:
        """To be called when the script has ended by itself all the same."""
        self._cut, self._cut_folders = {}, {}

    def release(self) -> None:
        """Let a successor claim at once. Raises :class:`ClaimLost`, :class:`StorageUnavailable`."""
        self._chain.release(self._attempt)

    def close(self) -> None:
        """Watch the folder no more."""
        self._settling.close()

    # -- deciding ---------------------------------------------------------------------------

    def _decide(
        self, pids: Collection[int] | None, *, frozen: bool, final: bool, is_look: bool = False
    ) -> _Decision:
        """What to keep of the folder as it is now."""
        inventory = list_folder(self._folder, self._warn)
        writers = {} if final else find_writers(self._folder, pids)
        self._settling.look(inventory.files, inventory.folders, writers)
        decision = _Decision(inventory)
        known = {folder.path for folder in (self._committed or EMPTY)[2]}
        root_is_one = any(
            "/" not in path and path.endswith((".index.json", ".metadata"))
            for path in inventory.files
        )
        units: dict[str, Unit] = {}
        with_files = {p.rpartition("/")[0] for p in inventory.files if not is_log_name(p)}
        for path, status in inventory.files.items():
            place = unit_of(path, known, with_files=with_files, root_is_one=root_is_one)
            unit = None
            if place is not None:
                unit = units.setdefault(place, Unit(place, bool(place) and place not in known))
                unit.present.add(path)
            verdict = self._verdict(path, status, unit, frozen=frozen, final=final, is_look=is_look)
            decision.verdicts[path] = verdict
            if unit is None or verdict in {"same", "log"} or is_log_name(path):
                continue
            if verdict == "whole":
                unit.whole[path] = self._settling.age_s(path, status)
                if path.endswith(".index.json"):
                    unit.shards |= self._shards(path)
            else:
                unit.writing.add(path)
                if path not in self._captured:
                    unit.lost.add(path)
        self._note_saves(decision)
        self._keep_databases_together(decision)
        self._hold(decision, units, final=final)
        return decision

    def _verdict(
        self,
        path: str,
        status: os.stat_result,
        unit: Unit | None,
        *,
        frozen: bool,
        final: bool,
        is_look: bool,
    ) -> _Verdict:
        kept = self._captured.get(path)
        writers = self._settling.writers_of(status)
        if (
            kept is not None
            and kept.signature == signature(status)
            and not (writers is not None and writers.mapped)
        ):
            return "same"
        if inode_of(status) in self._restless and not (frozen and not final):
            return "before"
        if final and path in self._cut and same_bytes(self._cut[path], signature(status)):
            self._warn_of_half(path, "was being written when the script was stopped")
            return "before"
        with self._opened(path) as descriptor:
            if descriptor is None:
                return "before"

            def extends() -> bool:
                return not is_look and kept is not None and self._extends(kept, descriptor, status)

            is_new = unit is not None and unit.is_new and not is_log_name(path)
            verdict = self._settling.verdict(
                path, status, descriptor, frozen=frozen or final,
                kept="file" if kept is not None else "no folder" if is_new else "nothing",
                extends=extends,
            )  # fmt: skip
        if verdict == "before" and writers is None and self._is_cut_off(path, status, final=final):
            self._warn_of_half(path, "has no end, as its format has it")
        return verdict

    def _is_cut_off(self, path: str, status: os.stat_result, *, final: bool) -> bool:
        return final or self._settling.age_s(path, status) > _TORN_S

    def _keep_databases_together(self, decision: _Decision) -> None:
        """An SQLite database and what belongs to it are of one instant, or of the one before."""
        for path, verdict in decision.verdicts.items():
            base = _database_of(path)
            if base not in decision.verdicts:
                continue
            if decision.verdicts[base] == "before":
                decision.verdicts[path] = "before"
            elif verdict == "before":
                decision.verdicts[path] = "log"

    def _hold(self, decision: _Decision, units: dict[str, Unit], *, final: bool) -> None:
        """Take nothing of folders that are not complete, nor what points to them."""
        files = decision.inventory.files
        folders = decision.inventory.folders
        held = self._sets.held(units.values(), self._captured, final=final, folders=folders)
        if final:
            held |= {
                folder
                for folder, content in self._cut_folders.items()
                if folder in units and content == _content(folder, files)
            }
        decision.held = {folder: units[folder].is_new for folder in held}
        for folder in held:
            for path in units[folder].present:
                verdict = decision.verdicts[path]
                stays = not units[folder].is_new and (verdict == "log" or is_log_name(path))
                if verdict != "same" and not stays:
                    decision.verdicts[path] = "before"
        names = {(str(PurePosixPath(f).parent), PurePosixPath(f).name) for f in held if f}
        for path, status in files.items() if names else ():
            parent = str(PurePosixPath(path).parent)
            wanted = [name.encode() for folder, name in names if folder == parent]
            if wanted and decision.verdicts[path] == "whole" and status.st_size <= _POINTER_BYTES:
                data = self._head(path)
                if any(name in data for name in wanted):
                    decision.verdicts[path] = "before"
        if final:
            for folder in held:
                self._warn(
                    f"the folder {folder or '.'!r} was not complete when the script ended, so it "
                    "is kept as it was before"
                )

    def _remember_look(self, decision: _Decision, looked_at: float) -> None:
        self._last_look = (decision.verdicts, looked_at)
        self._logs = {
            path
            for path, verdict in decision.verdicts.items()
            if verdict == "log" or (verdict == "same" and path in self._logs)
        }

    def _note_saves(self, decision: _Decision) -> None:
        """Remember when the script last completed a file that is no log."""
        times = [
            decision.inventory.files[path].st_mtime
            for path, verdict in decision.verdicts.items()
            if verdict == "whole" and not is_log_name(path)
        ]
        if times:
            self.saved_at = max(self.saved_at or 0.0, *times)

    def _extends(self, kept: Captured, descriptor: int, status: os.stat_result) -> bool:
        """Whether an open file begins with all that was kept of it."""
        if kept.holes or status.st_size < kept.size_bytes:
            return False
        offset = 0
        memory = memoryview(bytearray(max((size for _, size in kept.chunks), default=0)))
        for digest, size in kept.chunks:
            if read_at(descriptor, offset, memory[:size]) < size:
                return False
            if chunk_digest(memory[:size]) != digest:
                return False
            offset += size
        return True

    def _shards(self, path: str) -> set[str]:
        with self._opened(path) as descriptor:
            data = b"" if descriptor is None else os.pread(descriptor, 64 << 20, 0)
        folder = path.rpartition("/")[0]
        names = missing_shards(data)
        return {f"{folder}/{name}" if folder else name for name in names}

    def _has_end(self, path: str) -> bool:
        with self._opened(path) as descriptor:
            if descriptor is None:
                return False
            return wholeness(descriptor, path, os.fstat(descriptor).st_size) == "whole"

    def _head(self, path: str) -> bytes:
        with self._opened(path) as descriptor:
            return b"" if descriptor is None else os.pread(descriptor, _POINTER_BYTES, 0)

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[int | None]:
        """A descriptor to read a file; ``None`` when it is gone, or may not be read."""
        try:
            descriptor = os.open(self._folder / path, _OPEN)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            self._warn(f"{path!r} cannot be read, so it is not kept: {error.strerror}")
            yield None
            return
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    # -- capturing --------------------------------------------------------------------------

    def _snapshot(self, save: Save, done: dict[str, Captured], *, final: bool) -> Snapshot | None:
        """The folder as of one instant, with its bytes given to ``save``; ``None``: impossible."""
        self._restless = set()
        for _ in range(_TRIES):
            done.clear()
            try:
                return self._try_snapshot(save, done, final=final)
            except _Changed as changed:
                self._restless.add(changed.inode)
                if final:
                    self._warn(
                        f"{changed.path!r} is still being written after the script's end; it is "
                        "kept as it was before"
                    )
            except PauseTooLong:
                self._warn(
                    f"what changes in place cannot be copied within {self._most_pause_s:g} s, so "
                    "nothing newer is kept: let the script write less at a time, or use a file "
                    "system with reflinks (XFS, Btrfs)"
                )
                return None
            except OSError as error:
                self._warn(f"the files cannot be copied, so nothing newer is kept: {error}")
                return None
        return None

    def _try_snapshot(self, save: Save, done: dict[str, Captured], *, final: bool) -> Snapshot:
        with contextlib.ExitStack() as stack:
            began = self._monotonic()
            over_at = began + self._most_pause_s
            with contextlib.nullcontext(None) if final else self._freeze() as pids:
                frozen = pids is not None
                began = self._monotonic()
                over_at = began + self._most_pause_s
                staging = Staging(
                    self._folder.parent, save.known, self._chunk_bytes,
                    is_over=lambda: frozen and self._monotonic() > over_at,
                )  # fmt: skip
                stack.callback(staging.close)
                with self._lock:
                    decision = self._decide(pids, frozen=frozen, final=final)
                    if not final:
                        self._remember_look(decision, self._clock().timestamp())
                sources = self._take(decision, staging, stack)
            self.pause_s = self._monotonic() - began if frozen else 0.0
            files = self._with_gone(decision)
            for path, source in sources.items():
                files[path] = done[path] = self._store(path, source, staging, save)
        self.is_waiting = bool(decision.waiting or decision.held)
        return Snapshot(files, self._links(decision, files), self._folders(decision, files))

    def _take(
        self,
        decision: _Decision,
        staging: Staging,
        stack: contextlib.ExitStack,
    ) -> dict[str, _Source]:
        """Copies of the files to take, or descriptors to read them from later."""
        sources: dict[str, _Source] = {}
        for path, verdict in decision.verdicts.items():
            if verdict not in {"whole", "log"}:
                continue
            expected = decision.inventory.files[path]
            try:
                descriptor = os.open(self._folder / path, _OPEN)
            except FileNotFoundError as error:
                raise _Changed(path, inode_of(expected)) from error
            closing = stack.enter_context(contextlib.ExitStack())
            closing.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            warn_of_losses(path, descriptor, status, self._warn)
            if verdict == "whole" and signature(status) != signature(expected):
                raise _Changed(path, inode_of(status))
            is_open = self._settling.writers_of(status) is not None
            later = not is_open and status.st_size > _SMALL_BYTES
            later = later and inode_of(status) not in self._restless
            if later and len(sources) < _MOST_OPEN:
                sources[path] = _Source(status, None, descriptor)
                continue
            clone = staging.clone(descriptor, status.st_size)
            if clone is not None:
                sources[path] = _Source(status, None, clone, is_clone=True)
                closing.close()
                continue
            copied = staging.copy(descriptor, status.st_size, is_sparse=_is_sparse(status))
            after = os.fstat(descriptor)
            if copied is None or (verdict == "whole" and signature(after) != signature(status)):
                raise _Changed(path, inode_of(status))
            sources[path] = _Source(status, copied)
            closing.close()
        return sources

    def _store(self, path: str, source: _Source, staging: Staging, save: Save) -> Captured:
        """Give one file's bytes to ``save``. Raises :class:`_Changed`."""
        status = source.status
        self._saves = save.number
        if source.copied is not None:
            staging.store(source.copied, save)
            chunks, holes = source.copied.chunks, source.copied.holes
        else:
            found = self._read(source.descriptor, status, save)
            after = os.fstat(source.descriptor)
            is_same = source.is_clone or same_bytes(signature(after), signature(status))
            if found is None or not is_same:
                raise _Changed(path, inode_of(status))
            chunks, holes = found
        return Captured(
            signature(status), status.st_mode & 0o777, tuple(chunks), tuple(holes),
            links=status.st_nlink,
        )  # fmt: skip

    def _read(
        self, descriptor: int, status: os.stat_result, save: Save
    ) -> tuple[list[Chunk], list[Hole]] | None:
        """Give an open file's bytes to ``save``; ``None`` when it has become shorter."""
        chunks: list[Chunk] = []
        holes: list[Hole] = []
        step = max(1, PACK_BYTES // self._chunk_bytes) * self._chunk_bytes
        for offset, size, is_hole in extents(
            descriptor, status.st_size, self._chunk_bytes, _is_sparse(status)
        ):
            if is_hole:
                holes.append((offset, size))
                continue
            for start in range(offset, offset + size, step):
                target = save.buffer[: min(step, offset + size - start)]
                if read_at(descriptor, start, target) < len(target):
                    return None
                chunks += save.add(target, self._chunk_bytes)
        return chunks, holes

    def _with_gone(self, decision: _Decision) -> dict[str, Captured]:
        """What is kept from before: unchanged, being rewritten, or gone in favour of such a file."""
        inventory, waiting = decision.inventory, decision.waiting
        kept = {
            path: self._captured[path]
            for path, verdict in decision.verdicts.items()
            if verdict in {"same", "before"} and path in self._captured
        }
        present = {*inventory.files, *inventory.links}
        gone: dict[str, set[str]] = {}
        for path in self._captured.keys() - inventory.files.keys():
            parents = [str(parent) for parent in PurePosixPath(path).parents]
            if path in inventory.folders or path in present or present.intersection(parents):
                continue  # something else is in its place
            if _database_of(path) in inventory.files:
                continue  # an empty journal is as good as none
            there = next((p for p in parents if p == "." or p in inventory.folders), ".")
            beside = {p for p in waiting if there == "." or p.startswith(f"{there}/")}
            # Only what was under way when it went: what comes later is not its replacement.
            blockers = self._gone.get(path, beside) & waiting
            if blockers:
                gone[path] = blockers
                kept[path] = self._captured[path]
        self._gone = gone
        return kept

    def _links(self, decision: _Decision, files: dict[str, Captured]) -> tuple[LinkRef, ...]:
        """The links; one to something that is not taken is as it was before."""
        before = {link.path: link for link in (self._committed or EMPTY)[1]}
        inventory = decision.inventory
        found: dict[str, LinkRef] = {}
        for path, link in inventory.links.items():
            if decision.is_in_new(path):
                continue
            goal = link_goes_to(path, link.target)
            is_held = decision.is_in_new(goal) or (goal in inventory.files and goal not in files)
            if not is_held:
                found[path] = link
            elif path in before:
                found[path] = before[path]
        return tuple(link for _, link in sorted(found.items()))

    def _folders(self, decision: _Decision, files: dict[str, Captured]) -> tuple[FolderRef, ...]:
        """The folders: those that are there, and those of files that are gone and stay."""
        before = {folder.path: folder for folder in (self._committed or EMPTY)[2]}
        found = {
            path: folder
            for path, folder in decision.inventory.folders.items()
            if not decision.is_in_new(path)
        }
        for path in self._gone:
            for parent in list(PurePosixPath(path).parents)[:-1]:
                name = str(parent)
                if name in before:
                    found.setdefault(name, before[name])
        return tuple(
            folder for path, folder in sorted(found.items()) if path not in files
        )  # fmt: skip

    # -- committing -------------------------------------------------------------------------

    def _hear(self) -> int | None:
        """Whether a commit that was not answered has been applied: its entry's number."""
        if self._unsure is None:
            return None
        newest = self._chain.refresh().newest()
        if newest is None or newest[1].manifest != self._unsure.name:
            return None
        self._accept(self._unsure, newest[1].step)
        return newest[0]

    def _commit(self, snapshot: Snapshot, content: Content, save: Save) -> int:
        save.writer.finish()
        self._saves = save.number
        unsure = self._unsure
        if unsure is None or unsure.content != content:
            manifest = manifest_of(content, self._where | save.written())
            unsure = self._unsure = Unsure(save.manifest, manifest, content)
        digest, size_bytes = write_manifest(self._packs, unsure.name, unsure.manifest)
        new_bytes = self._unreported_bytes + save.writer.new_bytes
        step = self.step + comes_further(self._committed or EMPTY, content)
        seq = self._chain.commit(
            self._attempt, step=step, manifest=unsure.name, digest=digest,
            content="files", size_bytes=unsure.manifest.size_bytes + size_bytes,
            new_bytes=new_bytes + size_bytes,
        )  # fmt: skip
        self._captured = dict(snapshot.files)
        self._accept(unsure, step)
        tidy(self._packs, self._chain, self._attempt, self._retention, pinned=self._run.pinned)
        return seq

    def _accept(self, newest: Unsure, step: int) -> None:
        """The newest checkpoint is this one: what it does not name may be collected."""
        self.step = step
        self._committed = newest.content
        self._unsure = None
        self._unreported_bytes = 0
        self._where = locations(newest.manifest)
        self._captured = {
            path: entry for path, entry in self._captured.items() if self._is_stored(entry)
        }

    def _is_stored(self, entry: Captured) -> bool:
        return all(digest in self._where for digest, _ in entry.chunks)

    def _discard(self, save: Save) -> None:
        try:
            save.writer.discard()
        except StorageError as error:
            _log.warning("could not remove an unfinished checkpoint, will try again: %s", error)

    # -- sharing packs ----------------------------------------------------------------------

    def _well_used(self) -> dict[str, Location]:
        """What need not be written, because it is in a pack that is worth keeping."""
        few = sparse(self._where, set(self._where))
        return {d: where for d, where in self._where.items() if where.pack not in few}

    def _thin(self, snapshot: Snapshot, save: Save) -> None:
        """Take unchanged files again whose packs are kept for little more than them."""
        used = {digest for entry in snapshot.files.values() for digest, _ in entry.chunks}
        few = sparse(self._where, used)
        where = self._where | save.written()
        for path, entry in snapshot.files.items():
            if any(d in where and where[d].pack in few for d, _ in entry.chunks):
                with self._opened(path) as descriptor:
                    if descriptor is None:
                        continue
                    status = os.fstat(descriptor)
                    if signature(status) == entry.signature:
                        self._saves = save.number
                        self._read(descriptor, status, save)

    # -- restoring --------------------------------------------------------------------------

    def _remember(self, manifest: FilesManifest) -> None:
        """What need not be read again, because it was just written from the checkpoint."""
        self._captured = {}
        for file in manifest.files:
            status = (self._folder / file.path).lstat()
            self._captured[file.path] = Captured(
                signature(status), file.mode,
                tuple((part.digest, part.size_bytes) for part in file.parts), file.holes,
                links=status.st_nlink,
            )  # fmt: skip
        self._where = locations(manifest)
        self._committed = content_of(Snapshot(self._captured, manifest.links, manifest.folders))

    # -- warnings ---------------------------------------------------------------------------

    def _warn_of_half(self, path: str, why: str) -> None:
        before = "as it was before" if path in self._captured else "out of the checkpoint"
        self._warn(
            f"{path!r} {why}, so it is kept {before}; write beside it and rename, or save on SIGTERM"
        )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _log.warning("%s", message)
            self.warnings = (*self.warnings, message)[-_MOST_WARNINGS:]


def _is_sparse(status: os.stat_result) -> bool:
    return status.st_blocks * 512 < status.st_size


def _database_of(path: str) -> str:
    """The database that a file would belong to, by its name; empty when it is none of SQLite's."""
    for ending in _SQLITE_PARTS:
        if path.endswith(ending):
            return path[: -len(ending)]
    return ""


def _content(folder: str, files: dict[str, os.stat_result]) -> frozenset[tuple[str, Signature]]:
    prefix = f"{folder}/" if folder else ""
    return frozenset(
        (path, signature(status)) for path, status in files.items() if path.startswith(prefix)
    )
