"""Groups that no column names."""

import json

import numpy as np
import pytest

from fedlora.config import DataConfig, configfile
from fedlora.data import dialogues, likeness
from fedlora.errors import DataError
from fedlora.run import preflight

SHIPS = ["the ship sails over the sea", "a ship and its sail at sea", "sea, ship and harbour"]
BREADS = ["flour makes the bread", "bread of rye flour", "the oven bakes bread"]


def test_texts_that_share_words_are_a_cluster():
    found = likeness.clusters(2, SHIPS + BREADS, ["a ship", "some bread"], seed=0)
    assert len(set(found.train[:3])) == len(set(found.train[3:])) == 1
    assert found.test.tolist() == [found.train[0], found.train[3]]
    assert found.test[0] != found.test[1]
    assert "ship" in found.names[found.train[0]] or "sea" in found.names[found.train[0]]
    assert "bread" in found.names[found.train[3]]


def test_the_same_seed_gives_the_same_clusters():
    texts = [f"{word} {other}" for word in "abcdefghij".upper() for other in ("red blue", "green", "yellow pink")]
    one, same = (likeness.clusters(3, texts, texts, seed=4) for _ in range(2))
    assert one.names == same.names
    assert np.array_equal(one.train, same.train)
    assert np.array_equal(one.train, one.test)


def test_responses_by_length_are_groups_of_like_size():
    found = likeness.lengths(4, ["x" * n for n in range(1, 101)], ["x", "x" * 60, "x" * 500])
    assert np.bincount(found.train).tolist() == pytest.approx([25] * 4, abs=1)
    assert found.test.tolist() == [0, 2, 3]
    assert found.names[0] == "up to 25 characters"
    assert found.names[3].startswith("above 75")


@pytest.mark.parametrize("by", ["clusters:1", "clusters:99", "lengths:1"])
def test_a_number_of_groups_that_cannot_be_is_refused(by):
    kind, groups = likeness.asked(by)
    with pytest.raises(DataError, match=rf"partition.by={by} on 6 training examples; expected 2 to 6"):
        getattr(likeness, kind)(groups, SHIPS + BREADS, SHIPS, *([0] if kind == "clusters" else []))


def test_texts_without_words_and_of_one_length_are_refused():
    with pytest.raises(DataError, match="cannot be told apart by words"):
        likeness.clusters(2, ["1", "2", "the"], ["1"], 0)
    with pytest.raises(DataError, match="all responses are of one length"):
        likeness.lengths(2, ["ab", "cd"], ["ef"])


@pytest.mark.parametrize("by", ["clusters:3", "lengths:3"])
def test_dialogues_are_dealt_by_them(writing, tmp_path, by):
    file = tmp_path / "sums.jsonl"
    rows = [
        {"prompt": f"{SHIPS[i % 3] if i % 2 else BREADS[i % 3]} {i}", "response": "so " * (i % 9 + 1)}
        for i in range(90)
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    draft = dialogues.read(DataConfig(name=str(file)), by, 0)
    assert len(draft.labels) == 3
    assert set(draft.train["label"].to_pylist()) == {0, 1, 2}
    config = configfile.build(
        {**writing, "data.name": str(file), "partition.by": by, "partition.name": "dirichlet", "partition.alpha": 0.5}
    )
    assert preflight.check(config).dealt.labels == 3
