"""How every small file of a run is written: JSON of typed records, with a format version.

A reader accepts records of its own version or older; a newer one is refused by name
(:class:`NewerFormat`) rather than half understood. Fields that a record does not know are
ignored, so a release may add fields without a new version.

Two things that JSON lacks: a number that is none (a loss of NaN) is written as the string
``"NaN"``, ``"Infinity"`` or ``"-Infinity"`` and read back as a number; and a time always carries
its offset from UTC, because one without it means another moment on another machine.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import threading
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from spotfirst.errors import CorruptObject, NewerFormat

__all__ = [
    "FORMAT_VERSION",
    "LIMIT_BYTES",
    "Claimed",
    "Clock",
    "Record",
    "decode",
    "encode",
    "plausible",
    "prepared",
    "utc_now",
]

FORMAT_VERSION = 1

LIMIT_BYTES = 4 << 20
"""Of one record. A reader refuses a larger object before it has read all of it."""

Clock = Callable[[], datetime]
"""Tells the time in UTC. Injected, so that tests and simulations can step it."""

_R = TypeVar("_R")

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Callable[[type], type]:
        """Only type checkers need it: it tells them that subclasses are frozen as well."""
        return lambda decorated: decorated


def utc_now() -> datetime:
    """The :data:`Clock` of production."""
    return datetime.now(timezone.utc)


class _RecordMeta(msgspec.StructMeta):
    """msgspec hands ``frozen`` down to subclasses, but not ``kw_only``."""

    def __new__(
        mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **config: Any
    ) -> Any:
        return super().__new__(mcs, name, bases, namespace, **{"kw_only": True, **config})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Record(msgspec.Struct, metaclass=_RecordMeta, frozen=True, omit_defaults=True):
    """An immutable piece of a run's files. ``replace`` with :func:`msgspec.structs.replace`.

    Raises :class:`ValueError` for a time without an offset from UTC.
    """

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, datetime) and value.tzinfo is None:
                msg = (
                    f"{type(self).__name__}.{name} is {value.isoformat()} without a time zone; "
                    "give one, such as datetime.now(timezone.utc)"
                )
                raise ValueError(msg)


class Claimed(Record):
    """A record that another process wrote: :func:`decode` refuses numbers that nothing can have.

    Numbers are finite, not negative, and bounded (an exit code may be negative, and a metric may
    be any number); times are of this and the next centuries. So no sum, product or difference of
    them overflows, and no price or budget is turned around.
    """


_MOST = 10.0**15
_MOST_S = 10.0**10
_MOST_USD = 10**9
_MOST_ATTEMPTS = 10**6
_MOST_RATE = 10.0**6
_FIRST_YEAR, _LAST_YEAR = 2000, 2300


def _implausible(name: str, value: object) -> str:
    """What is wrong with a field's value; empty for a plausible one. Looks into records."""
    if value is None or isinstance(value, (str, bool)) or name == "metrics":
        return ""
    if isinstance(value, msgspec.Struct):
        return next(
            (
                f".{field}{wrong}"
                for field in value.__struct_fields__
                if (wrong := _implausible(field, getattr(value, field)))
            ),
            "",
        )
    if isinstance(value, datetime):
        good = _FIRST_YEAR <= value.year <= _LAST_YEAR
        return "" if good else f" is {value.isoformat()}, out of the years to {_LAST_YEAR}"
    if isinstance(value, (int, float, Decimal)):
        return _implausible_number(name, value)
    items: Iterable[object] = ()
    if isinstance(value, dict) and name not in _FREE:
        items = value.values()
    elif isinstance(value, (list, tuple)):
        items = value
    return next((wrong for item in items if (wrong := _implausible(name, item))), "")


_FREE = {"fleet_options", "policy_options", "original"}
"""Fields of free content: who uses them checks them."""


def _implausible_number(name: str, value: float | Decimal) -> str:
    if name == "exit_code":
        return "" if -(2**32) < value < 2**32 else f" is {_shown(value)}"
    most: float = _MOST_USD if isinstance(value, Decimal) else _MOST
    if name.endswith("_s"):
        most = _MOST_S
    elif name in {"attempt", "number", "to"}:
        most = _MOST_ATTEMPTS
    elif name == "clock_rate":
        most = _MOST_RATE
    # An int is finite, and may be too large to be made a float for being asked.
    finite = value.is_finite() if isinstance(value, Decimal) else abs(value) < math.inf
    if not finite:
        return f" is {value}, which is no number"
    if value < 0 or (name == "clock_rate" and value == 0):
        return f" is {_shown(value)}; it cannot be below 0"
    return "" if value <= most else f" is {_shown(value)}, more than {most:.6g}"


def _shown(value: float | Decimal) -> str:
    try:
        return f"{value:.6g}"
    except (OverflowError, ValueError):
        return "a number of thousands of digits"


def plausible(record: _R) -> _R:
    """The record with each field that :func:`decode` would refuse set back to its default.

    For what is shown to others and does not decide: a clock that was set must not silence an
    agent. Raises :class:`ValueError` for a field without a default.
    """
    assert isinstance(record, msgspec.Struct)
    changes: dict[str, Any] = {}
    for field in msgspec.structs.fields(type(record)):
        value = getattr(record, field.name)
        if not _implausible(field.name, value):
            continue
        if isinstance(value, msgspec.Struct):
            with contextlib.suppress(ValueError):
                changes[field.name] = plausible(value)
                continue
        if field.default is not msgspec.NODEFAULT:
            changes[field.name] = field.default
        elif field.default_factory is not msgspec.NODEFAULT:
            changes[field.name] = field.default_factory()
        else:
            msg = f"{type(record).__name__}.{field.name}{_implausible(field.name, value)}"
            raise ValueError(msg)
    return msgspec.structs.replace(record, **changes) if changes else record


class _Versioned(msgspec.Struct):
    v: int = FORMAT_VERSION


_prepared: set[Any] = set()
_preparing = threading.RLock()
# A child that was forked meanwhile would have half of it, and a lock that nobody releases.
os.register_at_fork(
    before=_preparing.acquire,
    after_in_parent=_preparing.release,
    after_in_child=_preparing.release,
)


def prepared(kind: type[_R]) -> type[_R]:
    """``kind``, of which msgspec knows all fields by now, and those of what is in them.

    It looks them up when a type is first decoded or converted to. If another thread then uses the
    same type, that one gets what was found so far, and crashes or waits for ever (msgspec 0.22). So
    whatever may run in threads decodes and converts to a prepared type.
    """
    if kind not in _prepared:
        with _preparing:
            msgspec.json.Decoder(kind)
            _prepared.add(kind)
    return kind


def encode(record: Record) -> bytes:
    """The record as JSON, with the format version as its first field.

    Raises :class:`TypeError` for a value that is no JSON, such as an object in free options.
    """
    try:
        body = msgspec.json.encode(record, enc_hook=_plain_number, order="deterministic")
    except UnicodeEncodeError:  # a file name or an output that was no UTF-8
        body = b"null"
    if b"null" in body:  # that is what msgspec makes of NaN; None is mostly left out
        plain = _sayable(msgspec.to_builtins(record, enc_hook=_plain_number))
        body = msgspec.json.encode(plain, order="deterministic")
    comma = b"," if len(body) > len(b"{}") else b""
    return b'{"v":%d' % FORMAT_VERSION + comma + body[1:]


def decode(data: bytes, kind: type[_R], *, path: str) -> _R:
    """A record of ``kind``; ``path`` names the object in errors.

    Raises :class:`NewerFormat` or :class:`CorruptObject`.
    """
    check_version(data, path=path)
    kind = prepared(kind)
    try:
        record = _decoded(data, kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        named = getattr(kind, "__name__", None) or str(kind)
        msg = (
            f"{path} is not a valid {named}: {error}. Something else than Spotfirst wrote or "
            "changed it: look at it, and restore it or remove the run"
        )
        raise CorruptObject(msg) from error
    wrong = _implausible("", record) if isinstance(record, Claimed) else ""
    if wrong:
        msg = (
            f"{path} is not plausible: {wrong.lstrip('.')}. Something else than Spotfirst wrote or "
            "changed it: look at it, and restore it or remove the run"
        )
        raise CorruptObject(msg)
    return record


def _decoded(data: bytes, kind: type[_R]) -> _R:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        if not any(word in data for word in _NO_NUMBERS):
            raise
        return msgspec.json.decode(data, type=kind, strict=False)


def check_version(data: bytes, *, path: str) -> None:
    """Refuse a record of a newer format, or something that is no record at all."""
    try:
        version = msgspec.json.decode(data, type=prepared(_Versioned)).v
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        msg = (
            f"{path} is not JSON that Spotfirst wrote: {error}. Look at it, and restore it or "
            "remove the run"
        )
        raise CorruptObject(msg) from error
    if version > FORMAT_VERSION:
        msg = (
            f"{path} has format {version}; this Spotfirst reads up to {FORMAT_VERSION}. "
            "A newer release wrote it: upgrade spotfirst here"
        )
        raise NewerFormat(msg)


_NO_NUMBERS = (b'"NaN"', b'"Infinity"', b'"-Infinity"')


def _plain_number(value: object) -> float:
    """NumPy's numbers, which metrics are full of, as Python's."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    msg = f"{value!r} of type {type(value).__name__} cannot be written as JSON"
    raise TypeError(msg)


def _sayable(value: Any) -> Any:
    """The same with every number and text replaced that JSON in UTF-8 cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_sayable(key): _sayable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_sayable(item) for item in value]
    return value
