"""Values as words: rates, intervals and changes, for a page, a chart or a line of Markdown.

A rate of a sentence, a table or a tooltip is spelt here and nowhere else, so that it never stands
without its interval, its n and its judge. A template sends every value through `shown` or
`markdown`. Left out on purpose: which numbers to show, and charts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Undefined
from markupsafe import Markup

from selfmoa.report.figures import Mark, visible

Estimate = Mapping[str, Any]


def shown(value: Any) -> Any:
    """Return a value of a story in words, its hidden characters visible; markup as it is."""
    if isinstance(value, Markup | Undefined):
        return value
    if value is None:
        return "n/a"
    if isinstance(value, Mapping):
        return visible(cell(value))
    if isinstance(value, float):
        return f"{percent(value)}%"
    return f"{value:,}" if isinstance(value, int) else visible(value)


def markdown(value: Any) -> Any:
    r"""Return a value in words on one line that mean only themselves: "a|b" becomes "a\|b"."""
    words = shown(value)
    if not isinstance(words, str) or isinstance(words, Markup):
        return words
    line = re.sub(r"\s*\n\s*", " ", words).strip()
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_|~$\[\]])", r"\\\1", line)
    line = re.sub(r"(?i)(?<=[a-z]):(?=//)|(?<=www)\.", r"\\\g<0>", line)  # no links by themselves
    line = re.sub(r"^(?=([-+])(?:\s|$|\1)|[=#])", r"\\", line)  # no lists, rules or headings
    line = re.sub(r"^(\d+)([.)](?:\s|$))", r"\1\\\2", line)
    return Markup(line)  # noqa: S704 - escaped above


def bounds(estimate: Estimate | None) -> tuple[float, float | None, float | None] | None:
    """Return (value, low, high), or None where nothing was judged."""
    found = [(estimate or {}).get(key) for key in ("value", "low", "high")]
    value, low, high = (None if v is None or not math.isfinite(v) else float(v) for v in found)
    return None if value is None else (value, low, high)


def percent(value: float | None) -> str:
    """Return a rate as a number of percent, "96.4"; "n/a" for None."""
    # Adding 0.0 turns -0.0 into 0.0.
    return "n/a" if value is None else f"{round(value * 100, 1) + 0.0:.1f}".replace("-", "−")


def reading(estimate: Estimate | None) -> tuple[str, str]:
    """Return the value and the interval: ("96.4%", "94.1–98.0"), or "n/a" for what is unknown."""
    if (found := bounds(estimate)) is None:
        return "n/a", "n/a"
    value, low, high = found
    return f"{percent(value)}%", "n/a" if None in found else f"{percent(low)}–{percent(high)}"


def basis(estimate: Estimate) -> tuple[str, str, str]:
    """Return what an estimate rests on: n, how many were left unjudged, the judge."""
    n, unjudged = (f"{estimate.get(key) or 0:,}" for key in ("n", "n_unjudged"))
    return n, unjudged, str(estimate.get("judge") or "unnamed")


def cell(estimate: Estimate | None) -> str:
    """Return "96.4% (94.1–98.0), n = 480, judge oracle" for a sentence or a cell."""
    if not estimate:
        return "not measured"
    (value, span), (n, unjudged, judge) = reading(estimate), basis(estimate)
    tail = "" if unjudged == "0" else f", {unjudged} unjudged"
    known = f"{value} ({span})" if bounds(estimate) else value
    return f"{known}, n = {n}, judge {judge}{tail}"


def mark(estimate: Estimate | None, name: str) -> Mark | None:
    """Return an estimate as a chart wants it, None where nothing was judged."""
    if (found := bounds(estimate)) is None:
        return None
    value, low, high = found
    low, high = (value if bound is None else bound for bound in (low, high))
    return Mark(value, low, high, f"{name}: {cell(estimate)}")


def difference(
    before: Estimate | None, after: Estimate | None
) -> tuple[float, float, float] | None:
    """Return after - before with the interval of two independent rates of one judge.

    d -+ the root of the summed squares of each rate's distance to the bound that matters on that
    side (Newcombe 1998, method 10). Phases answer the same prompts, which makes the true interval
    narrower: this one errs towards "no clear change". Rates of different judges have no
    difference: two judges can be ten points apart on one and the same model.
    """
    a, b = bounds(before), bounds(after)
    if not (before and after and a and b) or None in a or None in b:
        return None
    if before.get("judge") != after.get("judge"):
        return None
    (p, p_low, p_high), (q, q_low, q_high) = (tuple(v or 0.0 for v in x) for x in (a, b))
    down, up = math.hypot(q - q_low, p_high - p), math.hypot(q_high - q, p - p_low)
    return q - p, q - p - down, q - p + up


def points(change: tuple[float, float, float]) -> str:
    """Return a change in words: "+61.3 points (+56.2 to +65.8)"."""
    d, low, high = (percent(v) if v < 0 else f"+{percent(v)}" for v in change)
    return f"{d} points ({low} to {high})"


def direction(change: tuple[float, float, float] | None) -> int:
    """Return 1 for a change that is clearly up, -1 for clearly down, 0 where it could be chance."""
    return 0 if change is None else (change[1] > 0) - (change[2] < 0)
