"""From an instance's boot to its agent, and back: travels inside the user data.

``bootstrap.py SETTINGS.json [inside]``. Only the standard library, Python 3.9 or newer: at this
point nothing else is there. ``inside``: this is the container, and the wheels are fetched.
Exits with KEEP when the instance is to stay for someone to look at it.
"""

# ruff: noqa: D102, D103, S310, S606, T201 - every byte counts: EC2 takes 16 KB
from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

KEEP = 75
UNFIT = 78  # see spotfirst.agent.fitness
HOME = Path(__file__).resolve().parent
METADATA = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
PATIENCE_S = float(os.environ.get("SPOTFIRST_BOOT_PATIENCE_S") or 120)
IMAGE_PYTHON = Path("/opt/pytorch/bin/python3")  # in AWS's Deep Learning AMI
IMAGE_DISK = Path("/opt/dlami/nvme")  # there: the instance's own disks, if it has any


class Problem(Exception):
    """Nothing that passes by itself: people must change something."""


def say(text: str) -> None:
    print(time.strftime("%FT%TZ", time.gmtime()), f"bootstrap: {text}", flush=True)


def metadata(path: str) -> str:
    """The metadata service's answer (IMDSv2); waits for what is not there yet."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    ends = time.monotonic() + PATIENCE_S
    while True:
        try:
            ask = urllib.request.Request(f"{METADATA}/latest/api/token", method="PUT")
            ask.add_header("X-aws-ec2-metadata-token-ttl-seconds", "300")
            token = opener.open(ask, timeout=5).read().decode()
            ask = urllib.request.Request(f"{METADATA}/latest/meta-data/{path}")
            ask.add_header("X-aws-ec2-metadata-token", token)
            return str(opener.open(ask, timeout=5).read().decode())
        except (OSError, HTTPException) as error:
            if time.monotonic() > ends:
                raise Problem(f"the metadata service has no {path}: {error}") from error
            time.sleep(1)


class Files:
    """The storage on a disk that this machine sees, too: for tests."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def get(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def put_new(self, path: str, data: bytes) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        with (self.root / path).open("xb") as file:
            file.write(data)


class S3:
    """The storage on S3, with requests signed by the instance's role (Signature Version 4)."""

    def __init__(self, place: str, region: str, endpoint: str) -> None:
        self.bucket, _, self.prefix = place.strip("/").partition("/")
        self.region, self.endpoint = region, endpoint.rstrip("/")
        self.log_in()

    def log_in(self) -> None:
        """A role's keys expire after some hours, and a training may be longer."""
        role = metadata("iam/security-credentials/").split()[0]
        self.role = json.loads(metadata(f"iam/security-credentials/{role}"))
        self.fresh_until = time.monotonic() + 240

    def get(self, path: str) -> bytes:
        return self.ask("GET", path)

    def put_new(self, path: str, data: bytes) -> None:
        self.ask("PUT", path, data)

    def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        ends = time.monotonic() + PATIENCE_S
        alias = "-s3alias" in self.bucket
        if time.monotonic() > self.fresh_until:
            self.log_in()
        while True:
            try:
                with urllib.request.urlopen(self.signed(method, path, body), timeout=60) as answer:
                    data: bytes = answer.read()
                    return data
            except urllib.error.HTTPError as error:
                where = error.headers.get("x-amz-bucket-region", self.region)
                if error.code in {301, 307, 400} and where != self.region:
                    self.region = where
                    continue
                text = error.read(300).decode("utf-8", "replace")
                # A new access point is not known everywhere at once: there is no such bucket.
                if error.code == 404 and not (alias and "Key" not in text):
                    raise Problem(f"the storage has no {path}") from error
                say(f"{method} {error.url}: {error.code} {text}")
                # 403: nor is a new role. An access point waits for a controller to let it in, and
                # one that never came is no fault of the run's.
                if error.code in {400, 412, 501} or time.monotonic() > ends:
                    if error.code == 403 and not alias:
                        raise Problem(f"the instance's role may not {method} {path}") from error
                    raise
            except (OSError, HTTPException) as error:
                if time.monotonic() > ends:
                    raise
                say(f"{error}: trying again")
            time.sleep(1)

    def signed(self, method: str, path: str, body: bytes) -> urllib.request.Request:
        key = urllib.parse.quote(f"{self.prefix}/{path}".lstrip("/"), safe="/-_.~")
        aws = f"s3.{self.region}.amazonaws.com" + ".cn" * self.region.startswith("cn-")
        if self.endpoint or "." in self.bucket:  # the certificate is for one level of names
            url = f"{self.endpoint or f'https://{aws}'}/{self.bucket}/{key}"
        else:
            url = f"https://{self.bucket}.{aws}/{key}"
        parts = urllib.parse.urlsplit(url)
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        signed = {"x-amz-content-sha256": hashlib.sha256(body).hexdigest(), "x-amz-date": now}
        if body:
            signed["if-none-match"] = "*"
        if self.role.get("Token"):
            signed["x-amz-security-token"] = self.role["Token"]
        request = urllib.request.Request(url, data=body or None, method=method, headers=signed)
        signed["host"] = parts.netloc
        names = ";".join(sorted(signed))
        head = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
        lines = [method, parts.path, "", head, names, signed["x-amz-content-sha256"]]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        scope = f"{now[:8]}/{self.region}/s3/aws4_request"
        key_bytes = f"AWS4{self.role['SecretAccessKey']}".encode()
        for word in (*scope.split("/"), f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{digest}"):
            key_bytes = hmac.new(key_bytes, word.encode(), "sha256").digest()
        request.add_header(
            "Authorization",
            f"AWS4-HMAC-SHA256 Credential={self.role['AccessKeyId']}/{scope}, "
            f"SignedHeaders={names}, Signature={key_bytes.hex()}",
        )
        return request


def open_storage(settings: dict[str, Any]) -> Files | S3:
    kind, _, place = settings["storage_url"].rpartition("://")
    if kind in {"s3", "s3a"}:
        return S3(place, settings["region"], settings["endpoint_url"])
    return Files(place)


def fetch_wheels(storage: Files | S3, keys: list[str]) -> None:
    """The wheels for all the Pythons that the user data names, in a folder for each."""

    def fetch(folder: Path, file: dict[str, str]) -> None:
        data = storage.get(f"wheelhouse/{file['path']}")
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            raise OSError(f"{file['path']} is not what its manifest says")
        (folder / Path(file["path"]).name).write_bytes(data)

    for name in keys:
        key, _, digest = name.partition("@")
        data = storage.get(f"wheelhouse/{key}.json")
        if digest and hashlib.sha256(data).hexdigest() != digest:
            raise Problem(f"wheelhouse/{key}.json was changed after the launch: nothing is run")
        folder = HOME / "wheels" / key.rpartition("-")[2]
        folder.mkdir(parents=True, exist_ok=True)
        files = json.loads(data)["files"]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(fetch, [folder] * len(files), files))


def find_python(wanted: str) -> Any:
    """[path, tag such as cp312, folders of packages] of the Python that has torch."""
    if wanted == "python3" and IMAGE_PYTHON.exists():
        wanted = str(IMAGE_PYTHON)
    ask = (
        "import json, sys; print(json.dumps([sys.executable, 'cp%d%d' % sys.version_info[:2],"
        "[p for p in sys.path if p.endswith('-packages')]]))"
    )
    try:
        return json.loads(subprocess.check_output([wanted, "-c", ask]))
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise Problem(f"the fleet option python, {wanted!r}, does not run here: {error}") from error


def install(settings: dict[str, Any], parent: str, tag: str, folders: list[str]) -> str:
    """An environment above that Python's own packages; the Python in it."""
    venv = HOME / "venv"
    run(parent, "-m", "venv", "--without-pip", str(venv))
    python = str(venv / "bin/python")
    # What the parent has is found here, too, also when it is a virtual environment itself.
    [own] = venv.glob("lib/python*/site-packages")
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
    (own / "parent.pth").write_text("".join(lines))
    wheels = HOME / "wheels" / tag
    if not wheels.exists():
        raise Problem(f"the image's Python is {tag}: name it in the fleet option python_versions")
    say(f"unpacking {len(list(wheels.iterdir()))} wheels")
    for wheel in wheels.glob("*.whl"):
        # Without pip: they fit together, and an interrupted training waits for this.
        if not wheel.name.startswith("pip-"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(own)
    if settings["pip_install"]:
        pip = [python, *(f"{path}/pip" for path in wheels.glob("pip-*.whl"))]
        pip += ["-m", "pip"] * (len(pip) == 1)
        index = settings["pip_index"]
        where = ["--index-url", index] if index else ["--no-index", "--find-links", str(wheels)]
        run(*pip, "--isolated", "install", "-q", *where, *settings["pip_install"])
    # Programs such as torchrun start the Python that they were installed for.
    for program in Path(parent).parent.iterdir():
        mine = venv / "bin" / program.name
        if program.is_file() and program.stat().st_size < 10000 and not mine.exists():
            first, _, rest = program.read_bytes().partition(b"\n")
            if re.match(rb"#!.*python[0-9.]*$", first):
                mine.write_bytes(b"#!%s\n%s" % (python.encode(), rest))
                mine.chmod(0o755)
    return python


def run(*command: str) -> None:
    say(f"running {' '.join(command)}")
    if subprocess.call(command):
        raise Problem(f"this failed on the instance: {' '.join(command)}")


def run_agent(settings: dict[str, Any], attempt: str) -> int:
    """The agent's exit status."""
    parent, tag, folders = find_python(settings["python"])
    python = install(settings, parent, tag, folders)
    data = IMAGE_DISK / "spotfirst" if IMAGE_DISK.is_mount() else HOME
    programs = [str(Path(path).parent) for path in (python, parent)]
    environment = {
        "HOME": "/root",
        **os.environ,
        "PATH": os.pathsep.join([*programs, os.environ.get("PATH", os.defpath)]),
        "SPOTFIRST_STORAGE": settings["storage_url"],
        "SPOTFIRST_RUN": settings["run_id"],
        "SPOTFIRST_ATTEMPT": attempt,
        "SPOTFIRST_SPEC_SHA256": settings.get("spec_digest", ""),
        "SPOTFIRST_MAX_LIFE_S": str(settings["max_life_s"]),
        "SPOTFIRST_WORKDIR": str(data / "work"),
        "SPOTFIRST_CACHE": str(data / "cache"),
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": METADATA,
        "AWS_DEFAULT_REGION": settings["region"],
    }
    if settings["endpoint_url"]:
        environment["AWS_ENDPOINT_URL_S3"] = settings["endpoint_url"]
    mean_s = settings.get("interruption_mean_s")
    if mean_s and metadata("instance-life-cycle") == "spot":
        environment["SPOTFIRST_INTERRUPTION_MEAN_S"] = str(mean_s)
    if not settings["image"] and not settings["keep_h"]:
        # Should this be killed: the agent's guard does the same, a little later.
        environment["SPOTFIRST_POWER_OFF"] = "sleep 120; shutdown -P now"
    say(f"starting the agent of attempt {attempt}")
    words = [python, "-m", "spotfirst.agent"]
    if settings["image"]:
        # In this process's place: a container's first process tells only its child to end.
        os.chdir(HOME)
        os.execve(python, words, environment)
    return subprocess.call(words, env=environment, cwd=HOME)


def run_container(settings: dict[str, Any], attempt: str) -> int:
    """The exit status of the agent, which is started in the container as it is here."""
    image = settings["image"]
    registry = re.match(r"\d+\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com(\.cn)?(?=/)", image)
    if registry and shutil.which("aws"):
        words = ["aws", "ecr", "get-login-password", "--region", registry[1]]
        password = subprocess.run(words, stdout=subprocess.PIPE, check=False).stdout
        words = ["docker", "login", "--username", "AWS", "--password-stdin", registry[0]]
        subprocess.run(words, input=password, check=False)
    ends = time.monotonic() + PATIENCE_S
    while subprocess.call(["docker", "pull", "-q", image]):
        if time.monotonic() > ends:
            raise Problem(f"docker cannot pull the fleet option image, {image}")
        time.sleep(5)
    words = ["docker", "run", "--rm", "--init", "--network", "host", "--ipc", "host"]
    # Root, as outside: what is mounted belongs to it. Time for a last checkpoint at a shutdown.
    words += ["--user", "0", "--stop-timeout", "60"]
    words += ["--gpus", "all"] * bool(shutil.which("nvidia-smi"))
    for folder in [HOME, IMAGE_DISK][: 1 + IMAGE_DISK.is_mount()]:
        words += ["-v", f"{folder}:{folder}"]
    for name in ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "SPOTFIRST_BOOT_PATIENCE_S"):
        words += ["-e", name] * (name in os.environ)
    words += ["-e", f"SPOTFIRST_ATTEMPT={attempt}", "--entrypoint", settings["python"], image]
    status = subprocess.call([*words, __file__, str(HOME / "settings.json"), "inside"])
    if (HOME / "problem").exists():
        raise Problem((HOME / "problem").read_text())
    if status in {125, 126, 127}:  # docker's own
        raise Problem(f"{image} and the fleet option python, {settings['python']!r}, do not start")
    return status


def report(
    storage: Files | S3, settings: dict[str, Any], attempt: str, cause: str, message: str
) -> None:
    """Say why there was no training, in the agent's place; in vain when it has said so itself."""
    say(message)
    time.sleep(0.5)  # what writes the log is a process of its own
    at = dt.datetime.now(dt.timezone.utc).isoformat()
    body = {"v": 1, "attempt": int(attempt), "at": at, "cause": cause, "message": message}
    try:
        log = (HOME / "boot.log").read_text(errors="replace").splitlines()[-30:]
        path = f"runs/{settings['run_id']}/attempts/{attempt}/exit.json"
        storage.put_new(path, json.dumps({**body, "log_tail": log}).encode())
    except Exception as error:  # noqa: BLE001 - there is nobody else to tell
        say(f"no report: {error}")


def main() -> int:
    settings = json.loads(Path(sys.argv[1]).read_text())
    # At a shutdown the agent is told as well, and this ends after it.
    signal.signal(signal.SIGTERM, lambda *_: None)
    if sys.argv[2:]:
        try:
            return run_agent(settings, os.environ["SPOTFIRST_ATTEMPT"])
        except Problem as problem:
            (HOME / "problem").write_text(str(problem))
            return 1
    attempt = metadata("tags/instance/spotfirst:attempt")
    storage = open_storage(settings)
    try:
        fetch_wheels(storage, settings["wheelhouse"].split(","))
        status = (run_container if settings["image"] else run_agent)(settings, attempt)
        if status == UNFIT:
            files = [Path(root, "work", "unfit.txt") for root in (HOME, IMAGE_DISK / "spotfirst")]
            texts = [file.read_text() for file in files if file.exists()]
            message = (texts or ["the agent cannot work with this image"])[0]
            report(storage, settings, attempt, "unfit", message)
        elif status:
            report(storage, settings, attempt, "lost", f"the agent ended with {status}")
    except Problem as problem:
        message = f"the attempt could not begin: {problem}"
        report(storage, settings, attempt, "script_failed", message)
    except Exception as error:  # noqa: BLE001 - the run goes on elsewhere; this says why
        report(storage, settings, attempt, "lost", f"the instance could not be set up: {error}")
    if settings["keep_h"]:
        path = f"runs/{settings['run_id']}/attempts/{attempt}/exit.json"
        if json.loads(storage.get(path))["cause"] == "script_failed":
            say(f"staying for {settings['keep_h']} h, as on_failure='keep' asks for")
            return KEEP
    return 0


if __name__ == "__main__":
    sys.exit(main())
