"""Run a program on the local fleet, and take its instances away at random moments.

Storage, controller, fleet, agents and the program are the real ones. One run is interrupted a few
times, until it ends; then comes the next run, until there were enough interruptions.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.compatibility.comparing import difference, result_line
from benchmarks.compatibility.programs import Program
from benchmarks.compatibility.watching import Watch, digests
from spotfirst.channel import Channel
from spotfirst.checkpoints.mirroring import mirror
from spotfirst.heartbeat import Progress
from spotfirst.run import Run
from spotfirst.state import Attempt, Phase, RunState
from spotfirst.storage import open_storage
from spotfirst_airflow.fleets.local import LocalFleet
from spotfirst_airflow.following import Follower
from spotfirst_airflow.submission import Request, attach

__all__ = ["MOMENTS", "Moment", "Outcome", "moments", "plain", "play"]

MOMENTS = ("boot", "training", "saving", "training", "end")
"""While the instance starts; at any time; while a checkpoint is written; near the end."""
_TICK_S = 0.01
_NOTICE_S = 5.0
"""Short, so that a program of a quarter of a minute is not over before."""
_LIMIT_S = 900.0
"""Ends a run that hangs."""


@dataclass(frozen=True)
class Moment:
    """When an attempt is interrupted, and whether it hears of it before.

    ``chance`` (0 to 1) is where in the span of its kind the moment lies.
    """

    kind: str
    notice: bool
    chance: float


@dataclass
class Outcome:
    """What became of one run. ``wrong`` is empty when its result is the one it had to be."""

    done: list[Moment] = field(default_factory=list)
    attempts: int = 0
    refused: str = ""
    wrong: str = ""
    story: str = ""


def moments(count: int, seed: int) -> list[Moment]:
    """So many, of all kinds, half of them with notice, in an order by chance."""
    chance = random.Random(seed)
    kinds = [MOMENTS[n % len(MOMENTS)] for n in range(count)]
    notices = [n % 2 == 0 for n in range(count)]
    chance.shuffle(notices)
    found = [Moment(k, n, chance.random()) for k, n in zip(kinds, notices, strict=True)]
    chance.shuffle(found)
    # The end is near once in a run.
    return sorted(found, key=lambda moment: moment.kind == "end")


def plain(program: Program, folder: Path, *, start: Path | None = None) -> float:
    """Run it without Spotfirst, from the files in ``start`` or from nothing; how long it took.

    Raises ``CalledProcessError``.
    """
    checkpoints, code = folder / "checkpoints", folder / "code"
    shutil.copytree(start, checkpoints, symlinks=True) if start else checkpoints.mkdir(parents=True)
    shutil.copytree(program.code_folder, code, symlinks=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SPOTFIRST_")}
    environment |= program.env | {"SPOTFIRST_CHECKPOINT_DIR": str(checkpoints)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    began = time.monotonic()
    with (folder / "output.log").open("wb") as output:
        subprocess.run(
            program.command, cwd=code, env=environment, check=True, timeout=_LIMIT_S,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return time.monotonic() - began


def play(
    program: Program, plan: list[Moment], folder: Path, *, alone: Path, alone_s: float
) -> Outcome:
    """One run with these interruptions, one per attempt; ``alone`` is the plain run to compare with."""
    drive = _Drive(program, folder, alone_s)
    outcome = Outcome()
    try:
        drive.follow(plan, outcome)
        _judge(drive, outcome, alone)
    finally:
        drive.close()
    if outcome.wrong:
        outcome.story = drive.story()
    return outcome


def _judge(drive: _Drive, outcome: Outcome, alone: Path) -> None:
    state, program = drive.state, drive.program
    outcome.attempts = len(state.attempts)
    if state.phase is not Phase.SUCCEEDED:
        trained = drive.run.chain().refresh().commits or any(drive.folder.glob("restored-2"))
        why = next((a.ended.message for a in reversed(state.attempts) if a.ended), "")
        if trained:
            outcome.wrong = f"the run {state.phase}: {why}"
        else:
            outcome.refused = why
        return
    last = state.attempts[-1].number
    if program.mode == "lines":
        # After the last step the work is done, also when the instance goes before its script has ended.
        outputs = [drive.output(a.number) for a in state.attempts]
        lines = [line for path in outputs if (line := result_line(program, path))]
        (drive.folder / "output.log").write_text("\n".join(lines))
        outcome.wrong = difference(program, drive.folder, alone)
        return
    _, newest = drive.run.chain().refresh().commits[-1]
    kept = drive.folder / "kept"
    mirror(drive.run.packs(), newest, kept)
    outcome.wrong = drive.torn() or difference(program, kept, _reference(drive, alone, last))


def _reference(drive: _Drive, alone: Path, last: int) -> Path:
    if drive.program.equals == "uninterrupted":
        return alone / "checkpoints"
    again = drive.folder / "again"
    plain(drive.program, again, start=drive.folder / f"restored-{last}")
    return again / "checkpoints"


class _Drive:
    def __init__(self, program: Program, folder: Path, alone_s: float) -> None:
        self.program, self.folder, self._alone_s = program, folder, alone_s
        folder.mkdir(parents=True)
        storage = open_storage(str(folder / "storage"))
        self.run: Run = attach(storage, "run", self._request(), owner="benchmark", environment={})
        self._follower = Follower(lambda: (self.run, {}), show_output=False, log=_Quiet())
        self._fleet = LocalFleet(self.run.spec().fleet_options, environment={})
        self._watches: dict[int, Watch] = {}
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._reconcile, daemon=True)
        self._thread.start()

    def _request(self) -> Request:
        program = self.program
        command = program.command
        if program.mode == "files":
            # Keeps what the script finds, beside what Spotfirst knows, and becomes the script.
            found = f"{shlex.quote(str(self.folder))}/restored-$SPOTFIRST_ATTEMPT"
            script = f'cp -a "$SPOTFIRST_CHECKPOINT_DIR" {found}.tmp && mv {found}.tmp {found} && exec "$@"'
            command = ("sh", "-c", script, "sh", *command)
        return Request(
            command=command,
            code=str(program.code_folder),
            env=program.env,
            checkpoint_mode="trainer" if program.mode == "lines" else "files",
            checkpoint_period_s=program.period_s,
            policy="spot_only",
            heartbeat_s=0.5,
            fleet_options={"root": str(self.folder / "fleet"), "notice_s": _NOTICE_S},
        )

    # -- the controller -----------------------------------------------------------------------

    @property
    def state(self) -> RunState:
        return self.run.journal().refresh()

    def _reconcile(self) -> None:
        try:
            while (wait_s := self._follower.look()) is not None:
                time.sleep(min(wait_s, 0.3))
        except BaseException as error:  # noqa: BLE001 - raised again in the waiting thread
            self._error = error
        self._over.set()

    def follow(self, plan: list[Moment], outcome: Outcome) -> None:
        """Interrupt one attempt after the other, then wait for the end."""
        end = time.monotonic() + _LIMIT_S
        steps = self._steps(plan, outcome)
        while not self._over.is_set():
            assert time.monotonic() < end, f"not over after {_LIMIT_S:g} s:\n{self.story()}"
            self._watch()
            next(steps, None)
            time.sleep(_TICK_S)
        if self._error is not None:
            raise self._error

    def _steps(self, plan: list[Moment], outcome: Outcome) -> Iterator[None]:
        """A coroutine: each ``next`` looks once."""
        for number, moment in enumerate(plan, start=1):
            while not self._launched(number):
                yield
            waits = {
                "boot": self._while_booting,
                "training": self._while_training,
                "saving": self._while_saving,
                "end": self._near_the_end,
            }[moment.kind]
            yield from waits(number, moment.chance)
            attempt = self._attempt(number)
            if self._over.is_set() or attempt is None or attempt.ended is not None:
                return
            if self._fleet.interrupt(attempt.token, notice=moment.notice):
                outcome.done.append(moment)

    # -- moments ------------------------------------------------------------------------------

    def _while_booting(self, _: int, chance: float) -> Iterator[None]:
        yield from self._pass(chance * 3.0)

    def _while_training(self, number: int, chance: float) -> Iterator[None]:
        yield from self._some_way(number, chance * 0.6)

    def _while_saving(self, number: int, chance: float) -> Iterator[None]:
        yield from self._some_way(number, chance * 0.3)
        if self.program.mode == "files":
            watch = self._watches.get(number)
            if watch is not None:
                watch.changed.clear()
                yield from self._until(watch.changed.is_set)
        else:
            known = self._packs()
            yield from self._until(lambda: self._packs() - known)
        yield from self._pass(chance * 0.05)

    def _near_the_end(self, number: int, chance: float) -> Iterator[None]:
        yield from self._until(lambda: self._is_training(number))
        output = self.output(number)
        folder = output.parent / "checkpoints"
        if self.program.nearly_done:
            pattern = re.compile(self.program.nearly_done)
            yield from self._until(lambda: any(map(pattern.match, _lines(output))))
        elif self.program.mode == "lines":
            yield from self._until(lambda: self._left_steps(number) <= 1 + 4 * chance)
        else:
            yield from self._until(lambda: any(any(folder.glob(g)) for g in self.program.result))
        yield from self._pass(chance * 0.1)

    def _some_way(self, number: int, part: float) -> Iterator[None]:
        """Until an attempt has done this part of what is left for it."""
        yield from self._until(lambda: self._is_training(number))
        progress = self._progress(number)
        if progress is None or progress.total_steps is None or progress.step is None:
            yield from self._pass(part * self._alone_s * 0.5)
        else:
            until = progress.step + part * (progress.total_steps - progress.step)
            yield from self._until(lambda: self._step(number) >= until)

    def _step(self, number: int) -> float:
        progress = self._progress(number)
        return progress.step or 0 if progress is not None else 0

    def _left_steps(self, number: int) -> float:
        progress = self._progress(number)
        if progress is None or progress.step is None or progress.total_steps is None:
            return float("inf") if not result_line(self.program, self.output(number)) else 0.0
        return progress.total_steps - progress.step

    def _progress(self, number: int) -> Progress | None:
        """What the script has said, before it is in a heartbeat."""
        found = list(self._instance(number).glob("work/*/channel"))
        return Channel(found[0]).progress() if found else None

    def _pass(self, seconds: float) -> Iterator[None]:
        until = time.monotonic() + seconds
        yield from self._until(lambda: time.monotonic() >= until)

    def _until(self, condition: Callable[[], object]) -> Iterator[None]:
        while not condition():
            yield

    # -- looking ------------------------------------------------------------------------------

    def _attempt(self, number: int) -> Attempt | None:
        state = self._follower.state
        found = [a for a in state.attempts if a.number == number] if state else []
        return found[0] if found else None

    def _launched(self, number: int) -> bool:
        return self._attempt(number) is not None

    def _is_training(self, number: int) -> bool:
        attempt = self._attempt(number)
        if attempt is not None and attempt.ended is not None:
            return True
        if self.program.mode == "files":
            return (self.folder / f"restored-{number}").exists()
        progress = self._progress(number)
        return progress is not None and progress.timings.first_step is not None

    def _packs(self) -> set[Path]:
        return set((self.folder / "storage").glob("runs/*/packs/**/*"))

    def _instance(self, number: int) -> Path:
        attempt = self._attempt(number)
        token = attempt.token if attempt is not None else "none"
        return self.folder / "fleet" / "instances" / token

    def output(self, number: int) -> Path:
        """What an attempt's command printed."""
        found = sorted(self._instance(number).glob("work/*/output.log"))
        return found[0] if found else self._instance(number) / "output.log"

    def _watch(self) -> None:
        if self.program.mode != "files" or self._follower.state is None:
            return
        for attempt in self._follower.state.attempts:
            if attempt.number in self._watches:
                continue
            found = list(self._instance(attempt.number).glob("work/*/checkpoints"))
            if found:
                self._watches[attempt.number] = Watch(found[0])

    def torn(self) -> str:
        """Which file an attempt found that no attempt had written; empty when there is none.

        A file that is put back is written and closed as well: so versions of earlier attempts only.
        """
        written: dict[str, set[str]] = {}
        for number in sorted(self._watches):
            for name, found in digests(self.folder / f"restored-{number}").items():
                is_open = any(fnmatch(name, glob) for glob in self.program.held_open)
                if not is_open and found not in written.get(name, set()):
                    return f"attempt {number} found a {name} that no attempt had written"
            for name, versions in self._watches[number].versions.items():
                written.setdefault(name, set()).update(versions)
        return ""

    def story(self) -> str:
        """How it went, for somebody who looks for the reason."""
        lines = []
        for attempt in self.state.attempts:
            ended = attempt.ended
            lines.append(
                f"attempt {attempt.number}: {ended.cause if ended else 'open'} {ended.message if ended else ''}"
            )
            for path in (
                self._instance(attempt.number) / "instance.log",
                self.output(attempt.number),
            ):
                if path.exists():
                    lines += [
                        f"    {line}"
                        for line in path.read_text(errors="replace").splitlines()[-12:]
                    ]
        return "\n".join(lines)

    def close(self) -> None:
        for watch in self._watches.values():
            watch.close()
        self._fleet.terminate([instance.token for instance in self._fleet.owned()])


def _lines(output: Path) -> list[str]:
    return output.read_text(errors="replace").splitlines() if output.exists() else []


class _Quiet:
    def info(self, *_: object) -> None:
        """Nothing to say."""

    warning = error = info
