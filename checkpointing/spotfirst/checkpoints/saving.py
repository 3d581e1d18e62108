"""Makes snapshots durable on a background thread: blobs, then the manifest, then the commit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spotfirst.checkpoints.blobs import BlobStore
from spotfirst.checkpoints.chain import CheckpointChain
from spotfirst.checkpoints.manifest import ArrayRef, Packer, StateManifest
from spotfirst.checkpoints.statetree import Leaf
from spotfirst.errors import ClaimLost
from spotfirst.patience import Sleep, patiently
from spotfirst.wire import encode

__all__ = ["Saver", "Snapshot", "write_state"]


@dataclass(frozen=True)
class Snapshot:
    """A consistent copy of a training state after ``step`` finished steps.

    The leaves' bytes belong to the snapshot until it is saved. ``taken_at`` is monotonic time.
    """

    step: int
    objects: dict[str, Any]
    rng: Any
    leaves: list[Leaf]
    metrics: dict[str, float]
    taken_at: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete. ``took_s`` counts from the snapshot to the commit."""

    seq: int
    step: int
    took_s: float


def write_state(blobs: BlobStore, snapshot: Snapshot) -> tuple[str, int]:
    """Write a snapshot's blobs and its manifest; the manifest's digest, and the total size."""
    packer = Packer(blobs)
    arrays = tuple(
        ArrayRef(dtype=leaf.dtype, shape=leaf.shape, parts=packer.add(leaf.data))
        for leaf in snapshot.leaves
    )
    manifest = StateManifest(
        step=snapshot.step, blobs=packer.finish(), arrays=arrays, objects=snapshot.objects,
        rng=snapshot.rng,
    )  # fmt: skip
    data = encode(manifest)
    return blobs.put(data), manifest.size_bytes + len(data)


class Saver:
    """Saves one snapshot at a time. The chain is the saver's own while a save is running."""

    def __init__(
        self,
        blobs: BlobStore,
        chain: CheckpointChain,
        attempt: int,
        *,
        on_saved: Callable[[Saved], None],
        warn: Callable[[str], None],
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Sleep = time.sleep,
    ) -> None:
        self._blobs = blobs
        self._chain = chain
        self._attempt = attempt
        self._on_saved = on_saved
        self._warn = warn
        self._monotonic = monotonic
        self._sleep = sleep
        self._thread: threading.Thread | None = None
        self._lost: ClaimLost | None = None
        self._error: Exception | None = None
        self.newest_step: int | None = None
        """Finished steps in the newest checkpoint that is complete."""

    @property
    def busy(self) -> bool:
        """Whether a save is running."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise :class:`ClaimLost` when a save has found that this attempt may not commit."""
        if self._lost is not None:
            raise self._lost

    def start(self, snapshot: Snapshot) -> None:
        """Begin to save. One save at a time: not while :attr:`busy`."""
        assert not self.busy, "a save is running, and it owns the chain and the buffers"
        self._error = None
        # A daemon: when the script dies, a storage that does not answer must not keep it alive.
        self._thread = threading.Thread(
            target=self._save, args=(snapshot,), name="spotfirst-save", daemon=True
        )
        self._thread.start()

    def finish(self) -> Exception | None:
        """Wait for the running save, however long it takes; what went wrong with it, if anything.

        Raises :class:`ClaimLost`.
        """
        if self._thread is not None:
            self._thread.join()
        self.check()
        return self._error

    def release(self) -> None:
        """Release the chain. Raises :class:`ClaimLost`."""
        patiently(
            lambda: self._chain.release(self._attempt),
            what="release the run's checkpoints", sleep=self._sleep, warn=self._warn,
        )  # fmt: skip

    def _save(self, snapshot: Snapshot) -> None:
        try:
            self._on_saved(self._saved(snapshot))
        except ClaimLost as error:
            self._lost = error
        except Exception as error:  # noqa: BLE001 - told below; the next save tries again
            self._error = error
            self._warn(
                f"the checkpoint of step {snapshot.step} could not be saved "
                f"({type(error).__name__}: {error}); the next one is tried at its time"
            )

    def _saved(self, snapshot: Snapshot) -> Saved:
        what = f"save the checkpoint of step {snapshot.step}"
        before = self._blobs.new_bytes
        manifest, size_bytes = patiently(
            lambda: write_state(self._blobs, snapshot),
            what=what, sleep=self._sleep, warn=self._warn,
        )  # fmt: skip
        seq = patiently(
            lambda: self._chain.commit(
                self._attempt, step=snapshot.step, manifest=manifest, content="state",
                size_bytes=size_bytes, new_bytes=self._blobs.new_bytes - before,
                metrics=snapshot.metrics,
            ),
            what=what, sleep=self._sleep, warn=self._warn,
        )  # fmt: skip
        self.newest_step = snapshot.step
        return Saved(seq, snapshot.step, self._monotonic() - snapshot.taken_at)
