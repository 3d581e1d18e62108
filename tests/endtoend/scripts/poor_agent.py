"""The agent on a bad machine: ``poor_agent.py HOW``, for the first attempt only.

``small-files``: no file, in the storage either, may be larger than a checkpoint.
``small-disk``: the instance's disk is 1 MiB, in a mount namespace of its own.
"""

from __future__ import annotations

import os
import resource
import sys

agent = [sys.executable, "-m", "spotfirst.agent"]
if os.environ["SPOTFIRST_ATTEMPT"] == "1":
    if sys.argv[1] == "small-files":
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
    else:
        mount = 'mount -t tmpfs -o size=1m none "$SPOTFIRST_WORKDIR" && exec "$@"'
        agent = ["unshare", "-rm", "sh", "-c", mount, "sh", *agent]
os.execvp(agent[0], agent)
