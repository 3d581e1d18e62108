"""One wheel holds both sides, and what it announces is there."""

from __future__ import annotations

import importlib
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.conftest import HAS_TORCH

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("spotfirst", "spotfirst_airflow", "spotfirst_ui")
ENTRY_POINTS = [
    point for point in distribution("spotfirst").entry_points if point.group != "console_scripts"
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Build the wheel and return the paths in it."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("spotfirst-*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_wheel_contains_the_three_packages_and_nothing_else(wheel: list[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == set(PACKAGES)


def test_the_wheel_contains_every_module(wheel: list[str]) -> None:
    sources = {
        str(path.relative_to(folder))
        for folder in (ROOT / "checkpointing", ROOT / "operators", ROOT / "plugins")
        for path in folder.rglob("*.py")
    }
    assert sources <= set(wheel)


def test_the_wheel_says_that_it_is_typed(wheel: list[str]) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheel)


def test_no_top_level_package_takes_a_common_name() -> None:
    for folder in ("checkpointing", "operators", "plugins"):
        assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("point", ENTRY_POINTS, ids=lambda point: f"{point.group}:{point.name}")
def test_every_entry_point_loads(point) -> None:  # noqa: ANN001
    assert point.load() is not None


def test_the_command_line_loads() -> None:
    (script,) = distribution("spotfirst").entry_points.select(group="console_scripts")
    assert callable(script.load())


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_leaks_from_a_package(package: str) -> None:
    module = importlib.import_module(package)
    exported = set(getattr(module, "__all__", ()))
    for name in exported:
        if HAS_TORCH or name != "Checkpointer":
            assert getattr(module, name) is not None
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in {"annotations", "TYPE_CHECKING"}
        and getattr(value, "__module__", "") != "typing"
        and not getattr(value, "__spec__", None)  # submodules are reached by their own name
    }
    assert public <= exported
