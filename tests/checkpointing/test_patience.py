from __future__ import annotations

import math
import random

import pytest

from spotfirst.errors import StorageDenied, StorageUnavailable
from spotfirst.patience import DENIED_S, once_taken, patiently


def test_it_waits_longer_each_time_warns_once_and_leaves_the_users_random_numbers_alone() -> None:
    failures = 12
    waits: list[float] = []
    warnings: list[str] = []

    def action() -> str:
        if len(waits) < failures:
            msg = "no answer"
            raise StorageUnavailable(msg)
        return "done"

    before = random.getstate()
    assert patiently(action, what="save", sleep=waits.append, warn=warnings.append) == "done"
    assert random.getstate() == before
    assert warnings == ["could not save, trying again: no answer"]
    assert 0.1 <= waits[0] <= 0.2
    assert 7.5 <= waits[-1] <= 15


def test_a_refusal_is_waited_out_as_well() -> None:
    waits: list[float] = []
    warnings: list[str] = []

    def action() -> str:
        if sum(waits) < 300:
            msg = "read-only file system"
            raise StorageDenied(msg)
        return "done"

    assert patiently(action, what="save", sleep=waits.append, warn=warnings.append) == "done"
    assert warnings == ["could not save, trying again: read-only file system"]


@pytest.mark.parametrize(
    ("lasting", "taken", "gives_up_after_s"),
    [(True, True, 0), (True, False, 0), (False, False, DENIED_S), (False, True, math.inf)],
)
def test_a_refusal_is_final_when_it_lasts_or_nothing_was_ever_taken(
    lasting: bool, taken: bool, gives_up_after_s: float
) -> None:
    waits: list[float] = []

    class PatienceHasNoEndError(Exception):
        pass

    def action() -> str:
        if sum(waits) > 100 * DENIED_S:
            raise PatienceHasNoEndError
        msg = "no"
        raise StorageDenied(msg, lasting=lasting)

    expected = PatienceHasNoEndError if math.isinf(gives_up_after_s) else StorageDenied
    with pytest.raises(expected):
        patiently(action, what="save", sleep=waits.append, denied_s=once_taken(taken))
    if not math.isinf(gives_up_after_s):
        assert gives_up_after_s <= sum(waits) <= gives_up_after_s + 15


def test_a_wait_for_a_refusal_ends_when_it_is_to_stop() -> None:
    def action() -> None:
        msg = "no"
        raise StorageDenied(msg)

    with pytest.raises(StorageDenied):
        patiently(action, what="save", sleep=lambda _: None, stop=lambda: True)
