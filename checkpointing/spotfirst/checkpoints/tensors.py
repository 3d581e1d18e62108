"""Torch tensors in and out of a state: where they are, and memory for them."""

from __future__ import annotations

import sys
from typing import Any

import torch  # noqa: TID253 - this module is about tensors; only the Checkpointer's side imports it

from spotfirst.checkpoints.manifest import ArrayRef
from spotfirst.checkpoints.memory import ALIGNMENT, Block
from spotfirst.checkpoints.statetree import ITEM_BYTES, ArrayCollector, Leaf
from spotfirst.errors import UnsupportedState

__all__ = ["Room", "TensorCollector", "bytes_of", "is_plain", "writable_bytes"]

_ROOMY_BYTES = 256 << 10
_ROOM_BYTES = 256 << 20


class TensorCollector(ArrayCollector):
    """Takes the tensors of a tree as they are, without a copy. Tied tensors are taken once.

    The tree's values must stay alive while it is walked: tied tensors are known by their address.
    """

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[tuple[Any, ...], dict[str, int]] = {}

    def take(self, value: Any, path: object) -> dict[str, int] | None:
        """The node of a tensor or an array; ``None`` when ``value`` is neither."""
        if not isinstance(value, torch.Tensor):
            return super().take(value, path)
        dtype = _checked_dtype(value, path)
        address, shape = value.data_ptr(), value.shape
        conj = dtype.startswith("complex") and value.is_conj()
        flipped = conj or value.is_neg()
        key = (address, dtype, shape, value.stride(), value.device, conj, flipped)
        taken = self._taken.get(key)
        if taken is not None:
            return taken
        plain = value.is_cpu and value.is_contiguous() and not flipped
        # An alias: when the script points a parameter to other memory, this keeps the old one.
        leaf = Leaf(dtype, tuple(shape), value.detach(), None, address, plain)
        node = self._keep("tensor", leaf)
        if leaf.size_bytes:
            self._taken[key] = node
        return node

    def value(self, tag: str, number: int) -> Any:
        """The value of a leaf, for :func:`~spotfirst.checkpoints.statetree.unflatten`."""
        leaf = self.leaves[number]
        if tag == "tensor":
            return leaf.value
        import numpy as np

        array = np.frombuffer(leaf.value, leaf.dtype).reshape(leaf.shape)
        return array[()] if tag == "scalar" else array.copy()


def is_plain(value: torch.Tensor) -> bool:
    """Whether its bytes in memory are those that are stored: on the CPU, row-major, no view."""
    return (
        value.device.type == "cpu"
        and value.is_contiguous()
        and not value.is_conj()
        and not value.is_neg()
    )


def bytes_of(value: Any) -> Any:
    """The bytes of a :class:`Leaf`'s value: row-major, little-endian."""
    if not isinstance(value, torch.Tensor):
        return value
    if not value.numel():
        return b""
    plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return writable_bytes(plain)


def writable_bytes(value: torch.Tensor) -> memoryview:
    """The memory of a plain tensor (see :func:`is_plain`) with at least one element."""
    flat = value.detach().reshape(-1).view(torch.uint8)
    return flat.numpy().data


class Room:
    """Memory for new tensors: side by side in huge pages, each at the beginning of a page.

    So a disk writes right into them, and their first touch costs a fraction. Each has a storage of
    its own, as any tensor.
    """

    def __init__(self) -> None:
        self._block: Block | None = None
        self._used = 0

    def empty(self, array: ArrayRef) -> torch.Tensor:
        """A tensor on the CPU for a stored array, of undefined content."""
        dtype, size = getattr(torch, array.dtype), array.size_bytes
        if size < _ROOMY_BYTES:
            return torch.empty(array.shape, dtype=dtype)
        if self._block is None or self._used + size > self._block.size_bytes:
            self._block, self._used = Block(max(size, _ROOM_BYTES), inherited=True), 0
        raw = torch.frombuffer(self._block.view[self._used : self._used + size], dtype=torch.uint8)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return raw.view(dtype).view(array.shape)


_NAMES: dict[torch.dtype, str] = {
    getattr(torch, name): name for name in ITEM_BYTES if hasattr(torch, name)
}
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def _checked_dtype(value: torch.Tensor, path: object) -> str:
    dtype = _NAMES.get(value.dtype)
    what = ""
    if type(value) not in _PLAIN_TYPES:
        what = f"a tensor of type {type(value).__module__}.{type(value).__qualname__}"
    elif value.layout is not torch.strided:
        what = f"a tensor of layout {value.layout}"
    elif dtype is None:
        what = f"a tensor of {value.dtype}"
    elif value.is_meta:
        what = "a tensor without data (device meta)"
    elif sys.byteorder != "little":
        what = "a tensor on a big-endian machine"
    if what or dtype is None:
        msg = f"{path} is {what}, which checkpoints do not store; make it a plain dense tensor"
        raise UnsupportedState(msg)
    return dtype
