"""The house: which room may import which, no circles, and nothing new at the root."""

import ast
import importlib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedlora", "deployments", "mlflow_tracking", "tasks", "flows", "fedlora_cli")
"""Each imports only those before it."""
ROOMS = (
    ("errors", "seeds", "sections"),
    ("files", "adapter", "updates"),
    ("strategies",),
    ("config",),
    ("model", "data", "objective"),
    ("training", "channel"),
    ("metrics",),
    ("exchange", "report"),
    ("run",),
    ("sweep", "testing"),
)
"""From the ground; each imports only its neighbours and those before it."""
AT_THE_ROOT = {"__init__", "errors", "seeds", "sections", "metrics", "testing", "updates"}
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in [*(ROOT / package).rglob("*.py"), *ROOT.glob(f"{package}.py")]
}


def imports(module: str, tree: ast.AST) -> Iterator[str]:
    """The modules of ours that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            known = name if name in MODULES else name.rpartition(".")[0]
            if known in MODULES and known != module:
                yield known


ARROWS = {module: sorted(set(imports(module, ast.parse(path.read_text("utf-8"))))) for module, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def test_the_check_sees_imports_wherever_they_are():
    source = (
        "from fedlora.run import jobs\ndef f():\n    import fedlora.errors\n    from fedlora.config import RunConfig\n"
    )
    assert set(imports("x", ast.parse(source))) == {"fedlora.run.jobs", "fedlora.errors", "fedlora.config"}


def test_packages_import_one_way():
    wrong = [
        f"{module} -> {used}"
        for module, found in ARROWS.items()
        for used in found
        if PACKAGES.index(used.split(".")[0]) > PACKAGES.index(module.split(".")[0])
    ]
    assert wrong == []


def test_rooms_import_one_way():
    wrong = [
        f"{module} -> {used}"
        for module, found in ARROWS.items()
        for used in found
        if module.startswith("fedlora.") and used.startswith("fedlora.") and FLOOR[room(used)] > FLOOR[room(module)]
    ]
    assert wrong == []


def test_there_are_no_circles():
    """`fedlora` itself imports its public names only when they are used."""
    arrows = {module: set(found) - {"fedlora"} for module, found in ARROWS.items() if module != "fedlora"}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_nothing_new_is_at_the_root():
    assert {path.stem for path in (ROOT / "fedlora").glob("*.py")} == AT_THE_ROOT
    assert {path.name for path in (ROOT / "fedlora").iterdir() if path.is_dir() and path.name[0] != "_"} == {
        *FLOOR.keys() - AT_THE_ROOT,
        "assets",
    }


@pytest.mark.parametrize("line", [
    "from fedlora import configfile",
    "from fedlora.adapter import Adapter, Factors",
    "from fedlora.config import RunConfig, Section",
    "from fedlora.model import load_base, resolve",
    "from fedlora.strategies.base import Family, Plan, ServerState, Strategy, advance, with_shared",
    "from fedlora.testing import check_strategy",
    "from fedlora.updates import Update, Updates",
])  # fmt: skip
def test_what_plug_ins_and_programs_import_is_where_it_was(line):
    exec(line, {})


SELDOM = [*(ROOT / "tests/browser").glob("*.py"), *(ROOT / "docs").glob("*.py")]
"""What neither mypy nor every run of the tests looks at."""


@pytest.mark.parametrize("path", SELDOM, ids=lambda path: path.name)
def test_what_is_run_seldom_names_what_is_there(path):
    """Of our own packages: `module.name` of what was imported, and what is imported itself."""
    tree, known = ast.parse(path.read_text("utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                owner = importlib.import_module(full if full in MODULES else node.module)
                known[alias.asname or alias.name] = owner if full in MODULES else getattr(owner, alias.name)
    named = [
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    assert [f"{name}.{attr}" for name, attr in named if name in known and not hasattr(known[name], attr)] == []
