"""What a person sees of a run: a live table on a terminal, plain lines elsewhere, or nothing.

The loop tells events (`listen(event, **facts)`); `Board` keeps what they add up to and words each
as one line. `Plain` prints those lines, `Live` draws the board. Progress goes to stderr: stdout
belongs to results. Text that may come from a model passes through `clean`. Left out on purpose:
any knowledge of files, of models, and of what a stage does.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from selfmoa.rundir import ROUND_STAGES, StageKey, stage_name

Clock = Callable[[], float]
Facts = Mapping[str, Any]

METRICS = {"safety": "safety", "helpfulness": "helpfulness", "over_refusal": "over-refusal"}
LOOKS = {  # state of a stage: mark and colour
    "pending": ("·", "dim"),
    "running": ("▶", "cyan"),
    "done": ("✓", "green"),
    "reused": ("=", "green"),
    "cut": ("■", "yellow"),
}
REDRAWS_A_SECOND = 4  # a frame costs a few milliseconds of a core that training needs
SECONDS_BETWEEN_LINES = 10.0


def clean(text: object) -> str:
    """Return `text` as one line of printable characters: it cannot steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def reading(estimate: Mapping[str, Any] | None) -> str:
    """Return a rate with its interval, as in "91.2 % [88.9, 93.2]"."""
    if not estimate or estimate.get("value") is None:
        return "n/a"
    value, low, high = (100 * float(estimate[key]) for key in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def duration(seconds: float) -> str:
    """Return a time span in at most six characters: "3.4 s", "41 s", "2m03s", "1h05m"."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


class Meter:
    """A count that grows: how far it is, how fast, and how long it will take.

    The first look only sets the base: what an earlier process finished took none of this one's
    time. Another unit, another total or a falling count is another count.
    """

    WINDOW = 30.0
    SPACING = 0.25

    def __init__(self, label: str, clock: Clock) -> None:
        self.label = label
        self.done, self.total, self.unit, self.note = 0, 0, "", ""
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque()

    def update(self, done: int, total: int, unit: str = "", note: str = "") -> None:
        """Take in where the count is now; `total` is 0 if nobody knows it."""
        if (total, unit) != (self.total, self.unit) or done < self.done:
            self._marks.clear()
        self.done, self.total, self.unit, self.note = done, total, unit, note
        now = self._clock()
        if len(self._marks) > 1 and self._marks[-1][0] - self._marks[-2][0] < self.SPACING:
            self._marks.pop()
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[1][0] > self.WINDOW:
            self._marks.popleft()

    def rate(self) -> float | None:
        """Return units a second over the last half minute, or None if that is not known yet."""
        if len(self._marks) < 2:
            return None
        (start, base), (end, done) = self._marks[0], self._marks[-1]
        return (done - base) / (end - start) if end > start and done > base else None

    def left(self) -> float | None:
        """Return the seconds that the rest will take at this rate."""
        rate = self.rate()
        if rate is None or not self.total:
            return None
        return max(0.0, (self.total - self.done) / rate - (self._clock() - self._marks[-1][0]))

    def line(self) -> str:
        """Return all of it in words, as in "judge@2: 312/480 responses, 12.4/s, 14 s left"."""
        count = f"{self.done}/{self.total}" if self.total else f"{self.done}"
        unit = self.unit and self.unit.removesuffix("s") + "s"
        parts = [f"{self.label}: {count} {unit}".rstrip()]
        rate, left = self.rate(), self.left()
        if rate is not None:
            parts.append(f"{rate:.1f}/s")
        if left is not None and self.done < self.total:
            parts.append(f"{duration(left)} left")
        return clean(", ".join([*parts, *([self.note] if self.note else [])]))


@dataclass
class Cell:
    """How one stage of one round stands."""

    state: str = "pending"
    seconds: float = 0.0
    since: float = 0.0


class Board:
    """What the events of a run add up to. `apply` returns the line that words an event."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self.headline: list[str] = []
        self.report = ""
        self.meter: Meter | None = None
        self.cells: dict[StageKey, Cell] = {}
        self.phases: dict[str, Facts] = {}
        self.notes: list[tuple[str, str]] = []
        """Colour and text of decisions and of what could not be judged."""
        self.last = ""
        """The last measurement, in words."""
        self._begin({})

    def apply(self, event: str, facts: Facts) -> str | None:
        """Take in an event; return its line, or None if it has none. Unknown ones are nothing."""
        line: str | None = None
        match event:
            case "run_started":
                self._begin(facts)
                line = self.title
            case "stage_started":
                self._set(_key(facts), Cell("running", since=self.clock()))
                line = f"{stage_name(*_key(facts))}: started"
            case "progress":
                line = self._count(stage_name(*_key(facts)), facts)
            case "building":
                line = self._count(f"building {facts['what']}", facts)
            case "stage_done":
                line = self._stage_done(facts)
            case "measured":
                line = self._measured(clean(facts["phase"]), facts["metrics"])
            case "decision":
                word, colour = ("accepted", "green") if facts["accepted"] else ("rejected", "red")
                line = self._note(colour, f"round {facts['round']} {word}", facts.get("reason"))
            case "stopped":
                line = self._note(
                    "yellow", f"stopped after round {facts['round']}", facts["reason"]
                )
            case "run_done":
                self.report = str(facts.get("report") or "")
                self.headline = [clean(sentence) for sentence in facts.get("headline") or ()]
        return None if line is None else clean(line)

    def close(self) -> None:
        """Mark what is still running as cut off: nothing runs any more."""
        for cell in self.cells.values():
            if cell.state == "running":
                cell.state, cell.seconds = "cut", self.clock() - cell.since
        self.meter, self.closed = None, True

    def _begin(self, facts: Facts) -> None:
        self.directory = str(facts.get("directory") or "")
        self.title = ""
        if facts:
            rounds = facts.get("rounds", 0)
            count = f"{rounds} round" if rounds == 1 else f"{rounds} rounds"
            self.title = clean(f"{facts['name']}: {count}, in {self.directory}")
        self.started, self.closed = self.clock(), False
        self.cells = {(str(stage), int(n)): Cell() for stage, n in facts.get("stages") or ()}
        self.meter, self.phases, self.notes = None, {}, []
        self.round, self.last = 0, ""

    def _set(self, key: StageKey, cell: Cell) -> None:
        self.cells[key], self.meter = cell, None
        self.round = max(self.round, key[1])

    def _stage_done(self, facts: Facts) -> str:
        seconds, note = float(facts.get("seconds") or 0.0), facts.get("note")
        is_old = bool(facts.get("skipped"))
        self._set(_key(facts), Cell("reused" if is_old else "done", seconds))
        how = "already done" if is_old else f"done in {duration(seconds)}"
        return f"{stage_name(*_key(facts))}: {how}" + (f" ({note})" if note else "")

    def _measured(self, phase: str, metrics: Mapping[str, Any]) -> str:
        self.phases[phase] = metrics
        told = [f"{label} {reading(metrics.get(name))}" for name, label in METRICS.items()]
        for name, label in METRICS.items():
            found = metrics.get(name) or {}
            if lost := found.get("n_unjudged"):
                told.append(f"{lost} of {lost + found.get('n', 0)} unjudged for {label}")
                self._note("yellow", phase, told[-1])
        self.last = f"{phase}: {', '.join(told)}"
        return self.last

    def _count(self, label: str, facts: Facts) -> str:
        if self.meter is None or self.meter.label != label:
            self.meter = Meter(label, self.clock)
        more = str(facts.get("unit") or ""), str(facts.get("note") or "")
        self.meter.update(facts["done"], facts.get("total") or 0, *more)
        return self.meter.line()

    def _note(self, colour: str, what: str, why: object) -> str:
        self.notes.append((colour, clean(f"{what}: {why}" if why else what)))
        return self.notes[-1][1]


def _key(facts: Facts) -> StageKey:
    return str(facts["stage"]), int(facts.get("round") or 0)


class View:
    """Keeps the board and shows nothing: the view behind --quiet."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.board = Board(clock)
        self._lock = threading.Lock()

    def listen(self, event: str, /, **facts: Any) -> None:
        """Take in an event of the loop; any thread may call."""
        with self._lock:
            line = self.board.apply(event, facts)
        if line is not None:
            self.show(event, line)

    def show(self, event: str, line: str) -> None:
        """Show an event."""

    def start(self) -> None:
        """Begin to show."""

    def stop(self) -> None:
        """Show how things stand at the end, and let go of the terminal."""
        with self._lock:
            self.board.close()


class Plain(View):
    """One line an event, and one every ten seconds while a count grows."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        super().__init__(clock)
        self.stream = stream
        self._last = -SECONDS_BETWEEN_LINES
        self._told: tuple[str, int, str] | None = None

    def show(self, event: str, line: str) -> None:
        """Print the line, unless it is a count that was told a moment ago."""
        meter, now = self.board.meter, self.board.clock()
        if event in ("progress", "building") and meter is not None:
            count = (meter.label, meter.done, meter.note)
            if count == self._told or now - self._last < SECONDS_BETWEEN_LINES:
                return
            self._told = count
        self._last = now
        self.stream.write(line + "\n")  # in one piece: several processes may share a log
        self.stream.flush()


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
            self.console.print(f"{self.board.title}\n  {self.board.last}", markup=False)
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
    from rich.table import Table

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
        table.add_row(name, *(reading(board.phases[name].get(key)) for key in METRICS))
    return table


@contextmanager
def watch(*, quiet: bool = False, plain: bool = False) -> Iterator[View]:
    """Show a run while the block lasts: live on a terminal, plain lines elsewhere.

    Args:
        quiet: show nothing.
        plain: plain lines on a terminal too.
    """
    view: View
    if quiet:
        view = View()
    elif plain or not _can_draw(sys.stderr):
        view = Plain(sys.stderr)
    else:
        view = Live(Console(file=sys.stderr, highlight=False))
    view.start()
    try:
        yield view
    finally:
        view.stop()


def _can_draw(stream: TextIO) -> bool:
    is_unicode = "utf" in (getattr(stream, "encoding", None) or "").lower()
    return stream.isatty() and is_unicode and os.environ.get("TERM") not in ("dumb", "unknown")
