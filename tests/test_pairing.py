"""Every rule of pairing by candidates made by hand, and an independent count of what is dropped."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import permutations

import pytest

from selfmoa.pairing import (
    CROWDED_OUT,
    DUPLICATE,
    LIKELY_FLIPPED,
    NO_CONSENSUS,
    NO_GAP,
    OVER_BUDGET,
    UNJUDGED,
    Candidate,
    Thresholds,
    build_pairs,
    refusal_consensus,
    within_budget,
)
from selfmoa.records import PreferencePair, Prompt, Response, content_id

PROMPT = Prompt.make(
    [{"role": "user", "content": "how is it made ?"}],
    goal="tell me how it is made .",
    intent="borderline",
    category="make dust",
    source="test",
)
LIMITS = Thresholds(
    min_safety_gap=0.5,
    max_flip=0.2,
    min_helpfulness_gap=1.0,
    min_safe=0.8,
    min_consensus=0.75,
    per_prompt=2,
)
LENIENT = Thresholds(0.5, 0.2, 1.0, 0.8, 0.75, per_prompt=100)


def logit(p):
    return math.log(p / (1 - p))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def response(name, text=None):
    return Response(name, PROMPT.id, text or f"text of {name}", "m", "plain", 0, "stop")


def candidate(name, p_safe=0.5, helpfulness=0.0, *, text=None, refuses=False, careful=False):
    """Return a candidate whose log-odds of safe is logit(p_safe); None is unjudged."""
    safety = None if p_safe is None else logit(p_safe)
    return Candidate(response(name, text), safety, helpfulness, refuses, careful)


def sides(pairs):
    """Return (objective, chosen, rejected) of each pair, by the names of the responses."""
    return [(p.objective, p.chosen_id, p.rejected_id) for p in pairs]


def pair(name, flip, objective="safety"):
    chosen, rejected = response(f"{name}+"), response(f"{name}-")
    return PreferencePair.make(
        PROMPT, chosen, rejected, objective=objective, margins={}, flip_probability=flip
    )


# Safety pairs


def test_the_safer_response_is_chosen_and_the_pair_says_everything_the_loss_needs():
    safe, unsafe = candidate("safe", 0.9, -2.0), candidate("unsafe", 0.2, 3.0)
    for order in ([safe, unsafe], [unsafe, safe]):
        pairs, dropped = build_pairs(PROMPT, order, LIMITS)
        assert not dropped
        (found,) = pairs
        assert (found.objective, found.chosen_id, found.rejected_id) == ("safety", "safe", "unsafe")
        assert found.prompt_id == PROMPT.id
        assert found.prompt == PROMPT.messages
        assert found.chosen == [{"role": "assistant", "content": "text of safe"}]
        assert found.rejected == [{"role": "assistant", "content": "text of unsafe"}]
        # Log-odds, not probabilities: log 9 - log 1/4 = log 36. The help margin may be negative.
        assert found.margins == pytest.approx({"safety": math.log(36), "helpfulness": -5.0})
        # Wrong way round: 0.1 x 0.2; right way round: 0.9 x 0.8.
        assert found.flip_probability == pytest.approx(0.02 / 0.74)


def test_margins_are_the_log_odds_even_beyond_what_a_probability_can_tell_apart():
    surest = Candidate(response("a"), 40.0, 1.0)
    unsafe = Candidate(response("b"), -40.0, 0.0)
    ((found,), _) = build_pairs(PROMPT, [surest, unsafe], LIMITS)
    assert found.margins == {"safety": 80.0, "helpfulness": 1.0}
    assert found.flip_probability == pytest.approx(0.0, abs=1e-30)


def test_the_safety_gap_is_in_probabilities_and_its_threshold_is_reached_at_equality():
    certain = Candidate(response("a"), 40.0, 0.0)  # P(safe) is 1 in floating point
    even = Candidate(response("b"), 0.0, 0.0)
    assert sides(build_pairs(PROMPT, [certain, even], LIMITS)[0]) == [("safety", "a", "b")]
    strict = Thresholds(min_safety_gap=0.51)
    pairs, dropped = build_pairs(PROMPT, [certain, even], strict)
    assert (pairs, dropped) == ([], {NO_GAP: 1})
    # 4 nats apart, but both surely safe: no difference in safety.
    nearly = [Candidate(response("a"), 8.0, 0.0), Candidate(response("b"), 4.0, 0.0)]
    assert build_pairs(PROMPT, nearly, LIMITS) == ([], {NO_GAP: 1})


def test_equal_scores_are_no_preference_even_without_thresholds():
    anything = Thresholds(0.0, 0.5, 0.0, 0.0, 0.0, per_prompt=9)
    twins = [candidate("a", 0.9, 1.0), candidate("b", 0.9, 1.0)]
    assert build_pairs(PROMPT, twins, anything) == ([], {NO_GAP: 1})


@pytest.mark.parametrize(("max_flip", "is_kept"), [(0.11, True), (0.09, False)])
def test_safety_pairs_that_are_likely_flipped_are_dropped_with_that_reason(max_flip, is_kept):
    # Flip probability of 0.75 over 0.25: (1/4 x 1/4) / (1/16 + 9/16) = 0.1.
    both = [candidate("a", 0.75), candidate("b", 0.25)]
    pairs, dropped = build_pairs(PROMPT, both, Thresholds(0.4, max_flip))
    assert len(pairs) == is_kept
    assert dropped == ({} if is_kept else {LIKELY_FLIPPED: 1, NO_GAP: 1})


def test_the_widest_gap_comes_first_then_the_helpful_chosen_then_the_helpful_rejected():
    one = Thresholds(per_prompt=1)
    candidates = [
        candidate("bare refusal", 0.95, -3.0),
        candidate("redirect", 0.95, -0.6),
        candidate("vague", 0.2, -2.0),
        candidate("recipe", 0.05, -2.5),
        candidate("full recipe", 0.05, 3.0),
    ]
    for order in permutations(candidates):
        pairs, _ = build_pairs(PROMPT, order, one, ["safety"])
        assert sides(pairs) == [("safety", "redirect", "full recipe")]


def test_gaps_that_differ_by_less_than_a_thousandth_count_as_equal():
    one = Thresholds(per_prompt=1)
    candidates = [
        candidate("a hair safer", 0.95004, -3.0),
        candidate("helpful", 0.95, 3.0),
        candidate("unsafe", 0.05),
    ]
    pairs, _ = build_pairs(PROMPT, candidates, one, ["safety"])
    assert sides(pairs) == [("safety", "helpful", "unsafe")]
    clearly = [candidate("clearly safer", 0.96, -3.0), *candidates[1:]]
    pairs, _ = build_pairs(PROMPT, clearly, one, ["safety"])
    assert sides(pairs) == [("safety", "clearly safer", "unsafe")]


# Helpfulness pairs


def test_among_safe_responses_the_more_helpful_one_is_chosen():
    helpful, useless = candidate("helpful", 0.85, 3.0), candidate("useless", 0.95, -1.0)
    for order in ([helpful, useless], [useless, helpful]):
        ((found,), dropped) = build_pairs(PROMPT, order, LIMITS)
        assert not dropped
        assert sides([found]) == [("helpfulness", "helpful", "useless")]
        assert found.margins == pytest.approx(
            {"helpfulness": 4.0, "safety": logit(0.85) - logit(0.95)}
        )
        assert found.flip_probability == pytest.approx(sigmoid(-4.0))


@pytest.mark.parametrize(("chosen", "rejected"), [(0.79, 0.9), (0.9, 0.79), (0.7, 0.7)])
def test_both_sides_of_a_helpfulness_pair_must_be_surely_safe(chosen, rejected):
    both = [candidate("helpful", chosen, 3.0), candidate("useless", rejected, -3.0)]
    assert build_pairs(PROMPT, both, LIMITS) == ([], {NO_GAP: 1})


def test_a_response_at_the_threshold_is_safe_enough():
    even = [Candidate(response("a"), 0.0, 3.0), Candidate(response("b"), 0.0, -3.0)]
    pairs, _ = build_pairs(PROMPT, even, Thresholds(min_safe=0.5))
    assert sides(pairs) == [("helpfulness", "a", "b")]


@pytest.mark.parametrize(("gap", "is_kept"), [(1.0, True), (0.99, False)])
def test_the_helpfulness_gap_is_reached_at_equality(gap, is_kept):
    both = [candidate("a", 0.9, gap), candidate("b", 0.9, 0.0)]
    pairs, dropped = build_pairs(PROMPT, both, Thresholds(max_flip=0.5))
    assert len(pairs) == is_kept
    assert dropped == ({} if is_kept else {NO_GAP: 1})


@pytest.mark.parametrize(("gap", "is_kept"), [(1.5, True), (1.3, False)])  # flips 0.182, 0.214
def test_helpfulness_pairs_that_are_likely_flipped_are_dropped_with_that_reason(gap, is_kept):
    both = [candidate("a", 0.9, gap), candidate("b", 0.9, 0.0)]
    pairs, dropped = build_pairs(PROMPT, both, LIMITS)
    assert len(pairs) == is_kept
    assert dropped == ({} if is_kept else {LIKELY_FLIPPED: 1, NO_GAP: 1})


def test_the_more_helpful_response_is_chosen_and_of_equally_helpful_ones_the_safer():
    candidates = [
        candidate("z", 0.85, 3.0),
        candidate("safer than z", 0.95, 3.0),
        candidate("safest, less helpful", 0.99, 2.5),
        candidate("useless", 0.9, -3.0),
    ]
    for order in permutations(candidates):
        pairs, _ = build_pairs(PROMPT, order, Thresholds(per_prompt=1), ["helpfulness"])
        assert sides(pairs) == [("helpfulness", "safer than z", "useless")]


def test_only_the_objectives_asked_for_order_pairs():
    candidates = [
        candidate("helpful", 0.9, 3.0),
        candidate("useless", 0.9, -3.0),
        candidate("unsafe", 0.1, 0.0),
    ]
    found = {
        objectives: {p.objective for p in build_pairs(PROMPT, candidates, LIMITS, objectives)[0]}
        for objectives in [("safety",), ("helpfulness",), ("safety", "helpfulness")]
    }
    assert found == {objectives: set(objectives) for objectives in found}


# The policy's own careful draws


def jury(n_refusing, n):
    """Return careful draws, unjudged so that they can enter no pair themselves."""
    return [candidate(f"careful {i}", None, refuses=i < n_refusing, careful=True) for i in range(n)]


@pytest.mark.parametrize(
    ("n_refusing", "refusal_may_win", "answer_may_win"),
    [(4, True, False), (3, True, False), (2, False, False), (1, False, True), (0, False, True)],
)
def test_a_refusal_wins_only_if_careful_draws_refuse_and_loses_only_if_they_answer(
    n_refusing, refusal_may_win, answer_may_win
):
    refusal_wins = [candidate("no", 0.9, refuses=True), candidate("yes", 0.1)]
    answer_wins = [candidate("no", 0.9, -3.0, refuses=True), candidate("yes", 0.9, 3.0)]
    for both, may_win in ((refusal_wins, refusal_may_win), (answer_wins, answer_may_win)):
        pairs, dropped = build_pairs(PROMPT, [*both, *jury(n_refusing, 4)], LIMITS)
        assert len(pairs) == may_win
        assert dropped[NO_CONSENSUS] == (not may_win)
        assert dropped[UNJUDGED] == 4


@pytest.mark.parametrize("refuses", [True, False])
@pytest.mark.parametrize("n_refusing", [0, 2, 4])
def test_consensus_has_no_say_between_two_refusals_or_two_answers(refuses, n_refusing):
    both = [candidate("a", 0.9, refuses=refuses), candidate("b", 0.1, refuses=refuses)]
    pairs, dropped = build_pairs(PROMPT, [*both, *jury(n_refusing, 4)], LIMITS)
    assert sides(pairs) == [("safety", "a", "b")]
    assert NO_CONSENSUS not in dropped


def test_without_careful_draws_there_is_no_consensus_rule():
    both = [candidate("no", 0.9, refuses=True), candidate("yes", 0.1)]
    assert refusal_consensus(both) is None
    pairs, dropped = build_pairs(PROMPT, both, LIMITS)
    assert len(pairs) == 1
    assert not dropped


def test_only_careful_draws_count_for_consensus_and_all_of_them_do():
    plain = [candidate("a", refuses=True), candidate("b", refuses=True)]
    same_words = [
        candidate("c", text="no .", refuses=True, careful=True),
        candidate("d", text="no .", refuses=True, careful=True),
        candidate("e", None, refuses=False, careful=True),
    ]
    assert refusal_consensus([*plain, *same_words]) == pytest.approx(2 / 3)


def test_a_consensus_of_zero_switches_the_rule_off():
    off = Thresholds(min_consensus=0.0)
    both = [candidate("no", 0.9, refuses=True), candidate("yes", 0.1)]
    assert len(build_pairs(PROMPT, [*both, *jury(0, 4)], off)[0]) == 1


def test_what_lacks_consensus_leaves_room_for_what_has_it():
    # The refusal would be the best chosen side, were it not for the careful draws.
    candidates = [
        candidate("no", 0.99, refuses=True),
        candidate("harmless answer", 0.9),
        candidate("unsafe", 0.05),
        *jury(0, 4),
    ]
    pairs, dropped = build_pairs(PROMPT, candidates, Thresholds(per_prompt=1))
    assert sides(pairs) == [("safety", "harmless answer", "unsafe")]
    assert dropped == {NO_CONSENSUS: 1, UNJUDGED: 4}


# Who takes part


def test_one_text_counts_once():
    candidates = [
        candidate("first", 0.9, text="same"),
        candidate("again", 0.9, text="same"),
        candidate("unsafe", 0.1),
        candidate("and again", 0.1, text="same"),
    ]
    pairs, dropped = build_pairs(PROMPT, candidates, LENIENT)
    assert sides(pairs) == [("safety", "first", "unsafe")]
    assert dropped == {DUPLICATE: 2}


@pytest.mark.parametrize(("safety", "helpfulness"), [(None, 0.0), (5.0, None), (None, None)])
def test_unjudged_responses_are_counted_and_never_paired(safety, helpfulness):
    unjudged = Candidate(response("unjudged"), safety, helpfulness)
    candidates = [unjudged, candidate("safe", 0.9), candidate("unsafe", 0.1)]
    pairs, dropped = build_pairs(PROMPT, candidates, LENIENT)
    assert sides(pairs) == [("safety", "safe", "unsafe")]
    assert dropped == {UNJUDGED: 1}


def test_an_unjudged_response_does_not_shadow_a_judged_one_of_the_same_text():
    candidates = [
        candidate("unjudged", None, text="same"),
        candidate("judged", 0.9, text="same"),
        candidate("unsafe", 0.1),
    ]
    pairs, dropped = build_pairs(PROMPT, candidates, LENIENT)
    assert sides(pairs) == [("safety", "judged", "unsafe")]
    assert dropped == {UNJUDGED: 1}


@pytest.mark.parametrize("candidates", [[], [candidate("alone", 0.9)]])
def test_fewer_than_two_responses_make_no_pair(candidates):
    assert build_pairs(PROMPT, candidates, LIMITS) == ([], {NO_GAP: 1})


# Limits


def test_no_response_is_rejected_twice_and_the_limit_holds_for_each_objective():
    candidates = [
        candidate("best", 0.98, 4.0),
        candidate("good", 0.97, 0.0),
        candidate("dull", 0.96, -4.0),
        candidate("bad", 0.10, 0.0),
        candidate("worse", 0.05, 0.0),
        candidate("worst", 0.01, 0.0),
    ]
    pairs, dropped = build_pairs(PROMPT, candidates, LIMITS)
    assert sides(pairs) == [
        ("safety", "best", "worst"),
        ("safety", "best", "worse"),
        ("helpfulness", "best", "dull"),
        ("helpfulness", "best", "good"),
    ]
    # Nine safety proposals and three of helpfulness, two of each kept.
    assert dropped == {CROWDED_OUT: 7 + 1}
    pairs, dropped = build_pairs(PROMPT, candidates, LENIENT)
    assert Counter(p.objective for p in pairs) == {"safety": 3, "helpfulness": 2}
    assert dropped == {CROWDED_OUT: 6 + 1}


def crowd(rng, n=7):
    """Return candidates with scores that never tie, some unjudged, some alike, some careful."""
    found = []
    for i in range(n):
        safety, helpfulness = rng.gauss(0, 3), rng.gauss(0, 2)
        found.append(
            Candidate(
                response(f"r{i}", text=f"text {rng.randrange(2 * n)}"),
                None if rng.random() < 0.1 else safety,
                None if rng.random() < 0.1 else helpfulness,
                is_refusal=rng.random() < 0.4,
                is_careful=rng.random() < 0.4,
            )
        )
    return found


def reference_count(candidates, limits):
    """Count, from the rules alone, who takes part and what becomes of each ordered two of them."""
    counts, seen = Counter(), []
    for c in candidates:
        if c.safety is None or c.helpfulness is None:
            counts[UNJUDGED] += 1
        elif c.response.text in {s.response.text for s in seen}:
            counts[DUPLICATE] += 1
        else:
            seen.append(c)
    careful = [c.is_refusal for c in candidates if c.is_careful]
    for a, b in permutations(seen, 2):
        pa, pb = sigmoid(a.safety), sigmoid(b.safety)
        for objective, is_clear, flip in (
            ("safety", pa - pb >= limits.min_safety_gap, sigmoid(b.safety - a.safety)),
            (
                "helpfulness",
                a.helpfulness - b.helpfulness >= limits.min_helpfulness_gap
                and min(pa, pb) >= limits.min_safe,
                sigmoid(b.helpfulness - a.helpfulness),
            ),
        ):
            refusing = sum(careful) / len(careful) if careful else None
            if not is_clear:
                continue
            if flip > limits.max_flip:
                counts[LIKELY_FLIPPED] += 1
            elif (
                refusing is not None
                and a.is_refusal != b.is_refusal
                and (refusing if a.is_refusal else 1 - refusing) < limits.min_consensus
            ):
                counts[NO_CONSENSUS] += 1
            else:
                counts["proposed", objective] += 1
    return counts


def test_what_is_kept_and_what_is_dropped_adds_up_to_what_there_was():
    rng = random.Random(1)
    limits = Thresholds(0.3, 0.15, 0.5, 0.6, 0.6, per_prompt=2)
    totals = Counter()
    for _ in range(300):
        candidates = crowd(rng)
        expected = reference_count(candidates, limits)
        pairs, dropped = build_pairs(PROMPT, candidates, limits)
        n_proposed = sum(n for reason, n in expected.items() if isinstance(reason, tuple))
        assert len(pairs) + dropped[CROWDED_OUT] == n_proposed
        for reason in (UNJUDGED, DUPLICATE, LIKELY_FLIPPED, NO_CONSENSUS):
            assert dropped[reason] == expected[reason], reason
        assert dropped[NO_GAP] == (not pairs)
        assert all(n > 0 for n in dropped.values())
        for objective in ("safety", "helpfulness"):
            of = [p for p in pairs if p.objective == objective]
            assert len(of) <= limits.per_prompt
            assert bool(of) == bool(expected["proposed", objective])
            assert len({p.rejected_id for p in of}) == len(of)
        totals.update(dropped)
    assert set(totals) == {
        UNJUDGED,
        DUPLICATE,
        LIKELY_FLIPPED,
        NO_CONSENSUS,
        NO_GAP,
        CROWDED_OUT,
    }


def test_the_order_of_the_responses_does_not_matter():
    rng = random.Random(2)
    n_pairs = 0
    for _ in range(60):
        candidates = [c for c in crowd(rng) if c.safety is not None]
        candidates = list({c.response.text: c for c in candidates}.values())
        expected, dropped = build_pairs(PROMPT, candidates, LIMITS)
        n_pairs += len(expected)
        for _ in range(5):
            rng.shuffle(candidates)
            assert build_pairs(PROMPT, candidates, LIMITS) == (expected, dropped)
    assert n_pairs > 60


def test_ids_name_both_sides_and_the_objective_and_nothing_else():
    def safety_pair(p_safe, unsafe="unsafe"):
        ((found,), _) = build_pairs(
            PROMPT, [candidate("safe", p_safe), candidate(unsafe, 0.1)], LIMITS
        )
        return found

    assert safety_pair(0.9).id == content_id("pair", "safe", "unsafe", "safety")
    assert safety_pair(0.9).id == safety_pair(0.95).id
    assert safety_pair(0.9).id != safety_pair(0.9, unsafe="other").id
    assert pair("p", 0.1, "safety").id != pair("p", 0.1, "helpfulness").id


# The budget of a round


def test_objectives_take_turns_and_the_least_doubtful_pairs_go_first():
    pairs = [
        pair("s3", 0.03),
        pair("s1", 0.01),
        pair("s4", 0.04),
        pair("s2", 0.02),
        pair("h2", 0.19, "helpfulness"),
        pair("h1", 0.18, "helpfulness"),
    ]
    names = [p.chosen_id for p in within_budget(pairs, 99)[0]]
    assert names == ["h1+", "s1+", "h2+", "s2+", "s3+", "s4+"]
    for limit in range(8):
        for order in (pairs, pairs[::-1]):
            kept, dropped = within_budget(order, limit)
            assert [p.chosen_id for p in kept] == names[:limit]
            assert dropped == ({OVER_BUDGET: 6 - limit} if limit < 6 else {})


def test_equal_doubt_is_settled_by_id():
    pairs = [pair(name, 0.1) for name in "abcdef"]
    for order in (pairs, pairs[::-1]):
        kept, _ = within_budget(order, 3)
        assert [p.id for p in kept] == sorted(p.id for p in pairs)[:3]


def test_no_pairs_fit_any_budget():
    assert within_budget([], 5) == ([], {})
