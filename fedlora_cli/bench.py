"""`fedlora bench`: how fast this machine is."""

from __future__ import annotations

import errno
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedlora.errors import counted, saving
from fedlora_cli import output


def bench(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0 or mps.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a process, as runner.threads.")] = 1,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="A file for the figures.")] = None,
) -> None:
    """Measure training, writing, clients and aggregation on this machine, with packaged models: a minute or two.

    For example: fedlora bench --out here.json
    """
    output.busy("importing …")
    import torch
    from transformers.utils import logging as transformers_logging

    from fedlora.config import configfile
    from fedlora.files.atomic import check_writable, write_json
    from fedlora.run import speed
    from fedlora.training.workers import slot_devices

    transformers_logging.disable_progress_bar()
    runner = configfile.build({"runner.device": device, "runner.threads": threads}).runner
    chosen = torch.device(slot_devices(runner)[0])
    if out is not None:
        with saving(out, "another --out"):
            if out.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            check_writable(out.absolute().parent)
    machine = speed.Machine.here(chosen, threads)
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    print(f"{machine.processor}, {counted(machine.cores, 'core')}, {machine.memory_gb:g} GB; on {machine.device}, "
          f"{counted(threads, 'thread')}\n{versions}\n")  # fmt: skip
    found = []
    for figure in speed.figures(chosen, threads):
        found.append(figure)
        print(f"{figure.what:<48} {_rounded(figure.value):>8} {figure.unit}", flush=True)
    if out is not None:
        with saving(out, "another --out"):
            write_json(out, {"machine": asdict(machine), "figures": [asdict(figure) for figure in found]})
        print(f"\nwritten           {out}")


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
