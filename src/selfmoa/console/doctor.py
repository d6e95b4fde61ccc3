"""An examination as text. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from selfmoa.console.words import clean

SIGNS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


class Finding(Protocol):
    """What is shown of a finding (`doctor.findings`)."""

    @property
    def check(self) -> str:
        """What was looked at."""

    @property
    def level(self) -> str:
        """One of `SIGNS`."""

    @property
    def seen(self) -> str:
        """What was seen."""

    @property
    def remedy(self) -> str:
        """What to do about it, or nothing."""


def line(finding: Finding) -> str:
    """Return a finding as a line, and its remedy below."""
    told = f"{SIGNS[finding.level]}  {clean(finding.check)}: {clean(finding.seen)}"
    return f"{told}\n      -> {clean(finding.remedy)}" if finding.remedy else told


def verdict(findings: Sequence[Finding]) -> str:
    """Return the sum of an examination."""
    n = {level: sum(f.level == level for f in findings) for level in SIGNS}
    told = f"{n['ok']} well, {n['warn']} to look at, {n['fail']} to mend"
    return f"{told}." if n["fail"] else f"{told}: ready to run."
