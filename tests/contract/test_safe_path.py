"""No name leads out of its prefix."""

from __future__ import annotations

import os.path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst.errors import InvalidSpec
from spotfirst.storage import safe_path

_pieces = st.sampled_from(["..", ".", "/", "//", "\\", "\0", "a", "~", "b.c", " ", "…", "\udc80"])
_paths = st.one_of(st.text(), st.lists(_pieces).map("".join), st.lists(_pieces).map("/".join))


@given(_paths)
def test_what_is_accepted_stays_below(path: str) -> None:
    try:
        safe = safe_path(path)
    except InvalidSpec:
        return
    joined = os.path.normpath(f"/prefix/{safe}")
    assert joined.startswith("/prefix/")
    assert joined == f"/prefix/{safe}"  # one object, one name
    assert safe_path(safe) == safe
    safe.encode()


@pytest.mark.parametrize(
    "path", ["", ".", "./", "/etc/passwd", "..", "a/../../b", "a\\b", "a\0b", "\udc80"]
)
def test_names_that_leave_are_refused(path: str) -> None:
    with pytest.raises(InvalidSpec):
        safe_path(path)


@pytest.mark.parametrize(
    ("path", "safe"), [("a/b", "a/b"), ("a//b/./c/", "a/b/c"), ("a..b", "a..b")]
)
def test_plain_names_are_kept(path: str, safe: str) -> None:
    assert safe_path(path) == safe
