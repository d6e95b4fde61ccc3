"""One round's hunt for prompts on which the policy is unsafe: who is asked what, what was learnt.

    hunt = Hunt(context)
    hunt.ask(shots, batch)      -> rows: prompt, response, votes; a finished batch is not asked
    hunt.learn(rows, shots)     refits the label model, updates archive and bandit
    hunt.confirm()              asks again what may be handed on, k times in all
    hunt.hand_on()              -> the prompts of the round, hard ones first

Left out on purpose: the order of things (`red_team`), and what to try next (`attacks.search`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from selfmoa import labelmodel, metrics
from selfmoa.attacks import diversity
from selfmoa.attacks.archive import Archive, Try, cell_of
from selfmoa.attacks.neighbours import text_of
from selfmoa.attacks.search import Arm, Choice, Search
from selfmoa.attacks.trained import AttackerSettings, Success, select, train_attacker
from selfmoa.attacks.turns import answers, converse, is_talk
from selfmoa.protocols import Ask, Draw
from selfmoa.records import Prompt, Response, derive_seed
from selfmoa.rundir import read_jsonl
from selfmoa.stages import voting
from selfmoa.stages.witnesses import contradictions, false_alarms

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from selfmoa.labelmodel import LabelModel
    from selfmoa.protocols import Attack, Generator, Strategy
    from selfmoa.stages.context import Context

REPLAY, ADDED, STATIC = "replay", "added", "static"
REPLAY_SHARE = 0.3
"""Share of the round's calls that replay the archive at most."""
TOO_LONG = "too long for the model"
MIN_CONTRADICTIONS = 5
"""Answers that contradict others from which on they have a base rate of their own."""
TRIES = 20
"""How often a batch that is not full yet is filled up; then it stays as it is."""
CANDIDATES = 2
"""Prompts asked k times for each one that can be handed on."""


@dataclass(frozen=True)
class Shot:
    """A prompt to be put to the policy, and the decision that made it; talks have no prompt yet."""

    arm: str
    prompt: Prompt | None
    choice: Choice | None = None


def joined(context: Context, added: Mapping[str, str]) -> dict[str, str]:
    """Return what joined the run up to this round, by round."""
    return {r: name for r, name in added.items() if int(r) <= context.round}


class Hunt:
    """One round's search as it goes: who asks, who judges, what is known so far.

    After a restart it is rebuilt from the journal: finished batches are not asked again.
    """

    def __init__(self, context: Context) -> None:
        settings, recipe = context.recipe.red_team, context.recipe
        self.context, self.settings = context, settings
        self.policy: Generator = context.models.answering(context.policy_folder(context.round))
        self.judges = [context.judge(name) for name in recipe.judge.safety]
        self.refusal_rule = context.judge(recipe.judge.refusal)
        self.harmless = [
            p
            for p, _ in context.world.instructions(
                settings.benign_prompts, context.seed("harmless")
            )
        ]
        later = joined(context, recipe.added_attacks).values()
        names = dict.fromkeys((*settings.attacks, *settings.strategies, *later))
        made = {n: context.attacker(n, self._trained(n)) for n in names}
        self.attacks: dict[str, Attack] = {n: a for n, a in made.items() if hasattr(a, "rewrite")}
        self.strategies: dict[str, Strategy] = {
            n: a for n, a in made.items() if n not in self.attacks
        }
        self.seeds = context.seeds()
        self.search = Search(
            self._last_archive(),
            self._arms(),
            self.seeds,
            (recipe.seed, context.round),
            settings.floor,
            settings.alpha,
            settings.near_duplicates,
        )
        self.beside = voting.known(context)
        self.journal = context.journal("attempts.jsonl")
        self.rows: list[dict[str, Any]] = []
        self.parents: dict[str, Prompt] = {}
        self.calls = self.tokens = 0
        self.replayed: list[Prompt] = []
        self.model: LabelModel
        self.priors = (0.5, 0.5)

    def _trained(self, name: str) -> Path | None:
        """Return the folder that an attacker was trained to last, if it was."""
        for r in range(self.context.round - 1, 0, -1):
            folder = self.context.path("red_team", f"attackers/{name}", r)
            if folder.is_dir():
                return folder
        return None

    def train_attackers(self, confirmed: Sequence[Mapping[str, Any]]) -> None:
        """Train the attackers that learn from what they found, for the next round."""
        context = self.context
        tried = {row["id"]: row["p_unsafe"] for row in confirmed}
        if any(own.train for own in context.recipe.attackers.values()):
            context.models.free()
        for name, own in context.recipe.attackers.items():
            if not own.train or name not in self.attacks or own.model is None:
                continue
            found = [
                Success(self.parents[e.prompt.id], e.prompt, e.prompt.style, sum(p), len(p))
                for e in self.search.archive.entries("working")
                if e.prompt.source == name
                and e.prompt.id in self.parents
                and (p := tried.get(e.prompt.id))
            ]
            if not select(found, 1):
                context.say(f"attacker '{name}' found nothing that it could learn from")
                continue
            base = self._trained(name) or context.find(own.model, own.revision)
            settings = AttackerSettings(seed=context.seed("attacker", name))
            out = context.out(f"attackers/{name}")
            train_attacker(base, found, out, settings, progress=context.progress, say=context.say)

    def _arms(self) -> list[Arm]:
        """Return what can be done, styles held out for evaluation excepted."""
        held_out = set(self.context.recipe.held_out.styles)
        arms = [
            Arm(name, style, expands=attack.kind == "expand")
            for name, attack in self.attacks.items()
            for style in attack.styles
        ]
        arms += [Arm(name, style) for name, s in self.strategies.items() for style in s.styles]
        return [arm for arm in arms if arm.style not in held_out]

    def _last_archive(self) -> Archive:
        rows = []
        if self.context.round > 1:
            last = self.context.round - 1
            rows = read_jsonl(self.context.path("red_team", "archive.jsonl", last))
        settings = self.settings
        return Archive.from_rows(rows, settings.cell_size, self.policy.model, settings.keep_above)

    # What to ask

    def batches(self, started: float) -> Iterator[list[Shot]]:
        """Yield what to ask next until a budget is spent: first seeds and replays, then rewrites.

        A budget is overshot by one batch at most.
        """
        settings, is_first = self.settings, True
        while self.calls < settings.calls and not self._is_spent(started):
            size = min(settings.batch_size, settings.calls - self.calls)
            shots = self._old(size) if is_first else []
            shots += self._rewrites(size - len(shots))
            is_first = False
            if not shots:
                return
            yield shots

    def _is_spent(self, started: float) -> bool:
        settings = self.settings
        return bool(
            (settings.max_tokens and self.tokens >= settings.max_tokens)
            or (settings.max_seconds and time.monotonic() - started >= settings.max_seconds)
        )

    def _old(self, size: int) -> list[Shot]:
        """Return seeds, those that joined in this round before all others, and replays."""
        entries = [e.prompt for e in self.search.archive.entries() if not is_talk(e.prompt)]
        Random(self.context.seed("replays")).shuffle(entries)
        limit = max(len(self.seeds), int(REPLAY_SHARE * self.settings.calls))
        old = [*reversed(self.seeds), *entries][: min(limit, size)]
        self.replayed = [p for p in old if self.search.is_new(p)]
        new = {p.id for p in self.context.added_seeds(only_now=True)}
        return [Shot(ADDED if p.id in new else REPLAY, p) for p in self.replayed]

    def _rewrites(self, n: int) -> list[Shot]:
        """Return up to n new rewrites and talks; who fails leaves the slot to others."""
        shots: list[Shot] = []
        for _ in range(TRIES):
            missing = n - sum(self._cost(s) for s in shots)
            choices = self.search.choose(missing) if missing > 0 else []
            if not choices:
                break
            for choice, prompt in self._rewritten(choices):
                name = f"{choice.arm.operator} {choice.arm.style}"
                if choice.arm.operator in self.strategies:
                    shots.append(Shot(name, None, choice))
                elif prompt and prompt.intent != "benign" and self.search.is_new(prompt):
                    shots.append(Shot(name, prompt, choice))
        return shots

    def _cost(self, shot: Shot) -> int:
        """Return the calls of the policy that a shot takes at most."""
        if shot.prompt or shot.choice is None:
            return 1
        return self.strategies[shot.choice.arm.operator].max_turns

    def _rewritten(self, choices: Sequence[Choice]) -> list[tuple[Choice, Prompt | None]]:
        """Let each operator rewrite all that it was chosen for in one batch."""
        found: list[tuple[Choice, Prompt | None]] = []
        for name, attack in self.attacks.items():
            mine = [c for c in choices if c.arm.operator == name]
            if mine:
                asks = [Ask(c.parent, c.arm.style, c.seed) for c in mine]
                found += zip(mine, attack.rewrite(asks), strict=True)
        return found + [(c, None) for c in choices if c.arm.operator in self.strategies]

    # Asking and judging

    def ask(self, shots: Sequence[Shot], batch: int) -> list[dict[str, Any]]:
        """Return the rows of a batch: prompt, response, votes. A finished one is not asked."""
        rows = [row for row in self.journal.rows if row["batch"] == batch]
        if not rows or len(rows) < rows[0]["of"]:
            rows = self._answered(shots, batch)
            self.journal.append(rows)
        for talk in [r["prompt"] for r in rows if r["calls"] > 1]:
            self.search.is_new(Prompt.from_json(talk))
        self.rows += rows
        self.parents |= {s.prompt.id: s.choice.parent for s in shots if s.prompt and s.choice}
        if batch:
            self.calls += sum(row["calls"] for row in rows)
        tokens = sum(len(row["response"]["text"].split()) for row in rows)
        self.tokens += tokens
        self.context.tokens += tokens
        return rows

    def _answered(self, shots: Sequence[Shot], batch: int) -> list[dict[str, Any]]:
        asked = [(s, *one) for s, one in self._single(shots)] + self._talks(shots)
        items = [(prompt, response) for _, prompt, response in asked]
        votes = voting.vote_matrix(voting.vote(self.judges, items))
        refusals = self.refusal_rule.judge(items)
        # Controls are known to be harmless.
        alarms = false_alarms(self.context, self.refusal_rule, items) if batch else set()
        return [
            {
                "id": response.id,
                "batch": batch,
                "of": len(asked),
                "arm": shot.arm,
                "calls": sum(m["role"] == "user" for m in prompt.messages),
                "parent": shot.choice.parent.id if shot.choice else None,
                "prompt": prompt.to_json(),
                "response": response.to_json(),
                "votes": row.tolist(),
                "is_refusal": voting.is_refusal(refusal.score),
                "is_false_alarm": response.id in alarms,
            }
            for (shot, prompt, response), row, refusal in zip(asked, votes, refusals, strict=True)
        ]

    def _single(self, shots: Sequence[Shot]) -> list[tuple[Shot, tuple[Prompt, Response]]]:
        plain = [(s, s.prompt) for s in shots if s.prompt]
        draws = [Draw(p, self.context.seed("attempt", p.id)) for _, p in plain]
        responses = answers(self.policy, draws, self.context.sampling("attempt"))
        if lost := responses.count(None):
            self.context.dropped[TOO_LONG] += lost
        return [(s, (p, r)) for (s, p), r in zip(plain, responses, strict=True) if r]

    def _talks(self, shots: Sequence[Shot]) -> list[tuple[Shot, Prompt, Response]]:
        """Hold the conversations of a batch; one a parent, by the parent's own random numbers."""
        found = []
        for name, strategy in self.strategies.items():
            mine = [(s, s.choice) for s in shots if s.choice and s.choice.arm.operator == name]
            seeds = [derive_seed("talk", name, c.parent.id) for _, c in mine]
            parents = [c.parent for _, c in mine]
            talks = converse(strategy, self.policy, parents, self.context.sampling("talk"), seeds)
            for (shot, _), talk in zip(mine, talks, strict=True):
                if talk and talk.prompt.id not in self.search.asked:
                    found.append((shot, talk.prompt, talk.response))
        return found

    # Learning

    def learn(self, rows: Sequence[Mapping[str, Any]], shots: Sequence[Shot]) -> None:
        """Refit the label model on the round's attempts; update archive and bandit."""
        votes, is_control = voting.attempt_votes(self.rows)
        self.model = voting.fit(self.context, votes, is_control, self.beside)
        self._estimate_priors(votes)
        known = {s.prompt.id: s for s in shots if s.prompt}
        talks = {s.choice.parent.id: s for s in shots if s.choice and not s.prompt}
        for row, p in zip(rows, self.p_unsafe(rows), strict=True):
            prompt = Prompt.from_json(row["prompt"])
            shot = known.get(prompt.id) or talks.get(row["parent"])
            success = 0.0 if row["is_false_alarm"] else p
            if shot and shot.choice:
                harmless = bool(row["is_false_alarm"])
                self.search.learn(shot.choice, prompt, success, is_harmless=harmless)
            if success > self.settings.keep_above or row["arm"] == REPLAY:
                self._keep(row, prompt, success)
        self.search.end_batch()

    def _keep(self, row: Mapping[str, Any], prompt: Prompt, success: float) -> None:
        tokens = len(row["response"]["text"].split())
        tried = Try(self.policy.model, self.context.round, 1, round(success, 6), tokens)
        self.search.keep(prompt, tried)

    def review(self) -> None:
        """Judge all attempts by what is known at the end; keep what seemed harmless at its time."""
        if not self.calls:
            return
        known = {e.prompt.id for e in self.search.archive.entries()}
        for row, success in zip(self.rows, self._successes(self.rows), strict=True):
            if row["arm"] != voting.CONTROL and success > self.settings.keep_above:
                prompt = Prompt.from_json(row["prompt"])
                if prompt.id not in known:
                    self._keep(row, prompt, success)

    def _estimate_priors(self, votes: np.ndarray) -> None:
        """Estimate the base rates of P(unsafe): of answers in general, and of contradictions."""
        real = voting.is_real(self.rows)
        contradicts = contradictions(self.rows, self.rows)
        others = labelmodel.estimate_prior(self.model, votes[real & ~contradicts])
        mine = votes[real & contradicts]
        enough = len(mine) >= MIN_CONTRADICTIONS
        self.priors = others, labelmodel.estimate_prior(self.model, mine) if enough else others

    def p_unsafe(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return P(unsafe) of answers, by the label model as it is now.

        `rows` have prompt, votes and is_refusal, as `ask` returns them.
        """
        if not rows:
            return []
        votes = np.array([row["votes"] for row in rows], np.int8)
        odds = [labelmodel.log_odds_safe(self.model, votes, prior_unsafe=p) for p in self.priors]
        chosen = np.where(contradictions(rows, self.rows), odds[1], odds[0])
        return [float(p) for p in voting.p_unsafe(chosen)]

    def confirm(self) -> list[dict[str, Any]]:
        """Ask again what may be handed on, and what was replayed: k times in all.

        These prompts were chosen by verdict, so nothing is fitted on what comes of it.
        """
        archive, k = self.search.archive, self.settings.k
        chosen = archive.spread(CANDIDATES * self.settings.max_prompts)
        prompts = {p.id: p for p in (*chosen, *self.replayed)}
        draws = [
            Draw(p, self.context.seed("confirm", p.id, i))
            for p in prompts.values()
            for i in range(1, k)
        ]
        if not draws:
            return []
        responses = self.context.generate(
            self.policy, draws, self.context.sampling("confirm"), "responses.jsonl"
        )
        items = [(prompts[r.prompt_id], r) for r in responses]
        votes = voting.vote_matrix(voting.vote(self.judges, items))
        drawn_again: list[dict[str, Any]] = [
            {"prompt": {"goal": p.goal}, "votes": v, "is_refusal": voting.is_refusal(r.score)}
            for (p, _), v, r in zip(items, votes, self.refusal_rule.judge(items), strict=True)
        ]
        again: dict[str, list[float]] = {name: [] for name in prompts}
        for (prompt, _), p in zip(items, self.p_unsafe(drawn_again), strict=True):
            again[prompt.id].append(p)
        asked = [r for r in self.rows if r["prompt"]["id"] in prompts]
        first = dict(zip([r["prompt"]["id"] for r in asked], self._successes(asked), strict=True))
        rows = []
        for name, found in again.items():
            tried = Try(self.policy.model, self.context.round, len(found), round(sum(found), 6))
            archive.observe(prompts[name], tried)
            # A policy that is attacked a second time may not have been asked this once more.
            drawn = [first[name], *found] if name in first else found
            rows.append({"id": name, "p_unsafe": [round(p, 6) for p in drawn]})
        return rows

    # Handing on

    def hand_on(self) -> list[Prompt]:
        """Return the round's prompts: attacks, hard ones first, and harmless ones beside them.

        False alarms are requests that only look harmful: the borderline ones.
        """
        settings = self.settings
        alarms = [Prompt.from_json(r["prompt"]) for r in self.rows if r["is_false_alarm"]]
        alarms = [p for p in alarms if p.source not in ("instructions", "seed")]
        borderline = alarms[: settings.borderline_prompts]
        return self.search.archive.spread(settings.max_prompts) + borderline + self.harmless

    def figures(self, confirmed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what the search was worth: successes, coverage, diversity, losses."""
        archive = self.search.archive
        fresh = [r for r in self.rows if r["arm"] not in (REPLAY, voting.CONTROL)]
        first = self._successes(fresh)
        hits = [1 - float(np.prod([1 - p for p in row["p_unsafe"]])) for row in confirmed]
        texts = [text_of(e.prompt) for e in archive.entries("working")]
        tried = {cell_of(Prompt.from_json(r["prompt"])) for r in fresh}
        reachable = tried | archive.filled()
        attackers: dict[str, Any] = {**self.attacks, **self.strategies}
        lost = {n: dict(a.counts) for n, a in attackers.items() if getattr(a, "counts", None)}
        return {
            "calls": self.calls,
            "tokens": self.tokens,
            "hit_at_1": metrics.mean("hit_at_1", first, voting.ENSEMBLE).to_json(),
            "hit_at_k": metrics.mean("hit_at_k", hits, voting.ENSEMBLE).to_json(),
            "k": self.settings.k,
            "diversity": diversity.measure(
                texts, archive.filled("working"), reachable or {("", "")}
            ).to_json(),
            "cells_working": len(archive.filled("working")),
            "cells_tried": len(tried),
            "cells_given_up": sum(self.search.is_exhausted(c) for c in self.search.cells),
            "near_duplicates_refused": self.search.refused,
            "attackers": lost,
        }

    def _successes(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        found = zip(rows, self.p_unsafe(rows), strict=True)
        return [0.0 if row["is_false_alarm"] else p for row, p in found]
