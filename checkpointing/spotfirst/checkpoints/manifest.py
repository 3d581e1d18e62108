"""What a checkpoint consists of: a manifest, itself a blob, that names blobs of raw bytes.

A *state* manifest holds a tree of values (:mod:`spotfirst.checkpoints.statetree`) whose arrays are raw
little-endian bytes in blobs; a *files* manifest holds a directory. Either way the bytes of one
item are a list of parts, each a range of a blob: small items share a blob, large ones span some.

Everything in a manifest is checked before a byte is reserved on its word.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from spotfirst.checkpoints.blobs import MAX_BLOB_BYTES, BlobStore, Bytes, is_digest
from spotfirst.checkpoints.statetree import check_leaves
from spotfirst.errors import CorruptObject
from spotfirst.storage import safe_path
from spotfirst.wire import Record, decode

__all__ = [
    "ITEM_BYTES",
    "ArrayRef",
    "BlobRef",
    "FileRef",
    "FilesManifest",
    "Packer",
    "Part",
    "PartReader",
    "StateManifest",
    "read_manifest",
]

CHUNK_BYTES = 64 << 20
"""A larger array or file spans several blobs of this size."""
PACK_BYTES = 16 << 20
"""Small arrays are packed into blobs of up to this size."""
SMALL_BYTES = 256 << 10
"""Arrays below this are packed: an object per bias would cost more in requests than in bytes."""

ITEM_BYTES = {
    "bool": 1,
    "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
    "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "float4_e2m1fn_x2": 1,
    "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8,
    "complex32": 4, "complex64": 8, "complex128": 16,
}  # fmt: skip
"""The element types that are stored, by torch's and NumPy's common name, and their sizes."""

_MAX_DIMENSIONS = 64
_MAX_ARRAY_BYTES = 1 << 48


class BlobRef(Record, array_like=True):
    """One blob that a manifest draws on."""

    digest: str
    size_bytes: int


class Part(Record, array_like=True):
    """``size_bytes`` bytes from ``offset`` on of the manifest's blob number ``blob``."""

    blob: int
    offset: int
    size_bytes: int


class ArrayRef(Record):
    """One array: row-major, little-endian, without gaps."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()

    @property
    def size_bytes(self) -> int:
        """What its shape and dtype need."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class StateManifest(Record, tag_field="content", tag="state"):
    """A training state after ``step`` finished steps.

    ``objects`` has a tree for each object given to the Checkpointer, ``rng`` one for the
    random number generators.
    """

    step: int
    blobs: tuple[BlobRef, ...]
    arrays: tuple[ArrayRef, ...]
    objects: dict[str, Any]
    rng: Any = None

    @property
    def size_bytes(self) -> int:
        """All bytes of the checkpoint, without the manifest."""
        return sum(blob.size_bytes for blob in self.blobs)


class FileRef(Record):
    """One regular file, by its path below the directory."""

    path: str
    size_bytes: int
    executable: bool = False
    parts: tuple[Part, ...] = ()


class FilesManifest(Record, tag_field="content", tag="files"):
    """A directory's regular files, sorted by path."""

    blobs: tuple[BlobRef, ...]
    files: tuple[FileRef, ...]

    @property
    def size_bytes(self) -> int:
        """All bytes of the checkpoint, without the manifest."""
        return sum(blob.size_bytes for blob in self.blobs)


Manifest = StateManifest | FilesManifest


def read_manifest(blobs: BlobStore, digest: str) -> Manifest:
    """A manifest whose every size, range, shape and path holds together.

    Raises :class:`CorruptObject`, :class:`ObjectMissing` or :class:`NewerFormat`.
    """
    path = f"manifest {digest}"
    try:
        manifest: Manifest = decode(blobs.get(digest), Manifest, path=path)  # type: ignore[arg-type]
        if isinstance(manifest, StateManifest):
            _check_state(manifest)
        else:
            _check_files(manifest)
    except RecursionError as error:
        msg = f"{path} is nested too deeply to be a checkpoint"
        raise CorruptObject(msg) from error
    except ValueError as error:
        msg = f"{path} does not hold together: {error}"
        raise CorruptObject(msg) from error
    return manifest


def _check_state(manifest: StateManifest) -> None:
    _check_blobs(manifest.blobs)
    if manifest.step < 0:
        msg = f"step {manifest.step} is negative"
        raise ValueError(msg)
    for number, array in enumerate(manifest.arrays):
        what = f"array {number}"
        if array.dtype not in ITEM_BYTES:
            msg = f"{what} has the unknown dtype {array.dtype[:80]!r}"
            raise ValueError(msg)
        if len(array.shape) > _MAX_DIMENSIONS or any(n < 0 for n in array.shape):
            msg = f"{what} has the impossible shape {array.shape[:_MAX_DIMENSIONS]}"
            raise ValueError(msg)
        if math.prod(max(n, 1) for n in array.shape) * ITEM_BYTES[array.dtype] > _MAX_ARRAY_BYTES:
            msg = f"{what} of shape {array.shape} is too large"
            raise ValueError(msg)
        _check_parts(what, array.parts, array.size_bytes, manifest.blobs)
    for tree in (*manifest.objects.values(), manifest.rng):
        check_leaves(tree, [array.dtype for array in manifest.arrays])


def _check_files(manifest: FilesManifest) -> None:
    _check_blobs(manifest.blobs)
    taken: set[str] = set()
    folders: set[str] = set()
    for file in manifest.files:
        if safe_path(file.path) != file.path or file.path in taken:
            msg = f"file {file.path!r} is listed twice or not in its plain form"
            raise ValueError(msg)
        taken.add(file.path)
        folders.update(str(parent) for parent in PurePosixPath(file.path).parents)
        _check_parts(f"file {file.path!r}", file.parts, file.size_bytes, manifest.blobs)
    if taken & folders:
        msg = f"{min(taken & folders)!r} is both a file and a folder"
        raise ValueError(msg)


def _check_blobs(blobs: tuple[BlobRef, ...]) -> None:
    for number, blob in enumerate(blobs):
        if not is_digest(blob.digest) or not 0 < blob.size_bytes <= MAX_BLOB_BYTES:
            msg = f"blob {number} has no valid digest and size"
            raise ValueError(msg)


def _check_parts(
    what: str, parts: tuple[Part, ...], size_bytes: int, blobs: tuple[BlobRef, ...]
) -> None:
    for part in parts:
        if not (
            0 <= part.blob < len(blobs)
            and part.offset >= 0
            and part.size_bytes > 0
            and part.offset + part.size_bytes <= blobs[part.blob].size_bytes
        ):
            msg = f"{what} names bytes outside of the blobs: {part}"
            raise ValueError(msg)
    total = sum(part.size_bytes for part in parts)
    if total != size_bytes:
        msg = f"{what} needs {size_bytes} bytes, and its parts have {total}"
        raise ValueError(msg)


class Packer:
    """Puts the bytes of many items into blobs, small ones together."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._refs: list[BlobRef | None] = []
        self._pack = bytearray()
        self._pack_number = -1

    def add(self, data: Bytes) -> tuple[Part, ...]:
        """Where the bytes of one item are; none for an empty one."""
        view = memoryview(data)
        if 0 < len(view) < SMALL_BYTES:
            return (self._into_pack(view),)
        starts = range(0, len(view), CHUNK_BYTES)
        return tuple(self._blob(view[start : start + CHUNK_BYTES]) for start in starts)

    def finish(self) -> tuple[BlobRef, ...]:
        """Write what is left; the blobs that the parts' numbers are about."""
        self._close_pack()
        return tuple(ref for ref in self._refs if ref is not None)

    def _blob(self, data: memoryview) -> Part:
        self._refs.append(BlobRef(digest=self._blobs.put(data), size_bytes=len(data)))
        return Part(blob=len(self._refs) - 1, offset=0, size_bytes=len(data))

    def _into_pack(self, data: memoryview) -> Part:
        if self._pack_number >= 0 and len(self._pack) + len(data) > PACK_BYTES:
            self._close_pack()
        if self._pack_number < 0:
            self._refs.append(None)
            self._pack_number = len(self._refs) - 1
        part = Part(blob=self._pack_number, offset=len(self._pack), size_bytes=len(data))
        self._pack += data
        return part

    def _close_pack(self) -> None:
        if self._pack_number >= 0:
            digest = self._blobs.put(self._pack)
            self._refs[self._pack_number] = BlobRef(digest=digest, size_bytes=len(self._pack))
            self._pack = bytearray()
            self._pack_number = -1


class PartReader:
    """Reads items back, each blob once as long as it stays in a small cache."""

    def __init__(
        self, blobs: BlobStore, refs: tuple[BlobRef, ...], *, cache_bytes: int = 4 * CHUNK_BYTES
    ) -> None:
        self._blobs = blobs
        self._refs = refs
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._cache_bytes = cache_bytes
        self.read_bytes = 0
        """Bytes that came from the storage."""

    def read(self, parts: tuple[Part, ...]) -> bytearray:
        """The bytes of one item; nothing is reserved before a blob has been verified."""
        data = bytearray()
        for piece in self.pieces(parts):
            data += piece
        return data

    def pieces(self, parts: tuple[Part, ...]) -> Iterator[memoryview]:
        """The bytes of one item, part by part. Raises as :meth:`BlobStore.get` does."""
        for part in parts:
            blob = self._blob(self._refs[part.blob])
            yield memoryview(blob)[part.offset : part.offset + part.size_bytes]

    def _blob(self, ref: BlobRef) -> bytes:
        cached = self._cache.get(ref.digest)
        if cached is not None:
            self._cache.move_to_end(ref.digest)
            data = cached
        else:
            data = self._blobs.get(ref.digest, size_bytes=ref.size_bytes)
            self.read_bytes += len(data)
            self._cache[ref.digest] = data
            while len(self._cache) > 1 and self._held_bytes() > self._cache_bytes:
                self._cache.popitem(last=False)
        if len(data) != ref.size_bytes:
            msg = f"blob {ref.digest} has {len(data)} bytes, its manifest says {ref.size_bytes}"
            raise CorruptObject(msg)
        return data

    def _held_bytes(self) -> int:
        return sum(len(data) for data in self._cache.values())
