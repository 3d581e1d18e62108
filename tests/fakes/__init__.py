"""A deterministic AWS for tests: one seed drives everything, and time only moves when it is told.

``clock`` is its time, ``faults`` what goes wrong at a call, ``market`` capacity and prices,
``cloud`` the instances and the bill, ``clients`` and ``ec2client`` what boto3's clients would be.
``agent`` is what runs on an instance, ``world`` all that looks after one run, ``schedules`` what
happens to it and what must hold.
"""
