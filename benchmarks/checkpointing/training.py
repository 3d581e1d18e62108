"""The training that checkpoints are measured beside: a GPT in fp32 with fused AdamW, on all cores."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

__all__ = ["FULL", "GPU", "LORA", "QUICK", "SMALL", "Size", "Training"]


@dataclass(frozen=True)
class Size:
    """A model, and how many sequences of how many tokens a step has."""

    layers: int
    width: int
    vocabulary: int
    context: int
    batch: int
    tokens: int
    rank: int = 0
    """Of adapters beside frozen weights (LoRA); 0 trains all of the model."""


FULL = Size(layers=12, width=768, vocabulary=50257, context=1024, batch=2, tokens=64)
"""GPT-2's smallest: 124 million parameters, 1.49 GB of state."""
QUICK = Size(layers=4, width=512, vocabulary=4096, context=256, batch=2, tokens=32)
"""0.18 GB of state."""
SMALL = Size(layers=4, width=256, vocabulary=4096, context=64, batch=1, tokens=16)
"""50 MB of state, for many checkpoints."""
LORA = Size(layers=8, width=512, vocabulary=8192, context=256, batch=1, tokens=16, rank=8)
GPU = Size(layers=24, width=2304, vocabulary=50257, context=1024, batch=4, tokens=1024)
"""1.65 billion parameters, 19.8 GB of state; with its gradients, 26 GB of a GPU's memory."""


class Training:
    """A model, its optimizer, and steps of training on random tokens."""

    def __init__(self, size: Size, device: str = "cpu") -> None:
        torch.manual_seed(0)
        torch.set_num_threads(os.cpu_count() or 1)
        self.device = torch.device(device)
        with self.device:
            self.model = _GPT(size)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(1)
        shape = (size.batch, size.tokens + 1)
        tokens = torch.randint(size.vocabulary, shape, generator=generator)
        self._tokens = tokens.to(self.device)
        self.done = 0

    def step(self) -> float:
        """One step; the seconds that it took."""
        start = time.perf_counter()
        loss = self.model(self._tokens[:, :-1], self._tokens[:, 1:])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.settle()
        self.done += 1
        return time.perf_counter() - start

    def settle(self) -> None:
        """Wait for a GPU; nothing on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def tensors(self) -> list[torch.Tensor]:
        """All of the state, once each."""
        states = [v for state in self.optimizer.state.values() for v in state.values()]
        return [*self.model.parameters(), *states]

    @property
    def state_bytes(self) -> int:
        """Parameters and optimizer state; complete after the first step."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    @property
    def changing_bytes(self) -> int:
        """What a step changes of it."""
        frozen = sum(
            p.numel() * p.element_size() for p in self.model.parameters() if not p.requires_grad
        )
        return self.state_bytes - frozen


class _GPT(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.places = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(_Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        if size.rank:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("adapter" in name)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        values = self.tokens(tokens) + self.places(places)
        for block in self.blocks:
            values = block(values)
        scores = functional.linear(self.norm(values), self.tokens.weight)  # tied
        return functional.cross_entropy(scores.flatten(0, 1), targets.flatten())


class _Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = max(1, size.width // 64)
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in range(2))
        self.qkv = _linear(size.width, 3 * size.width, size.rank)
        self.mix = _linear(size.width, size.width, size.rank)
        self.widen = _linear(size.width, 4 * size.width, size.rank)
        self.narrow = _linear(4 * size.width, size.width, size.rank)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = values.shape
        parts = self.qkv(self.norms[0](values)).view(batch, tokens, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        values = values + self.mix(seen.transpose(1, 2).reshape(batch, tokens, width))
        wide: torch.Tensor = functional.gelu(self.widen(self.norms[1](values)))
        change: torch.Tensor = self.narrow(wide)
        return values + change


def _linear(inputs: int, outputs: int, rank: int) -> nn.Module:
    return _Adapted(inputs, outputs, rank) if rank else nn.Linear(inputs, outputs)


class _Adapted(nn.Module):
    """A linear layer with a trained change of low rank beside it."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.adapter_down = nn.Parameter(torch.randn(rank, inputs) / inputs)
        self.adapter_up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        change = functional.linear(functional.linear(values, self.adapter_down), self.adapter_up)
        base: torch.Tensor = self.base(values)
        return base + change
