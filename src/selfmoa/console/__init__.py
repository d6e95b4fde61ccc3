"""What a person sees of a run: a live table on a terminal, plain lines elsewhere, or nothing.

The loop tells events (`listen(event, **facts)`). `board` keeps what they add up to and words each
as one line; `views` prints those lines and `live` draws the board. Progress goes to stderr: stdout
belongs to results. Text that may come from a model passes through `words.clean`. `status` tells
how far a run on disk is, `failures` why a command ended. Nothing here knows models or stages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from selfmoa.console.views import View

__all__ = ["watch"]


@contextmanager
def watch(*, quiet: bool = False, plain: bool = False) -> Iterator[View]:
    """Show a run while the block lasts: live on a terminal, plain lines elsewhere.

    Args:
        quiet: show nothing.
        plain: plain lines on a terminal too.
    """
    from selfmoa.console.views import Plain, View

    view: View
    if quiet:
        view = View()
    elif plain or not _can_draw(sys.stderr):
        view = Plain(sys.stderr)
    else:
        from rich.console import Console

        from selfmoa.console.live import Live

        view = Live(Console(file=sys.stderr, highlight=False))
    view.start()
    try:
        yield view
    finally:
        view.stop()


def _can_draw(stream: TextIO) -> bool:
    is_unicode = "utf" in (getattr(stream, "encoding", None) or "").lower()
    return stream.isatty() and is_unicode and os.environ.get("TERM") not in ("dumb", "unknown")
