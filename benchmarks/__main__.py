"""``python -m benchmarks``: all benchmarks, one after the other."""

from __future__ import annotations

from benchmarks import changeover

changeover.main()
