"""What can go wrong at a call, drawn from a seed.

At every call: it is refused before it is applied (throttled, no connection, a fault of the
service); it is applied and the answer is lost; the caller dies before or after it; the caller is
held up, before or after it is applied, while time passes and others act.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    ReadTimeoutError,
)

from spotfirst.errors import StorageUnavailable
from spotfirst.storage import Storage

_T = TypeVar("_T")
_GRAVE = {
    "CreateFleet", "TerminateInstances", "CreateLaunchTemplate", "DeleteLaunchTemplate", "create",
    "CreateAccessPoint", "PutAccessPointPolicy", "DeleteAccessPoint",
}  # fmt: skip
"""Calls of which there are few, and that must not be done twice, or not at all. The last one is
the storage's, by which journal and chain grow."""
_GRAVE_FACTOR = 3
_ENDPOINT = "https://ec2.us-east-1.amazonaws.com/"


class Died(BaseException):
    """The calling process is gone, right here."""


class Rates:
    """How often each fault comes, per call."""

    def __init__(
        self,
        *,
        refused: float = 0.0,
        lost: float = 0.0,
        died: float = 0.0,
        held_up: float = 0.0,
    ) -> None:
        self.refused, self.lost, self.died, self.held_up = refused, lost, died, held_up

    @property
    def any(self) -> bool:
        return bool(self.refused or self.lost or self.died or self.held_up)


class Faults:
    """Draws a fault for each call of one caller. The same seed is the same story.

    ``hold_up`` is what happens meanwhile, when the caller is held up.
    """

    def __init__(
        self,
        seed: object = 0,
        rates: Rates | None = None,
        *,
        hold_up: Callable[[], None] = lambda: None,
    ) -> None:
        self._random = random.Random(f"faults/{seed}")
        self.rates = rates or Rates()
        self._hold_up = hold_up
        self.injected: Counter[str] = Counter()
        self.armed = True
        self.hold_once = ""
        """The next call of this operation is held up before it is applied."""
        self.die_after_hold = False
        """And its caller dies once it is applied."""

    def around(
        self,
        what: str,
        apply: Callable[[], _T],
        *,
        refusals: Callable[[str, random.Random], Exception],
        losses: Callable[[str, random.Random], Exception],
    ) -> _T:
        """The answer of ``apply``, or a fault instead of it or after it."""
        if self.hold_once == what:
            self.hold_once = ""
            self.injected["held up"] += 1
            self._hold_up()
            answer = apply()
            if self.die_after_hold:
                raise Died
            return answer
        if not self.armed or not self.rates.any:
            return apply()
        draw, rates = self._random.random(), self.rates
        if what in _GRAVE:
            draw /= _GRAVE_FACTOR
        # Each fault has its own stretch of [0, 1); the halves of two are before and after.
        if draw < rates.refused:
            self.injected["refused"] += 1
            raise refusals(what, self._random)
        draw -= rates.refused
        if draw < rates.lost:
            apply()
            self.injected["lost"] += 1
            raise losses(what, self._random)
        draw -= rates.lost
        if draw < rates.died:
            self.injected["died"] += 1
            if draw < rates.died / 2:
                apply()
            raise Died
        draw -= rates.died
        if draw < rates.held_up:
            self.injected["held up"] += 1
            if draw < rates.held_up / 2:
                self._hold_up()
                return apply()
            answer = apply()
            self._hold_up()
            return answer
        return apply()


def client_error(code: str, message: str, operation: str, *, status: int = 400) -> Any:
    """An error answer of AWS's."""
    return ClientError(
        {
            "Error": {"Code": code, "Message": message},
            "ResponseMetadata": {"HTTPStatusCode": status, "RequestId": "0", "RetryAttempts": 0},
        },
        operation,
    )


def refused_by_aws(operation: str, random_: random.Random) -> Any:
    """The error of a call that was not applied, as boto3 tells it once its retries are over."""
    kind = random_.randrange(4)
    if kind == 0:
        return ConnectTimeoutError(endpoint_url=_ENDPOINT)
    if kind == 1:
        return EndpointConnectionError(endpoint_url=_ENDPOINT, error="no route")
    if kind == 2:
        return client_error("Unavailable", "The service is unavailable.", operation, status=503)
    return client_error("RequestLimitExceeded", "Request limit exceeded.", operation, status=503)


def lost_by_aws(operation: str, random_: random.Random) -> Any:
    """The error of a call that was applied, and the caller cannot know."""
    kind = random_.randrange(3)
    if kind == 0:
        return ReadTimeoutError(endpoint_url=_ENDPOINT, error="timed out")
    if kind == 1:
        return ConnectionClosedError(endpoint_url=_ENDPOINT)
    return client_error("InternalError", "An internal error has occurred.", operation, status=500)


class FaultyStorage:
    """A storage as one process sees it, with its faults at every call."""

    def __init__(self, inner: Storage, faults: Faults) -> None:
        self._inner, self._faults = inner, faults
        self.url = inner.url

    def child(self, path: str) -> FaultyStorage:
        return FaultyStorage(self._inner.child(path), self._faults)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._inner, name)
        if not callable(call):
            return call
        return lambda *args, **more: self._faults.around(
            name, lambda: call(*args, **more), refusals=_refused_by_storage, losses=_lost_by_storage
        )


def _refused_by_storage(what: str, _: random.Random) -> Exception:
    return StorageUnavailable(f"{what}: not applied")


def _lost_by_storage(what: str, _: random.Random) -> Exception:
    return StorageUnavailable(f"{what}: applied, but the answer was lost")
