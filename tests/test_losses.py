"""Every loss against numbers worked by hand, its limits, its signs and its gradients."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch.testing import assert_close

from selfmoa.training import losses
from selfmoa.training.losses import (
    LOSSES,
    LossSettings,
    PairLogps,
    bfpo,
    dpo,
    implicit_rewards,
    ipo,
    modpo,
    robust,
    safedpo,
    simpo,
    weighted_sum,
)

# log pi of chosen and rejected, then log ref: d = 2 and -2, so h = 4 and beta h = 0.4 at beta 0.1.
USUAL = (-20.0, -30.0, -22.0, -28.0)


def pair(logps=USUAL, margins=(), flip=0.0, safety=None, lengths=None):
    """Return a batch of one pair in double precision; `margins` are differences."""
    chosen, rejected, reference_chosen, reference_rejected = (
        torch.tensor([x], dtype=torch.float64) for x in logps
    )
    return PairLogps(
        chosen.requires_grad_(),
        rejected.requires_grad_(),
        reference_chosen,
        reference_rejected,
        torch.tensor([margins], dtype=torch.float64),
        torch.tensor([flip], dtype=torch.float64),
        None if safety is None else torch.tensor([safety]),
        None if lengths is None else torch.tensor([lengths]),
    )


def softplus(x):
    """Return log(1 + e^x), which is -log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def settings_of(beta=0.1, weights=(1.0,), noise="none", gamma=0.0):
    return LossSettings(beta, weights, noise, gamma)


def every_loss():
    """Return (name, pair, settings) such that each loss can be called."""
    usual = pair(margins=(0.8,), flip=0.2, safety=(1, 0), lengths=(8, 10))
    return [(name, usual, settings_of(weights=(0.7, 0.3))) for name in LOSSES]


@pytest.mark.parametrize(
    ("logps", "plus", "minus", "weights", "beta", "loss", "gradient"),
    [
        # u = beta d / w_0 = 0.2 / 0.5 and -0.2 / 0.5; log(1 + e^-0.8)
        (USUAL, (0,), (0,), (0.5, 0.5), 0.1, 0.371101, -0.062005),
        # u = (0.2 - 0.5 * 0.6) / 0.5 and (-0.2 + 0.5 * 0.2) / 0.5, both -0.2; log 2
        (USUAL, (0.6,), (-0.2,), (0.5, 0.5), 0.1, 0.693147, -0.1),
        # u = (0.2 + 0.25) / 0.5 and (-0.2 - 0.15) / 0.5, apart by 1.6; log(1 + e^-1.6)
        (USUAL, (-0.5,), (0.3,), (0.5, 0.5), 0.1, 0.183901, -0.033596),
        # margins without weight: log(1 + e^-0.4)
        (USUAL, (0.6,), (-0.2,), (1.0, 0.0), 0.1, 0.513015, -0.040131),
        # u = (0.2 - 0.54) / 0.1 and (-0.2 + 0.18) / 0.1, apart by -3.2; log(1 + e^3.2)
        (USUAL, (0.6,), (-0.2,), (0.1, 0.9), 0.1, 3.239953, -0.960834),
        # u = (0.2 - 0.06) / 0.9 and (-0.2 + 0.02) / 0.9, apart by 0.355556
        (USUAL, (0.6,), (-0.2,), (0.9, 0.1), 0.1, 0.531089, -0.045782),
        # three objectives: u = (-0.1 - 0.3 * 0.4 + 0.2) / 0.5 and (0.2 - 0.03 - 0.1) / 0.5
        (
            (-12.5, -11.0, -12.0, -12.0),
            (0.4, -1.0),
            (0.1, 0.5),
            (0.5, 0.3, 0.2),
            0.2,
            0.787192,
            -0.217952,
        ),
        # policy = reference: u = -0.3 / 0.5 and 0.1 / 0.5, apart by -0.8
        ((-15.0, -18.0, -15.0, -18.0), (0.6,), (-0.2,), (0.5, 0.5), 0.1, 1.171101, -0.137995),
    ],
)
def test_modpo_by_hand(logps, plus, minus, weights, beta, loss, gradient):
    """The gradient towards log pi(chosen) is -(beta / w_0) sigmoid(u(rejected) - u(chosen))."""
    pairs = pair(logps, [p - m for p, m in zip(plus, minus, strict=True)])
    result = modpo(pairs, settings_of(beta, weights))
    assert result.item() == pytest.approx(loss, abs=1e-6)
    result.sum().backward()
    assert pairs.policy_chosen.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert pairs.policy_rejected.grad.item() == pytest.approx(-gradient, abs=1e-6)


def test_dpo_by_hand():
    """log(1 + e^-0.4) = 0.513015."""
    assert dpo(pair(), settings_of()).item() == pytest.approx(0.513015, abs=1e-6)


@pytest.mark.parametrize("noise", ["none", "robust", "conservative"])
def test_modpo_without_other_weights_is_dpo(noise):
    pairs = pair(margins=(0.8, -3.0), flip=0.2)
    expected = dpo(pairs, settings_of(noise=noise))
    assert_close(modpo(pairs, settings_of(weights=(1.0, 0.0, 0.0), noise=noise)), expected)
    assert_close(modpo(pair(flip=0.2), settings_of(noise=noise)), expected)


def test_modpo_pushes_harder_where_the_other_objective_agrees():
    weights = settings_of(weights=(0.5, 0.5))
    agrees, neutral, disagrees = (modpo(pair(margins=(m,)), weights) for m in (0.8, 0.0, -0.8))
    assert agrees > neutral > disagrees


def test_modpo_optimum_is_the_weighted_sum_of_all_objectives():
    """At beta h = w_0 r + w_1 m the model says P(chosen) = sigmoid(r): label smoothing with
    1 - e = sigmoid(r) has its gradient's zero there. r = log 3 (e = 1/4), m = 0.8, w = (0.6, 0.4).
    """
    wanted = (0.6 * math.log(3) + 0.4 * 0.8) / 0.1
    pairs = pair((wanted, 0.0, 0.0, 0.0), (0.8,), flip=0.25)
    modpo(pairs, settings_of(weights=(0.6, 0.4), noise="conservative")).sum().backward()
    assert pairs.policy_chosen.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_robust_by_hand():
    """e = 0.2, D = 0.4: (0.8 * 0.513015 - 0.2 * 0.913015) / 0.6 = 0.379682."""
    loss = dpo(pair(flip=0.2), settings_of(noise="robust"))
    assert loss.item() == pytest.approx((0.8 * softplus(-0.4) - 0.2 * softplus(0.4)) / 0.6)
    assert loss.item() == pytest.approx(0.379682, abs=1e-6)


@pytest.mark.parametrize(
    ("logps", "flip", "loss", "gradient"),
    [
        # [-(1 - e) log sigmoid(D) + e log sigmoid(-D)] / (1 - 2e) at D = 0.4; its derivative is
        # [-(1 - e) sigmoid(-D) - e sigmoid(D)] / (1 - 2e), times beta.
        (USUAL, 0.0, 0.513015, -0.040131),
        (USUAL, 0.1, 0.463015, -0.052631),
        (USUAL, 0.2, 0.379682, -0.073465),
        (USUAL, 0.4, -0.286985, -0.240131),
        # D = 0: log 2, whatever e is, and -beta / 2 / (1 - 2e)
        ((-15.0, -18.0, -15.0, -18.0), 0.3, 0.693147, -0.125),
        # D = -0.4, the pair the other way round
        ((-30.0, -20.0, -28.0, -22.0), 0.1, 0.963015, -0.072369),
    ],
)
def test_robust_vectors(logps, flip, loss, gradient):
    """The robust form of DESIGN section 5."""
    pairs = pair(logps, flip=flip)
    result = robust(pairs, settings_of())
    assert result.item() == pytest.approx(loss, abs=1e-6)
    result.sum().backward()
    assert pairs.policy_chosen.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert pairs.policy_rejected.grad.item() == pytest.approx(-gradient, abs=1e-6)


@pytest.mark.parametrize("noise", ["none", "robust", "conservative"])
def test_robust_is_dpo_with_robust_noise_whatever_the_settings_say(noise):
    pairs = pair(margins=(0.8, -3.0), flip=0.2)
    expected = dpo(pairs, settings_of(0.3, noise="robust"))
    assert_close(robust(pairs, settings_of(0.3, noise=noise)), expected)


def test_robust_with_certain_pairs_is_dpo():
    assert_close(robust(pair(flip=0.0), settings_of()), dpo(pair(flip=0.7), settings_of()))


def test_robust_is_unbiased():
    """Flipped with probability e, the pair's expected robust loss is the clean pair's loss."""
    swapped = (USUAL[1], USUAL[0], USUAL[3], USUAL[2])
    robust = settings_of(noise="robust")
    seen = 0.7 * dpo(pair(flip=0.3), robust) + 0.3 * dpo(pair(swapped, flip=0.3), robust)
    assert_close(seen, dpo(pair(), settings_of()))


@pytest.mark.parametrize("flip", [0.45, 0.5, 0.9, 1.0])
def test_robust_never_divides_by_nothing_nor_turns_round(flip):
    """From 0.45 on e stands still: (0.55 * 0.513015 - 0.45 * 0.913015) / 0.1 = -1.286985."""
    pairs = pair(flip=flip)
    loss = dpo(pairs, settings_of(noise="robust"))
    assert loss.item() == pytest.approx(-1.286985, abs=1e-5)
    loss.sum().backward()
    assert pairs.policy_chosen.grad.item() < 0


def test_conservative_by_hand():
    """e = 0.2, D = 0.4: 0.8 * 0.513015 + 0.2 * 0.913015 = 0.593015; a sure flip is -D."""
    loss = dpo(pair(flip=0.2), settings_of(noise="conservative"))
    assert loss.item() == pytest.approx(0.593015, abs=1e-6)
    flipped = dpo(pair(flip=1.0), settings_of(noise="conservative"))
    assert flipped.item() == pytest.approx(softplus(0.4))


@pytest.mark.parametrize("noise", ["robust", "conservative"])
@pytest.mark.parametrize("loss", [dpo, ipo, modpo, safedpo, simpo])
def test_certain_pairs_need_no_noise_model(loss, noise):
    pairs = pair(flip=0.0, safety=(1, 0), lengths=(8, 10))
    assert_close(loss(pairs, settings_of(noise=noise)), loss(pairs, settings_of()))


def test_ipo_by_hand():
    """h = 4 and 1 / (2 beta) = 5: (4 - 5)^2; at beta 0.5 (4 - 1)^2. With e = 0.2 the other way
    round counts (-4 - 5)^2 = 81: smoothed 0.8 + 16.2, robust (0.8 - 16.2) / 0.6.
    """
    assert ipo(pair(), settings_of()).item() == pytest.approx(1.0)
    assert ipo(pair(), settings_of(beta=0.5)).item() == pytest.approx(9.0)
    noisy = pair(flip=0.2)
    assert ipo(noisy, settings_of(noise="conservative")).item() == pytest.approx(17.0)
    assert ipo(noisy, settings_of(noise="robust")).item() == pytest.approx(-15.4 / 0.6)


@pytest.mark.parametrize(
    ("flip", "margin", "gap"),
    [
        # m_0 = log(0.8 / 0.2) = 1.386: 0.5 * 1.386 + 0.5 * 0.8 > 0, as given
        (0.2, 0.8, 0.4),
        # 0.5 * 1.386 - 0.5 * 3 < 0: the helpful one wins, the pair is turned round
        (0.2, -3.0, -0.4),
        # e > 0.5: the pair was the wrong way round to begin with
        (0.9, 0.0, -0.4),
        # log 4 - log 4: no preference, log 2
        (0.2, -math.log(4), 0.0),
        # certain: m_0 counts as 12, more than the 11 against it, less than 13
        (0.0, -11.0, 0.4),
        (0.0, -13.0, -0.4),
    ],
)
def test_weighted_sum_by_hand(flip, margin, gap):
    pairs = pair(margins=(margin,), flip=flip)
    loss = weighted_sum(pairs, settings_of(weights=(0.5, 0.5)))
    assert loss.item() == pytest.approx(softplus(-gap))


def test_weighted_sum_weighs():
    """0.9 log 4 - 0.1 * 3 > 0 but 0.1 log 4 - 0.9 * 3 < 0."""
    pairs = pair(margins=(-3.0,), flip=0.2)
    assert weighted_sum(pairs, settings_of(weights=(0.9, 0.1))).item() < math.log(2)
    assert weighted_sum(pairs, settings_of(weights=(0.1, 0.9))).item() > math.log(2)


def test_weighted_sum_smooths_by_the_size_of_the_sum():
    """Sum 0.5 log 4 - 0.5 * 3 = -0.806853: the other way round, e' = sigmoid(-0.806853)."""
    loss = weighted_sum(
        pair(margins=(-3.0,), flip=0.2), settings_of(weights=(0.5, 0.5), noise="conservative")
    )
    flip = 1 / (1 + math.exp(1.5 - 0.5 * math.log(4)))
    assert loss.item() == pytest.approx((1 - flip) * softplus(0.4) + flip * softplus(-0.4))


@pytest.mark.parametrize("noise", ["none", "robust", "conservative"])
def test_weighted_sum_of_one_objective_is_dpo(noise):
    pairs, settings = pair(flip=0.2), settings_of(noise=noise)
    assert_close(weighted_sum(pairs, settings), dpo(pairs, settings))


@pytest.mark.parametrize(
    ("safety", "expected"),
    [
        ((1, 1), softplus(-0.4)),
        ((1, 0), softplus(-0.4)),
        ((0, 1), softplus(0.4)),
        ((0, 0), 0.0),
    ],
)
def test_safedpo_orders_by_safety(safety, expected):
    pairs = pair(safety=safety)
    loss = safedpo(pairs, settings_of())
    assert loss.item() == pytest.approx(expected)
    loss.sum().backward()
    signs = {(1, 1): -1, (1, 0): -1, (0, 1): 1, (0, 0): 0}
    assert torch.sign(pairs.policy_chosen.grad).item() == signs[safety]


def test_safedpo_turns_the_flip_probability_with_the_pair():
    """e = 0.9 that the pair is the wrong way round is 0.1 once it has been turned."""
    loss = safedpo(pair(flip=0.9, safety=(0, 1)), settings_of(noise="conservative"))
    assert loss.item() == pytest.approx(0.9 * softplus(0.4) + 0.1 * softplus(-0.4))


@pytest.mark.parametrize(
    ("safety", "target", "expected"),
    [
        ((1, 1), 0.5, 1.0),  # (4 - 5)^2
        ((1, 0), 1.0, 36.0),  # (4 - 10)^2
        ((0, 1), -1.0, 196.0),  # (4 + 10)^2
        ((0, 0), -0.5, 81.0),  # (4 + 5)^2
    ],
)
def test_bfpo_by_hand(safety, target, expected):
    assert bfpo(pair(safety=safety), settings_of()).item() == pytest.approx(expected)
    at_target = pair((target / 0.1, 0.0, 0.0, 0.0), safety=safety)
    assert bfpo(at_target, settings_of()).item() == pytest.approx(0.0, abs=1e-20)


def test_bfpo_and_safedpo_need_safety_bits():
    for loss in (bfpo, safedpo):
        with pytest.raises(ValueError, match="whether it is safe"):
            loss(pair(), settings_of())


@pytest.mark.parametrize("noise", ["robust", "conservative"])
def test_bfpo_has_no_noise_form(noise):
    with pytest.raises(ValueError, match="set noise to 'none'"):
        bfpo(pair(safety=(1, 0)), settings_of(noise=noise))


@pytest.mark.parametrize(
    ("logps", "lengths", "beta", "gamma", "gap"),
    [
        # 2 (-20 / 8 + 30 / 10) = 1
        (USUAL, (8, 10), 2.0, 0.0, 1.0),
        (USUAL, (8, 10), 2.0, 0.4, 0.6),
        # of one length n, beta / n times the difference of sums
        (USUAL, (10, 10), 2.0, 0.0, 2.0),
        # the longer answer is the less likely one as a whole, and the likelier one per token
        ((-30.0, -20.0, 0.0, 0.0), (30, 10), 1.0, 0.5, 0.5),
        (USUAL, (4, 10), 0.5, 0.25, -1.25),
    ],
)
def test_simpo_by_hand(logps, lengths, beta, gamma, gap):
    """-log sigmoid(beta (mean logp chosen - mean logp rejected) - gamma)."""
    pairs = pair(logps, lengths=lengths)
    loss = simpo(pairs, settings_of(beta, gamma=gamma))
    assert loss.item() == pytest.approx(softplus(-gap))
    loss.sum().backward()
    slope = -beta / (1 + math.exp(gap))
    assert pairs.policy_chosen.grad.item() == pytest.approx(slope / lengths[0])
    assert pairs.policy_rejected.grad.item() == pytest.approx(-slope / lengths[1])


def test_simpo_has_no_reference_and_no_margins():
    usual, settings = (*USUAL[:2], -1e3, 1e3), settings_of(2.0, gamma=0.4)
    elsewhere = pair(usual, (5.0,), lengths=(8, 10))
    assert_close(simpo(elsewhere, settings), simpo(pair(lengths=(8, 10)), settings))


def test_simpo_doubts_pairs_as_the_others_do():
    """e = 0.2 and a gap of 0.6: both ways round, 0.8 to 0.2; gamma is part of the gap."""
    pairs, settings = pair(flip=0.2, lengths=(8, 10)), settings_of(2.0, noise="robust", gamma=0.4)
    expected = (0.8 * softplus(-0.6) - 0.2 * softplus(0.6)) / 0.6
    assert simpo(pairs, settings).item() == pytest.approx(expected)


def test_simpo_needs_lengths():
    with pytest.raises(ValueError, match="how many tokens each response has"):
        simpo(pair(), settings_of())


def test_only_simpo_has_a_gamma():
    usual = pair(margins=(0.8,), flip=0.2, safety=(1, 0), lengths=(8, 10))
    for name, loss in LOSSES.items():
        with_gamma, without = (
            loss(usual, settings_of(weights=(0.7, 0.3), gamma=gamma)) for gamma in (0.5, 0.0)
        )
        assert (with_gamma == without).item() == (name != "simpo")


def test_implicit_rewards_by_hand():
    """beta d = 0.1 * (-20 + 22) and 0.1 * (-30 + 28)."""
    chosen, rejected = implicit_rewards(pair(), settings_of())
    assert (chosen.item(), rejected.item()) == pytest.approx((0.2, -0.2))


@pytest.mark.parametrize(("name", "pairs", "settings"), every_loss())
def test_a_step_down_the_gradient_prefers_the_chosen(name, pairs, settings):
    chosen, rejected = torch.autograd.grad(
        LOSSES[name](pairs, settings).sum(), (pairs.policy_chosen, pairs.policy_rejected)
    )
    assert chosen.item() < 0 < rejected.item()


@pytest.mark.parametrize(
    ("name", "noise"),
    [(name, "none") for name in LOSSES]
    + [
        (name, noise)
        for name in sorted(LOSSES.keys() - {"bfpo"})
        for noise in ("robust", "conservative")
    ],
)
def test_gradients_agree_with_finite_differences(name, noise):
    pairs = pair(margins=(0.8,), flip=0.2, safety=(1, 0), lengths=(8, 10))
    settings = settings_of(weights=(0.7, 0.3), noise=noise)

    def loss_of(chosen, rejected):
        logps = (chosen, rejected, pairs.reference_chosen, pairs.reference_rejected)
        rest = (pairs.margins, pairs.flip_probability, pairs.safety, pairs.lengths)
        return LOSSES[name](PairLogps(*logps, *rest), settings)

    assert torch.autograd.gradcheck(loss_of, (pairs.policy_chosen, pairs.policy_rejected))


@pytest.mark.parametrize(("name", "pairs", "settings"), every_loss())
def test_pairs_of_a_batch_do_not_see_each_other(name, pairs, settings):
    other = pair((-3.0, -1.0, -2.0, -2.5), (-0.4,), 0.1, (0, 1), (2, 3))
    fields = PairLogps.__dataclass_fields__
    both = PairLogps(*(torch.cat([getattr(pairs, f), getattr(other, f)]) for f in fields))
    alone = torch.cat([LOSSES[name](p, settings) for p in (pairs, other)])
    assert LOSSES[name](both, settings).shape == (2,)
    assert_close(LOSSES[name](both, settings), alone)


@pytest.mark.parametrize(("name", "pairs", "settings"), every_loss())
def test_extreme_logps_stay_finite_in_single_precision(name, pairs, settings):
    x = torch.tensor([-900.0, 900.0], requires_grad=True)
    zero, ones = torch.zeros(2), torch.ones(2, 2)
    flip = torch.tensor([0.0, 1.0])
    loss = LOSSES[name](PairLogps(x, -x, zero, zero, torch.ones(2, 1), flip, ones, ones), settings)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss).all()
    assert torch.isfinite(x.grad).all()


def test_the_table_names_every_loss():
    public = {
        name
        for name, function in inspect.getmembers(losses, inspect.isfunction)
        if function.__module__ == losses.__name__ and not name.startswith("_")
    }
    assert set(LOSSES) == public - {"implicit_rewards"}
    assert all(name == loss.__name__ for name, loss in LOSSES.items())


@pytest.mark.parametrize("loss", [modpo, weighted_sum])
@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ((1.0,), "1 weights for 2 objectives"),
        ((0.5, 0.3, 0.2), "3 weights for 2 objectives"),
        ((0.0, 1.0), "must be above 0"),
        ((-0.5, 1.5), "must be above 0"),
        ((math.nan, 1.0), "must be above 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(loss, weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        loss(pair(margins=(0.8,)), settings_of(weights=weights))


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta"):
        LossSettings(beta=beta)


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("policy_chosen", (4, 1)),
        ("policy_rejected", (4, 1)),
        ("reference_chosen", (1,)),
        ("reference_rejected", (3,)),
        ("margins", (4,)),
        ("margins", (3, 1)),
        ("flip_probability", (4, 1)),
        ("safety", (4,)),
        ("safety", (2, 4)),
        ("lengths", (4,)),
        ("lengths", (4, 1)),
        ("lengths", (1, 2)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(field, shape):
    logps = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    tensors = {name: torch.zeros(4) for name in (*logps, "flip_probability")}
    tensors |= {"margins": torch.zeros(4, 1)}
    tensors |= {name: torch.zeros(4, 2) for name in ("safety", "lengths")}
    PairLogps(**tensors)
    with pytest.raises(ValueError, match=f"{field} has shape"):
        PairLogps(**tensors | {field: torch.zeros(shape)})
