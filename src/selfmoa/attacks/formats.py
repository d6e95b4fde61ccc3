"""What rows of other tools' files mean: garak, PyRIT, HarmBench, and plain columns.

format        told by                       prompt           goal             category, style
garak         entry_type, or probe and      prompt           goal             (none), probe
              attempt_id, in a row
PyRIT seeds   seeds or prompts in a         value            the objective    harm_categories,
              mapping (YAML, JSON)                           of its group     metadata.style
PyRIT memory  conversation_id in a row      converted_value  original_value   targeted_harm_
                                                                              categories,
                                                                              converters
HarmBench     Behavior and                  ContextString,   Goal, Behavior   SemanticCategory,
              SemanticCategory in a row     Behavior                          Style
archive       tries and version in a row    as it is
plain         else                          see `COLUMNS`
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from selfmoa.attacks.archive import Entry, from_row
from selfmoa.attacks.rows import Row
from selfmoa.records import Intent, Message

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversation"),
    "prompt": ("prompt", "attack", "test_case", "text", "question", "instruction", "value"),
    "goal": ("goal", "behavior", "behaviour", "objective"),
    "category": ("category", "semantic_category", "harm_category", "risk_category"),
    "style": ("style", "technique", "method", "strategy"),
    "intent": ("intent", "label"),
    "id": ("id", "behavior_id", "uuid"),
}
"""What a plain file's columns may be called, in lower case; the first that is filled counts."""
INTENTS: Mapping[str, Intent] = {"benign": "benign", "safe": "benign", "borderline": "borderline"}
"""Words for an intent; every other one is "harmful"."""
ROLES = ("system", "user", "assistant")


class UnclearRowError(ValueError):
    """A row cannot be understood; `problem` names the field."""

    def __init__(self, row: int, problem: str) -> None:
        self.row, self.problem = row, problem
        super().__init__(problem)


@dataclass(frozen=True)
class Attack:
    """What a file says of one attack; `id` is the file's own, or empty."""

    row: int
    messages: list[Message]
    goal: str
    category: str = ""
    style: str = ""
    intent: Intent = "harmful"
    id: str = ""


def attack_of(n: int, row: Row, seen: set[str]) -> Attack | Entry | str:
    """Return what a row holds: an attack, an entry of an archive, or why it is skipped.

    Args:
        n: number of the row.
        row: its fields.
        seen: attempts of garak that are through; this one is added.

    Raises:
        UnclearRowError: it cannot be understood.
    """
    if "version" in row and "tries" in row:
        try:
            return from_row(row)
        except ValueError as error:
            raise UnclearRowError(n, str(error)) from error
    if "seeds" in row:
        return _pyrit_seed(n, row["seeds"])
    if "entry_type" in row or {"probe", "attempt_id"} <= set(row):
        return _garak(n, row, seen)
    if {"Behavior", "SemanticCategory"} <= set(row):
        return _harmbench(n, row)
    return _plain(n, row)


def _plain(n: int, row: Row) -> Attack:
    by_name = {str(key).strip().lower(): value for key, value in row.items()}
    cells = {
        field: next((by_name[name] for name in names if by_name.get(name)), None)
        for field, names in COLUMNS.items()
    }
    messages, goal = cells["messages"], _text(n, "goal", cells["goal"])
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise UnclearRowError(n, f"field 'messages': it is not JSON ({error})") from error
    if messages is None:
        text = _text(n, "prompt", cells["prompt"]) or goal
        if not text:
            raise UnclearRowError(
                n, f"field 'prompt' is missing; it has {', '.join(by_name) or 'nothing'}"
            )
        messages = [{"role": "user", "content": text}]
    conversation = _conversation(n, "messages", messages)
    return Attack(
        n,
        conversation,
        goal or conversation[-1]["content"],
        _text(n, "category", cells["category"]),
        _text(n, "style", cells["style"]),
        INTENTS.get(_text(n, "intent", cells["intent"]).lower(), "harmful"),
        "" if cells["id"] is None else str(cells["id"]),
    )


def _harmbench(n: int, row: Row) -> Attack:
    behaviour, context = _text(n, "Behavior", row["Behavior"]), row.get("ContextString")
    text = f"{context}\n\n---\n\n{behaviour}" if context else behaviour
    return replace(
        _plain(n, {"prompt": text, "goal": row.get("Goal") or behaviour}),
        category=_text(n, "SemanticCategory", row["SemanticCategory"]),
        style=_text(n, "Style", row.get("Style")),
        id=_text(n, "BehaviorID", row.get("BehaviorID")),
    )


def _garak(n: int, row: Row, seen: set[str]) -> Attack | str:
    """Return an attempt of a report or a hit; an attempt is written again when it is judged."""
    if row.get("entry_type", "attempt") != "attempt":
        return "not an attempt"
    attempt = str(row.get("uuid") or row.get("attempt_id") or n)
    if attempt in seen:
        return "attempt told before"
    seen.add(attempt)
    prompt = row.get("prompt")
    if isinstance(prompt, Mapping) and "turns" in prompt:
        turns = prompt["turns"] if isinstance(prompt["turns"], list) else [None]
        messages = _conversation(n, "prompt", [_garak_turn(n, turn) for turn in turns])
    else:
        text = prompt.get("text") if isinstance(prompt, Mapping) else prompt
        if not text:
            return "without text"
        messages = [{"role": "user", "content": _text(n, "prompt", text)}]
    return Attack(
        n,
        messages,
        _text(n, "goal", row.get("goal")) or messages[-1]["content"],
        _text(n, "category", row.get("category")),
        _text(n, "probe", row.get("probe") or row.get("probe_classname")),
    )


def _garak_turn(n: int, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise UnclearRowError(n, "field 'prompt': a turn is no object with 'role' and 'content'")
    content = turn.get("content")
    text = content.get("text") if isinstance(content, Mapping) else content
    return {"role": turn.get("role"), "content": text}


def _pyrit_seed(n: int, seeds: Sequence[Row]) -> Attack | str:
    goals = [s for s in seeds if s.get("is_objective") or s.get("seed_type") == "objective"]
    asked = [s for s in seeds if s not in goals] or goals
    if any(s["data_type"] not in ("text", None) for s in asked):
        return "not text"
    if any(s.get("parameters") or "{{" in str(s.get("value")) for s in asked):
        return "template"
    asked = sorted(asked, key=lambda s: s.get("sequence") or 0)
    messages = _conversation(
        n, "value", [{"role": s.get("role") or "user", "content": s.get("value")} for s in asked]
    )
    metadata, harms = asked[-1].get("metadata"), asked[-1]["harm_categories"]
    metadata = metadata if isinstance(metadata, Mapping) else {}
    goal = goals[0].get("value") if goals else metadata.get("goal")
    return Attack(
        n,
        messages,
        _text(n, "value", goal) or messages[-1]["content"],
        _first(n, "harm_categories", harms),
        _text(n, "metadata", metadata.get("style")),
        id=_text(n, "metadata", metadata.get("id")),
    )


def pyrit_memory(rows: Sequence[tuple[int, Row]]) -> Iterator[tuple[int, Attack | str]]:
    """Yield a PyRIT memory's conversations, each up to its last message of a user.

    Raises:
        UnclearRowError: a row cannot be understood.
    """
    conversations: dict[str, list[tuple[int, Row]]] = defaultdict(list)
    for n, row in rows:
        conversations[_text(n, "conversation_id", row.get("conversation_id"))].append((n, row))
    for pieces in conversations.values():
        pieces.sort(key=lambda piece: piece[1].get("sequence") or 0)
        users = [i for i, (_, piece) in enumerate(pieces) if piece.get("role") == "user"]
        n = pieces[0][0]
        if not users:
            yield n, "without a user's message"
            continue
        asked = pieces[: users[-1] + 1]
        if any(p.get("converted_value_data_type", "text") != "text" for _, p in asked):
            yield n, "not text"
            continue
        said = [
            {
                "role": "assistant" if p.get("role") == "simulated_assistant" else p.get("role"),
                "content": p.get("converted_value") or p.get("original_value"),
            }
            for _, p in asked
        ]
        n, last = asked[-1]
        messages = _conversation(n, "converted_value", said)
        yield (
            n,
            Attack(
                n,
                messages,
                _text(n, "original_value", last.get("original_value")) or messages[-1]["content"],
                _first(n, "targeted_harm_categories", last.get("targeted_harm_categories")),
                _converters(last.get("converter_identifiers")),
            ),
        )


def _converters(found: Any) -> str:
    names = [
        str(each.get("__type__") or each.get("class_name") or "converter")
        for each in (found if isinstance(found, list) else [])
        if isinstance(each, Mapping)
    ]
    return "+".join(names)


def _conversation(n: int, field: str, found: Any) -> list[Message]:
    """Return messages as they should be: known roles, text, a user's at the end."""
    if not isinstance(found, list) or not found:
        raise UnclearRowError(n, f"field '{field}': it is no list of messages")
    messages = []
    for each in found:
        role = each.get("role") if isinstance(each, Mapping) else None
        if role not in ROLES:
            raise UnclearRowError(
                n, f"field '{field}': role {role!r} is none of {', '.join(ROLES)}"
            )
        content = _text(n, field, each.get("content"))
        if not content:
            raise UnclearRowError(n, f"field '{field}': a message is empty")
        messages.append({"role": str(role), "content": content})
    if messages[-1]["role"] != "user":
        raise UnclearRowError(
            n, f"field '{field}': the last message is the {messages[-1]['role']}'s"
        )
    return messages


def _first(n: int, field: str, found: Any) -> str:
    return _text(n, field, found[0] if isinstance(found, list) and found else found or None)


def _text(n: int, field: str, found: Any) -> str:
    """Return a field's text as it is; "" where there is none, or only spaces."""
    if found is None:
        return ""
    if not isinstance(found, str):
        raise UnclearRowError(n, f"field '{field}' should be text, not {type(found).__name__}")
    return found if found.strip() else ""
