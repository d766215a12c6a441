"""Before a run goes on: what is damaged is found by its digest, and the run goes back to the last point that is whole.

And as it goes on: what no later round needs is removed.
"""

from __future__ import annotations

import shutil

from fedlora.data.partition import Partition
from fedlora.errors import DataError
from fedlora.run import participation
from fedlora.run.runfolder import RunFolder


def mend(run: RunFolder) -> list[str]:
    """Remove what is not whole, so that it is made anew; says what was found, a line each.

    To be called with the folder held: nothing else may write to it.
    """
    for unfinished in run.path.rglob(".*.tmp"):
        unfinished.unlink(missing_ok=True)
    return [*_versions(run), *_preparation(run), *_rounds(run), *_answers(run)]


def _versions(run: RunFolder) -> list[str]:
    changed = run.other_versions()
    return [f"since this run began {', '.join(changed)}: its numbers may differ from now on"] if changed else []


def _preparation(run: RunFolder) -> list[str]:
    """The partition and what is known of the data; made again from the same data, they are the same."""
    summary = run.read_json("partition.json")
    if not (run.path / "partition.json").exists() and not (run.path / "partition.npz").exists():
        return []
    try:
        whole = summary is not None and Partition.load(run.path / "partition.npz").hash == summary["hash"]
    except DataError:
        whole = False
    if whole:
        return []
    (run.path / "partition.json").unlink(missing_ok=True)
    return [f"the partition in {run.path} is missing or damaged; the data is dealt again"]


def _rounds(run: RunFolder) -> list[str]:
    """Go back to the last closed round whose state is whole."""
    numbers = sorted(int(folder.name) for folder in (run.path / "rounds").glob("[0-9]*"))
    closed = run.finished_rounds()
    last = next((t for t in reversed(closed) if run.read_record(run.state_stem(t))), -1)
    newest = numbers[-1] if numbers else 0
    if last == newest or (last == newest - 1 and not (run.path / run.record_name(newest)).exists()):
        return []
    damaged = closed[-1] if closed and closed[-1] > last else last + 1
    for number in (t for t in numbers if t > last):
        if number == last + 1:  # its uploads may be whole, and then nobody trains again
            _reopen(run, number)
        else:
            shutil.rmtree(run.round_folder(number))
    back = f"round {last}" if last > 0 else "the beginning"
    return [f"round {damaged} in {run.path} is damaged; going back to {back}, the last point that is whole"]


def _reopen(run: RunFolder, number: int) -> None:
    for name in (run.record_name(number), *(f"{run.state_stem(number)}.{end}" for end in ("json", "safetensors"))):
        (run.path / name).unlink(missing_ok=True)


def _answers(run: RunFolder) -> list[str]:
    """The round under way: if an update that it has accepted is not whole, its clients answer again."""
    number = len(run.finished_rounds())
    path = run.path / run.roll_name(number)
    if not path.exists():
        return []
    roll = participation.read(run, number)
    accepted = roll.having("completed")
    broken = [
        entry.client
        for entry in accepted
        if (run.read_record(run.client_stem(number, entry.client)) or {}).get("digest") != entry.digest
    ]
    if roll.entries and not broken:
        return []
    path.unlink()
    whose = f"the update of client {', '.join(map(str, broken))}" if broken else "the roll"
    return [f"{whose} of round {number} in {run.path} is missing or damaged; it is made again"]


def prune(run: RunFolder, number: int) -> None:
    """Remove the uploads and states of rounds that are more than `keep_rounds` back; the start stays."""
    keep = run.config.keep_rounds
    if keep is None:
        return
    for folder in (run.path / "rounds").glob("[0-9]*"):
        if 0 < int(folder.name) <= number - keep:
            for file in folder.iterdir():
                if file != run.path / run.record_name(int(folder.name)):
                    file.unlink(missing_ok=True)


def size(run: RunFolder) -> int:
    """Bytes of all files in the run folder."""
    return sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
