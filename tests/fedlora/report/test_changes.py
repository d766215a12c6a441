"""Two made-up nights whose differences are known; tests against scipy."""

import json
import math
from dataclasses import replace

import pandas as pd
import plotly.graph_objects as go
import pytest
from scipy import stats

from fedlora import report
from fedlora.errors import FedloraError
from fedlora.report import changes, changewords, figuredata, page
from fedlora.report.changes import PAIRED, WELCH

FIRST = {
    "svd": {0: 0.60, 1: 0.70, 2: 0.80},
    "fedit": {0: 0.58, 1: 0.66, 2: 0.74},
    "local": {0: 0.30, 1: 0.40, 2: 0.50},
}
SECOND = {
    "svd": {0: 0.500, 1: 0.601, 2: 0.699},  # lower by .1 in every seed, and by little more or less
    "fedit": {0: 0.61, 1: 0.65, 2: 0.76},
    "local": FIRST["local"],
}


@pytest.fixture
def nights(make):
    """`nights(second, first)`: what changed from one to the other."""

    def compared(second=SECOND, first=FIRST, **altered):
        tables = make(second)
        later = replace(
            tables, title="s-2", **{name: change(getattr(tables, name)) for name, change in altered.items()}
        )
        return changes.compare(make(first, title="s-1"), later)

    return compared


def by_choice(found):
    return {cell.choice: cell for cell in found.cells}


def test_the_same_seeds_are_pairs_and_holm_is_over_what_could_be_tested(nights):
    found = nights()
    cells = by_choice(found)
    assert {cell.score.test for cell in found.cells} == {PAIRED}
    ps = [
        stats.ttest_rel(*(list(night[name].values()) for night in (SECOND, FIRST))).pvalue for name in ("svd", "fedit")
    ]
    assert cells["svd"].score.found.p == pytest.approx(ps[0])
    assert cells["fedit"].score.found.p == pytest.approx(ps[1])
    assert cells["svd"].score.holm == pytest.approx(2 * ps[0])  # of three, the third is equal and no test
    assert cells["fedit"].score.holm == pytest.approx(ps[1])
    assert found.tests == 2
    assert (cells["svd"].score.difference, cells["svd"].score.before.mean) == (pytest.approx(-0.1), pytest.approx(0.7))
    assert [cell.choice for cell in found.worse] == ["svd"]
    assert found.better == []
    assert cells["local"].score.found.why == "equal in every seed"


def test_unpaired_the_same_drop_is_within_noise(nights):
    """Other seeds, or another partition: what seeds do is no longer left out."""
    other = {name: {seed + 10: value for seed, value in seeds.items()} for name, seeds in SECOND.items()}
    dealt = nights(runs=lambda runs: runs.assign(partition="another" + runs["seed"].astype(str)))
    for found in (nights(other), dealt):
        score = by_choice(found)["svd"].score
        wanted = stats.ttest_ind(list(SECOND["svd"].values()), list(FIRST["svd"].values()), equal_var=False)
        assert score.test == WELCH
        assert score.found.p == pytest.approx(wanted.pvalue)
        assert found.worse == []
    assert dealt.dealt == ["0", "1", "2"]
    assert "The partition is another one in seeds 0, 1, 2" in " ".join(changewords.sentences(dealt))


def test_a_seed_that_is_missing_tonight_leaves_pairs(nights):
    found = nights({"svd": {0: 0.5, 1: 0.601}})
    score = found.cells[0].score
    assert (score.test, score.found.difference.n) == (PAIRED, 2)
    assert score.difference == pytest.approx(-0.0995)  # of the two seeds that both have, not of the means
    assert found.only_before == ["fedit", "local"]
    assert [(each.key, each.before, each.after) for each in found.settings] == [("seed", "0, 1, 2", "0, 1")]


def test_a_rise_is_told_and_is_no_regression(nights):
    found = nights(FIRST, SECOND)
    assert [cell.choice for cell in found.better] == ["svd"]
    assert changewords.to_json(found)["regression"] is False
    assert changewords.headline(found) == "svd rose beyond noise since s-1"
    assert (
        "1 of 3 scores rose beyond noise (p < 0.05 after Holm over 2 tests): svd 0.600 → 0.700 (+0.100"
        in (changewords.sentences(found)[0])
    )


def test_the_same_night_twice_says_so(nights):
    found = nights(FIRST)
    assert changewords.sentences(found) == [
        "No score changed beyond noise, of 3; 3 are the same to the last digit in every seed.",
        "Both ran with the same settings.",
        "No cost differs beyond noise.",
    ]
    assert changewords.headline(found) == "no score changed beyond noise since s-1"
    assert found.tests == 0


def test_one_seed_each_cannot_be_tested(nights):
    found = nights({"svd": {0: 0.1}}, {"svd": {0: 0.9}})
    assert found.worse == []
    assert "1 could not be tested (one common seed: two are needed)" in changewords.sentences(found)[0]


def test_settings_that_differ_are_told_and_do_not_hide_the_cells(nights, make):
    found = nights(runs=lambda runs: runs.assign(**{"lora.rank": 16, "runner.kind": "threads", "tracking.uri": "x"}))
    assert [(each.key, each.before, each.after) for each in found.settings] == [
        ("lora.rank", "8", "16"),
        ("runner.kind", "threads, processes", "threads"),  # it decides no number, but seconds
    ]
    assert len(found.cells) == 3
    grown = changes.compare(
        make(FIRST), make(FIRST, ranks=(4, 8))
    )  # varied in the second alone: the first's are matched
    assert [cell.choice for cell in grown.cells] == ["svd lora.rank=8", "fedit lora.rank=8", "local lora.rank=8"]
    assert len(grown.only_after) == 3
    assert grown.settings == []


def test_megabytes_differ_at_all_and_seconds_beyond_chance(nights):
    def dearer(rounds):
        svd = rounds["run_id"].str.startswith("svd")
        noise = rounds["run_id"].str[-1].astype(int) / 100
        return rounds.assign(
            **{
                "bytes/total": rounds["bytes/total"] * (1 + svd),
                "time/round_s": rounds["time/round_s"] + noise * (rounds["round"] == 1) + svd * 3,
            }
        )

    found = nights(FIRST, rounds=dearer)
    cells = by_choice(found)
    assert cells["svd"].dearer_or_cheaper == ["megabytes", "seconds"]
    assert cells["fedit"].dearer_or_cheaper == []  # .00, .01 and .02 s more are no difference
    assert "svd 2 → 4 MB, svd 4 → 10 seconds" in changewords.sentences(found)[-1]


def test_conditions_keep_apart(make):
    def night(change):
        parts = [make({"svd": FIRST["svd"]}), make({"svd": change})]
        runs, rounds = [], []
        for part, alpha in zip(parts, (0.1, 100.0), strict=True):
            ids = [table["run_id"] + f"@{alpha}" for table in (part.runs, part.rounds)]
            runs.append(part.runs.assign(**{"partition.alpha": alpha, "run_id": ids[0]}))
            rounds.append(part.rounds.assign(run_id=ids[1]))
        return make(runs=pd.concat(runs, ignore_index=True), rounds=pd.concat(rounds, ignore_index=True))

    found = changes.compare(night(FIRST["svd"]), night(SECOND["svd"]))
    assert found.conditions == ["partition.alpha=0.1", "partition.alpha=100"]
    assert [cell.label for cell in found.worse] == ["svd at partition.alpha=100"]
    figure = changewords.figure(found)
    assert figure.panels == found.conditions
    assert [trace["meta"]["panel"] for trace in figure.traces] == [0, 1]
    assert 'id="condition"' in page.render_changes(found)


def test_nothing_in_common_or_nothing_finished_is_one_line(make, nights):
    with pytest.raises(
        FedloraError, match=r"no choice under the same condition in common \(the first: svd, and ravan\)"
    ):
        nights({"ravan": {0: 0.5}})
    with pytest.raises(FedloraError, match="s-2: no run has finished"):
        nights(runs=lambda runs: runs.iloc[:0])


def test_the_page_its_json_and_its_csv(nights, tmp_path):
    found = nights()
    written = report.write_changes(found, tmp_path / "new")
    assert {path.name for path in written.parent.iterdir()} == set(report.CHANGES)
    text = written.read_text()
    assert text.count("plotly.js v") == 1
    assert '<p class="warning">1 of 3 scores fell beyond noise' in text
    content = json.loads((written.parent / "changes.json").read_text())
    assert content["regression"] is True
    local = next(cell for cell in content["cells"] if cell["choice"] == "local")
    assert (local["p"], local["note"], local["changed"]) == (None, "equal in every seed", "")
    rows = pd.read_csv(written.parent / "changes.csv").set_index("choice")
    assert rows.loc["svd", "changed"] == "fell"
    assert rows.loc["svd", "difference"] == pytest.approx(-0.1)
    figure = changewords.figure(found)
    go.Figure({"data": list(figure.traces), "layout": figure.layout})
    assert "-0.1" in figuredata.text(figure)
    assert math.isclose(figure.traces[0]["x"][0], -0.1)


def test_what_users_call_things_stays_text_here_too(make):
    evil = "</script><img src=x onerror=alert(1)>"
    night = {evil: FIRST["svd"]}
    text = page.render_changes(changes.compare(make(night, title=evil), make(night, title=evil)))
    assert text.count("</script>") == 3
    assert "<img src=x" not in text
