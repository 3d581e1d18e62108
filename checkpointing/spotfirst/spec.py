"""What a run is asked to do: ``spec.json``, written once, before anything is launched."""

from __future__ import annotations

import math
import re
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

import msgspec

from spotfirst.checkpoints.retention import Retention
from spotfirst.errors import FormatError, InvalidSpec
from spotfirst.lessons import Lessons
from spotfirst.wire import LIMIT_BYTES, Claimed, Record, decode, encode

__all__ = ["SPEC_DIGEST_VARIABLE", "TAG_NAMES", "CodeRef", "DatasetRef", "ResumeFrom", "RunSpec"]

SPEC_DIGEST_VARIABLE = "SPOTFIRST_SPEC_SHA256"
"""On an instance: the SHA-256 of the spec that it was launched for, and takes no other than."""

TAG_NAMES = ("env", "experiment_run", "model_id", "team")
"""The tags that costs are summed by."""

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class CodeRef(Record):
    """The training code, packed: ``{storage}/code/{digest}.tar.gz``."""

    digest: str
    size_bytes: int
    source: str = ""


class DatasetRef(Record):
    """One immutable version of a dataset; with ``since``, only what that version lacked.

    ``manifest`` and ``since_manifest`` are the digests of their manifests: nobody can put other
    files in the place of those that were asked for.
    """

    name: str
    version: int
    since: int | None = None
    manifest: str = ""
    since_manifest: str = ""


class ResumeFrom(Record):
    """The checkpoint of another run that this one starts from; ``digest``: of its manifest."""

    run_id: str
    step: int
    seq: int
    digest: str = ""


class RunSpec(Claimed):
    """Everything that stays the same over all attempts of a run.

    ``deadline`` is wall-clock time; ``budget_usd`` caps the run's cost over all attempts;
    ``on_budget`` says what happens as it comes near (see ``budget.Budget`` of the controller).
    ``checkpoint_period_s`` is the most training time that a kill without notice can lose.
    ``checkpoint_mode`` says who writes checkpoints: the script through
    :class:`spotfirst.Checkpointer`, or the agent, from the files in ``$SPOTFIRST_CHECKPOINT_DIR``.
    ``policy`` is the one of specs that name none: those from before there was another default.
    ``retention`` says which checkpoints stay.
    ``launches_per_hour`` bounds how many instances are launched within any hour; a run that would
    need more waits. ``max_life_s`` is when an instance ends itself, whatever else happens.
    ``training_time_s`` is what people expect from the first step to the last; ``lessons`` what
    earlier runs taught, as of when this one was made.
    """

    run_id: str
    created_at: datetime
    command: tuple[str, ...]
    code: CodeRef | None = None
    env: dict[str, str] = {}
    fleet: str = "local"
    fleet_options: dict[str, Any] = {}
    instance_types: tuple[str, ...] = ()
    policy: str = "fallback"
    policy_options: dict[str, Any] = {}
    deadline: datetime | None = None
    budget_usd: Decimal | None = None
    on_budget: Literal["stop", "continue_cheaper", "alert"] = "stop"
    checkpoint_period_s: float = 300.0
    checkpoint_mode: Literal["trainer", "files"] = "trainer"
    retention: Retention = Retention()
    dataset: DatasetRef | None = None
    resume_from: ResumeFrom | None = None
    script_retries: int = 0
    launches_per_hour: int = 30
    heartbeat_s: float = 5.0
    notice_poll_s: float = 5.0
    silence_s: float = 600.0
    max_life_s: float = 7 * 24 * 3600.0
    tags: dict[str, str] = {}
    training_time_s: float | None = None
    lessons: Lessons = Lessons()

    def check(self) -> None:
        """Raise :class:`InvalidSpec` for whatever can be seen from the spec alone."""
        check_run_id(self.run_id)
        if not self.command or not all(self.command):
            msg = (
                f"run {self.run_id}: command {list(self.command)!r} is empty or has an empty word; "
                'give it as a list, such as ["python", "train.py"]'
            )
            raise InvalidSpec(msg)
        unknown = sorted(set(self.tags) - set(TAG_NAMES))
        if unknown:
            msg = f"run {self.run_id}: unknown tags {unknown}; costs are summed by {TAG_NAMES}"
            raise InvalidSpec(msg)
        empty = sorted(name for name, value in self.tags.items() if not value.strip())
        if empty:
            msg = (
                f"run {self.run_id}: tags {empty} are empty (a template that rendered to nothing?)"
            )
            raise InvalidSpec(msg)
        if self.deadline is not None and self.deadline <= self.created_at:
            msg = (
                f"run {self.run_id}: the deadline {self.deadline.isoformat()} has already passed "
                f"(it is {self.created_at.isoformat()}); give a later one"
            )
            raise InvalidSpec(msg)
        budget = self.budget_usd
        if budget is not None and (not budget.is_finite() or budget <= 0):
            msg = f"run {self.run_id}: a budget of ${budget} buys nothing; give more than 0"
            raise InvalidSpec(msg)
        if budget is None and self.on_budget != "stop":
            msg = f"run {self.run_id}: on_budget={self.on_budget!r} needs budget_usd beside it"
            raise InvalidSpec(msg)
        for name in (
            "checkpoint_period_s",
            "heartbeat_s",
            "notice_poll_s",
            "silence_s",
            "max_life_s",
        ):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                msg = f"run {self.run_id}: {name} is {value}; it must be a number above 0"
                raise InvalidSpec(msg)
        if self.training_time_s is not None and not 0 < self.training_time_s < math.inf:
            msg = (
                f"run {self.run_id}: training_time_s is {self.training_time_s}; it must be a "
                "number of seconds above 0"
            )
            raise InvalidSpec(msg)
        if self.script_retries < 0:
            msg = (
                f"run {self.run_id}: script_retries is {self.script_retries}; it must be 0 or more"
            )
            raise InvalidSpec(msg)
        if self.launches_per_hour < 1:
            msg = (
                f"run {self.run_id}: launches_per_hour is {self.launches_per_hour}; it must be 1 "
                "or more, or the run would never begin"
            )
            raise InvalidSpec(msg)

        self.retention.check()
        _as_read(self)

    def same_work(self, other: RunSpec) -> bool:
        """Whether both ask for the same, leaving out when they were written."""
        # As read back: free options change a little on the way (a tuple becomes a list).
        mine = msgspec.structs.replace(self, created_at=other.created_at, lessons=other.lessons)
        return _as_read(mine) == _as_read(other)


def check_run_id(run_id: str) -> str:
    """``run_id`` when it can name a folder; else :class:`InvalidSpec`."""
    if not is_run_id(run_id):
        msg = (
            f"run id {run_id!r} must be 1 to 200 letters, digits, '.', '_' or '-', "
            "and start with a letter or digit"
        )
        raise InvalidSpec(msg)
    return run_id


def is_run_id(name: str) -> bool:
    """Whether a run can have this id."""
    return _RUN_ID.fullmatch(name) is not None


def _as_read(spec: RunSpec) -> RunSpec:
    """What readers will see of it. Raises :class:`InvalidSpec`."""
    try:
        data = encode(spec)
        if len(data) <= LIMIT_BYTES:
            return decode(data, RunSpec, path="spec.json")
    except (FormatError, TypeError, ValueError, RecursionError) as error:
        msg = (
            f"run {spec.run_id}: the spec cannot be written as JSON: {error}. Give options, "
            "tags and env as plain numbers, texts, lists and dicts"
        )
        raise InvalidSpec(msg) from error
    msg = (
        f"run {spec.run_id}: the spec has {len(data)} bytes, and readers take {LIMIT_BYTES} at "
        "most; put what is large (in env, command or options) into the code or a dataset"
    )
    raise InvalidSpec(msg)
