"""The arguments of a training: one table for the operator, the decorator, spec files and options.

Each argument has a parser, which returns the value that a :class:`Request` holds, and an example.
A wrong value raises :class:`InvalidSpec` with the argument's name, the value and the example.
Numbers may be text, because templates and command lines produce text; lists and mappings may be
JSON for the same reason.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal, InvalidOperation
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from spotfirst.checkpoints.retention import Retention
from spotfirst.errors import InvalidSpec
from spotfirst.spec import TAG_NAMES
from spotfirst.storage import check_url
from spotfirst.wire import prepared, utc_now
from spotfirst_airflow import secretlike

if TYPE_CHECKING:
    from spotfirst_airflow.submission import Request

__all__ = [
    "ARGUMENTS",
    "UNKNOWN",
    "check_text",
    "check_time",
    "check_together",
    "check_written",
    "is_template",
    "parse",
    "parse_duration",
    "span",
    "suggestion",
    "to_request",
]

UNKNOWN: Any = object()
"""Stands for a value that is known only once its template has been rendered."""

_TEMPLATE = re.compile(r"{{|{%|{#")
_DURATION = re.compile(r"\s*(?:\d+(?:\.\d+)?\s*[smhd]\s*)+")
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_LONGEST = timedelta(days=3650)
_LAST_YEAR = 2200
_MOST_USD = 10**9
_MOST = 10**6
_LONGEST_BYTES = 128 * 1024 - 1
"""Of one word or variable: Linux's MAX_ARG_STRLEN."""
_MOMENT = "'2030-01-31T18:00:00+00:00'"


class _Wrong(Exception):
    """What is wrong with a value, without the name and the example."""


class Argument(NamedTuple):
    """How a value is parsed, what a right one looks like, and the request's field for it."""

    parse: Callable[[Any], Any]
    example: str
    field: str = ""


def parse(name: str, value: Any) -> Any:
    """The value of one argument as a request holds it; ``None`` stands for "left out".

    Raises :class:`InvalidSpec`, naming the argument, the value and an example.
    """
    if value is None:
        return None
    argument = ARGUMENTS[name]
    try:
        return argument.parse(value)
    except _Wrong as wrong:
        msg = f"{name} {_shown(value)}: {wrong}; give {argument.example}"
        raise InvalidSpec(msg) from None


def span(name: str, text: str) -> timedelta:
    """The duration that an option of another command means, zero included."""
    try:
        return _span(text)
    except _Wrong as wrong:
        msg = f"{name} {_shown(text)}: {wrong}; give a duration, such as 8h or 90m"
        raise InvalidSpec(msg) from None


def parse_duration(name: str, value: Any) -> timedelta:
    """A duration that is no argument of a training, zero included. Raises :class:`InvalidSpec`."""
    if value == timedelta(0):
        return timedelta(0)
    try:
        return _duration(value)
    except _Wrong as wrong:
        msg = f"{name} {_shown(value)}: {wrong}; give a duration, such as '5m'"
        raise InvalidSpec(msg) from None


def to_request(values: Mapping[str, Any]) -> Request:
    """The request that these arguments mean; those that are ``None`` keep their defaults.

    Raises :class:`InvalidSpec` for an unknown name, a wrong value, and for values that contradict
    each other.
    """
    from spotfirst_airflow.submission import Request

    unknown = sorted(set(values) - set(ARGUMENTS))
    if unknown:
        there = ", ".join(sorted(ARGUMENTS))
        msg = (
            f"unknown keys {', '.join(unknown)}{suggestion(unknown, ARGUMENTS)}; there are {there}"
        )
        raise InvalidSpec(msg)
    parsed = {name: parse(name, value) for name, value in values.items()}
    fields: dict[str, Any] = {}
    given: dict[str, str] = {}
    for name, value in parsed.items():
        field = ARGUMENTS[name].field or name
        if value is None or name in _BESIDE:
            continue
        if field in fields:
            msg = f"{given[field]} and {name} are both given; leave one out"
            raise InvalidSpec(msg)
        given[field] = name
        fields[field] = value.total_seconds() if field in _IN_SECONDS and field != name else value
    if fields.get("resume_from") == "scratch":
        del fields["resume_from"]
    if "policy" in fields:
        fields["policy"], fields["policy_options"] = _in_words(
            fields["policy"], fields.get("policy_options", {})
        )
    check_together(parsed)
    return Request(**fields)


def check_written(values: Mapping[str, Any]) -> None:
    """Check arguments as a DAG's author wrote them, leaving out what is a template.

    Raises :class:`InvalidSpec`. Launches, reads and imports nothing of the author's.
    """
    known: dict[str, Any] = {}
    for name, value in values.items():
        literal = _literal(value)
        if literal is UNKNOWN:
            known[name] = UNKNOWN
            continue
        parsed = parse(name, literal)
        is_whole = literal is value or literal == value
        if is_whole or isinstance(parsed, Mapping):  # what stood between two words may be missing
            check_text(name, parsed)
        known[name] = parsed if is_whole else UNKNOWN
    check_together(known)


def check_text(name: str, value: Any) -> None:
    """Refuse what must not stand in a spec, which is plain text to all who read the storage.

    Raises :class:`InvalidSpec` for a variable that is Spotfirst's own, and for a secret.
    """
    if name == "env":
        for variable, text in (value or {}).items():
            if variable.startswith("SPOTFIRST_"):
                msg = f"env {variable!r} is Spotfirst's own; choose another name"
                raise InvalidSpec(msg)
            _refuse_secret(f"env {variable!r}", secretlike.in_variable(variable, text))
    elif name == "command":
        _refuse_secret("command", secretlike.in_command(value or ()))
    elif name in {"tags", "fleet_options", "policy_options"}:
        place, what = secretlike.in_options(value or {})
        _refuse_secret(f"{name} {place!r}", what)


def _refuse_secret(place: str, what: str) -> None:
    if what:
        msg = (
            f"{place} looks like a secret ({what}), and a run's spec is stored in plain text. Give "
            "the instance's role access to it, or read it from a secrets manager in the script"
        )
        raise InvalidSpec(msg)


def check_together(known: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidSpec` for parsed values that contradict each other.

    A value that is :data:`UNKNOWN` contradicts nothing; one that is missing was left out.
    """
    _check_policy(known)
    _check_fleet(known)
    if known.get("budget_usd") is None and known.get("on_budget") not in {None, "stop", UNKNOWN}:
        msg = f"on_budget is {known['on_budget']!r}, and budget_usd is missing; give budget_usd=25"
        raise InvalidSpec(msg)
    if known.get("dataset") is None and known.get("dataset_since") not in {None, UNKNOWN}:
        msg = (
            f"dataset_since is {known['dataset_since']!r}, and dataset is missing; give "
            "dataset='NAME@latest'"
        )
        raise InvalidSpec(msg)
    training, deadline = known.get("training_time"), known.get("deadline")
    is_whole = known.get("resume_from") in {None, "scratch"}
    if isinstance(training, timedelta) and isinstance(deadline, timedelta) and is_whole:
        check_time(training, deadline)
    mode, export = known.get("checkpoint_mode"), known.get("export")
    if isinstance(export, str) and mode is not UNKNOWN:
        check_export(export, mode or "trainer")
    beat, silence = known.get("heartbeat_s"), known.get("silence_s")
    if isinstance(beat, float) and isinstance(silence, float) and silence <= beat:
        msg = f"silence_s is {silence:g}, and heartbeat_s is {beat:g}: every instance would be lost"
        raise InvalidSpec(msg)
    life, period = _duration_of(known, "max_life"), _duration_of(known, "checkpoint_period")
    if life is not None and period is not None and life <= period:
        msg = (
            f"max_life is {life}, and checkpoint_period is {period}: every instance would end "
            "before its first checkpoint. Give a longer max_life, or a shorter checkpoint_period"
        )
        raise InvalidSpec(msg)


def _duration_of(known: Mapping[str, Any], name: str) -> timedelta | None:
    """The duration given by this name or in seconds, else the default; ``None``: not known yet."""
    from spotfirst_airflow.submission import Request

    value = known.get(name)
    seconds = known.get(f"{name}_s") if value is None else None
    if value is None and seconds is None:
        seconds = getattr(Request(), f"{name}_s")
    if isinstance(seconds, float):
        return timedelta(seconds=seconds)
    return value if isinstance(value, timedelta) else None


def check_time(training: timedelta, left: timedelta) -> None:
    """Raise :class:`InvalidSpec` when the work cannot fit into the time to the deadline."""
    if training > left:
        msg = (
            f"training_time is {training}, and the deadline is {left} away: the training cannot be "
            "done in time. Give a later deadline, or a smaller training_time"
        )
        raise InvalidSpec(msg)


def check_export(export: str, checkpoint_mode: str) -> None:
    """Raise :class:`InvalidSpec` when the mode has nothing that can be written there."""
    is_file = export.endswith(".safetensors")
    if checkpoint_mode == "trainer" and not is_file:
        msg = (
            f"export {export!r}: checkpoint_mode is 'trainer', which exports the model's weights "
            "as one file; give a name that ends in .safetensors"
        )
        raise InvalidSpec(msg)
    if checkpoint_mode == "files" and is_file:
        msg = (
            f"export {export!r}: checkpoint_mode is 'files', which exports a folder with the "
            "script's own files; give the name of a folder"
        )
        raise InvalidSpec(msg)


def suggestion(unknown: Iterable[str], known: Collection[str]) -> str:
    """`` (did you mean …?)`` for names that resemble known ones; else empty."""
    near = [name for each in unknown for name in _nearest(str(each), known)]
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _nearest(text: str, known: Collection[str]) -> list[str]:
    """The name that begins with ``text``, if it is one, or else one that is spelt like it."""
    begun = [name for name in known if len(text) > 2 and name.startswith(f"{text}_")]
    return begun if len(begun) == 1 else difflib.get_close_matches(text, known, 1)


def is_template(value: Any) -> bool:
    """Whether Airflow turns this value into another one before the task runs."""
    if isinstance(value, str):
        return bool(_TEMPLATE.search(value))
    if isinstance(value, os.PathLike):
        return False
    if isinstance(value, (type, msgspec.Struct)):
        return False
    # An XComArg or a DAG's param; or a function that Airflow calls with the context.
    return callable(value) or callable(getattr(value, "resolve", None))


def _literal(value: Any) -> Any:
    """``value`` without the templates in it; :data:`UNKNOWN` when nothing else is left."""
    if is_template(value):
        return UNKNOWN
    if isinstance(value, Mapping):
        pairs = {key: _literal(each) for key, each in value.items()}
        kept: Any = {key: each for key, each in pairs.items() if each is not UNKNOWN}
    elif isinstance(value, (list, tuple)):
        kept = type(value)(each for each in map(_literal, value) if each is not UNKNOWN)
    else:
        return value
    return UNKNOWN if value and not kept else kept


# -- what must fit together ---------------------------------------------------------------------


def _in_words(policy: Any, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    from spotfirst_airflow.policies import in_words

    try:
        return in_words(policy, options)
    except InvalidSpec as error:
        msg = f"policy {_shown(policy)}: {error}"
        raise InvalidSpec(msg) from error


def _check_policy(known: Mapping[str, Any]) -> None:
    from spotfirst_airflow.policies import load_policy

    policy, options = known.get("policy"), known.get("policy_options") or {}
    if policy is UNKNOWN or policy is None or options is UNKNOWN:
        return
    if not isinstance(policy, str):
        _in_words(policy, options)
        return
    if ":" in policy:  # of the author's: imported where it is needed
        return
    try:
        load_policy(policy, options)
    except InvalidSpec as error:
        name = "policy" if str(error).startswith("unknown policy") else "policy_options"
        msg = f"{name} {_shown(known.get(name))}: {error}"
        raise InvalidSpec(msg) from error


def _check_fleet(known: Mapping[str, Any]) -> None:
    from spotfirst_airflow.fleets.base import fleet_class, fleet_names

    fleet, options = known.get("fleet"), known.get("fleet_options")
    if fleet is UNKNOWN or fleet is None:
        return
    names = fleet_names()
    if fleet not in names:
        there = ", ".join(names) or "none"
        msg = f"fleet {fleet!r} is unknown{suggestion([fleet], names)}; installed are: {there}"
        raise InvalidSpec(msg)
    if not options or options is UNKNOWN:
        return
    try:
        fleet_class(fleet).settle(options, now=utc_now())
    except InvalidSpec as error:
        msg = f"fleet_options {_shown(options)}: {error}"
        raise InvalidSpec(msg) from error


# -- the kinds of values ------------------------------------------------------------------------


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"


def _text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        msg = f"it is {_kind(value)}, not text"
        raise _Wrong(msg)
    if not value.strip():
        msg = "it is empty"
        raise _Wrong(msg)
    return _plain(value)


def _plain(text: str) -> str:
    """Text that a process can be given. Raises :class:`_Wrong`."""
    if "\0" in text:
        msg = "it has a NUL character"
        raise _Wrong(msg)
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError:
        msg = "it is no valid Unicode"
        raise _Wrong(msg) from None
    if size_bytes > _LONGEST_BYTES:
        msg = f"it has {size_bytes} bytes, more than Linux hands to a program"
        raise _Wrong(msg)
    return text


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _word(value: Any) -> str:
    """A word of a command, or a variable's value: what Python, YAML and JSON write as a scalar."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (Real, Decimal)):
        return str(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        msg = f"{_shown(value)} is {_kind(value)}, not text or a number"
        raise _Wrong(msg)
    return _plain(value)


def _words(value: Any) -> tuple[str, ...]:
    words = tuple(_word(each) for each in _list(value))
    empty = [index for index, word in enumerate(words) if not word]
    if empty or not words:
        msg = f"the word at index {empty[0]} is empty" if words else "it has no words"
        raise _Wrong(msg)
    return words


def _names(value: Any) -> tuple[str, ...]:
    """A list of names; one text is one name, or several with commas."""
    if isinstance(value, str) and not _text(value).lstrip().startswith("["):
        value = [part for part in value.split(",") if part.strip()]
    return tuple(_text(each).strip() for each in _list(value))


def _list(value: Any) -> Sequence[Any]:
    if isinstance(value, str):
        value = _from_json(value, "one string")
    if not isinstance(value, (list, tuple)):
        # Airflow gives XComs of mapped tasks as a sequence of its own.
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
            return list(value)
        msg = f"it is {_kind(value)}, not a list"
        raise _Wrong(msg)
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = _from_json(value, "text")
    if not isinstance(value, Mapping):
        msg = f"it is {_kind(value)}, not a mapping"
        raise _Wrong(msg)
    strange = [key for key in value if not isinstance(key, str) or not key.strip()]
    if strange:
        msg = f"the name {strange[0]!r} is no text"
        raise _Wrong(msg)
    return dict(value)


def _from_json(text: str, what: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        msg = f"it is {what}"
        if text.lstrip().startswith(("[", "{", "(")):
            # What Jinja makes of a list or a mapping.
            msg += ", and no JSON; a template gives JSON as {{ … | tojson }}"
        raise _Wrong(msg) from None


def _env(value: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, each in _mapping(value).items():
        if "=" in name or "\0" in name or not name.isprintable():
            msg = f"no variable can have the name {name!r}"
            raise _Wrong(msg)
        try:
            found[name] = _word(each)
        except _Wrong as wrong:
            empty = "; leave it out, or give '' for an empty variable" if each is None else ""
            msg = f"variable {name}: {wrong}{empty}"
            raise _Wrong(msg) from None
    return found


def _tags(value: Any) -> dict[str, str]:
    tags = _mapping(value)
    unknown = sorted(set(tags) - set(TAG_NAMES))
    if unknown:
        there = ", ".join(TAG_NAMES)
        msg = (
            f"unknown tags {', '.join(unknown)}{suggestion(unknown, TAG_NAMES)}; there are {there}"
        )
        raise _Wrong(msg)
    found: dict[str, str] = {}
    for name, each in tags.items():
        try:
            found[name] = _word(each)
        except _Wrong as wrong:
            msg = f"tag {name}: {wrong}"
            raise _Wrong(msg) from None
        if not found[name].strip():
            msg = f"tag {name} is empty"
            raise _Wrong(msg)
    return found


def _span(text: str) -> timedelta:
    if not _DURATION.fullmatch(text):
        msg = "it is no duration"
        raise _Wrong(msg)
    try:
        parts = [timedelta(**{_UNITS[unit]: float(n)}) for n, unit in _PART.findall(text)]
        return sum(parts, timedelta(0))
    except OverflowError:
        return timedelta.max


def _duration(value: Any) -> timedelta:
    if isinstance(value, timedelta):
        found = value
    elif isinstance(value, str):
        found = _span(value)
    elif isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        msg = "a number has no unit"
        raise _Wrong(msg)
    else:
        msg = f"it is {_kind(value)}, not a duration"
        raise _Wrong(msg)
    if found <= timedelta(0):
        msg = "it must be longer than nothing"
        raise _Wrong(msg)
    if found > _LONGEST:
        msg = "it is longer than ten years"
        raise _Wrong(msg)
    return found


def _deadline(value: Any) -> timedelta | datetime:
    if isinstance(value, str) and not _DURATION.fullmatch(value):
        try:
            value = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
        except ValueError:
            msg = "it is neither a duration nor a moment"
            raise _Wrong(msg) from None
    if isinstance(value, datetime):
        if value.tzinfo is None or value.utcoffset() is None:
            msg = "it has no time zone"
            raise _Wrong(msg)
        if value.year > _LAST_YEAR:
            msg = f"it is after the year {_LAST_YEAR}"
            raise _Wrong(msg)
        return value
    if isinstance(value, date):
        msg = "it has no time of day"
        raise _Wrong(msg)
    return _duration(value)


def _dollars(value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal, str)):
        msg = f"it is {_kind(value)}, not a number of dollars"
        raise _Wrong(msg)
    try:
        amount = Decimal(str(value).strip())
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite():
        msg = "it is not a number of dollars"
        raise _Wrong(msg)
    if not 0 < amount <= _MOST_USD:
        msg = "it buys nothing" if amount <= 0 else "it is more than a billion"
        raise _Wrong(msg)
    return amount


def _seconds(value: Any) -> float:
    """A number of seconds, as arguments that end in ``_s`` have it."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        msg = f"it is {_kind(value)}, not a number of seconds"
        raise _Wrong(msg)
    try:
        found = float(value)
    except (ValueError, OverflowError):
        msg = "it is not a number of seconds"
        raise _Wrong(msg) from None
    if not 0 < found <= _LONGEST.total_seconds():
        msg = "it must be a number above 0" + (", of less than ten years" if found > 0 else "")
        raise _Wrong(msg)
    return found


def _whole(least: int) -> Callable[[Any], int]:
    def parse_whole(value: Any) -> int:
        text = str(value).strip() if isinstance(value, (Real, str)) else ""
        if isinstance(value, float) and math.isfinite(value) and value.is_integer():
            text = str(int(value))
        if isinstance(value, bool) or not re.fullmatch(r"[+-]?\d{1,9}", text):
            msg = "it is not a whole number"
            raise _Wrong(msg)
        if not least <= int(text) <= _MOST:
            msg = f"it must be from {least} to {_MOST}"
            raise _Wrong(msg)
        return int(text)

    return parse_whole


def _one_of(*choices: str) -> Callable[[Any], str]:
    def parse_choice(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            msg = f"it is none of its values{suggestion([str(value)], choices)}"
            raise _Wrong(msg)
        return value

    return parse_choice


def _policy(value: Any) -> Any:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, type) or not callable(getattr(value, "decide", None)):
        msg = "it is neither a policy's name nor a policy"
        raise _Wrong(msg)
    return value


def _version(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value)


def _checkpoint(value: Any) -> str:
    text = _text(value).strip()
    if text != "scratch" and not re.fullmatch(r"[^@\s]+@[^@\s]+", text):
        msg = 'it must read "RUN@STEP" or "RUN@latest"'
        raise _Wrong(msg)
    return text


def _place(value: Any) -> str:
    """A URL or a path that means the same on every machine."""
    text = _text(value).strip()
    if "://" not in text and not text.startswith(("/", "~")):
        msg = "a relative path means another folder on each worker"
        raise _Wrong(msg)
    return text


def _storage(value: Any) -> str:
    url = _place(value)
    try:
        check_url(url)
    except InvalidSpec as error:
        wrong = str(error).removeprefix(f"storage {url!r}")  # the name and the value come first
        raise _Wrong(wrong.removeprefix(": ") if wrong.startswith(":") else f"it{wrong}") from None
    return url


def _export(value: Any) -> str:
    target = _place(value)
    above, _, name = target.rstrip("/").rpartition("/")
    if not name or above.endswith(":/"):
        msg = "it names no file or folder in a bucket or folder"
        raise _Wrong(msg)
    _storage(above or "/")
    return target


def _code(value: Any) -> str:
    text = _text(value)
    if "://" in text:
        msg = "the code is sent from a folder of the worker, not from a URL"
        raise _Wrong(msg)
    return text


def _retention(value: Any) -> Retention:
    names = Retention.__struct_fields__
    if not isinstance(value, Retention):
        value = _mapping(value)
        unknown = sorted(str(key) for key in value if key not in names)
        if unknown:
            there = ", ".join(names)
            msg = (
                f"unknown keys {', '.join(unknown)}{suggestion(unknown, names)}; there are {there}"
            )
            raise _Wrong(msg)
        try:
            value = msgspec.convert(value, prepared(Retention), strict=False)
        except msgspec.ValidationError as error:
            raise _Wrong(str(error)) from error
    found: Retention = value
    try:
        found.check()
    except InvalidSpec as error:
        raise _Wrong(str(error)) from error
    return found


_IN_SECONDS = {"checkpoint_period_s", "max_life_s"}
_BESIDE = {"storage", "export"}
"""Where a run is kept, and where its result goes: no part of the request."""

ARGUMENTS: dict[str, Argument] = {
    "command": Argument(_words, "a list of words, such as ['python', 'train.py']"),
    "code": Argument(_code, "a folder, such as './training'"),
    "storage": Argument(_storage, "a URL or an absolute path, such as 's3://BUCKET/spotfirst'"),
    "fleet": Argument(_text, "a fleet's name, 'ec2' or 'local'"),
    "fleet_options": Argument(_mapping, "a mapping, such as {'region': 'us-east-1'}"),
    "instance_types": Argument(_names, "a list, such as ['g6.xlarge', 'g5.xlarge']"),
    "policy": Argument(_policy, "a name, such as 'spotfirst' or 'fallback', or a policy object"),
    "policy_options": Argument(_mapping, "a mapping, such as {'losses': 10}"),
    "deadline": Argument(_deadline, f"a duration, such as '8h' or '90m', or a moment with its zone, such as {_MOMENT}"),
    "budget_usd": Argument(_dollars, "dollars above 0, such as 25 or '12.50'"),
    "on_budget": Argument(_one_of("stop", "continue_cheaper", "alert"), "'stop', 'continue_cheaper' or 'alert'"),
    "dataset": Argument(_text, "'NAME@VERSION' or 'NAME@latest'"),
    "dataset_since": Argument(_version, "a version of the dataset, such as 3"),
    "resume_from": Argument(_checkpoint, "'RUN@STEP', 'RUN@latest', 'RUN@best' or 'scratch'"),
    "checkpoint_mode": Argument(_one_of("trainer", "files"), "'trainer' or 'files'"),
    "checkpoint_period": Argument(_duration, "a duration, such as '5m'", "checkpoint_period_s"),
    "checkpoint_period_s": Argument(_seconds, "seconds, such as 300"),
    "retention": Argument(_retention, "a mapping, such as {'last': 5}"),
    "script_retries": Argument(_whole(0), "a whole number, such as 2"),
    "launches_per_hour": Argument(_whole(1), "a whole number, such as 30"),
    "heartbeat_s": Argument(_seconds, "seconds, such as 5"),
    "notice_poll_s": Argument(_seconds, "seconds, such as 5"),
    "silence_s": Argument(_seconds, "seconds, such as 600"),
    "training_time": Argument(_duration, "a duration, such as '8h'"),
    "max_life": Argument(_duration, "a duration, such as '7d'", "max_life_s"),
    "max_life_s": Argument(_seconds, "seconds, such as 604800"),
    "env": Argument(_env, "a mapping of texts, such as {'LR': '0.1'}"),
    "tags": Argument(_tags, "a mapping, such as {'model_id': 'gpt-small'}"),
    "export": Argument(_export, "a URL or an absolute path, such as 's3://BUCKET/model.safetensors'"),
}  # fmt: skip
"""What can be said about a training. Those that end in ``_s`` are numbers of seconds."""
