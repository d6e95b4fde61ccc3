"""Recipes: YAML files, what they extend, overrides, and sentences about what is wrong in them.

A recipe may say `extends: another-recipe`: sections merge key by key, lists are replaced. The
typed tree (`selfmoa.config`) checks the result, and this module says which line or override each
problem came from. Importing it is cheap: pydantic and PyYAML come with the first recipe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from selfmoa.errors import (
    CannotRead,
    MissingFile,
    RecipeError,
    UnknownPlugin,
    did_you_mean,
    plain_reason,
)

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

    from selfmoa.config import Recipe

Model = TypeVar("Model", bound="BaseModel")
Location = tuple[str | int, ...]
Origins = dict[Location, str]  # where each key was last set: "demo.yaml, line 3"

FOLDER = Path(__file__).parent
MAX_BYTES = 1_000_000


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of that name or path, with overrides such as "sample.k=4" applied.

    Raises:
        MissingFile: there is no file at that path.
        UnknownPlugin: no recipe of that name is shipped.
        RecipeError: something in it, or in an override, is wrong; every problem is named.
    """
    from selfmoa.config import Recipe

    return load(Recipe, name_or_path, overrides)


def load(model: type[Model], name_or_path: str, overrides: Sequence[str] = ()) -> Model:
    """Do the work of `load_recipe` for any typed tree; raises the same."""
    path = find(name_or_path)
    return _check(model, *_read_chain(path, ()), overrides, str(path))


def adjust(model: type[Model], defaults: Mapping[str, Any], overrides: Sequence[str]) -> Model:
    """Return a typed tree from these defaults and overrides alone.

    Raises:
        RecipeError: something in an override is wrong; every problem is named.
    """
    return _check(model, deepcopy(dict(defaults)), {}, overrides, "the settings")


def _check(
    model: type[Model],
    data: dict[str, Any],
    origins: Origins,
    overrides: Sequence[str],
    source: str,
) -> Model:
    from pydantic import ValidationError

    for override in overrides:
        _override(model, data, origins, override)
    try:
        recipe = model.model_validate(data)
    except ValidationError as error:
        problems = [_sentence(model, data, each, origins) for each in error.errors()]
        raise _complain(source, problems) from error
    # A typed tree would take the word "nan" for a number.
    if bad := [_locate(where, origins) + " is not finite" for where in _not_finite(recipe)]:
        raise _complain(source, bad)
    return recipe


def shipped() -> list[tuple[str, str]]:
    """Return the names of the recipes that come with the program, with a line about each."""
    found = []
    for path in sorted(FOLDER.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found.append((path.stem, first.removeprefix("#").strip() if first[:1] == "#" else ""))
    return found


def find(name_or_path: str, beside: Path | None = None) -> Path:
    """Return the file of a recipe. What has a slash or ends in .yaml is a path, else a name.

    A path is relative to the folder `beside`, if that is given.

    Raises:
        MissingFile: there is no file at that path.
        UnknownPlugin: no recipe of that name is shipped.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if re.search(r"[/\\]|\.ya?ml$", name_or_path):
        path = (beside or Path()) / Path(name_or_path).expanduser()
        if not path.is_file():
            raise MissingFile(path, "recipe", f"shipped ones are {', '.join(known) or '(none)'}")
        return path
    if name_or_path not in known:
        raise UnknownPlugin("recipe", name_or_path, known)
    return FOLDER / f"{name_or_path}.yaml"


def _read_chain(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    """Read a recipe on top of those that it extends."""
    from selfmoa.recipes.strict_yaml import parse

    chain = (*above, path.resolve())
    if path.resolve() in above:
        names = " -> ".join(each.name for each in chain)
        raise RecipeError(str(path), f"recipes extend each other in a circle: {names}")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CannotRead(path, plain_reason(error)) from error
    if len(text) > MAX_BYTES:
        raise RecipeError(str(path), f"it is larger than {MAX_BYTES // 1_000_000} MB")
    data, lines = parse(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(str(path), "a recipe is a mapping of keys to values")
    origins = {where: f"{path.name}, line {line}" for where, line in lines.items()}
    parent = data.pop("extends", None)
    if parent is None:
        return data, origins
    if not isinstance(parent, str):
        raise RecipeError(origins[("extends",)], "extends should be the name of one recipe")
    base, base_origins = _read_chain(find(parent, path.parent), chain)
    return _merge(base, data), base_origins | origins


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _override(model: type[BaseModel], data: dict[str, Any], origins: Origins, text: str) -> None:
    """Set one key, as in "train.beta=0.1"; the value is YAML. Its neighbours stay as they are."""
    from selfmoa.recipes.strict_yaml import parse

    dotted, equals, value = text.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    where = f"override '{text}'"
    if not equals or not all(keys):
        raise RecipeError(where, "an override looks like section.key=value")
    section = data
    for n, key in enumerate(keys[:-1], 1):
        section = section.setdefault(key, _default_mapping(model, tuple(keys[:n])))
        if not isinstance(section, dict):
            above = ".".join(keys[:n])
            raise RecipeError(where, f"{above} is not a section; set {above} as a whole")
    section[keys[-1]], below = parse(value.encode(), where)
    origins |= {(*keys, *tail): where for tail in ((), *below)}


def _complain(source: str, problems: list[str]) -> RecipeError:
    """Return one error for all problems."""
    if len(problems) == 1:
        return RecipeError(source, problems[0])
    lines = "".join(f"\n  {problem}" for problem in problems)
    return RecipeError(source, f"{len(problems)} problems{lines}")


def _sentence(
    model: type[BaseModel], data: Mapping[str, Any], error: ErrorDetails, origins: Origins
) -> str:
    """Return one problem as a sentence: key, where it was set, what was seen and expected."""
    where, kind = _visible(error["loc"], data, missing=error["type"] == "missing"), error["type"]
    start = _locate(where, origins)
    if kind == "extra_forbidden":
        fields = _fields_at(model, error["loc"][:-1])
        return f"{start} is not a known key{did_you_mean(str(where[-1]), fields)}".rstrip(".")
    if kind == "missing":
        return f"{start} is required"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message.replace("Input should", "it should")
    if isinstance(error["input"], (dict, list)):
        return f"{start}: {message}" if where else message
    seen = repr(error["input"])
    return f"{start} is {seen if len(seen) <= 80 else seen[:76] + ' ...'}; {message}"


def _visible(loc: Location, data: Any, *, missing: bool) -> Location:
    """Return a location as the recipe spells it: without the tags of a choice of types."""
    where: list[str | int] = []
    for n, part in enumerate(loc):
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            if not missing or n < len(loc) - 1:
                continue
        where.append(part)
    return tuple(where)


def _locate(where: Location, origins: Origins) -> str:
    """Return a dotted key with the place that set it, or set the nearest section above."""
    dotted = ".".join(map(str, where))
    dotted = dotted if dotted.isprintable() else repr(dotted)
    for n in range(len(where), 0, -1):
        if origin := origins.get(where[:n]):
            return f"{dotted} ({origin})"
    return dotted


def _default_mapping(model: Any, loc: Location) -> dict[str, Any]:
    """Return what a key holds by default, if that is a mapping: what is set in it adds to that."""
    fields = [each.model_fields.get(loc[-1]) for each in _models_at(model, loc[:-1])]
    defaults = [field.get_default(call_default_factory=True) for field in fields if field]
    return next((dict(each) for each in defaults if isinstance(each, dict)), {})


def _fields_at(model: Any, loc: Location) -> list[str]:
    """Return the keys that the section at a location knows, over all types it may have."""
    return [name for each in _models_at(model, loc) for name in each.model_fields]


def _models_at(model: Any, loc: Location) -> list[Any]:
    sections = _models_in(model)
    for part in loc:
        inner = [
            each.model_fields[part].annotation for each in sections if part in each.model_fields
        ]
        if inner:
            sections = [found for each in inner for found in _models_in(each)]
    return sections


def _models_in(annotation: Any) -> list[Any]:
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [found for each in get_args(annotation) for found in _models_in(each)]


def _not_finite(value: Any, above: Location = ()) -> Iterator[Location]:
    if hasattr(value, "model_fields_set"):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, float) and not math.isfinite(value):
        yield above
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _not_finite(each, (*above, key))
    elif isinstance(value, (list, tuple)):
        for n, each in enumerate(value):
            yield from _not_finite(each, (*above, n))
