# ruff: noqa: T201
"""A trainer in miniature: claims, steps, commits, and drains, without a model.

Environment: STEPS, STEP_S, and ON_DRAIN, which is what it does when it is asked to stop:
``release`` (what a Checkpointer does), ``ignore``, ``fail``, or ``segfault`` (after releasing).
From step MUTE_FROM on it tells nothing, as on a full disk.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import msgspec

from spotfirst.checkpoints.claiming import wait_for_claim
from spotfirst.context import TrainerContext
from spotfirst.errors import ClaimLost
from spotfirst.heartbeat import Progress, Timings
from spotfirst.wire import utc_now

print("pid", os.getpid(), flush=True)
context = TrainerContext.find()
assert context is not None
assert context.attempt is not None
assert context.channel is not None
run, attempt, channel = context.run, context.attempt, context.channel
mute_from = int(os.environ.get("MUTE_FROM", sys.maxsize))
total, on_drain = int(os.environ.get("STEPS", "1000")), os.environ.get("ON_DRAIN", "release")
chain = run.chain()
progress = Progress(phase="standby", total_steps=total)


def tell(**changes: object) -> None:
    global progress  # noqa: PLW0603
    progress = msgspec.structs.replace(progress, **changes)
    if (progress.step or 0) < mute_from:
        channel.tell(progress)


def stamp(name: str) -> Timings:
    return msgspec.structs.replace(progress.timings, **{name: utc_now()})


def commit(step: int) -> None:
    start = time.monotonic()
    try:
        seq = chain.commit(
            attempt, step=step, manifest="00000001/000001.json", digest="0" * 64, content="state"
        )
    except ClaimLost:
        tell(phase="draining", released=True)
        sys.exit(75)
    tell(checkpoint_seq=seq, checkpoint_step=step, checkpoint_s=time.monotonic() - start)


tell(timings=stamp("standby"))
if not wait_for_claim(run, chain, attempt, leave=lambda: channel.drain() is not None):
    tell(phase="draining", released=True, timings=stamp("drained"))
    sys.exit(0)
newest = chain.newest()
first = newest[1].step if newest else 0
tell(phase="training", start_step=first, step=first, timings=stamp("claimed"))
for done in range(first + 1, total + 1):
    time.sleep(float(os.environ.get("STEP_S", "0.02")))
    tell(step=done, metrics={"loss": 1 / done}, timings=stamp("last_step"))
    print("step", done, flush=True)
    if done % 10 == 0 or done == total:
        commit(done)
    if done == total or channel.drain() is None or on_drain == "ignore":
        continue
    if on_drain == "fail":
        print("a bug in the last checkpoint", flush=True)
        sys.exit(3)
    tell(phase="draining")
    commit(done)
    chain.release(attempt)
    tell(released=True, timings=stamp("drained"))
    if on_drain == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    sys.exit(0)
print("trained", flush=True)
