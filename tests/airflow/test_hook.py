"""The connection: what is taken from it, and what happens without one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from airflow._shared.secrets_masker import should_hide_value_for_key
from airflow.sdk.exceptions import AirflowNotFoundException

from spotfirst.errors import InvalidSpec
from spotfirst.signing import ControlKeys, generate_key
from spotfirst_airflow.hooks import SpotfirstHook
from spotfirst_airflow.provider import get_provider_info


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("AWS_", "AIRFLOW_CONN_", "SPOTFIRST_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    settings = {
        "conn_type": "spotfirst",
        "login": "AKIA",
        "password": "secret",
        "extra": {
            "storage": str(tmp_path), "region": "eu-west-1", "endpoint_url": "http://127.0.0.1:1",
        },
    }  # fmt: skip
    monkeypatch.setenv("AIRFLOW_CONN_OURS", json.dumps(settings))
    return "ours"


def test_environment_of_instances_comes_from_the_connection(connection: str) -> None:
    environment = SpotfirstHook(connection).environment()
    assert environment["AWS_ACCESS_KEY_ID"] == "AKIA"
    assert environment["AWS_SECRET_ACCESS_KEY"] == "secret"
    assert environment["AWS_DEFAULT_REGION"] == "eu-west-1"
    assert environment["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:1"


def test_session_of_another_identity_is_not_mixed_in(
    connection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of somebody else")
    monkeypatch.setenv("AWS_PROFILE", "another")
    environment = SpotfirstHook(connection).environment()
    assert not {"AWS_SESSION_TOKEN", "AWS_PROFILE"} & environment.keys()


def test_without_a_connection_the_process_environment_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("SPOTFIRST_STORAGE", "s3://bucket/runs")
    monkeypatch.setenv("HOME_OF_SECRETS", "x")
    hook = SpotfirstHook(None)
    assert hook.environment() == {"AWS_REGION": "us-east-1"}
    assert hook.default_storage == "s3://bucket/runs"


def test_default_connection_may_be_missing() -> None:
    assert SpotfirstHook.find(SpotfirstHook.default_conn_name).conn_id is None


def test_named_connection_may_not_be_missing() -> None:
    with pytest.raises(AirflowNotFoundException, match="typo"):
        SpotfirstHook.find("typo")


def test_storage_that_nobody_named_is_an_error_that_says_where_to_name_it() -> None:
    with pytest.raises(InvalidSpec, match="SPOTFIRST_STORAGE"):
        SpotfirstHook(None).open_storage()


def test_test_button_writes_to_the_storage(connection: str, tmp_path: Path) -> None:
    works, message = SpotfirstHook(connection).test_connection()
    assert works, message
    assert str(tmp_path) in message


def test_test_button_says_what_is_wrong_without_the_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"conn_type": "spotfirst", "password": "secret", "extra": {"storage": "ftp://x"}}
    monkeypatch.setenv("AIRFLOW_CONN_BROKEN", json.dumps(settings))
    works, message = SpotfirstHook("broken").test_connection()
    assert not works
    assert "ftp://" in message
    assert "secret" not in message


def test_the_control_key_signs_and_reaches_no_instance(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = generate_key()
    extra = {"storage": str(tmp_path), "control_secret": key}
    monkeypatch.setenv("AIRFLOW_CONN_OURS", json.dumps({"conn_type": "spotfirst", "extra": extra}))
    hook = SpotfirstHook("ours")
    keys = hook.open_storage().keys
    assert keys is not None
    assert keys.ids == ControlKeys(key).ids
    assert key not in repr(keys)
    assert key not in json.dumps(hook.environment())


def test_without_a_control_key_the_process_has_one(connection: str) -> None:
    assert SpotfirstHook(connection).open_storage().keys is None


def test_airflow_masks_the_control_key_where_it_shows_a_connection() -> None:
    """By the field's name: its REST API and its logs show the extras of connections otherwise."""
    [kind] = get_provider_info()["connection-types"]
    [field] = [name for name in kind["conn-fields"] if name.startswith("control")]
    assert should_hide_value_for_key(field)
    assert kind["conn-fields"][field]["schema"]["format"] == "password"
