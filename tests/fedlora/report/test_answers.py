"""What the models wrote, side by side."""

from dataclasses import replace

import pandas as pd
import pytest

from fedlora.report import answers, page
from fedlora.report.decision import decide


def said(run, number, row, answer, exact):
    texts = {"prompt": f"question {row}", "answer": answer, "reference": f"right {row}"}
    return {"run_id": run, "round": number, "row": row, **texts, "exact": exact, "rouge-l": exact / 2}


@pytest.fixture
def written(comparison):
    """The comparison whose runs have answered 12 prompts before training and after the last round."""
    rows = [
        said(run, number, row, f"{run} round {number} row {row}", float(number > 0 and row == 3))
        for run in comparison.runs["run_id"]
        for number in (0, 2)
        for row in range(12)
    ]
    return replace(comparison, answers=pd.DataFrame(rows))


def test_the_same_ten_prompts_stand_in_a_column_for_each_choice(written):
    decided = decide(written)
    (found,) = answers.side_by_side(written, decided)
    condition = decided.conditions[0]
    choices = [each.choice for each in (*condition.standings, *condition.controls)]
    assert list(found.table.titles) == ["prompt", "reference", "before training", *choices]
    assert len(found.table.rows) == answers.MOST
    prompt, reference, before, *after = found.table.rows[3]
    assert (prompt.text, reference.text) == ("question 3", "right 3")
    assert before.text.endswith("round 0 row 3 [exact 0, rouge-l 0]")
    assert not before.strong
    for cell, each in zip(after, (*condition.standings, *condition.controls), strict=True):
        run = each.setting.seeds[min(each.setting.seeds)]
        assert cell.text == f"{run} round 2 row 3 [exact 1, rouge-l 0.5]"
        assert cell.strong


def test_what_only_some_have_answered_is_left_out(written):
    first = written.runs["run_id"].iloc[0]
    lacking = (written.answers["run_id"] == first) & (written.answers["row"] < 9)
    found = answers.side_by_side(replace(written, answers=written.answers[~lacking]), decide(written))
    assert [row[0].text for row in found[0].table.rows] == ["question 9", "question 10", "question 11"]


def test_a_script_in_an_answer_stays_text(written):
    evil = written.answers.assign(answer="<script>alert(1)</script>")
    text = page.render(replace(written, answers=evil), decide(written))
    assert "What they wrote" in text
    assert "<script>alert(1)" not in text


def test_without_answers_there_is_no_such_section(comparison):
    assert answers.side_by_side(comparison, decide(comparison)) == []
    assert "What they wrote" not in page.render(comparison, decide(comparison))
