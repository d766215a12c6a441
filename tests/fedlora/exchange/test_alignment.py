"""Adapters that differ in more than their values: alpha/r by client and by module, rows of different tokens.

What PEFT computes from the result is compared with dense float64 arithmetic on the clients' files."""

import json
import math
import re
import warnings
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fedlora
from fedlora.errors import AdapterError, ConfigError
from fedlora.strategies import registry

WEIGHTS = [3, 1, 2]
W = np.array(WEIGHTS) / sum(WEIGHTS)
TARGETS = {"enc.q": (7, 5), "enc.v": (4, 7), "dec.q": (6, 4)}
ROWS = "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta"


class Net(nn.Module):
    """No two sides alike, and an embedding whose rows can be trained one by one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed_tokens = nn.Embedding(8, 5)
        self.enc = nn.ModuleDict({"q": nn.Linear(5, 7), "v": nn.Linear(7, 4)})
        self.dec = nn.ModuleDict({"q": nn.Linear(4, 6)})
        self.unembed = nn.Linear(6, 8, bias=False)

    def forward(self, ids):
        return self.unembed(self.dec["q"](self.enc["v"](self.enc["q"](self.embed_tokens(ids)))))

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.unembed


@pytest.fixture
def client(tmp_path):
    """`client("alice", r=4)`: a folder that PEFT wrote, its parameters drawn by name; those in `shares` alike for all,
    up to the rank."""

    def make(name, shares="", save=None, **config):
        config = {"r": 3, "lora_alpha": 6, "target_modules": [*TARGETS]} | config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(Net(), peft.LoraConfig(**config))
            with torch.no_grad():
                for place, (key, parameter) in enumerate(model.named_parameters()):
                    if parameter.requires_grad:
                        common = bool(shares) and f"lora_{shares}" in key
                        g = torch.Generator().manual_seed(place if common else 1000 * sum(name.encode()) + place)
                        columns = common and shares == "B"
                        size = [9, parameter.shape[0]] if columns else [9, *parameter.shape[1:]]
                        drawn = torch.randn(size, generator=g)
                        drawn = drawn.T if columns else drawn
                        parameter.copy_(drawn[: parameter.shape[0], ..., : parameter.shape[-1]])
            model.save_pretrained(tmp_path / name, **(save or {}))
        return tmp_path / name

    return make


def change(folder, base_delta=None):
    """What PEFT, reading the folder and the base update, adds to the weights, in float64."""
    model = Net()
    before = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")
        fedlora.apply_base_update(model, base_delta or folder)
        after = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    return {name.removesuffix(".weight"): after[name].double().numpy() - before[name] for name in before}


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def scaling(folder, module):
    """s of a module by the words of PEFT's documentation, for patterns whose keys are ends of names."""
    config = config_of(folder)
    rank, alpha = (
        next((value for key, value in config[pattern].items() if re.search(rf"(^|\.)({key})$", module)), config[one])
        for pattern, one in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def pairs(folder, module):
    tensors = load_file(folder / "adapter_model.safetensors")
    return tuple(tensors[f"base_model.model.{module}.lora_{part}.weight"].double().numpy() for part in "BA")


def products(folders, module, w=W):
    """`Σ w_u s_u B_u A_u`."""
    found = ((scaling(folder, module), *pairs(folder, module)) for folder in folders)
    return sum(weight * s * B @ A for weight, (s, B, A) in zip(w, found, strict=True))


def best(matrix, rank):
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def by_owners(folders, module, rank):
    """raflora: every rank index averaged over the clients that have it."""
    found = [(scaling(folder, module), *pairs(folder, module)) for folder in folders]
    total = 0
    for j in range(max(A.shape[0] for _, _, A in found)):
        own = [(w, s * np.outer(B[:, j], A[j])) for w, (s, B, A) in zip(W, found, strict=True) if A.shape[0] > j]
        total = total + sum(w * each for w, each in own) / sum(w for w, _ in own)
    return best(total, rank)


def close(actual, wanted, tolerance=1e-5):
    assert np.linalg.norm(actual - wanted) <= tolerance * max(np.linalg.norm(wanted), 1e-3)


BY_PRODUCT = [name for name in registry.names() if registry.find(name).traits.any_scaling]
TRUNCATED = {"svd": best, "flexlora": best}
SHARED = {"ffa-lora": "A", "fedsvd": "A", "rolora": "A"}
WHOLE = {"florist": {"energy": 1}, "fedmomentum": {"energy": 1}}


class TestScalingsOfClients:
    def folders(self, client, name):
        """One alpha for ranks 2, 4 and 1; where the strategy wants one rank, three alphas for rank 3."""
        if registry.find(name).traits.one_rank:
            made = [("a", 3, 3), ("b", 3, 12), ("c", 3, 6)]
        else:
            made = [("a", 2, 6), ("b", 4, 6), ("c", 1, 6)]
        return [client(who, r=r, lora_alpha=alpha, shares=SHARED.get(name, "")) for who, r, alpha in made]

    @pytest.mark.parametrize("name", [name for name in BY_PRODUCT if not registry.find(name).traits.personal])
    def test_the_mean_of_updates(self, client, tmp_path, name):
        folders = self.folders(client, name)
        result = fedlora.aggregate(folders, name, WEIGHTS, options=WHOLE.get(name))
        result.save(tmp_path / "out", per_client=True)
        held = {tmp_path / "out": result.state.adapter.rank}
        held |= {tmp_path / f"out/client-{u:03d}": client.rank for u, client in enumerate(result.clients)}
        for folder, rank in held.items():
            found = change(folder, tmp_path / "out")
            for module in TARGETS:
                if name == "raflora":
                    wanted = by_owners(folders, module, rank)
                elif name in TRUNCATED:
                    wanted = best(products(folders, module), rank)
                elif name in SHARED and rank < 4:
                    wanted = None  # the first rows of the shared factor alone
                else:
                    wanted = products(folders, module)
                if wanted is not None:
                    close(found[module], wanted)
        if registry.find(name).traits.exact and name not in SHARED:
            assert result.divergence.rho < 1e-6
        assert [note for note in result.notes if "different alpha/r" in note and "B of each" in note]

    def test_rho_against_dense(self, client):
        folders = self.folders(client, "svd")
        result = fedlora.aggregate(folders, "svd", WEIGHTS)
        error = ideal = 0.0
        for module in TARGETS:
            whole = products(folders, module)
            ideal += np.linalg.norm(whole) ** 2
            error += sum(w * np.linalg.norm(best(whole, r) - whole) ** 2 for w, r in zip(W, (2, 4, 1), strict=True))
        assert result.divergence.rho == pytest.approx(math.sqrt(error / ideal), rel=1e-5)

    @pytest.mark.parametrize("name", ["local", "fedsa-lora"])
    def test_clients_that_go_on_with_their_own(self, client, tmp_path, name):
        """In their own alpha/r, and what they keep is theirs bit by bit."""
        folders = self.folders(client, name)
        fedlora.aggregate(folders, name, WEIGHTS).save(tmp_path / "out", per_client=True)
        for u, folder in enumerate(folders):
            own = tmp_path / f"out/client-{u:03d}"
            assert config_of(own)["lora_alpha"] == config_of(folder)["lora_alpha"]
            for module in TARGETS:
                assert np.array_equal(pairs(own, module)[0], pairs(folder, module)[0])

    def test_rolora_after_a_round_in_which_a_was_trained(self, client, tmp_path):
        folders = [client(who, r=r, lora_alpha=6, shares="B") for who, r in (("a", 2), ("b", 4), ("c", 1))]
        result = fedlora.aggregate(folders, "rolora", WEIGHTS)
        result.save(tmp_path / "out")
        for module in TARGETS:
            close(change(tmp_path / "out")[module], products(folders, module))
        assert "A of each" in result.notes[0]

    @pytest.mark.parametrize("name", ["svd", "flora", "oracle"])
    def test_rslora_beside_lora(self, client, tmp_path, name):
        folders = [client("a", use_rslora=True), client("b"), client("c", r=4, use_rslora=True)]
        fedlora.aggregate(folders, name, WEIGHTS).save(tmp_path / "out", per_client=True)
        for module in TARGETS:
            wanted = products(folders, module)
            close(change(tmp_path / "out")[module], best(wanted, 4) if name == "svd" else wanted)
        assert [config_of(tmp_path / f"out/client-00{u}")["use_rslora"] for u in range(3)] == [True, False, True]
        assert [config_of(tmp_path / f"out/client-00{u}")["lora_alpha"] for u in range(3)] == [6, 6, 6]

    @pytest.mark.parametrize("name", ["fedit", "hetlora", "flora-na"])
    def test_rslora_with_the_same_scaling_is_lora(self, client, tmp_path, name):
        """Another way of saying s = 2."""
        plain = [client("a"), client("b"), client("c")]
        fedlora.aggregate(plain, name, WEIGHTS).save(tmp_path / "plain")
        path = plain[1] / "adapter_config.json"
        path.write_text(json.dumps(config_of(plain[1]) | {"use_rslora": True, "lora_alpha": 2 * math.sqrt(3)}))
        result = fedlora.aggregate(plain, name, WEIGHTS)
        result.save(tmp_path / "mixed")
        assert result.notes == []
        for module in TARGETS:
            assert np.array_equal(change(tmp_path / "plain")[module], change(tmp_path / "mixed")[module])

    @pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
    def test_folding_loses_no_precision(self, client, tmp_path, precision):
        """alpha/r of 1/3: B is multiplied in float64, not in the precision of the file."""
        folders = [client("a", lora_alpha=1), client("b"), client("c", lora_alpha=7)]
        for folder in folders:
            path = folder / "adapter_model.safetensors"
            save_file({name: tensor.to(precision) for name, tensor in load_file(path).items()}, path)
        fedlora.aggregate(folders, "oracle", WEIGHTS).save(tmp_path / "out")
        for module in TARGETS:
            close(change(tmp_path / "out")[module], products(folders, module), 1e-6)

    @pytest.mark.parametrize(
        "name", [n for n in registry._BUILTIN if n not in BY_PRODUCT and n not in ("centralised", "fed-sb", "ravan")]
    )
    def test_a_strategy_that_combines_factors_says_so(self, client, name):
        folders = [client("a"), client("b", lora_alpha=3)]
        with pytest.raises(ConfigError, match=rf"{name} cannot .*b has alpha/r 1, but .*a has 2.*use a strategy for"):
            fedlora.aggregate(folders, name)

    def test_which_is_true(self, client, tmp_path):
        """The same updates with s on A instead of B: means of factors differ, means of products do not."""
        a, b, moved = client("a"), client("b", lora_alpha=3), client("moved")
        tensors = load_file(b / "adapter_model.safetensors")
        onto = {"A": 0.5, "B": 0.5}
        for part in "AB":
            scaled = {n: t * (onto[part] if f"lora_{part}" in n else 1) for n, t in tensors.items()}
            save_file(scaled, moved / "adapter_model.safetensors")
            for name in ("fedit", "svd"):
                fedlora.aggregate([a, moved], name).save(tmp_path / f"{name}-{part}")
        for module in TARGETS:
            one, other = (change(tmp_path / f"fedit-{part}")[module] for part in "AB")
            assert np.linalg.norm(one - other) > 0.1 * np.linalg.norm(one)
            close(*(change(tmp_path / f"svd-{part}")[module] for part in "AB"))


PATTERNS = {
    "ranks": {"rank_pattern": {"q": 2}},
    "alphas": {"alpha_pattern": {"q": 24}},
    "one layer": {"rank_pattern": {r"enc\.(q|v)": 2}, "alpha_pattern": {r"enc\.(q|v)": 8}},
    "rsLoRA": {"use_rslora": True, "rank_pattern": {"enc.q": 1, "v": 2}},
}


class TestScalingsOfModules:
    """Clients agree on them, and the mean is taken module by module."""

    @pytest.mark.parametrize("pattern", PATTERNS)
    @pytest.mark.parametrize("name", ["fedit", "svd", "flora", "oracle", "fedex-lora", "fedmomentum", "florist"])
    def test_the_mean_of_updates(self, client, tmp_path, name, pattern):
        folders = [client(who, **PATTERNS[pattern]) for who in "abc"]
        result = fedlora.aggregate(folders, name, WEIGHTS, options=WHOLE.get(name))
        result.save(tmp_path / "out", per_client=True)
        found, error, ideal = change(tmp_path / "out"), 0.0, 0.0
        for module in TARGETS:
            whole, rank = products(folders, module), pairs(folders[0], module)[1].shape[0]
            if name == "fedit":
                means = (sum(w * pairs(f, module)[k] for w, f in zip(W, folders, strict=True)) for k in (0, 1))
                wanted = scaling(folders[0], module) * np.matmul(*means)
            else:
                wanted = best(whole, rank) if name == "svd" else whole
            close(found[module], wanted)
            error, ideal = error + np.linalg.norm(wanted - whole) ** 2, ideal + np.linalg.norm(whole) ** 2
            for folder in (tmp_path / "out", tmp_path / "out/client-001"):
                assert scaling(folder, module) == pytest.approx(scaling(folders[0], module), rel=1e-12)
        assert result.divergence.rho == pytest.approx(math.sqrt(error / ideal), rel=1e-5, abs=1e-6)
        assert result.notes == []

    @pytest.mark.parametrize("name", [n for n in registry._BUILTIN if n not in ("centralised", "fed-sb", "ravan")])
    def test_a_module_is_what_it_is_alone(self, client, tmp_path, name):
        """Whatever the strategy: with the other modules at another alpha/r, or without them."""
        shares = SHARED.get(name, "")
        folders = [client(who, shares=shares, alpha_pattern={"enc.v": 30}) for who in "abc"]
        only = [client(f"only-{who}", shares=shares, alpha_pattern={"enc.v": 30}) for who in "abc"]
        for whole, part in zip(folders, only, strict=True):
            kept = {n: t for n, t in load_file(whole / "adapter_model.safetensors").items() if "enc.v" in n}
            save_file(kept, part / "adapter_model.safetensors")
        one = fedlora.aggregate(folders, name, WEIGHTS)
        other = fedlora.aggregate(only, name, WEIGHTS)
        pair, alone = (result.client(0).factors["enc.v"].to_double().product() for result in (one, other))
        torch.testing.assert_close(pair, alone, rtol=1e-6, atol=1e-8)
        rhos = (one.divergence.modules["enc.v"].rho, other.divergence.rho)
        assert rhos[0] == pytest.approx(rhos[1], rel=1e-6, abs=1e-9)

    def test_one_weight_for_all_modules_counts_updates(self, client):
        """flora-na with `shared`: a module counts by its update, so doubling alpha is doubling B."""
        scaled = [client(who, alpha_pattern={"enc.v": 60}) for who in "abc"]
        fits = [
            fedlora.aggregate(scaled, "flora-na", WEIGHTS, options={"shared": True}).state.diagnostics["dec.q"]["p"]
        ]
        for folder in scaled:
            path = folder / "adapter_model.safetensors"
            tensors = {n: 10 * t if "enc.v.lora_B" in n else t for n, t in load_file(path).items()}
            save_file(tensors, path)
            (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | {"alpha_pattern": {}}))
        fits += [
            fedlora.aggregate(scaled, "flora-na", WEIGHTS, options={"shared": True}).state.diagnostics["dec.q"]["p"]
        ]
        torch.testing.assert_close(*fits, rtol=1e-6, atol=1e-8)

    def test_both_at_once(self, client, tmp_path):
        """Modules and clients differ: each module gets the scaling that the client of the highest rank has."""
        folders = [client("a", r=2, alpha_pattern={"v": 5}), client("b", r=4, rank_pattern={"enc.q": 1}), client("c")]
        fedlora.aggregate(folders, "oracle", WEIGHTS).save(tmp_path / "out")
        fedlora.aggregate(folders, "svd", WEIGHTS).save(tmp_path / "svd")
        for module in TARGETS:
            close(change(tmp_path / "out")[module], products(folders, module))
            close(change(tmp_path / "svd")[module], best(products(folders, module), 4 if module != "enc.q" else 3))
            assert scaling(tmp_path / "svd", module) == pytest.approx(scaling(folders[1], module))

    def test_a_plug_in_that_knows_one_scaling(self, client, monkeypatch):
        flora = registry.find("flora")
        monkeypatch.setattr(flora, "traits", replace(flora.traits, scales_by_module=False))
        with pytest.raises(ConfigError, match="one alpha/r for all modules"):
            fedlora.aggregate([client("a", alpha_pattern={"v": 5})], "flora")
        fedlora.aggregate([client("b")], "flora")


BAD_BASES = {
    "no such folder": (lambda p: p / "none", "neither a model folder nor a hub's model"),
    "no model": (lambda p: p, "no tensor for 'embed_tokens'"),
    "another model": (lambda p: nn.Linear(2, 2), "no module 'embed_tokens'"),
    "too few rows": (lambda p: type("Small", (Net,), {})(), "expected a row of token 7"),
}


BAD = {
    "another count": ({"trainable_token_indices": [5]}, "has shape"),
    "a token twice": ({"trainable_token_indices": [5, 5]}, "1 different tokens in 2 places"),
    "not said": ({"trainable_token_indices": None}, "does not say which rows"),
    "of another module": ({"trainable_token_indices": {"unembed": [5, 6]}}, "does not say which rows"),
}


class TestRowsOfTokens:
    """PEFT keeps rows, not changes: the mean of changes needs the base's rows where a client trained none."""

    def clients(self, client, *tokens, **config):
        made = zip("abc", tokens, strict=False)
        return [client(name, trainable_token_indices=each, **config) for name, each in made]

    def wanted(self, folders, w=W):
        return sum(weight * change(folder)["embed_tokens"] for weight, folder in zip(w, folders, strict=True))

    def check(self, folders, out, base=None, w=W):
        result = fedlora.aggregate(folders, "svd", list(w), base=base)
        result.save(out, per_client=True)
        for folder in (out, *(out / f"client-{u:03d}" for u in range(len(folders)))):
            close(change(folder)["embed_tokens"], self.wanted(folders, w), 1e-6)
        return result

    def test_the_same_tokens(self, client, tmp_path):
        folders = self.clients(client, [5, 2], [5, 2], [5, 2])
        self.check(folders, tmp_path / "out")
        assert config_of(tmp_path / "out")["trainable_token_indices"] == [5, 2]

    def test_in_another_order(self, client, tmp_path):
        folders = self.clients(client, [5, 2, 7], [2, 7, 5], [7, 2, 5])
        self.check(folders, tmp_path / "out")
        assert config_of(tmp_path / "out")["trainable_token_indices"] == [2, 5, 7]

    @pytest.mark.parametrize("form", ["model", "folder", "shards", "body"])
    def test_other_tokens_with_the_base(self, client, tmp_path, form):
        folders = self.clients(client, [5, 6], [7, 1], [6])
        base = Net()
        if form != "model":
            tensors = {name: tensor.clone() for name, tensor in base.state_dict().items()}
            if form == "body":
                tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
            (tmp_path / "base").mkdir()
            parts = [tensors] if form != "shards" else [{name: tensor} for name, tensor in tensors.items()]
            for number, part in enumerate(parts):
                save_file(part, tmp_path / f"base/model-{number:05d}-of-{len(parts):05d}.safetensors")
        self.check(folders, tmp_path / "out", base if form == "model" else tmp_path / "base")
        assert config_of(tmp_path / "out")["trainable_token_indices"] == [1, 5, 6, 7]

    def test_other_tokens_without_it(self, client, tmp_path):
        folders = self.clients(client, [5, 6], [7, 5], [6, 5])
        with pytest.raises(AdapterError, match=r"a has not trained token 7 of 'embed_tokens'.*--base"):
            fedlora.aggregate(folders, "svd", WEIGHTS)

    def test_a_client_without_weight_needs_none(self, client, tmp_path):
        folders = self.clients(client, [5, 6], [7], [6, 5])
        self.check(folders, tmp_path / "out", w=np.array([0.4, 0, 0.6]))
        assert config_of(tmp_path / "out")["trainable_token_indices"] == [5, 6]

    def test_a_client_that_trained_none(self, client, tmp_path):
        folders = [*self.clients(client, [5, 6], [6]), client("c")]
        self.check(folders, tmp_path / "out", Net())
        assert config_of(tmp_path / "out/client-002")["trainable_token_indices"] == {"embed_tokens": [5, 6]}

    def test_in_both_forms(self, client, tmp_path):
        folders = self.clients(client, [5, 6], {"embed_tokens": [6, 5]}, {"embed_tokens": [5, 6]})
        self.check(folders, tmp_path / "out")

    def test_of_two_modules(self, client, tmp_path):
        tokens = [
            {"embed_tokens": [5, 6], "unembed": [1]},
            {"embed_tokens": [6, 5], "unembed": [1]},
            {"embed_tokens": [5, 6]},
        ]
        folders = self.clients(client, *tokens)
        self.check(folders, tmp_path / "out", Net())
        found = sum(w * change(folder)["unembed"] for w, folder in zip(W, folders, strict=True))
        close(change(tmp_path / "out")["unembed"], found, 1e-6)

    def test_a_base_in_the_adapters_own_file(self, client, tmp_path):
        """PEFT puts the whole embedding there after a change of the vocabulary."""
        folders = self.clients(client, [5, 6], [7, 5], [6], save={"save_embedding_layers": True})
        assert ROWS.replace("trainable_tokens_delta", "base_layer.weight") in load_file(
            folders[0] / "adapter_model.safetensors"
        )
        self.check(folders, tmp_path / "out")

    @pytest.mark.parametrize("name", ["local", "fedsa-lora"])
    def test_clients_that_keep_their_own(self, client, tmp_path, name):
        folders = self.clients(client, [5, 6], [7], [6])
        options = {"own_head": True} if name == "fedsa-lora" else None
        fedlora.aggregate(folders, name, WEIGHTS, options=options).save(tmp_path / "out", per_client=True)
        for u, folder in enumerate(folders):
            close(change(tmp_path / f"out/client-{u:03d}")["embed_tokens"], change(folder)["embed_tokens"])

    @pytest.mark.parametrize("case", BAD_BASES)
    def test_a_base_that_does_not_fit(self, client, tmp_path, case):
        make, message = BAD_BASES[case]
        base = make(tmp_path)
        if case == "too few rows":
            base.embed_tokens = nn.Embedding(6, 5)
        with pytest.raises(AdapterError, match=message):
            fedlora.aggregate(self.clients(client, [5, 6], [7]), "svd", base=base)

    @pytest.mark.parametrize("case", BAD)
    def test_a_configuration_that_does_not_fit(self, client, case):
        changes, message = BAD[case]
        (folder,) = self.clients(client, [5, 6])
        (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | changes))
        with pytest.raises(AdapterError, match=message):
            fedlora.aggregate([folder], "svd")

    def test_said_but_not_there(self, client):
        folder = client("a")
        config = config_of(folder) | {"trainable_token_indices": [5]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(AdapterError, match="trainable_token_indices is set, but"):
            fedlora.aggregate([folder], "svd")
