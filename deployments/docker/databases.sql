-- Runs once, when the data folder is new. Prefect's database is POSTGRES_DB; MLflow cannot share it.
CREATE DATABASE fedlora_mlflow;
