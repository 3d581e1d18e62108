"""What the clients of a simulated AWS share: faults at each call, pages, and filters."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, TypeVar

from tests.fakes.cloud import Cloud
from tests.fakes.faults import Faults, client_error, lost_by_aws, refused_by_aws

_T = TypeVar("_T")
_OK = {"ResponseMetadata": {"HTTPStatusCode": 200, "RequestId": "0", "RetryAttempts": 0}}


class FakeClient:
    """What all clients share: counting, faults, paginators."""

    def __init__(self, cloud: Cloud, faults: Faults | None = None) -> None:
        self.cloud = cloud
        self.faults = faults or Faults()
        self.calls: list[tuple[str, dict[str, Any]]] = []
        """(operation, parameters), in order."""

    def _call(
        self, operation: str, parameters: dict[str, Any], apply: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        self.calls.append((operation, parameters))
        self.cloud.calls[operation] += 1
        return self.faults.around(
            operation,
            lambda: {**apply(), **_OK},
            refusals=refused_by_aws,
            losses=lost_by_aws,
        )

    def get_paginator(self, method: str) -> Paginator:
        return Paginator(getattr(self, method))

    def _now(self) -> datetime:
        return self.cloud.clock.now


class Paginator:
    """Follows ``NextToken``."""

    def __init__(self, method: Callable[..., dict[str, Any]]) -> None:
        self._method = method

    def paginate(self, **parameters: Any) -> Iterator[dict[str, Any]]:
        config = parameters.pop("PaginationConfig", {})
        if config.get("PageSize"):
            parameters["MaxResults"] = config["PageSize"]
        while True:
            page = self._method(**parameters)
            yield page
            if not page.get("NextToken"):
                return
            parameters["NextToken"] = page["NextToken"]


def invalid(operation: str, message: str) -> Any:
    return client_error("InvalidParameterValue", message, operation)


def matches(wanted: dict[str, Any], values: Sequence[str]) -> bool:
    """Whether one of a filter's values, in which ``*`` and ``?`` stand for others, is there."""
    return any(fnmatch.fnmatchcase(value, each) for each in wanted["Values"] for value in values)


def page(name: str, rows: list[_T], parameters: dict[str, Any]) -> dict[str, Any]:
    """One page of an answer. The token says where the next one begins."""
    begin = int(parameters.get("NextToken") or 0)
    size = parameters.get("MaxResults") or 1000
    answer: dict[str, Any] = {name: rows[begin : begin + size]}
    if begin + size < len(rows):
        answer["NextToken"] = str(begin + size)
    return answer
