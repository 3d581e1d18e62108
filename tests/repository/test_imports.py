"""Each side imports on a machine that lacks what only the other side has."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSTANCE = ROOT / "checkpointing" / "spotfirst"
CONTROL = ROOT / "operators" / "spotfirst_airflow"
UI = ROOT / "plugins" / "spotfirst_ui"

# The parts of spotfirst_airflow that are Airflow's: by nature they need it.
AIRFLOW_PARTS = {"operators", "triggers", "hooks", "links", "decorators", "notifiers", "sensors"}

# Imports what it is told to, with some packages gone, and prints what went wrong for each module.
PROBE = """
import importlib, importlib.abc, json, sys, traceback
modules, blocked = json.load(sys.stdin)
class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked by this test", name=name)
sys.meta_path.insert(0, Gone())
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


def says_it_needs_torch(package: Path, module: str) -> bool:
    """Tell whether a module imports torch (or what pulls it in) at its top, outside any `if`."""
    base = package.parent.joinpath(*module.split("."))
    source = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    heavy = {"torch", "lightning", "pytorch_lightning", "transformers", "numpy"}
    for node in ast.parse(source.read_text()).body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        if any(name.partition(".")[0] in heavy for name in names):
            return True
    return False


def failures(names: list[str], blocked: set[str]) -> dict[str, str]:
    assert names
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps([names, sorted(blocked)]),
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_probe_notices_a_blocked_import() -> None:
    assert "blocked by this test" in failures(["torch"], {"torch"})["torch"]


def test_the_instance_side_imports_without_airflow_and_boto3() -> None:
    blocked = {"airflow", "boto3", "spotfirst_airflow", "spotfirst_ui"}
    assert failures(modules(INSTANCE), blocked) == {}


def test_the_instance_side_imports_without_torch_except_where_it_trains() -> None:
    names = [name for name in modules(INSTANCE) if not says_it_needs_torch(INSTANCE, name)]
    assert "spotfirst" in names
    assert failures(names, {"torch", "airflow", "boto3", "lightning", "transformers"}) == {}


def test_what_decides_launches_and_counts_imports_without_airflow_torch_and_boto3() -> None:
    plain = [name for name in modules(CONTROL) if not AIRFLOW_PARTS & set(name.split(".")[1:2])]
    assert "spotfirst_airflow.policies" in plain
    assert failures(plain, {"airflow", "torch", "boto3"}) == {}


def test_what_airflow_loads_imports_without_torch() -> None:
    blocked = {"torch", "lightning", "transformers"}
    assert failures([*modules(CONTROL), *modules(UI)], blocked) == {}
