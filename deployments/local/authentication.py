"""Who may use the servers of `fedlora up`: what they ask callers for, and what our own processes answer.

Everything comes from the environment and stays there: no password is in a file of ours, in a log or among the words of
a command, which every user of the machine can read. MLflow keeps a hash of its administrator's in `mlflow-auth.db`.
"""

from __future__ import annotations

import base64
import configparser
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from fedlora.errors import ConfigError
from fedlora.files import home

PREFECT_SERVER, PREFECT_CLIENT = "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"
ADMIN, ADMIN_PASSWORD = "MLFLOW_AUTH_ADMIN_USERNAME", "MLFLOW_AUTH_ADMIN_PASSWORD"
USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
AUTH_FILE, SESSION_KEY = "MLFLOW_AUTH_CONFIG_PATH", "MLFLOW_FLASK_SERVER_SECRET_KEY"
HOSTS, ORIGINS = "MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"

OF_PREFECT = (PREFECT_SERVER, PREFECT_CLIENT)
OF_MLFLOW = (ADMIN, ADMIN_PASSWORD, USER, PASSWORD, SESSION_KEY)
OF_SERVERS = (PREFECT_SERVER, ADMIN, ADMIN_PASSWORD, SESSION_KEY)
"""What a worker or a flow run has no use for."""

SHORTEST = 12
"""Characters of a password, as MLflow asks; Prefect asks for nothing."""
_PUBLISHED = ("password1234",)
"""Once MLflow's default."""
EVERYWHERE = "0.0.0.0"  # noqa: S104 (a word to compare with)


def check(host: str) -> None:
    """Whether the environment holds what both servers need to ask who is calling.

    Raises:
        ConfigError: it does not; names every variable that is missing or unusable, and never its value.
    """
    problems = [*_prefect_problems(), *_mlflow_problems()]
    if problems:
        raise ConfigError(
            f"on {host} both servers must ask who is calling, but {'; '.join(problems)}. Set this in the environment "
            "(never on a command line), or listen on 127.0.0.1 without --authenticate and use a tunnel "
            "(docs/security.md)"
        )


def _weak(password: str) -> bool:
    return len(password) < SHORTEST or password in _PUBLISHED


def _prefect_problems() -> Iterator[str]:
    text = os.environ.get(PREFECT_SERVER, "")
    user, _, password = text.partition(":")
    if not text:
        yield f"{PREFECT_SERVER} is not set: expected USER:PASSWORD, the password of {SHORTEST} characters or more"
    elif not user or _weak(password):
        yield f"{PREFECT_SERVER} is not USER:PASSWORD with a password of {SHORTEST} characters or more"
    if text and os.environ.get(PREFECT_CLIENT, text) != text:
        yield f"{PREFECT_CLIENT} is not the same as {PREFECT_SERVER}: unset it here"


def _mlflow_problems() -> Iterator[str]:
    password = os.environ.get(ADMIN_PASSWORD, "")
    if given := os.environ.get(AUTH_FILE):
        yield from _file_problems(Path(given))
    elif not password:
        yield f"{ADMIN_PASSWORD} is not set: expected {SHORTEST} characters or more, for MLflow's user {_admin()}"
    if password and _weak(password):
        yield f"{ADMIN_PASSWORD} is too short or published: expected {SHORTEST} characters or more of your own"
    if bool(os.environ.get(USER)) != bool(os.environ.get(PASSWORD)):
        yield f"only one of {USER} and {PASSWORD} is set: expected both, or none for the administrator"
    if find_spec("flask_wtf") is None:
        yield "MLflow's basic-auth app lacks Flask-WTF: pip install 'fedlora[auth]'"


def _file_problems(path: Path) -> Iterator[str]:
    """What keeps an ini file of the user's own from being used."""
    if not path.is_file():
        yield f"{AUTH_FILE} names {path}, which is no file"
        return
    if path.stat().st_mode & 0o077:
        yield f"{AUTH_FILE} names {path}, which others can read: chmod 600 {path}"
    if _weak(_from_file("admin_password") or os.environ.get(ADMIN_PASSWORD, "")):
        yield f"neither {path} nor {ADMIN_PASSWORD} gives an administrator's password of {SHORTEST} characters or more"


def _from_file(key: str) -> str:
    """A setting of the user's own ini file, where there is one."""
    content = configparser.ConfigParser(interpolation=None)
    try:
        content.read(os.environ.get(AUTH_FILE) or os.devnull)
        return content.get("mlflow", key, fallback="")
    except (OSError, configparser.Error):
        return ""


def _admin() -> str:
    return os.environ.get(ADMIN) or _from_file("admin_username") or "admin"


def prefect_login() -> str:
    """`USER:PASSWORD` with which our processes call a Prefect server of ours; empty where none is known."""
    return os.environ.get(PREFECT_CLIENT) or os.environ.get(PREFECT_SERVER) or ""


def mlflow_login() -> tuple[str, str] | None:
    """User and password with which our processes call an MLflow server of ours: a client's, or the administrator's."""
    user, password = os.environ.get(USER), os.environ.get(PASSWORD)
    if user and password:
        return user, password
    password = os.environ.get(ADMIN_PASSWORD) or _from_file("admin_password")
    return (_admin(), password) if password else None


def header(login: str) -> dict[str, str]:
    """HTTP's basic authentication for `USER:PASSWORD`; nothing for nothing."""
    return {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}


def prefect_client() -> dict[str, str]:
    """What a client of our Prefect server needs in its environment."""
    login = prefect_login()
    return {PREFECT_CLIENT: login} if login else {}


def mlflow_client() -> dict[str, str]:
    """What a client of our MLflow server needs in its environment."""
    login = mlflow_login()
    return {USER: login[0], PASSWORD: login[1]} if login else {}


def mlflow_server(host: str, port: int) -> dict[str, str]:
    """What MLflow's basic-auth app needs in its environment; it reads the administrator's password there itself.

    The key signs MLflow's form for new users and no session, so that a fresh one at every start does no harm. Requests
    under a name that is not ours are refused, and writing ones from another site's page.
    """
    ours = [f"{name}:{port}" for name in names(host)]
    given = _words(HOSTS)
    pages = [f"http://{name}" for name in ours]
    pages += [f"{scheme}://{name}" for name in given if "*" not in name for scheme in ("https", "http")]
    return {
        ADMIN: _admin(),
        AUTH_FILE: os.environ.get(AUTH_FILE) or str(home.mlflow_auth_file()),
        SESSION_KEY: os.environ.get(SESSION_KEY) or secrets.token_hex(32),
        HOSTS: ",".join(dict.fromkeys([*ours, *given])),
        ORIGINS: ",".join(dict.fromkeys([*pages, *_words(ORIGINS)])),
    }


def names(host: str) -> list[str]:
    """The names under which a server that listens on `host` is called; MLflow's own variable adds others."""
    if host != EVERYWHERE:
        return list(dict.fromkeys([host, "127.0.0.1", "localhost"] if host.startswith("127.") else [host]))
    return list(dict.fromkeys(["127.0.0.1", "localhost", *addresses(), socket.gethostname()]))


def addresses() -> list[str]:
    """The IPv4 addresses of this machine that others can reach."""
    import psutil

    every = [each for interface in psutil.net_if_addrs().values() for each in interface]
    return [each.address for each in every if each.family == socket.AF_INET and not each.address.startswith("127.")]


def _words(variable: str) -> list[str]:
    return [word.strip() for word in os.environ.get(variable, "").split(",") if word.strip()]


def prepare_files() -> None:
    """Make the files of MLflow's basic-auth app, for this user's eyes only. No password is in the ini file.

    Raises:
        OSError: the home folder cannot be written.
    """
    for path in (home.mlflow_auth_file(), home.mlflow_auth_database()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)
    lines = ["[mlflow]", "default_permission = READ", f"database_uri = {home.sqlite_url(home.mlflow_auth_database())}"]
    home.mlflow_auth_file().write_text("\n".join([*lines, ""]).replace("%", "%%"), encoding="utf-8")


def without(environ: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    """An environment without some variables."""
    return {name: value for name, value in environ.items() if name not in names}
