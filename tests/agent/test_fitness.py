"""An agent that cannot work on its instance says why, in one sentence, and is not tried again."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from spotfirst.agent.fitness import UNFIT, environment_problem
from spotfirst.errors import CorruptObject
from tests.waiting import PATIENCE_S

from .conftest import Lab


def shadow(folder: Path, module: str, source: str) -> str:
    """A folder for PYTHONPATH, with a module in the place of an installed one."""
    folder.mkdir()
    (folder / f"{module}.py").write_text(source)
    return str(folder)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise ImportError('GLIBC_2.38 not found')", "ImportError: GLIBC_2.38 not found"),
        ("def (", "SyntaxError: "),
    ],
)
def test_an_agent_that_cannot_be_imported_leaves_the_reason(
    lab: Lab, tmp_path: Path, source: str, sentence: str
) -> None:
    path = shadow(tmp_path / "broken", "blake3", source)
    instance = lab.start(lab.shell("echo trained"), PYTHONPATH=path)
    assert instance.process.wait(PATIENCE_S) == UNFIT
    reason = (lab.work / "unfit.txt").read_text()
    assert "the agent cannot work with this image (Python 3." in reason
    assert sentence in reason
    assert "\n" not in reason


def test_a_spec_that_cannot_be_read_is_no_reason_for_another_instance(lab: Lab) -> None:
    instance = lab.start(lab.shell("true"), SPOTFIRST_RUN="another")
    assert instance.process.wait(PATIENCE_S) == UNFIT
    assert "there is no run 'another'" in (lab.work / "unfit.txt").read_text()


def test_a_function_that_this_python_lacks_ends_the_run_not_the_instance_alone(
    lab: Lab, tmp_path: Path
) -> None:
    # As on a Python whose tarfile is older than the code that unpacks expects.
    source = "import tarfile\ndel tarfile.TarFile.extractfile\n"
    path = shadow(tmp_path / "older", "sitecustomize", source)
    report = lab.start(lab.create(), PYTHONPATH=path).exit()
    assert report.cause == "unfit"
    assert "AttributeError: 'TarFile' object has no attribute 'extractfile'" in report.message


def test_what_may_pass_is_left_to_another_instance() -> None:
    assert environment_problem(ConnectionResetError("by peer")) == ""
    assert environment_problem(OSError(errno.EIO, "the disk broke")) == ""
    assert environment_problem(MemoryError()) == ""


def test_what_does_not_pass_ends_the_run() -> None:
    assert "no space" in environment_problem(OSError(errno.ENOSPC, "no space"))
    assert "NotImplementedError" in environment_problem(NotImplementedError("here"))
    assert "damaged" in environment_problem(CorruptObject("damaged"))
