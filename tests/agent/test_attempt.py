"""The agent as an instance runs it."""

from __future__ import annotations


def test_a_command_that_exits_with_0_has_completed(lab) -> None:
    instance = lab.start(lab.create(env={"STEPS": "5"}))
    report = instance.exit()
    print(lab.output())
    assert (report.cause, report.exit_code) == ("completed", 0)
    print(report, instance.beat(), instance.log())
    assert 0
