"""Settings: files and words that are valid or nearly, as values that Hypothesis can draw and make smaller."""

# ruff: noqa: E501 (tables of odd values)
import re

import yaml
from hypothesis import strategies as st

from fedlora.config import configfile
from fedlora.strategies import registry
from tests.fuzz.folders import long

KEYS = st.sampled_from(
    [*configfile.dotted_keys(), "lora", "training", "strategy_options.heads", "strategy_options.energy"]
)
# fmt: off
ODD = st.sampled_from([
    None, True, False, 0, 1, 2, 3, -1, 0.5, 1.0, 2.5, 10**20, 10**400, 1e-300, 1e300, float("nan"), float("inf"), "", "x",
    "auto", "cpu", "cuda:0", "cuda:x", "2", "2,4", "1e3", "null", "a\nb\x1b[2J", "<x × 5000>", "\u202e", "é", "../../etc",
    [], [1], [2, 4, 8], ["query", "value"], [None], [[1]], {}, {"a": 1}, {4: 0.5, 16: 0.5}, {4: 1}, {"low": 2, "high": 4},
    {"low": 2, "high": 4, "share": 0.5}, {"low": "x"}, {"rank": 4}, {"heads": 2}, {"energy": 2}, {"a": {"b": [1, {"c": 2}]}},
    {1: {2: {3: 4}}}, "svd", "dirichlet", "iid", "lora", "dora", "hira", "adamw", "bf16", "threads", "natural-id",
]) | st.sampled_from(registry.names()) | st.integers(-3, 40) | st.floats(width=32) | st.text(max_size=5)
YAML = [
    "&a [*a]", "&a {b: *a}", "*a", "*nowhere", "&a", "!!python/object/apply:os.system [ls]", "!!set {a}", "!!binary aGk=",
    "!!timestamp 2001-99-99", "2001-99-99", "2001-01-01", "!!int ''", "!!float x", "!!bool maybe", "!!null x", "!!omap [a: 1]",
    "<[ × 3000>", "<{a: × 3000>", "<- × 3000>", "? [a]\n: b", "? {a: b}\n: c", "<<: 3", "<<: *a", "<<: [{seed: 1}]", "=: 1",
    "~: 1", "yes: no", "1: 2", "1.5: 2", ".nan: 1", "0x<f × 5000>", "0xffffffffff", "0o7", "1:59:59", "<1 × 5000>", "\0", "\ufeff",
    '"\\ud800"', '"\\U0010ffff"', "\t", "\n---\n", "\n...\n", "%YAML 9.9\n---\n", "# c", "|", ">", "'", '"', "{", "}", "[", "]",
    ":", "- ", ",", "@", "`", "!", "!x", "!!x", "\n", " ", "\r", "\x85", "\u2028", "é", "seed: 1", "\nseed: 1\n", "\n  seed: 1\n",
    "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]\n",
    "a: &a {k: v}\nb: &b {<<: [*a,*a,*a,*a,*a,*a]}\nc: &c {<<: [*b,*b,*b,*b,*b,*b]}\nd: &d {<<: [*c,*c,*c,*c,*c,*c]}\ne: &e {<<: [*d,*d,*d,*d,*d,*d]}\nf: &f {<<: [*e,*e,*e,*e,*e,*e]}\ng: {<<: [*f,*f,*f,*f,*f,*f]}\n",
]
SNIPPETS = st.sampled_from(YAML)
RUNS = st.sampled_from([
    {}, {"strategy": "svd"}, {"strategy": "ravan", "strategy_options": {"heads": 2}}, {"lora": {"rank": 4, "ranks": [1, 2]}, "clients": 2, "strategy": "svd"},
    {"lora": {"ranks": {2: 0.5, 4: 0.5}}, "strategy": "flexlora"}, {"training": {"local_steps": None, "local_epochs": 1}},
    {"name": "a", "seed": 3, "data": {"client": "who"}, "partition": {"name": "natural-id"}}, {"strategy": "hetlora", "lora": {"ranks": {"low": 2, "high": 4, "share": 0.2}}},
])
SWEEPS = st.sampled_from([
    {"name": "s", "grid": {"strategy": ["fedit", "svd"], "seed": [0, 1]}},
    {"name": "s", "base": "demo", "set": {"rounds": 2, "lora.rank": 2}, "grid": {"lora.variant": ["lora", "dora"], "strategy": ["flora"]}},
    {"name": "s", "cells": [{"seed": 1}, {"lora": {"ranks": [1, 2]}, "clients": 2, "strategy": "svd"}], "skip": [{"seed": 9, "reason": "x"}]},
    {"name": "s", "grid": {"seed": [1, 2], "strategy": ["fedit"]}, "skip": [{"seed": [1]}], "champion": False},
])
PARTS = st.sampled_from(["name", "base", "set", "grid", "cells", "skip", "champion", "x"])
# fmt: on


def put(content, key, value):
    """A dotted key, where the content still has sections."""
    node, (*sections, last) = content, key.split(".")
    for name in sections:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            return
    node[last] = long(value)


def put_yaml(content, key, snippet):
    """A value in YAML as it stands."""
    put(content, key, f"YAML{snippet}YAML")


def put_within(content, part, key, value):
    """A key and value in one part of a sweep file."""
    there = content.get(part)
    if part in ("set", "grid"):
        value = long(value) if part == "set" else [long(value), 1]
        content[part] = {**(there if isinstance(there, dict) else {}), key: value}
    else:
        content[part] = [*(there if isinstance(there, list) else []), {key: long(value)}]


def insert(text, at, snippet, keep):
    at %= len(text) + 1
    return text[:at] + written_out(snippet) + text[at + keep :]


def written_out(snippet):
    """With `<x × 3>` within as `xxx`."""
    return re.sub(r"<([^<>]*? × \d+)>", lambda found: long(found[0]), snippet)


def flip(content, at, bit):
    found = bytearray(content or b"\0")
    found[at % len(found)] ^= 1 << bit
    return bytes(found)


PLACE = st.integers(0, 400)
RUN_CHANGES = st.lists(
    st.tuples(st.just(put), KEYS, ODD) | st.tuples(st.just(put_yaml), KEYS, st.integers(0, len(YAML) - 1)), max_size=3
)
SWEEP_CHANGES = st.lists(
    st.tuples(st.just(put_within), st.sampled_from(["set", "grid", "cells", "skip"]), KEYS, ODD)
    | st.tuples(st.just(put), PARTS, ODD)
    | st.tuples(st.just(put_yaml), PARTS, st.integers(0, len(YAML) - 1)),
    max_size=2,
)
TEXT_CHANGES = st.lists(
    st.tuples(st.just(insert), PLACE, SNIPPETS | st.text(max_size=6), st.integers(0, 12)), max_size=2
)
BYTE_CHANGES = st.just([]) | st.lists(st.tuples(st.just(flip), PLACE, st.integers(0, 7)), max_size=2)


def files(contents, changes):
    """(content, changes of it, of its text, of its bytes) of a file; raw bytes now and then."""
    whole = st.tuples(contents, changes, TEXT_CHANGES, BYTE_CHANGES)
    return whole | whole | whole | st.binary(max_size=80)


def made(case):
    """The bytes of a file."""
    if isinstance(case, bytes):
        return case
    content, changes, texts, flips = case
    content = yaml.safe_load(yaml.safe_dump(content))  # drawn values are shared between cases
    for change, *arguments in changes:
        change(content, *arguments)
    text = yaml.safe_dump(content, allow_unicode=True)
    text = re.sub(r"YAML(\d+)YAML", lambda found: written_out(YAML[int(found[1])]), text)
    for change, *arguments in texts:
        text = change(text, *arguments)
    found = text.encode("utf-8", "surrogatepass")
    for change, *arguments in flips:
        found = change(found, *arguments)
    return found


def word(key, value):
    return f"{key}={long(value) if isinstance(value, str) else value}"


WORDS = st.lists(
    st.builds(word, KEYS, ODD)
    | st.builds(word, KEYS, SNIPPETS)
    | st.builds(word, st.text(max_size=6), ODD)
    | st.text(max_size=12),
    max_size=4,
)
