"""Train a small GPT on bytes, through any number of interruptions.

The text is every file below $SPOTFIRST_DATASET_DIR, or, without one, the source of Python's own
standard library, which every machine has. The model, the order of the samples and the weights at
the end depend on the arguments and the text alone: not on how often the training was interrupted.

    python train.py --steps 300
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import math
import os
import sysconfig
import time
from pathlib import Path

# cuBLAS is deterministic only with this, and only when it is set before its first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch import Tensor, nn
from torch.nn import functional

from spotfirst import Checkpointer
from spotfirst.checkpointer import weights_sha256
from spotfirst.datasets import SampleOrder

LIBRARY_BYTES = 4_000_000
VOCABULARY = 256
HEAD_WIDTH = 32


class Block(nn.Module):
    """Attention to what came before, then a small network for each place (pre-norm)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.query_key_value(self.norm_1(x)).chunk(3, dim=-1)
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts
        )
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = x + self.network(self.norm_2(x))
        return result


class GPT(nn.Module):
    """(batch, length) bytes to (batch, length, 256) scores of the byte that follows each."""

    def __init__(self, *, layers: int, width: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for table in (self.bytes, self.places):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        x = self.blocks(self.bytes(text) + self.places(places))
        return functional.linear(self.norm(x), self.bytes.weight)  # tied to the input's table

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy, in nats a byte, over (batch, length + 1) bytes."""
        scores = self(windows[:, :-1])
        return functional.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten())

    @torch.no_grad()
    def write(self, start: bytes, count: int, *, temperature: float = 0.7) -> bytes:
        """``start`` and ``count`` bytes more."""
        device = self.bytes.weight.device
        text = torch.tensor([list(start)], device=device)
        for _ in range(count):
            scores = self(text[:, -self.context :])[:, -1] / temperature
            text = torch.cat([text, torch.multinomial(scores.softmax(-1), 1)], dim=1)
        return bytes(text[0].tolist())


def read_corpus() -> tuple[Tensor, int]:
    """The text as one row of bytes, and how many files it is from."""
    folder = os.environ.get("SPOTFIRST_DATASET_DIR")
    if folder:
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        text = b"".join(path.read_bytes() for path in files)
    else:
        files, text = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")), b""
        for count, path in enumerate(files):
            if len(text) >= LIBRARY_BYTES:
                files = files[:count]
                break
            text += path.read_bytes()
    return torch.frombuffer(bytearray(text or b"\n"), dtype=torch.uint8), len(files)


def split(corpus: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(training, held out) windows of ``context + 1`` bytes; one in twenty is held out, the last.

    Both are views of the corpus: a window's last byte is the next one's first.
    """
    if len(corpus) < 2 * context + 1:
        raise SystemExit(
            f"the text has {len(corpus)} bytes, too few for two windows of {context}: "
            "give a larger dataset, or a smaller --context"
        )
    windows = corpus.unfold(0, context + 1, context)
    held_out = max(1, len(windows) // 20)
    return windows[:-held_out], windows[-held_out:]


def learning_rate(step: int, total: int, warmup: int = 20) -> float:
    """A factor: up in a straight line, then down along a cosine to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument(
        "--pace-s", type=float, default=0.0, help="the least time for a step, as of a larger model"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    corpus, files = read_corpus()
    training, held_out = split(corpus, args.context)
    print(f"text: {len(corpus):,} bytes of {files} files", flush=True)
    model = GPT(layers=args.layers, width=args.width, context=args.context).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, args.steps)
    )
    order = SampleOrder(len(training), args.seed)

    def pick(windows: Tensor, indices: list[int]) -> Tensor:
        return windows[indices].long().to(device)

    checkpointer = Checkpointer(model=model, optimizer=optimizer, scheduler=scheduler)
    for step in checkpointer.steps(args.steps):
        began = time.monotonic()
        # Computed from the step: a resumed training sees the samples that it would have seen.
        loss = model.loss(pick(training, order.batch(step, args.batch)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        metrics = {"loss": loss.item(), "lr": scheduler.get_last_lr()[0]}
        if step + 1 == args.steps:
            with torch.no_grad():
                some = list(range(min(len(held_out), 64)))
                metrics["val_loss"] = model.loss(pick(held_out, some)).item()
        checkpointer.report(**metrics, corpus_files=files, corpus_bytes=len(corpus))
        if step % args.log_every == 0 or step + 1 == args.steps:
            told = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            print(f"step {step + 1}/{args.steps}  {told}", flush=True)
        time.sleep(max(0.0, began + args.pace_s - time.monotonic()))

    print("it now writes:", model.write(b"def ", 120).decode(errors="replace"), sep="\n")
    print(f"weights {weights_sha256(model)}", flush=True)


if __name__ == "__main__":
    main()
