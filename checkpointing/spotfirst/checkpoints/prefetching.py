"""What a standby reads of the checkpoint, while the attempt before it still trains.

Most of a fine-tuned model is frozen: from one checkpoint to the next only the rest changes. So
what did not change between the last two checkpoints is read beforehand (of a first one, all), and
at the handover only what the last one changed. What a full training changes with every step,
nobody reads in vain.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator

import psutil

from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.manifest import Part, StateManifest, read_manifest
from spotfirst.checkpoints.packs import Wanted, fetch
from spotfirst.run import Run
from spotfirst.storage import Storage

__all__ = ["Prefetch"]

_log = logging.getLogger(__name__)

_BATCH_BYTES = 32 << 20
"""Between two of these it looks whether it is still wanted."""
_MEMORY_SHARE = 0.4
"""Of the memory that is free; a restore needs as much again for what it was read for."""


class Prefetch:
    """Reads in a thread of its own, from :meth:`start` on until all is read, or :meth:`stop`.

    Every chunk is verified as in a restore. It never fails: what could not be read is read later.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stopped = threading.Event()
        self._chunks: dict[str, memoryview] = {}
        self._thread = threading.Thread(target=self._read, name="spotfirst-prefetch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether there is nothing more to read beforehand."""
        return not self._thread.is_alive()

    @property
    def size_bytes(self) -> int:
        """What was read, and not yet taken."""
        return sum(map(len, self._chunks.values()))

    def stop(self) -> None:
        """Read no more; what is being read arrives yet."""
        self._stopped.set()
        self._thread.join()

    def take(self, wanted: Iterable[Wanted]) -> list[Wanted]:
        """Fill what it has, and let go of the rest; those that are still to be read.

        To be called after :meth:`stop`.
        """
        missing = []
        for each in wanted:
            chunk = self._chunks.get(each.part.digest)
            if chunk is not None and len(chunk) == len(each.target):
                each.target[:] = chunk
            else:
                missing.append(each)
        self._chunks.clear()
        return missing

    def _read(self) -> None:
        try:
            chain = self._run.chain().refresh()
            if chain.holder is None or chain.released or not chain.commits:
                return  # nobody to wait for: the restore begins at once
            packs = self._run.packs()
            commits = [commit for _, commit in chain.commits[-2:]]
            for batch in _batches(_lasting(packs, commits)):
                if self._stopped.is_set():
                    return
                fetch(packs, batch)
                self._chunks.update((each.part.digest, each.target) for each in batch)
        except Exception as error:  # noqa: BLE001 - whatever it is, the restore meets it, or does not
            _log.info("reading the checkpoint beforehand ended early: %s", error)


def _lasting(packs: Storage, commits: list[Commit]) -> Iterator[tuple[str, Part]]:
    """The chunks of the newest commit that the one before has as well, each once."""
    manifests = [read_manifest(packs, commit.manifest, commit.digest) for commit in commits]
    newest = manifests[-1]
    if not isinstance(newest, StateManifest):
        return
    before = manifests[0]
    seen = {part.digest for part in _parts(before)} if isinstance(before, StateManifest) else set()
    for part in _parts(newest):
        if part.digest in seen:
            seen.discard(part.digest)
            yield newest.packs[part.pack].name, part


def _parts(manifest: StateManifest) -> Iterator[Part]:
    return (p for array in manifest.arrays for shard in array.regions for p in shard.parts)


def _batches(chunks: Iterator[tuple[str, Part]]) -> Iterator[list[Wanted]]:
    """As much as there is room for, a piece at a time."""
    room = int(psutil.virtual_memory().available * _MEMORY_SHARE)
    batch: list[Wanted] = []
    size = 0
    for name, part in chunks:
        room -= part.size_bytes
        if room < 0:
            break
        batch.append(Wanted(name, part, memoryview(bytearray(part.size_bytes))))
        size += part.size_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
