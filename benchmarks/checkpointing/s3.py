"""Checkpoints in S3, beside the best bare clients: on a server that costs nothing, and on SeaweedFS."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.checkpointing.limits import warm
from benchmarks.checkpointing.restoring import fingerprint, restore
from benchmarks.checkpointing.s3clients import BareClients
from benchmarks.checkpointing.training import Size, Training
from benchmarks.checkpointing.writers import Spotfirst
from devstack.s3 import S3Server
from spotfirst.checkpoints.manifest import StateManifest, read_manifest
from spotfirst.checkpoints.memory import Block
from spotfirst.checkpoints.packs import Wanted, fetch
from spotfirst.checkpoints.tensors import bytes_of
from spotfirst.run import Run
from spotfirst.storage import Storage, open_storage

__all__ = ["compare"]

_BUCKET = "spotfirst"


def compare(size: Size, folder: Path, *, rounds: int, seaweedfs: bool) -> dict[str, float]:
    """MB/s, medians of ``rounds``: put and get, ours and the best bare one's.

    The bare get is also told for memory like a restore's: a third of it, the model's, is in use, and
    the optimizer's is new, which the kernel has to find and to clear first.
    """
    training = Training(size)
    training.step()
    found: dict[str, float] = {}
    with _fast_server(keep=False) as environment:
        found |= _puts(training, environment, rounds, "")
    with _fast_server(keep=True) as environment:
        found |= _gets(training, size, environment, rounds, "")
    if seaweedfs:
        with S3Server(folder / "seaweedfs", bucket=_BUCKET) as server:
            environment = _enter(server.environment())
            found |= _puts(training, environment, rounds, "_seaweedfs")
            found |= _gets(training, size, environment, rounds, "_seaweedfs")
    return found


def _puts(
    training: Training, environment: dict[str, str], rounds: int, which: str
) -> dict[str, float]:
    clients = BareClients(environment, _BUCKET)
    writer = Spotfirst(training, f"s3://{_BUCKET}/put{which}")
    memory = _copy_of(training)  # the same bytes: a server may compress what it can
    writer.save()  # imports, connections and memory; see the first save's time on disk
    ours: list[float] = []
    bare: dict[str, list[float]] = {}
    for _ in range(rounds):
        training.step()
        ours.append(writer.save())
        for name, took_s in clients.put_s(memory).items():
            bare.setdefault(name, []).append(took_s)
    best = min(bare, key=lambda name: _median(bare[name]))
    megabytes = training.state_bytes / 1e6
    print(
        f"s3 put{which}, MB/s: Spotfirst {megabytes / _median(ours):.0f}, "
        + ", ".join(f"{name} {megabytes / _median(took):.0f}" for name, took in bare.items()),
        file=sys.stderr,
    )
    return {
        f"put{which}": megabytes / _median(ours),
        f"put_best{which}": megabytes / _median(bare[best]),
    }


def _copy_of(training: Training) -> memoryview:
    target = warm(training.state_bytes).view[: training.state_bytes]
    end = 0
    for tensor in training.tensors():
        data = bytes_of(tensor)
        target[end : end + len(data)] = data
        end += len(data)
    return target


def _gets(
    training: Training, size: Size, environment: dict[str, str], rounds: int, which: str
) -> dict[str, float]:
    place = f"s3://{_BUCKET}/get{which}"
    Spotfirst(training, place).save()
    expected = fingerprint(training)
    run = Run(open_storage(place), "local")
    packs = run.packs()
    objects = [
        (f"get{which}/runs/local/packs/{name}", length)
        for name, length in packs.walk("")
        if not name.endswith(".json")
    ]
    total = sum(length for _, length in objects)
    memory = warm(total)
    clients = BareClients(environment, _BUCKET)
    _, newest = run.chain().refresh().commits[-1]
    manifest = read_manifest(packs, newest.manifest, newest.digest)
    assert isinstance(manifest, StateManifest)
    wanted = _all_of(manifest, memory.view)
    ours, bare, bare_new, fetched = [], [], [], []
    for _ in range(rounds):
        bare.append(clients.get_s(objects, memory.view))
        fetched.append(_fetch_s(packs, wanted))
        bare_new.append(clients.get_s(objects, _partly_new(total).view))
        built = Training(size)
        start = time.perf_counter()
        restore(built, place)
        ours.append(time.perf_counter() - start)
        if fingerprint(built) != expected:
            msg = "another state came back from S3 than was saved"
            raise RuntimeError(msg)
        del built
    return {
        f"get{which}": total / 1e6 / _median(ours),
        f"ranges{which}": total / 1e6 / _median(bare_new),
        f"ranges_warm{which}": total / 1e6 / _median(bare),
        f"fetch{which}": total / 1e6 / _median(fetched),
    }


def _all_of(manifest: StateManifest, memory: memoryview) -> list[Wanted]:
    """Every part of every array, side by side in ``memory``."""
    found: list[Wanted] = []
    end = 0
    for array in manifest.arrays:
        for region in array.regions:
            for part in region.parts:
                target = memory[end : end + part.size_bytes]
                found.append(Wanted(manifest.packs[part.pack].name, part, target))
                end += part.size_bytes
    return found


def _partly_new(size_bytes: int) -> Block:
    """Memory of which the first third was used before."""
    block = Block(size_bytes)
    used = size_bytes // 3
    block.view[:used] = bytes(used)
    return block


def _fetch_s(packs: Storage, wanted: Sequence[Wanted]) -> float:
    start = time.perf_counter()
    fetch(packs, wanted)
    return time.perf_counter() - start


@contextmanager
def _fast_server(*, keep: bool) -> Iterator[dict[str, str]]:
    words = [sys.executable, "-m", "benchmarks.checkpointing.s3server", *(["--keep"] * keep)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield _enter(
                {
                    "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{int(server.stdout.readline())}",
                    "AWS_ACCESS_KEY_ID": "nobody",
                    "AWS_SECRET_ACCESS_KEY": "nothing",
                    "AWS_DEFAULT_REGION": "us-east-1",
                    "AWS_EC2_METADATA_DISABLED": "true",
                }
            )
        finally:
            server.stdin.close()


def _enter(environment: dict[str, str]) -> dict[str, str]:
    os.environ.update(environment)
    return environment


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
