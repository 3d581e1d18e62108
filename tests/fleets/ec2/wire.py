"""moto's server: boto3's calls, on the wire."""

from __future__ import annotations

import contextlib
import urllib.request
from collections.abc import Iterator

from moto.server import ThreadedMotoServer

from spotfirst_airflow.fleets.ec2.aws import Aws, Identity


def empty(endpoint: str) -> None:
    """Have an account with nothing in it: all of moto's servers in a process share one."""
    urllib.request.urlopen(f"{endpoint}/moto-api/reset", data=b"").close()


@contextlib.contextmanager
def moto_aws(region: str = "us-east-1") -> Iterator[Aws]:
    """An account with nothing in it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        empty(endpoint)
        keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        yield Aws(Identity(region=region, endpoint_url=endpoint, environment=keys))
    finally:
        server.stop()
