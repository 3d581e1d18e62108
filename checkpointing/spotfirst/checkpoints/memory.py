"""Memory for copies: page-aligned, in huge pages, faulted in once, not copied by a fork.

Copying 1.5 GB into fresh 4 KiB pages takes eight times as long as into warm ones, so the arena is
kept from one checkpoint to the next. A DataLoader's workers are forks of the trainer: without
``MADV_DONTFORK`` every later write into the arena would copy a page.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable

__all__ = ["ALIGNMENT", "Arena", "Block", "Lending", "move"]

ALIGNMENT = 4096
"""Of everything that is written to a disk without passing the page cache."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_MADV_DONTFORK = 10
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
_HUGE_BYTES = 2 << 20
_POPULATE_BYTES = 4 << 20
"""At once: meanwhile the rest of the process cannot map memory, as torch does in every step."""
_LARGE_BYTES = 256 << 10
_MOVE = ctypes.memmove
_MOVE_SMALL = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ("memmove", ctypes.PyDLL(None))
)


class Block:
    """``size_bytes`` of page-aligned memory. Its pages are the kernel's until they are touched.

    Unless it is ``inherited``, a child of a fork does not have it.
    """

    def __init__(self, size_bytes: int, *, inherited: bool = False) -> None:
        rounded = -(-max(1, size_bytes) // _HUGE_BYTES) * _HUGE_BYTES
        self._map = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.size_bytes = rounded
        self.view = memoryview(self._map)
        """All of it."""
        if not inherited:
            _advise(self.address, rounded, _MADV_DONTFORK)
        _advise(self.address, rounded, _MADV_HUGEPAGE)


class Arena:
    """One :class:`Block` that grows to the largest state seen. Only one snapshot uses it."""

    def __init__(self) -> None:
        self._block: Block | None = None
        self._populated = 0
        self._pinned = False
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """How much it holds."""
        return self._block.size_bytes if self._block else 0

    @property
    def populated_bytes(self) -> int:
        """How much of it, from its beginning, has been faulted in."""
        return self._populated

    def fit(self, size_bytes: int, *, pinned: bool = False) -> Block:
        """At least ``size_bytes``, with what the previous snapshot left in them.

        ``pinned``: known to CUDA, so that a GPU writes to it directly.
        """
        block = self._block
        if block is not None and block.size_bytes >= size_bytes and self._pinned == pinned:
            return block  # not behind a thread that faults it in
        with self._lock:
            block = self._block
            if block is None or block.size_bytes < size_bytes or self._pinned != pinned:
                self._unpin()
                self._block = None  # the old memory goes before the new comes
                block = self._block = Block(size_bytes)
                self._populated = 0
                if pinned:
                    self._pin(block)
            return block

    def prepare(self, size_bytes: int, *, ready_bytes: int, pinned: bool = False) -> None:
        """Have the first ``ready_bytes`` of so many ready soon: a thread faults them in."""
        self.fit(size_bytes, pinned=pinned)
        threading.Thread(
            target=self.populate, args=(ready_bytes,), name="spotfirst-memory", daemon=True
        ).start()

    def populate(self, end: int) -> None:
        """Fault the first ``end`` bytes in, so that copying to them is fast. Holds no GIL."""
        while True:
            with self._lock:  # by pieces: who needs the beginning does not wait for the end
                block = self._block
                if block is None or self._populated >= min(end, block.size_bytes):
                    return
                size = min(_POPULATE_BYTES, block.size_bytes - self._populated)
                _advise(block.address + self._populated, size, _MADV_POPULATE_WRITE)
                self._populated += size

    def _pin(self, block: Block) -> None:
        from torch.cuda import cudart

        error = cudart().cudaHostRegister(block.address, block.size_bytes, 0)  # type: ignore[no-untyped-call]
        if int(error):
            msg = f"CUDA cannot pin {block.size_bytes} bytes of memory: {error}"
            raise MemoryError(msg)
        self._pinned = True
        self._populated = block.size_bytes

    def _unpin(self) -> None:
        if self._pinned and self._block is not None:
            from torch.cuda import cudart

            cudart().cudaHostUnregister(self._block.address)  # type: ignore[no-untyped-call]
        self._pinned = False


class Lending:
    """Ranges between ``start`` and ``end`` that are lent for a while, the lowest first.

    Thread-safe. Offsets and sizes are in bytes.
    """

    def __init__(self, start: int, end: int) -> None:
        self._free = [(start, end)]
        self._changed = threading.Condition()

    def take(self, size: int, limit: Callable[[], tuple[int, float | None]]) -> int:
        """The start of ``size`` bytes that are the caller's until :meth:`give_back`; waits for them.

        ``limit`` says up to where they may lie as things are, and in how many seconds (``None``:
        never) to ask it again if nothing is given back before.
        """
        with self._changed:
            while True:
                end, again_s = limit()
                for at, (low, high) in enumerate(self._free):
                    if low + size <= min(high, end):
                        self._free[at : at + 1] = [(low + size, high)] if low + size < high else []
                        return low
                self._changed.wait(again_s)

    def give_back(self, start: int, size: int) -> None:
        """The range may be lent again."""
        with self._changed:
            ranges: list[tuple[int, int]] = []
            for low, high in sorted([*self._free, (start, start + size)]):
                if ranges and ranges[-1][1] == low:
                    ranges[-1] = (ranges[-1][0], high)
                else:
                    ranges.append((low, high))
            self._free = ranges
            self._changed.notify_all()


def move(target: int, source: int, size_bytes: int) -> None:
    """Copy memory by address: a large piece without the GIL, a small one without giving it up.

    Who gives it up must wait for it again, as long as another thread likes to hold it.
    """
    (_MOVE if size_bytes >= _LARGE_BYTES else _MOVE_SMALL)(target, source, size_bytes)


def _advise(address: int, size_bytes: int, advice: int) -> None:
    # Advice: where the kernel does not know it, things are slower, not wrong.
    if sys.platform == "linux":
        _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), advice)
