# ruff: noqa: S106, T201  (names of special tokens; a script that prints its table)
"""What answering and training take in memory, beside what `training.estimates` says they will.

    python benchmarks/memory.py --quick
    python benchmarks/memory.py --json figures.json

Every case runs in a process of its own, by the code that stages call, on a random model: 8 layers
of width 512 and 32k words (41 M weights), so that the model outweighs the process around it. The
measured figure is the largest resident set (VmHWM) above that before the model was loaded; freed
tensors are given back to the system at once (MALLOC_MMAP_THRESHOLD_), or it would count them too.
In bf16, which few CPUs compute with, libraries below torch copy weights in fp32: there the bytes
of live tensors are counted instead, as on a GPU only these would be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

WORDS = 32_000
LENGTH, PAIRS = 256, 8


@dataclass(frozen=True)
class Case:
    """What is measured: generation, or training with these settings."""

    name: str
    family: str = "llama"
    adapter: str = ""
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    layers: int = 8


CASES = [
    Case("answers fp32"),
    Case("answers bf16", precision="bf16"),
    Case("answers fp32, gemma 3", family="gemma3_text"),
    Case("LoRA fp32", adapter="lora"),
    Case("LoRA fp32, checkpointing", adapter="lora", gradient_checkpointing=True),
    Case("LoRA bf16", adapter="lora", precision="bf16"),
    Case("LoRA fp32, gemma 3", adapter="lora", family="gemma3_text"),
    Case("all weights fp32", adapter="full"),
    Case("all weights fp32, checkpointing", adapter="full", gradient_checkpointing=True),
    Case("all weights bf16", adapter="full", precision="bf16"),
]
QUICK = ("answers fp32", "LoRA fp32")


def build(case: Case, folder: Path) -> None:
    """Write a random model and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from selfmoa.sandbox.model import CHAT_TEMPLATE, SPECIAL
    from selfmoa.training.policy import save_policy

    words = [*SPECIAL, *(f"w{i}" for i in range(WORDS - len(SPECIAL)))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        **named,
        additional_special_tokens=SPECIAL[4:],
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        case.family,
        vocab_size=WORDS,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=case.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    save_policy(AutoModelForCausalLM.from_config(config), tokenizer, folder)


def words(n: int, seed: int) -> str:
    """Return a text of n tokens."""
    return " ".join(f"w{(seed * 7919 + i * 31) % (WORDS - 10)}" for i in range(n))


def answer(case: Case, folder: Path) -> tuple[int, int]:
    """Answer 64 prompts of 200 tokens, 50 tokens each; return what was estimated, and the peak."""
    from transformers import AutoConfig

    from selfmoa.generators.devices import Device
    from selfmoa.generators.local import LocalGenerator
    from selfmoa.protocols import Draw, Sampling
    from selfmoa.records import Prompt
    from selfmoa.training.estimates import generation_bytes

    generator = LocalGenerator.load(
        folder, threads=1, digest="sha256:00", device=Device("cpu", case.precision)
    )
    generator.stops = [generator.pad]  # as good as never said: all answers are of full length
    prompts = [
        Prompt.make([{"role": "user", "content": words(196, i)}], goal="", intent="benign",
                    category="", source="benchmark")
        for i in range(64)
    ]  # fmt: skip
    generator.generate([Draw(p, i) for i, p in enumerate(prompts)], Sampling("b", 1.0, 50))
    peak = resident("VmHWM")
    config = AutoConfig.from_pretrained(folder)
    sizes = {"n_rows": 64, "prompt": 200, "new": 50}
    return generation_bytes(config, held=case.precision, **sizes), peak


def train(case: Case, folder: Path) -> tuple[int, int]:
    """Train two parts of a step on pairs of 256 tokens; return what was estimated, and the peak."""
    from transformers import AutoConfig

    from selfmoa.config import ONE_TRAINING, Policy, Train
    from selfmoa.training.estimates import training_bytes
    from selfmoa.training.fitting import fit_policy
    from selfmoa.training.preferences import Preference

    policy = Policy(
        adapter=case.adapter,
        precision=case.precision,
        gradient_checkpointing=case.gradient_checkpointing,
        max_tokens=PAIRS // 2 * LENGTH,
        threads=1,
        layout="mask",
    )
    pairs = [
        Preference(
            str(i),
            [{"role": "user", "content": words(122, i)}],
            words(63, i + 50),
            words(63, i + 99),
            objective="preference",
            margins={},
            flip_probability=0.0,
            safety=None,
        )
        for i in range(PAIRS)
    ]
    settings = Train(**(ONE_TRAINING["train"] | {"batch_size": PAIRS, "epochs": 2.0}))
    fit_policy(folder, folder, folder / "out", pairs, [], settings, policy, seed=0)
    peak = resident("VmHWM")
    config = AutoConfig.from_pretrained(folder)
    estimated = training_bytes(
        config,
        policy,
        length=LENGTH,
        trained_share=0.5,
        n_completions=2,
        own_reference=case.adapter == "full",
    )
    return estimated, peak


def resident(what: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{what}:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def one(case: Case, folder: Path) -> dict[str, Any]:
    """Measure a case in this process."""
    import selfmoa.generators.local
    import selfmoa.training.fitting
    from selfmoa.training.estimates import LiveBytes

    # Loaded before the baseline is taken; and what is freed must not be kept.
    selfmoa.training.fitting.keep_freed_memory = lambda: False
    del selfmoa
    torch.set_num_threads(1)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the mark falls to VmRSS
    act = train if case.adapter else answer
    with LiveBytes() as live:
        estimated, peak = act(case, folder)
    measured = live.peak if case.precision == "bf16" else peak - before
    return {"measured": measured, "estimated": estimated}


def measured(case: Case) -> dict[str, Any]:
    """Measure a case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        build(case, Path(folder))
        done = subprocess.run(  # noqa: S603 - this script itself
            [sys.executable, __file__, "--one", case.name, folder],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"},
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"case": asdict(case), **found, "ratio": found["estimated"] / found["measured"]}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two cases of ten")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        (case,) = [c for c in CASES if c.name == arguments.one[0]]
        print(json.dumps(one(case, Path(arguments.one[1]))))
        return
    cases = [c for c in CASES if c.name in QUICK] if arguments.quick else CASES
    print(f"{platform.machine()}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}; MB")  # fmt: skip
    print(f"{'':34}{'estimated':>10}{'measured':>10}{'ratio':>7}")
    rows = []
    for case in cases:
        row = measured(case)
        rows.append(row)
        print(f"{case.name:34}{row['estimated'] / 1e6:10.0f}{row['measured'] / 1e6:10.0f}"
              f"{row['ratio']:7.2f}", flush=True)  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
