"""Checkpoints of scripts that only write files: the agent keeps a directory safe for them.

A file is taken when it is whole as far as can be seen from outside: nobody has it open for
writing, and it has not changed for a while, nor while it was read. A file that is being written
stays as it was captured before. After the script's end everything is taken.
"""

from __future__ import annotations

import io
import logging
import os
import secrets
import shutil
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.claiming import wait_for_claim
from spotfirst.checkpoints.manifest import (
    FileRef,
    FilesManifest,
    PackRef,
    Part,
    read_manifest,
    write_manifest,
)
from spotfirst.checkpoints.memory import Block
from spotfirst.checkpoints.packs import (
    PACK_BYTES,
    Location,
    PackWriter,
    Wanted,
    chunk_digest,
    fetch,
    pack_prefix,
)
from spotfirst.checkpoints.restoring import load_newest
from spotfirst.checkpoints.retention import Retention, collect, prune
from spotfirst.errors import CorruptObject, FormatError, StorageError
from spotfirst.patience import Sleep
from spotfirst.run import Run
from spotfirst.storage import Storage
from spotfirst.wire import Clock, utc_now

__all__ = ["FILE_CHUNK_BYTES", "FileCheckpoints"]

_log = logging.getLogger(__name__)

FILE_CHUNK_BYTES = 1 << 20
"""A file that grew, or was rewritten in part, moves those of its pieces that changed."""

_FINAL_TRIES = 3

_MOST_WARNINGS = 20

Signature = tuple[int, int, int, int, int]
"""Device, inode, size and times of change: another file or other bytes have another."""


Chunk = tuple[str, int]
"""Digest and size of a piece of a file."""
Content = tuple[tuple[str, bool, tuple[Chunk, ...]], ...]
"""Path, executability and pieces of every file: what makes two checkpoints the same."""


@dataclass(frozen=True)
class _Captured:
    """A file as it was captured: what it looked like, and what it holds."""

    signature: Signature
    executable: bool
    chunks: tuple[Chunk, ...]

    @property
    def size_bytes(self) -> int:
        return sum(size for _, size in self.chunks)


@dataclass(frozen=True)
class _Unsure:
    """A checkpoint whose commit was not answered: it may be complete."""

    name: str
    manifest: FilesManifest
    content: Content


class _Save:
    """What one capture writes. Its number is in the names of all that it writes."""

    def __init__(
        self, packs: Storage, claim: int, number: int, known: Mapping[str, Location]
    ) -> None:
        self.manifest = f"{claim:08d}/{number:06d}.json"
        self.writer = PackWriter(packs, pack_prefix(claim, number), known)
        self.number = number
        self._parts: dict[str, Part] = {}
        self._buffer: Block | None = None

    @property
    def buffer(self) -> memoryview:
        if self._buffer is None:
            self._buffer = Block(PACK_BYTES)
        return self._buffer.view[:PACK_BYTES]

    def add(self, data: memoryview, chunk_bytes: int) -> list[Chunk]:
        cuts = [
            (start, min(chunk_bytes, len(data) - start))
            for start in range(0, len(data), chunk_bytes)
        ]
        digests = [chunk_digest(data[start : start + size]) for start, size in cuts]
        parts = self.writer.add(data, cuts, digests)
        self._parts.update(zip(digests, parts, strict=True))
        return [(digest, size) for digest, (_, size) in zip(digests, cuts, strict=True)]

    def written(self) -> dict[str, Location]:
        """What is in the storage, by digest; also when something went wrong."""
        found = ((digest, self.writer.location(part)) for digest, part in self._parts.items())
        return {digest: location for digest, location in found if location is not None}


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
        self._settle_s = settle_s
        self._clock, self._monotonic, self._sleep = clock, monotonic, sleep
        self._chain = run.chain()
        self._packs = run.packs()
        self._chunk_bytes = chunk_bytes
        self._retention = Retention()
        self._claim = 0
        self._saves = 0
        self._captured: dict[str, _Captured] = {}
        # Of every chunk in _captured; and of what a capture that failed has written.
        self._where: dict[str, Location] = {}
        self._committed: Content | None = None
        self._unsure: _Unsure | None = None
        self._unreported_bytes = 0
        self._seen: dict[str, tuple[Signature, float]] = {}
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
            self._run, self._chain, self._mirror, content="files",
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

        ``final``: the script has ended, so nothing is half-written and everything is taken.
        Raises :class:`StorageUnavailable`, when a later call goes on where this one stopped, and
        :class:`ClaimLost`.
        """
        seq = self._hear()
        save = _Save(self._packs, self._claim, self._saves + 1, self._well_used())
        captured: dict[str, _Captured] = {}
        try:
            self._look(captured, save, final=final)
            content = _content(captured)
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

    def release(self) -> None:
        """Let a successor claim at once. Raises :class:`ClaimLost`, :class:`StorageUnavailable`."""
        self._chain.release(self._attempt)

    # -- capturing --------------------------------------------------------------------------

    def _look(self, captured: dict[str, _Captured], save: _Save, *, final: bool) -> None:
        """Enter every file of the folder, as it is or as it was captured before."""
        writers = set() if final else _open_for_writing(self._folder)
        for path, status in self._files():
            kept = self._captured.get(path)
            signature = _signature(status)
            if kept is None or kept.signature != signature:
                whole = final or self._settled(path, status, writers)
                kept = (self._take(path, signature, save, final=final) if whole else None) or kept
            if kept is not None:
                captured[path] = kept
        self._seen = {path: seen for path, seen in self._seen.items() if path not in captured}

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

    def _settled(self, path: str, status: os.stat_result, writers: set[tuple[int, int]]) -> bool:
        """Whether nobody writes the file, and it has been as it is for ``settle_s``."""
        signature = _signature(status)
        now = self._monotonic()
        seen, since = self._seen.get(path, (None, now))
        if seen != signature:
            since = now
        self._seen[path] = (signature, since)
        if (status.st_dev, status.st_ino) in writers:
            return False
        age_s = self._clock().timestamp() - max(status.st_mtime, status.st_ctime)
        return age_s >= self._settle_s or now - since >= self._settle_s

    def _take(
        self, path: str, expected: Signature, save: _Save, *, final: bool
    ) -> _Captured | None:
        """The file with its bytes given to ``save``; ``None`` when it is not as ``expected``.

        After the script's end it may be as it likes, if only it stays so while it is read.
        """
        for _ in range(_FINAL_TRIES if final else 1):
            try:
                # Without following links, and without waiting for the other end of a pipe.
                handle = os.open(self._folder / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:
                return None
            except OSError as error:
                self._warn(f"{path!r} cannot be read, so it is not checkpointed: {error}")
                return None
            with open(handle, "rb", buffering=0) as file:  # noqa: PTH123 - opened above
                status = os.fstat(handle)
                signature = _signature(status)
                if not stat.S_ISREG(status.st_mode) or (not final and signature != expected):
                    return None
                chunks = self._read(file, signature, save)
            if chunks is not None:
                return _Captured(signature, bool(status.st_mode & stat.S_IXUSR), chunks)
        if final:
            self._warn(f"{path!r} is still being written after the script's end; it is left out")
        return None

    def _read(self, file: io.FileIO, signature: Signature, save: _Save) -> tuple[Chunk, ...] | None:
        """Give the file's bytes to ``save``; ``None`` when it changes meanwhile."""
        chunks: list[Chunk] = []
        while True:
            size = 0
            while size < PACK_BYTES and (count := file.readinto(save.buffer[size:])):
                size += count
            if _signature(os.fstat(file.fileno())) != signature:
                return None
            if size:
                self._saves = save.number
                chunks += save.add(save.buffer[:size], self._chunk_bytes)
            if size < PACK_BYTES:
                break
        is_whole = sum(size for _, size in chunks) == signature[2]
        return tuple(chunks) if is_whole else None

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

    def _commit(self, captured: dict[str, _Captured], content: Content, save: _Save) -> int:
        save.writer.finish()
        self._saves = save.number
        unsure = self._unsure
        if unsure is None or unsure.content != content:
            manifest = _manifest(captured, self._where | save.written())
            unsure = self._unsure = _Unsure(save.manifest, manifest, content)
        digest, size_bytes = write_manifest(self._packs, unsure.name, unsure.manifest)
        new_bytes = self._unreported_bytes + save.writer.new_bytes
        seq = self._chain.commit(
            self._attempt, step=self.step + 1, manifest=unsure.name, digest=digest,
            content="files", size_bytes=unsure.manifest.size_bytes + size_bytes,
            new_bytes=new_bytes + size_bytes,
        )  # fmt: skip
        self._captured = captured
        self._accept(unsure, self.step + 1)
        self._clean()
        return seq

    def _accept(self, newest: _Unsure, step: int) -> None:
        """The newest checkpoint is this one: what it does not name may be collected."""
        self.step = step
        self._committed = newest.content
        self._unsure = None
        self._unreported_bytes = 0
        self._where = _locations(newest.manifest)
        self._captured = {
            path: entry for path, entry in self._captured.items() if self._is_stored(entry)
        }

    def _is_stored(self, entry: _Captured) -> bool:
        return all(digest in self._where for digest, _ in entry.chunks)

    def _discard(self, save: _Save) -> None:
        try:
            save.writer.discard()
        except StorageError as error:
            _log.warning("could not remove an unfinished checkpoint, will try again: %s", error)

    def _clean(self) -> None:
        """Let go of checkpoints that are not to be kept. What fails here is done the next time."""
        try:
            if prune(self._chain, self._attempt, self._retention):
                collect(self._packs, self._chain, self._run.pinned())
        except (StorageError, FormatError) as error:
            _log.warning("could not remove old checkpoints, will try again: %s", error)

    # -- sharing packs ----------------------------------------------------------------------

    def _well_used(self) -> dict[str, Location]:
        """What need not be written, because it is in a pack that is worth keeping."""
        sparse = _sparse(self._where, set(self._where))
        return {d: where for d, where in self._where.items() if where.pack not in sparse}

    def _thin(self, captured: dict[str, _Captured], save: _Save) -> None:
        """Take unchanged files again whose packs are kept for little more than them."""
        used = {digest for entry in captured.values() for digest, _ in entry.chunks}
        sparse = _sparse(self._where, used)
        where = self._where | save.written()
        for path, entry in captured.items():
            if any(d in where and where[d].pack in sparse for d, _ in entry.chunks):
                self._take(path, entry.signature, save, final=False)

    # -- restoring --------------------------------------------------------------------------

    def _mirror(self, packs: Storage, commit: Commit) -> FilesManifest:
        """Fetch a checkpoint's files beside the folder; only when all are right, change it."""
        manifest = read_manifest(packs, commit.manifest, commit.digest)
        if not isinstance(manifest, FilesManifest):
            msg = f"manifest {packs.url}/{commit.manifest} is not of files"
            raise CorruptObject(msg)
        staging = self._folder.with_name(f".{self._folder.name}.{secrets.token_hex(4)}.restoring")
        staging.mkdir()
        try:
            for file in manifest.files:
                target = staging / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()
            for path, pieces in _fetched(packs, manifest):
                with (staging / path).open("ab") as opened:
                    for piece in pieces:
                        opened.write(piece)
            for file in manifest.files:
                (staging / file.path).chmod(0o755 if file.executable else 0o644)
            for old in self._folder.iterdir():
                if old.is_dir() and not old.is_symlink():
                    shutil.rmtree(old)
                else:
                    old.unlink()
            for new in staging.iterdir():
                shutil.move(new, self._folder / new.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return manifest

    def _remember(self, manifest: FilesManifest) -> None:
        """What need not be read again, because it was just written from the checkpoint."""
        self._captured = {
            file.path: _Captured(
                _signature((self._folder / file.path).lstat()),
                file.executable,
                tuple((part.digest, part.size_bytes) for part in file.parts),
            )
            for file in manifest.files
        }
        self._where = _locations(manifest)
        self._committed = _content(self._captured)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _log.warning("%s", message)
            self.warnings = (*self.warnings, message)[-_MOST_WARNINGS:]


def _content(captured: Mapping[str, _Captured]) -> Content:
    return tuple((path, entry.executable, entry.chunks) for path, entry in sorted(captured.items()))


def _manifest(captured: Mapping[str, _Captured], where: Mapping[str, Location]) -> FilesManifest:
    numbers: dict[tuple[str, int], int] = {}
    files = []
    for path, entry in sorted(captured.items()):
        parts = []
        for digest, size in entry.chunks:
            place = where[digest]
            number = numbers.setdefault((place.pack, place.pack_bytes), len(numbers))
            parts.append(Part(pack=number, offset=place.offset, size_bytes=size, digest=digest))
        files.append(
            FileRef(
                path=path, size_bytes=entry.size_bytes, executable=entry.executable,
                parts=tuple(parts),
            )
        )  # fmt: skip
    packs = tuple(PackRef(name=name, size_bytes=size) for name, size in numbers)
    return FilesManifest(packs=packs, files=tuple(files))


def _locations(manifest: FilesManifest) -> dict[str, Location]:
    return {
        part.digest: Location(
            manifest.packs[part.pack].name, manifest.packs[part.pack].size_bytes,
            part.offset, part.size_bytes,
        )
        for file in manifest.files
        for part in file.parts
    }  # fmt: skip


def _sparse(where: Mapping[str, Location], used: AbstractSet[str]) -> set[str]:
    """Packs of which less than half is used, as :func:`spotfirst.checkpoints.packs.known_parts`."""
    used_bytes = Counter[str]()
    pack_bytes: dict[str, int] = {}
    for digest, place in where.items():
        pack_bytes[place.pack] = place.pack_bytes
        used_bytes[place.pack] += place.size_bytes if digest in used else 0
    return {pack for pack, size in pack_bytes.items() if 2 * used_bytes[pack] < size}


def _fetched(packs: Storage, manifest: FilesManifest) -> Iterator[tuple[str, list[memoryview]]]:
    """The files' bytes in order: paths with their next pieces, which hold until the next one."""
    memory = Block(PACK_BYTES).view
    batch: list[tuple[str, Part]] = []
    size = 0
    pieces = [(file.path, part) for file in manifest.files for part in file.parts]
    for path, part in pieces:
        if part.size_bytes > PACK_BYTES:
            msg = f"file {path!r} has a part of {part.size_bytes} bytes, more than there are in one"
            raise CorruptObject(msg)
        if size + part.size_bytes > PACK_BYTES:
            yield from _fetch_batch(packs, manifest, batch, memory)
            batch, size = [], 0
        batch.append((path, part))
        size += part.size_bytes
    yield from _fetch_batch(packs, manifest, batch, memory)


def _fetch_batch(
    packs: Storage, manifest: FilesManifest, batch: list[tuple[str, Part]], memory: memoryview
) -> Iterator[tuple[str, list[memoryview]]]:
    wanted: list[Wanted] = []
    start = 0
    for _, part in batch:
        target = memory[start : start + part.size_bytes]
        wanted.append(Wanted(manifest.packs[part.pack].name, part.offset, part.digest, target))
        start += part.size_bytes
    fetch(packs, wanted)
    both = zip(batch, wanted, strict=True)
    for path, pieces in groupby(both, key=lambda pair: pair[0][0]):
        yield path, [each.target for _, each in pieces]


def _signature(status: os.stat_result) -> Signature:
    return (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )  # fmt: skip


def _open_for_writing(folder: Path) -> set[tuple[int, int]]:
    """(device, inode) of the files below ``folder`` that a process of ours may still write.

    From Linux' ``/proc``; elsewhere it is empty, and only the settling time protects.
    """
    found: set[tuple[int, int]] = set()
    root = f"{folder.resolve()}/"
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            for descriptor in descriptors.iterdir():
                if not os.readlink(descriptor).startswith(root):  # noqa: PTH115 - may be no path
                    continue
                info = (descriptors.parent / "fdinfo" / descriptor.name).read_text()
                flags = int(info.split("flags:", 1)[1].split(maxsplit=1)[0], 8)
                if flags & os.O_ACCMODE != os.O_RDONLY:
                    status = descriptor.stat()
                    found.add((status.st_dev, status.st_ino))
        except (OSError, IndexError, ValueError):
            continue  # another user's process, or one that has just ended
    return found
