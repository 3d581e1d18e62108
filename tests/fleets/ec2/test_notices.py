"""Events of EC2's reach the journal of the run that they are about, whoever receives them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from spotfirst import events as e
from spotfirst.errors import FleetUnavailable, StorageDenied, StorageUnavailable
from spotfirst.market import Market, Pool
from spotfirst.run import Run
from spotfirst.storage import Storage, open_storage
from spotfirst_airflow.fleets.base import ATTEMPT_TAG, RUN_TAG, STORAGE_TAG
from spotfirst_airflow.fleets.ec2.aws import Aws
from spotfirst_airflow.fleets.ec2.instances import TOKEN_TAG
from spotfirst_airflow.fleets.ec2.notices import Event, NoticeQueue, Poison, parse
from spotfirst_airflow.fleets.ec2.watching import Watcher
from spotfirst_airflow.waking import Bell
from tests.fakes.clients import QUEUE_URL, FakeAws
from tests.fakes.cloud import Cloud, CloudInstance, Weather
from tests.fakes.faults import client_error
from tests.fleets.ec2.wire import moto_aws
from tests.waiting import wait_until

POOL = ("g6.xlarge", "us-east-1a")
WARNING = "EC2 Spot Instance Interruption Warning"
RECOMMENDATION = "EC2 Instance Rebalance Recommendation"
CHANGE = "EC2 Instance State-change Notification"
_names = itertools.count()


def body(kind: str, detail: Mapping[str, str], *, at: str = "2026-01-01T00:00:00Z") -> str:
    return json.dumps({
        "version": "0", "id": "1e5527d7-bb36-4607-3370-4164db56a40e", "detail-type": kind,
        "source": "aws.ec2", "account": "123456789012", "time": at, "region": "us-east-1",
        "resources": ["arn:aws:ec2:us-east-1b:instance/i-0b662ef9931388ba0"], "detail": detail,
    })  # fmt: skip


def warning(instance_id: str, **more: Any) -> str:
    return body(WARNING, {"instance-id": instance_id, "instance-action": "terminate"}, **more)


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    Watcher.forget_all()
    yield
    Watcher.forget_all()


class World:
    """A cloud without chance, a storage, and processes that look at both."""

    def __init__(self) -> None:
        self.cloud = Cloud(weather=Weather(event_lost_share=0, event_twice_share=0))
        self.storage = open_storage(f"memory://notices-{next(_names)}")
        self.failures: list[Exception] = []

    def watcher(self, process: str = "", **settings: Any) -> Watcher:
        aws: Any = FakeAws(self.cloud, process=process)
        clock = self.cloud.clock
        settings = {"background": False, "open_storage": self.open_storage} | settings
        return Watcher.of(aws, QUEUE_URL, clock=clock, monotonic=clock.monotonic, **settings)

    def open_storage(self, url: str, environment: Mapping[str, str]) -> Storage:
        if self.failures:
            raise self.failures.pop(0)
        return open_storage(url)

    def launch(self, run_id: str = "r", attempt: int = 1, token: str = "t") -> CloudInstance:
        """An instance that some run's journal knows, in whatever process launched it."""
        instance = self.cloud.launch(POOL, spot=True)
        instance.tags = {
            RUN_TAG: run_id, ATTEMPT_TAG: str(attempt), STORAGE_TAG: self.storage.url,
            TOKEN_TAG: token,
        }  # fmt: skip
        journal, at = Run(self.storage, run_id).journal(), self.cloud.clock.now
        if not journal.refresh().attempts:
            journal.append(e.Created(at=at))
        pool = Pool(instance_type=POOL[0], zone=POOL[1])
        journal.append(
            e.Launching(
                at=at, attempt=attempt, token=token, market=Market.SPOT, pool=pool, reason="first"
            )
        )
        return instance

    def notices(self, run_id: str = "r") -> list[e.Noticed]:
        journal = Run(self.storage, run_id).journal()
        journal.refresh()
        return [event for event in journal.events if isinstance(event, e.Noticed)]

    def events(self, run_id: str = "r") -> int:
        return Run(self.storage, run_id).journal().refresh().seq

    def left(self) -> int:
        return len(self.cloud.queue)


@pytest.fixture
def world() -> World:
    return World()


class TestParsing:
    AT = datetime(2026, 1, 1, tzinfo=timezone.utc)

    @pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
    def test_an_interruption(self, action: str) -> None:
        text = body(WARNING, {"instance-id": "i-0b662ef9931388ba0", "instance-action": action})
        assert parse(text) == (
            Event(kind="interruption", instance_id="i-0b662ef9931388ba0", at=self.AT),
        )

    def test_a_recommendation(self) -> None:
        found = parse(body(RECOMMENDATION, {"instance-id": "i-12345678"}))
        assert found == (Event(kind="rebalance", instance_id="i-12345678", at=self.AT),)

    def test_a_change_of_state(self) -> None:
        found = parse(body(CHANGE, {"instance-id": "i-12345678", "state": "stopping"}))
        expected = Event(kind="state", instance_id="i-12345678", at=self.AT, state="stopping")
        assert found == (expected,)

    def test_an_event_of_another_kind_is_nothing_of_ours(self) -> None:
        assert parse(body("EC2 Spot Instance Request Fulfillment", {})) == ()

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "no JSON",
            "[]",
            '"text"',
            "[" * 100_000,
            '{"detail-type": "x"}',
            '{"detail-type": "x", "time": "soon", "detail": {}}',
            '{"detail-type": "x", "time": "2026-01-01T00:00:00Z", "detail": "text"}',
            body(WARNING, {"instance-action": "terminate"}),
            body(WARNING, {"instance-id": "../../etc", "instance-action": "terminate"}),
            body(WARNING, {"instance-id": "i-12345678"}),
            body(WARNING, {"instance-id": "i-12345678", "instance-action": "dance"}),
        ],
    )
    def test_what_nobody_will_ever_understand_is_poison(self, text: str) -> None:
        with pytest.raises(Poison):
            parse(text)


class TestJournal:
    def test_an_interruption_comes_two_minutes_after_its_event(self, world: World) -> None:
        instance = world.launch()
        world.cloud.enqueue(warning(instance.instance_id, at="2026-01-01T00:00:00Z"))
        world.cloud.clock.step(3)
        seen = world.watcher().find(["t"])["t"]
        (noticed,) = world.notices()
        assert noticed.attempt == 1
        assert noticed.at == noticed.notice.seen_at == world.cloud.clock.now
        assert noticed.notice.kind == "interruption"
        assert noticed.notice.time == datetime(2026, 1, 1, 0, 2, tzinfo=timezone.utc)
        assert seen.notice == noticed.notice
        assert world.left() == 0

    def test_a_recommendation_has_no_time_and_an_interruption_replaces_it(
        self, world: World
    ) -> None:
        instance = world.launch()
        watcher = world.watcher()
        world.cloud.enqueue(body(RECOMMENDATION, {"instance-id": instance.instance_id}))
        watcher.refresh()
        world.cloud.enqueue(warning(instance.instance_id))
        watcher.refresh()
        world.cloud.enqueue(body(RECOMMENDATION, {"instance-id": instance.instance_id}))
        watcher.refresh()
        first, second = world.notices()
        assert (first.notice.kind, first.notice.time) == ("rebalance", None)
        assert second.notice.kind == "interruption"
        assert world.left() == 0

    def test_twice_the_same_is_journalled_once(self, world: World) -> None:
        instance = world.launch()
        watcher = world.watcher()
        for _ in range(3):
            world.cloud.enqueue(warning(instance.instance_id))
            watcher.refresh()
        assert len(world.notices()) == 1
        assert world.left() == 0

    def test_the_run_of_another_process_is_told_as_well(self, world: World) -> None:
        first = world.launch("first", token="t1")
        second = world.launch("second", token="t2")
        for instance in (first, second):
            world.cloud.enqueue(warning(instance.instance_id))
        world.watcher("one").find(["t1"])
        assert len(world.notices("first")) == len(world.notices("second")) == 1
        assert world.watcher("two").find(["t2"])["t2"].notice is None  # it is in the journal

    def test_an_instance_that_this_process_has_not_seen_is_asked_for(self, world: World) -> None:
        watcher = world.watcher()
        watcher.refresh()
        for number in range(5):
            instance = world.launch(f"r{number}", token=f"t{number}")
            world.cloud.enqueue(warning(instance.instance_id))
        aws: Any = watcher._aws
        before = world.cloud.calls["DescribeInstances"]
        notices, _ = watcher._queues[QUEUE_URL]
        assert notices.poll() == 5
        assert all(len(world.notices(f"r{number}")) == 1 for number in range(5))
        assert world.cloud.calls["DescribeInstances"] - before == 1
        assert aws is watcher._aws

    def test_an_attempt_that_has_ended_is_left_alone(self, world: World) -> None:
        instance = world.launch()
        Run(world.storage, "r").journal().decide(
            lambda state: (
                None
                if state.attempts[0].ended
                else e.Ended(
                    at=world.cloud.clock.now, attempt=1, cause="completed",
                    ended_at=world.cloud.clock.now,
                )
            )
        )  # fmt: skip
        before = world.events()
        world.cloud.enqueue(warning(instance.instance_id))
        world.watcher().refresh()
        assert (world.events(), world.left()) == (before, 0)

    @pytest.mark.parametrize("wrong", [{TOKEN_TAG: "another"}, {ATTEMPT_TAG: "7"}, {RUN_TAG: "x"}])
    def test_tags_that_the_journal_does_not_confirm_are_not_believed(
        self, world: World, wrong: dict[str, str], caplog: pytest.LogCaptureFixture
    ) -> None:
        instance = world.launch()
        instance.tags |= wrong
        before = world.events()
        world.cloud.enqueue(warning(instance.instance_id))
        world.watcher().refresh()
        assert (world.events(), world.left()) == (before, 0)
        assert "none like it" in caplog.text


class TestLeaving:
    def test_what_could_not_be_journalled_comes_back(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        instance = world.launch()
        watcher = world.watcher()
        world.cloud.enqueue(warning(instance.instance_id))
        world.failures = [StorageUnavailable("the storage is away")]
        watcher.refresh()
        assert (len(world.notices()), world.left()) == (0, 1)
        assert "the storage is away" in caplog.text
        world.cloud.clock.step(10)
        watcher.refresh()
        assert (len(world.notices()), world.left()) == (0, 1)
        world.cloud.clock.step(10)
        watcher.refresh()
        assert (len(world.notices()), world.left()) == (1, 0)

    def test_a_failure_keeps_no_other_run_from_its_notice(self, world: World) -> None:
        for name in ("a", "b"):
            instance = world.launch(name, token=name)
            world.cloud.enqueue(warning(instance.instance_id))
        world.failures = [RuntimeError("a bug")]
        world.watcher().refresh()
        assert (len(world.notices("a")), len(world.notices("b")), world.left()) == (0, 1, 1)

    def test_it_is_given_up_when_it_is_of_no_use_any_more(self, world: World) -> None:
        instance = world.launch()
        watcher = world.watcher()
        world.cloud.enqueue(warning(instance.instance_id))
        world.failures = [StorageUnavailable("away")] * 100
        for _ in range(29):
            world.cloud.clock.step(20)
            watcher.refresh()
        assert world.left() == 1
        world.cloud.clock.step(20)
        watcher.refresh()
        assert world.left() == 0

    def test_an_instance_that_ec2_does_not_describe_yet_is_waited_for(self, world: World) -> None:
        instance = world.launch()
        instance.visible_at = instance.tagged_at = world.cloud.clock.now + timedelta(seconds=15)
        watcher = world.watcher()
        world.cloud.enqueue(warning(instance.instance_id))
        watcher.refresh()
        assert (len(world.notices()), world.left()) == (0, 1)
        world.cloud.clock.step(20)
        watcher.refresh()
        assert (len(world.notices()), world.left()) == (1, 0)

    def test_without_ec2_those_that_are_known_are_told(self, world: World) -> None:
        known = world.launch("known", token="known")
        watcher = world.watcher()
        watcher.refresh()
        unknown = world.launch("unknown", token="unknown")
        for instance in (known, unknown):
            world.cloud.enqueue(warning(instance.instance_id))
        aws: Any = watcher._aws
        aws._clients["ec2"] = Away()
        with pytest.raises(FleetUnavailable):
            watcher.refresh()
        assert (len(world.notices("known")), len(world.notices("unknown"))) == (1, 0)
        assert world.left() == 1

    def test_without_the_queue_instances_are_told_all_the_same(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        world.launch()
        watcher = world.watcher()
        aws: Any = watcher._aws
        aws._clients["sqs"] = Away()
        assert watcher.find(["t"])
        assert "UnauthorizedOperation" in caplog.text

    def test_a_lost_deletion_does_no_harm(self, world: World) -> None:
        instance = world.launch()
        watcher = world.watcher()
        aws: Any = watcher._aws
        inner = aws._clients["sqs"]
        aws._clients["sqs"] = KeepsAll(inner)
        world.cloud.enqueue(warning(instance.instance_id))
        watcher.refresh()
        aws._clients["sqs"] = inner
        world.cloud.clock.step(20)
        watcher.refresh()
        assert (len(world.notices()), world.left()) == (1, 0)


class Away:
    """A client whose every call is refused."""

    def __getattr__(self, name: str) -> Any:
        def refuse(**parameters: Any) -> Any:
            raise client_error("UnauthorizedOperation", "no", name)

        return refuse


class KeepsAll:
    """A queue whose deletions are not applied."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def receive_message(self, **parameters: Any) -> Any:
        return self.client.receive_message(**parameters)

    def delete_message_batch(self, **parameters: Any) -> Any:
        raise client_error("InternalError", "no", "DeleteMessageBatch")


class TestDeleting:
    def test_poison_is_deleted_with_a_word_and_holds_up_nobody(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        instance = world.launch()
        world.cloud.enqueue("poison")
        world.cloud.enqueue(warning(instance.instance_id))
        world.watcher().refresh()
        assert (len(world.notices()), world.left()) == (1, 0)
        assert "no event of EventBridge's" in caplog.text

    def test_a_queue_full_of_poison_is_one_warning_with_a_count_and_a_sample(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        for number in range(25):
            world.cloud.enqueue(f"poison {number}")
        watcher = world.watcher()
        watcher.refresh()
        [told] = watcher.warnings()
        assert QUEUE_URL in told
        assert "25 so far" in told
        assert "poison 0" in told
        for number in range(50):
            world.cloud.enqueue(f"more poison {number}")
        watcher.refresh()
        assert watcher.warnings() == [told]
        assert caplog.text.count("cannot be read") == 1
        assert world.left() == 0

    def test_a_message_with_several_stays_until_all_of_it_is_handled(self, world: World) -> None:
        first, second = world.launch(), world.launch("r2", token="t2")
        both = [json.loads(warning(each.instance_id)) for each in (first, second)]
        world.cloud.enqueue(json.dumps(both))
        world.failures = [StorageUnavailable("away")]
        watcher = world.watcher()
        watcher.refresh()
        assert world.left() == 1
        assert len(world.notices("r")) + len(world.notices("r2")) == 1
        world.cloud.clock.step(30)
        watcher.refresh()
        assert (world.left(), len(world.notices("r")), len(world.notices("r2"))) == (0, 1, 1)

    def test_instances_of_others_and_events_of_other_kinds_are_deleted(self, world: World) -> None:
        foreign = world.cloud.launch(POOL, spot=True)
        foreign.tags = {"Name": "web"}
        world.cloud.enqueue(warning(foreign.instance_id))
        world.cloud.enqueue(body("EC2 Spot Instance Request Fulfillment", {}))
        world.cloud.enqueue(body(CHANGE, {"instance-id": foreign.instance_id, "state": "stopped"}))
        world.watcher().refresh()
        assert world.left() == 0


class TestChanges:
    def test_a_change_of_state_makes_the_next_look_ask_ec2(self, world: World) -> None:
        instance = world.launch()
        watcher = world.watcher()
        world.cloud.tick(60)
        assert watcher.find(["t"])["t"].state == "running"
        instance.end("aws")
        world.cloud.enqueue(
            body(CHANGE, {"instance-id": instance.instance_id, "state": "shutting-down"})
        )
        notices, _ = watcher._queues[QUEUE_URL]
        bell = Bell("r")
        notices.poll()
        assert bell._rung.is_set()
        assert watcher.find(["t"])["t"].state == "shutting-down"

    def test_that_it_starts_changes_nothing_worth_a_call(self, world: World) -> None:
        instance = world.launch()
        watcher = world.watcher()
        watcher.refresh()
        for state in ("pending", "running"):
            detail = {"instance-id": instance.instance_id, "state": state}
            world.cloud.enqueue(body(CHANGE, detail))
        notices, _ = watcher._queues[QUEUE_URL]
        before = world.cloud.calls["DescribeInstances"]
        notices.poll()
        watcher.find(["t"])
        assert (world.cloud.calls["DescribeInstances"] - before, world.left()) == (0, 0)


class TestReceiving:
    def queue(self, world: World) -> tuple[NoticeQueue, Any]:
        client = FakeAws(world.cloud).client("sqs")
        return NoticeQueue(lambda: client, QUEUE_URL), client

    def test_it_goes_on_while_calls_come_back_full(self, world: World) -> None:
        for number in range(25):
            world.cloud.enqueue(str(number))
        queue, client = self.queue(world)
        messages = queue.receive()
        assert sorted(int(message.body) for message in messages) == list(range(25))
        assert len(client.calls) == 3
        queue.delete(messages)
        assert (world.left(), len(client.calls)) == (0, 6)

    def test_there_is_an_end_to_it(self, world: World) -> None:
        for _ in range(250):
            world.cloud.enqueue("x")
        queue, client = self.queue(world)
        assert len(queue.receive(calls=4)) == 40
        assert len(client.calls) == 4

    def test_what_was_received_is_handled_though_the_next_call_fails(self, world: World) -> None:
        for _ in range(15):
            world.cloud.enqueue("x")
        queue, client = self.queue(world)
        receive = client.receive_message

        def throttled(**parameters: Any) -> Any:
            if client.calls:
                raise client_error("RequestThrottled", "slow down", "ReceiveMessage", status=503)
            return receive(**parameters)

        client.receive_message = throttled
        assert len(queue.receive()) == 10

    def test_only_the_first_call_waits(self, world: World) -> None:
        for _ in range(15):
            world.cloud.enqueue("x")
        queue, client = self.queue(world)
        queue.receive(wait_s=300)
        assert [call["WaitTimeSeconds"] for _, call in client.calls] == [20, 0]


class TestEnvironments:
    def test_a_run_is_reached_with_the_keys_that_its_storage_accepts(self, world: World) -> None:
        tried: list[str] = []

        def open_it(url: str, environment: Mapping[str, str]) -> Storage:
            tried.append(environment["AWS_ACCESS_KEY_ID"])
            if environment["AWS_ACCESS_KEY_ID"] != "right":
                return Denying(url, "")  # type: ignore[abstract]
            return open_storage(url)

        instance = world.launch()
        for key in ("right", "wrong"):
            watcher = world.watcher(open_storage=open_it, environment={"AWS_ACCESS_KEY_ID": key})
        world.cloud.enqueue(warning(instance.instance_id))
        watcher.refresh()
        assert tried == ["wrong", "right"]
        assert (len(world.notices()), world.left()) == (1, 0)

    def test_one_that_no_keys_reach_is_left(self, world: World) -> None:
        instance = world.launch()
        watcher = world.watcher(open_storage=lambda url, _: Denying(url, ""))  # type: ignore[abstract]
        world.cloud.enqueue(warning(instance.instance_id))
        watcher.refresh()
        assert (len(world.notices()), world.left()) == (0, 1)


class Denying(Storage):
    """Refuses whoever asks."""

    def _at(self, url: str, root: str) -> Storage:
        return Denying(url, root)  # type: ignore[abstract]

    def _list(self, full: str) -> Any:
        raise StorageDenied("no")


Denying.__abstractmethods__ = frozenset()


class TestHurry:
    """With a thread that listens, as in production."""

    def listen(self, world: World, aws: Any, queue_url: str, **settings: Any) -> Watcher:
        watcher = Watcher.of(aws, queue_url, open_storage=world.open_storage, **settings)
        watcher.refresh()  # a process that looks once does not listen
        _, listener = watcher._queues[queue_url]
        assert not listener.is_listening
        watcher.refresh()
        assert listener.is_listening
        return watcher

    def test_a_controller_that_waits_is_woken_by_the_event(self, world: World) -> None:
        aws: Any = FakeAws(world.cloud)
        instance = world.launch()
        self.listen(world, aws, QUEUE_URL, clock=world.cloud.clock)
        bell = Bell("r")
        world.cloud.enqueue(warning(instance.instance_id))
        wait_until(bell._rung.is_set)  # only the listener rings: there is no look but its own
        assert len(world.notices()) == 1

    def test_a_run_that_nobody_here_waits_for_is_attended_to(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attended: list[str] = []
        monkeypatch.setattr(
            "spotfirst_airflow.fleets.ec2.watching._attend",
            lambda run, environment: attended.append(run.run_id),
        )
        aws: Any = FakeAws(world.cloud)
        waited, unattended = world.launch("waited", token="a"), world.launch("alone", token="b")
        self.listen(world, aws, QUEUE_URL, clock=world.cloud.clock)
        bell = Bell("waited")
        for instance in (waited, unattended):
            world.cloud.enqueue(warning(instance.instance_id))
        wait_until(lambda: attended and not world.left())
        assert attended == ["alone"]
        assert bell._rung.is_set()

    def test_of_three_hundred_notices_at_once_none_is_lost(self, world: World) -> None:
        aws: Any = FakeAws(world.cloud)
        instances = [world.launch(f"r{number}", token=f"t{number}") for number in range(300)]
        bells = [Bell(f"r{number}") for number in range(300)]
        self.listen(world, aws, QUEUE_URL, clock=world.cloud.clock)
        for instance in instances:
            world.cloud.enqueue(warning(instance.instance_id))
        wait_until(lambda: not world.left())
        assert all(len(world.notices(f"r{number}")) == 1 for number in range(300))
        assert all(bell._rung.is_set() for bell in bells)

    def test_it_stops_listening_once_nobody_looks_any_more(self, world: World) -> None:
        aws: Any = FakeAws(world.cloud)
        watcher = self.listen(world, aws, QUEUE_URL)
        _, listener = watcher._queues[QUEUE_URL]
        listener._idle_s = 0.0
        wait_until(lambda: not listener.is_listening)
        listener._idle_s = 60.0
        watcher.find(["t"])
        assert listener.is_listening

    def test_a_queue_that_fails_is_tried_again(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        aws: Any = FakeAws(world.cloud)
        sqs, aws._clients["sqs"] = aws._clients["sqs"], Away()
        instance = world.launch()
        self.listen(world, aws, QUEUE_URL, clock=world.cloud.clock)
        wait_until(lambda: "trying again in 2 s" in caplog.text)
        aws._clients["sqs"] = sqs
        world.cloud.enqueue(warning(instance.instance_id))
        wait_until(world.notices)


class TestOnTheWire:
    """boto3 against moto's EC2 and SQS."""

    def test_a_message_in_sqs_wakes_whoever_waits_within_a_second(self, world: World) -> None:
        with moto_aws() as aws:
            self.check(world, aws)
            Watcher.forget_all()

    def check(self, world: World, aws: Aws) -> None:
        sqs = aws.client("sqs")
        url = sqs.create_queue(QueueName="spotfirst")["QueueUrl"]
        tags = world.launch().tags
        answer = aws.client("ec2").run_instances(
            ImageId="ami-12c6146b", MinCount=1, MaxCount=1, InstanceType="g6.xlarge",
            TagSpecifications=[{
                "ResourceType": "instance",
                "Tags": [{"Key": key, "Value": value} for key, value in tags.items()],
            }],
        )  # fmt: skip
        instance_id = answer["Instances"][0]["InstanceId"]
        TestHurry().listen(world, aws, url)
        bell = Bell("r")
        at = datetime.now(timezone.utc)
        sqs.send_message(QueueUrl=url, MessageBody=warning(instance_id, at=at.isoformat()))
        wait_until(bell._rung.is_set)
        (noticed,) = world.notices()
        assert noticed.notice.time == at + timedelta(seconds=120)
        wait_until(lambda: self.visible(sqs, url) == (0, 0))

    def test_what_eventbridge_sends_to_the_queue_is_understood(self) -> None:
        detail = {"instance-id": "i-0b662ef9931388ba0", "instance-action": "terminate"}
        with moto_aws() as aws:
            sqs, events = aws.client("sqs"), aws.client("events")
            url = sqs.create_queue(QueueName="spotfirst")["QueueUrl"]
            arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
            pattern = json.dumps({"source": ["aws.ec2"], "detail-type": [WARNING]})
            events.put_rule(Name="spotfirst", EventPattern=pattern)
            target = {"Id": "queue", "Arn": arn["Attributes"]["QueueArn"]}
            events.put_targets(Rule="spotfirst", Targets=[target])
            events.put_events(
                Entries=[
                    {"Source": "aws.ec2", "DetailType": kind, "Detail": json.dumps(detail)}
                    for kind in ("EC2 Spot Instance Request Fulfillment", WARNING)
                ]
            )
            queue = NoticeQueue(lambda: sqs, url)
            (message,) = queue.receive(wait_s=1)
            queue.delete([message])
            assert queue.receive() == []
        (event,) = parse(message.body)
        assert (event.kind, event.instance_id) == ("interruption", detail["instance-id"])
        assert abs(datetime.now(timezone.utc) - event.at) < timedelta(minutes=1)

    def visible(self, sqs: Any, url: str) -> tuple[int, int]:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
        return int(found[names[0]]), int(found[names[1]])
