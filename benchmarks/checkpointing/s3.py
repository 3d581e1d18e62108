"""Checkpoints in S3, beside the best bare clients: on a server that costs nothing, and on SeaweedFS."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.checkpointing.clock import Clock, Took, medians
from benchmarks.checkpointing.limits import own_memory, partly_new, warm
from benchmarks.checkpointing.restoring import fingerprint, restore
from benchmarks.checkpointing.s3clients import LEAST, BareClients
from benchmarks.checkpointing.training import Size, Training
from benchmarks.checkpointing.writers import Spotfirst
from devstack.s3 import S3Server
from spotfirst.checkpoints.manifest import StateManifest, read_manifest
from spotfirst.checkpoints.packs import Wanted, fetch
from spotfirst.checkpoints.tensors import bytes_of
from spotfirst.run import Run
from spotfirst.storage import open_storage

__all__ = ["compare"]

_BUCKET = "spotfirst"


def compare(size: Size, folder: Path, *, rounds: int, seaweedfs: bool) -> dict[str, float]:
    """MB/s, medians of ``rounds``: put and get, ours and the best bare one's.

    The bare get is also told for memory like a restore's (:func:`partly_new`). Keys with ``busy_``:
    the share of all cores that client and server used meanwhile.
    """
    training = Training(size)
    training.step()
    found: dict[str, float] = {}
    with _fast_server(keep=False) as server:
        found |= _puts(training, server, rounds, "")
    with _fast_server(keep=True) as server:
        found |= _gets(training, size, server, rounds, "")
    if seaweedfs:
        with S3Server(folder / "seaweedfs", bucket=_BUCKET) as weed:
            assert weed.pid is not None
            server = _Server(_enter(weed.environment()), Clock(weed.pid))
            found |= _puts(training, server, rounds, "_seaweedfs")
            found |= _gets(training, size, server, rounds, "_seaweedfs")
    return found


class _Server(NamedTuple):
    environment: dict[str, str]
    clock: Clock


def _puts(training: Training, server: _Server, rounds: int, which: str) -> dict[str, float]:
    clients = BareClients(server.environment, _BUCKET, server.clock)
    # Nothing is removed meanwhile, as of the others.
    writer = Spotfirst(training, f"s3://{_BUCKET}/put{which}", keep=rounds + 1)
    memory = _copy_of(training)  # the same bytes: a server may compress what it can
    writer.save()  # imports, connections and memory; see the first save's time on disk
    took: dict[str, list[Took]] = {"Spotfirst": []}
    for _ in range(rounds):
        training.step()
        took["Spotfirst"].append(server.clock(writer.save))
        for name, each in clients.put(memory).items():
            took.setdefault(name, []).append(each)
    found = _told(f"put{which}", took, training.state_bytes)
    ours = found.pop("Spotfirst")
    least = found.pop(LEAST)
    best = min(found.values(), key=lambda each: each.wall_s)
    return _figures(
        training.state_bytes,
        {f"put{which}": ours, f"put_best{which}": best, f"put_least{which}": least},
    )


def _told(what: str, took: dict[str, list[Took]], size_bytes: int) -> dict[str, Took]:
    """The medians; each told on stderr with the processor's part in it."""
    found = {name: medians(values) for name, values in took.items()}
    for name, each in found.items():
        print(
            f"s3 {what}: {name} {size_bytes / 1e6 / each.wall_s:.0f} MB/s, {each.wall_s:.2f} s; "
            f"processor {each.here_s:.2f} s here and {each.server_s:.2f} s in the server, "
            f"{each.busy_share:.0%} of all cores",
            file=sys.stderr,
        )
    return found


def _figures(size_bytes: int, found: dict[str, Took]) -> dict[str, float]:
    rates = {name: size_bytes / 1e6 / each.wall_s for name, each in found.items()}
    return rates | {f"busy_{name}": each.busy_share for name, each in found.items()}


def _copy_of(training: Training) -> memoryview:
    target = warm(training.state_bytes).view[: training.state_bytes]
    end = 0
    for tensor in training.tensors():
        data = bytes_of(tensor)
        target[end : end + len(data)] = data
        end += len(data)
    return target


def _gets(
    training: Training, size: Size, server: _Server, rounds: int, which: str
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
    clients = BareClients(server.environment, _BUCKET, server.clock)
    _, newest = run.chain().refresh().commits[-1]
    manifest = read_manifest(packs, newest.manifest, newest.digest)
    assert isinstance(manifest, StateManifest)
    wanted = _all_of(manifest, memory.view)

    def whole() -> Took:
        built = Training(size)
        own_memory(total)
        took = server.clock(lambda: restore(built, place))
        if fingerprint(built) != expected:
            msg = "another state came back from S3 than was saved"
            raise RuntimeError(msg)
        return took

    ways: dict[str, Callable[[], Took]] = {
        "ranges_warm": lambda: clients.get(objects, memory.view),
        "fetch": lambda: server.clock(lambda: fetch(packs, wanted)),
        "ranges": lambda: clients.get(objects, partly_new(total).view),
        "ranges_hashed": lambda: clients.get(objects, partly_new(total).view, hashed=True),
        "get": whole,
    }
    took: dict[str, list[Took]] = {f"{name}{which}": [] for name in ways}
    for number in range(rounds):
        # There and back, so that nobody always comes after the same one.
        for name in list(ways)[:: -1 if number % 2 else 1]:
            took[f"{name}{which}"].append(ways[name]())
    return _figures(total, _told("gets", took, total))


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


@contextmanager
def _fast_server(*, keep: bool) -> Iterator[_Server]:
    words = [sys.executable, "-m", "benchmarks.checkpointing.s3server", *(["--keep"] * keep)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            port = int(server.stdout.readline())
            environment = {
                "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "nobody",
                "AWS_SECRET_ACCESS_KEY": "nothing",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
            yield _Server(_enter(environment), Clock(server.pid))
        finally:
            server.stdin.close()


def _enter(environment: dict[str, str]) -> dict[str, str]:
    os.environ.update(environment)
    return environment
