"""The charts of the report: inline SVG, drawn by small pure functions.

Every chart is well-formed XML without ids, scripts or remote parts, so that any number of them
can share a page; colours are classes that the page's style sheet fills in for light and dark.
Shapes differ wherever colours do. Left out on purpose: a plotting library, whose output changes
with its version, and everything that needs a script, such as zooming.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

Place = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom

WIDTH = 440.0  # narrow enough that labels of 13 units stay legible on a telephone
UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format, surrogate and separator characters
BLANK = {  # letters without ink and variation selectors, but for FE0F: emoji are honest text
    *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0),
    *(*range(0xFDD0, 0xFDF0), *range(0xFE00, 0xFE0F), *range(0xE0100, 0xE01F0)),
}
SHAPES = (  # circle, square, diamond, triangle, small circle: one a colour
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "M-4.5-4.5h9v9h-9z", "M0-6.2L6.2 0L0 6.2L-6.2 0z",
    "M0-6L5.6 4.4h-11.2z", "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mark:
    """A measured value with its interval, as fractions, and the words of its tooltip."""

    value: float
    low: float
    high: float
    note: str


@dataclass(frozen=True, slots=True)
class Step:
    """A phase or a round of the run; one that is not `kept` is a dead end of the way."""

    label: str
    caption: str = ""
    kept: bool = True
    shaded: bool = False
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """One measure along all steps; `ink` chooses its colour and its shape."""

    label: str
    ink: int
    marks: Sequence[Mark | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a dot plot: what is measured, and its marks with their short names."""

    label: str
    group: str
    marks: Sequence[tuple[str, Mark | None]]
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """A straight map from the domain [low, high] to the drawing; values outside are clamped."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the coordinate of `value`."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def visible(text: object) -> str:
    """Return `text` with every character that a reader cannot see spelt out.

    ESC becomes "␛", a bidirectional override "⟨U+202E⟩"; a new line and a tab stay.
    """
    plain = str(text).replace("\r\n", "\n")
    # Nearly all text is plain, and this way the page takes half the time.
    return plain if plain.isascii() and plain.isprintable() else "".join(map(_spelt, plain))


def _spelt(char: str) -> str:
    code = ord(char)
    if code < 0x20 or code == 0x7F:
        return char if char in "\n\t" else chr(0x2400 + min(code, 0x21))
    # The last two characters of every plane are none: XML forbids them.
    hidden = unicodedata.category(char) in UNSEEN or code in BLANK or code & 0xFFFE == 0xFFFE
    return f"⟨U+{code:04X}⟩" if hidden else char


def heat_level(value: float) -> int:
    """Return the colour of a rate, one of the classes h0 (pale) to h10 of the style sheet."""
    return int(min(max(value, 0.0), 1.0) * 10 + 0.5)


def percent_axis(values: Iterable[float]) -> list[int]:
    """Return the ticks, in percent, of an axis that holds all `values` and spans >= 20 points."""
    found = [min(max(v, 0.0), 1.0) * 100 for v in values] or [0.0, 100.0]
    low, high = max(0, math.floor(min(found) - 2)), min(100, math.ceil(max(found) + 2))
    low = max(0, min(low - (20 - high + low) // 2, 80)) if high - low < 20 else low
    high = max(high, low + 20)
    step = next(s for s in (5, 10, 20) if (high - low) / s <= 5)
    return list(range(low // step * step, -(-high // step) * step + 1, step))


def steps_taken(kept: Sequence[bool]) -> list[tuple[int, int]]:
    """Return the moves (from, to) between steps; each starts at the last kept step before it."""
    moves, last = [], None
    for here, is_kept in enumerate(kept):
        if last is not None:
            moves.append((last, here))
        last = here if is_kept else last
    return moves


def trend(
    title: str, x_label: str, y_label: str, steps: Sequence[Step], series: Sequence[Series]
) -> Markup:
    """Draw measures along the steps of a run: lines, markers and interval whiskers."""
    width, height, top, bottom = max(WIDTH, 64 + 66 * len(steps)), 312.0, 52.0, 246.0
    y = Scale(0, 1, bottom, top)
    x = [46 + (width - 58) * (i + 0.5) / len(steps) for i in range(len(steps))]
    half = (width - 58) / len(steps) / 2 - 3
    body = [_legend([(s.label, s.ink) for s in series]), _text(2, 38, y_label, "axis")]
    for step, at in zip(steps, x, strict=True):
        if step.shaded or not step.kept:
            body.append(_rect(at - half, top - 4, 2 * half, bottom - top + 8, "band"))
        body.append(_text(at, bottom + 20, step.label, "middle", 12))
        body.append(_text(at, bottom + 35, step.caption, "middle axis"))
    body.append(_text(17 + width / 2, height - 6, x_label, "middle axis"))
    body.append(_y_axis(range(0, 101, 20), y, 46, width - 12))
    for order, line in enumerate(series):
        # Side by side, or the whiskers of equal values would hide one another.
        places = [at + 10 * (order - (len(series) - 1) / 2) for at in x]
        body.append(_trend_line(line, steps, places, y))
    return _svg(width, height, title, "".join(body))


def _trend_line(line: Series, steps: Sequence[Step], x: Sequence[float], y: Scale) -> str:
    seen = [(at, step, mark) for at, step, mark in zip(x, steps, line.marks, strict=True) if mark]
    parts = []
    for start, end in steps_taken([step.kept for _, step, _ in seen]):
        (x1, _, a), (x2, step, b) = seen[start], seen[end]
        parts.append(_line(x1, y(a.value), x2, y(b.value), "way" if step.kept else "way dead"))
    for at, step, mark in seen:
        bars = _whisker(at, y(mark.low), at, y(mark.high))
        parts.append(_mark(mark.note, bars, at, y(mark.value), line.ink, step.kept))
    return f'<g class="s{line.ink % 5}">{"".join(parts)}</g>'


def plane(
    title: str, x_label: str, y_label: str, points: Sequence[tuple[Step, Mark, Mark]]
) -> Markup:
    """Draw the way of a policy through two measures: points with crosses, joined by arrows."""
    height, left, right, top, bottom = 380.0, 46.0, WIDTH - 20, 34.0, 320.0
    x_ticks = percent_axis(v for _, m, _ in points for v in (m.low, m.high))
    y_ticks = percent_axis(v for _, _, m in points for v in (m.low, m.high))
    x = Scale(x_ticks[0] / 100, x_ticks[-1] / 100, left, right)
    y = Scale(y_ticks[0] / 100, y_ticks[-1] / 100, bottom, top)
    body = [_text(2, 16, y_label, "axis"), _y_axis(y_ticks, y, left, right)]
    body.append(_x_axis([(t / 100, f"{t}%") for t in x_ticks], x, top, bottom, x_label))
    at = [(x(m.value), y(n.value)) for _, m, n in points]
    taken = [(px - 9, py - 9, px + 9, py + 9) for px, py in at]
    for start, end in steps_taken([step.kept for step, _, _ in points]):
        body.append(_arrow(at[start], at[end], points[end][0].kept))
        (ax, ay), (bx, by) = at[start], at[end]
        beads = [(ax + (bx - ax) * i / 20, ay + (by - ay) * i / 20) for i in range(21)]
        taken += [(bead_x - 5, bead_y - 5, bead_x + 5, bead_y + 5) for bead_x, bead_y in beads]
    for (step, m, n), (px, py) in zip(points, at, strict=True):
        ends = x(m.low), y(n.high), x(m.high), y(n.low)
        taken += [(ends[0], py - 3, ends[2], py + 3), (px - 3, ends[1], px + 3, ends[3])]
        cross = _whisker(ends[0], py, ends[2], py) + _whisker(px, ends[1], px, ends[3])
        ink = 2 if step.shaded else 0
        drawn = _mark(f"{step.label}: {m.note}; {n.note}", cross, px, py, ink, step.kept)
        body.append(f'<g class="s{ink}">{drawn}</g>')
        if step.chosen:
            body.append(f'<circle class="ring" cx="{_n(px)}" cy="{_n(py)}" r="10"/>')
    body.append(_labels([s.label for s, _, _ in points], at, taken, (left, 12.0, right, bottom)))
    return _svg(WIDTH, height, title, "".join(body))


def _arrow(start: Place, end: Place, kept: bool) -> str:
    line = _line(*start, *end, "path" if kept else "path dead")
    dx, dy = end[0] - start[0], end[1] - start[1]
    if math.hypot(dx, dy) < 26:  # no room for a head between two markers
        return line
    middle = f"translate({_n(start[0] + dx * 0.55)} {_n(start[1] + dy * 0.55)})"
    turn = f"rotate({_n(math.degrees(math.atan2(dy, dx)))})"
    return f'{line}<polygon class="head" points="5,0 -5,4 -5,-4" transform="{middle} {turn}"/>'


def _labels(names: Sequence[str], at: Sequence[Place], taken: Sequence[Box], frame: Box) -> str:
    """Put each name near its point where it covers least; far ones get a leader line."""
    parts, blocks = [], list(taken)
    for name, (px, py) in zip(names, at, strict=True):
        wide = 8 * min(len(name), 18) + 4
        best: tuple[float, Box] = (math.inf, (px, py, px + wide, py + 16))
        for reach in (12.0, 20.0, 32.0, 46.0, 62.0, 80.0):
            for turn in range(12):
                cx = px + (reach + wide / 2) * math.cos(turn * math.pi / 6)
                cy = py - (reach + 8) * math.sin(turn * math.pi / 6)
                box = (cx - wide / 2, cy - 8, cx + wide / 2, cy + 8)
                outside = sum(max(0.0, frame[i] - box[i]) for i in (0, 1))
                outside += sum(max(0.0, box[i] - frame[i]) for i in (2, 3))
                cost = reach / 4 + 40 * outside + sum(_overlap(box, other) for other in blocks)
                best = min(best, (cost, box))
        x0, y0, x1, y1 = best[1]
        blocks.append(best[1])
        near = (min(max(px, x0), x1), min(max(py, y0), y1))
        if math.dist(near, (px, py)) > 22:
            parts.append(_line(px, py, *near, "leader"))
        parts.append(_text((x0 + x1) / 2, (y0 + y1) / 2 + 4, name, "middle name", 18))
    return "".join(parts)


def _overlap(a: Box, b: Box) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, wide) * max(0.0, high)


def heat_map(
    title: str,
    styles: Sequence[tuple[str, bool]],
    rows: Sequence[tuple[str, Sequence[Mark | None]]],
) -> Markup:
    """Draw attack success by category (rows) and style (name, held out); held-out ones apart."""
    order = sorted(range(len(styles)), key=lambda i: styles[i][1])
    first = sum(not heldout for _, heldout in styles)
    gap = 10.0 if 0 < first < len(styles) else 0.0
    left = 7.4 * min(18, max(len(name) for name, _ in rows)) + 12
    longest = 7.2 * min(16, max(len(name) for name, _ in styles))
    top, right = 28 + 0.87 * longest, left + 27 * len(styles) + gap
    bottom = top + 26 * len(rows)
    body = [_text(left - 8, top - 8, "category", "end axis")]
    body += [
        _text(left - 8, top + 26 * r + 17, name, "end", 18) for r, (name, _) in enumerate(rows)
    ]
    for c, source in enumerate(order):
        x = left + 27 * c + (gap if c >= first else 0)
        where = f"translate({_n(x + 15)} {_n(top - 8)}) rotate(-60)"
        body.append(f'<g transform="{where}">{_text(0, 0, styles[source][0], "", 16)}</g>')
        body += [_cell(x, top + 26 * r, marks[source]) for r, (_, marks) in enumerate(rows)]
    if first < len(styles):
        start = left + 27 * first + gap
        body.append(_line(start, bottom + 5, right - 2, bottom + 5, "bracket"))
        body.append(_text(right - 2, bottom + 20, "held out", "end axis"))
    body.append(_text(left, bottom + 36, "style of the attack", "axis"))
    wide = max(right + 0.5 * longest - 8, left + 190)
    return _svg(wide, bottom + 44, title, "".join(body))


def _cell(x: float, y: float, mark: Mark | None) -> str:
    kind, note, number = "none", "not measured", "–"
    if mark:
        kind, note = f"cell h{heat_level(mark.value)}", mark.note
        number = f"{mark.value * 100:.0f}"
    shown = _rect(x, y, 25, 24) + _text(x + 12.5, y + 16.5, number, "middle")
    return f'<g class="{kind}">{_title(note)}{shown}</g>'


def dots(title: str, x_label: str, rows: Sequence[Row]) -> Markup:
    """Draw one line a row, grouped: a marker and whisker for each of its marks."""
    found = [m for row in rows for _, m in row.marks if m]
    ticks = percent_axis(v for m in found for v in (m.low, m.high))
    x, y = Scale(ticks[0] / 100, ticks[-1] / 100, 160, WIDTH - 38), 10.0
    body, group = [], None
    for row in rows:
        if row.group != group:
            group, y = row.group, y + 22
            body.append(_text(2, y - 6, group, "axis"))
        tall = 15.0 * max(1, len(row.marks)) + 8
        if row.strong:
            body.append(_rect(0, y, WIDTH, tall, "band"))
        body.append(_text(6, y + tall / 2 + 4, row.label, "strong" if row.strong else "", 20))
        for i, (name, mark) in enumerate(row.marks):
            if mark:
                at, ink = y + 11.5 + 15 * i, 0 if row.strong else 4
                bars = _whisker(x(mark.low), at, x(mark.high), at)
                drawn = _mark(f"{row.label}, {mark.note}", bars, x(mark.value), at, ink, True)
                short = _text(x(mark.high) + 6, at + 4, name, "tiny")
                body.append(f'<g class="s{ink}">{drawn}</g>{short}')
        y += tall + 2
    axis = _x_axis([(t / 100, f"{t}%") for t in ticks], x, 28, y, x_label)
    return _svg(WIDTH, y + 46, title, axis + "".join(body))


def stacked(
    title: str, x_label: str, rows: Sequence[str], parts: Sequence[tuple[str, int, Sequence[int]]]
) -> Markup:
    """Draw one bar a row, made of the counts of each part."""
    totals = [sum(counts[i] for _, _, counts in parts) for i in range(len(rows))]
    most = max([*totals, 1])
    size = 10 ** int(math.log10(most))
    step = next(s for s in (size // 2, size, size * 2) if s and most / s <= 5)
    limit = -(-most // step) * step
    x, top, bottom = Scale(0, limit, 82, WIDTH - 46), 34.0, 34.0 + 38 * len(rows)
    ticks = [(tick, f"{tick:,}") for tick in range(0, limit + 1, step)]
    body = [_legend([(label, ink) for label, ink, _ in parts])]
    body.append(_x_axis(ticks, x, top, bottom, x_label))
    for r, row in enumerate(rows):
        y, before = top + 38 * r + 6, 0
        body.append(_text(74, y + 17, row, "end", 11))
        for label, ink, counts in parts:
            start, end = x(before), x(before + counts[r])
            before += counts[r]
            block = _title(f"{label}: {counts[r]}") + _rect(start, y, end - start, 26, "block")
            body.append(f'<g class="s{ink % 5}">{block}</g>')
            if end - start > 30:
                body.append(_text((start + end) / 2, y + 17, f"{counts[r]}", "middle on"))
        body.append(_text(x(before) + 6, y + 17, f"{totals[r]:,}", "strong"))
    return _svg(WIDTH, bottom + 46, title, "".join(body))


def _x_axis(
    ticks: Sequence[tuple[float, str]], x: Scale, top: float, bottom: float, label: str
) -> str:
    parts = [_text((x.start + x.end) / 2, bottom + 40, label, "middle axis")]
    for value, name in ticks:
        parts.append(_line(x(value), top, x(value), bottom, "grid"))
        parts.append(_text(x(value), bottom + 18, name, "middle axis"))
    return "".join(parts)


def _y_axis(ticks: Iterable[int], y: Scale, left: float, right: float) -> str:
    parts = []
    for tick in ticks:
        parts.append(_line(left, y(tick / 100), right, y(tick / 100), "grid"))
        parts.append(_text(left - 6, y(tick / 100) + 4, f"{tick}%", "end axis"))
    return "".join(parts)


def _svg(width: float, height: float, title: str, body: str) -> Markup:
    name = escape(visible(title))
    frame = f'viewBox="0 0 {_n(width)} {_n(height)}" style="min-width:{width * 0.74:.0f}px"'
    frame += ' class="long"' if width > 1.3 * WIDTH else ""
    drawing = f'<svg role="img" aria-label="{name}" {frame}>{_title(title)}{body}</svg>'
    return Markup(drawing)  # noqa: S704 - every text in it went through `escape`


def _legend(entries: Sequence[tuple[str, int]]) -> str:
    parts, x = [], 8.0
    for label, ink in entries:
        parts.append(f'<g class="s{ink % 5}">{_mark(label, "", x, 12, ink, True)}</g>')
        parts.append(_text(x + 11, 16, label, "", 20))
        x += 32 + 7.2 * min(len(label), 20)
    return "".join(parts)


def _mark(note: str, bars: str, x: float, y: float, ink: int, solid: bool) -> str:
    where = f'd="{SHAPES[ink % 5]}" transform="translate({_n(x)} {_n(y)})"'
    kind = "mark" if solid else "mark hollow"
    return f'<g class="{kind}">{_title(note)}{bars}<path {where}/></g>'


def _whisker(x1: float, y1: float, x2: float, y2: float) -> str:
    dx, dy = (0, 3) if y1 == y2 else (3, 0)
    ends = (_line(x - dx, y - dy, x + dx, y + dy, "cap") for x, y in ((x1, y1), (x2, y2)))
    return _line(x1, y1, x2, y2, "whisker") + "".join(ends)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def _rect(x: float, y: float, width: float, height: float, kind: str = "") -> str:
    size = f'width="{_n(width)}" height="{_n(height)}"'
    return f'<rect class="{kind}" x="{_n(x)}" y="{_n(y)}" {size} rx="3"/>'


def _text(x: float, y: float, text: str, kind: str, limit: int = 80) -> str:
    shown = visible(text)
    cut = shown if len(shown) <= limit else shown[: limit - 1] + "…"
    full = _title(text) if cut != shown else ""
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}">{full}{escape(cut)}</text>'


def _title(text: str) -> str:
    return f"<title>{escape(visible(text))}</title>"


def _n(value: float) -> str:
    # Adding 0.0 turns -0.0 into 0.0: one number, one spelling.
    return f"{round(value, 1) + 0.0:.1f}"
