"""Makes a folder what a files checkpoint holds: all of it or nothing, in little memory."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.manifest import FilesManifest, Part, read_manifest
from spotfirst.checkpoints.memory import Block
from spotfirst.checkpoints.packs import PACK_BYTES, Wanted, fetch
from spotfirst.errors import CorruptObject
from spotfirst.storage import Storage

__all__ = ["mirror"]


def mirror(packs: Storage, commit: Commit, folder: Path) -> FilesManifest:
    """Fetch a checkpoint's files beside ``folder``; only when all are right, change it.

    About 64 MiB are in memory at a time. Raises what :func:`read_manifest` and
    :func:`spotfirst.checkpoints.packs.fetch` raise.
    """
    manifest = read_manifest(packs, commit.manifest, commit.digest)
    if not isinstance(manifest, FilesManifest):
        msg = f"manifest {packs.url}/{commit.manifest} is not of files"
        raise CorruptObject(msg)
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.restoring")
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
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink()
        for new in staging.iterdir():
            shutil.move(new, folder / new.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


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
        wanted.append(Wanted(manifest.packs[part.pack].name, part, target))
        start += part.size_bytes
    fetch(packs, wanted)
    both = zip(batch, wanted, strict=True)
    for path, pieces in groupby(both, key=lambda pair: pair[0][0]):
        yield path, [each.target for _, each in pieces]
