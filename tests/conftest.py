"""Fixtures for all tests."""

from __future__ import annotations

import importlib.util
import os
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from devstack.s3 import S3Server

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

# On a busy machine a slow example says nothing about the code.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

_LONG = {
    "airflow": ("tests/airflow/",),  # they share one Airflow
    # Each starts one of its own: one at a time.
    "stacks": (
        "tests/demo/",
        "tests/repository/test_compose_natively.py",
        "tests/repository/test_devstack.py",
    ),
    "endtoend": ("tests/endtoend/",),  # many trainings; they share one reference
}
"""What takes minutes: each in one process, and begun first."""


HAS_TORCH = importlib.util.find_spec("torch") is not None
_TRAININGS = ("tests/demo/", "tests/endtoend/", "tests/integrations/")
"""Their scripts import torch, each in a process of its own."""


def pytest_configure(config: pytest.Config) -> None:
    """Name each failure when it happens: a run that is cut off has said what failed."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_FailuresAtOnce(config))


class _FailuresAtOnce:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            where = f"{report.nodeid} ({report.when}, {report.duration:.0f} s)"
            terminal.write(f"\nFAILED {where}: {message[:300]}\n")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip, where there is no torch, the modules that import it, and the trainings."""
    report = yield
    if HAS_TORCH or not isinstance(collector, pytest.Module):
        return report
    needs_torch = "No module named 'torch'" in str(report.longrepr)
    if needs_torch or collector.nodeid.startswith(_TRAININGS):
        report.outcome, report.result = "skipped", []
        report.longrepr = (str(collector.path), 0, "Skipped: there is no torch here")
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs torch where there is none. Begin with what takes longest."""
    for item in items:
        if not HAS_TORCH and item.get_closest_marker("torch"):
            item.add_marker(pytest.mark.skip(reason="there is no torch here"))
    order = list(_LONG)
    items.sort(key=lambda item: order.index(g) if (g := _group(item.nodeid)) in order else 9)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file's tests in one process, and those that share something heavy."""
    from xdist.scheduler import LoadScopeScheduling  # only there when tests run in several

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def _group(nodeid: str) -> str:
    path = nodeid.split("::", 1)[0]
    return next((name for name, places in _LONG.items() if path.startswith(places)), path)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Yield a real S3 server, shared by all tests; `s3.environment()` is how to reach it."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_url(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return an empty prefix of the test's own, and point this process's AWS variables at it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return f"{s3.url}/{uuid.uuid4().hex}"
