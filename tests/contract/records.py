"""Hypothesis strategies for every record and event."""

from __future__ import annotations

import enum
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from hypothesis import strategies as st

from spotfirst import channel, heartbeat, market, spec
from spotfirst.checkpoints import chain, retention
from spotfirst.events import KNOWN, Event
from spotfirst.wire import Record

times = st.datetimes(
    min_value=datetime(2000, 1, 1),  # noqa: DTZ001 - the strategy adds the zone
    max_value=datetime(2100, 1, 1),  # noqa: DTZ001
    timezones=st.sampled_from([timezone.utc, timezone(timedelta(hours=5, minutes=30))]),
)
texts = st.text(st.characters(codec="utf-8"), max_size=8)
numbers = st.floats(allow_nan=False, width=32)
amounts = st.decimals(0, 10_000, places=6, allow_nan=False)
integers = st.integers(0, 2**40)
json_values = st.recursive(
    st.none() | st.booleans() | integers | texts | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
_PLAIN = {
    datetime: times, str: texts, float: numbers, Decimal: amounts, int: integers, Any: json_values,
    bool: st.booleans(), type(None): st.none(),
}  # fmt: skip


_SIZES = {float: st.floats(0.125, 10**6, width=32), int: st.integers(0, 10**6)}
"""Numbers that a reader takes from others. Only metrics may be any number."""
_ANY = {"metrics": _PLAIN[float], "exit_code": st.integers(-255, 255)}


def of(hint: Any, name: str = "") -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    if hint in {float, int}:
        return _ANY.get(name, _SIZES[hint])
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is not ...:
        return st.tuples(*(of(argument, name) for argument in arguments))
    if origin is tuple:
        return st.lists(of(arguments[0], name), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(of(arguments[0]), of(arguments[1], name), max_size=3)
    if origin in {Union, UnionType}:
        return st.one_of([of(argument, name) for argument in arguments])
    if issubclass(hint, enum.Enum):
        return st.sampled_from(list(hint))
    return built(hint)


def built(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Any instance, with optional fields left out or given."""
    hints = get_type_hints(kind)
    required, optional = {}, {}
    for field in msgspec.structs.fields(kind):
        (required if field.required else optional)[field.name] = of(hints[field.name], field.name)
    return st.fixed_dictionaries(required, optional=optional).map(lambda fields: kind(**fields))


EVENTS: list[type[Event]] = list(KNOWN.values())
RECORDS: list[type[Record]] = [
    market.Pool, market.Notice, spec.CodeRef, spec.DatasetRef, spec.ResumeFrom, spec.RunSpec,
    heartbeat.Timings, heartbeat.Progress, heartbeat.Heartbeat, heartbeat.Handover,
    heartbeat.ExitReport, chain.Claim, chain.Commit, chain.Release, chain.Prune,
    retention.Retention, channel.Drain, *EVENTS,
]  # fmt: skip

any_event = st.one_of([built(kind) for kind in EVENTS])
