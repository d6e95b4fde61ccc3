"""What a stage is given: the recipe, the world, its folder, policies to talk to, and a listener.

This is the only place where stages touch the run directory's order: a stage asks for "the votes
of this round" and gets a path, never a folder name.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Protocol

from selfmoa import registry
from selfmoa.attacks.turns import hold_again
from selfmoa.errors import MissingFile, RecipeError, RunDamaged
from selfmoa.judges.cache import cached
from selfmoa.protocols import Sampling
from selfmoa.records import Prompt, Response, content_id, derive_seed
from selfmoa.rundir import (
    Journal,
    RunDir,
    digest_file,
    kill_scope,
    read_jsonl,
    write_atomic,
    write_jsonl,
)
from selfmoa.rundir.stage import pretty_json
from selfmoa.stages.models import Models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from selfmoa.config import Attacker, JudgeModel, Recipe
    from selfmoa.protocols import Draw, Generator, Judge, Stage, Strategy
    from selfmoa.records import Record, StageRecord


class Listener(Protocol):
    """Hears what happens: the console draws it, the run directory notes it."""

    def __call__(self, event: str, /, **facts: Any) -> None:
        """Take one event."""


PACKAGES = ("selfmoa", "torch", "transformers", "peft", "numpy")


def installed_versions() -> dict[str, str]:
    """Return the versions that can change a result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def attacker_kind(name: str) -> str:
    """Return the kind of plug-in that an attacker is: "strategy" if it talks, else "attack"."""
    return "strategy" if name in registry.names("strategy") else "attack"


def _is_policy(folder: Path) -> bool:
    return any(folder.glob("*config.json"))


class Context:
    """One run as its stages see it. `at(stage, round)` moves it on."""

    def __init__(self, recipe: Recipe, run: RunDir, listen: Listener) -> None:
        self.recipe = recipe
        self.run = run
        self.listen = listen
        self.world: Any = registry.resolve("world", recipe.policy.world)(recipe)
        self.models = Models(recipe)
        self._judges: dict[str, Judge] = {}
        self.stage = ""
        self.round = 0
        self.dropped: Counter[str] = Counter()
        self.tokens = 0

    # Where things are

    @cached_property
    def instruct_folder(self) -> Path:
        """The instruct model; the world builds it on first use."""
        folder: Path = self.world.build(
            lambda done, total, unit: self.listen(
                "building", what="instruct model", done=done, total=total, unit=unit
            )
        )
        if self.recipe.model.name is not None:
            self._note(self.recipe.model.name, folder)
        return folder

    @property
    def instruct(self) -> Generator:
        """The instruct model as a generator."""
        found: Generator = self.models.load(self.instruct_folder)
        return found

    def path(self, stage: str, name: str, round_: int | None = None) -> Path:
        """Return a file of a stage of this round, or of `round_`."""
        return self.run.folder(stage, self.round if round_ is None else round_) / name

    def out(self, name: str) -> Path:
        """Return a file of the stage that is running."""
        return self.path(self.stage, name)

    @property
    def reset_folder(self) -> Path:
        """The policy that the rounds start from.

        Raises:
            MissingFile: it was deleted when the run ended.
        """
        if not self.recipe.reset.enabled:
            return self.instruct_folder
        folder = self.path("reset", "policy", 0)
        if not _is_policy(folder):
            raise MissingFile(
                folder,
                "policy",
                "a reset policy is deleted when its run ends: start again with --redo reset, and "
                "set reset.keep=true to extend a run later",
            )
        return folder

    def restore_reset(self) -> None:
        """Make the reset policy again, which was deleted when the run ended; it is the same one.

        It goes when this run ends, or when a crashed one is next opened.

        Raises:
            RunDamaged: what was made again is not what was sealed.
        """
        seal = self.run.sealed("reset", 0)
        if not self.recipe.reset.enabled or seal is None:
            return
        folder = self.path("reset", "policy", 0)
        if _is_policy(folder):
            return
        self.stage, self.round = "reset", 0
        self.listen("stage_started", stage="reset", round=0)
        with kill_scope("reset"):
            registry.resolve("stage", "reset")().run(self)
        for name, digest in seal.outputs.items():
            if digest_file(folder.parent / name) != digest:
                raise RunDamaged(folder.parent / name, "was made again and came out other", "reset")

    def seeds(self) -> list[Prompt]:
        """Return the prompts that every search starts from: the world's, and those added since.

        The share `held_out.seed_share` of them is left out, by the seed of the recipe.
        """
        share = self.recipe.held_out.seed_share
        found: list[Prompt] = [*self.world.seeds(), *self.added_seeds()]
        kept = [
            p for p in found if derive_seed(self.recipe.seed, "held out", p.id) >= share * 2**63
        ]
        if not kept:
            raise RecipeError("held_out.seed_share", "no seed is left to begin a search with")
        return kept

    def added_seeds(self, *, only_now: bool = False) -> list[Prompt]:
        """Return the attacks that joined the run up to this round, or those of this round alone."""
        files = {int(r): file for r, file in self.recipe.added_seeds.items()}
        return [
            prompt
            for r in sorted(files)
            if r == self.round or (r < self.round and not only_now)
            for prompt in read_jsonl(self.run.path / files[r], Prompt)
        ]

    @property
    def start_phase(self) -> str:
        """Name of the phase that the rounds start from."""
        return "reset" if self.recipe.reset.enabled else "instruct"

    def accepted_rounds(self, before: int) -> list[int]:
        """Return the rounds before `before` whose policy the gate accepted."""
        return [r for r in range(1, before) if self.decision(r)["accepted"]]

    def decision(self, round_: int) -> dict[str, Any]:
        """Return what the gate said of a round."""
        rows = read_jsonl(self.path("evaluate", "decision.jsonl", round_))
        return dict(rows[0])

    def measured(self, round_: int) -> dict[str, dict[str, Any]]:
        """Return the estimates of a round's evaluation by phase and name."""
        found: dict[str, dict[str, Any]] = json.loads(
            self.path("evaluate", "metrics.json", round_).read_text()
        )
        return found

    def evidence(self, phase: str) -> list[dict[str, Any]]:
        """Return the graded answers of a phase: "instruct", "reset" or "round 2"."""
        round_ = int(phase.split()[1]) if phase.startswith("round") else 0
        return read_jsonl(
            self.path("evaluate", f"evidence-{phase.replace(' ', '-')}.jsonl", round_)
        )

    def policy_folder(self, before: int) -> Path:
        """Return the policy that round `before` attacks: the last accepted one, or the reset's."""
        accepted = self.accepted_rounds(before)
        return self.path("train", "policy", accepted[-1]) if accepted else self.reset_folder

    # Doing the work

    def gather(self) -> None:
        """Find all models, and build all judges and attackers; no weights are read yet.

        What is missing is told before any work is done, not when it is first asked.
        """
        recipe = self.recipe
        if recipe.model.endpoint is None:
            _ = self.instruct
        for name in recipe.judges_used():
            self.judge(name)
        for name in (*recipe.attackers_used(), *recipe.added_attacks.values()):
            self.attacker(name)

    def refuse_changed(self, stage: Stage, name: str, round_: int) -> None:
        """Refuse other settings than those the work on disk has, before anything is built.

        Raises:
            RunChanged: a setting differs; it is named.
        """
        self.stage, self.round = name, round_
        if made_of := self.run.made_of(name, round_):
            settings = dict(stage.settings(self))
            self.run.check(name, round_, stage.version, settings, made_of.inputs)

    def do(self, stage: Stage, name: str, round_: int) -> StageRecord:
        """Run a stage unless it is sealed; seal it. Returns its record.

        Raises:
            RunChanged: it is sealed, or begun, with other settings or inputs.
        """
        self.stage, self.round = name, round_
        self.dropped, self.tokens = Counter(), 0
        settings, inputs = dict(stage.settings(self)), self._digests(stage)
        made_of = (name, round_, stage.version, settings, inputs)
        sealed = self.run.check(*made_of)
        record = sealed or self._work(stage, name, round_, made_of)
        self.listen(
            "stage_done",
            stage=name,
            round=round_,
            seconds=record.seconds,
            skipped=sealed is not None,
            note="",
        )
        return record

    def _work(self, stage: Stage, name: str, round_: int, made_of: tuple[Any, ...]) -> StageRecord:
        self.listen("stage_started", stage=name, round=round_)
        started = time.monotonic()
        self.run.begin(*made_of)
        with kill_scope(name):
            stage.run(self)
            return self.run.seal(
                *made_of,
                dropped=dict(self.dropped),
                seconds=round(time.monotonic() - started, 3),
                tokens=self.tokens,
            )

    def _digests(self, stage: Stage) -> dict[str, str]:
        """Return a digest of every sealed stage this one reads; the instruct model is one too."""
        found = {}
        for key, (name, round_) in dict(stage.reads(self)).items():
            record = self.run.sealed(name, round_)
            outputs = record.outputs if record else {}
            found[key] = content_id(outputs, length=32)
        found["instruct"] = self.models.digest(self.instruct_folder)
        # A world of the user's own files says what they hold.
        found |= getattr(self.world, "digest", {})
        return found

    # Small conveniences, so that stages read like their method

    def progress(self, done: int, total: int, unit: str) -> None:
        """Tell the listener how far the running stage is."""
        self.listen(
            "progress",
            stage=self.stage,
            round=self.round,
            done=done,
            total=total,
            unit=unit,
            note="",
        )

    def say(self, text: str) -> None:
        """Tell the listener what somebody may want to know of the running stage."""
        self.listen("remark", stage=self.stage, round=self.round, text=text)

    def write_log(self, log: Sequence[Mapping[str, Any]]) -> None:
        """Write the steps of a training, without what only the clock says: runs are compared."""
        rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in log]
        self.write("train.jsonl", rows)

    def seed(self, *key: Any) -> int:
        """Derive a seed from the run's seed, the stage, the round and a key."""
        return derive_seed(self.recipe.seed, self.stage, self.round, *key)

    def journal(self, name: str, key: Callable[[dict[str, Any]], str] | str = "id") -> Journal:
        """Open an append-only file of the running stage."""
        return Journal(self.out(name), key)

    def write(self, name: str, rows: Iterable[Record | Mapping[str, Any]]) -> None:
        """Write a whole JSONL file of the running stage."""
        write_jsonl(self.out(name), rows)

    def write_text(self, name: str, text: str) -> None:
        """Write a whole text file of the running stage."""
        write_atomic(self.out(name), text)

    def judge(self, name: str) -> Judge:
        """Return a judge by name: one of the recipe's own, or a plug-in with the instruct model.

        Verdicts of judges that ask a model are kept on this machine (`judges.cache`).
        """
        if name not in self._judges:
            own = self.recipe.judges.get(name)
            self._judges[name] = self._own_judge(name, own) if own else self._plain_judge(name)
        return self._judges[name]

    def judging(self, *gold: str | None) -> dict[str, Any]:
        """Return the settings that verdicts depend on, with the digests of labelled files."""
        found: dict[str, Any] = {"judge": self.recipe.judge.model_dump()}
        if self.recipe.judges:
            found["judges"] = {k: j.model_dump() for k, j in self.recipe.judges.items()}
        files = [file for file in gold if file is not None]
        return found | ({"files": {f: digest_file(f) for f in files}} if files else {})

    def _plain_judge(self, name: str) -> Judge:
        found: Judge = registry.resolve("judge", name)(self.world, self.instruct)
        return found

    def _own_judge(self, name: str, settings: JudgeModel) -> Judge:
        factory = registry.resolve("judge", settings.kind)
        model = self._model_of(factory, settings)
        family = {"family": settings.family} if settings.family else {}
        judge: Judge = factory(self.world, model, name=name, **family, **settings.options)
        return cached(judge)

    def attacker(self, name: str, weights: Path | None = None) -> Any:
        """Return an operator or strategy by name: one of the recipe's own, or a plug-in.

        `weights` stand in for its model: those that it was trained to.
        """
        own = self.recipe.attackers.get(name)
        kind = own.kind if own else name
        factory = registry.resolve(attacker_kind(kind), kind)
        model = self.models.load(weights) if weights else self._model_of(factory, own)
        options = {"name": name, **own.options} if own else {}
        return factory(self.world, model, **options)

    def _model_of(self, factory: Any, settings: JudgeModel | Attacker | None) -> Any:
        """Return the model that a plug-in asks: its own, or the instruct model."""
        backend = getattr(factory, "backend", "local")
        if backend is None:
            return None
        if settings is None or settings.model is None:
            return self.instruct
        if settings.endpoint is not None:
            return self.models.serve(settings.endpoint, settings.model)
        return self.models.load(self.find(settings.model, settings.revision), backend)

    def find(self, name: str, revision: str | None = None) -> Path:
        """Return the folder of a model, and note in the run what it is."""
        from selfmoa.training.policy import find_model

        folder = find_model(name, revision)
        self._note(name, folder)
        return folder

    def _note(self, name: str, folder: Path) -> None:
        """Write down commit and digests of a model, once: `models.json` says what a run is made of.

        A context that only looks writes nothing.
        """
        from selfmoa.training.intake import provenance

        if not self.run.is_open:
            return
        path = self.run.path / "models.json"
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if name not in known:
            write_atomic(path, pretty_json(known | {name: provenance(folder)}))

    def sampling(
        self, name: str, *, system: str | None = None, temperature: float | None = None
    ) -> Sampling:
        """Return how the policy is drawn from: as the recipe samples, if nothing else is said."""
        sample, template = self.recipe.sample, self.recipe.model.template
        warmth = sample.temperature if temperature is None else temperature
        return Sampling(name, warmth, sample.max_new_tokens, system, template or None)

    def talk_again(
        self, target: Generator, talks: Sequence[Prompt], sampling: Sampling, k: int
    ) -> list[tuple[str, Prompt, Response]]:
        """Hold conversations anew, k times each, all of a strategy together.

        Returns:
            (id of the old conversation, the new one, the answer to it); nothing of those whose
            strategy is not there.
        """
        found: list[tuple[str, Prompt, Response]] = []
        for source in dict.fromkeys(talk.source for talk in talks):
            mine = [talk for talk in talks if talk.source == source]
            strategy = self.strategy_of(source)
            if strategy is None:
                continue
            mine = [talk for talk in mine if talk.style in strategy.styles]
            held = hold_again(strategy, target, mine, sampling, k)
            found += [
                (old.id, new.prompt, new.response)
                for old, again in zip(mine, held, strict=True)
                for new in again
                if new
            ]
        return found

    def strategy_of(self, name: str) -> Strategy | None:
        """Return the strategy of this name, or None where there is none."""
        own = self.recipe.attackers.get(name)
        if attacker_kind(own.kind if own else name) != "strategy":
            return None
        strategy: Strategy = self.attacker(name)
        return strategy

    def generate(
        self, generator: Generator, draws: Sequence[Draw], sampling: Sampling, file: str
    ) -> list[Response]:
        """Answer draws in fixed batches, journal each batch, skip those that are there.

        A batch that was cut in the middle is drawn again as a whole: the same rows in the same
        shape round the same way, so a resumed run writes the same bytes.
        """
        journal = self.journal(file)
        size = self.recipe.sample.batch_size
        # The answers to a prompt side by side: it is read once for those in a batch.
        ordered = sorted(
            draws,
            key=lambda d: (len(d.prompt.messages[-1]["content"].split()), d.prompt.id, d.seed),
        )
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            ids = [
                Response.make_id(d.prompt.id, generator.model, sampling.name, d.seed) for d in batch
            ]
            if not all(i in journal.keys for i in ids):
                responses = generator.generate(batch, sampling)
                self.tokens += sum(len(r.text.split()) for r in responses)
                journal.append(responses)
            self.progress(min(start + size, len(ordered)), len(ordered), "response")
        return [Response.from_json(row) for row in journal.rows]

    # The end of a run

    def why_stop(self, round_: int) -> str | None:
        """Return why the loop ends after this round, or None. Weak judges only, never grades.

        A round that new attacks joined is always reached.
        """
        if any(int(r) > round_ for r in (*self.recipe.added_seeds, *self.recipe.added_attacks)):
            return None
        gate, decision = self.recipe.gate, self.decision(round_)
        if decision["found_share"] < gate.min_found:
            return (
                "the red team finds too little to learn from: "
                f"{decision['found_share']:.1%} of its attempts are unsafe by the weak judges "
                f"(gate.min_found is {gate.min_found:.1%})"
            )
        refused = [not self.decision(r)["accepted"] for r in range(1, round_ + 1)]
        if len(refused) >= gate.patience and all(refused[-gate.patience :]):
            return f"the gate refused {gate.patience} rounds in a row: {decision['reason']}"
        return "all rounds are done" if round_ == self.recipe.rounds else None

    def quarantine_reset(self) -> None:
        """Delete the reset policy, unless the recipe keeps it; its stage stays sealed."""
        seal = self.run.sealed("reset", 0)
        is_there = _is_policy(self.path("reset", "policy", 0))
        if seal and is_there and not self.recipe.reset.keep:
            self.run.delete_outputs("reset", 0, ["policy"])

    def summary(self) -> dict[str, Any]:
        """Return report/summary.json."""
        found: dict[str, Any] = json.loads(self.path("report", "summary.json", 0).read_text())
        return found
