"""The doctor on the queue of notices, and the rules that feed it."""

from __future__ import annotations

from typing import Any

import msgspec

from spotfirst_airflow.fleets.checks import Check
from spotfirst_airflow.fleets.ec2._examination import (
    Examination,
    Refused,
    allow,
    statements,
    unlooked,
)

__all__ = ["check_queue"]

_WARNING = "EC2 Spot Instance Interruption Warning"
_USEFUL = ("EC2 Instance Rebalance Recommendation", "EC2 Instance State-change Notification")
_MANY = 1000
_GONE = {"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist", "InvalidAddress"}


def check_queue(look: Examination) -> list[Check]:
    """It can be read, is encrypted, and EventBridge sends to it what happens to instances."""
    if not look.options.queue_url:
        found = (
            "no fleet option queue_url: an instance sees its own notice, but the controller then "
            "hears of it from the instance, and of a lost instance at the next look"
        )
        return [Check(name="queue", verdict="skipped", found=found)]
    url = look.options.queue_url
    fix = "give the fleet option queue_url: output QueueUrl of deploy/aws.yaml"
    try:
        answer = look.ask("sqs", "get_queue_attributes", QueueUrl=url, AttributeNames=["All"])
    except Refused as error:
        if error.code in _GONE:
            found = f"there is no queue {url}"
            return [Check(name="queue", verdict="failed", found=found, fix=fix)]
        if error.denied:
            return [_denied(error)]
        raise
    attributes: dict[str, str] = answer["Attributes"]
    arn = attributes["QueueArn"]
    found_here = [_may_read(look, url), _properties(look, attributes)]
    try:
        found_here.append(_feeds(look, arn))
    except Refused as error:
        found_here.append(unlooked("event rules", error))
    return found_here


def _denied(error: Refused) -> Check:
    found = f"denied: {error.action}"
    return Check(name="queue", verdict="failed", found=found, fix=allow(error.action))


def _may_read(look: Examination, url: str) -> Check:
    """Receive without hiding anything, and delete something that was never received."""
    try:
        look.ask(
            "sqs", "receive_message", QueueUrl=url, MaxNumberOfMessages=1, VisibilityTimeout=0,
            WaitTimeSeconds=0,
        )  # fmt: skip
        look.ask("sqs", "delete_message", QueueUrl=url, ReceiptHandle="spotfirst-doctor")
    except Refused as error:
        if error.denied:
            return _denied(error)
        if error.unavailable:
            return unlooked("queue", error)
        # The handle is wrong, so we would have been allowed.
    return Check(name="queue", verdict="ok", found="may be read")


def _properties(look: Examination, attributes: dict[str, str]) -> Check:
    name = "queue settings"
    policy = statements(attributes.get("Policy", ""))
    if not any(_lets_events_in(statement) for statement in policy):
        found = "its policy does not let EventBridge send, so it stays empty"
        fix = "allow sqs:SendMessage to events.amazonaws.com, as QueuePolicy of deploy/aws.yaml"
        return Check(name=name, verdict="failed", found=found, fix=fix)
    if attributes.get("SqsManagedSseEnabled") != "true" and not attributes.get("KmsMasterKeyId"):
        fix = "aws sqs set-queue-attributes --attributes SqsManagedSseEnabled=true --queue-url …"
        return Check(name=name, verdict="warning", found="it is not encrypted", fix=fix)
    place = attributes["QueueArn"].split(":")[3]
    if place != look.aws.region:
        found = f"it is in {place}, and instances in {look.aws.region}: events stay in a region"
        fix = f"give the queue of the stack in {look.aws.region}"
        return Check(name=name, verdict="failed", found=found, fix=fix)
    waiting = int(attributes.get("ApproximateNumberOfMessages", 0))
    if waiting > _MANY:
        found = f"{waiting} messages wait: no controller reads them"
        fix = "look whether Airflow's triggerer runs; `aws sqs purge-queue` empties it"
        return Check(name=name, verdict="warning", found=found, fix=fix)
    return Check(name=name, verdict="ok", found=f"encrypted, fed by EventBridge, {waiting} waiting")


def _lets_events_in(statement: dict[str, Any]) -> bool:
    actions = {action.lower() for action in _listed(statement.get("Action", []))}
    if statement.get("Effect") != "Allow" or not actions & {"sqs:sendmessage", "sqs:*", "*"}:
        return False
    principal = statement.get("Principal", {})
    if not isinstance(principal, dict):
        return bool(principal == "*")
    services = _listed(principal.get("Service", []))
    return "events.amazonaws.com" in services or "*" in _listed(principal.get("AWS", []))


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _feeds(look: Examination, arn: str) -> Check:
    name = "event rules"
    fix = "deploy the event rules of deploy/aws.yaml: InterruptionRule, RebalanceRule, StateRule"
    names = look.ask_all("events", "list_rule_names_by_target", "RuleNames", TargetArn=arn)
    kinds: set[str] = set()
    off = []
    for rule_name in names:
        rule = look.ask("events", "describe_rule", Name=rule_name)
        pattern = msgspec.json.decode(rule.get("EventPattern") or "{}")
        if "aws.ec2" not in pattern.get("source", []):
            continue
        if rule.get("State") == "DISABLED":
            off.append(rule_name)
            continue
        kinds |= set(pattern.get("detail-type", [_WARNING, *_USEFUL]))
    if _WARNING not in kinds:
        found = "no rule sends the queue EC2's interruption warnings"
        if off:
            found, fix = f"disabled: {', '.join(off)}", f"aws events enable-rule --name {off[0]}"
        return Check(name=name, verdict="failed", found=found, fix=fix)
    lacking = [kind for kind in _USEFUL if kind not in kinds]
    if lacking:
        found = f"nothing sends {' and '.join(lacking)}"
        return Check(name=name, verdict="warning", found=found, fix=fix)
    return Check(name=name, verdict="ok", found=f"{len(names)} feed it")
