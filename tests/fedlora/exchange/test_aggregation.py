"""`fedlora.aggregate` on folders that PEFT wrote: what PEFT computes from the output is compared with dense float64
arithmetic on the input files, for every strategy."""

import json
import math
import re
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import fedlora
from fedlora.exchange.aggregation import aggregate
from fedlora.strategies import registry

WEIGHTS = [3, 1, 2]
W = np.array(WEIGHTS) / sum(WEIGHTS)
S = 1.5
"""alpha/r of every client."""
EQUAL, MIXED = (3, 3, 3), (2, 4, 1)


SWEEPS = 6
OPTIONS = {"flora-na": {"max_sweeps": SWEEPS, "tolerance": 0}}
"""So that it stops where the dense version does."""


class Net(nn.Module):
    """An embedding, a linear layer, a Conv1D (weight d_in × d_out) and a head; no two sides are alike."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.up, self.conv, self.head = nn.Embedding(11, 6), nn.Linear(6, 9), Conv1D(5, 9), nn.Linear(5, 3)
        nn.init.normal_(self.conv.weight)

    def forward(self, ids):
        return self.head(self.conv(self.up(self.embed(ids)).mean(1)))


def bert():
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=20, num_labels=3, **sizes)
    return transformers.BertForSequenceClassification(config)


def gpt2():
    torch.manual_seed(3)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}
    return transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(vocab_size=50, pad_token_id=0, num_labels=3, **sizes)
    )


BASES = {
    "net": (Net, ["embed", "up", "conv"], ["head"]),
    "bert": (bert, ["query", "intermediate.dense", "word_embeddings"], ["classifier"]),
    "gpt2": (gpt2, ["c_attn", "c_fc"], ["score"]),
}


def trained(folder, seed, rank=3, base="net", variant="lora", shares=None, dtype=None, **config):
    """A client's folder, written by PEFT: every adapter parameter and the head drawn at random; the parts in `shares`
    are the first indices of one draw for all."""
    make, targets, head = BASES[base]
    config = {"target_modules": targets, "modules_to_save": head} | config
    if variant == "hira":
        peft_config = peft.HiraConfig(r=rank, **config)
    else:
        alpha = S * (math.sqrt(rank) if variant == "rslora" else rank)
        kinds = {"use_rslora": variant == "rslora", "use_dora": variant == "dora"}
        peft_config = peft.LoraConfig(r=rank, lora_alpha=config.pop("lora_alpha", alpha), **kinds, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(make(), peft_config)
        if dtype:
            model.to(dtype)
        with torch.no_grad():
            for place, (name, parameter) in enumerate(model.named_parameters()):
                if parameter.requires_grad:
                    part = re.search(r"_([AB])\b", name)
                    common = shares is not None and part is not None and part[1] == shares
                    g = torch.Generator().manual_seed(500 + place if common else 1000 * seed + place)
                    size = [8 if common and side == rank else side for side in parameter.shape]
                    drawn = torch.randn(size, generator=g)[tuple(slice(side) for side in parameter.shape)]
                    parameter.copy_(drawn.abs() + 0.5 if "magnitude" in name else drawn)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clients(tmp_path_factory):
    """`clients(ranks, base="gpt2")`: the folders of clients of these ranks, made once a session; not to be changed."""
    made = {}

    def folders(ranks=EQUAL, **options):
        key = (ranks, *sorted((name, str(value)) for name, value in options.items()))
        if key not in made:
            place = tmp_path_factory.mktemp("clients")
            made[key] = [trained(place / f"c{u}", u, rank, **options) for u, rank in enumerate(ranks)]
        return made[key]

    return folders


class Uploaded:
    """A module's factors of every client, as arrays, and the maps that strategies are made of; no scaling."""

    def __init__(self, pairs):
        self.pairs = pairs
        self.ranks = [A.shape[0] for _, A in pairs]
        self.top = max(self.ranks)
        self.ideal = sum(w * B @ A for w, (B, A) in zip(W, pairs, strict=True))

    def padded(self):
        more = [self.top - rank for rank in self.ranks]
        return [
            (np.pad(B, ((0, 0), (0, m))), np.pad(A, ((0, m), (0, 0))))
            for (B, A), m in zip(self.pairs, more, strict=True)
        ]

    def means(self, p=W, q=W):
        """Weighted sums of the padded factors."""
        return tuple(sum(w * pair[k] for w, pair in zip(x, self.padded(), strict=True)) for k, x in ((0, p), (1, q)))

    def shared(self, part):
        return self.padded()[int(np.argmax(self.ranks))][part]

    def by_norm(self):
        norms = np.array([np.linalg.norm(B @ A) for B, A in self.pairs])
        return self.means(norms / norms.sum(), norms / norms.sum())

    def by_owners(self):
        held = np.array([[r > j for j in range(self.top)] for r in self.ranks])
        share = W @ held
        B, A = self.means()
        return B / share, A / share[:, None]

    def owners_product(self):
        share = W @ np.array([[r > j for j in range(self.top)] for r in self.ranks])
        return sum(w * (B / share) @ A for w, (B, A) in zip(W, self.padded(), strict=True))

    def corrected(self):
        B, A = self.means()
        gram = A @ A.T
        damped = gram + 0.01 * np.trace(gram) / self.top * np.eye(self.top)
        return B + (self.ideal - B @ A) @ A.T @ np.linalg.inv(damped), A

    def fitted(self):
        """FLoRA-NA by dense alternating least squares."""
        p = q = W
        for _ in range(SWEEPS):
            _, A = self.means(q=q)
            p = np.linalg.lstsq(np.stack([(b @ A).ravel() for b, _ in self.padded()], 1), self.ideal.ravel())[0]
            B, _ = self.means(p)
            q = np.linalg.lstsq(np.stack([(B @ a).ravel() for _, a in self.padded()], 1), self.ideal.ravel())[0]
        return self.means(p, q)

    def to_energy(self, share, least=0):
        """The leading directions that hold a share of the energy."""
        energy = np.linalg.svd(self.ideal, compute_uv=False) ** 2
        count = int(np.searchsorted(energy.cumsum(), share * energy.sum())) + 1
        return best(self.ideal, max(count, least))


def best(matrix, rank):
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def cut(B, A):
    return lambda rank: B[:, :rank] @ A[:rank]


def truncated(matrix):
    return lambda rank: best(matrix, rank)


def everybody(matrix):
    return lambda rank: matrix


EXPECTED = {
    "fedit": lambda u: cut(*u.means()),
    "ffa-lora": lambda u: cut(u.means()[0], u.shared(1)),
    "rolora": lambda u: cut(u.means()[0], u.shared(1)),
    "flora": lambda u: everybody(u.ideal),
    "fedex-lora": lambda u: everybody(u.ideal),
    "flexlora": lambda u: truncated(u.ideal),
    "svd": lambda u: truncated(u.ideal),
    "flora-na": lambda u: cut(*u.fitted()),
    "lora-fair": lambda u: cut(*u.corrected()),
    "zero-padding": lambda u: cut(*u.means()),
    "hetlora": lambda u: cut(*u.by_norm()),
    "replication": lambda u: cut(*u.by_owners()),
    "fedsvd": lambda u: truncated(u.means()[0] @ u.shared(1)),
    "raflora": lambda u: truncated(u.owners_product()),
    "fedrot-lora": lambda u: cut(*u.means()),
    "fedmomentum": lambda u: everybody(u.to_energy(0.9999, u.top)),
    "florist": lambda u: everybody(u.to_energy(0.9)),
    "oracle": lambda u: everybody(u.ideal),
}
"""The product, base update included, that a client of a rank must hold (without the scaling)."""
SHARED_A = ("ffa-lora", "fedsvd", "rolora")
PERSONAL = {"fedsa-lora", "local"}
IMPOSSIBLE = {"centralised", "fed-sb", "ravan"}


def files_of(folder):
    """Arrays (float64) of a folder by PEFT's names without their prefix."""
    tensors = load_torch(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): t.double().numpy() for name, t in tensors.items()}


def pairs_of(folder):
    """(B, A) by module."""
    names, found = files_of(folder), {}
    for name in names:
        if match := re.fullmatch(r"(.+)\.(?:lora|hira)(?:_embedding)?_A(?:\.weight)?", name):
            b = re.sub(r"_A((?:\.weight)?)$", r"_B\1", name)
            found[match[1]] = (names[b], names[name])
    return found


def uploaded(folders):
    every = [pairs_of(folder) for folder in folders]
    return {module: Uploaded([pairs[module] for pairs in every]) for module in every[0]}


def weight(model, module):
    """A layer's weight as d_out × d_in, float64."""
    layer = model.get_submodule(module)
    found = layer.weight.detach().double().numpy()
    return found.T if isinstance(layer, nn.Embedding | Conv1D) else found


def loaded(folder, base="net", base_delta=None):
    """The base with PEFT's reading of the folder merged into it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")
        model = fedlora.apply_base_update(BASES[base][0](), base_delta or folder)
        return peft.PeftModel.from_pretrained(model, folder).merge_and_unload()


def close(actual, wanted, tolerance=2e-6):
    assert actual.shape == wanted.shape
    assert np.linalg.norm(actual - wanted) <= tolerance * np.linalg.norm(wanted)


def check_effective(folder, expected, base="net", base_delta=None, rank=None):
    """W0 + s·(what is expected) in every adapted module, as PEFT merges it."""
    before, after = BASES[base][0](), loaded(folder, base, base_delta)
    for module, product in expected.items():
        change = weight(after, module) - weight(before, module)
        assert np.linalg.norm(change - S * product) <= 1e-5 * max(np.linalg.norm(S * product), 1)
    if rank:
        config = json.loads((folder / "adapter_config.json").read_text())
        root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
        assert config["r"] == rank
        assert config["lora_alpha"] / root == pytest.approx(S, rel=1e-12)


def test_every_strategy_is_covered():
    assert EXPECTED.keys() | PERSONAL | IMPOSSIBLE == set(registry._BUILTIN)


CASES = [
    (name, ranks, base)
    for base in BASES
    for name in EXPECTED
    for ranks in (EQUAL, MIXED)
    if not (ranks == MIXED and registry.find(name).traits.one_rank)
    and (base == "net" or name in ("fedit", "svd", "flora", "fedex-lora", "florist", "flora-na", "oracle"))
]


@pytest.mark.parametrize(("name", "ranks", "base"), CASES, ids=lambda value: str(value).replace(", ", ""))
def test_what_peft_computes_from_the_output(clients, tmp_path, name, ranks, base):
    folders = clients(ranks, base=base, **({"shares": "A"} if name in SHARED_A else {}))
    result = aggregate(folders, name, WEIGHTS, options=OPTIONS.get(name))
    result.save(tmp_path / "out", per_client=True)
    functions = {module: EXPECTED[name](u) for module, u in uploaded(folders).items()}
    whole = {module: held(max(ranks)) for module, held in functions.items()}
    check_effective(tmp_path / "out", whole, base, rank=max(ranks))
    head = loaded(tmp_path / "out", base).get_submodule(BASES[base][2][0]).state_dict()
    for part, tensor in head.items():
        sent = [files_of(folder)[f"{BASES[base][2][0]}.{part}"] for folder in folders]
        close(tensor.double().numpy(), np.tensordot(W, np.stack(sent), 1))
    assert (tmp_path / "out/base_delta.safetensors").exists() == registry.find(name).traits.changes_base
    for index, rank in enumerate(ranks):
        folder = tmp_path / "out" / f"client-{index:03d}"
        check_effective(folder, {m: held(rank) for m, held in functions.items()}, base, tmp_path / "out", rank)
        said = result.strategy.broadcast(result.state, index).tensors()
        stored = load_torch(folder / "adapter_model.safetensors")
        assert stored.keys() == said.keys()
        assert all(torch.equal(tensor, stored[key]) for key, tensor in said.items())


def test_flora_writes_a_fresh_adapter_and_the_stack(clients, tmp_path):
    folders = clients(MIXED)
    aggregate(folders, "flora", WEIGHTS).save(tmp_path / "out")
    for B, A in pairs_of(tmp_path / "out").values():
        assert not B.any()
        assert np.abs(A).min() > 0
        assert A.shape[0] == max(MIXED)
    delta = load_file(tmp_path / "out/base_delta.safetensors")
    for module, u in uploaded(folders).items():
        if sum(MIXED) < min(u.ideal.shape):
            left, right = delta[f"{module}.left"].astype(float), delta[f"{module}.right"].astype(float)
            assert left.shape[1] == right.shape[0] == sum(MIXED)
            close(left @ right, S * u.ideal)
        else:
            close(delta[f"{module}.dense"].astype(float), S * u.ideal)


@pytest.mark.parametrize("name", sorted(PERSONAL))
def test_personal_strategies_have_a_folder_per_client_only(clients, tmp_path, name):
    folders = clients()
    aggregate(folders, name, WEIGHTS, options=OPTIONS.get(name)).save(tmp_path / "out", per_client=True)
    assert not (tmp_path / "out/adapter_config.json").exists()
    for index in range(3):
        expected = {m: u.pairs[index] for m, u in uploaded(folders).items()}
        if name == "fedsa-lora":
            expected = {m: (B, uploaded(folders)[m].means()[1]) for m, (B, _) in expected.items()}
        folder = tmp_path / "out" / f"client-{index:03d}"
        check_effective(folder, {m: B @ A for m, (B, A) in expected.items()}, rank=3)


def test_rolora_after_a_round_in_which_a_was_trained(clients, tmp_path):
    folders = clients(MIXED, shares="B")
    aggregate(folders, "rolora", WEIGHTS).save(tmp_path / "out")
    check_effective(tmp_path / "out", {m: u.shared(0) @ u.means()[1] for m, u in uploaded(folders).items()}, rank=4)


@pytest.mark.parametrize("name", ["svd", "zero-padding", "flora", "flora-na"])
def test_rslora_keeps_alpha_over_the_root(clients, tmp_path, name):
    folders = clients(MIXED, variant="rslora")
    aggregate(folders, name, WEIGHTS, options=OPTIONS.get(name)).save(tmp_path / "out", per_client=True)
    functions = {module: EXPECTED[name](u) for module, u in uploaded(folders).items()}
    for folder, rank in [(tmp_path / "out", 4), (tmp_path / "out/client-002", 1)]:
        check_effective(
            folder, {m: held(rank) for m, held in functions.items()}, base_delta=tmp_path / "out", rank=rank
        )


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("name", "ranks"), [("fedit", EQUAL), ("flora-na", EQUAL), ("replication", MIXED)])
def test_dora(clients, tmp_path, name, ranks, old):
    """m·(W0 + s·BA)/‖W0 + s·BA‖ by row, with the mean of m; also from files with the older name of the vector."""
    folders = clients(ranks, variant="dora")
    m = {k: np.tensordot(W, np.stack([files_of(f)[k] for f in folders]), 1) for k in files_of(folders[0]) if "mag" in k}
    if old:
        tensors = load_torch(folders[1] / "adapter_model.safetensors")
        renamed = {k.replace("magnitude_vector", "magnitude_vector.weight"): t for k, t in tensors.items()}
        folders = [folders[0], copied(folders[1], tmp_path / "old", renamed), folders[2]]
    aggregate(folders, name, WEIGHTS, options=OPTIONS.get(name)).save(tmp_path / "out")
    before, after = Net(), loaded(tmp_path / "out")
    for module, u in uploaded(folders).items():
        new = weight(before, module) + S * EXPECTED[name](u)(max(ranks))
        new *= (m[f"{module}.lora_magnitude_vector"] / np.linalg.norm(new, axis=1))[:, None]
        close(weight(after, module), new, 1e-5)


@pytest.mark.parametrize(("name", "ranks"), [("fedit", EQUAL), ("svd", MIXED)])
def test_hira(clients, tmp_path, name, ranks):
    """W0 ∘ (1 + BA), without a scaling."""
    folders = clients(ranks, variant="hira")
    aggregate(folders, name, WEIGHTS, options=OPTIONS.get(name)).save(tmp_path / "out", per_client=True)
    for folder, rank in [(tmp_path / "out", max(ranks)), (tmp_path / "out/client-000", ranks[0])]:
        before, after = Net(), loaded(folder)
        for module, u in uploaded(folders).items():
            close(weight(after, module), weight(before, module) * (1 + EXPECTED[name](u)(rank)), 1e-5)


def copied(source, folder, tensors=None, **changes):
    """A folder like another with other tensors, or values of its configuration."""
    folder.mkdir()
    config = json.loads((source / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors or load_torch(source / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    return folder
