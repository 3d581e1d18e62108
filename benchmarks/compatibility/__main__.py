"""Training programs as people write them, interrupted at random moments: is the result the same?

`python -m benchmarks.compatibility [NAME…] [--program DIR] [--quick]` runs each program alone, and
then on the local fleet, where its instances are taken away at moments by chance: half of them with
notice and half without, while an instance starts, trains, writes a checkpoint, or is nearly done.
A run is interrupted a few times; there are as many runs as it takes. The last line is one JSON
object; `--seed` repeats the moments of another time as well as a machine can.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from benchmarks._figures import console
from benchmarks.compatibility.driving import Outcome, moments, plain, play
from benchmarks.compatibility.programs import Program, load, ours

_MOMENTS = 20
_PER_RUN = 7
_QUICK = ("shell", "torch_loop")
_MOST_RUNS = 3
"""Of a program that ends before all its moments have come: times the runs that it would take."""


@dataclass
class Verdict:
    """What was found about one program."""

    program: Program
    alone_s: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    skipped: str = ""

    @property
    def noticed(self) -> int:
        """Interruptions with notice."""
        return sum(moment.notice for outcome in self.outcomes for moment in outcome.done)

    @property
    def interruptions(self) -> int:
        """All of them."""
        return sum(len(outcome.done) for outcome in self.outcomes)

    @property
    def word(self) -> str:
        """The result in one word or two."""
        if self.skipped:
            return "not run"
        if any(outcome.wrong for outcome in self.outcomes):
            return "differs"
        return "refused" if any(outcome.refused for outcome in self.outcomes) else "equal"

    @property
    def why(self) -> str:
        """The first reason for anything but *equal*."""
        reasons = [outcome.wrong or outcome.refused for outcome in self.outcomes]
        return self.skipped or next(filter(None, reasons), "")

    def figures(self) -> dict[str, Any]:
        """For the last line."""
        return {
            "mode": self.program.mode, "result": self.word, "why": self.why,
            "equals": self.program.equals, "runs": len(self.outcomes),
            "runs_equal": sum(not (o.wrong or o.refused) for o in self.outcomes),
            "interruptions": self.interruptions, "with_notice": self.noticed,
            "alone_s": round(self.alone_s, 1),
        }  # fmt: skip


def examine(
    program: Program, folder: Path, *, count: int, seed: int, per_run: int, most_runs: int
) -> Verdict:
    """Run it alone, then interrupted so many times in all, in at most so many runs."""
    if program.missing:
        return Verdict(program, skipped=f"needs {', '.join(program.missing)}")
    verdict = Verdict(program)
    alone = folder / "alone"
    try:
        verdict.alone_s = plain(program, alone)
    except subprocess.SubprocessError as error:
        output = (alone / "output.log").read_text(errors="replace")[-2000:]
        verdict.skipped = f"does not run by itself: {error}\n{output}"
        return verdict
    chance = random.Random(seed)
    left = moments(count, seed)
    runs = 0
    while left and runs < most_runs:
        runs += 1
        # One of those near the end, if there are any left, and any others before it.
        chance.shuffle(left)
        ends = [moment for moment in left if moment.kind == "end"][:1]
        plan = [m for m in left if m.kind != "end"][: per_run - len(ends)] + ends
        place = folder / f"run-{runs}"
        outcome = play(program, plan, place, alone=alone, alone_s=verdict.alone_s)
        verdict.outcomes.append(outcome)
        for moment in outcome.done:
            left.remove(moment)
        print(
            f"{program.name}, run {runs}: {outcome.wrong or outcome.refused or 'equal'}; "
            f"{len(outcome.done)} interruptions, {sum(m.notice for m in outcome.done)} with notice",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        if outcome.wrong or outcome.refused:
            print(f"    {program.name}, interrupted at {outcome.done}\n{outcome.story}", flush=True)
        else:
            shutil.rmtree(place, ignore_errors=True)
        if outcome.refused:
            break
    return verdict


def faster(program: Program) -> Program:
    """With shorter pauses between its steps, where it has any."""
    pace_s = float(program.env.get("PACE_S", "0")) / 3
    env = program.env | ({"PACE_S": f"{pace_s:.3f}"} if pace_s else {})
    return msgspec.structs.replace(program, env=env)


def show(verdicts: Sequence[Verdict]) -> None:
    """One row per program."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (
        "program",
        "mode",
        "alone",
        "interruptions",
        "with notice",
        "runs",
        "compared with",
        "result",
    ):
        table.add_column(
            name,
            justify="right"
            if name in {"alone", "interruptions", "with notice", "runs"}
            else "left",
        )
    for verdict in verdicts:
        program = verdict.program
        table.add_row(
            program.name, program.mode, f"{verdict.alone_s:.1f} s", str(verdict.interruptions),
            str(verdict.noticed), str(len(verdict.outcomes)),
            "a plain restart" if program.equals == "restarted" else "uninterrupted",
            f"{verdict.word}{': ' if verdict.why else ''}{verdict.why.splitlines()[0] if verdict.why else ''}",
        )  # fmt: skip
    console().print(table)


def main() -> int:
    """Examine and print; 1 when a result differs, or nothing could be run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compatibility", description=__doc__)
    known = {program.name: program for program in ours()}
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument(
        "--program",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="another program: a folder with a program.yaml",
    )
    parser.add_argument(
        "--quick", action="store_true", help="two programs, two interruptions each, within 50 s"
    )
    parser.add_argument(
        "--interruptions",
        type=int,
        default=_MOMENTS,
        metavar="N",
        help=f"of each program ({_MOMENTS})",
    )
    parser.add_argument(
        "--per-run",
        type=int,
        default=_PER_RUN,
        metavar="N",
        help=f"at most, of one run ({_PER_RUN})",
    )
    parser.add_argument("--seed", type=int, default=0, help="for other moments")
    parser.add_argument(
        "--keep", type=Path, help="a folder in which everything stays that went wrong"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end what was started
    if unknown := sorted(set(options.names) - set(known)):
        parser.error(f"no program {', '.join(unknown)}; there are: {', '.join(known)}")
    chosen = [known[name] for name in options.names] + [load(folder) for folder in options.program]
    if not chosen:
        chosen = [known[name] for name in _QUICK] if options.quick else list(known.values())
    if options.quick:
        chosen = [faster(program) for program in chosen]
    count = 2 if options.quick else options.interruptions
    verdicts = []
    folder = options.keep or Path(tempfile.mkdtemp(prefix="spotfirst-compatibility-"))
    try:
        for program in chosen:
            began = time.monotonic()
            place = folder / program.name
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            verdict = examine(
                program,
                place,
                count=count,
                seed=options.seed,
                per_run=options.per_run,
                most_runs=1 if options.quick else _MOST_RUNS * -(-count // options.per_run),
            )
            verdicts.append(verdict)
            print(
                f"{program.name}: {verdict.word} after {verdict.interruptions} interruptions, "
                f"{time.monotonic() - began:.0f} s {verdict.why}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    show(verdicts)
    found = {verdict.program.name: verdict.figures() for verdict in verdicts}
    words = [verdict.word for verdict in verdicts]
    print(
        json.dumps(
            {
                "programs": found,
                "equal": words.count("equal"), "refused": words.count("refused"),
                "differs": words.count("differs"), "not_run": words.count("not run"),
                "interruptions": sum(v.interruptions for v in verdicts), "n": len(words),
            }
        )
    )  # fmt: skip
    return int("differs" in words or not verdicts or words.count("not run") == len(words))


if __name__ == "__main__":
    os.environ.pop("SPOTFIRST_STORAGE", None)
    sys.exit(main())
