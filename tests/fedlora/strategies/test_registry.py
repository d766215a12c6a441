"""Names, options and plug-ins; the plug-in is a real distribution on the path, found as pip's would be."""

import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from fedlora.adapter.divergence import measure
from fedlora.config import configfile
from fedlora.errors import ConfigError, StrategyRefusal
from fedlora.strategies import registry
from fedlora.strategies.base import Family, Strategy, Traits
from fedlora.strategies.step import advance

PLUGIN = '''
from pydantic import Field

from fedlora.adapter import Factors
from fedlora.config import Section
from fedlora.strategies.base import Family, Strategy


class Damped(Strategy):
    """The mean of each factor, B damped."""

    name, family, exact = "damped", Family.PRODUCT_SUM, False
    summary, source = "damped means", "a test"

    class Options(Section):
        damping: float = Field(0.5, gt=0, le=1)
        """How much of B is kept."""

    def aggregate(self, state, updates):
        means = {m: updates.mean_factors(m) for m in updates.modules}
        return state.with_factors({m: Factors(self.options.damping * f.B, f.A) for m, f in means.items()})
'''


PLUGIN += """

class Nameless(Strategy):
    name, family, exact = "nameless", Family.PRODUCT_SUM, False
    aggregate = Damped.aggregate
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """An installed distribution with one strategy that works, one that is missing, and one that takes our name."""
    info = tmp_path / "damped_lora-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: damped-lora\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        textwrap.dedent(
            """\
            [fedlora.strategies]
            damped = damped_lora_plugin:Damped
            broken = no_such_module_anywhere:Broken
            absent = damped_lora_plugin:Absent
            fedit = damped_lora_plugin:Damped
            function = damped_lora_plugin:Field
            nameless = damped_lora_plugin:Nameless
            other = damped_lora_plugin:Damped
            """
        )
    )
    (tmp_path / "damped_lora_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    registry._locations.cache_clear()
    yield
    registry._locations.cache_clear()
    sys.modules.pop("damped_lora_plugin", None)


def test_a_plugin_works_from_name_to_divergence(plugin, dense, uploads):
    assert registry.names()[-6:] == ["absent", "broken", "damped", "function", "nameless", "other"]
    config = configfile.build({"strategy": "damped", "strategy_options.damping": 0.25})
    strategy = registry.make(config.strategy, config.strategy_options)
    updates = uploads.updates(3)
    new = advance(strategy, uploads.state(), updates)
    divergence = measure(updates, [strategy.broadcast(new, client) for client in updates.clients])
    w = updates.weights.numpy()
    for module in uploads.modules:
        pairs = dense.pairs(updates.factors(module))
        hat, ideal = 0.25 * dense.product_of_means(pairs, w), dense.mean_product(pairs, w)
        assert divergence.modules[module].rho == pytest.approx(dense.rho([hat] * 3, ideal, w), abs=1e-6)
    torch.testing.assert_close(new.adapter.head, {k: t.float() for k, t in updates.mean_head().items()})


def test_a_plugin_may_refuse_settings_with_its_reason_alone(plugin, monkeypatch):
    """As the contract was before a refusal named its setting."""
    said = classmethod(lambda cls, variant, mixed_ranks, svd_order: "it is shy" if mixed_ranks else None)
    monkeypatch.setattr(registry.find("damped"), "refusal", said)
    registry.check_combination("damped", "lora", False, False)
    with pytest.raises(StrategyRefusal, match="strategy=damped does not go with these settings of lora: it is shy"):
        registry.check_combination("damped", "lora", True, False)


def test_traits_as_attributes_of_the_class(plugin):
    """As the contract was before there were `Traits`: of a plug-in, of its own subclass, and of one of ours."""
    damped = registry.find("damped")
    assert damped.traits == Traits(family=Family.PRODUCT_SUM, exact=False)
    assert (damped.exact, damped.personal, damped.cost_up) == (False, False, "r*(d_out + d_in)")

    class Free:
        one_rank = ""

    class Own(Free, registry.find("fedsa-lora")):
        name = "own"
        changes_base = any_scaling = True
        cost_up = cost_down = "0"

    old = registry.find("fedsa-lora").traits
    assert Own.traits == replace(old, one_rank="", changes_base=True, cost_up="0", cost_down="0")
    assert (Own({}).personal, Own.changes_base, Own.cost_down, Own.one_rank) == (True, True, "0", "")
    assert Own.refusal("dora", False, False).setting == "variant=dora"
    assert Own.refusal("lora", True, False) is None


def test_a_plugin_cannot_take_a_builtin_name(plugin):
    assert registry.find("fedit").__module__ == "fedlora.strategies.fedit"
    assert registry.names().count("fedit") == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("function", "expected a subclass of fedlora's Strategy"),
        ("nameless", "whose class Nameless has no 'summary'"),
        ("other", "whose class calls itself 'damped'"),
    ],
)
def test_a_plugin_that_is_no_strategy(plugin, name, words):
    with pytest.raises(ConfigError, match=f"strategy '{name}' comes from a plug-in.*{words}"):
        registry.make(name)


def test_names_that_are_ours_already(plugin):
    assert registry.shadowed() == ["fedit"]


@pytest.mark.parametrize("name", ["broken", "absent"])
def test_a_plugin_that_cannot_be_loaded(plugin, name):
    with pytest.raises(ConfigError, match=f"strategy '{name}' comes from a plug-in that cannot be loaded"):
        registry.find(name)


def test_plugin_options_are_checked_with_the_configuration(plugin):
    with pytest.raises(ConfigError, match=r"strategy_options\.damping=3"):
        configfile.build({"strategy": "damped", "strategy_options.damping": 3})


@pytest.mark.parametrize(("typed", "meant"), [("fedti", "fedit"), ("flora_na", "flora-na"), ("ffa", "ffa-lora")])
def test_unknown_names_suggest_the_nearest(typed, meant):
    with pytest.raises(ConfigError, match=rf"unknown strategy '{typed}'\. Did you mean '{meant}'\? Known: fedit, "):
        registry.make(typed)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flora-na", {"max_sweep": 3}, r"max_sweep=3 of strategy 'flora-na'.*Did you mean 'max_sweeps'\?.*tolerance"),
        ("flora-na", {"max_sweeps": 0}, r"max_sweeps=0 of strategy 'flora-na': .*greater than or equal to 1"),
        ("flora-na", {"tolerance": -1}, r"tolerance=-1"),
        ("flora-na", {"tolerance": "much"}, r"tolerance='much'.*number"),
        ("fedit", {"tolerance": 1}, r"tolerance=1 of strategy 'fedit'.*Options: none"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ConfigError, match=message):
        registry.make(name, options)
    with pytest.raises(ConfigError, match=message):
        configfile.build({"strategy": name, "strategy_options": options})


def test_options_are_given_and_documented():
    given = registry.make("flora-na", {"max_sweeps": 7}).options.model_dump()
    assert (given["max_sweeps"], given["tolerance"], given["solver"]) == (7, 1e-10, "als")
    for name in registry.names():
        strategy = registry.find(name)
        assert issubclass(strategy, Strategy)
        assert all(field.description for field in strategy.Options.model_fields.values())
