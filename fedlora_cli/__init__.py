"""What a person types."""

from fedlora_cli.main import main

__all__ = ["main"]
