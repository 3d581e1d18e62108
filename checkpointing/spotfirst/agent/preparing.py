"""What happens between boot and the command: code, data, and in files mode the last checkpoint."""

from __future__ import annotations

import threading
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from spotfirst import code
from spotfirst.agent.retrying import until_answered
from spotfirst.run import Run
from spotfirst.spec import RunSpec
from spotfirst.wire import Clock

if TYPE_CHECKING:
    from spotfirst.agent.filemode import FileMode
    from spotfirst.agent.freezing import Freezer

__all__ = ["Preparation"]


class Preparation:
    """Runs in a thread of its own, so that the agent can leave at any moment of it."""

    def __init__(
        self,
        run: Run,
        spec: RunSpec,
        attempt: int,
        folder: Path,
        cache: Path,
        *,
        freezer: Freezer,
        clock: Clock,
    ) -> None:
        self._run, self._spec, self._attempt = run, spec, attempt
        self._folder, self._cache = folder, cache
        self._freezer = freezer
        self._clock = clock
        self._thread = threading.Thread(target=self._work, name="preparation", daemon=True)
        self.error: Exception | None = None
        self.files: FileMode | None = None
        """In files mode, what captures the checkpoint folder."""
        self.fetched_at: datetime | None = None
        self.is_waiting = False
        """Whether all is fetched, and the attempt before still holds the checkpoints."""
        self.moved_bytes = 0
        self.is_done = False
        self._leaving = False

    def start(self) -> None:
        """Begin; ``is_done`` tells when it is over, and ``error`` how."""
        self._thread.start()

    def leave(self) -> None:
        """Wait for nothing any more: the attempt ends."""
        self._leaving = True

    def _work(self) -> None:
        try:
            self._fetch()
        except Exception as error:  # noqa: BLE001 - handed to the main thread, which decides
            self.error = error
        self.is_done = True

    def _fetch(self) -> None:
        reference, dataset = self._spec.code, self._spec.dataset
        if reference is not None:
            self.moved_bytes += until_answered(
                "fetch the code",
                lambda: code.fetch(
                    self._run.root, reference, self._folder / "code", cache=self._cache
                ),
            )
        if dataset is not None:
            from spotfirst.datasets import sync

            self.moved_bytes += until_answered(
                "fetch the dataset",
                lambda: sync(
                    self._run.root, dataset, self._folder / "dataset", self._cache / "datasets"
                ),
            ).moved_bytes
        self.fetched_at = self._clock()
        if self._spec.checkpoint_mode == "files":
            from spotfirst.agent.filemode import FileMode

            files = FileMode(
                self._run, self._attempt, self._folder / "checkpoints", freezer=self._freezer
            )
            self.is_waiting = True
            until_answered("restore the files", lambda: files.restore(leave=lambda: self._leaving))
            self.files = files
