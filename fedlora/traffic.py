"""What crosses the wire for one client in one round, in bytes."""

from __future__ import annotations

from fedlora.adapter import Adapter, wire_size
from fedlora.metrics import Bytes
from fedlora.runfolder import RunFolder
from fedlora.seeds import Turn
from fedlora.strategies.base import Strategy


def crossing(run: RunFolder, strategy: Strategy, turn: Turn, start: Adapter, upload: Adapter | None) -> Bytes:
    """The broadcast `start`, the base update that the client has missed, and its `upload` where it sends one."""
    plan = strategy.plan(turn.round)
    down = wire_size(start, plan.down)
    up = wire_size(upload, plan.up) if upload is not None else (0, 0)
    base = missed_base(run, turn.round, turn.client)
    return Bytes(up_adapter=up[0], up_head=up[1], down_adapter=down[0], down_head=down[1], down_base=base)


def missed_base(run: RunFolder, number: int, client: int) -> int:
    """Bytes of base update that a client downloads at the start of round `number`.

    All that was added since it was last asked, or the whole update where that is smaller.
    """
    total = int(run.need_json(f"{run.state_stem(number - 1)}.json")["base_total_bytes"])
    if not total:
        return 0
    missed = 0
    for earlier in range(number - 1, 0, -1):
        record = run.need_json(run.record_name(earlier))
        missed += int(record["base_bytes"])
        if client in record["asked"]:
            break
    return min(missed, total)
