"""Instances that really run: EC2's API is moto's server, and a machine is processes of this one.

What an instance is started with is taken from the API, as EC2 does: its user data goes to bash, its
tags and its role's credentials to a metadata service of its own. Its `shutdown` tells us, and then
its processes are killed and the API says that it is gone. What is not real: the image (this very
Python stands for it), the network, and systemd.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
from moto.ec2 import ec2_backends
from moto.server import ThreadedMotoServer
from typing_extensions import Self

from spotfirst.wire import utc_now
from spotfirst_airflow.fleets.local.imds import MetadataService
from spotfirst_airflow.fleets.local.processes import ProcessRef, carrying, kill_all
from tests.fleets.ec2.wire import empty

ACCOUNT = "123456789012"
REGION = "us-east-1"
ROLE = "spotfirst-instance"
_MARK = "HARNESS_INSTANCE"
_TICK_S = 0.05
_SHUTDOWN = """\
echo "$*" >>"$HARNESS_FOLDER/shutdowns"
case "$*" in *now*) touch "$HARNESS_FOLDER/off" ;; esac
"""


class Machine:
    """One instance's hardware."""

    def __init__(self, cloud: Cloud, instance: Any) -> None:
        self.instance = instance
        self.folder = cloud.folder / instance.id
        self.folder.mkdir(parents=True)
        self.kill_at: datetime | None = None
        tags = {tag["key"]: tag["value"] for tag in instance.get_tags()}
        self.attempt = int(tags.get("spotfirst:attempt", 0))
        prefix = "meta-data/iam/security-credentials"
        self.service = MetadataService(
            {
                "meta-data/instance-id": instance.id,
                "meta-data/instance-type": instance.instance_type,
                "meta-data/instance-life-cycle": instance.lifecycle or "on-demand",
                **{f"meta-data/tags/instance/{key}": value for key, value in tags.items()},
                prefix: ROLE,
                f"{prefix}/{ROLE}": json.dumps(cloud.credentials()),
            }
        )
        script = self.folder / "user-data"
        script.write_bytes(base64.b64decode(str(instance.user_data)))
        with (self.folder / "console").open("wb") as console:
            self.process = subprocess.Popen(
                ["bash", str(script)],
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                start_new_session=True,
                env={
                    # Nothing of this process's own: an instance has only what it was given.
                    "PATH": f"{cloud.programs}:/usr/bin:/bin",
                    "SPOTFIRST_HOME": str(self.folder / "home"),
                    "SPOTFIRST_BOOT_PATIENCE_S": "10",
                    "AWS_EC2_METADATA_SERVICE_ENDPOINT": self.service.endpoint,
                    "HARNESS_FOLDER": str(self.folder),
                    _MARK: instance.id,
                },
            )  # fmt: skip
        self.service.start()

    @property
    def console(self) -> str:
        return (self.folder / "console").read_text(errors="replace")

    @property
    def shutdowns(self) -> list[str]:
        """What `shutdown` was asked for."""
        path = self.folder / "shutdowns"
        return path.read_text().splitlines() if path.exists() else []

    def processes(self) -> list[ProcessRef]:
        return carrying(_MARK, self.instance.id)

    def end(self) -> None:
        kill_all(self.processes, patience_s=10)
        self.process.wait()
        self.service.close()


class Cloud:
    """A region. Use it as a context manager; ``role`` is what instances may use, as AWS_* keys."""

    def __init__(self, folder: Path, role: Mapping[str, str]) -> None:
        self.folder = folder
        self.role = dict(role)
        self.programs = folder / "bin"
        self.programs.mkdir(parents=True)
        self.program("shutdown", _SHUTDOWN)
        self.machines: dict[str, Machine] = {}
        self.ended: dict[str, str] = {}
        self.trouble = ""
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hardware", daemon=True)

    def __enter__(self) -> Self:
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.endpoint_url = f"http://{host}:{port}"
        empty(self.endpoint_url)
        self.ec2 = boto3.client(
            "ec2", region_name=REGION, endpoint_url=self.endpoint_url,
            aws_access_key_id="testing", aws_secret_access_key="testing",
        )  # fmt: skip
        self._backend = ec2_backends[ACCOUNT][REGION]
        self.subnets = [each["SubnetId"] for each in self.ec2.describe_subnets()["Subnets"]]
        self.image_id = str(next(iter(self._backend.amis)))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        for machine in self.machines.values():
            if machine.instance.id not in self.ended:
                machine.end()
        empty(self.endpoint_url)
        self._server.stop()

    def program(self, name: str, body: str) -> None:
        """Put a program onto all machines, in shell."""
        (self.programs / name).write_text(f"#!/bin/sh\n{body}")
        (self.programs / name).chmod(0o755)

    def credentials(self) -> dict[str, str]:
        """The role's, as the metadata service gives them."""
        expires = utc_now() + timedelta(hours=6)
        return {
            "Code": "Success",
            "Type": "AWS-HMAC",
            "LastUpdated": f"{utc_now():%Y-%m-%dT%H:%M:%SZ}",
            "AccessKeyId": self.role.get("AWS_ACCESS_KEY_ID", "none"),
            "SecretAccessKey": self.role.get("AWS_SECRET_ACCESS_KEY", "none"),
            "Token": "",
            "Expiration": f"{expires:%Y-%m-%dT%H:%M:%SZ}",
        }

    def machine(self, attempt: int) -> Machine | None:
        """The one of this attempt, once it has booted."""
        found = [each for each in list(self.machines.values()) if each.attempt == attempt]
        return found[-1] if found else None

    def interrupt(self, attempt: int, *, in_s: float) -> None:
        """Give the notice of a spot interruption, and take the instance then."""
        machine = self.machine(attempt)
        assert machine is not None
        now = utc_now()
        machine.kill_at = now + timedelta(seconds=in_s)
        machine.service.post_notice(kill_at=machine.kill_at, now=now)

    def leftovers(self) -> list[str]:
        """Processes of instances that are gone."""
        found = [p for each in self.machines.values() for p in each.processes()]
        return [Path(f"/proc/{p.pid}/cmdline").read_text().replace("\0", " ") for p in found]

    def story(self) -> str:
        """What the consoles say, for messages."""
        consoles = [f"--- {id_}\n{each.console}" for id_, each in list(self.machines.items())]
        return "\n".join([self.trouble, *consoles])

    # -- hardware ---------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stop.wait(_TICK_S):
            try:
                self._tick()
            except Exception:  # noqa: BLE001 - shown by who waits in vain
                self.trouble = traceback.format_exc()
                return

    def _tick(self) -> None:
        for instance in list(self._backend.all_instances()):
            machine = self.machines.get(instance.id)
            if machine is None and instance.user_data and instance.state == "running":
                self.machines[instance.id] = Machine(self, instance)
            elif machine is not None and instance.id not in self.ended:
                self._look(machine)

    def _look(self, machine: Machine) -> None:
        if machine.instance.state != "running":
            self._end(machine, "Client.UserInitiatedShutdown")
        elif (machine.folder / "off").exists():
            self._end(machine, "Client.InstanceInitiatedShutdown")
        elif machine.kill_at is not None and utc_now() >= machine.kill_at:
            self._end(machine, "Server.SpotInstanceTermination")

    def _end(self, machine: Machine, reason: str) -> None:
        machine.end()
        instance = machine.instance
        if reason != "Client.UserInitiatedShutdown":
            with contextlib.suppress(Exception):
                instance.terminate()
            when = f"{utc_now():%Y-%m-%d %H:%M:%S} UTC"
            instance._reason = f"{reason} ({when})"
            instance.state_reason.code = reason
            instance.state_reason.message = f"{reason}: ended by the harness"
        self.ended[instance.id] = reason


PYTHON = sys.executable
PYTHON_TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"


def nothing_else(folder: Path, python_tag: str, platform: str) -> None:
    """In place of the index: the image has all that Spotfirst needs, and no Spotfirst."""


def no_keys(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without what AWS's clients read."""
    given = os.environ if environment is None else environment
    return {name: value for name, value in given.items() if not name.startswith("AWS_")}
