"""How two checkpoints differ: by their digests first, so what is equal is not read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, Literal, NamedTuple

from spotfirst.checkpoints.manifest import ArrayRef, FilesManifest, Part, StateManifest
from spotfirst.checkpoints.memory import Block
from spotfirst.checkpoints.packs import Wanted, fetch
from spotfirst.checkpoints.statetree import ITEM_BYTES, unflatten
from spotfirst.checkpoints.streaming import read_array
from spotfirst.storage import Storage

__all__ = ["Difference", "Side", "compare", "compare_files"]

_WORKERS = 4
_BATCH_BYTES = 64 << 20
_NATIVE = frozenset({
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
})  # fmt: skip
"""The element types that NumPy calculates with."""


class Side(NamedTuple):
    """A checkpoint of a training state to compare."""

    packs: Storage
    manifest: StateManifest


class Difference(NamedTuple):
    """One array, plain value or file, in both checkpoints or in one.

    ``form`` is a change of element type or shape, ``value`` that of something that is no array.
    ``left`` and ``right`` say what is there. ``max_abs`` is the largest absolute difference of two
    elements, NaN where one of them is NaN; ``None`` when that is not known for the element type.
    """

    name: str
    kind: Literal["same", "changed", "form", "value", "only_left", "only_right"]
    left: str = ""
    right: str = ""
    size_bytes: int = 0
    changed_bytes: int | None = None
    max_abs: float | None = None


class _Work(NamedTuple):
    """Two arrays that differ in a pair of parts; or that were cut otherwise, as a whole."""

    name: str
    ours: ArrayRef
    theirs: ArrayRef
    parts: tuple[Part, Part] | None

    @property
    def size_bytes(self) -> int:
        return self.parts[0].size_bytes if self.parts else self.ours.size_bytes


class _Change(NamedTuple):
    changed_bytes: int
    max_abs: float | None


def compare(
    left: Side,
    right: Side,
    *,
    rank: int = 0,
    on_total: Callable[[int], object] = lambda _: None,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> list[Difference]:
    """Every array and plain value of two states by name, ``OBJECT/NAME``, in the left one's order.

    Of objects that each rank has for itself, those of ``rank``. Random number generators are left
    out. Reads only the chunks whose digests differ; without NumPy, none. Raises as
    :func:`spotfirst.checkpoints.packs.fetch` does.
    """
    ours, theirs = _values(left.manifest, rank), _values(right.manifest, rank)
    found: dict[str, Difference] = {}
    work: list[_Work] = []
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if name not in theirs:
            found[name] = Difference(name, "only_left", left=_text(ours[name]))
        elif name not in ours:
            found[name] = Difference(name, "only_right", right=_text(theirs[name]))
        else:
            found[name] = _differ(name, ours[name], theirs[name])
            if found[name].kind == "changed":
                work += _work(name, ours[name], theirs[name])
    try:
        import numpy as np
    except ImportError:
        return list(found.values())
    on_total(2 * sum(each.size_bytes for each in work))
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="spotfirst-diff") as pool:
        for batch in _batches(work):
            pairs = _load(left, right, batch)
            jobs = [
                pool.submit(_measure, np, each.ours.dtype, *pair)
                for each, pair in zip(batch, pairs, strict=True)
            ]
            for each, job in zip(batch, jobs, strict=True):
                found[each.name] = _add(found[each.name], job.result())
                on_bytes(2 * each.size_bytes)
    # Saved by other ranks, the same bytes are cut otherwise.
    return [
        each._replace(kind="same") if each.kind == "changed" and not each.changed_bytes else each
        for each in found.values()
    ]


def compare_files(left: FilesManifest, right: FilesManifest) -> list[Difference]:
    """Every file of two directories by path, without reading any."""
    ours = {file.path: file for file in left.files}
    theirs = {file.path: file for file in right.files}
    found = []
    for path in sorted({*ours, *theirs}):
        if path not in theirs:
            found.append(Difference(path, "only_left", left=f"{ours[path].size_bytes} bytes"))
        elif path not in ours:
            found.append(Difference(path, "only_right", right=f"{theirs[path].size_bytes} bytes"))
        else:
            known = {part.digest for part in ours[path].parts}
            fresh = sum(p.size_bytes for p in theirs[path].parts if p.digest not in known)
            same = _digests(ours[path].parts) == _digests(theirs[path].parts)
            found.append(
                Difference(
                    path, "same" if same else "changed",
                    size_bytes=theirs[path].size_bytes, changed_bytes=fresh,
                )
            )  # fmt: skip
    return found


def _values(manifest: StateManifest, rank: int) -> dict[str, Any]:
    own = manifest.ranks[rank % len(manifest.ranks)].objects if manifest.ranks else {}
    values: dict[str, Any] = {}
    for name, tree in {**own, **manifest.objects}.items():
        value = unflatten(tree, lambda _, index: manifest.arrays[index])
        values.update(_walk(value, name))
    return values


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _walk(item, f"{path}/{number}")
    else:
        yield path, value


def _differ(name: str, ours: Any, theirs: Any) -> Difference:
    if not isinstance(ours, ArrayRef) or not isinstance(theirs, ArrayRef):
        # As text: so NaN is NaN, and 0.0 is not -0.0.
        kind: Literal["same", "value"] = "same" if repr(ours) == repr(theirs) else "value"
        return Difference(name, kind, _text(ours), _text(theirs))
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return Difference(name, "form", _text(ours), _text(theirs), theirs.size_bytes)
    same = [(s.offset, s.shape, _digests(s.parts)) for s in ours.regions] == [
        (s.offset, s.shape, _digests(s.parts)) for s in theirs.regions
    ]
    kinds: Literal["same", "changed"] = "same" if same else "changed"
    return Difference(name, kinds, _text(ours), _text(theirs), theirs.size_bytes)


def _digests(parts: tuple[Part, ...]) -> list[tuple[int, str]]:
    return [(part.size_bytes, part.digest) for part in parts]


def _work(name: str, ours: ArrayRef, theirs: ArrayRef) -> Iterator[_Work]:
    """What to read of two arrays that are not the same."""
    item_bytes = ITEM_BYTES[ours.dtype]
    cut_alike = [(s.offset, s.shape, [p.size_bytes for p in s.parts]) for s in ours.regions] == [
        (s.offset, s.shape, [p.size_bytes for p in s.parts]) for s in theirs.regions
    ]
    if not cut_alike or any(p.size_bytes % item_bytes for s in ours.regions for p in s.parts):
        yield _Work(name, ours, theirs, None)
        return
    for one, other in zip(ours.regions, theirs.regions, strict=True):
        for a, b in zip(one.parts, other.parts, strict=True):
            if a.digest != b.digest:
                yield _Work(name, ours, theirs, (a, b))


def _batches(work: list[_Work]) -> Iterator[list[_Work]]:
    """Pairs of parts to read together; a whole array alone."""
    batch: list[_Work] = []
    size = 0
    for each in work:
        alone = each.parts is None or (batch and batch[-1].parts is None)
        if batch and (alone or size + each.size_bytes > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(each)
        size += each.size_bytes
    if batch:
        yield batch


def _load(left: Side, right: Side, batch: list[_Work]) -> list[tuple[Any, Any]]:
    if batch[0].parts is None:
        [each] = batch
        return [(read_array(*left, each.ours), read_array(*right, each.theirs))]
    pairs = [each.parts for each in batch if each.parts]
    return list(
        zip(_read(left, [a for a, _ in pairs]), _read(right, [b for _, b in pairs]), strict=True)
    )


def _read(side: Side, parts: list[Part]) -> list[memoryview]:
    memory = Block(sum(part.size_bytes for part in parts)).view
    targets: list[memoryview] = []
    start = 0
    for part in parts:
        targets.append(memory[start : start + part.size_bytes])
        start += part.size_bytes
    fetch(
        side.packs,
        [
            Wanted(side.manifest.packs[part.pack].name, part, target)
            for part, target in zip(parts, targets, strict=True)
        ],
    )
    return targets


def _measure(np: ModuleType, dtype: str, ours: Any, theirs: Any) -> _Change:
    raw = np.frombuffer(ours, np.uint8), np.frombuffer(theirs, np.uint8)
    changed = int(np.count_nonzero(raw[0] != raw[1]))
    if not changed or sys.byteorder != "little" or dtype not in {*_NATIVE, "bfloat16"}:
        return _Change(changed, None if changed else 0.0)
    # By their bits: infinity is no different from infinity, although their difference is NaN.
    word = np.dtype(f"u{min(ITEM_BYTES[dtype], 8)}")
    differs = (raw[0].view(word) != raw[1].view(word)).reshape(
        -1, ITEM_BYTES[dtype] // word.itemsize
    )
    a, b = (_numbers(np, dtype, data) for data in raw)
    with np.errstate(all="ignore"):
        distance = np.abs(a - b)
    return _Change(changed, float(distance.max(where=differs.any(axis=1), initial=0)))


def _numbers(np: ModuleType, dtype: str, data: Any) -> Any:
    """The elements as something that can be subtracted without an overflow."""
    if dtype == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    values = data.view(dtype)
    if values.dtype.kind in "biu":
        return values.astype(np.float64)
    return values.astype(np.float32) if dtype == "float16" else values


def _add(difference: Difference, change: _Change) -> Difference:
    known = [v for v in (difference.max_abs, change.max_abs) if v is not None]
    nan = [v for v in known if v != v]  # noqa: PLR0124 - NaN
    return difference._replace(
        changed_bytes=(difference.changed_bytes or 0) + change.changed_bytes,
        max_abs=nan[0] if nan else max(known, default=None),
    )


def _text(value: Any) -> str:
    if isinstance(value, ArrayRef):
        return f"{value.dtype}{list(value.shape)}"
    return f"{value!r:.80}"
