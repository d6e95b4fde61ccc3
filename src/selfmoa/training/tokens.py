"""Conversations become token rows: rendered once through the model's own chat template.

    (row,) = encode(tokenizer, [[{"role": "user", "content": "hi"}]], [["hello", "go away"]])
    row.prompt       -> the template's ids, up to where the assistant's turn begins
    row.completions  -> each answer's ids, then the token that ends a turn in this template

A row is what generation sees: the prompt as it is rendered for generation, then what the model
would have to say. Where a template writes finished turns differently, the prompt stays as it is
and only two things are taken over, both found out once a tokenizer by rendering an answer that
gives itself away (`_chat_turn`):

- what stands between prompt and answer: a blank (Llama-2, DeepSeek), an empty thinking block
  (Qwen3), a channel (gpt-oss). The model writes these itself, so they begin the completion, unless
  the answer brings a thinking block of its own. If the whole does not begin with the prompt
  (DeepSeek-R1 drops thoughts that the prompt opens), the answer follows the prompt directly.
- the end of the turn, which need not be the eos_token: Gemma ends its turns with <end_of_turn>.

Everything else in an answer stays as it came, also blanks at its ends that a template would strip.
Special tokens that somebody typed are plain text in messages and answers. A prompt that is a
string (TRL's standard format) has no template: there they are what they say, as in TRL.
Left out on purpose: truncation. A row that is too long is dropped, with a reason (`drop_long`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import islice
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from jinja2 import TemplateError, TemplateSyntaxError

from selfmoa.errors import BadInput, UnusableTokenizer
from selfmoa.records import Message

T = TypeVar("T")
Ids = list[int]
Conversation = Sequence[Message] | str
"""Messages that end where the assistant's turn begins, or plain text that goes on."""

CHUNK = 1024
"""Texts a call: the library keeps some hundred bytes a token until a call returns."""
PROBE = "Zorbl7"
"""An answer that no template has in its own text."""
BREAK = "\ufdd0"
"""Not a character, by Unicode's own rule: stands where a text must be cut before it is encoded."""
CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
DAY = date(2024, 7, 26)
"""The date in templates that ask for today's (Llama's own default): equal rows on every day."""


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of one prompt and of the completions that share it; `weight` scales its loss.

    There is at least one completion, and none is empty.
    """

    prompt: tuple[int, ...] | list[int]
    completions: list[list[int]]
    weight: float = 1.0

    @property
    def n_tokens(self) -> int:
        """Tokens a model reads when the prompt is shared: the cost of the row."""
        return len(self.prompt) + sum(map(len, self.completions))


@dataclass(frozen=True, slots=True)
class _Turn:
    """What surrounds an answer: `start` begins the prompt, `lead` and `blank` precede the answer.

    An answer has the tokens that it has after `context`; sentencepiece tokenizers write the first
    word of a text otherwise than a word within a text. `ends` are the texts of the `end`.
    """

    end: tuple[int, ...]
    ends: tuple[str, ...]
    context: str
    start: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()
    blank: str = ""
    marks: tuple[str, ...] = ()


def encode_prompts(tokenizer: Any, conversations: Sequence[Conversation]) -> list[Ids]:
    """Return the token ids of each conversation, ready for the assistant's turn.

    The template alone decides on special tokens: none is added a second time, none that it leaves
    out is added. A plain text begins with the special tokens that the tokenizer gives to texts.

    Raises:
        BadInput: the template refuses a conversation, or a prompt has no tokens; names its number.
        UnusableTokenizer: there are messages, and no template.
    """
    plain = {i: c for i, c in enumerate(conversations) if isinstance(c, str)}
    chats = {i: c for i, c in enumerate(conversations) if not isinstance(c, str)}
    found: dict[int, Ids] = {}
    if chats:
        texts = _render_prompts(tokenizer, chats)
        found |= zip(chats, _encode_pieces(tokenizer, texts), strict=True)
    if plain:
        start = list(_once(tokenizer, _plain_turn).start)
        for i, ids in zip(plain, _ids(tokenizer, list(plain.values())), strict=True):
            found[i] = ids if ids[: len(start)] == start else start + ids
    for i, ids in found.items():
        if not ids:
            raise BadInput("prompts", i + 1, "field 'prompt' has no tokens, so nothing can follow")
    return [found[i] for i in range(len(conversations))]


def encode(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    completions: Sequence[Sequence[str]],
    *,
    end_of_turn: bool = True,
) -> list[Row]:
    """Return one row a conversation: its prompt, and its answers, each with the end of its turn.

    `completions[i]` are the answers that share prompt i. An answer that already ends with the
    end-of-turn token gets no second one. Of several assistant turns only the last, the answer, is
    a completion; earlier ones are prompt. An empty answer is the end of the turn alone, or, with
    `end_of_turn` off, an empty completion, on which nothing can be trained.

    Raises:
        BadInput: the template refuses a conversation, or a prompt has no tokens; names its number.
        UnusableTokenizer: there are messages and no template, or no token ends an answer.
    """
    if len(conversations) != len(completions):
        raise ValueError(f"{len(conversations)} prompts, but answers for {len(completions)}")
    prompts = encode_prompts(tokenizer, conversations)
    found: dict[int, list[Ids]] = {}
    for kind, find in ((False, _chat_turn), (True, _plain_turn)):
        where = [i for i, c in enumerate(conversations) if isinstance(c, str) is kind]
        if where:
            turn = _once(tokenizer, find)
            texts = [text for i in where for text in completions[i]]
            answers = iter(_answers(tokenizer, texts, turn, turn.end if end_of_turn else ()))
            found |= {i: list(islice(answers, len(completions[i]))) for i in where}
    return [Row(prompt, found[i]) for i, prompt in enumerate(prompts)]


def end_of_turn(tokenizer: Any) -> Ids:
    """Return the ids that end an assistant's turn in this tokenizer's template, else [eos].

    The last of them is what generation should stop at.

    Raises:
        UnusableTokenizer: there is no template, or it ends turns with nothing and there is no eos.
    """
    return list(_once(tokenizer, _chat_turn).end)


def drop_long(rows: Sequence[Row], max_tokens: int) -> tuple[list[Row], list[int]]:
    """Return the rows in which prompt and longest completion fit, and the places of the others."""
    long = [
        i
        for i, row in enumerate(rows)
        if len(row.prompt) + max(map(len, row.completions)) > max_tokens
    ]
    dropped = set(long)
    return [row for i, row in enumerate(rows) if i not in dropped], long


# --- answers -------------------------------------------------------------------------------------


def _answers(tokenizer: Any, texts: Sequence[str], turn: _Turn, end: Iterable[int]) -> list[Ids]:
    """Return the ids of answers: lead, text, end. Special tokens in the text are text.

    Other added tokens (<think>) are not: a model that has them writes them itself.
    """
    special = _once(tokenizer, _special_tokens)
    bodies = [_without_end(text, turn.ends) for text in texts]
    written = [turn.blank + body if body[:1].strip() else body for body in bodies]
    broken = [_broken(text, special) for text in written]
    encoded = _encode_pieces(tokenizer, broken, turn.context)
    leads = [() if any(m in body for m in turn.marks) else turn.lead for body in bodies]
    return [[*lead, *ids, *end] for lead, ids in zip(leads, encoded, strict=True)]


def _without_end(text: str, ends: Iterable[str]) -> str:
    """Return the answer without the end-of-turn text it may bring, and blanks after that."""
    bare = text.rstrip()
    return next((bare.removesuffix(end) for end in ends if bare.endswith(end)), text)


# --- prompts -------------------------------------------------------------------------------------


def _render_prompts(tokenizer: Any, chats: Mapping[int, Sequence[Message]]) -> list[str]:
    template = _once(tokenizer, _template)
    special, control = _once(tokenizer, _special_tokens), _once(tokenizer, _control_tokens)
    texts = []
    for i, messages in chats.items():
        try:
            defused = [_defused(message, special, control) for message in messages]
            texts.append(_render(tokenizer, template, defused, add_generation_prompt=True))
        except _REFUSALS as error:
            problem = (
                f"field 'prompt' is refused by the model's chat template ({_one_line(error)}); "
                f"change this conversation: {_one_line(messages)}"
            )
            raise BadInput("prompts", i + 1, problem) from error
    return texts


_REFUSALS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def _render(tokenizer: Any, template: str, messages: Sequence[Message], **how: bool) -> str:
    """Return the text of a conversation; the library renders it, in its own sandbox."""
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, **how
        )
    except TemplateSyntaxError as error:
        problem = f"has a chat template that is not Jinja ({_one_line(error)})"
        raise UnusableTokenizer(_name(tokenizer), problem, "mend its chat_template") from error
    return text


def _template(tokenizer: Any) -> str:
    """Return the chat template, with its clock stopped."""
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:
        problem = "has no chat template" if not tokenizer.chat_template else "has several templates"
        remedy = "give the tokenizer a (default) template, or pass prompts that are plain text"
        raise UnusableTokenizer(_name(tokenizer), problem, remedy) from error
    return CLOCK.sub(lambda call: repr(DAY.strftime(call[2])), template)


def _defused(message: Message, special: re.Pattern[str], control: re.Pattern[str]) -> Message:
    """Return the message with a break in every control token that somebody typed.

    Earlier answers keep tokens that are not special: templates look there for thinking blocks.
    """
    pattern = special if message["role"] == "assistant" else control
    return {**message, "content": _broken(message["content"], pattern)}


# --- texts to ids --------------------------------------------------------------------------------


def _special(tokenizer: Any) -> set[str]:
    added = tokenizer.added_tokens_decoder.values()
    return {t.content for t in added if t.special} | set(tokenizer.all_special_tokens)


def _special_tokens(tokenizer: Any) -> re.Pattern[str]:
    return _beginnings(_special(tokenizer))


def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return what finds special tokens and those that the template works with.

    The latter are the <|user|> of families that do not mark it as special.
    """
    template = _once(tokenizer, _template)
    added = tokenizer.added_tokens_decoder.values()
    used = {t.content for t in added if t.content.strip() and t.content in template}
    return _beginnings(used | _special(tokenizer))


def _beginnings(words: Iterable[str]) -> re.Pattern[str]:
    """Return what finds the first character of each of the words, also where they overlap."""
    return re.compile(f"(?={'|'.join(map(re.escape, sorted(words))) or '(?!)'}).", re.DOTALL)


def _broken(text: str, tokens: re.Pattern[str]) -> str:
    """Return the text with a break after the first character of each of the tokens."""
    return tokens.sub(lambda first: first[0] + BREAK, text)


def _encode_pieces(tokenizer: Any, texts: Sequence[str], context: str = "") -> list[Ids]:
    """Return the ids of texts after `context`, encoded apart on both sides of a break."""
    pieces = [text.split(BREAK) for text in texts]
    found = _ids(tokenizer, [first for first, *_ in pieces], context)
    rest = iter(_ids(tokenizer, [p for _, *later in pieces for p in later], "\n"))
    for ids, (_, *later) in zip(found, pieces, strict=True):
        for more in islice(rest, len(later)):
            ids.extend(more)
    return found


def _ids(tokenizer: Any, texts: Sequence[str], context: str = "") -> list[Ids]:
    """Return the ids that each text has after `context`, if they can be told apart, else alone."""
    found: list[Ids] = []
    for start in range(0, len(texts), CHUNK):
        found += tokenizer(
            [context + text for text in texts[start : start + CHUNK]],
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
    if not context or not texts:
        return found
    (head,) = _ids(tokenizer, [context])
    merged = [i for i, ids in enumerate(found) if ids[: len(head)] != head]
    alone = dict(zip(merged, _ids(tokenizer, [texts[i] for i in merged]), strict=True))
    return [alone[i] if i in alone else ids[len(head) :] for i, ids in enumerate(found)]


# --- what is found out once a tokenizer ----------------------------------------------------------

_known: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def _once(tokenizer: Any, find: Callable[[Any], T]) -> T:
    """Return find(tokenizer), found out once for as long as its template and tokens stay."""
    facts = _known.setdefault(tokenizer, {})
    key = (find, repr(tokenizer.chat_template), tokenizer.eos_token, len(tokenizer))
    if key not in facts:
        facts[key] = find(tokenizer)
    found: T = facts[key]
    return found


def _chat_turn(tokenizer: Any) -> _Turn:
    """Find out how the template surrounds an answer, by the rendering of a probe."""
    template = _once(tokenizer, _template)
    question = {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": PROBE}
    try:
        prompt = _render(tokenizer, template, [question], add_generation_prompt=True)
    except _REFUSALS as error:
        problem = f"has a chat template that refuses a plain question ({_one_line(error)})"
        raise UnusableTokenizer(_name(tokenizer), problem, "mend its chat_template") from error
    try:
        whole = _render(tokenizer, template, [question, answer], add_generation_prompt=False)
    except _REFUSALS:  # it is only for prompts: nothing is known about finished turns
        whole = ""
    before, _, after = whole.rpartition(PROBE)
    between = before.removeprefix(prompt) if before.startswith(prompt) else ""
    blank = between if between.isspace() else ""
    lead = _tail(tokenizer, prompt, between) if between and not blank else []
    end, ends = _end(tokenizer, after)
    return _Turn(
        end=end,
        ends=ends,
        context=_context(tokenizer, prompt + between.removesuffix(blank), blank),
        lead=tuple(lead),
        blank=blank,
        marks=tuple(between.split()),
    )


def _plain_turn(tokenizer: Any) -> _Turn:
    """Find out how the tokenizer surrounds a plain text; the end of its continuation is eos."""
    (bare,), full = _ids(tokenizer, [PROBE]), tokenizer(PROBE)["input_ids"]
    n_start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    end, ends = _end(tokenizer, "")
    return _Turn(end, ends, _context(tokenizer, "Hi:", ""), start=tuple(full[:n_start]))


def _end(tokenizer: Any, after: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return what ends a turn, as ids and as texts: up to the first added token after a probe."""
    added = {i for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}
    added = (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
    ids = _tail(tokenizer, PROBE, after)
    n = next((n for n, i in enumerate(ids, 1) if i in added), None)
    if n:
        token = tokenizer.convert_ids_to_tokens(ids[n - 1])
        return tuple(ids[:n]), (after.partition(token)[0] + token, token)
    if tokenizer.eos_token is None:
        problem = "has no token that ends an answer: no eos_token, and none in its chat template"
        raise UnusableTokenizer(_name(tokenizer), problem, "set its eos_token")
    return (tokenizer.eos_token_id,), (tokenizer.eos_token,)


def _context(tokenizer: Any, before: str, blank: str) -> str:
    """Return a text, none if possible, after which a probe has the tokens it has after `before`."""
    text = blank + PROBE
    wanted = _tail(tokenizer, before, text)
    return next((try_ for try_ in ("", "\n") if _tail(tokenizer, try_, text) == wanted), "")


def _tail(tokenizer: Any, before: str, text: str) -> Ids:
    """Return the ids of `text` after `before`."""
    (ids,) = _ids(tokenizer, [text], before)
    return ids


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "")) or type(tokenizer).__name__


def _one_line(value: object) -> str:
    text = " ".join(str(value).split()) or type(value).__name__
    return text if len(text) <= 160 else f"{text[:156]} ..."
