"""The bootstrap's parts, where a whole instance would be too much."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from typing_extensions import Self

from spotfirst.heartbeat import ExitReport
from spotfirst.market import INTERRUPTION_MEAN_VARIABLE
from spotfirst.wire import decode
from spotfirst_airflow.fleets.ec2 import bootstrap
from spotfirst_airflow.fleets.local.imds import MetadataService

SOURCE = Path(bootstrap.__file__)
KEYS = {"AccessKeyId": "AKEXAMPLE", "SecretAccessKey": "secret/+key", "Token": "token=="}
SETTINGS: dict[str, Any] = {
    "storage_url": "", "region": "us-east-1", "run_id": "run-1", "max_life_s": 60.0,
    "wheelhouse": "0123-cp312", "python": sys.executable, "image": "", "endpoint_url": "",
    "keep_h": 0.0, "pip_install": [], "pip_index": "",
}  # fmt: skip


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataService]:
    role = "meta-data/iam/security-credentials"
    service = MetadataService(
        {
            role: "the-role",
            f"{role}/the-role": json.dumps(KEYS),
            "meta-data/tags/instance/spotfirst:attempt": "7",
        }
    )
    service.start()
    monkeypatch.setattr(bootstrap, "METADATA", service.endpoint)
    monkeypatch.setattr(bootstrap, "PATIENCE_S", 0.0)
    yield service
    service.close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setattr(bootstrap, "HOME", folder)
    (folder / "boot.log").write_text("the last line\n")
    return folder


def test_it_needs_only_the_standard_library() -> None:
    names = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    assert names <= set(sys.stdlib_module_names)


# -- metadata -------------------------------------------------------------------------------


def test_tags_are_read_with_a_token(metadata: MetadataService) -> None:
    assert bootstrap.metadata("tags/instance/spotfirst:attempt") == "7"


def test_a_tag_that_never_comes_is_a_problem_with_its_name(metadata: MetadataService) -> None:
    with pytest.raises(bootstrap.Problem, match=r"has no tags/instance/spotfirst:run: .*404"):
        bootstrap.metadata("tags/instance/spotfirst:run")


# -- S3 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "region", "endpoint", "url"),
    [
        ("b", "us-east-1", "", "https://b.s3.us-east-1.amazonaws.com/wheelhouse/x"),
        ("b/p/q", "eu-west-1", "", "https://b.s3.eu-west-1.amazonaws.com/p/q/wheelhouse/x"),
        ("a.b/p", "us-east-1", "", "https://s3.us-east-1.amazonaws.com/a.b/p/wheelhouse/x"),
        ("b/p", "cn-north-1", "", "https://b.s3.cn-north-1.amazonaws.com.cn/p/wheelhouse/x"),
        ("b/p", "us-east-1", "http://127.0.0.1:1/", "http://127.0.0.1:1/b/p/wheelhouse/x"),
    ],
)
def test_objects_are_asked_for_where_s3_has_them(
    metadata: MetadataService, place: str, region: str, endpoint: str, url: str
) -> None:
    storage = bootstrap.S3(place, region, endpoint)
    assert storage.signed("GET", "wheelhouse/x", b"").full_url == url


@pytest.mark.parametrize("path", ["a/b.json", "spotfirst-0.1+f0-py3.whl", "ö ü/~(1)=&,"])
@pytest.mark.parametrize("body", [b"", b"data"])
@pytest.mark.parametrize("token", ["token==", ""])
def test_requests_are_signed_as_botocore_signs_them(
    metadata: MetadataService,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: bytes,
    token: str,
) -> None:
    storage = bootstrap.S3("bucket/prefix", "eu-central-1", "")
    storage.role["Token"] = token
    ours = storage.signed("PUT" if body else "GET", path, body)
    given = {name.lower(): value for name, value in ours.header_items()}
    headers = {"if-none-match": "*"} if body else {}
    request = AWSRequest(ours.get_method(), ours.full_url, headers=headers, data=body)
    request.context["payload_signing_enabled"] = True
    credentials = Credentials(KEYS["AccessKeyId"], KEYS["SecretAccessKey"], token or None)
    signer = S3SigV4Auth(credentials, "s3", "eu-central-1")
    request.headers["X-Amz-Content-SHA256"] = given["x-amz-content-sha256"]
    request.headers["X-Amz-Date"] = request.context["timestamp"] = given["x-amz-date"]
    if token:
        request.headers["X-Amz-Security-Token"] = token
    signed = signer.headers_to_sign(request)
    signature = signer.signature(
        signer.string_to_sign(request, signer.canonical_request(request)), request
    )
    assert given["authorization"].endswith(f"Signature={signature}")
    assert f"SignedHeaders={signer.signed_headers(signed)}," in given["authorization"]


class Server:
    """Answers with these (status, headers, body), one after the other; keeps what it was asked."""

    def __init__(self, *answers: tuple[int, dict[str, str], bytes]) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        left, asked = list(answers), self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                status, headers, body = left.pop(0)
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "PATIENCE_S", 30.0)
    monkeypatch.setattr(bootstrap.time, "sleep", lambda _: None)


def test_a_bucket_in_another_region_is_asked_there(metadata: MetadataService) -> None:
    elsewhere = (400, {"x-amz-bucket-region": "eu-west-1"}, b"<Error/>")
    with Server(elsewhere, (200, {}, b"data")) as server:
        assert bootstrap.S3("b/p", "us-east-1", server.url).get("x") == b"data"
    scopes = [headers["authorization"].split("/")[2] for _, headers in server.asked]
    assert scopes == ["us-east-1", "eu-west-1"]


@pytest.mark.parametrize("status", [403, 500, 503])
def test_what_passes_by_itself_is_waited_for(
    metadata: MetadataService, at_once: None, status: int
) -> None:
    with Server((status, {}, b"not now"), (200, {}, b"data")) as server:
        assert bootstrap.S3("b", "us-east-1", server.url).get("x") == b"data"


def test_an_answer_that_was_cut_off_is_asked_for_again(
    metadata: MetadataService, at_once: None
) -> None:
    with Server((200, {"Content-Length": "9"}, b"da"), (200, {}, b"data")) as server:
        assert bootstrap.S3("b", "us-east-1", server.url).get("x") == b"data"


def test_what_is_not_there_and_what_is_not_allowed_are_problems(metadata: MetadataService) -> None:
    with Server((404, {}, b"")) as server, pytest.raises(bootstrap.Problem, match="has no x"):
        bootstrap.S3("b", "us-east-1", server.url).get("x")
    with Server((403, {}, b"")) as server, pytest.raises(bootstrap.Problem, match="may not GET x"):
        bootstrap.S3("b", "us-east-1", server.url).get("x")


def test_an_access_point_that_is_not_known_everywhere_yet_is_waited_for(
    metadata: MetadataService, at_once: None
) -> None:
    unknown = (404, {}, b"<Error><Code>NoSuchBucket</Code></Error>")
    with Server(unknown, (403, {}, b"not let in"), (200, {}, b"data")) as server:
        assert bootstrap.S3("r-0123-s3alias/p", "us-east-1", server.url).get("x") == b"data"
    with (
        Server((404, {}, b"<Error><Code>NoSuchKey</Code></Error>")) as server,
        pytest.raises(bootstrap.Problem, match="has no x"),
    ):
        bootstrap.S3("r-0123-s3alias/p", "us-east-1", server.url).get("x")


def test_an_access_point_that_nobody_opened_is_no_fault_of_the_run(
    metadata: MetadataService,
) -> None:
    """A problem of the script's or the account's would end the run for good."""
    with Server((403, {}, b"not let in")) as server, pytest.raises(OSError, match="403"):
        bootstrap.S3("r-0123-s3alias/p", "us-east-1", server.url).get("x")


def test_keys_that_have_expired_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    service = {"iam/security-credentials/": "the-role"}
    service["iam/security-credentials/the-role"] = json.dumps(KEYS)
    monkeypatch.setattr(bootstrap, "metadata", service.__getitem__)
    with Server((200, {}, b"first"), (200, {}, b"second"), (200, {}, b"third")) as server:
        storage = bootstrap.S3("b", "us-east-1", server.url)
        service["iam/security-credentials/the-role"] = json.dumps(KEYS | {"AccessKeyId": "AKLATER"})
        storage.get("x")
        later = bootstrap.time.monotonic() + 7 * 3600
        monkeypatch.setattr(bootstrap.time, "monotonic", lambda: later)
        storage.get("x")
        storage.get("x")
    used = [headers["authorization"].partition("/")[0] for _, headers in server.asked]
    assert [each.rpartition("=")[2] for each in used] == ["AKEXAMPLE", "AKLATER", "AKLATER"]


# -- wheels and reports ---------------------------------------------------------------------


def test_a_wheel_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path, home: Path) -> None:
    folder = tmp_path / "storage" / "wheelhouse"
    (folder / "k").mkdir(parents=True)
    (folder / "k" / "good.whl").write_bytes(b"good")
    (folder / "k" / "bad.whl").write_bytes(b"tampered with")
    digest = hashlib.sha256(b"good").hexdigest()
    files = [{"path": f"k/{name}.whl", "sha256": digest} for name in ("good", "bad")]
    (folder / "key-cp312.json").write_text(json.dumps({"files": files}))
    with pytest.raises(OSError, match=r"k/bad\.whl is not what its manifest says"):
        bootstrap.fetch_wheels(bootstrap.Files(str(tmp_path / "storage")), ["key-cp312"])
    assert [path.name for path in (home / "wheels/cp312").iterdir()] == ["good.whl"]


@pytest.mark.parametrize("changed", [False, True])
def test_a_manifest_of_wheels_is_the_one_of_the_launch(
    tmp_path: Path, home: Path, changed: bool
) -> None:
    folder = tmp_path / "storage" / "wheelhouse"
    folder.mkdir(parents=True)
    path = folder / "key-cp312.json"
    path.write_text(json.dumps({"files": []}))
    name = f"key-cp312@{hashlib.sha256(path.read_bytes()).hexdigest()}"
    storage = bootstrap.Files(str(tmp_path / "storage"))
    if not changed:
        bootstrap.fetch_wheels(storage, [name])
        assert (home / "wheels/cp312").is_dir()
        return
    path.write_text(json.dumps({"files": [], "more": 1}))
    with pytest.raises(bootstrap.Problem, match="was changed after the launch"):
        bootstrap.fetch_wheels(storage, [name])


def test_a_report_is_the_one_that_the_controller_reads(tmp_path: Path, home: Path) -> None:
    storage = bootstrap.Files(str(tmp_path))
    bootstrap.report(storage, SETTINGS, "7", "lost", "it broke")
    data = (tmp_path / "runs/run-1/attempts/7/exit.json").read_bytes()
    report = decode(data, ExitReport, path="exit.json")
    assert (report.attempt, report.cause, report.message) == (7, "lost", "it broke")
    assert report.log_tail == ("the last line",)


def test_what_the_agent_has_reported_stands(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "runs/run-1/attempts/7/exit.json"
    path.parent.mkdir(parents=True)
    path.write_text("the agent's")
    bootstrap.report(bootstrap.Files(str(tmp_path)), SETTINGS, "7", "lost", "it broke")
    assert path.read_text() == "the agent's"


def test_a_python_that_is_not_there_is_a_problem_that_names_the_option() -> None:
    with pytest.raises(bootstrap.Problem, match="fleet option python, '/nowhere/python'"):
        bootstrap.find_python("/nowhere/python")


def test_the_python_of_the_deep_learning_image_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python3").symlink_to(sys.executable)
    monkeypatch.setattr(bootstrap, "IMAGE_PYTHON", tmp_path / "python3")
    path, tag, _ = bootstrap.find_python("python3")
    assert path == str(tmp_path / "python3")
    assert tag == f"cp3{sys.version_info.minor}"


def test_a_python_without_wheels_is_a_problem_that_names_its_tag(home: Path) -> None:
    parent, tag, folders = bootstrap.find_python(sys.executable)
    with pytest.raises(bootstrap.Problem, match=f"Python is {tag}: .* python_versions"):
        bootstrap.install(SETTINGS, parent, tag, folders)


# -- the agent's environment ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean_s", "life_cycle", "told"),
    [(7200.0, "spot", "7200.0"), (7200.0, "on-demand", None), (0.0, "spot", None)],
)
def test_a_spot_instance_is_told_how_often_its_pool_is_interrupted(
    home: Path, monkeypatch: pytest.MonkeyPatch, mean_s: float, life_cycle: str, told: str | None
) -> None:
    given: dict[str, str] = {}
    monkeypatch.setattr(bootstrap, "install", lambda *_: sys.executable)
    monkeypatch.setattr(bootstrap, "metadata", {"instance-life-cycle": life_cycle}.__getitem__)
    monkeypatch.setattr(bootstrap.subprocess, "call", lambda *_, env, **__: given.update(env) or 0)
    monkeypatch.delenv(INTERRUPTION_MEAN_VARIABLE, raising=False)
    assert bootstrap.run_agent(SETTINGS | {"interruption_mean_s": mean_s}, "7") == 0
    assert given.get(INTERRUPTION_MEAN_VARIABLE) == told


# -- containers -----------------------------------------------------------------------------


@pytest.mark.parametrize("login", [True, False])
def test_a_container_gets_the_attempt_the_network_and_the_wheels(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, login: bool
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("docker", "nvidia-smi", *(["aws"] if login else [])):
        text = f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/calls\n[ "$1" != run ] || exit 5\n'
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("SPOTFIRST_BOOT_PATIENCE_S", "1")
    image = "123456789012.dkr.ecr.us-west-2.amazonaws.com/train:7"
    settings = SETTINGS | {"image": image, "python": "python3"}
    assert bootstrap.run_container(settings, "7") == 5
    calls = (tmp_path / "calls").read_text().splitlines()
    if login:
        registry = image.partition("/")[0]
        assert calls[:2] == [
            "aws ecr get-login-password --region us-west-2",
            f"docker login --username AWS --password-stdin {registry}",
        ]
    assert calls[-2] == f"docker pull -q {image}"
    assert calls[-1] == (
        "docker run --rm --init --network host --ipc host --user 0 --stop-timeout 60 --gpus all "
        f"-v {home}:{home} -e SPOTFIRST_BOOT_PATIENCE_S -e SPOTFIRST_ATTEMPT=7 "
        f"--entrypoint python3 {image} {SOURCE} {home}/settings.json inside"
    )


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program whose text a test writes."""
    programs = tmp_path / "bin"
    programs.mkdir()
    path = programs / "docker"
    path.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return path


def test_what_is_wrong_inside_a_container_is_a_problem_outside(
    home: Path, docker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS | {"image": "train:7", "python": "/nowhere/python"}
    (home / "settings.json").write_text(json.dumps(settings))
    # What main() sets for its own process.
    monkeypatch.setattr(bootstrap.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["bootstrap.py", str(home / "settings.json"), "inside"])
    monkeypatch.setenv("SPOTFIRST_ATTEMPT", "7")
    assert bootstrap.main() == 1
    docker.write_text('#!/bin/sh\n[ "$1" != run ] || exit 1\n')
    with pytest.raises(bootstrap.Problem, match="'/nowhere/python', does not run here"):
        bootstrap.run_container(settings, "7")


@pytest.mark.parametrize("status", [125, 126, 127])
def test_an_image_that_docker_cannot_start_is_a_problem(
    home: Path, docker: Path, status: int
) -> None:
    docker.write_text(f'#!/bin/sh\n[ "$1" != run ] || exit {status}\n')
    with pytest.raises(bootstrap.Problem, match="train:7 and the fleet option python"):
        bootstrap.run_container(SETTINGS | {"image": "train:7"}, "7")


@pytest.mark.usefixtures("at_once")
def test_an_image_is_pulled_again_before_it_is_given_up(
    home: Path, docker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker.write_text(
        f'#!/bin/sh\n[ "$1" != pull ] || [ -e {home}/pulled ] || {{ touch {home}/pulled; exit 1; }}\n'
    )
    assert bootstrap.run_container(SETTINGS | {"image": "train:7"}, "7") == 0
    docker.write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setattr(bootstrap, "PATIENCE_S", 0.0)
    with pytest.raises(bootstrap.Problem, match="cannot pull the fleet option image, train:7"):
        bootstrap.run_container(SETTINGS | {"image": "train:7"}, "7")
