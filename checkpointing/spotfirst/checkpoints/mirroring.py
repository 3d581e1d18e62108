"""Makes a folder what a files checkpoint holds: all of it or nothing, in little memory."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.manifest import FileRef, FilesManifest, Part, read_manifest
from spotfirst.checkpoints.memory import Block
from spotfirst.checkpoints.packs import PACK_BYTES, Wanted, fetch
from spotfirst.errors import CorruptObject, StorageError
from spotfirst.storage import Storage

__all__ = ["export_files", "mirror"]

_Piece = tuple[str, int, Part]
"""Path, offset in the file, and which bytes come there."""


def mirror(
    packs: Storage,
    commit: Commit,
    folder: Path,
    *,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> FilesManifest:
    """Fetch a checkpoint's files beside ``folder``; only when all are right, change it.

    About 64 MiB are in memory at a time; ``on_bytes`` gets those just written. Modes, times, links
    and empty folders are those that were captured. Raises what :func:`read_manifest` and
    :func:`spotfirst.checkpoints.packs.fetch` raise, and :class:`OSError`.
    """
    manifest = _files_of(packs, commit)
    with _staged(packs, manifest, folder, on_bytes) as staging:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            _remove(old)
        for new in staging.iterdir():
            new.rename(folder / new.name)
        _finish_folders(manifest, folder)
    return manifest


def export_files(
    packs: Storage,
    commit: Commit,
    folder: Path,
    *,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> FilesManifest:
    """Write a checkpoint's files into ``folder``; what else is there stays.

    A file of the same name is replaced, and so is a link in the place of a folder: nothing is
    written outside. Takes and raises as :func:`mirror`; :class:`StorageError` when a folder is in
    the place of a file, or when the files cannot be written.
    """
    manifest = _files_of(packs, commit)
    try:
        with _staged(packs, manifest, folder, on_bytes) as staging:
            folder.mkdir(parents=True, exist_ok=True)
            _merge(staging, folder)
            _finish_folders(manifest, folder)
    except OSError as error:
        msg = (
            f"cannot write {error.filename2 or error.filename or folder}: {error.strerror or error}"
        )
        raise StorageError(msg, path=str(folder)) from error
    return manifest


def _files_of(packs: Storage, commit: Commit) -> FilesManifest:
    manifest = read_manifest(packs, commit.manifest, commit.digest)
    if not isinstance(manifest, FilesManifest):
        msg = f"manifest {packs.url}/{commit.manifest} is not of files"
        raise CorruptObject(msg)
    return manifest


@contextlib.contextmanager
def _staged(
    packs: Storage, manifest: FilesManifest, folder: Path, on_bytes: Callable[[int], object]
) -> Iterator[Path]:
    """A folder beside ``folder`` with all of the files, gone afterwards."""
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.restoring")
    staging.mkdir(mode=0o700)
    try:
        _write_all(packs, manifest, staging, on_bytes)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _merge(staging: Path, folder: Path) -> None:
    for new in staging.iterdir():
        old = folder / new.name
        if new.is_symlink() or not new.is_dir():
            new.replace(old)
            continue
        if old.is_symlink() or (old.exists() and not old.is_dir()):
            old.unlink()
        old.mkdir(exist_ok=True)
        _merge(new, old)


def _finish_folders(manifest: FilesManifest, folder: Path) -> None:
    # Last: whatever is put into a folder changes its time, and may need its permission.
    for each in sorted(manifest.folders, key=lambda f: f.path, reverse=True):
        (folder / each.path).chmod(each.mode)
        os.utime(folder / each.path, ns=(each.mtime_ns, each.mtime_ns))


def _write_all(
    packs: Storage, manifest: FilesManifest, staging: Path, on_bytes: Callable[[int], object]
) -> None:
    for each in manifest.folders:
        (staging / each.path).mkdir(parents=True, exist_ok=True)
    first: dict[int, Path] = {}
    written = []
    for file in manifest.files:
        target = staging / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.link and file.link in first:
            os.link(first[file.link], target)
            continue
        first[file.link] = target
        written.append(file)
        with target.open("xb") as opened:
            opened.truncate(file.size_bytes)
    for path, pieces in _fetched(packs, manifest, written):
        with (staging / path).open("r+b", buffering=0) as opened:
            for offset, data in pieces:
                _write_at(opened.fileno(), offset, data)
                on_bytes(len(data))
    for file in written:
        (staging / file.path).chmod(file.mode)
        os.utime(staging / file.path, ns=(file.mtime_ns, file.mtime_ns))
    for link in manifest.links:
        place = staging / link.path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(link.target)
        with contextlib.suppress(NotImplementedError):
            os.utime(place, ns=(link.mtime_ns, link.mtime_ns), follow_symlinks=False)


def _remove(path: Path) -> None:
    """Remove a file or a folder, also one that may not be written."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    path.chmod(0o700)
    for parent, folders, _ in os.walk(path):
        for name in folders:
            if not (below := Path(parent, name)).is_symlink():
                below.chmod(0o700)
    shutil.rmtree(path)


def _pieces(files: list[FileRef]) -> Iterator[_Piece]:
    """Where the parts of each file belong: one behind the other, around its holes."""
    for file in files:
        holes = iter((*file.holes, (file.size_bytes + 1, 0)))
        offset = 0
        hole = next(holes)
        for part in file.parts:
            while hole[0] == offset:
                offset += hole[1]
                hole = next(holes)
            if offset + part.size_bytes > hole[0]:
                msg = f"file {file.path!r} has a part that does not end where a hole begins"
                raise CorruptObject(msg)
            yield file.path, offset, part
            offset += part.size_bytes


def _fetched(
    packs: Storage, manifest: FilesManifest, files: list[FileRef]
) -> Iterator[tuple[str, list[tuple[int, memoryview]]]]:
    """Paths with their next pieces, each with its offset, which hold until the next one."""
    memory = Block(PACK_BYTES).view
    batch: list[_Piece] = []
    size = 0
    for piece in _pieces(files):
        part = piece[2]
        if part.size_bytes > PACK_BYTES:
            msg = (
                f"file {piece[0]!r} has a part of {part.size_bytes} bytes, more than there are in "
                "one"
            )
            raise CorruptObject(msg)
        if size + part.size_bytes > PACK_BYTES:
            yield from _fetch_batch(packs, manifest, batch, memory)
            batch, size = [], 0
        batch.append(piece)
        size += part.size_bytes
    yield from _fetch_batch(packs, manifest, batch, memory)


def _fetch_batch(
    packs: Storage, manifest: FilesManifest, batch: list[_Piece], memory: memoryview
) -> Iterator[tuple[str, list[tuple[int, memoryview]]]]:
    wanted: list[Wanted] = []
    start = 0
    for _, _, part in batch:
        target = memory[start : start + part.size_bytes]
        wanted.append(Wanted(manifest.packs[part.pack].name, part, target))
        start += part.size_bytes
    fetch(packs, wanted)
    both = zip(batch, wanted, strict=True)
    for path, pieces in groupby(both, key=lambda pair: pair[0][0]):
        yield path, [(piece[1], each.target) for piece, each in pieces]


def _write_at(descriptor: int, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        offset, data = offset + written, data[written:]
