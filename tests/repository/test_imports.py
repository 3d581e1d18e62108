"""Each side imports on a machine that lacks what only the other side has."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
INSTANCE = ROOT / "checkpointing" / "spotfirst"
CONTROL = ROOT / "operators" / "spotfirst_airflow"
UI = ROOT / "plugins" / "spotfirst_ui"

# The parts of spotfirst_airflow that are Airflow's: by nature they need it.
AIRFLOW_PARTS = {
    "operators", "reaper", "triggers", "hooks", "links", "decorators", "notifiers", "sensors",
    "taskrecord",
}  # fmt: skip

# Imports what it is told to, with some packages gone, and prints what went wrong for each module.
PROBE = """
import importlib, json, sys, traceback
modules, blocked = json.load(sys.stdin)
sys.modules |= dict.fromkeys(blocked)  # so an import fails, and whoever only looks finds nothing
failed = {}
for module in modules:
    try:
        importlib.import_module(module)
    except BaseException:
        failed[module] = traceback.format_exc(limit=-4)
print(json.dumps(failed))
"""


def modules(package: Path) -> list[str]:
    """List a package's modules; those that run when imported as programs do are left out."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        if parts[-1] != "__main__":
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def top_imports(package: Path, module: str) -> set[str]:
    """What a module imports at its top, outside any `if`; names of modules, or of what is in them."""
    base = package.parent.joinpath(*module.split("."))
    source = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    names: set[str] = set()
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
            names.add(node.module or "")
    return names


def need_torch(package: Path) -> set[str]:
    """The modules that import torch (or what pulls it in), themselves or through one another."""
    heavy = {"torch", "lightning", "pytorch_lightning", "transformers", "accelerate", "numpy"}
    imports = {module: top_imports(package, module) for module in modules(package)}
    need = {
        module
        for module, names in imports.items()
        if heavy & {name.partition(".")[0] for name in names}
    }
    while more := {module for module in imports.keys() - need if imports[module] & need}:
        need |= more
    return need


def failures(names: list[str], blocked: set[str]) -> dict[str, str]:
    assert names
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps([names, sorted(blocked)]),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_probe_notices_a_blocked_import() -> None:
    assert "import of torch halted" in failures(["torch"], {"torch"})["torch"]


@pytest.mark.torch
def test_the_instance_side_imports_without_airflow_and_boto3() -> None:
    blocked = {"airflow", "boto3", "spotfirst_airflow", "spotfirst_ui"}
    assert failures(modules(INSTANCE), blocked) == {}


def test_the_instance_side_imports_without_torch_except_where_it_trains() -> None:
    heavy = need_torch(INSTANCE)
    names = [name for name in modules(INSTANCE) if name not in heavy]
    assert {"spotfirst", "spotfirst.agent.attempt", "spotfirst.checkpoints.files"} <= set(names)
    assert failures(names, {"torch", "airflow", "boto3", "lightning", "transformers"}) == {}


def test_what_decides_launches_and_counts_imports_without_airflow_torch_and_boto3() -> None:
    plain = [name for name in modules(CONTROL) if not AIRFLOW_PARTS & set(name.split(".")[1:2])]
    assert "spotfirst_airflow.policies" in plain
    assert failures(plain, {"airflow", "torch", "boto3"}) == {}


def test_what_airflow_loads_imports_without_torch() -> None:
    blocked = {"torch", "lightning", "transformers"}
    assert failures([*modules(CONTROL), *modules(UI)], blocked) == {}
