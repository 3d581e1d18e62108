"""Pages for runs and their cost inside the Airflow UI."""
