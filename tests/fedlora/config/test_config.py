"""One typed configuration: what it refuses and how it says so, and what may change without changing results."""

import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import configfile
from fedlora.config.data import PARTITIONER_CLASSES
from fedlora.config.lora import LoraConfig
from fedlora.config.run import RunConfig, Section, TrainingConfig
from fedlora.errors import ConfigError

PRESETS = Path(__file__).parents[3] / "deployments" / "presets"
KEYS = list(configfile.dotted_keys())
DEFAULTS = configfile.flatten(RunConfig().model_dump(mode="json"))

OTHER = {
    "name": "a label",
    "task": "regression",
    "strategy": "svd",
    "strategy_options": {"max_sweeps": 3},
    "rounds": 3,
    "clients": 4,
    "fraction": 0.5,
    "weighting": "uniform",
    "seed": 7,
    "model.name": "minilm",
    "model.pooling": "cls",
    "model.dtype": "bf16",
    "model.quantization": "nf4",
    "model.gradient_checkpointing": True,
    "model.attention": "sdpa",
    "model.revision": "main",
    "model.trust_remote_code": True,
    "data.name": "glue",
    "data.subset": "rte",
    "data.text": "sentence1",
    "data.text_pair": "sentence2",
    "data.label": "topic",
    "data.chat_template": "chatml",
    "training.gradient_accumulation": 4,
    "training.packing": True,
    "training.cohort": 4,
    "data.template": "Sum: {{ question }}",
    "data.messages": "chat",
    "data.tests": "checks",
    "data.options": "choices",
    "data.empty": "drop",
    "data.prompt": "ask",
    "data.response": "answer",
    "data.loss_on": "all",
    "data.too_long": "cut",
    "data.client": "author",
    "data.test_fraction": 0.3,
    "data.train_size": 100,
    "data.test_size": 50,
    "data.max_length": 32,
    "partition.name": "shard",
    "partition.alpha": 0.1,
    "partition.min_size": 3,
    "partition.labels_per_client": 4,
    "partition.balanced_fraction": 0.2,
    "partition.by": "topic",
    "lora.variant": "rslora",
    "lora.rank": 4,
    "lora.alpha": 9.0,
    "lora.ranks": [1, 2],
    "lora.truncation": "svd",
    "lora.dropout": 0.1,
    "lora.target_modules": ["query"],
    "lora.exclude_modules": ["value"],
    "training.local_steps": 5,
    "training.local_epochs": 1.5,
    "training.batch_size": 4,
    "training.learning_rate": 0.1,
    "training.optimizer": "sgd",
    "training.weight_decay": 0.01,
    "training.momentum": 0.9,
    "training.warmup_steps": 0,
    "training.max_grad_norm": 0.5,
    "lora.init": "some/adapter",
    "training.final_learning_rate": 1e-4,
    "evaluation.every": 2,
    "evaluation.local": False,
    "evaluation.batch_size": 8,
    "evaluation.execute_code": True,
    "evaluation.generate.scorers": ["exact"],
    "evaluation.generate.decides": "loss",
    "evaluation.generate.every": 3,
    "evaluation.generate.share": 0.5,
    "evaluation.generate.examples": 12,
    "evaluation.generate.local_examples": 2,
    "evaluation.generate.max_new_tokens": 20,
    "evaluation.generate.batch_size": 4,
    "evaluation.generate.temperature": 0.7,
    "evaluation.generate.top_p": 0.9,
    "evaluation.generate.shown": 3,
    "runner.kind": "threads",
    "runner.slots": 3,
    "runner.device": "cpu",
    "runner.threads": 2,
    "runner.exclusive": True,
    "runner.retries": 0,
    "runner.timeout_s": 60.0,
    "runner.group_s": 0.0,
    "runner.address": "10.0.0.1:6379",
    "runner.gpus_per_client": 0.25,
    "runner.cpus_per_client": 2.0,
    "runner.shared_files": False,
    "keep_rounds": 5,
    "channel.min_clients": 2,
    "channel.too_few": "stop",
    "channel.attempts": 1,
    "channel.over_selection": 0.5,
    "channel.deadline_s": 20.0,
    "channel.max_norm": 3.0,
    "channel.faults.crash": 0.1,
    "channel.faults.delay": "exponential",
    "channel.faults.delay_s": 3.0,
    "channel.faults.corrupt": 0.2,
    "channel.faults.kinds": ["nan", "norm"],
    "tracking.experiment": "another",
    "tracking.uri": "sqlite:///x.db",
    "tracking.adapter_every": 2,
}
"""A value for every key that is not its default."""

NEEDS = {
    "strategy_options": {"strategy": "flora-na"},
    "training.local_epochs": {"training.local_steps": None, "training.local_epochs": 1.0},
    "training.momentum": {"training.optimizer": "sgd"},
    "lora.ranks": {"strategy": "svd", "clients": 2},
    "channel.over_selection": {"fraction": 0.5},
    "channel.deadline_s": {"channel.faults.delay": "lognormal"},
    "runner.address": {"runner.kind": "ray"},
    "runner.gpus_per_client": {"runner.kind": "ray"},
    "runner.cpus_per_client": {"runner.kind": "dask"},
    "runner.shared_files": {"runner.kind": "dask"},
}
"""What must be set with it."""

NEUTRAL = {
    "name",
    "runner.kind",
    "runner.slots",
    "runner.exclusive",
    "runner.retries",
    "runner.timeout_s",
    "runner.group_s",
    "runner.address",
    "runner.gpus_per_client",
    "runner.cpus_per_client",
    "runner.shared_files",
    "keep_rounds",
} | {key for key in KEYS if key.startswith("tracking.")}
"""Keys that cannot change a number of the results."""


class TestEveryKey:
    def test_is_in_the_table(self):
        assert set(OTHER) == set(KEYS), "a new key needs another value here, and a thought whether it changes results"

    def test_is_described(self):
        def undescribed(section, prefix=""):
            for name, field in section.model_fields.items():
                if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                    assert field.annotation.__doc__
                    yield from undescribed(field.annotation, f"{prefix}{name}.")
                elif not (field.description or "").strip():
                    yield f"{prefix}{name}"

        assert list(undescribed(RunConfig)) == []

    @pytest.mark.parametrize("key", KEYS)
    def test_changes_only_itself(self, key):
        given_ = {**NEEDS.get(key, {}), key: OTHER[key]}
        now = configfile.flatten(configfile.build(given_).model_dump(mode="json"))
        changed = {name for name in now.keys() | DEFAULTS.keys() if now.get(name) != DEFAULTS.get(name)}
        assert changed == {"strategy_options.max_sweeps" if name == "strategy_options" else name for name in given_}

    @pytest.mark.parametrize("key", KEYS)
    def test_is_in_the_digest_where_it_changes_results(self, key):
        needs = NEEDS.get(key, {})
        before, after = configfile.build(needs), configfile.build({**needs, key: OTHER[key]})
        assert (before.digest() == after.digest()) == (key in NEUTRAL)

    def test_digest_is_the_same_tomorrow(self):
        assert configfile.build({"lora.alpha": 16}).digest() == configfile.build({"lora.alpha": 16.0}).digest()
        assert re.fullmatch("[0-9a-f]{16}", RunConfig().digest())


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("typed", "meant"),
        [
            ("lora.rnk", "lora.rank"),
            ("learning_rate", "training.learning_rate"),
            ("training.leraning_rate", "training.learning_rate"),
            (
                "model.batch_size",
                "evaluation.batch_size or evaluation.generate.batch_size or training.batch_size",
            ),
            ("alpha", "lora.alpha or partition.alpha"),
            ("round", "rounds"),
        ],
    )
    def test_suggest_the_nearest(self, typed, meant):
        with pytest.raises(ConfigError, match=rf"^unknown key '{re.escape(typed)}'\. Did you mean '({meant})'\?$"):
            configfile.build({typed: 1})

    def test_far_from_everything(self):
        with pytest.raises(ConfigError, match=r"^unknown key 'zzzz'\.$"):
            configfile.build({"zzzz": 1})

    def test_in_a_file(self, tmp_path):
        (tmp_path / "run.yaml").write_text("lora:\n  rang: 4\n")
        with pytest.raises(ConfigError, match=r"unknown key 'lora\.rang'\. Did you mean 'lora\.rank'\?"):
            configfile.load(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("partition.name", "dirichlett", r"partition\.name='dirichlett' .*: iid, .*y\. Did you mean 'dirichlet'\?"),
        ("lora.variant", "lorra", r"lora\.variant='lorra' .*: allowed: lora, rslora, dora, hira\. Did you mean 'lora'"),
        ("strategy", "florra", r"strategy='florra' is not allowed: .*known: fedit, .*Did you mean 'flora'\?"),
        ("lora.rank", 0, r"lora\.rank=0 is not allowed: .*greater than or equal to 1"),
        ("lora.rank", 2.5, r"lora\.rank=2\.5 is not allowed: .*integer"),
        ("lora.rank", "four", r"lora\.rank='four' is not allowed: .*integer"),
        ("fraction", 0, r"fraction=0 is not allowed: .*greater than 0"),
        ("fraction", 1.1, r"fraction=1\.1 is not allowed: .*less than or equal to 1"),
        ("training.learning_rate", float("nan"), r"training\.learning_rate=nan is not allowed"),
        ("lora.alpha", math.inf, r"lora\.alpha=inf is not allowed: .*finite"),
        ("lora.dropout", 1, r"lora\.dropout=1 is not allowed: .*less than 1"),
        ("clients", None, r"clients=None is not allowed"),
        ("runner.device", "gpu", r"runner\.device='gpu' is not allowed: expected auto, cpu, cuda, cuda:N or mps"),
        ("runner.device", "cpu:1", r"runner\.device='cpu:1' is not allowed"),
        ("runner.device", "cuda:x", r"runner\.device='cuda:x' is not allowed"),
        ("tracking.experiment", "", r"tracking\.experiment='' is not allowed"),
        ("data.test_fraction", 1, r"data\.test_fraction=1 is not allowed"),
        ("seed", -1, r"seed=-1 is not allowed"),
    ],
)  # fmt: skip
def test_wrong_values(key, value, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        configfile.build({key: value})


@pytest.mark.parametrize("value", ["auto", "cpu", "mps", "cuda", "cuda:3"])
def test_devices(value):
    assert configfile.build({"runner.device": value}).runner.device == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"training.local_epochs": 1, "training.local_steps": 5},
            "exactly one of local_steps and local_epochs .*both are set in one place; leave one of them out",
        ),
        (
            {"training.local_steps": None},
            "exactly one of local_steps and local_epochs .*neither is set; set one of them",
        ),
        ({"training.momentum": 0.9}, r"training\.momentum is for training\.optimizer=sgd"),
        ({"runner.device": "cpu", "runner.kind": "threads", "runner.slots": 2}, r"runner\.slots above 1 needs"),
        ({"strategy_options.tolerance": 1}, r"strategy_options\.tolerance=1 of strategy 'fedit'.*Options: none"),
    ],
)
def test_combinations_that_cannot_work(values, message):
    with pytest.raises(ConfigError, match=message):
        configfile.build(values)


@pytest.mark.parametrize(
    "values",
    [
        {"training.local_epochs": 1, "training.local_steps": None},
        {"training.local_epochs": 1},
        {"training.momentum": 0.9, "training.optimizer": "sgd"},
        {"runner.device": "cpu", "runner.kind": "threads", "runner.slots": 1},
        {"runner.device": "cpu", "runner.kind": "processes", "runner.slots": 2},
        {"strategy_options.tolerance": 1e-3, "strategy": "flora-na"},
    ],
)
def test_combinations_that_do(values):
    configfile.build(values)


class TestMeanings:
    @pytest.mark.parametrize(("name", "meant"), PARTITIONER_CLASSES.items())
    def test_class_names_of_flwr_datasets(self, name, meant):
        config = configfile.build({"partition.name": name, "data.client": "author"})
        assert config.partition.name == meant
        assert config.digest() == configfile.build({"partition.name": meant, "data.client": "author"}).digest()

    @pytest.mark.parametrize(("variant", "scaling"), [("lora", 3), ("rslora", 6), ("dora", 3), ("hira", 1)])
    def test_scaling(self, variant, scaling):
        lora = LoraConfig(rank=4, alpha=12, variant=variant, ranks=[4, 16])
        assert lora.scaling == scaling
        if variant != "hira":
            assert [lora.alpha_at(rank) for rank in (4, 16)] == [12, 24 if variant == "rslora" else 48]

    @pytest.mark.parametrize(
        ("fraction", "clients", "count"), [(1, 10, 10), (0.1, 100, 10), (0.01, 10, 1), (0.3, 5, 2), (0.29, 100, 29)]
    )
    def test_clients_per_round(self, fraction, clients, count):
        assert configfile.build({"fraction": fraction, "clients": clients}).clients_per_round == count

    def test_frozen(self):
        with pytest.raises(ValueError, match="frozen"):
            RunConfig().seed = 3


class TestOverrides:
    @pytest.mark.parametrize(
        ("word", "key", "value"),
        [
            ("lora.rank=4", "lora.rank", 4),
            ("training.learning_rate=5e-3", "training.learning_rate", 0.005),
            ("training.learning_rate=1E-2", "training.learning_rate", 0.01),
            ("training.local_epochs=.5", "training.local_epochs", 0.5),
            ("data.client=null", "data.client", None),
            ("data.client=", "data.client", None),
            ("evaluation.local=false", "evaluation.local", False),
            ("evaluation.local=no", "evaluation.local", False),
            ("lora.target_modules=query,value", "lora.target_modules", ["query", "value"]),
            ("lora.target_modules=query, value,", "lora.target_modules", ["query", "value"]),
            ("lora.target_modules=[query, value]", "lora.target_modules", ["query", "value"]),
            ("lora.target_modules=query", "lora.target_modules", ["query"]),
            ("lora.target_modules=null", "lora.target_modules", None),
            ("tracking.uri=http://127.0.0.1:5000", "tracking.uri", "http://127.0.0.1:5000"),
            ("tracking.uri=sqlite:///a=b.db", "tracking.uri", "sqlite:///a=b.db"),
            ("name='12'", "name", "12"),
        ],
    )
    def test_values(self, word, key, value):
        values = configfile.parse_overrides([word])
        found = configfile.flatten(configfile.build(values).model_dump())[key]
        assert found == value
        assert type(found) is type(value)

    def test_strategy_options_dotted_or_whole(self):
        dotted = configfile.parse_overrides(["strategy=flora-na", "strategy_options.max_sweeps=3"])
        whole = configfile.parse_overrides(["strategy=flora-na", "strategy_options={max_sweeps: 3}"])
        assert dotted == whole == {"strategy": "flora-na", "strategy_options.max_sweeps": 3}
        assert configfile.build(whole).strategy_options == {"max_sweeps": 3}

    def test_a_section_beside_one_of_its_keys(self):
        both = {"lora.rank": 8, "lora.alpha": 3}
        assert configfile.parse_overrides(["lora.rank=8", "lora={alpha: 3}"]) == both
        assert configfile.parse_overrides(["lora={alpha: 3, rank: 2}", "lora.rank=8"]) == both

    def test_a_section_at_once(self):
        assert configfile.parse_overrides(["lora={rank: 2, alpha: 4}"]) == {"lora.rank": 2, "lora.alpha": 4}

    def test_the_last_one_counts(self):
        assert configfile.parse_overrides(["seed=1", "seed=2"]) == {"seed": 2}

    @pytest.mark.parametrize("word", ["lora.rank", "=4", ""])
    def test_not_key_and_value(self, word):
        with pytest.raises(ConfigError, match=f"'{word}' is not of the form key=value, for example"):
            configfile.parse_overrides([word])

    def test_value_that_is_no_yaml(self):
        with pytest.raises(ConfigError, match=r"the value of 'lora\.target_modules' cannot be read: \[a, b"):
            configfile.parse_overrides(["lora.target_modules=[a, b"])

    @pytest.mark.parametrize("words", [["lora=4", "lora.rank=4"], ["lora.rank=4", "lora=4"]])
    def test_value_and_section(self, words):
        with pytest.raises(ConfigError, match="lora"):
            configfile.build(configfile.parse_overrides(words))

    def test_win_over_the_file(self, tmp_path):
        (tmp_path / "run.yaml").write_text("seed: 3\nlora: {rank: 4, alpha: 5}\n")
        config = configfile.load(tmp_path / "run.yaml", {"lora.rank": 2})
        assert (config.seed, config.lora.rank, config.lora.alpha) == (3, 2, 5)


STEPS, EPOCHS = "training.local_steps", "training.local_epochs"


class TestTwoWaysToSayIt:
    """How long a client trains, in steps or in passes: a later layer unsets what an earlier one says the other way."""

    @pytest.mark.parametrize(
        ("layers", "steps", "epochs"),
        [
            ([{EPOCHS: 1}], None, 1),
            ([{STEPS: 5}], 5, None),
            ([{STEPS: 5}, {EPOCHS: 2}], None, 2),
            ([{EPOCHS: 2}, {STEPS: 5}], 5, None),
            ([{EPOCHS: 2}, {EPOCHS: 3}], None, 3),
            ([{STEPS: 5}, {EPOCHS: 2}, {STEPS: 7}], 7, None),
            ([{STEPS: 5}, {EPOCHS: 2, STEPS: None}], None, 2),
            ([{EPOCHS: 2, STEPS: None}, {"seed": 1}], None, 2),
            ([{EPOCHS: 2}, {EPOCHS: None, STEPS: 4}], 4, None),
        ],
    )
    def test_the_later_layer_counts(self, layers, steps, epochs):
        training = configfile.build(configfile.layered(*layers)).training
        assert (training.local_steps, training.local_epochs) == (steps, epochs)

    def test_over_a_preset_from_the_command_line_and_in_a_file(self, tmp_path):
        words = configfile.parse_overrides(["training.local_epochs=1"])
        assert configfile.load("demo", {}, PRESETS).training.local_steps == 20
        assert configfile.load("demo", words, PRESETS).training.local_steps is None
        (tmp_path / "run.yaml").write_text("training: {local_epochs: 2}\n")
        assert configfile.load(tmp_path / "run.yaml").training.local_steps is None
        assert configfile.load(tmp_path / "run.yaml", {STEPS: 3}).training.local_epochs is None

    def test_in_python(self):
        assert TrainingConfig(local_epochs=1).local_steps is None
        assert RunConfig.model_validate({"training": {"local_epochs": 1}}).training.local_steps is None

    @pytest.mark.parametrize("later", [{STEPS: None}, {EPOCHS: None}])
    def test_unsetting_both_is_refused(self, later):
        earlier = {EPOCHS: 1} if EPOCHS in later else {STEPS: 5}
        with pytest.raises(ConfigError, match="neither is set"):
            configfile.build(configfile.layered(earlier, later))

    def test_digests_are_what_they_were(self):
        """Of runs made before: the defaults, epochs with steps unset, and the demo."""
        assert RunConfig().digest() == "b50abcdfbb69f041"
        assert configfile.build({EPOCHS: 1, STEPS: None}).digest() == "3b751090283d65d0"
        assert configfile.build({EPOCHS: 1}).digest() == "3b751090283d65d0"
        assert configfile.load("demo", {}, PRESETS).digest() == "895d51fddc64710a"

    def test_a_layer_adds_no_keys_where_there_is_nothing_to_unset(self):
        """The identity of a sweep is a hash of its settings."""
        assert configfile.layered({"seed": 1}, {STEPS: 4}) == {"seed": 1, STEPS: 4}


class TestPaths:
    """Relative names of files are relative to the file that says them, or else to the working directory."""

    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path, monkeypatch):
        (tmp_path / "here").mkdir()
        (tmp_path / "files" / "model").mkdir(parents=True)
        (tmp_path / "files" / "mine.csv").write_text("text,label\n")
        monkeypatch.chdir(tmp_path / "here")

    def load(self, tmp_path, content, **overrides):
        (tmp_path / "files" / "run.yaml").write_text(content)
        return configfile.load("../files/run.yaml", overrides)

    def test_beside_the_file(self, tmp_path):
        config = self.load(tmp_path, "data: {name: mine.csv}\nmodel: {name: ./model}\n")
        for name, wanted in ((config.data.name, "mine.csv"), (config.model.name, "model")):
            assert Path(name).is_absolute()
            assert Path(name).samefile(tmp_path / "files" / wanted)

    def test_here_where_there_is_nothing_beside_it(self, tmp_path):
        (tmp_path / "here" / "own.csv").write_text("text,label\n")
        assert self.load(tmp_path, "data: {name: own.csv}\n").data.name == "own.csv"

    @pytest.mark.parametrize("name", ["wordnet-nouns", "nobody/nothing", "model", "x" * 5000 + "/y", "~nobody/x"])
    def test_what_is_no_path_stays(self, tmp_path, name):
        assert self.load(tmp_path, f"data: {{name: {name}}}\n").data.name == name

    def test_words_of_the_command_line_mean_the_working_directory(self, tmp_path):
        words = configfile.absolute_paths({"data.name": "../files/mine.csv", "seed": 1})
        assert Path(words["data.name"]).samefile(tmp_path / "files" / "mine.csv")
        assert configfile.absolute_paths({"data.name": "mine.csv"}) == {"data.name": "mine.csv"}


class TestFiles:
    @pytest.fixture
    def refused(self, tmp_path):
        def check(content, message):
            path = tmp_path / "run.yaml"
            path.write_bytes(content)
            with pytest.raises(ConfigError, match=message):
                configfile.load(path)

        return check

    def test_bad_yaml_shows_the_line(self, refused):
        refused(b"seed: 3\nlora:\n  rank: [4\nclients: 3\n", r"run\.yaml is not valid YAML: line 4, column 8 ")
        refused(b"seed: 3\n\tclients: 3\n", r"run\.yaml is not valid YAML: line 2, column 1 ")

    def test_not_a_mapping(self, refused):
        refused(b"- seed\n- 3\n", r"run\.yaml should hold keys and values, but holds a list")

    def test_not_text(self, refused):
        refused(b"\xff\xfe\x00seed", r"cannot read .*run\.yaml")

    def test_objects_are_not_made(self, refused):
        refused(b"name: !!python/object/apply:os.getcwd []\n", r"run\.yaml is not valid YAML: line 1, column 7 ")

    def test_empty_is_all_defaults(self, tmp_path):
        (tmp_path / "run.yaml").write_text("# nothing\n")
        assert configfile.load(tmp_path / "run.yaml") == RunConfig() == configfile.load(None)

    def test_missing(self):
        with pytest.raises(ConfigError, match=r"^no such file: there/is/no.yaml$"):
            configfile.load("there/is/no.yaml")

    @pytest.mark.parametrize(
        ("there", "given", "meant"),
        [("a.yml", "a.yaml", "a.yml"), ("a.yaml", "a.yml", "a.yaml"), ("mine.yaml", "mnie.yaml", "mine.yaml")],
    )
    def test_missing_but_there_is_one_of_nearly_that_name(self, tmp_path, there, given, meant):
        (tmp_path / there).write_text("seed: 1\n")
        with pytest.raises(ConfigError, match=rf"no such file: .*{given}\. Did you mean '.*/{meant}'\?"):
            configfile.load(str(tmp_path / given))

    @pytest.mark.parametrize("ending", ["yaml", "yml"])
    def test_the_ending_was_forgotten(self, tmp_path, monkeypatch, ending):
        monkeypatch.chdir(tmp_path)
        (tmp_path / f"mine.{ending}").write_text("seed: 1\n")
        with pytest.raises(ConfigError, match=rf"unknown preset 'mine'\. Did you mean 'mine\.{ending}'\?"):
            configfile.load("mine", presets=PRESETS)

    @pytest.mark.parametrize(
        "content", ["lora: {rank: 2}\nlora.rank: 4\n", "lora.rank: 4\nlora: {rank: 2}\n", "a.b: {c: 1}\na: {b.c: 1}\n"]
    )
    def test_a_key_in_both_forms_is_there_twice(self, tmp_path, content):
        (tmp_path / "run.yaml").write_text(content)
        with pytest.raises(ConfigError, match=r"run\.yaml: '(lora\.rank|a\.b\.c)' is given twice"):
            configfile.load(tmp_path / "run.yaml")

    def test_unknown_preset(self):
        with pytest.raises(ConfigError, match=r"unknown preset 'dmo'\. Did you mean 'demo'\? There are: .*demo, "):
            configfile.load("dmo", presets=PRESETS)
        with pytest.raises(ConfigError, match="There are: none"):
            configfile.load("demo")

    @pytest.mark.parametrize("name", configfile.preset_names(PRESETS))
    def test_presets_load(self, name):
        config = configfile.load(name, presets=PRESETS)
        assert config == configfile.load(PRESETS / f"{name}.yaml")
        assert name.startswith(config.tracking.experiment)  # both sizes of one in one experiment

    def test_there_are_presets(self):
        assert {"demo", "standard"} <= set(configfile.preset_names(PRESETS))

    @pytest.mark.parametrize("key", KEYS)
    def test_written_and_read_again(self, key, tmp_path):
        config = configfile.build({**NEEDS.get(key, {}), key: OTHER[key]})
        (tmp_path / "run.yaml").write_text(configfile.to_yaml(config))
        assert configfile.load(tmp_path / "run.yaml") == config
        assert yaml.safe_load(configfile.to_yaml(config)).keys() == RunConfig.model_fields.keys()


WORDS = st.text("abcdefg_-1", min_size=1, max_size=4)
LEAVES = st.none() | st.booleans() | st.integers() | WORDS | st.lists(st.integers(), max_size=2)
TREES = st.dictionaries(
    WORDS, st.recursive(LEAVES, lambda t: st.dictionaries(WORDS, t, min_size=1, max_size=3), max_leaves=8), max_size=4
)


@given(TREES)
def test_nest_undoes_flatten(tree):
    assert configfile.nest(configfile.flatten(tree)) == tree


@given(st.dictionaries(WORDS, LEAVES, min_size=1, max_size=3))
def test_strategy_options_are_opened_one_level(options):
    nested = {"strategy_options": {"weights": options, "plain": 1}}
    flat = configfile.flatten(nested)
    assert flat == {"strategy_options.weights": options, "strategy_options.plain": 1}
    assert configfile.nest(flat) == nested


def test_words_that_yaml_takes_for_something_else_stay_text_where_text_is_meant():
    values = configfile.parse_overrides(
        ["name=12", "data.label=yes", "tracking.experiment=2026", "evaluation.local=false"]
    )
    config = configfile.build(values)
    assert (config.name, config.data.label, config.tracking.experiment) == ("12", "yes", "2026")
    assert config.evaluation.local is False


def test_an_empty_mapping_clears_the_options_of_a_preset():
    preset = {"strategy": "flora-na", "strategy_options.max_sweeps": 3}
    assert configfile.build({**preset, **configfile.parse_overrides(["strategy_options={}"])}).strategy_options == {}


def test_the_learning_rate_falls_along_a_cosine_over_the_rounds():
    training = configfile.build({"training.learning_rate": 5e-5, "training.final_learning_rate": 1e-6}).training
    rates = [training.in_round(number, 200).learning_rate for number in (1, 100, 200)]
    assert rates == pytest.approx([4.9997e-5, 2.55e-5, 1e-6], rel=1e-4)
    assert training.in_round(3, 5).final_learning_rate is None
    constant = configfile.build({}).training
    assert constant.in_round(3, 5) is constant


def test_a_learning_rate_that_rises_is_refused():
    with pytest.raises(ConfigError, match=r"final_learning_rate=0.1 is above learning_rate=0.005"):
        configfile.build({"training.final_learning_rate": 0.1})
