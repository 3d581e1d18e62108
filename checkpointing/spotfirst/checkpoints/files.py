"""Checkpoints of scripts that only write files: the agent keeps a directory safe for them.

A file is taken when it is whole as far as can be seen from outside
(:mod:`spotfirst.checkpoints.settling`), and does not change while it is read. A file that is being
written stays as it was captured before; and as long as there is one, files that are gone stay too:
a script may have removed them in favour of it. After the script's end everything is taken but for
what it was writing when it was stopped.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from spotfirst.checkpoints.claiming import wait_for_claim
from spotfirst.checkpoints.filepacks import (
    Captured,
    Chunk,
    Content,
    Save,
    Unsure,
    content_of,
    locations,
    manifest_of,
    sparse,
)
from spotfirst.checkpoints.manifest import FilesManifest, write_manifest
from spotfirst.checkpoints.mirroring import mirror
from spotfirst.checkpoints.packs import PACK_BYTES, Location
from spotfirst.checkpoints.restoring import load_newest
from spotfirst.checkpoints.retention import Retention, tidy
from spotfirst.checkpoints.settling import Settling, Signature, same_bytes, signature
from spotfirst.errors import StorageError
from spotfirst.patience import Sleep
from spotfirst.run import Run
from spotfirst.wire import Clock, utc_now

__all__ = ["FILE_CHUNK_BYTES", "FileCheckpoints"]

_log = logging.getLogger(__name__)

FILE_CHUNK_BYTES = 1 << 20
"""A file that grew, or was rewritten in part, moves those of its pieces that changed."""

_FINAL_TRIES = 3

_MOST_WARNINGS = 20

_MOST_REPLACED = 100
"""Files that are open at the same time."""

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
"""Without following links, and without waiting for the other end of a pipe."""


class FileCheckpoints:
    """Captures ``folder`` into the run's checkpoints, and restores it. For one thread.

    ``settle_s`` is how long a file must have been unchanged; of a file that is larger than
    ``chunk_bytes``, only pieces of that size that changed are written. Links and special files are
    left out, with a warning. The step of a checkpoint is the number of captures so far.
    """

    def __init__(
        self,
        run: Run,
        attempt: int,
        folder: Path,
        *,
        settle_s: float = 1.0,
        chunk_bytes: int = FILE_CHUNK_BYTES,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Sleep = time.sleep,
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._folder = folder
        self._clock, self._monotonic, self._sleep = clock, monotonic, sleep
        self._settling = Settling(folder, settle_s, clock=clock, monotonic=monotonic, sleep=sleep)
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
        self._warned: set[str] = set()
        self.step = 0
        """Captures so far, in the run and in the checkpoint it started from."""
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
        captured: dict[str, Captured] = {}
        try:
            self._look(captured, save, final=final)
            content = content_of(captured)
            if content == (self._committed or ()):
                self._captured = captured
                self._discard(save)
                return seq
            self._thin(captured, save)
            return self._commit(captured, content, save)
        except BaseException:
            # What is written need not be written again; the rest is not known to be anywhere.
            self._where |= save.written()
            self._unreported_bytes += save.writer.new_bytes
            self._captured |= {
                path: entry for path, entry in captured.items() if self._is_stored(entry)
            }
            raise

    def note_writers(self) -> None:
        """To be called before the script is sent a signal: what it writes may stay half-written."""
        self._settling.note_writers()

    def forget_writers(self) -> None:
        """To be called when the script has ended by itself all the same."""
        self._settling.forget_writers()

    def release(self) -> None:
        """Let a successor claim at once. Raises :class:`ClaimLost`, :class:`StorageUnavailable`."""
        self._chain.release(self._attempt)

    # -- capturing --------------------------------------------------------------------------

    def _look(self, captured: dict[str, Captured], save: Save, *, final: bool) -> None:
        """Enter every file of the folder, as it is or as it was captured before."""
        settling = self._settling
        settling.begin()
        replaced: list[str] = []
        present: set[str] = set()
        for path, status in self._files():
            present.add(path)
            looks = signature(status)
            kept = self._captured.get(path)
            if kept is None or kept.signature != looks:
                before = settling.last_seen(path) or (kept.signature if kept else None)
                taken = None
                if final and settling.is_cut_off(status):
                    self._warn(
                        f"{path!r} was being written when the script was stopped, so it is kept "
                        "as it was before; write beside it and rename, or save on SIGTERM"
                    )
                elif final or settling.is_settled(path, status):
                    taken = self._take(path, looks, save, final=final)
                elif settling.is_replaced(status, before):
                    replaced.append(path)
                if taken is None and not final:
                    settling.add_pending(path)
                kept = taken or kept
            if kept is not None:
                captured[path] = kept
        self._take_replaced(replaced[:_MOST_REPLACED], captured, save)
        if settling.is_under_way:
            # What is gone may have been removed in favour of a file that is not taken yet.
            folders = {str(parent) for path in present for parent in PurePosixPath(path).parents}
            for path in self._captured.keys() - present - folders:
                if present.isdisjoint(str(parent) for parent in PurePosixPath(path).parents):
                    captured[path] = self._captured[path]
        settling.end()

    def _take_replaced(self, paths: list[str], captured: dict[str, Captured], save: Save) -> None:
        """Take files that another one was renamed to, even when that happens all the time."""
        if not paths:
            return
        with contextlib.ExitStack() as stack:
            files = {}
            for path in paths:
                with contextlib.suppress(OSError):
                    handle = os.open(self._folder / path, _OPEN)
                    files[path] = stack.enter_context(open(handle, "rb", buffering=0))  # noqa: PTH123
            whole = self._settling.look_twice({p: file.fileno() for p, file in files.items()})
            for path in sorted(whole):
                entry = self._read(files[path], save)
                if entry is not None:
                    captured[path] = entry
                    self._settling.is_taken(path)

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        for parent, folders, names in os.walk(self._folder):
            folders.sort()
            for name in sorted(names):
                full = Path(parent, name)
                try:
                    status = full.lstat()
                    path = full.relative_to(self._folder).as_posix()
                    path.encode()
                except OSError:
                    continue  # gone since it was listed
                except UnicodeEncodeError:
                    self._warn(f"{full!a} is left out of checkpoints: its name is not UTF-8")
                    continue
                if stat.S_ISREG(status.st_mode) and "\\" not in path:
                    yield path, status
                else:
                    self._warn(f"{path!r} is left out of checkpoints: it is no plain file")
            for name in folders:
                if Path(parent, name).is_symlink():
                    self._warn(f"{name!r} is left out of checkpoints: it is a link")

    def _take(self, path: str, expected: Signature, save: Save, *, final: bool) -> Captured | None:
        """The file with its bytes given to ``save``; ``None`` when it is not as ``expected``.

        After the script's end it may be as it likes, if only it stays so while it is read.
        """
        for _ in range(_FINAL_TRIES if final else 1):
            try:
                handle = os.open(self._folder / path, _OPEN)
            except FileNotFoundError:
                return None
            except OSError as error:
                self._warn(f"{path!r} cannot be read, so it is not checkpointed: {error}")
                return None
            with open(handle, "rb", buffering=0) as file:  # noqa: PTH123 - opened above
                if not final and signature(os.fstat(handle)) != expected:
                    return None
                entry = self._read(file, save)
            if entry is not None:
                return entry
        if final:
            self._warn(f"{path!r} is still being written after the script's end; it is left out")
        return None

    def _read(self, file: io.FileIO, save: Save) -> Captured | None:
        """Give the file's bytes to ``save``; ``None`` when it changes meanwhile."""
        status = os.fstat(file.fileno())
        looks = signature(status)
        if not stat.S_ISREG(status.st_mode):
            return None
        chunks: list[Chunk] = []
        while True:
            size = 0
            while size < PACK_BYTES and (count := file.readinto(save.buffer[size:])):
                size += count
            if not same_bytes(signature(os.fstat(file.fileno())), looks):
                return None
            if size:
                self._saves = save.number
                chunks += save.add(save.buffer[:size], self._chunk_bytes)
            if size < PACK_BYTES:
                break
        entry = Captured(looks, bool(status.st_mode & stat.S_IXUSR), tuple(chunks))
        return entry if entry.size_bytes == status.st_size else None

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

    def _commit(self, captured: dict[str, Captured], content: Content, save: Save) -> int:
        save.writer.finish()
        self._saves = save.number
        unsure = self._unsure
        if unsure is None or unsure.content != content:
            manifest = manifest_of(captured, self._where | save.written())
            unsure = self._unsure = Unsure(save.manifest, manifest, content)
        digest, size_bytes = write_manifest(self._packs, unsure.name, unsure.manifest)
        new_bytes = self._unreported_bytes + save.writer.new_bytes
        seq = self._chain.commit(
            self._attempt, step=self.step + 1, manifest=unsure.name, digest=digest,
            content="files", size_bytes=unsure.manifest.size_bytes + size_bytes,
            new_bytes=new_bytes + size_bytes,
        )  # fmt: skip
        self._captured = captured
        self._accept(unsure, self.step + 1)
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

    def _thin(self, captured: dict[str, Captured], save: Save) -> None:
        """Take unchanged files again whose packs are kept for little more than them."""
        used = {digest for entry in captured.values() for digest, _ in entry.chunks}
        few = sparse(self._where, used)
        where = self._where | save.written()
        for path, entry in captured.items():
            if any(d in where and where[d].pack in few for d, _ in entry.chunks):
                self._take(path, entry.signature, save, final=False)

    # -- restoring --------------------------------------------------------------------------

    def _remember(self, manifest: FilesManifest) -> None:
        """What need not be read again, because it was just written from the checkpoint."""
        self._captured = {
            file.path: Captured(
                signature((self._folder / file.path).lstat()),
                file.executable,
                tuple((part.digest, part.size_bytes) for part in file.parts),
            )
            for file in manifest.files
        }
        self._where = locations(manifest)
        self._committed = content_of(self._captured)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _log.warning("%s", message)
            self.warnings = (*self.warnings, message)[-_MOST_WARNINGS:]
