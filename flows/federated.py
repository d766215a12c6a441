"""One federated run as a Prefect flow: a round is a group of tasks in it.

prefect deployment run 'federated/custom' -p strategy=flora-na -p rounds=3
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from deployments.local import environment

environment.prepare()

from prefect import flow, runtime  # noqa: E402 (the environment must be ready first)
from prefect.futures import PrefectFuture, as_completed  # noqa: E402
from prefect.task_runners import ThreadPoolTaskRunner  # noqa: E402
from pydantic import Field  # noqa: E402

from deployments import form  # noqa: E402
from deployments.shipped import DEPLOYMENTS, PRESETS  # noqa: E402
from fedlora.config import RunConfig, configfile  # noqa: E402
from fedlora.errors import WorkerError  # noqa: E402
from fedlora.files import home  # noqa: E402
from fedlora.model import provenance  # noqa: E402
from fedlora.run import jobs, participation, recovery, rounds  # noqa: E402
from fedlora.run.rounds import Timings  # noqa: E402
from fedlora.run.rounds import unfinished as rounds_to_do  # noqa: E402
from fedlora.run.runfolder import RunFolder  # noqa: E402
from fedlora.strategies import registry  # noqa: E402
from fedlora.training import workers  # noqa: E402
from flows import checks, progress, refusals  # noqa: E402
from flows.logbook import Logbook  # noqa: E402
from flows.progress import Progress  # noqa: E402
from mlflow_tracking import store, tracker  # noqa: E402
from tasks import (  # noqa: E402
    devices,
    interruption,
    names,
)
from tasks.federated import (  # noqa: E402
    Run,
    aggregate,
    evaluate,
    fine_tune,
    initialise,
    partition,
    publish,
    receive,
)

if TYPE_CHECKING:
    StrategyName = str
else:
    StrategyName = Literal[(form.AS_IN_PRESET, *registry.names())]

_PREPARING = {
    "processes": "preparing the data, and the model in the worker processes",
    "threads": "preparing the data and the model",
}
_TASKS: Any = ThreadPoolTaskRunner(max_workers=16)


@flow(name="federated", task_runner=_TASKS, validate_parameters=True)
@refusals.told
def federated(
    preset: Annotated[str, form.name_or_file(configfile.preset_names(PRESETS), "preset")] = "demo",
    strategy: Annotated[StrategyName | None, form.one_of(registry.names())] = form.AS_IN_PRESET,
    rounds: Annotated[int | None, Field(ge=1)] = None,
    clients: Annotated[int | None, Field(ge=1)] = None,
    fraction: Annotated[float | None, Field(gt=0, le=1)] = None,
    seed: Annotated[int | None, Field(ge=0)] = None,
    overrides: dict[str, Any] | None = None,
    run_dir: str | None = None,
    mlflow_parent: str | None = None,
) -> str:
    """One federated run; returns its run folder.

    Args:
        preset: Where the settings come from: a preset of deployments/presets, or a YAML file on the worker.
        strategy: How the server combines the clients' adapters.
        rounds: Federated rounds. Empty: the preset's.
        clients: Clients among whom the data is dealt. Empty: the preset's.
        fraction: Share of the clients that take part in a round. Empty: the preset's.
        seed: Everything random follows from it. Empty: the preset's.
        overrides: Any other setting by its dotted key, for example {"lora.rank": 4, "partition.alpha": 0.1}. Relative
            paths are relative to deployments/prefect.yaml.
        run_dir: Folder of the run, below $FEDLORA_HOME/runs unless it is absolute; one that was interrupted is
            continued. Empty: a new one.
        mlflow_parent: MLflow run id of the sweep that this run belongs to.
    """
    flat = {"strategy": strategy, "rounds": rounds, "clients": clients, "fraction": fraction, "seed": seed}
    given = {key: value for key, value in flat.items() if value not in (None, form.AS_IN_PRESET)}
    others = configfile.absolute_paths(overrides or {}, DEPLOYMENTS)
    config = configfile.load(preset, {**others, **given}, PRESETS)
    place = home.runs() / run_dir if run_dir else default_folder(config)
    checks.of_run(config, place)
    folder = RunFolder.create(place, config)
    names.replace_generated(run_name(config))
    with execution(folder, config) as (run, told):
        logbook = Logbook(run, run_name(config), mlflow_parent, told)
        try:
            told.say(_PREPARING[config.runner.kind])
            partition.submit(run).result()
            for line in jobs.told_of_data(folder):
                told.say(line)
            if head := initialise.submit(run).result().get("head"):
                told.say(head)
            for number in rounds_to_do(folder):
                play_round(run, number, told, logbook.catch_up)
                logbook.enter(number)
            told.say("writing the adapter, tables and figures")
            logbook.catch_up()
        except BaseException as error:
            logbook.failed(error)
            raise
        publish.submit(run, logbook.tracked, logbook.page.note()).result()
        logbook.page.summarise()
        told.results(logbook.page.address, folder.path)
    return str(folder.path)


def play_round(run: Run, number: int, told: Progress, meanwhile: Callable[[], None]) -> None:
    """One round: the clients train, the server combines, the result is scored and told. Round 0 only scores.

    Args:
        run: which run.
        number: of the round.
        told: where the score is told.
        meanwhile: is called once the clients are at work: what is better done then than before.
    """
    watch = _Stopwatch(rounds.begun(run.state, number))
    if number:
        _ask_clients(run, number, told, meanwhile)
        watch.lap("train")
        aggregate.submit(run, number).result()
        watch.next()
    parts = rounds.evaluation_parts(run.state, number)
    scoring = [evaluate.submit(run, number, index, part) for index, part in enumerate(parts)]
    scores = [future.result() for future in scoring]
    watch.lap("evaluate")
    record = rounds.read_record(run.state, number) or rounds.finish(run.state, number, parts, scores, watch.timings())
    told.round(record, run.config.rounds)


def _ask_clients(run: Run, number: int, told: Progress, meanwhile: Callable[[], None]) -> None:
    """Let clients train until enough of their updates are there."""
    train = fine_tune.with_options(retries=run.config.runner.retries)
    while ask := participation.next_ask(run.state, number):
        answers = {train.submit(run, number, client, ask.attempt): client for client in ask.clients}
        meanwhile()
        roll = receive.submit(run, number, ask, _failures(answers, number, told)).result()
        if line := roll.told(ask):
            told.say(line)


def _failures(answers: Mapping[PrefectFuture[Any], int], number: int, told: Progress) -> dict[int, str]:
    """Wait for the clients, telling of each; why those that could not train could not.

    Raises:
        Exception: something that is no fault of a client's, and ends the round.
    """
    failed = {}
    for done, future in enumerate(as_completed(list(answers)), start=1):
        try:
            why = future.result().get("failed")
        except WorkerError as error:  # after the retries
            why = str(error)
        if why:
            failed[answers[future]] = why
        told.clients(number, done, len(answers))
    return failed


@contextmanager
def execution(folder: RunFolder, config: RunConfig) -> Iterator[tuple[Run, Progress]]:
    """The workers of a run, and its end: an MLflow run that did not finish is closed as killed or failed."""
    told = progress.current()
    told.begin(config, run_name(config))
    if notice := provenance.remote_code_notice(config.model):
        told.say(notice)
    try:
        with folder.held(), workers.open_pool(config.runner) as pool:
            pool.start(jobs.warm_up)
            for line in recovery.mend(folder):
                told.say(line)
            guarded = [slot.device for slot in pool.slots if devices.is_exclusive(config.runner, slot.device)]
            devices.ensure_limits(guarded)
            yield Run(folder.path, config.strategy), told
    except BaseException as error:
        interruption.note(error)
        tracked = tracker.load(folder)
        if tracked:
            store.close(tracked.uri, tracked.run, "KILLED" if interruption.is_one(error) else "FAILED")
        raise
    finally:
        told.end()


def run_name(config: RunConfig) -> str:
    """What a run is called in Prefect, in MLflow and on the terminal."""
    return config.name or f"{config.strategy} seed {config.seed}"


def default_folder(config: RunConfig) -> Path:
    """A folder for the flow run under way: the same for every retry of it.

    Named by the end of the flow run's id. Its beginning is the time at which the run was planned, which runs of one
    minute share, and all that a schedule has ahead of it.
    """
    return home.runs() / f"{config.strategy}-seed{config.seed}-{str(runtime.flow_run.id or 'run')[-12:]}"


class _Stopwatch:
    """Wall time of the phases of a round."""

    def __init__(self, resumed: bool) -> None:
        self._resumed = resumed
        self._begun = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """A phase is over."""
        begun = self._last
        self.next()
        self._laps[name] = self._last - begun

    def next(self) -> None:
        """The next phase begins."""
        self._last = time.perf_counter()

    def timings(self) -> Timings:
        return Timings(**self._laps, round=time.perf_counter() - self._begun, resumed=self._resumed)
