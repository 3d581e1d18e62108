"""IAM's decision, for as much of its language as deploy/aws.yaml uses: moto has no simulator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Literal, get_args

import boto3

Statements = list[dict[str, Any]]


def decide(
    statements: Statements, action: str, resource: str, context: Mapping[str, Any] | None = None
) -> str:
    """``allowed``, ``implicitDeny`` or ``explicitDeny``."""
    keys = {key.lower(): value for key, value in (context or {}).items()}
    hits = [s["Effect"] for s in statements if _applies(s, action, resource, keys)]
    if "Deny" in hits:
        return "explicitDeny"
    return "allowed" if "Allow" in hits else "implicitDeny"


Reading = Literal[
    "each policy twice", "a role's by the access point's ARN", "a role's by the bucket's ARN"
]
READINGS: tuple[Reading, ...] = get_args(Reading)
"""Of AWS's documentation, on requests through an access point. Both it and the bucket have to allow
them, and each has a policy that names its own ARNs: so much is said. The first one is what examples
of AWS's and others' rely on. What has to be allowed, is so by all of them, and what must not happen
is denied by all."""


def decide_through(
    reading: Reading,
    action: str,
    path: str,
    *,
    point_arn: str,
    point: Statements,
    bucket: str,
    bucket_policy: Statements,
    role: Statements,
    context: Mapping[str, Any],
) -> str:
    """The decision on a request through an access point; an empty ``path`` is the bucket itself."""
    keys = {"s3:DataAccessPointArn": point_arn, **context}
    here = f"{point_arn}/object/{path}" if path else point_arn
    there = f"arn:aws:s3:::{bucket}/{path}" if path else f"arn:aws:s3:::{bucket}"
    if reading == "each policy twice":
        found = [
            decide([*role, *point], action, here, keys),
            decide([*role, *bucket_policy], action, there, keys),
        ]
    elif reading == "a role's by the access point's ARN":
        found = [
            decide([*role, *point], action, here, keys),
            decide(bucket_policy, action, there, keys),
        ]
    else:
        own = decide(role, action, there, keys)
        theirs = decide(point, action, here, keys)
        found = [
            max(own, theirs, key=("implicitDeny", "allowed", "explicitDeny").index),
            decide([*role, *bucket_policy], action, there, keys),
        ]
    return max(found, key=("allowed", "implicitDeny", "explicitDeny").index)


def statements_of(principal: str) -> Statements:
    """Everything attached to a role or a user that moto knows, by its ARN."""
    iam = _iam()
    kind, name = principal.rsplit(":", 1)[1].split("/", 1)
    attached = getattr(iam, f"list_attached_{kind}_policies")
    inline, get = getattr(iam, f"list_{kind}_policies"), getattr(iam, f"get_{kind}_policy")
    who = {f"{kind.title()}Name": name}
    documents = [
        get(**who, PolicyName=each)["PolicyDocument"] for each in inline(**who)["PolicyNames"]
    ]
    for policy in attached(**who)["AttachedPolicies"]:
        documents += [document_of(policy["PolicyArn"])]
    return [statement for document in documents for statement in document["Statement"]]


def document_of(arn: str) -> dict[str, Any]:
    """What a managed policy says, as CloudFormation resolved it."""
    iam = _iam()
    version = iam.get_policy(PolicyArn=arn)["Policy"]["DefaultVersionId"]
    found = iam.get_policy_version(PolicyArn=arn, VersionId=version)["PolicyVersion"]["Document"]
    return dict(found)


def simulate(request: Mapping[str, Any]) -> dict[str, Any]:
    """As SimulatePrincipalPolicy answers."""
    statements = statements_of(request["PolicySourceArn"])
    context = {
        entry["ContextKeyName"]: entry["ContextKeyValues"]
        for entry in request.get("ContextEntries", ())
    }
    return {
        "EvaluationResults": [
            {
                "EvalActionName": action,
                "EvalResourceName": resource,
                "EvalDecision": decide(statements, action, resource, context),
            }
            for action in request["ActionNames"]
            for resource in request["ResourceArns"]
        ]
    }


@lru_cache
def _iam() -> Any:
    return boto3.client("iam", region_name="us-east-1")


def _applies(
    statement: dict[str, Any], action: str, resource: str, keys: Mapping[str, Any]
) -> bool:
    return (
        any(fnmatchcase(action.lower(), each.lower()) for each in _list(statement["Action"]))
        and _concerns(statement, keys)
        and _is_about(statement, resource)
        and all(
            _holds(operator, _values(keys, name), _list(wanted))
            for operator, tests in statement.get("Condition", {}).items()
            for name, wanted in tests.items()
        )
    )


def _concerns(statement: dict[str, Any], keys: Mapping[str, Any]) -> bool:
    """Whether the one who asks is meant; a policy of a role or user names nobody."""
    named = statement.get("Principal", "*")
    wanted = _list(named if isinstance(named, str) else named["AWS"])
    return "*" in wanted or bool(set(_values(keys, "aws:PrincipalArn") or ()) & set(wanted))


def _is_about(statement: dict[str, Any], resource: str) -> bool:
    if "NotResource" in statement:
        return not any(fnmatchcase(resource, each) for each in _list(statement["NotResource"]))
    return any(fnmatchcase(resource, each) for each in _list(statement["Resource"]))


def _holds(operator: str, found: list[str] | None, wanted: list[str]) -> bool:
    if operator.startswith("ForAllValues:"):
        return all(value in wanted for value in found or ())
    if operator == "Null":
        return (found is None) == (wanted == ["true"])
    if operator in {"ArnNotEquals", "ArnNotLike", "StringNotLike"}:
        return not any(fnmatchcase(value, each) for value in found or () for each in wanted)
    if operator == "StringNotEquals":
        return found is None or not set(found) & set(wanted)
    if found is None:
        return operator.endswith("IfExists")
    if operator in {"ArnEquals", "ArnLike"} or operator.startswith("StringLike"):
        return any(fnmatchcase(value, each) for value in found for each in wanted)
    assert operator in {"StringEquals", "Bool"}, f"{operator} is not known here"
    return bool(set(found) & set(wanted))


def _values(keys: Mapping[str, Any], name: str) -> list[str] | None:
    value = keys.get(name.lower())
    return None if value is None else _list(value)


def _list(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
