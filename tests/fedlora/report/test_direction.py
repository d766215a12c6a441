"""A score of which less is better: what is decided of losses is what is decided of accuracies that mirror them."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fedlora.errors import FedloraError
from fedlora.objective.generation import LOSS, TOKEN_ACCURACY
from fedlora.report import boards, changes, changewords, maps, measures, page, pareto, tables, verdict
from fedlora.report.decision import decide

SCORES = {
    "svd": {0: 0.60, 1: 0.70, 2: 0.80},
    "fedit": {0: 0.53, 1: 0.621, 2: 0.741},  # below svd in every seed, by more than chance
    "flora": {0: 0.61, 1: 0.68, 2: 0.80},  # not told apart from it
    "local": {0: 0.30, 1: 0.40, 2: 0.50},
    "oracle": {0: 0.70, 1: 0.80, 2: 0.90},
}


def mirrored(comparison):
    """The same runs with the loss 1 − accuracy."""

    def turned(table):
        found = table.copy()
        for name in [name for name in table if name.endswith("/accuracy")]:
            sign = -table[name] if name.startswith("gap/") else 1 - table[name]
            found[name.replace("accuracy", "loss")] = sign
        return found.drop(columns=[name for name in table if "accuracy" in name or "macro" in name])

    runs, rounds = turned(comparison.runs), turned(comparison.rounds)
    runs["final/gap"], runs["final/token_accuracy"] = -runs["final/gap"], 0.5
    return replace(comparison, runs=runs, rounds=rounds, scores=(LOSS, TOKEN_ACCURACY), labelled=False)


@pytest.fixture
def both(make):
    """What is decided of accuracies, and of the losses that mirror them."""
    made = make(SCORES)
    return decide(made), decide(mirrored(made))


def test_the_choice_with_the_lowest_loss_is_the_best_and_the_order_is_the_same(both):
    (accuracy,), (loss,) = (each.conditions for each in both)
    assert loss.best.choice == accuracy.best.choice
    assert [each.choice for each in loss.standings] == [each.choice for each in accuracy.standings]
    assert [each.score.mean for each in loss.standings] == sorted(each.score.mean for each in loss.standings)
    assert [each.choice for each in loss.controls] == ["oracle", "local"]


@pytest.mark.parametrize("what", ["place", "regret", "holm", "possible"])
def test_places_regrets_tests_and_shares_of_the_possible_are_the_same(both, what):
    (accuracy,), (loss,) = (each.conditions for each in both)
    pairs = zip((*accuracy.standings, *accuracy.controls), (*loss.standings, *loss.controls), strict=True)
    found = [(getattr(one, what), getattr(other, what)) for one, other in pairs]
    assert [other for _, other in found] == pytest.approx([one for one, _ in found], nan_ok=True)
    assert any(abs(one) > 0.01 for one, _ in found if not math.isnan(one))  # so that a turned sign would be seen


def test_wins_and_losses_across_conditions_are_the_same(both):
    accuracy, loss = both
    assert [(o.choice, o.wins, o.ties, o.losses) for o in loss.overall] == [
        (o.choice, o.wins, o.ties, o.losses) for o in accuracy.overall
    ]
    assert loss.overall[0].wins > 0


def test_a_control_that_is_as_good_is_warned_of(make):
    told = " ".join(verdict.sentences(decide(mirrored(make({**SCORES, "local": SCORES["svd"]})))))
    assert "Without aggregation (local) clients reach no more: 0.300" in told
    assert "Without aggregation" not in " ".join(verdict.sentences(decide(mirrored(make(SCORES)))))


def test_the_verdict_speaks_of_the_loss_and_of_less_as_better(make, both):
    first, second = verdict.sentences(both[1])[0], verdict.to_json(both[1])
    assert first.startswith("svd has the best score, loss 0.300 (")
    assert "it cannot be told apart from flora (+0.003" in first
    assert (second["score"], second["higher_is_better"]) == ("final loss", False)
    alone = {name: SCORES[name] for name in ("svd", "fedit")}
    assert "0.069 below fedit, the next" in verdict.sentences(decide(mirrored(make(alone))))[0]


def test_an_interval_is_cut_where_a_loss_ends_and_nowhere_else(make):
    wide = {"svd": {0: 0.99, 1: 0.1, 2: 0.5}, "fedit": {0: -0.1, 1: -2.0, 2: 0.4}}
    made = mirrored(make(wide))
    ends = tables.bounds(made)
    assert (ends["loss"], ends["worst_client"], ends["token_accuracy"]) == ((0, math.inf), (0, math.inf), (0, 1))
    assert ends["gap"] == (-math.inf, math.inf)
    svd, fedit = (each.score for each in decide(made).conditions[0].standings)
    assert svd.low == 0
    assert fedit.high > 1
    assert "(Student t, cut at 0); of" in maps.final_scores(decide(made)).caption


def test_the_front_has_the_lowest_losses():
    points = [(1.0, 0.5), (2.0, 0.6), (3.0, 0.2), (3.0, 0.3), (math.nan, 0.1), (0.5, 0.8)]
    assert measures.front(points, sign=-1) == [5, 0, 2]


def test_the_picture_of_the_front_joins_the_lowest(make):
    made = make(SCORES)
    rounds = made.rounds
    cheap = rounds["run_id"].str.startswith("fedit")
    rounds.loc[cheap, "bytes/total"] /= 2
    found = pareto.figures(decide(mirrored(made)))[0]
    front = next(trace for trace in found.traces if trace["name"] == "front")
    assert front["y"] == [pytest.approx(0.3693, abs=1e-4), pytest.approx(0.3)]  # fedit for less, svd; no dearer flora
    assert (found.title, "a lower score" in found.caption) == ("Loss against megabytes", True)
    assert found.layout["yaxis"]["title"]["text"] == "final test loss (nats per token)"


def test_a_target_is_reached_where_the_loss_has_fallen_to_it():
    spent = np.array([0.0, 1.0, 2.0, 3.0])
    curve = measures.Curve(spent, np.array([2.0, 1.5, 1.7, 1.0]), spent, spent, sign=-1)
    assert curve.until(1.6, curve.rounds) == 1
    assert curve.until(0.9, curve.rounds) == math.inf
    assert curve.until(1.0, curve.rounds) == 3


def test_the_target_of_a_loss_is_most_of_the_way_from_before_training(make):
    """svd begins at .9 and ends at .3 in the mean: nine tenths of the way are .36."""
    made = mirrored(make({"svd": SCORES["svd"], "fedit": SCORES["fedit"]}))
    found = measures.of(decide(made).conditions[0], measures.curves(made))
    assert found.target == pytest.approx(0.9 - 0.9 * (0.9 - 0.3))
    assert measures.target_words(LOSS) == "90 % of the way from the loss before training to the best final one"
    svd = next(each for each in found.choices if each.standing.choice == "svd")
    assert svd.rounds_to == math.inf  # seed 0 ends at .4
    assert found.choices[0].at_megabytes == pytest.approx(0.3)
    assert boards.measured(found).titles[-1] == "90th percentile"
    assert boards.leaderboard(decide(made).conditions[0]).titles[:3] == ["choice", "loss", "above the best"]


def test_without_a_score_before_training_there_is_no_target(make):
    made = mirrored(make({"svd": SCORES["svd"]}))
    later = replace(made, rounds=made.rounds[made.rounds["round"] > 0])
    found = measures.of(decide(later).conditions[0], measures.curves(later))
    assert math.isnan(found.target)
    assert math.isnan(found.choices[0].rounds_to)
    assert boards.budgets(found) == "Budget: 2 MB or 4 s."


@pytest.fixture
def nights(make):
    """`nights(later, earlier)`: what changed between two nights of losses."""

    def compared(later, earlier):
        one, other = (mirrored(make(each, title=title)) for each, title in ((earlier, "s-1"), (later, "s-2")))
        return changes.compare(one, other)

    return compared


LOWER = {**SCORES, "svd": {0: 0.500, 1: 0.601, 2: 0.699}}


def test_a_loss_that_rose_is_the_regression(nights):
    found = nights(LOWER, SCORES)
    assert [cell.choice for cell in found.worse] == ["svd"]
    assert found.better == []
    assert changewords.to_json(found)["regression"] is True
    assert changewords.frame(found).set_index("choice").loc["svd", "changed"] == "rose"
    assert changewords.headline(found) == "svd rose, which is worse, beyond noise since s-1"
    assert '<p class="warning">1 of 5 scores rose, which is worse, beyond noise' in page.render_changes(found)
    figure = changewords.figure(found)
    assert figure.caption.endswith("left of the line is better.")
    assert figure.layout["xaxis"]["title"]["text"] == "change of final test loss (nats per token)"


def test_a_loss_that_fell_is_none(nights):
    found = nights(SCORES, LOWER)
    assert ([cell.choice for cell in found.better], found.worse) == (["svd"], [])
    assert changewords.to_json(found)["regression"] is False
    assert changewords.headline(found) == "svd fell, which is better, beyond noise since s-1"


def test_nights_that_are_judged_by_different_scores_are_not_compared(make):
    made = make(SCORES)
    with pytest.raises(FedloraError, match=r"is judged by its accuracy, .* by its loss: there is nothing to compare"):
        changes.compare(made, mirrored(made))


def test_the_page_speaks_of_no_accuracy(make):
    made = mirrored(make(SCORES, ranks=(4, 8)))
    clients = pd.DataFrame([{"run_id": made.runs["run_id"][0], "round": 2, "client": c, "loss": 0.5} for c in range(4)])
    made = replace(made, clients=clients)
    decided = decide(made)
    before, _, after = page.render(made, decided).partition("plotly.js v")
    words = before + after.partition("</script>")[2]
    assert "accuracy" not in words.lower()
    assert '<section id="loss">' in words
    assert "Does less error of aggregation go with less loss?" in words
    table = boards.leaderboard_frame(decided)
    assert {"loss", "loss_bootstrap_low", "clients_loss", "token_accuracy"} <= set(table)
