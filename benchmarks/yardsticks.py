"""What a timing is held against: the machine, its GEMM rate, a step's arithmetic, its memory.

FLOPs here are those the mathematics asks for, a multiplication and an addition counted as two:
recomputed logits, masked attention scores and padding are not credited to anybody. Processors and
memory of the host are read from /proc, so on Linux.
"""

from __future__ import annotations

import gc
import platform
import resource
import time
from contextlib import suppress
from ctypes import CDLL
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812  (the name every reader of torch code expects)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rivals import Shape

MIB = 2**20


def machine(device: str) -> dict[str, str | int]:
    """Return what a reader needs to place the figures: processor, threads, versions."""
    names = ("torch", "transformers", "trl", "peft", "liger-kernel")
    processor = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    found: dict[str, str | int] = {
        "processor": processor,
        "instructions": " ".join([torch.backends.cpu.get_cpu_capability(), *_bf16_units()]),
        "threads": torch.get_num_threads(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
    }
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _cpu_name() -> str:
    return _cpu_entry("model name") or platform.machine()


def _bf16_units() -> list[str]:
    """Return what makes bf16 products fast on this processor: they differ by a factor of ten."""
    return sorted({"avx512_bf16", "amx_bf16"} & set(_cpu_entry("flags").split()))


def _cpu_entry(key: str) -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith(key)), "")


def gemm_rate(sizes: Sequence[tuple[int, int, int]], dtype: torch.dtype, device: str) -> float:
    """Return the best rate in FLOP/s of [rows, inner] x [inner, columns] over all sizes given."""
    return max(_rate_of(*size, dtype, device) for size in sizes)


def _rate_of(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> float:
    x = torch.randn(rows, inner, dtype=dtype, device=device)
    weight = torch.randn(columns, inner, dtype=dtype, device=device)
    work, best, start = 2 * rows * inner * columns, 0.0, time.perf_counter()
    while time.perf_counter() - start < 0.3:
        began = time.perf_counter()
        F.linear(x, weight)
        finish(device)
        best = max(best, work / (time.perf_counter() - began))
    return best


def finish(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Work:
    """FLOPs of one optimiser step, forward and backward."""

    body: float
    attention: float
    lora: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.body + self.attention + self.lora + self.head


def step_work(
    shape: Shape, rows: Sequence[tuple[int, Sequence[int]]], lora_rank: int | None
) -> Work:
    """Return the work of a step on rows (prompt length, completion lengths) of shared prompts.

    Frozen weights (a `lora_rank` is given) have no weight gradient, and what reads their
    embeddings no input gradient. The head serves the tokens that are predicted, the body all.
    """
    tokens = sum(prompt + sum(lengths) for prompt, lengths in rows)
    predicted = sum(sum(lengths) for _, lengths in rows)
    visible = sum(_visible(prompt, lengths) for prompt, lengths in rows)
    linears = shape.linears
    weights = sum(i * o for i, o in linears)
    entry = linears[:3]  # q, k, v of the first layer read the embeddings
    skipped = 2.0 * tokens * sum(i * o for i, o in entry)
    is_frozen = lora_rank is not None
    forward = 2.0 * tokens * weights * shape.layers
    head = 2.0 * predicted * shape.hidden * shape.vocab
    attention = 4.0 * visible * shape.heads * shape.head_size * shape.layers
    adapter = 2.0 * tokens * (lora_rank or 0)
    adapters = adapter * sum(i + o for i, o in linears) * shape.layers
    return Work(
        body=2 * forward - skipped if is_frozen else 3 * forward,
        attention=attention * 3,
        lora=adapters * 3 - adapter * sum(i for i, _ in entry),
        head=head * (2 if is_frozen else 3),
    )


def _visible(prompt: int, lengths: Sequence[int]) -> int:
    """Count the (query, key) pairs of a row whose completions see the prompt and themselves."""
    completions = sum(n * prompt + n * (n + 1) // 2 for n in lengths)
    return prompt * (prompt + 1) // 2 + completions


class Memory:
    """The peak of this process's memory above what it held when the watch began."""

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        else:
            CDLL("libc.so.6").malloc_trim(0)
        self.before = self._now()

    def restart(self) -> None:
        """Forget the peaks so far (setting up), not what was held at the beginning."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):  # where it is not permitted, the peak of the whole life counts
                Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def peak(self) -> float:
        """Return the peak above the beginning, in MiB."""
        if self.device == "cuda":
            return (torch.cuda.max_memory_allocated() - self.before) / MIB
        try:
            high = _status("VmHWM")
        except KeyError:
            high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return (high - self.before) / MIB

    def _now(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else _status("VmRSS")


def _status(key: str) -> int:
    """Return an entry of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    entries = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(entries[key].split()[0]) * 1024


KINDS = {
    "GEMM": ("mm", "addmm", "bmm"),
    "attention": ("scaled_dot", "flash", "efficient"),
    "exponentials and means": ("exp", "silu", "sigmoid", "softmax", "pow", "rsqrt", "mean"),
    "products and sums": ("mul", "add", "sub", "neg", "div", "sum"),
    "copies and casts": ("copy", "to_copy", "clone", "cat", "fill", "zero", "empty", "resize"),
    "gather and scatter": ("index", "gather", "scatter", "embedding"),
    "optimiser and clipping": ("fused_adam", "foreach", "linalg_vector_norm"),
}
"""Kinds of operations by how their names begin; the first that fits counts."""


def breakdown(step: Any, device: str) -> dict[str, float]:
    """Return the share of one step's time by kind of operation; the rest is Python and dispatch."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        step()
        finish(device)
        wall = (time.perf_counter() - start) * 1e6
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    shares: dict[str, float] = dict.fromkeys([*KINDS, "other operations"], 0.0)
    for event in profile.key_averages():
        if event.key.startswith("aten::"):
            shares[_kind(event.key)] += getattr(event, attribute) / wall
    shares["Python and dispatch"] = max(0.0, 1 - sum(shares.values()))
    return shares


def _kind(operation: str) -> str:
    name = operation.lower().removeprefix("aten::").lstrip("_")
    return next((k for k, parts in KINDS.items() if name.startswith(parts)), "other operations")
