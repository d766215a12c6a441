"""What `fedlora aggregate` refuses: exit code 2, one line that names the client and the tensor or key, nothing left.

All cases go through the command line's own `main`.
"""

import io
import json
import os
import pickle
import re
import signal
import struct
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedlora_cli import app as cli

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q", "v"], "modules_to_save": ["head"]}
CONFIG |= {"task_type": "SEQ_CLS"}
Q, V = "base_model.model.enc.q.", "base_model.model.enc.v."
NAN, INF = float("nan"), float("inf")


def tensors(seed=0, rank=2):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        f"{Q}lora_A.weight": (rank, 5),
        f"{Q}lora_B.weight": (7, rank),
        f"{V}lora_A.weight": (rank, 6),
        f"{V}lora_B.weight": (4, rank),
        "base_model.model.head.weight": (3, 4),
    }
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def write(folder, content=None, **config):
    """A PEFT folder; values of None are left out of the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors() if content is None else content, folder / "adapter_model.safetensors")
    kept = {key: value for key, value in (CONFIG | config).items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(kept))


def with_tensors(change, **config):
    """A client whose tensors were changed: a function on the dictionary."""

    def make(folder):
        content = tensors(1)
        change(content)
        write(folder, {name: tensor.contiguous() for name, tensor in content.items()}, **config)

    return make


def setting(name, value):
    return with_tensors(lambda t: t.__setitem__(name, value(t[name]) if callable(value) else value))


def filled(name, value):
    return with_tensors(lambda t: t[name].view(-1)[-1:].fill_(value))


def with_config(**config):
    return lambda folder: write(folder, tensors(2), **config)


def with_text(text):
    def make(folder):
        write(folder)
        (folder / "adapter_config.json").write_text(text)

    return make


def with_bytes(content):
    def make(folder):
        write(folder)
        place = folder / "adapter_model.safetensors"
        place.write_bytes(content(place.read_bytes()) if callable(content) else content)

    return make


def header(entries, length=None, body=b"\0" * 8):
    raw = json.dumps(entries).encode() if isinstance(entries, dict) else entries
    return with_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)


def instead(name, make=None):
    """A folder with something else in place of the weights, or of the configuration."""

    def build(folder):
        write(folder)
        place = folder / name
        place.unlink(missing_ok=True)
        if make:
            make(place)

    return build


def bin_only(folder):
    write(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def sharded(folder):
    write(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model-00001-of-00002.safetensors")
    (folder / "adapter_model.safetensors.index.json").write_text("{}")


def one_factor(content):
    content.pop(f"{Q}lora_B.weight")


def drop(module):
    return with_tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith(module)])


def magnitude(size, **config):
    return with_tensors(
        lambda t: t.update({f"{Q}lora_magnitude_vector": torch.ones(size), f"{V}lora_magnitude_vector": torch.ones(4)}),
        **config,
    )


HUGE = {"dtype": "F32", "data_offsets": [0, 8]}
A_OF_Q, B_OF_Q = rf"bob: tensor '{Q}lora_A\.weight'", rf"bob: tensor '{Q}lora_B\.weight'"
UNREADABLE = r"bob/adapter_model\.safetensors cannot be read as safetensors"
NO_FOLDER = r"bob is no PEFT adapter folder: adapter_config\.json cannot be read"

FOLDERS = {
    "nan": (filled(f"{Q}lora_A.weight", NAN), f"{A_OF_Q} has values that are not finite"),
    "infinity": (filled(f"{Q}lora_B.weight", -INF), f"{B_OF_Q} has values that are not finite"),
    "nan in the head": (filled("base_model.model.head.weight", NAN), "bob: tensor '.*head.weight' has values"),
    "beyond fp32": (setting(f"{Q}lora_A.weight", lambda t: t.double() * 1e60), f"{A_OF_Q} has values .* in fp32"),
    "missing module": (drop(V), r"bob: module 'enc\.v' is missing \(compared with .*alice\)"),
    "extra module": (
        with_tensors(lambda t: t.update({n.replace("enc.q", "enc.k"): t[n] + 1 for n in list(t) if "enc.q" in n})),
        r"bob: module 'enc\.k' is not expected",
    ),
    "missing head": (drop("base_model.model.head"), r"bob: tensor 'head\.weight' is missing"),
    "extra head": (setting("base_model.model.head.bias", torch.ones(3)), r"bob: tensor 'head\.bias' is not expected"),
    "shape of A": (setting(f"{Q}lora_A.weight", torch.ones(2, 9)), r"bob: module 'enc\.q' is 7 × 9, but 7 × 5"),
    "shape of the head": (
        setting("base_model.model.head.weight", torch.ones(4, 3)),
        r"bob: tensor 'head\.weight' has shape \(4, 3\), but \(3, 4\) in .*alice",
    ),
    "transposed B": (setting(f"{Q}lora_B.weight", lambda t: t.T), r"bob: module 'enc\.q': factors do not fit"),
    "one dimension": (setting(f"{Q}lora_A.weight", torch.ones(10)), r"bob: module 'enc\.q': factors do not fit"),
    "three dimensions": (setting(f"{Q}lora_A.weight", torch.ones(2, 5, 1)), r"bob: module 'enc\.q': factors do not"),
    "no B": (with_tensors(one_factor), r"bob: module 'enc\.q' has no lora_B\.weight"),
    "rank 0": (
        with_tensors(
            lambda t: t.update({f"{Q}lora_A.weight": torch.ones(0, 5), f"{Q}lora_B.weight": torch.ones(7, 0)})
        ),
        r"tensor '.*lora_A\.weight' has shape \(0, 5\); expected dimensions from 1",
    ),
    "rank 0 and declared": (
        with_tensors(
            lambda t: t.update({f"{Q}lora_A.weight": torch.ones(0, 5), f"{Q}lora_B.weight": torch.ones(7, 0)}),
            rank_pattern={"q": 0},
        ),
        r"tensor '.*lora_A\.weight' has shape \(0, 5\); expected dimensions from 1",
    ),
    "integers": (setting(f"{Q}lora_A.weight", torch.ones(2, 5, dtype=torch.int32)), "tensor '.*' is of type I32"),
    "fp8": (setting(f"{Q}lora_A.weight", lambda t: t.to(torch.float8_e4m3fn)), "tensor '.*' is of type F8_E4M3"),
    "unknown factor": (setting(f"{Q}lora_E", torch.ones(2, 1)), "bob: parameter '.*lora_E' is not understood"),
    "a tensor twice": (setting("enc.q.lora_A.weight", torch.ones(2, 5)), "bob: .* a tensor under two names"),
    "no factors": (with_tensors(lambda t: [t.pop(name) for name in list(t) if "lora" in name]), "bob: no LoRA factors"),
    "unprintable name": (setting("x\n\x1b[2Jy", torch.ones(1)), r"bob/.*: tensor 'x\\n\\x1b\[2Jy' has a name"),
    "factors of HiRA": (
        with_tensors(
            lambda t: t.update({f"{Q}hira_A": t.pop(f"{Q}lora_A.weight"), f"{Q}hira_B": t.pop(f"{Q}lora_B.weight")})
        ),
        r"bob: the factors of module 'enc\.q' are not those of lora",
    ),
    "another kind of layer": (
        with_tensors(lambda t: t.update({f"{Q}lora_embedding_{p}": t.pop(f"{Q}lora_{p}.weight") for p in "AB"})),
        r"bob: module 'enc\.q' is of another kind of layer",
    ),
    "magnitudes without DoRA": (magnitude(7), r"bob: the magnitude vector of module 'enc\.q' is not expected"),
    "DoRA without magnitudes": (with_config(use_dora=True), r"bob: the magnitude vector of module 'enc\.q' is missing"),
    "DoRA beside LoRA": (magnitude(7, use_dora=True), "bob is a dora adapter, but .*alice is lora"),
    "rsLoRA beside LoRA": (with_config(use_rslora=True), r"bob has alpha/r 2\.12132, but .*alice has 1\.5"),
    "truncated": (with_bytes(lambda content: content[:-3]), UNREADABLE),
    "empty": (with_bytes(b""), UNREADABLE),
    "no safetensors": (with_bytes(b"PK\x03\x04 says it is a zip file" * 40), UNREADABLE),
    "pickle by another name": (with_bytes(pickle.dumps({"a": 1}) * 9), UNREADABLE),
    "header beyond the file": (header({}, length=90_000_000), UNREADABLE),
    "header of an exabyte": (header({}, length=2**60), UNREADABLE),
    "shape beyond all memory": (header({"x": HUGE | {"shape": [2**40, 2**40]}}), UNREADABLE),
    "shape beyond the file": (header({"x": HUGE | {"shape": [2**30, 2]}}), UNREADABLE),
    "offsets beyond the file": (
        header({"x": {"dtype": "F32", "shape": [2**33], "data_offsets": [0, 2**35]}}),
        UNREADABLE,
    ),
    "lines in the header": (
        header(b'{"x\\nerror: y\\u001b[2J":{"dtype":"F32","shape":[9],"data_offsets":[0,8]}}'),
        UNREADABLE,
    ),
    "pickle": (bin_only, r"bob: adapter_model\.bin is a pickle"),
    "several files": (sharded, r"bob: the weights are in several files \(adapter_model\.safetensors\.index\.json\)"),
    "no weights": (instead("adapter_model.safetensors"), r"bob is no .*: adapter_model\.safetensors is missing"),
    "a folder as weights": (
        instead("adapter_model.safetensors", Path.mkdir),
        r"adapter_model\.safetensors is not a file",
    ),
    "a pipe as weights": (instead("adapter_model.safetensors", os.mkfifo), r"adapter_model\.safetensors is not a file"),
    "a pipe as configuration": (instead("adapter_config.json", os.mkfifo), rf"{NO_FOLDER} \(not a file\)"),
    "a dangling link": (
        instead("adapter_model.safetensors", lambda p: p.symlink_to("x")),
        r"adapter_model\.safetensors is",
    ),
    "no configuration": (instead("adapter_config.json"), NO_FOLDER),
    "no folder": (lambda folder: None, NO_FOLDER),
    "a file": (lambda folder: folder.write_text(""), NO_FOLDER),
    "configuration cut off": (with_text('{"r": 2'), NO_FOLDER),
    "configuration of bytes": (lambda f: (write(f), (f / "adapter_config.json").write_bytes(b"\xff\0")), NO_FOLDER),
    "nested without end": (with_text('{"r":' + "[" * 200_000), NO_FOLDER),
    "a key twice": (with_text(json.dumps(CONFIG)[:-1] + ', "r": 4}'), rf"{NO_FOLDER} \(key 'r' is there twice\)"),
    "a list": (with_text("[1]"), r"adapter_config\.json should hold keys and values"),
    "another method": (with_config(peft_type="IA3"), "bob/.*: peft_type is 'IA3'; expected LORA or HIRA"),
    "no method": (with_config(peft_type=None), "bob/.*: peft_type is None"),
    "lines in the method": (with_config(peft_type="a\nb"), r"bob/.*: peft_type is 'a\\nb'"),
    "another rank": (with_config(r=8), r"bob: module 'enc\.q' has rank 2, but adapter_config\.json says r=8"),
    "another rank by pattern": (
        with_config(rank_pattern={"v": 1}),
        r"bob: module 'enc\.v' has rank 2, but .* says r=1",
    ),
    "mixed alpha/r": (with_config(lora_alpha=4), r"bob has alpha/r 2, but .*alice has 1\.5"),
    "mixed alpha/r within": (
        with_config(alpha_pattern={"v": 4}),
        r"bob has alpha/r 2, but .*alice has 1\.5 \(module 'enc\.v'\)",
    ),
    "another task": (with_config(task_type="CAUSAL_LM"), "bob: task_type is 'CAUSAL_LM', but 'SEQ_CLS' in .*alice"),
    "other biases": (with_config(bias="all"), "bob: bias is 'all', but 'none' in .*alice"),
    "another orientation": (with_config(fan_in_fan_out=True), "bob: fan_in_fan_out is True, but False in .*alice"),
    "another tying": (with_config(ensure_weight_tying=True), "bob: ensure_weight_tying is True, but False in .*alice"),
    "a wrapper that cannot be told": (
        with_tensors(lambda t: t.update({n.replace("base_model.model.", "module."): t.pop(n) for n in list(t)})),
        r"bob: tensor 'module\.\S+' has something before or instead of 'base_model\.model\.'",
    ),
    "a wrapper that nobody knows": (
        with_tensors(lambda t: t.update({f"engine.{n}": t.pop(n) for n in list(t)})),
        r"bob: tensor 'engine\.base_model\.\S+' has something before",
    ),
    "a tensor with and without a wrapper": (
        setting(f"_orig_mod.{Q}lora_A.weight", torch.ones(2, 5)),
        "bob: .* a tensor under two names",
    ),
    "parts of FSDP's": (
        setting("base_model.model.enc._fsdp_wrapped_module._flat_param", torch.ones(9)),
        "bob: tensor '.*_flat_param' is a part of FSDP's",
    ),
    "LoftQ": (with_config(init_lora_weights="loftq"), "bob/.*'loftq' changes the base weights; PEFT does not convert"),
    "alpha 0": (with_config(lora_alpha=0), "bob/.*: lora_alpha is 0; expected a positive number"),
    "alpha nan": (with_text(json.dumps(CONFIG | {"lora_alpha": NAN})), "bob/.*: lora_alpha is nan"),
    "alpha in words": (with_config(lora_alpha="3"), "bob/.*: lora_alpha is '3'"),
    "hostile rank_pattern": (with_config(rank_pattern={"(.*.*)*(a+)+$": 2}), "bob/.*: pattern '.*' is not understood"),
    "hostile alpha_pattern": (with_config(alpha_pattern={"(([a-z])+.)+[A-Z]": 2}), "bob/.*: pattern '.*' is not under"),
    "pattern without end": (with_config(rank_pattern={".*a" * 999: 2}), "bob/.*: the regular expressions .* too long"),
    "pattern no mapping": (with_config(rank_pattern=["q"]), r"bob/.*: rank_pattern is \['q'\]; expected whole"),
    "modules_to_save": (with_config(modules_to_save=["(a+)+"]), r"bob/.*: modules_to_save is \['\(a\+\)\+'\]; exp"),
    "PiSSA": (
        with_config(init_lora_weights="pissa_niter_4"),
        "bob/.*: init_lora_weights='pissa_niter_4' changes the base",
    ),
    "links out of the folder": (
        instead("adapter_config.json", lambda p: p.symlink_to("/etc/hostname")),
        rf"{NO_FOLDER} \(adapter_config\.json is a link that leads out of the folder",
    ),
    "a base update that is a pipe": (instead("base_delta.safetensors", os.mkfifo), "bob has a base update"),
    "alpha beyond floats": (with_text(json.dumps(CONFIG | {"lora_alpha": 10**400})), "bob/.*: lora_alpha is 1000"),
    "modules_to_save of a number": (with_config(modules_to_save=1), "bob/.*: modules_to_save is 1; expected names"),
    "activated LoRA": (with_config(alora_invocation_tokens=[1]), "bob/.*: alora_invocation_tokens is set"),
}

GOOD = {"alice": with_tensors(lambda t: None), "bob": with_config()}
DORA = dict.fromkeys(GOOD, magnitude(7, use_dora=True))
MIXED = GOOD | {"bob": lambda folder: write(folder, tensors(1, 3), r=3, lora_alpha=4.5)}
CROSSED = {  # both of rank 3, in different modules
    who: lambda f, a=a, b=b: write(
        f,
        {n: t for rank, part in ((a, "enc.q"), (b, "enc.v")) for n, t in tensors(1, rank).items() if part in n},
        r=3, lora_alpha=4.5, rank_pattern={"q": a, "v": b}, alpha_pattern={"q": 1.5 * a, "v": 1.5 * b},
    )
    for who, a, b in (("alice", 3, 2), ("bob", 2, 3))
}  # fmt: skip
LARGE = dict.fromkeys(GOOD, with_tensors(lambda t: [tensor.mul_(1e30) for tensor in t.values()]))
WITH_BASE = dict.fromkeys(GOOD, setting(f"{Q}base_layer.weight", torch.ones(7, 5)))
NO_WEIGHTS = {who: lambda folder: write(folder, {}) for who in GOOD}

OTHERS = {
    "negative weight": (GOOD, ["--weights", "1,-1"], "bob: its weight -1 is not allowed"),
    "weights of zero": (GOOD, ["--weights", "0,0"], "all weights are zero"),
    "weight nan": (GOOD, ["--weights", "nan,1"], "alice: its weight nan is not allowed"),
    "weight infinity": (GOOD, ["--weights", "1,inf"], "bob: its weight inf is not allowed"),
    "weights without a sum": (GOOD, ["--weights", "1e308,1e308"], "the weights are too large"),
    "a weight too few": (GOOD, ["--weights", "1"], "1 weight for 2 clients"),
    "weights in words": (GOOD, ["--weights", "one,two"], "--weights one,two cannot be read"),
    "rank 0 wanted": (GOOD, ["--strategy", "svd", "--ranks", "2,0"], r"ranks \[2, 0\] for 2 clients"),
    "rank too high": (GOOD, ["--strategy", "svd", "--ranks", "2,9"], r"9 is above the smaller side of module 'enc\.q'"),
    "ranks for adapters of their own": (
        GOOD,
        ["--strategy", "local", "--per-client", "--ranks", "2,2"],
        "strategy local gives every client its own adapter back",
    ),
    "a rank too few": (GOOD, ["--strategy", "svd", "--ranks", "2"], r"ranks \[2\] for 2 clients"),
    "unknown strategy": (GOOD, ["--strategy", "fedlt"], "unknown strategy 'fedlt'. Did you mean 'fedit'"),
    "unknown option": (GOOD, ["--option", "energy=1"], "strategy_options.energy=1"),
    "nothing to aggregate": (GOOD, ["--strategy", "centralised"], "there is nothing to aggregate"),
    "a trained core": (GOOD, ["--strategy", "ravan"], "PEFT folders do not hold"),
    "mixed ranks": (MIXED, [], r"strategy fedit cannot aggregate .* \(clients of rank \[2, 3\]\)"),
    "mixed ranks by module": (CROSSED, ["--strategy", "fedex-lora"], "strategy fedex-lora cannot aggregate"),
    "no shared A": (GOOD, ["--strategy", "ffa-lora"], r"bob: A of module 'enc\.q' differs from that of .*alice"),
    "DoRA and the base": (DORA, ["--strategy", "flora"], "strategy flora cannot aggregate these adapters .dora."),
    "a base weight within": (WITH_BASE, ["--strategy", "flora"], r"alice holds the base weight of 'enc\.q'"),
    "beyond fp32": (LARGE, ["--strategy", "flexlora"], "the result of flexlora for tensor '.*' is too large for fp32"),
    "no tensors": (NO_WEIGHTS, [], "alice: no LoRA factors"),
    "personal": (GOOD, ["--strategy", "local"], "add --per-client"),
    "out is full": (GOOD, ["--out", "{there}/full"], "full is there already"),
    "out is a file": (GOOD, ["--out", "{there}/file"], "file is there already"),
    "out is a dangling link": (GOOD, ["--out", "{there}/link"], "link is there already"),
    "out with too long a name": (GOOD, ["--out", "{there}/" + "x" * 300], "File name too long; choose another"),
    "out within a file": (GOOD, ["--out", "{there}/file/x"], "file is no folder that can be written"),
    "report is a folder": (GOOD, ["--report", "{there}/full"], "the report cannot be written to .*full"),
    "report within a file": (GOOD, ["--report", "{there}/file/x"], "the report cannot be written to .*file/x"),
    "report is the output": (GOOD, ["--report", "{there}/out"], "the report cannot be written to .*out"),
    "report in place of a result": (GOOD, ["--report", "{there}/out/README.md"], "README.md, which is part of"),
}  # fmt: skip


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def called(words):
    """Exit code, output and errors of the command line."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["fedlora", *words])
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = "traceback"
    signal.signal(signal.SIGTERM, before)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Every case's (exit code, output, errors) and what it left behind."""
    cases = {name: (GOOD | {"bob": bob}, []) for name, (bob, _) in FOLDERS.items()}
    cases |= {f"{name} (call)": (who, words) for name, (who, words, _) in OTHERS.items()}
    calls, places = [], []
    for who, words in cases.values():
        place = tmp_path_factory.mktemp("case")
        (place / "full").mkdir()
        (place / "full" / "something").touch()
        (place / "file").touch()
        (place / "link").symlink_to("nowhere")
        for name, make in who.items():
            make(place / name)
        fixed = ["--strategy", "fedit", "--out", str(place / "out"), "--report", str(place / "report.json")]
        clients = [str(place / name) for name in who]
        calls.append(["aggregate", *fixed, *(word.format(there=place) for word in words), *clients])
        places.append((place, tree(place)))
    done = [called(words) for words in calls]
    left = [(set(tree(place)) ^ set(before)) for place, before in places]
    return dict(zip(cases, zip(done, left, strict=True), strict=True))


def check(case, pattern):
    (code, out, err), left = case
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert re.search(pattern, err), err
    assert left == set()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_client_that_is_refused(refused, name):
    check(refused[name], FOLDERS[name][1])


@pytest.mark.parametrize("name", OTHERS)
def test_a_call_that_is_refused(refused, name):
    check(refused[f"{name} (call)"], OTHERS[name][2])
