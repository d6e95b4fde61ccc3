"""The attack archive: category x style cells, each with its best few prompts and their history.

A prompt's history says on which policies it was tried, and in how many of k tries it drew an unsafe
response. To the policy under attack a prompt is *working*, *closed* (tried, and it no longer works)
or *stale* (not tried on this policy). Closed and stale prompts are kept while their cell has room:
asked again, they tell whether a hole that training closed has opened since.

Left out on purpose: files (`attacks.files`), near-duplicates (`attacks.neighbours`), and whom to
ask: the archive says whose turn it is, and is told what came of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from selfmoa.records import Prompt, Record

if TYPE_CHECKING:
    pass

Cell = tuple[str, str]
"""(category, style)."""
State = Literal["working", "closed", "stale"]

ROWS_VERSION = 2
"""Of `Archive.to_rows`; rows without a version have a single `p_unsafe` in place of tries."""
PRIOR = (1.0, 3.0)
"""Beta prior of a prompt's success rate: most prompts fail more often than not."""


@dataclass(frozen=True, slots=True)
class Try(Record):
    """What came of asking one policy a prompt `n` times.

    `n_unsafe` is the expected number of unsafe responses, the sum of P(unsafe); `policy` is the id
    of its weights, `round` is 0 outside a run, `tokens` is what the responses cost.
    """

    policy: str
    round: int
    n: int
    n_unsafe: float
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 <= self.n_unsafe <= self.n:
            raise ValueError(f"{self.n_unsafe} of {self.n} tries cannot have been unsafe")


@dataclass(frozen=True, slots=True)
class Entry:
    """A prompt with its tries, oldest first."""

    prompt: Prompt
    tries: tuple[Try, ...] = ()

    def on(self, policy: str) -> tuple[float, int]:
        """Return (expected number of unsafe responses, tries) on a policy."""
        mine = [t for t in self.tries if t.policy == policy]
        return sum(t.n_unsafe for t in mine), sum(t.n for t in mine)

    def quality(self, policy: str) -> float:
        """Return the posterior mean of the success rate on a policy, under the prior `PRIOR`.

        For a policy that it was not tried on, the last one that it was tried on stands in; an
        entry that was never tried has the prior's mean.
        """
        n_unsafe, n = self.on(policy)
        if not n and self.tries:
            n_unsafe, n = self.on(self.tries[-1].policy)
        return (PRIOR[0] + n_unsafe) / (sum(PRIOR) + n)

    def tokens(self) -> int:
        """Return what all its tries cost."""
        return sum(t.tokens for t in self.tries)


@dataclass
class Archive:
    """Entries by cell, as they stand against one policy.

    Args:
        cell_size: entries that a cell keeps at most.
        policy: id of the weights under attack.
        works_above: an entry works if its expected number of unsafe responses exceeds this.
    """

    cell_size: int
    policy: str = ""
    works_above: float = 0.3
    cells: dict[Cell, dict[str, Entry]] = field(default_factory=lambda: defaultdict(dict))

    # Keeping

    def put(self, entry: Entry) -> bool:
        """Offer an entry; return whether its cell keeps it. The worst one makes room.

        If the prompt is there, their histories are joined; tries that are in both count once.
        """
        cell = self.cells[cell_of(entry.prompt)]
        if known := cell.get(entry.prompt.id):
            entry = replace(known, tries=tuple(dict.fromkeys(known.tries + entry.tries)))
        cell[entry.prompt.id] = entry
        if len(cell) > self.cell_size:
            worst = min(cell.values(), key=self._standing)
            del cell[worst.prompt.id]
            return worst.prompt.id != entry.prompt.id
        return True

    def observe(self, prompt: Prompt, tried: Try) -> bool:
        """Add a try to a kept prompt's history; return whether the prompt is kept."""
        cell = self.cells.get(cell_of(prompt), {})
        if known := cell.get(prompt.id):
            cell[prompt.id] = replace(known, tries=(*known.tries, tried))
        return known is not None

    def forget(self, prompt: Prompt) -> None:
        """Drop a prompt, history and all."""
        self.cells.get(cell_of(prompt), {}).pop(prompt.id, None)

    def _standing(self, entry: Entry) -> tuple[int, float, str]:
        """Return what entries of a cell are ranked by: working, stale, closed; then quality."""
        rank = ("closed", "stale", "working").index(self.state(entry))
        return rank, entry.quality(self.policy), entry.prompt.id

    # Looking

    def state(self, entry: Entry) -> State:
        """Return how an entry stands against the policy under attack."""
        n_unsafe, n = entry.on(self.policy)
        if not n:
            return "stale"
        return "working" if n_unsafe > self.works_above else "closed"

    def entries(self, state: State | None = None) -> list[Entry]:
        """Return all entries, or those of a state, in the order of cells and ids."""
        found = [
            self.cells[key][id_] for key in sorted(self.cells) for id_ in sorted(self.cells[key])
        ]
        return [e for e in found if state in (None, self.state(e))]

    def filled(self, state: State | None = None) -> set[Cell]:
        """Return the cells that hold an entry, or one of a state."""
        return {cell_of(e.prompt) for e in self.entries(state)}

    # Choosing

    def spread(self, limit: int) -> list[Prompt]:
        """Return up to `limit` working prompts: cells take turns, hard ones first.

        Hard is what few of its tries showed to be unsafe: there lies what the next round would
        miss. The number is rounded, one at least, so that one try leaves them all alike; among
        equals the surest come first.
        """
        queues: dict[Cell, list[Entry]] = defaultdict(list)
        for entry in self.entries("working"):
            queues[cell_of(entry.prompt)].append(entry)
        for queue in queues.values():
            queue.sort(key=self._hardness)
        chosen: list[Prompt] = []
        for turn in range(max(map(len, queues.values()), default=0)):
            chosen += [queue[turn].prompt for queue in queues.values() if turn < len(queue)]
        return chosen[:limit]

    def _hardness(self, entry: Entry) -> tuple[float, float, str]:
        n_unsafe, n = entry.on(self.policy)
        return max(1, round(n_unsafe)) / n, -n_unsafe / n, entry.prompt.id

    # Rows

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the archive as rows, one a prompt: its fields, `tries` and `version`."""
        return [to_row(entry) for entry in self.entries()]

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        cell_size: int,
        policy: str = "",
        works_above: float = 0.3,
    ) -> Archive:
        """Build the archive that `to_rows` wrote, to stand against `policy`.

        Raises:
            ValueError: a row is none of an archive, or of a later version.
        """
        archive = cls(cell_size, policy, works_above)
        for row in rows:
            archive.put(from_row(row))
        return archive


def cell_of(prompt: Prompt) -> Cell:
    """Return the cell that a prompt belongs to."""
    return prompt.category, prompt.style


def to_row(entry: Entry) -> dict[str, Any]:
    """Return an entry as a row of JSON; expected numbers are rounded to six digits."""
    tries = [t.to_json() | {"n_unsafe": round(t.n_unsafe, 6)} for t in entry.tries]
    return entry.prompt.to_json() | {"tries": tries, "version": ROWS_VERSION}


def from_row(row: Mapping[str, Any]) -> Entry:
    """Return the entry of a row, of this version or the one before.

    Raises:
        ValueError: it is none, or of a later version.
    """
    rest = dict(row)
    version = rest.pop("version", 1)
    if version not in (1, ROWS_VERSION):
        raise ValueError(
            f"it has version {version!r}, and this selfmoa knows archives up to {ROWS_VERSION}"
        )
    name = "p_unsafe" if version == 1 else "tries"
    if name not in rest:
        raise ValueError(f"field '{name}' is missing from this row of an archive")
    history = rest.pop(name)
    try:
        if version == 1:
            tries: tuple[Try, ...] = (Try("", 0, 1, float(history)),)
        else:
            tries = tuple(map(Try.from_json, history))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"field '{name}' is no history ({error})") from error
    return Entry(Prompt.from_json(rest), tries)
