"""Attacks from other tools' files: reading, checking, counting. `attacks.formats` has the formats.

Replies that a file holds are left where they are: attacks are asked anew. What is no attack is
counted and skipped; what cannot be understood is refused by file, row and field.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfmoa.attacks.archive import Entry
from selfmoa.attacks.formats import Attack, UnclearRowError, attack_of, pyrit_memory
from selfmoa.attacks.neighbours import PromptNeighbours
from selfmoa.attacks.rows import read_rows
from selfmoa.attacks.taxonomy import PLAIN, UNSORTED, category_of, unknown
from selfmoa.errors import BadInput
from selfmoa.records import Prompt


@dataclass(frozen=True)
class Imported:
    """The attacks of a file, and how many rows were skipped, by reason."""

    entries: list[Entry]
    skipped: dict[str, int]


def read_attacks(
    path: Path,
    *,
    category: str | None = None,
    style: str | None = None,
    categories: Sequence[str] | None = None,
) -> Imported:
    """Read a file of attacks; what nearly repeats an earlier row is skipped and counted.

    Args:
        path: the file; its ending tells CSV, YAML and JSON from JSONL.
        category: of rows that name none; without it, "unsorted".
        style: of rows that name none; without it, "plain".
        categories: if given, no others are allowed.

    Raises:
        BadInput: a row cannot be understood, an id is there twice, a category is not one of
            `categories`, or there is no attack in the file.
        MissingFile, CannotRead: the file cannot be read.
    """
    entries: dict[int, Entry] = {}
    skipped: Counter[str] = Counter()
    ids: dict[str, int] = {}
    for n, found in _attacks(path):
        if isinstance(found, str):
            skipped[found] += 1
            continue
        entry = found if isinstance(found, Entry) else _entry(path, found, category, style)
        own_id = "" if isinstance(found, Entry) else found.id  # two cells may have one prompt
        if own_id and own_id in ids:
            raise BadInput(
                path, n, f"field 'id': '{own_id}' is there already, in row {ids[own_id]}"
            )
        ids[own_id] = n
        if categories is not None and (
            problem := unknown(entry.prompt.category, categories, "category")
        ):
            raise BadInput(path, n, f"field 'category': {problem}")
        if entry.prompt.intent == "benign":
            skipped["harmless"] += 1
        else:
            entries[n] = entry
    kept = list(entries.values())
    matches = PromptNeighbours().insert([e.prompt for e in kept])
    fresh = [entry for entry, match in zip(kept, matches, strict=True) if match is None]
    if repeated := len(kept) - len(fresh):
        skipped["near-duplicate"] += repeated
    if not fresh:
        told = ", ".join(f"{k} {reason}" for reason, k in skipped.items())
        raise BadInput(path, 1, f"there is no attack in this file{told and f' ({told})'}")
    return Imported(fresh, dict(skipped))


def _entry(path: Path, found: Attack, category: str | None, style: str | None) -> Entry:
    return Entry(
        Prompt.make(
            found.messages,
            goal=found.goal,
            intent=found.intent,
            category=category_of(found.category.strip() or category or UNSORTED),
            style=found.style.strip() or style or PLAIN,
            source=f"import:{path.name}",
        )
    )


def _attacks(path: Path) -> Iterator[tuple[int, Attack | Entry | str]]:
    """Yield (row, what it holds: an attack, an entry of an archive, or why it is skipped)."""
    rows = read_rows(path, "file of attacks")
    try:
        if rows and "conversation_id" in rows[0][1]:
            yield from pyrit_memory(rows)
            return
        seen: set[str] = set()
        for n, row in rows:
            yield n, attack_of(n, row, seen)
    except UnclearRowError as error:
        raise BadInput(path, error.row, error.problem) from error
