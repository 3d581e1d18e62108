"""Secrets are recognised by their value and by whole words of their name, and by nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst_airflow import secretlike

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
VALUES = {
    "a URL with a password": "postgres://user:pa55word@host/db",
    "a URL with a password and no user": "redis://:hunter2@cache:6379/0",
    "a password in a longer text": "connect to mongodb+srv://me:pw@cluster.example/db please",
    "AWS": "AKIAIOSFODNN7EXAMPLE",
    "AWS, for a session": "ASIAIOSFODNN7EXAMPLE",
    "GitHub": "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "GitHub, fine-grained": "github_pat_11ABCDEFG0abcdefghijklmnop",
    "GitLab": "glpat-abcdefghij0123456789",
    "Hugging Face": "hf_abcdefghijklmnopqrstuvwxyz",
    "OpenAI": "sk-abcdefghijklmnopqrstuvwxyz0123",
    "OpenAI, of a project": "sk-proj-abcdefghijklmnopqrstuvwx",
    "Anthropic": "sk-ant-api03-abcdefghijklmnopqrstuvwx",
    "Stripe": "sk_live_4eC39HqLyjWDarjtT1zdp7dc",
    "Slack": "xoxb-123456789012-abcdefgh",
    "Slack, a hook": "https://hooks.slack.com/services/T000/B000/XXXX",
    "a JSON web token": JWT,
    "a header": "Authorization: Basic dXNlcjpwYXNz",
    "Bearer": "Bearer abcdefghijkl0123456789",
    "PEM": "-----BEGIN PRIVATE KEY-----\nMIIE",
    "PEM, of RSA": "-----BEGIN RSA PRIVATE KEY-----",
    "PEM, of OpenSSH": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "presigned by AWS": "https://b.s3.amazonaws.com/x?X-Amz-Expires=1&X-Amz-Signature=abc",
    "presigned by Google": "https://storage.googleapis.com/b/x?X-Goog-Signature=abc",
    "presigned by Azure": "https://a.blob.core.windows.net/c/x?sv=1&sig=abc%3D",
}
SECRET_NAMES = [
    "PASSWORD", "DB_PASSWORD", "PGPASSWORD", "PGPASSWD", "MYSQL_PWD", "DB_PASS", "SMTP_PASS",
    "HF_TOKEN", "GITHUB_TOKEN", "TOKEN", "WANDB_API_KEY", "OPENAI_APIKEY", "API-KEY", "apiKey",
    "CLIENT_SECRET", "clientSecret", "SECRET_KEY_BASE", "SSH_PRIVATE_KEY", "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY", "CREDENTIALS", "DB_CREDS", "SSH_PASSPHRASE", "dbPassword",
]  # fmt: skip
HARMLESS = {
    "TOKENIZERS_PARALLELISM": "false",
    "MAX_TOKENS": "512",
    "NUM_TOKENS": "1000",
    "TOKEN_LIMIT": "4096",
    "TOKENIZER": "bpe",
    "PAD_TOKEN": "<pad>",
    "EOS_TOKEN": "</s>",
    "MASK_TOKEN": "[MASK]",
    "IMAGE_TOKEN": "32000",
    "KEYBOARD": "qwerty",
    "MONKEY": "capuchin",
    "SECRETARY": "Ann",
    "PASSAGE_LENGTH": "128",
    "FORWARD_PASS": "2",
    "SORT_KEY": "length",
    "PRIMARY_KEY": "image_id",
    "BEST_METRIC_KEY": "val_loss",
    "PASSWORD_FILE": "/run/secrets/db",
    "DB_PASSWORD": "",
    "HF_TOKEN": "$TOKEN_FROM_THE_IMAGE",
    "GOOGLE_APPLICATION_CREDENTIALS": "/opt/key.json",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token",
    "SECRET_ARN": "arn:aws:secretsmanager:eu-west-1:123456789012:secret:db",
    "USE_TOKEN": "1",
    "PWD": "/home/me",
    "DATA_URL": "https://host:8080/path@v2?size=3",
    "REMOTE": "git@github.com:org/repo.git",
    "GIT_SHA": "0123456789abcdef0123456789abcdef01234567",
    "PUBLIC": "-----BEGIN CERTIFICATE-----",
    "DSN": "postgres://user:${PASSWORD}@host/db",
    "MODEL": "task-sk-learn-2024",
    "IMAGE": "registry:5000/team/train@sha256:0123",
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_secret_is_recognised_by_its_value(value: str) -> None:
    assert secretlike.in_variable("HARMLESS", value)
    assert secretlike.in_command(["python", "train.py", "--logger", value])
    assert secretlike.in_options({"a": [{"b": value}]})[0] == "a[0]['b']"


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_is_recognised_by_a_whole_word_of_its_name(name: str) -> None:
    assert secretlike.in_variable(name, "hunter2")


@pytest.mark.parametrize(("name", "value"), HARMLESS.items(), ids=HARMLESS)
def test_what_only_resembles_a_secret_is_harmless(name: str, value: str) -> None:
    assert secretlike.in_variable(name, value) == ""


@pytest.mark.parametrize(
    "command",
    [
        ["python", "train.py", "--api-key=0123"],
        ["python", "train.py", "--api-key", "0123"],
        ["python", "train.py", "logger.api_key=0123"],
        ["env", "DB_PASSWORD=hunter2", "python", "train.py"],
        ["sh", "-c", "export HF_TOKEN=abc; python train.py"],
        ["sh", "-c", "python train.py --password 'hunter2' | tee log"],
        ["curl", "https://host/x?token=abcdefgh&size=3"],
        ["docker", "run", "-e", "CLIENT_SECRET=abc", "image"],
    ],
)
def test_a_secret_in_a_command_is_found(command: list[str]) -> None:
    assert secretlike.in_command(command)


@pytest.mark.parametrize(
    "command",
    [
        ["python", "train.py", "--max-tokens", "512", "--tokenizer", "bpe"],
        ["python", "train.py", "--eos-token", "</s>", "--pad-token=<pad>"],
        ["python", "train.py", "--token", "$HF_TOKEN"],
        ["python", "train.py", "--placeholder_token", "<cat>", "--initializer_token", "toy"],
        ["python", "train.py", "--use_auth_token", "True", "--hub_token", "None"],
        ["sh", "-c", "docker login --username me --password-stdin registry.example < /run/pw"],
        ["sh", "-c", 'python train.py --api-key "$(cat /run/key)"'],
        ["python", "train.py", "--password-file", "/run/password"],
        ["python", "train.py", "--use-auth-token", "--verbose"],
        ["python", "-c", "token = tokenizer.next(); print(token)"],
        ["torchrun", "--nproc-per-node=8", "train.py", "optimizer.lr=0.1", "key=val_loss"],
    ],
)
def test_a_command_without_a_secret_is_harmless(command: list[str]) -> None:
    assert secretlike.in_command(command) == ""


@pytest.mark.parametrize(
    "text",
    ["a", "a:", "a://", "://a:a:", "sk-", "sk-a-", "eyJ", "bearer ", "--a ", "A=", "=", "hf_"],
)
def test_a_long_text_takes_no_longer_than_to_read_it(text: str) -> None:
    value = text * (1_000_000 // len(text))
    assert isinstance(secretlike.in_variable("X", value), str)
    assert isinstance(secretlike.in_command([value]), str)


@given(st.text(), st.text())
def test_any_text_is_judged_without_an_error(name: str, value: str) -> None:
    assert isinstance(secretlike.in_variable(name, value), str)
    assert isinstance(secretlike.in_command([name, value]), str)


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz0123456789", min_size=3))
def test_a_reason_does_not_repeat_the_secret(value: str) -> None:
    assert f"7{value}7" not in secretlike.in_variable("DB_PASSWORD", f"7{value}7")
