"""The attack archive: category x style cells, each with the few prompts that work best.

Left out for now: embeddings, trained attackers, export; the cells and their histories are here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from selfmoa.records import Prompt

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping
    from random import Random

Cell = tuple[str, str]


@dataclass
class Archive:
    """Prompts by cell, with P(unsafe) of the response each last drew; `cell_size` are kept."""

    cell_size: int
    cells: dict[Cell, dict[str, tuple[Prompt, float]]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def put(self, prompt: Prompt, p_unsafe: float) -> bool:
        """Offer a prompt that worked; return whether its cell keeps it."""
        cell = self.cells[prompt.category, prompt.style]
        cell[prompt.id] = (prompt, p_unsafe)
        if len(cell) > self.cell_size:
            worst = min(cell, key=lambda id_: (cell[id_][1], id_))
            del cell[worst]
            return worst != prompt.id
        return True

    def forget(self, prompt: Prompt) -> None:
        """Drop a prompt that no longer works on the current policy."""
        cell = self.cells.get((prompt.category, prompt.style), {})
        cell.pop(prompt.id, None)

    def prompts(self) -> list[tuple[Prompt, float]]:
        """Return every kept prompt with its P(unsafe), in the order of cells and ids."""
        return [
            self.cells[key][id_] for key in sorted(self.cells) for id_ in sorted(self.cells[key])
        ]

    def spread(self, limit: int, among: Container[str]) -> list[Prompt]:
        """Return up to `limit` prompts with ids in `among`: cells take turns, surest first."""
        queues = [
            sorted(
                (e for e in self.cells[key].values() if e[0].id in among),
                key=lambda e: (-e[1], e[0].id),
            )
            for key in sorted(self.cells)
        ]
        chosen: list[Prompt] = []
        for turn in range(max(map(len, queues), default=0)):
            chosen += [queue[turn][0] for queue in queues if turn < len(queue)]
        return chosen[:limit]

    def filled(self) -> int:
        """Return how many cells hold at least one prompt."""
        return sum(bool(cell) for cell in self.cells.values())

    def draw_parent(self, seeds: list[Prompt], rng: Random) -> Prompt:
        """Draw a parent: a filled cell first, so that full cells are not drawn more; or a seed."""
        filled = [key for key in sorted(self.cells) if self.cells[key]]
        if not filled or rng.random() < 1 / (1 + len(filled) ** 0.5):
            return rng.choice(seeds)
        cell = self.cells[rng.choice(filled)]
        return cell[rng.choice(sorted(cell))][0]

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the archive as rows, one a prompt."""
        return [p.to_json() | {"p_unsafe": round(score, 6)} for p, score in self.prompts()]

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], cell_size: int) -> Archive:
        """Build the archive that `to_rows` wrote."""
        archive = cls(cell_size)
        for row in rows:
            prompt = Prompt.from_json({k: v for k, v in row.items() if k != "p_unsafe"})
            archive.put(prompt, float(row["p_unsafe"]))
        return archive


@dataclass
class Bandit:
    """Thompson sampling over arms: each arm's success rate has a Beta posterior."""

    wins: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)

    def choose(self, arms: Iterable[str], rng: Random) -> str:
        """Draw a success rate for every arm and return the arm with the largest."""
        return max(
            arms,
            key=lambda a: rng.betavariate(1 + self.wins.get(a, 0), 1 + self.losses.get(a, 0)),
        )

    def learn(self, arm: str, success: float) -> None:
        """Count a try: `success` in [0, 1] is the probability that it worked."""
        self.wins[arm] = self.wins.get(arm, 0.0) + success
        self.losses[arm] = self.losses.get(arm, 0.0) + 1 - success
