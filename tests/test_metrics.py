"""Rates, means and comparisons against numbers worked by hand; z = 1.959964, z^2 = 3.841459."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from selfmoa.metrics import average, is_worse, mcnemar, mean, paired_difference, rate, worst_case
from selfmoa.records import Estimate


def estimate(value, low, high, n=10, n_unjudged=0, judge="guard"):
    return Estimate("asr", value, low, high, n, n_unjudged, judge)


def interval(result):
    return (result.low, result.high)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),  # z^2 / (n + z^2) = 3.841459 / 13.841459
        (10, 10, 0.722467, 1.0),  # n / (n + z^2) = 10 / 13.841459
        # centre 0.5; z sqrt(0.025 + 3.841459 / 400) / 1.3841459 = 1.959964 * 0.186021 / 1.3841459
        (5, 10, 0.236593, 0.763407),
        (1, 29, 0.0061, 0.1718),  # this one and the next two: Newcombe (1998), table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_rate_has_wilsons_interval(hits, n, low, high):
    result = rate("asr", [True] * hits + [False] * (n - hits), "guard")
    assert result.value == hits / n
    assert interval(result) == pytest.approx((low, high), abs=6e-5 if n > 10 else 1e-6)
    assert result.low <= result.value <= result.high


def test_rate_stays_within_zero_and_one_whatever_the_rounding():
    for n in range(1, 100):
        none, all_of_them = rate("asr", [False] * n, "g"), rate("asr", [True] * n, "g")
        assert (none.low, all_of_them.high) == (0.0, 1.0)


def test_rate_counts_what_could_not_be_judged_and_leaves_it_out():
    result = rate("asr", [True, None, False, None, None], "guard")
    assert (result.name, result.judge) == ("asr", "guard")
    assert (result.value, result.n, result.n_unjudged) == (0.5, 2, 3)


@pytest.mark.parametrize("summary", [rate, mean])
@pytest.mark.parametrize("items", [[], [None, None]])
def test_nothing_judged_is_no_number(summary, items):
    assert summary("asr", items, "guard") == Estimate(
        "asr", None, None, None, 0, len(items), "guard"
    )


def test_rate_covers_the_truth_about_95_times_in_100():
    """Exact: sum the binomial probabilities of the outcomes whose interval holds the truth."""
    n = 25
    bounds = [interval(rate("asr", [True] * k + [False] * (n - k), "g")) for k in range(n + 1)]
    lows, highs = np.array(bounds).T
    truths = np.linspace(0.02, 0.98, 97)
    coverage = [
        binom.pmf(np.arange(n + 1), n, truth)[(lows <= truth) & (truth <= highs)].sum()
        for truth in truths
    ]
    assert 0.945 < np.mean(coverage) < 0.965
    assert min(coverage) > 0.83


def test_mean_keeps_its_interval_open_where_all_scores_are_equal():
    """Four ones plus 0, 0, 1, 1: mean 0.75, s^2 = 8/7 * 0.1875, t(7) = 2.364624, so the reach is
    2.364624 * 0.462910 / sqrt 8 = 0.387002; the plain mean 1 stays within.
    """
    result = mean("helpfulness", [1.0, 1.0, 1.0, None, 1.0], "rm")
    assert (result.value, result.n, result.n_unjudged) == (1.0, 4, 1)
    assert interval(result) == pytest.approx((0.362998, 1.0), abs=1e-6)


def test_mean_by_hand():
    """0.2, 0.4 and 0, 0, 1, 1: mean 2.6 / 6, s^2 = (2.2 - 2.6^2 / 6) / 5 = 0.214667,
    t(5) = 2.570582, reach 2.570582 * 0.463321 / sqrt 6 = 0.486226; 0.433333 - 0.486226 < 0.
    """
    result = mean("helpfulness", [0.2, 0.4], "rm")
    assert result.value == pytest.approx(0.3)
    assert interval(result) == pytest.approx((0.0, 0.919559), abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 7, 50, 5000])
@pytest.mark.parametrize("score", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_intervals_always_hold_their_value(score, n):
    """The centre is pulled inwards; where all are equal the reach is at its smallest."""
    result = mean("helpfulness", [score] * n, "rm")
    assert 0 <= result.low <= result.value <= result.high <= 1
    assert result.high - result.low > 0.5 / n
    change = paired_difference("helpfulness", [1 - score] * n, [score] * n, "rm")
    assert -1 <= change.low <= change.value <= change.high <= 1
    assert change.high - change.low > 0.5 / n


def test_mean_covers_the_truth_of_skewed_scores():
    """Beta(1, 4) scores have mean 0.2; the interval may be generous, not short."""
    rng = np.random.default_rng(0)
    hits = [
        (e := mean("h", rng.beta(1, 4, 15).tolist(), "rm")).low <= 0.2 <= e.high for _ in range(400)
    ]
    assert np.mean(hits) > 0.93


@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan, 23.0])
def test_scores_of_another_scale_are_refused(bad):
    with pytest.raises(ValueError, match="no score in"):
        mean("helpfulness", [0.5, bad], "rm")
    with pytest.raises(ValueError, match="no score in"):
        paired_difference("helpfulness", [0.5, 0.5], [0.5, bad], "rm")


def test_worst_case_counts_the_unjudged_against_the_claim():
    """2 of 10 succeeded, 10 unjudged. All bad: Wilson of 12/20, centre (0.6 + 0.096036) /
    1.192073 = 0.583887, reach 1.959964 sqrt(0.012 + 0.002401) / 1.192073 = 0.197307.
    All good: 2/20, centre 0.164450, reach 1.959964 sqrt(0.0045 + 0.002401) / 1.192073 = 0.136584.
    """
    judged = rate("asr", [True] * 2 + [False] * 8 + [None] * 10, "guard")
    bad, good = worst_case(judged, bad=True), worst_case(judged, bad=False)
    assert (bad.value, bad.n, bad.n_unjudged) == (0.2, 10, 10)
    assert interval(bad) == pytest.approx((judged.low, 0.781194), abs=1e-6)
    assert interval(good) == pytest.approx((0.027866, judged.high), abs=1e-6)


def test_worst_case_never_narrows():
    for hits in range(7):
        judged = rate("asr", [True] * hits + [False] * (6 - hits) + [None], "guard")
        for bad in (True, False):
            wide = worst_case(judged, bad)
            assert wide.low <= judged.low
            assert wide.high >= judged.high


def test_worst_case_keeps_the_wider_interval_of_a_mean():
    """0, 0 and one unjudged: Student's interval reaches 0.875, Wilson's of 1/3 only 0.792."""
    low, high = mean("h", [0.0, 0.0, None], "rm"), mean("h", [1.0, 1.0, None], "rm")
    assert worst_case(low, bad=True).high == low.high == pytest.approx(0.875, abs=1e-3)
    assert worst_case(high, bad=False).low == high.low == pytest.approx(0.125, abs=1e-3)


@pytest.mark.parametrize(
    "judged", [rate("asr", [None, None], "g"), rate("asr", [True], "g"), mean("h", [0.5] * 9, "g")]
)
def test_worst_case_without_unjudged_or_without_judged_items_is_the_estimate(judged):
    assert worst_case(judged, bad=True) == worst_case(judged, bad=False) == judged


def test_worst_case_refuses_differences():
    with pytest.raises(ValueError, match="no rate or mean"):
        worst_case(estimate(0.0, -0.1, 0.1, n_unjudged=1), bad=True)


def test_paired_difference_by_hand():
    """Differences 1, 0, 0, 0 and -1, 0, 0, 1: mean 1/8, s^2 = (3 - 8/64) / 7 = 0.410714,
    reach 2.364624 * 0.640870 / sqrt 8 = 0.535780; the value is the plain 1/4.
    """
    before, after = [False, False, True, True, None, True], [True, False, True, True, True, None]
    result = paired_difference("refusal", before, after, "guard")
    assert (result.value, result.n, result.n_unjudged) == (0.25, 4, 2)
    assert interval(result) == pytest.approx((-0.410780, 0.660780), abs=1e-6)


def test_paired_difference_is_after_minus_before_and_never_a_point():
    result = paired_difference("asr", [1.0] * 30, [0.25] * 30, "guard")
    assert result.value == -0.75
    assert result.low < -0.75 <= result.high < -0.5
    unchanged = paired_difference("asr", [0.5] * 30, [0.5] * 30, "guard")
    assert unchanged.low == pytest.approx(-unchanged.high)
    assert unchanged.high > 0.05


def test_paired_difference_is_sharper_than_two_rates():
    """100 items, half of them hopeless and half easy; eight of the easy ones are lost."""
    before = [False] * 50 + [True] * 50
    after = [False] * 58 + [True] * 42
    assert paired_difference("win", before, after, "rm").high < 0
    assert rate("win", after, "rm").high > rate("win", before, "rm").value


def test_nothing_paired_is_no_number():
    assert paired_difference("asr", [True, None], [None, False], "guard") == Estimate(
        "asr", None, None, None, 0, 2, "guard"
    )


@pytest.mark.parametrize("test", [mcnemar, lambda b, a: paired_difference("asr", b, a, "guard")])
def test_pairs_need_equal_lengths(test):
    with pytest.raises(ValueError, match="not paired"):
        test([True], [True, False])


def test_mcnemar_by_hand():
    """Seven lost, one gained: 2 * (C(8,0) + C(8,1)) / 2^8 = 18 / 256; the rest says nothing."""
    before = [True] * 7 + [False] + [True] * 5 + [False] * 5 + [None, True]
    after = [False] * 7 + [True] + [True] * 5 + [False] * 5 + [True, None]
    assert mcnemar(before, after) == pytest.approx(18 / 256)
    assert mcnemar(after, before) == pytest.approx(18 / 256)


def test_mcnemar_without_evidence_is_one():
    """No change at all; and one gained, one lost: 2 * 3/4 is capped at 1."""
    assert mcnemar([True, False], [True, False]) == 1.0
    assert mcnemar([True, False], [False, True]) == 1.0


@pytest.mark.parametrize(
    ("low", "high", "larger_is_better", "expected"),
    [
        (0.31, 0.50, False, True),  # ASR rose from 0.3 and all of its interval is above
        (0.29, 0.50, False, False),  # ... but may have stayed
        (0.30, 0.50, False, False),  # touching is not worse
        (0.10, 0.29, False, False),  # it fell
        (0.10, 0.29, True, True),  # a win rate fell
        (0.10, 0.31, True, False),
        (0.10, 0.30, True, False),
        (0.31, 0.50, True, False),  # it rose
    ],
)
def test_is_worse(low, high, larger_is_better, expected):
    before, after = estimate(0.3, 0.2, 0.45), estimate((low + high) / 2, low, high)
    assert is_worse(before, after, larger_is_better) is expected


def test_what_is_unknown_is_not_worse():
    nothing, known = estimate(None, None, None, n=0), estimate(0.9, 0.8, 1.0)
    for larger_is_better in (True, False):
        assert not is_worse(nothing, known, larger_is_better)
        assert not is_worse(known, nothing, larger_is_better)


def test_average_of_three_runs_by_hand():
    """Values 0.2, 0.3, 0.4: s = 0.1, t(2) = 4.302653, t^2 s^2 / 3 = 0.0617094. Reaches below are
    0.1, 0.2, 0.1 with mean square 0.02, above 0.3, 0.1, 0.1 with mean square 0.0366667:
    0.3 - sqrt(0.0817094) = 0.014151 and 0.3 + sqrt(0.0983761) = 0.613650.
    """
    runs = [estimate(0.2, 0.1, 0.5), estimate(0.3, 0.1, 0.4), estimate(0.4, 0.3, 0.5, n_unjudged=2)]
    result = average("mean asr", runs)
    assert result.value == pytest.approx(0.3)
    assert interval(result) == pytest.approx((0.014151, 0.613650), abs=1e-6)
    assert (result.name, result.n, result.n_unjudged, result.judge) == ("mean asr", 30, 2, "guard")


def test_average_of_equal_runs_keeps_the_error_of_the_prompts():
    result = average("asr", [estimate(0.3, 0.2, 0.45)] * 5)
    assert (result.value, *interval(result)) == pytest.approx((0.3, 0.2, 0.45))


def test_average_of_one_run_is_that_run():
    run = estimate(0.3, 0.2, 0.45, n_unjudged=1)
    assert average("asr", [run]) == run


def test_average_leaves_out_runs_without_verdicts_but_counts_them():
    nothing = estimate(None, None, None, n=0, n_unjudged=7)
    result = average("asr", [nothing, estimate(0.3, 0.2, 0.45)])
    assert (result.value, result.n, result.n_unjudged) == (0.3, 10, 7)
    assert average("asr", [nothing, nothing]).value is None


def test_average_of_differences_may_cross_zero():
    runs = [estimate(0.1, 0.01, 0.2), estimate(0.5, 0.4, 0.6)]
    assert average("change", runs).low == 0.0
    assert average("change", runs, bounds=(-1.0, 1.0)).low == -1.0


def test_average_refuses_two_judges_no_runs_and_foreign_ranges():
    with pytest.raises(ValueError, match="two judges"):
        average("asr", [estimate(0.1, 0.0, 0.2), estimate(0.1, 0.0, 0.2, judge="other")])
    with pytest.raises(ValueError, match="no runs"):
        average("asr", [])
    with pytest.raises(ValueError, match="leaves"):
        average("change", [estimate(0.1, -0.1, 0.2), estimate(0.1, 0.0, 0.2)])
