"""Preference files: every TRL format becomes `Preference` rows, or one sentence says which row not.

    prompt   chosen                        rejected
    [m..]    [assistant]                   [assistant]                   conversational, explicit
    -        [m.., assistant]              [m.., assistant]              conversational, implicit
    "text"   "text"                        "text"                        standard, explicit
    -        "text and more"               "text and less"               standard, implicit

with the optional columns id, objective, margins {objective: log-odds}, flip_probability (as in
`PreferencePair`), chosen_safe and rejected_safe (true or false). Others are ignored, TRL's `margin`
among them: a number that does not say what it measures. A null is as good as no column: Parquet
has no other way to leave a field out.

The reader stops at the first bad row. Nothing is repaired and nothing left out: a file that is not
what its owner thinks should not cost an evening on a GPU.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfmoa.errors import BadInput, MissingExtra, did_you_mean
from selfmoa.records import Message, PreferencePair, content_id
from selfmoa.rundir.files import parsed_json, reading

COLUMNS = (
    *("id", "prompt", "chosen", "rejected", "objective", "margins", "flip_probability"),
    *("chosen_safe", "rejected_safe"),
)
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Preference:
    """One answer preferred over another, ready to be rendered.

    `prompt` is a conversation that ends with the user's turn, or plain text. `margins` holds
    m(chosen) - m(rejected) in log-odds of every other objective, of the row's own too if the file
    has it, or nothing. `safety`
    tells whether chosen and rejected are safe (1.0) or not (0.0), if anybody knows.
    """

    id: str
    prompt: list[Message] | str
    chosen: str
    rejected: str
    objective: str
    margins: dict[str, float]
    flip_probability: float
    safety: tuple[float, float] | None


def read_preferences(
    path: str | Path, objectives: Sequence[str] | Mapping[str, float]
) -> list[Preference]:
    """Read a preference file: .parquet, .json (a list, or lines), anything else as JSON lines.

    `objectives` are the names that may occur, best with their weights: an objective without
    weight may have margins but cannot order a row. A row that names none is of the first
    that has a weight.

    Raises:
        BadInput: a row cannot be used; names file, row (from 1) and field.
        MissingFile: there is no such file.
        CannotRead: the disk refuses.
        MissingExtra: it is Parquet, and pyarrow is not installed.
    """
    path = Path(path)
    weights = objectives if isinstance(objectives, Mapping) else dict.fromkeys(objectives, 1.0)
    found: list[Preference] = []
    places: dict[str, int] = {}
    for n, row in _rows(path):
        try:
            preference = _preference(row, weights)
        except _FieldError as error:
            raise BadInput(path, n, str(error)) from error
        if "id" not in row:
            preference = _with_own_id(preference, places)
        if preference.id in places:
            problem = f"field 'id' is {preference.id!r}, as in row {places[preference.id]}"
            raise BadInput(path, n, problem)
        places[preference.id] = n
        found.append(preference)
    if not found:
        raise BadInput(path, 1, "there is none, the file is empty")
    return found


def from_pairs(pairs: Iterable[PreferencePair]) -> list[Preference]:
    """Return the loop's own pairs as preferences.

    The chosen side of a pair is safe by the rules of pairing; the rejected side is not if safety
    is what ordered the pair.
    """
    return [
        Preference(
            pair.id,
            pair.prompt,
            pair.chosen[0]["content"],
            pair.rejected[0]["content"],
            pair.objective,
            pair.margins,
            pair.flip_probability,
            (1.0, 0.0 if pair.objective == "safety" else 1.0),
        )
        for pair in pairs
    ]


class _FieldError(ValueError):
    """What is wrong with a field of a row."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field '{field}' {problem}")


# --- files to rows -------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows with their numbers: of lines those in the file, of lists places from 1."""
    with reading(path, "preference file"):
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    for n, row in _numbered(path, data):
        if not isinstance(row, dict):
            raise BadInput(path, n, "it is not a JSON object")
        yield n, {name: value for name, value in row.items() if value is not None}


def _numbered(path: Path, data: bytes) -> Iterable[tuple[int, Any]]:
    if path.suffix.lower() == ".parquet":
        return enumerate(_parquet_rows(path, data), 1)
    if path.suffix.lower() == ".json" and data.lstrip().startswith(b"["):
        return enumerate(parsed_json(path, 1, data), 1)
    lines = enumerate(data.split(b"\n"), 1)
    return ((n, parsed_json(path, n, line)) for n, line in lines if line.strip())


def _parquet_rows(path: Path, data: bytes) -> list[dict[str, Any]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra("file format", "parquet", "pyarrow", "selfmoa[parquet]") from error
    try:
        file = parquet.ParquetFile(pa.BufferReader(data))
        known = [name for name in file.schema_arrow.names if name in COLUMNS]
        rows: list[dict[str, Any]] = file.read(columns=known).to_pylist()
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        problem = " ".join(str(error).split())[:160]
        raise BadInput(path, 1, f"the file is not Parquet ({problem})") from error
    return rows


# --- rows to preferences -------------------------------------------------------------------------


def _preference(row: Mapping[str, Any], weights: Mapping[str, float]) -> Preference:
    """Return the row as a preference; without an id of its own, `id` names its content."""
    prompt, chosen, rejected = _sides(row)
    objective = _objective(row, weights)
    id_ = _id(row) if "id" in row else content_id("preference", prompt, chosen, rejected, objective)
    return Preference(
        id_,
        prompt,
        chosen,
        rejected,
        objective,
        _margins(row, objective, weights),
        _number("flip_probability", row.get("flip_probability", 0.0), 0.0, 1.0),
        _safety(row),
    )


def _sides(row: Mapping[str, Any]) -> tuple[list[Message] | str, str, str]:
    """Return prompt, chosen and rejected of a row in any of the four formats."""
    for name in ("chosen", "rejected"):
        if name not in row:
            raise _FieldError(name, "is missing")
    columns = [name for name in ("prompt", "chosen", "rejected") if name in row]
    kind = str if isinstance(row[columns[0]], str) else list
    if not isinstance(row[columns[0]], kind):
        raise _FieldError(columns[0], "should be text or a list of messages")
    for name in columns:
        if not isinstance(row[name], kind):
            raise _FieldError(name, f"should be {_KINDS[kind]}, like '{columns[0]}'")
    prompt: list[Message] | str
    if kind is str:
        prompt, chosen, rejected = _texts({name: _text(name, row[name]) for name in columns})
    else:
        prompt, chosen, rejected = _talks({name: _messages(name, row[name]) for name in columns})
    _refuse_empty(chosen, rejected)
    if chosen == rejected:
        raise _FieldError("rejected", "is the same answer as 'chosen'")
    return prompt, chosen, rejected


_KINDS = {str: "text", list: "a list of messages"}


def _texts(row: Mapping[str, str]) -> tuple[str, str, str]:
    """Return the sides of a standard row; an absent prompt is the common beginning."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is None:
        _refuse_empty(chosen, rejected)
        if chosen == rejected:
            raise _FieldError("rejected", "is the same text as 'chosen'")
        # As TRL cuts: each answer keeps a character at least, and the blank before it is theirs.
        n = min(_n_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        n = max(n - (chosen[n - 1 : n] == " "), 0)
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
        if not prompt.strip():
            raise _FieldError(
                "prompt", "is missing, and 'chosen' and 'rejected' have no common beginning"
            )
    if not prompt.strip():
        raise _FieldError("prompt", "is empty")
    return prompt, chosen, rejected


def _talks(row: Mapping[str, list[Message]]) -> tuple[list[Message], str, str]:
    """Return the sides of a conversational row; an absent prompt is the common beginning."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is None:
        if chosen == rejected:
            raise _FieldError("rejected", "is the same conversation as 'chosen'")
        n = _n_common(chosen, rejected)
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
        if not prompt:
            raise _FieldError(
                "prompt", "is missing, and 'chosen' and 'rejected' have no common beginning"
            )
    if prompt[-1]["role"] != "user":
        role = prompt[-1]["role"]
        raise _FieldError(
            "prompt", f"should end with the user's turn, but its last role is {role!r}"
        )
    if not prompt[-1]["content"].strip():
        raise _FieldError("prompt", "ends with an empty turn")
    return prompt, _answer("chosen", chosen), _answer("rejected", rejected)


def _refuse_empty(chosen: str, rejected: str) -> None:
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise _FieldError(name, "is an empty answer")


def _n_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _answer(name: str, messages: Sequence[Message]) -> str:
    if len(messages) != 1:
        problem = f"should be one assistant message after the prompt, but it is {len(messages)}"
        raise _FieldError(name, problem)
    if messages[0]["role"] != "assistant":
        raise _FieldError(
            name, f"should be an assistant message, but its role is {messages[0]['role']!r}"
        )
    return messages[0]["content"]


def _messages(name: str, value: Sequence[Any]) -> list[Message]:
    if not value:
        raise _FieldError(name, "is an empty list")
    found = []
    for n, message in enumerate(value, 1):
        where = f"message {n}"
        if not isinstance(message, dict):
            raise _FieldError(name, f"should be a list of messages, but {where} is not an object")
        if message.get("role") not in ROLES:
            raise _FieldError(
                name, f"should have roles out of {', '.join(ROLES)}, but {where} has not"
            )
        if not isinstance(message.get("content"), str):
            raise _FieldError(
                name, f"should have messages with text, but {where} has no text in 'content'"
            )
        found.append({"role": message["role"], "content": _text(name, message["content"])})
    return found


def _text(name: str, value: str) -> str:
    """Return the text if it is one: JSON can spell half a character, which no tokenizer reads."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _FieldError(name, f"holds half a character (at {error.start + 1})") from error
    return value


def _objective(row: Mapping[str, Any], weights: Mapping[str, float]) -> str:
    objective = row.get("objective", next((name for name, w in weights.items() if w), ""))
    if not isinstance(objective, str):
        raise _FieldError("objective", "should be text")
    if not weights.get(objective):
        margins = row.get("margins")
        named = dict.fromkeys([objective, *(margins if isinstance(margins, dict) else ())])
        example = ", ".join(f"{name}: 0.5" for name in named)
        raise _FieldError(
            "objective",
            f"is {objective!r}, which has no weight{_known(objective, weights)}; give it one, as "
            f"in 'train.weights={{{example}}}'",
        )
    return objective


def _margins(
    row: Mapping[str, Any], objective: str, weights: Mapping[str, float]
) -> dict[str, float]:
    margins = row.get("margins", {})
    if not isinstance(margins, dict):
        raise _FieldError("margins", "should be an object of numbers by objective")
    margins = {name: value for name, value in margins.items() if value is not None}
    for name in margins:
        if name not in weights:
            raise _FieldError(
                "margins", f"has the unknown objective {name!r}{_known(name, weights)}"
            )
    missing = [name for name in weights if name != objective and name not in margins]
    if margins and missing:
        raise _FieldError(
            "margins", f"has no {missing[0]!r}: name every objective but the row's own"
        )
    return {name: _number(f"margins.{name}", value) for name, value in margins.items()}


def _known(name: str, weights: Mapping[str, float]) -> str:
    return f"{did_you_mean(name, weights)} Known: {', '.join(weights)}"


def _number(name: str, value: Any, low: float = -math.inf, below: float = math.inf) -> float:
    """Return a finite number in [low, below)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _FieldError(name, "should be a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise _FieldError(name, "is too large a number") from error
    if not math.isfinite(number):
        raise _FieldError(name, f"is {number}, it should be finite")
    if not low <= number < below:
        raise _FieldError(name, f"is {number:g}, it should be at least {low:g} and below {below:g}")
    return number


def _safety(row: Mapping[str, Any]) -> tuple[float, float] | None:
    names = ("chosen_safe", "rejected_safe")
    for name in names:
        if name in row and not isinstance(row[name], bool):
            raise _FieldError(name, "should be true or false")
    missing = [name for name in names if name not in row]
    if len(missing) == 1:
        raise _FieldError(missing[0], "is missing, though the other one is there")
    return None if missing else (float(row["chosen_safe"]), float(row["rejected_safe"]))


def _id(row: Mapping[str, Any]) -> str:
    value = row["id"]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise _FieldError("id", "should be text or a whole number")
    return _text("id", str(value))


def _with_own_id(preference: Preference, places: Mapping[str, int]) -> Preference:
    """Return it with an id that is free: public files hold rows twice, and those have no names."""
    id_, n = preference.id, 1
    while id_ in places:
        n += 1
        id_ = content_id(preference.id, n)
    return replace(preference, id=id_)
