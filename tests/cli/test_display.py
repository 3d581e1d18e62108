"""What a glance looks like where there is no terminal."""

from __future__ import annotations

import io
from datetime import datetime, timedelta, timezone
from decimal import Decimal

from rich.console import Console

from spotfirst import events as e
from spotfirst.heartbeat import Heartbeat, Progress
from spotfirst.market import Market, Notice, Pool
from spotfirst.spec import RunSpec
from spotfirst.state import fold
from spotfirst_airflow.cli.display import Display
from spotfirst_airflow.cli.watching import Glance, News

NOW = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
LAUNCHING = e.Launching(
    at=NOW, attempt=1, token="t", market=Market.SPOT,
    pool=Pool(instance_type="g6.xlarge", zone="local-a"), reason="spot first",
)  # fmt: skip
SPEC = RunSpec(run_id="r", created_at=NOW, command=("true",), deadline=NOW + timedelta(minutes=10))


def glance(**changes: object) -> Glance:
    beat = Heartbeat(
        attempt=1, beat=1, at=NOW, phase="training",
        progress=Progress(step=40, total_steps=100, metrics={"loss": 2.5}),
        notice=Notice(kind="interruption", seen_at=NOW, time=NOW + timedelta(seconds=90)),
    )  # fmt: skip
    fields: dict[str, object] = {
        "state": fold([e.Created(at=NOW), LAUNCHING]),
        "spec": SPEC,
        "at": NOW,
        "cost_usd": Decimal("0.1234"),
        "beat": beat,
    }
    return Glance(**{**fields, **changes})  # type: ignore[arg-type]


def shown(*glances: Glance, quiet: bool = False) -> list[str]:
    file = io.StringIO()
    with Display(Console(file=file, width=200), quiet=quiet) as display:
        for each in glances:
            display.show(each)
    return file.getvalue().splitlines()


def test_the_progress_names_step_loss_attempt_cost_deadline_and_notice() -> None:
    [line] = shown(glance())
    assert line == (
        "12:00:00  step 40/100 · loss 2.5000 · attempt 1 spot g6.xlarge local-a · "
        "instance goes in 90 s · $0.1234 · 10 min to the deadline"
    )


def test_progress_is_told_now_and_then_and_news_at_once() -> None:
    later = glance(at=NOW + timedelta(seconds=3), cost_usd=Decimal("0.2"))
    news = (News(event=LAUNCHING, text="attempt 1: launching"),)
    lines = shown(glance(), later, glance(at=later.at, news=news))
    assert len(lines) == 2
    assert lines[1] == "12:00:00  attempt 1: launching"


def test_output_is_shown_as_it_is_and_not_when_quiet() -> None:
    talking = glance(lines=((1, "loss [red]= 3[/red]"),))
    assert "[1] loss [red]= 3[/red]" in shown(talking)
    assert not any("loss [red]" in line for line in shown(talking, quiet=True))
