"""The wheel claims one name in site-packages besides its launcher, and its command line works from there."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, unpacked."""
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("wheel")
    built = next(iter(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])))
    zipfile.ZipFile(built).extractall(folder / "site")
    return folder / "site"


def test_generic_names_stay_out_of_site_packages(wheel):
    top = {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"fedlora", "fedlora_cli", "fedlora_pipeline"}
    inside = {path.name for path in (wheel / "fedlora_pipeline").iterdir()}
    assert inside == {"flows", "tasks", "mlflow_tracking", "deployments"}


def test_model_data_and_their_licences_are_in_the_wheel(wheel):
    assets = wheel / "fedlora" / "assets"
    for name in (
        "bert-tiny/model.safetensors",
        "bert-tiny/LICENSE",
        "wordnet-nouns/train.parquet",
        "wordnet-nouns/LICENSE",
        "wordnet-definitions/train.parquet",
        "wordnet-definitions/LICENSE",
    ):
        assert (assets / name).stat().st_size > 500
    assert list(wheel.glob("*.dist-info/licenses/NOTICE"))


def test_the_command_line_runs_from_the_wheel(wheel, tmp_path):
    code = "import fedlora_cli, sys; sys.argv = ['fedlora', 'datasets']\n"
    code += "try: fedlora_cli.main()\nexcept SystemExit: pass\n"
    code += "import flows, fedlora; print(flows.__file__); print(fedlora.__file__)"
    environ = {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True, timeout=60
    )
    assert "wordnet-nouns" in done.stdout
    assert done.stdout.count(str(wheel)) == 2
