"""Harmless instructions of a file, with answers where it has some.

JSON lines, JSON, YAML or CSV. What columns may be called, in any case; the first that is filled
counts:

messages   messages, conversation       up to the last of the user; an answer may follow
prompt     prompt, instruction, question, text
           input                        goes below the prompt (Alpaca)
answer     response, answer, output, completion, reference, chosen
label      label, intent                "harmful" and "unsafe" rows are left out, "borderline" are
                                        requests that only look harmful
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfmoa.attacks.rows import read_rows
from selfmoa.errors import BadInput
from selfmoa.judges.refusal import reading
from selfmoa.protocols import INSTRUCTIONS
from selfmoa.records import Prompt

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from selfmoa.records import Intent, Message, Split

TALKS = ("messages", "conversation")
PROMPTS = ("prompt", "instruction", "question", "text")
ANSWERS = ("response", "answer", "output", "completion", "reference", "chosen")
LABELS = ("label", "intent")
HARMFUL = ("harmful", "unsafe")
LEGIT, BENIGN = "legit", "benign"
"""Categories of harmless requests: such as only look harmful, and all others."""
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Instruction:
    """A harmless request, and a helpful answer to it or "" where the file has none."""

    messages: list[Message]
    answer: str
    looks_harmful: bool

    @property
    def goal(self) -> str:
        """What is asked for."""
        return self.messages[-1]["content"]

    def prompt(self, category: str, split: Split) -> Prompt:
        """Return it as a prompt."""
        intent: Intent = "borderline" if self.looks_harmful else "benign"
        return Prompt.make(
            self.messages,
            goal=self.goal,
            intent=intent,
            category=category,
            source=INSTRUCTIONS,
            split=split,
        )


def read_instructions(path: Path) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of a file, each request once, and what was left out, by reason.

    An answer that refuses is left out, and its instruction with it: a reset would learn to refuse.

    Raises:
        BadInput: a row cannot be understood, or there is no harmless instruction.
        MissingFile, CannotRead: the file cannot be read.
    """
    found: dict[str, Instruction] = {}
    dropped: Counter[str] = Counter()
    for n, row in read_rows(path, "file of instructions"):
        cells = {str(key).strip().lower(): value for key, value in row.items() if value}
        if str(_first(cells, LABELS) or "").lower() in HARMFUL:
            dropped["harmful"] += 1
            continue
        one = _instruction(path, n, cells)
        if one.answer and reading(one.answer) != "answer":
            dropped["the answer refuses"] += 1
        elif one.goal in found:
            dropped["repeated"] += 1
        else:
            found[one.goal] = one
    if not found:
        told = ", ".join(f"{k} {reason}" for reason, k in dropped.items())
        raise BadInput(path, 1, f"there is no harmless instruction in it{told and f' ({told})'}")
    return list(found.values()), dict(dropped)


def _first(cells: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((cells[name] for name in names if name in cells), None)


def _instruction(path: Path, n: int, cells: Mapping[str, Any]) -> Instruction:
    talk, answer = _first(cells, TALKS), _first(cells, ANSWERS)
    text = _first(cells, PROMPTS)
    if talk is None and isinstance(text, list):  # TRL's conversational columns
        talk = text
    if talk is None:
        if not isinstance(text, str) or not text.strip():
            has = ", ".join(cells) or "nothing"
            raise BadInput(path, n, f"field 'prompt' is missing or no text; it has {has}")
        more = cells.get("input")
        talk = [{"role": "user", "content": f"{text}\n\n{more}" if more else text}]
    messages = _messages(path, n, talk)
    if messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
    if not messages or messages[-1]["role"] != "user":
        raise BadInput(path, n, "field 'messages': the user has to speak last, or before an answer")
    if isinstance(answer, list):
        answer = _messages(path, n, answer)[-1]["content"] if answer else None
    if answer is not None and not isinstance(answer, str):
        raise BadInput(path, n, "the answer is no text")
    looks_harmful = str(_first(cells, LABELS) or "").lower() == "borderline"
    return Instruction(messages, (answer or "").strip(), looks_harmful)


def _messages(path: Path, n: int, talk: Any) -> list[Message]:
    if not isinstance(talk, list) or not talk:
        raise BadInput(path, n, "field 'messages' is no list of messages")
    for message in talk:
        is_whole = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not is_whole or message.get("role") not in ROLES:
            roles = ", ".join(ROLES)
            raise BadInput(path, n, f"field 'messages': each needs a role ({roles}) and a content")
    return [{"role": m["role"], "content": m["content"]} for m in talk]
