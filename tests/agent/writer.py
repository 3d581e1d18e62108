"""A script that writes files in the ways that scripts do, and refuses to begin with a torn one.

Every file holds one number, many times, or tells by itself that it is whole. ``TORCH=1`` saves with
torch itself.
"""

# ruff: noqa: T201, B905
from __future__ import annotations

import io
import itertools
import json
import mmap
import os
import pickle
import shutil
import sqlite3
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["SPOTFIRST_CHECKPOINT_DIR"])
WITH_TORCH = os.environ.get("TORCH") == "1"
NAMES = ("config.json", "model.safetensors", "optimizer.bin", "trainer_state.json")
problems: list[str] = []
if WITH_TORCH:
    import torch


def save(value: int, path: Path) -> None:
    if WITH_TORCH:
        torch.save({"model": torch.full((20_000,), value)}, path)
        return
    with path.open("wb", buffering=0) as file:
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr("data", b"%08d" % value * 5_000)
        for at in range(0, len(data.getvalue()), 10_000):
            file.write(data.getvalue()[at : at + 10_000])
            time.sleep(0.002)


def load(path: Path) -> int:
    if WITH_TORCH:
        values = torch.load(path)["model"]
        assert len(values) == 20_000
        assert bool((values == values[0]).all())
        return int(values[0])
    with zipfile.ZipFile(path) as archive:
        return one(archive.read("data"), 40_000)


def one(data: bytes, size: int) -> int:
    assert len(data) == size
    assert data == data[:8] * (size // 8)
    return int(data[:8])


def checked(name: str, look: Any) -> int:
    try:
        return int(look()) if (FOLDER / name).exists() else 0
    except Exception as error:  # noqa: BLE001 - whatever it is, the file is not whole
        problems.append(f"{name}: {type(error).__name__}: {error}")
        return 0


def look_at_database() -> int:
    database = sqlite3.connect(FOLDER / "study.db")
    assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    trials = database.execute("select count(*) from trials").fetchone()[0]
    assert database.execute("select count(*) from params").fetchone()[0] == 20 * trials
    database.close()
    return int(trials)


def look_at_rotation() -> int:
    found = sorted(FOLDER.glob("run/checkpoint-*"), key=lambda path: int(path.name[11:]))
    for folder in found:
        assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES), folder
        for name in NAMES:
            assert one((folder / name).read_bytes(), 16_000) == int(folder.name[11:])
    newest = int(found[-1].name[11:]) if found else 0
    by_time = sorted(found, key=lambda path: path.stat().st_mtime_ns)
    assert by_time == found, "the newest by time is another one"
    if (FOLDER / "run" / "last").is_symlink():
        assert (FOLDER / "run" / "last").exists(), "the link leads nowhere"
    return newest


def look_at_memory() -> int:
    data = (FOLDER / "rows.dat").read_bytes()
    assert len(data) == 64 * 4096
    return max(data[::4096])


def numbers(start: int) -> Any:
    return itertools.count(start + 1)


def save_in_place(start: int) -> None:
    for number in numbers(start):
        save(number, FOLDER / "ckpt.pt")
        time.sleep(0.05)


def dump(start: int) -> None:
    for number in numbers(start):
        with (FOLDER / "model.joblib").open("wb", buffering=0) as file:
            data = pickle.dumps([b"%08d" % number] * 1 + [b"%08d" % number * 3000])
            for at in range(0, len(data), 5000):
                file.write(data[at : at + 5000])
                time.sleep(0.003)
        time.sleep(0.08)


def replace(start: int) -> None:
    for number in numbers(start):
        partial = FOLDER / "state.json.tmp"
        partial.write_text(json.dumps({"number": number, "again": [number] * 3000}))
        partial.replace(FOLDER / "state.json")
        time.sleep(0.03)


def rotate(start: int) -> None:
    (FOLDER / "run").mkdir(exist_ok=True)
    for number in numbers(start):
        folder = FOLDER / "run" / f"checkpoint-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in NAMES:
            with (folder / name).open("wb", buffering=0) as file:
                for _ in range(4):
                    file.write(b"%08d" % number * 500)
                    time.sleep(0.02)
        link = FOLDER / "run" / ".last"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.replace(FOLDER / "run" / "last")
        for old in range(max(1, number - 6), number - 1):
            shutil.rmtree(FOLDER / "run" / f"checkpoint-{old}", ignore_errors=True)
        time.sleep(0.3)


def study(start: int) -> None:
    database = sqlite3.connect(FOLDER / "study.db")
    database.execute("pragma cache_size=3")
    database.execute("create table if not exists trials (number integer)")
    database.execute("create table if not exists params (number integer, text text)")
    database.commit()
    for number in numbers(start):
        database.execute("insert into trials values (?)", (number,))
        for _ in range(20):
            database.execute("insert into params values (?, ?)", (number, "x" * 700))
            time.sleep(0.001)
        database.commit()


def log(_: int) -> None:
    with (FOLDER / "metrics.csv").open("a" if os.environ.get("APPEND") else "w") as file:
        for number in itertools.count():
            print(f"{number},0.5", file=file, flush=True)
            time.sleep(0.02)


def remember(start: int) -> None:
    path = FOLDER / "rows.dat"
    if not path.exists():
        path.write_bytes(bytes(64 * 4096))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        for number in numbers(start):
            mapped[number % 64 * 4096] = number % 256
            time.sleep(0.01)


def look_at_json() -> int:
    data = json.loads((FOLDER / "state.json").read_text())
    assert data["again"] == [data["number"]] * 3000
    return int(data["number"])


def look_at_dump() -> int:
    head, body = pickle.loads((FOLDER / "model.joblib").read_bytes())
    assert body == head * 3000
    return int(head)


def look_at_log() -> int:
    lines = (FOLDER / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [str(n) for n in range(len(lines))]
    return len(lines)


LOOKS = {
    "ckpt.pt": lambda: load(FOLDER / "ckpt.pt"),
    "model.joblib": look_at_dump,
    "state.json": look_at_json,
    "study.db": look_at_database,
    "rows.dat": look_at_memory,
    "metrics.csv": look_at_log,
    "run": look_at_rotation,
}
WRITERS = (save_in_place, dump, replace, study, remember, log, rotate)
found = [checked(name, look) for name, look in LOOKS.items()]
print("FOUND", json.dumps(dict(zip(LOOKS, found))), flush=True)
if problems:
    print("TORN", *problems, sep="\n", flush=True)
    sys.exit(3)
for writer, start in zip(WRITERS, found):
    threading.Thread(target=writer, args=(start,)).start()
print("RUNNING", flush=True)
