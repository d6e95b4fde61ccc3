"""What a model cannot take is found by halving, so that the rest of a batch is still answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from selfmoa.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
R = TypeVar("R")


def by_halves(
    ask: Callable[[Sequence[T]], list[R]], items: Sequence[T], lost: Callable[[BadInput], R]
) -> list[R]:
    """Return ask(items), one an item; `lost` says what stands for an item that is refused.

    A batch that is refused (`BadInput`) is asked again in halves, down to the item alone. Other
    errors are raised.
    """
    if not items:
        return []
    try:
        return ask(items)
    except BadInput as error:
        if len(items) == 1:
            return [lost(error)]
        half = len(items) // 2
        return by_halves(ask, items[:half], lost) + by_halves(ask, items[half:], lost)
