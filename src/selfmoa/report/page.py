"""From a story to a page: both templates, HTML and Markdown, print one view of it.

A view is made of sections, a section of figures, tables and sentences about what is missing; the
templates know nothing of rounds or judges. Text of models and recipes reaches a page through one
door, the `finalize` of its template environment (`words`), which makes hidden characters visible
before anything is escaped. Left out on purpose: files, clocks, chance; equal stories, equal pages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from selfmoa.report import figures
from selfmoa.report.figures import Mark, Row, Series, Step
from selfmoa.report.words import (
    Estimate,
    basis,
    bounds,
    cell,
    difference,
    direction,
    mark,
    markdown,
    points,
    reading,
    shown,
)

Story = Mapping[str, Any]

MEASURES = {  # name: (label, what it counts, whether more is better)
    "safety": ("Safety", "answers that are safe", True),
    "helpfulness": ("Helpfulness", "how much of what was asked is answered well", True),
    "over_refusal": ("Over-refusal", "harmless requests that are refused", False),
    "asr": ("Attack success (ASR)", "attacks that draw an unsafe answer", False),
    "asr_heldout_styles": ("ASR, held-out styles", "the same, in styles never trained on", False),
    "redirect_share": ("Safe redirects", "unsafe requests met with a safe alternative", True),
}
VERDICTS = {  # words for a change that is clearly up, clearly down, or not clear
    "safety": ("safer", "less safe", "not measurably safer"),
    "helpfulness": ("more helpful", "less helpful", "about as helpful"),
    "over_refusal": (
        "quicker to refuse harmless requests",
        "slower to refuse harmless requests",
        "no quicker to refuse harmless requests",
    ),
}
BASIS = ("Value", "95% interval", "n", "Unjudged", "Judge")


class Table(NamedTuple):
    """A table of words, counts and estimates; its first column names the rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Figure(NamedTuple):
    """A chart and its numbers, under one title."""

    svg: Markup
    numbers: Table


Part = Figure | Table | str  # a sentence says what the story does not tell


class Section(NamedTuple):
    """A part of the page with its anchor."""

    id: str
    title: str
    parts: Sequence[Part]


def render_html(story: Story) -> str:
    """Return the report of `story` as one HTML page."""
    return environment(shown).get_template("page.html.j2").render(view(story))


def render_markdown(story: Story) -> str:
    """Return the report of `story` as Markdown."""
    text = environment(markdown).get_template("page.md.j2").render(view(story))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@cache
def environment(finalize: Callable[[Any], Any]) -> Environment:
    """Return where the templates are; every value printed goes through `finalize`."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def view(story: Story) -> dict[str, Any]:
    """Return everything the templates print, in final words."""
    phases = story.get("phases") or []
    start = next((p for p in phases if p["name"] == "instruct"), phases[0] if phases else None)
    kept = [p for p in phases if p.get("kept", True)]
    end = next((p for p in phases if p["name"] == story.get("final")), kept[-1] if kept else None)
    stop = story.get("stop")
    return {
        "name": story.get("name") or "unnamed",
        "description": story.get("description") or "",
        "facts": [f"{k} {story[k]}" for k in ("recipe", "seed") if story.get(k) is not None],
        "verdict": _verdict(start, end),
        "headline": story.get("headline") or [],
        "changes": [line for name in VERDICTS if (line := _change_line(name, start, end))],
        "result": end["name"] if end else "the result",
        "tiles": [_tile(name, start, end) for name in MEASURES if _metric(end, name)],
        "made": _made(story, phases, end),
        "stop": f"The run stopped after round {stop['round']}: {stop['reason']}" if stop else "",
        "rejected": _rejected(phases, end),
        "sections": [
            Section("phases", "Phase by phase", _progress(phases, end)),
            Section("heat", "Where attacks succeed", _heat(story.get("heat") or {}, end)),
            Section("attacks", "Red team", _attacks(story)),
            Section("judges", "The judges, judged", _judges(story.get("judges") or [])),
            Section("drift", "Do the judges part ways?", _drift(story)),
            Section("pairs", "Preference pairs", _pairs(story.get("pairs") or [])),
        ],
        "examples": story.get("examples") or [],
        "setup": [_listing(key, story.get(key) or {}) for key in ("settings", "versions")],
    }


# The summary


def _metric(phase: Story | None, name: str) -> Estimate | None:
    found: Estimate | None = ((phase or {}).get("metrics") or {}).get(name)
    return found


def _changed(
    name: str, start: Story | None, end: Story | None
) -> tuple[float, float, float] | None:
    """Return a measure's change: prompt by prompt where the run compared it so, else of two rates.

    A run compares every phase with its instruct model.
    """
    paired = _metric(end, f"{name}_change") if start and start["name"] == "instruct" else None
    if found := bounds(paired):
        value, low, high = (0.0 if part is None else part for part in found)
        return value, low, high
    return difference(_metric(start, name), _metric(end, name))


def _verdict(start: Story | None, end: Story | None) -> str:
    if start is None or end is None or start is end:
        return "There is no result yet to compare with the start of the run."
    told = []
    for name, (more, less, neither) in VERDICTS.items():
        if change := _changed(name, start, end):
            told.append({1: more, -1: less, 0: neither}[direction(change)])
    if not told:
        return f"{end['name']} and {start['name']} cannot be compared: nothing was judged in both."
    listed = " and ".join(filter(None, [", ".join(told[:-1]), told[-1]]))
    return f"Compared with {start['name']}, the result ({end['name']}) is {listed}."


def _change_line(name: str, start: Story | None, end: Story | None) -> str:
    before, after = _metric(start, name), _metric(end, name)
    if start is None or end is None or start is end or not (before or after):
        return ""
    change = _changed(name, start, end)
    told = points(change) if change else "change n/a"
    chance = ", which could be chance" if change and not direction(change) else ""
    return (
        f"{MEASURES[name][0]}: {told}{chance}. Before ({start['name']}): {cell(before)}; "
        f"after ({end['name']}): {cell(after)}."
    )


def _tile(name: str, start: Story | None, end: Story | None) -> dict[str, str]:
    label, meaning, up = MEASURES[name]
    found = _metric(end, name) or {}
    change = None if start is end else _changed(name, start, end)
    tone = ("good" if (direction(change) > 0) == up else "bad") if direction(change) else "flat"
    since = f"{points(change)} against {start['name']}" if change and start else ""
    (value, span), (n, unjudged, judge) = reading(found), basis(found)
    rests = f"n = {n}, {unjudged} unjudged, judge {judge}"
    words = {"label": label, "meaning": meaning, "value": value, "interval": span}
    return {**words, "basis": rests, "change": since, "tone": tone}


def _made(story: Story, phases: Sequence[Story], end: Story | None) -> list[str]:
    rounds = [phase for phase in phases if phase["name"] not in {"instruct", "reset"}]
    passed = sum(bool(phase.get("kept", True)) for phase in rounds)
    attacks, pairs = story.get("red_team") or [], story.get("pairs") or []
    judges = {row["name"] for row in story.get("judges") or [] if not row.get("is_ensemble")}
    used = sum(n for row in pairs for n in (row.get("kept") or {}).values())
    calls, found = (sum(row[key] for row in attacks) for key in ("calls", "found"))
    count = f"; {found:,} of {calls:,} attacks worked" if attacks else ""
    size = f", {used:,} pairs" if pairs else ""
    reset = "helpful-only training removed the model's safety on purpose; never use that policy"
    if all(phase["name"] != "reset" for phase in phases):
        reset = "none; the loop began with the model as it was"
    votes = f"{len(judges) or 'several'} weak judges voted on the answers"
    held = f"{passed} of {len(rounds)} rounds still answered harmless probes, by the weak judges"
    return [
        f"Reset: {reset}.",
        f"Red team: prompts were made against each round's own policy{count}.",
        f"Judge: {votes}, and a label model weighed their votes.",
        f"Train: preference optimisation for safety and helpfulness at once{size}.",
        f"Gate: {held}; the result is {end['name'] if end else 'none'}.",
    ]


def _rejected(phases: Sequence[Story], end: Story | None) -> list[str]:
    lines, last = [], "the start"
    for phase in phases:
        if phase.get("kept", True):
            last = phase["name"]
            continue
        told = [f"{MEASURES[n][0]} {cell(e)}" for n in VERDICTS if (e := _metric(phase, n))]
        measured = f" It measured: {'; '.join(told)}." if told else ""
        lines.append(f"{phase['name']} was rejected and the policy fell back to {last}.{measured}")
    if end and end["name"] == "reset":
        lines.append(
            "The result is the reset policy itself: its safety was removed, do not use it."
        )
    return lines


# The sections


def _progress(phases: Sequence[Story], end: Story | None) -> list[Part]:
    if not phases:
        return ["The story has no phases."]
    steps = [_step(phase, end) for phase in phases]
    lines = [
        Series(label, ink, [mark(_metric(p, name), f"{p['name']}, {label}") for p in phases])
        for ink, (name, label) in enumerate((name, MEASURES[name][0]) for name in VERDICTS)
    ]
    found_names = {name for phase in phases for name in phase.get("metrics") or {}}
    extra = {name for name in found_names - set(MEASURES) if not name.endswith("_change")}
    labels = {name: MEASURES[name][0] for name in MEASURES} | {
        name: name.replace("_", " ") for name in sorted(extra)
    }
    rows = [
        (step.label, step.caption, label, *reading(found), *basis(found))
        for phase, step in zip(phases, steps, strict=True)
        for name, label in labels.items()
        if (found := _metric(phase, name))
    ]
    title = "Safety, helpfulness and over-refusal by phase"
    numbers = Table(title, ("Phase", "Fate", "Measure", *BASIS), rows)
    if not any(any(line.marks) for line in lines):
        return ["No phase has a judged safety, helpfulness or over-refusal.", numbers]
    chart = figures.trend(title, "phase of the run", "share of answers", steps, lines)
    first = Figure(chart, numbers)
    places = zip(steps, lines[1].marks, lines[0].marks, strict=True)
    both = [(step, x, y) for step, x, y in places if x and y]
    if not both:
        return [first, "No phase has both safety and helpfulness."]
    title = "Safety against helpfulness: the way of the policy"
    chart = figures.plane(title, "helpfulness, more is better", "safety, more is better", both)
    cells = [(p["name"], _metric(p, "helpfulness"), _metric(p, "safety")) for p in phases]
    return [first, Figure(chart, Table(title, ("Phase", "Helpfulness", "Safety"), cells))]


def _step(phase: Story, end: Story | None) -> Step:
    kept, reset = bool(phase.get("kept", True)), phase["name"] == "reset"
    fate = "safety removed" if reset else "" if kept else "rejected"
    return Step(phase["name"], "result" if phase is end else fate, kept, reset, phase is end)


def _heat(heat: Story, end: Story | None) -> list[Part]:
    rows, columns, maps = (heat.get(key) or [] for key in ("categories", "styles", "phases"))
    if not (rows and columns and maps):
        return ["The story has no attack success by category and style."]
    styles = [(style, style in (heat.get("heldout_styles") or [])) for style in columns]
    heads = ["Category", *(f"{name} (held out)" if heldout else name for name, heldout in styles)]
    known = ("instruct", "reset", "final")
    parts: list[Part] = []
    for phase in [*(p for p in known if p in maps), *sorted(set(maps) - set(known))]:
        which = f"{phase} ({end['name']})" if end and phase == "final" else phase
        title = f"Attack success, {which}"
        marks = [
            (row, [mark(found, f"{row}, {s}") for s, found in zip(columns, line, strict=True)])
            for row, line in zip(rows, maps[phase], strict=True)
        ]
        chart = figures.heat_map(title, styles, marks)
        cells = [(row, *line) for row, line in zip(rows, maps[phase], strict=True)]
        parts.append(Figure(chart, Table(title, heads, cells)))
    return parts


def _attacks(story: Story) -> list[Part]:
    rounds = story.get("red_team") or []
    if not rounds:
        return ["The story has no red-team rounds."]
    heads = {
        "Round": "round",
        "Hit rate": "hit_rate",
        "Calls": "calls",
        "Found": "found",
        "Archive cells filled": "cells_filled",
        "Archive cells": "cells",
    }
    believed = {
        "Round": "round",
        "Hit@1, by the judges": "hit_at_1",
        "Hit@k of those asked again": "hit_at_k",
        "Self-BLEU": "self_bleu",
        "Distinct clusters": "clusters",
        "Cells given up": "given_up",
        "Near-duplicates refused": "refused",
    }
    parts: list[Part] = [
        _pick("Attacks tried and attacks that worked", heads, rounds),
        _pick("What the search believed, and how different its finds are", believed, rounds),
    ]
    if reopened := story.get("reopened"):
        heads = {"Round": "round", "Closed attacks that work again": "reopened"}
        parts.append(_pick("Old holes, asked again", heads, reopened))
    return parts


def _pick(title: str, heads: Mapping[str, str], rows: Sequence[Story]) -> Table:
    return Table(title, list(heads), [[row.get(key) for key in heads.values()] for row in rows])


def _judges(judges: Sequence[Story]) -> list[Part]:
    if not judges:
        return ["The story has no judges measured against the grader."]
    ranked = sorted(judges, key=_judge_order)
    lines: dict[tuple[str, str, bool], list[tuple[str, Mark | None]]] = {}
    for judge in ranked:
        line = judge["name"], judge["objective"], bool(judge.get("is_ensemble"))
        name = f"round {judge['round']}"
        lines.setdefault(line, []).append((f"r{judge['round']}", mark(judge.get("accuracy"), name)))
    rows = [
        Row(name, objective, marks, strong) for (name, objective, strong), marks in lines.items()
    ]
    who = {"Judge": "name", "Objective": "objective", "Round": "round"}
    accuracy = {**who, "Family": "family", "Accuracy": "accuracy"}
    beliefs = {
        **who,
        "Sensitivity, believed": "estimated_sensitivity",
        "Sensitivity, true": "sensitivity",
        "Specificity, believed": "estimated_specificity",
        "Specificity, true": "specificity",
    }
    title = "Accuracy of each judge against the grader"
    chart = figures.dots(title, "accuracy", rows)
    belief = "What the label model believed, and what the grader found"
    return [Figure(chart, _pick(title, accuracy, ranked)), _pick(belief, beliefs, ranked)]


def _drift(story: Story) -> list[Part]:
    """Say how far judges agree, and whether training judges and held-out ones part ways."""
    rounds = story.get("drift") or []
    if not rounds:
        return ["The story has no rounds in which judges could part ways."]
    alarms = [
        f"ALARM in round {row['round']}: the training judges pass more than before of what the "
        "held-out judge calls unsafe. The policy may have learned to please them; read some of "
        "these answers, and change a training judge before going on."
        for row in rounds
        if row["alarm"]
    ]
    heads = {"Round": "round", "Before": "before", "After": "after", "Growth": "growth"}
    title = "Answers that the training judges pass and the held-out judge calls unsafe"
    parts: list[Part] = [*alarms, _pick(title, heads, rounds)]
    if agreement := story.get("agreement"):
        heads = {
            "Round": "round",
            "Krippendorff's alpha": "alpha",
            "Attempts": "n",
            "Without any vote": "unvoted",
        }
        parts.append(_pick("Agreement of the training judges of safety", heads, agreement))
    if worst := story.get("worst"):
        heads = {"Phase": "phase", "Measure": "name", "With all unjudged answers bad": "worst"}
        parts.append(_pick("What unjudged answers may hide", heads, worst))
    return parts


def _judge_order(judge: Story) -> tuple[bool, str, bool, str, int]:
    objective, ensemble = judge["objective"], bool(judge.get("is_ensemble"))
    return objective != "safety", objective, ensemble, judge["name"], judge["round"]


def _pairs(rounds: Sequence[Story]) -> list[Part]:
    if not rounds:
        return ["The story has no preference pairs."]
    names = [f"round {row['round']}" for row in rounds]
    kept, right, dropped = (
        [row.get(key) or {} for row in rounds] for key in ("kept", "right_way", "dropped")
    )
    found = {objective for row in (*kept, *right) for objective in row}
    objectives = sorted(found, key=lambda objective: (objective != "safety", objective))
    inks = [list(VERDICTS).index(o) if o in VERDICTS else 3 for o in objectives]
    counts = [[row.get(o, 0) for row in kept] for o in objectives]
    lines = [
        Series(o, ink, [mark(row.get(o), f"{n}, {o}") for n, row in zip(names, right, strict=True)])
        for o, ink in zip(objectives, inks, strict=True)
    ]
    title, way = "Preference pairs kept", "Pairs that point the right way, says the grader"
    bars = figures.stacked(title, "pairs", names, list(zip(objectives, inks, counts, strict=True)))
    chart = figures.trend(way, "round", "share of pairs", [Step(name) for name in names], lines)
    shares = [(n, *map(row.get, objectives)) for n, row in zip(names, right, strict=True)]
    reasons = sorted({reason for row in dropped for reason in row})
    drops = [(reason, *(row.get(reason, 0) for row in dropped)) for reason in reasons]
    heads = ("Round", *objectives)
    return [
        Figure(bars, Table(title, heads, list(zip(names, *counts, strict=True)))),
        Figure(chart, Table(way, heads, shares)),
        Table("What made no pair, by reason", ("Reason", *names), drops)
        if drops
        else "Nothing was dropped on the way to pairs.",
    ]


def _listing(name: str, values: Story) -> Part:
    # JSON, not words: a setting is copied back into a recipe.
    rows = [
        (key, value if isinstance(value, str) else json.dumps(value, sort_keys=True))
        for key, value in sorted(values.items())
    ]
    return Table(name.title(), ("Name", "Value"), rows) if rows else f"The story has no {name}."
