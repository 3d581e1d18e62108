"""What checkpoints cost a training, how fast they are durable and restored, beside peers and limits.

`python -m benchmarks.checkpointing [--quick] [--gpu] [--only JOB…] [--folder F]` trains a GPT on all
cores (124 million parameters in fp32 with fused AdamW: 1.49 GB of state) and saves it with
Spotfirst, `torch.save` and `dcp.async_save`, each in a process of its own. The last line is one
JSON object. Its figures are ratios, of medians:

- ``lost_vs_dcp_async``, ``lost_vs_torch_save``: lost training time per checkpoint (what stops the
  loop, and slower steps beside), the first save included;
- ``bare_vs_dcp_async``: the same of a bare copy, hash and O_DIRECT write: the least that it can be;
- ``lost_vs_bare``: lost by later checkpoints, per that of a bare copy, hash and O_DIRECT write of the
  same bytes beside the same training: what is left above 1 is Spotfirst's own;
- ``stall_vs_memcpy``, ``stall_eager_vs_memcpy``: how long the loop stands still, per copy of the
  state in warm memory; lazy (the default) and eager;
- ``durable_vs_o_direct``: from the snapshot to the commit with the training stopped, per bare
  O_DIRECT write of the same bytes; ``durable_training_vs_o_direct``: while training goes on;
- ``s3_put_vs_best``, ``s3_get_vs_ranges``: rates beside the best bare clients, on a server that
  costs next to nothing; with ``_seaweedfs``, on SeaweedFS; ``s3_get_vs_hashed``: beside one that
  verifies as well; ``s3_fetch_vs_ranges``: without the rest of a restore, into warm memory;
- ``extra_memory_ratio``: per byte of state; ``memory_growth_ratio``: over many checkpoints;
- ``unchanged_bytes_share``, ``lora_bytes_ratio``: bytes written per byte of state, or changed;
- ``restore_vs_read``: a bare O_DIRECT read into warm memory, per restore of a model just built;
- ``overhead_share``: of training time at the period of Young for an interruption each hour;
  ``overhead_with_rework_share``: and what interruptions without notice would undo.

Further keys are seconds and MB/s: ``spotfirst_lost_s``, ``dcp_async_lost_s`` and so on.
``…_noise_s`` is what windows without a checkpoint seem to lose, ``…_others`` how many cores other
processes used: with more than a few hundredths, repeat it on a machine that is quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks._figures import Figure, console, figures_table
from benchmarks.checkpointing.figures import figures

_ROOT = Path(__file__).resolve().parents[2]
_FULL = [
    ["spotfirst"], ["spotfirst_eager"], ["bare"], ["dcp_async"], ["torch_save"], ["keeping"],
    ["restoring"], ["s3"],
]  # fmt: skip
_QUICK = [
    ["spotfirst", "spotfirst_eager", "bare", "keeping"],
    ["dcp_async", "torch_save", "restoring", "s3"],
]
_GPU = [["spotfirst"], ["spotfirst_eager"], ["dcp_async"], ["torch_save"]]
_LIMIT_S = 1800.0
_COLUMNS = (
    "lost_s", "first_lost_s", "stall_s", "first_stall_s", "durable_s", "threads_s", "step_s",
    "noise_s", "others",
)  # fmt: skip


def measure(
    folder: Path, groups: Sequence[Sequence[str]], scale: str
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Run the jobs, each group in a process: what they found, and what went wrong with others."""
    found: dict[str, dict[str, Any]] = {}
    errors: list[str] = []
    for number, names in enumerate(groups):
        place = folder / str(number)
        place.mkdir()
        words = [sys.executable, "-W", "ignore", "-m", "benchmarks.checkpointing.job", *names]
        try:
            done = subprocess.run(
                [*words, "--folder", str(place), "--scale", scale],
                cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=_LIMIT_S,
            )  # fmt: skip
            found |= json.loads(done.stdout.splitlines()[-1])
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            errors.append(f"{', '.join(names)}: {error}")
        shutil.rmtree(place)
    return found, errors


def show(found: Sequence[Figure], measured: dict[str, dict[str, Any]]) -> None:
    """The figures, then what each writer took."""
    terminal = console()
    terminal.print(figures_table(found))
    rows = {name: job for name, job in measured.items() if "lost_s" in job}
    table = Table("seconds", box=None, pad_edge=False, header_style="bold")
    for column in _COLUMNS:
        table.add_column(column.removesuffix("_s").replace("_", " "), justify="right")
    for name, job in rows.items():
        table.add_row(name, *(f"{job[column]:.3f}" for column in _COLUMNS))
    if rows:
        terminal.print()
        terminal.print(table)


def main() -> None:
    """Measure and print; exit code 1 when something could not be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpointing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a smaller state, within 50 s")
    parser.add_argument("--gpu", action="store_true", help="20 GB of state on a CUDA GPU")
    parser.add_argument("--only", nargs="+", metavar="JOB", help="some of the jobs")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (temporary files)")
    options = parser.parse_args()
    groups = _QUICK if options.quick else _GPU if options.gpu else _FULL
    known = {name for group in groups for name in group}
    if options.only:
        if unknown := sorted(set(options.only) - known):
            parser.error(f"no job {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
        groups = [[n for n in group if n in options.only] for group in groups]
        groups = [group for group in groups if group]
    if options.gpu and not _has_gpu():
        print(json.dumps({"gpu": None, "why": "torch finds no CUDA device on this machine"}))
        sys.exit(1)
    scale = "quick" if options.quick else "gpu" if options.gpu else "full"
    folder = Path(tempfile.mkdtemp(prefix="spotfirst-checkpointing-", dir=options.folder))
    try:
        measured, errors = measure(folder, groups, scale)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = figures(measured)
    show(found, measured)
    raw = {f"{job}_{key}": value for job, keys in measured.items() for key, value in keys.items()}
    print(
        json.dumps(
            {
                **{each.name: round(each.value, 4) for each in found},
                "met": sum(each.met is True for each in found),
                "missed": [each.name for each in found if each.met is False],
                **({"errors": errors} if errors else {}),
                **{key: round(value, 4) for key, value in raw.items()},
                "scale": scale,
                "cores": os.cpu_count(),
                "load": round(os.getloadavg()[0], 1),
            }
        )
    )
    sys.exit(1 if errors else 0)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
