"""Against AWS itself, for what no simulator proves. Costs some cents; runs only when asked to.

    SPOTFIRST_AWS_TEST=1 SPOTFIRST_AWS_STORAGE=s3://BUCKET/PREFIX SPOTFIRST_AWS_OPTIONS='{…}' \\
        pytest tests/fleets/ec2/test_real_aws.py

``SPOTFIRST_AWS_OPTIONS`` are fleet options as JSON (``region``, ``subnets``, ``instance_profile``, …:
the outputs of deploy/aws.yaml), ``SPOTFIRST_AWS_TYPES`` instance types (g4dn.xlarge), and
``SPOTFIRST_AWS_FIS_ROLE`` is the ARN of a role with which AWS FIS may interrupt spot instances.
Should this test not end its instances, they end themselves: their runs do not exist or do not last.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from spotfirst import events as e
from spotfirst.errors import FleetUnavailable, NoCapacity
from spotfirst.market import Market
from spotfirst.run import create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from spotfirst.wire import utc_now
from spotfirst_airflow.controller import Controller, Step
from spotfirst_airflow.fleets import Instance, InstanceState, LaunchRequest
from spotfirst_airflow.fleets.ec2 import Ec2Fleet
from spotfirst_airflow.submission import open_controller, request_stop, storage_environment

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("SPOTFIRST_AWS_TEST") != "1",
        reason="launches instances on AWS, which cost money: set SPOTFIRST_AWS_TEST=1 to do so",
    ),
    pytest.mark.timeout(1800),
]

TYPES = os.environ.get("SPOTFIRST_AWS_TYPES", "g4dn.xlarge").split(",")
FIS_ROLE = os.environ.get("SPOTFIRST_AWS_FIS_ROLE", "")


def make_fleet() -> Ec2Fleet:
    options = json.loads(os.environ["SPOTFIRST_AWS_OPTIONS"])
    return Ec2Fleet(options, environment=storage_environment())


@pytest.fixture
def fleet() -> Iterator[Ec2Fleet]:
    fleet = make_fleet()
    yield fleet
    mine = [i.token for i in fleet.owned() if i.token.startswith("spotfirst-test-")]
    fleet.terminate(mine)


def asked(fleet: Ec2Fleet, market: Market) -> LaunchRequest:
    pools = [offer.pool for offer in fleet.offers(TYPES) if offer.market is market]
    name = uuid.uuid4().hex[:12]
    return LaunchRequest(
        token=f"spotfirst-test-{name}", run_id=f"test-{name}", attempt=1, market=market,
        pool=pools[0], others=tuple(pools[1:]), storage_url=os.environ["SPOTFIRST_AWS_STORAGE"],
        max_life_s=1200.0, tags={"team": "spotfirst-test"},
    )  # fmt: skip


def launched(fleet: Ec2Fleet, request: LaunchRequest) -> Instance:
    try:
        return fleet.launch(request)
    except NoCapacity as error:
        pytest.skip(f"AWS has no capacity now: {error}")


def wait_for(fleet: Ec2Fleet, token: str, holds: Callable[[Instance], bool]) -> Instance:
    ends = time.monotonic() + 600
    while True:
        instance = fleet.describe([token])[token]
        if holds(instance):
            return instance
        assert time.monotonic() < ends, instance
        time.sleep(5)


def is_gone(instance: Instance) -> bool:
    return instance.state is InstanceState.TERMINATED


@pytest.mark.parametrize("market", list(Market), ids=str)
def test_a_token_that_is_launched_twice_at_once_is_one_instance(
    fleet: Ec2Fleet, market: Market
) -> None:
    request = asked(fleet, market)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: launched(make_fleet(), request), range(2))
    assert one.instance_id == two.instance_id
    assert fleet.launch(request).instance_id == one.instance_id
    assert [i.instance_id for i in fleet.owned() if i.token == request.token] == [one.instance_id]
    fleet.terminate([request.token])
    ended = wait_for(fleet, request.token, is_gone)
    assert ended.ended_by == "request"
    assert ended.ended_at is not None
    again = fleet.launch(request)
    assert (again.instance_id, again.state) == (one.instance_id, InstanceState.TERMINATED)


@pytest.mark.skipif(not FIS_ROLE, reason="SPOTFIRST_AWS_FIS_ROLE names no role for AWS FIS")
def test_an_interruption_is_noticed_replaced_and_told(fleet: Ec2Fleet) -> None:
    now = utc_now()
    spec = RunSpec(
        run_id=f"test-{uuid.uuid4().hex[:12]}", created_at=now, command=("sleep", "1200"),
        checkpoint_mode="files", max_life_s=1800.0, tags={"team": "spotfirst-test"}, fleet="ec2",
        fleet_options=Ec2Fleet.settle(json.loads(os.environ["SPOTFIRST_AWS_OPTIONS"]), now=now),
        instance_types=tuple(TYPES), policy="spot_only",
    )  # fmt: skip
    run = create_run(open_storage(os.environ["SPOTFIRST_AWS_STORAGE"]), spec)
    run.journal(by="test").append(e.Created(at=now))
    controller = open_controller(run, environment=storage_environment())
    try:
        step = look_after(controller, lambda step: is_training(step, 1))
        launched = step.state.attempt(1).launched
        assert launched is not None
        interrupt(fleet._aws, launched.instance_id)
        step = look_after(controller, lambda step: step.state.attempt(1).ended is not None)
    finally:
        request_stop(run, reason="the test is over")
        over = look_after(controller, lambda step: step.done)
    first = step.state.attempt(1)
    assert first.notice is not None
    assert first.ended is not None
    assert (first.ended.cause, first.ended.by_fleet) == ("interrupted", True)
    assert len(over.state.attempts) > 1


def is_training(step: Step, attempt: int) -> bool:
    beat = step.heartbeat
    return beat is not None and beat.attempt == attempt and beat.phase == "training"


def look_after(controller: Controller, holds: Callable[[Step], bool]) -> Step:
    """Do what the run needs until this holds."""
    ends = time.monotonic() + 800
    while True:
        try:
            step = controller.step()
        except FleetUnavailable:
            time.sleep(5)
            continue
        if holds(step):
            return step
        assert time.monotonic() < ends, step.state
        time.sleep(step.wait_s)


def interrupt(aws: Any, instance_id: str) -> None:
    """Let AWS's Fault Injection Service take the instance back, with two minutes' notice."""
    account = aws.client("sts").get_caller_identity()["Account"]
    fis = aws.client("fis")
    template = fis.create_experiment_template(
        clientToken=uuid.uuid4().hex,
        description="Spotfirst's test: interrupt one spot instance",
        roleArn=FIS_ROLE,
        stopConditions=[{"source": "none"}],
        targets={
            "instances": {
                "resourceType": "aws:ec2:spot-instance",
                "resourceArns": [f"arn:aws:ec2:{aws.region}:{account}:instance/{instance_id}"],
                "selectionMode": "ALL",
            }
        },
        actions={
            "interrupt": {
                "actionId": "aws:ec2:send-spot-instance-interruptions",
                "parameters": {"durationBeforeInterruption": "PT2M"},
                "targets": {"SpotInstances": "instances"},
            }
        },
    )["experimentTemplate"]["id"]
    try:
        fis.start_experiment(clientToken=uuid.uuid4().hex, experimentTemplateId=template)
    finally:
        fis.delete_experiment_template(id=template)
