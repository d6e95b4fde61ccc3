"""The world of a real model: the recipe names the instruct model, the user's files have prompts.

    seeds ----------- train ----> red team          instructions -- train --> reset, control group,
        |                                               |                     anchors, probes
        +-- held out --> suite: harmful                 +-- held out --> suite: harmless

What is held out is told by a hash of the request, so that its rewrites are on the same side; what
nearly repeats a request of training is left out of the suite. Files of a suite of its own
(`data.suite`, `data.harmless`) are taken whole, and refused where they overlap with training.
Everything is read when the world is made: a bad row is told before hours are spent.
"""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from selfmoa.attacks.interop import read_attacks
from selfmoa.attacks.leakage import leaks, refuse_leaks
from selfmoa.attacks.operators import Rewrites, refuse_unknown
from selfmoa.attacks.taxonomy import PLAIN
from selfmoa.errors import MissingFile, RecipeError
from selfmoa.protocols import Ask
from selfmoa.records import Prompt, derive_seed
from selfmoa.rundir import digest_file
from selfmoa.suites.instructions import BENIGN, LEGIT, Instruction, read_instructions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from selfmoa.config import Recipe
    from selfmoa.protocols import Progress
    from selfmoa.records import Split

SUITE, SEED, STATIC = "suite", "seed", "static"
HOW_TO = re.compile(
    r"^\W*(?:please |kindly )*how (?:do|to|can|could|would|should)\b", re.IGNORECASE
)


class Files:
    """A model and data of the user's own.

    `heldout_styles` are styles of attack that only the suite asks in; `digest` names what the
    files say.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Read the files.

        Raises:
            BadInput: a row cannot be used; names file, row and field.
            MissingFile, CannotRead: a file cannot be read.
            RecipeError: the files do not suffice, or a style is not known.
            LeakFound: a suite of its own overlaps with what is trained on.
        """
        self.refuse_unworkable(recipe)
        data = recipe.data
        self.recipe, self.seed = recipe, recipe.seed
        self.heldout_styles = recipe.held_out.styles
        styles = [s for s in (*data.styles, *self.heldout_styles) if s != PLAIN]
        refuse_unknown("data.styles, held_out.styles", styles)
        files = [*data.seeds, *data.instructions, *data.suite, *data.harmless]
        for name in files:
            if not Path(name).is_file():
                raise MissingFile(
                    name, "file of data", "paths are taken from the folder that you are in"
                )
        self.digest = {name: digest_file(Path(name)) for name in files}
        self.threshold = recipe.held_out.near_duplicate
        self.attacked, self.graded = self._goals()
        self.harmless, self.graded_harmless = self._instructions()
        self._check()

    @staticmethod
    def refuse_unworkable(recipe: Recipe) -> None:
        """Refuse a recipe that names no model or data, as the shipped ones do not.

        Raises:
            RecipeError: says what is missing.
        """
        wanted = {
            "model.name": recipe.model.name,
            "data.seeds": recipe.data.seeds,
            "data.instructions": recipe.data.instructions,
        }
        if missing := [key for key, value in wanted.items() if not value]:
            raise RecipeError(
                f"recipe '{recipe.name}'",
                f"it needs {', '.join(missing)}: name your own, as in data.seeds=[FILE], or have "
                "`selfmoa init` write a recipe",
            )

    # What the stages ask for

    def build(self, progress: Progress) -> Path:  # noqa: ARG002 - it is only found
        """Return the folder of the instruct model."""
        from selfmoa.training.policy import find_model

        return find_model(str(self.recipe.model.name), self.recipe.model.revision)

    def style_group(self, style: str) -> str:
        """Return the column of the heat map that a style belongs to: its own."""
        return style

    def seeds(self) -> list[Prompt]:
        """Return the requests that every search starts from."""
        return list(self.attacked)

    def static_attacks(self, n: int) -> list[Prompt]:
        """Return a fixed set of the requests in the styles of training, as a labelled set has."""
        found = _dressed(self.attacked, self._styles("train"), STATIC, self.seed)
        Random(f"static-{self.seed}").shuffle(found)
        return found[:n]

    def instructions(self, n: int, seed: int, howto_share: float = 0.0) -> list[tuple[Prompt, str]]:
        """Return n harmless instructions at most, with their answers, or "" where there is none.

        That share of them asks how to do something, as far as there are enough such.
        """
        rng = Random(f"instructions-{self.seed}-{seed}")
        pool = rng.sample(self.harmless, len(self.harmless))
        howto = [i for i in pool if HOW_TO.match(i.goal)][: round(n * howto_share)]
        taken = {i.goal for i in howto}
        chosen = howto + [i for i in pool if i.goal not in taken][: n - len(howto)]
        return [
            (i.prompt("instruction", "train"), i.answer) for i in rng.sample(chosen, len(chosen))
        ]

    def suite(self, per_category: int) -> list[Prompt]:
        """Return what is graded on: each category has that many prompts at most.

        Harmful requests keep their category; harmless ones are "legit" where they only look
        harmful, else "benign". Within a category requests take turns, and so do styles: however
        few prompts there are, held-out styles have their share of them.
        """
        categories: defaultdict[str, list[Prompt]] = defaultdict(list)
        for prompt in (*self.graded, *self.graded_harmless):
            categories[prompt.category].append(prompt)
        found: dict[str, Prompt] = {}
        for nth, prompts in enumerate(categories.values()):
            distinct = {p.id: p for p in self._in_turns(prompts, nth) if p.id not in found}
            found |= dict(islice(distinct.items(), per_category))
        return list(found.values())

    def _in_turns(self, prompts: Sequence[Prompt], first: int) -> list[Prompt]:
        """Return requests in every style of the suite, all once before any a second time.

        The first request begins with the style of the number `first`, the next one with the next.
        """
        styles = self._styles("heldout")
        dressed = [_dress(prompts, style, SUITE, self.seed) for style in styles]
        return [
            prompt
            for turn in range(len(styles))
            for i in range(len(prompts))
            if (prompt := dressed[(first + turn + i) % len(styles)][i])
        ]

    # Reading and splitting

    def _styles(self, split: Split) -> list[str]:
        chosen = [s for s in self.recipe.data.styles if s not in self.heldout_styles]
        return [*chosen, *(self.heldout_styles if split == "heldout" else ())]

    def _is_heldout(self, goal: str) -> bool:
        return derive_seed("held out", goal) < self.recipe.data.held_out * 2**63

    def _goals(self) -> tuple[list[Prompt], list[Prompt]]:
        """Return the harmful requests to attack with, and those to grade on."""
        data = self.recipe.data
        seeds, suite = _requests(data.seeds), _requests(data.suite)
        if suite:
            train = [_put(p, "train") for p in seeds]
            held = [_put(p, "heldout") for p in suite]
            refuse_leaks(leaks(train, held, threshold=self.threshold))
            return train, held
        train = [_put(p, "train") for p in seeds if not self._is_heldout(p.goal)]
        held = [_put(p, "heldout") for p in seeds if self._is_heldout(p.goal)]
        return train, self._unseen(train, held)

    def _instructions(self) -> tuple[list[Instruction], list[Prompt]]:
        """Return the harmless instructions of training, and the prompts to grade on."""
        data = self.recipe.data
        train, held = _read(data.instructions), _read(data.harmless)
        if not held:
            held = [i for i in train if self._is_heldout(i.goal)]
            train = [i for i in train if not self._is_heldout(i.goal)]
        prompts = [i.prompt(LEGIT if i.looks_harmful else BENIGN, "heldout") for i in held]
        seen = [i.prompt("instruction", "train") for i in train]
        return train, self._unseen(seen, prompts)

    def _unseen(self, train: Sequence[Prompt], held: Sequence[Prompt]) -> list[Prompt]:
        seen = {leak.heldout_id for leak in leaks(train, held, threshold=self.threshold)}
        return [p for p in held if p.id not in seen]

    def _check(self) -> None:
        data = self.recipe.data
        for key, found, what in (
            ("data.seeds", self.attacked, "harmful request to attack with"),
            ("data.suite", self.graded, "harmful request to grade on"),
            ("data.instructions", self.harmless, "harmless instruction to train on"),
            ("data.harmless", self.graded_harmless, "harmless request to grade on"),
        ):
            if not found:
                raise RecipeError(
                    key, f"there is no {what}; {data.held_out:.0%} are held out of what is given"
                )
        if self.recipe.reset.enabled and not any(i.answer for i in self.harmless):
            raise RecipeError(
                "data.instructions",
                "no instruction has an answer, and reset learns from answers: name a file that has "
                "them, or set reset.enabled=false",
            )


def _requests(files: Sequence[str]) -> list[Prompt]:
    """Return the attacks of some files, each prompt once."""
    found = [entry.prompt for name in files for entry in read_attacks(Path(name)).entries]
    return list({p.id: p for p in found}.values())


def _read(files: Sequence[str]) -> list[Instruction]:
    found = [one for name in files for one in read_instructions(Path(name))[0]]
    return list({one.goal: one for one in found}.values())


def _put(prompt: Prompt, split: Split) -> Prompt:
    """Return a request on a side of the split, as a seed without history."""
    return Prompt.make(
        prompt.messages,
        goal=prompt.goal,
        intent=prompt.intent,
        category=prompt.category,
        style=prompt.style,
        source=SEED if split == "train" else SUITE,
        split=split,
    )


def _dressed(
    prompts: Sequence[Prompt], styles: Sequence[str], source: str, seed: int
) -> list[Prompt]:
    """Return the requests in every style, style by style."""
    return [p for style in styles for p in _dress(prompts, style, source, seed) if p]


def _dress(prompts: Sequence[Prompt], style: str, source: str, seed: int) -> list[Prompt | None]:
    """Return each request in a style, or None where it has none; plain is as the file has it.

    What comes in a style of its own stays in it.
    """
    if style == PLAIN:
        return list(prompts)
    bare = [p for p in prompts if p.style == PLAIN and len(p.messages) == 1]
    asks = [Ask(p, style, derive_seed(seed, source, style, p.id)) for p in bare]
    rewrites = dict(zip([p.id for p in bare], Rewrites(name=source).rewrite(asks), strict=True))
    return [rewrites.get(p.id) for p in prompts]
