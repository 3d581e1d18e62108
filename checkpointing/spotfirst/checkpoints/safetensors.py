"""The safetensors file format: the length of a JSON header, the header, raw bytes.

The header maps each name to element type, shape, and where its bytes begin and end behind the
header. The bytes are row-major and little-endian, like ours, and leave no gap. Described at
https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from spotfirst.checkpoints.statetree import ITEM_BYTES
from spotfirst.errors import InvalidSpec, UnsupportedState
from spotfirst.wire import prepared

__all__ = ["Entry", "layout", "read_header"]

_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_MAX_HEADER_BYTES = 100_000_000
"""What readers of the format accept."""
_METADATA = "__metadata__"
_NAMES = {
    "bool": "BOOL",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "float8_e4m3fn": "F8_E4M3", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64",
    "complex64": "C64",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class Entry(NamedTuple):
    """An array in a file: element type, shape, and where its bytes are in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def layout(
    arrays: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """What a file with these arrays (element type and shape by name) begins with, and their places.

    Raises :class:`UnsupportedState` naming the arrays that the format has no element type for.
    """
    unfit = [f"{name} ({dtype})" for name, (dtype, _) in arrays.items() if dtype not in _NAMES]
    unfit += [f"the name {name!r}" for name in arrays if name == _METADATA]
    if unfit:
        more = f" and {len(unfit) - 10} more" if len(unfit) > 10 else ""
        msg = (
            f"safetensors cannot hold {', '.join(unfit[:10])}{more}; export to a .pt file, which "
            "can"
        )
        raise UnsupportedState(msg)
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    relative: dict[str, Entry] = {}
    offset = 0
    # The widest elements first: then every array begins where its elements may.
    for name in sorted(arrays, key=lambda name: (-ITEM_BYTES[arrays[name][0]], name)):
        dtype, shape = arrays[name]
        size = math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {
            "dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, offset + size],
        }  # fmt: skip
        relative[name] = Entry(dtype, shape, offset, size)
        offset += size
    data = msgspec.json.encode(header)
    data += b" " * (-len(data) % _ALIGNMENT)
    if len(data) > _MAX_HEADER_BYTES:
        msg = f"{len(arrays)} arrays need a header of {len(data)} bytes, which no reader accepts"
        raise UnsupportedState(msg)
    begin = _LENGTH.size + len(data)
    places = {name: entry._replace(offset=begin + entry.offset) for name, entry in relative.items()}
    return _LENGTH.pack(len(data)) + data, places


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The arrays of a file by name, in the order of their bytes, and which names are tied to which.

    A tied array is in the file once, and its other names are in the metadata; so safetensors itself
    writes models. All that the header says is checked. Raises :class:`InvalidSpec`.
    """
    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            start = file.read(_LENGTH.size)
            length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else -1
            if not 0 < length <= min(_MAX_HEADER_BYTES, size_bytes - _LENGTH.size):
                msg = f"{path} is no safetensors file: its header would have {length} bytes"
                raise InvalidSpec(msg)
            data = file.read(length)
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror}"
        raise InvalidSpec(msg) from error
    try:
        header = msgspec.json.decode(data, type=dict[str, dict[str, Any]])
        metadata = header.pop(_METADATA, None) or {}
        begin = _LENGTH.size + length
        entries = {name: _entry(name, found, begin) for name, found in header.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        msg = f"{path} is no valid safetensors file: {error}"
        raise InvalidSpec(msg) from error
    entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    end = begin
    for name, entry in entries.items():
        if entry.offset != end:
            msg = f"{path} is damaged: {name!r} begins at byte {entry.offset}, not at {end}"
            raise InvalidSpec(msg)
        end += entry.size_bytes
    if end != size_bytes:
        msg = f"{path} is damaged: it has {size_bytes} bytes, and its header speaks of {end}"
        raise InvalidSpec(msg)
    tied = {
        name: other
        for name, other in metadata.items()
        if name not in entries and isinstance(other, str) and other in entries
    }
    return entries, tied


class _Raw(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _entry(name: str, found: dict[str, Any], begin: int) -> Entry:
    raw = msgspec.convert(found, prepared(_Raw))
    dtype = _DTYPES.get(raw.dtype)
    if dtype is None:
        msg = f"{name!r} has the element type {raw.dtype[:40]!r}, which checkpoints do not store"
        raise ValueError(msg)
    first, last = raw.data_offsets
    size = math.prod(raw.shape) * ITEM_BYTES[dtype]
    if first < 0 or any(n < 0 for n in raw.shape) or last - first != size:
        msg = (
            f"{name!r} of shape {list(raw.shape)} needs {size} bytes and has those from {first} "
            f"to {last}"
        )
        raise ValueError(msg)
    return Entry(dtype, raw.shape, begin + first, size)
