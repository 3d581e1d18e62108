"""The demo does what it says, and leaves nothing behind, however it is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


class Playing:
    """A demo in a home of its own, its output in a file."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.home = folder / "demo"
        self._output = folder / "output"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "devstack.demo", "--home", str(self.home), *words],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={
                    k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "SPOTFIRST"))
                },
                # A shell's background job, as a test run may be, ignores Ctrl-C, and hands that on.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            )

    def text(self) -> str:
        return self._output.read_text()

    def wait_for(self, words: str, *, patience_s: float) -> None:
        give_up = time.monotonic() + patience_s
        while words not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < give_up, self.text()
            time.sleep(0.1)

    def processes(self) -> dict[int, str]:
        """Those that name the demo's home; the demo itself is gone when this is asked."""
        found = {}
        for path in Path("/proc").iterdir():
            if path.name.isdigit() and int(path.name) != os.getpid():
                try:
                    texts = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
                except OSError:
                    continue
                if any(str(self.home).encode() in text for text in texts):
                    found[int(path.name)] = texts[0].replace(b"\0", b" ").decode()
        return found


@contextmanager
def playing(folder: Path, *words: str) -> Iterator[Playing]:
    demo = Playing(folder, *words)
    try:
        yield demo
    finally:
        if demo.process.poll() is None:
            demo.process.send_signal(signal.SIGTERM)
            demo.process.wait(PATIENCE_S)


@pytest.mark.airflow
@pytest.mark.slow
def test_the_demo_trains_in_airflow_compares_the_weights_and_stays_until_ctrl_c(
    tmp_path: Path,
) -> None:
    with playing(tmp_path, "--steps", "24") as demo:
        demo.wait_for("Airflow stays up", patience_s=PATIENCE_S)
        text = demo.text()
        assert "step 24/24" in text  # by the first attempt, or on a busy machine by the second
        assert "✓ the same, bit for bit" in text
        assert "in Airflow the DAG run is: success" in text
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(PATIENCE_S) == 0
        assert demo.processes() == {}


@pytest.mark.airflow
def test_ctrl_c_at_any_time_leaves_no_process_behind(tmp_path: Path) -> None:
    with playing(tmp_path) as demo:
        demo.wait_for("starting Airflow", patience_s=PATIENCE_S)
        time.sleep(4)  # Airflow and the training without interruptions are starting up
        assert demo.processes()
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(PATIENCE_S) == 130
        assert demo.processes() == {}
