"""The agent: what an instance runs, from its boot to its last word.

``python -m spotfirst.agent`` fetches code and data, runs the user's command, beats, ships the
log, watches for notices and for a successor, asks the trainer for a last checkpoint in the time
that is left, reports how the attempt ended, and leaves no process behind.

=============== ===========================================================================
module          what it knows
=============== ===========================================================================
``fitness``     whether the agent can work on this instance at all
``program``     the process: settings, signals, the guard, the exit status
``settings``    the environment variables that an instance is started with
``attempt``     the life of one attempt: the order of things
``preparing``   code, data, and in files mode the last checkpoint
``filemode``    capturing what a script without a Checkpointer writes
``telling``     heartbeats and the exit report
``listening``   notices, handovers, shutdown
``notices``     the instance metadata service (IMDSv2)
``stopping``    when to drain, and how long the trainer has
``command``     one process tree: started, signalled, and gone for sure
``logs``        output as numbered segments in the storage
``exits``       how an attempt ended, from what was seen
``guard``       a second process that ends everything when the agent cannot
``periodic``    background threads that survive their own failures
``retrying``    calls that wait for the storage
=============== ===========================================================================
"""

from __future__ import annotations

__all__: list[str] = []
