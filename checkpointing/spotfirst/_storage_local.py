"""Objects as files. A new one is written beside its place, synced, and linked or renamed there."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from spotfirst import _bulk_local
from spotfirst.errors import StorageError
from spotfirst.storage import Storage, denied, missing, unavailable

__all__ = ["LocalStorage"]

_PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
_FINAL = {errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.ENOTSUP}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class LocalStorage(Storage):
    """Files below a folder, readable by whom the umask says.

    A folder that had something in it, and now is gone or empty, is one whose disk is not mounted:
    until it is back, the storage does not answer. Nothing is written in its place.
    """

    on_disk = True

    def __init__(self, url: str, root: str) -> None:
        super().__init__(url, root)
        self._home = _Home(root)

    def _at(self, url: str, root: str) -> Storage:
        child = LocalStorage(url, root)
        child._home = self._home
        return child

    def _read(self, full: str) -> bytes:
        data = Path(full).read_bytes()
        self._home.is_known = True
        return data

    def _read_range(self, full: str, start: int, end: int) -> bytes:
        with Path(full).open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def _write(self, full: str, data: bytes) -> None:
        with _staged(Path(full), self._home, lambda file: file.write(data)) as temporary:
            _into_place(temporary.replace, full)

    def _write_from(self, full: str, data: memoryview) -> None:
        def fill(file: BinaryIO) -> None:
            _bulk_local.write_from(file.fileno(), data)

        with _staged(Path(full), self._home, fill) as temporary:
            _into_place(temporary.replace, full)

    def _read_into(self, full: str, start: int, target: memoryview) -> int:
        with Path(full).open("rb", buffering=0) as file:
            return _bulk_local.read_into(file.fileno(), start, target)

    def _create(self, full: str, data: bytes) -> None:
        if os.path.lexists(full):  # saves the disk a write when the race is lost already
            raise FileExistsError(full)
        with _staged(Path(full), self._home, lambda file: file.write(data)) as temporary:
            try:
                _into_place(lambda name: os.link(temporary, name), full)  # fails when it exists
            except FileExistsError:
                raise
            except OSError as error:
                if error.errno in _NO_LINKS:
                    raise _NoLinks(str(error)) from error
                raise

    def _size_bytes(self, full: str) -> int:
        if not Path(full).is_file():
            raise FileNotFoundError(full)
        return Path(full).stat().st_size

    def _list(self, full: str) -> Iterable[str]:
        with os.scandir(full) as entries:
            return [entry.name for entry in entries if _counts(entry)]

    def _walk(self, full: str) -> Iterable[tuple[str, int]]:
        found = []
        for folder, _, names in os.walk(full):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    if not _PARTIAL.fullmatch(name):
                        found.append((path.relative_to(full).as_posix(), path.stat().st_size))
        return found

    def _delete(self, full: str) -> None:
        Path(full).unlink()
        if self._home.is_gone():  # emptied by ourselves
            self._home.is_known = False

    def _upload(self, local: Path, full: str) -> None:
        def copy(file: BinaryIO) -> None:
            with local.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)

        with _staged(Path(full), self._home, copy) as temporary:
            _into_place(temporary.replace, full)

    def _download(self, full: str, local: Path) -> None:
        shutil.copyfile(full, local)

    def _translate(self, error: Exception, what: str) -> StorageError | None:
        if not isinstance(error, OSError):
            return None
        writing = what.startswith(("write", "create", "upload"))
        if isinstance(error, _NoLinks):
            return denied(
                what,
                f"this file system has no hard links ({error})",
                "Spotfirst creates files exactly once through them: use another file system, or S3",
                lasting=True,
            )
        if isinstance(error, (IsADirectoryError, NotADirectoryError, FileExistsError)):
            if not writing:
                return missing(what)
            advice = "A file or folder of another kind is in the way: move it"
            return denied(what, error, advice, lasting=True)
        if isinstance(error, FileNotFoundError):
            if self._home.is_gone():
                error = FileNotFoundError(f"the folder {self._home.root} is gone, or empty")
                return unavailable(what, error, "Mount its disk again")
            # A writer makes its folders; one that vanished in between is made again.
            return unavailable(what, error) if writing else missing(what)
        if isinstance(error, PermissionError):
            return denied(what, error, "Check the owner and mode of the folder")
        if error.errno == errno.EROFS:
            return denied(what, error, "Mount the file system for writing")
        if error.errno in _FINAL:
            advice = "Check the file system, and the length of the path"
            return denied(what, error, advice, lasting=True)
        return unavailable(what, error, "Free some space" if error.errno in _FULL else "")


class _NoLinks(OSError):
    pass


class _Home:
    """The folder of a storage, and whether this process has seen something in it."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.is_known = False

    def is_gone(self) -> bool:
        """Whether there is nothing any more."""
        if not self.is_known:
            return False
        try:
            with os.scandir(self.root) as entries:
                return next(entries, None) is None
        except FileNotFoundError:
            return True


def _counts(entry: os.DirEntry[str]) -> bool:
    """Whether S3 would list it: no file that is being written, no folder without any content."""
    if not entry.is_dir():
        return not _PARTIAL.fullmatch(entry.name)
    with contextlib.suppress(OSError), os.scandir(entry.path) as inside:
        return any(not _PARTIAL.fullmatch(item.name) for item in inside)
    return False


def _into_place(move: Callable[[str], object], full: str) -> None:
    """Make a durable file appear at ``full``, durably: the name is in its folder's bytes."""
    move(full)
    folder = os.open(os.path.dirname(full), os.O_RDONLY)  # noqa: PTH120 - a name, not a path
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _staged(target: Path, home: _Home, fill: Callable[[BinaryIO], object]) -> Iterator[Path]:
    """A durable temporary file, beside ``target``, gone afterwards."""
    if home.is_gone():
        raise FileNotFoundError(home.root)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # not the target: something on the way to it
        raise NotADirectoryError(error.errno, "is no folder", error.filename) from error
    temporary = target.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with temporary.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        home.is_known = True
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
