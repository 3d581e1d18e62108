"""Packs: objects of about 64 MiB in which the bytes of a checkpoint are kept.

Bytes come in *chunks* of at most 8 MiB, each with its digest. A chunk whose digest the previous
checkpoint has is not written again; the manifest names the older pack. What is new and lies side
by side in memory goes to the storage as it lies there.

A pack's name begins with the number of its writer's claim in the checkpoint chain, so two writers
never have the same name, and a name is written once. This is what garbage collection rests on.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import xxhash

from spotfirst.checkpoints.codec import decode, encode
from spotfirst.checkpoints.manifest import ArrayRef, PackRef, Part
from spotfirst.checkpoints.memory import Block
from spotfirst.errors import CorruptObject
from spotfirst.storage import Storage

__all__ = [
    "CHUNK_BYTES",
    "PACK_BYTES",
    "Location",
    "PackWriter",
    "Wanted",
    "Write",
    "chunk_cuts",
    "chunk_digest",
    "fetch",
    "known_arrays",
    "known_parts",
    "manifest_name",
    "pack_prefix",
    "read_chunk",
]

CHUNK_BYTES = 8 << 20
"""A larger array or file has several parts."""
PACK_BYTES = 64 << 20
"""When a pack is full. Large enough for a disk and for S3, small enough to write several at once."""

_READ_BYTES = 16 << 20
_DIRECT_BYTES = 1 << 20
"""Chunks of at most this size that lie side by side are read together."""
_READERS = 8
_REQUESTS = min(32, max(4, 2 * (os.cpu_count() or 1)))
"""At once to a server: more would only take the cores from each other."""


Write = Callable[[], None]
"""Puts one pack into the storage."""


@dataclass(frozen=True)
class Location:
    """Where a chunk is."""

    pack: str
    pack_bytes: int
    offset: int
    size_bytes: int
    packed_bytes: int = 0
    item_bytes: int = 1


def chunk_digest(data: memoryview) -> str:
    """The XXH3-128 of a chunk, in hex; runs without the GIL."""
    return xxhash.xxh3_128_hexdigest(data)


def chunk_cuts(size_bytes: int) -> list[tuple[int, int]]:
    """(offset, size) of the chunks of an item of ``size_bytes``."""
    starts = range(0, size_bytes, CHUNK_BYTES)
    return [(start, min(CHUNK_BYTES, size_bytes - start)) for start in starts]


def pack_prefix(claim: int, save: int, rank: int = 0) -> str:
    """How the names of one save's packs begin: claim, number of the save, rank."""
    return f"{claim:08d}/{save:06d}-{rank:05d}"


def manifest_name(claim: int, save: int) -> str:
    """The name of one save's manifest."""
    return f"{claim:08d}/{save:06d}.json"


def known_arrays(packs: Sequence[PackRef], arrays: Iterable[ArrayRef]) -> dict[str, Location]:
    """:func:`known_parts` of the arrays of a state."""
    return known_parts(
        packs, (part for array in arrays for region in array.regions for part in region.parts)
    )


def known_parts(packs: Sequence[PackRef], parts: Iterable[Part]) -> dict[str, Location]:
    """What a checkpoint holds and the next one need not write, by digest.

    Packs of which less than half is still in use are left out: their rest is written again, so
    that they can go. So no more than twice the bytes of the kept checkpoints are stored.
    """
    parts = list(parts)
    used = Counter[int]()
    for part in {(part.pack, part.offset): part for part in parts}.values():
        used[part.pack] += part.stored_bytes
    return {
        part.digest: Location(
            packs[part.pack].name,
            packs[part.pack].size_bytes,
            part.offset,
            part.size_bytes,
            part.packed_bytes,
            part.item_bytes,
        )
        for part in parts
        if 2 * used[part.pack] >= packs[part.pack].size_bytes
    }


class PackWriter:
    """Writes the chunks of one checkpoint into a storage. Thread-safe.

    ``known`` is what need not be written: chunks of a checkpoint that stays. ``write`` puts one
    pack into the storage, and may take as long as it likes.
    """

    def __init__(
        self,
        storage: Storage,
        prefix: str,
        known: Mapping[str, Location],
        *,
        write: Callable[[Callable[[], None]], None] = lambda action: action(),
    ) -> None:
        self._storage = storage
        self._prefix = prefix
        self._known = known
        self._write_with = write
        self._lock = threading.Lock()
        self._fresh: dict[str, Part] = {}
        self._numbers: dict[str, int] = {}
        self._refs: list[PackRef] = []
        self._written: list[str] = []
        self._unwritten: set[int] = set()
        self._pending: Block | None = None
        self._pending_number = 0
        self._pending_bytes = 0
        self.new_bytes = 0
        """Bytes that went to the storage."""

    def add(
        self,
        block: memoryview,
        cuts: Sequence[tuple[int, int]],
        digests: Sequence[str],
        item_bytes: Sequence[int] | None = None,
    ) -> list[Part]:
        """Make the chunks at ``cuts`` (offset, size) of ``block`` part of the checkpoint.

        With ``item_bytes``, the element size of each chunk, they are compressed. The pack of small,
        scattered or compressed chunks is written later, by :meth:`finish` at the latest.
        """
        parts, writes = self.place(block, cuts, digests, item_bytes)
        for write in writes:
            write()
        return parts

    def place(
        self,
        block: memoryview,
        cuts: Sequence[tuple[int, int]],
        digests: Sequence[str],
        item_bytes: Sequence[int] | None = None,
    ) -> tuple[list[Part], list[Write]]:
        """As :meth:`add`, but nothing is written: that is left to who calls the writes.

        Until then the memory of ``block`` must stay as it is.
        """
        with self._lock:
            found = [
                self._present(digest, size) for (_, size), digest in zip(cuts, digests, strict=True)
            ]
            missing = [at for at, part in enumerate(found) if part is None]
            end = max((start + size for start, size in cuts), default=0)
            whole = (
                len(missing) == len(cuts) and end >= PACK_BYTES // 8 and item_bytes is None
            )  # fmt: skip
            number = -1
            if whole:  # goes to the storage as it lies in memory
                number = self._open(end)
                found = [
                    self._place(Part(pack=number, offset=start, size_bytes=size, digest=digest))
                    for (start, size), digest in zip(cuts, digests, strict=True)
                ]
        writes: list[Write] = []
        if whole:
            writes.append(partial(self._write, number, block[:end]))
            missing = []
        packed: dict[int, bytes | None] = {}
        if item_bytes is not None:  # takes long: not with the lock held
            for number in missing:
                start, size = cuts[number]
                packed[number] = encode(block[start : start + size], item_bytes[number])
        full: list[tuple[int, Block, int]] = []
        with self._lock:
            for number in missing:
                start, size = cuts[number]
                part = self._present(digests[number], size)  # it may come twice
                data = packed.get(number)
                if part is None and data is not None and item_bytes is not None:
                    pack, offset = self._pend(memoryview(data), full)
                    part = self._place(
                        Part(
                            pack=pack,
                            offset=offset,
                            size_bytes=size,
                            digest=digests[number],
                            packed_bytes=len(data),
                            item_bytes=item_bytes[number],
                        )
                    )
                elif part is None:
                    pack, offset = self._pend(block[start : start + size], full)
                    part = self._place(
                        Part(pack=pack, offset=offset, size_bytes=size, digest=digests[number])
                    )
                found[number] = part
        writes += [partial(self._write, pack, memory.view[:size]) for pack, memory, size in full]
        return [part for part in found if part is not None], writes

    def finish(self) -> tuple[PackRef, ...]:
        """Write what is left; the packs that the parts' numbers are about."""
        packs, writes = self.close()
        for write in writes:
            write()
        return packs

    def close(self) -> tuple[tuple[PackRef, ...], list[Write]]:
        """As :meth:`finish`, but nothing is written: that is left to who calls the writes."""
        full: list[tuple[int, Block, int]] = []
        with self._lock:
            self._close_pending(full)
        writes: list[Write] = [
            partial(self._write, pack, memory.view[:size]) for pack, memory, size in full
        ]
        return tuple(self._refs), writes

    def location(self, part: Part) -> Location | None:
        """Where a part of :meth:`add` is; ``None`` while its pack is not in the storage.

        Also after a failure: what is there need not be written by the next try.
        """
        with self._lock:
            if part.pack in self._unwritten:
                return None
            pack = self._refs[part.pack]
        return Location(
            pack.name, pack.size_bytes, part.offset, part.size_bytes, part.packed_bytes,
            part.item_bytes,
        )  # fmt: skip

    def discard(self) -> None:
        """Remove what was written for a checkpoint that is not to be."""
        for name in self._written:
            self._storage.delete(name)

    # -- with the lock held -----------------------------------------------------------------

    def _present(self, digest: str, size_bytes: int) -> Part | None:
        fresh = self._fresh.get(digest)
        if fresh is not None and fresh.size_bytes == size_bytes:
            return fresh
        known = self._known.get(digest)
        if known is None or known.size_bytes != size_bytes:
            return None
        number = self._numbers.get(known.pack)
        if number is None:
            number = self._numbers[known.pack] = len(self._refs)
            self._refs.append(PackRef(name=known.pack, size_bytes=known.pack_bytes))
        return Part(
            pack=number, offset=known.offset, size_bytes=size_bytes, digest=digest,
            packed_bytes=known.packed_bytes, item_bytes=known.item_bytes,
        )  # fmt: skip

    def _open(self, size_bytes: int) -> int:
        name = f"{self._prefix}-{len(self._written):06d}"
        self._written.append(name)
        self._refs.append(PackRef(name=name, size_bytes=size_bytes))
        self._unwritten.add(len(self._refs) - 1)
        return len(self._refs) - 1

    def _place(self, part: Part) -> Part:
        self._fresh.setdefault(part.digest, part)
        return part

    def _pend(self, data: memoryview, full: list[tuple[int, Block, int]]) -> tuple[int, int]:
        if self._pending is not None and self._pending_bytes + len(data) > PACK_BYTES:
            self._close_pending(full)
        if self._pending is None:
            self._pending = Block(PACK_BYTES)
            self._pending_number = self._open(1)
            self._pending_bytes = 0
        offset = self._pending_bytes
        self._pending.view[offset : offset + len(data)] = data
        self._pending_bytes += len(data)
        return self._pending_number, offset

    def _close_pending(self, full: list[tuple[int, Block, int]]) -> None:
        if self._pending is None:
            return
        number, size = self._pending_number, self._pending_bytes
        self._refs[number] = PackRef(name=self._refs[number].name, size_bytes=size)
        full.append((number, self._pending, size))
        self._pending = None

    # -- without it -------------------------------------------------------------------------

    def _write(self, pack: int, data: memoryview) -> None:
        name = self._refs[pack].name
        self._write_with(lambda: self._storage.write_from(name, data))
        with self._lock:
            self.new_bytes += len(data)
            self._unwritten.discard(pack)


@dataclass(frozen=True)
class Wanted:
    """One chunk to read, and the memory that it goes to (of its size, writable)."""

    pack: str
    part: Part
    target: memoryview


def fetch(packs: Storage, wanted: Iterable[Wanted], *, readers: int | None = None) -> int:
    """Read chunks into their memory, several at once, each verified; the bytes read.

    A chunk that is wrong or missing raises :class:`CorruptObject` or :class:`ObjectMissing`; the
    targets then hold anything.
    """
    readers = readers or (_READERS if packs.reads_apart else _REQUESTS)
    with ThreadPoolExecutor(readers, thread_name_prefix="spotfirst-read") as pool:
        runs = _runs(wanted, apart=packs.reads_apart)
        futures: list[Future[int]] = [pool.submit(_read_run, packs, run) for run in runs]
        try:
            return sum(future.result() for future in futures)
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def read_chunk(packs: Storage, pack: str, part: Part) -> bytearray:
    """The bytes of one part, verified. Raises as :func:`fetch` does."""
    data = bytearray(part.size_bytes)
    _read_run(packs, [Wanted(pack, part, memoryview(data))])
    return data


def _runs(wanted: Iterable[Wanted], *, apart: bool) -> Iterable[list[Wanted]]:
    """Chunks to read with one call: neighbours, and with ``apart`` only small ones."""
    run: list[Wanted] = []
    end = size = 0
    for each in sorted(wanted, key=lambda w: (w.pack, w.part.offset)):
        part = each.part
        fits = (
            run
            and run[-1].pack == each.pack
            and (not apart or max(part.stored_bytes, run[-1].part.stored_bytes) < _DIRECT_BYTES)
            and 0 <= part.offset - end < _DIRECT_BYTES // 16
            and size + part.stored_bytes <= _READ_BYTES
        )
        if run and not fits:
            yield run
            run, size = [], 0
        run.append(each)
        size += part.stored_bytes
        end = part.offset + part.stored_bytes
    if run:
        yield run


def _with_gaps(run: list[Wanted]) -> Iterable[memoryview]:
    """The targets of a run, and memory for what lies between them."""
    end = run[0].part.offset
    for each in run:
        if each.part.offset > end:
            yield memoryview(bytearray(each.part.offset - end))
        yield each.target
        end = each.part.offset + each.part.stored_bytes


def _read_run(packs: Storage, run: list[Wanted]) -> int:
    first, last = run[0], run[-1]
    start = first.part.offset
    size = last.part.offset + last.part.stored_bytes - start
    if len(run) == 1 and not first.part.packed_bytes:
        packs.read_into(first.pack, start, first.target)
    elif not packs.reads_apart and not any(each.part.packed_bytes for each in run):
        packs.read_scattered(first.pack, start, list(_with_gaps(run)))
    else:
        together = memoryview(bytearray(size))
        packs.read_into(first.pack, start, together)
        for each in run:
            offset = each.part.offset - start
            stored = together[offset : offset + each.part.stored_bytes]
            if each.part.packed_bytes:
                decode(stored, each.target, each.part.item_bytes)
            else:
                each.target[:] = stored
    for each in run:
        if chunk_digest(each.target) != each.part.digest:
            msg = (
                f"pack {packs.url}/{each.pack} is damaged: the {each.part.stored_bytes} bytes from "
                f"{each.part.offset} on are not those that were written"
            )
            raise CorruptObject(msg)
    return size
