"""Recognise secrets before they reach a file that others may read.

A run's spec and an instance's user data are plain text. A secret is recognised by its *value* (a
key of a known form, a URL with a password) or by *whole words* of its name: ``DB_PASSWORD`` is one,
``TOKENIZERS_PARALLELISM`` and ``KEYBOARD`` are not. Reasons never repeat the value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

__all__ = ["in_command", "in_options", "in_text", "in_variable"]

_VALUES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (what, re.compile(pattern))
    for what, pattern in (
        ("an AWS access key", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
        ("an AWS secret key", r"(?i)secret_?access_?key[\"']?\s*[:=]"),
        ("a private key", r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY|PuTTY-User-Key-File"),
        (
            "a presigned URL",
            r"X-Amz-(?:Signature|Security-Token)=|(?i:[?&;](?:X-Goog-Signature|Signature|sig)=[^&\s])",
        ),
        ("a GitHub token", r"\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_[A-Za-z0-9_]{16,}"),
        ("a GitLab token", r"\bgl(?:pat|dt|ptt|rt)-[A-Za-z0-9_-]{16,}"),
        ("a Hugging Face token", r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),
        ("an API key", r"\bsk-(?:[A-Za-z0-9]{1,40}-){0,5}[A-Za-z0-9_]{16,}"),
        ("an API key", r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{8,}"),
        ("an API key", r"\b(?:nvapi-|ya29\.|AIza)[A-Za-z0-9_-]{20,}|\bdapi[0-9a-f]{32}\b"),
        ("an API key", r"\b(?:npm_[A-Za-z0-9]{36}|pypi-AgE[A-Za-z0-9_-]{8,}|r8_[A-Za-z0-9]{30,})"),
        ("an API key", r"\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"),
        ("a Slack token", r"\bxox[a-z]-[A-Za-z0-9-]{8,}|\bhooks\.slack\.com/services/\w"),
        ("a JSON web token", r"\beyJ[A-Za-z0-9_-]{5,}\.eyJ[A-Za-z0-9_-]{5,}"),
        ("a bearer token", r"(?i)\bbearer\s+(?=[^\s\"']*\d)[\w.~+/=-]{12,}"),
        ("credentials of a request", r"(?i)\bauthorization\s*[:=]\s*[\"']?(?:basic|token)\s+\w"),
        ("credentials of a request", r"\ABasic\s+[A-Za-z0-9+/]{6,}={0,2}\Z"),
        ("a storage account's key", r"(?i)\b(?:AccountKey|SharedAccessKey)\s*=\s*\w"),
    )
)
_URL = re.compile(
    # Bounded, and begun where a word begins: a megabyte of letters takes no longer than to read it.
    r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s/?#@\"':]{0,200}:([^\s/?#@\"']{1,500})@"
)

_WORDS = {
    "secret", "secrets", "password", "passwords", "passwd", "passphrase", "pwd",
    "credential", "credentials", "creds", "authorization", "apikey", "apikeys",
}  # fmt: skip
_ENDS = ("password", "passwd", "passphrase", "apikey", "secret")
_PAIRS = {
    (kind, key)
    for kind in ("api", "access", "private", "secret", "account", "auth", "encryption", "signing")
    for key in ("key", "keys")
}
_ABOUT = {
    # NAME_PASSWORD_FILE and the like: where it is, or how it is handled, not what it is.
    "arn", "backend", "column", "count", "dir", "enabled", "env", "expiry", "field", "file", "folder", "header",
    "id", "len", "length", "limit", "manager", "max", "min", "name", "path", "policy", "prefix",
    "provider", "region", "required", "rotation", "size", "stdin", "store", "timeout", "ttl", "type",
    "uri", "url", "var", "version",
}  # fmt: skip
_WHETHER = {
    "allow", "disable", "enable", "has", "is", "need", "no", "require", "requires", "skip", "use",
    "with",
}  # fmt: skip
_PASS_OF = {
    "admin", "database", "db", "ftp", "http", "imap", "ldap", "login", "mail", "mongo", "mysql",
    "pg", "postgres", "proxy", "redis", "root", "smtp", "sql", "ssh", "user",
}  # fmt: skip
_TOKEN_OF_A_VOCABULARY = {
    "assistant", "audio", "begin", "blank", "bos", "class", "cls", "concept", "decoder", "end",
    "eos", "image", "initializer", "instance", "mask", "max", "min", "newline", "next", "num",
    "pad", "padding", "per", "placeholder", "prompt", "sep", "separator", "special", "start",
    "stop", "text", "trigger", "unk", "unknown", "video",
}  # fmt: skip
_NOTHING = {
    "", "true", "false", "yes", "no", "on", "off", "none", "null", "auto", "disabled",
    "enabled", "required", "xxx", "changeme",
}  # fmt: skip
_PLACE = re.compile(r"(?:/|~|\.{1,2}/|file:|s3://|arn:|ssm:|vault:)")
_REFERENCE = re.compile(r"[$%*]|\{|<|\[|.*\(", re.DOTALL)
"""``$VARIABLE``, ``{{ template }}``, ``<pad>``, ``***`` or a call: the value comes from elsewhere."""
_RANDOM = re.compile(r"[0-9a-fA-F]{16,}|[A-Za-z0-9+/]{20,}={0,2}")
_SPLIT_NAME = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_SPLIT_COMMAND = re.compile(r"[\s;|&?]+")
_ASSIGNMENT = re.compile(r"[\"']*-{0,2}([A-Za-z_][\w.\-]*)=(.*)", re.DOTALL)
_OPTION = re.compile(r"--?([A-Za-z][\w.\-]*)")


def in_text(text: str) -> str:
    """What secret the text holds, such as ``"an AWS access key"``; empty for none."""
    for what, pattern in _VALUES:
        if pattern.search(text):
            return what
    if any(not _is_reference(found[1]) for found in _URL.finditer(text)):
        return "a URL with a password"
    return ""


def in_variable(name: str, value: str) -> str:
    """Why a named value looks like a secret, by its value or its name; empty when it does not."""
    return in_text(value) or _by_name(name, value)


def in_command(command: Iterable[str]) -> str:
    """Why a command line holds a secret; empty when it does not.

    Beside values of known forms, that is ``--api-key=VALUE``, ``--api-key VALUE`` and
    ``API_KEY=VALUE``, also within a word that is a script for a shell.
    """
    words = list(command)
    for word in words:
        if found := in_text(word):
            return found
    for name, value in _named(words):
        if found := _by_name(name, value):
            return f"{found} ({name})"
    return ""


def in_options(options: object, path: str = "") -> tuple[str, str]:
    """(place, what) of the first secret by its value in nested options; ("", "") for none."""
    if isinstance(options, str):
        found = in_text(options)
        return (path, found) if found else ("", "")
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(options, Mapping):
        items = options.items()
    elif isinstance(options, (list, tuple)):
        items = enumerate(options)
    for key, value in items:
        place, found = in_options(value, f"{path}[{key!r}]" if path else str(key))
        if found:
            return place, found
    return "", ""


def _named(words: list[str]) -> Iterator[tuple[str, str]]:
    pieces = [piece for word in words for piece in _SPLIT_COMMAND.split(word) if piece]
    for number, piece in enumerate(pieces):
        assigned = _ASSIGNMENT.fullmatch(piece)
        if assigned is not None:
            yield assigned[1], assigned[2].strip("\"'")
            continue
        option = _OPTION.fullmatch(piece)
        following = pieces[number + 1] if number + 1 < len(pieces) else ""
        if option is not None and not following.startswith("-"):
            yield option[1], following.strip("\"'")


def _by_name(name: str, value: str) -> str:
    value = value.strip()
    if value.lower() in _NOTHING or _is_reference(value):
        return ""
    words = [word.lower() for word in _SPLIT_NAME.split(name) if word]
    is_random = _looks_random(value)
    if _PLACE.match(value) and not is_random:
        return ""
    if _names_a_secret(words, value):
        return "a secret by its name"
    if words and words[-1] in {"key", "keys"} and is_random:
        return "a key"
    return ""


def _names_a_secret(words: list[str], value: str) -> bool:
    if ("access", "key") in pairwise(words):
        return True  # AWS_ACCESS_KEY_ID is half of a pair
    if not words or words[-1] in _ABOUT or (words[0] in _WHETHER and value.isdigit()):
        return False
    if any(word in _WORDS or word.endswith(_ENDS) for word in words):
        return True
    if _PAIRS.intersection(pairwise(words)):
        return True
    before = words[-2] if len(words) > 1 else ""
    if words[-1] == "token":
        return before not in _TOKEN_OF_A_VOCABULARY and not (value.isdigit() and len(value) < 10)
    return words[-1] == "pass" and (before in _PASS_OF or not before)


def _is_reference(value: str) -> bool:
    return _REFERENCE.match(value) is not None


def _looks_random(value: str) -> bool:
    has_digit = any(c.isdigit() for c in value)
    has_letter = any(c.isalpha() for c in value)
    return _RANDOM.fullmatch(value) is not None and has_digit and has_letter
