"""Committing a folder as the next version: only bytes that the storage lacks are sent."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from blake3 import blake3

from spotfirst.datasets._keys import parents
from spotfirst.datasets._local import default_cache, for_each, hash_stream, scratch
from spotfirst.datasets._log import Version, VersionLog, object_path
from spotfirst.datasets._manifest import build_manifest, content_digest, encode_manifest
from spotfirst.datasets._source import Found, Source, SourceChanged, open_source, readable
from spotfirst.datasets._statcache import StatCache
from spotfirst.errors import CorruptObject, InvalidSpec, ObjectMissing
from spotfirst.storage import Storage
from spotfirst.wire import Clock, utc_now

__all__ = ["commit"]

_IN_MEMORY_BYTES = 16 << 20
_ASK_PER_PAGE = 20  # so many questions, asked in parallel, take as long as one page of a listing
_PAGE = 1000
_TRIES = 3


class _Row(NamedTuple):
    key: str
    size: int
    digest: str
    executable: bool


def commit(
    storage: Storage,
    name: str,
    source: Path | str,
    message: str = "",
    *,
    repair: bool = False,
    cache: Path | None = None,
    workers: int = 16,
    clock: Clock = utc_now,
) -> Version:
    """Make the files below ``source`` the newest version of dataset ``name``.

    ``source`` is a local folder or an fsspec URL prefix. When the newest version holds exactly
    these files, it is returned and nothing is written. Of two committers that race, one gets the
    next number and the other the one after it.

    Files whose size, times and inode are those of the last commit are not read again (``cache``
    is where that is remembered: ``$SPOTFIRST_CACHE``, else the user's cache folder). With
    ``repair`` every file is read and sent again, which mends an object that was damaged.

    The storage and the cache are left out where they lie inside of the source. Whether a file may
    be run is part of it; other modes, owners and times are not.

    Raises :class:`~spotfirst.errors.InvalidSpec` for a source that is not there, may not be read,
    holds a name that cannot be a key, or keeps changing while it is read; a
    :class:`~spotfirst.errors.StorageError` for one that cannot be read for another reason.
    """
    log = VersionLog(storage, name)
    cache = default_cache() if cache is None else cache
    place = open_source(source, clock(), left_out=(storage.url, str(cache)))
    known = StatCache(cache, place.name)
    digests = {} if repair else known.load()
    changed = ""
    for _ in range(_TRIES):
        try:
            with scratch(cache / "datasets" / "partial") as temporary:
                work = _Work(log.storage, place, workers, temporary, repair=repair)
                rows = _read(work, known, digests)
                return _append(log, work, rows, message, clock)
        except SourceChanged as error:
            digests, changed = {}, str(error)
    msg = f"{changed or place.name} changes while it is committed; commit a copy, or stop what writes to it"
    raise InvalidSpec(msg)


class _Work(NamedTuple):
    """What every part of one commit needs."""

    storage: Storage
    place: Source
    workers: int
    temporary: Path
    repair: bool


def _read(work: _Work, known: StatCache, digests: Mapping[Found, str]) -> list[_Row]:
    """The source as rows of a manifest; files that ``digests`` knows are not read."""
    found = work.place.scan()
    if not found:
        raise InvalidSpec(f"there are no files below {work.place.name}; nothing to commit")
    fresh = _hash(work, found, digests)
    if fresh or len(digests) != len(found):
        digests = {entry: fresh.get(entry) or digests[entry] for entry in found}
        known.store(digests)
    rows = [_Row(entry.key, entry.size, digests[entry], entry.executable) for entry in found]
    _refuse_clashes(rows)
    return rows


def _append(log: VersionLog, work: _Work, rows: list[_Row], message: str, clock: Clock) -> Version:
    """Send what is missing, then add the version; on top of a racing one when that was first."""
    content = content_digest(rows)
    sent: set[str] = set()
    while True:
        newest = log.newest()
        if newest is not None and newest.content == content and not work.repair:
            return newest
        sent |= _upload(work, rows, sent if work.repair else sent | _objects_of(log, newest))
        manifest = _write_manifest(log.storage, rows)
        if newest is not None and newest.manifest == manifest:
            return newest  # repaired
        version = Version(
            version=log.next_number,
            manifest=manifest,
            content=content,
            files=len(rows),
            bytes=sum(row.size for row in rows),
            created_at=clock(),
            nonce=secrets.token_hex(8),
            message=message,
        )
        if log.append(version):
            return version


@contextmanager
def _opened(work: _Work, key: str) -> Iterator[BinaryIO]:
    """A file of the source; errors of reading it name it."""
    with readable(f"{work.place.name}/{key}"), work.place.open(key) as file:
        yield file


def _hash(work: _Work, found: list[Found], digests: Mapping[Found, str]) -> dict[Found, str]:
    """Digests of the files that the cache does not know."""
    fresh: dict[Found, str] = {}

    def hash_one(entry: Found) -> None:
        with _opened(work, entry.key) as file:
            digest, size = hash_stream(file)
            fingerprint = work.place.fingerprint_of(file)
        if size != entry.size or fingerprint not in {None, entry.fingerprint}:
            raise SourceChanged(f"{work.place.name}/{entry.key}")
        fresh[entry] = digest

    unknown = [entry for entry in found if not entry.fingerprint or entry not in digests]
    for_each(unknown, hash_one, workers=min(work.workers, 4))
    return fresh


def _refuse_clashes(rows: list[_Row]) -> None:
    """An object store may hold both ``a`` and ``a/b``, which no folder can."""
    keys = {row.key for row in rows}
    folders = {name for key in keys if "/" in key for name in parents(key.rpartition("/")[0])}
    for clash in sorted(keys & folders):
        raise InvalidSpec(f"{clash!r} is both a file and a folder in the source; rename one")


def _objects_of(log: VersionLog, version: Version | None) -> set[str]:
    if version is None:
        return set()
    try:
        return set(log.manifest(version)["blake3"].to_pylist())
    except (CorruptObject, ObjectMissing):
        return set()  # then it proves nothing; the listing will


def _upload(work: _Work, rows: list[_Row], present: set[str]) -> set[str]:
    """Send the objects that are not there; the digests of all that now are."""
    missing = {row.digest: row for row in rows if row.digest not in present}
    if not work.repair:
        for digest in _already_there(work, missing, len(present)):
            del missing[digest]
    small = (row for row in missing.values() if row.size <= _IN_MEMORY_BYTES)
    large = (row for row in missing.values() if row.size > _IN_MEMORY_BYTES)

    def send_small(row: _Row) -> None:
        with _opened(work, row.key) as file:
            data = file.read(_IN_MEMORY_BYTES + 1)
        if blake3(data).hexdigest() != row.digest:
            raise SourceChanged(f"{work.place.name}/{row.key}")
        work.storage.write(object_path(row.digest), data)

    for_each(small, send_small, workers=work.workers)
    for row in large:
        with _private_copy(work, row) as copy:
            work.storage.upload(copy, object_path(row.digest))
    return {row.digest for row in rows}


def _already_there(work: _Work, missing: Mapping[str, _Row], known: int) -> list[str]:
    """Objects that an older version or a killed commit has left there, with all their bytes."""
    if len(missing) > _ASK_PER_PAGE * (1 + known // _PAGE):
        listed = {path.rpartition("/")[2]: size for path, size in work.storage.walk("objects")}
        return [d for d, row in missing.items() if listed.get(d) == row.size]
    there: list[str] = []

    def look(row: _Row) -> None:
        try:
            if work.storage.size_bytes(object_path(row.digest)) == row.size:
                there.append(row.digest)
        except ObjectMissing:
            return

    for_each(missing.values(), look, workers=work.workers)
    return there


@contextmanager
def _private_copy(work: _Work, row: _Row) -> Iterator[Path]:
    """The file's bytes where nobody can change them between the hash and the upload."""
    path = work.temporary / row.digest
    try:
        with path.open("wb") as copy, _opened(work, row.key) as file:
            digest, _ = hash_stream(file, copy_to=copy)
        if digest != row.digest:
            raise SourceChanged(f"{work.place.name}/{row.key}")
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write_manifest(storage: Storage, rows: list[_Row]) -> str:
    data = encode_manifest(build_manifest(rows))
    digest: str = blake3(data).hexdigest()
    storage.write(f"manifests/{digest}.parquet", data)
    return digest
