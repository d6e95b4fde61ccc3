"""YAML for recipes: YAML 1.2's words and numbers, and nothing that has no business in a recipe.

PyYAML reads YAML 1.1, where `1e-5` is a word while `no`, `010` and `12:30` are not; here it is
the other way round. Repeated keys, NaN, anchors (and with them alias bombs), tags of other
languages and nesting beyond 20 are refused with their line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from selfmoa.errors import RecipeError

MAX_DEPTH = 20
WORDS_AND_NUMBERS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
}

Location = tuple[str | int, ...]


def parse(text: bytes, where: str) -> tuple[Any, dict[Location, int]]:
    """Return the value of a YAML text, and the line on which each key and item in it stands.

    Raises:
        RecipeError: it is not YAML, or has in it what is refused; with `where` and the line.
    """
    try:
        loader = StrictLoader(text)
        try:
            node = loader.get_single_node()
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{where}, line {mark.line + 1}" if mark else where
        raise RecipeError(line, str(error.problem or error.context)) from error
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(where, f"it is not YAML text ({reason})") from error
    return value, dict(_lines(node, ()))


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader without the surprises."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's way to say "none yet"
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Build one node of the tree."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:  # an anchor, or the alias of one
            _refuse("anchors and aliases are not for recipes; use extends", event)
        if self.depth == MAX_DEPTH:
            _refuse(f"it is nested deeper than {MAX_DEPTH}", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Build a mapping from a node."""
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                _refuse("a key should be a word", key)
            if key.value in seen:
                _refuse(f"key '{key.value}' is there twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_finite(self, node: Any) -> float:
        """Build a number from a node."""
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            _refuse(f"{node.value} is not a finite number", node)
        return value


StrictLoader.add_constructor("tag:yaml.org,2002:float", StrictLoader.construct_finite)
for _tag, (_pattern, _starts) in WORDS_AND_NUMBERS.items():
    StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$", re.ASCII), _starts
    )


class StrictDumper(yaml.SafeDumper):
    """PyYAML's safe dumper; it quotes what `parse` would take for something else than a word."""

    yaml_implicit_resolvers = StrictLoader.yaml_implicit_resolvers

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        """Build the node of a list: on one line."""
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


StrictDumper.add_representer(list, StrictDumper.represent_list)


def dump(value: Any) -> str:
    """Return a value as YAML that `parse` reads as the same; lists are on one line."""
    text: str = yaml.dump(
        value, Dumper=StrictDumper, default_flow_style=False, sort_keys=False, allow_unicode=True
    )
    return text


def _refuse(problem: str, found: Any) -> None:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=found.start_mark)


def _lines(node: yaml.Node | None, above: Location) -> Iterator[tuple[Location, int]]:
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(n, item, item) for n, item in enumerate(node.value)]
    else:
        children = []
    for name, named, value in children:
        yield (*above, name), named.start_mark.line + 1
        yield from _lines(value, (*above, name))
