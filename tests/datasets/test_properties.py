"""For all pairs of folders: what was committed comes back, and diffs tell the difference."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from spotfirst import datasets
from spotfirst.storage import open_storage
from tests.datasets.helpers import content, fill

_NAME = st.sampled_from(["a", "b", "..c", "ü", "d.txt"])
_KEY = st.lists(_NAME, min_size=1, max_size=3).map("/".join)
_DATA = st.sampled_from([b"", b"1", b"2", b"longer"])


def _possible(tree: dict[str, bytes]) -> bool:
    """No name is both a file and a folder."""
    return not any(other.startswith(f"{key}/") for key in tree for other in tree)


_TREE = st.dictionaries(_KEY, _DATA, min_size=1, max_size=6).filter(_possible)


@given(_TREE, _TREE)
@settings(max_examples=40, deadline=None)
def test_two_versions_and_their_difference_come_back(
    one: dict[str, bytes], two: dict[str, bytes]
) -> None:
    with tempfile.TemporaryDirectory() as made:
        tmp = Path(made)
        storage = open_storage(f"memory://{uuid.uuid4().hex}")
        first = datasets.commit(storage, "d", fill(tmp / "one", one), cache=tmp / "stat")
        second = datasets.commit(storage, "d", fill(tmp / "two", two), cache=tmp / "stat")
        a, b = f"d@{first.version}", f"d@{second.version}"

        assert (first == second) == (one == two)
        for text, tree in ((a, one), (b, two), (a, one)):
            datasets.sync(storage, datasets.resolve(storage, text), tmp / "t", tmp / "c")
            assert content(tmp / "t") == tree

        added, removed, changed, size = datasets.diff(storage, a, b)
        assert added == tuple(sorted(two.keys() - one.keys()))
        assert removed == tuple(sorted(one.keys() - two.keys()))
        assert changed == tuple(sorted(k for k in one.keys() & two.keys() if one[k] != two[k]))
        assert size == sum(len(two[key]) for key in (*added, *changed))

        since = datasets.resolve(storage, b, since=first.version)
        datasets.sync(storage, since, tmp / "since", tmp / "c")
        assert content(tmp / "since") == {key: two[key] for key in (*added, *changed)}
