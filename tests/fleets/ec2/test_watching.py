"""One answer of EC2's serves all runs of a process, and no hiccup of it ends an instance."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from botocore.exceptions import ClientError

from spotfirst.errors import FleetUnavailable
from spotfirst.market import Notice
from spotfirst_airflow.fleets.base import InstanceState
from spotfirst_airflow.fleets.ec2.aws import Aws
from spotfirst_airflow.fleets.ec2.instances import TOKEN_TAG, instance_of
from spotfirst_airflow.fleets.ec2.watching import Watcher
from tests.fakes.clients import FakeAws
from tests.fakes.cloud import Cloud, CloudInstance, Weather
from tests.fakes.faults import client_error
from tests.fleets.ec2.wire import moto_aws

POOL = ("g6.xlarge", "us-east-1a")


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    Watcher.forget_all()
    yield
    Watcher.forget_all()


def launch(cloud: Cloud, token: str) -> CloudInstance:
    instance = cloud.launch(POOL, spot=True)
    instance.tags = {TOKEN_TAG: token, "spotfirst:run": "r"}
    return instance


def watch(cloud: Cloud, **settings: Any) -> Watcher:
    aws: Any = FakeAws(cloud)
    clock = cloud.clock
    return Watcher(aws, clock=clock, monotonic=clock.monotonic, background=False, **settings)


def polls(cloud: Cloud) -> int:
    return cloud.calls["DescribeInstances"]


def state(watcher: Watcher, token: str) -> str:
    return watcher.find([token])[token].state


class Broken:
    """A client of EC2's whose answers to some calls are errors, by their number from 1 on."""

    def __init__(self, client: Any, errors: dict[int, Exception]) -> None:
        self.client, self.errors, self.calls = client, errors, 0

    def describe_instances(self, **parameters: Any) -> Any:
        self.calls += 1
        if self.calls in self.errors:
            raise self.errors[self.calls]
        return self.client.describe_instances(**parameters)


def broken(watcher: Watcher, errors: dict[int, Exception]) -> Broken:
    aws: Any = watcher._aws
    aws._clients["ec2"] = made = Broken(aws._clients["ec2"], errors)
    return made


class TestPolls:
    def test_1200_instances_of_300_runs_are_three_calls_per_poll(self) -> None:
        cloud = Cloud()
        for run in range(300):
            for attempt in range(4):
                launch(cloud, f"{run}-{attempt}")
        watcher = watch(cloud)

        def ask_for_all() -> int:
            runs = [[f"{run}-{attempt}" for attempt in range(4)] for run in range(300)]
            return sum(len(watcher.find(tokens)) for tokens in runs)

        assert ask_for_all() == 1200
        assert polls(cloud) == 3
        cloud.clock.step(5)
        assert ask_for_all() == 1200
        assert polls(cloud) == 3
        cloud.clock.step(1)
        assert ask_for_all() == 1200
        assert polls(cloud) == 6

    def test_those_who_ask_at_the_same_time_share_one_poll(self) -> None:
        cloud = Cloud()
        launch(cloud, "t")
        watcher, everyone = watch(cloud), threading.Barrier(32)
        client = broken(watcher, {})
        answer = client.client.describe_instances

        def answer_slowly(**parameters: Any) -> Any:
            time.sleep(0.1)  # the others come meanwhile
            return answer(**parameters)

        client.client.describe_instances = answer_slowly

        def ask() -> int:
            everyone.wait()
            return len(watcher.find(["t"]))

        with ThreadPoolExecutor(32) as threads:
            assert sum(threads.map(lambda _: ask(), range(32))) == 32
        assert polls(cloud) == 1

    def test_an_answer_that_expired_is_asked_anew(self) -> None:
        cloud = Cloud()
        instance = launch(cloud, "t")
        watcher = watch(cloud)
        cloud.tick(60)
        assert state(watcher, "t") == "running"
        instance.end("user")
        assert state(watcher, "t") == "running"
        watcher.expire()
        assert state(watcher, "t") == "shutting-down"

    def test_what_expires_while_ec2_answers_is_asked_anew(self) -> None:
        cloud = Cloud()
        launch(cloud, "t")
        watcher = watch(cloud)
        client = broken(watcher, {})
        inner = client.client.describe_instances

        def change_meanwhile(**parameters: Any) -> Any:
            answer = inner(**parameters)
            client.client.describe_instances = inner
            watcher.expire()
            return answer

        client.client.describe_instances = change_meanwhile
        watcher.find(["t"])
        watcher.find(["t"])
        assert polls(cloud) == 2

    def test_a_token_that_was_never_seen_is_left_out(self) -> None:
        assert watch(Cloud()).find(["t"]) == {}

    def test_instances_without_a_token_are_none_of_ours(self) -> None:
        cloud = Cloud()
        launch(cloud, "t").tags.pop(TOKEN_TAG)
        assert watch(cloud).owned() == []


class TestFailures:
    def test_a_page_that_fails_changes_nothing(self) -> None:
        cloud = Cloud()
        instances = [launch(cloud, str(number)) for number in range(600)]
        watcher = watch(cloud)
        cloud.tick(60)
        watcher.refresh()
        for instance in instances:
            instance.end("aws")
        cloud.tick(60)
        broken(watcher, {2: client_error("RequestLimitExceeded", "", "DescribeInstances")})
        with pytest.raises(FleetUnavailable, match="RequestLimitExceeded"):
            watcher.find(["0"])
        known = {seen.state for seen in watcher._memory}
        assert known == {"running"}
        cloud.clock.step(1)
        assert state(watcher, "0") == "terminated"

    def test_a_refusal_says_nothing_either(self) -> None:
        watcher = watch(Cloud())
        broken(watcher, {1: client_error("UnauthorizedOperation", "", "DescribeInstances")})
        with pytest.raises(FleetUnavailable, match="UnauthorizedOperation"):
            watcher.find(["t"])

    def test_an_outage_is_met_by_one_call_a_second_however_many_ask(self) -> None:
        cloud = Cloud()
        watcher = watch(cloud)
        unavailable = client_error("Unavailable", "", "DescribeInstances")
        client = broken(watcher, dict.fromkeys(range(1, 100), unavailable))
        for _ in range(3):
            for _ in range(100):
                with pytest.raises(FleetUnavailable):
                    watcher.find(["t"])
            cloud.clock.step(1)
        assert client.calls == 3

    def test_a_failure_while_missing_ids_are_asked_for_changes_nothing(self) -> None:
        cloud = Cloud(weather=Weather(flicker_share=1))
        watcher = watch(cloud)
        launch(cloud, "t")
        watcher.saw({"InstanceId": "i-0000000000000001", "State": {"Name": "running"}}, token="u")
        cloud.clock.step(60)
        broken(watcher, {2: client_error("InternalError", "", "DescribeInstances")})
        with pytest.raises(FleetUnavailable):
            watcher.find(["u"])
        assert watcher._memory["i-0000000000000001"].state == "running"


class TestMissing:
    def test_an_instance_that_an_answer_lacks_keeps_its_state(self) -> None:
        cloud = Cloud()
        launch(cloud, "t")
        watcher = watch(cloud)
        cloud.tick(60)
        assert state(watcher, "t") == "running"
        cloud.weather.flicker_share = 1  # EC2 describes it by its id, and lists it no more
        for _ in range(200):
            cloud.clock.step(6)
            assert state(watcher, "t") == "running"

    def test_it_is_asked_for_by_its_id_every_half_minute(self) -> None:
        cloud = Cloud()
        launch(cloud, "t")
        watcher = watch(cloud)
        watcher.refresh()
        cloud.weather.flicker_share = 1
        before = polls(cloud)
        for _ in range(10):
            cloud.clock.step(6)
            watcher.find(["t"])
        assert polls(cloud) - before == 10 + 2

    def test_a_launched_instance_is_known_before_ec2_describes_it(self) -> None:
        cloud = Cloud()
        instance = launch(cloud, "t")
        instance.visible_at = cloud.clock.now + timedelta(seconds=200)
        watcher = watch(cloud)
        watcher.saw({"InstanceId": instance.instance_id, "State": {"Name": "pending"}}, token="t")
        for _ in range(33):
            assert state(watcher, "t") == "pending"
            cloud.clock.step(6)
        instance.tagged_at = instance.visible_at  # the fake's clock has passed both
        cloud.clock.step(6)
        assert state(watcher, "t") == "running"

    def test_a_launch_says_less_than_a_description_and_takes_nothing_from_it(self) -> None:
        cloud = Cloud()
        instance = launch(cloud, "t")
        watcher = watch(cloud)
        cloud.tick(60)
        watcher.refresh()
        watcher.saw({"InstanceId": instance.instance_id, "State": {"Name": "pending"}}, token="t")
        assert state(watcher, "t") == "running"

    def test_one_that_lost_its_tags_is_found_to_have_ended_by_its_id(self) -> None:
        cloud = Cloud()
        instance = launch(cloud, "t")
        watcher = watch(cloud)
        cloud.tick(60)
        watcher.refresh()
        instance.end("aws")
        cloud.tick(60)
        instance.tags = {}  # as AWS takes them away, while nobody looked
        seen = watcher.find(["t"])["t"]
        assert seen.is_terminated
        assert seen.tags["spotfirst:run"] == "r"
        assert seen.described["StateReason"]["Code"] == "Server.SpotInstanceTermination"

    def test_one_that_ec2_denies_for_five_minutes_is_gone(self) -> None:
        cloud = Cloud()
        instance = launch(cloud, "t")
        watcher = watch(cloud)
        cloud.tick(60)
        watcher.refresh()
        del cloud.instances[instance.instance_id]
        since = cloud.clock.now + timedelta(seconds=6)
        while cloud.clock.now < since + timedelta(seconds=290):
            cloud.clock.step(6)
            assert state(watcher, "t") == "running"
        cloud.clock.step(40)
        seen = watcher.find(["t"])["t"]
        assert seen.is_terminated
        assert seen.described["StateReason"]["Code"] == "Spotfirst.NotFound"
        instance_ = instance_of(seen.described, price=lambda *_: (Decimal(1), "a test", Decimal(2)))
        assert instance_.state is InstanceState.TERMINATED
        assert instance_.ended_by == "unknown"
        assert "forgotten" in instance_.ended_why

    def test_the_five_minutes_begin_anew_when_it_is_seen_in_between(self) -> None:
        cloud = Cloud()
        instance = launch(cloud, "t")
        watcher = watch(cloud)
        watcher.refresh()
        for _ in range(3):
            del cloud.instances[instance.instance_id]
            for _ in range(40):
                cloud.clock.step(6)
                watcher.find(["t"])
            cloud.instances[instance.instance_id] = instance
            cloud.clock.step(6)
            assert state(watcher, "t") == "running"

    def test_one_unknown_id_does_not_hide_what_ec2_says_of_the_others(self) -> None:
        cloud = Cloud()
        first, second = launch(cloud, "t"), launch(cloud, "u")
        watcher = watch(cloud)
        cloud.tick(60)
        watcher.refresh()
        second.end("aws")
        cloud.tick(60)
        second.tags = {}
        del cloud.instances[first.instance_id]
        assert state(watcher, "u") == "terminated"
        assert state(watcher, "t") == "running"

    def test_many_unknown_ids_are_one_call_and_one_for_the_rest(self) -> None:
        cloud = Cloud()
        instances = [launch(cloud, str(number)) for number in range(40)]
        watcher = watch(cloud)
        cloud.tick(60)
        watcher.refresh()
        for instance in instances[:-1]:
            del cloud.instances[instance.instance_id]
        instances[-1].tags = {}
        cloud.clock.step(6)
        before = polls(cloud)
        assert state(watcher, "0") == "running"
        assert polls(cloud) - before == 1 + 2
        cloud.clock.step(300)
        states = {state(watcher, str(number)) for number in range(39)}
        assert (states, state(watcher, "39")) == ({"terminated"}, "running")

    def test_there_is_an_end_to_asking_when_errors_name_one_id_each(self) -> None:
        cloud = Cloud()
        watcher = watch(cloud)
        for number in range(40):
            watcher.saw({"InstanceId": f"i-{number:017x}"}, token=str(number))
        aws: Any = watcher._aws
        aws._clients["ec2"] = Tacit(aws._clients["ec2"], names=1)
        cloud.clock.step(31)
        assert state(watcher, "0") == "pending"
        assert polls(cloud) == 1 + 20

    def test_ids_are_told_apart_also_when_the_error_names_none(self) -> None:
        cloud = Cloud()
        instances = [launch(cloud, str(number)) for number in range(9)]
        watcher = watch(cloud)
        cloud.tick(60)
        watcher.refresh()
        for instance in instances:
            instance.end("aws")
        cloud.tick(60)
        for instance in instances:
            instance.tags = {}
        del cloud.instances[instances[4].instance_id]
        aws: Any = watcher._aws
        aws._clients["ec2"] = Tacit(aws._clients["ec2"])
        states = [state(watcher, str(number)) for number in range(9)]
        assert states == ["running" if n == 4 else "terminated" for n in range(9)]


class Tacit:
    """Names so many of the ids that it does not know."""

    def __init__(self, client: Any, *, names: int = 0) -> None:
        self.client, self.names = client, names

    def describe_instances(self, **parameters: Any) -> Any:
        try:
            return self.client.describe_instances(**parameters)
        except ClientError as error:
            code, message = error.response["Error"]["Code"], error.response["Error"]["Message"]
            named = re.findall("i-[0-9a-f]+", message)[: self.names]
            message = f"Some ids do not exist: {named}"
            raise client_error(code, message, "DescribeInstances") from None


class TestEnds:
    def test_an_end_is_remembered_after_ec2_forgot_it(self) -> None:
        cloud = Cloud()
        instance = launch(cloud, "t")
        watcher = watch(cloud)
        cloud.tick(60)
        watcher.refresh()
        instance.end("itself")
        cloud.tick(60)
        assert state(watcher, "t") == "terminated"
        del cloud.instances[instance.instance_id]
        for _ in range(10):
            cloud.clock.step(3600)
            assert state(watcher, "t") == "terminated"
        assert watcher.owned() == []

    def test_it_is_forgotten_once_nobody_has_asked_for_a_day(self) -> None:
        cloud = Cloud()
        instance = launch(cloud, "t")
        watcher = watch(cloud)
        instance.end("itself")
        cloud.tick(60)
        assert state(watcher, "t") == "terminated"
        del cloud.instances[instance.instance_id]
        cloud.clock.step(25 * 3600)
        watcher.refresh()
        assert watcher.find(["t"]) == {}

    def test_it_is_for_ever_whatever_an_old_answer_says(self) -> None:
        cloud = Cloud()
        instance = launch(cloud, "t")
        watcher = watch(cloud)
        cloud.tick(60)
        instance.end("aws")
        cloud.tick(60)
        assert state(watcher, "t") == "terminated"
        instance.ends_at = instance.gone_at = None
        cloud.clock.step(6)
        assert state(watcher, "t") == "terminated"

    def test_a_process_that_comes_anew_learns_of_ends_in_the_meantime(self) -> None:
        cloud = Cloud()
        instance = launch(cloud, "t")
        cloud.tick(60)
        instance.end("aws")
        cloud.tick(60)
        seen = watch(cloud).find(["t"])["t"]
        assert seen.described["StateReason"]["Code"] == "Server.SpotInstanceTermination"


class TestTwins:
    def test_of_two_instances_with_one_token_the_living_one_is_told_and_both_are_known(
        self,
    ) -> None:
        cloud = Cloud()
        first = launch(cloud, "t")
        cloud.tick(5)
        second = launch(cloud, "t")
        watcher = watch(cloud)
        assert watcher.find(["t"])["t"].instance_id == first.instance_id
        first.end("user")
        cloud.tick(60)
        assert watcher.find(["t"])["t"].instance_id == second.instance_id
        assert len(watcher.find_all(["t"])["t"]) == 2


class TestNews:
    def test_an_interruption_replaces_a_recommendation_and_nothing_else_does(self) -> None:
        cloud = Cloud()
        instance = launch(cloud, "t")
        watcher = watch(cloud)
        at = datetime(2026, 1, 1, tzinfo=timezone.utc)
        early = Notice(kind="rebalance", seen_at=at)
        late = Notice(kind="interruption", seen_at=at, time=at + timedelta(seconds=120))
        for notice, expected in ((early, early), (late, late), (early, late)):
            watcher.noticed(instance.instance_id, notice)
            assert watcher.find(["t"])["t"].notice == expected


class TestSharing:
    def test_all_fleets_of_one_identity_share_one(self) -> None:
        aws: Any = FakeAws(Cloud())
        other: Any = FakeAws(Cloud(), process="other")
        assert Watcher.of(aws) is Watcher.of(aws)
        assert Watcher.of(aws) is not Watcher.of(other)


class TestOnTheWire:
    """moto's EC2: it does not page as EC2 does, but checks what boto3 sends."""

    def test_instances_are_found_by_token_and_missing_ones_by_id(self) -> None:
        with moto_aws() as aws:
            self.check(aws)

    def check(self, aws: Aws) -> None:
        ec2 = aws.client("ec2")

        def run(token: str) -> str:
            answer = ec2.run_instances(
                ImageId="ami-12c6146b", MinCount=1, MaxCount=1, InstanceType="g6.xlarge",
                TagSpecifications=[{
                    "ResourceType": "instance", "Tags": [{"Key": TOKEN_TAG, "Value": token}],
                }],
            )  # fmt: skip
            return str(answer["Instances"][0]["InstanceId"])

        first, second = run("t"), run("u")
        seconds = [0.0]
        watcher = Watcher(aws, monotonic=lambda: seconds[0], background=False)
        assert {t: s.state for t, s in watcher.find(["t", "u", "v"]).items()} == {
            "t": "running", "u": "running",
        }  # fmt: skip
        ec2.delete_tags(Resources=[first], Tags=[{"Key": TOKEN_TAG}])
        ec2.terminate_instances(InstanceIds=[first])
        watcher.saw({"InstanceId": "i-0ffffffffffffffff"}, token="v")
        seconds[0] += 31
        found = watcher.find(["t", "u", "v"])
        assert {token: seen.state for token, seen in found.items()} == {
            "t": "terminated", "u": "running", "v": "pending",
        }  # fmt: skip
        assert watcher.ask_tags([second, "i-0ffffffffffffffff"]) == {second: {TOKEN_TAG: "u"}}
