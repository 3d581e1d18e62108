"""A checkpoint with which a script crashes at once is not the end of its run."""

from __future__ import annotations

from spotfirst.state import Phase
from tests.endtoend.driving import Place, driving

SCRIPT = """
cd "$SPOTFIRST_CHECKPOINT_DIR"
case "$(cat state 2>/dev/null)" in
broken) echo "cannot read the state"; exit 3;;
whole) echo done > result; exit 0;;
esac
echo whole > state
while [ ! -e "$E2E_FOLDER/go" ]; do sleep 0.1; done
echo broken > state
sleep 1000
"""


def test_a_script_that_cannot_read_its_newest_files_gets_those_before(place: Place) -> None:
    request = place.request(
        code="unmodified.py", command=("sh", "-c", SCRIPT), checkpoint_mode="files",
        checkpoint_period_s=0.3,
    )  # fmt: skip
    with driving(place, request) as drive:
        drive.until(lambda: len(drive.run.chain().refresh().commits) == 1)
        (place.folder / "go").touch()
        drive.until(lambda: len(drive.run.chain().refresh().commits) == 2)
        drive.interrupt(1, notice=False)
        state = drive.until_over()
        assert state.phase is Phase.SUCCEEDED, drive.story()
        assert drive.causes() == ["interrupted", "script_failed", "completed"], drive.story()
        assert any("BEFORE" in warning for warning in state.warnings)
        report = drive.run.exit_report(3)
        assert report is not None
        assert any("GOING BACK" in warning for warning in report.progress.warnings)
