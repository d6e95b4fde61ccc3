"""The first recipe of one's own: what `selfmoa init` writes from a model, a memory and some files.

The file extends the shipped recipe that is nearest to the model and says only what differs, so
that it stays short and a later version's better defaults reach it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfmoa.errors import CannotWrite, MissingFile, OutputTaken
from selfmoa.recipes import load_recipe
from selfmoa.recipes.budgets import budget, memory_class

if TYPE_CHECKING:
    from selfmoa.config import Recipe

GENERIC = "chat-model"
"""What a model of no known family extends."""
BILLIONS: Mapping[str, float] = {
    "smollm2-135m": 0.13,
    "smollm2-360m": 0.36,
    "smollm2-1.7b": 1.7,
    "qwen2.5-0.5b": 0.49,
    "qwen2.5-1.5b": 1.5,
    "qwen3-0.6b": 0.6,
    "qwen3-1.7b": 1.7,
    "llama-3.2-1b": 1.2,
    "llama-3.2-3b": 3.2,
    "gemma-3-1b": 1.0,
    "phi-4-mini": 3.8,
    "granite-3-2b": 2.5,
}
"""The shipped recipes for a family of models, with the weights that their models have."""
SIZE = re.compile(r"(?<![a-z\d.])(\d+(?:\.\d+)?)([mb])(?![a-z\d])")
SERVER = "judges"
"""Name of the endpoint that answers for judges and attackers."""
CLASSIFIERS = ("reward-model", "refusal-classifier")
"""Kinds of judges that no chat endpoint can answer for: they stay on this machine."""
HEADER = """\
# Written by `selfmoa init`. It extends the shipped recipe '{base}': all else is as it says
# (`selfmoa recipes show {base}`), and any of it can be set here.
extends: {base}
"""


@dataclass(frozen=True, slots=True)
class Answers:
    """What `selfmoa init` asks for.

    Attributes:
        model: a folder, or a name on the model hub.
        memory: of the accelerator, in GB.
        seeds: files of harmful requests.
        instructions: files of harmless instructions.
        endpoint: address of a server that answers for judges and attackers, if there is one.
    """

    model: str
    memory: float
    seeds: tuple[str, ...]
    instructions: tuple[str, ...]
    endpoint: str | None = None


def nearest(model: str) -> tuple[str, float | None]:
    """Return the shipped recipe for a model, and its billions of weights as far as its name says.

    Of a known family, that of the nearest size, else the generic one.
    """
    name = Path(model).name.lower()
    found = SIZE.search(name)
    size = float(found[1]) / (1000 if found[2] == "m" else 1) if found else None
    kin = [r for r in BILLIONS if re.search(rf"{re.escape(_family(r))}(?![a-z])", name)]
    if not kin or (size is None and len(kin) > 1):
        return GENERIC, size
    if size is None:
        return kin[0], BILLIONS[kin[0]]
    wanted = math.log(size)
    return min(kin, key=lambda r: abs(math.log(BILLIONS[r]) - wanted)), size


def begin(answers: Answers, out: Path | None = None) -> dict[str, Any]:
    """Write a recipe from the answers; returns where it is, what it extends, and what to do next.

    Without `out` it is put into the working folder, under the name of the model.

    Raises:
        MissingFile: a file of data is not there.
        OutputTaken: there is a file in its place.
        CannotWrite: the disk or the folder refuses it.
        RecipeError: it is too little memory.
    """
    from selfmoa.config import Recipe
    from selfmoa.recipes.rendering import commented

    for file in (*answers.seeds, *answers.instructions):
        if not Path(file).is_file():
            raise MissingFile(file, "file of data", "name one that is there")
    base, billions = nearest(answers.model)
    name = _slug(answers.model)
    path = out or Path(f"{name}.yaml")
    description = f"Self-MOA on {Path(answers.model).name}"
    said = {"name": name, "description": description, **_settings(answers, base, billions)}
    _write(path, HEADER.format(base=base) + commented(said, Recipe))
    return {
        "recipe": str(path),
        "extends": base,
        "memory_gb": memory_class(answers.memory),
        "next": [f"selfmoa {verb} {_as_path(path)}" for verb in ("doctor", "plan", "run")],
    }


def _settings(answers: Answers, base: str, billions: float | None) -> dict[str, Any]:
    """Return what the recipe says beside what it extends."""
    found: dict[str, Any] = {
        "model": {"name": answers.model},
        "data": {"seeds": list(answers.seeds), "instructions": list(answers.instructions)},
        **budget(answers.memory, billions),
    }
    if answers.endpoint:
        found |= _served(load_recipe(base), found, answers.endpoint)
    return found


def _served(recipe: Recipe, settings: Mapping[str, Any], url: str) -> dict[str, Any]:
    """Return the settings that have a server answer for attackers and for judges in use."""
    grades = {**recipe.evaluate.judges, **settings.get("evaluate", {}).get("judges", {})}
    used = {*recipe.judge.safety, recipe.judge.helpfulness, recipe.judge.refusal, *grades.values()}
    judges = [n for n, j in recipe.judges.items() if n in used and j.kind not in CLASSIFIERS]
    return {
        "endpoints": {SERVER: {"url": url}},
        "judges": {name: {"endpoint": SERVER} for name in judges},
        "attackers": {name: {"endpoint": SERVER} for name in recipe.attackers},
    }


def _write(path: Path, text: str) -> None:
    """Write a file where nothing lies."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise OutputTaken(path, "is there already", "another name") from error
    except OSError as error:
        raise CannotWrite.because(path, error) from error


def _as_path(path: Path) -> str:
    """Return a path so that no command takes it for the name of a shipped recipe."""
    text = str(path)
    return text if re.search(r"/|\.ya?ml$", text) else f"./{text}"


def _family(recipe: str) -> str:
    return re.sub(r"-[\d.]+[mb]$", "", recipe)


def _slug(model: str) -> str:
    """Return the name of a model as that of a recipe."""
    return re.sub(r"[^a-z0-9._-]+", "-", Path(model).name.lower()).strip("-._")[:64] or "my-model"
