"""The bytes of a folder's files in packs: what is new is written, and where the rest is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from spotfirst.checkpoints.manifest import (
    FileRef,
    FilesManifest,
    FolderRef,
    LinkRef,
    PackRef,
    Part,
)
from spotfirst.checkpoints.memory import Block
from spotfirst.checkpoints.packs import (
    PACK_BYTES,
    Location,
    PackWriter,
    chunk_digest,
    manifest_name,
    pack_prefix,
)
from spotfirst.checkpoints.settling import Signature
from spotfirst.storage import Storage

__all__ = [
    "EMPTY", "Captured", "Chunk", "Content", "Hole", "Save", "Snapshot", "Unsure",
    "comes_further", "content_of", "locations", "manifest_of", "sparse",
]  # fmt: skip

Chunk = tuple[str, int]
"""Digest and size of a piece of a file."""
Hole = tuple[int, int]
"""Offset and size of zeros that take no space."""
Content = tuple[
    tuple[tuple[str, int, int, tuple[Chunk, ...], tuple[Hole, ...], int], ...],
    tuple[LinkRef, ...],
    tuple[FolderRef, ...],
]
"""All that a manifest says but where the bytes are: what makes two checkpoints the same."""
EMPTY: Content = ((), (), ())
_LOGS = (".log", ".out", ".err")
_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class Captured:
    """A file as it was captured: what it looked like, and what it holds.

    ``chunks`` lie one behind the other, with ``holes`` (offset, size) between them. ``links`` is
    how many names it had.
    """

    signature: Signature
    mode: int
    chunks: tuple[Chunk, ...]
    holes: tuple[Hole, ...] = ()
    links: int = 1

    @property
    def size_bytes(self) -> int:
        """Its length."""
        return sum(size for _, size in (*self.chunks, *self.holes))

    @property
    def mtime_ns(self) -> int:
        """When it was changed last."""
        return self.signature[3]


@dataclass(frozen=True)
class Snapshot:
    """What a folder holds at one instant."""

    files: Mapping[str, Captured]
    links: tuple[LinkRef, ...] = ()
    folders: tuple[FolderRef, ...] = ()


@dataclass(frozen=True)
class Unsure:
    """A checkpoint whose commit was not answered: it may be complete."""

    name: str
    manifest: FilesManifest
    content: Content


class Save:
    """What one capture writes. Its number is in the names of all that it writes."""

    def __init__(
        self, packs: Storage, claim: int, number: int, known: Mapping[str, Location]
    ) -> None:
        self.manifest = manifest_name(claim, number)
        self.known = known
        self.writer = PackWriter(packs, pack_prefix(claim, number), known)
        self.number = number
        self._parts: dict[str, Part] = {}
        self._buffer: Block | None = None

    @property
    def buffer(self) -> memoryview:
        """Memory to read a file into, a pack at a time."""
        if self._buffer is None:
            self._buffer = Block(PACK_BYTES)
        return self._buffer.view[:PACK_BYTES]

    def add(self, data: memoryview, chunk_bytes: int) -> list[Chunk]:
        """Make bytes part of the checkpoint; ``data`` is free when this returns."""
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


def content_of(snapshot: Snapshot) -> Content:
    """What this snapshot holds."""
    numbers = _link_numbers(snapshot.files)
    files = tuple(
        (path, entry.mode, entry.mtime_ns, entry.chunks, entry.holes, numbers.get(path, 0))
        for path, entry in sorted(snapshot.files.items())
    )
    return files, snapshot.links, snapshot.folders


def comes_further(before: Content, after: Content) -> bool:
    """Whether a script has done more than to write to its logs.

    One that crashes again and again writes to them each time, and rewrites what it writes at its
    start. A table of results may be all that a script makes, so one counts where nothing else is.
    """
    old, new = _made(before), _made(after)
    if not new:
        return not old and bool(after[1] or after[2])
    has_more = not all(path.endswith(_TABLES) for path in new)
    return any(
        old.get(path) != made
        for path, made in new.items()
        if not (has_more and path.endswith(_TABLES))
    )


def _made(content: Content) -> dict[str, tuple[object, object]]:
    """What the files hold that are no logs for sure, whenever they were written."""
    return {
        path: (chunks, holes)
        for path, _, _, chunks, holes, _ in content[0]
        if not path.endswith(_LOGS) and "tfevents" not in path.rpartition("/")[2]
    }


def manifest_of(content: Content, where: Mapping[str, Location]) -> FilesManifest:
    """The manifest of this content; ``where`` has all of its chunks."""
    numbers: dict[tuple[str, int], int] = {}
    files = []
    for path, mode, mtime_ns, chunks, holes, link in content[0]:
        parts = []
        for digest, size in chunks:
            place = where[digest]
            number = numbers.setdefault((place.pack, place.pack_bytes), len(numbers))
            parts.append(Part(pack=number, offset=place.offset, size_bytes=size, digest=digest))
        files.append(
            FileRef(
                path=path, size_bytes=sum(size for _, size in (*chunks, *holes)), mode=mode,
                mtime_ns=mtime_ns, parts=tuple(parts), holes=holes, link=link,
            )
        )  # fmt: skip
    packs = tuple(PackRef(name=name, size_bytes=size) for name, size in numbers)
    return FilesManifest(
        packs=packs, files=tuple(files), links=content[1], folders=content[2]
    )  # fmt: skip


def _link_numbers(files: Mapping[str, Captured]) -> dict[str, int]:
    """A number above 0 for each file with several names here, by path."""
    names: dict[tuple[int, int], list[str]] = {}
    for path, entry in sorted(files.items()):
        if entry.links > 1:
            names.setdefault(entry.signature[:2], []).append(path)
    several = [
        paths for paths in names.values() if len({files[p] for p in paths}) == 1 < len(paths)
    ]
    return {path: number for number, paths in enumerate(several, start=1) for path in paths}


def locations(manifest: FilesManifest) -> dict[str, Location]:
    """Where a checkpoint's chunks are, by digest."""
    return {
        part.digest: Location(
            manifest.packs[part.pack].name, manifest.packs[part.pack].size_bytes,
            part.offset, part.size_bytes,
        )
        for file in manifest.files
        for part in file.parts
    }  # fmt: skip


def sparse(where: Mapping[str, Location], used: AbstractSet[str]) -> set[str]:
    """Packs of which less than half is used, as :func:`spotfirst.checkpoints.packs.known_parts`."""
    used_bytes = Counter[str]()
    pack_bytes: dict[str, int] = {}
    for digest, place in where.items():
        pack_bytes[place.pack] = place.pack_bytes
        used_bytes[place.pack] += place.size_bytes if digest in used else 0
    return {pack for pack, size in pack_bytes.items() if 2 * used_bytes[pack] < size}
