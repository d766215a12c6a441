"""Which databases the servers of `fedlora up` use: SQLite files under `fedlora.files.home`, or PostgreSQL.

One PostgreSQL server is enough, but not one database: Prefect and MLflow both keep a table `alembic_version`. Passwords
travel in the environment of the server that needs them (or in `~/.pgpass`), never in a URL, which ends up in logs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlsplit

from fedlora.errors import ConfigError, FedloraError
from fedlora.files import home

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
class Postgres:
    """A database on a PostgreSQL server."""

    host: str
    port: int
    user: str
    name: str
    """Of the database; empty where only the server is meant."""
    password: str = field(default="", repr=False)
    sslmode: str = ""

    @property
    def shown(self) -> str:
        """The address without the password; may be written to logs and files."""
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"postgresql://{user}{host}:{self.port}" + (f"/{self.name}" if self.name else "")

    def url(self, driver: str) -> str:
        """For SQLAlchemy, without the password."""
        return self.shown.replace("postgresql://", f"postgresql+{driver}://", 1)

    def environ(self) -> dict[str, str]:
        """What both drivers read from the environment of their process."""
        given = {"PGPASSWORD": self.password, "PGSSLMODE": self.sslmode}
        return {name: value for name, value in given.items() if value}


@dataclass(frozen=True)
class Databases:
    """What the Prefect and the MLflow server are given."""

    prefect: Mapping[str, str] = field(repr=False)
    """Environment of the Prefect server; wins over what the process inherits."""
    mlflow: Mapping[str, str] = field(repr=False)
    server: str = ""
    """PostgreSQL server given as `--database`, without password; empty otherwise."""
    postgres: tuple[Postgres, ...] = ()
    """The databases that must be there before the servers start."""


def choose(option: str | None) -> Databases:
    """The databases of both servers: on the PostgreSQL server `option`, or those of the two variables, or SQLite files.

    Raises:
        ConfigError: an address that cannot be read, or one database for both servers.
    """
    if option:
        server = parse(option, OPTION)
        if server.name:
            raise ConfigError(
                f"{OPTION}: '{server.name}' names a database, but each server needs one of its own; {EXPECTED}, where "
                f"{' and '.join(_NAMES.values())} are used, or set {PREFECT_URL} and {MLFLOW_URL}"
            )
        each = [
            Postgres(server.host, server.port, server.user, name, server.password, server.sslmode)
            for name in _NAMES.values()
        ]
        prefect, mlflow = (
            {variable: at.url(_DRIVERS[variable]), **at.environ()} for variable, at in zip(_NAMES, each, strict=True)
        )
        return Databases(prefect, mlflow, server.shown, tuple(each))
    prefect, first = _from_environment(PREFECT_URL, home.sqlite_url(home.prefect_database(), "aiosqlite"))
    mlflow, second = _from_environment(MLFLOW_URL, home.sqlite_url(home.mlflow_database()))
    if first and second and (first.host, first.port, first.name) == (second.host, second.port, second.name):
        raise ConfigError(
            f"{PREFECT_URL} and {MLFLOW_URL} name the same database {first.shown}; each server needs one of its own, "
            "for both keep a table alembic_version"
        )
    return Databases(prefect, mlflow, "", tuple(each for each in (first, second) if each))


def parse(url: str, what: str) -> Postgres:
    """Read `postgresql://user:password@host:port/name?sslmode=…`; `what` names the option in errors.

    Raises:
        ConfigError: it cannot be read. The message does not hold the address, which may hold a password.
    """
    parts = urlsplit(url)
    if parts.scheme.partition("+")[0] not in ("postgresql", "postgres"):
        scheme = parts.scheme or "nothing"
        raise ConfigError(f"{what}: the address begins with '{scheme}'; {EXPECTED}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"{what}: the port is not a number up to 65535; {EXPECTED}") from None
    if not host:
        raise ConfigError(f"{what}: the address names no host; {EXPECTED}")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return Postgres(host, port or 5432, user, unquote(parts.path.strip("/")), password, _sslmode(parts, what))


def _sslmode(parts: SplitResult, what: str) -> str:
    query = parse_qs(parts.query)
    unknown = query.keys() - {"sslmode", "ssl"}
    if unknown:
        raise ConfigError(f"{what}: unknown setting '{min(unknown)}' in the address; only sslmode is read there")
    return next(iter(query.get("sslmode", query.get("ssl", []))), "")


def _from_environment(variable: str, default: str) -> tuple[dict[str, str], Postgres | None]:
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
    at = parse(url, variable)
    if not at.name:
        raise ConfigError(f"{variable} names no database; expected postgresql://USER@HOST:PORT/NAME")
    return {variable: at.url(_DRIVERS[variable]), **at.environ()}, at


def prepare(databases: Databases) -> list[str]:
    """Connect to every PostgreSQL database and create those that are missing; returns the names of the new ones.

    Raises:
        FedloraError: no driver, no answer, wrong password, or the user may not create a database. One line.
    """
    return [each.name for each in databases.postgres if _create(each)]


def _create(at: Postgres) -> bool:
    driver = _driver()
    try:
        _connect(driver, at, at.name).close()
        return False
    except driver.OperationalError as error:
        if "does not exist" not in str(error) or f'"{at.name}"' not in str(error):
            raise _unreachable(at, error) from None
    try:
        connection = _connect(driver, at, "postgres")
        connection.autocommit = True  # CREATE DATABASE does not run in a transaction
        try:
            with connection.cursor() as cursor:
                cursor.execute(f'CREATE DATABASE "{at.name.replace(chr(34), chr(34) * 2)}"')
        finally:
            connection.close()
    except driver.errors.DuplicateDatabase:  # somebody else was quicker
        return False
    except driver.OperationalError as error:
        raise _unreachable(at, error) from None
    except driver.Error as error:
        raise FedloraError(
            f"database {at.name} is missing on {at.shown} and cannot be created ({_first_line(error)}); ask its "
            f"administrator for: CREATE DATABASE {at.name} OWNER {at.user or 'YOU'}"
        ) from None
    return True


def _driver() -> Any:
    try:
        return importlib.import_module("psycopg2")
    except ImportError:
        raise FedloraError(
            "PostgreSQL needs the driver psycopg2, which is not installed: pip install 'fedlora[postgresql]'"
        ) from None


def _connect(driver: Any, at: Postgres, name: str) -> Any:
    optional = {"user": at.user, "password": at.password, "sslmode": at.sslmode}
    given = {key: value for key, value in optional.items() if value}
    return driver.connect(host=at.host, port=at.port, dbname=name, connect_timeout=10, **given)


def _unreachable(at: Postgres, error: Exception) -> FedloraError:
    reason = _first_line(error)
    if "password" in reason or "no pg_hba.conf entry" in reason:
        return FedloraError(
            f"the PostgreSQL server refuses {at.shown} ({reason}); set PGPASSWORD or a line in ~/.pgpass, or give the "
            "right user"
        )
    return FedloraError(
        f"the PostgreSQL server of {at.shown} cannot be reached ({reason}); is it running, and are host and port right?"
    )


def _first_line(error: Exception) -> str:
    """What PostgreSQL says, without the repeated `connection to server at …`."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.rpartition("failed: ")[2].removeprefix("FATAL:").removeprefix("ERROR:").strip()
