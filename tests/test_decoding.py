"""Continuous batching on tiny random replicas of many families: the same answers as alone."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from selfmoa.generators import batching, sampling
from selfmoa.generators.batching import can_batch
from selfmoa.generators.decoding import Decoding, decode
from selfmoa.generators.sampling import choose
from test_layouts import FAMILIES, FAST, PAD, VOCAB, build, tokens

STOP, MAX_NEW = 2, 12
LENGTHS = (3, 17, 9, 17, 30, 1, 9, 5)
PROMPTS = [tokens(n, seed=n) for n in LENGTHS]  # those of 17 and of 9 tokens are there twice
SEEDS = range(100, 100 + len(PROMPTS))
GREEDY = Decoding(0.0, MAX_NEW, (STOP,), PAD)
FREE = Decoding(1.0, MAX_NEW, (STOP,), PAD)
NARROW = 3 * (max(LENGTHS) + MAX_NEW)
"""Tokens that hold three rows of the longest prompt, so that rows must wait for one another."""

model_of = cache(build)


@torch.no_grad()
def alone(model, prompt, how, seed=0):
    """Return an answer token by token, each from the whole text, without cache or padding."""
    numbers = np.random.default_rng(seed).random(how.max_new_tokens)
    ids = []
    for number in numbers:
        text = torch.tensor([[*prompt, *ids]])
        logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[0, -1]
        ids.append(exact_choice(logits, number, how.temperature))
        if ids[-1] in how.stops:
            break
    return ids


def exact_choice(logits, number, temperature):
    """Return the token by inversion over the whole vocabulary in double precision."""
    if temperature == 0:
        return int(logits.argmax())
    cumulative = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    return int(torch.searchsorted(cumulative, number * cumulative[-1]))


def said(decoded):
    return [answer.ids for answer in decoded]


def narrow(how, **more):
    return Decoding(
        how.temperature, how.max_new_tokens, how.stops, how.pad, **{"max_tokens": NARROW} | more
    )


# Exactness, family by family


def check_family(name):
    model = model_of(name)
    for how in (GREEDY, FREE):
        wanted = [alone(model, p, how, s) for p, s in zip(PROMPTS, SEEDS, strict=True)]
        assert said(decode(model, PROMPTS, SEEDS, how)) == wanted
        assert said(decode(model, PROMPTS, SEEDS, narrow(how))) == wanted


@pytest.mark.parametrize("name", FAST)
def test_every_row_says_in_any_batch_what_it_says_alone(name):
    check_family(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(FAST)))
def test_every_row_of_every_family_says_in_any_batch_what_it_says_alone(name):
    check_family(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_only_families_with_more_than_keys_and_values_are_not_batched(name):
    assert can_batch(model_of(name)) == (name not in ("mamba2", "lfm2"))


def test_an_adapter_is_at_work():
    torch.manual_seed(0)
    adapted = get_peft_model(
        build("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    found = said(decode(adapted, PROMPTS, SEEDS, GREEDY))
    assert found == [alone(adapted, p, GREEDY) for p in PROMPTS]
    assert found != said(decode(model_of("llama"), PROMPTS, SEEDS, GREEDY))


# Batches


@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=10),
    k=st.integers(1, 4),
    max_tokens=st.integers(1, 400),
    max_rows=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=25, deadline=None)
def test_no_budget_changes_an_answer(lengths, k, max_tokens, max_rows, temperature):
    prompts = [tokens(n, seed=i) for i, n in enumerate(lengths) for _ in range(k)]
    how = Decoding(temperature, MAX_NEW, (STOP, 7, 9), PAD)
    wanted = [alone(model_of("llama"), p, how, s) for s, p in enumerate(prompts)]
    limits = narrow(how, max_tokens=max_tokens, max_rows=max_rows)
    assert said(decode(model_of("llama"), prompts, range(len(prompts)), limits)) == wanted


@pytest.fixture
def calls(monkeypatch):
    """Return what the model is called with, as (rows, tokens, slots)."""
    seen = []
    forward = batching._Engine._forward

    def watch(engine, ids, mask, positions, past):
        seen.append((*ids.shape, mask.shape[1]))
        return forward(engine, ids, mask, positions, past)

    monkeypatch.setattr(batching._Engine, "_forward", watch)
    return seen


def test_a_prompt_is_read_once_for_all_its_answers(calls):
    prompts = [tokens(30)] * 6 + [tokens(20, 1)] * 6
    decode(model_of("llama"), prompts, range(12), FREE)
    assert calls[0] == (2, 30, 30)
    assert all(n == 1 for _, n, _ in calls[1:])


def test_rows_and_slots_stay_within_the_budget(calls):
    prompts = [tokens(n, n) for n in range(1, 40)]
    decode(model_of("llama"), prompts, range(39), narrow(FREE, max_tokens=300))
    assert all(rows * slots <= 300 for rows, _, slots in calls)
    # No slot that no row could reach.
    assert max(slots for _, _, slots in calls) <= 39 + MAX_NEW - 1
    calls.clear()
    decode(model_of("llama"), prompts, range(39), narrow(FREE, max_tokens=10**6, max_rows=5))
    assert max(rows for rows, n, _ in calls if n == 1) == 5


def test_keys_and_values_stay_within_their_bytes(calls, monkeypatch):
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values of 2 layers of 2 heads of 8 in fp32
    monkeypatch.setattr(batching, "KEPT_BYTES", per_token * 300)
    decode(model_of("llama"), [tokens(n, n) for n in range(1, 40)], range(39), FREE)
    sizes = [rows * slots for rows, n, slots in calls if n == 1]
    assert 150 < max(sizes) <= 300


def test_rows_that_ended_give_their_places_to_those_that_wait(calls):
    how = Decoding(1.0, 60, (*range(2, 8),), PAD, max_rows=8)  # a tenth ends at every token
    prompts = [tokens(5, n) for n in range(64)]
    answers = said(decode(model_of("llama"), prompts, range(64), how))
    steps = [rows for rows, n, _ in calls if n == 1]
    needed = sum(len(ids) - 1 for ids in answers)
    longest = max(map(len, answers))
    # In fixed groups of 8 every group takes as many steps as its longest answer.
    fixed = sum(max(map(len, answers[i : i + 8])) - 1 for i in range(0, 64, 8))
    assert longest > 20
    assert len(steps) < 0.75 * fixed
    assert sum(steps) < 1.25 * needed
    assert steps[-1] < 8


def test_prompts_are_read_in_portions(calls, monkeypatch):
    monkeypatch.setattr(batching, "READ_TOKENS", 40)
    wanted = [alone(model_of("llama"), p, GREEDY) for p in PROMPTS]
    assert said(decode(model_of("llama"), PROMPTS, SEEDS, GREEDY)) == wanted
    reads = [rows * n for rows, n, _ in calls if n > 1 or rows == 1]
    assert len(reads) > 2
    assert max(reads) <= 40


def test_a_batch_outgrows_its_room(monkeypatch):
    monkeypatch.setattr(batching, "ROOM", 2)
    wanted = [
        alone(model_of("gemma3_text"), p, FREE, s) for p, s in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert said(decode(model_of("gemma3_text"), PROMPTS, SEEDS, FREE)) == wanted


def test_equal_calls_say_the_same_to_the_last_bit_and_draw_on_no_global_generator():
    state = torch.get_rng_state()
    prompts = PROMPTS * 4
    first = decode(model_of("llama"), prompts, range(32), narrow(FREE))
    torch.manual_seed(5)
    assert decode(model_of("llama"), prompts, range(32), narrow(FREE)) == first
    torch.set_rng_state(state)
    decode(model_of("llama"), prompts, range(32), FREE)
    assert torch.equal(torch.get_rng_state(), state)


# Ends


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_answers_end_with_the_first_stop_or_are_cut(name):
    how = Decoding(1.0, 10, (*range(2, 12),), PAD)
    prompts = [tokens(4)] * 40
    for answer in decode(model_of(name), prompts, range(40), how):
        assert answer.is_ended == (answer.ids[-1] in how.stops)
        assert not set(answer.ids[:-1]) & set(how.stops)
        assert answer.is_ended or len(answer.ids) == 10


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_one_token_needs_no_batch(name):
    how = Decoding(0.0, 1, (STOP,), PAD)
    wanted = [alone(model_of(name), p, how) for p in PROMPTS]
    assert said(decode(model_of(name), PROMPTS, SEEDS, how)) == wanted


# One token


def test_a_token_is_drawn_as_by_inversion_over_the_whole_vocabulary(monkeypatch):
    monkeypatch.setattr(sampling, "BLOCK", 8)
    torch.manual_seed(0)
    for size in (1, 7, 8, 9, 100):
        logits = torch.randn(500, size) * 3
        numbers = torch.rand(500, dtype=torch.float64)
        for temperature in (0.3, 1.0, 2.5):
            found = choose(logits, numbers, temperature)
            wanted = [exact_choice(x, n, temperature) for x, n in zip(logits, numbers, strict=True)]
            assert found.tolist() == wanted


def test_each_token_is_drawn_as_often_as_its_probability():
    p, n = torch.tensor([0.05, 0.0, 0.6, 0.25, 0.1, 0.0]), 20000
    numbers = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = torch.bincount(choose(p.log().expand(n, -1), numbers, 1.0), minlength=6)
    assert counts.tolist() == pytest.approx((n * p).tolist(), abs=1)


def test_temperature_divides_the_logits():
    n = 10000
    numbers = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    logits = torch.tensor([0.0, math.log(9.0)]).expand(n, -1)
    for temperature, share in ((1.0, 0.9), (2.0, 0.75), (0.5, 81 / 82)):
        drawn = choose(logits, numbers, temperature)
        assert float(drawn.double().mean()) == pytest.approx(share, abs=1e-3)


def test_the_last_number_stays_within_the_vocabulary_and_off_tokens_of_no_weight():
    largest = torch.tensor([1 - 2**-53] * 3, dtype=torch.float64)
    for size in (2, 600, 5000):
        logits = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
        logits[1, size // 2 :] = -torch.inf
        drawn = choose(logits, largest, 1.0)
        assert (drawn < size).all()
        assert drawn[1] < max(1, size // 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_drawn_from_in_full(dtype):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    numbers = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    kept = logits.clone()
    wanted = [exact_choice(x, n, 1.0) for x, n in zip(logits, numbers, strict=True)]
    assert choose(logits, numbers, 1.0).tolist() == wanted
    assert torch.equal(logits, kept)


def test_first_tokens_follow_the_model():
    model, n = model_of("gemma3_text"), 3000
    logits = model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1].double()
    how = Decoding(1.0, 1, (STOP,), PAD)
    found = Counter(ids[0] for ids in said(decode(model, [PROMPTS[1]] * n, range(n), how)))
    frequency = torch.tensor([found[i] / n for i in range(VOCAB)], dtype=torch.float64)
    assert_close(frequency, logits.softmax(-1), atol=4 * math.sqrt(0.25 / n), rtol=0)
