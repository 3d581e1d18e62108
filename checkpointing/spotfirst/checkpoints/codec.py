"""Lossless compression of chunks, for storages that are slower than the cores. Off by default.

Numbers of one array differ most in their low bytes, so all first bytes are put together, all second
ones and so on, before zstd sees them: bf16 weights shrink to about two thirds, fp32 ones by a sixth.
That costs seconds of CPU for each GB: it pays below some tens of MB/s of store bandwidth a core, so
:func:`pays` measures before anything is compressed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from spotfirst.errors import CorruptObject

__all__ = ["SHUFFLES", "decode", "encode", "pays"]

SHUFFLES = (1, 2, 4, 8, 16)
"""Sizes of elements whose bytes are regrouped."""

_LEVEL = 1
_WORTH = 0.95
"""A chunk that shrinks less is stored as it is."""


def encode(data: memoryview, item_bytes: int) -> bytes | None:
    """``data`` compressed; ``None`` when that is not worth it."""
    import numpy as np
    import pyarrow as pa

    raw = np.frombuffer(data, dtype=np.uint8)
    if item_bytes > 1 and len(raw) % item_bytes == 0:
        raw = np.ascontiguousarray(raw.reshape(-1, item_bytes).T).reshape(-1)
    packed: Any = pa.Codec("zstd", compression_level=_LEVEL).compress(raw, asbytes=True)
    return packed if len(packed) < _WORTH * len(data) else None


def decode(packed: memoryview, target: memoryview, item_bytes: int) -> None:
    """Undo :func:`encode` into ``target``, whose size says how much there must be.

    Raises :class:`CorruptObject`.
    """
    import numpy as np
    import pyarrow as pa

    try:
        found = pa.Codec("zstd").decompress(packed, decompressed_size=len(target))
    except (OSError, ValueError) as error:
        msg = f"compressed bytes are damaged: {error}"
        raise CorruptObject(msg) from error
    raw = np.frombuffer(found, dtype=np.uint8)
    if len(raw) != len(target):
        msg = f"compressed bytes hold {len(raw)} bytes instead of {len(target)}"
        raise CorruptObject(msg)
    if item_bytes > 1 and len(raw) % item_bytes == 0:
        raw = raw.reshape(item_bytes, -1).T.reshape(-1)
    target[:] = np.ascontiguousarray(raw).data


def pays(
    sample: memoryview,
    item_bytes: int,
    stored_bytes_s: float,
    *,
    threads: int,
    timer: Callable[[], float] = time.perf_counter,
) -> bool:
    """Whether a storage that takes ``stored_bytes_s`` has a state like ``sample`` sooner compressed.

    ``threads`` compress at once, beside the training.
    """
    start = timer()
    packed = encode(sample, item_bytes)
    took_s = timer() - start
    if packed is None:
        return False
    compressed_s = took_s / threads + len(packed) / stored_bytes_s
    return compressed_s < len(sample) / stored_bytes_s
