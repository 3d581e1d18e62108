"""The fleet on EC2: exactly-once launches, real notices, no orphans. In one region, or in several."""

from spotfirst_airflow.fleets.ec2.fleet import Ec2Fleet
from spotfirst_airflow.fleets.ec2.regions import Ec2Regions

__all__ = ["Ec2Fleet", "Ec2Regions"]
