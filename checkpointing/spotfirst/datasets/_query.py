"""Reading what versions there are, what is in them, and what changed between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from spotfirst.datasets._log import Version, VersionLog
from spotfirst.errors import CorruptObject, InvalidSpec
from spotfirst.spec import DatasetRef
from spotfirst.storage import Storage

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Diff", "diff", "manifest", "resolve", "rows_of", "versions"]


class Diff(NamedTuple):
    """Keys that the second version has and the first lacks, the reverse, and those that differ.

    ``bytes`` is the size of what was added or changed: what a sync has to move at most.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    bytes: int


def versions(storage: Storage, name: str) -> list[Version]:
    """All versions of a dataset, oldest first; empty when there is none."""
    return VersionLog(storage, name).all()


def resolve(storage: Storage, dataset: str, *, since: int | None = None) -> DatasetRef:
    """``corpus``, ``corpus@latest`` or ``corpus@3`` as an immutable reference.

    With ``since`` the reference means only the files that were added or changed after that
    version. Raises :class:`~spotfirst.errors.UnknownDataset`, which lists the versions, or
    :class:`~spotfirst.errors.InvalidSpec` for a text of another form.
    """
    name, _, wanted = dataset.partition("@")
    log = VersionLog(storage, name)
    if wanted in {"", "latest"}:
        newest = log.newest()
        if newest is None:
            raise log.unknown("latest")
        found = newest
    elif wanted.isascii() and wanted.isdigit() and 0 < int(wanted) < 10**8:
        found = log.get(int(wanted))
    else:
        msg = f"dataset {dataset!r}: write NAME, NAME@latest or NAME@NUMBER, such as {name}@1"
        raise InvalidSpec(msg)
    if since is not None:
        if since > found.version:
            msg = (
                f"dataset {dataset!r}: version {since} is newer than {found.version}; there is no "
                "'since'"
            )
            raise InvalidSpec(msg)
        older = log.get(since).manifest
    else:
        older = ""
    return DatasetRef(
        name=name, version=found.version, since=since,
        manifest=found.manifest, since_manifest=older,
    )  # fmt: skip


def manifest(storage: Storage, ref: DatasetRef | str) -> pa.Table:
    """The files of a version: columns key, size (bytes), blake3, location; sorted by key.

    With ``ref.since`` only the rows that were added or changed after that version. Raises
    :class:`~spotfirst.errors.UnknownDataset` or :class:`~spotfirst.errors.CorruptObject`.
    """
    ref = resolve(storage, ref) if isinstance(ref, str) else ref
    return rows_of(VersionLog(storage, ref.name), ref)


def rows_of(log: VersionLog, ref: DatasetRef, **options: Any) -> pa.Table:
    table = log.manifest(_version(log, ref.version, ref.manifest), **options)
    if ref.since is None:
        return table
    from spotfirst.datasets._compare import added_or_changed

    older = _version(log, ref.since, ref.since_manifest)
    return added_or_changed(log.manifest(older, **options), table)


def _version(log: VersionLog, number: int, manifest: str) -> Version:
    """The version, when it is still the one that was asked for."""
    found = log.get(number)
    if manifest not in {"", found.manifest}:
        msg = (
            f"{log.storage.url}: version {number} of {log.name} is another than the one that was "
            "asked for: somebody replaced it. Restore the object from an older version, or commit "
            "the data as a new one"
        )
        raise CorruptObject(msg)
    return found


def diff(storage: Storage, a: DatasetRef | str, b: DatasetRef | str) -> Diff:
    """What has to change to make version ``a`` into version ``b``; keys are sorted.

    Raises what :func:`manifest` raises.
    """
    from spotfirst.datasets._compare import compare

    return Diff(*compare(manifest(storage, a), manifest(storage, b)))
