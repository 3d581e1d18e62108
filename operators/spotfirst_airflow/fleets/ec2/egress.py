"""What AWS bills for a GB that goes from one region to another.

US dollars per GB that leaves a region for another one, by the one it leaves: the same for EC2 and
S3, and coming in is free ("Data Transfer" of https://aws.amazon.com/ec2/pricing/on-demand/ and of
https://aws.amazon.com/s3/pricing/). The figures are those of AWS's price list as published
with SkyNomad (arXiv 2601.06520, January 2026). Regions whose price depends on the destination are
left out: for them, and for those that are newer, stands the dearest figure of that list. The fleet
option ``egress_usd_gb`` takes the place of all of them.
"""

from __future__ import annotations

from decimal import Decimal

__all__ = ["UNKNOWN_USD_GB", "egress_usd_gb"]

UNKNOWN_USD_GB = Decimal("0.15")
"""Between regions of which nothing is known here."""

_LEAVING = {
    region: Decimal(usd_gb)
    for usd_gb, regions in (
        ("0.02", "us-east-1 us-east-2 us-west-1 us-west-2 ca-central-1"),
        ("0.02", "eu-central-1 eu-central-2 eu-north-1 eu-south-1 eu-south-2 eu-west-1 eu-west-2"),
        ("0.02", "eu-west-3"),
        ("0.08", "ap-northeast-2"),
        ("0.085", "me-central-1"),
        ("0.086", "ap-south-1 ap-south-2"),
        ("0.09", "ap-east-1 ap-northeast-1 ap-northeast-3 ap-southeast-1"),
        ("0.098", "ap-southeast-2"),
        ("0.1105", "me-south-1"),
        ("0.138", "sa-east-1"),
        ("0.147", "af-south-1"),
    )
    for region in regions.split()
}
_NEAR = frozenset({"us-east-1", "us-east-2"})
_NEAR_USD_GB = Decimal("0.01")


def egress_usd_gb(leaves: str, enters: str) -> Decimal:
    """USD per GB (10^9 bytes) from one region to another; 0 within one."""
    if leaves == enters:
        return Decimal(0)
    if {leaves, enters} == _NEAR:
        return _NEAR_USD_GB
    if leaves in _LEAVING and enters in _LEAVING:
        return _LEAVING[leaves]
    return UNKNOWN_USD_GB
