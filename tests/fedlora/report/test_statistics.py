"""Values worked out by hand, or with a table of Student's t."""

import math

import numpy as np
import pytest
from scipy import stats

from fedlora.report import statistics
from fedlora.report.statistics import correlation, holm, interval, paired, welch


def test_an_interval_is_student_s():
    found = interval([1.0, 2.0, 3.0])  # s = 1, s/√3 = .57735, t(.975, 2) = 4.302653
    assert (found.mean, found.n) == (2.0, 3)
    assert found.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert found.high == pytest.approx(2 + 2.484138, abs=1e-6)
    assert found.known


def test_one_value_has_no_interval_and_none_has_no_mean():
    one = interval([0.4, math.nan])
    assert (one.mean, one.n) == (0.4, 1)
    assert math.isnan(one.low)
    assert not one.known
    assert interval([math.nan]).n == 0
    assert math.isnan(interval([]).mean)


def test_a_paired_difference_is_over_common_seeds():
    # differences -.02, -.04, -.06: mean -.04, s = .02, t = -.04/(.02/√3) = -3.4641, p = 1 - |t|/√(t² + 2) = .0742
    ours, other = {0: 0.58, 1: 0.66, 2: 0.74, 7: 0.1}, {0: 0.60, 1: 0.70, 2: 0.80, 8: 0.9}
    found = paired(ours, other)
    assert found.difference.n == 3
    assert found.difference.mean == pytest.approx(-0.04)
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-9)
    assert found.why == ""


@pytest.mark.parametrize(
    ("ours", "other", "words"),
    [
        ({0: 0.5}, {1: 0.6}, "no common seed"),
        ({0: 0.5, 1: math.nan}, {0: 0.6, 1: 0.6}, "one common seed: two are needed"),
        ({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6}, "equal in every seed"),
        ({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.5}, "the same difference in every seed"),
    ],
)
def test_where_no_test_is_possible_it_says_why(ours, other, words):
    found = paired(ours, other)
    assert math.isnan(found.p)
    assert found.why.startswith(words)


def test_welch_s_test_is_that_of_scipy():
    ours, other = [0.61, 0.64, 0.60, math.nan], [0.55, 0.70, 0.40, 0.52]
    found = welch(ours, other)
    wanted = stats.ttest_ind(ours[:3], other, equal_var=False)
    assert found.p == pytest.approx(float(wanted.pvalue))
    assert found.difference.mean == pytest.approx(np.mean(ours[:3]) - np.mean(other))
    limits = wanted.confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == (pytest.approx(limits.low), pytest.approx(limits.high))
    assert found.p != pytest.approx(float(stats.ttest_ind(ours[:3], other).pvalue))  # nor is it Student's


@pytest.mark.parametrize(
    ("ours", "other", "words"),
    [
        ([math.nan], [0.5, 0.6], "nothing was measured"),
        ([0.5], [0.5, 0.6], "one seed: two of each are needed"),
        ([0.5, 0.5], [0.6, 0.6], "neither varies over seeds"),
    ],
)
def test_where_welch_s_test_is_not_possible_it_says_why(ours, other, words):
    found = welch(ours, other)
    assert math.isnan(found.p)
    assert found.why == words


def test_holm_multiplies_the_smallest_by_their_number_and_never_falls():
    assert holm([0.04, 0.01, math.nan, 0.03])[:2] == pytest.approx([0.06, 0.03])
    assert holm([0.04, 0.01, math.nan, 0.03])[3] == pytest.approx(0.06)
    assert math.isnan(holm([0.04, math.nan])[1])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_correlation_by_hand():
    found = correlation([1, 2, 3, 4], [1, 3, 2, 4])
    assert found.pearson == pytest.approx(0.8)  # Σ(dx·dy)/√(Σdx²·Σdy²) = 4/5
    assert found.spearman == pytest.approx(0.8)
    assert found.spearman_p == pytest.approx(8 / 24)  # of 24 orders, 4 reach .8 and 4 reach -.8
    assert found.pearson_p == pytest.approx(0.2)  # two degrees of freedom: p = 1 - |r|
    curved = correlation([1, 2, 3, 4, math.nan], [1, 10, 100, 1000, 5])
    assert (curved.n, curved.spearman) == (4, pytest.approx(1.0))
    assert curved.pearson < 0.9


def test_correlation_of_many_points_agrees_with_the_exact_one_at_the_border():
    xs, ys = list(range(statistics._EXACT)), [2, 0, 1, 4, 3, 6, 5]
    exact = correlation(xs, ys)
    longer = correlation([*xs, 7], [*ys, 7])
    assert exact.spearman_p < 0.05
    assert longer.spearman_p < exact.spearman_p


def test_too_few_points_or_no_variation_have_no_correlation():
    assert correlation([1, 2], [1, 2]).why == "2 points: at least 3 are needed"
    assert correlation([1, math.nan], [1, 2]).why == "1 point: at least 3 are needed"
    flat = correlation([1, 1, 1], [1, 2, 3])
    assert math.isnan(flat.pearson)
    assert "does not vary" in flat.why


def test_noise_is_called_a_drop_in_one_night_of_forty_and_a_steady_drop_is_found():
    """Three choices, three seeds, differences with a spread of .01; and five seeds with a drop of five times that."""
    random = np.random.default_rng(0)

    def fell(seeds, drop, nights):
        called = 0
        for _ in range(nights):
            differences = random.normal(0, 0.01, (3, seeds)) - np.array([[drop], [0], [0]])
            tests = [paired(dict(enumerate(each + 0.5)), dict.fromkeys(range(seeds), 0.5)) for each in differences]
            corrected = holm([each.p for each in tests])
            called += any(p < 0.05 and each.difference.mean < 0 for p, each in zip(corrected, tests, strict=True))
        return called / nights

    assert 0.01 < fell(3, 0.0, 800) < 0.045
    assert fell(5, 0.05, 60) > 0.95
