"""What ``spotfirst doctor`` says of one thing that a run needs, and what holds for every fleet."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

from spotfirst.errors import SpotfirstError
from spotfirst.storage import Storage
from spotfirst.wire import Record

__all__ = ["Check", "Step", "check_clock", "check_storage", "check_storage_clock"]

WARN_SKEW_S = 30.0
FAIL_SKEW_S = 300.0
"""AWS refuses requests that were signed this long ago or ahead of now (SigV4)."""


class Check(Record):
    """One thing looked at: what was found, and how to repair it where it is wrong.

    ``warning``: a run works, but worse or at a higher cost; or nobody let us look. ``failed``: a
    run would not work. ``skipped``: it does not apply, or something before it failed.
    """

    name: str
    verdict: Literal["ok", "warning", "failed", "skipped"]
    found: str
    fix: str = ""


class Step(Record):
    """A group of checks: its name is for people who wait."""

    name: str
    run: Callable[[], list[Check]]


def check_storage(storage: Storage) -> list[Check]:
    """Whether objects can be written, read, and created only if absent; by doing it."""
    begun = time.perf_counter()
    try:
        storage.probe()
    except SpotfirstError as error:
        fix = "let the controller's role list, read, write and delete below this URL"
        if "ignores" in str(error):
            fix = "use AWS S3, or a server that honours If-None-Match: *"
        return [Check(name="storage", verdict="failed", found=str(error), fix=fix)]
    took_s = time.perf_counter() - begun
    found = f"{storage.url} writes, reads, creates only if absent ({took_s:.1f} s)"
    return [Check(name="storage", verdict="ok", found=found)]


def check_clock(skew_s: float, *, source: str, error_s: float = 0.0) -> Check:
    """``skew_s`` is how far our clock is ahead of the source's, known to ``error_s``."""
    size = max(0.0, abs(skew_s) - error_s)
    words = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} {source}"
    if size < WARN_SKEW_S:
        about = f"within {max(abs(skew_s), error_s, 0.1):.1f} s of {source}"
        return Check(name="clock", verdict="ok", found=about)
    if size < FAIL_SKEW_S:
        why = f"{words}: deadlines, prices and notices are misjudged by as much"
        return Check(name="clock", verdict="warning", found=why, fix=_CLOCK_FIX)
    why = f"{words}: AWS refuses requests that are 5 minutes off"
    return Check(name="clock", verdict="failed", found=why, fix=_CLOCK_FIX)


_CLOCK_FIX = "set this machine's clock: chronyc makestep, or timedatectl set-ntp true"


def check_storage_clock(storage: Storage, *, clock: Callable[[], float] = time.time) -> list[Check]:
    """Our clock against that of whoever keeps the storage: a file server, or S3."""
    scheme, _, rest = storage.url.partition("://")
    try:
        before = clock()
        if scheme in {"s3", "s3a"}:
            theirs, error_s = _http_time(_s3_endpoint()), 1.0
        elif scheme == "memory":
            return [Check(name="clock", verdict="skipped", found="the storage has no clock")]
        else:
            theirs, error_s = _file_time(storage, Path(rest or scheme)), 0.0
        after = clock()
    except (OSError, ValueError, SpotfirstError) as error:
        found = f"the storage does not tell the time: {error}"
        return [Check(name="clock", verdict="skipped", found=found)]
    skew_s = (before + after) / 2 - theirs
    error_s += (after - before) / 2
    return [check_clock(skew_s, source="the storage", error_s=error_s)]


def _file_time(storage: Storage, root: Path) -> float:
    """What a file is stamped with that is written now."""
    name = f"probe/{secrets.token_hex(8)}"
    try:
        storage.write(name, b"clock")
        return (root / name).stat().st_mtime
    finally:
        with contextlib.suppress(SpotfirstError):
            storage.delete(name)


def _s3_endpoint() -> str:
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return named or "https://s3.amazonaws.com"


def _http_time(url: str) -> float:
    """The Date of any answer, a refusal too."""
    if not url.startswith(("http://", "https://")):
        msg = f"{url} is no address of a server"
        raise ValueError(msg)
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - checked above
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 - checked above
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:
        date = error.headers["Date"]
    return parsedate_to_datetime(date or "").timestamp()
