"""Folders as people have them: other precisions, ranks by module, regular expressions, links, many clients."""

import json
import math
import re
import resource
import warnings
import weakref
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fedlora
from fedlora.errors import AdapterError, ConfigError
from fedlora.exchange.peftfolder import open_peft_folder
from fedlora.files.limits import Limits
from fedlora.files.tensorfile import StoredTensors
from fedlora.model.peftpattern import Pattern
from fedlora.strategies import registry

TARGETS = {"enc.q": (7, 5), "enc.v": (4, 7), "dec.q": (6, 4)}


class Net(nn.Module):
    """The last part of a module's name does not tell it apart; `narrow` has two rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.enc = nn.ModuleDict({"q": nn.Linear(5, 7), "v": nn.Linear(7, 4)})
        self.dec = nn.ModuleDict({"q": nn.Linear(4, 6)})
        self.q = nn.Linear(6, 9)
        self.embed_tokens = nn.Embedding(8, 5)
        self.narrow = nn.Linear(9, 2)

    def forward(self, x):
        return self.narrow(self.q(self.dec["q"](self.enc["v"](self.enc["q"](x)))))

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return None


@pytest.fixture
def client(tmp_path):
    """`client("alice", rank_pattern={…})`: a folder that PEFT wrote, its parameters drawn by name."""

    def make(name, dtype=torch.float32, **config):
        config = {"r": 3, "lora_alpha": 6, "target_modules": ["enc.q", "enc.v", "dec.q"]} | config
        g = torch.Generator().manual_seed(sum(name.encode()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(Net(), peft.LoraConfig(**config)).to(dtype)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.copy_(torch.randn(parameter.shape, generator=g))
            model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def changed(folder, **config):
    """The same folder with other values of its configuration."""
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | config))
    return folder


def mean_product(folders, module):
    found = []
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        B, A = (tensors[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "BA")
        found.append((B @ A).numpy())
    return sum(found) / len(found)


def change(folder, module):
    """What PEFT, reading the folder and the base update beside it, adds to a module's weight."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        model = fedlora.apply_base_update(Net(), folder)
        merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    return (merged.get_submodule(module).weight - Net().get_submodule(module).weight).detach().double().numpy()


def check_exact(folder, folders, modules=TARGETS, tolerance=1e-5):
    """The effective weights are W0 + 2·mean(BA), alpha/r being 2."""
    for module in modules:
        wanted = 2 * mean_product(folders, module)
        assert np.linalg.norm(change(folder, module) - wanted) <= tolerance * np.linalg.norm(wanted)


class TestPrecision:
    @pytest.mark.parametrize("name", ["flora", "oracle", "svd"])
    def test_of_each_client_its_own(self, client, tmp_path, name):
        folders = [client("a", torch.float16), client("b", torch.bfloat16), client("c", torch.float32), client("d")]
        kinds = [set(StoredTensors(folder / "adapter_model.safetensors").dtypes.values()) for folder in folders]
        assert kinds == [{"F16"}, {"BF16"}, {"F32"}, {"F32"}]
        fedlora.aggregate(folders, name).save(tmp_path / "out")
        if name != "svd":
            check_exact(tmp_path / "out", folders)
        assert set(StoredTensors(tmp_path / "out/adapter_model.safetensors").dtypes.values()) == {"F32"}

    def test_a_shared_factor_in_two_precisions(self, client, tmp_path):
        folders = [client("a"), client("b", torch.float64)]
        stored = [load_file(folder / "adapter_model.safetensors") for folder in folders]
        stored[1] |= {name: t.double() for name, t in stored[0].items() if "lora_A" in name}
        save_file(stored[1], folders[1] / "adapter_model.safetensors")
        fedlora.aggregate(folders, "ffa-lora").save(tmp_path / "out")
        check_exact(tmp_path / "out", folders)


class TestRanksByModule:
    """enc.q has rank 2 and q rank 1, where dec.q and enc.v have 3."""

    @pytest.fixture
    def folders(self, client):
        pattern = {"rank_pattern": {"enc.q": 2, "^q": 1}, "alpha_pattern": {"enc.q": 4, "^q": 2}}
        return [client(name, target_modules=["q", "enc.v"], **pattern) for name in "ab"]

    @pytest.mark.parametrize("name", ["fedex-lora", "flora", "oracle"])
    def test_are_read_and_written(self, folders, tmp_path, name):
        fedlora.aggregate(folders, name).save(tmp_path / "out", per_client=True)
        check_exact(tmp_path / "out", folders, [*TARGETS, "q"])
        for folder in (tmp_path / "out", tmp_path / "out/client-001"):
            shapes = open_peft_folder(folder).shapes
            assert {module: rank for module, (_, rank, _) in shapes.items()} == {
                "enc.q": 2,
                "q": 1,
                "enc.v": 3,
                "dec.q": 3,
            }
            assert open_peft_folder(folder).scaling == 2
        # anchored: a name that ends another's stands for itself alone
        assert config_of(tmp_path / "out")["rank_pattern"] == {r"^enc\.q": 2, "^q": 1}

    def test_of_two_clients_in_opposite_modules(self, client, tmp_path):
        """Both have rank 3, and yet their ranks are mixed."""
        folders = [
            client(name, rank_pattern={module: 2}, alpha_pattern={module: 4})
            for name, module in (("a", "enc.q"), ("b", "dec.q"))
        ]
        with pytest.raises(ConfigError, match="it needs clients of one rank"):
            fedlora.aggregate(folders, "fedit")
        result = fedlora.aggregate(folders, "flora")
        result.save(tmp_path / "out")
        check_exact(tmp_path / "out", folders)
        assert "rank_pattern" in config_of(tmp_path / "out")

    def test_rslora(self, client, tmp_path):
        pattern = {"rank_pattern": {"dec.q": 2}, "alpha_pattern": {"dec.q": 5 * math.sqrt(2)}}
        folders = [client(name, use_rslora=True, lora_alpha=5 * math.sqrt(3), **pattern) for name in "ab"]
        result = fedlora.aggregate(folders, "svd")
        result.save(tmp_path / "out")
        assert result.state.scaling == pytest.approx(5, rel=1e-12)
        assert open_peft_folder(tmp_path / "out").scaling == pytest.approx(5, rel=1e-12)
        config = config_of(tmp_path / "out")
        assert (config["lora_alpha"], *config["alpha_pattern"].values()) == pytest.approx((5 * 3**0.5, 5 * 2**0.5))


class TestPatterns:
    NAMES = ("encoder.layer.0.attention.self.query", "encoder.layer.11.attention.self.value", "q_proj", "a-b.c", "xq.q")
    KEYS = (
        "query", "^q_proj", "self.query", "^encoder.layer.0.attention.self.query", r"encoder\.layer\.11\..*value",
        r".*\.layer\.\d+\.attention\..*", r"layer\.[0-9]\..*", r"layer\.(?:0|11)\..*(query|value)", "query|value", ".*",
        r"^.*value$", r"\w+", "[a-z]*", "[^a]", r"a\-b\.c", "q.?_proj", r"l.*?r\.0.*", r".+\.1+\..+y?", "layer.0", "",
    )  # fmt: skip

    @pytest.mark.parametrize("key", KEYS)
    def test_match_as_in_peft(self, key):
        for name in self.NAMES:
            expected = 4 if re.match(rf"(.*\.)?({key})$", name) else 8
            assert Pattern({key: 4}).of(name, 8) == expected, name

    def test_the_first_counts(self):
        assert Pattern({"self.query": 1, "query": 2}).of("a.self.query", 8) == 1
        assert Pattern({".*query": 3, "self.query": 1}).of("a.self.query", 8) == 3
        assert Pattern({"value": 3, "query": 1, "q.*": 2}).of("a.self.query", 8) == 1
        assert Pattern(None).of("a", 8) == 8

    @pytest.mark.parametrize(
        "key", ["(a+)+", "(a|aa)*", "(?:a?){30}a{30}", r"(a)\1", "(?=a)", "((a)b)", "(", "[", "*", "a{3}"]
    )
    def test_what_could_take_for_ever_is_refused(self, key):
        with pytest.raises(AdapterError, match="is not understood"):
            Pattern({key: 1})

    def test_many_wild_cards_do_not(self):
        """With `re`, time would grow with a power of the name's length: this would outlive us all."""
        assert Pattern({".*a" * 150: 1}).of("a" * 2000 + "b", 8) == 8

    def test_nothing_that_peft_would_give_to_re_is_handed_on(self, client, tmp_path):
        """A regular expression for the target modules becomes their names."""
        hostile = r"(?:(?:[a-z]+)+\.)*(?:q|v)"
        folders = [changed(client(name), target_modules=hostile, layers_pattern=["(a+)+"]) for name in "ab"]
        fedlora.aggregate(folders, "flora").save(tmp_path / "out", per_client=True)
        assert config_of(tmp_path / "out")["target_modules"] == sorted(TARGETS)
        assert not re.search(
            r"\+\)|\(\?", json.dumps([config_of(p.parent) for p in tmp_path.glob("out/**/adapter_config.json")])
        )
        check_exact(tmp_path / "out", folders)

    def test_the_card_says_what_the_configuration_said_and_no_more(self, client, tmp_path):
        changed(client("a"), base_model_name_or_path='x" tags: [evil] # Run me')
        fedlora.aggregate([tmp_path / "a"]).save(tmp_path / "out")
        assert r'base_model: "x\" tags: [evil] # Run me"' in (tmp_path / "out/README.md").read_text()
        changed(client("b"), base_model_name_or_path="x\ntags: [evil]\n---\n# Run me")
        with pytest.raises(AdapterError, match=r"base_model_name_or_path is 'x\\ntags: .*; expected one line"):
            fedlora.aggregate([tmp_path / "b"])

    def test_what_peft_would_act_upon_is_not_handed_on(self, client, tmp_path):
        """Modules to import, a tokenizer to fetch, weights to draw anew: keys that no adapter needs."""
        alien = {"auto_mapping": {"parent_library": "os"}, "megatron_config": {"a": 1}, "megatron_core": "megatron.x"}
        alien |= {"tokenizer_kwargs": {"trust_remote_code": True}, "init_lora_weights": "eva", "eva_config": {"rho": 9}}
        changed(client("a"), **alien)
        fedlora.aggregate([tmp_path / "a"]).save(tmp_path / "out", per_client=True)
        for folder in (tmp_path / "out", tmp_path / "out/client-000"):
            assert not alien.keys() & config_of(folder).keys()


class TestFolders:
    def test_the_same_twice(self, client, tmp_path):
        one, other = client("a"), client("b")
        fedlora.aggregate([one, other, one], "oracle").save(tmp_path / "out")
        check_exact(tmp_path / "out", [one, other, one])

    def test_links_as_in_the_cache_of_the_hub(self, client, tmp_path):
        folder, cached, blobs = client("a"), tmp_path / "hub/snapshots/1f", tmp_path / "hub/blobs"
        cached.mkdir(parents=True)
        blobs.mkdir()
        for index, name in enumerate(("adapter_config.json", "adapter_model.safetensors")):
            (blobs / str(index)).write_bytes((folder / name).read_bytes())
            (cached / name).symlink_to(f"../../blobs/{index}")
        (tmp_path / "link").symlink_to(cached)
        fedlora.aggregate([tmp_path / "link"], "svd").save(tmp_path / "out")
        check_exact(tmp_path / "out", [folder])

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "base_delta.safetensors"])
    def test_links_out_of_the_folder_are_refused(self, client, tmp_path, name):
        """A client's archive could name any file of the server's."""
        folder = client("a")
        (tmp_path / "theirs").mkdir()
        if (folder / name).exists():
            (folder / name).rename(tmp_path / "theirs" / name)
        (folder / name).symlink_to(tmp_path / "theirs" / name)
        with pytest.raises(AdapterError, match=r"leads out of the folder|has a base update"):
            fedlora.aggregate([folder], "svd")

    def test_a_link_within_the_folder(self, client, tmp_path):
        folder = client("a")
        (folder / "adapter_config.json").rename(folder / "other.json")
        (folder / "adapter_config.json").symlink_to("other.json")
        fedlora.aggregate([folder], "svd").save(tmp_path / "out")

    def test_a_rank_above_the_smaller_side(self, client, tmp_path):
        """PEFT allows it: rank 3 on a layer of two rows."""
        folders = [client(name, target_modules=["narrow", "enc.q"]) for name in "abc"]
        for name in ("flora", "oracle", "fedex-lora"):
            fedlora.aggregate(folders, name).save(tmp_path / name)
            check_exact(tmp_path / name, folders, ["narrow", "enc.q"])
        for name in (
            "fedit",
            "svd",
            "flexlora",
            "flora-na",
            "lora-fair",
            "raflora",
            "fedmomentum",
            "hetlora",
            "florist",
        ):
            assert math.isfinite(fedlora.aggregate(folders, name).divergence.rho)
        assert fedlora.aggregate(folders, "svd").divergence.modules["narrow"].rho < 1e-6

    def test_settings_left_to_peft(self, client, tmp_path):
        """r and lora_alpha are 8 where a configuration does not say."""
        folder = client("a", r=8, lora_alpha=8, target_modules=["q"])
        content = {"peft_type": "lora", "target_modules": ["q"], "modules_to_save": None}
        (folder / "adapter_config.json").write_text(json.dumps(content))
        assert (open_peft_folder(folder).scaling, open_peft_folder(folder).rank) == (1, 8)

    def test_embeddings_saved_with_the_adapter(self, client, tmp_path):
        """PEFT keeps the base weight of an embedding that it adapts: loading that would undo a base update."""
        folders = [client(name, target_modules=["embed_tokens", "enc.q"]) for name in "ab"]
        assert "base_model.model.embed_tokens.base_layer.weight" in StoredTensors(
            folders[0] / "adapter_model.safetensors"
        )
        with pytest.raises(ConfigError, match="holds the base weight of 'embed_tokens' itself"):
            fedlora.aggregate(folders, "flora")
        fedlora.aggregate(folders, "svd").save(tmp_path / "out")
        assert open_peft_folder(tmp_path / "out").shapes["embed_tokens"] == (5, 3, 8)

    @pytest.mark.parametrize("weights", [None, [5, 5], np.array([0.5, 0.5]), torch.tensor([2, 2])])
    def test_weights_of_any_kind(self, client, weights):
        assert fedlora.aggregate([client("a"), str(client("b"))], weights=weights).weights == (0.5, 0.5)

    def test_a_client_of_weight_zero(self, client, tmp_path):
        fedlora.aggregate([client("a"), client("b")], "oracle", [0, 3]).save(tmp_path / "out")
        check_exact(tmp_path / "out", [tmp_path / "b"])

    def test_limits(self, client):
        folder = client("a")
        size = (folder / "adapter_model.safetensors").stat().st_size
        fedlora.aggregate([folder], limits=Limits(total_bytes=size))
        with pytest.raises(AdapterError, match=f"its {size} bytes are above the limit of {size - 1}"):
            fedlora.aggregate([folder], limits=Limits(total_bytes=size - 1))

    def test_no_client(self):
        with pytest.raises(AdapterError, match="there is no client folder"):
            fedlora.aggregate([])

    def test_the_output_can_be_aggregated_again(self, client, tmp_path):
        folders = [client("a", r=2, lora_alpha=4), client("b")]
        fedlora.aggregate(folders, "svd").save(tmp_path / "out", per_client=True)
        again = [tmp_path / "out/client-000", tmp_path / "out/client-001", tmp_path / "out"]
        assert [client.rank for client in fedlora.aggregate(again, "svd").clients] == [2, 3, 3]


class TestManyClients:
    """300 of them, with room for some 40 open files."""

    @pytest.fixture
    def folders(self, tmp_path):
        g = torch.Generator().manual_seed(0)
        for u in range(300):
            tensors = {}
            for module, (d_out, d_in) in TARGETS.items():
                tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, d_in, generator=g)
                tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(d_out, 2, generator=g)
            (tmp_path / f"c{u}").mkdir()
            save_file(tensors, tmp_path / f"c{u}" / "adapter_model.safetensors")
            (tmp_path / f"c{u}" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
        return [tmp_path / f"c{u}" for u in range(300)]

    @pytest.mark.parametrize("name", ["fedit", "svd", "flora", "fedex-lora", "zero-padding"])
    def test_are_read_a_few_at_a_time(self, folders, monkeypatch, name):
        """Neither open files nor tensors in memory grow with the clients."""
        alive, most, read = [], [0], StoredTensors.read

        def counted(self, names):
            found = read(self, names)
            alive[:] = [r for r in alive if r() is not None]
            alive.extend(weakref.ref(tensor) for tensor in found)
            most[0] = max(most[0], sum(r() is not None for r in alive))
            return found

        monkeypatch.setattr(StoredTensors, "read", counted)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(list(Path("/proc/self/fd").iterdir()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, limits[1]))
        try:
            result = fedlora.aggregate(folders, name)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert len(result.weights) == 300
        assert most[0] <= 12
        assert registry.find(name).traits.exact == (result.divergence.rho < 1e-6) or name == "svd"


class TestWhatIsSaid:
    def test_rho_of_the_global_adapter(self, client):
        """With mixed ranks clients of a lower rank lose more than the adapter that is written."""
        folders = [client("alice", r=2, lora_alpha=4), client("bob", r=3, lora_alpha=6)]
        result = fedlora.aggregate(folders, "svd", weights=[1, 3])
        ideal = error = 0.0
        for module, pair in result.adapter.factors.items():
            uploads = [open_peft_folder(folder).adapter.factors[module].to_double().product() for folder in folders]
            wanted = 0.25 * uploads[0] + 0.75 * uploads[1]
            ideal += float(wanted.square().sum())
            error += float((pair.to_double().product() - wanted).square().sum())
        assert result.global_rho == pytest.approx(math.sqrt(error / ideal), rel=1e-6)
        assert result.global_rho < result.divergence.rho
        assert result.report()["rho"]["global"] == result.global_rho

    def test_at_one_rank_it_is_the_same(self, client):
        result = fedlora.aggregate([client("alice"), client("bob")], "svd")
        assert result.global_rho == result.divergence.rho
        assert result.notes == []

    def test_other_bases_are_noted(self, client):
        folders = [client("alice"), client("bob")]
        for folder, name in zip(folders, ("one/model", "another/model"), strict=True):
            path = folder / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}))
        (note,) = fedlora.aggregate(folders, "svd").notes
        assert "another/model, one/model" in note
