"""Torch tensors in and out of a state: a consistent copy first, raw bytes from it."""

from __future__ import annotations

import sys
from typing import Any

import torch  # noqa: TID253 - this module is about tensors; only the Checkpointer's side imports it

from spotfirst.checkpoints.manifest import ITEM_BYTES, PartReader, StateManifest
from spotfirst.checkpoints.statetree import ArrayCollector, Leaf, unflatten
from spotfirst.errors import UnsupportedState

__all__ = ["Buffers", "TensorCollector", "load_tree"]


class Buffers:
    """CPU memory for the copies, kept from one snapshot to the next.

    The n-th tensor of a state always goes to the n-th buffer: only one snapshot is alive.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, torch.Tensor] = {}

    def get(self, number: int, size_bytes: int, *, pinned: bool) -> torch.Tensor:
        """``size_bytes`` bytes, with what the previous snapshot left in them."""
        buffer = self._buffers.get(number)
        if buffer is None or buffer.numel() != size_bytes or buffer.is_pinned() != pinned:
            buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)
            self._buffers[number] = buffer
        return buffer


class TensorCollector(ArrayCollector):
    """Copies the tensors of a tree into ``buffers``; without them, takes only their shapes.

    Tied tensors are taken once. The tree's values must stay alive while it is walked.
    """

    def __init__(self, buffers: Buffers | None = None) -> None:
        super().__init__()
        self._buffers = buffers
        self._taken: dict[tuple[Any, ...], dict[str, int]] = {}

    def take(self, value: Any, path: str) -> dict[str, int] | None:
        """The node of a tensor or an array; ``None`` when ``value`` is neither."""
        if not isinstance(value, torch.Tensor):
            return super().take(value, path)
        dtype = _checked_dtype(value, path)
        key = (
            value.device, value.data_ptr(), dtype, value.shape, value.stride(),
            value.is_conj(), value.is_neg(),
        )  # fmt: skip
        if key in self._taken:
            return self._taken[key]
        node = self._keep("tensor", Leaf(dtype, tuple(value.shape), self._copy(value)))
        if value.numel():
            self._taken[key] = node
        return node

    def _copy(self, value: torch.Tensor) -> Any:
        if self._buffers is None or not value.numel():
            return b""
        size_bytes = value.numel() * value.dtype.itemsize
        buffer = self._buffers.get(len(self.leaves), size_bytes, pinned=value.is_cuda)
        with torch.no_grad():
            buffer.view(value.dtype).view(value.shape).copy_(value)
        return buffer.numpy().data


def load_tree(node: Any, manifest: StateManifest, reader: PartReader) -> Any:
    """The value of one of a manifest's trees, tensors on the CPU, tied ones tied again.

    Raises :class:`CorruptObject` or :class:`ObjectMissing`.
    """
    tensors: dict[int, torch.Tensor] = {}

    def leaf(tag: str, index: int) -> Any:
        array = manifest.arrays[index]
        if tag == "tensor":
            if index not in tensors:
                data = reader.read(array.parts)
                dtype = getattr(torch, array.dtype)
                tensors[index] = (
                    torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(array.shape)
                    if data
                    else torch.empty(array.shape, dtype=dtype)
                )
            return tensors[index]
        import numpy as np

        values = np.frombuffer(reader.read(array.parts), dtype=np.dtype(array.dtype)).reshape(
            array.shape
        )
        return values[()] if tag == "scalar" else values

    return unflatten(node, leaf)


def _checked_dtype(value: torch.Tensor, path: str) -> str:
    dtype = str(value.dtype).removeprefix("torch.")
    what = ""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        what = f"a tensor of type {type(value).__module__}.{type(value).__qualname__}"
    elif value.layout is not torch.strided:
        what = f"a tensor of layout {value.layout}"
    elif value.is_quantized or dtype not in ITEM_BYTES:
        what = f"a tensor of {dtype}"
    elif value.device.type == "meta":
        what = "a tensor without data (device meta)"
    elif sys.byteorder != "little":
        what = "a tensor on a big-endian machine"
    if what:
        msg = f"{path} is {what}, which checkpoints do not store; make it a plain dense tensor"
        raise UnsupportedState(msg)
    return dtype
