"""Prefect flows: a federated run, a sweep of them, a report on runs."""
