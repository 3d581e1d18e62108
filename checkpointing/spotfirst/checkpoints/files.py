"""Checkpoints of scripts that only write files: the agent keeps a directory safe for them.

A file is taken when it is whole as far as can be seen from outside: nobody has it open for
writing, and it has not changed for a while, nor while it was read. A file that is being written
stays as it was captured before. After the script's end everything is taken.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.claiming import wait_for_claim
from spotfirst.checkpoints.manifest import (
    FileRef,
    FilesManifest,
    Part,
    read_manifest,
)
from spotfirst.checkpoints.packs import (
    CHUNK_BYTES,
)
from spotfirst.checkpoints.restoring import load_newest
from spotfirst.errors import CorruptObject
from spotfirst.patience import Sleep
from spotfirst.run import Run
from spotfirst.wire import Clock, encode, utc_now

__all__ = ["FileCheckpoints"]

_log = logging.getLogger(__name__)

_FINAL_TRIES = 3

_MOST_WARNINGS = 20

Signature = tuple[int, int, int, int, int]
"""Device, inode, size and times of change: another file or other bytes have another."""


@dataclass(frozen=True)
class _Captured:
    """A file as it was captured: what it looked like, and where its bytes are."""

    signature: Signature
    executable: bool
    size_bytes: int
    blobs: tuple[BlobRef, ...]


class FileCheckpoints:
    """Captures ``folder`` into the run's checkpoints, and restores it. For one thread.

    ``settle_s`` is how long a file must have been unchanged. Links and special files are left
    out, with a warning. The step of a checkpoint is the number of captures so far.
    """

    def __init__(
        self,
        run: Run,
        attempt: int,
        folder: Path,
        *,
        settle_s: float = 1.0,
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
        self._blobs = BlobStore(run.blobs())
        self._captured: dict[str, _Captured] = {}
        self._seen: dict[str, tuple[Signature, float]] = {}
        self._manifest: bytes | None = None
        self._reported_bytes = 0
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
        restored = load_newest(
            self._run, self._chain, self._blobs, self._mirror, content="files",
            resume_from=self._run.spec().resume_from, warn=self._warn,
        )  # fmt: skip
        if restored is None:
            return 0
        self.step = restored.commit.step
        if restored.seq is not None:
            self._captured = self._as_restored(restored.value)
            self._manifest = encode(restored.value)
        return self.step

    def capture(self, *, final: bool = False) -> int | None:
        """Commit what is whole in the folder; the entry's number, or ``None`` when nothing is new.

        ``final``: the script has ended, so nothing is half-written and everything is taken.
        Raises :class:`StorageUnavailable`, when a later call goes on where this one stopped, and
        :class:`ClaimLost`.
        """
        captured: dict[str, _Captured] = {}
        writers = set() if final else _open_for_writing(self._folder)
        for path, status in self._files():
            kept = self._captured.get(path)
            signature = _signature(status)
            if kept is None or kept.signature != signature:
                whole = final or self._settled(path, status, writers)
                kept = (self._take(path, final=final) if whole else None) or kept
            if kept is not None:
                captured[path] = kept
        self._captured = captured
        self._seen = {path: seen for path, seen in self._seen.items() if path not in captured}
        return self._commit(_manifest(captured))

    def release(self) -> None:
        """Let a successor claim at once. Raises :class:`ClaimLost`, :class:`StorageUnavailable`."""
        self._chain.release(self._attempt)

    # -- capturing --------------------------------------------------------------------------

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

    def _take(self, path: str, *, final: bool) -> _Captured | None:
        """The file's bytes in blobs; ``None`` when it changed while it was read."""
        for _ in range(_FINAL_TRIES if final else 1):
            try:
                handle = os.open(self._folder / path, os.O_RDONLY | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
            except OSError as error:
                self._warn(f"{path!r} cannot be read, so it is not checkpointed: {error}")
                return None
            with open(handle, "rb") as file:  # noqa: PTH123 - opened above, without following links
                before = os.fstat(handle)
                blobs: list[BlobRef] = []
                while chunk := file.read(CHUNK_BYTES):
                    blobs.append(BlobRef(digest=self._blobs.put(chunk), size_bytes=len(chunk)))
                after = os.fstat(handle)
            size_bytes = sum(blob.size_bytes for blob in blobs)
            if _signature(before) == _signature(after) and size_bytes == after.st_size:
                executable = bool(after.st_mode & stat.S_IXUSR)
                return _Captured(_signature(after), executable, size_bytes, tuple(blobs))
        if final:
            self._warn(f"{path!r} is still being written after the script's end; it is left out")
        return None

    def _commit(self, manifest: FilesManifest) -> int | None:
        data = encode(manifest)
        if data == self._manifest or (self._manifest is None and not manifest.files):
            return None
        digest = self._blobs.put(data)
        newest = self._chain.refresh().newest()
        if newest is not None and newest[1].attempt == self._attempt:
            seq, commit = newest  # the last one of ours may be news: when its answer was lost
            self.step = max(self.step, commit.step)
            if commit.manifest == digest:
                self._manifest = data
                return seq
        seq = self._chain.commit(
            self._attempt, step=self.step + 1, manifest=digest, content="files",
            size_bytes=manifest.size_bytes + len(data),
            new_bytes=self._blobs.new_bytes - self._reported_bytes,
        )  # fmt: skip
        self._reported_bytes = self._blobs.new_bytes
        self._manifest = data
        self.step += 1
        return seq

    # -- restoring --------------------------------------------------------------------------

    def _mirror(self, blobs: BlobStore, commit: Commit) -> FilesManifest:
        """Fetch a checkpoint's files beside the folder; only when all are right, change it."""
        manifest = read_manifest(blobs, commit.manifest)
        if not isinstance(manifest, FilesManifest):
            msg = f"manifest {commit.manifest} is not of files"
            raise CorruptObject(msg)
        reader = PartReader(blobs, manifest.blobs, cache_bytes=0)
        staging = self._folder.with_name(f".{self._folder.name}.{secrets.token_hex(4)}.restoring")
        staging.mkdir()
        try:
            for file in manifest.files:
                target = staging / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as opened:
                    for piece in reader.pieces(file.parts):
                        opened.write(piece)
                target.chmod(0o755 if file.executable else 0o644)
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

    def _as_restored(self, manifest: FilesManifest) -> dict[str, _Captured]:
        """What need not be read again, because it was just written from the checkpoint."""
        captured = {}
        for file in manifest.files:
            blobs = tuple(manifest.blobs[part.blob] for part in file.parts)
            if sum(blob.size_bytes for blob in blobs) == file.size_bytes:
                signature = _signature((self._folder / file.path).lstat())
                captured[file.path] = _Captured(signature, file.executable, file.size_bytes, blobs)
        return captured

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _log.warning("%s", message)
            self.warnings = (*self.warnings, message)[-_MOST_WARNINGS:]


def _manifest(captured: dict[str, _Captured]) -> FilesManifest:
    """The same files give the same manifest, byte for byte."""
    blobs: list[BlobRef] = []
    files: list[FileRef] = []
    for path, entry in sorted(captured.items()):
        first = len(blobs)
        blobs.extend(entry.blobs)
        parts = tuple(
            Part(blob=first + number, offset=0, size_bytes=blob.size_bytes)
            for number, blob in enumerate(entry.blobs)
        )
        files.append(
            FileRef(
                path=path, size_bytes=entry.size_bytes, executable=entry.executable, parts=parts
            )
        )
    return FilesManifest(blobs=tuple(blobs), files=tuple(files))


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
