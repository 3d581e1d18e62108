"""What templates rendered to, checked and parsed before anything is launched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec

from spotfirst.checkpoints.retention import Retention
from spotfirst.errors import InvalidSpec
from spotfirst.wire import prepared

__all__ = ["check_rendered", "parse_duration", "parse_moment", "parse_retention", "parse_usd"]

_TEMPLATE = re.compile(r"{{|{%")
_NOTHING = {"", "none", "null", "undefined"}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_MAY_BE_EMPTY = {"env"}
"""An environment variable that is set to nothing is a common way to switch something off."""


def check_rendered(written: Mapping[str, Any], rendered: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidSpec` when a field that was meant to hold a value holds none.

    ``written`` are the fields as the DAG's author wrote them, ``rendered`` as they are now. A
    missing Param or XCom renders to an empty string or to the word ``None``; launched like that,
    a run would train the wrong thing, at full price.
    """
    problems = [
        f"{path} (written as {source!r}) rendered to {value!r}"
        for name in written
        for path, source, value in _pairs(name, written[name], rendered.get(name))
        if _is_lost(path, source, value)
    ]
    if problems:
        msg = (
            f"{'; '.join(problems)}. Give the Param or XCom behind it a value, or leave the "
            "argument out (for resume_from, 'scratch' means: from the beginning)"
        )
        raise InvalidSpec(msg)


def parse_moment(value: timedelta | datetime | str | None) -> timedelta | datetime | None:
    """A deadline: as it is, or from ``"8h"``, ``"90m"``, ``"2d"``, ``"300s"`` or ISO 8601."""
    if value is None or isinstance(value, (timedelta, datetime)):
        return value
    if match := _DURATION.fullmatch(value):
        return timedelta(**{_UNITS[match[2]]: float(match[1])})
    try:
        return datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
    except ValueError:
        msg = (
            f"deadline {value!r} is neither a duration, such as '8h' or '90m', nor a moment, such "
            "as '2030-01-31T18:00:00+00:00'"
        )
        raise InvalidSpec(msg) from None


def parse_duration(value: timedelta | str | None, name: str) -> timedelta | None:
    """A duration: as it is, or from ``"8h"``, ``"90m"``, ``"2d"`` or ``"300s"``."""
    if value is None or isinstance(value, timedelta):
        return value
    if match := _DURATION.fullmatch(value):
        return timedelta(**{_UNITS[match[2]]: float(match[1])})
    msg = f"{name} {value!r} is no duration, such as '8h' or '90m'"
    raise InvalidSpec(msg)


def parse_usd(value: float | Decimal | str | None) -> Decimal | None:
    """Dollars, exactly as they were written."""
    if value is None:
        return None
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite():
        msg = f"budget_usd {value!r} is not a number of dollars, such as 25 or '12.50'"
        raise InvalidSpec(msg)
    return amount


def parse_retention(value: Any) -> Retention | None:
    """Which checkpoints to keep; from a mapping, numbers may be texts that a template gave."""
    if value is None:
        return None
    names = Retention.__struct_fields__
    if not isinstance(value, (Retention, Mapping)):
        msg = f"retention is {value!r}; give a mapping with some of {', '.join(names)}"
        raise InvalidSpec(msg)
    if isinstance(value, Mapping):
        unknown = sorted(str(key) for key in value if key not in names)
        if unknown:
            msg = (
                f"retention has the unknown keys {', '.join(unknown)}; there are {', '.join(names)}"
            )
            raise InvalidSpec(msg)
        try:
            value = msgspec.convert(dict(value), prepared(Retention), strict=False)
        except msgspec.ValidationError as error:
            msg = f"retention is {value!r}: {error}"
            raise InvalidSpec(msg) from error
    found: Retention = value
    found.check()
    return found


def _pairs(path: str, written: Any, rendered: Any) -> Iterator[tuple[str, Any, Any]]:
    """(path, leaf as written, leaf as rendered) of a nested field."""
    if isinstance(written, Mapping) and isinstance(rendered, Mapping):
        for key in written:
            yield from _pairs(f"{path}[{key!r}]", written[key], rendered.get(key))
    elif _is_list(written) and _is_list(rendered) and len(written) == len(rendered):
        for index, (before, after) in enumerate(zip(written, rendered, strict=True)):
            yield from _pairs(f"{path}[{index}]", before, after)
    else:
        yield path, written, rendered


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_lost(path: str, written: Any, rendered: Any) -> bool:
    if written is None:
        return False
    if rendered is None:
        return True
    if not isinstance(rendered, str):
        return False
    if not rendered.strip():
        return path.partition("[")[0] not in _MAY_BE_EMPTY
    is_template = not isinstance(written, str) or bool(_TEMPLATE.search(written))
    return is_template and rendered.strip().lower() in _NOTHING
