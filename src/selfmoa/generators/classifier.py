"""Sequence classifiers on this machine: reward models and classifiers of texts.

A conversation is written by the model's own chat template, whole; a text or a pair of texts as its
tokenizer writes them, with special tokens that somebody typed taken apart by a blank. What does not
fit is refused, never cut: a verdict on half an answer is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from selfmoa.errors import BadInput
from selfmoa.generators.devices import BYTES, Device, Weights, stored_weights
from selfmoa.training.intake import refuse_unfit
from selfmoa.training.policy import load_tokenizer
from selfmoa.training.tokens import apart, encode_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from selfmoa.records import Message

    Text = str | tuple[str, str] | Sequence[Message]


class LocalClassifier:
    """A sequence classifier and its tokenizer; see `protocols.Classifier`."""

    def __init__(self, model: Any, tokenizer: Any, name: str, weights: Any = None) -> None:
        """Take a model that is loaded, or its config and the weights that are read when used."""
        self._own = None if weights else model.eval()
        self._weights: Weights | None = weights
        self._config = model if weights else model.config
        self.tokenizer = tokenizer
        self.model = name
        names = self._config.id2label
        self.labels: tuple[str, ...] = tuple(str(names[i]) for i in sorted(names))
        self.most: int | None = getattr(self._config, "max_position_embeddings", None)

    @classmethod
    def load(
        cls, folder: Path, *, threads: int, digest: str, device: Device | None = None
    ) -> LocalClassifier:
        """Take a model folder; its weights are read when they are first used.

        The classifier is named by the folder's content. Weights are fp32 or bf16: 4 bits would
        cost a small classifier more than they save.
        """
        refuse_unfit(folder)
        if threads:
            torch.set_num_threads(threads)
        device = device or Device("cpu", "fp32")
        held = "fp32" if device.held == "fp32" else "bf16"

        def load() -> Any:
            model = AutoModelForSequenceClassification.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32 if held == "fp32" else torch.bfloat16,
            )
            return model.to(device.torch).eval()

        weights = Weights(device, load, lambda: stored_weights(folder) * BYTES[held], str(folder))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        name = digest.removeprefix("sha256:")[:12] + ("" if held == "fp32" else f"-{held}")
        return cls(config, load_tokenizer(folder), name, weights)

    @property
    def lm(self) -> Any:
        """The model, loaded."""
        return self._weights.use() if self._weights else self._own

    def _lm_for(self, n_rows: int, length: int) -> Any:
        """Return the model when there is room to read rows."""
        if self._weights is None:
            return self._own
        return self._weights.use(lambda: reading_bytes(self._config, n_rows, length))

    @torch.inference_mode()
    def logits(self, texts: Sequence[Text]) -> list[list[float]]:
        """Return one number a label for each text, text pair or conversation.

        Raises:
            BadInput: a text has no tokens, or more than the model has positions for.
        """
        if not texts:
            return []
        rows = [self._row(text) for text in texts]
        for i, (ids, _) in enumerate(rows, 1):
            if self.most is not None and len(ids) > self.most:
                problem = f"it has {len(ids)} tokens, the model reads {self.most}"
                raise BadInput("texts", i, problem)
        length = max(len(ids) for ids, _ in rows)
        pad = self._pad([ids for ids, _ in rows])
        lm = self._lm_for(len(rows), length)
        lm.config.pad_token_id = pad  # by which decoders find the last token of a row
        inputs = {
            "input_ids": self._padded([ids for ids, _ in rows], length, pad),
            "attention_mask": self._padded([[1] * len(ids) for ids, _ in rows], length, 0),
        }
        if any(kinds for _, kinds in rows):
            inputs["token_type_ids"] = self._padded([kinds for _, kinds in rows], length, 0)
        found: list[list[float]] = (
            lm(**{name: ids.to(lm.device) for name, ids in inputs.items()}).logits.float().tolist()
        )
        return found

    def _row(self, text: Text) -> tuple[list[int], list[int]]:
        """Return ids and, for a pair of a model that knows them, kinds of its tokens."""
        if not isinstance(text, str | tuple):
            (ids,) = encode_prompts(self.tokenizer, [text])
            return ids, []
        parts = [text] if isinstance(text, str) else list(text)
        encoded = self.tokenizer(*(apart(self.tokenizer, part) for part in parts), verbose=False)
        ids = list(encoded["input_ids"])
        if not ids:
            raise BadInput("texts", 1, "it has no tokens")
        return ids, list(encoded.get("token_type_ids", []))

    def _pad(self, rows: Sequence[Sequence[int]]) -> int:
        """Return the tokenizer's padding, or a token that no row has if rows end with it."""
        own: int | None = self.tokenizer.pad_token_id
        if own is not None and all(row[-1] != own for row in rows):
            return own
        used = {token for row in rows for token in row}
        return next(token for token in range(len(used) + 1) if token not in used)

    def _padded(self, rows: Sequence[Sequence[int]], length: int, fill: int) -> torch.Tensor:
        """Return rows [n, length], padded on the right."""
        padded = torch.full((len(rows), length), fill)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        return padded


def reading_bytes(config: Any, n_rows: int, length: int) -> int:
    """Return the bytes that reading rows takes in one layer, attention written out, in fp32."""
    config = config.get_text_config()
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    each = 12 * config.hidden_size + 3 * wide
    scores = 3 * config.num_attention_heads * length
    return int(4 * n_rows * length * (each + scores))
