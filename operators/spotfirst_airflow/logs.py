"""A run's training output, followed over all of its attempts."""

from __future__ import annotations

from spotfirst.run import Run

__all__ = ["LogFollower"]


class LogFollower:
    """Gives each line of output once, in order within an attempt. Not thread-safe."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._next: dict[int, int] = {}
        self._halves: dict[int, str] = {}

    def skip_to_end(self, attempts: int) -> None:
        """Leave out what has been shipped so far: a follower that comes back, not a new one."""
        for attempt in range(1, attempts + 1):
            shipped = self._run.storage.list(self._run.attempt_path(attempt, "log"))
            self._next[attempt] = len(shipped) + 1

    def new_lines(self, attempts: int) -> list[tuple[int, str]]:
        """(attempt, line) for what was shipped since the last call, by attempts 1 … ``attempts``.

        Costs one small call per attempt that may still write: the two newest.
        """
        lines: list[tuple[int, str]] = []
        for attempt in range(max(1, attempts - 1) if self._next else 1, attempts + 1):
            lines.extend((attempt, line) for line in self._read(attempt))
        return lines

    def _read(self, attempt: int) -> list[str]:
        text = self._halves.pop(attempt, "")
        number = self._next.get(attempt, 1)
        while (segment := self._run.log_segment(attempt, number)) is not None:
            text += segment
            number += 1
        self._next[attempt] = number
        *lines, half = text.split("\n")
        if half:
            self._halves[attempt] = half
        return lines

    def rest(self) -> list[tuple[int, str]]:
        """Last lines that did not end with a newline; call once, when the run is done."""
        halves, self._halves = self._halves, {}
        return sorted(halves.items())
