"""A plan as text: models, stages, and what a run takes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selfmoa.console.words import clean, columns, duration


def planned(found: Mapping[str, Any]) -> str:
    """Return a plan as `planning.plan` makes it."""
    head = f"{clean(found['recipe'])}: {found['rounds']} rounds at most, to the end of all budgets."
    parts = [head, _models(found), _stages(found), _sums(found)]
    parts += [f"Note: {clean(remark)}." for remark in found["remarks"]]
    return "\n\n".join(parts)


def _models(found: Mapping[str, Any]) -> str:
    rows = [("model", "for", "weights", "held", "answers")]
    rows += [
        (
            m["name"],
            ", ".join(m["roles"]),
            _count(m["parameters"]) + (" (guess)" if m["guess"] else ""),
            m["held"] or "-",
            m["endpoint"] or "here",
        )
        for m in found["models"]
    ]
    return columns(rows)


def _stages(found: Mapping[str, Any]) -> str:
    rows = [("stage", "answers", "verdicts", "steps", "tokens", "memory", "by")]
    for line in found["stages"]:
        name = f"{line['stage']} {line['round']}" if line["round"] else line["stage"]
        tokens = line["tokens_read"] + line["tokens_written"] + line["tokens_trained"]
        rows.append(
            (
                name,
                f"{line['generations']:,}",
                f"{line['verdicts']:,}",
                f"{line['steps']:,}",
                _count(tokens or None),
                f"{line['memory_bytes'] / 1e9:.2f} GB" if line["memory_bytes"] else "-",
                line["memory_by"],
            )
        )
    return columns(rows)


def _sums(found: Mapping[str, Any]) -> str:
    memory, disk, totals = found["memory"], found["disk"], found["totals"]
    answers = f"In all: {totals['generations']:,} answers, {totals['verdicts']:,} verdicts"
    where = f"{memory['stage']} ({clean(memory['by'])})"
    lines = [
        f"{answers}, {totals['steps']:,} steps; prompts counted by {found['tokens_by']}.",
        f"Memory: {memory['peak_gb']:.1f} GB, all in, for {where}.{_fits(memory)}",
        f"Disk: {disk['run'] / 1e9:.1f} GB for the run, {disk['to_fetch'] / 1e9:.1f} GB to fetch.",
    ]
    times = [f"{name} {duration(seconds)}" for name, seconds in found["seconds"].items()]
    lines.append(f"Time, to a factor of two: {', '.join(times)}.")
    for name, line in found["endpoints"].items():
        asked = f"{line['calls']:,.0f} calls, {_count(line['tokens'])} tokens"
        lines.append(f"Endpoint {name}: {asked}, {line['cost']:.2f} by its prices.")
    return "\n".join(lines)


def _fits(memory: Mapping[str, Any]) -> str:
    if memory["fits"] is None:
        return ""
    limit = f"{memory['limit_gb']:g} GB"
    if not memory["fits"]:
        return f" That does not fit in {limit}: {memory['remedy']}."
    turns = " by turns: models are loaded and freed" if memory["takes_turns"] else ""
    return f" That fits in {limit}{turns}."


def _count(n: float | None) -> str:
    """Return a number in three digits, as in "1.54B" or "820k"."""
    if not n:
        return "-"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"
