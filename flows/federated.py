"""One federated run as a Prefect flow: a round is a group of tasks in it.

prefect deployment run 'federated/custom' -p strategy=flora-na -p rounds=3
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from deployments.local import environment

environment.prepare()

from prefect import flow, runtime  # noqa: E402 (the environment must be ready first)
from prefect.task_runners import ThreadPoolTaskRunner  # noqa: E402

from deployments import form  # noqa: E402
from deployments.shipped import DEPLOYMENTS, PRESETS  # noqa: E402
from fedlora.config import RunConfig, RunnerConfig, configfile  # noqa: E402
from fedlora.files import home  # noqa: E402
from fedlora.files.remote import Remote, is_url  # noqa: E402
from fedlora.metrics import RoundRecord  # noqa: E402
from fedlora.run import jobs  # noqa: E402
from fedlora.run.play import Observer, Observers, play  # noqa: E402
from fedlora.run.runfolder import RunFolder  # noqa: E402
from fedlora.run.server import Server  # noqa: E402
from fedlora.training import engines, workers  # noqa: E402
from flows import checks, progress, refusals  # noqa: E402
from flows.logbook import Logbook  # noqa: E402
from flows.progress import Progress  # noqa: E402
from mlflow_tracking import store, tracker  # noqa: E402
from tasks import devices, interruption, names  # noqa: E402
from tasks.federated import Run, TaskHands  # noqa: E402

_PREPARING = {
    "processes": "preparing the data, and the model in the worker processes",
    "threads": "preparing the data and the model",
    "ray": "preparing the data and the model here, for a cluster of Ray",
    "dask": "preparing the data and the model here, for a cluster of Dask",
}
_TASKS: Any = ThreadPoolTaskRunner(max_workers=16)


@form.left_empty
@flow(name="federated", task_runner=_TASKS, validate_parameters=True)
@refusals.told
@form.with_settings
def federated(
    preset: Annotated[str, form.name_or_file(configfile.preset_names(PRESETS), "preset")] = "demo",
    settings: Mapping[str, Any] = MappingProxyType({}),
    overrides: Annotated[dict[str, Any] | None, form.empty("object")] = None,
    run_dir: Annotated[str | None, form.empty("string")] = None,
    mlflow_parent: Annotated[str | None, form.empty("string")] = None,
) -> str:
    """One federated run; returns its run folder.

    Args:
        preset: Where the settings come from that are left empty: a preset of deployments/presets, or a YAML file on the
            worker.
        settings: By dotted key; as a deployment, a parameter for each of `form.SETTINGS`.
        overrides: Any other setting by its dotted key, for example {"lora.dropout": 0.1, "channel.min_clients": 4}.
            Relative paths are relative to deployments/prefect.yaml.
        run_dir: Folder of the run, below $FEDLORA_HOME/runs unless it is absolute, or a URL such as s3://bucket/run;
            one that was interrupted is continued. Left empty but by sweeps: a new one.
        mlflow_parent: Filled in by a sweep: the MLflow run that this one belongs to.
    """
    given = configfile.absolute_paths({**(overrides or {}), **settings}, DEPLOYMENTS)
    config = checks.looked_up(configfile.load(preset, given, PRESETS))
    with connected(config.runner), kept(run_dir or str(default_folder(config))) as (place, keeper):
        checks.of_run(config, place)
        folder = RunFolder.create(place, config)
        names.replace_generated(run_name(config))
        with execution(folder, config) as (run, told):
            logbook = Logbook(run, run_name(config), mlflow_parent, told)
            told.say(_PREPARING[config.runner.kind])
            with hands(run, logbook.deliver, told) as working:
                play(run.server, working, Observers(told, logbook, keeper))
    return run_dir if run_dir and is_url(run_dir) else str(folder.path)


@contextmanager
def kept(run_dir: str) -> Iterator[tuple[Path, Observer]]:
    """The folder that a run is worked on in, and who sees to it that each round is also where it is kept."""
    if not is_url(run_dir):
        yield home.runs() / run_dir, Observer()
        return
    remote = Remote(run_dir)
    with remote.worked_on(progress.current().say) as folder:
        yield folder, _Keeper(remote, folder)


class _Keeper(Observer):
    """A round is written to the store that the run folder is kept in before the next one begins."""

    def __init__(self, remote: Remote, folder: Path) -> None:
        self._remote, self._folder = remote, folder

    def round(self, record: RoundRecord) -> None:
        self._remote.commit(self._folder)


@contextmanager
def execution(folder: RunFolder, config: RunConfig) -> Iterator[tuple[Run, Progress]]:
    """The workers of a run, and its end: an MLflow run that did not finish is closed as killed or failed."""
    told = progress.current()
    told.begin(config, run_name(config))
    try:
        with folder.held(), workers.open_pool(config.runner) as pool:
            pool.start(jobs.warm_up)
            guarded = [slot.device for slot in pool.slots if devices.is_exclusive(config.runner, slot.device)]
            devices.ensure_limits(guarded)
            yield Run(Server(folder)), told
    except BaseException as error:
        interruption.note(error)
        tracked = tracker.load(folder)
        if tracked:
            store.close(tracked.uri, tracked.run, "KILLED" if interruption.is_one(error) else "FAILED")
        raise
    finally:
        told.end()


@contextmanager
def connected(runner: RunnerConfig) -> Iterator[None]:
    """Connected to the cluster that a runner names, if it names one: what is wrong with it is known before there is a
    folder, and its processes begin with their imports."""
    with ExitStack() as stack:
        if runner.clustered:
            engines.check(runner)
            from tasks.engines import opened  # which needs an extra

            stack.enter_context(opened(runner))
        yield


@contextmanager
def hands(run: Run, deliver: Callable[[], None], told: Progress) -> Iterator[TaskHands]:
    """Who does the work: the slots of this machine, or a cluster."""
    runner = run.folder.config.runner
    if not runner.clustered:
        yield TaskHands(run, deliver)
        return
    from tasks import far  # which needs an extra

    with closing(far.FarHands(run, deliver)) as working:
        yield working
        if line := working.told():
            told.say(line)


def run_name(config: RunConfig) -> str:
    """What a run is called in Prefect, in MLflow and on the terminal."""
    return config.name or f"{config.strategy} seed {config.seed}"


def default_folder(config: RunConfig) -> Path:
    """A folder for the flow run under way: the same for every retry of it.

    Named by the end of the flow run's id. Its beginning is the time at which the run was planned, which runs of one
    minute share, and all that a schedule has ahead of it.
    """
    return home.runs() / f"{config.strategy}-seed{config.seed}-{str(runtime.flow_run.id or 'run')[-12:]}"
