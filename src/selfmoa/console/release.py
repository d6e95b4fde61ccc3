"""What was exported, merged or pushed, as text. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selfmoa.console.words import METRICS, clean, columns, reading

TOLD = {"asr": "attack success", **METRICS}
SIZES = ("B", "kB", "MB", "GB", "TB")


def exported(receipt: Mapping[str, Any]) -> str:
    """Return what a folder of a policy or of pairs holds, from its receipt."""
    rounds = receipt["data"]["rounds"]
    if receipt["kind"] == "pairs":
        n = sum(sum(found["kept"].values()) for found in rounds.values())
        return f"{n:,} pairs, of rounds {', '.join(rounds)}. They hold attacks and unsafe answers."
    before, after = (receipt["estimates"][name] for name in ("instruct", receipt["phase"]))
    rows = [("", "base", "this model", "n", "judge")]
    rows += [
        (label, reading(before[name]), reading(after[name]), after[name]["n"], after[name]["judge"])
        for name, label in TOLD.items()
        if name in after
    ]
    base = receipt["base"]["name"]
    head = f"The policy of {receipt['phase']}, {receipt['kind']}, made from {base}."
    return f"{head}\n{columns(rows)}"


def merged(found: Mapping[str, Any]) -> str:
    """Return what was merged: as an export, or whose base could or could not be checked."""
    if "run" in found:
        return exported(found)
    checked = "was compared with what its training noted"
    unchecked = "could not be compared with anything: the adapter has no receipt of it"
    told = checked if found["base"]["checked"] else unchecked
    return f"Merged into {clean(found['base']['name'])}, which {told}."


def pushed(plan: Mapping[str, Any]) -> str:
    """Return what would be sent, what was sent, and what is refused."""
    sight = "private" if plan["private"] else "public"
    rows = [("file", "size", "digest")]
    rows += [(f["name"], size(f["bytes"]), f["digest"]) for f in plan["files"]]
    total = size(sum(f["bytes"] for f in plan["files"]))
    lines = [f"{plan['kind']} {plan['target']} ({sight}): {len(plan['files'])} files, {total}."]
    lines += [columns(rows), *(f"Refused: {clean(why)}." for why in plan["refused"])]
    if plan["commit"]:
        lines.append(f"Pushed: {plan['commit']}")
    elif not plan["refused"]:
        lines.append("Nothing was sent: --really does it.")
    return "\n".join(lines)


def size(n: int) -> str:
    """Return a number of bytes in three digits: "41.4 kB"."""
    value, unit = float(n), 0
    while value >= 999.5 and unit < len(SIZES) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {SIZES[unit]}" if unit == 0 else f"{value:.3g} {SIZES[unit]}"
