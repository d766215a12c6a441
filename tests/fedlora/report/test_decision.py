"""Made-up results whose right answer is known."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.power import TTestPower

from fedlora.errors import FedloraError
from fedlora.report import Comparison, boards, decision, pareto, statistics, verdict
from fedlora.report.roles import Roles

EASY, HARD = 100.0, 0.1


@pytest.fixture
def world(make):
    """`world({0.1: {"svd": {0: .5}}, …})`: runs at several values of partition.alpha."""

    def build(scores, roles=None):
        parts = []
        for alpha, accuracies in scores.items():
            part = make(accuracies)
            runs = part.runs.assign(**{"partition.alpha": alpha})
            tables = (runs, part.rounds)
            for table in tables:
                table["run_id"] = table["run_id"] + f"@{alpha}"
            parts.append(tables)
        runs, rounds = (pd.concat(each, ignore_index=True) for each in zip(*parts, strict=True))
        return Comparison("made up", "", runs, rounds, roles=roles or Roles())

    return build


def paragraph(decided):
    return " ".join(verdict.sentences(decided))


def spread(mean, *steps):
    return {seed: mean + step for seed, step in enumerate(steps)}


def test_what_a_key_is():
    assert [Roles().is_choice(key) for key in ("strategy", "lora.rank", "strategy_options.beta", "rounds")] == [
        True
    ] * 4
    assert not any(
        Roles().is_choice(key) for key in ("partition.alpha", "clients", "channel.faults.crash", "model.name")
    )
    assert not Roles(conditions=("lora.rank",)).is_choice("lora.rank")
    assert Roles(choices=("model",)).is_choice("model.name")
    assert not Roles(choices=("model",)).is_choice("models")


def test_simpsons_paradox_does_not_turn_the_order_round(world):
    """fedit is better wherever both ran, but has more runs where it is hard, so that its mean over all is lower."""
    hard = {"fedit": spread(0.31, 0, 0.01, 0.02, 0.005), "svd": {0: 0.30}}
    easy = {"fedit": {0: 0.91}, "svd": spread(0.90, 0, 0.01, 0.02, 0.005)}
    found = decision.decide(world({HARD: hard, EASY: easy}))
    runs = world({HARD: hard, EASY: easy}).runs
    means = runs.groupby("strategy")["final/accuracy"].mean()
    assert means["svd"] > means["fedit"]  # what a table over all runs would say
    assert [each.choice for each in found.overall] == ["fedit", "svd"]
    assert found.overall[0].mean_regret == pytest.approx(-0.005)  # in the seeds that both have it is ahead everywhere
    assert found.world == ["partition.alpha"]
    assert found.choices == ["strategy"]


def test_choices_are_compared_within_a_condition_only(world):
    found = decision.decide(
        world({HARD: {"svd": spread(0.3, 0, 0.01, 0.02), "fedit": spread(0.2, 0.001, 0.012, 0.019)},
               EASY: {"svd": spread(0.8, 0, 0.01, 0.02), "fedit": spread(0.9, 0.001, 0.012, 0.019)}})
    )  # fmt: skip
    assert [(each.label, each.best.choice) for each in found.conditions] == [
        ("partition.alpha=0.1", "svd"),
        ("partition.alpha=100", "fedit"),
    ]
    assert [each.score.n for condition in found.conditions for each in condition.standings] == [3] * 4
    svd = next(each for each in found.overall if each.choice == "svd")
    assert (svd.wins, svd.ties, svd.losses, svd.mean_place) == (1, 0, 1, 1.5)
    assert svd.worst_regret == pytest.approx(0.1, abs=1e-3)
    said = paragraph(found)
    assert "At partition.alpha=0.1: take svd: accuracy 0.310 (0.285 to 0.335, 3 seeds), 0.099 above fedit" in said
    assert "At partition.alpha=100: take fedit" in said


def test_ties_share_a_place_and_are_not_told_apart(world):
    equal = {"svd": {0: 0.6, 1: 0.5, 2: 0.4}, "fedit": {0: 0.5, 1: 0.6, 2: 0.4}, "ffa-lora": {0: 0.4, 1: 0.3, 2: 0.1}}
    (only,) = decision.decide(world({HARD: equal})).conditions
    assert only.label == ""  # alpha does not vary
    assert {each.choice: each.place for each in only.standings} == {"svd": 1.5, "fedit": 1.5, "ffa-lora": 3.0}
    assert only.equals[0].choice in ("svd", "fedit")


def test_a_choice_that_is_missing_in_a_condition_is_named_and_comes_last(world):
    found = decision.decide(
        world({HARD: {"svd": spread(0.3, 0, 0.01, 0.02)},
               EASY: {"svd": spread(0.8, 0, 0.01, 0.02), "fedit": spread(0.9, 0, 0.02, 0.01)}})
    )  # fmt: skip
    assert [(each.choice, each.conditions) for each in found.overall] == [("svd", 2), ("fedit", 1)]
    assert found.missing == ["fedit"]
    said = paragraph(found)
    assert "svd alone ran" in said
    assert "Not run in every condition: fedit." in said


def test_one_seed_is_no_recommendation(world):
    found = decision.decide(world({HARD: {"svd": {0: 0.6}, "fedit": {0: 0.5}}}))
    said = paragraph(found)
    assert said.startswith("svd has the highest score, accuracy 0.600, 0.100 above fedit, in one seed each")
    assert "take" not in said


def test_without_a_finished_run_there_is_nothing_to_decide(make):
    made = make()
    with pytest.raises(FedloraError, match="no run has finished, so there is nothing to compare; first: flora"):
        decision.decide(replace(made, runs=made.runs.iloc[:0]))


def test_two_seeds_are_both_shown(world):
    found = decision.decide(world({HARD: {"svd": {0: 0.6, 1: 0.7}, "fedit": {0: 0.2, 1: 0.31}}}))
    assert not found.conditions[0].best.score.known
    assert "accuracy 0.650 (0.600 and 0.700)" in paragraph(found)


def test_controls_are_a_scale_and_no_candidates(world):
    scores = {
        "oracle": spread(0.9, 0, 0.01, 0.02),
        "svd": spread(0.7, 0, 0.012, 0.019),
        "fedit": spread(0.6, 0, 0.012, 0.019),
        "local": spread(0.5, 0, 0.01, 0.02),
    }
    (only,) = decision.decide(world({HARD: scores})).conditions
    assert only.best.choice == "svd"
    assert [each.choice for each in only.controls] == ["oracle", "local"]
    assert only.best.possible == pytest.approx(0.5, abs=0.002)
    assert "50% of the way from local training to the oracle" in paragraph(decision.decide(world({HARD: scores})))
    better = scores | {"local": spread(0.8, 0, 0.01, 0.02)}
    assert "Without aggregation (local) clients reach no less: 0.810" in paragraph(decision.decide(world({1: better})))


def test_a_condition_may_be_made_a_choice(world):
    scores = {HARD: {"svd": spread(0.3, 0, 0.01, 0.02)}, EASY: {"svd": spread(0.8, 0, 0.012, 0.02)}}
    found = decision.decide(world(scores, Roles(choices=("partition",))))
    assert [each.choice for each in found.conditions[0].standings] == [
        "svd partition.alpha=100",
        "svd partition.alpha=0.1",
    ]


def test_the_json_holds_what_the_words_say_and_no_nan(world):
    found = decision.decide(world({HARD: {"svd": {0: 0.6}, "fedit": {0: 0.5}}}))
    content = json.loads(json.dumps(verdict.to_json(found), allow_nan=False))
    assert content["conditions"][0]["best"] == "svd"
    assert content["conditions"][0]["standings"][0]["low"] is None
    assert " ".join(content["verdict"]) == paragraph(found)


@pytest.mark.parametrize(
    "differences", [(0.02, 0.05, -0.01), (0.01, 0.03, 0.012, 0.006), (0.001, -0.002, 0.0015, 0.003)]
)
@pytest.mark.parametrize("tests", [1, 4])
def test_more_seeds_are_those_of_statsmodels(differences, tests):
    found = statistics.paired(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))
    effect = abs(np.mean(differences)) / np.std(differences, ddof=1)
    power = TTestPower()
    wanted = next(
        (
            n
            for n in range(len(differences), 1001)
            if power.power(effect, n, 0.05 / tests, alternative="two-sided") >= 0.8
        ),
        None,
    )
    assert statistics.more_seeds(found, tests) == (None if wanted is None else wanted - len(differences))


def test_a_bounded_interval_stays_within_its_bounds():
    found = statistics.interval([0.02, 0.1, 0.3], bounds=(0, 1))
    assert (found.low, found.mean) == (0, pytest.approx(0.14))
    assert statistics.interval([0.98, 0.9, 0.7], bounds=(0, 1)).high == 1
    assert math.isnan(statistics.interval([0.2, 0.9]).low)


def test_students_interval_keeps_its_promise_with_three_seeds_and_a_bootstrap_does_not():
    random = np.random.default_rng(0)
    inside = {"t": 0, "bootstrap": 0}
    for _ in range(400):
        seeds = random.beta(30, 15, size=3)
        found = statistics.interval(seeds.tolist(), bounds=(0, 1))
        inside["t"] += found.low <= 30 / 45 <= found.high
        low, high = statistics.bootstrap([[value] for value in seeds], draws=200)
        inside["bootstrap"] += low <= 30 / 45 <= high
    assert 0.92 < inside["t"] / 400 < 0.98
    assert inside["bootstrap"] / 400 < 0.85


def test_the_bootstrap_draws_clients_too():
    alike = statistics.bootstrap([[0.5, 0.5], [0.5, 0.5]])
    apart = statistics.bootstrap([[0.0, 1.0], [0.0, 1.0]])
    assert alike == (0.5, 0.5)
    assert apart[0] < 0.2 < 0.8 < apart[1]
    assert all(math.isnan(each) for each in statistics.bootstrap([[0.5]]))


def test_memory_is_the_peak_over_rounds_and_said_where_it_is_known(comparison):
    rounds = comparison.rounds.copy()
    assert all(math.isnan(each.costs["client_memory"]) for each in decision.decide(comparison).conditions[0].standings)
    rounds["memory/client_bytes"] = 8e8
    rounds.loc[rounds["round"] == 1, "memory/client_bytes"] = 9e8
    rounds["memory/server_bytes"] = 5e8
    decided = decision.decide(replace(comparison, rounds=rounds))
    best = decided.conditions[0].best
    assert (best.costs["client_memory"], best.costs["server_memory"]) == (900.0, 500.0)
    assert "900 MB of memory at a client" in " ".join(verdict.sentences(decided))
    board = boards.leaderboard(decided.conditions[0])
    assert board.rows[0][board.titles.index("client memory")].text == "900"
    assert "client memory" in board.hidden
    assert "pareto-client_memory" in [figure.key for figure in pareto.figures(decided)]
