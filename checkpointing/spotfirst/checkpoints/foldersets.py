"""Which folders are checkpoints of several files, and whether one is complete.

A folder of which nothing has been kept is a unit with all that is below it (:func:`unit_of` says
which, of several); so is, for its own files, one that is known. A unit is taken when its files are whole, and

- it has every name that its newest sibling has (``checkpoint-20`` those of ``checkpoint-10``), or
- the script has begun with a later one (``checkpoint-30``), or
- no file has been added for as long as it took to write those that are there (2 to 60 s).

An index of shards must have all of them. Logs are no part of this: they never end.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import msgspec

__all__ = ["FolderSets", "Unit", "is_log_name", "is_temporary", "missing_shards", "unit_of"]

_LEAST_QUIET_S = 2.0
_MOST_QUIET_S = 60.0
_GIVE_UP_S = 600.0
"""A unit that nobody has changed for so long is taken as it is."""
_NUMBER = re.compile(r"[0-9]{1,18}")
_CHECKPOINT = re.compile(r"(check|ckpt|step|epoch|iter|save|model).*\d|^\d+$", re.IGNORECASE)
_LOGS = (".csv", ".tsv", ".log", ".txt", ".jsonl", ".ndjson", ".out", ".err", ".db", ".sqlite")
_TEMPORARY = ".orbax-checkpoint-tmp"
_INDEX = ".index.json"


def is_log_name(path: str) -> bool:
    """Whether a file's name is that of a log, which is no part of a checkpoint of several files."""
    name = path.rpartition("/")[2]
    return name.endswith((*_LOGS, "-wal", "-shm", "-journal")) or "tfevents" in name


def is_temporary(path: str) -> bool:
    """Whether the folder is one that Orbax renames once it is complete."""
    return _TEMPORARY in path


def unit_of(
    path: str, known: Collection[str], *, with_files: Collection[str], root_is_one: bool
) -> str | None:
    """The folder with which a file is taken or not: a new one above it, or else its own.

    ``known`` are folders that have been kept, and ``with_files`` those with files of their own that
    are no logs. Of several new ones it is the highest with a name like ``checkpoint-500``; else the
    highest with files, and with a number in its name if there is one. The files of the folder
    itself are on their own, unless ``root_is_one``: then they are the unit ``""``.
    """
    parents = [str(parent) for parent in PurePosixPath(path).parents][:-1]
    new = [parent for parent in reversed(parents) if parent not in known]
    if new:
        saved = [parent for parent in new if _CHECKPOINT.search(parent.rpartition("/")[2])]
        filled = [parent for parent in new if parent in with_files]
        numbered = [parent for parent in filled if _NUMBER.search(parent.rpartition("/")[2])]
        return (saved or numbered or filled or new)[0]
    if parents:
        return parents[0]
    return "" if root_is_one else None


def missing_shards(index: bytes) -> set[str]:
    """The names of the files that an index of shards needs; empty when it is another JSON file."""
    try:
        shards = msgspec.json.decode(index)["weight_map"].values()
        return {name for name in shards if isinstance(name, str)}
    except (msgspec.DecodeError, TypeError, KeyError, AttributeError, RecursionError):
        return set()


@dataclass
class Unit:
    """What has changed in one folder since it was kept, as of one look.

    ``whole`` and ``writing`` are files that are no logs, by their paths; ``lost`` those of
    ``writing`` of which no earlier version is kept. ``present`` are all of its files.
    """

    path: str
    is_new: bool
    whole: dict[str, float] = field(default_factory=dict)
    """With how long ago, in seconds, each was changed last."""
    writing: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    present: set[str] = field(default_factory=set)
    shards: set[str] = field(default_factory=set)


class FolderSets:
    """Remembers since when the files of each unit are whole, from one look to the next."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._since: dict[str, dict[str, float]] = {}
        self._held: dict[str, float] = {}

    def held(
        self,
        units: Iterable[Unit],
        kept: Mapping[str, object],
        *,
        final: bool,
        folders: Collection[str] = (),
    ) -> set[str]:
        """The paths of the units that are still being written.

        ``kept`` has the paths of all files that were captured before, ``folders`` are all that are
        there. ``final``: nothing more will
        be written.
        """
        now = self._monotonic()
        units = list(units)
        paths = {unit.path for unit in units}
        self._since = {path: since for path, since in self._since.items() if path in paths}
        self._held = {path: since for path, since in self._held.items() if path in paths}
        found = set()
        for unit in units:
            since = self._since.setdefault(unit.path, {})
            for path, age_s in unit.whole.items():
                since.setdefault(path, now - age_s)
            if self._is_incomplete(unit, kept, since, now, final=final, folders=folders):
                self._held.setdefault(unit.path, now)
                found.add(unit.path)
            else:
                self._held.pop(unit.path, None)
        return found

    def _is_incomplete(
        self,
        unit: Unit,
        kept: Mapping[str, object],
        since: Mapping[str, float],
        now: float,
        *,
        final: bool,
        folders: Collection[str],
    ) -> bool:
        if is_temporary(unit.path):
            return True
        if not (unit.whole or unit.writing):
            return False
        first, last = min(since.values(), default=now), max(since.values(), default=now)
        quiet_s = now - last
        has_half = any(path not in since for path in unit.writing) or bool(unit.lost)
        has_half = has_half or not unit.shards <= unit.present
        waited_s = now - self._held.get(unit.path, now)
        if has_half:
            return final or (quiet_s < _GIVE_UP_S if unit.is_new else waited_s < _MOST_QUIET_S)
        if final:
            return False
        if not unit.is_new and unit.whole.keys() | unit.writing <= kept.keys():
            own = {p for p in unit.present if not is_log_name(p) and _is_in(unit.path, p)}
            if len(own) == 1:
                return False  # a file that is saved again and again
        if unit.is_new and _has_successor(unit.path, folders):
            return False
        needed = _names_of_sibling(unit.path, kept) if unit.is_new else Counter()
        if needed and not needed - Counter(_general(path, unit.path) for path in unit.present):
            return False
        if not needed and waited_s >= _MOST_QUIET_S:
            return False  # of a folder that gets a file every second there is no end
        least_s = _MOST_QUIET_S if needed else _LEAST_QUIET_S
        return quiet_s < min(_MOST_QUIET_S, max(least_s, last - first))


def _is_in(folder: str, path: str) -> bool:
    return path.rpartition("/")[0] == folder


def _general(path: str, unit: str) -> str:
    """A path within its unit with no numbers in it."""
    return _NUMBER.sub("#", path[len(unit) :])


def _has_successor(unit: str, folders: Iterable[str]) -> bool:
    """Whether there is a folder of the same name but for larger numbers."""
    pattern = _NUMBER.sub("#", unit)
    if "#" not in pattern.rpartition("/")[2]:
        return False
    own = _numbers(unit)
    return any(_NUMBER.sub("#", each) == pattern and _numbers(each) > own for each in folders)


def _numbers(path: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(path)]


def _names_of_sibling(unit: str, kept: Iterable[str]) -> Counter[str]:
    """The general names of the files of the newest kept folder whose name differs in numbers."""
    pattern = _NUMBER.sub("#", unit)
    if "#" not in pattern.rpartition("/")[2]:
        return Counter()
    depth = unit.count("/") + 1
    siblings: dict[str, Counter[str]] = {}
    for path in kept:
        folder = "/".join(path.split("/", depth)[:depth])
        if folder not in {path, unit} and _NUMBER.sub("#", folder) == pattern:
            siblings.setdefault(folder, Counter())[_general(path, folder)] += 1
    newest = max(
        siblings, key=_numbers, default=None
    )  # fmt: skip
    return Counter() if newest is None else siblings[newest]
