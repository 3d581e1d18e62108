"""The versions of a dataset: which there are, which is newest, and how the next is added."""

from __future__ import annotations

import contextlib
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from spotfirst.datasets._keys import check_name
from spotfirst.errors import (
    CorruptObject,
    FormatError,
    ObjectMissing,
    StorageUnavailable,
    UnknownDataset,
)
from spotfirst.sequence import Sequence
from spotfirst.storage import Storage
from spotfirst.wire import LIMIT_BYTES, Record, decode, encode

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Version", "VersionLog", "object_path"]

_MANIFEST_LIMIT_BYTES = 1 << 30
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Version(Record):
    """One immutable version of a dataset, counted from 1.

    ``manifest`` is the BLAKE3 digest of its Parquet file, ``content`` that of what it says: two
    versions with the same ``content`` hold the same files.
    """

    version: int
    manifest: str
    content: str
    files: int
    bytes: int
    created_at: datetime
    nonce: str
    message: str = ""


class _Root(Record):
    version: int


def object_path(digest: str) -> str:
    return f"objects/{digest[:2]}/{digest}"


class VersionLog:
    """One process's view of a dataset's versions. Not thread-safe."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.name = check_name(name)
        self.storage = storage.child(f"datasets/{name}")
        self._versions = Sequence(self.storage, "versions")

    def newest(self) -> Version | None:
        """Two reads and a probe, however many versions there are, while the hint is fresh."""
        entries = Sequence(self.storage, "versions")
        hint = self._hint()
        # Read from the hinted version on: what it points at must be there, and may not be last.
        entries.length = max(hint - 1, 0)
        found = entries.read_new()
        if hint and not found:
            entries.length = 0
            found = entries.read_new()
        self._versions = entries
        if not found:
            return None
        path, data = found[-1]
        return self._decode(data, entries.length, path)

    def get(self, number: int) -> Version:
        """Raises :class:`UnknownDataset`, which names the versions that there are."""
        path = self._versions.path(number)
        try:
            data = self.storage.read(path, limit_bytes=LIMIT_BYTES)
            return self._decode(data, number, path)
        except ObjectMissing:
            raise self.unknown(str(number)) from None

    def all(self) -> list[Version]:
        entries = Sequence(self.storage, "versions").read_new()
        return [self._decode(data, n, path) for n, (path, data) in enumerate(entries, start=1)]

    def append(self, version: Version) -> bool:
        """Add the version after :meth:`newest`; false when another writer was first."""
        if not self._versions.append(encode(version)):
            return False
        with contextlib.suppress(StorageUnavailable):  # the version is there; this is the hint
            self.storage.write("root.json", encode(_Root(version=version.version)))
        return True

    @property
    def next_number(self) -> int:
        return self._versions.length + 1

    def unknown(self, asked: str) -> UnknownDataset:
        numbers = [version.version for version in self.all()]
        where = f"in {self.storage.url}"
        if not numbers:
            return UnknownDataset(
                f"there is no dataset {self.name!r} {where}; commit a folder first"
            )
        there = f"1 to {len(numbers)}" if len(numbers) > 1 else "1"
        return UnknownDataset(
            f"dataset {self.name!r} {where} has no version {asked!r}; it has {there} "
            f"({self.name}@latest is {len(numbers)})"
        )

    def manifest(self, version: Version, cache: Path | None = None) -> pa.Table:
        """The version's manifest, verified. ``cache`` is a folder that may hold it already.

        Raises :class:`ObjectMissing` or :class:`CorruptObject`.
        """
        from spotfirst.datasets._manifest import decode_manifest

        path = f"manifests/{version.manifest}.parquet"
        data = _cached(cache, version.manifest)
        if data is None:
            data = self.storage.read(path, limit_bytes=_MANIFEST_LIMIT_BYTES)
            if blake3(data).hexdigest() != version.manifest:
                msg = (
                    f"{self.storage.url}/{path} has other bytes than its name promises; commit "
                    f"the source of {self.name}@{version.version} again with repair=True"
                )
                raise CorruptObject(msg)
            _remember(cache, version.manifest, data)
        table = decode_manifest(data, path=f"{self.storage.url}/{path}")
        if len(table) != version.files:
            msg = f"{self.storage.url}/{path} lists {len(table)} files instead of {version.files}"
            raise CorruptObject(msg)
        return table

    def _hint(self) -> int:
        try:
            data = self.storage.read_or_none("root.json", limit_bytes=LIMIT_BYTES)
            return decode(data, _Root, path=f"{self.storage.url}/root.json").version if data else 0
        except FormatError:
            return 0  # a hint only: the listing tells the truth

    def _decode(self, data: bytes, number: int, path: str) -> Version:
        version = decode(data, Version, path=f"{self.storage.url}/{path}")
        if version.version != number or not _DIGEST.fullmatch(version.manifest):
            msg = (
                f"{self.storage.url}/{path} calls itself version {version.version} with manifest "
                f"{version.manifest!r}; restore the object"
            )
            raise CorruptObject(msg)
        return version


def _cached(cache: Path | None, digest: str) -> bytes | None:
    if cache is None:
        return None
    try:
        data = (cache / digest).read_bytes()
    except OSError:
        return None
    return data if blake3(data).hexdigest() == digest else None


def _remember(cache: Path | None, digest: str, data: bytes) -> None:
    if cache is None:
        return
    from spotfirst.datasets._local import replace_file

    replace_file(cache / digest, data)
