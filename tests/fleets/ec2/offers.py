"""A price list in the shape of AWS's: the columns that matter, among others, and rows."""

from __future__ import annotations

import csv
import io

COLUMNS = (
    "SKU", "OfferTermCode", "RateCode", "TermType", "PriceDescription", "EffectiveDate",
    "StartingRange", "EndingRange", "Unit", "PricePerUnit", "Currency", "RelatedTo",
    "LeaseContractLength", "PurchaseOption", "OfferingClass", "Product Family", "serviceCode",
    "Location", "Location Type", "Instance Type", "Current Generation", "Instance Family", "vCPU",
    "Physical Processor", "Clock Speed", "Memory", "Storage", "Network Performance",
    "Processor Architecture", "Tenancy", "EBS Optimized", "Operating System", "License Model",
    "usageType", "operation", "AvailabilityZone", "CapacityStatus", "GPU", "GPU Memory",
    "MarketOption", "Pre Installed S/W", "Region Code", "serviceName",
)  # fmt: skip
L4 = {
    "SKU": "ABCD", "TermType": "OnDemand", "Unit": "Hrs", "PricePerUnit": "1.0064000000",
    "Currency": "USD", "Product Family": "Compute Instance", "Instance Type": "g6.xlarge",
    "vCPU": "4", "Memory": "16 GiB", "Tenancy": "Shared", "Operating System": "Linux",
    "License Model": "No License required", "usageType": "EUC1-BoxUsage:g6.xlarge",
    "operation": "RunInstances", "CapacityStatus": "Used", "GPU": "1", "GPU Memory": "24 GB",
    "MarketOption": "OnDemand", "Pre Installed S/W": "NA", "Region Code": "eu-central-1",
    "PriceDescription": '$1.0064 per On Demand Linux g6.xlarge Instance Hour, "as used"',
}  # fmt: skip
HEAD = (
    ("FormatVersion", "v1.0"),
    ("Disclaimer", "This list is a test's. It has no real prices, and a comma."),
    ("Publication Date", "2026-11-20T08:15:00Z"),
    ("Version", "20261120081500"),
    ("OfferCode", "AmazonEC2"),
)


def row(**changes: str) -> dict[str, str]:
    """The row of a g6.xlarge in Frankfurt, with changes; ``_`` stands for a space in a name."""
    by_name = {name.replace(" ", "_").replace("/", ""): name for name in COLUMNS}
    return L4 | {by_name[name]: value for name, value in changes.items()}


def price_list(
    *rows: dict[str, str],
    head: tuple[tuple[str, str], ...] = HEAD,
    columns: tuple[str, ...] = COLUMNS,
) -> str:
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerows(head)
    writer.writerow(columns)
    writer.writerows([each.get(name, "") for name in columns] for each in rows)
    return out.getvalue()
