"""Whether all bytes of stored checkpoints are there, and are those that were written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import msgspec

from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.codec import decode
from spotfirst.checkpoints.manifest import FilesManifest, Manifest, Part, read_manifest
from spotfirst.checkpoints.packs import chunk_digest
from spotfirst.errors import CorruptObject, ObjectMissing
from spotfirst.storage import Storage

__all__ = ["Damage", "Verdict", "parts_of", "verify"]

_READERS = 8
_READ_BYTES = 8 << 20
_GAP_BYTES = 64 << 10
_Problem = Literal["missing", "damaged"]


class Damage(NamedTuple):
    """What is wrong with one object: how much of it, and the checkpoints that this touches."""

    name: str
    problem: _Problem
    chunks: int
    size_bytes: int
    checkpoints: tuple[int, ...]


class Verdict(NamedTuple):
    """What was read, and what is wrong with it."""

    checkpoints: int
    packs: int
    size_bytes: int
    damage: tuple[Damage, ...]


_Found = list[tuple[str, _Problem, Part]]


def parts_of(manifest: Manifest) -> Iterator[Part]:
    """Every part that a manifest names, as often as it names it."""
    if isinstance(manifest, FilesManifest):
        for file in manifest.files:
            yield from file.parts
        return
    for array in manifest.arrays:
        for region in array.regions:
            yield from region.parts


def verify(
    packs: Storage,
    commits: Sequence[tuple[int, Commit]],
    *,
    still_kept: Callable[[], Collection[int]] | None = None,
    on_total: Callable[[int], object] = lambda _: None,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> Verdict:
    """Read and hash everything that checkpoints name, each chunk once, several at a time.

    ``commits`` are entries of the chain with their numbers. ``still_kept`` is asked when
    something is wrong: a running writer may have let go of a checkpoint meanwhile, which is no
    damage. ``on_total`` is told the bytes to read, ``on_bytes`` those just read. Takes some
    64 MiB of memory. Raises :class:`StorageError` when the storage does not answer.
    """
    damage: list[Damage] = []
    wanted: dict[str, dict[Part, set[int]]] = {}
    for seq, commit in commits:
        try:
            manifest = read_manifest(packs, commit.manifest, commit.digest)
        except (ObjectMissing, CorruptObject) as error:
            problem: _Problem = "missing" if isinstance(error, ObjectMissing) else "damaged"
            damage.append(Damage(commit.manifest, problem, 1, commit.size_bytes, (seq,)))
            continue
        for part in parts_of(manifest):
            pack = wanted.setdefault(manifest.packs[part.pack].name, {})
            # The pack's number is this manifest's own; others share the bytes under another.
            pack.setdefault(msgspec.structs.replace(part, pack=0), set()).add(seq)
    total = sum(part.stored_bytes for parts in wanted.values() for part in parts)
    on_total(total)
    found: dict[tuple[str, _Problem], list[Part]] = {}

    def check(span: tuple[str, list[Part]]) -> _Found:
        wrong = _check(packs, *span)
        on_bytes(sum(part.stored_bytes for part in span[1]))
        return wrong

    with ThreadPoolExecutor(_READERS, thread_name_prefix="spotfirst-verify") as pool:
        spans = [(name, span) for name, parts in wanted.items() for span in _spans(parts)]
        for wrong in pool.map(check, spans):
            for name, kind, part in wrong:
                found.setdefault((name, kind), []).append(part)
    damage += [
        Damage(
            name, kind, len(parts), sum(part.size_bytes for part in parts),
            tuple(sorted(set().union(*(wanted[name][part] for part in parts)))),
        )
        for (name, kind), parts in sorted(found.items())
    ]  # fmt: skip
    if damage and still_kept is not None:
        kept = set(still_kept())
        damage = [
            each._replace(checkpoints=left)
            for each in damage
            if (left := tuple(seq for seq in each.checkpoints if seq in kept))
        ]
    return Verdict(len(commits), len(wanted), total, tuple(damage))


def _spans(parts: Collection[Part]) -> Iterator[list[Part]]:
    """Parts of one pack to read with one call."""
    span: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.offset, part.stored_bytes)):
        if span:
            end = span[-1].offset + span[-1].stored_bytes
            after = part.offset + part.stored_bytes - span[0].offset
            if part.offset - end > _GAP_BYTES or after > _READ_BYTES:
                yield span
                span = []
        span.append(part)
    if span:
        yield span


def _check(packs: Storage, name: str, span: list[Part]) -> _Found:
    begin = span[0].offset
    data = memoryview(bytearray(max(p.offset + p.stored_bytes for p in span) - begin))
    try:
        packs.read_into(name, begin, data)
    except ObjectMissing:
        return [(name, "missing", part) for part in span]
    except CorruptObject:  # it ends too early: some may be whole
        if len(span) == 1:
            return [(name, "damaged", span[0])]
        return [wrong for part in span for wrong in _check(packs, name, [part])]
    return [
        (name, "damaged", part)
        for part in span
        if not _is_whole(part, data[part.offset - begin :][: part.stored_bytes])
    ]


def _is_whole(part: Part, stored: memoryview) -> bool:
    if not part.packed_bytes:
        return chunk_digest(stored) == part.digest
    plain = memoryview(bytearray(part.size_bytes))
    try:
        decode(stored, plain, part.item_bytes)
    except CorruptObject:
        return False
    return chunk_digest(plain) == part.digest
