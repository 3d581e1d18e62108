"""What a run can say about its local fleet, checked before anything starts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from spotfirst.errors import InvalidSpec
from spotfirst.wire import Record
from spotfirst_airflow.fleets.options import parse, require
from spotfirst_airflow.fleets.zones import region_of
from spotfirst_airflow.markets import CalmMarket, RecordedMarket, market_options

__all__ = ["LocalOptions"]

_DEFAULT_ZONES = ("local-a", "local-b")


class LocalOptions(Record):
    """The options of :class:`~spotfirst_airflow.fleets.local.LocalFleet`.

    ``time_scale`` is market seconds per second: markets, notices and bills run faster by it, the
    training does not. ``notice_s`` is in market seconds, ``boot_s`` in real ones. ``epoch`` is
    when the market began. ``agent_command`` is what an instance runs instead of the agent.
    ``egress_usd_gb`` is what a GB costs between a zone and the storage, where that is in another
    region, ``storage_region``; a zone's region is what its name says (``us-east-1`` of
    ``us-east-1a``). Without ``storage_region`` nothing crosses regions.
    """

    root: str = ""
    zones: tuple[str, ...] = ()
    time_scale: float = 1.0
    market: dict[str, Any] = msgspec.field(default_factory=lambda: {"kind": CalmMarket.kind})
    notice_s: float = 120.0
    boot_s: float = 0.0
    epoch: datetime | None = None
    agent_command: tuple[str, ...] = ()
    storage_region: str = ""
    egress_usd_gb: Decimal = Decimal(0)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> LocalOptions:
        """Raises :class:`InvalidSpec`. Reads no recordings: a reaper must not need them."""
        parsed = parse(cls, options, where="local fleet")
        require(parsed.time_scale > 0, "time_scale", parsed.time_scale, "above 0")
        require(parsed.notice_s >= 0, "notice_s", parsed.notice_s, "0 or more")
        usd_gb = parsed.egress_usd_gb
        require(usd_gb.is_finite() and usd_gb >= 0, "egress_usd_gb", usd_gb, "0 or more")
        if usd_gb and not parsed.storage_region:
            msg = "fleet option egress_usd_gb is given, and storage_region does not say from where"
            raise InvalidSpec(msg)
        require(parsed.boot_s >= 0, "boot_s", parsed.boot_s, "0 or more")
        require(len(set(parsed.zones)) == len(parsed.zones), "zones", parsed.zones, "all different")
        require(all(parsed.zones), "zones", parsed.zones, "names, none of them empty")
        require(
            not parsed.agent_command or all(parsed.agent_command),
            "agent_command",
            parsed.agent_command,
            "a list of words, none of them empty",
        )
        market = market_options(parsed.market)
        if not market.zones():
            return msgspec.structs.replace(parsed, zones=parsed.zones or _DEFAULT_ZONES)
        strange = sorted(set(parsed.zones) - set(market.zones()))
        if strange:
            msg = (
                f"fleet option zones has {', '.join(map(repr, strange))}, which its market lacks; "
                f"it has {', '.join(market.zones())}"
            )
            raise InvalidSpec(msg)
        return msgspec.structs.replace(parsed, zones=parsed.zones or market.zones())

    def settled(self, now: datetime) -> LocalOptions:
        """With an absolute root and files, and the market beginning now unless it did before."""
        market = dict(self.market)
        if market.get("kind") == RecordedMarket.kind:
            market["zones"] = {z: str(Path(p).absolute()) for z, p in market["zones"].items()}
            if market.get("prices"):
                market["prices"] = str(Path(market["prices"]).absolute())
        return msgspec.structs.replace(
            self, root=str(self.folder), market=market, epoch=self.epoch or now
        )

    @property
    def folder(self) -> Path:
        """The absolute path of the registry."""
        given = self.root or os.environ.get("SPOTFIRST_LOCAL_FLEET")
        path = Path(given) if given else Path("~/.local/share/spotfirst/fleet")
        return path.expanduser().absolute()

    @property
    def market_key(self) -> str:
        """Names the market. Instances compete for capacity only with those in the same one."""
        parts = msgspec.json.encode(
            [self.market, self.time_scale, self.epoch], order="deterministic"
        )
        return hashlib.sha256(parts).hexdigest()[:16]

    def way_usd_gb(self, zone: str) -> Decimal:
        """What a GB costs between a zone and the storage, either way."""
        is_near = not self.storage_region or region_of(zone) == self.storage_region
        return Decimal(0) if is_near else self.egress_usd_gb

    def market_time_s(self, now: datetime) -> float:
        """Market seconds since the epoch, 0 before it."""
        began = self.epoch or now
        return max(0.0, (now - began).total_seconds() * self.time_scale)
