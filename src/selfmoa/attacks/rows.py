"""Files to rows: CSV, YAML, JSON and JSON lines of somebody else, with their row numbers."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from selfmoa.errors import BadInput
from selfmoa.rundir.files import parsed_json, reading

Row = Mapping[str, Any]


def read_rows(path: Path, what: str) -> list[tuple[int, Row]]:
    """Return (number, row) of every row of a file; its ending tells CSV, YAML and JSON from JSONL.

    A YAML or JSON document is a list of rows, or a PyRIT data set, each of whose groups of seeds
    is one row.

    Args:
        path: the file.
        what: what an error calls it.

    Raises:
        BadInput: it is not what its ending says, or a row is no object.
        MissingFile, CannotRead: it cannot be read.
    """
    with reading(path, what):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(path, data[: error.start].count(b"\n") + 1, "it is not UTF-8") from error
    kind = path.suffix.lower()
    if kind == ".csv":
        return list(_csv_rows(path, text))
    if kind in (".yaml", ".yml", ".prompt", ".json"):
        return list(_document_rows(path, text, is_json=kind == ".json"))
    lines = enumerate(text.split("\n"), 1)
    return [(n, _mapping(path, n, _loads(path, n, line))) for n, line in lines if line.strip()]


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    n = 1  # the header
    try:
        for row in reader:
            n += 1
            if None in row:
                raise BadInput(path, n, f"it has more cells than the {len(row) - 1} of the header")
            yield n, {key: value for key, value in row.items() if value}
    except csv.Error as error:
        raise BadInput(path, n + 1, f"it is not CSV ({error})") from error


def _document_rows(path: Path, text: str, *, is_json: bool) -> Iterator[tuple[int, Row]]:
    if is_json:
        found = _loads(path, 1, text)
    else:
        try:
            found = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            line = mark.line + 1 if mark else 1
            raise BadInput(path, line, "it is not YAML: " + str(error).split("\n")[0]) from error
    if isinstance(found, Mapping):
        yield from _seed_groups(path, found)
    elif isinstance(found, list):
        yield from ((n, _mapping(path, n, row)) for n, row in enumerate(found, 1))
    elif found is not None:
        raise BadInput(path, 1, "it is neither a list of attacks nor a mapping with 'seeds'")


def _loads(path: Path, n: int, text: str) -> Any:
    return parsed_json(path, n, text.encode())


def _mapping(path: Path, n: int, row: Any) -> Row:
    if not isinstance(row, Mapping):
        raise BadInput(path, n, "it is not an object with fields")
    return row


def _seed_groups(path: Path, found: Row) -> Iterator[tuple[int, Row]]:
    """Yield (row, {"seeds": [...]}) for every group of a PyRIT data set; most have one seed."""
    seeds = found.get("seeds") or found.get("prompts")
    if not isinstance(seeds, list):
        raise BadInput(path, 1, "field 'seeds' (or 'prompts') is no list")
    groups: dict[Any, list[Row]] = defaultdict(list)
    rows: dict[Any, int] = {}
    for n, found_seed in enumerate(seeds, 1):
        text = isinstance(found_seed, str)
        seed = _mapping(path, n, {"value": found_seed} if text else found_seed)
        alias = seed.get("prompt_group_alias") or ("row", n)
        rows.setdefault(alias, n)
        groups[alias].append(
            {"harm_categories": found.get("harm_categories"), "data_type": "text"} | dict(seed)
        )
    yield from ((rows[alias], {"seeds": group}) for alias, group in groups.items())
