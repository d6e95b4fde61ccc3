"""What work costs: memory on one device, time on several, money at endpoints, room on the disk."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from selfmoa.planning.models import POLICY
from selfmoa.training import estimates

if TYPE_CHECKING:
    from selfmoa.config import Policy, Recipe
    from selfmoa.planning.models import Model
    from selfmoa.planning.work import StageWork, Steps, Work

GB = 1e9
PROCESS, ALLOCATOR = 0.5, 0.08
"""GB that a process needs beside its tensors, and the share that its allocator keeps between
them: what is added before memory is compared with that of a device."""
JUDGE_ROWS = 16
"""Rows that a judge or attacker answers at once, unless its option `batch_size` says."""
READING, WRITING, TRAINING = 0.3, 0.4, 0.3
"""Shares of a device's arithmetic that reading prompts and training reach, and of its bandwidth
that writing does: what plain PyTorch gets on models of 0.5 to 4 thousand million weights."""
LAYER_SECONDS = 0.6e-3
"""Least time of a layer in a step of writing: Python and kernel launches."""
ANSWER_BYTES, VERDICT_BYTES = 1500, 250
"""Bytes that an answer leaves on the disk (with its prompt), and a verdict."""


@dataclass(frozen=True)
class Device:
    """A class of devices by the figures that makers publish: FLOP/s in 16 bits, bytes/s."""

    name: str
    flops: float
    bandwidth: float


DEVICES = (
    Device("8 CPU cores", 0.8e12, 50e9),
    Device("8 GB card (RTX 4060)", 60e12, 272e9),
    Device("16 GB card (RTX 4080)", 97e12, 717e9),
    Device("24 GB card (RTX 4090)", 165e12, 1008e9),
    Device("80 GB card (A100)", 312e12, 2039e9),
    Device("80 GB card (H100)", 989e12, 3350e9),
)


# --- memory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors that a stage needs: models in turn, and all of them at once.

    Where `together` does not fit but `alone` does, models take turns.
    """

    alone: int
    together: int
    by: str


def memory_of(recipe: Recipe, stage: StageWork, models: Sequence[Model]) -> Memory:
    """Return what a stage needs on the device that its models share."""
    here = {role: m for m in models if m.config is not None for role in m.roles}
    largest: dict[str, Work] = {}  # of each model, what keeps the most tokens at once
    for work in stage.works:
        if work.calls and work.prompt and work.model in here:
            name = here[work.model].name
            largest[name] = max(largest.get(name, work), work, key=_kept(recipe))
    needs: dict[str, tuple[int, int]] = {}  # by model: weights, and what work takes on top
    for name, work in largest.items():
        model = here[work.model]
        beside = _working_bytes(
            _written(model.config), model.held, _rows(recipe, work), work.prompt, work.answer or 1
        )
        needs[name] = (estimates.weights_bytes(model.config, model.held), beside)
    if stage.training and POLICY in here:
        config, steps = here[POLICY].config, stage.training
        taken = _training_bytes(_written(config), recipe.policy, replace(steps, steps=1))
        needs[f"training of {here[POLICY].name}"] = (taken, 0)
    if not needs:
        return Memory(0, 0, "")
    by = max(needs, key=lambda name: sum(needs[name]))
    together = sum(w for w, _ in needs.values()) + max(b for _, b in needs.values())
    return Memory(sum(needs[by]), together, by)


def _rows(recipe: Recipe, work: Work) -> int:
    own = recipe.judges.get(work.model) or recipe.attackers.get(work.model)
    most = int(own.options.get("batch_size", JUDGE_ROWS)) if own else recipe.sample.batch_size
    return max(1, min(most, work.calls))


def _kept(recipe: Recipe) -> Callable[[Work], int]:
    return lambda work: _rows(recipe, work) * (work.prompt + work.answer)


def _written(config: Any) -> tuple[type, str]:
    """Return a configuration as what estimates can be remembered by: they take seconds each."""
    return type(config), config.to_json_string(use_diff=False)


def _config(written: tuple[type, str]) -> Any:
    kind: Any = written[0]
    return kind.from_dict(json.loads(written[1]))


@lru_cache(maxsize=256)
def _working_bytes(written: tuple[type, str], held: str, rows: int, prompt: int, new: int) -> int:
    config = _config(written)
    return estimates.working_bytes(config, held=held, n_rows=rows, prompt=prompt, new=new)


@lru_cache(maxsize=256)
def _training_bytes(written: tuple[type, str], policy: Policy, steps: Steps) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that transformers will change
        return estimates.training_bytes(
            _config(written),
            policy,
            length=steps.length,
            n_rows=steps.rows,
            trained_share=steps.trained_share,
            n_completions=steps.completions,
            own_reference=policy.adapter == "full" and steps.completions > 1,
        )


def with_overhead(tensors: int) -> float:
    """Return GB that a device must have for these bytes of tensors."""
    return PROCESS + (1 + ALLOCATOR) * tensors / GB


# --- time and money ------------------------------------------------------------------------------


def seconds_of(recipe: Recipe, stage: StageWork, models: Sequence[Model], device: Device) -> float:
    """Return how long a stage takes on a device; what answers at an endpoint takes no time here."""
    here = {role: m for m in models if m.config is not None for role in m.roles}
    total = sum(
        _answering(work, here[work.model], device, _rows(recipe, work))
        for work in stage.works
        if work.prompt and work.model in here
    )
    if stage.training and POLICY in here:
        total += _fitting(recipe.policy, stage.training, here[POLICY], device)
    return total


def _answering(work: Work, model: Model, device: Device, rows: int) -> float:
    """Reading is 2 FLOP a weight and token; writing reads every weight once a step and batch."""
    n = model.parameters
    reading = 2.0 * n * work.calls * work.prompt / (READING * device.flops)
    by_memory = estimates.weights_bytes(model.config, model.held) / (WRITING * device.bandwidth)
    by_arithmetic = 2.0 * n * rows / (READING * device.flops)
    layers = int(model.config.get_text_config().num_hidden_layers)
    step = max(by_memory, by_arithmetic, LAYER_SECONDS * layers)
    return reading + step * work.answer * work.calls / rows


def _fitting(policy: Policy, steps: Steps, model: Model, device: Device) -> float:
    """Training is 6 FLOP a weight and token, 4 where the weights stand still; 2 more to recompute.

    The reference reads every row once.
    """
    tokens = float(steps.steps * steps.rows * steps.length)
    each = (6 if policy.adapter == "full" else 4) + 2 * policy.gradient_checkpointing
    again = 2 / max(1, steps.steps) + (2 if policy.adapter == "full" else 0)
    slower = 2.0 if policy.precision == "fp32" else 1.0
    flops = (each + again * (steps.completions > 1)) * model.parameters * tokens
    return slower * flops / (TRAINING * device.flops)


def costs_of(recipe: Recipe, works: Iterable[Work], models: Sequence[Model]) -> dict[str, Any]:
    """Return calls, tokens and money at each endpoint."""
    asked = {role: m.endpoint for m in models for role in m.roles if m.endpoint}
    found: dict[str, dict[str, float]] = {}
    for work in works:
        endpoint = asked.get(work.model)
        if endpoint is None or not work.prompt:
            continue
        price = recipe.endpoints[endpoint]
        line = found.setdefault(endpoint, {"calls": 0, "tokens": 0, "cost": 0.0})
        read, wrote = work.calls * work.prompt, work.calls * work.answer
        line["calls"] += work.calls
        line["tokens"] += read + wrote
        line["cost"] += (read * price.price_in + wrote * price.price_out) / 1e6
    return found


# --- disk ----------------------------------------------------------------------------------------


def disk_of(recipe: Recipe, stages: Sequence[StageWork], models: Sequence[Model]) -> dict[str, int]:
    """Return bytes that a run writes (policies, checkpoints, records), and those still to fetch."""
    config = models[0].config
    trained = 0 if config is None else _trained(config, recipe.policy)
    n_policies = sum(stage.training is not None for stage in stages)
    works = [work for stage in stages for work in stage.works]
    records = sum(w.calls * (VERDICT_BYTES if w.is_verdict else ANSWER_BYTES) for w in works)
    states = 2 * 3 * 4 * trained if recipe.policy.checkpoint_every else 0
    return {
        "run": 4 * trained * n_policies + states + records,
        "to_fetch": sum(2 * m.parameters for m in models if m.to_fetch),
    }


def _trained(config: Any, policy: Policy) -> int:
    """Return how many weights are trained, and therefore saved."""
    if policy.adapter == "full":
        return estimates.parameters(config).total
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return sum((m.in_features + m.out_features) * policy.lora_rank for m in linear)
