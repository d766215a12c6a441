"""Adapter and base update as a plain model: its logits are those of the model with the adapter on it."""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fedlora
from fedlora.adapter import Factors
from fedlora.adapter.base_update import BaseUpdate
from fedlora.errors import AdapterError, ModelError
from fedlora.exchange import merging
from fedlora.exchange.peftfolder import open_peft_folder
from fedlora.model import base as models

IDS = torch.tensor([[5, 17, 9, 30, 2, 8], [11, 6, 6, 44, 3, 9]])


def classifier(name, **changes):
    """A random sequence classifier of three labels."""
    torch.manual_seed(4)
    if name == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        config = transformers.BertConfig(vocab_size=50, num_labels=3, **sizes | changes)
    else:
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20}
        config = transformers.GPT2Config(vocab_size=50, num_labels=3, pad_token_id=0, **sizes | changes)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


TARGETS = {"bert": ["query", "dense", "word_embeddings"], "gpt2": ["c_attn", "c_fc", "wte"]}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def trained(base, folder, seed=0, **config):
    """A client's folder, written by PEFT beside a base of its own; the base is changed."""
    config = {"r": 3, "lora_alpha": 6, "task_type": "SEQ_CLS"} | config
    model = peft.get_peft_model(base, peft.LoraConfig(**config))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    """`combined("gpt2", "flora")`: (base folder, folder of the aggregate). Not to be changed."""
    made = {}

    def folders(name, strategy="flora"):
        if name not in made:
            place = made[name] = tmp_path_factory.mktemp(name)
            classifier(name).save_pretrained(place / "base")
            for u in range(3):
                auto = transformers.AutoModelForSequenceClassification
                base = auto.from_pretrained(place / "base")
                trained(base, place / f"c{u}", u, target_modules=TARGETS[name])
        place = made[name]
        if not (place / strategy).exists():
            clients = [place / f"c{u}" for u in range(3)]
            fedlora.aggregate(clients, strategy, [3, 1, 2]).save(place / strategy)
        return place / "base", place / strategy

    return folders


@pytest.fixture
def copy(combined, tmp_path):
    """A copy of the BERT adapter that may be changed, and its base."""
    base, adapter = combined("bert")
    shutil.copytree(adapter, tmp_path / "adapter")
    return base, tmp_path / "adapter"


@pytest.mark.parametrize("strategy", ["fedit", "flora"])
@pytest.mark.parametrize("pooling", ["mean", "head"])
def test_a_run(finished, tmp_path, strategy, pooling):
    """bert-tiny, pooled or with its own head: `load_merged` says what `load_adapter` says."""
    adapter = finished({"strategy": strategy, "model.pooling": pooling}) / "adapter"
    assert (adapter / "base_delta.safetensors").exists() == (strategy == "flora")
    fedlora.merge(adapter, tmp_path / "plain")
    model, tokenizer, labels = fedlora.load_merged(tmp_path / "plain")
    wanted, _, names = fedlora.load_adapter(adapter)
    tokens = tokenizer(["a small dog", "the capital of a country far away"], padding=True, return_tensors="pt")
    assert labels == names
    assert not any("lora" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        same(model(**tokens).logits, wanted(**tokens).logits)
        bare = fedlora.load_base("bert-tiny", labels, pooling=pooling).eval()(**tokens).logits
    assert (bare - wanted(**tokens).logits).abs().max() > 1e-3
    if pooling == "head":
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
        same(plain(**tokens).logits, wanted(**tokens).logits)
        assert list(plain.config.id2label.values()) == labels


ALONE = """
from importlib.machinery import PathFinder

everything = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *more: None if name.split(".")[0] in ("fedlora", "peft") else everything(name, *more)
)
"""
TEXTS = ["a small dog", "the capital of a country far away"]


POOLINGS = ("mean", "cls", "head")


@pytest.fixture(scope="module")
def alone(finished, tmp_path_factory):
    """By pooling: the adapter, the folder of the merged model, and what the code of its README prints in a process of
    neither package."""
    place, told = tmp_path_factory.mktemp("alone"), []
    adapters = {each: finished({"strategy": "flora", "model.pooling": each}) / "adapter" for each in POOLINGS}
    for pooling, adapter in adapters.items():
        fedlora.merge(adapter, place / pooling)
        (snippet,) = re.findall(r"```python\n(.*?)```", (place / pooling / "README.md").read_text(), flags=re.S)
        snippet = snippet.replace("this folder", str(place / pooling))
        told.append(snippet.replace('["one text", "another text"]', repr(TEXTS)) + "\nprint(logits.tolist())")
    code = f"{ALONE}\nfor told in {told!r}:\n    exec(told, {{}})\n"
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=place, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return {
        pooling: (adapters[pooling], place / pooling, lines[2 * number : 2 * number + 2])
        for number, pooling in enumerate(POOLINGS)
    }


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_readme_of_a_merged_model_loads_it_where_neither_peft_nor_fedlora_is(alone, pooling):
    adapter, plain, lines = alone[pooling]
    names, numbers = map(ast.literal_eval, lines)
    model, tokenizer, labels = fedlora.load_adapter(adapter)
    with torch.no_grad():
        wanted = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    same(torch.tensor(numbers), wanted)
    assert names == [labels[index] for index in wanted.argmax(1).tolist()]
    declared = json.loads((plain / "config.json").read_text())["id2label"]
    assert list(declared.values()) == labels


def llama(tie=False, rows=64):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=rows, num_key_value_heads=2, tie_word_embeddings=tie, pad_token_id=0, **sizes
    )
    return transformers.LlamaForCausalLM(config).eval()


CAUSAL = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("kind", ["saved embeddings", "saved and grown", "tokens", "tied tokens"])
def test_embeddings_that_come_with_an_adapter_are_merged_as_peft_merges_them(tmp_path, kind):
    """In float64, and as the folder that Transformers reads."""
    tie, grown = kind == "tied tokens", kind == "saved and grown"
    base = llama(tie)
    if grown:
        base.resize_token_embeddings(70, mean_resizing=False)
    rows = {"trainable_token_indices": [1, 5]} if "tokens" in kind else {}
    live = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **CAUSAL, **rows))
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if parameter.requires_grad or "embed_tokens" in name or "lm_head" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    live.save_pretrained(tmp_path / "adapter", save_embedding_layers=not rows)

    own = llama(tie)
    if grown:
        own.resize_token_embeddings(70, mean_resizing=False)
    wanted = peft.PeftModel.from_pretrained(own.double(), tmp_path / "adapter").merge_and_unload().eval()
    fedlora.merge(tmp_path / "adapter", tmp_path / "plain", llama(tie).double())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float64).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, wanted(ids).logits, rtol=1e-9, atol=1e-12)
        assert (plain(ids).logits[..., :64] - llama(tie).double()(ids).logits).abs().max() > 1e-3


def test_attention_that_peft_merges_wrongly_is_refused(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x)[0]

    peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["attn"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"module 'attn' is an nn\.MultiheadAttention, whose output projection PEFT"):
        fedlora.merge(tmp_path / "adapter", tmp_path / "plain", Net())
    assert not (tmp_path / "plain").exists()


def test_pefts_automatic_class_loads_what_the_card_says(finished, tmp_path_factory):
    tiny_copy = shutil.copytree(models.resolve("bert-tiny"), tmp_path_factory.mktemp("base") / "bert")
    adapter = finished({"model.name": str(tiny_copy), "model.pooling": "head"}) / "adapter"
    model, tokenizer, labels = fedlora.load_adapter(adapter)
    assert f"num_labels={len(labels)}, dtype='float32')`" in (adapter / "README.md").read_text()
    found = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        adapter, num_labels=len(labels), dtype="float32"
    )
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        same(found.eval()(**tokens).logits, model(**tokens).logits)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("strategy", ["fedit", "flora", "fedex-lora", "oracle", "florist", "fedmomentum"])
def test_an_adapter_from_elsewhere(combined, tmp_path, name, strategy):
    """The plain folder, read by Transformers alone."""
    base, adapter = combined(name, strategy)
    fedlora.merge(adapter, tmp_path / "plain", base)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    start = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    before = logits(start)
    wanted = logits(peft.PeftModel.from_pretrained(fedlora.apply_base_update(start, adapter), adapter))
    same(logits(plain), wanted)
    assert (before - wanted).abs().max() > 0.01
    assert not list((tmp_path).glob(".*"))


def test_the_base_is_in_the_configuration_or_in_memory(combined, tmp_path):
    base, adapter = combined("gpt2")
    fedlora.merge(adapter, tmp_path / "named")
    fedlora.merge(adapter, tmp_path / "given", classifier("gpt2"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("named", "given"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        same(tensor, other[name])
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


class TestBaseUpdate:
    def test_before_and_after_the_adapter(self, combined):
        """On a plain model or one with an adapter on it."""
        _, adapter = combined("bert")
        first = peft.PeftModel.from_pretrained(fedlora.apply_base_update(classifier("bert"), adapter), adapter)
        second = fedlora.apply_base_update(peft.PeftModel.from_pretrained(classifier("bert"), adapter), adapter)
        same(logits(first), logits(second))

    def test_how_layers_store_their_weight(self, combined):
        """W0 + left·right for a linear layer, its transpose for Conv1D and embeddings."""
        for name in ("bert", "gpt2"):
            _, adapter = combined(name)
            before, after = classifier(name), fedlora.apply_base_update(classifier(name), adapter)
            delta = load_file(adapter / "base_delta.safetensors")
            for module in {tensor.rpartition(".")[0] for tensor in delta}:
                wanted = delta[f"{module}.left"] @ delta[f"{module}.right"]
                found = after.get_submodule(module).weight - before.get_submodule(module).weight
                same(found, wanted if name == "bert" and "embed" not in module else wanted.T)

    def test_none_changes_nothing(self, combined):
        _, adapter = combined("bert", "fedit")
        same(logits(fedlora.apply_base_update(classifier("bert"), adapter)), logits(classifier("bert")))

    @pytest.mark.parametrize(
        ("module", "left", "right", "said"),
        [
            ("bert.nowhere", (16, 1), (1, 16), "the model has no module 'bert.nowhere' with a weight"),
            ("bert.encoder", (16, 1), (1, 16), "the model has no module 'bert.encoder' with a weight"),
            ("classifier", (16, 1), (1, 3), r"module 'classifier' is \(16, 3\), but the model's weight is \(3, 16\)"),
            ("bert.embeddings.word_embeddings", (50, 1), (1, 16), r"is \(50, 16\), but .* is \(50, 16\)"),
        ],
    )
    def test_a_foreign_one(self, tmp_path, module, left, right, said):
        """The model stays as it was, also where other modules fit."""
        fits = Factors(torch.ones(3, 1), torch.ones(1, 16))
        BaseUpdate({"classifier": fits, module: Factors(torch.ones(left), torch.ones(right))}).write(tmp_path)
        model = classifier("bert")
        with pytest.raises(AdapterError, match=f"base update: .*{said}"):
            fedlora.apply_base_update(model, tmp_path)
        same(logits(model), logits(classifier("bert")))

    def test_values_that_are_not_finite(self, tmp_path):
        BaseUpdate({"classifier": Factors(torch.full((3, 1), torch.nan), torch.ones(1, 16))}).write(tmp_path)
        with pytest.raises(AdapterError, match="module 'classifier' has values that are not finite"):
            fedlora.apply_base_update(classifier("bert"), tmp_path)

    def test_a_weight_that_two_layers_share(self, tmp_path):
        """The output layer of a language model would move with its embedding, which the adapter leaves alone."""
        config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=20)
        BaseUpdate({"transformer.wte": Factors(torch.ones(16, 1), torch.ones(1, 50))}).write(tmp_path)
        with pytest.raises(AdapterError, match=r"'transformer\.wte' shares its weight with 'lm_head'"):
            fedlora.apply_base_update(transformers.GPT2LMHeadModel(config), tmp_path)

    def test_a_damaged_file(self, tmp_path):
        (tmp_path / "base_delta.safetensors").write_bytes(pickle.dumps({"classifier.left": 1}))
        with pytest.raises(AdapterError, match=r"base_delta\.safetensors cannot be read as safetensors"):
            fedlora.apply_base_update(classifier("bert"), tmp_path)


class TestRefusals:
    """Each before anything is written, and nothing is left."""

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path):
        self.place = tmp_path

    def refused(self, error, said, folder, out, base=None):
        before = sorted(self.place.rglob("*"))
        with pytest.raises(error, match=said):
            fedlora.merge(folder, out, base)
        assert sorted(self.place.rglob("*")) == before

    def test_the_output_is_there(self, combined, tmp_path):
        (tmp_path / "file").touch()
        (tmp_path / "full" / "x").mkdir(parents=True)
        _, adapter = combined("bert")
        for name in ("file", "full"):
            self.refused(AdapterError, f"{name} is there already", adapter, tmp_path / name)
        self.refused(AdapterError, "file is no folder that can be written", adapter, tmp_path / "file" / "out")

    def test_unknown_bases(self, combined, tmp_path):
        _, adapter = combined("bert")
        self.refused(ModelError, "base model 'someone/none' cannot be", adapter, tmp_path / "out", "someone/none")
        self.refused(ModelError, "cannot be loaded", adapter, tmp_path / "out", tmp_path)

    def test_a_configuration_without_a_base(self, copy, tmp_path):
        _, adapter = copy
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"task_type": None}))
        self.refused(AdapterError, "does not say which model it is for", adapter, tmp_path / "out")

    @pytest.mark.parametrize("changes", [{"hidden_size": 24}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
    @pytest.mark.parametrize("strategy", ["fedit", "flora"])
    def test_a_base_of_another_size(self, combined, tmp_path, changes, strategy):
        """Also where PEFT would pass over the layers that are missing or too many."""
        _, adapter = combined("bert", strategy)
        self.refused(
            AdapterError, r"base update|not fit the base", adapter, tmp_path / "o", classifier("bert", **changes)
        )

    def test_another_architecture(self, combined, tmp_path):
        _, adapter = combined("bert", "fedit")
        self.refused(AdapterError, "does not fit the base model", adapter, tmp_path / "out", classifier("gpt2"))

    def test_a_pickle(self, copy, tmp_path):
        _, adapter = copy
        (adapter / "adapter_model.safetensors").unlink()
        torch.save({}, adapter / "adapter_model.bin")
        self.refused(AdapterError, r"adapter_model\.bin is a pickle", adapter, tmp_path / "out")

    def test_a_tensor_that_is_missing(self, copy, tmp_path):
        _, adapter = copy
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors.pop("base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight")
        save_file(tensors, adapter / "adapter_model.safetensors")
        self.refused(AdapterError, r"query' has no lora_B\.weight", adapter, tmp_path / "out")

    def test_the_folder_of_a_personal_run(self, finished, tmp_path):
        """There is no global adapter; a client's own can be merged."""
        adapter = finished({"strategy": "local"}) / "adapter"
        self.refused(AdapterError, "is no PEFT adapter folder", adapter, tmp_path / "out")
        fedlora.merge(adapter / "client-001", tmp_path / "out")
        assert len(fedlora.load_merged(tmp_path / "out")[2]) > 1

    def test_load_merged_of_something_else(self, combined):
        with pytest.raises(AdapterError, match=r"holds no readable fedlora\.json"):
            fedlora.load_merged(combined("bert")[0])


class TestOnce:
    """A base update is part of what was learned: it is applied once, everywhere it belongs."""

    def test_a_second_time_is_refused(self, combined):
        place, folder = combined("bert")
        base = transformers.AutoModelForSequenceClassification.from_pretrained(place)
        fedlora.apply_base_update(base, folder)
        with pytest.raises(AdapterError, match=r"has the base update of .* already"):
            fedlora.apply_base_update(base, folder)

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(AdapterError, match="nothere is no folder"):
            fedlora.apply_base_update(classifier("bert"), tmp_path / "nothere")

    @pytest.mark.parametrize("strategy", ["flora", "oracle", "fedex-lora"])
    def test_every_client_folder_is_whole(self, combined, tmp_path, strategy):
        place, whole = combined("bert", strategy)
        clients = [whole.parent / f"c{u}" for u in range(3)]
        fedlora.aggregate(clients, strategy).save(tmp_path / "out", per_client=True)
        for folder in (tmp_path / "out", tmp_path / "out" / "client-001"):
            fedlora.merge(folder, tmp_path / f"merged-{folder.name}", base=place)
        auto = transformers.AutoModelForSequenceClassification
        one, other = (auto.from_pretrained(tmp_path / f"merged-{name}") for name in ("out", "client-001"))
        same(logits(one), logits(other))

    def test_a_client_with_a_base_update_is_refused(self, combined):
        _, folder = combined("bert", "flora")
        with pytest.raises(AdapterError, match=r"flora has a base update \(base_delta.safetensors\), without which"):
            fedlora.aggregate([folder, folder.parent / "c0"], "svd")

    def test_tied_weights_are_not_merged(self, tmp_path):
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            tie_word_embeddings=True,
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        folder = trained(base, tmp_path / "c0", target_modules=["embed_tokens"], task_type="CAUSAL_LM")
        with pytest.raises(AdapterError, match="shares its weight with"):
            fedlora.merge(folder, tmp_path / "merged", base=tmp_path / "base")
        assert not (tmp_path / "merged").exists()


def test_adapters_of_runs_stay_loadable_after_an_aggregation(tmp_path):
    """What a run knows of its base goes along, so that neither labels nor pooling are lost."""
    config = fedlora.RunConfig.model_validate(
        {
            "strategy": "local", "rounds": 1, "clients": 2, "data": {"train_size": 80, "test_size": 40},
            "training": {"local_steps": 2}, "runner": {"kind": "threads", "device": "cpu"},
        }
    )  # fmt: skip
    fedlora.train(config, str(tmp_path / "run"))
    clients = [tmp_path / "run" / "adapter" / f"client-{u:03d}" for u in range(2)]
    with pytest.raises(
        AdapterError, match=r"an adapter per client and no global one; choose one, such as .*client-000"
    ):
        fedlora.load_adapter(tmp_path / "run" / "adapter")
    fedlora.aggregate(clients, "svd").save(tmp_path / "out")
    model, _, labels = fedlora.load_adapter(tmp_path / "out")
    fedlora.merge(tmp_path / "out", tmp_path / "merged")
    merged, _, again = fedlora.load_merged(tmp_path / "merged")
    assert labels == again
    same(logits(model), logits(merged))


class TestStrangers:
    """What a configuration from anyone may not do to PEFT."""

    def test_a_regular_expression_is_replaced_by_names(self, copy, tmp_path):
        """As it stands it would take longer than anyone waits."""
        base, adapter = copy
        config = json.loads((adapter / "adapter_config.json").read_text())
        alien = {"target_modules": r"(?:(?:\w+)+\.?)+!", "exclude_modules": "(a+)+$", "auto_mapping": {"x": 1}}
        (adapter / "adapter_config.json").write_text(json.dumps(config | alien | {"megatron_core": "antigravity"}))
        fedlora.merge(adapter, tmp_path / "plain", base)
        attached = merging.attach(classifier("bert"), adapter)
        found = attached.peft_config["default"]
        assert found.target_modules == set(open_peft_folder(adapter).shapes)
        assert (found.exclude_modules, found.auto_mapping) == (None, None)

    def test_modules_of_several_scalings_are_merged(self, copy, tmp_path):
        """They cannot be aggregated, but they can be used."""
        base, adapter = copy
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"query": 30}}))
        with pytest.raises(AdapterError, match="modules have different alpha/r"):
            assert open_peft_folder(adapter).scaling
        fedlora.merge(adapter, tmp_path / "plain", base)
        auto = transformers.AutoModelForSequenceClassification
        start = fedlora.apply_base_update(auto.from_pretrained(base), adapter)
        same(logits(auto.from_pretrained(tmp_path / "plain")), logits(peft.PeftModel.from_pretrained(start, adapter)))

    @pytest.mark.parametrize("shape", [(4, 128), (3, 0)])
    def test_a_classifier_that_does_not_fit(self, finished, tmp_path, shape):
        adapter = finished({"model.pooling": "mean"}) / "adapter"
        fedlora.merge(adapter, tmp_path / "plain")
        place = tmp_path / "plain" / "classifier.safetensors"
        save_file({"weight": torch.ones(shape), "bias": torch.ones(shape[0])}, place)
        with pytest.raises(AdapterError, match=r"classifier\.safetensors.*(expected|is missing)"):
            fedlora.load_merged(tmp_path / "plain")

    def test_links_and_other_kinds(self, copy, tmp_path):
        base, adapter = copy
        (adapter / "adapter_config.json").rename(tmp_path / "config.json")
        (adapter / "adapter_config.json").symlink_to(tmp_path / "config.json")
        with pytest.raises(AdapterError, match="a link that leads out of the folder"):
            fedlora.merge(adapter, tmp_path / "plain", base)
        (adapter / "adapter_config.json").unlink()
        alien = {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}}
        (adapter / "adapter_config.json").write_text(json.dumps(alien))
        with pytest.raises(AdapterError, match="peft_type is 'PROMPT_TUNING'; expected LORA or HIRA"):
            fedlora.merge(adapter, tmp_path / "plain", base)
