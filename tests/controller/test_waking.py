"""A ring ends a wait, of a thread or of a coroutine, and none is lost between two waits."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from spotfirst_airflow.waking import Bell, ring
from tests.waiting import PATIENCE_S, wait_until

LONG_S = PATIENCE_S


def took(began: float) -> float:
    return time.monotonic() - began


def test_a_wait_that_nobody_cuts_short_lasts() -> None:
    began = time.monotonic()
    Bell("run").wait(0.05)
    asyncio.run(Bell("run").sleep(0.05))
    assert took(began) >= 0.1


def test_a_ring_ends_the_wait_of_a_thread() -> None:
    bell, began = Bell("run"), time.monotonic()
    waiter = threading.Thread(target=bell.wait, args=[LONG_S])
    waiter.start()
    assert ring("run")
    waiter.join()
    assert took(began) < LONG_S / 2


def test_a_ring_from_another_thread_ends_the_sleep_of_a_coroutine() -> None:
    bell, began = Bell("run"), time.monotonic()

    def ring_it() -> None:
        wait_until(lambda: bell._wake is not None)
        ring("run")

    ringer = threading.Thread(target=ring_it)
    ringer.start()
    asyncio.run(bell.sleep(LONG_S))
    ringer.join()
    assert took(began) < LONG_S / 2


def test_a_ring_between_two_waits_is_kept_for_the_next_one_only() -> None:
    bell, began = Bell("run"), time.monotonic()
    ring("run")
    ring("run")
    bell.wait(LONG_S)
    ring("run")
    asyncio.run(bell.sleep(LONG_S))
    assert took(began) < LONG_S / 2
    began = time.monotonic()
    bell.wait(0.05)
    asyncio.run(bell.sleep(0.05))
    assert took(began) >= 0.1


def test_all_who_wait_for_a_run_are_woken_and_nobody_else() -> None:
    one, other, stranger = Bell("run"), Bell("run"), Bell("another")
    ring("run")
    assert (one._rung.is_set(), other._rung.is_set(), stranger._rung.is_set()) == (
        True, True, False,
    )  # fmt: skip


def test_a_bell_that_nobody_holds_is_gone() -> None:
    assert ring("held by nobody") is False
    bell = Bell("held by nobody")
    assert ring("held by nobody")
    del bell
    assert ring("held by nobody") is False


def test_a_coroutine_that_is_cancelled_while_it_rings_is_cancelled() -> None:
    bell = Bell("run")

    async def cancel_while_ringing() -> None:
        sleeper = asyncio.create_task(bell.sleep(LONG_S))
        await asyncio.sleep(0)
        bell.ring()
        await asyncio.sleep(0)  # the ring has reached the loop, the sleeper has not gone on
        sleeper.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeper

    asyncio.run(cancel_while_ringing())


def test_ringing_for_a_loop_that_has_closed_harms_nobody() -> None:
    bell = Bell("run")
    loop = asyncio.new_event_loop()
    bell._wake = lambda: loop.call_soon_threadsafe(print)
    loop.close()
    assert ring("run")
