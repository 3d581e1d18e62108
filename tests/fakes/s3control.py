"""S3's access points, as far as the fleet uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.fakes.client import FakeClient, page
from tests.fakes.cloud import ACCOUNT
from tests.fakes.faults import client_error


class FakeS3Control(FakeClient):
    """Names, policies and aliases. One that is made again has another alias."""

    def create_access_point(self, **parameters: Any) -> dict[str, Any]:
        name = parameters["Name"]

        def apply() -> dict[str, Any]:
            if self.cloud.access_point_error is not None:
                raise client_error(*self.cloud.access_point_error, "CreateAccessPoint")
            if name in self.cloud.access_points:
                code = "AccessPointAlreadyOwnedByYou"
                raise client_error(code, "It exists.", "CreateAccessPoint", status=409)
            alias = f"{name[:20]}-{self.cloud.random.getrandbits(128):032x}-s3alias"
            self.cloud.access_points[name] = {
                "Name": name, "Bucket": parameters["Bucket"], "Alias": alias,
                "CreationDate": self._now(), "NetworkOrigin": "Internet",
                "AccessPointArn": f"arn:aws:s3:{self.cloud.region}:{ACCOUNT}:accesspoint/{name}",
            }  # fmt: skip
            return {"AccessPointArn": f"…/{name}", "Alias": alias}

        return self._call("CreateAccessPoint", parameters, apply)

    def get_access_point(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            found = self._find("GetAccessPoint", parameters)
            return {key: value for key, value in found.items() if key != "Policy"}

        return self._call("GetAccessPoint", parameters, apply)

    def delete_access_point(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            self._find("DeleteAccessPoint", parameters)
            del self.cloud.access_points[parameters["Name"]]
            return {}

        return self._call("DeleteAccessPoint", parameters, apply)

    def get_access_point_policy(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            found = self._find("GetAccessPointPolicy", parameters)
            if "Policy" not in found:
                code = "NoSuchAccessPointPolicy"
                raise client_error(code, "It has none.", "GetAccessPointPolicy", status=404)
            return {"Policy": found["Policy"]}

        return self._call("GetAccessPointPolicy", parameters, apply)

    def put_access_point_policy(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            found = self._find("PutAccessPointPolicy", parameters)
            if self.cloud.access_point_policy_error is not None:
                raise client_error(
                    *self.cloud.access_point_policy_error, "PutAccessPointPolicy", status=403
                )
            found["Policy"] = parameters["Policy"]
            return {}

        return self._call("PutAccessPointPolicy", parameters, apply)

    def list_access_points(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            names = ("Name", "Bucket", "Alias", "AccessPointArn", "NetworkOrigin")
            rows = [{k: each[k] for k in names} for each in self.cloud.access_points.values()]
            return page("AccessPointList", rows, parameters)

        return self._call("ListAccessPoints", parameters, apply)

    def _call(
        self, operation: str, parameters: dict[str, Any], apply: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        assert parameters["AccountId"] == ACCOUNT
        return super()._call(operation, parameters, apply)

    def _find(self, operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        found = self.cloud.access_points.get(parameters["Name"])
        if found is None:
            raise client_error("NoSuchAccessPoint", "There is none.", operation, status=404)
        return found
