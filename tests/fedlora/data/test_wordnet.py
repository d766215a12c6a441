import re
from collections import Counter

import pyarrow.parquet as pq
import pytest

from fedlora.config import DataConfig
from fedlora.data import dialogues, sources, wordnet
from fedlora.errors import DataError

HEADER = "  1 This software and database is being provided to you  \n  2 by Princeton University.  \n"


def line(number: int, gloss: str, offset: int = 1) -> str:
    return f"{offset:08d} {number:02d} n 01 word 0 000 | {gloss}  "


@pytest.mark.parametrize(
    ("gloss", "expected"),
    [
        ("a domesticated carnivorous mammal; kept as a pet", "a domesticated carnivorous mammal"),
        ('a loud noise "what a din"; "din of war"', "a loud noise"),
        ("(music) (usually plural) the sixth note (of a scale)", "the sixth note (of a scale)"),
        ("(only a remark)", "(only a remark)"),
        ('in insects: "an eye"', "in insects"),
    ],
)
def test_definition_is_the_gloss_without_examples_and_remarks(gloss, expected):
    assert wordnet.parse(line(5, gloss)) == (expected, "animal")


@pytest.mark.parametrize("text", [HEADER.splitlines()[0], line(5, '"only an example"'), line(5, ""), "00001 05 n"])
def test_lines_without_definition_are_left_out(text):
    assert wordnet.parse(text) is None


def test_a_definition_of_two_classes_is_left_out_and_a_repeated_one_kept_once():
    lines = [line(5, "one"), line(5, "one"), line(5, "both"), line(20, "both"), line(20, "two")]
    assert wordnet.definitions(lines) == {"animal": ["one"], "plant": ["two"]}


def test_capped_counts_sum_up_keep_the_cap_and_the_order_of_sizes():
    sizes = {f"class {i}": 40 * (i + 1) for i in range(20)}
    counts = wordnet.capped(1000, sizes)
    assert sum(counts.values()) == 1000
    assert max(counts.values()) == 90
    assert [counts[label] for label in sizes] == sorted(counts.values())


@pytest.fixture
def source(tmp_path):
    lines = [line(number, f"definition {i} of {number}") for number in range(4, 24) for i in range(10 * number)]
    path = tmp_path / "data.noun"
    path.write_text(HEADER + "\n".join(lines))
    return path


def test_selection_is_stratified_disjoint_and_the_same_in_any_order_of_the_source(source):
    lines = source.read_text().splitlines()
    train, test = wordnet.select(wordnet.definitions(lines), train=400, test=100)
    assert (train, test) == wordnet.select(wordnet.definitions(reversed(lines)), train=400, test=100)
    assert len(set(train + test)) == 500
    in_train, in_test = (Counter(label for _, label in train), Counter(label for _, label in test))
    assert all(abs(in_test[label] - in_train[label] / 4) <= 1 for label in in_train)
    assert in_train["animal"] < in_train["phenomenon"]


def test_build_writes_parquet_licence_and_readme(source, tmp_path, monkeypatch):
    monkeypatch.setattr(wordnet.select, "__defaults__", (20, 400, 100))
    wordnet.build(source, tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "train.parquet")
    assert table.column_names == ["text", "label"]
    assert table.num_rows == 400
    assert (tmp_path / "out" / "LICENSE").read_text().splitlines() == [
        "This software and database is being provided to you",
        "by Princeton University.",
    ]
    assert "400 training and 100 test" in (tmp_path / "out" / "README.md").read_text()


def test_a_source_that_is_not_wordnet_is_refused(tmp_path):
    (tmp_path / "data.noun").write_text(line(5, "one"))
    with pytest.raises(DataError, match="has 1 noun classes, expected 20"):
        wordnet.build(tmp_path / "data.noun", tmp_path / "out")
    with pytest.raises(DataError, match="apt install wordnet-base"):
        wordnet.build(tmp_path / "absent", tmp_path / "out")


def test_a_source_with_too_few_definitions_is_refused(source):
    with pytest.raises(DataError, match=r"class '\w+' has \d+ definitions, \d+ are needed"):
        wordnet.select(wordnet.definitions(source.read_text().splitlines()))


def test_the_packaged_slice_is_what_its_readme_says():
    text = sources.load(DataConfig(), seed=0)
    counts = Counter(list(text.test["label"]))
    assert (len(text.train), len(text.test), len(text.labels)) == (8000, 2000, 20)
    assert max(counts.values()) / 2000 == 0.09
    assert not set(text.train["text"]) & set(text.test["text"])
    assert not any(re.search(r'"|^\(\w+\) ', one) for one in list(text.test["text"]))


INDEX = """  1 This software and database is being provided to you
dog n 2 1 @ 2 1 00000002 00000009
hot_dog n 1 3 @ ~ #p 1 1 00000003
frank n 1 1 @ 1 1 00000003
okapi n 1 1 @ 1 0 00000004
rome n 1 1 @ 1 1 00000005
cur n 1 1 @ 1 1 00000006
"""
NOUNS = """  1 This software and database is being provided to you
00000002 05 n 02 Canis 0 dog 0 001 @ 00000001 n 0000 | a domesticated animal; kept as a pet
00000003 13 n 02 hot_dog 0 frank 0 000 | a sausage "eat it"
00000004 05 n 01 okapi 0 000 | seldom in texts
00000005 15 n 01 Rome 0 000 | a name
00000006 05 n 01 cur 0 000 | (offensive) a term of abuse
00000009 06 n 01 dog 0 000 | another sense
"""


def test_terms_are_nouns_of_texts_in_their_usual_sense_and_one_for_each_definition():
    found = wordnet.terms(NOUNS.splitlines(), INDEX.splitlines())
    assert sorted(found) == [("dog", "a domesticated animal", "animal"), ("hot dog", "a sausage", "food")]
    assert found == wordnet.terms(reversed(NOUNS.splitlines()), INDEX.splitlines())


def test_of_every_kind_a_fifth_is_for_testing_and_small_kinds_are_left_out():
    found = [(f"{kind} {n}", f"what {kind} {n} is", kind) for kind, size in (("a", 100), ("b", 203), ("c", 99))
             for n in range(size)]  # fmt: skip
    train, test = wordnet.explained(found)
    assert Counter(row[2] for row in train) == {"a": 80, "b": 163}
    assert Counter(row[2] for row in test) == {"a": 20, "b": 40}
    assert ("Define the noun: a 99", "what a 99 is", "a") in train
    with pytest.raises(DataError, match="no kind has 100 nouns"):
        wordnet.explained(found[:99])


def test_definitions_are_built_beside_their_licence_and_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(wordnet, "SMALLEST_KIND", 5)
    named = [chr(97 + n // 26) + chr(97 + n % 26) for n in range(60)]
    lines = [f"{n:08d} {5 + n % 2:02d} n 01 {word} 0 000 | what {word} is" for n, word in enumerate(named)]
    (tmp_path / "data.noun").write_text(HEADER + "\n".join(lines))
    with pytest.raises(DataError, match=r"cannot read .*index\.noun"):
        wordnet.build_terms(tmp_path / "data.noun", tmp_path / "out")
    (tmp_path / "index.noun").write_text("".join(f"{word} n 1 0 1 1 {n:08d}\n" for n, word in enumerate(named)))
    wordnet.build_terms(tmp_path / "data.noun", tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "train.parquet").column_names == ["prompt", "response", "kind"]
    assert "by Princeton University." in (tmp_path / "out" / "LICENSE").read_text()
    assert "48 training and 12 test" in (tmp_path / "out" / "README.md").read_text()


def test_the_packaged_definitions_are_dialogues_with_natural_clients():
    text = sources.finish(dialogues.read(DataConfig(name="wordnet-definitions"), by=None, seed=0))
    train, test = (text.tables[split].to_pylist() for split in ("train", "test"))
    assert (len(train), len(test), len({row["client"] for row in train})) == (7501, 1866, 22)
    asked = {split: {row["messages"][0]["content"] for row in rows} for split, rows in (("a", train), ("b", test))}
    assert not asked["a"] & asked["b"]
    assert [each["content"] for row in test for each in row["messages"]].count("Define the noun: dog") <= 1
    assert all(re.match(r"Define the noun: [a-z0-9]", prompt) for prompt in asked["a"])
