"""The example training script: alone, interrupted, and on new files only."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

import pytest

from spotfirst import datasets
from spotfirst.channel import Channel, Drain
from spotfirst.datasets import SampleOrder
from spotfirst.run import Run, create_run
from spotfirst.spec import ResumeFrom, RunSpec
from spotfirst.storage import Storage, open_storage
from tests.datasets.helpers import fill
from tests.waiting import PATIENCE_S

pytest.importorskip("torch")

SCRIPT = Path(__file__).parents[2] / "dags/training/gpt/train.py"
TINY = ("--batch", "2", "--context", "8", "--layers", "1", "--width", "16", "--log-every", "1")
STEPS = 300


def _start(steps: int, corpus: Path, **variables: object) -> subprocess.Popen[str]:
    clean = {name: v for name, v in os.environ.items() if not name.startswith("SPOTFIRST_")}
    # The same weights whatever accelerator this machine has.
    mine = {"SPOTFIRST_DATASET_DIR": corpus, "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--steps", str(steps), *TINY],
        env={**clean, **{name: str(value) for name, value in mine.items()}},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    return output


def _weights(output: str) -> str:
    found = re.search(r"^weights ([0-9a-f]{64})", output, re.MULTILINE)
    assert found, output
    return found[1]


def _attempt(
    run: Run, number: int, folder: Path, corpus: Path, steps: int
) -> tuple[Channel, subprocess.Popen[str]]:
    """Start the script as an agent would."""
    channel = folder / f"channel-{run.run_id}-{number}"
    channel.mkdir()
    process = _start(
        steps, corpus, SPOTFIRST_STORAGE=run.root.url, SPOTFIRST_RUN=run.run_id,
        SPOTFIRST_ATTEMPT=number, SPOTFIRST_CHANNEL=channel,
    )  # fmt: skip
    return Channel(channel), process


def _run(storage: Storage, name: str, resume_from: ResumeFrom | None = None) -> Run:
    now = datetime.now(timezone.utc)
    spec = RunSpec(run_id=name, created_at=now, command=("train",), resume_from=resume_from)
    return create_run(storage, spec)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = Path(SCRIPT).read_bytes()
    return fill(tmp_path_factory.mktemp("corpus"), {"a.py": text, "b/c.py": text[::-1]})


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path) -> str:
    """The output of a training that ran alone, without Spotfirst's environment."""
    return _finish(_start(STEPS, corpus))


def test_alone_it_trains_and_learns(uninterrupted: str) -> None:
    losses = [float(loss) for loss in re.findall(r" loss ([\d.]+|nan|inf)", uninterrupted)]
    assert len(losses) == STEPS
    assert sum(losses[-20:]) / 20 < losses[0] - 1
    assert "val_loss" in uninterrupted


def test_interrupted_it_ends_with_the_same_weights_bit_for_bit(
    tmp_path: Path, corpus: Path, uninterrupted: str
) -> None:
    run = _run(open_storage(str(tmp_path / "storage")), "run")
    channel, first = _attempt(run, 1, tmp_path, corpus, STEPS)
    while (channel.progress() is None or not channel.progress().step) and first.poll() is None:  # type: ignore[union-attr]
        time.sleep(0.01)
    channel.ask_to_drain(Drain(reason="the test takes the instance back"))
    _finish(first)
    told = channel.progress()
    assert told is not None
    assert told.released
    assert 0 < (told.step or 0) < STEPS

    _, second = _attempt(run, 2, tmp_path, corpus, STEPS)
    output = _finish(second)

    assert f"step {told.step}/{STEPS}" not in output  # went on behind it
    assert _weights(output) == _weights(uninterrupted)


def test_a_second_training_starts_from_the_first_one_and_sees_only_new_files(
    tmp_path: Path,
) -> None:
    storage = open_storage(str(tmp_path / "storage"))
    text = Path(SCRIPT).read_bytes()
    datasets.commit(storage, "d", fill(tmp_path / "in", {"a": text}))
    datasets.commit(storage, "d", fill(tmp_path / "in", {"new": text[:3000]}))

    def train(name: str, ref: datasets.DatasetRef, steps: int, start: ResumeFrom | None) -> Run:
        datasets.sync(storage, ref, tmp_path / name, tmp_path / "cache")
        run = _run(storage, name, start)
        _finish(_attempt(run, 1, tmp_path, tmp_path / name, steps)[1])
        return run

    first = train("first", datasets.resolve(storage, "d@1"), 5, None)
    seq, commit = first.chain().refresh().commits[-1]
    start = ResumeFrom(run_id="first", step=commit.step, seq=seq)
    second = train("second", datasets.resolve(storage, "d@2", since=1), 8, start)

    progress = Channel(tmp_path / "channel-second-1").progress()
    assert progress is not None
    assert (progress.start_step, progress.step) == (5, 8)
    assert progress.metrics["corpus_bytes"] == 3000
    assert second.chain().refresh().commits[-1][1].metrics["corpus_files"] == 1


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_text_that_is_too_short_is_refused_with_what_to_do(script: ModuleType) -> None:
    import torch

    with pytest.raises(SystemExit, match="smaller --context"):
        script.split(torch.zeros(10, dtype=torch.uint8), 8)


def test_no_window_is_both_trained_on_and_held_out(script: ModuleType) -> None:
    import torch

    training, held_out = script.split(torch.arange(200, dtype=torch.uint8), 8)
    assert training[:, :-1].max() < held_out[:, :-1].min()
    assert len(SampleOrder(len(training), 0).take(0, len(training))) == 23


def test_the_standard_library_is_its_text_when_there_is_no_dataset(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPOTFIRST_DATASET_DIR", raising=False)
    corpus, files = script.read_corpus()
    assert 1_000_000 < len(corpus) < 6_000_000
    assert files > 20
