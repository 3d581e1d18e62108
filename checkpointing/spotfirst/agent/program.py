"""``python -m spotfirst.agent``: everything it needs to know is in environment variables."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import threading
from types import FrameType

from spotfirst.agent.attempt import Agent
from spotfirst.agent.fitness import UNFIT, environment_problem, say_unfit
from spotfirst.agent.guard import Guard
from spotfirst.agent.logs import LogShipper
from spotfirst.agent.settings import Settings
from spotfirst.channel import CHANNEL_VARIABLE
from spotfirst.errors import SpotfirstError
from spotfirst.storage import open_storage


class _IntoLog(logging.Handler):
    """What the agent does, among the lines of what it runs."""

    def __init__(self, logs: LogShipper) -> None:
        super().__init__(logging.INFO)
        self._logs = logs

    def emit(self, record: logging.LogRecord) -> None:
        self._logs.note(self.format(record))


def main() -> int:
    """Run the attempt that the environment names; 0 once its end is reported,
    or :data:`~spotfirst.agent.fitness.UNFIT`.
    """
    if sys.argv[1:]:
        sys.stdout.write(f"{__doc__}\n\n{Settings.__doc__}\n")
        return 0 if sys.argv[1] in {"-h", "--help"} else 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("aiobotocore", "botocore", "fsspec", "s3fs", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    log = logging.getLogger("spotfirst.agent")
    # From the first moment on: a shutdown during the start is an interruption like any other.
    shutdown = threading.Event()
    agent: Agent | None = None

    def terminate(_number: int, _frame: FrameType | None) -> None:
        shutdown.set()
        if agent is not None:
            agent.terminate()

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, terminate)
    try:
        settings = Settings.from_environment()
        storage = open_storage(settings.storage_url)
        settings.folder.mkdir(parents=True, exist_ok=True)
    except SpotfirstError as error:
        say_unfit(f"the agent cannot begin: {error}")
        return UNFIT
    except OSError as error:
        if problem := environment_problem(error):
            say_unfit(problem)
            return UNFIT
        raise
    # Held until this process ends, however it ends.
    lock = os.open(settings.folder / "agent.lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        log.warning("attempt %d is running on this machine already", settings.attempt)
        return 0
    guard = Guard(
        life_s=settings.max_life_s,
        marker=f"{CHANNEL_VARIABLE}={settings.folder / 'channel'}",
        power_off=settings.power_off,
    )
    agent = Agent(settings, storage, guard=guard)
    if shutdown.is_set():
        agent.terminate()
    shown = _IntoLog(agent.logs)
    shown.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger().addHandler(shown)
    try:
        if not agent.boot():
            return 0
    except SpotfirstError as error:
        say_unfit(f"the agent cannot begin: {error}")
        return UNFIT
    except Exception as error:
        if problem := environment_problem(error):
            log.exception("the agent cannot begin")
            say_unfit(problem)
            return UNFIT
        raise
    return agent.run()
