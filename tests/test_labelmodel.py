"""The label model on judges whose accuracies are known, and on the cases that break its kind."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
from scipy.special import expit, logit

from selfmoa.labelmodel import (
    LabelModel,
    estimate_prior,
    fit,
    flip_probability,
    is_judged,
    krippendorff_alpha,
    log_odds_safe,
)

# Three judges with an accuracy of 0.8 each: a vote is worth log(0.8 / 0.2) = log 4.
LOG4 = math.log(4)


def simulate(n, prior_unsafe, sensitivity, specificity, *, abstain=0.0, seed=0):
    """Return the truth [n] and independent votes [n, J] of judges with these accuracies."""
    rng = np.random.default_rng(seed)
    unsafe = rng.random(n) < prior_unsafe
    size = (n, len(sensitivity))
    p_unsafe_vote = np.where(unsafe[:, None], sensitivity, 1 - np.array(specificity))
    votes = np.where(rng.random(size) < p_unsafe_vote, 1, 0)
    return unsafe, np.where(rng.random(size) < abstain, -1, votes).astype(np.int8)


def votes_of(*rows):
    return np.array(rows, dtype=np.int8)


def model_of(
    sensitivity, specificity, *, prior_unsafe=0.5, weights=None, identifiable=True, **more
):
    n = len(sensitivity)
    return LabelModel(
        judges=tuple("abcdef"[:n]),
        sensitivity=tuple(sensitivity),
        specificity=tuple(specificity),
        weights=weights or (1.0,) * n,
        prior_unsafe=prior_unsafe,
        n=100,
        identifiable=identifiable,
        iterations=1,
        **more,
    )


def test_known_accuracies_are_recovered():
    sensitivity, specificity = [0.9, 0.7, 0.8, 0.6], [0.95, 0.9, 0.7, 0.85]
    _, votes = simulate(4000, 0.3, sensitivity, specificity, abstain=0.1)
    model = fit(votes, "abcd", "abcd")
    assert model.identifiable
    assert model.sensitivity == pytest.approx(sensitivity, abs=0.04)
    assert model.specificity == pytest.approx(specificity, abs=0.03)
    assert model.prior_unsafe == pytest.approx(0.3, abs=0.03)
    assert model.weights == (1.0,) * 4
    assert (model.judges, model.families, model.n) == (tuple("abcd"),) * 2 + (
        int(is_judged(votes).sum()),
    )


def test_posterior_is_calibrated():
    unsafe, votes = simulate(20000, 0.3, [0.9, 0.7, 0.8], [0.95, 0.9, 0.7])
    p_safe = expit(log_odds_safe(fit(votes, "abc", "abc"), votes))
    for pattern in product((0, 1), repeat=3):
        held = (votes == pattern).all(axis=1)
        assert np.mean(~unsafe[held]) == pytest.approx(p_safe[held][0], abs=0.06)


def test_a_judge_that_lies_is_read_backwards():
    """Most judges beat chance, so the fourth, right one time in five, is found out."""
    _, votes = simulate(3000, 0.4, [0.85, 0.85, 0.85, 0.2], [0.85, 0.85, 0.85, 0.2])
    model = fit(votes, "abcd", "abcd")
    assert model.sensitivity[3] == pytest.approx(0.2, abs=0.05)
    alone = log_odds_safe(model, votes_of([-1, -1, -1, 1]), prior_unsafe=0.5)
    assert alone[0] == pytest.approx(LOG4, abs=0.3)


def test_six_items_stay_undecided_where_dawid_skene_without_priors_is_certain():
    """Three judges on six items; without priors EM ends at P = 1 1 0 0 1 0: judge 1 is perfect."""
    votes = votes_of([1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 1])
    model = fit(votes, "abc", "abc")
    p_safe = expit(log_odds_safe(model, votes))
    assert p_safe.min() > 0.01
    assert p_safe.max() < 0.99
    assert ((p_safe > 0.05) & (p_safe < 0.95)).sum() >= 4
    assert max(model.sensitivity + model.specificity) < 0.9


def test_parameters_are_posterior_means():
    """Gold clamps all ten rows. Judge a says "unsafe" on 4 of 5 unsafe rows and 1 of 5 safe ones:
    both accuracies (8 + 4) / (10 + 5); b is always right: 13 / 15; c abstains: 8 / 10. The base
    rate is (1 + 5) / (2 + 10).
    """
    truth = [1] * 5 + [0] * 5
    columns = [[1, 1, 1, 1, 0, 1, 0, 0, 0, 0], truth, [-1] * 10]
    model = fit(votes_of(*columns).T, "abc", "abc", gold=dict(enumerate(truth)))
    assert model.sensitivity == pytest.approx((12 / 15, 13 / 15, 0.8))
    assert model.specificity == pytest.approx((12 / 15, 13 / 15, 0.8))
    assert model.prior_unsafe == pytest.approx(0.5)
    assert model.iterations == 2


def test_sensitivity_and_specificity_are_not_exchanged():
    """All rows are gold: a raises the alarm on everything, b on nothing. (8 + 12) / 22, 8 / 22."""
    votes = np.tile(np.array([1, 0], np.int8), (24, 1))
    model = fit(votes, "ab", "ab", gold={row: row < 12 for row in range(24)})
    assert model.sensitivity == pytest.approx((20 / 22, 8 / 22))
    assert model.specificity == pytest.approx((8 / 22, 20 / 22))


def test_gold_decides_what_the_votes_leave_open():
    """Two judges are no three families, but 24 labelled rows pin them; the others teach nothing."""
    _, votes = simulate(200, 0.5, [0.9, 0.9], [0.9, 0.9])
    truth = {row: row % 2 == 0 for row in range(24)}
    votes[:24] = np.where(np.arange(24) % 2 == 0, 1, 0)[:, None]
    model = fit(votes, "ab", "ab", gold=truth)
    assert model.identifiable
    assert model.n == 24
    assert model.sensitivity == pytest.approx((20 / 22, 20 / 22))
    few = fit(votes, "ab", "ab", gold=dict(list(truth.items())[:18]))
    assert not few.identifiable
    assert few.sensitivity == pytest.approx((17 / 19, 17 / 19))
    assert not fit(votes, "ab", "ab", gold=dict.fromkeys(range(24), True)).identifiable


def test_gold_outvotes_a_majority_that_is_wrong():
    """Three judges err together on what gold calls unsafe; the orientation follows gold."""
    _, votes = simulate(300, 0.5, [0.2] * 3, [0.2] * 3)
    unsafe, gold_votes = simulate(200, 0.5, [0.2] * 3, [0.2] * 3, seed=1)
    gold = {row: bool(is_unsafe) for row, is_unsafe in enumerate(unsafe)}
    model = fit(np.vstack([gold_votes, votes]), "abc", "abc", gold=gold)
    assert max(model.sensitivity + model.specificity) < 0.4
    assert log_odds_safe(model, votes_of([1, 1, 1]))[0] > 1


def test_exchanged_classes_are_turned_round():
    """With a flat prior, EM on these rows ends at sensitivities 0.92, 0.56, 0.17, specificities
    0.40, 0.37, 0.44 and 79 % unsafe: worse than chance on average. Renaming the classes swaps
    sensitivity with 1 - specificity, so 0.60, 0.63, 0.56 and 0.08, 0.44, 0.83, and 21 % unsafe.
    """
    rows = [[1, 1, 0]] * 7 + [[1, 0, 0]] * 5 + [[1, 0, 1], [1, 1, 1], [0, 1, 1]]
    model = fit(votes_of(*rows), "abc", "abc", accuracy_prior=(1.0, 1.0))
    assert model.sensitivity == pytest.approx((0.60, 0.63, 0.56), abs=0.006)
    assert model.specificity == pytest.approx((0.08, 0.44, 0.83), abs=0.006)
    assert model.prior_unsafe == pytest.approx(0.21, abs=0.006)


@pytest.mark.parametrize("families", ["a", "ab", "aab", "aabb"])
def test_fewer_than_three_families_do_not_teach(families):
    """Accuracies stay 8 / 10, the base rate 1 / 2, however one-sided the votes are."""
    judges = "wxyz"[: len(families)]
    _, votes = simulate(500, 0.05, [0.99] * len(families), [0.99] * len(families))
    model = fit(votes, judges, families)
    assert not model.identifiable
    assert (model.n, model.prior_unsafe) == (0, 0.5)
    assert model.sensitivity == model.specificity == (0.8,) * len(families)


def test_a_family_that_never_votes_is_no_witness():
    _, votes = simulate(500, 0.3, [0.9] * 3, [0.9] * 3)
    votes[:, 2] = -1
    assert not fit(votes, "abc", "abc").identifiable


def test_without_learning_a_vote_is_taken_at_face_value():
    """Base rate 1/2 and accuracy 0.8: one vote is P = 0.8 either way."""
    votes = votes_of([1], [0])
    model = fit(votes, "a", "a")
    assert log_odds_safe(model, votes) == pytest.approx([-LOG4, LOG4])


def test_posterior_by_hand():
    """Judges (0.9, 0.6) and (0.7, 0.8), base rate 0.2, so log-odds of safe start at log 4.
    Votes unsafe, safe: - log(0.9 / 0.4) - log(0.3 / 0.8) = log(4 * 0.4 / 0.9 * 0.8 / 0.3).
    Votes safe, abstain: - log(0.1 / 0.6) = log(4 * 6).
    """
    model = model_of((0.9, 0.7), (0.6, 0.8), prior_unsafe=0.2)
    log_odds = log_odds_safe(model, votes_of([1, 0], [0, -1], [-1, -1]))
    expected = [math.log(4 * 0.4 / 0.9 * 0.8 / 0.3), math.log(24), LOG4]
    assert log_odds == pytest.approx(expected)
    shifted = log_odds_safe(model, votes_of([0, -1]), prior_unsafe=0.5)
    assert shifted == pytest.approx([math.log(6)])


def test_votes_of_a_family_are_tempered():
    """Two judges of one family: weight 1 / (1 + 0.5) each, together 4/3 of a vote, not 2."""
    votes = votes_of([1, 1, 0])
    model = fit(votes, "abc", "ffg")
    assert model.weights == pytest.approx((2 / 3, 2 / 3, 1.0))
    assert log_odds_safe(model, votes) == pytest.approx([-LOG4 * 4 / 3 + LOG4])


def test_copies_of_a_judge_neither_teach_nor_convince():
    """Every vote of a doubled twice over. Learning is as without the copies, exactly; taken for
    three witnesses, they would be found near perfect. With rho = 1 the posterior is too.
    """
    _, votes = simulate(800, 0.1, [0.8] * 3, [0.9] * 3, seed=2)
    copied = votes[:, [0, 0, 0, 1, 2]]
    alone, family = fit(votes, "abc", "abc"), fit(copied, "aAäbc", "aaabc", rho=1.0)
    assert family.sensitivity[2:] == pytest.approx(alone.sensitivity)
    assert family.specificity[2:] == pytest.approx(alone.specificity)
    assert family.prior_unsafe == pytest.approx(alone.prior_unsafe)
    assert log_odds_safe(family, copied) == pytest.approx(log_odds_safe(alone, votes))
    naive = fit(copied, "aAäbc", "vwxyz")
    assert naive.sensitivity[0] > 0.95 > family.sensitivity[0] + 0.05


def test_abstentions_alone_are_no_verdict():
    votes = votes_of([-1, -1, -1], [1, -1, -1], [-1, 0, -1])
    assert is_judged(votes).tolist() == [False, True, True]
    model = model_of((0.8,) * 3, (0.8,) * 3, prior_unsafe=0.2)
    assert log_odds_safe(model, votes)[0] == pytest.approx(logit(0.8))


def test_rows_of_abstentions_change_nothing():
    _, votes = simulate(300, 0.3, [0.9] * 3, [0.9] * 3)
    padded = np.vstack([votes, np.full((500, 3), -1, np.int8)])
    model = fit(votes, "abc", "abc")
    assert fit(padded, "abc", "abc") == model
    assert estimate_prior(model, padded) == estimate_prior(model, votes)


def test_log_odds_are_clipped():
    model = model_of((0.99,) * 3, (0.99,) * 3)
    votes = votes_of([1, 1, 1], [0, 0, 0])
    assert log_odds_safe(model, votes).tolist() == [-6.0, 6.0]
    assert log_odds_safe(model, votes, clip=2.0).tolist() == [-2.0, 2.0]


def test_base_rate_of_three_percent_is_found():
    """Judges learned where half was unsafe; later 3 % are. With the old rate the posterior calls
    about one response in eight unsafe, with the new one about what is there.
    """
    accuracies = [0.85, 0.8, 0.9], [0.9, 0.92, 0.88]
    _, early = simulate(3000, 0.5, *accuracies, seed=3)
    unsafe, late = simulate(3000, 0.03, *accuracies, seed=4)
    model = fit(early, "abc", "abc")
    prior = estimate_prior(model, late)
    assert prior == pytest.approx(unsafe.mean(), abs=0.012)
    p_unsafe = expit(-log_odds_safe(model, late, prior_unsafe=prior))
    assert p_unsafe.mean() == pytest.approx(unsafe.mean(), abs=0.012)
    assert expit(-log_odds_safe(model, late)).mean() > 2 * unsafe.mean()


def test_base_rate_is_not_moved_by_copies():
    _, votes = simulate(1000, 0.05, [0.85] * 3, [0.9] * 3, seed=5)
    alone = model_of((0.85,) * 3, (0.9,) * 3)
    family = model_of((0.85,) * 4, (0.9,) * 4, weights=(2 / 3, 2 / 3, 1, 1), families=tuple("aabc"))
    expected = estimate_prior(alone, votes)
    assert estimate_prior(family, votes[:, [0, 0, 1, 2]]) == pytest.approx(expected, abs=1e-6)
    assert 0.03 < expected < 0.08


def test_base_rate_by_hand():
    """Ten votes of one judge (0.8, 0.8), four of them "unsafe", flat prior. EM stops where
    p = (1 + 4 q1 + 6 q0) / 12, q1 = 4p / (4p + 1 - p), q0 = p / (p + 4 (1 - p)).
    """
    p = estimate_prior(model_of((0.8,), (0.8,)), votes_of(*[[1]] * 4, *[[0]] * 6))
    q1, q0 = 4 * p / (4 * p + 1 - p), p / (p + 4 * (1 - p))
    assert p == pytest.approx((1 + 4 * q1 + 6 * q0) / 12, abs=1e-7)
    assert 0 < p < 0.5


def test_base_rate_needs_judges_that_are_known():
    """One alarm in fifty is fewer than the false alarms of a judge *assumed* to be 0.8 right; the
    rate would fall to nearly nothing and every alarm with it.
    """
    votes = votes_of([1], *[[0]] * 49)
    assumed = fit(votes, "a", "a")
    assert estimate_prior(assumed, votes) == assumed.prior_unsafe == 0.5
    assert estimate_prior(model_of((0.8,), (0.8,)), votes) < 0.1
    silent = votes_of([-1], [-1])
    assert estimate_prior(model_of((0.8,), (0.8,), prior_unsafe=0.3), silent) == 0.3


def test_flip_probability_by_hand():
    """P(safe) 0.9 and 0.2: wrong way 0.1 * 0.2, right way 0.9 * 0.8, so 0.02 / 0.74."""
    result = flip_probability([0.9, 0.2, 1.0, 0.0, 1.0, 0.0], [0.2, 0.9, 0.0, 1.0, 1.0, 0.0])
    assert result == pytest.approx([0.02 / 0.74, 0.72 / 0.74, 0.0, 1.0, 0.5, 0.5])
    assert float(flip_probability(0.5, 0.5)) == 0.5


def test_flip_probability_is_the_sigmoid_of_the_log_odds_difference():
    chosen, rejected = np.array([2.0, -1.0, 5.5]), np.array([-1.0, 0.5, 5.0])
    flip = flip_probability(expit(chosen), expit(rejected))
    assert flip == pytest.approx(expit(rejected - chosen))


def test_flip_probability_refuses_log_odds():
    with pytest.raises(ValueError, match=r"P\(safe\)"):
        flip_probability([2.0], [0.5])


def test_krippendorff_alpha_of_two_coders():
    """Ten units, two coders, four disagreements; 14 zeros and 6 ones among the 20 votes:
    1 - 19 * (4 * 2) / (2 * 6 * 14) = 0.095238.
    """
    first, second = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    votes = votes_of(first, second).T
    assert krippendorff_alpha(votes) == pytest.approx(1 - 19 * 8 / 168)


def test_krippendorff_alpha_with_missing_votes():
    """Units (1,1,0), (0,0,-), (1,1,1); the fourth has one vote and does not count. o = 2*2*1/2 = 2,
    N = 8, N_1 = 5, N_0 = 3: 1 - 7 * 2 / 30.
    """
    votes = votes_of([1, 1, 0], [0, 0, -1], [1, 1, 1], [0, -1, -1])
    assert krippendorff_alpha(votes) == pytest.approx(1 - 14 / 30)


def test_krippendorff_alpha_of_a_constant_is_no_number():
    assert krippendorff_alpha(votes_of([1, 1], [0, 0])) == 1.0
    assert math.isnan(krippendorff_alpha(votes_of([0, 0], [0, 0])))
    assert math.isnan(krippendorff_alpha(votes_of([0, -1], [-1, 1])))


def test_model_survives_json():
    _, votes = simulate(50, 0.3, [0.9] * 3, [0.9] * 3)
    model = fit(votes, "abc", "abb", gold={0: True})
    assert LabelModel.from_json(json.loads(json.dumps(model.to_json()))) == model
    with pytest.raises(ValueError, match="missing"):
        LabelModel.from_json({"judges": ["a"]})


@pytest.mark.parametrize(
    ("votes", "options", "sentence"),
    [
        (np.zeros((3, 2), np.int8), {}, "shape"),
        (np.full((3, 3), 2, np.int8), {}, "something else"),
        (np.zeros((3, 3), np.int8), {"gold": {3: True}}, "gold names rows"),
        (np.zeros((3, 3), np.int8), {"gold": {-1: True}}, "gold names rows"),
        (np.zeros((3, 3), np.int8), {"accuracy_prior": (2.0, 8.0)}, "worse than chance"),
        (np.zeros((3, 3), np.int8), {"rho": 1.5}, "rho"),
        (np.zeros((3, 3), np.int8), {"max_iterations": 0}, "at least one iteration"),
    ],
)
def test_fit_refuses_what_it_cannot_use(votes, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit(votes, "abc", "abc", **options)


def test_a_model_refuses_foreign_votes_and_impossible_rates():
    model = model_of((0.8,), (0.8,))
    with pytest.raises(ValueError, match="shape"):
        log_odds_safe(model, votes_of([1, 1]))
    with pytest.raises(ValueError, match="shape"):
        estimate_prior(model, votes_of([1, 1]))
    with pytest.raises(ValueError, match="base rate"):
        log_odds_safe(model, votes_of([1]), prior_unsafe=0.0)
