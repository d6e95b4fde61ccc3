"""Several runs side by side: means over seeds with intervals, as a table and as data."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from selfmoa import metrics
from selfmoa.records import Estimate
from selfmoa.rundir import write_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PHASES = ("instruct", "reset", "final")
COLUMNS = {
    "safety": "safety",
    "asr_heldout_styles": "ASR, held-out styles",
    "helpfulness": "helpfulness",
    "over_refusal": "over-refusal",
    "redirect_share": "safe redirects",
}


def tabulate(summaries: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> dict[str, Any]:
    """Write comparison.json and comparison.md into `folder` and return what they hold.

    Args:
        summaries: recipe name -> the summaries of its runs, one a seed.
        folder: where the two files go.
    """
    rows = [_row(name, runs) for name, runs in summaries.items()]
    table = _markdown(rows)
    found: dict[str, Any] = {"rows": rows, "markdown": table}
    write_atomic(folder / "comparison.json", json.dumps(found, indent=1) + "\n")
    write_atomic(folder / "comparison.md", table)
    return found


def _row(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    phases: dict[str, dict[str, Any]] = {}
    for phase in PHASES:
        present = [run[phase] for run in runs if run.get(phase)]
        if present:
            phases[phase] = {
                metric: metrics.average(
                    metric, [Estimate.from_json(p[metric] | {"name": metric}) for p in present]
                ).to_json()
                for metric in COLUMNS
            }
    return {
        "recipe": name,
        "seeds": [run["seed"] for run in runs],
        "metrics": phases,
        "pairs_total": sum(run["pairs_total"] for run in runs) / len(runs),
    }


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["recipe", "policy", *COLUMNS.values(), "pairs a run", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        for phase, found in row["metrics"].items():
            cells = [row["recipe"], phase, *(_cell(found[m]) for m in COLUMNS)]
            cells += [f"{row['pairs_total']:.0f}", str(len(row["seeds"]))]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "n/a"
    low, high = estimate["low"], estimate["high"]
    return f"{estimate['value']:.1%} [{low:.1%}, {high:.1%}]"
