"""The random number generators that training draws from: Python's, NumPy's, torch's."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch  # noqa: TID253 - its generators are among them
from blake3 import blake3

from spotfirst.errors import StateMismatch

__all__ = [
    "as_stateful",
    "cuda_in_use",
    "generator_state",
    "is_generator",
    "reseed_rng",
    "restore_rng",
    "rng_state",
    "set_generator",
]


def cuda_in_use() -> bool:
    """Whether this process has begun to use a GPU; asking does not begin it."""
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def rng_state() -> dict[str, Any]:
    """The state of every global generator that has been used or can be."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    if cuda_in_use():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: Any) -> list[str]:
    """Set the global generators; what could not be set, in words."""
    if not isinstance(state, dict):
        return ["the checkpoint has no state of the random number generators"]
    skipped: list[str] = []
    try:
        random.setstate(state["python"])
        torch.set_rng_state(state["torch"])
        if "numpy" in state:
            import numpy as np

            np.random.set_state(state["numpy"])  # noqa: NPY002 - user code draws from the global one
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        msg = f"the checkpoint's state of the random number generators does not fit: {error!r}"
        raise StateMismatch(msg) from error
    on_gpus = state.get("cuda", [])
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, value in enumerate(on_gpus[:present]):
        torch.cuda.set_rng_state(value, device)
    if len(on_gpus) != present and on_gpus:
        skipped.append(
            f"the checkpoint has the random number generators of {len(on_gpus)} GPUs, and here "
            f"are {present}: numbers drawn on a GPU will differ from an uninterrupted run"
        )
    return skipped


def reseed_rng(state: Any, place: str) -> None:
    """Seed the global generators for a rank that has no state of its own in a checkpoint.

    The seed follows from another rank's ``state`` and from ``place``, a text that tells ranks and
    steps apart: doing it again gives the same.
    """
    hasher = blake3(place.encode())
    if isinstance(state, dict) and isinstance(state.get("torch"), torch.Tensor):
        hasher.update(state["torch"].numpy().tobytes())
    seed = int.from_bytes(hasher.digest(8), "little") >> 1
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(seed % (1 << 32))  # noqa: NPY002 - user code draws from the global one


def is_generator(value: Any) -> bool:
    """Whether it is a random number generator of torch, Python or NumPy, the older RandomState too."""
    return (
        isinstance(value, (torch.Generator, random.Random))
        or hasattr(value, "bit_generator")
        or _is_random_state(value)
    )


def generator_state(generator: Any) -> Any:
    """The state of a generator, as :func:`set_generator` takes it."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if _is_random_state(generator):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state


def set_generator(generator: Any, state: Any) -> None:
    """Set a generator to a state of its kind."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif _is_random_state(generator):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def _is_random_state(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.RandomState)


class _Generator:
    """Gives a generator object the two methods of everything else that is checkpointed."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._kind = (
            "torch" if isinstance(generator, torch.Generator)
            else "python" if isinstance(generator, random.Random)
            else "numpy"
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {self._kind: generator_state(self._generator)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_generator(self._generator, state[self._kind])


def as_stateful(value: Any) -> Any:
    """``value`` when it has ``state_dict`` and ``load_state_dict``, a wrapped generator, or None."""
    if callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    ):
        return value
    return _Generator(value) if is_generator(value) else None
