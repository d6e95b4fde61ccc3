"""What each stage of a recipe asks of its models: calls, tokens, steps. At most, by the budgets.

How much is found decides how much of a budget is used; the budgets are told. Answers count as long
as they may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfmoa import registry
from selfmoa.planning.models import INSTRUCT, POLICY
from selfmoa.stages.hunt import CANDIDATES, REPLAY_SHARE

if TYPE_CHECKING:
    from selfmoa.config import Recipe
    from selfmoa.records import Message, Prompt

    Count = Callable[[Sequence[Message]], int]

TEMPLATE = 24
"""Tokens that a chat template puts around a request, about."""
GUARD, VERDICT = 350, 16
"""Tokens of a judge's own instructions, and of its verdict, about."""
WRITER = 250
"""Tokens of an attacker's own instructions, about; it writes a request, then checks its intent."""
CHARACTERS = 4
"""Characters of a token, where the policy's tokenizer is not here to count."""


@dataclass(frozen=True)
class Sizes:
    """What a world has for this recipe: numbers of prompts, and mean tokens of each kind."""

    seeds: int
    suite: int
    probes: int
    control: int
    static: int
    reset: int
    attack_tokens: int
    harmless_tokens: int
    suite_tokens: int


@dataclass(frozen=True)
class Work:
    """Calls of one kind: to a model, each with a prompt and an answer of so many tokens.

    `model` is "policy", "instruct", or the name of a judge or attacker. `is_verdict` tells judging
    from answering; `is_exact`, that no result of the run can make them fewer.
    """

    what: str
    model: str
    calls: int
    prompt: int
    answer: int
    is_verdict: bool = False
    is_exact: bool = False


@dataclass(frozen=True)
class Steps:
    """A training: its steps, the rows that each reads, and the tokens of a row."""

    steps: int
    rows: int
    length: int
    trained_share: float
    completions: int


@dataclass(frozen=True)
class StageWork:
    """What a stage of a round does."""

    stage: str
    round: int
    works: tuple[Work, ...] = ()
    training: Steps | None = None


def measure_world(recipe: Recipe, world: Any, count: Count) -> Sizes:
    """Return how much a world has for a recipe; `count` tells the tokens of a conversation."""
    seeds, suite = world.seeds(), world.suite(recipe.evaluate.per_category)
    harmless = [p for p, _ in world.instructions(recipe.red_team.benign_prompts, 0)]
    probes = world.instructions(recipe.evaluate.probes, 1)
    static = world.static_attacks(recipe.red_team.static) if recipe.red_team.static else []
    rows = world.instructions(recipe.reset.examples, 2, recipe.reset.howto_share)
    return Sizes(
        seeds=len(seeds),
        suite=len(suite),
        probes=len(probes),
        control=len(harmless),
        static=len(static),
        reset=len(rows),
        attack_tokens=_mean(seeds, count),
        harmless_tokens=_mean(harmless or [p for p, _ in probes], count),
        suite_tokens=_mean(suite, count),
    )


def _mean(prompts: Sequence[Prompt], count: Count) -> int:
    some = prompts[:: max(1, len(prompts) // 100)]
    return math.ceil(sum(count(p.messages) for p in some) / max(1, len(some)))


def work_of(recipe: Recipe, sizes: Sizes, stages: Sequence[tuple[str, int]]) -> list[StageWork]:
    """Return what the stages of a run do, in order."""
    make = {
        "reset": _reset,
        "red_team": _red_team,
        "sample": _sample,
        "judge": _judge,
        "pair": _pair,
        "train": _train,
        "evaluate": _evaluate,
    }
    return [
        make[name](recipe, sizes, r) if name in make else StageWork(name, r) for name, r in stages
    ]


def _verdicts(recipe: Recipe, names: Sequence[str], n: int, prompt: int, **how: bool) -> list[Work]:
    """Return the verdicts of judges on n answers; those that ask no model cost no tokens."""
    works = []
    for name in names:
        own = recipe.judges.get(name)
        asks = own is not None and _backend("judge", own.kind) is not None
        read = GUARD + prompt + recipe.sample.max_new_tokens if asks else 0
        wrote = VERDICT if own and asks and _backend("judge", own.kind) != "classifier" else 0
        works.append(Work("verdicts", name, n, read, wrote, is_verdict=True, **how))
    return works


def _backend(kind: str, name: str) -> str | None:
    found: str | None = getattr(registry.resolve(kind, name), "backend", "local")
    return found


def _reset(recipe: Recipe, sizes: Sizes, round_: int) -> StageWork:
    own = recipe.reset
    if not own.enabled:
        return StageWork("reset", round_)
    answer = recipe.sample.max_new_tokens
    length = _fitting(recipe, sizes.harmless_tokens + answer)
    share = min(1.0, answer / length)
    return StageWork("reset", round_, (), Steps(own.steps, own.batch_size, length, share, 1))


def _red_team(recipe: Recipe, sizes: Sizes, round_: int) -> StageWork:
    own, answer = recipe.red_team, recipe.sample.max_new_tokens
    prompt, weak = sizes.attack_tokens, recipe.judge.safety
    works = [
        Work("control group", POLICY, sizes.control, sizes.harmless_tokens, answer, False, True)
    ]
    if own.static:
        works += [Work("static attacks", POLICY, sizes.static, prompt, answer, is_exact=True)]
        asked = sizes.static
    else:
        asked = own.calls
        replayed = min(own.batch_size, max(sizes.seeds, int(REPLAY_SHARE * own.calls)))
        replayed = min(replayed, sizes.seeds) if round_ == 1 else replayed
        chosen = min(CANDIDATES * own.max_prompts, round_ * own.calls)
        again = (own.k - 1) * (chosen + replayed)
        works += _attackers(recipe, own.calls, prompt)
        works += [
            Work("attacks", POLICY, own.calls, prompt, answer),
            Work("attacks, again", POLICY, again, prompt, answer),
        ]
        works += _verdicts(recipe, weak, again, prompt)
    checks = own.checks * asked
    careful = prompt + TEMPLATE + _words(recipe.sample.careful)
    works += [Work("false alarm checks", INSTRUCT, checks, careful, answer)] if checks else []
    works += _verdicts(recipe, [recipe.judge.refusal], checks, careful) if checks else []
    works += _verdicts(recipe, weak, sizes.control + asked, prompt)
    return StageWork("red_team", round_, tuple(works))


def _words(text: str) -> int:
    return math.ceil(len(text) / CHARACTERS)


def _attackers(recipe: Recipe, calls: int, prompt: int) -> list[Work]:
    """Return what attackers write: the calls of a round fall to all operators alike."""
    names = recipe.attackers_used()
    works = []
    for name in names:
        own = recipe.attackers.get(name)
        kind = "strategy" if name in recipe.red_team.strategies else "attack"
        if own is None or _backend(kind, own.kind) is None:
            continue
        share = math.ceil(calls / len(names))
        works.append(Work("rewrites", name, share, WRITER + prompt, prompt))
        works.append(Work("intent checks", name, share, WRITER + 2 * prompt, VERDICT))
    return works


def _attacks_handed_on(recipe: Recipe, sizes: Sizes) -> int:
    own = recipe.red_team
    return sizes.static if own.static else own.max_prompts + own.borderline_prompts


def _responses(recipe: Recipe, sizes: Sizes) -> tuple[int, int]:
    """Return how many answers a round's attacks and harmless instructions get."""
    own = recipe.sample
    harmless = min(own.k, own.k_harmless) + min(own.k_careful, own.k_harmless)
    attacks = _attacks_handed_on(recipe, sizes) * (own.k + own.k_careful)
    return attacks, sizes.control * harmless


def _sample(recipe: Recipe, sizes: Sizes, round_: int) -> StageWork:
    attacks, harmless = _responses(recipe, sizes)
    answer = recipe.sample.max_new_tokens
    return StageWork(
        "sample",
        round_,
        (
            Work("answers to attacks", POLICY, attacks, sizes.attack_tokens, answer),
            Work("answers to others", POLICY, harmless, sizes.harmless_tokens, answer, False, True),
        ),
    )


def _judge(recipe: Recipe, sizes: Sizes, round_: int) -> StageWork:
    own, n = recipe.judge, sum(_responses(recipe, sizes))
    names = (*own.safety, own.helpfulness, own.refusal)
    return StageWork("judge", round_, tuple(_verdicts(recipe, names, n, sizes.attack_tokens)))


def _pair(recipe: Recipe, sizes: Sizes, round_: int) -> StageWork:
    if recipe.pair.rule != "oracle":
        return StageWork("pair", round_)
    names = [recipe.evaluate.judges[o] for o in ("safety", "helpfulness")]
    n = sum(_responses(recipe, sizes))
    return StageWork("pair", round_, tuple(_verdicts(recipe, names, n, sizes.attack_tokens)))


def _train(recipe: Recipe, sizes: Sizes, round_: int) -> StageWork:
    own, answer = recipe.train, recipe.sample.max_new_tokens
    pairs = recipe.pair.max_pairs * (round_ if own.replay else 1)
    anchored = own.anchor_weight > 0 and recipe.pair.anchors > 0
    steps = max(1, math.ceil(own.epochs * math.ceil(pairs / own.batch_size)))
    length = _fitting(recipe, sizes.attack_tokens + 2 * answer)
    share = min(1.0, 2 * answer / length)
    rows = own.batch_size * (2 if anchored else 1)
    return StageWork("train", round_, (), Steps(steps, rows, length, share, 2))


def _fitting(recipe: Recipe, length: int) -> int:
    return min(length, recipe.policy.max_length)


def _evaluate(recipe: Recipe, sizes: Sizes, round_: int) -> StageWork:
    answer, weak = recipe.sample.max_new_tokens, recipe.judge
    phases = (2 if recipe.reset.enabled else 1) if round_ == 0 else 1
    n = phases * sizes.suite
    works = [
        Work("suite", POLICY, n, sizes.suite_tokens, answer, is_exact=True),
        Work("probes", POLICY, sizes.probes, sizes.harmless_tokens, answer, is_exact=True),
        *_verdicts(recipe, list(recipe.evaluate.judges.values()), n, sizes.suite_tokens),
        *_verdicts(recipe, weak.safety, n, sizes.suite_tokens),
        *_verdicts(recipe, [weak.refusal, weak.helpfulness], sizes.probes, sizes.harmless_tokens),
    ]
    if round_:
        again = recipe.red_team.k * min(recipe.gate.replays, round_ * recipe.red_team.calls)
        again = 0 if recipe.red_team.static else again
        works.append(Work("closed attacks", POLICY, again, sizes.attack_tokens, answer))
        works += _verdicts(recipe, weak.safety, again, sizes.attack_tokens)
    return StageWork("evaluate", round_, tuple(works))
