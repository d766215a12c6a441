"""What a sweep file says: its runs, those left out and why, and one clear line for each mistake."""

import pytest

from deployments.shipped import PRESETS, SWEEPS
from fedlora.config import configfile
from fedlora.errors import ConfigError
from fedlora.report.roles import Roles
from fedlora.sweep import plan as sweeps


@pytest.fixture
def load(tmp_path):
    """`load("name: x\\ngrid: …", {"rounds": 2})`: the sweep in a file with this text."""

    def read(text, overrides=None):
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        return sweeps.load(str(file), overrides, PRESETS, SWEEPS)

    return read


GRID = "name: mine\nbase: demo\ngrid:\n  strategy: [fedit, svd]\n  seed: [0, 1]\n"


def test_every_combination_is_a_run_and_the_last_key_varies_fastest(load):
    found = load(GRID)
    assert [cell.label for cell in found.cells] == ["fedit seed=0", "fedit seed=1", "svd seed=0", "svd seed=1"]
    assert [cell.config.seed for cell in found.cells] == [0, 1, 0, 1]
    assert found.varied == ["strategy", "seed"]
    assert found.cells[0].config.data.max_length == 32  # the base's


def test_an_override_holds_for_all_runs_and_ends_the_variation_of_its_key(load):
    found = load(GRID, {"seed": 7, "lora.rank": 4})
    assert [cell.label for cell in found.cells] == ["fedit", "svd"]
    assert {(cell.config.seed, cell.config.lora.rank) for cell in found.cells} == {(7, 4)}
    assert load(GRID, {"seed": 7, "strategy": "svd"}).cells[0].name == "svd seed=7"


def test_cells_are_further_runs_shown_with_the_same_settings(load):
    found = load(GRID + "cells:\n  - {strategy: flora, lora: {rank: 2}}\n")
    assert found.cells[-1].label == "flora seed=0 lora.rank=2"
    assert found.cells[0].label == "fedit seed=0 lora.rank=8"
    alone = load("name: mine\ncells:\n  - {strategy: svd}\n  - {strategy: svd, rounds: 3}\n")
    assert [cell.settings["rounds"] for cell in alone.cells] == [8, 3]
    assert [cell.label for cell in alone.cells] == ["svd rounds=8", "svd rounds=3"]
    one_left = load(GRID + "cells:\n  - {strategy: flora, lora.rank: 2}\nskip: [{strategy: flora}]\n")
    assert one_left.cells[0].label == "fedit seed=0"  # the rank tells nothing any more


def test_a_name_is_short_and_ends_in_what_tells_a_run_from_its_neighbours(load):
    grid = "name: x\ngrid: {seed: [0, 1], partition.alpha: [0.1, 100], lora.rank: [4, 8], strategy: [svd, fedit]}\n"
    found = load(grid)
    assert [cell.name for cell in found.cells][:2] == ["svd rank=4 alpha=0.1 s0", "fedit rank=4 alpha=0.1 s0"]
    assert found.cells[0].label == "seed=0 partition.alpha=0.1 lora.rank=4 svd"
    assert found.world == ["partition.alpha"]
    alike = load("name: x\ngrid: {lora.alpha: [8, 16], partition.alpha: [0.1, 1]}\n").cells[0]
    assert alike.name == "fedit lora.alpha=8 partition.alpha=0.1"
    assert load("name: x\nset: {name: mine}\ngrid: {rounds: [1, 2]}\n").cells[0].name == "mine"


def test_what_a_setting_is_may_be_said(load):
    assert load(GRID).roles == Roles()
    found = load(GRID + "compare: {choices: [model], conditions: [lora.rank]}\n")
    assert found.roles == Roles(("model",), ("lora.rank",))
    assert found.identity == load(GRID).identity  # the runs are the same, however they are compared
    with pytest.raises(ConfigError, match=r"compare.choices: unknown key 'lora.rnak'. Did you mean 'lora.rank'"):
        load(GRID + "compare: {choices: [lora.rnak]}\n")
    with pytest.raises(ConfigError, match="'seed' is among the choices and the conditions; remove one"):
        load(GRID + "compare: {choices: [seed], conditions: [seed]}\n")


EPOCHS = "name: mine\nbase: demo\ngrid:\n  training.local_epochs: [1, 2]\n"


def test_a_grid_over_epochs_needs_no_steps_unset(load):
    found = load(EPOCHS)
    lengths = [(cell.config.training.local_steps, cell.config.training.local_epochs) for cell in found.cells]
    assert lengths == [(None, 1), (None, 2)]
    mixed = load("name: mine\nbase: demo\ncells: [{training.local_steps: 5}, {training.local_epochs: 1}]\n")
    assert [cell.label for cell in mixed.cells] == [
        "training.local_steps=5 training.local_epochs=null", "training.local_steps=null training.local_epochs=1",
    ]  # fmt: skip


@pytest.mark.parametrize("base", ["demo", "steps.yaml"])
def test_steps_on_the_command_line_end_a_variation_of_epochs(load, base, tmp_path):
    (tmp_path / "steps.yaml").write_text("training: {local_steps: 9}\n")
    text = EPOCHS.replace("demo", base) + "  seed: [0, 1]\n"
    found = load(text, {"training.local_steps": 3})
    assert [cell.label for cell in found.cells] == ["seed=0", "seed=1"]
    assert {cell.config.training.local_steps for cell in found.cells} == {3}
    for cell in load(text).cells:  # what another process makes of the preset and the changes is the same run
        again = configfile.load(found.base, cell.changes, PRESETS)
        assert again.digest() == cell.digest


def test_paths_are_relative_to_the_sweep_file(load, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.csv").write_text("text,label\n")
    (tmp_path / "base.yaml").write_text("data: {name: c.csv}\n")
    grid = "grid:\n  data.name: [a.csv, ./b.csv, wordnet-nouns]\nskip: [{data.name: [b.csv], reason: not b}]\n"
    found = load("name: mine\nbase: demo\n" + grid)
    assert [cell.label for cell in found.cells] == ["data.name=a.csv", "data.name=wordnet-nouns"]
    assert [cell.config.data.name for cell in found.cells] == [str(tmp_path / "a.csv"), "wordnet-nouns"]
    assert found.cells[0].changes["data.name"] == str(tmp_path / "a.csv")
    assert [left.label for left in found.skipped] == ["data.name=./b.csv"]
    common = load("name: mine\nbase: demo\nset: {data: {name: a.csv}}\ngrid: {seed: [1]}\n")
    assert common.cells[0].config.data.name == str(tmp_path / "a.csv")
    beside = load("name: mine\nbase: base.yaml\ngrid: {seed: [1]}\n")
    assert beside.cells[0].config.data.name == str(tmp_path / "c.csv")


def test_conditions_leave_runs_out_and_their_reason_is_kept(load):
    found = load(GRID + "skip:\n  - {strategy: svd, seed: [1, 2], reason: too dear}\n  - {strategy: flora}\n")
    assert [cell.label for cell in found.cells] == ["fedit seed=0", "fedit seed=1", "svd seed=0"]
    assert [(left.label, left.reason) for left in found.skipped] == [("svd seed=1", "too dear")]
    plain = load(GRID + "skip:\n  - {seed: 1}\n")
    assert {left.reason for left in plain.skipped} == {"left out by the sweep: seed=1"}


def test_a_condition_may_speak_of_what_is_not_varied(load):
    with pytest.raises(ConfigError, match="all 4 runs are left out; the first, because: no demo"):
        load(GRID + "skip:\n  - {clients: 10, reason: no demo}\n")


def test_what_a_strategy_refuses_is_left_out_with_its_reason(load):
    mixed = "name: mine\nset: {lora.ranks: {4: 0.5, 8: 0.5}}\ngrid:\n  strategy: [fedit, zero-padding]\n"
    found = load(mixed)
    assert [cell.label for cell in found.cells] == ["zero-padding"]
    assert found.skipped[0].label == "fedit"
    assert "needs clients of one rank" in found.skipped[0].reason
    ranks = load("name: mine\ngrid:\n  strategy: [ravan]\n  lora.rank: [6, 8]\n")
    assert "heads=4" in ranks.skipped[0].reason


def test_the_identity_is_that_of_the_common_settings(load):
    same = load(GRID), load(GRID.replace("[0, 1]", "[0, 1, 2]")), load(GRID, {"runner.slots": 1})
    assert len({sweep.identity for sweep in same}) == 1
    others = load(GRID, {"rounds": 2}), load(GRID.replace("mine", "yours")), load(GRID, {"tracking.experiment": "x"})
    assert len({sweep.identity for sweep in (same[0], *others)}) == 4


def test_a_digest_is_that_of_the_run_alone(load):
    both = load(GRID), load(GRID + "cells:\n  - {strategy: svd, rounds: 3}\n")
    assert [cell.digest for cell in both[0].cells] == [cell.digest for cell in both[1].cells][:4]


def test_a_base_file_is_found_beside_the_sweep(load, tmp_path):
    (tmp_path / "base.yaml").write_text("rounds: 3\nclients: 4\n")
    found = load(GRID.replace("base: demo", "base: base.yaml"))
    assert found.cells[0].config.clients == 4
    assert found.base == str(tmp_path / "base.yaml")


def test_values_that_are_no_words_become_words_in_tables(load):
    found = load("name: mine\ngrid:\n  strategy: [zero-padding]\n  lora.ranks: [{4: 0.5, 8: 0.5}, {4: 0.7, 8: 0.3}]\n")
    assert [cell.settings["lora.ranks"] for cell in found.cells] == ['{"4": 0.5, "8": 0.5}', '{"4": 0.7, "8": 0.3}']


MISTAKES = {
    "unknown key": ("name: a\ngird: {}\n", "unknown key 'gird'", "Did you mean 'grid'?"),
    "unknown grid key": ("name: a\ngrid: {lora.rnak: [1]}\n", "unknown key 'lora.rnak'", "Did you mean 'lora.rank'?"),
    "empty grid": ("name: a\ngrid: {}\n", "nothing to run", "grid"),
    "no grid": ("name: a\n", "nothing to run", "cells"),
    "empty list": ("name: a\ngrid: {seed: []}\n", "grid.seed is an empty list", "nothing"),
    "no list": ("name: a\ngrid: {seed: 1}\n", "grid.seed", "list"),
    "value twice": ("name: a\ngrid: {seed: [1, 1]}\n", "grid.seed has a value twice", "[1, 1]"),
    "cell twice": (GRID + "cells: [{strategy: svd}]\n", "'svd seed=0' is the same run twice", "remove"),
    "the same in other words": (
        "name: a\ncells: [{runner.slots: 1}, {runner.slots: 2}]\n",
        "are the same run twice",
        "remove",
    ),
    "unknown condition": (GRID + "skip: [{sede: 1}]\n", "skip: unknown key 'sede'", "Did you mean 'seed'?"),
    "no condition": (GRID + "skip: [{reason: x}]\n", "would leave out everything", "condition"),
    "bad value": ("name: a\ngrid: {strategy: [fedti]}\n", "strategy='fedti' is not allowed", "(run fedti)"),
    "bad YAML": ("name: a\ngrid: {seed: [1\n", "line 3", "not valid YAML"),
    "no name": ("grid: {seed: [1]}\n", "name", "required"),
    "bad name": ("name: a/b\ngrid: {seed: [1]}\n", "name", "pattern"),
    "unknown base": ("name: a\nbase: deom\ngrid: {seed: [1]}\n", "unknown preset 'deom'", "Did you mean 'demo'?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(load, mistake):
    text, *words = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_the_sweeps_that_come_along_are_valid():
    for file in SWEEPS.glob("*.yaml"):
        assert sweeps.load(file.stem, None, PRESETS, SWEEPS).name == file.stem
