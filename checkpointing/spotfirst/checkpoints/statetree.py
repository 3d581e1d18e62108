"""A training state as a JSON tree and a list of arrays, and back. Torch-free, pickle-free.

===================================== =====================================================
value                                 node
===================================== =====================================================
``None``, bool, str, small int, float itself
larger int, NaN and infinity          ``{"int": hex}``, ``{"float": hex of the IEEE bytes}``
bytes, bytearray                      ``{"bytes": base64}``, ``{"bytearray": …}``
BytesIO                               ``{"bytesio": [position, base64]}``
complex, Decimal, UUID                ``{"complex": text}``, ``{"decimal": …}``, ``{"uuid": …}``
datetime, date, time, timedelta       ``{"datetime": ISO 8601}``, …, ``{"timedelta": [d, s, µs]}``
Path, PurePosixPath                   ``{"path": text}``, ``{"purepath": …}``
torch dtype, device, Size             ``{"dtype": "float32"}``, ``{"device": …}``, ``{"size": [n, …]}``
range, slice                          ``{"range": [start, stop, step]}``, ``{"slice": …}``
set, frozenset                        ``{"set": […]}``, ``{"frozenset": […]}``, sorted
list, tuple                           ``[…]``, ``{"tuple": […]}``
deque                                 ``{"deque": [length or null, …]}``
dict, Counter                         ``{"dict": [[key, value], …]}``, ``{"counter": …}``
OrderedDict                           ``{"ordered": […], "metadata": …}``
torch tensor, NumPy array and scalar  ``{"tensor": n}``, ``{"array": n}``, ``{"scalar": n}``
===================================== =====================================================

Keys are str or int. ``metadata`` is the version information that torch attaches to the state of
a module. Any other type is refused by name, with its place: so are enumerations and named tuples,
whose classes a reader would have to import. Where there is no torch, its types are read as text.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import io
import json
import math
import re
import struct
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any
from uuid import UUID

from spotfirst.errors import UnsupportedState

__all__ = [
    "ITEM_BYTES",
    "ArrayCollector",
    "Leaf",
    "check_leaves",
    "flatten",
    "renumber",
    "unflatten",
    "walk_leaves",
]

ITEM_BYTES = {
    "bool": 1,
    "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
    "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "float4_e2m1fn_x2": 1,
    "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8,
    "complex32": 4, "complex64": 8, "complex128": 16,
}  # fmt: skip
"""The element types that are stored, by torch's and NumPy's common name, and their sizes."""

_MAX_DEPTH = 100
_PLAIN_INT = 1 << 53
"""Integers below this are the same in every JSON reader."""
_LEAF_TAGS = ("tensor", "array", "scalar")
_NUMPY_NAMES = frozenset({
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
})  # fmt: skip


@dataclass(slots=True)
class Leaf:
    """An array of a state: element type, shape, and ``value``.

    ``value`` is its bytes (row-major, little-endian), or a torch tensor that is still alive: at
    ``address``, and ``plain`` when its bytes in memory are those to store. ``whole`` is for a shard
    of a larger array: that array's shape, and where the shard begins.
    """

    dtype: str
    shape: tuple[int, ...]
    value: Any
    whole: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    address: int = 0
    plain: bool = False
    size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.size_bytes = math.prod(self.shape) * ITEM_BYTES[self.dtype]


class ArrayCollector:
    """Takes the arrays out of a tree. This one knows NumPy's; a subclass adds torch's."""

    def __init__(self) -> None:
        self.leaves: list[Leaf] = []

    def take(self, value: Any, path: object) -> dict[str, int] | None:
        """The node of an array; ``None`` when ``value`` is none."""
        numpy = sys.modules.get("numpy")
        if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
            return None
        scalar = isinstance(value, numpy.generic)
        name = value.dtype.name
        if (not scalar and type(value) is not numpy.ndarray) or name not in _NUMPY_NAMES:
            raise _refused(f"NumPy {type(value).__name__} of {value.dtype}", path)
        little = value.dtype.newbyteorder("<")
        data = numpy.asarray(value).astype(little, order="C").tobytes()
        return self._keep("scalar" if scalar else "array", Leaf(name, tuple(value.shape), data))

    def _keep(self, tag: str, leaf: Leaf) -> dict[str, int]:
        self.leaves.append(leaf)
        return {tag: len(self.leaves) - 1}


class _NoArrays(ArrayCollector):
    """Where no array can be: in a set."""

    def take(self, value: Any, path: object) -> dict[str, int] | None:
        del value, path
        return None


class _Path:
    """Where a value is, written out only when there is something to say about it."""

    __slots__ = ("key", "parent")

    def __init__(self, parent: object, key: object) -> None:
        self.parent = parent
        self.key = key

    def __str__(self) -> str:
        return f"{self.parent}[{self.key!r:.200}]"


def flatten(value: Any, arrays: ArrayCollector, path: object = "state", depth: int = 0) -> Any:
    """The node of ``value``; its arrays go to ``arrays``. Raises :class:`UnsupportedState`."""
    if depth > _MAX_DEPTH:
        msg = f"{str(path)[:200]} is nested more than {_MAX_DEPTH} levels deep; does it contain itself?"
        raise UnsupportedState(msg)
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind in _SCALARS:
        return _SCALARS[kind](value, path)
    if kind in _SETS:
        nodes = [flatten(each, _NoArrays(), f"{path} (a set)", depth + 1) for each in value]
        return {_SETS[kind]: sorted(nodes, key=json.dumps)}
    if kind is deque:
        rest = [flatten(v, arrays, _Path(path, i), depth + 1) for i, v in enumerate(value)]
        return {"deque": [value.maxlen, *rest]}
    if kind is list or kind is tuple:
        nodes = [flatten(v, arrays, _Path(path, i), depth + 1) for i, v in enumerate(value)]
        return nodes if kind is list else {"tuple": nodes}
    if kind in _MAPPINGS:
        pairs = []
        for key, item in value.items():
            if type(key) not in (str, int):
                raise _refused(
                    f"a mapping with the key {key!r:.80} of type {_name(type(key))}", path
                )
            node = flatten(item, arrays, _Path(path, key), depth + 1)
            pairs.append([_SCALARS[type(key)](key, path), node])
        result: dict[str, Any] = {_MAPPINGS[kind]: pairs}
        metadata = getattr(value, "_metadata", None)
        if metadata is not None:
            result["metadata"] = flatten(metadata, arrays, f"{path}._metadata", depth + 1)
        return result
    node = _torch_node(value) or arrays.take(value, path)
    if node is None:
        raise _refused(_name(kind), path)
    return node


def unflatten(node: Any, leaf: Callable[[str, int], Any], depth: int = 0) -> Any:
    """The value of a node; ``leaf(tag, index)`` gives that of an array.

    Raises :class:`ValueError` for a node that :func:`flatten` does not write.
    """
    if node is None or isinstance(node, (bool, str, int, float)):
        return node
    if depth > _MAX_DEPTH:
        msg = f"the tree is nested more than {_MAX_DEPTH} levels deep"
        raise ValueError(msg)
    if isinstance(node, list):
        return [unflatten(item, leaf, depth + 1) for item in node]
    if not isinstance(node, dict):
        msg = f"a node is of type {type(node).__name__}"
        raise ValueError(msg)  # noqa: TRY004 - the file is wrong, not a caller
    metadata = node.get("metadata")
    tags = [tag for tag in node if tag != "metadata"]
    if len(tags) != 1 or (metadata is not None and tags != ["ordered"]):
        msg = f"a node has the tags {sorted(map(str, node))[:5]}"
        raise ValueError(msg)
    (tag,) = tags
    content = node[tag]
    if tag in _LEAF_TAGS:
        if type(content) is not int:
            msg = f"a {tag} node holds no number"
            raise ValueError(msg)
        return leaf(tag, content)
    if tag in _READERS:
        if not isinstance(content, str):
            msg = f"a node {tag!r} holds no text"
            raise ValueError(msg)
        try:
            return _READERS[tag](content)
        except (ArithmeticError, TypeError) as error:
            msg = f"a node {tag!r} holds {content[:80]!r}: {error!r}"
            raise ValueError(msg) from error
    if not isinstance(content, list):
        msg = f"a node {str(tag)[:80]!r} is unknown or holds no list"
        raise ValueError(msg)  # noqa: TRY004 - the file is wrong, not a caller
    if tag == "tuple":
        return tuple(unflatten(item, leaf, depth + 1) for item in content)
    if tag in _LISTS:
        # Of a deque's items, arrays too; of the others' only what they themselves may hold.
        held = leaf if tag == "deque" else _no_leaf
        items = [unflatten(item, held, depth + 1) for item in content]
        try:
            return _LISTS[tag](items)
        except (TypeError, ArithmeticError) as error:
            msg = f"a node {tag!r} holds what it cannot: {error}"
            raise ValueError(msg) from error
    if tag not in _MAPPINGS.values():
        msg = f"a node has the unknown tag {tag[:80]!r}"
        raise ValueError(msg)
    mapping = _mapping(tag, content, leaf, depth + 1)
    if metadata is not None:
        mapping._metadata = unflatten(metadata, leaf, depth + 1)  # noqa: SLF001 - where torch keeps it
    return mapping


def check_leaves(node: Any, dtypes: Sequence[str]) -> None:
    """Raise :class:`ValueError` unless a tree is whole and names only arrays that are there.

    ``dtypes`` are the element types of the manifest's arrays.
    """

    def check(tag: str, index: int) -> None:
        if not 0 <= index < len(dtypes):
            msg = f"the tree names array {index} of {len(dtypes)}"
            raise ValueError(msg)
        if tag != "tensor" and dtypes[index] not in _NUMPY_NAMES:
            msg = f"NumPy has no {dtypes[index]}"
            raise ValueError(msg)

    unflatten(node, check)


def walk_leaves(node: Any, path: str = "") -> Iterator[tuple[str, str, int]]:
    """(name, tag, array number) of each array below the mappings and lists of a valid tree.

    The name joins keys and positions with ``/``: a module's arrays have their own names.
    """
    if isinstance(node, dict):
        for tag, content in node.items():
            if tag in _LEAF_TAGS:
                yield path, tag, content
            elif tag in _MAPPINGS.values():
                for key, item in content:
                    yield from walk_leaves(item, _join(path, unflatten(key, _no_leaf)))
            elif tag == "tuple":
                yield from walk_leaves(content, path)
            elif tag == "deque":
                yield from walk_leaves(content[1:], path)
    elif isinstance(node, list):
        for position, item in enumerate(node):
            yield from walk_leaves(item, _join(path, position))


def renumber(node: Any, number: Callable[[int], int]) -> Any:
    """The same tree with ``number(n)`` in the place of each array's number n."""
    if isinstance(node, list):
        return [renumber(item, number) for item in node]
    if isinstance(node, dict):
        return {
            tag: number(content)
            if tag in _LEAF_TAGS and type(content) is int
            else renumber(content, number)
            for tag, content in node.items()
        }
    return node


def _mapping(tag: str, pairs: list[Any], leaf: Callable[[str, int], Any], depth: int) -> Any:
    result = {"dict": dict, "ordered": OrderedDict, "counter": Counter}[tag]()
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            msg = f"a node {tag!r} holds something other than pairs"
            raise ValueError(msg)
        key = unflatten(pair[0], _no_leaf)
        if type(key) not in (str, int) or key in result:
            msg = f"a node {tag!r} has the key {key!r:.80}, which is invalid or there twice"
            raise ValueError(msg)
        result[key] = unflatten(pair[1], leaf, depth)
    return result


def _no_leaf(tag: str, _: int) -> Any:
    msg = f"a {tag} is used as a key"
    raise ValueError(msg)


def _join(path: str, name: object) -> str:
    return f"{path}/{name}" if path else str(name)


def _refused(what: str, path: object) -> UnsupportedState:
    return UnsupportedState(
        f"{path} is {what}, which checkpoints do not store; keep numbers, strings, lists, dicts "
        "and dense arrays in state_dict(), and rebuild the rest when it is loaded"
    )


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _int_node(value: int, _: object) -> Any:
    return value if abs(value) < _PLAIN_INT else {"int": f"{value:x}"}


def _float_node(value: float, _: object) -> Any:
    return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}


def _str_node(value: str, path: object) -> Any:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _refused(f"the text {value[:80]!r}, which is no valid Unicode", path) from error
    return value


def _bytes_node(value: bytes, _: object) -> Any:
    return {"bytes": base64.b64encode(value).decode()}


def _read_float(text: str) -> float:
    (value,) = struct.unpack(">d", bytes.fromhex(text)) if len(text) == 16 else (None,)
    if value is None:
        msg = f"{text[:80]!r} is not the hex of 8 bytes"
        raise ValueError(msg)
    return float(value)


def _read_bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        msg = "bytes are not valid base64"
        raise ValueError(msg) from error


def _text_node(tag: str) -> Callable[[Any, object], Any]:
    return lambda value, path: {tag: _str_node(str(value), path)}


def _time_node(tag: str) -> Callable[[Any, object], Any]:
    def node(value: Any, path: object) -> Any:
        if type(getattr(value, "tzinfo", None)) not in (type(None), dt.timezone):
            # Such as of zoneinfo, whose rules would be lost.
            raise _refused(f"a {tag} in the time zone {value.tzinfo!r:.80}", path)
        return {tag: value.isoformat()}

    return node


def _complex_node(value: complex, _: object) -> Any:
    return {"complex": struct.pack(">dd", value.real, value.imag).hex()}


def _read_complex(text: str) -> complex:
    data = bytes.fromhex(text)
    if len(data) != 16:
        msg = f"{text[:80]!r} is not the hex of 16 bytes"
        raise ValueError(msg)
    return complex(*struct.unpack(">dd", data))


def _torch_node(value: Any) -> Any | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if type(value) is torch.dtype:
        return {"dtype": str(value).removeprefix("torch.")}
    if type(value) is torch.device:
        return {"device": str(value)}
    if type(value) is torch.Size:
        return {"size": list(value)}
    return None


def _read_dtype(text: str) -> Any:
    torch = sys.modules.get("torch")
    if not text.isascii() or not text.isidentifier():
        msg = f"{text[:80]!r} is no element type"
        raise ValueError(msg)
    if torch is None:
        return f"torch.{text}"
    found = getattr(torch, text, None)
    if type(found) is not torch.dtype:
        msg = f"torch has no element type {text[:80]!r} here"
        raise ValueError(msg)
    return found


def _read_device(text: str) -> Any:
    torch = sys.modules.get("torch")
    if not _DEVICE.fullmatch(text):
        msg = f"{text[:80]!r} is no device"
        raise ValueError(msg)
    try:
        return text if torch is None else torch.device(text)
    except RuntimeError as error:
        msg = f"torch has no device {text!r} here"
        raise ValueError(msg) from error


def _read_size(items: list[Any]) -> Any:
    if any(type(item) is not int for item in items):
        msg = "a size holds something other than numbers"
        raise TypeError(msg)
    torch = sys.modules.get("torch")
    return tuple(items) if torch is None else torch.Size(items)


def _read_deque(items: list[Any]) -> deque[Any]:
    length = items[0] if items else -1
    if not (length is None or (type(length) is int and length >= 0)):
        msg = "a deque has no valid length"
        raise TypeError(msg)
    return deque(items[1:], length)


def _bytesio_node(value: io.BytesIO, path: object) -> Any:
    if value.closed:
        raise _refused("a closed io.BytesIO", path)
    return {"bytesio": [value.tell(), base64.b64encode(value.getbuffer()).decode()]}


def _read_bytesio(items: list[Any]) -> io.BytesIO:
    position, text = items
    if type(position) is not int or not 0 <= position < 1 << 63 or not isinstance(text, str):
        msg = "a BytesIO holds something other than a position and text"
        raise TypeError(msg)
    value = io.BytesIO(_read_bytes(text))
    value.seek(position)
    return value


def _read_range(items: list[Any]) -> range:
    if any(type(item) is not int for item in items):
        msg = "a range holds something other than numbers"
        raise TypeError(msg)
    return range(*items)


def _range_node(value: Any, path: object) -> Any:
    ends = [flatten(end, _NoArrays(), path, 1) for end in (value.start, value.stop, value.step)]
    return {type(value).__name__: ends}


_DEVICE = re.compile(r"[a-z_]{1,20}(:\d{1,4})?")
_SETS: dict[type, str] = {set: "set", frozenset: "frozenset"}
_SCALARS: dict[type, Callable[[Any, object], Any]] = {
    int: _int_node,
    float: _float_node,
    str: _str_node,
    bytes: _bytes_node,
    bytearray: lambda value, _: {"bytearray": base64.b64encode(value).decode()},
    io.BytesIO: _bytesio_node,
    complex: _complex_node,
    Decimal: _text_node("decimal"),
    UUID: _text_node("uuid"),
    dt.datetime: _time_node("datetime"),
    dt.date: _time_node("date"),
    dt.time: _time_node("time"),
    dt.timedelta: lambda value, _: {"timedelta": [value.days, value.seconds, value.microseconds]},
    PosixPath: _text_node("path"),
    PurePosixPath: _text_node("purepath"),
    range: _range_node,
    slice: _range_node,
}
_READERS: dict[str, Callable[[str], Any]] = {
    "int": lambda text: int(text, 16),
    "float": _read_float,
    "bytes": _read_bytes,
    "bytearray": lambda text: bytearray(_read_bytes(text)),
    "complex": _read_complex,
    "decimal": Decimal,
    "uuid": UUID,
    "datetime": dt.datetime.fromisoformat,
    "date": dt.date.fromisoformat,
    "time": dt.time.fromisoformat,
    "path": Path,
    "purepath": PurePosixPath,
    "dtype": _read_dtype,
    "device": _read_device,
}
_LISTS: dict[str, Callable[[list[Any]], Any]] = {
    "set": set,
    "frozenset": frozenset,
    "deque": _read_deque,
    "bytesio": _read_bytesio,
    "timedelta": lambda items: dt.timedelta(*items),
    "size": _read_size,
    "range": _read_range,
    "slice": lambda items: slice(*items),
}
_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}
