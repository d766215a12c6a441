"""The one place on disk where everything is kept unless told otherwise: `$FEDLORA_HOME`, or `~/.fedlora`.

Nothing depends on the working directory.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from fedlora.errors import ConfigError


def home() -> Path:
    """The absolute root folder (not created here).

    Raises:
        ConfigError: its path holds what no address of a database or data set can carry.
    """
    found = Path(os.environ.get("FEDLORA_HOME") or Path.home() / ".fedlora").expanduser().absolute()
    _check(str(found))
    return found


def _check(path: str) -> None:
    """What none of SQLAlchemy, MLflow and datasets can be given, however it is quoted, is refused before it is used."""
    if "::" in path:
        what = "'::', at which data sets split a path into two files"
    elif bad := next((letter for letter in path if not letter.isprintable()), None):
        undecodable = "\udc80" <= bad <= "\udcff"
        what = f"the byte {ord(bad) - 0xDC00:#04x}, which is not UTF-8" if undecodable else f"the character {bad!a}"
    else:
        return
    shown = path.encode("utf-8", "backslashreplace").decode()
    shown = "".join(letter if letter.isprintable() else "?" for letter in shown)
    raise ConfigError(f"FEDLORA_HOME={shown} holds {what}; choose a folder without it")


def sqlite_url(file: Path, driver: str = "") -> str:
    """The address of a SQLite database, for SQLAlchemy: of exactly this file, whatever characters its path has.

    A `?` begins the options of an address, so such a path is written as SQLite's own `file:` address, percent-encoded.
    The driver is named there because MLflow takes what follows a bare `sqlite:///` for a path, and makes its folder.
    """
    path, scheme = str(file), f"sqlite+{driver}" if driver else "sqlite"
    if not {"?", "%"} & set(path):
        return f"{scheme}:///{path}"
    from sqlalchemy import URL  # which releases quote a `%` in an address and which do not, it knows itself

    if "?" not in path:
        return URL.create(scheme, database=path).render_as_string()
    named = f"sqlite+{driver or 'pysqlite'}"
    return URL.create(named, database=f"file:{quote(path)}", query={"uri": "true"}).render_as_string()


def runs() -> Path:
    """Run folders."""
    return home() / "runs"


def copies() -> Path:
    """Copies, that are worked on, of run folders which are kept in a store elsewhere."""
    return home() / "copies"


def sweeps() -> Path:
    """Sweep folders: the comparison table and pictures of several runs."""
    return home() / "sweeps"


def cache() -> Path:
    """Tokenised data sets, shared by runs."""
    return home() / "cache"


def data_dir() -> Path | None:
    """The user's folder of data sets, `$FEDLORA_DATA_DIR`, if it is set."""
    value = os.environ.get("FEDLORA_DATA_DIR")
    return Path(value).expanduser().absolute() if value else None


def mlflow_database() -> Path:
    """SQLite file of the default tracking store."""
    return home() / "mlflow.db"


def mlflow_artifacts() -> Path:
    """Artifacts of the default tracking store."""
    return home() / "mlartifacts"


def mlflow_auth_database() -> Path:
    """SQLite file with the users of MLflow, and hashes of their passwords, where `fedlora up` asks for them."""
    return home() / "mlflow-auth.db"


def mlflow_auth_file() -> Path:
    """Settings of MLflow's authentication; holds no password."""
    return home() / "mlflow-auth.ini"


def prefect_database() -> Path:
    """SQLite file of the default Prefect server."""
    return home() / "prefect.db"


def services_file() -> Path:
    """What `fedlora up` started: process ids, ports and URLs."""
    return home() / "services.json"


def logs() -> Path:
    """Logs of the servers and the worker that `fedlora up` starts."""
    return home() / "logs"
