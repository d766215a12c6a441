"""How many clients this machine trains together fastest: measured once for a kind of work, and kept.

It is kept in `home.cache()/cohort`, under a digest of all that the speed depends on.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch

from fedlora.adapter import EVERY_PART
from fedlora.config import TrainingConfig
from fedlora.data.tokens import Padding
from fedlora.errors import RunFolderError
from fedlora.files import home, limits
from fedlora.files.atomic import write_json
from fedlora.model.resident import ResidentModel
from fedlora.training import client, cohort
from fedlora.training.cohort import Member

GAIN = 1.1
"""What more clients at a time must be worth, against one."""
_MOST = {"cpu": 8}
_MOST_ELSEWHERE = 256
_STEPS = {"cpu": 2}
_STEPS_ELSEWHERE = 5
_REPEATS = 3
_LARGEST = 10_000
"""Bytes of what is kept."""

Rates = Mapping[int, float]
"""Clients a second, by how many are trained at a time."""


def measure(
    model: ResidentModel, members: Sequence[Member], training: TrainingConfig, padding: Padding
) -> dict[int, float]:
    """Steps of clients a second with 1, 2, 4, … of them at a time, until more gain nothing or do not fit into the
    memory of the GPU."""
    kind = model.device.type
    few = training.model_copy(update={"local_steps": _STEPS.get(kind, _STEPS_ELSEWHERE), "local_epochs": None})
    found: dict[int, float] = {}
    for size in (2**power for power in count()):
        if size > _MOST.get(kind, _MOST_ELSEWHERE):
            break
        some = [members[place % len(members)] for place in range(size)]
        seconds = _seconds(lambda some=some: _train(model, some, few, padding), model.device)  # type: ignore[misc]
        if seconds is None:
            break
        found[size] = size * int(few.local_steps or 1) / seconds
        if size > 2 and found[size] < found[size // 2]:
            break
    return found


def best(rates: Rates, most: int) -> int:
    """The number of clients at a time, at most `most`, of the highest rate; one where that is no gain to speak of."""
    possible = {size: rate for size, rate in rates.items() if size <= most}
    size = max(possible, key=lambda each: possible[each], default=1)
    return size if size > 1 and possible[size] >= GAIN * possible[1] else 1


def kept(key: Any, make: Callable[[], Rates]) -> dict[int, float]:
    """What was measured under a key before, or is now."""
    place = _place(key)
    try:
        content = limits.read_json(place, _LARGEST)
        known = {int(size): float(rate) for size, rate in content["rates"].items()}
        if known[1] > 0 and all(map(math.isfinite, known.values())):
            return known
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    found = dict(make())
    with suppress(RunFolderError):
        write_json(place, {"of": key, "rates": {str(size): rate for size, rate in found.items()}}, durable=False)
    return found


def machine(device: torch.device) -> list[str]:
    """What of a machine the speed depends on, beside its load."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return [name, str(torch.get_num_threads()), torch.__version__]


def _train(model: ResidentModel, members: Sequence[Member], training: TrainingConfig, padding: Padding) -> None:
    if len(members) > 1:
        cohort.train(model, members, training, EVERY_PART, padding)
        return
    only = members[0]
    client.train(model, only.start, only.examples, training, only.turn, EVERY_PART, padding)


def _seconds(work: Callable[[], None], device: torch.device) -> float | None:
    """The median time of some work after it was done once; None where the GPU has no memory for it."""
    taken = []
    for _ in range(1 + _REPEATS):
        begun = time.perf_counter()
        try:
            work()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:])


def _place(key: Any) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return home.cache() / "cohort" / f"{digest}.json"
