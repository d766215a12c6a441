"""What processes of their own do in tests; the fork server of workers (`fedlora.training.forerunner`) finds it here."""

from pathlib import Path

import torch

from fedlora.config import RunConfig
from fedlora.run.loop import train


def train_alone(config: RunConfig, folder: Path) -> None:
    """Train as the tests' own processes do."""
    torch.set_num_threads(1)
    train(config, folder)
