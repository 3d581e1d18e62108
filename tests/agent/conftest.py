"""A real agent in a real process, beside a metadata service that keeps the IMDSv2 rules."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from spotfirst.code import publish
from spotfirst.heartbeat import ExitReport, Handover, Heartbeat
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import Storage, open_storage
from tests.waiting import PATIENCE_S, wait_until

TRAINER = Path(__file__).with_name("trainer.py")


class Metadata:
    """An instance metadata service (version 2): what it was asked, and what it says."""

    def __init__(self) -> None:
        self.interruption: str | None = None
        self.rebalance: str | None = None
        self.tokens: set[str] = set()
        self.status: int | None = None
        self.asked: list[tuple[str, str, int]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
                is_valid = ttl.isdigit() and 1 <= int(ttl) <= 21600
                if self.path != "/latest/api/token" or not is_valid:
                    self.answer(400)
                else:
                    token = secrets.token_hex(8)
                    outer.tokens.add(token)
                    self.answer(200, token)

            def do_GET(self) -> None:
                paths = {
                    "/latest/meta-data/spot/instance-action": outer.interruption,
                    "/latest/meta-data/events/recommendations/rebalance": outer.rebalance,
                }
                if self.headers.get("X-aws-ec2-metadata-token") not in outer.tokens:
                    self.answer(401)
                elif outer.status is not None:
                    self.answer(outer.status, "<html>an error page</html>")
                elif paths.get(self.path) is None:
                    self.answer(404)
                else:
                    self.answer(200, paths[self.path] or "")

            def answer(self, status: int, body: str = "") -> None:
                outer.asked.append((self.command, self.path, status))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def interrupt(self, in_s: float) -> datetime:
        time_ = datetime.now(timezone.utc) + timedelta(seconds=in_s)
        self.interruption = json.dumps({"action": "terminate", "time": f"{time_:%FT%TZ}"})
        return time_

    def recommend(self) -> None:
        self.rebalance = json.dumps({"noticeTime": "2026-01-01T00:00:00Z"})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Instance:
    """One machine with one agent."""

    def __init__(self, lab: Lab, run: Run, attempt: int, process: subprocess.Popen[bytes]) -> None:
        self._lab, self.run, self.attempt, self.process = lab, run, attempt, process

    def beat(self) -> Heartbeat | None:
        return self.run.heartbeat(self.attempt)

    def until(self, seen: Callable[[Heartbeat], bool], what: str = "") -> Heartbeat:
        def look() -> Heartbeat | None:
            beat = self.beat()
            return beat if beat is not None and seen(beat) else None

        return wait_until(look, f"{what or 'the beat'}; the last was {self.beat()}")

    def until_step(self, step: int) -> Heartbeat:
        return self.until(lambda b: (b.progress.step or 0) >= step, f"step {step}")

    def until_running(self) -> int:
        """The process id of the command, once it has been seen."""
        return int(wait_until(lambda: self.log_line("pid "), "the command").split()[-1])

    def log_line(self, start: str) -> str:
        path = self._lab.work / f"{self.run.run_id}-{self.attempt}" / "output.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return next((line for line in lines if line.startswith(start)), "")

    def log(self) -> str:
        """The shipped log."""
        texts = []
        while (text := self.run.log_segment(self.attempt, len(texts) + 1)) is not None:
            texts.append(text)
        return "".join(texts)

    def exit(self, within_s: float = PATIENCE_S) -> ExitReport:
        """The exit report, once the agent has ended.

        After an interruption it waits for the fleet, which this then plays: it shuts down.
        """
        wait_until(
            lambda: self.process.poll() is not None or self.run.exit_report(self.attempt),
            "the end of the agent",
            patience_s=within_s,
        )
        reported = self.run.exit_report(self.attempt)
        if reported is not None and reported.cause == "interrupted":
            self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(within_s) == 0, self._lab.output()
        report = self.run.exit_report(self.attempt)
        assert report is not None, self._lab.output()
        return report

    def hand_over(self, to: int | None = None) -> None:
        self.run.request_handover(
            self.attempt, Handover(reason="a test", at=datetime.now(timezone.utc), to=to)
        )


class Lab:
    """Makes runs in a storage, and instances for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.storage = open_storage(str(folder / "storage"))
        self.metadata = Metadata()
        self._processes: list[subprocess.Popen[bytes]] = []

    def create(self, *command: str, storage: Storage | None = None, **fields: Any) -> Run:
        """A run with fast beats, of this command, or of the example trainer."""
        storage = storage or self.storage
        if not command:
            fields.setdefault("code", publish(storage, TRAINER))
            command = ("python", "trainer.py")
        defaults = {
            "created_at": datetime.now(timezone.utc), "heartbeat_s": 0.3, "notice_poll_s": 0.2,
            "run_id": f"r{secrets.token_hex(3)}",
        }  # fmt: skip
        spec = RunSpec(command=command, **{**defaults, **fields})
        return create_run(storage, spec)

    def shell(self, script: str, **fields: Any) -> Run:
        return self.create("sh", "-c", f"echo pid $$\n{script}", **fields)

    def start(self, run: Run, attempt: int = 1, **variables: str) -> Instance:
        environment = {
            **os.environ,
            "SPOTFIRST_STORAGE": run.root.url,
            "SPOTFIRST_RUN": run.run_id,
            "SPOTFIRST_ATTEMPT": str(attempt),
            "SPOTFIRST_WORKDIR": str(self.work),
            "SPOTFIRST_CACHE": str(self.folder / "cache"),
            "SPOTFIRST_LOG_PERIOD_S": "0.2",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.metadata.url,
            **variables,
        }
        with (self.folder / "agent.out").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "spotfirst.agent"],
                env=environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        return Instance(self, run, attempt, process)

    def output(self) -> str:
        return (self.folder / "agent.out").read_text()

    def pids(self, word: str) -> list[int]:
        """The processes of this lab's attempts that have this word in their command."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_ours = process.environ().get("SPOTFIRST_CHANNEL", "").startswith(str(self.work))
                if is_ours and word in process.cmdline():
                    found.append(process.pid)
        return found

    def leftovers(self) -> list[str]:
        """Processes that any attempt of this lab has left behind; the guards get a moment."""
        end = time.monotonic() + 30
        while True:
            found = []
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if process.environ().get("SPOTFIRST_CHANNEL", "").startswith(str(self.work)):
                        found.append(" ".join(process.cmdline()))
            if not found or time.monotonic() > end:
                return found
            time.sleep(0.05)

    def close(self) -> None:
        self.metadata.close()
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    try:
        yield made
        assert made.leftovers() == []
    finally:
        made.close()


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    made = Metadata()
    yield made
    made.close()
