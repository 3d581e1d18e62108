"""The benchmarks: which there are, and all of them one after the other.

``python -m benchmarks [NAME…] [--full] [--list]``, or ``python -m benchmarks.NAME`` for one. Quick by
default, which is for a look; figures to quote come from ``--full``.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent


def found() -> dict[str, str]:
    """The benchmarks and what each measures: modules that do not begin with an underscore."""
    modules = [path for path in _HERE.glob("*.py") if not path.name.startswith("_")]
    paths = {path.stem: path for path in modules}
    paths |= {path.parent.name: path for path in _HERE.glob("*/__main__.py")}
    return {name: _summary(path) for name, path in sorted(paths.items())}


def _summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.partition("\n")[0]


def main() -> int:
    """Run those that are named, or all; the number that failed."""
    known = found()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--list", action="store_true", help="only say which there are")
    parser.add_argument("--full", action="store_true", help="measure for longer")
    parser.add_argument("--quick", action="store_true", help="the default")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are: {', '.join(known)}")
    failed = 0
    for name in options.names or known:
        print(f"{name}: {known[name]}", flush=True)
        if not options.list:
            words = [sys.executable, "-m", f"benchmarks.{name}"]
            done = subprocess.run(
                words if options.full else [*words, "--quick"], cwd=_HERE.parent, check=False
            )
            failed += done.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
