"""What fits a model's positions: a prompt that does not is refused before anything is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfmoa.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from selfmoa.protocols import Draw


class PromptTooLong(BadInput):
    """A prompt and its answer have more tokens than the model has positions for."""

    def __init__(self, row: int, prompt_id: str, tokens: int, new: int, most: int) -> None:
        self.tokens, self.new, self.most = tokens, new, most
        super().__init__(
            "prompts",
            row,
            f"prompt {prompt_id} has {tokens} tokens and may be answered with {new}, the model "
            f"reads {most} in all",
        )


def refuse_long(
    draws: Sequence[Draw], rows: Sequence[Sequence[int]], new: int, most: int | None
) -> None:
    """Refuse a batch with a prompt that has no room for `new` tokens after it.

    Args:
        draws: what is asked.
        rows: the token ids of each.
        new: tokens of an answer at most.
        most: positions of the model; None where it has no bound.

    Raises:
        PromptTooLong: names the first such prompt and both counts.
    """
    for i, (draw, row) in enumerate(zip(draws, rows, strict=True), 1):
        if most is not None and len(row) + new > most:
            raise PromptTooLong(i, draw.prompt.id, len(row), new, most)


def refuse_long_texts(lengths: Sequence[int], most: int | None) -> None:
    """Refuse a batch with a prompt and text of more than `most` tokens together.

    Raises:
        BadInput: names the first such row and both counts.
    """
    for i, length in enumerate(lengths, 1):
        if most is not None and length > most:
            raise BadInput("texts", i, f"it has {length} tokens, the model reads {most}")
