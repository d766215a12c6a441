"""Registers what `deployments/prefect.yaml` declares, and the automations, with a Prefect server.

Prefect reads its settings when it is imported, so this happens in a process of its own, by Prefect's own
`prefect deploy --all`: the file is the one description of the deployments, whoever registers it. In a container, where
the server is elsewhere: `python -m deployments.local.registering`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deployments import form
from deployments.local import authentication
from deployments.local.asking import POOLS
from deployments.local.environment import of_child, prepare
from deployments.local.processes import ServiceError, ending
from deployments.shipped import PRESETS, SWEEPS
from fedlora.config import configfile, yamltext
from fedlora.errors import FedloraError

SOURCE = Path(__file__).resolve().parents[2]
PREFECT_FILE = Path("deployments", "prefect.yaml")
PATIENCE = 120.0
_WHAT = f"cannot register the deployments of {PREFECT_FILE}"


def deploy(prefect_url: str, source: Path = SOURCE) -> None:
    """Register the deployments of `source`, whose flows a worker finds in that folder, and the automations.

    Raises:
        ServiceError: a flow cannot be imported or the server refuses something (the end of what was said follows the
            first line), or the time is up.
    """
    check_source(source)
    process = begin(prefect_url, source)
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise ServiceError(f"{_WHAT}: Prefect did not finish within {PATIENCE:.0f} s") from error
    finally:
        process.kill()
        process.communicate()
    if process.returncode:
        raise ServiceError(f"{_WHAT}:\n{ending(output)}")


def check_source(source: Path) -> None:
    """Raise before anything starts if a file that the worker would run is not there, or parameters name nothing.

    Raises:
        ServiceError: it is missing, `prefect.yaml` cannot be read, or a deployment's parameters cannot be a run's.
    """
    wanted = declared(source)
    for each in wanted:
        for parameters in _parameters(each):
            try:
                _check_parameters(each["entrypoint"], parameters, source / PREFECT_FILE.parent)
            except FedloraError as error:
                raise ServiceError(f"{source / PREFECT_FILE}: deployment '{each['name']}': {error}") from None
    for entrypoint in sorted({each["entrypoint"] for each in wanted}):
        file = source / entrypoint.partition(":")[0]
        if not file.is_file():
            raise ServiceError(
                f"{file}, a flow that the worker would run, does not exist: is the installation complete?"
            )


def _parameters(deployment: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parameters of a deployment, and of each of its schedules on top."""
    own = deployment.get("parameters") or {}
    given = [own, *({**own, **(each.get("parameters") or {})} for each in deployment.get("schedules") or [])]
    yield from filter(None, given)


def _check_parameters(entrypoint: str, parameters: dict[str, Any], folder: Path) -> None:
    """Names and keys, by what costs no import of seconds; the run itself looks at the rest.

    Raises:
        ConfigError: there is no such preset or sweep, or a setting of a run that there is not.
    """
    overrides = configfile.absolute_paths(parameters.get("overrides") or {}, folder)
    if entrypoint.endswith(":federated"):
        preset = str(parameters.get("preset", "demo"))
        configfile.load(preset, {**overrides, **form.settings(parameters)}, folder / PRESETS.name)
    elif entrypoint.endswith(":run_sweep"):
        configfile.find(str(parameters.get("sweep", "demo")), folder / SWEEPS.name, "sweep")
        configfile.check_keys(overrides)


def declared(source: Path = SOURCE) -> list[dict[str, Any]]:
    """The deployments of the file, as written there.

    Raises:
        ServiceError: it does not exist, is no YAML, or declares nothing.
    """
    file = source / PREFECT_FILE
    try:
        content = yamltext.parse(file.read_text("utf-8"))
        found = [each for each in content["deployments"] if each["name"] and each["entrypoint"]]
    except FileNotFoundError:
        raise ServiceError(f"{file} does not exist: is the installation complete?") from None
    except (OSError, ValueError) as error:
        raise ServiceError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    except (KeyError, TypeError):
        raise ServiceError(f"{file}: expected a list `deployments`, each with a name and an entrypoint") from None
    if not found:
        raise ServiceError(f"{file} declares no deployment")
    return found


def begin(prefect_url: str, source: Path) -> subprocess.Popen[str]:
    """Start registering in the background."""
    secrets = authentication.OF_SERVERS + authentication.OF_MLFLOW
    return subprocess.Popen(
        [sys.executable, "-m", "deployments.local.registering", str(source)],
        env=authentication.without(of_child(prefect_url), secrets) | authentication.prefect_client(),
        cwd=SOURCE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )


def register(source: Path) -> None:
    """All of it, in a process whose `PREFECT_API_URL` names the server.

    Raises:
        SystemExit: Prefect's command refused the file.
        ServiceError: it passed over a deployment.
    """
    from prefect.client.orchestration import get_client
    from prefect.flows import load_flow_from_entrypoint

    from deployments.local import automations

    # `prefect deploy` would register a placeholder for a flow that cannot be imported, and the error come at night.
    wanted = declared(source)
    entrypoints = {each["entrypoint"] for each in wanted}
    loaded = {
        each: load_flow_from_entrypoint(str(source / each), use_placeholder_flow=False).name for each in entrypoints
    }
    os.chdir(source)
    _create_pools()
    _prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE))
    with get_client(sync_client=True) as client:
        for each in wanted:  # a file that does not validate is skipped with a remark
            client.read_deployment_by_name(f"{loaded[each['entrypoint']]}/{each['name']}")
    automations.apply()


def _prefect(*words: str) -> None:
    """Prefect's own command line, in this process, where importing the flows has been paid for."""
    from prefect.cli import app

    sys.argv = ["prefect", *words]
    try:
        app()
    except SystemExit as end_of_it:
        if end_of_it.code:
            raise


def _create_pools() -> None:
    """Make pools that are not there, and give one that no worker has described yet the form of a process pool."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    with get_client(sync_client=True) as client:
        for name in POOLS:
            try:
                pool = client.read_work_pool(name)
                if pool.type == "process" and not pool.base_job_template:
                    client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
            except ObjectNotFound:
                client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))


if __name__ == "__main__":
    prepare()
    register(Path(sys.argv[1] if len(sys.argv) > 1 else SOURCE).resolve())
