"""YAML of settings: what is plain is read, everything else is refused before it is made."""

import pytest

from deployments.shipped import PRESETS, SWEEPS
from fedlora.config import configfile
from fedlora.config.yamltext import parse
from fedlora.errors import ConfigError, FedloraError
from fedlora.sweep import plan as sweeps


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 2001-99-99", {"a": "2001-99-99"}),
        ("2024-01-31", "2024-01-31"),
        ("2024-01-31T12:00:00Z", "2024-01-31T12:00:00Z"),
        ("{4: 0.5, 16: 0.5}", {4: 0.5, 16: 0.5}),
        ("[0x10, 1_000, .5, -1.0e+3, ~, true, text]", [16, 1000, 0.5, -1000.0, None, True, "text"]),
        ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
        ("a: &x {c: 1}\nb: {<<: *x, d: 2}", {"a": {"c": 1}, "b": {"c": 1, "d": 2}}),
        ("a: &x {c: 1, d: 1}\nb: &y {<<: *x, d: 2}\nc: {<<: *y, c: 3}", {
            "a": {"c": 1, "d": 1}, "b": {"c": 1, "d": 2}, "c": {"c": 3, "d": 2},
        }),
        ("a: &x {c: 1}\nb: {<<: *x, <<: {d: 2}}", {"a": {"c": 1}, "b": {"c": 1, "d": 2}}),
        ("a: &x {c: 1}\nb: *x\nc: {c: *x}", {"a": {"c": 1}, "b": {"c": 1}, "c": {"c": {"c": 1}}}),
        ("", None),
    ],
)  # fmt: skip
def test_plain_values(text, value):
    assert parse(text) == value


def laughs(value):
    """Ten levels, each with nine of the one before."""
    levels = (f"a{n + 1}: &a{n + 1} {value.format(', '.join([f'*a{n}'] * 9))}" for n in range(10))
    return "a0: &a0 {k: v}\n" + "\n".join(levels)


REFUSED = {
    "a billion laughs": (laughs("[{}]"), "aliases written out it has more than 1000000"),
    "a billion merged keys": (laughs("{{<<: [{}]}}"), "aliases written out it has more than 1000000"),
    "a list that holds itself": ("a: &a [*a]", "line 1: 'a' holds itself"),
    "a mapping that holds itself": ("a: &a\n  b: *a", "line 1: 'a' holds itself|line 2: 'a' holds itself"),
    "deep": ("[" * 100_000, "line 1: nested deeper than 30 levels"),
    "large": ("x" * 1_000_001, "1000001 characters; at most 1000000 are read"),
    "a set": ("a: !!set {x}", "could not determine a constructor"),
    "bytes": ("a: !!binary aGk=", "could not determine a constructor"),
    "a date by its tag": ("a: !!timestamp 2001-99-99", "could not determine a constructor"),
    "an object": ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "no number": ("a: !!int ''", "a value does not fit its tag"),
    "no truth value": ("a: !!bool maybe", "a value does not fit its tag"),
    "an endless number": ("a: 0x" + "f" * 9000, "a number of 9002 characters"),
    "an endless number of base 60": ("a: 1" + ":59" * 300_000, "a number of 900001 characters"),
    "null as a key": ("~: 1", "the key None is not text"),
    "a truth value as a key": ("on: 1", "the key True is not text"),
    "a list as a key": ("? [a]\n: b", "unhashable|hashable"),
    "text and numbers as keys": ("{a: 1, 2: 3}", r"the keys \['a', 2\] are partly text, partly numbers"),
    "a section twice": ("training:\n  a: 7\nlora: 2\ntraining:\n  b: 1", "'training' is there twice, on lines 1 and 4"),
    "a key twice, deep": ("a:\n- b:\n    c: 1\n    'c': 2", "'c' is there twice, on lines 3 and 4"),
    "a number twice": ("{4: .5,\n 0x4: .5}", "'0x4' is there twice, on lines 1 and 2"),
    "a key twice in what is merged": ("a: &x\n  b: 1\n  b: 2\nc: {<<: *x}", "'b' is there twice, on lines 2 and 3"),
    "two documents": ("a: 1\n---\nb: 2", "line 2, column 1 but found another document"),
    "a null byte": ("a: \0", "control characters are not allowed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_in_one_line(name):
    text, said = REFUSED[name]
    with pytest.raises(ValueError, match=said) as refused:
        parse(text)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400


TWICE = "training: {batch_size: 4}\nlora.rank: 2\ntraining: {local_steps: 3}\n"


@pytest.mark.parametrize(
    "read",
    [
        configfile.load,
        lambda file: configfile.load(file.stem, {}, file.parent),
        lambda file: sweeps.load(str(file), None, PRESETS, SWEEPS),
        lambda file: sweeps.load(file.stem, None, PRESETS, file.parent),
    ],
    ids=["run", "preset", "sweep file", "sweep"],
)
def test_a_section_given_twice_is_refused_with_both_lines(tmp_path, read):
    file = tmp_path / "mine.yaml"
    file.write_text(TWICE)
    with pytest.raises(
        ConfigError, match=r"mine\.yaml is not valid YAML: .*'training' is there twice, on lines 1 and 3"
    ):
        read(file)


@pytest.mark.parametrize(
    "words",
    [
        ["lora.ranks={4: .5, 4: .5}"],
        ["seed=0x" + "f" * 5000], ["name=!!int ''"], ["name=&a [*a]"], ["strategy_options=!!set {a}"],
        ["lora.ranks={a: 1, 2: 3}"],
        ["seed=" + "9" * 5000], ["x" * 9000 + "=1"], ["data.label=\x1b[2J"], ["x\ny=1"], ["lora.rank=" + "x" * 9000],
    ],
)  # fmt: skip
def test_words_of_a_command_line(words):
    with pytest.raises(ConfigError) as refused:
        configfile.build(configfile.parse_overrides(words))
    assert len(str(refused.value)) < 1000
    assert str(refused.value).isprintable()


def test_a_date_is_a_name():
    assert configfile.build(configfile.parse_overrides(["name=2024-01-31"])).name == "2024-01-31"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: s\ngrid: {" + ", ".join(f"k{n}: [1, 2, 3, 4, 5]" for n in range(30)) + "}", "runs are too many"),
        ("name: s\nbase: \"\\x1b[2J\"\ngrid: {seed: [1]}", "unknown preset"),
        (f"name: s\nbase: {'x' * 300}.yaml\ngrid: {{seed: [1]}}", "no such file"),
        ("name: s\nbase: '~nobody/x.yaml'\ngrid: {seed: [1]}", "no such file"),
        ("name: s\ngrid: {strategy_options: [{a: 1, 2: 3}]}", "partly text"),
    ],
)  # fmt: skip
def test_files_of_sweeps(tmp_path, text, said):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(FedloraError, match=said) as refused:
        sweeps.load(str(tmp_path / "s.yaml"), None, PRESETS, SWEEPS)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["x" * 300 + ".yaml", "a\0b.yaml", "~nobody/x.yaml"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(ConfigError, match="no such file"):
        configfile.load(name)
