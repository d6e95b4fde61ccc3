"""Continuous batching over transformers' own forward pass.

A step reads every weight once, however many rows it serves, so places in the batch are kept full:

- equal prompts are read once, and their keys and values copied to each of their rows;
- the shortest prompts come first, and rows that ended give their places to those that wait: what
  the others have said so far makes them about as long as the prompts that come;
- keys and values lie in buffers with room behind them, so that a step copies none of them.

All rows of a batch end at the same slot and are padded on the left, which every family that
transformers can generate with understands.
"""

from __future__ import annotations

import inspect
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from selfmoa.generators.sampling import choose
from selfmoa.training.packing import pad

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from selfmoa.generators.decoding import Decoding

KEPT_BYTES = 2 * 2**30
"""Keys and values that are kept at once at most. It is the same on every machine, as what is in a
batch decides how its rows round."""
READ_TOKENS = 4096
"""Tokens of prompts, padding included, that one forward pass reads."""
ROOM = 64
"""Slots that are kept free behind a batch: this many steps copy no keys and values."""
FREED = 8
"""A batch is put together anew when one in this many of its rows has ended."""


def can_batch(lm: Any) -> bool:
    """Return whether the model's cache is keys and values of every token, and nothing else.

    That is told by the class of the layers that transformers makes for it. A recurrent state
    (Mamba, LFM2) is no such layer: it cannot be moved to other places of a batch.
    """
    layers = DynamicCache(config=lm.config).layers
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    is_known = all(type(layer) in kinds for layer in layers)
    return is_known and "past_key_values" in _parameters(lm)


def continuously(
    lm: Any, prompts: Sequence[Sequence[int]], numbers: Tensor | None, how: Decoding
) -> list[list[int]]:
    """Return the tokens of every answer; arguments as in `decoding.decode`."""
    max_tokens = min(how.max_tokens, KEPT_BYTES // _bytes_a_token(lm))
    return _Engine(lm, prompts, numbers, replace(how, max_tokens=max_tokens)).run()


def _bytes_a_token(lm: Any) -> int:
    """Return what the keys and values of a token take, over all layers."""
    config = lm.config.get_text_config()
    n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * n_heads * size * lm.dtype.itemsize)


def _parameters(lm: Any) -> Mapping[str, Any]:
    whole = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    return inspect.signature(whole.forward).parameters


class _Buffer(DynamicLayer):
    """Keys and values of a layer, [rows, heads, slots, size], with room behind the slots in use.

    Sliding windows are kept whole too: what a row no longer sees is masked.
    """

    def __init__(self, keys: Tensor, values: Tensor, n_slots: int) -> None:
        super().__init__()
        self.keys, self.values, self.n_slots = keys, values, n_slots
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a step's keys and values behind the others; return all that are in use."""
        start, self.n_slots = self.n_slots, self.n_slots + key_states.shape[-2]
        self.keys[:, :, start : self.n_slots] = key_states
        self.values[:, :, start : self.n_slots] = value_states
        return self.keys[:, :, : self.n_slots], self.values[:, :, : self.n_slots]

    def get_seq_length(self) -> int:
        """Return the number of slots in use."""
        return self.n_slots


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows that go into the next batch: which of a cache's rows each continues, and from where.

    `lengths` are the tokens that the cache holds of each row, all of them in the last slots.
    """

    cache: Cache
    n_slots: int
    places: list[int]
    rows: list[int]
    lengths: list[int]
    tokens: list[int]


@dataclass(slots=True)
class _Batch:
    """Rows that are answered side by side. Those that ended go on until it is put together anew."""

    rows: list[int]
    cache: Cache
    mask: Tensor
    """[rows, slots and room]"""
    positions: Tensor
    """[rows, 1] of the tokens that are read next; `tokens` are those, `said` counts the answer's"""
    tokens: Tensor
    said: Tensor
    numbers: Tensor | None
    n_slots: int
    ended: set[int]

    def is_due(self) -> bool:
        """Return whether no room is left, or enough places are free to be filled or closed."""
        is_full = self.n_slots == self.mask.shape[1]
        return is_full or len(self.ended) * FREED >= len(self.rows)

    def kept(self, answers: Sequence[Sequence[int]], lengths: Sequence[int]) -> _Part:
        """Return the rows that have not ended."""
        places = [i for i, row in enumerate(self.rows) if row not in self.ended]
        rows = [self.rows[i] for i in places]
        return _Part(
            self.cache,
            self.n_slots,
            places,
            rows,
            [lengths[row] + len(answers[row]) - 1 for row in rows],
            [answers[row][-1] for row in rows],
        )


class _Engine:
    """Answers prompts; what every row has said so far is in `answers`."""

    def __init__(
        self, lm: Any, prompts: Sequence[Sequence[int]], numbers: Tensor | None, how: Decoding
    ) -> None:
        self.lm = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
        self.takes_positions = "position_ids" in _parameters(lm)
        self.prompts, self.numbers, self.how = prompts, numbers, how
        self.lengths = [len(prompt) for prompt in prompts]
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.waiting = deque(_groups(prompts, how))

    def run(self) -> list[list[int]]:
        """Return the tokens of every answer."""
        batch: _Batch | None = None
        while self.waiting or batch:
            if batch is None or batch.is_due():
                parts = [batch.kept(self.answers, self.lengths)] if batch else []
                n_kept = sum(len(part.rows) for part in parts)
                parts += self._read(self._admitted(n_kept))
                batch = self._joined([part for part in parts if part.rows])
            if batch:
                self._step(batch)
        return self.answers

    def _admitted(self, n_rows: int) -> list[list[int]]:
        """Take the groups that fit beside so many rows; none of these has a longer prompt."""
        found: list[list[int]] = []
        while self.waiting:
            n_more = n_rows + len(self.waiting[0])
            if n_rows and n_more > _capacity(self.lengths[self.waiting[0][0]], self.how):
                break
            found.append(self.waiting.popleft())
            n_rows = n_more
        return found

    def _read(self, groups: Sequence[list[int]]) -> list[_Part]:
        """Read the groups' prompts, and draw the first token of every row."""
        found = []
        for some in _portions(groups, self.lengths):
            ids = pad([self.prompts[g[0]] for g in some], self.how.pad, self.lm.device, left=True)
            lengths = torch.tensor([self.lengths[g[0]] for g in some], device=ids.device)
            places = (
                torch.arange(ids.shape[1], device=ids.device) - (ids.shape[1] - lengths)[:, None]
            )
            cache = DynamicCache()
            logits = self._forward(ids, (places >= 0).long(), places.clamp(min=0), cache)
            rows = [row for g in some for row in g]
            place = torch.tensor([i for i, g in enumerate(some) for _ in g], device=ids.device)
            first = None if self.numbers is None else self.numbers[rows, 0]
            tokens = choose(logits[place], first, self.how.temperature).tolist()
            goes_on = [self._say(row, t) for row, t in zip(rows, tokens, strict=True)]
            kept = [i for i, is_open in enumerate(goes_on) if is_open]
            found.append(
                _Part(
                    cache,
                    ids.shape[1],
                    place[kept].tolist(),
                    [rows[i] for i in kept],
                    [self.lengths[rows[i]] for i in kept],
                    [tokens[i] for i in kept],
                )
            )
        return found

    def _joined(self, parts: Sequence[_Part]) -> _Batch | None:
        """Return one batch of all parts, with room for some steps."""
        rows = [row for part in parts for row in part.rows]
        if not rows:
            return None
        lengths = [n for part in parts for n in part.lengths]
        said = [len(self.answers[row]) for row in rows]
        # No slot is used that no row could reach, as some families know no position beyond.
        finals = [n + self.how.max_new_tokens - s for n, s in zip(lengths, said, strict=True)]
        n_slots = max(lengths)
        size = min(n_slots + ROOM, max(finals))
        layers = [
            _Buffer(*_gathered(parts, i, n_slots, size), n_slots)
            for i in range(len(parts[0].cache.layers))
        ]
        device = self.lm.device
        n = torch.tensor(lengths, device=device)
        return _Batch(
            rows=rows,
            cache=Cache(layers=layers),
            mask=(torch.arange(size, device=device) >= (n_slots - n)[:, None]).long(),
            positions=n[:, None],
            tokens=torch.tensor([t for part in parts for t in part.tokens], device=device)[:, None],
            said=torch.tensor(said, device=device)[:, None],
            numbers=None if self.numbers is None else self.numbers[rows],
            n_slots=n_slots,
            ended=set(),
        )

    def _step(self, batch: _Batch) -> None:
        """Say one more token in every row."""
        batch.n_slots += 1
        mask = batch.mask[:, : batch.n_slots]
        logits = self._forward(batch.tokens, mask, batch.positions, batch.cache)
        # A row that ended may have no number left.
        last = self.how.max_new_tokens - 1
        numbers = batch.numbers
        if numbers is not None:
            numbers = numbers.gather(1, batch.said.clamp(max=last)).squeeze(1)
        batch.tokens = choose(logits, numbers, self.how.temperature)[:, None]
        batch.positions, batch.said = batch.positions + 1, batch.said + 1
        for row, token in zip(batch.rows, batch.tokens.flatten().tolist(), strict=True):
            if row not in batch.ended and not self._say(row, token):
                batch.ended.add(row)

    def _say(self, row: int, token: int) -> bool:
        """Add a token to a row's answer; return whether the row goes on."""
        self.answers[row].append(token)
        return token not in self.how.stops and len(self.answers[row]) < self.how.max_new_tokens

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Return the logits after the last token of each row."""
        more = {"position_ids": positions} if self.takes_positions else {}
        out = self.lm(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **more,
        )
        logits: Tensor = out.logits[:, -1]
        return logits


def _capacity(n_tokens: int, how: Decoding) -> int:
    """Return how many rows there may be when the longest prompt has so many tokens."""
    return max(1, min(how.max_rows, how.max_tokens // (n_tokens + how.max_new_tokens)))


def _groups(prompts: Sequence[Sequence[int]], how: Decoding) -> list[list[int]]:
    """Return the rows of each prompt, the shortest first; too large a group is cut."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(tuple(prompt), []).append(i)
    found = []
    for prompt in sorted(rows, key=len):
        size = _capacity(len(prompt), how)
        group = rows[prompt]
        found += [group[i : i + size] for i in range(0, len(group), size)]
    return found


def _portions(groups: Sequence[list[int]], lengths: Sequence[int]) -> list[list[list[int]]]:
    """Return groups, the shortest first, by what one forward pass reads of their prompts."""
    found: list[list[list[int]]] = []
    for group in groups:
        if not found or (len(found[-1]) + 1) * lengths[group[0]] > READ_TOKENS:
            found.append([])
        found[-1].append(group)
    return found


def _gathered(parts: Sequence[_Part], layer: int, n_slots: int, size: int) -> tuple[Tensor, Tensor]:
    """Return keys and values of the rows of all parts, right-aligned in the first `n_slots`."""
    olds = [part.cache.layers[layer] for part in parts]
    keys = _aligned([old.keys for old in olds], parts, n_slots, size)
    values = _aligned([old.values for old in olds], parts, n_slots, size)
    for old in olds:  # whole caches are never there twice
        old.keys = old.values = None
    return keys, values


def _aligned(olds: Sequence[Tensor], parts: Sequence[_Part], n_slots: int, size: int) -> Tensor:
    n_rows = sum(len(part.rows) for part in parts)
    new = olds[0].new_empty(n_rows, olds[0].shape[1], size, olds[0].shape[3])
    start = 0
    for old, part in zip(olds, parts, strict=True):
        end, n = start + len(part.rows), max(part.lengths)
        where = torch.tensor(part.places, device=old.device)
        # Padding must be finite: no weight times what is not a number is not nothing.
        new[start:end, :, : n_slots - n] = 0
        used = old[:, :, part.n_slots - n : part.n_slots]
        torch.index_select(used, 0, where, out=new[start:end, :, n_slots - n : n_slots])
        start = end
    return new
