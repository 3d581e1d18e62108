"""From what was measured to the figures that are promised."""

from __future__ import annotations

import math
from collections.abc import Mapping

from benchmarks._figures import Figure

__all__ = ["figures"]

_MEAN_BETWEEN_INTERRUPTIONS_S = 3600.0
_Measured = Mapping[str, Mapping[str, float]]


def figures(measured: _Measured) -> list[Figure]:
    """Those that can be told from the jobs that were run."""
    found: list[Figure] = []

    def add(
        name: str, value: float, target: float | None, what: str, *, least: bool = False
    ) -> None:
        found.append(Figure(name, value, target, not least, what))

    lazy = measured.get("spotfirst")
    eager = measured.get("spotfirst_eager")
    if lazy:
        for peer, target, what in (
            ("dcp_async", 0.15, "lost training time per checkpoint / dcp.async_save's"),
            ("torch_save", 0.05, "the same / torch.save's, with fsync"),
        ):
            if peer in measured:
                add(f"lost_vs_{peer}", lazy["lost_s"] / measured[peer]["lost_s"], target, what)
        if "bare" in measured and "dcp_async" in measured:
            add("bare_vs_dcp_async", measured["bare"]["lost_s"] / measured["dcp_async"]["lost_s"], None, "the least: a bare copy, hash and write / dcp.async_save")  # fmt: skip
        if "bare" in measured:
            add("lost_vs_bare", lazy["later_lost_s"] / measured["bare"]["later_lost_s"], None, "lost by later checkpoints / by a bare copy, hash and write")  # fmt: skip
        add("stall_vs_memcpy", lazy["stall_s"] / lazy["memcpy_s"], 0.2, "time that the loop stands still / one copy of the state, lazy")  # fmt: skip
        add("first_stall_vs_memcpy", lazy["first_stall_s"] / lazy["memcpy_s"], None, "the same, the first checkpoint")  # fmt: skip
    if eager:
        add("stall_eager_vs_memcpy", eager["stall_s"] / eager["memcpy_s"], 1.5, "the same, eager")
    if lazy:
        add("durable_vs_o_direct", lazy["idle_durable_s"] / lazy["o_direct_s"], 1.2, "snapshot to commit, training stopped / bare O_DIRECT write")  # fmt: skip
        add("durable_training_vs_o_direct", lazy["durable_s"] / lazy["o_direct_s"], None, "the same, while all cores train")  # fmt: skip
    if s3 := measured.get("s3"):
        for on, put_target, server in (
            ("", 0.6, "a server that costs next to nothing"),
            ("_seaweedfs", 0.95, "SeaweedFS"),
        ):
            if f"put{on}" not in s3:
                continue
            put, get = s3[f"put{on}"], s3[f"get{on}"]
            add(f"s3_put_vs_best{on}", put / s3[f"put_best{on}"], put_target, f"MB/s to {server} / best bare client", least=True)  # fmt: skip
            add(f"s3_put_vs_least{on}", put / s3[f"put_least{on}"], None, "the same / a bare client that also copies, hashes and sends checksums")  # fmt: skip
            add(f"s3_get_vs_ranges{on}", get / s3[f"ranges{on}"], 0.8, "MB/s of a restore from it / bare range reads into memory as new", least=True)  # fmt: skip
            add(f"s3_get_vs_hashed{on}", get / s3[f"ranges_hashed{on}"], None, "the same / such range reads, each hashed")  # fmt: skip
        add("s3_fetch_vs_ranges", s3["fetch"] / s3["ranges_warm"], 0.8, "MB/s of the verified reads alone / bare ones, both into warm memory", least=True)  # fmt: skip
    if lazy:
        add("extra_memory_ratio", lazy["extra_bytes"] / lazy["state_bytes"], 1.1, "more memory than without checkpoints / state")  # fmt: skip
        add("unchanged_bytes_share", lazy["unchanged_share"], 0.01, "bytes written for an unchanged state / state")  # fmt: skip
    if keeping := measured.get("keeping"):
        add("memory_growth_ratio", keeping["growth"], 0.05, "growth of memory from the first to the last of many checkpoints / state")  # fmt: skip
        add("lora_bytes_ratio", keeping["lora_ratio"], 1.05, "bytes written / bytes changed, adapters beside frozen weights")  # fmt: skip
    if restoring := measured.get("restoring"):
        add("restore_vs_read", restoring["direct_read"] / restoring["spotfirst"], 0.8, "bare O_DIRECT read into warm memory / restore", least=True)  # fmt: skip
        add("restore_vs_read_new", restoring["direct_read_new"] / restoring["spotfirst"], None, "the same, into memory as new as a restore's")  # fmt: skip
        add("torch_load_vs_read", restoring["direct_read"] / restoring["torch_load"], None, "the same, torch.load")  # fmt: skip
        add("dcp_load_vs_read", restoring["direct_read"] / restoring["dcp_load"], None, "the same, dcp.load")  # fmt: skip
    if lazy:
        share, period_s = _overhead(lazy)
        add("overhead_share", share, 0.005, f"training time lost to checkpoints, one each {period_s:.0f} s (interruptions: one an hour)")  # fmt: skip
        add("overhead_with_rework_share", share + period_s / 2 / _MEAN_BETWEEN_INTERRUPTIONS_S, None, "with what interruptions without notice would undo")  # fmt: skip
    return found


def _overhead(lazy: Mapping[str, float]) -> tuple[float, float]:
    """The share of time lost, and the period: Young's, but no shorter than a checkpoint takes.

    T = sqrt(2 C M): J. W. Young, "A first order approximation to the optimum checkpoint interval",
    CACM 17 (1974). A cost below the noise counts as what the loop stands still.
    """
    cost_s = max(lazy["lost_s"], lazy["stall_s"])
    period_s = math.sqrt(2 * cost_s * _MEAN_BETWEEN_INTERRUPTIONS_S)
    period_s = max(period_s, lazy["durable_s"])
    return cost_s / period_s, period_s
