"""Every object of a storage: who writes it, and how. docs/security.md has a row for each."""

from __future__ import annotations

from typing import Literal, NamedTuple

Writer = Literal["controllers", "instances", "both"]


class Kind(NamedTuple):
    """``once``: nobody ever replaces it. ``removable``: instances may delete it."""

    name: str
    example: str
    writer: Writer
    once: bool = False
    removable: bool = False


OBJECTS = (
    Kind("control/runs/{run}/spec.json", "control/runs/r/spec.json", "controllers", once=True),
    Kind("control/runs/{run}/amendments/{n}.json", "control/runs/r/amendments/00000001.json", "controllers", once=True),
    Kind("control/runs/{run}/journal/{n}.json", "control/runs/r/journal/00000001.json", "controllers", once=True),
    Kind("control/runs/{run}/pins/{seq}-{nonce}.json", "control/runs/r/pins/00000001-0123456789abcdef.json", "controllers", once=True),
    Kind("runs/{run}/attempts/{n}/agent.json", "runs/r/attempts/1/agent.json", "instances", once=True),
    Kind("runs/{run}/attempts/{n}/heartbeat.json", "runs/r/attempts/1/heartbeat.json", "instances"),
    Kind("runs/{run}/attempts/{n}/handover.json", "runs/r/attempts/1/handover.json", "both", once=True),
    Kind("runs/{run}/attempts/{n}/exit.json", "runs/r/attempts/1/exit.json", "instances", once=True),
    Kind("runs/{run}/attempts/{n}/log/{n}", "runs/r/attempts/1/log/00000001", "instances", once=True),
    Kind("runs/{run}/checkpoints/{n}.json", "runs/r/checkpoints/00000001.json", "instances", once=True),
    Kind("runs/{run}/packs/{claim}/{save}", "runs/r/packs/00000001/000001.pack", "instances", removable=True),
    Kind("code/{digest}.tar.gz", f"code/{'a' * 64}.tar.gz", "controllers"),
    Kind("datasets/{name}/versions/{n}.json", "datasets/corpus/versions/00000001.json", "controllers"),
    Kind("datasets/{name}/manifests/{digest}.parquet", f"datasets/corpus/manifests/{'a' * 64}.parquet", "controllers"),
    Kind("datasets/{name}/objects/{digest}", f"datasets/corpus/objects/aa/{'a' * 64}", "controllers"),
    Kind("datasets/{name}/root.json", "datasets/corpus/root.json", "controllers"),
    Kind("wheelhouse/{key}.json", "wheelhouse/0123456789abcdef0123-cp312.json", "controllers"),
    Kind("wheelhouse/{key}/{wheel}", "wheelhouse/0123456789abcdef0123-cp312/a.whl", "controllers"),
    Kind("probe/{nonce}", "probe/0123456789abcdef", "controllers"),
)  # fmt: skip
