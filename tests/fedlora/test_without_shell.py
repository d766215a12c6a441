"""The library stands alone: it runs where neither Prefect nor MLflow is installed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedlora
import fedlora.config

ROOT = Path(fedlora.__file__).parents[1]
FORBIDDEN = {"fedlora": {"prefect", "mlflow"}, "mlflow_tracking": {"prefect"}, "deployments": {"mlflow"}}
"""What a package may not import; `tests/test_house.py` looks at our own packages."""

ALONE = """
import json, sys
from pathlib import Path

REFUSED = ("prefect", "mlflow", "deployments", "mlflow_tracking", "tasks", "flows", "fedlora_cli")

sys.modules.update(dict.fromkeys(REFUSED))  # as if not installed, to those too who only ask (accelerate)
for name in REFUSED:
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} could be imported: this test proves nothing")

import fedlora
from fedlora.config import configfile

config = configfile.build(json.loads(sys.argv[1]))
records = fedlora.train(config, Path(sys.argv[2]))
print(json.dumps([record.metrics["global/accuracy"] for record in records]))
"""


def imported(source: str) -> set[str]:
    """The top-level names of everything that a module imports, wherever in it; its own package's are not named."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {str(a.value).split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return found


def test_the_check_sees_every_way_to_import():
    source = "import prefect.x\ndef f():\n    from mlflow.x import y\n    import_module('flows.x')\nfrom . import tasks"
    assert imported(source) == {"prefect", "mlflow", "flows"}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        str(path.relative_to(ROOT)): sorted(names)
        for path in files
        if (names := imported(path.read_text(encoding="utf-8")) & FORBIDDEN[package])
    }
    assert wrong == {}


def test_the_library_trains_where_prefect_and_mlflow_cannot_be_imported(tiny, finished, tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "alone.py"), json.dumps(tiny), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    accuracies = json.loads(done.stdout.splitlines()[-1])
    assert len(accuracies) == 3
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (finished() / name).read_bytes()


def test_the_public_functions_are_listed_though_nothing_is_imported():
    code = "import fedlora, sys; print(*dir(fedlora)); assert not {'torch', 'pydantic'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert set(fedlora.__all__) | {"__version__"} <= set(done.stdout.split())
    assert all(callable(getattr(fedlora, name)) for name in fedlora.__all__)
