"""The other clients, and :class:`FakeAws`, which hands them out as production's ``Aws`` does."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

from tests.fakes.client import FakeClient
from tests.fakes.cloud import ACCOUNT, Cloud
from tests.fakes.ec2client import FakeEc2
from tests.fakes.faults import Faults, client_error
from tests.fakes.s3control import FakeS3Control

QUEUE_URL = "https://sqs.us-east-1.amazonaws.com/123456789012/spotfirst"


class FakeSsm(FakeClient):
    """Public parameters: every name is that of the same image."""

    def get_parameter(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            name = parameters["Name"]
            if not name.startswith("/"):
                raise client_error("ParameterNotFound", "", "GetParameter")
            return {
                "Parameter": {
                    "Name": name,
                    "Type": "String",
                    "Value": self.cloud.default_image,
                    "Version": 1,
                    "LastModifiedDate": self.cloud.clock.now,
                    "ARN": f"arn:aws:ssm:{self.cloud.region}::parameter{name}",
                    "DataType": "aws:ec2:image",
                }
            }

        return self._call("GetParameter", parameters, apply)


class FakeSqs(FakeClient):
    """One queue. A message that was received and not deleted comes again."""

    def receive_message(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            self._check("ReceiveMessage", parameters)
            limit = parameters.get("MaxNumberOfMessages", 1)
            if not 1 <= limit <= 10:
                raise client_error("InvalidParameterValue", "at most 10 messages", "ReceiveMessage")
            now, again_s = self.cloud.clock.now, parameters.get("VisibilityTimeout", 30)
            due = [message for message in self.cloud.queue if message.due <= now][:limit]
            for message in due:
                message.receipts += 1
                message.due = now + timedelta(seconds=again_s)
            if not due:
                return {}
            return {
                "Messages": [
                    {
                        "MessageId": message.message_id,
                        "ReceiptHandle": f"{message.message_id}/{message.receipts}",
                        "MD5OfBody": hashlib.md5(message.body.encode()).hexdigest(),
                        "Body": message.body,
                    }
                    for message in due
                ]
            }

        return self._call("ReceiveMessage", parameters, apply)

    def delete_message(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            self._check("DeleteMessage", parameters)
            self._delete(parameters["ReceiptHandle"])
            return {}

        return self._call("DeleteMessage", parameters, apply)

    def delete_message_batch(self, **parameters: Any) -> dict[str, Any]:
        def apply() -> dict[str, Any]:
            self._check("DeleteMessageBatch", parameters)
            for entry in parameters["Entries"]:
                self._delete(entry["ReceiptHandle"])
            return {"Successful": [{"Id": entry["Id"]} for entry in parameters["Entries"]]}

        return self._call("DeleteMessageBatch", parameters, apply)

    def _delete(self, handle: str) -> None:
        name = handle.partition("/")[0]
        self.cloud.queue[:] = [m for m in self.cloud.queue if m.message_id != name]

    def _check(self, operation: str, parameters: dict[str, Any]) -> None:
        if parameters["QueueUrl"] != QUEUE_URL:
            raise client_error(
                "AWS.SimpleQueueService.NonExistentQueue",
                "The specified queue does not exist.",
                operation,
            )


class FakeSts(FakeClient):
    """Who is calling."""

    def get_caller_identity(self, **parameters: Any) -> dict[str, Any]:
        identity = {
            "UserId": "AROAEXAMPLE:test",
            "Account": ACCOUNT,
            "Arn": f"arn:aws:sts::{ACCOUNT}:assumed-role/test/test",
        }
        return self._call("GetCallerIdentity", parameters, lambda: identity)


class FakeIdentity:
    """Who calls. ``key`` differs for callers that share no answers: two processes, two keys."""

    def __init__(self, region: str, key: str = "") -> None:
        self.region = region
        self.key = (region, key, "", "")


class FakeAws:
    """One process's clients of a simulated cloud: what production calls ``Aws``."""

    def __init__(self, cloud: Cloud, faults: Faults | None = None, *, process: str = "") -> None:
        self.identity = FakeIdentity(cloud.region, process)
        self.cloud = cloud
        self.faults = faults or Faults()
        kinds = {
            "ec2": FakeEc2, "s3control": FakeS3Control, "ssm": FakeSsm, "sqs": FakeSqs,
            "sts": FakeSts,
        }  # fmt: skip
        self._clients = {name: kind(cloud, self.faults) for name, kind in kinds.items()}

    @property
    def region(self) -> str:
        return self.identity.region

    def client(self, service: str, region: str = "") -> Any:
        return self._clients[service]
