"""The operator that ends instances which nobody owns any more; meant for a schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from spotfirst.errors import FormatError, InvalidSpec, LaunchRejected, SpotfirstError, StorageDenied
from spotfirst_airflow.arguments import check_written, is_template, parse, parse_duration
from spotfirst_airflow.hooks import SpotfirstHook
from spotfirst_airflow.operators import InvalidArgument, RendersExactly

if TYPE_CHECKING:
    from airflow.sdk import Context

    from spotfirst_airflow.reaping import Reaped

__all__ = ["SpotReaperOperator"]


class SpotReaperOperator(RendersExactly, BaseOperator):
    """Ends instances that no live run of the storage owns, and counts what it found.

    The last line of defence: runs end their own instances, and instances end themselves at their
    maximum life. It spares what an active run trains on, what nobody has owned for less than the
    grace time, what is kept for debugging, and what belongs to runs of another storage.

    Returns counts: ``live``, ``recent``, ``kept``, ``foreign``, ``unclear``, ``orphan`` (as
    :data:`~spotfirst_airflow.reaping.Standing` has them), ``ended``, ``left`` (asked to end, but
    still there: the next round asks again), ``tidied`` (things without a price that served only
    runs that are over), and ``saved_usd_h``, what the orphans cost by the hour.

    Fails only when it could not look, or was not allowed to end what it found.

    Args:
        fleet: whose instances; by default the connection's fleet, or ``"local"``.
        fleet_options: what that fleet wants to know, such as ``{"region": "eu-central-1"}``.
        storage: URL that holds the runs; by default the connection's, or ``$SPOTFIRST_STORAGE``.
        grace: how long an instance may be without an owner, such as ``"10m"``: its controller may
            be ending it.
        dry_run: end nothing, and say what would be.
        spotfirst_conn_id: the connection with storage and keys. The default one may be missing;
            then the environment of Airflow's processes is used.
    """

    template_fields: Sequence[str] = (
        "fleet",
        "fleet_options",
        "storage",
        "grace",
        "spotfirst_conn_id",
    )
    exact_fields: ClassVar[Sequence[str]] = template_fields
    template_fields_renderers = {"fleet_options": "json"}
    ui_color = "#d8f0e3"

    def __init__(
        self,
        *,
        fleet: str | None = None,
        fleet_options: Mapping[str, Any] | None = None,
        storage: str | None = None,
        grace: timedelta | str = timedelta(minutes=5),
        dry_run: bool = False,
        spotfirst_conn_id: str | None = SpotfirstHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.fleet = fleet
        self.fleet_options = fleet_options
        self.storage = storage
        self.grace = grace
        self.only_look = dry_run  # BaseOperator has a method dry_run
        self.spotfirst_conn_id = spotfirst_conn_id
        self._check_arguments()

    def _check_arguments(self) -> None:
        dry_run: Any = self.only_look
        if not isinstance(dry_run, bool):
            msg = f"dry_run {dry_run!r}: it is not a bool; give True or False"
            raise InvalidArgument(msg)
        names = ("fleet", "fleet_options", "storage")
        try:
            check_written({name: getattr(self, name) for name in names})
            if not is_template(self.grace):
                parse_duration("grace", self.grace)
        except InvalidSpec as error:
            raise InvalidArgument(str(error)) from None

    def execute(self, context: Context) -> dict[str, Any]:  # noqa: ARG002
        """One round."""
        from spotfirst_airflow.fleets.base import load_fleet
        from spotfirst_airflow.reaping import reap

        try:
            hook = SpotfirstHook.find(self.spotfirst_conn_id)
            storage = hook.open_storage(parse("storage", self.storage))
            grace = parse_duration("grace", self.grace)
            fleet = load_fleet(
                self.fleet or hook.default_fleet,
                parse("fleet_options", self.fleet_options) or {},
                environment=hook.environment(),
            )
            self.log.info(
                "Looking for instances without an owner; the owners are in %s", storage.url
            )
            done = reap(fleet, storage, grace_s=grace.total_seconds(), dry_run=self.only_look)
        except (InvalidSpec, FormatError, LaunchRejected, StorageDenied) as error:
            raise AirflowFailException(str(error)) from error  # the next try would be told the same
        except SpotfirstError as error:
            raise AirflowException(str(error)) from error
        self._tell(done)
        return _counts(done)

    def _tell(self, done: Reaped) -> None:
        if not done.verdicts:
            self.log.info("No instances are running.")
        rows = [("INSTANCE", "RUN", "SINCE (UTC)", "$/H", "VERDICT", "WHY")]
        word = "would end" if done.dry_run else "ended"
        for verdict in done.verdicts:
            one = verdict.instance
            rows.append(
                (
                    one.instance_id, verdict.run_id or "?", f"{one.started_at:%Y-%m-%d %H:%M}",
                    f"{one.price_usd_h:.4f}", word if verdict.orphan else "spared", verdict.why,
                )
            )  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows if done.verdicts else ():
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.log.info("%s", "  ".join(cells).rstrip())
        if done.left:
            self.log.warning("Still there: %s; the next round asks again.", ", ".join(done.left))
        if done.tidied:
            self.log.info(
                "Removed %d other things that served only runs that are over.", done.tidied
            )
        if done.untidy:
            self.log.warning("Other things were left: %s", done.untidy)


def _counts(done: Reaped) -> dict[str, Any]:
    standings = Counter(verdict.standing for verdict in done.verdicts)
    names = ("live", "recent", "kept", "foreign", "unclear", "orphan")
    return {name: standings[name] for name in names} | {  # type: ignore[index]
        "ended": len(done.ended),
        "left": len(done.left),
        "tidied": done.tidied,
        "saved_usd_h": str(done.saved_usd_h),
        "dry_run": done.dry_run,
    }
