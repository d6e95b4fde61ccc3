"""An archive of attacks as text: its grid, its best attacks, and what a replay found. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selfmoa.console.words import clean, columns, reading

WITHHELD = "(text withheld; --reveal shows it)"


def imported(found: Mapping[str, Any]) -> str:
    """Return how many attacks were kept, and why others were not."""
    told = ", ".join(f"{n:,} {reason}" for reason, n in sorted(found["skipped"].items()))
    return f"{found['kept']:,} attacks in {found['cells']} cells" + (
        f"; skipped: {told}." if told else "."
    )


def archive(found: Mapping[str, Any]) -> str:
    """Return an archive as `redteam.show` describes it."""
    states = ", ".join(f"{n:,} {state}" for state, n in found["states"].items())
    diversity = found["diversity"]
    bleu = "n/a" if diversity["self_bleu"] is None else f"{diversity['self_bleu']:.2f}"
    n = sum(found["states"].values())
    lines = [f"{n:,} attacks, against {found['policy'] or 'no policy yet'}: {states}."]
    filled = f"{diversity['coverage']:.0%} of the cells filled"
    sizes = f"{diversity['clusters']:,} clusters, self-BLEU {bleu}, {found['tokens']:,} tokens"
    lines.append(f"{filled}, {sizes} of responses.")
    grid = [("category", "style", "attacks", "working")]
    grid += [(c["category"], c["style"], c["attacks"], c["working"]) for c in found["grid"]]
    best = [("attack", "cell", "state", "success", "text")]
    best += [
        (
            each["id"],
            f"{each['category']} / {each['style']}",
            each["state"],
            f"{each['quality']:.2f}",
            clean(each.get("text", WITHHELD)),
        )
        for each in found["best"]
    ]
    return "\n".join([*lines, "", columns(grid), "", columns(best)])


def replayed(found: Mapping[str, Any]) -> str:
    """Return hit rates as `redteam.replay` found them."""
    last = f"hit@{found['k']}"
    rows = [("category", "style", "attacks", "hit@1", last)]
    rows += [
        (
            line["category"],
            line["style"],
            line[last]["n"] + line[last]["n_unjudged"],
            reading(line["hit@1"]),
            reading(line[last]),
        )
        for line in found["cells"]
    ]
    tail = f"\nTarget: {found['policy']}, {found['k']} responses each."
    if found["left_out"]:
        what = "conversations of strategies that the recipe does not have were left out"
        tail += f" {found['left_out']:,} {what}."
    return columns(rows) + tail
