"""A disk of the machine as the first tier: it survives the process, and never leads astray."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from spotfirst.context import TrainerContext
from spotfirst.errors import StorageDenied
from spotfirst.run import Run
from spotfirst.storage import Storage, open_storage
from tests.checkpointing.storages import faulty
from tests.checkpointing.training import STEPS, Trainer, uninterrupted


def refusing(storage: Storage) -> Storage:
    """It takes the chain's claims and no packs: nothing is ever committed there."""

    def before(verb: str, path: str) -> None:
        if verb == "write_from":
            msg = f"may not {verb} {path}"
            raise StorageDenied(msg, path=path, lasting=True)

    return faulty(storage, before=before)


def context(storage: Storage) -> TrainerContext:
    return TrainerContext(Run(storage, "local"), None)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def start_steps(storage: Storage, disk: Path | None, steps: int = STEPS) -> tuple[int, str]:
    trainer = Trainer(context(storage), period_s=0, local=str(disk) if disk else None)
    seen: list[int] = []
    digest = trainer.train(steps, at_step=seen.append)
    return (seen[0] if seen else steps), digest


def crash_after(storage: Storage, disk: Path, steps: int) -> None:
    """Train; the storage gets nothing, the disk everything."""
    trainer = Trainer(context(refusing(storage)), period_s=0, local=str(disk))
    first = trainer.checkpointer.restore()
    for step in range(first, steps):
        trainer.train_one_step()
        trainer.checkpointer.step(step + 1)
        with pytest.raises(StorageDenied):
            trainer.checkpointer.save()


def test_a_restarted_process_goes_on_from_the_disk_when_the_storage_lacks_the_checkpoint(
    storage: Storage, disk: Path
) -> None:
    crash_after(storage, disk, 4)
    assert Run(storage, "local").chain().refresh().newest() is None
    assert start_steps(storage, disk) == (4, uninterrupted())


def test_another_machine_goes_on_from_the_storage(storage: Storage, disk: Path) -> None:
    start_steps(storage, None, 3)
    crash_after(storage, disk, 6)
    assert start_steps(storage, None) == (3, uninterrupted())


def test_a_disk_that_was_left_behind_is_not_gone_back_to(storage: Storage, disk: Path) -> None:
    crash_after(storage, disk, 4)
    start_steps(storage, None, 6)  # elsewhere, from nothing: the run's state is there now
    crash_after(storage, disk, 6)
    assert start_steps(storage, disk) == (6, uninterrupted())


def test_a_damaged_disk_is_passed_over(storage: Storage, disk: Path) -> None:
    start_steps(storage, disk, 4)
    for pack in (disk / "runs" / "local" / "packs").rglob("*-*-*"):
        pack.write_bytes(b"x" * pack.stat().st_size)
    assert start_steps(storage, disk) == (4, uninterrupted())


def test_a_disk_that_cannot_be_used_costs_the_disk_and_not_the_training(
    storage: Storage, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert start_steps(storage, tmp_path / "file")[1] == uninterrupted()


def test_the_disk_keeps_one_checkpoint(storage: Storage, disk: Path) -> None:
    start_steps(storage, disk)
    chain = Run(open_storage(str(disk)), "local").chain().refresh()
    assert [commit.step for _, commit in chain.commits] == [STEPS]
    shutil.rmtree(disk)
    assert start_steps(storage, disk)[1] == uninterrupted()
