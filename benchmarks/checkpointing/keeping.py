"""What checkpoints take: memory over many of them, and bytes where little or nothing has changed."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.checkpointing.training import Training
from benchmarks.checkpointing.writers import Spotfirst

__all__ = ["Memory", "growth", "lora_ratio", "unchanged_share"]


class Memory:
    """The most memory that this process has had since :meth:`reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin again, at what it has now."""
        Path("/proc/self/clear_refs").write_text("5")

    @property
    def peak_bytes(self) -> int:
        """The kernel's high-water mark of the resident set."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None, "Linux tells it"
        return int(found[1]) * 1024


def growth(training: Training, folder: Path, saves: int) -> float:
    """By how much the peak of the last quarter is above that of the first, per byte of state."""
    writer = Spotfirst(training, str(folder))
    part = max(1, saves // 4)
    peaks = []
    memory = Memory()
    for number in range(saves):
        training.step()
        writer.save()
        if number == part - 1 or number == saves - part - 1:
            peaks.append(memory.peak_bytes)
            memory.reset()
    return (memory.peak_bytes - peaks[0]) / training.state_bytes


def unchanged_share(training: Training, writer: Spotfirst) -> float:
    """New bytes of a checkpoint, per byte of state, when nothing has changed but the step."""
    writer.save()
    training.done += 1
    writer.save()
    saved = writer.checkpointer.last_saved
    assert saved is not None
    return saved.new_bytes / training.state_bytes


def lora_ratio(training: Training, folder: Path) -> float:
    """New bytes of a checkpoint per byte that a step changes, with frozen weights and adapters."""
    writer = Spotfirst(training, str(folder))
    training.step()
    writer.save()
    training.step()
    writer.save()
    saved = writer.checkpointer.last_saved
    assert saved is not None
    return saved.new_bytes / training.changing_bytes
