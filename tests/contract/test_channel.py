"""The agent and the trainer hear each other, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from spotfirst.channel import CHANNEL_VARIABLE, Channel, Drain
from spotfirst.heartbeat import Progress


def test_each_side_hears_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHANNEL_VARIABLE, str(tmp_path))
    agent, trainer = Channel(tmp_path), Channel.from_environment()
    assert trainer is not None
    assert agent.progress() is None
    assert trainer.drain() is None
    assert trainer.tell(Progress(step=3, metrics={"loss": float("nan")}))
    assert trainer.tell(Progress(step=4))
    agent.ask_to_drain(Drain(reason="notice"))
    agent.ask_to_drain(Drain(reason="another"))
    progress, drain = agent.progress(), trainer.drain()
    assert progress is not None
    assert progress.step == 4
    assert drain is not None
    assert drain.reason == "notice"


def test_outside_of_an_attempt_there_is_no_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CHANNEL_VARIABLE, raising=False)
    assert Channel.from_environment() is None


def test_rubbish_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_bytes(b"{")
    (tmp_path / "drain.json").write_bytes(b"\xff")
    assert Channel(tmp_path).progress() is None
    assert Channel(tmp_path).drain() is None


def test_training_goes_on_when_progress_cannot_be_told(tmp_path: Path) -> None:
    assert not Channel(tmp_path / "gone").tell(Progress(step=1))


def test_telling_leaves_one_file(tmp_path: Path) -> None:
    for step in range(5):
        Channel(tmp_path).tell(Progress(step=step))
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]
