"""The loop around the losses: optimiser steps over tasks, in micro-batches that fit the memory.

    fit(model, [pairs, anchors], settings, seed=0)

A task knows its items and their losses (`tasks`, `preference`); a step takes one batch of each and
minimises the weighted sum of their means (method, eq. 10). The means are over the whole batch, of
all processes, so that neither micro-batches nor processes change a gradient but by rounding. The
order of items comes from a seed; the clock is read for `tokens_per_second` alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from selfmoa.errors import TrainingStopped
from selfmoa.training.memory import is_out_of_memory
from selfmoa.training.processes import Processes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from selfmoa.training.checkpoints import Checkpoints

    Progress = Callable[[int, int, str], None]

Precision = Literal["fp32", "bf16"]
LogRow = dict[str, Any]
BETAS = (0.9, 0.98)


@dataclass(frozen=True, slots=True)
class Optimisation:
    """Settings of the optimiser: AdamW, linear warm-up over `warmup` of the steps, cosine decay.

    `max_tokens` bounds the tokens, padding included, that one forward pass takes: longer batches
    are worked through in parts, with the same result.
    """

    lr: float
    batch_size: int
    steps: int
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_tokens: int = 16384
    precision: Precision = "fp32"
    checkpoint_every: int = 0


class Task(Protocol):
    """Something to be trained on: items, what each costs, and the losses of some of them."""

    weight: float
    """Of its mean loss in the step's."""
    batch_size: int
    """What the sizes of a step's items add up to, as nearly as can be."""
    sizes: list[int]
    """How much each item counts towards `batch_size`."""
    costs: list[int]
    """Tokens of each item."""
    trained: list[int]
    """How many of them the loss is about."""
    counted: tuple[str, ...]
    """Names of the sums that `losses` returns."""

    def total(self, items: Sequence[int]) -> float:
        """Return what the losses of these items are divided by for their mean: above 0."""

    def losses(self, model: Any, items: Sequence[int]) -> tuple[Tensor, Mapping[str, float]]:
        """Return the losses of these items, in the order of `names`, and sums for the log."""

    def names(self, items: Sequence[int]) -> list[str]:
        """Return what to call each of the losses when it is not finite."""

    def summary(self, sums: Mapping[str, float], total: float) -> LogRow:
        """Return what the log says of a step, from its sums over all items."""


def learning_rate(step: int, settings: Optimisation) -> float:
    """Return the learning rate at a step in [0, steps): warm-up, then cosine to a tenth."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    phase = (step - warmup) / max(1, settings.steps - warmup)
    return settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * phase)))


def batches_by_length(
    lengths: Sequence[int],
    batch_size: int,
    steps: int,
    seed: int,
    sizes: Sequence[int] | None = None,
) -> Iterator[list[int]]:
    """Yield `steps` index batches: every item once an epoch, items of like length together.

    Each epoch is shuffled, cut into pools of eight batches, and sorted inside a pool: nearly as
    random as a plain shuffle and with little padding. `sizes` say how much each item counts
    towards `batch_size`, 1 if they are not given.

    Raises:
        ValueError: there are no items and more than no steps: the epochs would never end.
    """
    if steps and not lengths:
        raise ValueError(f"there are no rows for {steps} steps")
    rng = np.random.default_rng(seed)
    done = 0
    while done < steps:
        for batch in _epoch(lengths, batch_size, sizes, rng)[: steps - done]:
            yield batch
            done += 1


def steps_of(epochs: float, task: Task, seed: int) -> int:
    """Return the steps that some epochs over a task take: at least 1."""
    one = _epoch(task.costs, task.batch_size, task.sizes, np.random.default_rng(seed))
    return max(1, math.ceil(epochs * len(one)))


def _epoch(
    lengths: Sequence[int],
    batch_size: int,
    sizes: Sequence[int] | None,
    rng: np.random.Generator,
) -> list[list[int]]:
    sizes = sizes or [1] * len(lengths)
    batches: list[list[int]] = []
    for pool in _fill(rng.permutation(len(lengths)).tolist(), sizes, 8 * batch_size):
        batches += _fill(sorted(pool, key=lambda i: lengths[i]), sizes, batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(items: Sequence[int], costs: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut items into parts whose padded size, items times longest, is at most `max_tokens`.

    Items of like cost come together; one that is too long on its own is alone.
    """
    parts: list[list[int]] = []
    for item in sorted(items, key=lambda i: -costs[i]):
        if parts and (len(parts[-1]) + 1) * costs[parts[-1][0]] <= max_tokens:
            parts[-1].append(item)
        else:
            parts.append([item])
    return parts


def make_optimizer(model: Any, settings: Optimisation) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters."""
    return torch.optim.AdamW(
        trainable(model),
        lr=settings.lr,
        betas=BETAS,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """Return the parameters that training changes."""
    return [p for p in model.parameters() if p.requires_grad]


def fit(
    model: Any,
    tasks: Sequence[Task],
    settings: Optimisation,
    *,
    seed: int,
    processes: Processes | None = None,
    checkpoints: Checkpoints | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> list[LogRow]:
    """Train `model` in place; return one row of measurements a step.

    Args:
        model: a causal language model; its trainable parameters are changed.
        tasks: what to train on; the n-th one's order comes from `seed` + n.
        settings: of the optimiser.
        seed: of the order of items.
        processes: this process and its fellows; alone if not given.
        checkpoints: where to go on from and what to write; none if not given.
        progress: called as progress(done, total, "step").
        say: called with remarks.

    Raises:
        TrainingStopped: a loss is not finite; the items are named.
    """
    processes = processes or Processes()
    call, optimizer = processes.prepare(model, make_optimizer(model, settings))
    saved = checkpoints.restore(model, optimizer) if checkpoints else None
    log: list[LogRow] = list(saved.log) if saved else []
    max_tokens = int(saved.facts["max_tokens"]) if saved else settings.max_tokens
    if saved and say:
        say(f"going on after step {saved.step} of {settings.steps}")
    orders = [
        batches_by_length(t.costs, t.batch_size, settings.steps, seed + n, t.sizes)
        for n, t in enumerate(tasks)
    ]
    step = _Step(call, trainable(model), tasks, settings, processes, max_tokens)
    model.train()
    for number, batches in islice(enumerate(zip(*orders, strict=True)), len(log), None):
        row = step.take(number, batches, optimizer)
        log.append(row)
        done = number + 1
        is_due = settings.checkpoint_every and done % settings.checkpoint_every == 0
        if checkpoints and is_due and done < settings.steps and processes.is_main:
            checkpoints.save(model, optimizer, done, log, {"max_tokens": step.max_tokens})
        if progress and processes.is_main and (done % 10 == 0 or done == settings.steps):
            progress(done, settings.steps, "step")
    model.eval()
    return log


@dataclass
class _Step:
    """Takes optimiser steps; remembers how many tokens fit into the memory at once."""

    call: Callable[..., Any]
    parameters: list[torch.nn.Parameter]
    tasks: Sequence[Task]
    settings: Optimisation
    processes: Processes
    max_tokens: int

    def take(self, number: int, batches: Sequence[list[int]], optimizer: Any) -> LogRow:
        """Take one step down the weighted mean losses of the batches; return its measurements."""
        started = time.perf_counter()
        sums, was_halved = self._fitting_gradients(number, batches)
        self.processes.add_gradients(self.parameters)
        norm = self.processes.clip(self.parameters, self.settings.max_grad_norm)
        if not math.isfinite(norm):
            raise TrainingStopped.not_finite(number, self._names(batches), what="gradient")
        rate = learning_rate(number, self.settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        row: LogRow = {"step": number}
        tokens = trained = 0
        for task, items, each in zip(self.tasks, batches, sums, strict=True):
            row |= task.summary(self.processes.sum(each, task.counted), task.total(items))
            tokens += sum(task.costs[i] for i in items)
            trained += sum(task.trained[i] for i in items)
        row |= {"gradient_norm": norm, "lr": rate, "trained_share": trained / tokens}
        if was_halved:
            row["max_tokens"] = self.max_tokens
        return row | {"tokens_per_second": round(tokens / (time.perf_counter() - started), 1)}

    def _fitting_gradients(
        self, number: int, batches: Sequence[list[int]]
    ) -> tuple[list[dict[str, float]], bool]:
        """Compute the gradients; where memory runs out, again with half the tokens at once."""
        before, random = self.max_tokens, _random_state()
        while True:
            sums = self._try(number, batches)
            if not self.processes.any(sums is None):
                return sums or [], self.max_tokens < before
            self.max_tokens = self._largest(batches) // 2
            self._start_again(random)

    def _try(self, number: int, batches: Sequence[list[int]]) -> list[dict[str, float]] | None:
        """Return what `_gradients` does, or None if memory ran out.

        The exception must be gone before the next try: its frames hold what did not fit.
        """
        try:
            return self._gradients(number, batches)
        except (RuntimeError, MemoryError) as error:
            is_final = self.processes.are_sharded or not self._largest(batches)
            if is_final or not is_out_of_memory(error):
                raise
            clear_frames(error.__traceback__)
            return None

    def _largest(self, batches: Sequence[list[int]]) -> int:
        """Return the tokens of the largest forward pass that could be cut in two, 0 if none can."""
        return max(
            (
                len(part) * task.costs[part[0]]
                for task, items in zip(self.tasks, batches, strict=True)
                for part in micro_batches(items, task.costs, self.max_tokens)
                if len(part) > 1
            ),
            default=0,
        )

    def _start_again(self, random: list[Tensor]) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        _set_random_state(random)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _names(self, batches: Sequence[list[int]]) -> list[str]:
        return [n for t, items in zip(self.tasks, batches, strict=True) for n in t.names(items)]

    def _gradients(self, number: int, batches: Sequence[list[int]]) -> list[dict[str, float]]:
        """Add up the gradients of this process's share of the batches; return sums for the log."""
        found = []
        for task, items in zip(self.tasks, batches, strict=True):
            sums = dict.fromkeys(task.counted, 0.0)
            total = task.total(items)
            if total <= 0:
                raise TrainingStopped.nothing_to_train(number, task.names(items))
            scale = task.weight / total
            mine = items[self.processes.rank :: self.processes.count]
            parts = micro_batches(mine, task.costs, self.max_tokens)
            for _ in range(self.processes.missing(len(parts))):
                self._backward(task, [min(items, key=lambda i: task.costs[i])], 0.0, number)
            for part in parts:
                for name, value in self._backward(task, part, scale, number).items():
                    sums[name] += value
            found.append(sums)
        return found

    def _backward(
        self, task: Task, part: list[int], scale: float, number: int
    ) -> Mapping[str, float]:
        with self.processes.autocast(self.settings.precision):
            losses, sums = self.call(task.losses, part)
        is_finite = torch.isfinite(losses.detach())
        if not bool(is_finite.all()):
            names = task.names(part)
            bad = [name for name, good in zip(names, is_finite.tolist(), strict=True) if not good]
            raise TrainingStopped.not_finite(number, bad)
        self.processes.backward(losses.sum() * scale)
        return dict(sums)


def _fill(items: Sequence[int], sizes: Sequence[int], wanted: int) -> list[list[int]]:
    """Cut items, in their order, into parts whose sizes add up to `wanted` as nearly as can be."""
    parts: list[list[int]] = []
    room = 0
    for item in items:
        if 2 * room < sizes[item] or room <= 0:  # the part is nearer to it without the item
            parts.append([])
            room = wanted
        parts[-1].append(item)
        room -= sizes[item]
    return parts


def _random_state() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if state[1:]:
        torch.cuda.set_rng_state_all(state[1:])
