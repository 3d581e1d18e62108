"""Bytes under their own BLAKE3 digest: written once, shared by name, verified on every read."""

from __future__ import annotations

import re

from blake3 import blake3

from spotfirst.errors import CorruptObject
from spotfirst.storage import Storage

__all__ = ["MAX_BLOB_BYTES", "BlobStore", "Bytes", "is_digest"]

Bytes = bytes | bytearray | memoryview

MAX_BLOB_BYTES = 1 << 30
"""No blob is larger, so a reader never reserves more than this on a manifest's word."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    """Whether ``text`` can name a blob: 64 lower-case hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


class BlobStore:
    """The blobs below one prefix, as ``{first two digits}/{digest}``.

    It remembers which blobs it wrote or read whole and right, and does not write those again.
    Not shared between threads that write at the same time.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: set[str] = set()
        self.new_bytes = 0
        """Bytes that :meth:`put` has written; what was known already is not counted."""

    def put(self, data: Bytes) -> str:
        """Make ``data`` durable (1 byte to :data:`MAX_BLOB_BYTES`); its digest.

        An object that is there but not known is replaced: it may be damaged.
        """
        if not 0 < len(data) <= MAX_BLOB_BYTES:
            msg = f"a blob has 1 to {MAX_BLOB_BYTES} bytes, not {len(data)}"
            raise ValueError(msg)
        digest = blake3(data).hexdigest()
        if digest not in self._known:
            self._storage.write(_path(digest), bytes(data))
            self._known.add(digest)
            self.new_bytes += len(data)
        return digest

    def get(self, digest: str, *, size_bytes: int | None = None) -> bytes:
        """The blob. With ``size_bytes``, no more than that is ever read.

        Raises :class:`CorruptObject` when the bytes are not those that the digest names, and
        :class:`ObjectMissing` when there are none.
        """
        if not is_digest(digest):
            msg = f"{digest[:80]!r} is no blob of {self._storage.url}: a digest has 64 hex digits"
            raise CorruptObject(msg)
        path = _path(digest)
        if size_bytes is None:
            data = self._storage.read(path)
        else:
            data = self._storage.read_range(path, 0, size_bytes + 1)
        if blake3(data).hexdigest() != digest:
            msg = (
                f"blob {self._storage.url}/{path} is damaged: it holds {len(data)} bytes with "
                "another digest"
            )
            raise CorruptObject(msg)
        self._known.add(digest)
        return data


def _path(digest: str) -> str:
    return f"{digest[:2]}/{digest}"
