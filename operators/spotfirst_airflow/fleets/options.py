"""Options that a person wrote: read with errors that name the wrong one and those there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from spotfirst.errors import InvalidSpec
from spotfirst.wire import Record, prepared

__all__ = ["parse", "require"]

_R = TypeVar("_R", bound=Record)


def parse(kind: type[_R], values: Any, *, where: str) -> _R:
    """A record from a mapping that a person wrote.

    Raises :class:`InvalidSpec` that names the wrong key and the ones there are.
    """
    allowed = [field.encode_name for field in msgspec.structs.fields(kind)]
    if not isinstance(values, Mapping):
        msg = f"fleet option {where} is {values!r}; give a mapping with {', '.join(allowed)}"
        raise InvalidSpec(msg)
    unknown = sorted(str(key) for key in values if key not in allowed)
    if unknown:
        msg = (
            f"unknown {where} option {', '.join(map(repr, unknown))}; "
            f"allowed are {', '.join(allowed)}"
        )
        raise InvalidSpec(msg)
    try:
        return msgspec.convert(dict(values), prepared(kind))
    except msgspec.ValidationError as error:
        msg = f"{where} options are wrong: {error}"
        raise InvalidSpec(msg) from error


def require(holds: bool, option: str, value: object, must_be: str) -> None:
    """Raise :class:`InvalidSpec` unless what an option must be holds."""
    if not holds:
        msg = f"fleet option {option} is {value!r}; it must be {must_be}"
        raise InvalidSpec(msg)
