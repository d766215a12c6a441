"""Which databases the servers of `fedlora up` use: SQLite files under `fedlora.files.home`, or PostgreSQL.

One PostgreSQL server is enough, but not one database: Prefect and MLflow both keep a table `alembic_version`. Passwords
travel in the environment of the server that needs them (or in `~/.pgpass`), never in a URL, which ends up in logs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedlora.errors import ConfigError, FedloraError
from fedlora.files import home

if TYPE_CHECKING:
    from sqlalchemy import URL

OPTION = "--database"
EXPECTED = "expected postgresql://USER@HOST:PORT"
PREFECT_URL = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
MLFLOW_URL = "MLFLOW_BACKEND_STORE_URI"
SECRETS = (PREFECT_URL, MLFLOW_URL, "PREFECT_API_DATABASE_CONNECTION_URL", "PGPASSWORD")
"""Variables that a worker has no use for: it reaches both databases through their servers."""

_DRIVERS = {PREFECT_URL: "asyncpg", MLFLOW_URL: "psycopg2"}
_NAMES = {PREFECT_URL: "fedlora_prefect", MLFLOW_URL: "fedlora_mlflow"}
_OTHERS = {
    PREFECT_URL: ("sqlite+aiosqlite",),
    MLFLOW_URL: ("sqlite", "sqlite+pysqlite", "mysql", "mysql+pymysql", "mssql+pyodbc"),
}
"""Schemes besides PostgreSQL's that the servers understand by themselves."""


@dataclass(frozen=True)
class Databases:
    """What the Prefect and the MLflow server are given."""

    prefect: Mapping[str, str] = field(repr=False)
    """Environment of the Prefect server; wins over what the process inherits."""
    mlflow: Mapping[str, str] = field(repr=False)
    server: str = ""
    """PostgreSQL server given as `--database`, without password; empty otherwise."""
    postgres: tuple[URL, ...] = ()
    """The databases that must be there before the servers start."""


def choose(option: str | None) -> Databases:
    """The databases of both servers: on the PostgreSQL server `option`, or those of the two variables, or SQLite files.

    Raises:
        ConfigError: an address that cannot be read, or one database for both servers.
    """
    if option:
        server = _parse(option, OPTION)
        if server.database:
            raise ConfigError(
                f"{OPTION}: '{server.database}' names a database, but each server needs one of its own; {EXPECTED}, "
                f"where {' and '.join(_NAMES.values())} are used, or set {PREFECT_URL} and {MLFLOW_URL}"
            )
        each = {variable: server.set(database=name) for variable, name in _NAMES.items()}
        prefect, mlflow = (_environ(variable, at) for variable, at in each.items())
        return Databases(prefect, mlflow, _shown(server), tuple(each.values()))
    prefect, first = _from_environment(PREFECT_URL, home.sqlite_url(home.prefect_database(), "aiosqlite"))
    mlflow, second = _from_environment(MLFLOW_URL, home.sqlite_url(home.mlflow_database()))
    if first and second and (first.host, first.port, first.database) == (second.host, second.port, second.database):
        raise ConfigError(
            f"{PREFECT_URL} and {MLFLOW_URL} name the same database {_shown(first)}; each server needs one of its own, "
            "for both keep a table alembic_version"
        )
    return Databases(prefect, mlflow, "", tuple(each for each in (first, second) if each))


def _parse(url: str, what: str) -> URL:
    """Read an address; `what` names the option in errors, which do not hold the address: it may hold a password."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    scheme, colon, _ = url.partition(":")
    if scheme.partition("+")[0] not in ("postgresql", "postgres"):
        raise ConfigError(f"{what}: the address begins with '{scheme if colon else 'nothing'}'; {EXPECTED}")
    login, at, rest = url.rpartition("@")  # a password may hold an @ as it is
    try:
        found = make_url(f"{login.replace('@', '%40')}{at}{rest}")
        if (found.port or 0) > 65535:
            raise ValueError(found.port)
    except (ArgumentError, ValueError):
        raise ConfigError(f"{what}: the port is not a number up to 65535; {EXPECTED}") from None
    if not found.host:
        raise ConfigError(f"{what}: the address names no host; {EXPECTED}")
    if unknown := found.query.keys() - {"sslmode", "ssl"}:
        raise ConfigError(f"{what}: unknown setting '{min(unknown)}' in the address; only sslmode is read there")
    return found.set(port=found.port or 5432)


def _shown(at: URL, scheme: str = "postgresql") -> str:
    """The address without the password; may be written to logs and files."""
    without = at.create(scheme, at.username, host=at.host, port=at.port, database=at.database)
    return without.render_as_string().replace(" ", "%20")


def _sslmode(at: URL) -> str | None:
    query = at.normalized_query
    return next(iter(query.get("sslmode", query.get("ssl", ()))), None)


def _environ(variable: str, at: URL) -> dict[str, str]:
    """The address for a server, and what its driver reads from the environment besides: a password is not in it."""
    given = {"PGPASSWORD": at.password, "PGSSLMODE": _sslmode(at)}
    return {variable: _shown(at, f"postgresql+{_DRIVERS[variable]}")} | {
        key: value for key, value in given.items() if value
    }


def _from_environment(variable: str, default: str) -> tuple[dict[str, str], URL | None]:
    """What to set for a server whose variable the user may have set; a password moves out of the URL."""
    url = os.environ.get(variable)
    if not url:
        older = variable == PREFECT_URL and os.environ.get("PREFECT_API_DATABASE_CONNECTION_URL")
        return ({} if older else {variable: default}), None
    scheme = url.partition(":")[0]
    if scheme in _OTHERS[variable]:
        return {variable: url}, None
    if not scheme.startswith("postgres"):
        known = ", ".join(f"{name}://" for name in _OTHERS[variable])
        raise ConfigError(f"{variable} begins with '{scheme}'; expected postgresql://USER@HOST:PORT/NAME or {known}")
    at = _parse(url, variable)
    if not at.database:
        raise ConfigError(f"{variable} names no database; expected postgresql://USER@HOST:PORT/NAME")
    return _environ(variable, at), at


def prepare(databases: Databases) -> list[str]:
    """Connect to every PostgreSQL database and create those that are missing; returns the names of the new ones.

    Raises:
        FedloraError: no driver, no answer, wrong password, or the user may not create a database. One line.
    """
    return [str(each.database) for each in databases.postgres if _create(each)]


def _create(at: URL) -> bool:
    try:
        driver = importlib.import_module("psycopg2")
    except ImportError:
        raise FedloraError(
            "PostgreSQL needs the driver psycopg2, which is not installed: pip install 'fedlora[postgresql]'"
        ) from None
    try:
        _connect(driver, at).close()
        return False
    except driver.OperationalError as error:
        if "does not exist" not in str(error) or f'"{at.database}"' not in str(error):
            raise _unreachable(at, error) from None
    try:
        connection = _connect(driver, at.set(database="postgres"))
        connection.autocommit = True  # CREATE DATABASE does not run in a transaction
        try:
            with connection.cursor() as cursor:
                cursor.execute(f"CREATE DATABASE {driver.extensions.quote_ident(at.database, cursor)}")
        finally:
            connection.close()
    except driver.errors.DuplicateDatabase:  # somebody else was quicker
        return False
    except driver.OperationalError as error:
        raise _unreachable(at, error) from None
    except driver.Error as error:
        raise FedloraError(
            f"database {at.database} is missing on {_shown(at)} and cannot be created ({_first_line(error)}); ask its "
            f"administrator for: CREATE DATABASE {at.database} OWNER {at.username or 'YOU'}"
        ) from None
    return True


def _connect(driver: Any, at: URL) -> Any:
    given = {"user": at.username, "password": at.password, "sslmode": _sslmode(at)}
    return driver.connect(host=at.host, port=at.port, dbname=at.database, connect_timeout=10, **given)


def _unreachable(at: URL, error: Exception) -> FedloraError:
    reason = _first_line(error)
    if "password" in reason or "no pg_hba.conf entry" in reason:
        return FedloraError(
            f"the PostgreSQL server refuses {_shown(at)} ({reason}); set PGPASSWORD or a line in ~/.pgpass, or give "
            "the right user"
        )
    return FedloraError(
        f"the PostgreSQL server of {_shown(at)} cannot be reached ({reason}); is it running, and are host and port "
        "right?"
    )


def _first_line(error: Exception) -> str:
    """What PostgreSQL says, without the repeated `connection to server at …`."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.rpartition("failed: ")[2].removeprefix("FATAL:").removeprefix("ERROR:").strip()
