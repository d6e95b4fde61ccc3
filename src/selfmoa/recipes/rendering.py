"""Recipes as text: YAML with a sentence about each key, and the JSON Schema that editors read."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from selfmoa.recipes.strict_yaml import dump

if TYPE_CHECKING:
    from pydantic import BaseModel

    from selfmoa.config import Recipe

WIDTH = 100


def as_yaml(recipe: Recipe) -> str:
    """Return a whole recipe, every key with its value; `load_recipe` reads it as the same one."""
    data = recipe.model_dump(mode="json")
    for named in ("endpoints", "judges", "attackers"):  # of these, what somebody wrote is enough
        sections = getattr(recipe, named).items()
        data[named] = {k: v.model_dump(mode="json", exclude_defaults=True) for k, v in sections}
    return commented(data, type(recipe))


def commented(data: Mapping[str, Any], model: type[BaseModel]) -> str:
    """Return keys of a typed tree as YAML; above each stands what its docstring says."""
    return "".join(_lines(data, model, 0))


def _lines(data: Mapping[str, Any], model: Any, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for key, value in data.items():
        field = model.model_fields[key]
        if field.description:
            mark = f"{indent}# "
            text = " ".join(field.description.split())
            yield textwrap.fill(text, WIDTH, initial_indent=mark, subsequent_indent=mark) + "\n"
        if hasattr(field.annotation, "model_fields"):
            yield f"{indent}{key}:\n"
            yield from _lines(value, field.annotation, depth + 1)
        else:
            yield textwrap.indent(dump({key: value}), indent)


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe's file.

    Nothing in it is required but a name or something to extend: a recipe that extends another says
    only what differs. The loader is stricter.
    """
    from selfmoa.config import Recipe

    found: dict[str, Any] = _all_optional(Recipe.model_json_schema())
    extends = {
        "type": "string",
        "title": "Extends",
        "description": "A shipped recipe, or the path of a file: it has what this one leaves out.",
    }
    found["properties"] = {"extends": extends} | found["properties"]
    found["anyOf"] = [{"required": ["name"]}, {"required": ["extends"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _all_optional(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _all_optional(v) for k, v in node.items() if k != "required"}
    return [_all_optional(each) for each in node] if isinstance(node, list) else node
