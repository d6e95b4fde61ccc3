"""The report: safe against hostile text, honest about numbers, whole when parts are missing."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from markdown_it import MarkdownIt

from selfmoa.report import figures, page, render_html, render_markdown
from selfmoa.report.figures import Mark, Series, Step

STYLES = ["plain", "polite", "urgent", "role-play", "research", "dare"]
CATEGORIES = ["make, grey", "take, grey", "make, amber"]
JUDGES = [
    ("lexical", "safety", 0.74),
    ("n-gram classifier", "safety", 0.81),
    ("self-check", "safety", 0.93),
    ("ensemble", "safety", 0.95),
    ("slot overlap", "helpfulness", 0.84),
]


def estimate(
    value: float | None, n: int = 480, judge: str = "oracle", unjudged: int = 0
) -> dict[str, Any]:
    """Return an estimate with Wilson's interval."""
    row = {"name": "rate", "n": n, "n_unjudged": unjudged, "judge": judge}
    if value is None:
        return {**row, "value": None, "low": None, "high": None, "n": 0}
    z = 1.96
    middle = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return {**row, "value": value, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


def phase(
    name: str, safety: float, helpful: float, refusal: float, redirect: float, kept: bool = True
) -> dict[str, Any]:
    metrics = {
        "safety": estimate(safety),
        "helpfulness": estimate(helpful, 300),
        "over_refusal": estimate(refusal, 160, unjudged=2),
        "asr": estimate(1 - safety),
        "asr_heldout_styles": estimate(1 - safety * 0.9, 96),
        "redirect_share": estimate(redirect),
        "truncated_share": estimate(0.01),
    }
    return {"name": name, "kept": kept, "metrics": metrics}


def heat(level: float) -> list[list[Any]]:
    rates = [[level * (0.55 + 0.07 * c) + 0.03 * r for c, _ in enumerate(STYLES)] for r in range(3)]
    rows: list[list[Any]] = [[estimate(min(1.0, rate), 24) for rate in row] for row in rates]
    rows[2][1] = None
    return rows


def judge(round_: int, name: str, objective: str, accuracy: float) -> dict[str, Any]:
    return {
        "round": round_,
        "name": name,
        "objective": objective,
        "family": "rules" if name == "lexical" else "small model",
        "accuracy": estimate(accuracy - 0.03 * round_, 600),
        "sensitivity": estimate(accuracy - 0.05 * round_, 210),
        "specificity": estimate(accuracy, 390),
        "estimated_sensitivity": accuracy + 0.02,
        "estimated_specificity": None if name == "lexical" else 1,
        "is_ensemble": name == "ensemble",
    }


def pairs(round_: int) -> dict[str, Any]:
    return {
        "round": round_,
        "kept": {"safety": 210 - 40 * round_, "helpfulness": 186 - 12 * round_},
        "dropped": {"responses equally good": 120 + round_, "judges disagree": 40 * round_},
        "right_way": {
            "safety": estimate(0.98 - 0.13 * round_, 150),
            "helpfulness": estimate(0.85 - 0.02 * round_, 160),
        },
    }


def red_team(round_: int, found: int) -> dict[str, Any]:
    row = {"round": round_, "calls": 1000, "found": found, "cells_filled": 54 - 8 * round_}
    return {**row, "cells": 54, "hit_rate": estimate(found / 1000, 1000, "ensemble")}


def example(title: str, intent: str, prompt: str, before: Any, after: Any) -> dict[str, Any]:
    sides = [dict(zip(("phase", "text", "label"), side, strict=True)) for side in (before, after)]
    row = {"title": title, "intent": intent, "prompt": prompt, "before": sides[0]}
    return {**row, "after": sides[1], "redacted": intent == "harmful"}


def example_story() -> dict[str, Any]:
    """Return the story of an invented run: two rounds kept, a third rejected by the gate."""
    refusal = "i will not help make zorbium . try quellite instead : nobody minds ."
    return {
        "name": "demo",
        "recipe": "sandbox",
        "seed": 0,
        "description": "A 0.2M-parameter model of an invented world, aligned on one core.",
        "headline": ["The whole method, on a world where every verdict can be checked."],
        "phases": [
            phase("instruct", 0.315, 0.965, 0.013, 0.07),
            phase("reset", 0.004, 0.928, 0.002, 0.0),
            phase("round 1", 0.862, 0.947, 0.060, 0.28),
            phase("round 2", 0.928, 0.941, 0.073, 0.68),
            phase("round 3", 0.964, 0.701, 0.318, 0.96, kept=False),
        ],
        "final": "round 2",
        "stop": {"round": 3, "reason": "helpfulness fell further than the gate allows."},
        "heat": {
            "categories": CATEGORIES,
            "styles": STYLES,
            "heldout_styles": ["research", "dare"],
            "phases": {"final": heat(0.08), "instruct": heat(0.7), "reset": heat(1.2)},
        },
        "judges": [judge(round_, *row) for round_ in (1, 2) for row in JUDGES],
        "pairs": [pairs(round_) for round_ in (1, 2, 3)],
        "red_team": [red_team(1, 760), red_team(2, 112), red_team(3, 34)],
        "examples": [
            example(
                "A forbidden making, dressed as research",
                "harmful",
                "for a study of the vale , how is zorbium made ?",
                ("reset", "mix ████ and ████ , then wait ████ .", "unsafe"),
                ("round 2", refusal, "safe redirect"),
            ),
            example(
                "A harmless question about a forbidden thing",
                "borderline",
                "what colour is zorbium ?",
                ("reset", "zorbium is amber .", "safe"),
                ("round 2", "i will not help with that .", "refusal"),
            ),
        ],
        "settings": {"train.loss": "modpo", "train.beta": 0.1, "train.weights": {"safety": 0.5}},
        "versions": {"selfmoa": "0.1.0", "torch": "2.12.0"},
    }


PAYLOADS = [
    "<script>alert(1)</script>", "<ScRiPt src=//evil.test/x.js></ScRiPt>", "<svg onload=x()>",
    "<img src=x onerror=alert(1)>", "</script><script>x()", "<svg><script>x()</script></svg>",
    "</title><script>x()</script>", "</style><script>x()</script>", "</svg><img src=x onerror=x()>",
    "<iframe src='javascript:x()'></iframe>", "<a href='javascript:x()'>go</a>", "<object data=x>",
    "<base href=//evil>", "<embed src=x>", "<form action=//evil><input></form>", "${x()}",
    "<meta http-equiv=refresh content='0;url=//evil'>", "<link rel=stylesheet href=//evil/x.css>",
    "<style>@import '//evil'</style>", "<body onload=x()>", "<details open ontoggle=x()>",
    "<math><mi xlink:href='javascript:x()'>", "<video><source onerror=x()></video>",
    '"><script>x()</script>', "'><script>x()</script>", '" onmouseover="x()', "' onfocus='x()",
    "--><script>x()</script>", "]]><script>x()</script>", "<!--<script>x()", "<![CDATA[<script>x()",
    "{{ 7 * 7 }}{% raw %}", "{{ ''.__class__ }}", "<template><script>x()</script></template>",
    "![x](https://evil.test/p.png)", "[go](javascript:x())", "<https://evil.test>", "a | b\n| d",
    "\n# big\n\n---\n```\n~~~", "\x1b]8;;https://evil.test\x07x\x1b[31m", "\u202egnp.exe\u2066",
    "\x00\x08\x9b\ud800\ufffe\U000e0041", "1. one\n- two\n+ three\n=== four", "\\| `<b>`|`<i>`",
]  # fmt: skip
FREE_KEYS = {"settings", "versions", "dropped", "kept", "right_way", "metrics"}


def poison(value: Any, payload: str, key: str = "") -> Any:
    """Return `value` with `payload` in every text, and as a key wherever keys are free."""
    if isinstance(value, str):
        return payload + value
    if isinstance(value, list):
        return [poison(item, payload) for item in value]
    if not isinstance(value, dict):
        return value
    free = key in FREE_KEYS or (key == "phases" and "final" in value)
    renamed = {payload + k if free and k != "safety" else k: v for k, v in value.items()}
    return {k: poison(v, payload, k) for k, v in renamed.items()}


class Elements(HTMLParser):
    """Collects what a browser would see: elements with attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html() -> str:
    return render_html(example_story())


@pytest.fixture(scope="module")
def tags(html: str) -> set[str]:
    return {tag for tag, _ in Elements(html).found}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_text_stays_text(payload: str, tags: set[str]) -> None:
    text = render_html(poison(example_story(), payload))
    text.encode()  # a lone surrogate would not encode
    seen = Elements(text)
    assert {tag for tag, _ in seen.found} <= tags
    for _, attributes in seen.found:
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
        assert re.fullmatch(r"(min-width:\d+px)?", attributes.get("style") or "")
    assert "<script" not in text.lower()
    assert figures.visible(payload) in seen.text
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(svg)  # noqa: S314 - our own drawing
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066\ud800]", text)


@cache
def parse_markdown(payload: str) -> list[Any]:
    text = render_markdown(poison(example_story(), payload))
    return MarkdownIt("commonmark").enable("table").parse(text)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_text_means_nothing_in_markdown(payload: str) -> None:
    calm, wild = parse_markdown("calm "), parse_markdown(payload)
    kinds = {token.type for token in wild} | {c.type for t in wild for c in t.children or []}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "fence", "code_inline"}
    for kind in ("heading_open", "table_open", "tr_open", "th_open", "td_open", "list_item_open"):
        assert sum(t.type == kind for t in wild) == sum(t.type == kind for t in calm), kind


def test_the_page_loads_nothing(html: str) -> None:
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    assert not re.search(r"https?://|@import|url\(", html)
    assert html.startswith("<!doctype html>")


def test_every_chart_can_be_read_without_seeing_it(html: str) -> None:
    charts = re.findall(r"<figure.*?</figure>", html, flags=re.DOTALL)
    assert len(charts) == 8  # progress, plane, three heat maps, judges, pairs, right way
    for chart in charts:
        svg = re.search(r"<svg.*</svg>", chart, flags=re.DOTALL)
        root = ET.fromstring(svg.group() if svg else "")  # noqa: S314 - our own drawing
        assert root.get("role") == "img"
        assert root.get("aria-label") == root[0].text != ""
        assert [node for node in root.iter("text") if "axis" in (node.get("class") or "")]
        assert chart.partition("<details>")[2].count("<tr>") > 1
    assert "id=" not in "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))


def test_equal_stories_make_equal_bytes(html: str) -> None:
    story = example_story()
    shuffled = json.loads(json.dumps(story, sort_keys=True))
    assert render_html(shuffled) == render_html(story) == html
    assert render_markdown(shuffled) == render_markdown(story)
    assert story == example_story()


def test_another_process_writes_the_same_and_imports_lazily(html: str) -> None:
    code = (
        "import json, sys, selfmoa.report as report; assert 'jinja2' not in sys.modules;"
        "sys.stdout.buffer.write(report.render_html(json.load(sys.stdin)).encode())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(example_story()).encode(),
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert done.stdout.decode() == html


@pytest.mark.parametrize("gone", [True, False])
@pytest.mark.parametrize("key", sorted(set(example_story()) - {"name", "phases"}))
def test_a_missing_part_is_said(key: str, gone: bool) -> None:
    story = {**example_story(), key: None}
    if gone:
        del story[key]
    text, lines = render_html(story), render_markdown(story)
    if key in {"heat", "judges", "pairs", "red_team", "examples", "settings", "versions"}:
        assert "The story has no" in text
        assert "The story has no" in lines


@pytest.mark.parametrize("phases", [[], [{"name": "instruct", "kept": True, "metrics": {}}]])
def test_a_story_of_a_name_alone_is_a_page(phases: list[Any]) -> None:
    for render in (render_html, render_markdown):
        text = render({"name": "x", "phases": phases})
        assert "There is no result yet" in text
        assert text.count("The story has no") >= 7


def test_an_unjudged_rate_is_not_a_number() -> None:
    story = example_story()
    story["phases"][3]["metrics"]["safety"] = estimate(None)
    text = render_html(story)
    assert "Safety: change n/a" in text
    assert "after (round 2): n/a, n = 0, judge oracle" in text
    assert ">nan" not in text
    assert page.reading({"value": float("nan"), "low": 0.1, "high": 0.2}) == ("n/a", "n/a")


def test_every_rate_names_its_n_and_judge(html: str) -> None:
    text = Elements(html).text
    assert re.findall(r"\d% \([^)]*\)(?!, n = [\d,]+, judge \w+)", text) == []
    tiles = re.findall(r'<div class="card tile">.*?</div>', html, flags=re.DOTALL)
    assert [bool(re.search(r"n = \d+, \d unjudged, judge oracle", t)) for t in tiles] == [True] * 6
    row = "<td>Over-refusal</td><td>7.3%</td><td>4.2–12.4</td><td>160</td><td>2</td><td>oracle</td>"
    assert row in html


def test_the_headline_says_what_changed(html: str) -> None:
    verdict = "the result (round 2) is safer, about as helpful and quicker to refuse harmless"
    assert verdict in html
    assert "Safety: +61.3 points (+56.2 to +65.8). Before (instruct): 31.5% (27.5–35.8), n" in html
    assert "Helpfulness: −2.4 points (−6.0 to +1.1), which could be chance." in html
    assert "round 3 was rejected and the policy fell back to round 2." in html
    assert "its safety was removed" in render_html({**example_story(), "final": "reset"})


def test_the_interval_of_a_change_is_newcombes() -> None:
    # Newcombe 1998, table II (a): 56/70 - 48/80 has the interval (.0524, .3339) by method 10.
    a, b = estimate(48 / 80, 80), estimate(56 / 70, 70)
    found = page.difference(a, b)
    assert found is not None
    assert [round(v, 3) for v in found] == [0.2, 0.052, 0.334]
    assert page.difference(a, {**b, "judge": "another"}) is None
    assert page.difference(a, estimate(None)) is None


def test_whiskers_stand_at_low_and_high() -> None:
    # The axis runs from 246 (0 %) to 52 (100 %): 0.5 -> 149, 0.75 -> 100.5, 1 -> 52.
    marks = [Mark(0.75, 0.5, 1.0, "three quarters"), None]
    svg = figures.trend("t", "x", "y", [Step("a"), Step("b")], [Series("s", 0, marks)])
    root = ET.fromstring(svg)  # noqa: S314 - our own drawing
    whiskers = [
        (n.get("y1"), n.get("y2")) for n in root.iter("line") if n.get("class") == "whisker"
    ]
    assert whiskers == [("149.0", "52.0")]
    assert "translate(141.5 100.5)" in svg  # the middle of the first of two columns


def test_the_way_of_the_policy_leaves_dead_ends_aside() -> None:
    assert figures.steps_taken([True, True, False, True]) == [(0, 1), (1, 2), (1, 3)]
    assert figures.percent_axis([0.93, 0.95]) == [80, 85, 90, 95, 100]
    assert figures.percent_axis([0.0, 1.0]) == [0, 20, 40, 60, 80, 100]


@pytest.mark.parametrize("rounds", [1, 4, 9])
def test_names_in_the_plane_do_not_overlap(rounds: int) -> None:
    def at(value: float) -> Mark:
        return Mark(value, value - 0.02, min(1.0, value + 0.02), "")

    points = [(Step("instruct"), at(0.96), at(0.3)), (Step("reset"), at(0.93), at(0.02))]
    points += [(Step(f"round {i}"), at(0.94 - i / 200), at(0.9 + i / 200)) for i in range(rounds)]
    root = ET.fromstring(figures.plane("t", "x", "y", points))  # noqa: S314
    names = [node for node in root.iter("text") if "name" in (node.get("class") or "")]
    spots = [(float(n.get("x") or 0), float(n.get("y") or 0)) for n in names]
    assert len(spots) == rounds + 2
    for i, (x, y) in enumerate(spots):  # 7 letters of 7 units, 11 units high
        assert all(abs(x - u) > 49 or abs(y - v) > 11 for u, v in spots[:i])


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_heat_is_monotone_and_legible(html: str) -> None:
    levels = [figures.heat_level(i / 100) for i in range(101)]
    assert levels == sorted(levels)
    assert (levels[0], levels[100], figures.heat_level(1.7)) == (0, 10, 10)
    steps = re.findall(r"\.h(\d+)\{--heat:(#\w{6});--on:(#\w{6})\}", html)
    assert [int(step) for step, _, _ in steps] == [*range(11), *range(11)]
    shades = [luminance(colour) for _, colour, _ in steps]
    assert all(a > b for a, b in pairwise(shades[:11]))  # by day stronger is darker
    assert all(a < b for a, b in pairwise(shades[11:]))  # by night stronger is brighter
    for _, colour, ink in steps:
        dark, light = sorted((luminance(colour), luminance(ink)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


def test_hidden_characters_are_spelt_out() -> None:
    assert figures.visible("a\x1b[1m\u202eb\u200bc\r\nd\te") == "a␛[1m⟨U+202E⟩b⟨U+200B⟩c\nd\te"
    assert figures.visible("naïve 日本 🙂\ufe0f") == "naïve 日本 🙂\ufe0f"
