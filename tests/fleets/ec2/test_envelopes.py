"""Whatever is wrapped around an event is taken off; what is no event is named and never guessed."""

from __future__ import annotations

import base64
import json
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst_airflow.fleets.ec2.envelopes import Event, Poison, parse, read

AT = datetime(2026, 1, 1, tzinfo=timezone.utc)
SENT = datetime(2026, 1, 1, 0, 0, 9, tzinfo=timezone.utc)
ID = "i-0123456789abcdef0"
NOTICE = {
    "version": "0", "id": "1", "source": "aws.ec2", "account": "123456789012",
    "detail-type": "EC2 Spot Instance Interruption Warning", "region": "eu-west-1",
    "time": "2026-01-01T00:00:00Z", "resources": [f"arn:aws:ec2:eu-west-1a:instance/{ID}"],
    "detail": {"instance-id": ID, "instance-action": "terminate"},
}  # fmt: skip
INTERRUPTION = Event(kind="interruption", instance_id=ID, at=AT)


def sns(message: object, **more: Any) -> dict[str, Any]:
    return {
        "Type": "Notification", "MessageId": "1", "TopicArn": "arn:aws:sns:eu-west-1:1:t",
        "Message": message if isinstance(message, str) else json.dumps(message),
        "Timestamp": "2026-01-01T00:00:01Z", **more,
    }  # fmt: skip


def b64(value: object) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


WRAPPED = {
    "as it is": NOTICE,
    "in SNS's notification": sns(NOTICE),
    "in a list": [NOTICE],
    "in SNS's notification, of SNS's": sns(sns(NOTICE)),
    "in SNS's notification, a list": sns([NOTICE]),
    "in a list of SNS's notifications": [sns(NOTICE)],
    "as a text": json.dumps(NOTICE),
    "as Lambda gets it from SNS": {"Records": [{"EventSource": "aws:sns", "Sns": sns(NOTICE)}]},
    "as Lambda gets it from SQS": {"Records": [{"messageId": "1", "body": json.dumps(NOTICE)}]},
    "from SQS, of SNS's": {"Records": [{"body": json.dumps(sns(NOTICE))}]},
    "as Kinesis has it": {"Records": [{"kinesis": {"data": b64(NOTICE)}}]},
    "in base64": b64(NOTICE),
    "with its time without a zone": NOTICE | {"time": "2026-01-01T00:00:00"},
    "a transformer's fields": {
        "instance": ID, "action": "terminate", "time": "2026-01-01T00:00:00Z",
    },
    "a transformer's other names": {
        "instanceId": ID, "instanceAction": "stop", "time": "2026-01-01T00:00:00Z",
        "detailType": "EC2 Spot Instance Interruption Warning",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_a_notice_is_found_in_any_envelope(name: str) -> None:
    assert parse(json.dumps(WRAPPED[name]), sent_at=SENT) == (INTERRUPTION,)


@pytest.mark.parametrize("wrap", [lambda body: body, sns, lambda body: [body]])
@pytest.mark.parametrize(
    ("detail", "expected"),
    [
        ({"instance-id": ID, "instance-action": "stop"}, ("interruption", "")),
        ({"instance-id": ID}, ("rebalance", "")),
        ({"instance-id": ID, "state": "shutting-down"}, ("state", "shutting-down")),
    ],
)
def test_the_detail_alone_says_it_too_and_happened_when_it_was_sent(
    wrap: Any, detail: dict[str, str], expected: tuple[str, str]
) -> None:
    (event,) = parse(json.dumps(wrap(detail)), sent_at=SENT)
    assert (event.kind, event.state) == expected
    assert (event.instance_id, event.at) == (ID, SENT)


def test_several_in_one_message_are_all_found_and_a_bad_one_is_named() -> None:
    others = [NOTICE | {"detail": {"instance-id": f"i-{n:08x}", "instance-action": "stop"}}
              for n in range(3)]  # fmt: skip
    content = read(json.dumps([*others, "garbage", {"a": 1}]))
    assert [event.instance_id for event in content.events] == [
        "i-00000000",
        "i-00000001",
        "i-00000002",
    ]
    assert len(content.problems) == 2
    assert "garbage" in content.problems[0]


def test_an_event_of_another_kind_is_neither_found_nor_a_problem() -> None:
    other = NOTICE | {"detail-type": "EC2 Spot Instance Request Fulfillment"}
    for wrapped in (other, sns(other), [other], {"instanceId": ID, "detailType": "Another Kind"}):
        assert read(json.dumps(wrapped)) == ((), ())


NONE = {
    "a word": "hello",
    "SNS with a word": sns("hello"),
    "SNS without its message": {"Type": "Notification", "TopicArn": "t"},
    "nothing": {},
    "an empty list": [],
    "a number": 3,
    "null": None,
    "a sentence that names an instance": f"Instance {ID} will be terminated",
    "an instance and a guess": {"instance-id": ID, "message": "it may be terminated soon"},
    "an unknown action": {"instance-id": ID, "instance-action": "dance"},
    "no id of an instance": {"instance-id": "../../etc", "instance-action": "stop"},
    "values of odd types": {"instance-id": ID, "instance-action": ["stop"], "state": {}},
    "wrapped without end": None,
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_event_is_poison_and_shows_itself(name: str) -> None:
    body = json.dumps(NONE[name])
    if name == "wrapped without end":
        body = json.dumps(NOTICE)
        for _ in range(10):
            body = json.dumps(sns(body))
    with pytest.raises(Poison, match=r"\S"):
        parse(body)


def test_a_subscription_that_waits_to_be_confirmed_says_so() -> None:
    asked = {"Type": "SubscriptionConfirmation", "TopicArn": "arn:t", "Token": "x", "Message": "m"}
    with pytest.raises(Poison, match=r"arn:t: confirm the subscription"):
        parse(json.dumps(asked))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from([ID, json.dumps(NOTICE)]),
    lambda inner: st.lists(inner) | st.dictionaries(
        st.sampled_from(["detail", "detail-type", "time", "Message", "Records", "body", "Type",
                         "instance-id", "instance-action", "state", "data"]) | st.text(), inner,
    ),
    max_leaves=12,
)  # fmt: skip


@given(json_values.map(json.dumps) | st.text())
def test_any_message_is_read_without_an_error(body: str) -> None:
    content = read(body)
    assert all(len(problem) < 1000 for problem in content.problems)
    assert isinstance(content.events, tuple)


@pytest.mark.parametrize(
    "body", ["[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "[" * 900 + "]" * 900]
)
def test_deep_nesting_is_no_event(body: str) -> None:
    assert read(body).problems
