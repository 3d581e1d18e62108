"""The frameworks are imported where they are used, and missed with a clear message."""

from __future__ import annotations

import subprocess
import sys

from tests.waiting import PATIENCE_S

WITHOUT = """
import importlib, sys
sys.modules |= dict.fromkeys(["lightning", "transformers", "accelerate"])
for module in ("lightning", "huggingface", "accelerate"):
    try:
        importlib.import_module(f"spotfirst.integrations.{module}")
    except ImportError as error:
        print(error)
"""


def test_a_missing_framework_is_named_with_what_installs_it() -> None:
    assert _python(WITHOUT).splitlines() == [
        "spotfirst.integrations.lightning needs Lightning: pip install lightning",
        "spotfirst.integrations.huggingface needs transformers: pip install 'transformers>=5' accelerate",
        "spotfirst.integrations.accelerate needs Accelerate: pip install accelerate",
    ]


def test_spotfirst_imports_none_of_them() -> None:
    frameworks = "{'torch', 'lightning', 'transformers', 'accelerate'}"
    said = _python(f"import spotfirst.integrations, sys; print({frameworks} & sys.modules.keys())")
    assert said.strip() == "set()"


def _python(*arguments: str) -> str:
    command = [sys.executable, "-c", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=PATIENCE_S
    ).stdout
