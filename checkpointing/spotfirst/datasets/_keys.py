"""Which names a dataset and its files may have: those that stay below their folder."""

from __future__ import annotations

import re

from spotfirst.errors import InvalidSpec

__all__ = ["UNSAFE_KEY_RE2", "check_key", "check_name", "parents"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")

# Empty, absolute, with an empty, '.' or '..' part, a backslash or a NUL. One rule in two
# dialects, because a manifest of a million keys is checked by Arrow, in one call.
_UNSAFE = r"^{end}|^/|//|/{end}|(?:^|/)\.\.?(?:/|{end})|\\|\x00"
UNSAFE_KEY_RE2 = _UNSAFE.format(end="$")
_UNSAFE_KEY = re.compile(_UNSAFE.format(end=r"\Z"))


def check_name(name: str) -> str:
    """``name`` when it can name a dataset; else :class:`InvalidSpec`."""
    if not _NAME.fullmatch(name):
        msg = (
            f"dataset name {name!r} must be 1 to 200 letters, digits, '.', '_' or '-', "
            "and start with a letter or digit"
        )
        raise InvalidSpec(msg)
    return name


def check_key(key: str) -> str:
    """``key`` when it is a relative path in its only form; else :class:`InvalidSpec`."""
    try:
        key.encode()
        safe = not _UNSAFE_KEY.search(key)
    except UnicodeEncodeError:
        safe = False
    if not safe:
        msg = (
            f"a file named {key!r} cannot be in a dataset: names are relative paths in UTF-8, "
            "without '.', '..', empty parts or backslashes. Rename it"
        )
        raise InvalidSpec(msg)
    return key


def parents(folder: str) -> list[str]:
    """``a/b/c`` gives ``a/b/c``, ``a/b`` and ``a``."""
    parts = folder.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
