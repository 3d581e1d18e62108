"""What runs beside Airflow: the controller, fleets, policies, costs and operators."""
