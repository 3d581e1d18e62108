"""What EC2 runs when an instance boots: a little bash, and in it the bootstrap.

The same for all attempts of a run, as it is part of the launch template: an instance reads the
number of its attempt from its tags. There is no secret in it, as whoever may describe instances
may read it, and every process on the instance: credentials come from the instance's role.
"""

from __future__ import annotations

import ast
import json
import math
import re
import threading
import urllib.parse
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from spotfirst.errors import InvalidSpec
from spotfirst_airflow import secretlike

__all__ = ["LIMIT_BYTES", "condensed", "user_data"]

LIMIT_BYTES = 16384
"""EC2's, before base64: "Run commands when you launch an EC2 instance" in its user guide."""
_GRACE_S = 900.0
"""The agent ends at its maximum life by itself, and was started some minutes after the boot."""
_parsing = threading.Lock()
_SCRIPT = """\
#!/bin/bash
# Spotfirst: one attempt of a training, and then the end of this instance.
umask 022
boot="${SPOTFIRST_HOME:-/var/lib/cloud/scripts}/per-boot/spotfirst"
export SPOTFIRST_HOME="${SPOTFIRST_HOME:-/var/lib/spotfirst}"
trap 'shutdown -P now || poweroff -f' EXIT
# Whatever happens, and if nobody ever looks: not for longer than this.
shutdown -P +@LIFE_MIN@ || exit 1
# A reboot (a kernel's panic) forgets that timer, and this script runs only once. Of an image that
# someone makes of this disk it is not meant.
again() {
  id=/var/lib/cloud/data/instance-id
  cat >"$boot" <<SPOTFIRST_AGAIN && chmod +x "$boot"
#!/bin/sh
[ "\\$(cat $id)" != "$(cat $id)" ] || shutdown -P $1 || poweroff -f
SPOTFIRST_AGAIN
}
mkdir -p "${boot%/*}" && again now || exit 1
mkdir -p "$SPOTFIRST_HOME" && cd "$SPOTFIRST_HOME" || exit 1
exec > >(tee -a boot.log) 2>&1
cat >settings.json <<'SPOTFIRST_SETTINGS'
@SETTINGS@
SPOTFIRST_SETTINGS
cat >bootstrap.py <<'SPOTFIRST_BOOTSTRAP'
@BOOTSTRAP@
SPOTFIRST_BOOTSTRAP
"$(command -v python3 || echo @PYTHON@)" -I bootstrap.py settings.json
if [ $? = 75 ] && [ @KEEP_MIN@ != 0 ]; then
  # In the timer's place: there is always one.
  shutdown -P +@KEEP_MIN@ && again +@KEEP_MIN@ && trap - EXIT
fi
"""


def user_data(
    *,
    storage_url: str,
    region: str,
    run_id: str,
    max_life_s: float,
    wheelhouse: str,
    spec_digest: str = "",
    python: str,
    image: str,
    endpoint_url: str = "",
    keep_h: float = 0.0,
    interruption_mean_s: float = 0.0,
    pip_install: Sequence[str] = (),
    pip_index: str = "",
) -> str:
    """The user data of a run's instances, not yet in base64.

    ``wheelhouse`` is what :func:`~spotfirst_airflow.fleets.ec2.wheelhouse.publish_all` gave: what
    the manifests are called, and their digests. ``spec_digest`` is of the only spec to be run. ``region`` is that of the storage, and
    ``endpoint_url`` its own, when it is not AWS's S3. ``keep_h`` hours are added for an instance whose script has failed.
    ``interruption_mean_s`` is told to the agent of a spot instance; 0 when nobody knows it.

    Raises :class:`InvalidSpec` for what is too large, or looks like a secret.
    """
    for name, url in (
        ("the storage", storage_url), ("the endpoint", endpoint_url), ("pip_index", pip_index),
    ):  # fmt: skip
        if urllib.parse.urlsplit(url).password:
            msg = (
                f"{name} has a password in its URL, and would show it in the instance's user data; "
                "leave it out, and give the instance's role the permission"
            )
            raise InvalidSpec(msg)
    settings = {
        "storage_url": storage_url, "region": region, "run_id": run_id, "max_life_s": max_life_s,
        "spec_digest": spec_digest,
        "wheelhouse": wheelhouse, "python": python, "image": image, "endpoint_url": endpoint_url,
        "keep_h": keep_h, "interruption_mean_s": interruption_mean_s,
        "pip_install": list(pip_install), "pip_index": pip_index,
    }  # fmt: skip
    values = {
        "LIFE_MIN": str(math.ceil((max_life_s + _GRACE_S) / 60)),
        "KEEP_MIN": str(math.ceil(keep_h * 60)),
        "PYTHON": _quoted(python),
        "SETTINGS": json.dumps(settings),
        "BOOTSTRAP": _bootstrap(),
    }
    # In one pass: what a value holds is nobody's placeholder.
    text = re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], _SCRIPT)
    if secret := secretlike.in_text(text.replace(values["BOOTSTRAP"], "")):
        msg = (
            f"the instance's user data would hold what looks like {secret}; leave it out of "
            "the storage's URL and of the fleet options: the instance has a role"
        )
        raise InvalidSpec(msg)
    size_bytes = len(text.encode())
    if size_bytes > LIMIT_BYTES:
        msg = (
            f"the instance's user data has {size_bytes} bytes, and EC2 takes {LIMIT_BYTES}: shorten "
            "the fleet options pip_install and image, or the storage's URL"
        )
        raise InvalidSpec(msg)
    return text


@cache
def _bootstrap() -> str:
    return condensed(files(__package__).joinpath("bootstrap.py").read_text("utf-8"))


def condensed(source: str) -> str:
    """The same program without comments, docstrings, empty lines and the annotations of functions.

    It is indented by one space.
    """
    # Python 3.11 cannot build syntax trees in two threads at once: where something listens to the
    # garbage collector, ast.parse() raises SystemError (https://github.com/python/cpython/issues/106905).
    with _parsing:
        tree = ast.parse(source)
    lines = _without_annotations(source, tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and len(node.body) > 1:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                for number in range(first.lineno - 1, first.end_lineno or first.lineno):
                    lines[number] = ""
    kept = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return "\n".join(
        " " * ((len(line) - len(line.lstrip())) // 4) + line.lstrip().rstrip() for line in kept
    )


def _without_annotations(source: str, tree: ast.Module) -> list[str]:
    """Its lines. Columns are counted in bytes, so the lines are of bytes meanwhile."""
    lines = [line.encode() for line in source.splitlines()]
    cuts: set[tuple[int, int, int]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            start = node.col_offset + len(node.arg.encode())
            cuts.add((node.lineno, start, node.annotation.end_col_offset or start))
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            found = node.returns
            start = lines[found.lineno - 1].rindex(b" -> ", 0, found.col_offset)
            cuts.add((found.lineno, start, found.end_col_offset or start))
    for number, start, end in sorted(cuts, reverse=True):
        line = lines[number - 1]
        lines[number - 1] = line[:start] + line[end:]
    return [line.decode() for line in lines]


def _quoted(word: str) -> str:
    """For bash."""
    return "'" + word.replace("'", "'\\''") + "'"
