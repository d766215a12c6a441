"""Whether everything still works with the packages of this environment: what `make test-newest` asks of the newest.

    .venv/newest/bin/python benchmarks/newest.py [--out docs/data/newest.json]

Runs the demo's run as a user would, in a home of its own, then the tests in which real servers plan and start what is
scheduled, answer with their pages, and hand adapters to and from PEFT. Writes the date and the versions if all is well.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("prefect", "mlflow", "sqlalchemy", "fastapi", "transformers", "peft", "datasets", "torch")
"""Those whose releases have broken something, or could."""
TESTS = (
    "tests/deployments/local/test_automations.py",
    "tests/deployments/local/test_services.py",
    "tests/flows/test_federated.py",
    "tests/mlflow_tracking/test_tracking.py",
    "tests/fedlora/strategies/test_peft_oracle.py",
    "tests/fedlora/adapter/test_adapter.py",
    "tests/fedlora/exchange/test_merging.py",
    "tests/fedlora/model/test_model.py",
)


def demo() -> float:
    """The accuracy of the demo's run, through the command line.

    Raises:
        SystemExit: it failed; its output has been shown.
    """
    with tempfile.TemporaryDirectory(prefix="fedlora-newest-") as home:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        environ |= {"FEDLORA_HOME": home, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "fedlora_cli", "run", "demo", "--run-dir", f"{home}/run"]
        done = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout)
        if done.returncode:
            raise SystemExit("RED: the demo's run failed")
        from fedlora import metrics
        from fedlora.run import rounds
        from fedlora.run.runfolder import RunFolder

        *_, last = rounds.records(RunFolder(Path(home, "run")))
        return last.metrics[f"{metrics.GLOBAL}accuracy"]


def tests(words: list[str]) -> int:
    """How many tests passed.

    Raises:
        SystemExit: one failed, or none ran.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-n", "2", "--dist", "loadfile"]
        command += ["-p", "no:cacheprovider", f"--junitxml={results}"]
        code = subprocess.run([*command, *TESTS, *words], cwd=ROOT, check=False).returncode
        suites = ElementTree.parse(results).getroot().iter("testsuite") if results.exists() else []
        counted = [{key: int(suite.get(key, 0)) for key in ("tests", "skipped")} for suite in suites]
    passed = sum(each["tests"] - each["skipped"] for each in counted)
    if code or not passed:
        raise SystemExit("RED: see above which test failed")
    return passed


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where date and versions are written if everything is green")
    options, words = parser.parse_known_args()  # the others are pytest's
    versions = {name: re.sub(r"\+.*", "", version(name)) for name in PACKAGES}
    print("with", ", ".join(f"{name} {number}" for name, number in versions.items()), flush=True)
    accuracy = demo()
    result: dict[str, Any] = {
        "green": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "demo_accuracy": accuracy,
        "tests_passed": tests(words),
    }
    print("GREEN:", json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
