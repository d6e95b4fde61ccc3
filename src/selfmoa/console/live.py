"""The view on a terminal: rounds by stages, the current count, what was measured and decided."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from selfmoa.console.board import Board, Clock
from selfmoa.console.views import View
from selfmoa.console.words import METRICS, duration, reading
from selfmoa.rundir import ROUND_STAGES, StageKey

LOOKS = {  # state of a stage: mark and colour
    "pending": ("·", "dim"),
    "running": ("▶", "cyan"),
    "done": ("✓", "green"),
    "reused": ("=", "green"),
    "cut": ("■", "yellow"),
}
REDRAWS_A_SECOND = 4  # a frame costs a few milliseconds of a core that training needs


class Live(View):
    """Rounds by stages, the current count and the measurements, redrawn in place."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        super().__init__(clock)
        self.console = console
        self._screen = Screen(
            console=console, refresh_per_second=REDRAWS_A_SECOND, get_renderable=self.render
        )

    def start(self) -> None:
        """Begin to draw."""
        self._screen.start(refresh=True)

    def stop(self) -> None:
        """Draw the last state, which stays on the screen."""
        super().stop()
        self._screen.stop()

    def listen(self, event: str, /, **facts: Any) -> None:
        """Take in an event; before a next run begins, leave a line about the one before."""
        if event == "run_started" and self.board.last:
            self.console.print(Text(f"{self.board.title}\n  {self.board.last}"))
        super().listen(event, **facts)

    def render(self) -> RenderableType:
        """Return the board as something that rich can draw."""
        with self._lock:
            board = self.board
            # Two tables share the screen; the last picture may scroll, a redrawn one may not.
            rows = sys.maxsize if board.closed else max(2, (self.console.height - 9) // 2)
            notes = board.notes if board.closed else board.notes[-3:]
            parts = [_title(board), _stages(board, rows), _progress(board), _phases(board, rows)]
            parts += [_line(text, colour, fold=board.closed) for colour, text in notes]
            return Group(*(part for part in parts if part is not None))


def _line(text: str, style: str, *, fold: bool = False) -> RenderableType:
    return Text(text, style, no_wrap=not fold, overflow="fold" if fold else "ellipsis")


def _title(board: Board) -> RenderableType | None:
    spent = duration(board.clock() - board.started)
    return _line(f"{board.title}, {spent}", "bold") if board.title else None


def _mark(board: Board, key: StageKey, label: str = "") -> Text:
    """Return how a stage looks: its mark with seconds, in its colour."""
    cell = board.cells.get(key)
    if cell is None:
        return Text(label)
    mark, colour = LOOKS[cell.state]
    seconds = board.clock() - cell.since if cell.state == "running" else cell.seconds
    spent = "" if cell.state == "pending" else f" {duration(seconds)}"
    return Text.assemble(label, (mark + spent, colour))


def _stages(board: Board, limit: int) -> RenderableType | None:
    if not board.cells:
        return None
    table = Table("", *(name.replace("_", " ") for name in ROUND_STAGES), box=None, pad_edge=False)
    rounds = sorted({round_ for stage, round_ in board.cells if stage != "report"})
    room = limit - 1
    start = max(0, min(board.round - 1, len(rounds) - room))
    for round_ in rounds[start : start + room]:
        label = Text(f"round {round_}") if round_ else _mark(board, ("reset", 0), "reset ")
        table.add_row(label, *(_mark(board, (stage, round_)) for stage in ROUND_STAGES))
    if ("report", 0) in board.cells:
        table.add_row(_mark(board, ("report", 0), "report "))
    return table


def _progress(board: Board) -> RenderableType | None:
    if board.meter is None:
        return None
    line = _line(board.meter.line(), "cyan")
    if not board.meter.total:
        return line
    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(board.meter.total, board.meter.done, width=16), line)
    return grid


def _phases(board: Board, limit: int) -> RenderableType | None:
    if not board.phases:
        return None
    table = Table("", *METRICS.values(), box=None, pad_edge=False, padding=(0, 1, 0, 0))
    names = list(board.phases)
    shown = names if len(names) <= limit else [names[0], *names[1 - limit :]]
    for name in shown:
        cells = (reading(board.phases[name].get(key)) for key in METRICS)
        table.add_row(*map(Text, (name, *cells)))  # a plain str would be read as markup
    return table
