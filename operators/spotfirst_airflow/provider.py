"""What Airflow's provider discovery reads. Imports nothing: every Airflow process calls it."""

from __future__ import annotations

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Return the provider's metadata, in the form of Airflow's provider_info schema."""
    return {
        "package-name": "spotfirst",
        "name": "Spotfirst",
        "description": "Train on spot GPUs as if they were never interrupted.",
    }
