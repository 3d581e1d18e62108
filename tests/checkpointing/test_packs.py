from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst.checkpoints import packs as packs_module
from spotfirst.checkpoints.manifest import Part
from spotfirst.checkpoints.packs import (
    Location,
    PackWriter,
    Wanted,
    chunk_cuts,
    chunk_digest,
    fetch,
    known_parts,
    pack_prefix,
    read_chunk,
)
from spotfirst.errors import CorruptObject, ObjectMissing, StorageUnavailable
from spotfirst.storage import Storage, open_storage
from tests.checkpointing.storages import faulty

PREFIX = pack_prefix(1, 1)


def _add(writer: PackWriter, *chunks: bytes) -> list[Part]:
    """Add chunks that lie side by side in memory."""
    block = memoryview(b"".join(chunks))
    cuts, start = [], 0
    for chunk in chunks:
        cuts.append((start, len(chunk)))
        start += len(chunk)
    return writer.add(block, cuts, [chunk_digest(memoryview(chunk)) for chunk in chunks])


def _writer(packs: Storage, known: dict[str, Location] | None = None, save: int = 1) -> PackWriter:
    return PackWriter(packs, pack_prefix(1, save), known or {})


def _known(writer: PackWriter, parts: list[Part]) -> dict[str, Location]:
    return known_parts(writer.finish(), parts)


def _contents(packs: Storage, writer: PackWriter, parts: list[Part]) -> list[bytes]:
    refs = writer.finish()
    return [bytes(read_chunk(packs, refs[part.pack].name, part)) for part in parts]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs and chunks so small that a few bytes make several."""
    monkeypatch.setattr(packs_module, "CHUNK_BYTES", 8)
    monkeypatch.setattr(packs_module, "PACK_BYTES", 64)


def test_chunks_come_back_as_they_were(packs: Storage) -> None:
    writer = _writer(packs)
    chunks = [b"weights", b"bias", b"x" * 1000]
    assert _contents(packs, writer, _add(writer, *chunks)) == chunks
    assert writer.new_bytes == 1011
    assert [name for name, _ in packs.walk("")] == [f"{PREFIX}-000000"]


def test_a_pack_that_is_not_full_is_written_when_the_save_ends(packs: Storage) -> None:
    writer = _writer(packs)
    _add(writer, b"weights")
    assert list(packs.walk("")) == []
    writer.finish()
    assert list(packs.walk("")) == [(f"{PREFIX}-000000", 7)]


def test_what_the_checkpoint_before_has_is_not_written_again(packs: Storage) -> None:
    first = _writer(packs)
    parts = _add(first, b"frozen", b"trained")
    known = _known(first, parts)
    second = _writer(packs, known, save=2)
    again = _add(second, b"frozen", b"trained!")
    assert _contents(packs, second, again) == [b"frozen", b"trained!"]
    assert second.new_bytes == len(b"trained!")
    assert [ref.name for ref in second.finish()] == [
        f"{PREFIX}-000000",
        f"{pack_prefix(1, 2)}-000000",
    ]


def test_a_save_in_which_nothing_changed_writes_no_pack(packs: Storage) -> None:
    first = _writer(packs)
    known = _known(first, _add(first, b"frozen"))
    second = _writer(packs, known, save=2)
    _add(second, b"frozen")
    second.finish()
    assert second.new_bytes == 0
    assert len(list(packs.walk(""))) == 1


def test_a_pack_that_is_mostly_unused_is_let_go(packs: Storage) -> None:
    first = _writer(packs)
    parts = _add(first, b"trained" * 10, b"frozen")
    known = known_parts(first.finish(), parts[1:])
    assert known == {}
    assert len(known_parts(first.finish(), parts)) == 2


def test_a_chunk_that_comes_twice_within_a_save_is_written_once(packs: Storage) -> None:
    writer = _writer(packs)
    parts = _add(writer, b"zeros", b"other", b"zeros") + _add(writer, b"zeros")
    assert _contents(packs, writer, parts) == [b"zeros", b"other", b"zeros", b"zeros"]
    assert writer.new_bytes == 10


def test_a_chunk_of_another_size_is_another_chunk(packs: Storage) -> None:
    """Should two digests ever meet."""
    digest = chunk_digest(memoryview(b"frozen"))
    writer = _writer(packs, {digest: Location("00000001/000001-00000-000000", 99, 0, 99)})
    _add(writer, b"frozen")
    writer.finish()
    assert writer.new_bytes == 6


def test_changed_chunks_that_lie_apart_are_packed_together(packs: Storage, small: None) -> None:
    chunks = [b"%08d" % number for number in range(8)]
    first = _writer(packs)
    parts = _add(first, *chunks)
    known = _known(first, parts)
    chunks[1], chunks[6] = b"changed1", b"changed6"
    second = _writer(packs, known, save=2)
    parts = _add(second, *chunks)
    assert _contents(packs, second, parts) == chunks
    assert [size for name, size in packs.walk("") if pack_prefix(1, 2) in name] == [16]


def test_a_block_that_is_all_new_goes_to_the_storage_as_it_lies_in_memory(
    packs: Storage, small: None
) -> None:
    taken: list[Any] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(packs, name)

        def write_from(self, path: str, data: memoryview) -> None:
            taken.append(data.obj)
            packs.write_from(path, data)

    block = bytes(range(64))
    cuts = chunk_cuts(64)
    digests = [chunk_digest(memoryview(block)[start : start + size]) for start, size in cuts]
    writer = _writer(Watched())  # type: ignore[arg-type]
    parts = writer.add(memoryview(block), cuts, digests)
    assert b"".join(_contents(packs, writer, parts)) == block
    assert len(taken) == 1
    assert taken[0] is block


def test_packs_are_written_as_they_fill(packs: Storage, small: None) -> None:
    writer = _writer(packs)
    chunks = [b"%05d" % number for number in range(40)]
    parts = [part for chunk in chunks for part in _add(writer, chunk)]
    assert len(list(packs.walk(""))) == 3
    assert _contents(packs, writer, parts) == chunks
    assert [size for _, size in packs.walk("")] == [60, 60, 60, 20]


def test_threads_may_add_at_the_same_time(packs: Storage, small: None) -> None:
    writer = _writer(packs)
    blocks = [[b"%08d" % (number % 90) for number in range(n, n + 6)] for n in range(200)]
    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(lambda block: _add(writer, *block), blocks))
    for block, parts in zip(blocks, added, strict=True):
        assert _contents(packs, writer, parts) == block
    assert writer.new_bytes == 90 * 8
    assert sum(size for _, size in packs.walk("")) == 90 * 8


@given(
    saves=st.lists(
        st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12), max_size=5), max_size=4
    )
)
def test_whatever_changes_between_saves_every_part_is_right(saves: list[list[list[int]]]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packs_module, "PACK_BYTES", 64)
        packs = open_storage("memory://any-saves")
        for path, _ in list(packs.walk("")):
            packs.delete(path)
        known: dict[str, Location] = {}
        written: set[bytes] = set()
        for number, blocks in enumerate(saves):
            writer = _writer(packs, known, save=number)
            chunks = [[b"%02d" % value * (value + 1) for value in block] for block in blocks]
            added = [_add(writer, *block) for block in chunks]
            everything = [chunk for block in chunks for chunk in block]
            parts = [part for block in added for part in block]
            assert _contents(packs, writer, parts) == everything
            old, written = written, set(everything)
            new_bytes = sum(len(chunk) for chunk in set(everything) - old)
            # A block that is all new is written as it lies, with what it has twice.
            assert new_bytes <= writer.new_bytes <= sum(map(len, everything))
            known = known_parts(writer.finish(), parts)


def test_a_failed_write_is_raised_where_the_chunks_are_added(packs: Storage, small: None) -> None:
    def refuse(verb: str, path: str) -> None:
        if verb == "write_from":
            raise StorageUnavailable(path)

    writer = _writer(faulty(packs, before=refuse))
    with pytest.raises(StorageUnavailable):
        _add(writer, b"x" * 40)


def test_what_was_written_for_nothing_is_removed(packs: Storage, small: None) -> None:
    first = _writer(packs)
    known = _known(first, _add(first, b"kept"))
    kept = list(packs.walk(""))
    second = _writer(packs, known, save=2)
    _add(second, b"kept", b"a" * 40)
    _add(second, b"b" * 40)
    second.finish()
    second.discard()
    assert list(packs.walk("")) == kept


# -- reading --------------------------------------------------------------------------------


def _stored(packs: Storage, *chunks: bytes) -> tuple[str, list[Part]]:
    writer = _writer(packs)
    parts = _add(writer, *chunks)
    (ref,) = writer.finish()
    return ref.name, parts


def _wanted(name: str, parts: list[Part]) -> list[Wanted]:
    return [Wanted(name, part, memoryview(bytearray(part.size_bytes))) for part in parts]


def test_chunks_are_read_into_the_memory_that_is_given(packs: Storage) -> None:
    name, parts = _stored(packs, b"one", b"two", b"three")
    wanted = _wanted(name, parts[::-1])
    assert fetch(packs, wanted) == 11
    assert [bytes(each.target) for each in wanted] == [b"three", b"two", b"one"]


def test_small_neighbours_are_read_with_one_call(packs: Storage) -> None:
    name, parts = _stored(packs, *(b"%06d" % number for number in range(1000)))
    calls: list[str] = []
    fetch(faulty(packs, before=lambda verb, path: calls.append(verb)), _wanted(name, parts))
    assert calls == ["read_into"]


def test_every_flipped_bit_is_found(packs: Storage) -> None:
    name, parts = _stored(packs, b"weights", b"bias")
    data = packs.read(name)
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        packs.write(name, bytes(damaged))
        with pytest.raises(CorruptObject, match="damaged"):
            fetch(packs, _wanted(name, parts))


def test_a_pack_that_was_cut_short_is_damaged(packs: Storage) -> None:
    name, parts = _stored(packs, b"weights", b"bias")
    packs.write(name, packs.read(name)[:-1])
    with pytest.raises(CorruptObject, match="damaged"):
        fetch(packs, _wanted(name, parts))


def test_a_missing_pack_is_told_apart_from_a_damaged_one(packs: Storage) -> None:
    name, parts = _stored(packs, b"weights")
    packs.delete(name)
    with pytest.raises(ObjectMissing):
        fetch(packs, _wanted(name, parts))


def test_names_sort_by_claim_then_save() -> None:
    names = [pack_prefix(claim, save) for claim in (1, 9, 10, 123) for save in (1, 2, 30, 400)]
    assert names == sorted(names)
