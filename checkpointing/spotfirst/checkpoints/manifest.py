"""What a checkpoint consists of: a manifest that names ranges of *packs* of raw bytes.

A *state* manifest holds a tree of values (:mod:`spotfirst.checkpoints.statetree`) whose arrays are
raw little-endian bytes; a *files* manifest holds a directory. Either way the bytes of an item are a
list of *parts*: each a range of a pack, with the digest of its bytes. A part of an older
checkpoint's pack is how a checkpoint shares what has not changed.

An array whose pieces were saved by several ranks has *shards*: regions of the whole, each with its
parts. So it can be read at another world size, or by a single process.

Everything in a manifest is checked before a byte is reserved on its word.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from blake3 import blake3

from spotfirst.checkpoints.codec import SHUFFLES
from spotfirst.checkpoints.statetree import ITEM_BYTES, check_leaves
from spotfirst.errors import CorruptObject
from spotfirst.storage import Storage, safe_path
from spotfirst.wire import Record, decode, encode

__all__ = [
    "MAX_MANIFEST_BYTES",
    "ArrayRef",
    "FileRef",
    "FilesManifest",
    "FolderRef",
    "GroupMade",
    "LinkRef",
    "Made",
    "Manifest",
    "PackRef",
    "Part",
    "RankState",
    "Shard",
    "StateManifest",
    "manifest_digest",
    "read_manifest",
    "stays_inside",
    "write_manifest",
]

MAX_PACK_BYTES = 1 << 30
MAX_PACKED_BYTES = 64 << 20
"""What one compressed part may become: nothing decompresses into more."""
_MAX_DIMENSIONS = 64
_MAX_ARRAY_BYTES = 1 << 48
MAX_MANIFEST_BYTES = 512 << 20
_MOST_NS = 1 << 62
_MOST_TARGET = 4096
_MAX_IRREGULAR = 1000
"""Shards that overlap in some dimension without being aligned in it, of one array."""
_PACK = re.compile(r"\d{8}/\d{6}-\d{5}-\d{6}")
_MANIFEST = re.compile(r"\d{8}/\d{6}\.json")
_DIGEST = re.compile(r"[0-9a-f]{32}")


class PackRef(Record, array_like=True):
    """One object of packed bytes, by its name below the run's ``packs/``."""

    name: str
    size_bytes: int


class Part(Record, array_like=True):
    """``size_bytes`` bytes from ``offset`` on of the manifest's pack number ``pack``.

    ``digest`` is their XXH3-128: it finds accidents, and what need not be written again. Bytes that
    are compressed (:mod:`spotfirst.checkpoints.codec`) take ``packed_bytes`` in the pack, and were
    regrouped by elements of ``item_bytes``.
    """

    pack: int
    offset: int
    size_bytes: int
    digest: str
    packed_bytes: int = 0
    item_bytes: int = 1

    @property
    def stored_bytes(self) -> int:
        """How much of the pack it takes."""
        return self.packed_bytes or self.size_bytes


class Shard(Record):
    """The region of an array from ``offset`` on, of ``shape``; row-major, little-endian."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()


class ArrayRef(Record):
    """One array: its bytes in ``parts``, or in the ``shards`` that make it up without overlap."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    shards: tuple[Shard, ...] = ()

    @property
    def size_bytes(self) -> int:
        """What its shape and dtype need."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def regions(self) -> tuple[Shard, ...]:
        """Its shards; of an array that was saved whole, the one."""
        return self.shards or (
            Shard(offset=(0,) * len(self.shape), shape=self.shape, parts=self.parts),
        )


class RankState(Record):
    """What each rank has of its own: its random number generators, and some objects."""

    objects: dict[str, Any] = {}
    rng: Any = None


class GroupMade(Record):
    """A group of an optimizer's parameters: their names, and the values that it was made with.

    A parameter that no module has is called ``""``. ``values`` is a tree without arrays.
    """

    names: tuple[str, ...] = ()
    values: Any = None


class Made(Record):
    """How the script made an optimizer or a scheduler: its class, and its values at the start."""

    kind: str = ""
    groups: tuple[GroupMade, ...] = ()
    values: Any = None


class StateManifest(Record, tag_field="content", tag="state"):
    """A training state after ``step`` finished steps.

    ``objects`` has a tree for each object that all ranks share; ``ranks`` the rest, rank by rank.
    ``made`` says how optimizers and schedulers were made. Not ``flat``: torch.distributed.checkpoint
    has saved each object as one value, and reads it as one.
    """

    step: int
    packs: tuple[PackRef, ...]
    arrays: tuple[ArrayRef, ...]
    objects: dict[str, Any]
    ranks: tuple[RankState, ...] = ()
    made: dict[str, Made] = {}
    flat: bool = True

    @property
    def size_bytes(self) -> int:
        """All bytes that a reader of the whole reads, without the manifest."""
        return sum(array.size_bytes for array in self.arrays)


class FileRef(Record):
    """One regular file, by its path below the directory.

    ``holes`` are ranges (offset, size) of zeros that take no space; the parts are what lies between
    them. Files with the same ``link`` above 0 are one file under several names.
    """

    path: str
    size_bytes: int
    mode: int = 0o644
    mtime_ns: int = 0
    parts: tuple[Part, ...] = ()
    holes: tuple[tuple[int, int], ...] = ()
    link: int = 0


class LinkRef(Record):
    """A symbolic link, by its path; ``target`` is relative, and within the directory."""

    path: str
    target: str
    mtime_ns: int = 0


class FolderRef(Record):
    """A folder below the directory."""

    path: str
    mode: int = 0o755
    mtime_ns: int = 0


class FilesManifest(Record, tag_field="content", tag="files"):
    """What a directory holds, each sorted by path."""

    packs: tuple[PackRef, ...]
    files: tuple[FileRef, ...]
    links: tuple[LinkRef, ...] = ()
    folders: tuple[FolderRef, ...] = ()

    @property
    def size_bytes(self) -> int:
        """All bytes of the files."""
        return sum(file.size_bytes for file in self.files)


Manifest = StateManifest | FilesManifest


def manifest_digest(data: bytes) -> str:
    """The BLAKE3 of a manifest's bytes, which the chain's entry holds: 64 hex digits."""
    return blake3(data).hexdigest()


def write_manifest(packs: Storage, name: str, manifest: Manifest) -> tuple[str, int]:
    """Write it as ``name`` below ``packs``; its digest and size."""
    data = encode(manifest)
    packs.write(name, data)
    return manifest_digest(data), len(data)


def read_manifest(packs: Storage, name: str, digest: str) -> Manifest:
    """A manifest whose every size, range, shape and path holds together.

    ``name`` and ``digest`` are those of the chain's entry. Raises :class:`CorruptObject`,
    :class:`ObjectMissing` or :class:`NewerFormat`.
    """
    path = f"manifest {packs.url}/{name}"
    if _MANIFEST.fullmatch(name) is None:
        msg = f"{name[:80]!r} is no name of a manifest"
        raise CorruptObject(msg)
    data = packs.read_range(name, 0, MAX_MANIFEST_BYTES)
    if manifest_digest(data) != digest:
        msg = f"{path} is damaged: its {len(data)} bytes are not those that were committed"
        raise CorruptObject(msg)
    try:
        manifest: Manifest = decode(data, Manifest, path=path)  # type: ignore[arg-type]
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
    _check_packs(manifest.packs)
    if manifest.step < 0:
        msg = f"step {manifest.step} is negative"
        raise ValueError(msg)
    for number, array in enumerate(manifest.arrays):
        _check_array(f"array {number}", array, manifest.packs)
    dtypes = [array.dtype for array in manifest.arrays]
    trees = [*manifest.objects.values()]
    for rank in manifest.ranks:
        trees += [*rank.objects.values(), rank.rng]
    for tree in trees:
        check_leaves(tree, dtypes)
    for made in manifest.made.values():
        for tree in (made.values, *(group.values for group in made.groups)):
            check_leaves(tree, ())  # it names no arrays


def _check_array(what: str, array: ArrayRef, packs: Sequence[PackRef]) -> None:
    if array.dtype not in ITEM_BYTES:
        msg = f"{what} has the unknown dtype {array.dtype[:80]!r}"
        raise ValueError(msg)
    item_bytes = ITEM_BYTES[array.dtype]
    if len(array.shape) > _MAX_DIMENSIONS or any(n < 0 for n in array.shape):
        msg = f"{what} has the impossible shape {array.shape[:_MAX_DIMENSIONS]}"
        raise ValueError(msg)
    if math.prod(max(n, 1) for n in array.shape) * item_bytes > _MAX_ARRAY_BYTES:
        msg = f"{what} of shape {array.shape} is too large"
        raise ValueError(msg)
    if array.shards and array.parts:
        msg = f"{what} has both parts and shards"
        raise ValueError(msg)
    if array.shards:
        _check_shards(what, array)
    for shard in array.regions:
        _check_parts(what, shard.parts, math.prod(shard.shape) * item_bytes, packs)


def _check_shards(what: str, array: ArrayRef) -> None:
    for shard in array.shards:
        fits = len(shard.offset) == len(shard.shape) == len(array.shape) and all(
            o >= 0 and n >= 0 and o + n <= whole
            for o, n, whole in zip(shard.offset, shard.shape, array.shape, strict=True)
        )
        if not fits:
            msg = f"{what} of shape {array.shape} has a shard outside of it"
            raise ValueError(msg)
    full = [shard for shard in array.shards if math.prod(shard.shape)]
    if sum(math.prod(s.shape) for s in full) != math.prod(array.shape):
        msg = f"{what}: its shards do not make up its shape {array.shape}"
        raise ValueError(msg)
    pair = _overlapping(full, tuple(range(len(array.shape))))
    if pair is not None:
        msg = f"{what}: the shards at {pair[0].offset} and {pair[1].offset} overlap"
        raise ValueError(msg)


def _overlapping(shards: list[Shard], dimensions: tuple[int, ...]) -> tuple[Shard, Shard] | None:
    """Two shards that overlap in all ``dimensions``; fast where they form a grid, as they do."""
    if len(shards) < 2 or not dimensions:
        return (shards[0], shards[1]) if len(shards) > 1 else None
    for d in dimensions:
        groups: dict[tuple[int, int], list[Shard]] = {}
        for shard in shards:
            groups.setdefault((shard.offset[d], shard.shape[d]), []).append(shard)
        if all(o + n <= behind for (o, n), (behind, _) in itertools.pairwise(sorted(groups))):
            rest = tuple(other for other in dimensions if other != d)
            found = (_overlapping(group, rest) for group in groups.values())
            return next(filter(None, found), None)
    if len(shards) > _MAX_IRREGULAR:
        msg = f"its {len(shards)} shards do not form a grid"
        raise ValueError(msg)
    for one, other in itertools.combinations(shards, 2):
        if all(
            one.offset[d] < other.offset[d] + other.shape[d]
            and other.offset[d] < one.offset[d] + one.shape[d]
            for d in dimensions
        ):
            return one, other
    return None


def _check_files(manifest: FilesManifest) -> None:
    _check_packs(manifest.packs)
    taken: set[str] = set()
    above: set[str] = set()
    entries: list[FileRef | LinkRef | FolderRef]
    entries = [*manifest.files, *manifest.links, *manifest.folders]
    for entry in entries:
        if safe_path(entry.path) != entry.path or entry.path in taken:
            msg = f"{entry.path!r} is listed twice or not in its plain form"
            raise ValueError(msg)
        taken.add(entry.path)
        above.update(str(parent) for parent in PurePosixPath(entry.path).parents)
        if abs(entry.mtime_ns) > _MOST_NS:
            msg = f"{entry.path!r} has the impossible time {entry.mtime_ns}"
            raise ValueError(msg)
        if not isinstance(entry, LinkRef) and not 0 <= entry.mode <= 0o777:
            msg = f"{entry.path!r} has the impossible mode {entry.mode:o}"
            raise ValueError(msg)
    wrong = above & taken - {folder.path for folder in manifest.folders}
    if wrong:  # also: nothing is written through a link
        msg = f"{min(wrong)!r} is both a folder and something else"
        raise ValueError(msg)
    for link in manifest.links:
        if not stays_inside(link.path, link.target):
            msg = f"the link {link.path!r} leads out of its folder: {link.target!r}"
            raise ValueError(msg)
    linked: dict[int, FileRef] = {}
    for file in manifest.files:
        what = f"file {file.path!r}"
        _check_parts(what, file.parts, file.size_bytes - _hole_bytes(file), manifest.packs)
        other = linked.setdefault(file.link, file) if file.link else file
        if (other.parts, other.holes, other.mode) != (file.parts, file.holes, file.mode):
            msg = f"{what} is said to be {other.path!r}, and holds something else"
            raise ValueError(msg)


def stays_inside(path: str, target: str) -> bool:
    """Whether a link at ``path`` can be followed without leaving the directory.

    Steps upwards stand at the beginning only: behind a name, which may be a link itself, they
    would lead from wherever that link goes to.
    """
    if not target or "\0" in target or target.startswith("/") or len(target) > _MOST_TARGET:
        return False
    words = [word for word in target.split("/") if word not in {"", "."}]
    ups = next((n for n, word in enumerate(words) if word != ".."), len(words))
    return ".." not in words[ups:] and ups <= path.count("/")


def _hole_bytes(file: FileRef) -> int:
    if not 0 <= file.size_bytes <= _MAX_ARRAY_BYTES:
        msg = f"file {file.path!r} has the impossible size {file.size_bytes}"
        raise ValueError(msg)
    end = total = 0
    for offset, size in file.holes:
        if offset < end or size <= 0 or offset + size > file.size_bytes:
            msg = f"file {file.path!r} has holes that overlap, or are outside of it"
            raise ValueError(msg)
        end, total = offset + size, total + size
    return total


def _check_packs(packs: Sequence[PackRef]) -> None:
    for number, pack in enumerate(packs):
        if _PACK.fullmatch(pack.name) is None or not 0 < pack.size_bytes <= MAX_PACK_BYTES:
            msg = f"pack {number} has no valid name and size"
            raise ValueError(msg)


def _check_parts(
    what: str, parts: tuple[Part, ...], size_bytes: int, packs: Sequence[PackRef]
) -> None:
    for part in parts:
        if part.packed_bytes and part.size_bytes > MAX_PACKED_BYTES:
            msg = f"{what} has a compressed part of {part.size_bytes} bytes, which nobody writes"
            raise ValueError(msg)
        if not (
            0 <= part.pack < len(packs)
            and part.offset >= 0
            and part.size_bytes > 0
            and 0 <= part.packed_bytes < part.size_bytes
            and part.item_bytes in SHUFFLES
            and part.offset + part.stored_bytes <= packs[part.pack].size_bytes
            and _DIGEST.fullmatch(part.digest)
        ):
            msg = f"{what} names bytes outside of the packs, or without a digest: {part}"
            raise ValueError(msg)
    total = sum(part.size_bytes for part in parts)
    if total != size_bytes:
        msg = f"{what} needs {size_bytes} bytes, and its parts have {total}"
        raise ValueError(msg)
