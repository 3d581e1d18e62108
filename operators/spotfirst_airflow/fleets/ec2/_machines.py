"""The doctor on what instances are made of: subnets, groups, routes, types, image, quotas."""

from __future__ import annotations

from typing import Any

from spotfirst_airflow.fleets.checks import Check
from spotfirst_airflow.fleets.ec2._examination import Examination, Refused, allow, unlooked

__all__ = [
    "check_groups",
    "check_image",
    "check_quotas",
    "check_routes",
    "check_subnets",
    "check_types",
]

_FEW_ADDRESSES = 8

_SPOT_QUOTAS: dict[str, tuple[str, ...]] = {
    "g": ("L-3819A6DF",),
    "p5": ("L-C4BD4855", "L-7212CCBC"),  # regions differ in whether P5 is counted apart
    "p": ("L-7212CCBC",),
    "standard": ("L-34B43A08",),
}
_ON_DEMAND_QUOTAS: dict[str, tuple[str, ...]] = {
    "g": ("L-DB2E81BA",),
    "p5": ("L-417A185B",),
    "p": ("L-417A185B",),
    "standard": ("L-1216C47A",),
}
"""Codes of EC2's vCPU quotas by family: aws service-quotas list-service-quotas --service-code ec2.

Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/using-spot-limits.html and
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-on-demand-instances.html
"""


def check_subnets(look: Examination) -> list[Check]:
    """They exist, in which zones, and have addresses left."""
    wanted = look.options.subnets
    where = f"give subnets of {look.aws.region}: output Subnets of deploy/aws.yaml"
    if not wanted:
        found = "the fleet option subnets is not given"
        return [Check(name="subnets", verdict="failed", found=found, fix=where)]
    try:
        answer = look.ask("ec2", "describe_subnets", SubnetIds=list(wanted))
    except Refused as error:
        if error.code.startswith("InvalidSubnet"):
            return [Check(name="subnets", verdict="failed", found=str(error), fix=where)]
        raise
    look.subnets = answer["Subnets"]
    zones = sorted({subnet["AvailabilityZone"] for subnet in look.subnets})
    networks = {subnet["VpcId"] for subnet in look.subnets}
    if len(networks) > 1:
        found = f"they are in {len(networks)} VPCs: {', '.join(sorted(networks))}"
        fix = "give subnets of one VPC: one launch has the security groups of one"
        return [Check(name="subnets", verdict="failed", found=found, fix=fix)]
    empty = [
        subnet["SubnetId"]
        for subnet in look.subnets
        if subnet.get("AvailableIpAddressCount", _FEW_ADDRESSES) < _FEW_ADDRESSES
    ]
    if empty:
        found = f"nearly no free addresses in {', '.join(empty)}"
        fix = "give larger subnets, or end what uses up their addresses"
        return [Check(name="subnets", verdict="warning", found=found, fix=fix)]
    found = f"{len(look.subnets)} in {', '.join(zones)}"
    if len(zones) < len(look.subnets):
        fix = "leave out all but one subnet of each zone: EC2 Fleet takes one"
        return [Check(name="subnets", verdict="warning", found=f"{found} only", fix=fix)]
    if len(zones) == 1:
        fix = "add a subnet in each other zone: each zone is another pool of spot capacity"
        return [Check(name="subnets", verdict="warning", found=f"{found} only", fix=fix)]
    return [Check(name="subnets", verdict="ok", found=found)]


def check_groups(look: Examination) -> list[Check]:
    """No port is open, and HTTPS gets out."""
    name, wanted = "security groups", look.options.security_groups
    fix = "give the fleet option security_groups: output SecurityGroups of deploy/aws.yaml"
    if not wanted:
        found = "none given: the VPC's default group is used, whose members reach each other"
        return [Check(name=name, verdict="warning", found=found, fix=fix)]
    try:
        groups = look.ask("ec2", "describe_security_groups", GroupIds=list(wanted))[
            "SecurityGroups"
        ]
    except Refused as error:
        if error.code.startswith("InvalidGroup"):
            return [Check(name=name, verdict="failed", found=str(error), fix=fix)]
        raise
    networks = {subnet["VpcId"] for subnet in look.subnets}
    strange = [group["GroupId"] for group in groups if networks and group["VpcId"] not in networks]
    if strange:
        found = f"{', '.join(strange)} is in another VPC than the subnets"
        return [Check(name=name, verdict="failed", found=found, fix=fix)]
    rules = [rule for group in groups for rule in group.get("IpPermissionsEgress", [])]
    if not any(_lets_out(rule, 443) for rule in rules):
        found = f"{', '.join(wanted)} lets no HTTPS out, so no storage can be reached"
        fix = "allow TCP 443 outbound, as SecurityGroup of deploy/aws.yaml does"
        return [Check(name=name, verdict="failed", found=found, fix=fix)]
    opened = [group["GroupId"] for group in groups if group.get("IpPermissions")]
    if opened:
        found = f"{', '.join(opened)} lets connections in; nothing here needs any"
        fix = f"aws ec2 revoke-security-group-ingress, or use another group than {opened[0]}"
        return [Check(name=name, verdict="warning", found=found, fix=fix)]
    found = f"{', '.join(wanted)}: nothing in, HTTPS out"
    return [Check(name=name, verdict="ok", found=found)]


def _lets_out(rule: dict[str, Any], port: int) -> bool:
    if rule.get("IpProtocol") == "-1":
        return True
    return rule.get("IpProtocol") == "tcp" and rule["FromPort"] <= port <= rule["ToPort"]


def check_routes(look: Examination) -> list[Check]:
    """From each subnet there is a way to S3, and to an index or a registry where one is used."""
    name = "way to S3"
    if not look.subnets:
        return [Check(name=name, verdict="skipped", found="no subnets to look at")]
    network = look.subnets[0]["VpcId"]
    within = [{"Name": "vpc-id", "Values": [network]}]
    tables = look.ask_all("ec2", "describe_route_tables", "RouteTables", Filters=within)
    is_far = look.storage_region != look.aws.region
    # An endpoint reaches the buckets of its own region.
    through, everywhere = (set[str](), False) if is_far else _endpoints(look, within)
    lost, billed, closed = [], [], []
    for subnet in look.subnets:
        table = _table_of(subnet["SubnetId"], tables)
        kinds = {
            _kind(route) for route in table.get("Routes", []) if route.get("State") != "blackhole"
        }
        if everywhere or table.get("RouteTableId") in through:
            kinds.add("s3")
        outside = "nat" in kinds or ("internet" in kinds and subnet.get("MapPublicIpOnLaunch"))
        if "s3" not in kinds and not outside:
            lost.append((subnet["SubnetId"], table.get("RouteTableId", "its route table")))
        elif "s3" not in kinds and "nat" in kinds:
            billed.append(subnet["SubnetId"])
        elif not outside:
            closed.append(subnet["SubnetId"])
    if lost:
        subnets, routes = ", ".join(s for s, _ in lost), ",".join(sorted({t for _, t in lost}))
        found = f"{subnets}: no endpoint for S3, and no way to the internet (a public address?)"
        fix = f"deploy the stack with RouteTableIds={routes}, which adds the free endpoint for S3"
        if is_far:
            found = f"{subnets}: no way to the storage, which is in {look.storage_region}"
            fix = "give subnets with public addresses, or a NAT gateway: endpoints reach one region"
        return [Check(name=name, verdict="failed", found=found, fix=fix)]
    needs = [option for option in ("pip_index", "image") if getattr(look.options, option)]
    if closed and needs:
        found = f"{', '.join(closed)} reaches S3 only, and {' and '.join(needs)} may need more"
        fix = "add a NAT gateway or interface endpoints, or leave the option out"
        return [Check(name=name, verdict="warning", found=found, fix=fix)]
    if billed:
        found = f"{', '.join(billed)} goes through NAT, where each GB costs about $0.045"
        fix = "deploy the stack with RouteTableIds of these subnets: the endpoint for S3 is free"
        if is_far:
            fix = "give subnets with public addresses: no endpoint reaches another region"
        return [Check(name=name, verdict="warning", found=found, fix=fix)]
    return [Check(name=name, verdict="ok", found=f"from all {len(look.subnets)} subnets")]


def _endpoints(look: Examination, within: list[dict[str, Any]]) -> tuple[set[str], bool]:
    """The route tables with S3's gateway endpoint; whether an interface endpoint has its names."""
    tables: set[str] = set()
    everywhere = False
    for found in look.ask_all("ec2", "describe_vpc_endpoints", "VpcEndpoints", Filters=within):
        if not found["ServiceName"].endswith(f".{look.aws.region}.s3"):
            continue  # a route to another one, such as DynamoDB's, looks the same
        if str(found.get("State", "")).lower() != "available":
            continue
        tables |= set(found.get("RouteTableIds", []))
        everywhere |= found.get("VpcEndpointType") == "Interface" and bool(
            found.get("PrivateDnsEnabled")
        )
    return tables, everywhere


def _table_of(subnet_id: str, tables: list[Any]) -> dict[str, Any]:
    """The subnet's own route table, or else the VPC's main one."""
    for table in tables:
        if any(a.get("SubnetId") == subnet_id for a in table.get("Associations", [])):
            return dict(table)
    mains = (t for t in tables if any(a.get("Main") for a in t.get("Associations", [])))
    return dict(next(mains, {}))


def _kind(route: dict[str, Any]) -> str:
    if route.get("DestinationCidrBlock") != "0.0.0.0/0":
        return "near"
    return "internet" if route.get("GatewayId", "").startswith("igw-") else "nat"


def check_types(look: Examination) -> list[Check]:
    """They exist, and are offered in the zones of the subnets."""
    name, wanted = "instance types", look.type_names
    try:
        answer = look.ask("ec2", "describe_instance_types", InstanceTypes=list(wanted))
    except Refused as error:
        if error.code.startswith("InvalidInstanceType"):
            fix = "correct --instance-types, or take those of another region"
            return [Check(name=name, verdict="failed", found=str(error), fix=fix)]
        raise
    look.types = {found["InstanceType"]: found for found in answer["InstanceTypes"]}
    offers = look.ask_all(
        "ec2", "describe_instance_type_offerings", "InstanceTypeOfferings",
        LocationType="availability-zone",
        Filters=[{"Name": "instance-type", "Values": list(wanted)}],
    )  # fmt: skip
    zones = {subnet["AvailabilityZone"] for subnet in look.subnets}
    places: dict[str, set[str]] = {each: set() for each in wanted}
    for offer in offers:
        places.setdefault(offer["InstanceType"], set()).add(offer["Location"])
    if not zones:
        found = f"{', '.join(sorted(set().union(*places.values()))) or 'no zone'} offer them"
        fix = "" if offers else "name types of this region"
        return [Check(name=name, verdict="ok" if offers else "failed", found=found, fix=fix)]
    usable = {each: sorted(found & zones) for each, found in places.items()}
    pools = sum(map(len, usable.values()))
    missing = [each for each, found in usable.items() if not found]
    other = sorted(set().union(*(places[each] for each in missing)) - zones)
    fix = f"add a subnet in {' or '.join(other)}" if other else "name types of this region"
    if not pools:
        found = f"none of {', '.join(wanted)} is offered in {', '.join(sorted(zones))}"
        return [Check(name=name, verdict="failed", found=found, fix=fix)]
    if missing:
        found = f"{', '.join(missing)} is not offered in {', '.join(sorted(zones))}"
        return [Check(name=name, verdict="warning", found=found, fix=fix)]
    found = f"{', '.join(wanted)}: {pools} pools in {', '.join(sorted(zones))}"
    return [Check(name=name, verdict="ok", found=found)]


def check_image(look: Examination) -> list[Check]:
    """The AMI is there, and of the types' architecture."""
    name, ami = "AMI", look.options.ami
    fix = f"give the fleet option ami: an id, or a public parameter that {look.aws.region} has"
    try:
        image_id = _image_id(look, ami)
        images = look.ask("ec2", "describe_images", ImageIds=[image_id])["Images"]
    except Refused as error:
        if error.code == "ParameterNotFound" or error.code.startswith("InvalidAMI"):
            return [Check(name=name, verdict="failed", found=f"{ami}: {error}", fix=fix)]
        if error.denied:
            found = f"{error.code} for {error.action}, which each launch needs"
            return [Check(name=name, verdict="failed", found=found, fix=allow(error.action))]
        raise
    if not images or images[0].get("State", "available") != "available":
        found = f"{ami} is {image_id}, which is not there (or not available) in this region"
        return [Check(name=name, verdict="failed", found=found, fix=fix)]
    image = images[0]
    look.image_id = image_id
    wrong = [
        each
        for each, known in look.types.items()
        if (able := known.get("ProcessorInfo", {}).get("SupportedArchitectures"))
        and image.get("Architecture", able[0]) not in able
    ]
    if wrong:
        found = f"{image_id} is for {image['Architecture']}, and {', '.join(wrong)} is not"
        return [Check(name=name, verdict="failed", found=found, fix=fix)]
    if image.get("Architecture", "x86_64") != "x86_64":
        found = f"{image_id} is for {image['Architecture']}, and Spotfirst's wheels are for x86_64"
        fix = "give the fleet option ami and instance types of x86_64"
        return [Check(name=name, verdict="failed", found=found, fix=fix)]
    title = image.get("Name", "")
    return [Check(name=name, verdict="ok", found=f"{image_id} {title}".strip())]


def _image_id(look: Examination, ami: str) -> str:
    if not ami.startswith("ssm:"):
        return ami
    answer = look.ask("ssm", "get_parameter", Name=ami.removeprefix("ssm:"))
    return str(answer["Parameter"]["Value"])


def check_quotas(look: Examination) -> list[Check]:
    """The account may run at least one instance of the types, on spot and on demand."""
    if not look.types:
        return [Check(name="quotas", verdict="skipped", found="no instance types to look at")]
    found = []
    for market, codes, fallback in (
        ("spot", _SPOT_QUOTAS, "failed"),
        ("on-demand", _ON_DEMAND_QUOTAS, "warning"),
    ):
        name = f"quota, {market}"
        try:
            found.append(_check_market(look, name, codes, missing=fallback))
        except Refused as error:
            found.append(unlooked(name, error))
    return found


def _check_market(
    look: Examination, name: str, codes: dict[str, tuple[str, ...]], *, missing: str
) -> Check:
    limits: dict[str, tuple[str, float]] = {}
    fits: list[tuple[str, int, str, float]] = []
    short: list[tuple[str, int, str, float]] = []
    unknown = []
    for each, known in look.types.items():
        family = _family(each)
        if family not in codes:
            unknown.append(each)
            continue
        if family not in limits:
            limits[family] = _limit(look, codes[family])
        code, limit = limits[family]
        vcpus = known["VCpuInfo"]["DefaultVCpus"]
        (fits if vcpus <= limit else short).append((each, vcpus, code, limit))
    if not fits and not short:
        found = f"the quota of {', '.join(unknown)} is not known here"
        return Check(name=name, verdict="skipped", found=found)
    if not short:
        words = ", ".join(f"{limit:.0f} vCPUs ({code})" for code, limit in limits.values())
        least = max(vcpus for _, vcpus, _, _ in fits)
        return Check(name=name, verdict="ok", found=f"{words}; one instance needs up to {least}")
    words = ", ".join(
        f"{each} needs {vcpus} vCPUs of {limit:.0f}" for each, vcpus, _, limit in short
    )
    code, needed = short[0][2], max(vcpus for _, vcpus, _, _ in short)
    fix = (
        f"aws service-quotas request-service-quota-increase --service-code ec2 --quota-code {code} "
        f"--desired-value {2 * needed} --region {look.aws.region}  # two, for changes of instance"
    )
    if fits or missing == "warning":
        if not fits:
            words = f"{words}: no run can fall back to on-demand"
        return Check(name=name, verdict="warning", found=words, fix=fix)
    return Check(name=name, verdict="failed", found=words, fix=fix)


def _limit(look: Examination, codes: tuple[str, ...]) -> tuple[str, float]:
    """How many vCPUs the first of these quotas that there is allows. An account may have no value of its own."""
    for code in codes:
        for method in ("get_service_quota", "get_aws_default_service_quota"):
            try:
                answer = look.ask("service-quotas", method, ServiceCode="ec2", QuotaCode=code)
            except Refused as error:
                if error.code == "NoSuchResourceException":
                    continue
                raise
            return code, float(answer["Quota"]["Value"])
    message = f"AWS knows no quota {' or '.join(codes)} in {look.aws.region}"
    raise Refused(message, code="", action="", unavailable=True)


def _family(instance_type: str) -> str:
    """Which quota counts an instance type."""
    family = instance_type.partition(".")[0]
    if family.startswith(("p5", "p6")):
        return "p5"
    if family.startswith(("p2", "p3", "p4")):
        return "p"
    if family.startswith(("g", "vt")):
        return "g"
    special = ("dl", "f1", "f2", "inf", "trn", "u-", "hpc", "mac", "x")
    return "" if family.startswith(special) else "standard"
