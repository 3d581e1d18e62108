"""What a finished run gives to those who asked for it: small, JSON, free of secrets."""

from __future__ import annotations

import math
from datetime import datetime
from decimal import Decimal
from typing import Any

from spotfirst.errors import SpotfirstError
from spotfirst.run import Run
from spotfirst.state import RunState
from spotfirst_airflow.costs import bill

__all__ = ["result", "weights_digest"]


def result(
    run: Run, state: RunState, *, now: datetime, exported: str | None = None
) -> dict[str, Any]:
    """The run's outcome as XCom and ``spotfirst run --json`` give it; see ``docs/airflow.md``.

    Money is in dollars, as numbers; what is not known is ``None``. ``exported`` is where the
    weights or files were written.
    """
    account, spec = bill(state, now=now), run.spec()
    done = state.result
    newest = run.chain().refresh().newest()
    seq = newest[0] if newest else None
    began, ended = state.created_at, state.updated_at if state.is_final else now
    used = {charge.pool.instance_type: None for charge in account.charges}
    return {
        "run_id": run.run_id,
        "storage": run.root.url,
        "phase": str(state.phase),
        "step": done.step if done else state.checkpoint_step,
        "checkpoint": f"{run.url}/checkpoints/{seq:08d}.json" if seq else None,
        "resume_from": f"{run.run_id}@{newest[1].step}" if newest else None,
        "weights_sha256": weights_digest(run),
        "exported": exported,
        # JSON knows no NaN, and a database that is given one refuses the whole result.
        "metrics": {k: v if math.isfinite(v) else None for k, v in done.metrics.items()}
        if done
        else {},
        "attempts": len(account.charges),
        "lost_steps": account.lost_steps,
        "duration_s": (ended - began).total_seconds() if began and ended else None,
        "cost_usd": float(account.total_usd),
        "on_demand_usd": _number(account.known_on_demand_usd),
        "saving_usd": _number(account.saved_usd),
        "saving_share": None if account.saved_share is None else round(account.saved_share, 4),
        "is_simulated": account.is_simulated,
        "command": list(spec.command),
        "env": dict(spec.env),
        "tags": dict(spec.tags),
        "fleet": spec.fleet,
        "instance_types": list(used),
    }


def _number(amount: Decimal | None) -> float | None:
    return None if amount is None else float(amount)


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
