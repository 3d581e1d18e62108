"""Whether a file is cut off, as far as its format tells: checked before it counts as whole.

Only formats that are written from front to back, and whose end shows that they are complete.
"""

from __future__ import annotations

import math
import os
import re
from typing import Literal

import msgspec

__all__ = ["Wholeness", "is_sqlite", "wholeness"]

Wholeness = Literal["whole", "torn", "unsure", "unknown"]
"""``unsure``: it looks cut off, but a format of records without an end may look like that."""

_ZIP = b"PK\x03\x04"
_ZIP_END = b"PK\x05\x06"
_ZIP_END_BYTES = 22
_ZIP_COMMENT_BYTES = 65_535
_SQLITE = b"SQLite format 3\0"
_MOST_SAFETENSORS_HEAD_BYTES = 100 << 20


def is_sqlite(descriptor: int) -> bool:
    """Whether an open file begins as an SQLite database does."""
    return os.pread(descriptor, len(_SQLITE), 0) == _SQLITE


def wholeness(descriptor: int, path: str, size_bytes: int) -> Wholeness:
    """What the beginning and the end of an open file tell. Reads up to 64 KiB."""
    head = os.pread(descriptor, 16, 0)
    if head.startswith(_ZIP):  # torch.save, numpy.savez, Keras, joblib with compression
        return _zip(descriptor, size_bytes)
    if path.endswith(".safetensors"):
        return _safetensors(descriptor, head, size_bytes)
    if head[:1] == b"\x80" and head[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}:
        return "unknown" if os.pread(descriptor, 1, size_bytes - 1) == b"." else "unsure"
    if head.startswith(b"\x93NUMPY"):
        return _npy(descriptor, head, size_bytes)
    if head.startswith(b"PAR1"):
        is_whole = size_bytes >= 12 and os.pread(descriptor, 4, size_bytes - 4) == b"PAR1"
        return "whole" if is_whole else "torn"
    if size_bytes == 0 and path.endswith((".pt", ".pth", ".ckpt", ".safetensors", ".npz", ".npy")):
        return "torn"
    return "unknown"


def _zip(descriptor: int, size_bytes: int) -> Wholeness:
    start = max(0, size_bytes - _ZIP_END_BYTES - _ZIP_COMMENT_BYTES)
    tail = os.pread(descriptor, size_bytes - start, start)
    at = tail.rfind(_ZIP_END)
    if at < 0 or len(tail) - at < _ZIP_END_BYTES:
        return "torn"
    directory_bytes = int.from_bytes(tail[at + 12 : at + 16], "little")
    directory_at = int.from_bytes(tail[at + 16 : at + 20], "little")
    comment_bytes = int.from_bytes(tail[at + 20 : at + 22], "little")
    if len(tail) - at != _ZIP_END_BYTES + comment_bytes:
        return "torn"
    is_64 = 0xFFFFFFFF in {directory_bytes, directory_at}
    if not is_64 and directory_at + directory_bytes > start + at:
        return "torn"
    return "whole"


def _safetensors(descriptor: int, head: bytes, size_bytes: int) -> Wholeness:
    if len(head) < 8:
        return "torn"
    head_bytes = int.from_bytes(head[:8], "little")
    if not 2 <= head_bytes <= _MOST_SAFETENSORS_HEAD_BYTES:
        return "unknown"
    if 8 + head_bytes > size_bytes:
        return "torn"
    ends = _data_offsets(os.pread(descriptor, head_bytes, 8))
    if ends is None:
        return "torn"
    return "torn" if 8 + head_bytes + ends > size_bytes else "unknown"


def _data_offsets(head: bytes) -> int | None:
    try:
        found = msgspec.json.decode(head)
        return max(
            (
                int(value["data_offsets"][1])
                for key, value in found.items()
                if key != "__metadata__"
            ),
            default=0,
        )
    except (
        msgspec.DecodeError,
        TypeError,
        KeyError,
        IndexError,
        ValueError,
        AttributeError,
        RecursionError,
    ):
        return None


def _npy(descriptor: int, head: bytes, size_bytes: int) -> Wholeness:
    """The header says shape and type; no less than that many bytes follow it."""
    if len(head) < 12:
        return "torn"
    wide = head[6] > 1
    start = 12 if wide else 10
    head_bytes = int.from_bytes(head[8:start], "little")
    text = os.pread(descriptor, min(head_bytes, 1 << 16), start)
    shape = re.search(rb"'shape':\s*\(([0-9, ]*)\)", text)
    kind = re.search(rb"'descr':\s*'[<>|=]?[a-zA-Z](\d+)'", text)
    if shape is None or kind is None:
        return "unknown"
    try:
        needed = math.prod(map(int, filter(None, (n.strip() for n in shape[1].split(b",")))))
        needed *= int(kind[1])
    except ValueError:
        return "unknown"
    if b"U" in kind[0]:  # texts: a number of characters, of four bytes each
        needed *= 4
    return "torn" if start + head_bytes + needed > size_bytes else "unknown"
