"""Compose file, Dockerfiles and job templates, as far as they can be checked without an engine or a cluster."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prefect.utilities.templating import find_placeholders

ROOT = Path(__file__).parent.parent.parent
DEPLOYMENTS = ROOT / "deployments"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOYMENTS / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILES = sorted((DEPLOYMENTS / "docker").glob("*.Dockerfile"))
JOBS = {path.stem: json.loads(path.read_text()) for path in (DEPLOYMENTS / "jobs").glob("*.json")}


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Keyword and rest of each line, continued lines joined."""
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0].upper(), line.partition(" ")[2].strip()) for line in lines]


def is_root(user: str) -> bool:
    return user.partition(":")[0] in ("", "0", "root")


def test_everything_is_there() -> None:
    assert {path.stem for path in DOCKERFILES} == {"server", "tracking", "worker-cpu", "worker-cuda"}
    assert {"postgres", "prefect", "mlflow", "register", "worker-cpu", "worker-cuda"} == SERVICES.keys()
    assert JOBS.keys() == {"docker-gpu", "kubernetes-gpu"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_unprivileged_pinned_and_on_loopback(name: str) -> None:
    service = SERVICES[name]
    assert not is_root(service["user"])
    assert not service.get("privileged")
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    tag = service["image"].partition(":")[2]
    assert re.match(r"\d", tag), "an image without version"
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    if name == "register":
        assert service["restart"] == "no"
    else:
        assert service["healthcheck"]["test"][0] == "CMD"
    for needed, how in service.get("depends_on", {}).items():
        assert needed in SERVICES
        assert how["condition"] == ("service_completed_successfully" if needed == "register" else "service_healthy")


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_refers_to_exists(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        context = (DEPLOYMENTS / service["build"]["context"]).resolve()
        assert context == ROOT
        assert (context / service["build"]["dockerfile"]) in DOCKERFILES
    for volume in service.get("volumes", []):
        source = volume.partition(":")[0]
        assert (DEPLOYMENTS / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
    assert set(service["networks"]) <= COMPOSE["networks"].keys()


def test_no_password_has_a_default() -> None:
    text = (DEPLOYMENTS / "compose.yaml").read_text()
    for service, variable in {"postgres": "POSTGRES_PASSWORD", "prefect": "PGPASSWORD", "mlflow": "PGPASSWORD"}.items():
        assert SERVICES[service]["environment"][variable].startswith("${POSTGRES_PASSWORD:?")
    assert not re.search(r"://[^/\s:]+:[^@/\s]+@", text), "a password in an address"
    example = (DEPLOYMENTS / "docker" / "env.example").read_text()
    assert "POSTGRES_PASSWORD=\n" in example
    variables = set(re.findall(r"\$\{(\w+)", text))
    assert variables == set(re.findall(r"^(?:# )?(\w+)=", example, re.MULTILINE))


def test_the_servers_have_a_database_each_and_mlflow_knows_its_names() -> None:
    prefect, mlflow = SERVICES["prefect"]["environment"], SERVICES["mlflow"]["environment"]
    first = prefect["PREFECT_SERVER_DATABASE_CONNECTION_URL"].rpartition("/")[2]
    second = mlflow["MLFLOW_BACKEND_STORE_URI"].rpartition("/")[2]
    assert first == SERVICES["postgres"]["environment"]["POSTGRES_DB"]
    assert f"CREATE DATABASE {second};" in (DEPLOYMENTS / "docker" / "databases.sql").read_text()
    allowed = mlflow["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    for name in ("worker-cpu", "worker-cuda"):
        address = SERVICES[name]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
        assert address in allowed
    assert "*" not in allowed


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_a_dockerfile_is_pinned_ends_as_nobody_special_and_copies_what_exists(dockerfile: Path) -> None:
    steps = instructions(dockerfile)
    images = [rest for keyword, rest in steps if keyword == "FROM"]
    assert images
    assert all(re.search(r":\d+\.\d+\.\d+", image) for image in images)
    users = [rest for keyword, rest in steps if keyword == "USER"]
    assert users
    assert not is_root(users[-1])
    assert [keyword for keyword, _ in steps].index("USER") > max(i for i, (k, _) in enumerate(steps) if k == "RUN")
    assert any(keyword == "HEALTHCHECK" for keyword, _ in steps)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for keyword, rest in steps:
        if keyword == "COPY":
            for source in shlex.split(rest)[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source.split('/')[0]}" in ignored, f"{source} is not sent to the engine"


def test_images_hold_the_declared_versions() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=]", each)[0]: each for each in project["dependencies"]}
    for name in ("server", "tracking"):
        for quoted in re.findall(r'"([\w-]+[<>=][^"]*)"', (DEPLOYMENTS / "docker" / f"{name}.Dockerfile").read_text()):
            package = re.split(r"[<>=]", quoted)[0]
            assert quoted == declared.get(package, quoted)
    images = {service["image"] for service in SERVICES.values() if service["image"].startswith("fedlora")}
    assert {image.rpartition(":")[2] for image in images} == {project["version"]}
    assert {job["variables"]["properties"]["image"]["default"] for job in JOBS.values()} <= images


def filled(template: dict[str, Any], **changes: Any) -> Any:
    """The job with defaults in place; what has no default is left out, as Prefect does."""
    properties = template["variables"]["properties"]
    values = {name: each["default"] for name, each in properties.items() if each.get("default") is not None} | changes

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            made = {key: fill(each) for key, each in value.items()}
            return {key: each for key, each in made.items() if each is not None}
        if isinstance(value, list):
            return [fill(each) for each in value]
        found = re.fullmatch(r"\{\{ (\w+) \}\}", value) if isinstance(value, str) else None
        return values.get(found[1]) if found else value

    return fill(template["job_configuration"])


@pytest.mark.parametrize("name", JOBS)
def test_a_job_template_is_a_schema_whose_variables_are_all_used(name: str) -> None:
    template = JOBS[name]
    variables = template["variables"]
    jsonschema.Draft202012Validator.check_schema(variables)
    assert {found.name for found in find_placeholders(template["job_configuration"])} == variables["properties"].keys()
    defaults = {key: each["default"] for key, each in variables["properties"].items() if "default" in each}
    jsonschema.validate(defaults, variables)
    assert {"PREFECT_API_URL", "MLFLOW_TRACKING_URI"} <= defaults["env"].keys()
    assert variables["properties"]["gpus"]["minimum"] == 1


def test_the_docker_job_is_one_of_the_compose_network() -> None:
    job = filled(JOBS["docker-gpu"], gpus=2)
    created = job["container_create_kwargs"]
    assert created["device_requests"] == [{"Driver": "nvidia", "Count": 2, "Capabilities": [["gpu"]]}]
    assert not is_root(created["user"])
    assert not job["privileged"]
    assert job["networks"] == [COMPOSE["networks"]["fedlora"]["name"]]
    volume = job["volumes"][0].partition(":")[0]
    assert volume.removeprefix(f"{COMPOSE['name']}_") in COMPOSE["volumes"]
    user = JOBS["docker-gpu"]["variables"]["properties"]["user"]["pattern"]
    assert [bool(re.search(user, each)) for each in ("10001:10001", "0", "0:0", "1000:0")] == [
        True,
        False,
        False,
        False,
    ]


def test_the_kubernetes_job_asks_for_gpus_and_is_not_root() -> None:
    job = filled(JOBS["kubernetes-gpu"], gpus=2, env=[], name="run", labels={}, annotations={})["job_manifest"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["nvidia.com/gpu"] == 2
        assert container["resources"][kind].keys() == {"cpu", "memory", "nvidia.com/gpu"}
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] > 0
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert not pod["automountServiceAccountToken"]


def test_secrets_stay_out_of_the_image_and_of_git() -> None:
    assert "**/.env" in (ROOT / ".dockerignore").read_text().splitlines()
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
