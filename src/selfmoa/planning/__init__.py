"""What a recipe will take, told before anything is loaded: calls, memory, time, money, disk.

    plan(recipe, memory_gb=16)      -> facts for `console.planning`, or for a script

Calls are those of the budgets: a run that finds little makes fewer, none makes more but for
rewrites that fail. Times follow from published figures of devices and stated shares of them
(`costs`): right to a factor of two, not to a minute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from selfmoa import registry
from selfmoa.planning import costs
from selfmoa.planning.models import find_here, find_models
from selfmoa.planning.work import CHARACTERS, TEMPLATE, measure_world, work_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from selfmoa.config import Recipe
    from selfmoa.planning.costs import Memory
    from selfmoa.planning.models import Model
    from selfmoa.planning.work import Sizes, StageWork
    from selfmoa.records import Message

START, END = ("reset", "evaluate"), ("report",)
ROUND = ("red_team", "sample", "judge", "pair", "train", "evaluate")
LESS: tuple[tuple[str, Any], ...] = (
    ("policy.gradient_checkpointing", True),
    ("policy.precision", "bf16"),
    ("policy.max_tokens", 4096),
    ("sample.batch_size", 64),
    ("policy.max_tokens", 1024),
    ("sample.batch_size", 16),
    ("policy.adapter", "lora"),
    ("policy.max_tokens", 512),
    ("policy.adapter", "qlora"),
    ("policy.inference", "nf4"),
)
"""Settings that take less memory, in the order in which one would try them."""


def plan(recipe: Recipe, memory_gb: float | None = None) -> dict[str, Any]:
    """Return what a run of a recipe takes, as plain data.

    Args:
        recipe: what would be run.
        memory_gb: what the device has, in 10^9 bytes; `memory.fits` is None without it.

    Raises:
        SelfmoaError: the recipe's files or plug-ins cannot be used.
    """
    world = registry.resolve("world", recipe.policy.world)(recipe)
    count, counted_by = _counter(recipe)
    sizes = measure_world(recipe, world, count)
    accelerated = _is_accelerated(recipe, memory_gb)
    models = find_models(recipe, accelerated=accelerated)
    stages = work_of(recipe, sizes, _stages(recipe))
    memory = [costs.memory_of(recipe, stage, models) for stage in stages]
    works = [work for stage in stages for work in stage.works]
    endpoints = costs.costs_of(recipe, works, models)
    return {
        "recipe": recipe.name,
        "rounds": recipe.rounds,
        "tokens_by": counted_by,
        "models": [_about(model) for model in models],
        "stages": [_line(recipe, s, m, models) for s, m in zip(stages, memory, strict=True)],
        "totals": _totals(stages),
        "memory": _verdict(recipe, sizes, stages, memory, memory_gb, accelerated=accelerated),
        "seconds": {
            device.name: sum(costs.seconds_of(recipe, s, models, device) for s in stages)
            for device in costs.DEVICES
        },
        "endpoints": endpoints,
        "disk": costs.disk_of(recipe, stages, models),
        "remarks": _remarks(recipe, models, endpoints),
    }


def _stages(recipe: Recipe) -> list[tuple[str, int]]:
    rounds = [(name, r) for r in range(1, recipe.rounds + 1) for name in ROUND]
    return [*((name, 0) for name in START), *rounds, *((name, 0) for name in END)]


def _counter(recipe: Recipe) -> tuple[Callable[[Sequence[Message]], int], str]:
    """Return what counts the tokens of a conversation, and its name."""
    if recipe.policy.world == "sandbox":
        return lambda talk: 3 + sum(1 + len(m["content"].split()) for m in talk), "words"
    folder = find_here(recipe.model.name, recipe.model.revision) if recipe.model.name else None
    if folder is not None and any(folder.glob("tokenizer*")):
        from selfmoa.training.policy import load_tokenizer
        from selfmoa.training.tokens import encode_prompts

        tokenizer = load_tokenizer(folder)
        return lambda talk: len(encode_prompts(tokenizer, [talk])[0]), "the policy's tokenizer"
    rule = f"{CHARACTERS} characters a token"
    return lambda talk: TEMPLATE + sum(-(-len(m["content"]) // CHARACTERS) for m in talk), rule


def _is_accelerated(recipe: Recipe, memory_gb: float | None) -> bool:
    """Return whether models answer on an accelerator; memory that is told is taken for one's."""
    if recipe.policy.device != "auto" or memory_gb is not None:
        return recipe.policy.device != "cpu"
    import torch

    return torch.accelerator.is_available()


def _about(model: Model) -> dict[str, Any]:
    return {
        "roles": list(model.roles),
        "name": model.name,
        "parameters": model.parameters or None,
        "held": None if model.config is None else model.held,
        "endpoint": model.endpoint,
        "guess": model.guess,
    }


def _line(
    recipe: Recipe, stage: StageWork, memory: Memory, models: Sequence[Model]
) -> dict[str, Any]:
    answers = [w for w in stage.works if not w.is_verdict]
    steps = stage.training
    return {
        "stage": stage.stage,
        "round": stage.round,
        "generations": sum(w.calls for w in answers),
        "verdicts": sum(w.calls for w in stage.works if w.is_verdict),
        "steps": steps.steps if steps else 0,
        "tokens_read": sum(w.calls * w.prompt for w in stage.works),
        "tokens_written": sum(w.calls * w.answer for w in stage.works),
        "tokens_trained": steps.steps * steps.rows * steps.length if steps else 0,
        "work": [
            {"what": w.what, "model": w.model, "calls": w.calls, "is_exact": w.is_exact}
            for w in stage.works
        ],
        "memory_bytes": memory.alone,
        "memory_together_bytes": memory.together,
        "memory_by": memory.by,
        "seconds": {d.name: costs.seconds_of(recipe, stage, models, d) for d in costs.DEVICES},
    }


def _totals(stages: Sequence[StageWork]) -> dict[str, int]:
    works = [w for stage in stages for w in stage.works]
    return {
        "generations": sum(w.calls for w in works if not w.is_verdict),
        "verdicts": sum(w.calls for w in works if w.is_verdict),
        "tokens_read": sum(w.calls * w.prompt for w in works),
        "tokens_written": sum(w.calls * w.answer for w in works),
        "steps": sum(s.training.steps for s in stages if s.training),
    }


def _verdict(
    recipe: Recipe,
    sizes: Sizes,
    stages: Sequence[StageWork],
    memory: Sequence[Memory],
    memory_gb: float | None,
    *,
    accelerated: bool,
) -> dict[str, Any]:
    """Return the peak, whether it fits, and what to change where it does not."""
    peak = max(range(len(stages)), key=lambda i: memory[i].alone)
    found: dict[str, Any] = {
        "peak_bytes": memory[peak].alone,
        "peak_gb": round(costs.with_overhead(memory[peak].alone), 2),
        "stage": stages[peak].stage,
        "by": memory[peak].by,
        "limit_gb": memory_gb,
        "fits": None,
        "takes_turns": False,
        "overrides": [],
        "remedy": "",
    }
    if memory_gb is None:
        return found
    found["fits"] = found["peak_gb"] <= memory_gb
    together = max(costs.with_overhead(m.together) for m in memory)
    found["takes_turns"] = found["fits"] and together > memory_gb
    if not found["fits"]:
        overrides, left = _overrides(recipe, sizes, memory_gb, accelerated=accelerated)
        found["overrides"] = overrides
        how = f"try {' '.join(overrides)}" if overrides else "nothing in the recipe takes less"
        enough = "" if left <= memory_gb else f", which leaves {left:.1f} GB: take a smaller model"
        found["remedy"] = how + enough
    return found


def _overrides(
    recipe: Recipe, sizes: Sizes, memory_gb: float, *, accelerated: bool
) -> tuple[list[str], float]:
    """Return settings that make it fit, one after the other those that help, and the peak then."""

    def peak(changed: Recipe) -> float:
        models = find_models(changed, accelerated=accelerated)
        which = [stage for stage in _stages(changed) if stage[1] in (0, changed.rounds)]
        stages = work_of(changed, sizes, which)
        return max(costs.with_overhead(costs.memory_of(changed, s, models).alone) for s in stages)

    chosen: dict[str, Any] = {}
    now = peak(recipe)
    for key, value in LESS:
        if now <= memory_gb:
            break
        section, _, field = key.partition(".")
        if not _takes_less(getattr(getattr(recipe, section), field), value):
            continue
        own = getattr(recipe, section).model_copy(update={field: value})
        changed = recipe.model_copy(update={section: own})
        if (then := peak(changed)) < 0.99 * now:
            recipe, now, chosen[key] = changed, then, value
    return [f"{key}={str(value).lower()}" for key, value in chosen.items()], now


def _takes_less(now: Any, value: Any) -> bool:
    """Return whether a setting would be a change, and not one upwards."""
    order = ("full", "lora", "qlora")
    if now in order:
        return order.index(value) > order.index(now)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return bool(now > value if is_number else now != value)


def _remarks(recipe: Recipe, models: Sequence[Model], endpoints: dict[str, Any]) -> list[str]:
    guessed = [m.name for m in models if m.guess]
    told = f"sizes are guessed, by the names, of what is not on this machine: {', '.join(guessed)}"
    found = [told] if guessed else []
    for name, line in endpoints.items():
        own = recipe.endpoints[name]
        for field, planned in (
            ("max_requests", line["calls"]),
            ("max_tokens", line["tokens"]),
            ("max_cost", line["cost"]),
        ):
            limit = getattr(own, field)
            if limit and planned > limit:
                asked = f"{planned:,.6g}: a run may stop there"
                found.append(f"endpoints.{name}.{field} is {limit:,g}, and budgets allow {asked}")
    if recipe.model.endpoint:
        found.append(f"the policy answers at the endpoint '{recipe.model.endpoint}', not here")
    return found
