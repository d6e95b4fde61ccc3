"""The same preference step three times: TRL's, TRL's with compacted logits, ours.

All start from equal random weights, get equal token ids and take equal optimiser steps (fused
AdamW, gradient norm clipped to 1). TRL is driven as its own training loop drives it: its trainer
prepares the model, its collator makes the batches, its `training_step`, clipping, optimiser and
scheduler do the step. What the loop adds (callbacks, logging, a data loader) is left out, in its
favour. It is configured for speed: reference log-probabilities computed beforehand, no gradient
checkpointing, no dropout, bf16 weights under bf16 autocast where the cell is bf16.

"trl compact" scores completion tokens only. TRL 1.16 does so on devices with Triton and scores
every position elsewhere; here the question "has this device Triton?" is answered with yes at the
one place where that choice is made.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from selfmoa.training.losses import LossSettings, dpo
from selfmoa.training.preference import Group, Objective, Pair, Preferences
from selfmoa.training.processes import Processes
from selfmoa.training.reference import Scoring, score
from selfmoa.training.tokens import Row
from selfmoa.training.trainer import Optimisation, _Step, make_optimizer, trainable

BETA, LR, MAX_NORM, LORA_RANK = 0.1, 1e-5, 1.0, 16
PAD_ID = 0
FIRST_WORD = 3  # token ids below are special

warnings.filterwarnings("ignore", ".*(gradient_checkpointing|use_liger_kernel)", FutureWarning)

Step = Callable[[], float]
"""Takes an optimiser step, always on the same pairs, and returns its loss."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes. Embeddings are tied, as in nearly all models below 2B parameters."""

    vocab: int
    hidden: int = 256
    layers: int = 6
    intermediate: int = 1792
    heads: int = 4
    kv_heads: int = 4
    head_size: int = 64
    family: str = "llama"

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's projections, those that read the layer's input first."""
        h, i, q = self.hidden, self.intermediate, self.heads * self.head_size
        kv = self.kv_heads * self.head_size
        return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]


SHAPES = {
    "32k": Shape(32_000),
    "152k": Shape(151_936),
    "llama-3.2-1b": Shape(128_256, 2048, 16, 8192, 32, 8, 64),
    "qwen2.5-1.5b": Shape(151_936, 1536, 28, 8960, 12, 2, 128, "qwen2"),
}


@dataclass(frozen=True)
class Cell:
    """What is trained on what: a model's shape, lengths in tokens, LoRA or all weights."""

    shape: str
    prompt: int
    completion: int
    tuning: str

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Read `152k:256/64:lora`.

        Raises:
            ValueError: it is not of that form.
        """
        try:
            shape, lengths, tuning = text.split(":")
            prompt, completion = (int(n) for n in lengths.split("/"))
        except ValueError:
            raise ValueError(f"'{text}' is not like 152k:256/64:lora") from None
        if shape not in SHAPES or tuning not in ("lora", "full"):
            raise ValueError(f"'{text}': shapes are {', '.join(SHAPES)}; tunings lora and full")
        return cls(shape, prompt, completion, tuning)

    def __str__(self) -> str:
        return f"{self.shape}:{self.prompt}/{self.completion}:{self.tuning}"

    def dtype(self, device: str) -> torch.dtype:
        """LoRA is bf16; all weights are fp32 on a CPU and bf16 on a GPU."""
        is_half = self.tuning == "lora" or device == "cuda"
        return torch.bfloat16 if is_half else torch.float32


def draw_rows(cell: Cell, n_rows: int, responses: int) -> list[Row]:
    """Return rows of random token ids, every prompt and every completion of the cell's length."""
    generator = torch.Generator().manual_seed(2)
    vocab = SHAPES[cell.shape].vocab

    def draw(n: int) -> list[int]:
        return torch.randint(FIRST_WORD, vocab, (n,), generator=generator).tolist()

    return [
        Row(draw(cell.prompt), [draw(cell.completion) for _ in range(responses)])
        for _ in range(n_rows)
    ]


def as_pairs(rows: Sequence[Row]) -> list[Row]:
    """Return the first completion against each of the others, every pair a row of its own."""
    return [Row(row.prompt, [row.completions[0], c]) for row in rows for c in row.completions[1:]]


def build_model(cell: Cell, device: str) -> Any:
    """Return the random model of a cell; equal weights at every call."""
    shape = SHAPES[cell.shape]
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[shape.family]
    config = config_class(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=PAD_ID,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return model_class(config).to(cell.dtype(device))


def lora() -> LoraConfig:
    """Return the adapter of the LoRA cells: rank 16 on all linear layers but the head."""
    return LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )


@torch.no_grad()
def nudge(model: Any) -> None:
    """Move the policy off its reference by the same amounts everywhere: a first loss to compare."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if "lora_" in name:
                parameter.copy_(0.02 * noise)
            else:
                parameter.add_(0.002 * noise)


def build_selfmoa(model: Any, cell: Cell, rows: Sequence[Row], device: str) -> Step:
    """Return our engine's step on these rows; a row's first completion meets each of the others."""
    if cell.tuning == "lora":
        model = get_peft_model(model, lora())
    precision = "bf16" if cell.dtype(device) == torch.bfloat16 else "fp32"
    processes = Processes(Accelerator() if device == "cuda" else None)
    how = Scoring("mask", PAD_ID, sum(row.n_tokens for row in rows), precision, processes)
    reference = score(model, rows, how)  # a new adapter changes nothing: this is the reference
    nudge(model)
    objectives = {"preference": Objective(dpo, LossSettings(BETA), ())}
    groups = [Group(row, tuple(_pair(n) for n in range(1, len(row.completions)))) for row in rows]
    n_pairs = sum(len(group.pairs) for group in groups)
    task = Preferences(groups, objectives, reference, how.layout, how.pad_id, n_pairs)
    settings = Optimisation(
        LR, n_pairs, steps=10**6, max_tokens=how.max_tokens, precision=precision
    )
    stepper = _Step(
        lambda function, *args: function(model, *args),
        trainable(model),
        [task],
        settings,
        processes,
        how.max_tokens,
    )
    optimizer = make_optimizer(model, settings)
    model.train()
    items = list(range(len(groups)))
    return lambda: float(stepper.take(0, [items], optimizer)["loss"])


def _pair(rejected: int) -> Pair:
    return Pair(str(rejected), 0, rejected, "preference", (), 0.0, None)


def build_trl(
    model: Any, cell: Cell, rows: Sequence[Row], device: str, variant: str = "trl"
) -> Step:
    """Return TRL's step on these rows, with two completions each.

    Args:
        model: from `build_model`, its own.
        cell: the model's sizes and how it is tuned.
        rows: one pair each.
        device: "cpu" or "cuda".
        variant: "trl"; "trl compact", see above; "trl liger", with Liger's layer kernels.
    """
    from datasets import Dataset, disable_progress_bars

    os.environ["TQDM_DISABLE"] = "1"
    disable_progress_bars()
    records = [
        {
            "prompt_ids": list(r.prompt),
            "chosen_ids": r.completions[0],
            "rejected_ids": r.completions[1],
        }
        for r in rows
    ]
    trainer = _trainer(model, cell, Dataset.from_list(records), device, variant)
    model, _ = trainer._prepare_for_training(1_000_000, None, None)
    trainer.current_gradient_accumulation_steps = 1
    nudge(trainer.model)
    liger = _liger(trainer) if variant == "trl liger" else {}
    pairs = list(trainer.train_dataset)

    def step() -> float:
        with _compact() if variant == "trl compact" else _patched(liger):
            batch = trainer.data_collator(pairs)
            loss = trainer.training_step(model, batch)
            trainer._clip_grad_norm(model)
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
            model.zero_grad()
        return float(loss)

    return step


def _trainer(model: Any, cell: Cell, dataset: Any, device: str, variant: str) -> Any:
    """Return TRL's trainer over rows that are token ids already."""
    logging.getLogger("trl").setLevel(logging.ERROR)
    from trl import DPOConfig, DPOTrainer

    class TokenTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    arguments = DPOConfig(
        output_dir=tempfile.gettempdir(),
        beta=BETA,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=MAX_NORM,
        optim="adamw_torch_fused",
        per_device_train_batch_size=len(dataset),
        max_length=None,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=cell.dtype(device) == torch.bfloat16,
        use_cpu=device == "cpu",
        use_liger_kernel=variant == "trl liger",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    with _compact() if variant == "trl compact" else nullcontext():
        return TokenTrainer(
            model,
            args=arguments,
            train_dataset=dataset,
            processing_class=_tokenizer(),
            peft_config=lora() if cell.tuning == "lora" else None,
        )


def _compact() -> Any:
    return mock.patch("trl.trainer.utils._use_triton", return_value=True)


def _liger(trainer: Any) -> dict[str, dict[str, Any]]:
    """Give Liger's layers to this trainer's model; return what its step needs in which module.

    Liger also replaces functions of the model's module, for all models of the process: the
    others here must not have them.
    """
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.trainer_utils import unwrap_peft_model

    name = type(unwrap_peft_model(trainer.model)).__module__
    module = vars(sys.modules[name])
    before = dict(module)
    apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    changed = {key: value for key, value in module.items() if before.get(key) is not value}
    module.update(before)
    return {name: changed}


def _patched(modules: dict[str, dict[str, Any]]) -> Any:
    stack = ExitStack()
    for name, changed in modules.items():
        stack.enter_context(mock.patch.dict(vars(sys.modules[name]), changed))
    return stack


def _tokenizer() -> Any:
    """Return a tokenizer for the trainer to hold: it reads no text here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": PAD_ID, "<s>": 1, "</s>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="</s>")),  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
    )
