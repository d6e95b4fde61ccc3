"""Numbers and foreign text as words on a line. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

METRICS = {"safety": "safety", "helpfulness": "helpfulness", "over_refusal": "over-refusal"}
"""What is told of a phase, and under which name."""


def clean(text: object) -> str:
    """Return `text` as one line of printable characters: it cannot steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def reading(estimate: Mapping[str, Any] | None) -> str:
    """Return a rate with its interval, as in "91.2 % [88.9, 93.2]"."""
    if not estimate or estimate.get("value") is None:
        return "n/a"
    value, low, high = (100 * float(estimate[key]) for key in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def readings(metrics: Mapping[str, Any]) -> str:
    """Return the three rates of a phase, as in "safety 91.2 % [88.9, 93.2], helpfulness ..."."""
    return ", ".join(f"{label} {reading(metrics.get(name))}" for name, label in METRICS.items())


def duration(seconds: float) -> str:
    """Return a time span in at most six characters: "3.4 s", "41 s", "2m03s", "1h05m"."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def columns(rows: Sequence[Sequence[object]], indent: str = "") -> str:
    """Return rows of cells as aligned lines of plain text."""
    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join((indent + "  ".join(map(str.ljust, row, widths))).rstrip() for row in cells)
