"""What MLflow keeps of a run. Knows fedlora and MLflow, nothing of Prefect."""
