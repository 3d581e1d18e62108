"""Where the next attempt runs: pure functions from what is known now to a decision."""

from __future__ import annotations

from spotfirst_airflow.policies.base import (
    LONGEST_REST_S,
    Decision,
    Policy,
    PoolHistory,
    View,
    Work,
    rest_s,
)
from spotfirst_airflow.policies.fallback import Fallback
from spotfirst_airflow.policies.loading import in_words, installed_policies, load_policy
from spotfirst_airflow.policies.published import Greedy, UniformProgress
from spotfirst_airflow.policies.simple import OnDemand, SpotOnly
from spotfirst_airflow.policies.spotfirst import Spotfirst

__all__ = [
    "LONGEST_REST_S",
    "Decision",
    "Fallback",
    "Greedy",
    "OnDemand",
    "Policy",
    "PoolHistory",
    "SpotOnly",
    "Spotfirst",
    "UniformProgress",
    "View",
    "Work",
    "in_words",
    "installed_policies",
    "load_policy",
    "rest_s",
]
