"""What a spec file and options say; :mod:`spotfirst_airflow.arguments` says what it means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from spotfirst.errors import InvalidSpec
from spotfirst_airflow.arguments import ARGUMENTS

__all__ = ["assign", "parse_fleet_options", "parse_pairs", "read_spec_file"]


def read_spec_file(path: Path) -> dict[str, Any]:
    """The keys of a YAML, TOML or JSON file. Raises :class:`InvalidSpec`.

    A relative ``code`` is meant from the file's own folder.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        msg = f"spec file {path} cannot be read: {error.strerror}"
        raise InvalidSpec(msg) from error
    try:
        found = _decoder(path)(data)
    except (msgspec.DecodeError, ValueError) as error:
        msg = f"spec file {path} is not valid: {error}"
        raise InvalidSpec(msg) from error
    except ImportError as error:
        msg = f"reading {path} needs a package that is missing ({error}); write the spec as JSON"
        raise InvalidSpec(msg) from error
    if not isinstance(found, dict):
        msg = f"spec file {path} holds no keys; it wants 'command', and may have {_allowed()}"
        raise InvalidSpec(msg)
    code = found.get("code")
    if isinstance(code, str):
        found["code"] = str(path.absolute().parent / Path(code).expanduser())
    return found


def parse_pairs(pairs: list[str], option: str) -> dict[str, str]:
    """``NAME=VALUE`` options as a mapping. Raises :class:`InvalidSpec`."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            msg = f"{option} {pair!r} must read NAME=VALUE"
            raise InvalidSpec(msg)
        found[name] = value
    return found


_LISTS = ("subnets", "security_groups", "pip_install", "python_versions")


def parse_fleet_options(pairs: list[str]) -> dict[str, Any]:
    """Fleet options as a spec has them; a list may be given as JSON, or with commas.

    Raises :class:`InvalidSpec`.
    """
    named = parse_pairs(pairs, "--fleet-option")
    lists = {n: named.pop(n) for n in _LISTS if n in named and not named[n].startswith("[")}
    options: dict[str, Any] = {}
    assign(options, named)
    for name, text in lists.items():
        # As text: JSON would read the version 3.10 as 3.1.
        options[name] = [part.strip() for part in text.split(",") if part.strip()]
    return options


def assign(values: dict[str, Any], pairs: Mapping[str, str]) -> None:
    """Set each dotted key; a value is JSON when it reads as such, else text.

    ``env.LR=0.1`` sets one variable, ``policy=on_demand`` a key, and
    ``fleet_options.market={"kind": "calm"}`` a whole mapping.
    """
    for dotted, text in pairs.items():
        *path, last = dotted.split(".")
        inner = values
        for part in path:
            below = inner.get(part)
            inner[part] = dict(below) if isinstance(below, Mapping) else {}
            inner = inner[part]
        inner[last] = text if path and path[0] in {"env", "tags"} else _parsed(text)


def _parsed(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _decoder(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix in {".yaml", ".yml"}:
        return _decode_yaml
    if suffix == ".toml":
        return msgspec.toml.decode
    if suffix == ".json":
        return msgspec.json.decode
    msg = f"spec file {path} must end in .yaml, .yml, .toml or .json"
    raise InvalidSpec(msg)


def _decode_yaml(data: bytes) -> Any:
    # PyYAML comes with Airflow; alone, Spotfirst does not install it.
    return msgspec.yaml.decode(data)


def _allowed() -> str:
    return ", ".join(sorted(ARGUMENTS))
