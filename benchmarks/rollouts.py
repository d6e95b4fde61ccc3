# ruff: noqa: T201  (a script that prints its tables)
"""Answers from one model: our generator against `generate` of transformers and other engines.

    python benchmarks/rollouts.py --quick
    python benchmarks/rollouts.py --json figures.json
    python benchmarks/rollouts.py --cells llama-32k:bf16 --device cuda

The mixed bag: prompts of 16 to 512 tokens (log-uniform), k answers each of at most 256 tokens. The
models are random ones whose chance of ending is the same after every token, 2 %, so lengths are
geometric in every engine, and no engine needs a hook. All engines draw from the whole vocabulary at
temperature 1. They answer the bag in turn, in one process; a rate is the tokens that an engine said
over its seconds, prompts included, and figures are medians over the rounds, each of other seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yardsticks
from training import table, tell
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from selfmoa.generators.decoding import Decoding, decode
from selfmoa.training.packing import pad

PAD, BOS, EOS = 0, 1, 2
SHORTEST, LONGEST, MAX_NEW = 16, 512, 256
ENDING = 0.02
"""Chance that a token is the last one."""
STATIC_BATCH = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-32k": {"kind": "llama", "vocab_size": 32_000, "num_key_value_heads": 4},
    "qwen2-152k": {"kind": "qwen2", "vocab_size": 151_936, "num_key_value_heads": 2},
}
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 1792,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}

Figures = dict[str, Any]
Engine = Callable[[int], int]
"""Answers the bag with a seed; returns the number of tokens said, ends included."""


@dataclass(frozen=True)
class Bag:
    """What is answered: prompts, and how many answers each."""

    prompts: list[list[int]]
    k: int

    @classmethod
    def draw(cls, n: int, k: int, vocab: int) -> Bag:
        """Return `n` random prompts of log-uniform length, in random order."""
        torch.manual_seed(0)
        span = math.log(LONGEST / SHORTEST)
        lengths = (SHORTEST * torch.exp(torch.rand(n) * span)).long().tolist()
        return cls([[BOS, *torch.randint(3, vocab, (m - 1,)).tolist()] for m in lengths], k)


def build(shape: str, dtype: torch.dtype, device: str) -> Any:
    """Return a random model that ends with chance `ENDING` after any token.

    One channel of the embeddings is the same for all tokens, so it is nearly constant in the last
    hidden state too; there only the row of the head that scores the end looks at it.
    """
    options = dict(SHAPES[shape])
    config = AutoConfig.for_model(options.pop("kind"), **SIZES, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 1.0
        head[:, 0] = 0.0
        head[EOS] = 0.0
        ids = torch.randint(3, config.vocab_size, (4, 64))
        hidden = model.base_model(ids).last_hidden_state[:, -1]
        others = (hidden @ head.T).logsumexp(-1).mean()
        head[EOS, 0] = (others + math.log(ENDING / (1 - ENDING))) / hidden[:, 0].mean()
    model.generation_config = GenerationConfig()
    return model.to(device, dtype)


# Engines


def ours(model: Any, bag: Bag) -> Engine:
    """Return our engine: all answers in one call."""
    prompts = [prompt for prompt in bag.prompts for _ in range(bag.k)]
    how = Decoding(1.0, MAX_NEW, (EOS,), PAD)

    def answer(seed: int) -> int:
        seeds = range(seed * len(prompts), (seed + 1) * len(prompts))
        return sum(len(decoded.ids) for decoded in decode(model, prompts, seeds, how))

    return answer


def generate(model: Any, bag: Bag, n_prompts: int) -> Engine:
    """Return what users write: `generate` on so many prompts at a time, with their k answers."""
    groups = [bag.prompts[i : i + n_prompts] for i in range(0, len(bag.prompts), n_prompts)]

    def answer(seed: int) -> int:
        torch.manual_seed(seed)
        said = 0
        for group in groups:
            ids = pad(group, PAD, model.device, left=True)
            out = model.generate(
                input_ids=ids,
                attention_mask=(ids != PAD).long(),
                do_sample=True,
                top_k=0,
                max_new_tokens=MAX_NEW,
                num_return_sequences=bag.k,
                pad_token_id=PAD,
                eos_token_id=EOS,
            )[:, ids.shape[1] :]
            said += int((out != PAD).sum())
        return said

    return answer


def generate_batch(model: Any, bag: Bag) -> Engine:
    """Return the continuous batching of transformers."""
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=MAX_NEW,
        num_return_sequences=bag.k,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )

    def answer(seed: int) -> int:
        torch.manual_seed(seed)
        out = model.generate_batch(inputs=bag.prompts, generation_config=config)
        if len(out) != len(bag.prompts) * bag.k:
            raise SystemExit(f"generate_batch gave {len(out)} answers")
        return sum(len(o.generated_tokens) for o in out.values())

    return answer


def ctranslate2(model: Any, bag: Bag, folder: Path) -> Engine:
    """Return CTranslate2 on the same weights: sorted by length, batches of as many rows as ours."""
    import ctranslate2 as ct2
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    special = {"bos_token": "w1", "eos_token": "w2", "unk_token": "w3"}
    core = Tokenizer(models.WordLevel(words, unk_token=special["unk_token"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    model.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    TransformersConverter(str(folder / "hf")).convert(str(folder / "ct2"))
    kind = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
    engine = ct2.Generator(
        str(folder / "ct2"), compute_type=kind, intra_threads=torch.get_num_threads()
    )
    prompts = [[f"w{i}" for i in prompt] for prompt in bag.prompts for _ in range(bag.k)]

    def answer(seed: int) -> int:
        ct2.set_random_seed(seed)
        out = engine.generate_batch(
            prompts,
            max_batch_size=4 * STATIC_BATCH,
            max_length=MAX_NEW,
            sampling_topk=0,
            include_prompt_in_result=False,
            return_end_token=True,
            end_token=[EOS],
        )
        return sum(len(o.sequences_ids[0]) for o in out)

    return answer


# Figures


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    device: str
    threads: int
    prompts: int
    k: int
    rounds: int
    clock: str
    engines: tuple[str, ...]

    def now(self) -> float:
        """Return seconds: of the wall, or those that this process's threads computed."""
        yardsticks.finish(self.device)
        return time.process_time() if self.clock == "cpu" else time.perf_counter()


def engines(model: Any, bag: Bag, folder: Path, wanted: Sequence[str]) -> dict[str, Engine]:
    """Return the engines by name, ours first; those that cannot be built are left out."""
    makers: dict[str, Callable[[], Engine]] = {
        "selfmoa": lambda: ours(model, bag),
        "generate": lambda: generate(model, bag, STATIC_BATCH),
        "generate, 8 rows": lambda: generate(model, bag, max(1, STATIC_BATCH // bag.k)),
        "generate_batch": lambda: generate_batch(model, bag),
        "ctranslate2": lambda: ctranslate2(model, bag, folder),
    }
    found = {}
    for name in wanted:
        try:
            found[name] = makers[name]()
        except (ImportError, ValueError) as error:
            tell(f"{name} is left out: {error}")
    return found


def measure(cell: str, settings: Settings) -> Figures:
    """Return a cell's rates, how much was said, and our share of what products alone allow."""
    shape, kind = cell.split(":")
    model = build(shape, DTYPES[kind], settings.device)
    bag = Bag.draw(settings.prompts, settings.k, model.config.vocab_size)
    rates: dict[str, list[float]] = {}
    said: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        built = engines(model, bag, Path(folder), settings.engines)
        for seed in range(settings.rounds):
            for name, answer in built.items():
                start = settings.now()
                n = answer(seed)
                rates.setdefault(name, []).append(n / (settings.now() - start))
                said.setdefault(name, []).append(n)
                tell(f"{cell}, round {seed + 1}, {name}: {n} tokens, {rates[name][-1]:.0f}/s")
    medians = {name: median(found) for name, found in rates.items()}
    limit = limit_of_products(model, bag, median(said["selfmoa"]), settings.device)
    return {
        "cell": cell,
        "prompt_tokens": sum(map(len, bag.prompts)),
        "tokens_said": said,
        "rounds": rates,
        "tokens_per_second": medians,
        "limit": limit,
        "share_of_limit": medians["selfmoa"] / limit,
    }


def limit_of_products(model: Any, bag: Bag, said: float, device: str) -> float:
    """Return tokens per second if the linear layers ran at the rate of a bare product of 256 rows.

    Every prompt is read once, every token said goes through the body and the head once. Attention,
    which a processor spends reading keys and values, and drawing tokens count nothing.
    """
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.base_model.layers.parameters() if p.dim() == 2)
    read = sum(map(len, bag.prompts))
    flop = 2.0 * (body * (read + said) + head * said)
    sizes = [(256, hidden, inner), (256, inner, hidden), (256, hidden, 4096)]
    return said / (flop / yardsticks.gemm_rate(sizes, model.dtype, device))


def report(figures: Sequence[Figures]) -> str:
    """Return the table of rates and ratios."""
    names = list(figures[0]["tokens_per_second"])
    headers = ["cell", *(f"{n}, tokens/s" for n in names), *(f"vs {n}" for n in names[1:])]
    rows = []
    for found in figures:
        rates = found["tokens_per_second"]
        ours_ = rates["selfmoa"]
        shown = [f"{rates[n]:.0f}" if n in rates else "-" for n in names]
        ratios = [f"{ours_ / rates[n]:.2f}x" if n in rates else "-" for n in names[1:]]
        limit = [f"{found['limit']:.0f}", f"{found['share_of_limit']:.0%}"]
        rows.append([found["cell"], *shown, *ratios, *limit])
    return table([*headers, "limit, tokens/s", "share"], rows)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cells = [f"{shape}:{kind}" for shape in SHAPES for kind in DTYPES]
    names = ("selfmoa", "generate", "generate, 8 rows", "generate_batch", "ctranslate2")
    parser.add_argument("--quick", action="store_true", help="one cell, 12 prompts, one round")
    parser.add_argument("--cells", nargs="+", choices=cells, default=None, metavar="CELL")
    parser.add_argument("--engines", nargs="+", choices=names[1:], default=None, metavar="ENGINE")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--answers", type=int, default=4, help="answers a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a busy machine"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    is_quick = given.quick
    settings = Settings(
        device=given.device,
        threads=given.threads,
        prompts=12 if is_quick else given.prompts,
        k=given.answers,
        rounds=1 if is_quick else given.rounds,
        clock=given.clock,
        engines=("selfmoa", *(given.engines or (names[1:2] if is_quick else names[1:]))),
    )
    machine = yardsticks.machine(settings.device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    chosen = given.cells or (cells[:1] if is_quick else cells)
    figures = [measure(cell, settings) for cell in chosen]
    print(report(figures))
    if given.json:
        whole = {"machine": machine, "settings": vars(settings), "cells": figures}
        given.json.write_text(json.dumps(whole, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
