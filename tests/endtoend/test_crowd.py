"""Many runs at once, looked after by one process."""

from __future__ import annotations

import os
import queue
import resource
import threading
import time
from pathlib import Path

import psutil
import pytest

from spotfirst.state import Phase
from tests.endtoend.driving import Drive, Place, kill_all

RUNS = 50
THREADS = 32
LASTS_S = 5.0


@pytest.mark.slow
def test_fifty_runs_are_seen_through_by_one_process_with_a_few_threads(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "storage"), tmp_path / "place")
    place.folder.mkdir()
    request = place.request("sleep", str(LASTS_S), code="plain.py")
    busy_before = psutil.cpu_times()
    mine_before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.monotonic()
    drives = [Drive(place, request, f"run-{number:02d}") for number in range(RUNS)]
    submitted_s = time.monotonic() - began
    try:
        peak = see_through_all(drives)
        took_s = time.monotonic() - began
        for drive in drives:
            assert drive.state.phase is Phase.SUCCEEDED, drive.story()
            assert drive.causes() == ["completed"]
            assert len(drive.trace()) == RUNS
            assert drive.until_gone() == []
    finally:
        for drive in drives:
            kill_all(drive.processes)
    used = resource.getrusage(resource.RUSAGE_SELF)
    own_s = used.ru_utime + used.ru_stime - mine_before.ru_utime - mine_before.ru_stime
    busy = psutil.cpu_times()
    machine_s = busy.user + busy.system - busy_before.user - busy_before.system
    print(
        f"\n{RUNS} runs of {LASTS_S:g} s: {took_s:.1f} s in all (submitting {submitted_s:.1f} s), "
        f"at most {peak} at once; this process {own_s:.1f} s of CPU "
        f"({1000 * own_s / RUNS:.0f} ms a run), the machine {machine_s:.1f} s "
        f"({1000 * machine_s / RUNS:.0f} ms a run) on {os.cpu_count()} cores"
    )


def see_through_all(drives: list[Drive]) -> int:
    """What the triggerer does: looks in a bounded pool of threads. The most that ran at once."""
    due: queue.PriorityQueue[tuple[float, int]] = queue.PriorityQueue()
    over = threading.Semaphore(0)
    failures: list[BaseException] = []
    for number in range(len(drives)):
        due.put((0.0, number))

    def work() -> None:
        while True:
            at, number = due.get()
            if number < 0:
                return
            time.sleep(max(0.0, min(at - time.monotonic(), 0.05)))
            if at > time.monotonic():
                due.put((at, number))
                continue
            try:
                wait_s = drives[number].look()
            except BaseException as error:  # noqa: BLE001 - for the test to raise
                failures.append(error)
                wait_s = None
            if wait_s is None:
                over.release()
            else:
                due.put((time.monotonic() + wait_s, number))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    peak, left = 0, len(drives)
    while left and not failures:
        left -= over.acquire(timeout=1.0)
        peak = max(peak, len(drives[0].fleet.owned()))
    for _ in threads:
        due.put((-1.0, -1))
    assert failures == []
    return peak
