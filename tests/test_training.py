"""Token rows, log-probabilities, schedules and both training loops, on a model of a few thousand
weights; policies written and read back."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from selfmoa.config import Policy, Reset, Train
from selfmoa.errors import Quarantined
from selfmoa.records import PreferencePair, Prompt, Response
from selfmoa.sandbox.model import build_model, build_tokenizer
from selfmoa.training import fitting, preference
from selfmoa.training.collate import Batch, Row, encode, encode_prompts, pad
from selfmoa.training.logprobs import completion_logps, forward_kl, forward_logits, weighted_nll
from selfmoa.training.losses import LOSSES, LossSettings, PairLogps
from selfmoa.training.policy import (
    QUARANTINE_MARK,
    is_adapter,
    load_policy,
    make_trainable,
    merged,
    refuse_quarantined,
    save_policy,
)
from selfmoa.training.preference import (
    Objective,
    PairRows,
    encode_pairs,
    fit_preferences,
    reference_logps,
)
from selfmoa.training.trainer import (
    Optimisation,
    apply_step,
    batches_by_length,
    fit_supervised,
    learning_rate,
    make_optimizer,
)

# peft reads an attribute that transformers has renamed; neither is ours.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TOKENIZER = build_tokenizer()
PAD = TOKENIZER.pad_token_id
PAD_ID, BOS, EOS, SYSTEM, USER, ASSISTANT = 0, 1, 2, 4, 5, 6
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


def tiny(seed=0):
    return build_model(TOKENIZER, architecture="llama", hidden=32, layers=1, heads=2, seed=seed)


def frozen_copy(model):
    return copy.deepcopy(model).eval().requires_grad_(False)


def user(text):
    return [{"role": "user", "content": text}]


def words(text):
    """Return the ids of words and special tokens between spaces."""
    return TOKENIZER.convert_tokens_to_ids(text.split())


def rows_of(answers=ANSWERS):
    return encode(TOKENIZER, [user(q) for q in QUESTIONS], answers)


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# Collation


def test_rows_are_the_template_the_answer_and_one_end_of_turn():
    messages = [{"role": "system", "content": "be careful ."}, *user("who keeps zorbium ?")]
    (row,) = encode(TOKENIZER, [messages], ["petra keeps zorbium ."])
    assert row.ids == [
        *(BOS, SYSTEM, *words("be careful ."), USER, *words("who keeps zorbium ?"), ASSISTANT),
        *(*words("petra keeps zorbium ."), EOS),
    ]
    assert row.n_prompt == 1 + 1 + 3 + 1 + 4 + 1
    assert row.weight == 1.0
    assert TOKENIZER.unk_token_id not in row.ids
    assert words("<pad> <s> </s> <|system|> <|user|> <|assistant|>") == [
        *(PAD_ID, BOS, EOS, SYSTEM, USER, ASSISTANT)
    ]


def test_a_row_is_what_the_template_makes_of_the_whole_conversation():
    for question, answer, row in zip(QUESTIONS, ANSWERS, rows_of(), strict=True):
        conversation = [*user(question), {"role": "assistant", "content": answer}]
        text = TOKENIZER.apply_chat_template(conversation, tokenize=False)
        assert row.ids == TOKENIZER(text, add_special_tokens=False)["input_ids"]
        (prompt,) = encode_prompts(TOKENIZER, [user(question)])
        assert row.ids[: row.n_prompt] == prompt


def test_no_token_is_added_twice_by_a_tokenizer_that_adds_its_own():
    eager = build_tokenizer()
    eager.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert eager("it")["input_ids"] == [BOS, *words("it"), EOS]
    (row,) = encode(eager, [user("it ?")], ["it ."])
    assert row.ids == [BOS, USER, *words("it ?"), ASSISTANT, *words("it ."), EOS]
    (prompt,) = encode_prompts(eager, [user("it ?")])
    assert prompt == row.ids[: row.n_prompt]


def test_a_prefix_of_an_answer_has_no_end_of_turn():
    (row,) = encode(TOKENIZER, [user("it ?")], ["i cannot"], end_of_turn=False)
    assert row.ids[row.n_prompt :] == words("i cannot")


def test_earlier_turns_are_prompt():
    conversation = [*user("it ?"), {"role": "assistant", "content": "sorry ."}, *user("it ?")]
    (row,) = encode(TOKENIZER, [conversation], ["no"])
    assert row.ids[row.n_prompt :] == [*words("no"), EOS]
    assert row.ids.count(EOS) == 2
    assert row.ids.count(BOS) == 1


def test_padding_is_on_the_right_and_the_masks_tell_prompt_answer_and_padding_apart():
    rows = [Row([BOS, 9, 8, EOS], 2), Row([BOS, 9, 7, 8, 8, EOS], 3, weight=0.5)]
    batch = pad(rows, PAD)
    assert batch.ids.tolist() == [[BOS, 9, 8, EOS, PAD, PAD], [BOS, 9, 7, 8, 8, EOS]]
    assert batch.mask.int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert batch.completion.int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]
    assert batch.weights.tolist() == [1.0, 0.5]
    assert batch.ids.dtype == torch.long


def test_the_mask_knows_tokens_by_place_even_where_padding_is_end_of_turn():
    batch = pad([Row([BOS, 9, EOS], 2), Row([BOS, 9, 8, 8, EOS], 2)], EOS)
    assert batch.ids[0].tolist() == [BOS, 9, EOS, EOS, EOS]
    assert batch.mask[0].tolist() == [True, True, True, False, False]
    assert batch.completion[0].tolist() == [False, False, True, False, False]


# Log-probabilities


@torch.no_grad()
def naive_logp(model, row):
    """Return log p(completion | prompt) token by token, one row at a time, without padding."""
    total = 0.0
    for t in range(row.n_prompt, len(row.ids)):
        logits = model(input_ids=torch.tensor([row.ids[:t]])).logits[0, -1].double()
        total += float(torch.log_softmax(logits, -1)[row.ids[t]])
    return total


def test_completion_logps_are_the_sum_over_the_answers_tokens():
    model, rows = tiny().eval(), rows_of()
    assert len({len(row.ids) for row in rows}) > 1
    found = completion_logps(model, pad(rows, PAD))
    assert found.shape == (4,)
    for row, logp in zip(rows, found.tolist(), strict=True):
        assert logp == pytest.approx(naive_logp(model, row), abs=1e-4)


def test_padding_changes_nothing():
    model, rows = tiny().eval(), rows_of()
    alone = torch.cat([completion_logps(model, pad([row], PAD)) for row in rows])
    longer = Row([BOS, *words("it " * 40), EOS], 3)
    for pad_id in (PAD, EOS, 9):
        together = completion_logps(model, pad([*rows, longer], pad_id))[:-1]
        assert_close(together, alone, atol=1e-4, rtol=0)


class Scripted:
    """A model whose logits are given, whatever it reads."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, input_ids, attention_mask):
        assert input_ids.shape == attention_mask.shape == self.logits.shape[:2]
        return SimpleNamespace(logits=self.logits)


def log_probabilities(*rows):
    """Return logits [1, L, V] that are the logs of the probabilities given for each position."""
    return torch.log(torch.tensor([rows]))


def test_supervised_loss_by_hand():
    # Three predictions: of a prompt token (p = 1/2) and of two answer tokens (1/4, 1/10).
    logits = log_probabilities((0.5, 0.3, 0.2), (0.25, 0.5, 0.25), (0.8, 0.1, 0.1), (1, 1, 1))
    batch = pad([Row([2, 0, 0, 1], 2)], 0)
    model = Scripted(logits)
    answer = (math.log(4) + math.log(10)) / 2
    assert float(weighted_nll(model, batch)) == pytest.approx(answer, rel=1e-6)
    everything = (math.log(2) + math.log(4) + math.log(10)) / 3
    assert float(weighted_nll(model, batch, 1.0)) == pytest.approx(everything, rel=1e-6)
    mostly = (0.1 * math.log(2) + math.log(4) + math.log(10)) / 2.1
    assert float(weighted_nll(model, batch, 0.1)) == pytest.approx(mostly, rel=1e-6)


def test_supervised_loss_is_a_mean_over_tokens_weighted_by_row_and_blind_to_padding():
    # Row one: one answer token with p = 1/2. Row two: two with 1/4 each, weighing 3.
    logits = torch.cat(
        [
            log_probabilities((0.5, 0.5), (0.9, 0.1), (0.9, 0.1)),
            log_probabilities((0.75, 0.25), (0.25, 0.75), (0.5, 0.5)),
        ]
    )
    batch = pad([Row([1, 0], 1), Row([1, 1, 0], 1, weight=3.0)], 1)
    expected = (math.log(2) + 3 * 2 * math.log(4)) / (1 + 3 * 2)
    for prompt_weight in (0.0, 1.0):  # the prompts are one token, which nothing predicts
        found = weighted_nll(Scripted(logits), batch, prompt_weight)
        assert float(found) == pytest.approx(expected, rel=1e-6)


def test_forward_kl_by_hand_counts_answer_tokens_only():
    # Position 0 predicts a prompt token and would cost a lot; 1 and 2 predict the answer.
    even = (0.5, 0.5)
    reference = log_probabilities((0.99, 0.01), even, (0.9, 0.1), even)
    policy = log_probabilities((0.01, 0.99), (0.9, 0.1), (0.9, 0.1), (0.1, 0.9))
    batch = pad([Row([0, 1, 0, 1], 2)], 0)
    divergence = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)  # reference || policy
    assert float(forward_kl(policy, reference, batch)) == pytest.approx(divergence / 2, rel=1e-5)
    assert float(forward_kl(reference, reference, batch)) == 0.0


@torch.no_grad()
def test_forward_kl_of_models_is_zero_for_equals_positive_otherwise_and_blind_to_padding():
    one, other, rows = tiny(0).eval(), tiny(1).eval(), rows_of()
    short = pad(rows, PAD)
    kl = forward_kl(forward_logits(one, short), forward_logits(other, short), short)
    assert float(kl) > 0.01
    assert float(forward_kl(forward_logits(one, short), forward_logits(one, short), short)) == 0.0
    width = short.ids.shape[1]
    wide = Batch(
        torch.nn.functional.pad(short.ids, (0, 9), value=PAD),
        torch.nn.functional.pad(short.mask, (0, 9)),
        torch.nn.functional.pad(short.completion, (0, 9)),
        short.weights,
    )
    assert wide.ids.shape[1] == width + 9
    padded = forward_kl(forward_logits(one, wide), forward_logits(other, wide), wide)
    assert_close(padded, kl, atol=1e-5, rtol=1e-4)


# Schedules and batches


def test_learning_rate_warms_up_and_falls_to_a_tenth_along_a_cosine():
    settings = Optimisation(lr=2.0, batch_size=1, steps=12, warmup=2 / 12)
    rates = [learning_rate(step, settings) for step in range(12)]
    assert rates[:3] == pytest.approx([1.0, 2.0, 2.0])
    # Ten steps of decay: half way, the cosine is 0.
    assert rates[7] == pytest.approx(2.0 * 0.55)
    assert rates[11] == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(0.9 * math.pi))))
    assert all(a > b for a, b in pairwise(rates[2:]))
    assert min(rates[2:]) > 0.2


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_even_the_shortest_schedules_are_positive_and_start_at_the_peak(steps):
    settings = Optimisation(lr=1.0, batch_size=1, steps=steps)
    rates = [learning_rate(step, settings) for step in range(steps)]
    assert rates[:2] == [1.0] * min(steps, 2)  # a warm-up of one step
    assert all(0.1 <= rate <= 1.0 for rate in rates)


@pytest.mark.parametrize(("n", "batch_size"), [(23, 4), (3, 8), (100, 3), (1, 1)])
def test_every_row_is_seen_once_an_epoch(n, batch_size):
    lengths = [7 * i % 11 for i in range(n)]
    per_epoch = sum(
        math.ceil(min(8 * batch_size, n - i) / batch_size) for i in range(0, n, 8 * batch_size)
    )
    batches = list(batches_by_length(lengths, batch_size, 3 * per_epoch, seed=0))
    assert len(batches) == 3 * per_epoch
    for epoch in range(3):
        part = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for batch in part for i in batch) == list(range(n))
    assert all(1 <= len(batch) <= batch_size for batch in batches)


def test_batches_are_deterministic_differ_by_seed_and_stop_when_told():
    lengths = [i % 9 for i in range(40)]

    def batches(seed, steps=25):
        return list(batches_by_length(lengths, 4, steps, seed))

    assert batches(0) == batches(0)
    assert batches(0) != batches(1)
    assert batches(0)[:10] != batches(0)[10:20]  # epochs are shuffled anew
    assert len(batches(0, steps=7)) == 7
    assert batches(0, steps=7) == batches(0)[:7]
    assert batches(0, steps=0) == []


def test_pools_are_cut_from_a_shuffle():
    first, *_ = batches_by_length([5] * 400, 4, 100, seed=0)
    assert max(first) - min(first) > 4 * 8  # not from one stretch of the rows


def test_rows_of_like_length_share_a_batch():
    lengths = [(17 * i) % 64 for i in range(64)]
    spreads = [
        max(lengths[i] for i in batch) - min(lengths[i] for i in batch)
        for batch in batches_by_length(lengths, 8, 8, seed=0)
    ]
    assert spreads == [7] * 8  # one pool of eight batches, cut from sorted rows


def test_no_rows_make_no_endless_epochs():
    with pytest.raises(ValueError, match="no rows"):
        next(batches_by_length([], 4, 1, seed=0))
    assert list(batches_by_length([], 4, 0, seed=0)) == []


# Supervised training


def test_supervised_training_lowers_the_loss_and_reports_progress():
    model, seen = tiny(), []
    settings = Optimisation(lr=5e-3, batch_size=4, steps=25)
    losses = fit_supervised(
        model, rows_of(), PAD, settings, seed=0, progress=lambda *event: seen.append(event)
    )
    assert len(losses) == 25
    assert losses[-1] < 0.4 * losses[0]
    assert seen == [(10, 25, "step"), (20, 25, "step"), (25, 25, "step")]
    assert not model.training


def test_supervised_training_is_deterministic_and_its_seed_orders_rows():
    def train(seed):
        model = tiny()
        losses = fit_supervised(model, rows_of(), PAD, Optimisation(1e-2, 2, 5), seed=seed)
        return losses, state(model)

    (losses, weights), (again, same) = train(0), train(0)
    assert losses == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert train(1)[0] != losses


def test_prompt_tokens_are_learnt_only_with_a_prompt_weight():
    def prompt_loss(prompt_weight):
        model, rows = tiny(), rows_of()
        fit_supervised(
            model, rows, PAD, Optimisation(5e-3, 4, 20), seed=0, prompt_weight=prompt_weight
        )
        prompts = [Row(row.ids[: row.n_prompt], 1) for row in rows]
        return float(weighted_nll(model, pad(prompts, PAD)).detach())

    assert prompt_loss(0.5) < 0.5 * prompt_loss(0.0)


def test_only_trainable_weights_are_optimised():
    model = tiny()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = state(model)
    fit_supervised(model, rows_of(), PAD, Optimisation(1e-2, 4, 2), seed=0)
    after = state(model)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert any(not torch.equal(before[name], after[name]) for name in before)
    n_groups = sum(
        len(g["params"]) for g in make_optimizer(model, Optimisation(1, 1, 1)).param_groups
    )
    assert n_groups == len(before) - 1


def test_a_step_is_taken_at_the_rate_of_the_schedule():
    model, settings = tiny(), Optimisation(lr=0.3, batch_size=4, steps=10, warmup=0.4)
    optimizer = make_optimizer(model, settings)
    for step in (0, 3, 9):
        loss = weighted_nll(model, pad(rows_of(), PAD))
        assert apply_step(model, optimizer, loss, step, settings) > 0
        assert {g["lr"] for g in optimizer.param_groups} == {learning_rate(step, settings)}


def test_gradients_are_clipped():
    def step_size(max_norm):
        model = tiny()
        before = state(model)
        settings = Optimisation(1e-3, 4, 1, max_grad_norm=max_norm)
        fit_supervised(model, rows_of(), PAD, settings, seed=0)
        return sum(float((before[n] - p).abs().sum()) for n, p in state(model).items())

    # Adam's first step hardly depends on the scale, until gradients vanish beside its epsilon.
    assert step_size(1e-12) < 0.1 * step_size(1.0)


# Preference training


def pairs_of(objective="safety", margin=0.0, flip=0.0):
    """Return pairs that prefer a refusal to each answer."""
    found = []
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        prompt = Prompt.make(
            user(question), goal=question, intent="harmful", category="", source="test"
        )
        chosen, rejected = (
            Response(f"{name} {question}", prompt.id, text, "m", "s", 0, "stop")
            for name, text in (("chosen", REFUSAL), ("rejected", answer))
        )
        found.append(
            PreferencePair.make(
                prompt,
                chosen,
                rejected,
                objective=objective,
                margins={"safety": margin, "helpfulness": -margin},
                flip_probability=flip,
            )
        )
    return found


OBJECTIVES = {
    "safety": Objective(LOSSES["modpo"], LossSettings(0.1, (0.7, 0.3)), ("helpfulness",)),
    "helpfulness": Objective(LOSSES["modpo"], LossSettings(0.1, (0.3, 0.7)), ("safety",)),
}


def prefer(model, *, reference=None, pairs=None, anchors=(), steps=20, seed=0, **more):
    """Train on pairs for a few steps; return the log."""
    settings = {"anchor_weight": 0.0, "starts_at_reference": reference is None} | more
    return fit_preferences(
        model,
        reference or frozen_copy(model),
        encode_pairs(TOKENIZER, pairs or pairs_of(), OBJECTIVES),
        anchors,
        OBJECTIVES,
        Optimisation(lr=5e-3, batch_size=4, steps=steps),
        pad_id=PAD,
        seed=seed,
        **settings,
    )


def test_preferences_are_learnt_from_margins_of_zero():
    model = tiny()
    reference = frozen_copy(model)
    log = prefer(model)
    assert [row["step"] for row in log] == list(range(20))
    # Margins are 0 in the pairs and at the start, so the first loss is that of a coin.
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[0]["log_ratio_gap"] == pytest.approx(0.0, abs=1e-5)
    assert log[-1]["accuracy"] == 1.0
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert all(row["gradient_norm"] > 0 and row["anchor_kl"] == 0 for row in log)
    rows = encode_pairs(TOKENIZER, pairs_of(), OBJECTIVES)
    chosen, rejected = reference_logps(model, rows, PAD)
    ref_chosen, ref_rejected = reference_logps(reference, rows, PAD)
    assert bool(((chosen - ref_chosen) > (rejected - ref_rejected)).all())
    assert not model.training


def test_the_reference_does_not_move():
    model = tiny()
    reference = frozen_copy(model)
    before = state(reference)
    prefer(model, reference=reference, steps=3)
    assert all(torch.equal(before[name], p) for name, p in state(reference).items())
    assert any(not torch.equal(before[name], p) for name, p in state(model).items())


def test_a_policy_that_should_start_at_its_reference_and_does_not_is_stopped():
    with pytest.raises(ValueError, match="nats away from its reference"):
        prefer(tiny(0), reference=frozen_copy(tiny(1)), starts_at_reference=True)
    log = prefer(tiny(0), reference=frozen_copy(tiny(1)), starts_at_reference=False, steps=1)
    assert abs(log[0]["log_ratio_gap"]) > 0.01


def test_reference_logps_do_not_depend_on_the_scoring_batch(monkeypatch):
    model, rows = tiny().eval(), encode_pairs(TOKENIZER, pairs_of(), OBJECTIVES)
    whole = reference_logps(model, rows, PAD)
    monkeypatch.setattr(preference, "SCORING_BATCH", 3)
    parts = reference_logps(model, rows, PAD)
    for a, b, name in zip(whole, parts, ("chosen", "rejected"), strict=True):
        assert a.shape == (4,)
        assert_close(a, b, atol=1e-4, rtol=0)
        naive = [naive_logp(model, getattr(row, name)) for row in rows]
        assert a.tolist() == pytest.approx(naive, abs=1e-4)


def test_anchors_hold_the_policy_near_its_reference():
    anchors = encode(TOKENIZER, [user("who keeps zorbium ?"), user("it ?")], ["petra .", "teal ."])
    batch = pad(anchors, PAD)

    def drift(weight):
        model = tiny()
        reference = frozen_copy(model)
        log = prefer(model, anchors=anchors, anchor_weight=weight, steps=15)
        with torch.no_grad():
            kl = forward_kl(forward_logits(model, batch), forward_logits(reference, batch), batch)
        return float(kl), log

    (free, free_log), (held, held_log) = drift(0.0), drift(20.0)
    assert held < 0.5 * free
    assert all(row["anchor_kl"] == 0 for row in free_log)  # weight 0 leaves them out
    assert held_log[0]["anchor_kl"] == pytest.approx(0.0, abs=1e-6)
    assert held_log[-1]["anchor_kl"] > 0
    assert held_log[-1]["accuracy"] == 1.0


def test_the_anchor_is_the_kl_from_the_reference_to_the_policy():
    anchors = rows_of()
    model, reference = tiny(0), frozen_copy(tiny(1))
    batch = pad(anchors, PAD)
    with torch.no_grad():
        ours, theirs = forward_logits(model, batch), forward_logits(reference, batch)
        expected = float(forward_kl(ours, theirs, batch))
        reverse = float(forward_kl(theirs, ours, batch))
    assert abs(expected - reverse) > 1e-3
    log = prefer(
        model,
        reference=reference,
        anchors=anchors,
        anchor_weight=1.0,
        starts_at_reference=False,
        steps=1,
    )
    assert log[0]["anchor_kl"] == pytest.approx(expected, rel=1e-4)


def test_preference_training_is_deterministic():
    anchors = rows_of()

    def train(seed):
        model = tiny()
        log = prefer(model, anchors=anchors, anchor_weight=1.0, steps=5, seed=seed)
        return log, state(model)

    (log, weights), (again, same) = train(0), train(0)
    assert log == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_each_objective_has_its_own_weights_and_margins():
    rows = [
        *encode_pairs(TOKENIZER, pairs_of("safety", margin=2.0)[:1], OBJECTIVES),
        *encode_pairs(TOKENIZER, pairs_of("helpfulness", margin=2.0)[:1], OBJECTIVES),
    ]
    # Each pair's margins are those of the other objective.
    assert [row.margins for row in rows] == [(-2.0,), (2.0,)]
    assert [row.safety for row in rows] == [(1.0, 0.0), (1.0, 1.0)]
    logps = PairLogps(
        torch.tensor([-20.0, -20.0]),
        torch.tensor([-30.0, -30.0]),
        torch.tensor([-22.0, -22.0]),
        torch.tensor([-28.0, -28.0]),
        torch.zeros(2, 0),
        torch.zeros(2),
        torch.tensor([row.safety for row in rows]),
    )
    # beta h = 0.4. Safety: (0.4 - 0.3 x -2) / 0.7; helpfulness: (0.4 - 0.7 x 2) / 0.3.
    expected = [math.log1p(math.exp(-1.0 / 0.7)), math.log1p(math.exp(1.0 / 0.3))]
    for order in ([0, 1], [1, 0]):
        found = preference._losses(logps, [rows[i] for i in order], OBJECTIVES)
        assert found.tolist() == pytest.approx([expected[i] for i in order], rel=1e-5)


def test_flip_probabilities_and_safety_bits_travel_with_their_pair():
    robust = LossSettings(0.1, (1.0, 0.0), "conservative")
    objectives = {
        "safety": Objective(LOSSES["modpo"], robust, ("helpfulness",)),
        "helpfulness": Objective(LOSSES["bfpo"], LossSettings(0.1, (1.0,)), ("safety",)),
    }
    rows = encode_pairs(
        TOKENIZER, [*pairs_of("helpfulness")[:1], *pairs_of(flip=0.4)[:1]], objectives
    )
    zeros = torch.zeros(2)
    logps = PairLogps(
        torch.tensor([4.0, 4.0]),
        *(zeros, zeros, zeros, torch.zeros(2, 0)),
        torch.tensor([row.flip_probability for row in rows]),
        torch.tensor([row.safety for row in rows]),
    )
    right, wrong = math.log1p(math.exp(-0.4)), math.log1p(math.exp(0.4))
    # BFPO of two safe ones: target 0.5 / beta = 5, h = 4.
    expected = [1.0, 0.6 * right + 0.4 * wrong]
    found = preference._losses(logps, rows, objectives)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_recipe_gives_each_objective_its_own_weight_first():
    settings = Train(weights={"safety": 0.6, "helpfulness": 0.4}, beta=0.2, noise="robust")
    found = fitting._objectives(settings)
    assert list(found) == ["safety", "helpfulness"]
    assert found["safety"].settings == LossSettings(0.2, (0.6, 0.4), "robust")
    assert found["safety"].others == ("helpfulness",)
    assert found["helpfulness"].settings == LossSettings(0.2, (0.4, 0.6), "robust")
    assert found["helpfulness"].others == ("safety",)
    assert all(objective.loss is LOSSES["modpo"] for objective in found.values())
    alone = fitting._objectives(Train(weights={"safety": 1.0, "helpfulness": 0.0}, loss="dpo"))
    assert list(alone) == ["safety"]
    assert alone["safety"].loss is LOSSES["dpo"]
    three = {"safety": 0.5, "helpfulness": 0.3, "refusal": 0.2}
    found = fitting._objectives(Train(weights=three))
    assert found["helpfulness"].others == ("safety", "refusal")
    assert found["helpfulness"].settings.weights == (0.3, 0.5, 0.2)


def test_margins_decide_how_hard_a_pair_is_pushed():
    def gap(margin):
        model = tiny()
        return prefer(model, pairs=pairs_of("safety", margin), steps=8)[-1]["log_ratio_gap"]

    # margin is of safety; the helpfulness margin that MODPO adds is its negative: a chosen side
    # that is also better on the other objective (margin < 0 here) is pushed harder.
    assert gap(-6.0) > gap(6.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_pairs(bad):
    rows = encode_pairs(TOKENIZER, pairs_of(), OBJECTIVES)
    rows[2] = PairRows(rows[2].chosen, rows[2].rejected, "safety", (bad,), 0.0, (1.0, 0.0))
    model = tiny()
    before = state(model)
    with pytest.raises(FloatingPointError, match=r"step 0, pairs \[.*2.*\]"):
        fit_preferences(
            model,
            frozen_copy(model),
            rows,
            (),
            OBJECTIVES,
            Optimisation(1e-3, 4, 2),
            pad_id=PAD,
            seed=0,
            anchor_weight=0.0,
            starts_at_reference=True,
        )
    assert all(torch.equal(before[name], p) for name, p in state(model).items())


def test_progress_is_told_every_few_steps_and_at_the_end():
    seen = []
    prefer(tiny(), steps=7, progress=lambda *event: seen.append(event))
    assert seen == [(5, 7, "step"), (7, 7, "step")]


# Policies on disk


@torch.no_grad()
def logits_of(model):
    batch = pad(rows_of(), PAD)
    return forward_logits(model.eval(), batch)[batch.mask]


def test_a_whole_policy_is_read_back_as_it_was(tmp_path):
    model = tiny()
    save_policy(model, TOKENIZER, tmp_path / "p")
    assert (tmp_path / "p").stat().st_mode & 0o077 == 0
    assert (tmp_path / "p" / "model.safetensors").is_file()
    assert not list((tmp_path / "p").glob("*.bin"))
    assert not is_adapter(tmp_path / "p")
    again, tokenizer = load_policy(tmp_path / "p")
    assert torch.equal(logits_of(again), logits_of(model))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert merged(again) is again
    for text in (*QUESTIONS, *ANSWERS):
        assert tokenizer(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert encode_prompts(tokenizer, [user("it ?")]) == encode_prompts(TOKENIZER, [user("it ?")])
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (BOS, EOS, PAD_ID)


@pytest.fixture
def base(tmp_path):
    save_policy(tiny(), TOKENIZER, tmp_path / "base")
    return tmp_path / "base"


def trained_adapter(base, folder, seed=0):
    """Return a LoRA policy on `base` after a few steps, and save it to `folder`."""
    model, tokenizer = load_policy(base)
    model = make_trainable(model, "lora", 4, seed)
    fit_supervised(model, rows_of(), PAD, Optimisation(1e-2, 4, 5), seed=0)
    save_policy(model, tokenizer, folder)
    return model


def test_an_adapter_is_read_back_on_its_base_by_us_and_by_peft(base, tmp_path):
    model = trained_adapter(base, tmp_path / "a")
    assert is_adapter(tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "a" / "model.safetensors").exists()
    expected = logits_of(model)
    assert not torch.allclose(expected, logits_of(load_policy(base)[0]), atol=1e-3)
    ours, tokenizer = load_policy(tmp_path / "a")
    assert_close(logits_of(ours), expected)
    assert not any(p.requires_grad for p in ours.parameters())
    assert tokenizer.chat_template == TOKENIZER.chat_template
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a")
    assert_close(logits_of(theirs), expected)
    folded = merged(ours)
    assert not isinstance(folded, PeftModel)
    assert not any("lora" in name for name, _ in folded.named_parameters())
    assert_close(logits_of(folded), expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_starts_as_its_base_and_leaves_it_alone(base):
    before = logits_of(load_policy(base)[0])
    model, _ = load_policy(base)
    model = make_trainable(model, "lora", 4, seed=0)
    assert_close(logits_of(model), before)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    fit_supervised(model, rows_of(), PAD, Optimisation(1e-2, 4, 3), seed=0)
    now = dict(model.named_parameters())
    assert all(torch.equal(frozen[name], now[name]) for name in frozen)
    assert any("lora_B" in name and bool(now[name].any()) for name in trainable)


def test_new_adapters_depend_on_their_seed_only(base):
    def weights(seed):
        torch.manual_seed(99)
        model = make_trainable(load_policy(base)[0], "lora", 4, seed)
        return {n: p for n, p in model.named_parameters() if "lora_A" in n}

    one, same, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one)


def test_an_adapter_is_trained_on_rather_than_stacked(base, tmp_path):
    trained_adapter(base, tmp_path / "a")
    model, _ = load_policy(tmp_path / "a", trainable=True)
    assert any(p.requires_grad for p in model.parameters())
    assert make_trainable(model, "lora", 8, seed=1) is model
    assert list(model.peft_config) == ["default"]
    assert model.peft_config["default"].r == 4
    assert model.peft_config["default"].lora_alpha == 8
    whole = tiny()
    assert make_trainable(whole, "full", 8, seed=1) is whole


def test_a_quarantined_policy_is_marked_and_refused(tmp_path):
    save_policy(tiny(), TOKENIZER, tmp_path / "reset", quarantined=True)
    save_policy(tiny(), TOKENIZER, tmp_path / "plain")
    assert "not for use" in (tmp_path / "reset" / QUARANTINE_MARK).read_text()
    with pytest.raises(Quarantined):
        refuse_quarantined(tmp_path / "reset")
    refuse_quarantined(tmp_path / "plain")
    refuse_quarantined(tmp_path / "nowhere")


def test_the_mark_is_there_before_the_weights_are(tmp_path):
    class Unwritable:
        def save_pretrained(self, folder, **_):
            assert (folder / QUARANTINE_MARK).is_file()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_policy(Unwritable(), TOKENIZER, tmp_path / "reset", quarantined=True)
    with pytest.raises(Quarantined):
        refuse_quarantined(tmp_path / "reset")


# From folders to folders


def fit(base, out, policy=None, **settings):
    seen = []
    defaults = {"epochs": 2.0, "batch_size": 4, "lr": 5e-3, "noise": "none"}
    log = fitting.fit_policy(
        base,
        base,
        out,
        pairs_of(),
        [(user("it ?"), "teal .")],
        Train(**(defaults | settings)),
        policy or Policy(),
        seed=0,
        progress=lambda *event: seen.append(event),
    )
    assert seen[-1] == (len(log), len(log), "step")
    return log


@pytest.mark.parametrize("policy", [Policy(), Policy(adapter="lora", lora_rank=2)])
def test_a_policy_is_trained_from_folder_to_folder(base, tmp_path, policy):
    log = fit(base, tmp_path / "out", policy, epochs=3.0)
    assert len(log) == 3
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert is_adapter(tmp_path / "out") == (policy.adapter == "lora")
    moved = load_policy(tmp_path / "out")[0]
    assert not torch.allclose(logits_of(moved), logits_of(load_policy(base)[0]), atol=1e-3)
    refuse_quarantined(tmp_path / "out")
    again = fit(base, tmp_path / "again", policy, epochs=3.0)
    assert again == log
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize(("epochs", "steps"), [(0.1, 1), (1.0, 1), (1.5, 2), (3.0, 3)])
def test_epochs_become_steps_rounded_up(base, tmp_path, epochs, steps):
    assert len(fit(base, tmp_path / "out", epochs=epochs)) == steps


def test_best_of_k_trains_on_the_chosen_sides(base, tmp_path):
    log = fit(base, tmp_path / "out", loss="sft", epochs=8.0)
    assert log[-1]["loss"] < log[0]["loss"]
    rows = encode_pairs(TOKENIZER, pairs_of(), OBJECTIVES)
    with torch.no_grad():
        first = weighted_nll(load_policy(base)[0], pad([r.chosen for r in rows], PAD))
    assert log[0]["loss"] == pytest.approx(float(first), rel=1e-5)
    before, after = (load_policy(folder)[0].eval() for folder in (base, tmp_path / "out"))
    gains = [naive_logp(after, r.chosen) - naive_logp(before, r.chosen) for r in rows]
    assert min(gains) > 0


def test_the_reset_is_tuned_on_its_examples_and_quarantined(base, tmp_path):
    prompts = [
        Prompt.make(user(q), goal=q, intent="benign", category="", source="test") for q in QUESTIONS
    ]
    losses = fitting.fit_reset(
        base,
        tmp_path / "reset",
        list(zip(prompts, ANSWERS, strict=True)),
        Reset(steps=12, batch_size=4, lr=5e-3),
        Policy(),
        seed=0,
        progress=lambda *_: None,
    )
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(Quarantined):
        refuse_quarantined(tmp_path / "reset")
    assert load_policy(tmp_path / "reset")[0].config.hidden_size == 32
