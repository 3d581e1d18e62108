"""How every small file of a run is written: JSON of typed records, with a format version.

A reader accepts records of its own version or older; a newer one is refused by name
(:class:`NewerFormat`) rather than half understood. Fields that a record does not know are
ignored, so a release may add fields without a new version.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from spotfirst.errors import CorruptObject, NewerFormat

__all__ = ["FORMAT_VERSION", "Clock", "Record", "decode", "encode", "utc_now"]

FORMAT_VERSION = 1

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
    """An immutable piece of a run's files. ``replace`` with :func:`msgspec.structs.replace`."""


class _Versioned(msgspec.Struct):
    v: int = FORMAT_VERSION


def encode(record: Record) -> bytes:
    """The record as JSON, with the format version as its first field."""
    body = msgspec.json.encode(record, order="deterministic")
    comma = b"," if len(body) > len(b"{}") else b""
    return b'{"v":%d' % FORMAT_VERSION + comma + body[1:]


def decode(data: bytes, kind: type[_R], *, path: str) -> _R:
    """A record of ``kind``; ``path`` names the object in errors.

    Raises :class:`NewerFormat` or :class:`CorruptObject`.
    """
    check_version(data, path=path)
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        msg = f"{path} is not a valid {getattr(kind, '__name__', kind)}: {error}"
        raise CorruptObject(msg) from error


def check_version(data: bytes, *, path: str) -> None:
    """Refuse a record of a newer format, or something that is no record at all."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).v
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        msg = f"{path} is not JSON that Spotfirst wrote: {error}"
        raise CorruptObject(msg) from error
    if version > FORMAT_VERSION:
        msg = (
            f"{path} has format {version}; this Spotfirst reads up to {FORMAT_VERSION}. "
            "A newer release wrote it: upgrade spotfirst here"
        )
        raise NewerFormat(msg)
