"""The loop: schedules, batches, steps that fit the memory, and trainings that are gone on with.

Most of it is tested on `Toy` and `Squares`, a linear model and a task of squared errors, whose
gradients are easy to say; what depends on a language model is tested on one of some thousand
weights.
"""

from __future__ import annotations

import ctypes
import json
import math
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from selfmoa.config import Policy
from selfmoa.errors import TrainingChanged, TrainingStopped
from selfmoa.sandbox.model import build_model, build_tokenizer
from selfmoa.training import memory, tasks
from selfmoa.training.checkpoints import Checkpoints
from selfmoa.training.memory import is_out_of_memory, keep_freed_memory
from selfmoa.training.policy import make_trainable
from selfmoa.training.processes import Processes, join
from selfmoa.training.tasks import Supervised
from selfmoa.training.tokens import Row, encode
from selfmoa.training.trainer import (
    Optimisation,
    batches_by_length,
    fit,
    learning_rate,
    make_optimizer,
    micro_batches,
    steps_of,
)

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
GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
CPU_FULL = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def tiny(seed=0, dropout=0.0):
    model = build_model(TOKENIZER, architecture="llama", hidden=32, layers=1, heads=2, seed=seed)
    model.model.layers[0].self_attn.attention_dropout = dropout
    return model


def user(text):
    return [{"role": "user", "content": text}]


def rows_of(answers=ANSWERS):
    return encode(TOKENIZER, [user(q) for q in QUESTIONS], [[answer] for answer in answers])


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def distance(one, other):
    """Return the largest difference of two states."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def without_clock(log):
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in log]


class Toy(nn.Module):
    """A linear model with dropout on its inputs."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(x) @ self.weight


@dataclass
class Squares:
    """Squared errors of 40 points; item i costs 1 to 9 tokens. A pass over `limit` of them fails.

    `passes` has the items of every forward pass, whether it failed or not.
    """

    batch_size: int = 8
    weight: float = 1.0
    seed: int = 0
    limit: float = math.inf
    failure: BaseException = field(default_factory=lambda: GPU_FULL)
    name: str = "loss"
    passes: list[list[int]] = field(default_factory=list)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        self.inputs = torch.randn(40, 6, generator=generator)
        self.targets = torch.randn(40, generator=generator)
        self.counted = (self.name,)
        self.sizes = [1] * 40
        self.costs = [1 + (7 * i) % 9 for i in range(40)]
        self.trained = [1] * 40

    @property
    def sizes_of_passes(self):
        return [len(items) * max(self.costs[i] for i in items) for items in self.passes]

    def total(self, items):
        return len(items)

    def losses(self, model, items):
        self.passes.append(list(items))
        if self.sizes_of_passes[-1] > self.limit:
            torch.rand(3)  # what failed has drawn random numbers too
            raise self.failure
        losses = (model(self.inputs[items]) - self.targets[items]) ** 2
        return losses, {self.name: float(losses.detach().sum())}

    def names(self, items):
        return [f"point {i}" for i in items]

    def summary(self, sums, total):
        return {self.name: sums[self.name] / total}


def train_toy(*given_tasks, steps=12, dropout=0.0, seed=0, model=None, more=None, **options):
    """Train a toy for some steps; return its log and its state."""
    torch.manual_seed(5)
    model = model or Toy(dropout)
    defaults = {"lr": 0.05, "batch_size": 8, "steps": steps}
    how = Optimisation(**(defaults | options))
    log = fit(model, given_tasks or [Squares()], how, seed=seed, **(more or {}))
    return log, state(model)


# Schedules


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


# Batches


def n_batches(n, batch_size):
    """Return the batches of an epoch: those of each pool of eight."""
    pool = 8 * batch_size
    return sum(math.ceil(min(pool, n - i) / batch_size) for i in range(0, n, pool))


@pytest.mark.parametrize(("n", "batch_size"), [(23, 4), (3, 8), (100, 3), (1, 1)])
def test_every_row_is_seen_once_an_epoch(n, batch_size):
    lengths = [7 * i % 11 for i in range(n)]
    per_epoch = n_batches(n, batch_size)
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


def test_batches_of_a_pool_come_in_no_order_of_length():
    lengths = [(17 * i) % 64 for i in range(64)]
    longest = [max(lengths[i] for i in b) for b in batches_by_length(lengths, 8, 8, seed=0)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_no_rows_make_no_endless_epochs():
    with pytest.raises(ValueError, match="no rows"):
        next(batches_by_length([], 4, 1, seed=0))
    assert list(batches_by_length([], 4, 0, seed=0)) == []


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=80),
    batch_size=st.integers(1, 10),
    seed=st.integers(0, 9),
)
def test_batches_of_sized_items_have_every_item_once_an_epoch(sizes, batch_size, seed):
    lengths = [5 * i % 7 for i in range(len(sizes))]
    seen = Counter()
    for batch in batches_by_length(lengths, batch_size, 10**6, seed, sizes):
        assert batch
        seen.update(batch)
        if len(seen) == len(sizes):
            break
    assert seen == Counter(range(len(sizes)))


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=80),
    batch_size=st.integers(1, 10),
    seed=st.integers(0, 9),
)
def test_the_sizes_of_a_batch_add_up_to_nearly_the_batch_size(sizes, batch_size, seed):
    """A batch is no further from `batch_size` than half an item, but for the last of its pool."""
    lengths, n_short = [5 * i % 7 for i in range(len(sizes))], 0
    seen = 0
    for batch in batches_by_length(lengths, batch_size, 10**6, seed, sizes):
        gap = sum(sizes[i] for i in batch) - batch_size
        # An item that is larger than two batches is alone.
        assert gap <= max(sizes[i] for i in batch) / 2 or len(batch) == 1
        n_short += gap < -max(sizes) / 2
        seen += len(batch)
        if seen == len(sizes):
            break
    n_pools = math.ceil(sum(sizes) / max(1, 8 * batch_size - max(sizes) / 2))
    assert n_short <= n_pools


def test_a_batch_ends_where_it_is_nearest_to_its_size():
    def order(sizes):
        # Items of rising length; one pool, so that they come in this order.
        batches = list(batches_by_length(range(len(sizes)), 4, 1, 0, sizes))
        assert len(batches) == 1
        return steps_of(1.0, Squares(), 0) and batches

    assert sorted(order([3, 1])[0]) == [0, 1]  # 4 exactly
    assert sorted(order([3, 2])[0]) == [0, 1]  # 5 is as near as 3: the item is taken
    assert order([3, 3])[0] in ([0], [1])  # 6 is further away than 3
    assert order([9, 1])[0] in ([0], [1])


def test_sizes_of_one_are_the_default():
    lengths = [i % 9 for i in range(40)]
    given_sizes = list(batches_by_length(lengths, 4, 30, 3, [1] * 40))
    assert given_sizes == list(batches_by_length(lengths, 4, 30, 3))


@pytest.mark.parametrize(("epochs", "steps"), [(0.01, 1), (0.5, 3), (1.0, 5), (1.1, 6), (3.0, 15)])
def test_epochs_become_steps_rounded_up(epochs, steps):
    task = Squares()
    assert n_batches(40, 8) == 5
    assert steps_of(epochs, task, seed=0) == steps


@pytest.mark.parametrize("seed", range(5))
def test_one_epoch_of_sized_items_is_every_item_once(seed):
    task = Squares()
    task.sizes = [1 + i % 6 for i in range(40)]
    batches = batches_by_length(
        task.costs, task.batch_size, steps_of(1.0, task, seed), seed, task.sizes
    )
    assert sorted(i for batch in batches for i in batch) == list(range(40))


# Micro-batches

costs_of_items = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(costs=costs_of_items, max_tokens=st.integers(1, 120), data=st.data())
def test_micro_batches_have_every_item_once_and_keep_to_the_limit(costs, max_tokens, data):
    items = data.draw(st.permutations(range(len(costs))))[: 1 + len(costs) // 2]
    parts = micro_batches(items, costs, max_tokens)
    assert sorted(i for part in parts for i in part) == sorted(items)
    for part in parts:
        padded = len(part) * max(costs[i] for i in part)
        assert padded <= max_tokens or len(part) == 1
    # No part has room for the longest of the next.
    for part, following in pairwise(parts):
        assert (len(part) + 1) * max(costs[i] for i in part) > max_tokens
        assert min(costs[i] for i in part) >= max(costs[i] for i in following)


def test_micro_batches_by_hand():
    costs = [5, 40, 10, 10, 100, 7]
    assert micro_batches(range(6), costs, 45) == [[4], [1], [2, 3, 5, 0]]
    assert micro_batches(range(6), costs, 39) == [[4], [1], [2, 3, 5], [0]]
    assert micro_batches([], costs, 45) == []
    assert micro_batches(range(6), costs, 600) == [[4, 1, 2, 3, 5, 0]]


# Supervised training


@torch.no_grad()
def naive_nll(model, row, prompt_weight=0.0):
    """Return a row's weighted negative log-likelihood token by token, without padding."""
    ids, total = [*row.prompt, *row.completions[0]], 0.0
    for t in range(1, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:t]])).logits[0, -1].double()
        weight = prompt_weight if t < len(row.prompt) else 1.0
        total -= weight * row.weight * float(torch.log_softmax(logits, -1)[ids[t]])
    return total


@pytest.mark.parametrize("prompt_weight", [0.0, 0.1, 1.0])
def test_the_losses_of_rows_are_sums_over_their_tokens(prompt_weight):
    rows = [Row(r.prompt, r.completions, w) for r, w in zip(rows_of(), (1, 3, 0.5, 0), strict=True)]
    model, task = tiny().eval(), Supervised(rows, PAD, 4, prompt_weight)
    losses, sums = task.losses(model, [2, 0, 3, 1])
    expected = [naive_nll(model, rows[i], prompt_weight) for i in (2, 0, 3, 1)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-3)
    assert sums == {"loss": pytest.approx(sum(expected), rel=1e-5)}


def test_supervised_loss_by_hand():
    """A model whose logits are all 0 pays log V a token, whatever the rows weigh."""
    model = tiny()
    nn.init.zeros_(model.model.embed_tokens.weight)
    rows = [Row([1, 9, 8], [[7, 6]]), Row([1, 9], [[8, 8, 8, 2]], weight=3.0)]
    for prompt_weight, total in ((0.0, 2 + 3 * 4), (0.5, 2 + 0.5 * 2 + 3 * (4 + 0.5))):
        task = Supervised(rows, PAD, 2, prompt_weight)
        assert task.total([0, 1]) == total
        _, sums = task.losses(model, [0, 1])
        found = task.summary(sums, total)
        assert found == {"loss": pytest.approx(math.log(len(TOKENIZER)), rel=1e-5)}


def test_a_task_says_what_its_rows_cost():
    rows = [Row([1, 9, 8], [[7, 6]]), Row([1, 9], [[8, 8, 8, 2]])]
    task = Supervised(rows, PAD, 2)
    assert (task.sizes, task.costs, task.trained) == ([1, 1], [5, 6], [2, 4])
    assert Supervised(rows, PAD, 2, 0.1).trained == [4, 5]  # nothing predicts a first token
    assert task.names([1, 0]) == ["row 1", "row 0"]


def learn(model, rows=None, *, seed=0, prompt_weight=0.0, progress=None, **options):
    """Train a model on rows; return the losses."""
    how = Optimisation(**({"lr": 5e-3, "batch_size": 4, "steps": 20} | options))
    task = Supervised(rows or rows_of(), PAD, how.batch_size, prompt_weight)
    return [row["loss"] for row in fit(model, [task], how, seed=seed, progress=progress)]


def test_supervised_training_lowers_the_loss_and_reports_progress():
    model, seen = tiny(), []
    losses = learn(model, steps=25, progress=lambda *event: seen.append(event))
    assert len(losses) == 25
    assert losses[-1] < 0.4 * losses[0]
    assert seen == [(10, 25, "step"), (20, 25, "step"), (25, 25, "step")]
    assert not model.training


def test_the_first_loss_is_that_of_the_model_as_it_came():
    rows = rows_of()
    n_tokens = sum(len(row.completions[0]) for row in rows)
    expected = sum(naive_nll(tiny().eval(), row) for row in rows) / n_tokens
    assert learn(tiny(), steps=1) == [pytest.approx(expected, rel=1e-4)]


def test_supervised_training_is_deterministic_and_its_seed_orders_rows():
    def train(seed):
        model = tiny()
        losses = learn(model, seed=seed, lr=1e-2, batch_size=2, steps=5)
        return losses, state(model)

    (losses, weights), (again, same) = train(0), train(0)
    assert losses == again
    assert distance(weights, same) == 0
    assert train(1)[0] != losses


def test_prompt_tokens_are_learnt_only_with_a_prompt_weight():
    def prompt_loss(prompt_weight):
        model, rows = tiny(), rows_of()
        learn(model, rows, prompt_weight=prompt_weight)
        prompts = [Row(row.prompt[:1], [row.prompt[1:]]) for row in rows]
        return sum(naive_nll(model, row) for row in prompts)

    assert prompt_loss(0.5) < 0.5 * prompt_loss(0.0)


def test_only_trainable_weights_are_optimised():
    model = tiny()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = state(model)
    learn(model, lr=1e-2, steps=2)
    after = state(model)
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert distance(before, after) > 0
    n_parameters = sum(
        len(g["params"]) for g in make_optimizer(model, Optimisation(1, 1, 1)).param_groups
    )
    assert n_parameters == len(before) - 1


def test_the_model_is_trained_in_training_mode_and_left_in_evaluation_mode():
    model, modes = Toy().eval(), []
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    train_toy(model=model, steps=2)
    assert set(modes) == {True}
    assert not model.training


# One step


def first_gradients(tasks, **more):
    """Return the gradients of the first step before they are clipped, and the log."""
    seen = []

    class Watching(more.pop("kind", Processes)):
        def clip(self, parameters, max_norm):
            seen.append([p.grad.clone() for p in parameters])
            return super().clip(parameters, max_norm)

    log, _ = train_toy(*tasks, steps=1, more={"processes": Watching()}, **more)
    return seen[0][0], log


def test_a_step_follows_the_weighted_sum_of_the_tasks_means():
    one, other = Squares(), Squares(batch_size=3, weight=2.5, seed=1, name="other")
    found, log = first_gradients([one, other])
    model, expected = Toy(), 0.0
    for task, (items,) in ((one, one.passes), (other, other.passes)):
        loss = task.losses(model, items)[0].mean()
        assert log[0][task.name] == pytest.approx(loss.item(), rel=1e-5)
        expected = expected + task.weight * loss
    expected.backward()
    assert_close(found, model.weight.grad)
    assert [len(task.passes[0]) for task in (one, other)] == [8, 3]


def test_tasks_do_not_share_an_order():
    one, other = Squares(), Squares(name="other")
    train_toy(one, other, steps=3, seed=4)
    assert one.passes == list(map(sorted_by_cost, batches_by_length(one.costs, 8, 3, 4)))
    assert other.passes == list(map(sorted_by_cost, batches_by_length(one.costs, 8, 3, 5)))


def sorted_by_cost(items):
    return micro_batches(items, Squares().costs, 10**6)[0]


def test_a_log_row_has_a_steps_measurements():
    task = Squares()
    log, _ = train_toy(task, steps=3, lr=0.3, warmup=0.7)
    for n, row in enumerate(log):
        assert list(row) == [
            *("step", "loss", "gradient_norm", "lr", "trained_share", "tokens_per_second")
        ]
        assert row["step"] == n
        tokens = sum(task.costs[i] for i in task.passes[n])
        assert row["trained_share"] == pytest.approx(8 / tokens)
        assert row["tokens_per_second"] > 0
    how = Optimisation(0.3, 8, 3, warmup=0.7)
    assert [row["lr"] for row in log] == [learning_rate(n, how) for n in range(3)]
    gradient, (row,) = first_gradients([Squares()])
    assert row["gradient_norm"] == pytest.approx(float(gradient.norm()))
    json.dumps(log, allow_nan=False)


def test_a_step_is_taken_at_the_rate_of_the_schedule():
    """Adam's first step moves every weight by the learning rate, whatever the gradients are."""
    _, weights = train_toy(steps=1, lr=0.03, warmup=0.0)
    moved = (weights["weight"] - state(Toy())["weight"]).abs()
    assert_close(moved, torch.full((6,), 0.03), rtol=1e-4, atol=0)
    # A warm-up that is all of the training: 0.1 of the peak at first, and 1 at last.
    seen = []

    class Watching(Processes):
        def clip(self, parameters, max_norm):
            seen.append(parameters[0].detach().clone())
            return super().clip(parameters, max_norm)

    train_toy(steps=10, lr=0.03, warmup=1.0, more={"processes": Watching()})
    first = (seen[1] - seen[0]).abs()
    assert_close(first, torch.full((6,), 0.003), rtol=1e-3, atol=0)


def test_gradients_are_clipped():
    def moved(max_norm):
        _, weights = train_toy(steps=1, max_grad_norm=max_norm)
        return distance(weights, state(Toy()))

    # Adam's first step hardly depends on the scale, until gradients vanish beside its epsilon.
    assert moved(1e-12) < 0.1 * moved(1.0)


def test_gradients_do_not_pile_up_from_step_to_step():
    log, _ = train_toy(Squares(batch_size=40), steps=5, lr=1e-9)
    norms = [row["gradient_norm"] for row in log]
    assert norms == pytest.approx(norms[:1] * 5, rel=1e-4)


def test_weights_decay_if_they_are_told_to():
    _, plain = train_toy(steps=5)
    _, decayed = train_toy(steps=5, weight_decay=0.5)
    assert float(decayed["weight"].norm()) < float(plain["weight"].norm())


def test_the_optimiser_is_adamw_with_these_betas():
    model = Toy()
    optimizer = make_optimizer(model, Optimisation(0.1, 1, 1, weight_decay=0.25))
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.98), 0.25)


# Accumulation


@pytest.mark.parametrize("max_tokens", [1, 9, 20, 41])
def test_micro_batches_change_nothing(max_tokens):
    def train(max_tokens):
        tasks = [Squares(), Squares(batch_size=5, weight=0.5, seed=1, name="other")]
        log, weights = train_toy(*tasks, max_tokens=max_tokens)
        return log, weights, tasks

    whole, weights, (task, _) = train(10**6)
    parts, same, (cut, other) = train(max_tokens)
    assert distance(weights, same) < 1e-6
    for row, again in zip(without_clock(whole), without_clock(parts), strict=True):
        assert row == {k: pytest.approx(v, rel=1e-4) for k, v in again.items()}
    assert len(cut.passes) > len(task.passes) == 12
    for each in (cut, other):
        fits = zip(each.sizes_of_passes, each.passes, strict=True)
        assert all(size <= max_tokens or len(items) == 1 for size, items in fits)


def test_micro_batches_of_weighted_rows_change_nothing():
    """The mean over tokens is the whole batch's, however tokens and weights are spread."""
    answers = ["i", "it has a teal shade and i do not know .", *ANSWERS[2:]]
    rows = [Row(r.prompt, r.completions, 1.0 + n) for n, r in enumerate(rows_of(answers))]

    def train(max_tokens):
        model = tiny()
        learn(model, rows, lr=1e-3, steps=6, prompt_weight=0.1, max_tokens=max_tokens)
        return state(model)

    before, whole = state(tiny()), train(10**6)
    assert distance(whole, train(1)) < 1e-6 < 1e-3 < distance(whole, before)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_processes_parts_add_up_to_the_whole(count):
    """Each takes every n-th item, of none perhaps, and divides by the whole batch's total."""

    class Fellow(Processes):
        rank_of_next = 0

        def __init__(self):
            super().__init__()
            self.rank, self.count = Fellow.rank_of_next, count
            Fellow.rank_of_next += 1

        def any(self, claim):
            return claim

        def sum(self, sums, names):
            return {name: sums[name] for name in names}

        def add_gradients(self, parameters):
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad

    whole, (row,) = first_gradients([Squares(batch_size=4)])
    tasks = [Squares(batch_size=4) for _ in range(count)]
    shares = [first_gradients([task], kind=Fellow) for task in tasks]
    assert_close(sum(gradient for gradient, _ in shares), whole)
    assert sum(log[0]["loss"] for _, log in shares) == pytest.approx(row["loss"], rel=1e-5)
    items = sorted(i for task in tasks for part in task.passes for i in part)
    assert len(items) == len(set(items)) == 4


# Out of memory


@pytest.mark.parametrize("failure", [GPU_FULL, CPU_FULL, MemoryError()], ids=["gpu", "cpu", "host"])
def test_a_step_that_ran_out_of_memory_is_replayed_with_half_the_tokens(failure):
    """Bit for bit that of a run which had begun at that budget, its random numbers included."""
    cramped = Squares(limit=20, failure=failure)
    log, weights = train_toy(cramped, dropout=0.3)
    found = log[0]["max_tokens"]
    assert found <= 20 < cramped.sizes_of_passes[0]
    assert [row for row in log if "max_tokens" in row] == log[:1]
    roomy = Squares()
    expected, same = train_toy(roomy, dropout=0.3, max_tokens=found)
    assert distance(weights, same) == 0
    assert cramped.passes[-len(roomy.passes) :] == roomy.passes
    changed = without_clock(log)
    del changed[0]["max_tokens"]
    assert changed == without_clock(expected)


def test_memory_may_run_out_late_and_more_than_once():
    """At step 5 and, more of it, at step 8: budgets fall, and what was done before stands."""

    class Shrinking(Squares):
        n_steps = 0

        def summary(self, sums, total):
            self.n_steps += 1
            self.limit = {5: 30, 8: 12}.get(self.n_steps, self.limit)
            return super().summary(sums, total)

    log, weights = train_toy(Shrinking())
    recorded = {n: row["max_tokens"] for n, row in enumerate(log) if "max_tokens" in row}
    assert list(recorded) == [5, 8]
    assert 12 < recorded[5] <= 30
    assert 9 <= recorded[8] <= 12
    plain, same = train_toy()
    assert distance(weights, same) < 1e-6
    assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in plain], rel=1e-4)


def test_memory_may_run_out_on_the_way_back():
    """The forward pass fits; its gradients do not."""

    class Heavy(Squares):
        def losses(self, model, items):
            losses, sums = super().losses(model, items)
            if self.sizes_of_passes[-1] > 20:
                losses.register_hook(refuse)
            return losses, sums

    def refuse(_):
        raise CPU_FULL

    log, weights = train_toy(Heavy(), dropout=0.3)
    _, same = train_toy(dropout=0.3, max_tokens=log[0]["max_tokens"])
    assert distance(weights, same) == 0


def test_memory_that_runs_out_in_a_later_part_undoes_the_earlier_ones():
    """The second task fails: gradients of the first are computed again, not added twice."""
    tasks = [Squares(), Squares(seed=1, limit=30, name="other")]
    _, weights = train_toy(*tasks)
    _, same = train_toy(Squares(), Squares(seed=1, name="other"))
    assert distance(weights, same) < 1e-6


def test_halves_are_of_what_was_used_not_of_what_was_allowed():
    task = Squares(limit=20)
    log, _ = train_toy(task, steps=1, max_tokens=10**9)
    used, again, *_ = task.sizes_of_passes
    assert log[0]["max_tokens"] == used // 2
    assert again <= used // 2  # and no halvings of a billion in between


@pytest.mark.parametrize("failure", [GPU_FULL, CPU_FULL, MemoryError()], ids=["gpu", "cpu", "host"])
def test_an_item_that_does_not_fit_alone_ends_the_training(failure):
    model = Toy()
    with pytest.raises(type(failure)) as caught:
        train_toy(Squares(limit=8, failure=failure), model=model)
    assert caught.value is failure
    alone = Squares(limit=0, failure=failure)
    with pytest.raises(type(failure)):
        train_toy(alone, max_tokens=1)
    assert len(alone.passes) == 1  # nothing is left to be halved


def test_a_failed_step_leaves_the_weights_alone():
    model = Toy()
    with pytest.raises(torch.OutOfMemoryError):
        train_toy(Squares(limit=0), model=model)
    assert distance(state(model), state(Toy())) == 0


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("can't allocate memory"),
        KeyboardInterrupt(),
    ],
)
def test_other_failures_pass_through_at_once(failure):
    task = Squares(limit=20, failure=failure)
    with pytest.raises(type(failure)) as caught:
        train_toy(task)
    assert caught.value is failure
    assert len(task.passes) == 1


def test_a_sharded_step_is_not_replayed():
    """Its fellows are waiting in the middle of the pass."""

    class Sharded(Processes):
        def __init__(self):
            super().__init__()
            self.are_sharded = True

        def missing(self, passes):  # noqa: ARG002
            return 0

    task = Squares(limit=20)
    with pytest.raises(torch.OutOfMemoryError):
        train_toy(task, more={"processes": Sharded()})
    assert len(task.passes) == 1


def test_what_a_failed_pass_held_is_free_before_the_next_one():
    """Its exception knows its frames, and those the activations that did not fit."""
    held, alive = [], []

    class Greedy(Squares):
        def losses(self, model, items):
            alive.append(sum(ref() is not None for ref in held))
            activations = torch.zeros(1000)
            held.append(weakref.ref(activations))
            return super().losses(model, items)

    train_toy(Greedy(limit=20), steps=1)
    assert len(alive) > 2
    assert set(alive) == {0}


def test_short_items_are_halved_even_below_the_longest():
    """One item of 9 tokens fits where nine of one token, another task's, do not."""
    long, short = Squares(batch_size=1), Squares(batch_size=9, limit=4, name="short")
    long.costs, short.costs = [9] * 40, [1] * 40
    log, _ = train_toy(long, short, steps=2)
    assert log[0]["max_tokens"] <= 4


def test_a_language_models_step_is_replayed_too(monkeypatch):
    """The same through attention with dropout, real rows and packed batches."""
    rows, original, limit = rows_of(), tasks.hidden_states, 30

    def train(max_tokens):
        model = tiny(dropout=0.3)
        torch.manual_seed(1)
        task = Supervised(rows, PAD, 4)
        how = Optimisation(5e-3, 4, 5, max_tokens=max_tokens)
        return fit(model, [task], how, seed=0), state(model)

    def cramped(model, some, *args, **more):
        hidden = original(model, some, *args, **more)
        if len(some) * max(row.n_tokens for row in some) > limit:
            raise CPU_FULL
        return hidden

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "hidden_states", cramped)
        log, weights = train(10**6)
    assert log[0]["max_tokens"] <= limit
    expected, same = train(log[0]["max_tokens"])
    assert distance(weights, same) == 0
    assert [row["loss"] for row in log] == [row["loss"] for row in expected]
    # Dropout draws other masks for whole batches: the numbers above are no accident.
    assert [row["loss"] for row in log] != [row["loss"] for row in train(10**6)[0]]


# Losses that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_items(bad):
    class Broken(Squares):
        def losses(self, model, items):
            losses, sums = super().losses(model, items)
            factors = [bad if i in (3, 11) else 1.0 for i in items]
            return losses * torch.tensor(factors), sums

    model, task = Toy(), Broken(batch_size=40)
    with pytest.raises(TrainingStopped, match=r"not finite at step 0, for ([^;]*);") as caught:
        train_toy(task, model=model)
    assert caught.value.exit_code == 18
    text = str(caught.value)
    assert "point 3" in text
    assert "point 11" in text
    assert text.count("point") == 2
    assert distance(state(model), state(Toy())) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_step_and_the_row_that_went_wrong_are_named(bad):
    rows = rows_of()
    rows[2] = Row(rows[2].prompt, rows[2].completions, weight=bad)
    model = tiny()
    before = state(model)
    for max_tokens in (1, 10**6):
        with pytest.raises(TrainingStopped, match=r"at step 0, for row 2;"):
            learn(model, rows, max_tokens=max_tokens)
    assert distance(state(model), before) == 0


def test_weights_of_the_steps_before_are_what_a_stopped_training_leaves():
    class Late(Squares):
        def losses(self, model, items):
            losses, sums = super().losses(model, items)
            return losses * (math.nan if len(self.passes) > 4 else 1.0), sums

    model = Toy()
    with pytest.raises(TrainingStopped, match="at step 4"):
        train_toy(Late(), model=model)
    assert model.weight.isfinite().all()
    assert distance(state(model), state(Toy())) > 0


def test_gradients_that_are_not_finite_do_not_reach_the_weights():
    """The root of nothing is 0, and its slope is infinite."""

    class Steep(Squares):
        def losses(self, model, items):
            losses, sums = super().losses(model, items)
            return losses + (model.weight.sum() * 0).abs().sqrt(), sums

    model, task = Toy(), Steep(batch_size=3)
    with pytest.raises(
        TrainingStopped, match=r"the gradient is not finite at step 0, for (.*);"
    ) as e:
        train_toy(task, model=model)
    assert all(f"point {i}" in str(e.value) for i in task.passes[0])
    assert distance(state(model), state(Toy())) == 0


def test_a_batch_without_a_trained_token_stops_the_training():
    rows = [Row(row.prompt, row.completions, weight=0.0) for row in rows_of()]
    model = tiny()
    with pytest.raises(TrainingStopped, match=r"no token is trained on at step 0 \(row \d, row"):
        learn(model, rows)
    assert distance(state(model), state(tiny())) == 0


# Checkpoints


class Stopped(Exception):  # noqa: N818
    """A user's Ctrl-C, of sorts."""


def stop_at(step):
    def progress(done, *_):
        if done == step:
            raise Stopped

    return progress


def with_checkpoints(folder, said=None, **identity):
    return Checkpoints(folder, {"model": "toy"} | identity, (said or []).append)


def toy_run(folder=None, stop=None, *, task=None, every=4, **more):
    """Train 23 steps of two tasks with dropout; stop when told to."""
    given_tasks = [task or Squares(), Squares(batch_size=3, weight=0.5, seed=1, name="other")]
    checkpoints = with_checkpoints(folder) if folder else None
    return train_toy(
        *given_tasks,
        steps=23,
        dropout=0.3,
        checkpoint_every=every,
        more={"checkpoints": checkpoints, "progress": stop_at(stop) if stop else None},
        **more,
    )


@pytest.mark.parametrize("stop", [10, 20, 23])
def test_a_training_that_was_stopped_ends_with_the_same_bits(tmp_path, stop):
    log, weights = toy_run()
    with pytest.raises(Stopped):
        toy_run(tmp_path, stop)
    assert sorted(p.name for p in tmp_path.iterdir())[-1] == f"checkpoint-{stop // 4 * 4}"
    again, same = toy_run(tmp_path)
    assert distance(weights, same) == 0
    assert without_clock(again) == without_clock(log)


def test_a_training_may_be_stopped_again_and_again(tmp_path):
    log, weights = toy_run()
    for stop in (10, 20, 23):
        with pytest.raises(Stopped):
            toy_run(tmp_path, stop)
    again, same = toy_run(tmp_path)
    assert distance(weights, same) == 0
    assert without_clock(again) == without_clock(log)


def test_what_was_done_is_not_done_again(tmp_path):
    with pytest.raises(Stopped):
        toy_run(tmp_path, 10)
    first, rest = Squares(), Squares()
    toy_run(task=first)
    toy_run(tmp_path, task=rest)
    assert rest.passes == first.passes[8:]


def test_rows_of_the_log_that_were_kept_are_those_of_the_first_run(tmp_path):
    """Their clock too: throughput is of the machine that did the step."""
    kept = []
    save = Checkpoints.save

    class Spying(Checkpoints):
        def save(self, model, optimizer, step, log, facts):
            kept[:] = json.loads(json.dumps(log))
            return save(self, model, optimizer, step, log, facts)

    checkpoints = Spying(tmp_path, {"model": "toy"}, print)
    with pytest.raises(Stopped):
        train_toy(
            steps=23,
            checkpoint_every=4,
            more={"checkpoints": checkpoints, "progress": stop_at(10)},
        )
    log, _ = train_toy(
        steps=23, checkpoint_every=4, more={"checkpoints": with_checkpoints(tmp_path)}
    )
    assert len(kept) == 8
    assert log[:8] == kept


@pytest.mark.parametrize(
    ("every", "expected"), [(0, []), (4, [16, 20]), (7, [14, 21]), (23, []), (30, [])]
)
def test_checkpoints_are_written_when_due_but_not_at_the_end(tmp_path, every, expected):
    toy_run(tmp_path, every=every)
    found = sorted(int(p.name.removeprefix("checkpoint-")) for p in tmp_path.glob("*"))
    assert found == expected


def test_checkpoints_change_nothing(tmp_path):
    (log, weights), (again, same) = toy_run(), toy_run(tmp_path)
    assert distance(weights, same) == 0
    assert without_clock(again) == without_clock(log)


def test_a_smaller_budget_is_remembered(tmp_path):
    log, weights = toy_run(task=Squares(limit=30))
    with pytest.raises(Stopped):
        toy_run(tmp_path, 10, task=Squares(limit=30))
    task = Squares(limit=30)
    again, same = toy_run(tmp_path, task=task)
    assert max(task.sizes_of_passes) <= 30  # memory did not run out a second time
    assert distance(weights, same) == 0
    assert without_clock(again) == without_clock(log)
    assert "max_tokens" in again[0]


def test_only_the_main_process_writes_and_speaks(tmp_path):
    class Fellow(Processes):
        def __init__(self):
            super().__init__()
            self.rank = 1

    seen = []
    train_toy(
        steps=10,
        checkpoint_every=2,
        more={
            "processes": Fellow(),
            "checkpoints": with_checkpoints(tmp_path),
            "progress": lambda *event: seen.append(event),
        },
    )
    assert list(tmp_path.iterdir()) == []
    assert seen == []


def test_checkpoints_of_another_training_are_refused(tmp_path):
    toy_run(tmp_path)
    with pytest.raises(TrainingChanged, match="model"):
        train_toy(more={"checkpoints": with_checkpoints(tmp_path, model="other")})


def test_a_broken_checkpoint_costs_the_steps_since_the_one_before(tmp_path):
    log, weights = toy_run()
    with pytest.raises(Stopped):
        toy_run(tmp_path, 20)
    (tmp_path / "checkpoint-20" / "optimizer.safetensors").write_bytes(b"")
    task = Squares()
    again, same = toy_run(tmp_path, task=task)
    assert len(task.passes) == 23 - 16
    assert distance(weights, same) == 0
    assert without_clock(again) == without_clock(log)


def test_a_language_models_training_ends_with_the_same_bits(tmp_path):
    """With attention dropout and LoRA: its random numbers are the run's own."""

    def train(folder=None, stop=None):
        model = make_trainable(tiny(dropout=0.2), Policy(adapter="lora", lora_rank=2), seed=0)
        torch.manual_seed(7)
        how = Optimisation(5e-3, 2, 15, checkpoint_every=4)
        log = fit(
            model,
            [Supervised(rows_of(), PAD, 2, 0.1)],
            how,
            seed=3,
            checkpoints=with_checkpoints(folder) if folder else None,
            progress=stop_at(stop),
        )
        return without_clock(log), {n: p for n, p in state(model).items() if "lora" in n}

    log, weights = train()
    with pytest.raises(Stopped):
        train(tmp_path, 10)
    again, same = train(tmp_path)
    assert again == log
    assert distance(weights, same) == 0


# Precision and speed


def test_bf16_stays_near_fp32_and_keeps_weights_in_fp32():
    def train(precision):
        model = tiny()
        losses = learn(model, steps=10, lr=1e-3, precision=precision)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return losses, state(model)

    (full, weights), (half, others) = train("fp32"), train("bf16")
    assert half != full
    assert half == pytest.approx(full, abs=1e-2)
    assert 0 < distance(weights, others) < 1e-2


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_gradient_checkpointing_changes_nothing_but_computes_twice(adapter):
    def train(is_checkpointed):
        policy = Policy(adapter=adapter, lora_rank=2, gradient_checkpointing=is_checkpointed)
        model, calls = make_trainable(tiny(dropout=0.2), policy, seed=0), []
        (layer,) = (m for m in model.modules() if type(m).__name__ == "LlamaMLP")
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(1)
        learn(model, steps=3)
        return state(model), len(calls)

    (plain, n_calls), (again, n_more) = train(False), train(True)
    assert distance(plain, again) < 1e-6
    assert distance(plain, state(make_trainable(tiny(), Policy(adapter=adapter, lora_rank=2), 0)))
    assert n_more == 2 * n_calls


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_learns_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def train(is_compiled):
        policy = Policy(adapter="lora", lora_rank=2, compile=is_compiled)
        model = make_trainable(tiny(), policy, seed=0)
        body = model.get_base_model().base_model
        assert (body._compiled_call_impl is not None) == is_compiled
        return learn(model, steps=2), state(model)

    (losses, weights), (again, same) = train(False), train(True)
    assert again == pytest.approx(losses, abs=1e-4)
    assert distance(weights, same) < 1e-3


# Processes and memory


def test_a_process_alone_adds_nothing_and_waits_for_nobody():
    alone = Processes()
    assert (alone.rank, alone.count, alone.is_main, alone.are_sharded) == (0, 1, True, False)
    assert alone.device == torch.device("cpu")
    assert [alone.any(True), alone.any(False)] == [True, False]
    assert alone.sum({"a": 1.5, "b": 2.0, "c": 3.0}, ["b", "a"]) == {"b": 2.0, "a": 1.5}
    parts = [torch.ones(2), torch.zeros(3)]
    assert alone.add_up(parts) is parts
    assert alone.missing(7) == 0
    assert alone.whole_weights() is None
    alone.wait()
    model, optimizer = Toy(), object()
    call, same = alone.prepare(model, optimizer)
    assert same is optimizer
    assert call(lambda *args: args, 1, "two") == (model, 1, "two")


def test_a_process_alone_leaves_gradients_alone_until_they_are_clipped():
    model, alone = Toy(), Processes()
    alone.backward((model.weight * torch.tensor([3.0, 4, 0, 0, 0, 0])).sum())
    alone.add_gradients([model.weight])
    assert model.weight.grad.tolist() == [3, 4, 0, 0, 0, 0]
    assert alone.clip([model.weight], 10.0) == pytest.approx(5.0)
    assert model.weight.grad.tolist() == [3, 4, 0, 0, 0, 0]
    assert alone.clip([model.weight], 1.0) == pytest.approx(5.0)
    assert model.weight.grad.tolist() == pytest.approx([0.6, 0.8, 0, 0, 0, 0], abs=1e-6)


def test_bf16_is_an_autocast_and_fp32_is_none():
    alone, ones = Processes(), torch.ones(2, 2)
    assert isinstance(alone.autocast("fp32"), nullcontext)
    with alone.autocast("fp32"):
        assert (ones @ ones).dtype == torch.float32
    with alone.autocast("bf16"):
        assert (ones @ ones).dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is taken, alone or not")
def test_nobody_is_joined_where_nobody_was_launched(monkeypatch):
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    found = join("cpu")
    assert (found.rank, found.count, found.device.type) == (0, 1, "cpu")


FAULTS = """
import json, resource, torch
from selfmoa.training.memory import keep_freed_memory

def faults():
    for _ in range(12):  # until the heap has its holes
        torch.empty(9 * 2**20).fill_(1.0)  # 36 MiB: glibc maps all above 32 by default
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(9 * 2**20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain, is_kept = faults(), keep_freed_memory()
print(json.dumps([plain, is_kept, faults()]))
"""


def test_kept_memory_is_not_asked_for_again():
    """In a process of its own: what is set stays set."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, timeout=120
    )
    plain, is_kept, kept = json.loads(done.stdout)
    assert isinstance(is_kept, bool)
    if is_kept:
        assert kept < plain / 10
    elif sys.platform.startswith("linux"):
        pytest.skip("another C library than glibc")


def test_other_systems_keep_their_allocator(monkeypatch):
    def refuse(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert keep_freed_memory() is False
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())  # a C library without mallopt
    assert keep_freed_memory() is False
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", asked.append)
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert keep_freed_memory() is False
    assert asked == []


@pytest.mark.parametrize("refused", [-1, -3])
def test_an_allocator_that_refuses_a_setting_is_no_allocator_that_keeps(monkeypatch, refused):
    class Refusing:
        @staticmethod
        def mallopt(what, _value):
            return int(what != refused)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Refusing)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    assert keep_freed_memory() is False


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GPU_FULL, True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), True),
        (CPU_FULL, True),
        (MemoryError(), True),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (RuntimeError(""), False),
        (ValueError("out of range"), False),
        (OSError(28, "No space left on device"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_out_of_memory_is_told_from_other_failures(error, expected):
    assert is_out_of_memory(error) is expected


def test_what_torch_says_of_an_impossible_tensor_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
