"""What `aggregate` writes is what PEFT loads: wrappers in names, real modules of such names, layers in layers, starts
that change the base, and the proof itself."""

import json
import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fedlora
from fedlora.adapter.weights import without_wrappers
from fedlora.errors import AdapterError, ConfigError
from fedlora.exchange import result as results
from fedlora.exchange.peftfolder import PEFT_PREFIX, config_at_ranks, open_peft_folder, passed_over

FILE = "adapter_model.safetensors"


class Net(nn.Module):
    """With a module that is called `module`, and attention whose layers PEFT adapts as one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.module = nn.ModuleDict({"q": nn.Linear(5, 7), "deep": nn.ModuleDict({"module": nn.Linear(7, 8)})})
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.module["deep"]["module"](self.module["q"](x))
        return self.head(self.attn(x, x, x)[0])


LINEAR = {"module.q": (7, 5), "module.deep.module": (8, 7)}
CONFIG = {"r": 2, "lora_alpha": 6, "target_modules": ["q", "deep.module"], "modules_to_save": ["head"]}


def drawn(model, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=g))
    return model


@pytest.fixture
def clients(tmp_path):
    """`clients(target_modules=…)`: two folders that PEFT wrote."""

    def make(**config):
        folders = []
        for seed in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = drawn(peft.get_peft_model(Net(), peft.LoraConfig(**CONFIG | config)), seed)
                model.save_pretrained(tmp_path / f"c{seed}")
            folders.append(tmp_path / f"c{seed}")
        return folders

    return make


def change(folder, base=Net):
    """Merged minus base weights, float64; no tensor may be missing."""
    model = base()
    before = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")
        after = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    return {name: after[name].double().numpy() - before[name] for name in before}


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def renamed(folder, rename):
    tensors = load_file(folder / FILE)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / FILE, {"format": "pt"})


def within(wrapper):
    """As PyTorch has it where a module within the model is wrapped."""
    return lambda name: name.replace(f"{PEFT_PREFIX}module.", f"{PEFT_PREFIX}module.{wrapper}.")


WRAPPERS = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "DataParallel": lambda name: f"module.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}",
    "DDP of a compiled one": lambda name: f"module._orig_mod.{name}",
    "compiled DDP": lambda name: f"_orig_mod.module.{name}",
    "DeepSpeed around DDP": lambda name: f"module.module.{name}",
    "FSDP within": within("_fsdp_wrapped_module"),
    "compiled within": within("_orig_mod"),
    "checkpoints within FSDP": within("_fsdp_wrapped_module._checkpoint_wrapped_module"),
    "PEFT around a compiled model": lambda name: name.replace(PEFT_PREFIX, f"{PEFT_PREFIX}_orig_mod."),
    "FSDP at every level": lambda name: "_fsdp_wrapped_module." + name.replace(".", "._fsdp_wrapped_module.", 3),
}


class TestWrappers:
    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_are_taken_off_and_said(self, clients, tmp_path, wrapper):
        folders = clients()
        fedlora.aggregate(folders, "svd").save(tmp_path / "plain")
        for folder in folders:
            renamed(folder, WRAPPERS[wrapper])
        result = fedlora.aggregate(folders, "svd")
        result.save(tmp_path / "out")
        (note,) = result.notes
        assert "c0 and 1 more: names of wrappers were taken off" in note
        plain, out = change(tmp_path / "plain"), change(tmp_path / "out")
        assert all(np.array_equal(plain[name], out[name]) for name in plain)
        assert all(out[f"{name}.weight"].any() for name in [*LINEAR, "head"])

    def test_one_client_alone_has_them(self, clients, tmp_path):
        folders = clients()
        renamed(folders[1], WRAPPERS["FSDP within"])
        fedlora.aggregate(folders, "svd").save(tmp_path / "out")
        assert open_peft_folder(tmp_path / "out").shapes.keys() == LINEAR.keys()

    def test_a_module_of_that_name_stays(self, clients, tmp_path):
        folders = clients()
        result = fedlora.aggregate(folders, "fedit")
        result.save(tmp_path / "out")
        assert result.notes == []
        assert result.adapter.modules == ("module.deep.module", "module.q")
        for name in load_file(folders[0] / FILE):
            assert without_wrappers(name) == name
        for name in LINEAR:
            pairs = [open_peft_folder(folder).adapter.factors[name].to_double() for folder in folders]
            wanted = 3 * ((pairs[0].B + pairs[1].B) / 2) @ ((pairs[0].A + pairs[1].A) / 2)
            np.testing.assert_allclose(change(tmp_path / "out")[f"{name}.weight"], wanted, rtol=1e-4, atol=1e-5)


class TestProof:
    def wrong(self, monkeypatch, **changes):
        monkeypatch.setattr(results, "config_at_ranks", lambda *given: {**config_at_ranks(*given), **changes})

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"target_modules": ["q"]}, "'module.deep.module' in"),
            ({"lora_alpha": 7}, "'module.deep.module' in"),
            ({"r": 4}, "says r=4"),
            ({"exclude_modules": ["q"]}, "'module.deep.module' in"),
            ({"layers_to_transform": [0]}, "'module.deep.module' in"),
            ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ],
    )
    def test_of_a_configuration(self, clients, tmp_path, monkeypatch, changes, what):
        self.wrong(monkeypatch, **changes)
        with pytest.raises(AdapterError, match=f"what was written is not what PEFT would load: .*{what}"):
            fedlora.aggregate(clients(), "svd").save(tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("kind", ["lost", "added", "changed"])
    def test_of_tensors(self, clients, tmp_path, monkeypatch, kind):
        def write(adapter, folder, config, card, real=results.write_peft_folder):
            real(adapter, folder, config, card)
            tensors = load_file(folder / FILE)
            name = f"{PEFT_PREFIX}head.bias"
            if kind == "lost":
                del tensors[name]
            else:
                tensors[f"{PEFT_PREFIX}head.other" if kind == "added" else name] = torch.ones(3)
            save_file(tensors, folder / FILE)

        monkeypatch.setattr(results, "write_peft_folder", write)
        with pytest.raises(AdapterError, match=r"not what PEFT would load: '\S*head\.\w+' in"):
            fedlora.aggregate(clients(), "svd").save(tmp_path / "out")

    def test_peft_agrees(self, clients, tmp_path):
        """A weight of an adapted module by the base's own name, and a module that is not chosen: PEFT loads neither."""
        (folder, _) = clients()
        tensors = load_file(folder / FILE)
        weight = f"{PEFT_PREFIX}module.q.weight"
        save_file(tensors | {weight: torch.ones(7, 5)}, folder / FILE)
        assert passed_over(open_peft_folder(folder)) == ["module.q.weight"]
        loaded = peft.PeftModel.from_pretrained(Net(), folder)
        assert not (loaded.get_submodule("base_model.model.module.q").weight == 1).any()
        config = config_of(folder) | {"target_modules": ["q"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        assert passed_over(open_peft_folder(folder))[0] == "module.deep.module"
        assert not change(folder)["module.deep.module.weight"].any()

    @pytest.mark.parametrize(
        "choice",
        [
            {"target_modules": "all-linear"},
            {"target_modules": None},
            {"target_modules": ["q"]},
            {"exclude_modules": ["module"]},
            {"layers_to_transform": 7, "layers_pattern": None},
        ],
    )
    def test_modules_that_the_configuration_does_not_choose_are_named(self, clients, tmp_path, choice):
        """What a client's file holds is what goes in, and what PEFT loads afterwards."""
        folders = clients()
        wanted = fedlora.aggregate(folders, "svd")
        wanted.save(tmp_path / "wanted")
        for folder in folders:
            (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | choice))
        fedlora.aggregate(folders, "svd").save(tmp_path / "out")
        one, other = change(tmp_path / "wanted"), change(tmp_path / "out")
        assert all(np.array_equal(one[name], other[name]) for name in one)
        assert other["module.deep.module.weight"].any()


class TestAttention:
    """nn.MultiheadAttention: PEFT names `attn` and `attn.base_layer.out_proj`, with one rank and alpha."""

    @pytest.mark.parametrize("pattern", [{}, {"alpha_pattern": {"attn": 20}}, {"alpha_pattern": {"out_proj": 20}}])
    def test_patterns_are_those_of_the_whole(self, clients, tmp_path, pattern):
        """At full rank nothing is lost, so the mean of what PEFT makes of the clients is what it makes of the result;
        another client's alpha is told from the name of the whole too."""
        folders = clients(target_modules=["attn", "q"], r=8)
        (folders[0] / "adapter_config.json").write_text(json.dumps(config_of(folders[0]) | pattern))
        result = fedlora.aggregate(folders, "svd")
        result.save(tmp_path / "out")
        assert result.alignment.mixed == ("attn" in pattern.get("alpha_pattern", {}))
        found, each = change(tmp_path / "out"), [change(folder) for folder in folders]
        for name in ("attn.in_proj_weight", "attn.out_proj.weight"):
            np.testing.assert_allclose(found[name], (each[0][name] + each[1][name]) / 2, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["flora", "oracle", "fedex-lora", "florist", "fedmomentum"])
    def test_what_could_not_be_added_to_the_base_is_refused(self, clients, name):
        with pytest.raises(ConfigError, match=r"'attn\.base_layer\.out_proj' is a layer within one.*svd, flexlora"):
            fedlora.aggregate(clients(target_modules=["attn", "q"]), name)


class TestStartsThatChangeTheBase:
    """The ways out that a refusal names, gone with PEFT itself."""

    def base(self, changed=None):
        model = Net()
        if changed is not None:
            model.load_state_dict(changed, strict=False)
        return model

    @pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
    def test_conversion_when_saving(self, tmp_path, start):
        config = CONFIG | {"modules_to_save": None, "init_lora_weights": start}  # PEFT would lose the head
        model = peft.get_peft_model(Net(), peft.LoraConfig(**config))
        model.save_pretrained(tmp_path / "as-it-is")
        with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
            fedlora.aggregate([tmp_path / "as-it-is"], "svd")
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        drawn(model, 3)
        model.save_pretrained(tmp_path / "alice", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        fedlora.aggregate([tmp_path / "alice"], "svd").save(tmp_path / "out")
        trained = model.merge_and_unload().state_dict()
        found = change(tmp_path / "out")
        for name in LINEAR:
            wanted = trained[f"{name}.weight"].double().numpy() - Net().state_dict()[f"{name}.weight"].double().numpy()
            np.testing.assert_allclose(found[f"{name}.weight"], wanted, rtol=1e-4, atol=1e-4)

    def test_peft_has_no_conversion_of_loftq(self, tmp_path):
        """It warns, and would subtract a start that does not add up with the quantised base."""
        model = peft.get_peft_model(Net(), peft.LoraConfig(**CONFIG))
        model.save_pretrained(tmp_path / "start")
        config = peft.LoraConfig(**CONFIG)
        config.init_lora_weights = "loftq"
        with pytest.warns(UserWarning, match="only works for converting"):
            peft.tuners.lora.LoraModel._convert_state_dict_for_initial_model(
                model, config, str(tmp_path / "start"), peft.get_peft_model_state_dict(model), {}
            )

    def test_loftq_with_its_base(self, tmp_path):
        """The adapter of a quantised base: that base saved, and the key set, as the refusal says."""
        quantised = {n: (4 * t).round() / 4 for n, t in Net().state_dict().items() if n.startswith("module")}
        folders = []
        for seed in range(2):
            model = drawn(peft.get_peft_model(self.base(quantised), peft.LoraConfig(**CONFIG)), seed)
            model.save_pretrained(tmp_path / f"c{seed}")
            folders.append(tmp_path / f"c{seed}")
            config = config_of(folders[-1])
            (folders[-1] / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "loftq"}))
            with pytest.raises(AdapterError, match=r"does not convert it; .*unload.*init_lora_weights to true"):
                fedlora.aggregate(folders[-1:], "svd")
            changes = {"init_lora_weights": True, "base_model_name_or_path": "quantised"}
            (folders[-1] / "adapter_config.json").write_text(json.dumps(config | changes))
        save_file(model.unload().state_dict(), tmp_path / "quantised.safetensors")
        base = load_file(tmp_path / "quantised.safetensors")
        assert torch.equal(base["module.q.weight"], quantised["module.q.weight"])
        fedlora.aggregate(folders, "oracle").save(tmp_path / "out")
        trained = [
            peft.PeftModel.from_pretrained(self.base(quantised), f).merge_and_unload().state_dict() for f in folders
        ]
        model = fedlora.apply_base_update(self.base(quantised), tmp_path / "out")
        found = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
        for name in LINEAR:
            wanted = (trained[0][f"{name}.weight"] + trained[1][f"{name}.weight"]) / 2
            torch.testing.assert_close(found[f"{name}.weight"], wanted, rtol=1e-4, atol=1e-4)
