"""Python files that come with a model run only where the user said so, and nothing else that is loaded is code."""

import ast
import json
from pathlib import Path

import pytest
import yaml

from fedlora.config import ModelConfig, yamltext
from fedlora.errors import ModelError
from fedlora.exchange import inference
from fedlora.exchange.description import description
from fedlora.exchange.peftfolder import DESCRIPTION
from fedlora.model import base as model
from fedlora.model import provenance
from fedlora.run.runfolder import RunFolder

ROOT = Path(__file__).parents[3]
PACKAGES = ("fedlora", "mlflow_tracking", "tasks", "flows", "deployments")
CODE = """
from pathlib import Path
from transformers import BertConfig, BertModel

Path({marker!r}).touch()


class OwnConfig(BertConfig):
    model_type = "own-bert"


class OwnModel(BertModel):
    config_class = OwnConfig
"""
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "torch.load",
    "torch.hub.load",
    "pd.read_pickle",
    "pandas.read_pickle",
    "yaml.unsafe_load",
    "yaml.full_load",
    "eval",
    "exec",
}


@pytest.fixture
def own_code(small_bert, tmp_path, monkeypatch):
    """A model whose architecture is a Python file in its folder, and the file that tells whether it ran."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder, marker = small_bert(), tmp_path / "it-ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-bert", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    return folder, marker


def test_code_of_a_model_is_refused_in_one_line(own_code):
    folder, marker = own_code
    config = ModelConfig(name=str(folder), pooling="mean")
    for load in (lambda: model.load_base(config, ["a", "b"]), lambda: model.check_length(config, 8)):
        with pytest.raises(ModelError, match=r"needs Python files .*model\.trust_remote_code=true") as refused:
            load()
        assert "\n" not in str(refused.value)
    assert not marker.exists()
    assert provenance.remote_code_notice(config) == ""


def test_code_of_a_model_runs_where_it_is_allowed_and_is_announced(own_code):
    folder, marker = own_code
    config = ModelConfig(name=str(folder), pooling="mean", trust_remote_code=True)
    assert type(model.load_base(config, ["a", "b"]).encoder).__name__ == "OwnModel"
    assert marker.exists()
    assert str(folder) in provenance.remote_code_notice(config)
    before = provenance.of_model(config)
    (folder / "own.py").write_text("")
    assert provenance.of_model(config) != before  # the code is part of what is recorded


def test_an_adapter_cannot_allow_code(own_code, tmp_path):
    folder, marker = own_code
    content = {"model": {"name": str(folder), "pooling": "mean", "trust_remote_code": True}, "labels": ["a", "b"]}
    (tmp_path / DESCRIPTION).write_text(json.dumps(content))
    assert description(tmp_path)[0].trust_remote_code is False
    with pytest.raises(ModelError):
        inference.load_adapter(tmp_path)
    assert not marker.exists()


def test_a_run_that_allows_code_has_a_tag(configure, tmp_path):
    from mlflow_tracking import tracker

    plain = RunFolder.create(tmp_path / "plain", configure())
    allowing = RunFolder.create(tmp_path / "allowing", configure({"model.trust_remote_code": True}))
    assert "fedlora.trust_remote_code" not in tracker._tags(plain, None)
    assert tracker._tags(allowing, None)["fedlora.trust_remote_code"] == "true"
    assert allowing.config.digest() != plain.config.digest()


def _dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _could_run_code(tree):
    """Lines of a module that could make code of what they read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            if any(name.partition(".")[0] in FORBIDDEN_IMPORTS for name in names):
                yield node.lineno, f"imports {names[0]}"
        if not isinstance(node, ast.Call):
            continue
        called, given = _dotted(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
        if called in FORBIDDEN_CALLS or (called == "yaml.load" and given.get("Loader") != "_Loader"):
            yield node.lineno, f"calls {called}"
        if given.get("allow_pickle", "False") != "False":
            yield node.lineno, f"{called} allows pickles"
        if given.get("trust_remote_code", "False") not in ("False", "config.trust_remote_code"):
            yield node.lineno, f"{called} trusts remote code"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "yaml.load(text, Loader=yaml.Loader)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_the_search_finds(line):
    assert list(_could_run_code(ast.parse(line)))


def test_nothing_of_ours_makes_code_of_what_it_reads():
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    found = [(str(path), *line) for path in files for line in _could_run_code(ast.parse(path.read_text()))]
    assert len(files) > 50
    assert found == []
    assert issubclass(yamltext._Loader, yaml.SafeLoader | getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def test_data_sets_cannot_bring_code():
    """Since version 4, which is required, `datasets` refuses those that are programs."""
    import inspect

    import datasets

    assert "trust_remote_code" not in inspect.signature(datasets.load_dataset).parameters
    assert "Dataset scripts are no longer supported" in inspect.getsource(datasets.load)
