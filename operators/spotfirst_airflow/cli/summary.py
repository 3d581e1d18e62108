"""How a run went: its attempts, what was lost, how fast it changed instances, what it cost."""

from __future__ import annotations

from datetime import datetime
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spotfirst.run import Run
from spotfirst.state import Attempt, RunState
from spotfirst.wire import utc_now
from spotfirst_airflow.changeovers import Changeover, changeovers, read_progress
from spotfirst_airflow.cli._common import duration
from spotfirst_airflow.costs import Bill, bill, usd
from spotfirst_airflow.results import weights_digest

__all__ = ["attempts_table", "between_regions", "print_summary"]

_OUTCOMES = {"succeeded": "green", "stopped": "yellow", "failed": "red"}


def print_summary(run: Run, state: RunState, console: Console, *, digest: bool = True) -> None:
    """For a terminal. ``digest`` reads the final weights to give their SHA-256."""
    account = bill(state, now=utc_now())
    console.print()
    console.print(attempts_table(state, account))
    outcome = Text(f"run {run.run_id} {state.phase}", style=_OUTCOMES.get(str(state.phase), ""))
    if state.failure is not None:
        outcome.append(f": {state.failure.message}")
    if state.stop is not None and str(state.phase) == "stopped":
        outcome.append(f": {state.stop.reason}")
    console.print(outcome, soft_wrap=True)
    if state.failure is not None:
        for line in state.failure.log_tail:
            console.print(Text(f"  | {line}", style="dim"), soft_wrap=True)
    for label, text in _facts(run, state, account, digest=digest):
        console.print(Text.assemble((f"  {label:<14}", "dim"), text), soft_wrap=True)


def attempts_table(state: RunState, account: Bill | None = None) -> Table:
    """One row per attempt, those included that never got an instance."""
    account = account or bill(state, now=utc_now())
    costs = {charge.attempt: charge for charge in account.charges}
    table = Table(box=None, pad_edge=False, header_style="bold")
    cost = "simulated cost" if account.is_simulated else "cost"
    for name in ("attempt", "market", "pool", "why", "life", "steps", cost, "ended"):
        table.add_column(name, justify="right" if name in {"life", cost} else "left")
    for attempt in state.attempts:
        charge = costs.get(attempt.number)
        life = duration(charge.end - charge.start) if charge else "-"
        cost = usd(charge.cost_usd + charge.egress_usd) if charge else "-"
        if charge and charge.is_estimate:
            cost = f"~{cost}"
        table.add_row(
            str(attempt.number), str(attempt.market), str(attempt.pool), Text(attempt.reason),
            life, _steps(attempt), cost, Text(ending(attempt)),
        )  # fmt: skip
    return table


def between_regions(account: Bill) -> str:
    """The part of a bill that was paid for bytes between regions, in words."""
    return f"{usd(account.egress_usd)} of it between regions"


def ending(attempt: Attempt) -> str:
    """How an attempt ended, in a word or two."""
    if attempt.not_launched is not None and attempt.launched is None:
        return f"not launched: {attempt.not_launched.cause.replace('_', ' ')}"
    late = ", launched after it was given up" if attempt.not_launched is not None else ""
    return _cause(attempt) + late


def _cause(attempt: Attempt) -> str:
    if attempt.ended is None:
        return "running"
    cause = attempt.ended.cause.replace("_", " ")
    if attempt.ended.cause == "interrupted":
        return f"{cause}, {'with' if attempt.notice else 'without'} notice"
    if attempt.ended.cause == "script_failed" and attempt.ended.exit_code is not None:
        return f"{cause} (exit code {attempt.ended.exit_code})"
    return cause


def describe_changeovers(found: tuple[Changeover, ...]) -> str:
    """Their number, and the medians that matter, with and without notice apart."""
    kinds = {"notice": "after a notice", "move": "by choice", "loss": "after a loss"}
    return "; ".join(
        _medians([change for change in found if change.why == why], words)
        for why, words in kinds.items()
        if any(change.why == why for change in found)
    )


def _medians(found: list[Changeover], words: str) -> str:
    total = median(change.changeover_s for change in found)
    beyond = median(change.beyond_startup_s for change in found)
    pause = median(change.pause_s for change in found)
    return (
        f"{len(found)} {words}, {duration(total)} to the next step "
        f"({duration(beyond)} beyond start-up), {duration(pause)} without training"
    )


def _steps(attempt: Attempt) -> str:
    ended = attempt.ended
    if ended is None or ended.step is None:
        return "-"
    return f"{ended.start_step or 0} → {ended.step}"


def _facts(
    run: Run, state: RunState, account: Bill, *, digest: bool
) -> list[tuple[str, str | Text]]:
    facts: list[tuple[str, str | Text]] = []
    if state.result is not None and state.result.step is not None:
        metrics = ", ".join(f"{k} {v:.4g}" for k, v in sorted(state.result.metrics.items()))
        facts.append(("finished", f"step {state.result.step}{', ' if metrics else ''}{metrics}"))
    if state.created_at and state.updated_at:
        facts.append(("took", duration(_end(state) - state.created_at)))
    facts.append(("steps lost", "-" if account.lost_steps is None else str(account.lost_steps)))
    found = changeovers(state, read_progress(run, state))
    if found:
        facts.append(("changeovers", describe_changeovers(found)))
    crossed = f", {between_regions(account)}" if account.egress_usd else ""
    simulated = account.is_simulated
    cost = f"{usd(account.total_usd, simulated=simulated)}{crossed}"
    if account.known_on_demand_usd is not None:
        cost += f"; on demand it would have been {usd(account.known_on_demand_usd, simulated=simulated)}"
    if account.saving_in_words:
        cost += f" ({account.saving_in_words})"
    facts.append(("cost", cost))
    if digest and (weights := weights_digest(run)):
        facts.append(("weights", f"SHA-256 {weights}"))
    return facts


def _end(state: RunState) -> datetime:
    ends = [a.ended.ended_at for a in state.attempts if a.ended]
    assert state.updated_at is not None
    return max(ends, default=state.updated_at) if state.is_final else utc_now()
