"""What an examination finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was seen and, unless all is well, what to do about it."""

    check: str
    level: Level
    seen: str
    remedy: str = ""


def ok(check: str, seen: str) -> Finding:
    """Return a finding that asks for nothing."""
    return Finding(check, "ok", seen)


def warn(check: str, seen: str, remedy: str) -> Finding:
    """Return a finding that a run would survive."""
    return Finding(check, "warn", seen, remedy)


def fail(check: str, seen: str, remedy: str) -> Finding:
    """Return a finding that would stop a run, or make its figures worthless."""
    return Finding(check, "fail", seen, remedy)
