"""What each policy costs on recorded markets, beside what was published and what was possible.

The rules, wherever the papers ("Can't Be Late", NSDI 2024; SkyNomad, arXiv 2601.06520) leave a choice:

- **Who sees what.** ``uniform_progress`` and ``greedy`` see in each tick which zones have spot, for
  nothing, as their papers have it. ``spotfirst`` and all others see prices only: whether there is
  spot they learn by launching. A launch that is refused is free and takes no time; an instance that
  starts is paid, used or not. There is no other probing.
- **Billing.** Spot costs what its zone costs in each tick; the hour that is free on AWS after an early
  interruption is not counted. Seconds are billed, not ticks.
- **Time.** An instance is paid from its launch on, and trains one changeover later, wherever it is:
  the time to copy a checkpoint is part of it. The last second of spot is the end of its tick; there
  is no notice, and no training is lost. The instance that is moved from ends at once.
- **Decisions** are made when they are due, which may be within a tick. What has to happen at a tick in
  the papers' simulators (the safety net) happens at its own second here.
- **Egress** is paid on a launch in another region, once something was trained: by the table for AWS
  (1 cent a GB between us-east-1 and us-east-2, else 2), and 2 cents everywhere for Google.
- **Uniform Progress with failover** takes the cheapest pool with spot, those in the zone of its last
  instance last. On demand it goes where the work left and the way there cost least. With
  exactly as much done as expected it is behind: at the start, it does not wait a tick.
- **Omniscient** knows the whole market, and starts and stops at ticks; see ``omniscient``.
- **A window** begins at a tick, and its zones, lengths and prices are the recording's. The 4-node gangs
  run while all four nodes are there, at four times $0.9731 on spot and four times $3.06 on demand.
- **Nothing is known beforehand**: no policy is given a history of the pools.

The traces that "Can't Be Late" was measured on (October 2022, one zone) are not among ours: the tables
of one zone are of February and March 2023, where spot is scarcer, at the recorded prices.
"""
