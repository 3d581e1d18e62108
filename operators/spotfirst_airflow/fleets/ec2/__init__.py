"""The fleet on EC2: exactly-once launches, real notices, no orphans."""

from spotfirst_airflow.fleets.ec2.fleet import Ec2Fleet

__all__ = ["Ec2Fleet"]
