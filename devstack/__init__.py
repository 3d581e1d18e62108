"""The servers Spotfirst runs against on one machine: an S3 store and Airflow (not in the wheel)."""
