"""The frozen policy that losses and anchors are tied to, without a second copy where possible.

An adapter that is switched off is its base, and a second, frozen adapter on the same base is
another policy; only a policy with weights of its own needs a second model. The log-probabilities
of the pairs under the reference never change: they are computed once and kept by content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from selfmoa.errors import TrainingStopped
from selfmoa.records import content_id
from selfmoa.rundir.files import make_folder, write_atomic
from selfmoa.training.layouts import hidden_states
from selfmoa.training.logprobs import head_of, sum_logps, token_logps
from selfmoa.training.memory import is_out_of_memory
from selfmoa.training.processes import Processes
from selfmoa.training.trainer import micro_batches

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from selfmoa.training.tokens import Row

Frozen = Callable[[Any], AbstractContextManager[Any]]
"""From the policy's model to a context in which a model is the reference, in evaluation mode."""
REFERENCE_ADAPTER = "reference"
# Nats by which a response may differ at the start: rounding. A wrong reference is off by whole
# nats. In bf16 every token adds an error of its own, so the sum's grows with the root of them.
FP32_TOLERANCE = 1e-3
BF16_TOLERANCE = 0.02


@contextmanager
def adapter_off(model: Any) -> Iterator[Any]:
    """Be the reference that is the adapter's base."""
    with _evaluating(model), model.disable_adapter():
        yield model


@contextmanager
def reference_adapter(model: Any) -> Iterator[Any]:
    """Be the reference that is a second adapter, `REFERENCE_ADAPTER`, on the same base."""
    trained = model.active_adapter
    with _evaluating(model):
        model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
        try:
            yield model
        finally:
            model.set_adapter(trained)


def other_model(reference: Any) -> Frozen:
    """Return the reference that is a model of its own."""
    reference.eval().requires_grad_(False)

    @contextmanager
    def frozen(_: Any) -> Iterator[Any]:
        yield reference

    return frozen


@dataclass(frozen=True, slots=True)
class Scoring:
    """How rows are put through a model whose gradients nobody wants."""

    layout: str
    pad_id: int
    max_tokens: int = 16384
    precision: str = "fp32"
    processes: Processes = field(default_factory=Processes)


@torch.no_grad()
def score(model: Any, rows: Sequence[Row], how: Scoring) -> list[Tensor]:
    """Return log p(completion | prompt) of each row's completions, [k] each, on the CPU.

    Parts that run out of memory are halved. Every process scores its share.
    """

    def try_part(part: list[int]) -> Tensor | None:
        # The exception must be gone before the halves: its frames hold what did not fit.
        try:
            with how.processes.autocast(how.precision):
                mine = [rows[i] for i in part]
                hidden, batch = hidden_states(model, mine, how.layout, how.pad_id)
                logps = token_logps(hidden, batch.targets, head_of(model))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(part) == 1:
                raise
            clear_frames(error.__traceback__)
            return None
        return sum_logps(logps, batch.owners, batch.n_completions).cpu()

    def score_part(part: list[int]) -> None:
        sums = try_part(part)
        if sums is None:
            score_part(part[: len(part) // 2])
            score_part(part[len(part) // 2 :])
            return
        sizes = [len(rows[i].completions) for i in part]
        for i, each in zip(part, sums.split(sizes), strict=True):
            found[i] = each

    found = [torch.zeros(len(row.completions)) for row in rows]
    mine = range(how.processes.rank, len(rows), how.processes.count)
    for part in micro_batches(mine, [row.n_tokens for row in rows], how.max_tokens):
        score_part(part)
    return how.processes.add_up(found)


def reference_logps(
    frozen: Frozen, model: Any, rows: Sequence[Row], how: Scoring, *, cache: Path, identity: str
) -> list[Tensor]:
    """Return `score` of the reference, from `cache` (a folder) if it is there.

    `identity` names the reference's weights; with the rows, the layout and the precision it is the
    name of the cached file, so nothing stale is ever read.
    """
    tokens = [[list(row.prompt), *row.completions] for row in rows]
    name = content_id(identity, tokens, how.layout, how.max_tokens, how.precision, length=32)
    path = cache / f"reference-{name}.safetensors"
    if (kept := _read(path, rows)) is not None:
        return kept
    with frozen(model) as reference, _evaluating(reference):
        found = score(reference, rows, how)
    if how.processes.is_main:
        make_folder(cache)
        write_atomic(path, save({"logps": torch.cat(found)}))
    return found


def check_start(model: Any, rows: Sequence[Row], reference: Sequence[Tensor], how: Scoring) -> None:
    """Refuse a policy that should start as its reference, and does not.

    The rows of the first forward pass are compared: a wrong reference is wrong on all.

    Raises:
        TrainingStopped: a response's log-probability differs by more than rounding does.
    """
    first = micro_batches(range(len(rows)), [row.n_tokens for row in rows], how.max_tokens)[0]
    part = [rows[i] for i in first]
    with _evaluating(model):
        here = score(model, part, how)
    for i, row, ours in zip(first, part, here, strict=True):
        for logp, theirs, tokens in zip(ours, reference[i], row.completions, strict=True):
            gap = abs(float(logp - theirs))
            rounding = BF16_TOLERANCE * len(tokens) ** 0.5 if how.precision == "bf16" else 0.0
            if not gap <= FP32_TOLERANCE + rounding:
                raise TrainingStopped.wrong_reference(gap)


def _read(path: Path, rows: Sequence[Row]) -> list[Tensor] | None:
    """Return kept log-probabilities, or None if there are none that can be read."""
    sizes = [len(row.completions) for row in rows]
    try:
        with safe_open(path, "pt") as file:
            logps: Tensor = file.get_tensor("logps")
    except (OSError, SafetensorError):
        return None
    return list(logps.split(sizes)) if logps.shape == (sum(sizes),) else None


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
