"""Self Multi-Objective Alignment: make a small language model safe without making it mute.

Names are imported when they are first asked for, so `import selfmoa` loads no model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfmoa.loop import run
    from selfmoa.recipes import load_recipe
    from selfmoa.records import Estimate, PreferencePair, Prompt, Response, Verdict

    __version__: str

__all__ = [
    "Estimate",
    "PreferencePair",
    "Prompt",
    "Response",
    "Verdict",
    "__version__",
    "load_recipe",
    "run",
]

_HOMES = {
    "Estimate": "selfmoa.records",
    "PreferencePair": "selfmoa.records",
    "Prompt": "selfmoa.records",
    "Response": "selfmoa.records",
    "Verdict": "selfmoa.records",
    "load_recipe": "selfmoa.recipes",
    "run": "selfmoa.loop",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _read_version()
    if name not in _HOMES:
        raise AttributeError(f"module 'selfmoa' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _read_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("selfmoa")
    except PackageNotFoundError:
        return "0+unknown"  # run from a source tree that was never installed
