"""Saves of one process take turns."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.torch

COLLECTIONS = """
import gc
import threading

from spotfirst.distributed.session import Turns


class Garbage:
    def __init__(self):
        self.cycle, self.local = self, threading.local()


turns = Turns()
for allocations in range(60):  # until the collection
    end = threading.Event()
    threads = [threading.Thread(target=end.wait) for _ in range(10)]
    for thread in threads:
        thread.start()
    gc.collect()
    gc.disable()
    for _ in range(10):
        Garbage()
    turns.arrive(1)
    gc.set_threshold(gc.get_count()[0] + allocations)
    gc.enable()
    turns.take()
    turns.give()
    assert gc.isenabled()
    end.set()
    for thread in threads:
        thread.join()
"""


def test_a_garbage_collection_while_a_save_waits_for_its_turn_stops_nothing() -> None:
    """Before Python 3.12, one that frees a thread-local value may wait for a lock of its own thread."""
    subprocess.run([sys.executable, "-c", COLLECTIONS], check=True, timeout=PATIENCE_S)
