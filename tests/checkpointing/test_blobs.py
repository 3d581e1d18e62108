from __future__ import annotations

import pytest
from blake3 import blake3

from spotfirst.checkpoints.blobs import BlobStore
from spotfirst.errors import CorruptObject, ObjectMissing
from spotfirst.storage import Storage


def _path(digest: str) -> str:
    return f"{digest[:2]}/{digest}"


def test_a_blob_is_named_by_the_blake3_of_its_bytes(blobs: BlobStore) -> None:
    digest = blobs.put(memoryview(b"weights"))
    assert digest == blake3(b"weights").hexdigest()
    assert blobs.get(digest) == b"weights"


def test_a_blob_that_was_written_is_not_written_again(blobs: BlobStore, storage: Storage) -> None:
    digest = blobs.put(b"weights")
    storage.delete(_path(digest))
    blobs.put(b"weights")
    assert not storage.exists(_path(digest))
    assert blobs.new_bytes == 7


def test_a_blob_that_was_read_and_verified_is_not_written_again(storage: Storage) -> None:
    digest = BlobStore(storage).put(b"weights")
    reader = BlobStore(storage)
    reader.get(digest)
    reader.put(b"weights")
    assert reader.new_bytes == 0


def test_a_damaged_blob_is_refused_and_replaced_by_the_next_put(storage: Storage) -> None:
    digest = BlobStore(storage).put(b"weights")
    storage.write(_path(digest), b"weighty")
    later = BlobStore(storage)
    with pytest.raises(CorruptObject, match="damaged"):
        later.get(digest)
    later.put(b"weights")
    assert later.get(digest) == b"weights"


def test_a_missing_blob_is_told_apart_from_a_damaged_one(blobs: BlobStore) -> None:
    with pytest.raises(ObjectMissing):
        blobs.get("0" * 64)


@pytest.mark.parametrize("name", ["", "..", "../../spec.json", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_only_a_digest_names_a_blob(blobs: BlobStore, name: str) -> None:
    with pytest.raises(CorruptObject):
        blobs.get(name)


def test_no_more_is_read_than_the_size_that_was_promised(storage: Storage) -> None:
    blobs = BlobStore(storage)
    digest = blobs.put(b"x" * 1000)
    with pytest.raises(CorruptObject, match="holds 11 bytes"):
        blobs.get(digest, size_bytes=10)


@pytest.mark.parametrize("data", [b""])
def test_an_empty_blob_is_refused(blobs: BlobStore, data: bytes) -> None:
    with pytest.raises(ValueError, match="1 to"):
        blobs.put(data)
