"""What a finished run gives to those who asked for it: small, JSON, free of secrets."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from spotfirst.errors import SpotfirstError
from spotfirst.run import Run
from spotfirst.state import RunState
from spotfirst_airflow.costs import bill

__all__ = ["result", "weights_digest"]


def result(run: Run, state: RunState, *, now: datetime) -> dict[str, Any]:
    """The run's outcome as XCom and ``spotfirst run --json`` give it. Money as decimal strings."""
    account = bill(state, now=now)
    done = state.result
    newest = run.chain().refresh().newest()
    seq = newest[0] if newest else None
    return {
        "run_id": run.run_id,
        "storage": run.root.url,
        "phase": str(state.phase),
        "step": done.step if done else state.checkpoint_step,
        "checkpoint": f"{run.url}/checkpoints/{seq:08d}.json" if seq else None,
        "resume_from": f"{run.run_id}@{newest[1].step}" if newest else None,
        "weights_sha256": weights_digest(run),
        "metrics": dict(done.metrics) if done else {},
        "attempts": len(account.charges),
        "lost_steps": account.lost_steps,
        "cost_usd": str(account.total_usd),
        "on_demand_usd": str(account.on_demand_usd),
        "saving_share": round(account.saving_share, 4),
    }


def weights_digest(run: Run, name: str = "model") -> str | None:
    """SHA-256 of the newest checkpoint's ``name`` tensors; ``None`` when it has none."""
    from spotfirst.checkpoints.weights import state_digest

    newest = run.chain().refresh().newest()
    if newest is None or newest[1].content != "state":
        return None
    try:
        return state_digest(run.packs(), newest[1], name=name)
    except (KeyError, SpotfirstError):
        return None
