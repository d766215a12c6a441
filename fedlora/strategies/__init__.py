"""Aggregation strategies: one file a method, one registry entry. See `fedlora.strategies.base` for the contract."""
