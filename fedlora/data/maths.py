"""Sums with answers that can be checked, made by `reasoning-gym` and written to a file once.

Its tasks are programs with a seed. Of each problem there are `question`, `answer` (a number), `task`, and where a task
tells it, `solution`: the way to the answer, which ends with `#### answer`.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora import seeds
from fedlora.errors import ConfigError, did_you_mean, saving
from fedlora.files.atomic import write_atomic

_NUMBER = re.compile(r"[-+]?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?(/\d+)?")


def make(tasks: Sequence[str], size: int, seed: int, difficulty: int | None, out: Path) -> int:
    """Write as many problems of each task as one JSON line each, without repeated questions; returns how many.

    Args:
        tasks: as `reasoning-gym` calls them.
        size: problems of a task.
        seed: of all of them; the same seed, the same file.
        difficulty: level of a task's curriculum, from 0; None: as the task is by itself.
        out: a new jsonl file.

    Raises:
        ConfigError: the package is not installed, there is no such task or it has no levels, its answers are no
            numbers, or the file is there.
        FedloraError: the file cannot be written.
    """
    if out.exists():
        raise ConfigError(f"--out {out} is there already; give a new file, or remove it")
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out {out} should end in .jsonl")
    rows = {row["question"]: row for task in dict.fromkeys(tasks) for row in _problems(task, size, seed, difficulty)}
    with saving(out):
        write_atomic(out, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows.values()).encode())
    return len(rows)


def _problems(task: str, size: int, seed: int, difficulty: int | None) -> list[dict[str, str]]:
    gym, factory = _gym("reasoning_gym"), _gym("reasoning_gym.factory")
    if task not in factory.DATASETS:
        raise ConfigError(f"--task {task}: reasoning-gym has no such task.{did_you_mean(task, factory.DATASETS)}")
    # Problem i of seed s is problem i - 1 of seed s + 1 there, so that near seeds would share most of their problems.
    options: dict[str, Any] = {"size": size, "seed": seeds.key(seed, f"maths/{task}") % 2**31}
    if difficulty is not None:
        if not factory.has_curriculum(task):
            raise ConfigError(f"--difficulty {difficulty}: {task} has no levels; leave it out")
        curriculum = factory.create_curriculum(task)
        curriculum.set_global_level(difficulty)
        options = vars(curriculum.generate_configuration(options))
    made = gym.create_dataset(task, **options)
    return [_row(task, made[number]) for number in range(size)]


def _row(task: str, problem: dict[str, Any]) -> dict[str, str]:
    answer, way = str(problem["answer"]).strip(), problem["metadata"].get("answer_cot")
    if not _NUMBER.fullmatch(answer):
        raise ConfigError(
            f"--task {task}: its answers are no numbers ({answer[:40]!r}), so that comparing would not tell right from "
            "wrong; take one like gsm_symbolic, chain_sum, gcd, leg_counting, simple_equations"
        )
    row = {"question": str(problem["question"]), "answer": answer, "task": task}
    return row | ({"solution": str(way)} if way else {})


def _gym(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"reasoning-gym cannot be imported ({error}); install it: pip install 'fedlora[maths]'"
        ) from error
