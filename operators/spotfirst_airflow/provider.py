"""What Airflow's provider discovery reads. Imports nothing: every Airflow process calls it."""

from __future__ import annotations

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Return the provider's metadata, in the form of Airflow's provider_info schema."""
    return {
        "package-name": "spotfirst",
        "name": "Spotfirst",
        "description": "Train on spot GPUs as if they were never interrupted.",
        "operators": [
            {
                "integration-name": "Spotfirst",
                "python-modules": ["spotfirst_airflow.operators", "spotfirst_airflow.reaper"],
            }
        ],
        "triggers": [
            {
                "integration-name": "Spotfirst",
                "python-modules": ["spotfirst_airflow.triggers"],
            }
        ],
        "hooks": [
            {
                "integration-name": "Spotfirst",
                "python-modules": ["spotfirst_airflow.hooks"],
            }
        ],
        "task-decorators": [
            {
                "name": "spot_training",
                "class-name": "spotfirst_airflow.decorators.spot_training_task",
            }
        ],
        "connection-types": [
            {
                "connection-type": "spotfirst",
                "hook-name": "Spotfirst",
                "hook-class-name": "spotfirst_airflow.hooks.SpotfirstHook",
                "ui-field-behaviour": {
                    "hidden-fields": ["host", "port", "schema"],
                    "relabeling": {"login": "Access key ID", "password": "Secret access key"},
                    "placeholders": {
                        "login": "empty: the role or environment of Airflow's processes",
                    },
                },
                "conn-fields": {
                    "storage": {
                        "label": "Storage",
                        "description": "URL below which all runs are kept: s3://BUCKET/PREFIX",
                        "schema": {"type": ["string", "null"], "default": None},
                    },
                    "endpoint_url": {
                        "label": "S3 endpoint",
                        "description": "Only for an S3 server that is not AWS",
                        "schema": {"type": ["string", "null"], "default": None},
                    },
                    "region": {
                        "label": "Region",
                        "description": "Region of the bucket and of the instances",
                        "schema": {"type": ["string", "null"], "default": None},
                    },
                    "fleet": {
                        "label": "Fleet",
                        "description": "Where tasks that name no fleet get their instances",
                        "schema": {"type": ["string", "null"], "default": None},
                    },
                    "control_secret": {
                        "label": "Control key",
                        "description": "Signs what controllers decide; needed with several hosts",
                        "schema": {
                            "type": ["string", "null"],
                            "format": "password",
                            "default": None,
                        },
                    },
                },
            }
        ],
    }
