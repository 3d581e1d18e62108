"""One of several controllers of a run: ``controller.py STORAGE RUN_ID``."""

from __future__ import annotations

import sys
import time

from spotfirst.run import Run
from spotfirst.storage import open_storage
from spotfirst_airflow.following import Follower
from spotfirst_airflow.submission import storage_environment

run = Run(open_storage(sys.argv[1]), sys.argv[2])
follower = Follower(lambda: (run, storage_environment()), show_output=False)
while (wait_s := follower.look()) is not None:
    time.sleep(min(wait_s, 0.05))
