"""The launch template: what all instances of a run have in common.

Its name is a hash of its content. So whoever finds that a template of this name is there knows
what is in it, nobody ever changes one, and one that was deleted is made again as it was.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from spotfirst.errors import FleetUnavailable, LaunchRejected
from spotfirst.wire import Record
from spotfirst_airflow.fleets.base import RUN_TAG, STORAGE_TAG, LaunchRequest
from spotfirst_airflow.fleets.ec2.account import Account, Image, pages
from spotfirst_airflow.fleets.ec2.aws import Aws, call, code_of
from spotfirst_airflow.fleets.ec2.instances import tag_list, tags_of
from spotfirst_airflow.fleets.ec2.options import Ec2Options

__all__ = ["Template", "ensure", "run_tags", "template_of", "tidy"]

LONGEST_TAG = 256
"""EC2's limit for the value of a tag, in characters."""
_PREFIX = "spotfirst-"


class Template(Record):
    """A launch template: ``data`` as EC2 takes it. ``tags`` are the template's own."""

    name: str
    data: dict[str, Any]
    tags: dict[str, str]


def run_tags(request: LaunchRequest) -> dict[str, str]:
    """The tags of everything that serves the run. Raises :class:`LaunchRejected`."""
    tags = request.tags | {RUN_TAG: request.run_id, STORAGE_TAG: request.storage_url}
    for name, value in tags.items():
        if len(value) > LONGEST_TAG:
            msg = (
                f"run {request.run_id}: {name} has {len(value)} characters, and a tag of EC2's at "
                f"most {LONGEST_TAG}: shorten it"
            )
            raise LaunchRejected(msg)
    return tags


def template_of(
    options: Ec2Options, request: LaunchRequest, *, image: Image, user_data: str
) -> Template:
    """The template of a run. The same for all of its attempts. Raises :class:`LaunchRejected`."""
    tags = run_tags(request)
    disk: dict[str, Any] = {
        # A disk cannot be smaller than the image's own.
        "VolumeSize": max(options.volume_gb, image.root_gb),
        "VolumeType": options.volume_type,
        "Encrypted": True,
        "DeleteOnTermination": True,
    }
    if options.kms_key:
        disk["KmsKeyId"] = options.kms_key
    data: dict[str, Any] = {
        "ImageId": image.image_id,
        "IamInstanceProfile": {"Name": options.instance_profile},
        "UserData": base64.b64encode(user_data.encode()).decode(),
        "BlockDeviceMappings": [{"DeviceName": image.root_device, "Ebs": disk}],
        "MetadataOptions": {
            "HttpEndpoint": "enabled",
            "HttpTokens": "required",
            # Through the bridge of a container it is one hop more.
            "HttpPutResponseHopLimit": 2 if options.image else 1,
            "InstanceMetadataTags": "enabled",
        },
        # The default would stop it, and its disk would cost for ever.
        "InstanceInitiatedShutdownBehavior": "terminate",
        "TagSpecifications": [{"ResourceType": "volume", "Tags": tag_list(tags)}],
    }
    if options.security_groups:
        data["SecurityGroupIds"] = list(options.security_groups)
    content = json.dumps([data, tags], sort_keys=True, ensure_ascii=True).encode()
    return Template(name=_PREFIX + hashlib.sha256(content).hexdigest()[:40], data=data, tags=tags)


def ensure(aws: Aws, template: Template, *, again: bool = False) -> None:
    """Make the template, unless it is there. One call at most, and none if this process knows.

    ``again``: EC2 has just said that it is not there. Raises as :func:`call`.
    """
    known = Account.of(aws).templates
    if template.name in known and not again:
        return
    try:
        call(
            aws.client("ec2").create_launch_template,
            LaunchTemplateName=template.name,
            LaunchTemplateData=template.data,
            TagSpecifications=[
                {"ResourceType": "launch-template", "Tags": tag_list(template.tags)}
            ],
        )
    except LaunchRejected as error:
        if "AlreadyExists" not in code_of(error):
            raise
        if again:
            msg = f"EC2 does not agree with itself on whether {template.name} is there"
            raise FleetUnavailable(msg) from error
    known.add(template.name)


def tidy(aws: Aws, is_over: Callable[[Mapping[str, str]], bool]) -> int:
    """Delete the templates of runs that are over; how many. An account may have 5,000 of them.

    Needed again, a template is made again. Raises as :func:`call`.
    """
    ec2, deleted = aws.client("ec2"), 0
    found = [
        template
        for answer in pages(
            ec2.describe_launch_templates,
            Filters=[{"Name": "tag-key", "Values": [RUN_TAG]}],
            MaxResults=200,
        )
        for template in answer["LaunchTemplates"]
    ]
    for template in found:
        name = template["LaunchTemplateName"]
        if not name.startswith(_PREFIX) or not is_over(tags_of(template)):
            continue
        Account.of(aws).templates.discard(name)
        try:
            call(ec2.delete_launch_template, LaunchTemplateName=name)
        except LaunchRejected as error:
            if "NotFound" not in code_of(error):
                raise
        else:
            deleted += 1
    return deleted
