"""``python -m spotfirst.agent``: see :mod:`spotfirst.agent.program`.

Only the standard library is imported before the environment is known to be good: an agent that
cannot even be imported must still be able to say so.
"""

from __future__ import annotations

import os
import sys

from spotfirst.agent.fitness import UNFIT, import_problem, say_unfit

if __name__ == "__main__":
    if problem := import_problem():
        say_unfit(problem)
        code = UNFIT
    else:
        from spotfirst.agent.program import main

        code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads may still wait for a storage that is away; there is nothing left for them to do.
    os._exit(code)
