from __future__ import annotations

import random

from spotfirst.errors import StorageUnavailable
from spotfirst.patience import patiently


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
