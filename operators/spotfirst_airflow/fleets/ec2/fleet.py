"""The fleet itself: the five calls of :class:`~spotfirst_airflow.fleets.Fleet`, on EC2."""

from __future__ import annotations


class Ec2Fleet:
    """Instances on EC2."""
