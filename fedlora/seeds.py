"""Random draws keyed by (seed, purpose, round, client).

No draw depends on the order in which clients happen to run, on how many workers there are, or on what was drawn
before: this is what makes a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Turn:
    """A client that is asked in a round: the key of every random draw in it.

    `attempt` counts how often the round has asked anybody, from 0. Training does not depend on it, faults do.
    """

    seed: int
    round: int
    client: int
    attempt: int = 0

    def __str__(self) -> str:
        return f"client {self.client}, round {self.round}"


def key(seed: int, purpose: str, round_number: int = 0, client: int = 0) -> int:
    """A 63-bit integer that names one stream of random numbers."""
    text = f"{seed}/{purpose}/{round_number}/{client}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def numpy_generator(seed: int, purpose: str, round_number: int = 0, client: int = 0) -> np.random.Generator:
    """A NumPy generator for one purpose; equal keys give equal streams."""
    return np.random.default_rng(key(seed, purpose, round_number, client))


def torch_generator(seed: int, purpose: str, round_number: int = 0, client: int = 0) -> torch.Generator:
    """A CPU torch generator for one purpose; equal keys give equal streams."""
    return torch.Generator().manual_seed(key(seed, purpose, round_number, client))


def seed_torch(
    seed: int, purpose: str, round_number: int = 0, client: int = 0, device: torch.device | None = None
) -> None:
    """Seed torch's global generator of a device (the default one unless said): initialisation and dropout draw from it.

    Its own generator alone is touched: on another, somebody may be training another client at this moment, and
    `torch.manual_seed`, which seeds all, takes a millisecond for those that are not there.
    """
    value = key(seed, purpose, round_number, client)
    device = device or torch.get_default_device()  # a quantised base is loaded, and its head drawn, on its device
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)
    else:
        torch.default_generator.manual_seed(value)
