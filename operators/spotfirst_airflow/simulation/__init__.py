"""What a run would have cost, and when it would have ended: policies against recorded markets.

The policy, the view that it is shown, the fold over events and the bill are those of a real run;
only the market, the clock and the training are played. See :func:`simulate`.
"""

from __future__ import annotations

from spotfirst_airflow.simulation.engine import simulate
from spotfirst_airflow.simulation.task import Played, Task
from spotfirst_airflow.simulation.world import Place, World

__all__ = ["Place", "Played", "Task", "World", "simulate"]
