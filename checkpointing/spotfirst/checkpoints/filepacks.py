"""The bytes of a folder's files in packs: what is new is written, and where the rest is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from spotfirst.checkpoints.manifest import FileRef, FilesManifest, PackRef, Part
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
    "Captured", "Chunk", "Content", "Save", "Unsure", "content_of", "locations", "manifest_of",
    "sparse",
]  # fmt: skip

Chunk = tuple[str, int]
"""Digest and size of a piece of a file."""
Content = tuple[tuple[str, bool, tuple[Chunk, ...]], ...]
"""Path, executability and pieces of every file: what makes two checkpoints the same."""


@dataclass(frozen=True)
class Captured:
    """A file as it was captured: what it looked like, and what it holds."""

    signature: Signature
    executable: bool
    chunks: tuple[Chunk, ...]

    @property
    def size_bytes(self) -> int:
        """Its length."""
        return sum(size for _, size in self.chunks)


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


def content_of(captured: Mapping[str, Captured]) -> Content:
    """What these files hold."""
    return tuple((path, entry.executable, entry.chunks) for path, entry in sorted(captured.items()))


def manifest_of(captured: Mapping[str, Captured], where: Mapping[str, Location]) -> FilesManifest:
    """The manifest of these files; ``where`` has all of their chunks."""
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
