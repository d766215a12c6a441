"""The commands `fedlora run` and `fedlora resume`; heavy imports happen inside them."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.local import environment, private_server
from fedlora.errors import FedloraError, counted
from fedlora_cli import output
from flows import checks

if TYPE_CHECKING:
    from fedlora.config import RunConfig
    from mlflow_tracking.tracker import Tracked

_CONSOLE = "CRITICAL"
"""What Prefect may print: the progress and our one line of error say the rest; its own page has the full log."""

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[PRESET|FILE.yaml] [KEY=VALUE]...", help="Where settings come from, and what to change."),
]


def run(
    words: Words = None,
    run_dir: Annotated[
        str | None,
        typer.Option(
            help="Folder of the run, or a URL such as s3://bucket/run; one that was interrupted is continued.",
            metavar="DIR",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only see whether the run could begin; start nothing.")
    ] = False,
) -> None:
    """One federated run. DIR/adapter/ is the final adapter.

    For example: fedlora run demo strategy=flora-na lora.rank=4 seed=1
    """
    environment.prepare(_CONSOLE)
    if not check:
        private_server.begin_imports()
    from deployments.shipped import PRESETS
    from fedlora.config import configfile
    from fedlora.files import home, remote

    source, overrides = _split(words, "demo")
    config = checks.looked_up(configfile.load(source, overrides, PRESETS))
    if not check:
        output.busy("looking at the settings, the data and the model")
    place = run_dir if run_dir and remote.is_url(run_dir) else None
    folder = (
        remote.Remote(place).fetched()
        if place
        else Path(run_dir or home.runs() / _new_name(config)).expanduser().absolute()
    )
    found = checks.before_start(config, folder)
    if check:
        print(f"OK: {found.line() if found else f'the run in {place or folder} can be continued'}")
        return
    _run_and_show(source, overrides, config, folder, place)


def resume(
    what: Annotated[
        str,
        typer.Argument(metavar="RUN|DIR", help="A run folder, its URL or name, or the run's id in MLflow or Prefect."),
    ],
) -> None:
    """Continue an interrupted run: it ends as if nothing had happened.

    For example: fedlora resume fedit-seed0-20261121-101500-4711
    """
    environment.prepare(_CONSOLE)
    private_server.begin_imports()
    from deployments.local import asking
    from fedlora.files import remote
    from fedlora.run import preflight
    from fedlora.run.runfolder import RunFolder
    from fedlora_cli import which_run

    folder = which_run.folder_of(what)
    begun = RunFolder.open(folder)
    preflight.names(begun.config)
    asking.check_prefect()
    url = begun.place if remote.is_url(begun.place) else None
    _run_and_show(str(folder / "config.yaml"), {}, begun.config, folder, url)


def extend(
    what: Annotated[
        str, typer.Argument(metavar="RUN", help="A finished run: folder, name, or id in MLflow or Prefect.")
    ],
    words: Annotated[
        list[str], typer.Argument(metavar="rounds=N [KEY=VALUE]...", help="How many rounds it shall have.")
    ],
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run that goes on; a new one.", metavar="DIR")
    ] = None,
) -> None:
    """Let a finished run go on to more rounds: what a run of so many would have been. The run itself stays as it is.

    For example: fedlora extend fedit-seed0-20261121-101500-4711 rounds=20
    """
    environment.prepare(_CONSOLE)
    private_server.begin_imports()
    from deployments.local import asking
    from fedlora.config import configfile
    from fedlora.files import home
    from fedlora.run import extension, preflight
    from fedlora.run.runfolder import RunFolder
    from fedlora_cli import which_run

    begun = RunFolder.open(which_run.folder_of(what))
    config = extension.extended(begun, configfile.parse_overrides(words))
    preflight.names(config)
    asking.check_prefect()
    folder = (run_dir or home.runs() / _new_name(config)).expanduser().absolute()
    extension.extend(begun, config, folder)
    print(f"goes on from round {begun.config.rounds} of {begun.path}", flush=True)
    _run_and_show(str(folder / "config.yaml"), {}, config, folder)


def watch(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[FLOW_RUN]", help="Its id or name, also its first. Without it: the one asked for last."
        ),
    ] = None,
) -> None:
    """Follow a flow run that a worker executes: a line per round, its results, or why it failed.

    For example: prefect deployment run federated/demo; fedlora watch
    """
    environment.prepare(_CONSOLE)
    from deployments.local import asking

    asking.check_prefect()
    from prefect.settings import get_current_settings

    from fedlora_cli import watching

    if not get_current_settings().api.url:
        raise FedloraError("there is no Prefect server to ask: `fedlora up`, or set PREFECT_API_URL")
    watching.follow(what, lambda line: print(line, flush=True))


def _run_and_show(
    source: str, overrides: dict[str, Any], config: RunConfig, folder: Path, url: str | None = None
) -> None:
    """Run, and print what came of it; where the folder is the copy of one that is kept elsewhere, at a URL."""
    from tasks import where

    print(f"run folder: {url} (worked on in {folder})" if url else f"run folder: {folder}", flush=True)
    try:
        tracked, flow_run = _run(source, overrides, config, folder, url)
    except KeyboardInterrupt:
        again = shlex.join(["resume", url or str(folder)])
        print(f"stopped; what is finished is kept. Continue: {where.command('fedlora')} {again}")
        raise
    _print_results(folder, config, tracked, flow_run)
    if url:
        print(f"kept at           {url}")


def _split(words: list[str] | None, default: str) -> tuple[str, dict[str, Any]]:
    """The preset or file (the first word without '=') and the overrides."""
    from fedlora.config import configfile

    given = list(words or [])
    source = given.pop(0) if given and "=" not in given[0] else default
    if source.endswith((".yaml", ".yml")):
        source = str(Path(source).expanduser().absolute())
    return source, configfile.absolute_paths(configfile.parse_overrides(given))


def _new_name(config: RunConfig) -> str:
    return f"{config.strategy}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _run(
    source: str, overrides: dict[str, Any], config: RunConfig, folder: Path, url: str | None
) -> tuple[Tracked, str]:
    """Run the flow in this process; returns its run in MLflow, and the flow run."""
    from flows.progress import shown_on

    with shown_on(sys.stdout) as shown:
        from flows.federated import federated, run_name
        from tasks import interruption

        with private_server.available(), interruption.marked():
            federated.with_options(flow_run_name=run_name(config))(
                preset=source, overrides=overrides, run_dir=url or str(folder)
            )
    from fedlora.run.runfolder import RunFolder
    from mlflow_tracking import tracker

    tracked = tracker.load(RunFolder(folder))
    if tracked is None:
        raise FedloraError(f"{folder} holds no tracked run")
    return tracked, shown.flow_run


def _print_results(folder: Path, config: RunConfig, tracked: Tracked, flow_run: str) -> None:
    from fedlora.run import recovery
    from fedlora.run.runfolder import RunFolder
    from fedlora.sweep.comparison import Result
    from fedlora_cli import tables
    from mlflow_tracking import store
    from tasks import where

    print()
    tables.compared([Result.of_folder({"strategy": config.strategy}, folder)], ["strategy"], sys.stdout)
    size = recovery.size(RunFolder(folder)) / 1e6
    print(f"\nrun folder        {folder} ({size:.1f} MB{_kept(config)})")
    print(f"adapter           {folder / 'adapter'}\npicture           {folder / 'figures' / 'rounds.png'}")
    print("\n".join(where.lines(tracked.uri, store.run_page(tracked.experiment, tracked.run), flow_run)))


def _kept(config: RunConfig) -> str:
    """Which rounds can still be gone back to."""
    keep = config.keep_rounds
    if keep is None or keep >= config.rounds:
        return ""
    return f"; uploads and states of the last {'round' if keep == 1 else counted(keep, 'round')}"
