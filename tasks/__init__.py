"""Prefect tasks: a few lines each around `fedlora` and `mlflow_tracking`; paths and small numbers in and out."""
