"""A small set of texts with owners, as the user's own file would hold it, and the packaged tokenizer."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

import fedlora.config

ASSETS = Path(fedlora.__file__).parent / "assets"
ANIMALS, PLANTS, TOOLS = (("cat", "dog", "hen"), ("oak", "fern", "rose", "a tall larch"), ("saw", "axe"))


@pytest.fixture(autouse=True)
def _no_data_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDLORA_DATA_DIR", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def rows() -> list[dict]:
    """90 rows of three classes in unequal numbers, four owners, lengths from 1 to 12 words."""
    kinds = ["animal"] * 40 + ["plant"] * 30 + ["tool"] * 20
    words = {"animal": ANIMALS, "plant": PLANTS, "tool": TOOLS}
    return [
        {"text": " ".join([words[kind][i % len(words[kind])]] * (1 + i % 12)), "label": kind, "owner": f"farm {i % 4}"}
        for i, kind in enumerate(kinds)
    ]


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSETS / "bert-tiny")
