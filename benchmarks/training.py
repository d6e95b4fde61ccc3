# ruff: noqa: T201  (a script that prints its tables)
"""The preference step against TRL's DPOTrainer: time, memory, share of the machine's GEMM rate.

    python benchmarks/training.py --quick
    python benchmarks/training.py --json figures.json
    python benchmarks/training.py --cells 152k:256/64:lora 152k:256/64:full --profile
    python benchmarks/training.py --device cuda --model llama-3.2-1b

Variants (`rivals.py`) take their steps in turn, in one process, on the same token ids, after it
is checked that their first losses are equal; figures are medians over the rounds. Peak memory is
that of two steps in a process of their own, above what the process held with the model built.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yardsticks
from rivals import (
    LORA_RANK,
    SHAPES,
    Cell,
    Step,
    as_pairs,
    build_model,
    build_selfmoa,
    build_trl,
    draw_rows,
)

from selfmoa.training.memory import keep_freed_memory
from selfmoa.training.tokens import Row

LENGTHS = [(64, 64), (256, 64), (512, 128)]
QUICK = "32k:64/64:lora"
K = 4  # responses a prompt in the table on shared prompts
GPU_SHAPES = ("llama-3.2-1b", "qwen2.5-1.5b")
MAX_PAIRS = 4096
# bf16 rounds every hidden state to 3 digits; a sum of 64-128 log-probabilities then differs by
# some hundredths between two orders of summation, a loss by beta times that.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Figures = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the command line says and every measurement needs."""

    device: str
    allocator: str
    threads: int
    pairs: int
    rounds: int
    profile: bool

    @property
    def rivals(self) -> tuple[str, str]:
        """The two variants of TRL. On a GPU its logits are compacted in any case."""
        return ("trl", "trl compact" if self.device == "cpu" else "trl liger")


def build(variant: str, cell: Cell, rows: Sequence[Row], settings: Settings) -> Step | None:
    """Return a variant's step on a model of its own; None if a library it needs is not there."""
    model = build_model(cell, settings.device)
    return build_on(model, variant, cell, rows, settings)


def build_on(
    model: Any, variant: str, cell: Cell, rows: Sequence[Row], settings: Settings
) -> Step | None:
    """Return a variant's step on this model; None if a library it needs is not there."""
    if variant.startswith("selfmoa"):
        return build_selfmoa(model, cell, rows, settings.device)
    try:
        return build_trl(model, cell, rows, settings.device, variant)
    except ImportError as error:
        print(f"{variant} is left out: {error}", file=sys.stderr)
        return None


def time_steps(steps: dict[str, Step], cell: Cell, settings: Settings) -> dict[str, float]:
    """Return the median seconds of each variant's step, after checking that their losses agree."""
    losses = {name: step() for name, step in steps.items()}  # and a warm-up
    spread = max(losses.values()) - min(losses.values())
    if not spread <= TOLERANCES[cell.dtype(settings.device)]:
        raise SystemExit(f"{cell}: the variants do not compute the same loss: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(settings.rounds):
        for name, step in steps.items():
            yardsticks.finish(settings.device)
            start = time.perf_counter()
            step()
            yardsticks.finish(settings.device)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(found) for name, found in seconds.items()}


def measure_cell(cell: Cell, settings: Settings) -> Figures:
    """Return a cell's figures: times, ratios, share of the GEMM rate, breakdown."""
    gc.collect()
    rows = draw_rows(cell, settings.pairs, 2)
    built = {v: build(v, cell, rows, settings) for v in (*settings.rivals, "selfmoa")}
    steps = {name: step for name, step in built.items() if step}
    seconds = time_steps(steps, cell, settings)
    rank = LORA_RANK if cell.tuning == "lora" else None
    shape, lengths = SHAPES[cell.shape], [cell.completion] * 2
    work = yardsticks.step_work(shape, [(cell.prompt, lengths)] * settings.pairs, rank)
    tokens = settings.pairs * (cell.prompt + 2 * cell.completion)
    peak = yardsticks.gemm_rate(
        gemm_sizes(cell, tokens, settings.pairs * 2 * cell.completion),
        cell.dtype(settings.device),
        settings.device,
    )
    figures: Figures = {
        "cell": str(cell),
        "seconds": seconds,
        "gflop": {**vars(work), "total": work.total},
        "gemm_gflops": peak / 1e9,
        "share_of_gemm_rate": work.total / seconds["selfmoa"] / peak,
    }
    figures["gflop"] = {kind: flop / 1e9 for kind, flop in figures["gflop"].items()}
    if settings.profile:
        figures["breakdown"] = yardsticks.breakdown(steps["selfmoa"], settings.device)
    return figures


def gemm_sizes(cell: Cell, tokens: int, predicted: int) -> list[tuple[int, int, int]]:
    """Return (rows, inner, columns) of the step's largest products: two of the body, the head's."""
    shape = SHAPES[cell.shape]
    body = [(tokens, shape.hidden, shape.intermediate), (tokens, shape.intermediate, shape.hidden)]
    return [*body, (predicted, shape.hidden, 4096), (predicted, 4096, shape.hidden)]


def measure_responses(cell: Cell, settings: Settings) -> Figures:
    """Return pairs per second where K responses share a prompt: the best meets each other one."""
    gc.collect()
    shared = draw_rows(cell, 1, K)
    apart = as_pairs(shared)
    data = {"trl": apart, "selfmoa, pairs apart": apart, "selfmoa": shared}
    built = {name: build(name, cell, rows, settings) for name, rows in data.items()}
    steps = {name: step for name, step in built.items() if step}
    seconds = time_steps(steps, cell, settings)
    rates = {name: (K - 1) / s for name, s in seconds.items()}
    return {"cell": str(cell), "responses": K, "pairs_per_second": rates}


def measure_apart(
    variant: str, cell: Cell, settings: Settings, *, responses: int = 2, prompts: int | None = None
) -> Figures:
    """Return what a process of its own finds: peak memory and, on a GPU, the largest batch."""
    command = [sys.executable, __file__, "--worker", variant, "--cells", str(cell)]
    command += ["--device", settings.device, "--allocator", settings.allocator]
    command += ["--threads", str(settings.threads), "--responses", str(responses)]
    command += ["--pairs", str(prompts or settings.pairs)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if told.returncode:
        raise SystemExit(f"{cell}, {variant}: the worker failed\n{told.stderr}")
    found: Figures = json.loads(told.stdout.splitlines()[-1])
    return found


def work(variant: str, cell: Cell, responses: int, settings: Settings) -> Figures:
    """Measure one variant's peak memory in this process and, on a GPU, the largest batch."""
    if variant != "selfmoa":  # libraries are no part of a step's memory
        import datasets  # noqa: F401
        import trl.trainer.dpo_trainer  # noqa: F401
    found: Figures = {}
    if settings.device == "cuda":
        found = largest_batch(variant, cell, settings)
        gc.collect()
    model = build_model(cell, settings.device)
    watch = yardsticks.Memory(settings.device)
    step = build_on(model, variant, cell, draw_rows(cell, settings.pairs, responses), settings)
    if step is None:
        return found
    watch.restart()
    step()
    step()
    return {**found, "peak_mib": watch.peak()}


def largest_batch(variant: str, cell: Cell, settings: Settings) -> Figures:
    """Double the batch until memory ends; return the last that fitted and its pairs per second."""
    found: Figures = {"largest": 0}
    n = 1
    while n <= MAX_PAIRS:
        try:
            step = build(variant, cell, draw_rows(cell, n, 2), settings)
            if step is None:
                return {}
            step()
            yardsticks.finish(settings.device)
            start = time.perf_counter()
            step()
            yardsticks.finish(settings.device)
        except torch.OutOfMemoryError:
            break
        found = {"largest": n, "pairs_per_second": n / (time.perf_counter() - start)}
        n *= 2
        del step
        gc.collect()
        torch.cuda.empty_cache()
    return found


def run(cells: Sequence[Cell], settings: Settings, *, is_quick: bool) -> Figures:
    """Measure all cells, printing each when it is done; return the figures."""
    shared = [c for c in cells if (c.prompt, c.completion) == (256, 64)]
    shared = shared or (list(cells[:1]) if is_quick else [])
    report: Figures = {
        "machine": yardsticks.machine(settings.device),
        "settings": vars(settings),
        "cells": [],
        "responses": [],
    }
    for cell in cells:
        figures = measure_cell(cell, settings)
        variants = figures["seconds"]
        figures["memory"] = {v: measure_apart(v, cell, settings) for v in variants}
        report["cells"].append(figures)
        tell(f"{cell} is done: {', '.join(f'{v} {s:.3f} s' for v, s in variants.items())}")
    for cell in shared:
        figures = measure_responses(cell, settings)
        figures["memory"] = {
            str(k): measure_apart("selfmoa", cell, settings, responses=k, prompts=1)
            for k in (() if is_quick else (2, 4, 8))
        }
        report["responses"].append(figures)
        tell(f"{cell} with {K} responses a prompt is done")
    return report


def tell(text: str) -> None:
    """Say how far we are, apart from the tables."""
    print(text, file=sys.stderr, flush=True)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, aligned for the eye too."""
    lines = [list(headers), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    lines.insert(1, ["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)])
    aligned = [
        [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def speed_table(cells: Sequence[Figures], rivals: Sequence[str]) -> str:
    """Return median step times, the ratios, and ours against the arithmetic."""
    headers = ["cell", *(f"{v}, s" for v in (*rivals, "selfmoa")), *(f"vs {v}" for v in rivals)]
    headers += ["GFLOP", "GEMM GFLOP/s", "share"]
    rows = []
    for figures in cells:
        seconds = figures["seconds"]
        ours = seconds["selfmoa"]
        times = [f"{seconds[v]:.3f}" if v in seconds else "-" for v in (*rivals, "selfmoa")]
        ratios = [f"{seconds[v] / ours:.2f}x" if v in seconds else "-" for v in rivals]
        work = [f"{figures['gflop']['total']:.1f}", f"{figures['gemm_gflops']:.0f}"]
        share = f"{figures['share_of_gemm_rate']:.0%}"
        rows.append([figures["cell"], *times, *ratios, *work, share])
    return table(headers, rows)


def memory_table(cells: Sequence[Figures], rivals: Sequence[str]) -> str:
    """Return peak memory above the built model, and the ratios."""
    headers = ["cell", *(f"{v}, MiB" for v in (*rivals, "selfmoa")), *(f"vs {v}" for v in rivals)]
    rows = []
    for figures in cells:
        peaks = {v: found.get("peak_mib") for v, found in figures["memory"].items()}
        ours = peaks["selfmoa"]
        sizes = [f"{peaks[v]:.0f}" if peaks.get(v) else "-" for v in (*rivals, "selfmoa")]
        ratios = [f"{ours / peaks[v]:.2f}x" if peaks.get(v) else "-" for v in rivals]
        rows.append([figures["cell"], *sizes, *ratios])
    return table(headers, rows)


def responses_table(responses: Sequence[Figures]) -> str:
    """Return pairs per second where a prompt is shared, and peak memory by responses."""
    peaks = [(int(k), k) for k in responses[0]["memory"]]
    headers = ["cell", "trl, pairs/s", "pairs apart", "shared", "vs apart", "vs trl"]
    headers += [f"MiB at k = {k}" for k, _ in peaks]
    headers += [f"MiB/token {a}-{b}" for (a, _), (b, _) in pairwise(peaks)]
    rows = []
    for figures in responses:
        trl, apart, shared = figures["pairs_per_second"].values()
        memory = [(k, figures["memory"][key]["peak_mib"]) for k, key in peaks]
        tokens = Cell.parse(figures["cell"]).completion
        slopes = [(q - p) / ((b - a) * tokens) for (a, p), (b, q) in pairwise(memory)]
        rows.append(
            [figures["cell"]]
            + [f"{x:.2f}" for x in (trl, apart, shared)]
            + [f"{shared / apart:.2f}x", f"{shared / trl:.2f}x"]
            + [f"{peak:.0f}" for _, peak in memory]
            + [f"{x:.2f}" for x in slopes]
        )
    return table(headers, rows)


def largest_table(cells: Sequence[Figures]) -> str:
    """Return the largest batch of each variant and its pairs per second (GPU only)."""
    rows = [
        [figures["cell"], v, str(found["largest"]), f"{found.get('pairs_per_second', 0):.1f}"]
        for figures in cells
        for v, found in figures["memory"].items()
        if "largest" in found
    ]
    return table(["cell", "variant", "largest batch, pairs", "pairs/s there"], rows)


def breakdown_table(cells: Sequence[Figures]) -> str:
    """Return where one step of ours goes, under the profiler (which slows Python down)."""
    kinds = list(cells[0]["breakdown"])
    rows = [[f["cell"], *(f"{f['breakdown'][k]:.0%}" for k in kinds)] for f in cells]
    return table(["cell", *kinds], rows)


def show(report: Figures, settings: Settings) -> None:
    """Print the tables."""
    cells, rivals = report["cells"], settings.rivals
    print(", ".join(f"{k} {v}" for k, v in report["machine"].items()))
    print(
        f"{settings.pairs} pairs a step, medians of {settings.rounds} interleaved rounds, "
        f"allocator {settings.allocator} for all variants\n"
    )
    print("Seconds a step; share = GFLOP / seconds / GEMM rate\n")
    print(speed_table(cells, rivals))
    print("\nPeak memory above the built model\n")
    print(memory_table(cells, rivals))
    if report["responses"]:
        print(f"\nOne prompt, {K} responses, {K - 1} pairs: the first against each other one\n")
        print(responses_table(report["responses"]))
    if settings.device == "cuda":
        print("\nLargest batch\n\n" + largest_table(cells))
    if settings.profile:
        print("\nWhere our step goes\n\n" + breakdown_table(cells))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small cell, under a minute")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    parser.add_argument("--cells", nargs="+", type=Cell.parse, metavar="32k:64/64:lora")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=GPU_SHAPES, help="the shape of the default cells")
    parser.add_argument("--allocator", choices=("kept", "plain"), default="kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=4, help="a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="where our step goes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--responses", type=int, default=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def default_cells(model: str | None, *, is_quick: bool) -> list[Cell]:
    """Return the cells of a run that names none."""
    if model:
        return [Cell(model, p, c, tuning) for p, c in LENGTHS for tuning in ("lora", "full")]
    if is_quick:
        return [Cell.parse(QUICK)]
    return [
        Cell(shape, p, c, tuning)
        for tuning in ("lora", "full")
        for shape in ("32k", "152k")
        for p, c in LENGTHS
    ]


def main() -> None:
    """Measure what the command line asks for."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.allocator == "kept" and not keep_freed_memory():
        args.allocator = "plain"
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    settings = Settings(args.device, args.allocator, args.threads, args.pairs, rounds, args.profile)
    cells = args.cells or default_cells(args.model, is_quick=args.quick)
    if args.worker:
        print(json.dumps(work(args.worker, cells[0], args.responses, settings)))
        return
    report = run(cells, settings, is_quick=args.quick)
    show(report, settings)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
