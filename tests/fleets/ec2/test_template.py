"""What all instances of a run have in common, under a name that says what is in it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import pytest

from spotfirst.errors import FleetUnavailable, LaunchRejected
from spotfirst_airflow.fleets.ec2.account import Account, Image
from spotfirst_airflow.fleets.ec2.options import Ec2Options
from spotfirst_airflow.fleets.ec2.template import Template, ensure, template_of, tidy
from tests.fakes.faults import client_error
from tests.fleets.ec2.launches import OPTIONS, World, request

IMAGE = Image(image_id="ami-0a", root_device="/dev/sda1", root_gb=75)


@pytest.fixture
def world() -> World:
    Account.forget_all()
    return World()


def made(
    image: Image = IMAGE, user_data: str = "#!/bin/bash", asked: Any = None, **options: Any
) -> Template:
    return template_of(
        Ec2Options.of(OPTIONS | options), asked or request(), image=image, user_data=user_data
    )


def disk(template: Template) -> dict[str, Any]:
    [mapping] = template.data["BlockDeviceMappings"]
    assert mapping["DeviceName"] == "/dev/sda1"
    return dict(mapping["Ebs"])


# -- content --------------------------------------------------------------------------------------


def test_metadata_needs_a_session_and_stays_on_the_instance() -> None:
    assert made().data["MetadataOptions"] == {
        "HttpEndpoint": "enabled",
        "HttpTokens": "required",
        "HttpPutResponseHopLimit": 1,
        "InstanceMetadataTags": "enabled",
    }


def test_metadata_reaches_into_a_container() -> None:
    options = Ec2Options.of(OPTIONS | {"image": "pytorch/pytorch"})
    template = template_of(options, request(), image=IMAGE, user_data="")
    assert template.data["MetadataOptions"]["HttpPutResponseHopLimit"] == 2


def test_an_instance_that_shuts_down_is_terminated() -> None:
    assert made().data["InstanceInitiatedShutdownBehavior"] == "terminate"


def test_the_disk_is_encrypted_and_goes_with_the_instance() -> None:
    assert disk(made()) == {
        "VolumeSize": 100,
        "VolumeType": "gp3",
        "Encrypted": True,
        "DeleteOnTermination": True,
    }
    assert disk(made(kms_key="alias/training"))["KmsKeyId"] == "alias/training"


def test_the_disk_is_not_smaller_than_the_images() -> None:
    assert disk(made(volume_gb=20))["VolumeSize"] == 75


def test_the_user_data_is_in_base64() -> None:
    data = made(user_data="#!/bin/bash\necho ü").data["UserData"]
    assert base64.b64decode(data).decode() == "#!/bin/bash\necho ü"


def test_volumes_are_attributed_to_the_run() -> None:
    [tagged] = made().data["TagSpecifications"]
    assert tagged["ResourceType"] == "volume"
    assert {tag["Key"]: tag["Value"] for tag in tagged["Tags"]} == {
        "spotfirst:run": "run-1",
        "spotfirst:storage": "memory://bucket",
        "team": "search",
    }


def test_a_value_that_is_too_long_for_a_tag_is_refused() -> None:
    with pytest.raises(LaunchRejected, match="spotfirst:storage has 257 characters"):
        made(asked=request(storage_url="s3://" + 252 * "x"))


# -- name -----------------------------------------------------------------------------------------


def test_the_name_is_the_same_for_all_attempts_of_a_run() -> None:
    assert made().name == made(asked=request("token-2", attempt=2)).name


@pytest.mark.parametrize(
    "change",
    [
        {"image": Image(image_id="ami-0b", root_device="/dev/sda1")},
        {"user_data": "#!/bin/sh"},
        {"asked": request(run_id="run-2")},
        {"asked": request(tags={"team": "ads"})},
        {"instance_profile": "other"},
        {"security_groups": []},
        {"volume_gb": 200},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_name_changes_with_the_content(change: dict[str, Any]) -> None:
    assert made(**change).name != made().name


# -- at EC2 ---------------------------------------------------------------------------------------


def test_it_is_made_once(world: World) -> None:
    aws: Any = world.aws()
    ensure(aws, made())
    ensure(aws, made())
    assert world.calls == {"CreateLaunchTemplate": 1}
    [template] = world.cloud.templates.values()
    assert template["Data"] == made().data


def test_it_may_be_there_already(world: World) -> None:
    one, two = world.aws("a"), world.aws("b")
    for aws in (one, two):
        given: Any = aws
        ensure(given, made())
    assert len(world.cloud.templates) == 1


def test_a_lost_answer_is_asked_for_again(world: World) -> None:
    aws: Any = world.aws()
    world.faults.after(
        "CreateLaunchTemplate", client_error("InternalError", "", "CreateLaunchTemplate")
    )
    with pytest.raises(FleetUnavailable):
        ensure(aws, made())
    ensure(aws, made())
    assert len(world.cloud.templates) == 1


def test_only_templates_of_runs_that_are_over_are_tidied_away(world: World) -> None:
    aws: Any = world.aws()
    for run_id in ("over", "live"):
        ensure(aws, made(asked=request(run_id=run_id)))
    world.cloud.templates["somebody-elses"] = {
        **next(iter(world.cloud.templates.values())), "LaunchTemplateName": "somebody-elses",
    }  # fmt: skip

    def is_over(tags: Mapping[str, str]) -> bool:
        return tags["spotfirst:run"] == "over"

    assert tidy(aws, is_over) == 1
    assert tidy(aws, is_over) == 0
    assert set(world.cloud.templates) == {
        made(asked=request(run_id="live")).name, "somebody-elses",
    }  # fmt: skip


def test_a_template_that_was_tidied_away_is_made_again(world: World) -> None:
    aws: Any = world.aws()
    ensure(aws, made())
    tidy(aws, lambda tags: True)
    ensure(aws, made())
    assert set(world.cloud.templates) == {made().name}
