"""What an instance is told when it starts: environment variables, and nothing else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from spotfirst.errors import InvalidSpec
from spotfirst.spec import SPEC_DIGEST_VARIABLE, check_run_id
from spotfirst.wire import Record

__all__ = ["Settings"]

DEFAULT_MAX_LIFE_S = 7 * 24 * 3600.0


class Settings(Record):
    """One attempt's settings.

    =================================== ======================================================
    variable                            meaning
    =================================== ======================================================
    ``SPOTFIRST_STORAGE``               URL of the storage (required)
    ``SPOTFIRST_RUN``                   run id (required)
    ``SPOTFIRST_ATTEMPT``               attempt number, from 1 (required)
    ``SPOTFIRST_SPEC_SHA256``           SHA-256 of the spec that it was launched for: the attempt
                                        runs no other
    ``SPOTFIRST_MAX_LIFE_S``            the instance ends itself this long after boot
    ``SPOTFIRST_WORKDIR``               folder for this attempt's files
    ``SPOTFIRST_CACHE``                 folder for what other attempts may use again
    ``SPOTFIRST_POWER_OFF``             command (for a shell) that ends the instance
    ``AWS_EC2_METADATA_SERVICE_ENDPOINT`` base URL of the instance metadata service
    ``SPOTFIRST_LOG_PERIOD_S``          how often new output is shipped (1)
    ``SPOTFIRST_DRAIN_PATIENCE_S``      how long a handover may take (120)
    ``SPOTFIRST_SHUTDOWN_WINDOW_S``     how long a SIGTERM leaves for the last checkpoint (20)
    ``SPOTFIRST_INTERRUPTION_MEAN_S``   mean time between interruptions of the instance's pool, if
                                        the fleet knows it: handed on to the command, whose
                                        checkpoint period follows from it
    =================================== ======================================================
    """

    storage_url: str
    run_id: str
    attempt: int
    workdir: Path
    cache: Path
    spec_digest: str = ""
    max_life_s: float = DEFAULT_MAX_LIFE_S
    power_off: str = ""
    metadata_url: str = "http://169.254.169.254"
    log_period_s: float = 1.0
    drain_patience_s: float = 120.0
    shutdown_window_s: float = 20.0

    @property
    def folder(self) -> Path:
        """This attempt's own folder: several attempts may share a machine."""
        return self.workdir / f"{self.run_id}-{self.attempt}"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Raises :class:`InvalidSpec` that names the variable to set."""
        workdir = environment.get("SPOTFIRST_WORKDIR") or tempfile.mkdtemp(prefix="spotfirst-")
        cache = environment.get("SPOTFIRST_CACHE") or str(Path(workdir) / "cache")
        return cls(
            storage_url=_required(environment, "SPOTFIRST_STORAGE"),
            run_id=check_run_id(_required(environment, "SPOTFIRST_RUN")),
            attempt=int(_number(environment, "SPOTFIRST_ATTEMPT")),
            spec_digest=environment.get(SPEC_DIGEST_VARIABLE, ""),
            workdir=Path(workdir).absolute(),
            cache=Path(cache).absolute(),
            max_life_s=_number(environment, "SPOTFIRST_MAX_LIFE_S", DEFAULT_MAX_LIFE_S),
            power_off=environment.get("SPOTFIRST_POWER_OFF", ""),
            metadata_url=environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
            or "http://169.254.169.254",
            log_period_s=_number(environment, "SPOTFIRST_LOG_PERIOD_S", 1.0),
            drain_patience_s=_number(environment, "SPOTFIRST_DRAIN_PATIENCE_S", 120.0),
            shutdown_window_s=_number(environment, "SPOTFIRST_SHUTDOWN_WINDOW_S", 20.0),
        )


def _required(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    if not value:
        msg = f"{name} is not set: the agent is started by a fleet, which sets it"
        raise InvalidSpec(msg)
    return value


def _number(environment: Mapping[str, str], name: str, default: float | None = None) -> float:
    text = environment.get(name, "") if default is not None else _required(environment, name)
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        msg = f"{name} is {text!r}; it must be a number above 0"
        raise InvalidSpec(msg)
    return value
