"""The local generator: a transformers model on this machine, drawn from row by row.

Sampling inverts the cumulative distribution with one uniform number a token, taken from the
draw's own seed, so what a row draws does not depend on its neighbours in the batch. (Rounding in
a differently shaped batch may still differ in the last bit; stages therefore fix their batches.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoConfig, GenerationConfig

from selfmoa.errors import UnusableTokenizer
from selfmoa.generators.decoding import MAX_ROWS, Decoding, decode
from selfmoa.generators.devices import BYTES, Device, Weights, stored_weights
from selfmoa.generators.limits import refuse_long_texts
from selfmoa.generators.rows import prompt_rows, responses, text_rows
from selfmoa.training.estimates import weights_bytes, working_bytes
from selfmoa.training.layouts import choose_layout
from selfmoa.training.policy import base_of, is_adapter, load_frozen, load_tokenizer, positions
from selfmoa.training.reference import Scoring, score
from selfmoa.training.tasks import ALONE
from selfmoa.training.tokens import end_of_turn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from selfmoa.protocols import Draw, Sampling
    from selfmoa.records import Message, Response
    from selfmoa.training.tokens import Row


class LocalGenerator:
    """Answers prompts with a causal language model and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        """Take a model that is loaded, or a `Seat` at one that is loaded when it is used."""
        self._seat: Seat | None = model if isinstance(model, Seat) else None
        self._own = None if self._seat else _neutral(model)
        self.most = self._seat.base.most if self._seat else positions(model.config)
        self.tokenizer = tokenizer
        self.model = name
        self._shared, self._tried = ALONE, 0
        self.stops = end_tokens(tokenizer)
        # Models that only ever read raw text may have no padding; what is padded is masked.
        self.pad = self.stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @classmethod
    def load(
        cls, folder: Path, *, threads: int, digest: str, device: Device | None = None
    ) -> LocalGenerator:
        """Take a policy folder; its weights are read when they are first used.

        The generator is named by the folder's content. Adapters of one base share it.
        """
        if threads:
            torch.set_num_threads(threads)
        device = device or Device("cpu", "fp32")
        below = base_of(folder).resolve()
        base = device.shared.setdefault(("base", below), Base(below, device))
        adapter = digest.removeprefix("sha256:")[:12] if is_adapter(folder) else None
        seat = Seat(base, adapter, folder)
        return cls(seat, load_tokenizer(folder), device.label(digest))

    @property
    def lm(self) -> Any:
        """The model, loaded and with the right adapter."""
        return self._seat.take() if self._seat else self._own

    def _lm_for(self, n_rows: int, prompt: int, new: int) -> Any:
        """Return the model when there is room to write `new` tokens after prompts."""
        return self._seat.take(n_rows, prompt, new) if self._seat else self._own

    def generate(self, draws: Sequence[Draw], sampling: Sampling) -> list[Response]:
        """Answer one batch of draws; temperature 0 is greedy."""
        if not draws:
            return []
        rows = prompt_rows(self.tokenizer, draws, sampling, self.most)
        how = Decoding(sampling.temperature, sampling.max_new_tokens, tuple(self.stops), self.pad)
        lm = self._lm_for(len(rows), max(map(len, rows)), sampling.max_new_tokens)
        answers = decode(lm, rows, [draw.seed for draw in draws], how)
        texts = self.tokenizer.batch_decode([a.ids for a in answers], skip_special_tokens=True)
        reasons = ["stop" if answer.is_ended else "length" for answer in answers]
        said = [(text.strip(), why) for text, why in zip(texts, reasons, strict=True)]
        return responses(draws, sampling, self.model, said)

    @torch.inference_mode()
    def logprobs(
        self,
        items: Sequence[tuple[Sequence[Message], str]],
        template: Mapping[str, Any] | None = None,
    ) -> list[float]:
        """Return log p(text | messages) of each item, without the end-of-turn token.

        Texts that follow one another on the same messages share their prompt: it is read once.
        """
        if not items:
            return []
        rows = text_rows(self.tokenizer, items, template)
        refuse_long_texts(
            [len(row.prompt) + len(text) for row in rows for text in row.completions], self.most
        )
        lm = self._lm_for(len(rows), max(row.n_tokens for row in rows), 0)
        told = [replace(row, completions=[c for c in row.completions if c]) for row in rows]
        told = [row for row in told if row.completions]
        scored = score(lm, told, Scoring(self._layout(told), self.pad)) if told else []
        logps = iter([float(logp) for each in scored for logp in each])
        # An empty text is certain.
        return [next(logps) if text else 0.0 for row in rows for text in row.completions]

    def _layout(self, rows: Sequence[Row]) -> str:
        """Return how rows share their prompt: the first way that is exact for this model.

        It is looked for again where a row is longer than those it was tried on.
        """
        longest = max(row.n_tokens for row in rows)
        if all(len(row.completions) == 1 for row in rows):
            return ALONE
        if longest > self._tried:
            with torch.inference_mode(mode=False):
                self._shared = choose_layout(self.lm, rows, self.pad).layout
            self._tried = longest
        return self._shared


class Base:
    """A whole model, and the adapters that take turns on it; one copy of its weights for all."""

    def __init__(self, folder: Path, device: Device) -> None:
        self.config = AutoConfig.from_pretrained(folder)
        self.most = positions(self.config)
        self.held = device.held
        self.weights = Weights(device, self._load, self._count, str(folder))
        self._folder, self._device = folder, device
        self._peft: Any = None
        self._active: str | None = None

    def _load(self) -> Any:
        self._peft = self._active = None
        return _neutral(load_frozen(self._folder, self.held, self._device.torch))

    def _count(self) -> int:
        if self.held == "nf4":
            return weights_bytes(self.config, "nf4")
        return stored_weights(self._folder) * BYTES[self.held]

    def turn(self, adapter: str | None, folder: Path, working: Callable[[], int] | None) -> Any:
        """Return the model with this adapter on it, or with none."""
        model = self.weights.use(working)
        if adapter == self._active:
            return model
        if adapter is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._put_on(model, adapter, folder)
        self._active = adapter
        return model

    def _put_on(self, model: Any, adapter: str, folder: Path) -> None:
        how = {"autocast_adapter_dtype": False}  # adapters compute in the precision of their base
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(model, folder, adapter, **how)
        elif adapter not in self._peft.peft_config:
            self._peft.load_adapter(folder, adapter, **how)
        self._peft.base_model.enable_adapter_layers()
        self._peft.set_adapter(adapter, inference_mode=True)
        self._peft.eval()


@dataclass(frozen=True, slots=True)
class Seat:
    """A generator's place at a base: with which adapter it answers."""

    base: Base
    adapter: str | None
    folder: Path

    def take(self, n_rows: int = 0, prompt: int = 1, new: int = 0) -> Any:
        """Return the model, when there is room for it and for what it is to do."""

        def working() -> int:
            n = min(_rounded(n_rows, 16), MAX_ROWS)
            return _working(self.base, n, _rounded(prompt, 64), _rounded(new, 64))

        return self.base.turn(self.adapter, self.folder, working if n_rows else None)


@lru_cache(maxsize=256)
def _working(base: Base, n_rows: int, prompt: int, new: int) -> int:
    return working_bytes(base.config, held=base.held, n_rows=n_rows, prompt=prompt, new=new)


def _rounded(n: int, step: int) -> int:
    """Return the next multiple, so that few sizes have to be estimated."""
    return -(-n // step) * step


def _neutral(model: Any) -> Any:
    """Return the model for evaluation, without its vendor's decoding defaults.

    A repetition penalty or a least length would make what is drawn and what `logprobs` scores two
    different models.
    """
    model.generation_config = GenerationConfig()
    return model.eval()


def end_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer.

    A template may end turns with another token than the tokenizer's own end (Gemma). A template
    that cannot render a plain question (a guard's, or none at all) leaves only the latter.

    Raises:
        UnusableTokenizer: there is neither.
    """
    own = tokenizer.eos_token_id
    try:
        return sorted({own, end_of_turn(tokenizer)[-1]} - {None})
    except UnusableTokenizer:
        if own is None:
            raise
        return [own]
