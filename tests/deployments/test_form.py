"""The fields of a deployment's form: what they set, and how Prefect will draw them."""

import inspect
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate

from deployments import form
from deployments.shipped import PRESETS
from fedlora.config import configfile
from fedlora.errors import ConfigError, FedloraError
from fedlora.strategies import registry
from flows.federated import federated
from flows.report import make_report
from flows.sweep import run_sweep

OTHER: dict[str, Any] = {
    "strategy": "svd",
    "data": "somebody/set",
    "text": "sentence",
    "label": "topic",
    "model": "somebody/model",
    "rounds": 3,
    "clients": 7,
    "fraction": 0.5,
    "partition": "iid",
    "alpha": 0.1,
    "rank": 5,
    "ranks": "{4: 0.7, 16: 0.3}",
    "learning_rate": 0.02,
    "local_steps": 9,
    "batch_size": 4,
    "seed": 11,
}
"""For every field but `options` a value that is not the preset's."""
SCHEMAS = {flow.name: parameter_schema(flow).model_dump() for flow in (federated, run_sweep, make_report)}
FIELDS = [(flow, name) for flow, schema in SCHEMAS.items() for name in schema["properties"]]


def flat(**given: Any) -> dict[str, Any]:
    config = configfile.load("demo", form.settings(given), PRESETS)
    return configfile.flatten(config.model_dump(mode="json"))


def test_every_field_is_looked_at() -> None:
    assert {*OTHER, "options"} == set(form.SETTINGS)


@pytest.mark.parametrize("name", OTHER)
def test_setting_one_changes_that_one_only(name: str) -> None:
    base = {"strategy": "svd"} if name == "ranks" else {}  # which the preset's strategy refuses
    before, after = flat(**base), flat(**base, **{name: OTHER[name]})
    assert {key for key in before if before[key] != after[key]} == {form.SETTINGS[name]}


def test_what_is_left_as_it_is_is_the_presets() -> None:
    given = dict.fromkeys(form.SETTINGS)
    given |= {"strategy": form.AS_IN_PRESET, "partition": form.AS_IN_PRESET, "data": "", "options": []}
    assert form.settings(given) == {}


def test_ranks_are_read_however_they_arrive() -> None:
    """A form sends text; `prefect deployment run -p` reads 4,4,8 as a list."""
    assert form.settings({"ranks": "4,4,8"}) == {"lora.ranks": "4,4,8"}
    assert form.settings({"ranks": [4, 4, 8]}) == {"lora.ranks": [4, 4, 8]}
    assert form.settings({"ranks": "{low: 5, high: 20, share: 0.1}"})["lora.ranks"]["high"] == 20
    with pytest.raises(ConfigError, match=r"the value of 'lora.ranks' cannot be read"):
        form.settings({"ranks": "{4: "})


OPTIONS = SCHEMAS["federated"]["properties"]["options"]["items"]["enum"]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_in_the_list_is_one_of_its_strategy_and_not_its_default(option: str) -> None:
    strategy, _, word = option.partition(" ")
    set_to = form.settings({"options": [option]})
    name = f"strategy_options.{word.partition('=')[0]}"
    assert set(set_to) == {name}
    options = {name.rpartition(".")[2]: value for name, value in set_to.items()}
    registry.check_options(strategy, options)
    assert registry.make(strategy, options).options != registry.make(strategy).options


def test_an_option_of_another_strategy_is_refused() -> None:
    with pytest.raises(FedloraError, match="solver"):
        flat(strategy="fedit", options=["flora-na solver=adam"])


@pytest.mark.parametrize(("flow", "name"), FIELDS)
def test_a_field_has_help_and_no_tab_of_nothing(flow: str, name: str) -> None:
    field = SCHEMAS[flow]["properties"][name]
    assert field["description"].strip()
    assert "null" not in repr(field)
    assert field.get("default", "something") is not None  # the UIs draw no field for a null, or send it back
    assert "type" in field or {each["title"] for each in field["anyOf"]} >= {"YAML file"}


@pytest.mark.parametrize("flow", SCHEMAS)
def test_a_form_that_is_sent_as_it_was_drawn_is_accepted(flow: str) -> None:
    """Prefect's second UI sends a null for each field that is empty."""
    properties = SCHEMAS[flow]["properties"]
    validate({name: each.get("default") for name, each in properties.items()}, SCHEMAS[flow], raise_on_error=True)
    assert not SCHEMAS[flow].get("required")


def test_a_call_is_as_it_was_written() -> None:
    found = inspect.signature(federated.fn).parameters
    assert found["rounds"].default is found["run_dir"].default is None
    assert next(iter(found)) == "preset"
    assert list(found)[-2:] == ["run_dir", "mlflow_parent"]  # what sweeps fill in comes last
