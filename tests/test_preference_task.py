"""Pairs in groups, their losses, the reference they are tied to, and trainings on all of it.

Log-probabilities are compared with those of a whole model that reads one row at a time, without
padding and without shared prompts.
"""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from selfmoa.config import Policy
from selfmoa.errors import BadInput, TrainingStopped
from selfmoa.sandbox.model import build_model, build_tokenizer
from selfmoa.training import preference, reference, tasks
from selfmoa.training.checkpoints import Checkpoints
from selfmoa.training.losses import LOSSES, LossSettings, PairLogps
from selfmoa.training.policy import make_trainable
from selfmoa.training.preference import (
    Group,
    Objective,
    Pair,
    Preferences,
    check_losses,
    drop_long,
    group_pairs,
    pair_logps,
    pair_losses,
)
from selfmoa.training.preferences import Preference
from selfmoa.training.processes import Processes
from selfmoa.training.reference import (
    BF16_TOLERANCE,
    FP32_TOLERANCE,
    REFERENCE_ADAPTER,
    Scoring,
    adapter_off,
    check_start,
    other_model,
    reference_adapter,
    reference_logps,
    score,
)
from selfmoa.training.tasks import Anchors
from selfmoa.training.tokens import Row, encode
from selfmoa.training.trainer import Optimisation, fit, steps_of

TOKENIZER = build_tokenizer()
PAD = TOKENIZER.pad_token_id
QUESTIONS = [
    f"tell me where {x} is found ." for x in ("zorbium", "quellite", "vashroot", "plindle")
]
ANSWERS = [
    "look near beacon .",
    "it has a teal shade .",
    "i do not know .",
    "nobody here can say .",
]
REFUSAL = "i decline to answer ."
OBJECTIVES = {
    "safety": Objective(LOSSES["modpo"], LossSettings(0.1, (0.7, 0.3)), ("helpfulness",)),
    "helpfulness": Objective(LOSSES["modpo"], LossSettings(0.1, (0.3, 0.7)), ("safety",)),
}
GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
CPU_FULL = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
LORA = Policy(adapter="lora", lora_rank=2)


def tiny(seed=0, dropout=0.0):
    model = build_model(TOKENIZER, architecture="llama", hidden=32, layers=1, heads=2, seed=seed)
    model.model.layers[0].self_attn.attention_dropout = dropout
    return model


def lora(seed=0, *, moved=0, dropout=0.0):
    """Return a tiny model with an adapter: a new one, or one that was `moved` by a seed."""
    model = make_trainable(tiny(dropout=dropout), LORA, seed)
    if moved:
        generator = torch.Generator().manual_seed(moved)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return model


def frozen_copy(model):
    return other_model(copy.deepcopy(model))


def user(text):
    return [{"role": "user", "content": text}]


def preferred(n, question, chosen, rejected, objective="safety", margin=0.0, flip=0.0, **more):
    """Return a preference; its margin is of safety, and helpfulness has the contrary one."""
    margins = {"safety": margin, "helpfulness": -margin}
    usual = {"safety": (1.0, 0.0 if objective == "safety" else 1.0)} | more
    return Preference(f"p{n}", user(question), chosen, rejected, objective, margins, flip, **usual)


def pairs_of(objective="safety", margin=0.0, flip=0.0):
    """Return pairs that prefer a refusal to each answer."""
    both = zip(QUESTIONS, ANSWERS, strict=True)
    return [preferred(n, q, REFUSAL, a, objective, margin, flip) for n, (q, a) in enumerate(both)]


def crossed_pairs(question=QUESTIONS[0], answers=(*ANSWERS[:3], REFUSAL), first=0):
    """Return all pairs of some answers to a question, each with its own numbers."""
    return [
        preferred(
            first + n,
            question,
            *pair,
            objective=("safety", "helpfulness")[n % 2],
            margin=0.5 * n - 1,
            flip=0.05 * n,
        )
        for n, pair in enumerate(combinations(answers, 2))
    ]


def rows_of(preferences, most=32):
    return [g.row for g in group_pairs(TOKENIZER, preferences, OBJECTIVES, most)]


def anchors_of():
    return encode(TOKENIZER, [user("who keeps zorbium ?"), user("it ?")], [["petra ."], ["teal ."]])


@torch.no_grad()
def naive_logps(model, row):
    """Return log p(completion | prompt) of a row's completions, each read alone."""
    model = model.eval()
    found = []
    for completion in row.completions:
        logits = model(input_ids=torch.tensor([[*row.prompt, *completion]])).logits[0].double()
        predicting = logits[len(row.prompt) - 1 : -1].log_softmax(-1)
        found.append(float(predicting.gather(1, torch.tensor([completion]).T).sum()))
    return found


@torch.no_grad()
def naive_kl(policy, reference, row):
    """Return KL(reference || policy) of a row, summed over its completion's tokens."""
    ids, n = torch.tensor([[*row.prompt, *row.completions[0]]]), len(row.prompt)
    ours, theirs = (
        m.eval()(input_ids=ids).logits[0, n - 1 : -1].double().log_softmax(-1)
        for m in (policy, reference)
    )
    return float((theirs.exp() * (theirs - ours)).sum())


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def distance(one, other):
    """Return the largest difference of two states."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def without_clock(log):
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in log]


def prefer(model, preferences=None, *, frozen=None, anchors=(), seed=0, more=None, **options):
    """Train on pairs for a few steps; return the log. The reference is the model as it comes."""
    frozen = frozen or frozen_copy(model)
    most, layout = options.pop("most", 4), options.pop("layout", "mask")
    weight, objectives = options.pop("anchor_weight", 1.0), options.pop("objectives", OBJECTIVES)
    how = Optimisation(**({"lr": 5e-3, "batch_size": 4, "steps": 20} | options))
    groups = group_pairs(TOKENIZER, preferences or pairs_of(), objectives, most)
    with frozen(model) as theirs:
        logps = score(theirs, [g.row for g in groups], Scoring(layout, PAD))
    given = [Preferences(groups, objectives, logps, layout, PAD, how.batch_size)]
    if anchors:
        given.append(Anchors(anchors, frozen, PAD, len(anchors), weight))
    return fit(model, given, how, seed=seed, **(more or {}))


# Groups


def test_pairs_of_one_prompt_are_one_row_with_each_response_once():
    preferences = [
        preferred(0, QUESTIONS[0], REFUSAL, ANSWERS[0]),
        preferred(1, QUESTIONS[1], ANSWERS[1], ANSWERS[2]),
        preferred(2, QUESTIONS[0], ANSWERS[3], REFUSAL),
    ]
    one, other = group_pairs(TOKENIZER, preferences, OBJECTIVES, 32)
    (expected,) = encode(TOKENIZER, [user(QUESTIONS[0])], [[REFUSAL, ANSWERS[0], ANSWERS[3]]])
    assert one.row == expected
    assert [(p.id, p.chosen, p.rejected) for p in one.pairs] == [("p0", 0, 1), ("p2", 2, 0)]
    assert [(p.id, p.chosen, p.rejected) for p in other.pairs] == [("p1", 0, 1)]


def test_a_group_has_no_more_pairs_than_it_may():
    preferences = crossed_pairs()
    groups = group_pairs(TOKENIZER, preferences, OBJECTIVES, 4)
    assert [[p.id for p in g.pairs] for g in groups] == [["p0", "p1", "p2", "p3"], ["p4", "p5"]]
    assert [len(g.row.completions) for g in groups] == [4, 3]
    alone = group_pairs(TOKENIZER, preferences, OBJECTIVES, 1)
    assert [len(g.row.completions) for g in alone] == [2] * 6
    assert len({tuple(g.row.prompt) for g in [*groups, *alone]}) == 1


def test_texts_and_conversations_are_different_prompts():
    text = replace(preferred(0, QUESTIONS[0], REFUSAL, ANSWERS[0]), prompt=QUESTIONS[0])
    chat = preferred(1, QUESTIONS[0], REFUSAL, ANSWERS[0])
    one, other = group_pairs(TOKENIZER, [text, chat], OBJECTIVES, 32)
    assert len(one.row.prompt) < len(other.row.prompt)


def test_a_pair_brings_what_its_loss_needs():
    three = {
        "safety": Objective(LOSSES["modpo"], LossSettings(), ("style", "helpfulness")),
        "style": Objective(LOSSES["modpo"], LossSettings(), ("safety", "helpfulness")),
    }
    preferences = [
        preferred(0, QUESTIONS[0], REFUSAL, ANSWERS[0], "safety", 2.0, 0.25),
        preferred(1, QUESTIONS[0], ANSWERS[0], ANSWERS[1], "style", 3.0, safety=None),
    ]
    ((one, other),) = (g.pairs for g in group_pairs(TOKENIZER, preferences, three, 32))
    # A margin that a pair does not have counts as 0.
    assert one == Pair("p0", 0, 1, "safety", (0.0, -2.0), 0.25, (1.0, 0.0))
    assert other == Pair("p1", 1, 2, "style", (3.0, -3.0), 0.0, None)


several_preferences = st.lists(
    st.tuples(
        st.sampled_from(QUESTIONS),
        st.permutations([*ANSWERS, REFUSAL]),
        st.sampled_from(["safety", "helpfulness"]),
    ),
    max_size=20,
).map(
    lambda drawn: [
        preferred(n, question, *answers[:2], objective, margin=float(n), flip=n / 50)
        for n, (question, answers, objective) in enumerate(drawn)
    ]
)


def unfolded(groups):
    """Return each pair's id with its tokens and numbers, whatever group it is in."""
    return {
        p.id: (
            tuple(g.row.prompt),
            g.row.completions[p.chosen],
            g.row.completions[p.rejected],
            *(p.objective, p.margins, p.flip_probability, p.safety),
        )
        for g in groups
        for p in g.pairs
    }


@given(preferences=several_preferences, most=st.integers(1, 5))
def test_grouping_loses_nothing(preferences, most):
    groups = group_pairs(TOKENIZER, preferences, OBJECTIVES, most)
    alone = [group_pairs(TOKENIZER, [each], OBJECTIVES, 1)[0] for each in preferences]
    assert unfolded(groups) == unfolded(alone)
    assert sum(len(g.pairs) for g in groups) == len(preferences)
    for group in groups:
        assert 1 <= len(group.pairs) <= most
        used = {i for p in group.pairs for i in (p.chosen, p.rejected)}
        assert used == set(range(len(group.row.completions)))
        assert len(set(map(tuple, group.row.completions))) == len(used)
    # As few rows as can be: all groups of a prompt are full but for the last.
    per_prompt = Counter(tuple(g.row.prompt) for g in groups)
    pairs = Counter(str(each.prompt) for each in preferences)
    assert sorted(per_prompt.values()) == sorted(math.ceil(n / most) for n in pairs.values())


@given(preferences=several_preferences, most=st.integers(10, 18))
def test_pairs_that_are_too_long_are_left_out_and_named(preferences, most):
    groups = group_pairs(TOKENIZER, preferences, OBJECTIVES, 5)
    whole = unfolded(groups)
    kept, dropped = drop_long(groups, most)
    fits = {
        name: len(prompt) + max(len(chosen), len(rejected)) <= most
        for name, (prompt, chosen, rejected, *_) in whole.items()
    }
    assert unfolded(kept) == {name: pair for name, pair in whole.items() if fits[name]}
    assert sorted(dropped) == sorted(name for name in whole if not fits[name])
    for group in kept:
        used = {i for p in group.pairs for i in (p.chosen, p.rejected)}
        assert used == set(range(len(group.row.completions)))


def test_a_group_that_fits_is_left_as_it_is_and_its_weight_is_kept():
    row = Row([1, 2, 3], [[4], [5, 6, 7], [8, 9]], weight=0.5)
    pairs = [
        Pair(f"p{n}", *ends, "safety", (), 0.0, None) for n, ends in enumerate([(0, 1), (2, 0)])
    ]
    group = Group(row, tuple(pairs))
    assert drop_long([group], 6) == ([group], [])
    ((cut,), dropped) = drop_long([group], 5)
    assert dropped == ["p0"]
    assert cut.row == Row([1, 2, 3], [[4], [8, 9]], weight=0.5)
    assert cut.pairs == (replace(pairs[1], chosen=1, rejected=0),)
    assert drop_long([group], 3) == ([], ["p0", "p1"])


# Losses that can be told without a model


def objectives_with(loss, weights=(0.7, 0.3), **settings):
    return {"safety": Objective(LOSSES[loss], LossSettings(0.1, weights, **settings), ("other",))}


def with_margin(margin, **more):
    return replace(preferred(0, "it ?", "a", "b"), margins={"other": margin}, **more)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_pairs_whose_losses_can_be_computed_pass(loss):
    check_losses(objectives_with(loss), [with_margin(0.8), with_margin(-4.0)], "pairs.jsonl")


@pytest.mark.parametrize(
    ("objectives", "bad", "sentence"),
    [
        (objectives_with("modpo"), with_margin(math.inf), "its loss is inf"),
        (objectives_with("modpo"), with_margin(math.nan), "its loss is nan"),
        (objectives_with("modpo"), with_margin(1e39), "its loss is inf"),  # it is so in fp32
        (
            objectives_with("dpo", noise="conservative"),
            with_margin(0, flip_probability=math.nan),
            "nan",
        ),
        (objectives_with("safedpo"), with_margin(0, safety=None), "whether it is safe"),
        (objectives_with("modpo", (1.0,)), with_margin(0), "1 weights for 2 objectives"),
        (objectives_with("modpo", (0.0, 1.0)), with_margin(0), "must be above 0"),
    ],
)
def test_pairs_whose_losses_cannot_be_computed_are_named(objectives, bad, sentence):
    with pytest.raises(BadInput, match=re.escape(sentence)) as caught:
        check_losses(objectives, [bad, with_margin(1.0)], "pairs.jsonl")
    assert "pairs.jsonl" in str(caught.value)
    if "weight" not in sentence and "above" not in sentence:
        with pytest.raises(BadInput, match="row 3"):
            check_losses(objectives, [with_margin(1.0)] * 2 + [bad], "pairs.jsonl")


# Log-probabilities of pairs


def test_each_pair_gets_the_numbers_of_its_responses():
    groups = [
        Group(Row([1], [[2], [3, 4], [5]]), tuple(
            Pair(name, *ends, "safety", (), flip, safe)
            for name, ends, flip, safe in (
                ("a", (2, 0), 0.1, (1.0, 0.0)), ("b", (1, 0), 0.2, (0.0, 1.0)))
        )),
        Group(Row([1], [[6, 7, 8], [9]]), (Pair("c", 1, 0, "safety", (), 0.3, (1.0, 1.0)),)),
    ]  # fmt: skip
    policy, theirs = torch.arange(5.0), -torch.arange(5.0)
    pairs, logps = pair_logps(groups, policy, theirs)
    assert [p.id for p in pairs] == ["a", "b", "c"]
    assert logps.policy_chosen.tolist() == [2, 1, 4]
    assert logps.policy_rejected.tolist() == [0, 0, 3]
    assert logps.reference_chosen.tolist() == [-2, -1, -4]
    assert logps.reference_rejected.tolist() == [0, 0, -3]
    assert logps.flip_probability.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert logps.safety is None  # which pairs have bits depends on their objective
    assert logps.lengths.tolist() == [[1, 1], [2, 1], [1, 3]]
    assert logps.margins.shape == (3, 0)


def test_each_objective_has_its_own_weights_and_margins():
    preferences = [
        preferred(0, QUESTIONS[0], REFUSAL, ANSWERS[0], "safety", 2.0),
        preferred(1, QUESTIONS[1], REFUSAL, ANSWERS[1], "helpfulness", 2.0),
    ]
    pairs = [p for g in group_pairs(TOKENIZER, preferences, OBJECTIVES, 1) for p in g.pairs]
    # Each pair's margins are those of the other objective.
    assert [p.margins for p in pairs] == [(-2.0,), (2.0,)]
    logps = PairLogps(
        torch.tensor([-20.0, -20.0]),
        torch.tensor([-30.0, -30.0]),
        torch.tensor([-22.0, -22.0]),
        torch.tensor([-28.0, -28.0]),
        torch.zeros(2, 0),
        torch.zeros(2),
    )
    # beta h = 0.4. Safety: (0.4 - 0.3 x -2) / 0.7; helpfulness: (0.4 - 0.7 x 2) / 0.3.
    expected = [math.log1p(math.exp(-1.0 / 0.7)), math.log1p(math.exp(1.0 / 0.3))]
    for order in ([0, 1], [1, 0]):
        found = pair_losses(logps, [pairs[i] for i in order], OBJECTIVES)
        assert found.tolist() == pytest.approx([expected[i] for i in order], rel=1e-5)


def test_flip_probabilities_safety_bits_and_lengths_travel_with_their_pair():
    objectives = {
        "safety": Objective(
            LOSSES["modpo"], LossSettings(0.1, (1.0, 0.0), "conservative"), ("helpfulness",)
        ),
        "helpfulness": Objective(LOSSES["bfpo"], LossSettings(0.1), ("safety",)),
        "style": Objective(LOSSES["simpo"], LossSettings(2.0), ()),
    }
    preferences = [
        preferred(0, QUESTIONS[0], "it .", REFUSAL, "style"),
        preferred(1, QUESTIONS[0], REFUSAL, ANSWERS[0], "helpfulness"),
        preferred(2, QUESTIONS[0], REFUSAL, ANSWERS[1], flip=0.4),
    ]
    groups = group_pairs(TOKENIZER, preferences, objectives, 1)
    pairs, logps = pair_logps(groups, torch.tensor([-6.0, -3.0, 4, 0, 4, 0]), torch.zeros(6))
    right, wrong = math.log1p(math.exp(-0.4)), math.log1p(math.exp(0.4))
    expected = [
        math.log1p(math.exp(-2.0 * (-6 / 3 + 3 / 6))),  # with the end, 3 and 6 tokens
        1.0,  # BFPO of two safe ones: target 0.5 / beta = 5, h = 4
        0.6 * right + 0.4 * wrong,
    ]
    assert pair_losses(logps, pairs, objectives).tolist() == pytest.approx(expected, rel=1e-5)


def test_pairs_without_safety_bits_do_not_take_those_of_others():
    objectives = {
        "safety": Objective(LOSSES["safedpo"], LossSettings(), ()),
        "style": Objective(LOSSES["dpo"], LossSettings(), ()),
    }
    preferences = [
        preferred(0, QUESTIONS[0], REFUSAL, ANSWERS[0]),
        preferred(1, QUESTIONS[0], REFUSAL, ANSWERS[1], "style", safety=None),
    ]
    check_losses(objectives, preferences, "pairs.jsonl")  # alone, both can be computed
    groups = group_pairs(TOKENIZER, preferences, objectives, 2)
    pairs, logps = pair_logps(groups, torch.zeros(3), torch.zeros(3))
    found = pair_losses(logps, pairs, objectives)
    assert found.tolist() == pytest.approx([math.log(2)] * 2)


# The task


def task_of(groups, logps, layout="mask", objectives=OBJECTIVES, **more):
    return Preferences(groups, objectives, logps, layout, PAD, 4, **more)


@pytest.mark.parametrize("layout", ["mask", "prefix", "rows"])
def test_losses_are_those_of_log_probabilities_without_shared_prompts(layout):
    """Four responses, all six pairs of them, two objectives: margins and doubts a pair."""
    policy, theirs = tiny(0), tiny(1)
    preferences = crossed_pairs()
    (group,) = group_pairs(TOKENIZER, preferences, OBJECTIVES, 32)
    assert len(group.row.completions) == 4
    ours, reference_of_all = naive_logps(policy, group.row), naive_logps(theirs, group.row)
    expected = []
    for pair, each in zip(group.pairs, preferences, strict=True):
        h = (ours[pair.chosen] - reference_of_all[pair.chosen]) - (
            ours[pair.rejected] - reference_of_all[pair.rejected]
        )
        own, other = (0.7, 0.3) if each.objective == "safety" else (0.3, 0.7)
        margin = each.margins["helpfulness" if each.objective == "safety" else "safety"]
        gap = (0.1 * h - other * margin) / own
        right, wrong = math.log1p(math.exp(-gap)), math.log1p(math.exp(gap))
        e = each.flip_probability
        expected.append((1 - e) * right + e * wrong)
    doubtful = {
        name: replace(o, settings=replace(o.settings, noise="conservative"))
        for name, o in OBJECTIVES.items()
    }
    task = task_of([group], [torch.tensor(reference_of_all)], layout, doubtful)
    losses, _ = task.losses(policy, [0])
    assert losses.tolist() == pytest.approx(expected, abs=1e-4)
    assert task.names([0]) == [f"pair p{n}" for n in range(6)]


@pytest.mark.parametrize("layout", ["mask", "prefix", "rows"])
def test_responses_in_several_pairs_cost_one_row_and_give_the_gradients_of_separate_pairs(layout):
    preferences = [*crossed_pairs(), *crossed_pairs(QUESTIONS[1], ANSWERS, first=6)]

    def train(most):
        model = tiny()
        groups = group_pairs(TOKENIZER, preferences, OBJECTIVES, most)
        rows = [g.row for g in groups]
        logps = score(tiny(1).eval(), rows, Scoring(layout, PAD))
        task = task_of(groups, logps, layout)
        items = list(range(len(groups)))
        losses, sums = task.losses(model, items)
        losses.sum().backward()
        named = dict(zip(task.names(items), losses.tolist(), strict=True))
        return task, named, sums, model.model.embed_tokens.weight.grad

    shared, losses, sums, gradient = train(6)
    separate, same, again, other_gradient = train(1)
    assert losses == {name: pytest.approx(loss, abs=1e-4) for name, loss in same.items()}
    assert sums == {name: pytest.approx(value, abs=1e-3) for name, value in again.items()}
    assert_close(gradient, other_gradient, atol=1e-5, rtol=1e-4)
    assert shared.total([0, 1]) == separate.total(range(12)) == 12
    assert sum(shared.trained) == sum(separate.trained) / 3
    assert sum(shared.costs) < sum(separate.costs) / 3


def test_the_order_of_items_is_that_of_losses_and_names():
    groups = group_pairs(TOKENIZER, crossed_pairs() + pairs_of()[1:], OBJECTIVES, 3)
    rows = [g.row for g in groups]
    task, model = task_of(groups, score(tiny(1).eval(), rows, Scoring("mask", PAD))), tiny()
    together, _ = task.losses(model, [3, 0, 2])
    alone = torch.cat([task.losses(model, [i])[0] for i in (3, 0, 2)])
    assert_close(together, alone, atol=1e-5, rtol=0)
    assert task.names([3, 0]) == task.names([3]) + task.names([0])


def test_a_task_says_what_its_groups_cost():
    row = Row([1, 2, 3], [[4], [5, 6], [7]])
    group = Group(row, tuple(Pair("p", 0, n, "safety", (0.0,), 0.0, None) for n in (1, 2)))
    task = task_of([group, group], [])
    assert (task.sizes, task.costs, task.trained) == ([2, 2], [7, 7], [4, 4])
    assert task.total([0, 1]) == 4


def test_what_the_log_says_of_a_step_by_hand():
    """Three pairs, h = 4, -1 and 2: log-ratios (1, -3), (0, 1) and (2, 0)."""
    pairs = [("safety", 0, 1), ("safety", 2, 3), ("helpfulness", 4, 5)]
    group = Group(
        Row([1, 9], [[n] for n in range(6)]),
        tuple(Pair(str(ends), *ends, name, (0.0,), 0.0, None) for name, *ends in pairs),
    )
    task = task_of([group], [])
    ours, theirs = torch.tensor([1.0, -3, 0, 1, 2, 0]) - 9, torch.full((6,), -9.0)
    found, logps = pair_logps([group], ours, theirs)
    losses = torch.tensor([0.5, 1.5, 1.0])
    sums = task._sums(logps, found, losses)
    assert set(sums) == set(task.counted)
    assert task.summary(sums, 3) == {
        "loss": 1.0,
        "accuracy": pytest.approx(2 / 3),
        "log_ratio_gap": pytest.approx(5 / 3),
        "margins": {"safety": pytest.approx(0.1 * 1.5), "helpfulness": pytest.approx(0.2)},
        "kl_estimate": pytest.approx((1 + 9 + 0 + 1 + 4 + 0) / 2 / 6),
    }
    _, at_the_start = pair_logps([group], theirs, theirs)  # a tie is not right
    assert task.summary(task._sums(at_the_start, found, losses), 3)["accuracy"] == 0
    one, logps = pair_logps([Group(group.row, group.pairs[:1])], ours, theirs)
    assert task.summary(task._sums(logps, one, losses[:1]), 1)["margins"] == {
        "safety": pytest.approx(0.4)
    }


def test_the_losses_of_anchors_are_divergences_from_the_reference():
    policy, theirs, rows = tiny(0), tiny(1), anchors_of()
    task = Anchors(rows, other_model(theirs), PAD, 2, 0.5)
    losses, sums = task.losses(policy, [1, 0])
    expected = [naive_kl(policy, theirs, rows[i]) for i in (1, 0)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)
    assert abs(naive_kl(theirs, policy, rows[1]) - expected[0]) > 1e-3  # it has a direction
    n_tokens = sum(len(row.completions[0]) for row in rows)
    assert task.total([0, 1]) == sum(task.trained) == n_tokens
    assert task.costs == [row.n_tokens for row in rows]
    assert task.sizes == [1, 1]
    assert task.summary(sums, n_tokens) == {
        "anchor_kl": pytest.approx(sum(expected) / n_tokens, rel=1e-4)
    }
    assert task.names([1, 0]) == ["anchor 1", "anchor 0"]
    losses.sum().backward()
    assert all(p.grad is None for p in theirs.parameters())
    assert float(policy.model.embed_tokens.weight.grad.abs().max()) > 0


# The reference


def parts_of(model):
    """Return what may not change: weights that are trained, active adapters, modes."""
    return (
        [name for name, p in model.named_parameters() if p.requires_grad],
        getattr(model, "active_adapter", None),
        [module.training for module in model.modules()],
    )


@pytest.fixture
def other_adapter(tmp_path):
    """Return the folder of an adapter that is not the policy's, and the model it makes."""
    model = lora(1, moved=2)
    model.save_pretrained(tmp_path / "reference")
    return tmp_path / "reference", model


def both_adapters(folder, **more):
    model = lora(moved=1, **more)
    model.load_adapter(folder, REFERENCE_ADAPTER, is_trainable=False)
    return model


@pytest.mark.parametrize("is_training", [True, False])
def test_without_its_adapter_a_policy_is_its_base(is_training):
    model, (row,) = lora(moved=1, dropout=0.5), rows_of(pairs_of()[:1])
    before, ours = parts_of(model.train(is_training)), naive_logps(model, row)
    model.train(is_training)
    with adapter_off(model) as theirs:
        assert not any(module.training for module in theirs.modules())
        found = score(theirs, [row], Scoring("mask", PAD))
    assert found[0].tolist() == pytest.approx(naive_logps(tiny(), row), abs=1e-4)
    assert parts_of(model) == before
    assert naive_logps(model, row) == ours
    assert abs(ours[0] - float(found[0][0])) > 0.01


@pytest.mark.parametrize("is_training", [True, False])
def test_a_second_adapter_is_the_reference_for_a_while(other_adapter, is_training):
    folder, other = other_adapter
    model, (row,) = both_adapters(folder, dropout=0.5), rows_of(pairs_of()[:1])
    ours = naive_logps(lora(moved=1), row)
    before = parts_of(model.train(is_training))
    assert not any(REFERENCE_ADAPTER in name for name in before[0])
    with reference_adapter(model) as theirs:
        assert not any(module.training for module in theirs.modules())
        assert not any(p.requires_grad for p in theirs.parameters())
        found = score(theirs, [row], Scoring("mask", PAD))
    assert found[0].tolist() == pytest.approx(naive_logps(other, row), abs=1e-4)
    assert parts_of(model) == before
    assert naive_logps(model, row) == pytest.approx(ours, abs=1e-5)
    assert abs(ours[0] - float(found[0][0])) > 0.01


def test_another_model_is_the_reference_whatever_the_policy(other_adapter):
    _, theirs = other_adapter
    theirs.train().requires_grad_(True)
    policy = tiny().train()
    with other_model(theirs)(policy) as found:
        assert found is theirs
        assert not found.training
        assert not any(p.requires_grad for p in found.parameters())
    assert policy.training
    assert all(p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("kind", [adapter_off, reference_adapter])
def test_a_policy_is_itself_again_after_an_accident(other_adapter, kind):
    model = both_adapters(other_adapter[0]).train()
    before = parts_of(model)
    with pytest.raises(ZeroDivisionError), kind(model):
        raise ZeroDivisionError
    assert parts_of(model) == before


@pytest.mark.parametrize("kind", [adapter_off, reference_adapter])
def test_gradients_that_are_being_added_up_survive_a_look_at_the_reference(other_adapter, kind):
    model = both_adapters(other_adapter[0]).train()
    task = Anchors(anchors_of(), kind, PAD, 2, 1.0)
    task.losses(model, [0])[0].sum().backward()
    first = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(float(grad.abs().max()) > 0 for grad in first.values())
    task.losses(model, [0])[0].sum().backward()
    for name, p in model.named_parameters():
        if name in first:
            assert_close(p.grad, 2 * first[name], rtol=1e-4, atol=1e-7)
        else:
            assert p.grad is None


@pytest.mark.parametrize("kind", [adapter_off, reference_adapter])
def test_only_the_policys_adapter_is_trained(other_adapter, kind):
    folder, other = other_adapter
    model = both_adapters(folder)
    everything = {name: p.clone() for name, p in model.named_parameters()}
    log = prefer(model, frozen=kind, anchors=anchors_of(), steps=3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, everything[name])}
    assert moved == {name for name in everything if "lora_" in name and ".default." in name}
    theirs = tiny() if kind is adapter_off else other
    expected = [naive_kl(lora(moved=1), theirs, row) for row in anchors_of()]
    n_tokens = sum(len(row.completions[0]) for row in anchors_of())
    assert log[0]["anchor_kl"] == pytest.approx(sum(expected) / n_tokens, rel=1e-3)


# Scoring


@pytest.mark.parametrize("layout", ["mask", "prefix", "rows"])
@pytest.mark.parametrize("max_tokens", [1, 40, 10**6])
def test_scores_do_not_depend_on_layout_or_batch(layout, max_tokens):
    model, rows = tiny().eval(), rows_of(crossed_pairs() + pairs_of(), most=3)
    found = score(model, rows, Scoring(layout, PAD, max_tokens))
    assert [len(logps) for logps in found] == [len(row.completions) for row in rows]
    for row, logps in zip(rows, found, strict=True):
        assert logps.tolist() == pytest.approx(naive_logps(model, row), abs=1e-4)
        assert not logps.requires_grad
    assert score(model, [], Scoring(layout, PAD)) == []


def limited(monkeypatch, limit, failure=CPU_FULL, module=reference):
    """Let forward passes over more than `limit` packed tokens fail; return the sizes of all."""
    original, sizes = module.hidden_states, []

    def cramped(model, rows, *args, **more):
        sizes.append(len(rows) * max(row.n_tokens for row in rows))
        hidden = original(model, rows, *args, **more)
        if sizes[-1] > limit:
            raise failure
        return hidden

    monkeypatch.setattr(module, "hidden_states", cramped)
    return sizes


@pytest.mark.parametrize("failure", [GPU_FULL, CPU_FULL, MemoryError()])
def test_scoring_halves_what_does_not_fit(monkeypatch, failure):
    model, rows = tiny().eval(), rows_of(pairs_of())
    whole = score(model, rows, Scoring("mask", PAD))
    sizes = limited(monkeypatch, 50, failure)
    halves = score(model, rows, Scoring("mask", PAD))
    assert max(sizes) > 50
    for a, b in zip(whole, halves, strict=True):
        assert_close(a, b, atol=1e-5, rtol=0)
    limited(monkeypatch, 10, failure)
    with pytest.raises(type(failure)):
        score(model, rows, Scoring("mask", PAD))


def test_scoring_lets_other_failures_through(monkeypatch):
    sizes = limited(monkeypatch, 10, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        score(tiny().eval(), rows_of(pairs_of()), Scoring("mask", PAD))
    assert len(sizes) == 1


def test_what_a_failed_scoring_held_is_free_before_its_halves(monkeypatch):
    original, held, alive = reference.hidden_states, [], []

    def cramped(model, rows, *args):
        alive.append(sum(ref() is not None for ref in held))
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        if len(rows) > 1:
            raise GPU_FULL
        return original(model, rows, *args)

    monkeypatch.setattr(reference, "hidden_states", cramped)
    score(tiny().eval(), rows_of(pairs_of()), Scoring("mask", PAD))
    assert len(alive) == 7
    assert set(alive) == {0}


def test_processes_share_the_scoring():
    class Fellow(Processes):
        def __init__(self, rank):
            super().__init__()
            self.rank, self.count = rank, 3

        def add_up(self, parts):
            return parts

    model, rows = tiny().eval(), rows_of(pairs_of())
    whole = score(model, rows, Scoring("mask", PAD))
    shares = [score(model, rows, Scoring("mask", PAD, processes=Fellow(n))) for n in range(3)]
    for i, expected in enumerate(whole):
        parts = [share[i] for share in shares]
        assert_close(sum(parts), expected, atol=1e-5, rtol=0)
        assert [bool(part.any()) for part in parts] == [i % 3 == rank for rank in range(3)]


def test_scores_in_bf16_are_near_those_in_fp32():
    model, rows = tiny().eval(), rows_of(pairs_of())
    full, half = (score(model, rows, Scoring("mask", PAD, precision=p)) for p in ("fp32", "bf16"))
    assert any(not torch.equal(a, b) for a, b in zip(full, half, strict=True))
    for a, b in zip(full, half, strict=True):
        assert b.dtype == torch.float32
        assert_close(a, b, atol=BF16_TOLERANCE * 7**0.5, rtol=0)


# The cache of the reference


def counted(model):
    """Return a list that grows by one for every forward pass of a model's body."""
    calls = []
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    return calls


SCORING = Scoring("mask", PAD)


def look_up(folder, model, rows, how=SCORING, identity="sha256:1"):
    return reference_logps(other_model(model), None, rows, how, cache=folder, identity=identity)


def test_the_references_log_probabilities_are_computed_once(tmp_path):
    model, rows = tiny(1), rows_of(pairs_of())
    calls = counted(model)
    first = look_up(tmp_path / "new" / "cache", model, rows)
    assert len(calls) == 1
    for row, logps in zip(rows, first, strict=True):
        assert logps.tolist() == pytest.approx(naive_logps(model, row), abs=1e-4)
    del calls[:]
    again = look_up(tmp_path / "new" / "cache", model, rows)
    assert calls == []
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (file,) = (tmp_path / "new" / "cache").iterdir()
    assert_close(load_file(file)["logps"], torch.cat(first), atol=0, rtol=0)


def with_rows(change):
    return [change(row) for row in rows_of(pairs_of())]


@pytest.mark.parametrize(
    ("rows", "how", "identity"),
    [
        (rows_of(pairs_of()), SCORING, "sha256:2"),
        (rows_of(pairs_of())[:3], SCORING, "sha256:1"),
        (rows_of(pairs_of())[::-1], SCORING, "sha256:1"),
        (with_rows(lambda row: replace(row, prompt=[*row.prompt[:-1], 9])), SCORING, "sha256:1"),
        (
            with_rows(lambda row: replace(row, completions=row.completions[::-1])),
            SCORING,
            "sha256:1",
        ),
        (rows_of(pairs_of()), replace(SCORING, layout="rows"), "sha256:1"),
        (rows_of(pairs_of()), replace(SCORING, precision="bf16"), "sha256:1"),
    ],
    ids=["weights", "fewer", "order", "prompts", "completions", "layout", "precision"],
)
def test_whatever_changes_them_has_a_file_of_its_own(tmp_path, rows, how, identity):
    model = tiny(1)
    look_up(tmp_path, model, rows_of(pairs_of()))
    calls = counted(model)
    look_up(tmp_path, model, rows, how, identity)
    assert len(calls) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_prompt_is_not_mistaken_for_a_completion(tmp_path):
    model = tiny(1)
    look_up(tmp_path, model, [Row([1, 9], [[8, 7], [6]])])
    look_up(tmp_path, model, [Row([1, 9, 8], [[7], [6]])])
    look_up(tmp_path, model, [Row([1, 9], [[8], [7, 6]])])
    assert len(list(tmp_path.iterdir())) == 3


def break_by(how, file):
    data = file.read_bytes()
    match how:
        case "cut":
            file.write_bytes(data[: len(data) // 2])
        case "empty":
            file.write_bytes(b"")
        case "text":
            file.write_text("it has a teal shade .")
        case "other name":
            save_file({"other": torch.zeros(8)}, file)
        case "other size":
            save_file({"logps": torch.zeros(7)}, file)
        case "other shape":
            save_file({"logps": torch.zeros(8, 1)}, file)


@pytest.mark.parametrize("how", ["cut", "empty", "text", "other name", "other size", "other shape"])
def test_a_broken_file_is_written_anew(tmp_path, how):
    model, rows = tiny(1), rows_of(pairs_of())
    first = look_up(tmp_path, model, rows)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    break_by(how, file)
    again = look_up(tmp_path, model, rows)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == whole


def test_only_the_main_process_writes_the_cache(tmp_path):
    class Fellow(Processes):
        def __init__(self):
            super().__init__()
            self.rank = 1

    look_up(tmp_path / "cache", tiny(1), rows_of(pairs_of()), replace(SCORING, processes=Fellow()))
    assert not (tmp_path / "cache").exists()


def test_a_policy_in_training_is_itself_again_after_its_reference_was_scored(tmp_path):
    model, rows = lora(moved=1, dropout=0.5).train(), rows_of(pairs_of())
    before = parts_of(model)
    found = reference_logps(adapter_off, model, rows, SCORING, cache=tmp_path, identity="base")
    assert parts_of(model) == before
    expected = [x for row in rows for x in naive_logps(tiny(), row)]
    assert torch.cat(found).tolist() == pytest.approx(expected, abs=1e-4)


# The start


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_policy_that_starts_as_its_reference_passes(precision):
    rows = rows_of([*crossed_pairs(), *pairs_of()[1:]])
    how = Scoring("mask", PAD, precision=precision)
    for model, theirs in ((tiny(), tiny()), (lora(), tiny())):
        model.train()
        logps = score(theirs.eval(), rows, how)
        check_start(model, rows, logps, how)
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("make", [lambda: tiny(1), lambda: lora(moved=1)], ids=["full", "lora"])
def test_a_policy_that_should_start_as_its_reference_and_does_not_is_stopped(make, precision):
    rows, how = rows_of(pairs_of()), Scoring("mask", PAD, precision=precision)
    logps = score(tiny().eval(), rows, how)
    with pytest.raises(TrainingStopped, match=r"\d nats away from its reference") as caught:
        check_start(make(), rows, logps, how)
    assert caught.value.exit_code == 18


@pytest.mark.parametrize(
    ("precision", "off", "stops"),
    [
        ("fp32", 0.5 * FP32_TOLERANCE, False),
        ("fp32", -2 * FP32_TOLERANCE, True),
        ("fp32", 2 * FP32_TOLERANCE, True),
        ("fp32", math.nan, True),
        ("fp32", math.inf, True),
        # A response of six tokens
        ("bf16", 0.9 * BF16_TOLERANCE * 6**0.5, False),
        ("bf16", 1.2 * BF16_TOLERANCE * 6**0.5, True),
        ("bf16", math.nan, True),
    ],
)
def test_the_start_may_be_off_by_rounding_only(precision, off, stops):
    model, rows = tiny(), rows_of(pairs_of()[:1])
    how = Scoring("mask", PAD, precision=precision)
    (logps,) = score(model.eval(), rows, how)
    assert len(rows[0].completions[0]) == 6
    shifted = [logps + torch.tensor([off, 0.0])]
    if stops:
        with pytest.raises(TrainingStopped):
            check_start(model, rows, shifted, how)
    else:
        check_start(model, rows, shifted, how)


def test_the_start_is_looked_at_in_one_forward_pass_with_the_longest_row(monkeypatch):
    model, rows = tiny(), rows_of([*pairs_of(), *crossed_pairs("it ?")])
    how = Scoring("mask", PAD, max_tokens=40)
    logps = score(model.eval(), rows, how)
    sizes = limited(monkeypatch, math.inf)
    check_start(model, rows, logps, how)
    assert sizes == [max(row.n_tokens for row in rows)]
    longest = max(range(len(rows)), key=lambda i: rows[i].n_tokens)
    logps[longest] = logps[longest] + 1
    with pytest.raises(TrainingStopped, match=r"1\.0000 nats"):
        check_start(model, rows, logps, how)


# Training


def test_preferences_are_learnt_from_margins_of_zero():
    model = tiny()
    before = copy.deepcopy(model)
    log = prefer(model)
    assert [row["step"] for row in log] == list(range(20))
    # Margins are 0 in the pairs and at the start, so the first loss is that of a coin.
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[0]["log_ratio_gap"] == pytest.approx(0.0, abs=1e-4)
    assert log[0]["kl_estimate"] == pytest.approx(0.0, abs=1e-6)
    assert log[-1]["accuracy"] == 1.0
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert log[-1]["margins"] == {"safety": pytest.approx(0.1 * log[-1]["log_ratio_gap"])}
    assert all(row["gradient_norm"] > 0 for row in log)
    assert list(log[0]) == [
        *("step", "loss", "accuracy", "log_ratio_gap", "margins", "kl_estimate"),
        *("gradient_norm", "lr", "trained_share", "tokens_per_second"),
    ]
    for row in rows_of(pairs_of()):
        (chosen, rejected), (then, other) = naive_logps(model, row), naive_logps(before, row)
        assert chosen - then > rejected - other
    assert not model.training


def test_the_reference_does_not_move():
    model, theirs = tiny(), tiny(1)
    before = {name: p.clone() for name, p in theirs.named_parameters()}
    prefer(model, frozen=other_model(theirs), anchors=anchors_of(), steps=3)
    assert all(torch.equal(before[name], p) for name, p in theirs.named_parameters())
    assert distance(state(model), state(tiny())) > 0


def test_anchors_hold_the_policy_near_its_reference():
    def drift(weight):
        model = tiny()
        anchors = anchors_of() if weight else ()
        log = prefer(model, anchors=anchors, anchor_weight=weight, steps=15)
        return sum(naive_kl(model, tiny(), row) for row in anchors_of()), log

    (free, free_log), (held, held_log) = drift(0.0), drift(20.0)
    assert held < 0.5 * free
    assert "anchor_kl" not in free_log[0]
    assert held_log[0]["anchor_kl"] == pytest.approx(0.0, abs=1e-6)
    assert held_log[-1]["anchor_kl"] > 0
    assert held_log[-1]["accuracy"] == 1.0


def test_margins_decide_how_hard_a_pair_is_pushed():
    def gap(margin):
        return prefer(tiny(), pairs_of(margin=margin), steps=8)[-1]["log_ratio_gap"]

    # margin is of safety; the helpfulness margin that MODPO adds is its negative: a chosen side
    # that is also better on the other objective (margin < 0 here) is pushed harder.
    assert gap(-6.0) > gap(6.0)


def test_preference_training_is_deterministic():
    def train(seed):
        model = tiny(dropout=0.2)
        torch.manual_seed(0)
        log = prefer(model, mixed_pairs(), anchors=anchors_of(), steps=5, seed=seed, most=2)
        return without_clock(log), state(model)

    (log, weights), (again, same) = train(0), train(0)
    assert log == again
    assert distance(weights, same) == 0
    assert train(1)[0] != log


def mixed_pairs():
    """Return pairs of prompts with six, three and one of them."""
    return [
        *crossed_pairs(),
        *crossed_pairs(QUESTIONS[1], ANSWERS[:3], first=6),
        preferred(9, QUESTIONS[2], REFUSAL, ANSWERS[0], margin=1.0),
    ]


@pytest.mark.parametrize(("most", "batch_size"), [(6, 2), (6, 4), (2, 4), (1, 3)])
def test_every_pair_is_seen_once_an_epoch(monkeypatch, most, batch_size):
    groups = group_pairs(TOKENIZER, mixed_pairs(), OBJECTIVES, most)
    logps = score(tiny().eval(), [g.row for g in groups], SCORING)
    task = Preferences(groups, OBJECTIVES, logps, "mask", PAD, batch_size)
    seen, original = [], task.losses

    def spy(model, items):
        seen.append([name for i in items for name in task.names([i])])
        return original(model, items)

    monkeypatch.setattr(task, "losses", spy)
    fit(tiny(), [task], Optimisation(1e-3, batch_size, steps_of(1.0, task, 3)), seed=3)
    assert sorted(name for batch in seen for name in batch) == sorted(
        f"pair p{n}" for n in range(10)
    )
    assert len(seen) >= 10 / (batch_size + most / 2)
    largest = max(task.sizes)
    assert all(len(batch) <= max(largest, batch_size + largest / 2) for batch in seen)


@pytest.mark.parametrize(
    ("layout", "max_tokens"), [("mask", 1), ("mask", 60), ("prefix", 60), ("rows", 1)]
)
def test_gradient_accumulation_equals_the_big_batch(layout, max_tokens):
    """With shared prompts, groups of different sizes, two objectives and anchors."""

    def train(max_tokens):
        model = tiny()
        frozen = other_model(tiny(1))
        log = prefer(
            model,
            mixed_pairs(),
            frozen=frozen,
            anchors=anchors_of(),
            anchor_weight=0.7,
            lr=1e-3,
            steps=5,
            most=3,
            batch_size=5,
            layout=layout,
            max_tokens=max_tokens,
        )
        return log, state(model)

    (whole, weights), (parts, same) = train(10**6), train(max_tokens)
    assert distance(weights, same) < 1e-6 < 1e-3 < distance(weights, state(tiny()))
    for row, again in zip(whole, parts, strict=True):
        for name in ("loss", "anchor_kl", "gradient_norm", "accuracy", "kl_estimate"):
            assert row[name] == pytest.approx(again[name], rel=1e-4)
        assert row["margins"] == {
            n: pytest.approx(m, abs=1e-4) for n, m in again["margins"].items()
        }


def test_layouts_train_the_same():
    def train(layout):
        model = tiny()
        prefer(model, mixed_pairs(), steps=4, lr=1e-3, layout=layout)
        return state(model)

    packed = train("mask")
    assert distance(packed, train("prefix")) < 1e-5
    assert distance(packed, train("rows")) < 1e-5


@pytest.mark.parametrize("where", [preference, tasks], ids=["pairs", "anchors"])
def test_a_step_that_ran_out_of_memory_is_replayed(monkeypatch, where):
    """With dropout, anchors and shared prompts: the bits of a run that began at that budget."""

    def train(max_tokens=10**6):
        model = lora(dropout=0.3)
        torch.manual_seed(2)
        # Every batch has all the pairs, so the first one does not fit already.
        log = prefer(
            model,
            mixed_pairs(),
            frozen=adapter_off,
            anchors=anchors_of() * 4,
            steps=3,
            batch_size=10,
            most=3,
            max_tokens=max_tokens,
        )
        return without_clock(log), state(model)

    with monkeypatch.context() as patch:
        sizes = limited(patch, 60, module=where)
        log, weights = train()
    budget = log[0].pop("max_tokens")
    assert budget < max(sizes)
    assert max(sizes[len(sizes) // 2 :]) <= 60 < max(sizes)
    assert not any("max_tokens" in row for row in log)
    expected, same = train(budget)
    assert log == expected
    assert distance(weights, same) == 0
    assert train()[0] != log  # whole batches draw other masks


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_tokens", [1, 10**6])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_pairs(bad, max_tokens):
    preferences = mixed_pairs()
    for n in (2, 7):
        own = preferences[n].margins | {"safety": bad, "helpfulness": bad}
        preferences[n] = replace(preferences[n], margins=own)
    model = tiny()
    with pytest.raises(TrainingStopped, match=r"at step 0, for ([^;]*);") as caught:
        prefer(model, preferences, batch_size=32, most=6, max_tokens=max_tokens)
    named = set(re.findall(r"pair (p\d)", str(caught.value)))
    assert named == {"p2", "p7"} if max_tokens > 1 else named and named <= {"p2", "p7"}
    assert distance(state(model), state(tiny())) == 0
    assert caught.value.exit_code == 18


def test_an_anchor_that_is_not_finite_is_named(monkeypatch):
    original = tasks.token_kl

    def broken(*args):
        divergence = original(*args)
        return torch.where(
            torch.arange(len(divergence)) == len(divergence) - 1, math.nan, divergence
        )

    monkeypatch.setattr(tasks, "token_kl", broken)
    assert [row.n_tokens for row in anchors_of()] == [10, 8]  # the shorter one comes last
    with pytest.raises(TrainingStopped, match=r"for anchor 1;"):
        prefer(tiny(), anchors=anchors_of())


class Stopped(Exception):  # noqa: N818
    """A user's Ctrl-C, of sorts."""


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("stop", [10, 13])
def test_a_training_that_was_stopped_ends_with_the_same_bits(tmp_path, stop, adapter):
    """AdamW, dropout, anchors, shared prompts, and the reference's log-probabilities cached."""

    def train(folder=None, stop=None):
        model = tiny(dropout=0.2) if adapter == "full" else lora(dropout=0.2)
        frozen = frozen_copy(model) if adapter == "full" else adapter_off
        torch.manual_seed(7)
        groups = group_pairs(TOKENIZER, mixed_pairs(), OBJECTIVES, 3)
        rows = [g.row for g in groups]
        cache = (folder or tmp_path) / "cache"
        logps = reference_logps(frozen, model, rows, SCORING, cache=cache, identity="it")
        check_start(model, rows, logps, SCORING)
        given = [
            Preferences(groups, OBJECTIVES, logps, "mask", PAD, 4),
            Anchors(anchors_of(), frozen, PAD, 1, 0.5),
        ]

        def progress(done, *_):
            if done == stop:
                raise Stopped

        log = fit(
            model,
            given,
            Optimisation(5e-3, 4, 13, weight_decay=0.1, max_tokens=50, checkpoint_every=4),
            seed=3,
            checkpoints=Checkpoints(folder, {"model": "it"}, print) if folder else None,
            progress=progress,
        )
        return without_clock(log), state(model)

    log, weights = train()
    with pytest.raises(Stopped):
        train(tmp_path / "run", stop)
    assert (tmp_path / "run" / f"checkpoint-{stop // 4 * 4}").is_dir()
    again, same = train(tmp_path / "run")
    assert again == log
    assert distance(weights, same) == 0


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_bf16_stays_near_fp32(adapter):
    def train(precision):
        model = tiny() if adapter == "full" else lora()
        frozen = frozen_copy(model) if adapter == "full" else adapter_off
        log = prefer(
            model,
            mixed_pairs(),
            frozen=frozen,
            anchors=anchors_of(),
            steps=8,
            lr=1e-3,
            precision=precision,
        )
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return log, state(model)

    (full, weights), (half, others) = train("fp32"), train("bf16")
    assert [row["loss"] for row in half] == pytest.approx([r["loss"] for r in full], abs=1e-2)
    assert [row["anchor_kl"] for row in half] == pytest.approx(
        [row["anchor_kl"] for row in full], abs=1e-2
    )
    assert 0 < distance(weights, others) < 1e-2
    assert distance(others, state(tiny() if adapter == "full" else lora())) > 1e-3
