"""The same agent against a real S3 server."""

from __future__ import annotations

from spotfirst.storage import open_storage

from .conftest import Lab


def test_an_attempt_on_s3_hands_over_to_the_next(lab: Lab, s3_url: str) -> None:
    run = lab.create(storage=open_storage(s3_url), env={"STEPS": "5000"})
    first = lab.start(run)
    first.until_step(5)
    second = lab.start(run, attempt=2)
    report = first.exit()
    assert (report.cause, report.progress.checkpoint_step) == ("handed_over", report.progress.step)
    second.until_step((report.progress.step or 0) + 5)
    second.hand_over()
    assert second.exit().progress.start_step == report.progress.step
    assert "step 5\n" in first.log()
