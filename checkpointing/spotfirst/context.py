"""Where a trainer finds itself: in which attempt of which run, and how it reaches the agent."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spotfirst.channel import CHANNEL_VARIABLE, Channel
from spotfirst.errors import InvalidSpec
from spotfirst.run import Run
from spotfirst.spec import SPEC_DIGEST_VARIABLE
from spotfirst.storage import open_storage

__all__ = ["TrainerContext"]

_log = logging.getLogger(__name__)

_LOCAL_RUN = "local"


@dataclass(frozen=True)
class TrainerContext:
    """``attempt`` is ``None`` on a laptop, where each process is the next attempt of one run."""

    run: Run
    attempt: int | None
    channel: Channel | None = None

    @classmethod
    def find(
        cls, storage: str | None = None, environment: Mapping[str, str] = os.environ
    ) -> TrainerContext | None:
        """The attempt that the agent has started us in; else a local run in ``storage``, or none.

        Raises :class:`InvalidSpec` when only some of the agent's variables are set.
        """
        names = ("SPOTFIRST_STORAGE", "SPOTFIRST_RUN", "SPOTFIRST_ATTEMPT")
        values = [environment.get(name, "") for name in names]
        if environment.get("SPOTFIRST_RUN"):
            missing = [name for name, value in zip(names, values, strict=True) if not value]
            if missing or not values[2].isdigit():
                msg = (
                    f"SPOTFIRST_RUN is set, but {missing or names[2]} is missing or no number; the "
                    "agent sets all of them, so unset SPOTFIRST_RUN to train on your own"
                )
                raise InvalidSpec(msg)
            folder = environment.get(CHANNEL_VARIABLE)
            channel = Channel(Path(folder)) if folder else None
            digest = environment.get(SPEC_DIGEST_VARIABLE, "")
            run = Run.on_instance(open_storage(values[0]), values[1], digest)
            return cls(run, int(values[2]), channel)
        if storage is not None:
            return cls(Run(open_storage(storage), _LOCAL_RUN), None)
        _log.warning(
            "training outside of a Spotfirst run: nothing is checkpointed. "
            "Give Checkpointer(storage='./checkpoints') to keep checkpoints here"
        )
        return None
