"""What others wrote is shown on a terminal, and is never a command to it."""

from __future__ import annotations

import io
import json
import logging
import unicodedata
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from spotfirst import events as e
from spotfirst.heartbeat import Heartbeat, Progress
from spotfirst.market import Market, Pool
from spotfirst.run import create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from spotfirst.wire import utc_now
from spotfirst_airflow.cli import app
from spotfirst_airflow.cli._common import print_json, tell_broken
from spotfirst_airflow.cli.terminal import PlainConsole, PlainFormatter, indented, plain, plain_json
from spotfirst_airflow.reading import Unreadable

TITLE = "\x1b]0;stolen\x07"
CLIPBOARD = "\x1b]52;c;cm0gLXJm\x1b\\"
UP = "\x1b[2A\x1b[2K"
C1 = "\x9b2J"
BACKWARDS = "\u202eetanimret"
HOSTILE = f"{TITLE}{CLIPBOARD}{UP}{C1}{BACKWARDS}\x7f\x08\x00"


def _commands(text: str) -> set[str]:
    """The characters in it that a terminal may act on, but for lines and tabs."""
    return {
        c
        for c in text
        if c not in "\n\t"
        and (unicodedata.category(c) in {"Cc", "Zl", "Zp"} or c in "\u202a\u202b\u202c\u202d\u202e")
    }


@given(st.text())
def test_no_text_keeps_a_command(text: str) -> None:
    assert not _commands(plain(text))


@given(st.dictionaries(st.text(), st.text()))
def test_json_means_what_it_meant(value: dict[str, str]) -> None:
    shown = plain_json(json.dumps(value, ensure_ascii=False))
    assert json.loads(shown) == value
    assert not _commands(shown)


def test_colours_are_left_out_and_the_words_stay() -> None:
    assert plain("\x1b[1;32mloss\x1b[0m 0.5\té") == "loss 0.5\té"


def test_the_consoles_own_styles_still_reach_the_terminal() -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=True, color_system="standard", width=80)
    table = Table()
    table.add_column("run")
    table.add_row(Text(HOSTILE))
    console.print(table)
    console.print(Text(HOSTILE, style="red"), HOSTILE, soft_wrap=True)
    text = file.getvalue()
    assert "\x1b[31m" in text
    for command in (TITLE, CLIPBOARD, UP, C1, BACKWARDS):
        assert command not in text


def test_a_log_message_is_plain() -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 0, "run %s", (HOSTILE,), None)
    assert not _commands(PlainFormatter("%(message)s").format(record))


def test_further_lines_of_a_message_cannot_pass_for_others() -> None:
    assert indented("x\n12:00:00  run succeeded") == "x\n    12:00:00  run succeeded"


def test_errors_and_json_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    tell_broken([Unreadable(run_id="r", url="/s", error=HOSTILE)])
    print_json({"found": HOSTILE})
    told = capsys.readouterr()
    assert not _commands(told.err)
    assert not _commands(told.out)
    assert json.loads(told.out) == {"found": HOSTILE}


def test_no_command_that_looks_at_a_run_lets_its_texts_act(tmp_path: Path) -> None:
    """Output, metrics, warnings and the names of folders, as a script or a bucket writer made them."""
    storage, at = open_storage(str(tmp_path)), utc_now()
    run = create_run(storage, RunSpec(run_id="odd", created_at=at, command=(f"x{HOSTILE}",),
                                      env={"A": HOSTILE}, tags={"team": HOSTILE}))  # fmt: skip
    journal = run.journal()
    for event in (
        e.Created(at=at),
        e.Launching(at=at, attempt=1, token="t", market=Market.SPOT,
                    pool=Pool(instance_type="g", zone="a"), reason=HOSTILE),
        e.Launched(at=at, attempt=1, instance_id="i", started_at=at, price_usd_h=Decimal(1),
                   price_source=HOSTILE, price_at=at, on_demand_usd_h=Decimal(1)),
        e.Warned(at=at, attempt=1, message=HOSTILE),
    ):  # fmt: skip
        journal.append(event)
    run.storage.write(run.log_path(1, 1), f"{HOSTILE}\nplain\n".encode())
    storage.write(f"runs/near{TITLE}/x", b"x")
    run.beat(Heartbeat(attempt=1, beat=1, at=at, phase="training",
                       progress=Progress(step=1, metrics={HOSTILE: 1.0})))  # fmt: skip
    chain = run.chain()
    chain.claim(1)
    chain.commit(1, step=1, manifest=HOSTILE, digest="d", content="state", metrics={HOSTILE: 1.0})
    for words in (
        ("logs", "odd"), ("logs", "odd", "--attempt", "1"), ("show", "odd", "--events"),
        ("show", "odd", "--json", "--events"), ("runs",), ("cost", "odd"), ("cost",),
        ("cost", "--by", "team"), ("checkpoint", "ls", "odd"), ("checkpoint", "verify", "odd"),
        ("checkpoint", "export", "odd", str(tmp_path / "x.safetensors")), ("show", "near"),
    ):  # fmt: skip
        told = CliRunner().invoke(app, [*words, "-s", storage.url])
        assert told.output, words
        assert not _commands(told.output), words
    assert "plain" in CliRunner().invoke(app, ["logs", "odd", "-s", storage.url]).stdout
