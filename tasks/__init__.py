"""Prefect tasks, a few lines each around `fedlora` and `mlflow_tracking`, and what Prefect's pages show of them."""
