"""What a simulated EC2 says of the account: subnets, images, types, and prices."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from tests.fakes.client import FakeClient, invalid, matches, page
from tests.fakes.faults import client_error


class AccountCalls(FakeClient):
    """The part of the EC2 client that tells what there is."""

    def describe_subnets(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            asked = parameters.get("SubnetIds") or list(self.cloud.subnets)
            if missing := [name for name in asked if name not in self.cloud.subnets]:
                raise client_error(
                    "InvalidSubnetID.NotFound",
                    f"The subnet ID '{missing[0]}' does not exist",
                    "DescribeSubnets",
                )
            found = [
                {
                    "SubnetId": name,
                    "AvailabilityZone": self.cloud.subnets[name],
                    "AvailabilityZoneId": f"use1-az{ord(self.cloud.subnets[name][-1]) - 96}",
                    "VpcId": "vpc-0000000000000000a",
                    "State": "available",
                    "CidrBlock": "10.0.0.0/20",
                    "AvailableIpAddressCount": 4000,
                    "DefaultForAz": False,
                    "MapPublicIpOnLaunch": False,
                    "Tags": [],
                }
                for name in asked
            ]
            return page("Subnets", found, parameters)

        return self._call("DescribeSubnets", parameters, apply)

    def describe_images(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            found = [
                {
                    "ImageId": name,
                    "Name": "Deep Learning AMI",
                    "State": "available",
                    "Architecture": "x86_64",
                    "RootDeviceName": "/dev/sda1",
                    "RootDeviceType": "ebs",
                    "BlockDeviceMappings": [
                        {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 75, "VolumeType": "gp3"}}
                    ],
                }
                for name in parameters["ImageIds"]
            ]
            return {"Images": found}

        return self._call("DescribeImages", parameters, apply)

    def describe_instance_type_offerings(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            found = []
            for kind, zone in self.cloud.pools:
                values = {"instance-type": [kind], "location": [zone]}
                if all(matches(f, values.get(f["Name"], [])) for f in parameters["Filters"]):
                    found.append(
                        {
                            "InstanceType": kind,
                            "LocationType": "availability-zone",
                            "Location": zone,
                        }
                    )
            return page("InstanceTypeOfferings", found, parameters)

        return self._call("DescribeInstanceTypeOfferings", parameters, apply)

    def describe_spot_price_history(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            kinds = set(parameters.get("InstanceTypes") or self.cloud.types)
            zones = set(self.cloud.subnets.values())
            if parameters.get("AvailabilityZone"):
                zones = {parameters["AvailabilityZone"]}
            products = parameters.get("ProductDescriptions") or ["Linux/UNIX"]
            for each in parameters.get("Filters", ()):
                if each["Name"] == "availability-zone":
                    zones &= set(each["Values"])
                elif each["Name"] == "instance-type":
                    kinds &= set(each["Values"])
                elif each["Name"] == "product-description":
                    products = list(each["Values"])
                else:
                    raise invalid("DescribeSpotPriceHistory", f"filter {each['Name']}")
            start = parameters.get("StartTime") or self._now() - timedelta(days=90)
            end = min(parameters.get("EndTime") or self._now(), self._now())
            rows: list[dict[str, Any]] = []
            for (kind, zone), market in self.cloud.pools.items():
                if kind not in kinds or zone not in zones:
                    continue
                prices = [(since, price) for since, price in market.prices if since <= end]
                # The one in force at the start is told, too.
                first = max((i for i, (since, _) in enumerate(prices) if since <= start), default=0)
                for since, price in prices[first:]:
                    rows.extend(
                        {
                            "AvailabilityZone": zone, "InstanceType": kind,
                            "ProductDescription": product, "SpotPrice": f"{price:.6f}",
                            "Timestamp": since,
                        }
                        for product in products
                    )  # fmt: skip
            rows.sort(key=lambda row: row["Timestamp"], reverse=True)
            return page("SpotPriceHistory", rows, parameters)

        return self._call("DescribeSpotPriceHistory", parameters, apply)

    def get_spot_placement_scores(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            zones = sorted(set(self.cloud.subnets.values()))
            rows = [
                {"Region": self.cloud.region, "AvailabilityZoneId": f"id-{zone}", "Score": 7}
                for zone in zones
            ]
            return page("SpotPlacementScores", rows, parameters)

        return self._call("GetSpotPlacementScores", parameters, apply)
