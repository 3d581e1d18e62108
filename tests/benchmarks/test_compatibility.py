"""The benchmark of compatibility: it sees what it has to see, and a lost result does not pass."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.compatibility.comparing import difference, result_line
from benchmarks.compatibility.driving import MOMENTS, moments, plain, play
from benchmarks.compatibility.programs import Program, load, ours
from benchmarks.compatibility.watching import Watch, digest
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]


def program(folder: Path, script: str, **wishes: object) -> Program:
    """A shell script as a program in files mode, whose result is a file."""
    folder.mkdir()
    (folder / "script.sh").write_text(script)
    words = {
        "title": "a script",
        "mode": "files",
        "command": ["sh", "script.sh"],
        "result": ["result"],
    }
    (folder / "program.yaml").write_text(json.dumps(words | {"period_s": 0.3} | wishes))
    return load(folder)


def test_each_of_our_programs_has_its_code_and_names_what_it_needs() -> None:
    found = ours()
    assert len(found) >= 10
    for each in found:
        words = set(" ".join(each.command).split())
        assert any((each.code_folder / word).is_file() for word in words), each.name
        assert each.mode == "files" or each.changes != "none", each.name


@pytest.mark.parametrize("seed", range(5))
def test_half_of_the_moments_have_a_notice_and_all_kinds_occur(seed: int) -> None:
    found = moments(20, seed)
    assert sum(moment.notice for moment in found) == 10
    kinds = Counter(moment.kind for moment in found)
    assert set(kinds) == set(MOMENTS)
    assert found == moments(20, seed)


def test_versions_are_noted_when_a_file_is_closed_or_moved_into_place(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    (tmp_path / "sub").mkdir()
    wait_until(lambda: tmp_path / "sub" in watch.folders.values(), "the folder to be watched")
    with (tmp_path / "sub" / "whole").open("w") as file:
        file.write("half")
        file.flush()
        torn = digest(tmp_path / "sub" / "whole")
        file.write(" and half")
    (tmp_path / "partial").write_text("moved")
    (tmp_path / "partial").rename(tmp_path / "moved")
    (tmp_path / "linked").hardlink_to(tmp_path / "moved")
    wait_until(lambda: "linked" in watch.versions, "the second name")
    wait_until(lambda: "moved" in watch.versions and "sub/whole" in watch.versions, "the versions")
    watch.close()
    assert watch.versions["sub/whole"] == {digest(tmp_path / "sub" / "whole")} != {torn}


def test_tensors_are_compared_bit_for_bit_and_only_under_the_keys_that_are_named(
    tmp_path: Path,
) -> None:
    one = program(tmp_path / "p", "true", result=["x.pt"], compare="tensors", keys=["w"])
    for name, value, path in (("a", 1.0, "here"), ("b", 1.0, "there"), ("c", 1.0000001, "here")):
        (tmp_path / name).mkdir()
        torch.save({"w": {"m": torch.tensor([value])}, "path": path}, tmp_path / name / "x.pt")
    assert difference(one, tmp_path / "a", tmp_path / "b") == ""
    assert difference(one, tmp_path / "a", tmp_path / "c") == "x.pt differs"
    assert difference(one, tmp_path / "a", tmp_path) == "there is no x.pt"


def test_the_result_is_the_last_line_that_begins_like_it(tmp_path: Path) -> None:
    one = program(tmp_path / "p", "true", mode="lines", result=["weights "], changes="lines")
    (tmp_path / "log").write_text("weights 1\nloss 3\nweights 2\n[spotfirst] ended\n")
    assert result_line(one, tmp_path / "log") == "weights 2"
    assert result_line(one, tmp_path / "none") == ""


COUNTS = """
cd "$SPOTFIRST_CHECKPOINT_DIR"
n=$(cat count 2>/dev/null || echo 0)
while [ "$n" -lt 25 ]; do
    n=$((n + 1)); sleep 0.2
    echo "$n" > partial; mv partial count
done
RESULT
sleep 0.3
"""


def test_a_program_that_goes_on_from_its_files_is_equal_and_one_that_notes_its_restarts_is_not(
    tmp_path: Path,
) -> None:
    good = program(tmp_path / "good", COUNTS.replace("RESULT", "cp count result"))
    bad = program(tmp_path / "bad", COUNTS.replace("RESULT", 'echo "$SPOTFIRST_ATTEMPT" > result'))
    wrong = {}
    for each in (good, bad):
        alone = tmp_path / "alone" / each.name
        alone_s = plain(each, alone)
        plan = moments(2, seed=3)[:1]
        outcome = play(each, plan, tmp_path / "run" / each.name, alone=alone, alone_s=alone_s)
        assert outcome.done == plan, outcome.story
        assert not outcome.refused
        wrong[each.name] = outcome.wrong
    assert wrong == {"good": "", "bad": "result differs"}


def test_a_program_whose_packages_are_missing_is_not_run(tmp_path: Path) -> None:
    program(tmp_path / "p", "true", needs=["a_package_that_is_not_there"])
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.compatibility", "--program", str(tmp_path / "p")],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 1
    last = json.loads(told.stdout.splitlines()[-1])
    assert last["not_run"] == 1
    assert "a_package_that_is_not_there" in last["programs"]["p"]["why"]
