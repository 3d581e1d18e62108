"""A deterministic AWS for tests: one seed drives everything, and time only moves when it is told.

``clock`` is its time, ``faults`` what goes wrong at a call, ``market`` capacity and prices,
``cloud`` the instances and the bill, ``ec2client`` and ``clients`` what boto3's clients would be.
"""
