"""Large buffers to and from files past the page cache, without the GIL.

O_DIRECT saves the copy into the page cache, and the cache itself, which the dataset needs. It is
a matter of the file system and of alignment, so whatever refuses it (tmpfs, overlay, memory at an
odd address) is written and read plainly.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading

__all__ = ["read_into", "write_from"]

_ALIGNMENT = 4096
"""Of offsets and sizes: the largest block size of a disk."""
_WRITE_BYTES = 16 << 20
_SCRATCH_BYTES = 4 << 20
_SMALL_BYTES = 256 << 10
"""What is read ahead with its neighbours is there sooner than past the cache."""
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_REFUSED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}

_threads = threading.local()


def write_from(descriptor: int, data: memoryview) -> None:
    """Write all of ``data`` to an empty file. Not durable before an fsync."""
    done = 0
    aligned = len(data) // _ALIGNMENT * _ALIGNMENT
    if aligned and _pass_cache(descriptor, True):
        try:
            done = _write(descriptor, data[:aligned], 0)
        except OSError as error:
            if error.errno not in _REFUSED:  # memory that is not aligned
                raise
        _pass_cache(descriptor, False)
    _write(descriptor, data[done:], done)


def read_into(descriptor: int, start: int, target: memoryview) -> int:
    """Fill ``target`` with a file's bytes from ``start`` on; how many there were."""
    if len(target) < _SMALL_BYTES or not _pass_cache(descriptor, True):
        return _read(descriptor, target, start)
    try:
        return _read_direct(descriptor, start, target)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    _pass_cache(descriptor, False)
    return _read(descriptor, target, start)


def _pass_cache(descriptor: int, direct: bool) -> bool:
    """Whether the file system lets us.

    Not by a flag of open(): that creates the file before it refuses.
    """
    if not _DIRECT:
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _DIRECT if direct else flags & ~_DIRECT)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return False
    return True


def _write(descriptor: int, data: memoryview, start: int) -> int:
    done = 0
    while done < len(data):
        wrote = os.pwrite(descriptor, data[done : done + _WRITE_BYTES], start + done)
        if not wrote:
            raise OSError(errno.EIO, "the disk took no bytes")
        done += wrote
        if wrote % _ALIGNMENT and done < len(data):
            # Nearly full, or a limit: what is left can no longer be aligned, and the plain write
            # says why.
            _pass_cache(descriptor, False)
    return done


def _read(descriptor: int, target: memoryview, start: int) -> int:
    done = 0
    while done < len(target):
        found = os.preadv(descriptor, [target[done:]], start + done)
        if not found:
            break
        done += found
    return done


def _read_direct(descriptor: int, start: int, target: memoryview) -> int:
    """As :func:`_read`, straight where the disk can, else through aligned memory of this thread."""
    done = 0
    aligned = len(target) // _ALIGNMENT * _ALIGNMENT
    if aligned and start % _ALIGNMENT == 0:
        try:
            done = os.preadv(descriptor, [target[:aligned]], start)
        except OSError as error:
            if error.errno not in _REFUSED:  # the target's address
                raise
        else:
            if done < aligned and done % _ALIGNMENT:
                return done  # the file's end
    scratch = _scratch()
    source = ctypes.addressof(ctypes.c_char.from_buffer(scratch))
    into = ctypes.addressof(ctypes.c_char.from_buffer(target)) if len(target) else 0
    while done < len(target):
        skip = (start + done) % _ALIGNMENT
        wanted = min(_SCRATCH_BYTES, -(-(skip + len(target) - done) // _ALIGNMENT) * _ALIGNMENT)
        found = os.preadv(descriptor, [memoryview(scratch)[:wanted]], start + done - skip)
        usable = min(found - skip, len(target) - done)
        if usable <= 0:
            break
        ctypes.memmove(into + done, source + skip, usable)  # unlike a slice, without the GIL
        done += usable
        if found < wanted:
            break
    return done


def _scratch() -> mmap.mmap:
    found: mmap.mmap | None = getattr(_threads, "scratch", None)
    if found is None:
        found = mmap.mmap(-1, _SCRATCH_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                found.madvise(mmap.MADV_HUGEPAGE)  # twice as fast for the disk
        _threads.scratch = found
    return found
