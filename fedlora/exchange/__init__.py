"""Adapters from and for anyone: PEFT folders, `aggregate`, loading, merging."""
