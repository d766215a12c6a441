"""How many clients of a run are trained in one pass of the base (`training.cohort`), and which.

It is settled when a run begins, and written down: who trains with whom must not depend on when a run was interrupted,
for the last bits of what comes out do depend on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch

from fedlora.config import RunConfig
from fedlora.data.tokens import Padding
from fedlora.errors import ClientFailed
from fedlora.model.resident import ResidentModel
from fedlora.run.runfolder import RunFolder
from fedlora.training import calibration, sharing
from fedlora.training.client import Trained
from fedlora.training.cohort import Member
from fedlora.training.draws import CannotShare
from fedlora.training.workers import Workbench, slot_devices

FILE = "cohort.json"


def size(run: RunFolder) -> int:
    """How many clients are trained together; 1 before it is settled."""
    if run.config.training.cohort == 1:
        return 1
    known = run.read_json(FILE)
    return int(known["size"]) if known else 1


def is_settled(run: RunFolder) -> bool:
    """Whether that is known."""
    return run.config.training.cohort == 1 or run.read_json(FILE) is not None


def told(run: RunFolder) -> str:
    """What a person should know of it; empty where they said it themselves."""
    known = None if run.config.training.cohort == 1 else run.read_json(FILE)
    return str(known["said"]) if known else ""


def cohorts(clients: Sequence[int], together: int) -> list[tuple[int, ...]]:
    """Those who are asked, in order, so many at a time."""
    return [tuple(clients[start : start + together]) for start in range(0, len(clients), together)]


Came = Trained | ClientFailed
"""What a client comes to."""


def train(
    bench: Workbench,
    run: RunFolder,
    members: Sequence[Member],
    alone: Callable[[Member], Trained],
    at_once: Callable[[Sequence[Member]], list[Came]],
    say: Callable[[str], None],
) -> list[Came]:
    """What some clients come to: at once, or, where the memory of the GPU is too small for so many, fewer at a time,
    from then on. One of them is trained as it is alone."""
    if len(members) == 1:
        return [_alone(members[0], alone)]
    most = bench.keep("cohort", run.id, lambda: size(run))
    if len(members) <= most:
        try:
            return at_once(members)
        except CannotShare as error:
            fewer, why = 1, str(error)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            fewer, why = (len(members) + 1) // 2, f"the memory of {bench.device} is too small for {len(members)}"
        asked = f"training.cohort={run.config.training.cohort}"
        say(f"{asked}: from now on {fewer} at a time, because {why}; set training.cohort={fewer}")
        most = bench.renew("cohort", run.id, lambda: fewer)
    parts = (members[start : start + most] for start in range(0, len(members), most))
    return [came for some in parts for came in train(bench, run, some, alone, at_once, say)]


def _alone(member: Member, alone: Callable[[Member], Trained]) -> Came:
    try:
        return alone(member)
    except ClientFailed as failed:
        return failed


def settle(run: RunFolder, model: ResidentModel, members: Sequence[Member], padding: Padding) -> None:
    """Find out, and write down, how many clients of a run are trained together.

    Args:
        run: whose.
        model: in memory.
        members: some clients, with some of their examples.
        padding: of the tokenizer.
    """
    config = run.config
    asked = config.training.cohort
    awake = [Member(sharing.awake(each.start, place), each.examples, each.turn) for place, each in enumerate(members)]
    why = sharing.why_alone(model) or sharing.tried(model, awake, padding)
    if why:
        said = f"training.cohort={asked}: clients are trained one by one, because {why}"
        run.write_json(FILE, {"size": 1, "said": said})
    elif asked == "auto":
        most = max(1, -(-config.clients_asked // len(slot_devices(config.runner))))
        rates = calibration.kept(
            _key(config, model), lambda: calibration.measure(model, awake, config.training, padding)
        )
        found = calibration.best(rates, most)
        run.write_json(FILE, {"size": found, "said": _said(rates, found)})
    else:
        run.write_json(FILE, {"size": asked, "said": ""})


def _said(rates: calibration.Rates, found: int) -> str:
    measured = ", ".join(f"{size}: {rate:.3g}" for size, rate in rates.items())
    return f"training.cohort=auto: {found} at a time (steps of clients a second by clients at a time: {measured})"


def _key(config: RunConfig, model: ResidentModel) -> list[str]:
    """What of a run and its machine the speed depends on."""
    adapter = config.lora.model_dump(mode="json", exclude={"init", "ranks", "truncation", "alpha"})
    step = [config.task, config.data.max_length, config.training.batch_size, config.training.packing]
    content = [config.model.model_dump(mode="json"), adapter, config.lora.highest_rank, step, config.training.optimizer]
    return [json.dumps(content, sort_keys=True), *calibration.machine(model.device)]
