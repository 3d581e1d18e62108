"""``python -m spotfirst.agent``: everything it needs to know is in environment variables."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
from types import FrameType

from spotfirst.agent.attempt import Agent
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
    """Run the attempt that the environment names; 0 once its end is reported."""
    if sys.argv[1:]:
        sys.stdout.write(f"{__doc__}\n\n{Settings.__doc__}\n")
        return 0 if sys.argv[1] in {"-h", "--help"} else 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("aiobotocore", "botocore", "fsspec", "s3fs", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    log = logging.getLogger("spotfirst.agent")
    try:
        settings = Settings.from_environment()
        storage = open_storage(settings.storage_url)
        settings.folder.mkdir(parents=True, exist_ok=True)
    except (SpotfirstError, OSError) as error:
        log.error("%s", error)  # noqa: TRY400 - the message says what to do; a traceback hides it
        return 2
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

    def terminate(_number: int, _frame: FrameType | None) -> None:
        agent.terminate()

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, terminate)
    shown = _IntoLog(agent.logs)
    shown.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger().addHandler(shown)
    try:
        return agent.run()
    except SpotfirstError as error:
        log.error("%s", error)  # noqa: TRY400
        return 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads may still wait for a storage that is away; there is nothing left for them to do.
    os._exit(code)
