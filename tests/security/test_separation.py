"""SeparateRuns: what an instance may do through its run's access point, and through any other way.

Decided over the template's policies and those that the fleet puts, for each way in which AWS's
documentation can be read. AWS's own decisions only an account of AWS's can show.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from typing import Any

import pytest

from spotfirst.spec import CodeRef, ResumeFrom, RunSpec
from spotfirst_airflow.fleets.ec2.accesspolicy import Place, policy_of
from spotfirst_airflow.fleets.ec2.options import SeparateRuns
from tests.fleets.ec2.examined import an_account
from tests.fleets.ec2.policies import (
    READINGS,
    Reading,
    Statements,
    decide,
    decide_through,
    statements_of,
)
from tests.fleets.ec2.stacks import Stack, bucket_policy
from tests.security.objects import OBJECTS, Kind

ACCOUNT = "123456789012"
MINE, OTHER, GONE = (f"arn:aws:ec2:us-east-1:{ACCOUNT}:instance/i-{n}" for n in ("1", "2", "3"))
CODE = "a" * 64
EVERYTHING = [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]
WRITES = ("s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:DeleteObjectVersion")


def _each(kinds: Iterable[Kind]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.name)


_each_object = _each(OBJECTS)
_of_a_run = _each(kind for kind in OBJECTS if "runs/r/" in kind.example)
_decided = _each(kind for kind in OBJECTS if kind.writer == "controllers")
_written = _each(kind for kind in OBJECTS if kind.writer != "controllers")
_each_reading = pytest.mark.parametrize("reading", READINGS)
_each_storage = pytest.mark.parametrize("storage", ["spotfirst", "spotfirst/team/one"])


class Account:
    """The stack's policies, and the access point of each run."""

    def __init__(self, stack: Stack) -> None:
        assert stack.apart is not None
        self.stack, self.apart = stack, stack.apart
        self.role = statements_of(self.apart.role)
        self.bucket_policy = bucket_policy(stack.bucket, apart=self.apart)

    def arn(self, run_id: str) -> str:
        return f"{self.apart.access_points}-{run_id}"

    def point(
        self, run_id: str, *instances: str, storage: str = "spotfirst", **spec: Any
    ) -> Statements:
        """The policy of a run's access point."""
        now = datetime(2026, 1, 1, tzinfo=timezone.utc)
        policy = policy_of(
            self.arn(run_id), self.apart.role,
            Place(bucket=self.stack.bucket, prefix=storage), run_id, instances=instances,
            spec=RunSpec(run_id=run_id, created_at=now, command=("train",), **spec),
        )  # fmt: skip
        return list(json.loads(policy.text)["Statement"])

    def decide(
        self,
        reading: Reading,
        action: str,
        path: str,
        *,
        by: str | None = MINE,
        through: str = "r",
        point: Statements | None = None,
        role: Statements | None = None,
        arn: str = "",
        **context: Any,
    ) -> str:
        """On a request of instance ``by`` with the role's credentials."""
        keys: dict[str, Any] = {
            "aws:PrincipalArn": self.apart.role, "aws:SecureTransport": "true",
            "s3:ObjectCreationOperation": "true", "s3:if-none-match": "*",
        }  # fmt: skip
        if by is not None:
            keys["ec2:SourceInstanceARN"] = by
        keys |= {name.replace("__", ":"): value for name, value in context.items()}
        return decide_through(
            reading, action, path, point_arn=arn or self.arn(through),
            point=self.point(through, MINE) if point is None else point,
            bucket=self.stack.bucket, bucket_policy=self.bucket_policy,
            role=self.role if role is None else role,
            context={name: value for name, value in keys.items() if value is not None},
        )  # fmt: skip


@pytest.fixture(scope="module")
def account() -> Iterator[Account]:
    with an_account(SeparateRuns="true") as stack:
        yield Account(stack)


# -- its own run ----------------------------------------------------------------------------------


@_each_object
@_each_reading
@_each_storage
@pytest.mark.parametrize("name", ["r", "control", "code", "datasets", "runs", "attempts"])
def test_an_instance_does_with_its_own_run_what_it_must(
    account: Account, kind: Kind, reading: Reading, storage: str, name: str
) -> None:
    path = f"{storage}/{kind.example}".replace("runs/r/", f"runs/{name}/")
    code = CodeRef(digest=CODE, size_bytes=1)
    point = account.point(name, MINE, storage=storage, code=code)
    may = {
        action: account.decide(reading, action, path, through=name, point=point) == "allowed"
        for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject")
    }
    assert may == {
        "s3:GetObject": not kind.name.startswith("probe"),
        "s3:PutObject": kind.writer != "controllers",
        "s3:DeleteObject": kind.removable,
    }


@_each_reading
@pytest.mark.parametrize("action", ["s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"])
def test_a_large_object_is_uploaded_in_parts(
    account: Account, reading: Reading, action: str
) -> None:
    path = "spotfirst/runs/r/packs/00000001/000001.pack"
    assert account.decide(reading, action, path) == "allowed"
    part = account.decide(
        reading, "s3:PutObject", path, s3__ObjectCreationOperation="false", **{"s3__if-none-match": None}
    )  # fmt: skip
    assert part == "allowed"


@_each_reading
def test_an_object_that_is_missing_is_told_from_one_that_is_denied(
    account: Account, reading: Reading
) -> None:
    """Without s3:ListBucket S3 answers 403 instead of 404."""
    assert account.decide(reading, "s3:ListBucket", "") == "allowed"


@_each_reading
@pytest.mark.parametrize(
    ("prefix", "decision"),
    [
        ("spotfirst/runs/r/checkpoints/", "allowed"),
        ("spotfirst/control/runs/r/journal/", "allowed"),
        ("spotfirst/datasets/corpus/versions/", "allowed"),
        ("spotfirst/runs/", "explicitDeny"),
        ("spotfirst/runs/r2/checkpoints/", "explicitDeny"),
        ("spotfirst/control/runs/", "explicitDeny"),
        ("other/", "explicitDeny"),
        ("", "explicitDeny"),
    ],
)
def test_an_instance_lists_its_run_and_datasets(
    account: Account, reading: Reading, prefix: str, decision: str
) -> None:
    assert account.decide(reading, "s3:ListBucket", "", s3__prefix=prefix) == decision


@_each_reading
def test_a_replay_reads_the_checkpoints_that_it_starts_from_and_nothing_else_of_that_run(
    account: Account, reading: Reading
) -> None:
    source = ResumeFrom(run_id="parent", step=1, seq=1)
    point = account.point("r", MINE, resume_from=source)
    for path, read in (("checkpoints/00000001.json", True), ("packs/1/x", True),
                       ("attempts/1/log/00000001", False)):  # fmt: skip
        full = f"spotfirst/runs/parent/{path}"
        read_it = account.decide(reading, "s3:GetObject", full, point=point)
        assert read_it == ("allowed" if read else "explicitDeny")
        for action in WRITES:
            assert account.decide(reading, action, full, point=point) == "explicitDeny"
    control = "spotfirst/control/runs/parent/journal/00000001.json"
    assert account.decide(reading, "s3:GetObject", control, point=point) == "explicitDeny"
    listed = {"s3__prefix": "spotfirst/runs/parent/checkpoints/"}
    assert account.decide(reading, "s3:ListBucket", "", point=point, **listed) == "allowed"


@_each_reading
def test_code_is_read_of_the_own_run_only(account: Account, reading: Reading) -> None:
    point = account.point("r", MINE, code=CodeRef(digest=CODE, size_bytes=1))
    for digest, decision in ((CODE, "allowed"), ("b" * 64, "explicitDeny")):
        path = f"spotfirst/code/{digest}.tar.gz"
        assert account.decide(reading, "s3:GetObject", path, point=point) == decision


# -- another run's --------------------------------------------------------------------------------


@_each_object
@_each_reading
@pytest.mark.parametrize("by", [OTHER, GONE, None], ids=["another run's", "ended", "no instance"])
@pytest.mark.parametrize("more", [[], EVERYTHING], ids=["", "whatever else is attached"])
def test_nobody_but_the_runs_instances_gets_through_its_access_point(
    account: Account, kind: Kind, reading: Reading, by: str | None, more: Statements
) -> None:
    role = [*account.role, *more]
    for action in ("s3:GetObject", "s3:GetObjectVersion", *WRITES):
        found = account.decide(reading, action, f"spotfirst/{kind.example}", by=by, role=role)
        assert found == "explicitDeny"
    for action in ("s3:ListBucket", "s3:ListBucketVersions"):
        assert account.decide(reading, action, "", by=by, role=role) == "explicitDeny"


@_of_a_run
@_each_reading
@_each_storage
@pytest.mark.parametrize("more", [[], EVERYTHING], ids=["", "whatever else is attached"])
def test_an_instance_reaches_no_other_run_through_its_own_access_point(
    account: Account, kind: Kind, reading: Reading, storage: str, more: Statements
) -> None:
    role, point = [*account.role, *more], account.point("r2", OTHER, storage=storage)
    for run_id in ("r", "r2x", "x-r2", "control"):
        path = f"{storage}/{kind.example}".replace("runs/r/", f"runs/{run_id}/")
        for action in ("s3:GetObject", *WRITES):
            found = account.decide(
                reading, action, path, by=OTHER, through="r2", point=point, role=role
            )
            assert found == "explicitDeny", (action, path)


@_decided
@_each_reading
@pytest.mark.parametrize("more", [[], EVERYTHING], ids=["", "whatever else is attached"])
def test_what_all_share_is_written_by_nobody(
    account: Account, kind: Kind, reading: Reading, more: Statements
) -> None:
    for action in WRITES:
        found = account.decide(
            reading, action, f"spotfirst/{kind.example}", role=[*account.role, *more]
        )
        assert found == "explicitDeny"


@_each_reading
def test_a_run_of_the_same_name_in_another_storage_is_another_run(
    account: Account, reading: Reading
) -> None:
    point = account.point("r", MINE, storage="spotfirst/team")
    for storage in ("spotfirst", "spotfirst/team/one", "spotfirst/team2"):
        path = f"{storage}/runs/r/packs/1/x"
        for action in ("s3:GetObject", *WRITES):
            assert account.decide(reading, action, path, point=point) == "explicitDeny"


# -- other ways -----------------------------------------------------------------------------------


@_each_object
@pytest.mark.parametrize("more", [[], EVERYTHING], ids=["", "whatever else is attached"])
def test_a_request_without_an_access_point_is_denied(
    account: Account, kind: Kind, more: Statements
) -> None:
    arn = f"arn:aws:s3:::{account.stack.bucket}/spotfirst/{kind.example}"
    keys = {"aws:PrincipalArn": account.apart.role, "ec2:SourceInstanceARN": MINE,
            "aws:SecureTransport": "true", "s3:if-none-match": "*"}  # fmt: skip
    statements = [*account.role, *more, *account.bucket_policy]
    for action in ("s3:GetObject", *WRITES):
        assert decide(statements, action, arn, keys) == "explicitDeny"
    bucket = f"arn:aws:s3:::{account.stack.bucket}"
    assert decide(statements, "s3:ListBucket", bucket, keys) == "explicitDeny"


@pytest.mark.parametrize(
    "arn",
    [
        f"arn:aws:s3:us-east-1:{ACCOUNT}:accesspoint/somebodys",
        "arn:aws:s3:us-east-1:999999999999:accesspoint/spotfirst-00000000-r",
        f"arn:aws:s3:us-east-1:{ACCOUNT}:accesspoint/spotfirst-ffffffff-r",
    ],
    ids=["another's", "another account's", "another stack's"],
)
@pytest.mark.parametrize("reading", READINGS[:2])
def test_an_access_point_that_is_not_the_stacks_leads_nowhere(
    account: Account, arn: str, reading: Reading
) -> None:
    """Even one that lets everybody in: it may be an attacker's own, in an account of theirs."""
    open_to_all = [{"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": "*"}]
    for action in ("s3:GetObject", *WRITES):
        found = account.decide(
            reading, action, "spotfirst/runs/r/packs/1/x", arn=arn, point=open_to_all
        )
        assert found != "allowed"


@pytest.mark.parametrize("reading", READINGS[:2])
@pytest.mark.parametrize("action", ["s3:GetObject", *WRITES])
def test_an_access_point_without_a_policy_lets_nobody_in(
    account: Account, reading: Reading, action: str
) -> None:
    """Its maker was killed before it had one."""
    found = account.decide(reading, action, "spotfirst/runs/r/packs/1/x", point=[])
    assert found != "allowed"


@_each_reading
@_each_object
def test_one_that_was_just_made_lets_nobody_in(
    account: Account, reading: Reading, kind: Kind
) -> None:
    point = account.point("r")
    for action in ("s3:GetObject", *WRITES):
        path = f"spotfirst/{kind.example}"
        assert account.decide(reading, action, path, point=point) == "explicitDeny"


@_each_reading
@_written
def test_what_is_created_once_is_never_replaced_through_an_access_point_either(
    account: Account, reading: Reading, kind: Kind
) -> None:
    path = f"spotfirst/{kind.example}"
    replaced = account.decide(reading, "s3:PutObject", path, **{"s3__if-none-match": None})
    assert (replaced == "explicitDeny") is kind.once
    assert account.decide(reading, "s3:PutObject", path) == "allowed"
    plain = account.decide(reading, "s3:PutObject", path, aws__SecureTransport="false")
    assert plain == "explicitDeny"


def test_controllers_go_to_the_bucket_as_before(account: Account) -> None:
    controller = account.stack.outputs["ControllerRoleArn"]
    statements = [*statements_of(controller), *account.bucket_policy]
    keys = {"aws:PrincipalArn": controller, "aws:SecureTransport": "true", "s3:if-none-match": "*",
            "s3:ObjectCreationOperation": "true"}  # fmt: skip
    for kind in OBJECTS:
        arn = f"arn:aws:s3:::{account.stack.bucket}/spotfirst/{kind.example}"
        for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
            assert decide(statements, action, arn, keys) == "allowed"


def test_controllers_make_and_remove_the_stacks_access_points_only(account: Account) -> None:
    controller = statements_of(account.stack.outputs["ControllerRoleArn"])
    for name in ("CreateAccessPoint", "DeleteAccessPoint", "GetAccessPoint", "GetAccessPointPolicy",
                 "PutAccessPointPolicy"):  # fmt: skip
        assert decide(controller, f"s3:{name}", account.arn("r")) == "allowed"
        for other in ("spotfirst-00000000-r", "mine", "spotfirst"):
            arn = f"arn:aws:s3:us-east-1:{ACCOUNT}:accesspoint/{other}"
            assert decide(controller, f"s3:{name}", arn) == "implicitDeny"
        assert decide(account.role, f"s3:{name}", account.arn("r")) != "allowed"
    assert decide(controller, "s3:ListAccessPoints", "*") == "allowed"


def test_the_longest_names_fit_into_a_policy() -> None:
    apart = SeparateRuns(
        access_points=f"arn:aws-us-gov:s3:us-gov-west-1:{ACCOUNT}:accesspoint/spotfirst-01234567",
        role=f"arn:aws-us-gov:iam::{ACCOUNT}:role/{'r' * 64}",
    )
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    spec = RunSpec(
        run_id="r" * 200, created_at=now, command=("train",),
        code=CodeRef(digest=CODE, size_bytes=1),
        resume_from=ResumeFrom(run_id="p" * 200, step=1, seq=1),
    )  # fmt: skip
    instances = [
        f"arn:aws-us-gov:ec2:us-gov-west-1:{ACCOUNT}:instance/i-{n:017x}" for n in range(20)
    ]
    policy_of(
        f"{apart.access_points}-{'0' * 24}", apart.role, Place(bucket="b" * 63, prefix="p" * 100),
        "r" * 200, spec=spec, instances=instances,
    )  # fmt: skip
