"""Adapter folders: valid ones, and what can be wrong with them, as values that Hypothesis can draw and make smaller."""

# ruff: noqa: E501, SIM905 (tables of odd values)
import json
import os
import struct
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
VALUES = np.random.default_rng(0).standard_normal(4096).astype("<f4").tobytes()


@dataclass
class Draft:
    """A folder before it is written: `tensors[name]` is [type, shape, fill]; `header` and `files` change it after."""

    tensors: dict
    config: object
    files: dict = field(default_factory=dict)
    header: list = field(default_factory=list)
    raw: list = field(default_factory=list)

    def weights(self):
        entries, values = {}, b""
        for name, (dtype, shape, fill) in self.tensors.items():
            part = _values(dtype, shape, fill)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(values), len(values) + len(part)]}
            values += part
        text = json.dumps(entries)
        for change in self.header:
            text = change(text)
        head = text.encode("utf-8", "surrogatepass")
        content = struct.pack("<Q", len(head)) + head + values
        for change in self.raw:
            content = change(content)
        return content

    def write(self, folder):
        folder.mkdir(parents=True)
        config = self.config if isinstance(self.config, str) else json.dumps(self.config)
        (folder / WEIGHTS).write_bytes(self.weights())
        (folder / CONFIG).write_bytes(config.encode("utf-8", "surrogatepass"))
        for name, kind in self.files.items():
            _put(folder / name, kind)


def _values(dtype, shape, fill):
    count = 1
    for size in shape:
        count *= size if isinstance(size, int) and not isinstance(size, bool) else 1
    if not 0 <= count <= 5000:  # the header says more than there is
        return b""
    length = count * SIZES.get(dtype, 4)
    if fill is not None and dtype in ("F32", "F64"):
        return np.full(count, fill, "<f4" if dtype == "F32" else "<f8").tobytes()
    if dtype == "F64":
        return np.frombuffer(VALUES, "<f4")[np.arange(count) % 4096].astype("<f8").tobytes()
    pool = VALUES if dtype == "F32" else b"\x3c\x3d\x38\x3a" * 4096
    return (pool * (length // len(pool) + 1))[:length]


def _put(path, kind):
    if path.is_file():
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "circle":
        path.symlink_to(path.name)
    elif kind == "outside":
        path.symlink_to("/proc/self/environ")
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind != "missing":
        path.write_bytes(kind)


# -- valid folders ------------------------------------------------------------------------------------------------

SHAPES = {"enc.q": (7, 5), "enc.v": (4, 6), "layers.0.mlp": (3, 9), "wide": (1, 600), "tall": (600, 1)}
"""Of the last two, a product is far larger than its factors."""


def draft(variant="lora", rank=2, modules=3, head=True, dtype="F32"):
    """A valid folder with the first so many of the modules."""
    shapes, prefix = dict(list(SHAPES.items())[:modules]), PREFIX
    a, b = ("hira_A", "hira_B") if variant == "hira" else ("lora_A.weight", "lora_B.weight")
    tensors = {}
    for module, (d_out, d_in) in shapes.items():
        tensors[f"{prefix}{module}.{a}"] = [dtype, [rank, d_in], None]
        tensors[f"{prefix}{module}.{b}"] = [dtype, [d_out, rank], None]
        if variant == "dora":
            tensors[f"{prefix}{module}.lora_magnitude_vector"] = [dtype, [d_out], None]
    if head:
        tensors[f"{prefix}head.weight"] = [dtype, [3, 4], None]
    config = {"peft_type": "HIRA" if variant == "hira" else "LORA", "r": rank, "target_modules": list(shapes)}
    config |= {"base_model_name_or_path": "base", "task_type": "SEQ_CLS", "modules_to_save": ["head"] if head else None}
    if variant != "hira":
        config |= {"lora_alpha": 2 * rank, "use_dora": variant == "dora", "use_rslora": variant == "rslora"}
    return Draft(tensors, config)


# -- what can be wrong --------------------------------------------------------------------------------------------------


def _nth(mapping, index):
    return list(mapping)[index % len(mapping)] if mapping else None


def rename(d, index, name):
    old, name = _nth(d.tensors, index), long(name)
    d.tensors = {name if n == old else n: value for n, value in d.tensors.items()}


def drop(d, index):
    d.tensors.pop(_nth(d.tensors, index), None)


def add(d, name, dtype, shape):
    d.tensors[long(name)] = [dtype, shape, None]


def put(d, index, place, value):
    """A type (0), a shape (1) or a fill (2)."""
    if (name := _nth(d.tensors, index)) is not None:
        d.tensors[name][place] = value


def dim(d, index, axis, value):
    """One dimension of one tensor."""
    name = _nth(d.tensors, index)
    if name is not None and d.tensors[name][1]:
        shape = list(d.tensors[name][1])
        shape[axis % len(shape)] = value
        d.tensors[name][1] = shape


def rank(d, value):
    """The same strange rank in every factor and in the configuration: they still fit."""
    for name, tensor in d.tensors.items():
        if "_A" in name:
            tensor[1] = [value, *tensor[1][1:]]
        elif "_B" in name:
            tensor[1] = [*tensor[1][:-1], value]
    config(d, "r", value)


def config(d, key, value):
    if isinstance(d.config, dict):
        d.config[key] = long(value)


def config_text(d, text):
    d.config = long(text)


def config_cut(d, at, insert):
    text, insert = d.config if isinstance(d.config, str) else json.dumps(d.config), long(insert)
    at %= len(text) + 1
    d.config = text[:at] + insert + text[at + len(insert) :]


def header(d, at, insert, keep):
    d.header.append(lambda t: t[: at % (len(t) + 1)] + long(insert) + t[at % (len(t) + 1) + keep :])


def again(d, index):
    """An entry of the header a second time."""
    d.header.append(lambda text: _edited(text, lambda entries: _twice(text, entries, _nth(entries, index))))


def offsets(d, index, first, last):
    def moved(entries):
        entries[_nth(entries, index)]["data_offsets"] = [first, last]
        return json.dumps(entries)

    d.header.append(lambda text: _edited(text, moved))


def _twice(text, entries, name):
    return f"{text[:-1]}, {json.dumps(name)}: {json.dumps(entries[name])}}}"


def _edited(text, change):
    try:
        return change(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return text


def flip(d, at, bit):
    def flipped(content):
        found = bytearray(content or b"\0")
        found[at % len(found)] ^= 1 << bit
        return bytes(found)

    d.raw.append(flipped)


def cut(d, at):
    d.raw.append(lambda content: content[: at % (len(content) + 1)])


def append(d, more):
    d.raw.append(lambda content: content + more)


def length(d, value):
    """The first 8 bytes: how long the header says it is."""
    d.raw.append(lambda content: struct.pack("<Q", value) + content[8:])


def instead(d, content):
    d.raw.append(lambda _: content)


def file(d, name, kind):
    d.files[name] = kind


def long(value):
    """`<[ × 2000>` in place of two thousand of them, which Hypothesis would print all the time."""
    if isinstance(value, str) and value[:1] == "<" and value[-1:] == ">" and " × " in value:
        letters, _, times = value[1:-1].rpartition(" × ")
        return letters * int(times)
    return value


def fault(change, *arguments):
    return st.tuples(st.just(change), *arguments)


# fmt: off
NAMES = st.sampled_from([
    "", "x", "lora_A.weight", f"{PREFIX}.lora_A.weight", f"{PREFIX}enc.q.lora_B.weight", f"{PREFIX}enc.q.lora_core",
    "enc.q.lora_A.weight", f"{PREFIX}enc.q.lora_magnitude_vector", f"{PREFIX}enc.q.lora_embedding_A", "../../x",
    f"{PREFIX}enc.q.base_layer.weight", "\x00", "a\nb", "é.lora_A.weight", "\ud800", "<😀 × 300>", "<n × 5000>",
    "__metadata__", f"{PREFIX}enc.q.lora_A.weight.lora_A.weight", f"{PREFIX}enc.q.hira_A", "a.lora_x", "٣.lora_B.weight",
]) | st.text(max_size=12)
DIMS = st.sampled_from([0, 1, 2, 3, 5, 7, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, -1, 1.5, True, None, "2"])
ODD = st.sampled_from([
    None, True, False, 0, 1, -1, 2, 3.5, 10**18, 10**400, 1e-320, 1e308, float("nan"), float("inf"), "", "2", "q",
    "(a+)+$", "a\nb\x1b[2J", "<x × 3000>", "\ud800", [], ["q"], ["(a+)+$"], [[["q"]]], [1], [None], {}, {"q": 2},
    {"q": "2"}, {"(.*a){30}": 2}, {".*": 2}, {"q": None}, {"q": [1]}, {"parent_library": "os"}, "../../etc/passwd",
    {"q": 1e300}, {"^enc.q": 3}, "pissa", "eva", "gaussian", "all", "IA3", "HIRA", "lora", "PROMPT_TUNING", "\u202ex",
]) | st.recursive(st.none() | st.integers(-9, 9) | st.text(max_size=3), lambda t: st.lists(t, max_size=3), max_leaves=4)
KEYS = st.sampled_from(
    """r lora_alpha rank_pattern alpha_pattern target_modules modules_to_save peft_type use_dora use_rslora task_type
    base_model_name_or_path auto_mapping exclude_modules layers_to_transform layers_pattern init_lora_weights bias
    trainable_token_indices fan_in_fan_out lora_dropout megatron_config megatron_core lora_bias layer_replication revision
    runtime_config loftq_config eva_config target_parameters hira_dropout inference_mode peft_version x""".split()
)
KINDS = st.sampled_from([
    "folder", "pipe", "circle", "outside", "zero", "dangling", "missing", b"", b"{}", b"[]", b"null", b"\xff\xfe",
    b"\x80\x04K\x01.", b"PK\x03\x04", b"\x02\0\0\0\0\0\0\0{}", b'{"model": {}, "labels": [1]}',
    b'{"model": {"name": "bert-tiny"}, "labels": ["a"], "max_length": 9}', b'{"model": 3, "labels": {}, "max_length": 1}',
    b'{"model": {"name": "\\ud800", "x": [[[]]]}, "labels": ["a"], "max_length": 9}', b'{"labels": [[]]}',
]) | st.binary(max_size=40)
FILES = st.sampled_from([
    WEIGHTS, CONFIG, "fedlora.json", "base_delta.safetensors", "adapter_model.bin", f"{WEIGHTS}.index.json", "README.md",
])
TEXTS = st.sampled_from([
    "", "{", "}", "[", '"', ",", ":", "\\", "0", "<9 × 5000>", "<[ × 2000>", "-", "1e999", "NaN", "\0", "é", '"\\ud800"',
    '"__metadata__":{"a":1},', "null", '"dtype"', "<  × 50>",
])
CONFIGS = st.sampled_from(["", "[]", "null", "3", '"x"', "{", '<{"r": × 2000>', "<[ × 2000>", "[[" * 20 + "]]" * 20])
FILLS = st.sampled_from([float("nan"), float("inf"), 0.0, 3e38, -3e38, 1e-45, 1e25, 1.0])
LENGTHS = st.sampled_from([0, 1, 2, 100, 2**31, 2**63, 2**64 - 1])
INDEX, PLACE = st.integers(0, 9), st.integers(0, 2000)
DTYPES = st.sampled_from([*SIZES, "F8_E4M3", "F4", "", "f32", "C64"])
# fmt: on

TENSOR_FAULTS = [
    fault(rename, INDEX, NAMES),
    fault(drop, INDEX),
    fault(add, NAMES, DTYPES, st.lists(DIMS, max_size=4)),
    fault(put, INDEX, st.just(0), DTYPES),
    fault(put, INDEX, st.just(1), st.lists(DIMS, max_size=10)),
    fault(put, INDEX, st.just(2), FILLS),
    fault(dim, INDEX, st.integers(0, 1), DIMS),
    fault(rank, DIMS | st.integers(1, 12)),
]
CONFIG_FAULTS = [*[fault(config, KEYS, ODD)] * 4, fault(config_text, CONFIGS)]
FILE_FAULTS = [
    fault(config_cut, PLACE, TEXTS),
    fault(header, PLACE, TEXTS, st.integers(0, 9)),
    fault(again, INDEX),
    fault(offsets, INDEX, DIMS, DIMS),
    fault(flip, PLACE, st.integers(0, 7)),
    fault(cut, PLACE),
    fault(append, st.binary(min_size=1, max_size=9)),
    fault(length, LENGTHS),
    fault(instead, st.binary(max_size=60)),
    *[fault(file, FILES, KINDS)] * 3,
]
FAULTS = st.one_of(*TENSOR_FAULTS, *CONFIG_FAULTS, *FILE_FAULTS)


def made(choice, faults):
    """The draft of a choice with the faults in it."""
    found = draft(*choice)
    for change, *arguments in faults:
        change(found, *arguments)
    return found


def choices(variants=("lora", "lora", "rslora", "dora", "hira"), ranks=(1, 2, 3)):
    """What `draft` takes: of every variant, with one to three modules, in several precisions."""
    return st.tuples(
        st.sampled_from(variants),
        st.sampled_from(ranks),
        st.integers(1, len(SHAPES)),
        st.booleans(),
        st.sampled_from(["F32", "F32", "F32", "F16", "BF16", "F64"]),
    )


def faulty(most=3):
    """(choice, faults) of a folder; no fault leaves it valid."""
    return st.tuples(choices(), st.lists(FAULTS, max_size=most))
