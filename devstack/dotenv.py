"""Generate the secrets that docker-compose.yml asks for.

`python3 -m devstack.dotenv > .env`, once per deployment: a new Fernet key cannot read what an older
one encrypted.
"""

from __future__ import annotations

import base64
import os
import secrets


def generate() -> dict[str, str]:
    """Return fresh secrets, safe in URLs and in a .env file without quotes."""
    return {
        "POSTGRES_PASSWORD": secrets.token_hex(24),
        "REDIS_PASSWORD": secrets.token_hex(24),
        "AIRFLOW_FERNET_KEY": base64.urlsafe_b64encode(os.urandom(32)).decode(),
        "AIRFLOW_API_SECRET_KEY": secrets.token_hex(32),
        "AIRFLOW_JWT_SECRET": secrets.token_hex(64),
        "SPOTFIRST_CONTROL_KEY": secrets.token_hex(32),
        # Of the s3 service. Real AWS credentials go here when S3_ENDPOINT_URL is empty.
        "AWS_ACCESS_KEY_ID": f"AK{secrets.token_hex(9).upper()}",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(24),
    }


if __name__ == "__main__":
    for name, value in generate().items():
        print(f"{name}={value}")
