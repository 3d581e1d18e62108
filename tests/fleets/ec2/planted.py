"""Bugs to plant into production, each in one line: what the schedules must find."""

from __future__ import annotations

import secrets
from typing import Any

import pytest

from spotfirst import spending
from spotfirst.checkpoints.chain import CheckpointChain
from spotfirst_airflow.fleets.ec2 import memory
from spotfirst_airflow.fleets.ec2.launching import Launcher


def no_fence(patch: pytest.MonkeyPatch) -> None:
    """An attempt commits whoever holds the claim."""
    commit = CheckpointChain.commit

    def unfenced(self: CheckpointChain, *args: Any, **more: Any) -> int:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(CheckpointChain, "_is_ours", lambda *_: True)
            return commit(self, *args, **more)

    patch.setattr(CheckpointChain, "commit", unfenced)


def no_token(patch: pytest.MonkeyPatch) -> None:
    """Each launch has a client token of its own."""
    parameters = Launcher._parameters

    def unlike(self: Launcher, *args: Any) -> dict[str, Any]:
        return parameters(self, *args) | {"ClientToken": secrets.token_hex(8)}

    patch.setattr(Launcher, "_parameters", unlike)


def hasty(patch: pytest.MonkeyPatch) -> None:
    """What EC2 does not list is taken for gone."""
    patch.setattr(memory, "GONE_AFTER_S", 0.0)
    patch.setattr(memory, "ASK_AGAIN_S", 0.0)


def all_paid(patch: pytest.MonkeyPatch) -> None:
    """The first hour is billed though AWS took the instance back."""
    patch.setattr(spending, "FREE_IF_INTERRUPTED_WITHIN_S", 0.0)
