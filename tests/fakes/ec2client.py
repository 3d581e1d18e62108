"""EC2 as a boto3 client shows it: the calls that Spotfirst makes, with their answers and errors.

Each call has its faults, and answers what AWS would by then: new instances late, tags later.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from tests.fakes.client import invalid, matches, page
from tests.fakes.cloud import ACCOUNT, CloudInstance
from tests.fakes.ec2account import AccountCalls
from tests.fakes.faults import client_error


class FakeEc2(AccountCalls):
    """The EC2 client of one caller."""

    # -- launch templates -------------------------------------------------------------------

    def create_launch_template(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            name = parameters["LaunchTemplateName"]
            if name in self.cloud.templates:
                raise client_error(
                    "InvalidLaunchTemplateName.AlreadyExistsException",
                    "Launch template name already in use.",
                    "CreateLaunchTemplate",
                )
            if not 3 <= len(name) <= 128:
                raise invalid("CreateLaunchTemplate", f"template name {name!r}")
            user_data = parameters["LaunchTemplateData"].get("UserData", "")
            if len(user_data) * 3 // 4 > 16 * 1024:
                raise invalid("CreateLaunchTemplate", "User data is limited to 16384 bytes")
            self.cloud.templates[name] = {
                "LaunchTemplateId": f"lt-{self.cloud.random.getrandbits(68):017x}",
                "LaunchTemplateName": name,
                "CreateTime": self._now(),
                "CreatedBy": f"arn:aws:sts::{ACCOUNT}:assumed-role/test/test",
                "DefaultVersionNumber": 1,
                "LatestVersionNumber": 1,
                "Tags": _tags_of(parameters, "launch-template"),
                "Data": parameters["LaunchTemplateData"],
            }
            return {"LaunchTemplate": self._template(name)}

        return self._call("CreateLaunchTemplate", parameters, apply)

    def describe_launch_templates(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            named = list(parameters.get("LaunchTemplateNames", ()))
            ids = set(parameters.get("LaunchTemplateIds", ()))
            if missing := [name for name in named if name not in self.cloud.templates]:
                raise _no_template("DescribeLaunchTemplates", missing[0])
            found = [
                self._template(name)
                for name, template in self.cloud.templates.items()
                if (not named or name in named)
                and (not ids or template["LaunchTemplateId"] in ids)
                and all(
                    matches(template_filter, _template_values(template, template_filter["Name"]))
                    for template_filter in parameters.get("Filters", ())
                )
            ]
            if ids and not found:
                raise client_error(
                    "InvalidLaunchTemplateId.NotFound",
                    "At least one of the launch templates specified in the request does not exist.",
                    "DescribeLaunchTemplates",
                )
            return page("LaunchTemplates", found, parameters)

        return self._call("DescribeLaunchTemplates", parameters, apply)

    def delete_launch_template(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            name = self._template_name("DeleteLaunchTemplate", parameters)
            template = self._template(name)
            del self.cloud.templates[name]
            return {"LaunchTemplate": template}

        return self._call("DeleteLaunchTemplate", parameters, apply)

    # -- launching --------------------------------------------------------------------------

    def create_fleet(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            token = parameters.get("ClientToken", "")
            if len(token) > 64 or not token.isascii():
                raise invalid("CreateFleet", f"ClientToken {token!r}")
            asked = json.dumps(parameters, sort_keys=True, default=str)
            if token and token in self.cloud.fleets:
                before, answer = self.cloud.fleets[token]
                if before != asked:
                    raise client_error(
                        "IdempotentParameterMismatch",
                        "The request uses the same client token as a previous, but non-identical "
                        "request.",
                        "CreateFleet",
                    )
                return answer
            answer = self._create_fleet(parameters)
            self.cloud.fleets[token or f"no token {len(self.cloud.fleets)}"] = asked, answer
            return answer

        return self._call("CreateFleet", parameters, apply)

    def _create_fleet(self, parameters: dict[str, Any]) -> dict[str, Any]:
        if parameters.get("Type") != "instant":
            raise invalid("CreateFleet", "only Type=instant is simulated")
        kinds = {each["ResourceType"] for each in parameters.get("TagSpecifications", ())}
        if not kinds <= {"fleet", "instance"}:
            raise invalid("CreateFleet", f"instant fleets tag fleet and instance, not {kinds}")
        target = parameters["TargetCapacitySpecification"]
        if target["TotalTargetCapacity"] != 1:
            raise invalid("CreateFleet", "only one instance per fleet is simulated")
        spot = target.get("DefaultTargetCapacityType", "on-demand") == "spot"
        (config,) = parameters["LaunchTemplateConfigs"]
        specification = config["LaunchTemplateSpecification"]
        name = self._template_name("CreateFleet", specification)
        fleet_id = f"fleet-{self.cloud.random.getrandbits(128):032x}"
        answer: dict[str, Any] = {"FleetId": fleet_id, "Errors": [], "Instances": []}
        candidates, lifecycle = [], "spot" if spot else "on-demand"
        resolved = {
            "LaunchTemplateId": self.cloud.templates[name]["LaunchTemplateId"],
            "Version": str(specification.get("Version", "1")).replace("$Latest", "1"),
        }
        for override in config["Overrides"]:
            zone = self._zone(override)
            code, message = self._why_not((override["InstanceType"], zone), spot=spot)
            chosen = {
                "LaunchTemplateSpecification": resolved,
                "Overrides": {**override, "AvailabilityZone": zone},
            }
            if code:
                answer["Errors"].append({
                    "LaunchTemplateAndOverrides": chosen, "Lifecycle": lifecycle,
                    "ErrorCode": code, "ErrorMessage": message,
                })  # fmt: skip
            else:
                candidates.append((override, zone, chosen))
        if not candidates:
            return answer
        answer["Errors"] = []  # what was not tried after all
        override, zone, chosen = self._choose(candidates, parameters, spot=spot)
        pool = (override["InstanceType"], zone)
        instance = self.cloud.launch(pool, spot=spot)
        instance.fleet_id, instance.subnet_id = fleet_id, override.get("SubnetId", "")
        instance.template = self.cloud.templates[name]["Data"]
        instance.tags = {
            "aws:ec2:fleet-id": fleet_id,
            "aws:ec2launchtemplate:id": resolved["LaunchTemplateId"],
            **{each["Key"]: each["Value"] for each in _tags_of(parameters, "instance")},
        }
        answer["Instances"].append({
            "LaunchTemplateAndOverrides": chosen, "Lifecycle": lifecycle,
            "InstanceIds": [instance.instance_id], "InstanceType": override["InstanceType"],
        })  # fmt: skip
        return answer

    def _why_not(self, pool: tuple[str, str], *, spot: bool) -> tuple[str, str]:
        """(code, message) of the error that this override ends with; empty when it could be had."""
        if self.cloud.launch_error is not None:
            return self.cloud.launch_error
        if pool not in self.cloud.pools:
            return "Unsupported", f"Your requested instance type ({pool[0]}) is not supported there"
        if self.cloud.has_capacity(pool, spot=spot):
            return "", ""
        message = (
            f"We currently do not have sufficient {pool[0]} capacity in the Availability Zone "
            f"you requested ({pool[1]})."
        )
        return "InsufficientInstanceCapacity", message

    def _choose(self, candidates: list[Any], parameters: dict[str, Any], *, spot: bool) -> Any:
        """The allocation strategies are AWS's own secret: a draw, weighted by price for spot."""
        options = parameters.get("SpotOptions" if spot else "OnDemandOptions", {})
        prices = []
        for override, zone, _ in candidates:
            market = self.cloud.pools[override["InstanceType"], zone]
            prices.append(market.spot_usd_h(self._now()) if spot else market.on_demand_usd_h)
        if options.get("AllocationStrategy") in {"lowest-price", "lowestPrice"}:
            return candidates[prices.index(min(prices))]
        random_ = random.Random(f"{self.cloud.seed}/{parameters.get('ClientToken')}")
        return random_.choices(candidates, [float(1 / price) for price in prices])[0]

    # -- looking ----------------------------------------------------------------------------

    def describe_instances(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            ids = list(parameters.get("InstanceIds", ()))
            if ids and "MaxResults" in parameters:
                raise client_error(
                    "InvalidParameterCombination",
                    "The parameter instancesSet cannot be used with the parameter maxResults",
                    "DescribeInstances",
                )
            if not 5 <= parameters.get("MaxResults", 5) <= 1000:
                raise invalid("DescribeInstances", "MaxResults is between 5 and 1000")
            filters = parameters.get("Filters", ())
            if any(len(each["Values"]) > 200 for each in filters):
                raise client_error(
                    "FilterLimitExceeded", "The maximum number of filter values is 200.",
                    "DescribeInstances",
                )  # fmt: skip
            seen = self._seen()
            if ids:
                self._require("DescribeInstances", ids)
                seen = [instance for instance in seen if instance.instance_id in ids]
            elif self.cloud.random.random() < self.cloud.weather.flicker_share and seen:
                seen.pop(self.cloud.random.randrange(len(seen)))
            found = [
                instance
                for instance in seen
                if all(matches(each, self._values(instance, each["Name"])) for each in filters)
            ]
            return page(
                "Reservations",
                [
                    {
                        "ReservationId": f"r-{instance.instance_id[2:]}",
                        "OwnerId": ACCOUNT,
                        "RequesterId": ACCOUNT,
                        "Groups": [],
                        "Instances": [self._describe(instance)],
                    }
                    for instance in found
                ],
                parameters,
            )

        return self._call("DescribeInstances", parameters, apply)

    def _seen(self) -> list[CloudInstance]:
        now, forget = self._now(), timedelta(seconds=self.cloud.weather.forget_s)
        return [
            instance
            for instance in self.cloud.instances.values()
            if now >= instance.visible_at
            and (instance.gone_at is None or instance.stopped or now < instance.gone_at + forget)
        ]

    def _as_of(self, instance: CloudInstance) -> datetime:
        """The moment of which an answer tells: the end of an instance is seen late."""
        return self._now() - timedelta(seconds=instance.stale_s)

    def _values(self, instance: CloudInstance, name: str) -> list[str]:
        """What a filter of this name compares with."""
        tags = instance.seen_tags(self._now())
        if name == "tag-key":
            return list(tags)
        if name.startswith("tag:"):
            return [tags[name[4:]]] if name[4:] in tags else []
        plain: dict[str, Callable[[], str]] = {
            "instance-id": lambda: instance.instance_id,
            "instance-state-name": lambda: instance.state(self._as_of(instance))[1],
            "instance-type": lambda: instance.pool[0],
            "availability-zone": lambda: instance.pool[1],
            "subnet-id": lambda: instance.subnet_id,
            "client-token": lambda: f"{instance.fleet_id}-0",
            "instance-lifecycle": lambda: "spot" if instance.spot else "on-demand",
        }
        if name not in plain:
            raise invalid("DescribeInstances", f"The filter '{name}' is invalid")
        return [plain[name]()]

    def _describe(self, instance: CloudInstance) -> dict[str, Any]:
        at = self._as_of(instance)
        code, state = instance.state(at)
        data = instance.template
        described: dict[str, Any] = {
            "InstanceId": instance.instance_id,
            "ImageId": data.get("ImageId", "ami-0000000000000000a"),
            "InstanceType": instance.pool[0],
            "State": {"Code": code, "Name": state},
            "LaunchTime": instance.launched_at,
            "Placement": {
                "AvailabilityZone": instance.pool[1],
                "GroupName": "",
                "Tenancy": "default",
            },
            # Not the token of CreateFleet: that one is not seen here.
            "ClientToken": f"{instance.fleet_id}-0",
            "Architecture": "x86_64",
            "SubnetId": instance.subnet_id,
            "StateTransitionReason": "",
            "Tags": [
                {"Key": key, "Value": value}
                for key, value in instance.seen_tags(self._now()).items()
            ],
        }
        if instance.spot:
            described["InstanceLifecycle"] = "spot"
            described["SpotInstanceRequestId"] = f"sir-{instance.instance_id[-8:]}"
        if state not in {"pending", "running"}:
            reason, transition = instance.reasons()
            described |= {"StateReason": reason, "StateTransitionReason": transition}
        return described

    # -- ending -----------------------------------------------------------------------------

    def terminate_instances(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            self._require("TerminateInstances", parameters["InstanceIds"])
            return {
                "TerminatingInstances": [
                    self._change(self.cloud.instances[name], "shutting-down", _terminate)
                    for name in parameters["InstanceIds"]
                ]
            }

        return self._call("TerminateInstances", parameters, apply)

    def _change(
        self, instance: CloudInstance, name: str, change: Callable[[CloudInstance], None]
    ) -> dict[str, Any]:
        before = instance.state(self._now())
        change(instance)
        after = instance.state(self._now())
        return {
            "InstanceId": instance.instance_id,
            "PreviousState": {"Code": before[0], "Name": before[1]},
            "CurrentState": {"Code": after[0], "Name": after[1]},
        }

    def create_tags(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            tags = {each["Key"]: each["Value"] for each in parameters["Tags"]}
            instances = [name for name in parameters["Resources"] if name.startswith("i-")]
            self._require("CreateTags", instances)
            for name in instances:
                since = self._now() + timedelta(
                    seconds=self.cloud.random.uniform(0, self.cloud.weather.hidden_s)
                )
                self.cloud.instances[name].late_tags.append((since, tags))
            return {}

        return self._call("CreateTags", parameters, apply)

    # -- shared -----------------------------------------------------------------------------

    def _require(self, operation: str, ids: Sequence[str]) -> None:
        """Raise as AWS does for an id that it does not know, or not yet, or no more."""
        known = {instance.instance_id for instance in self._seen()}
        missing = [name for name in ids if name not in known]
        if missing:
            some = "IDs" if len(missing) > 1 else "ID"
            verb = "do" if len(missing) > 1 else "does"
            raise client_error(
                "InvalidInstanceID.NotFound",
                f"The instance {some} '{', '.join(missing)}' {verb} not exist",
                operation,
            )

    def _template_name(self, operation: str, by: dict[str, Any]) -> str:
        name: str = by.get("LaunchTemplateName", "")
        if by.get("LaunchTemplateId"):
            name = next(
                (
                    name
                    for name, template in self.cloud.templates.items()
                    if template["LaunchTemplateId"] == by["LaunchTemplateId"]
                ),
                "",
            )
        if name not in self.cloud.templates:
            raise _no_template(operation, name or by.get("LaunchTemplateId", ""))
        return name

    def _template(self, name: str) -> dict[str, Any]:
        return {key: value for key, value in self.cloud.templates[name].items() if key != "Data"}

    def _zone(self, override: dict[str, Any]) -> str:
        if override.get("SubnetId"):
            if override["SubnetId"] not in self.cloud.subnets:
                raise client_error(
                    "InvalidSubnetID.NotFound",
                    f"The subnet ID '{override['SubnetId']}' does not exist",
                    "CreateFleet",
                )
            return self.cloud.subnets[override["SubnetId"]]
        zone: str = override["AvailabilityZone"]
        return zone


def _terminate(instance: CloudInstance) -> None:
    instance.end("user")


def _no_template(operation: str, name: str) -> Any:
    return client_error(
        "InvalidLaunchTemplateName.NotFoundException",
        f"The specified launch template, with template name {name}, does not exist.",
        operation,
    )


def _tags_of(parameters: dict[str, Any], kind: str) -> list[dict[str, str]]:
    return [
        tag
        for each in parameters.get("TagSpecifications", ())
        if each["ResourceType"] == kind
        for tag in each["Tags"]
    ]


def _template_values(template: dict[str, Any], name: str) -> list[str]:
    tags = {each["Key"]: each["Value"] for each in template["Tags"]}
    if name == "launch-template-name":
        return [template["LaunchTemplateName"]]
    if name == "tag-key":
        return list(tags)
    return [tags[name[4:]]] if name.startswith("tag:") and name[4:] in tags else []
