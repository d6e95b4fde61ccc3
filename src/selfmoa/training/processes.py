"""This process and its fellows, as `accelerate launch` started them; alone if nobody did.

Plain data parallelism does not wrap the model: every process adds up the gradients of its share
of a batch, and once a step they are summed over all. So a step is the same sum whatever the number
of processes, and one that ran out of memory can be taken again. Where weights are sharded (FSDP,
DeepSpeed) accelerate wraps the model, and what needs its weights runs inside its forward (`_Door`).
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedType
from torch import distributed

from selfmoa.errors import TrainingStopped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor


class Processes:
    """The processes of one training. Without an accelerator: this one alone, on one device."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self._accelerator = accelerator
        kind = accelerator.distributed_type if accelerator else DistributedType.NO
        self.are_sharded = kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.rank = accelerator.process_index if accelerator else 0
        self.count = accelerator.num_processes if accelerator else 1
        self.device = accelerator.device if accelerator else torch.device("cpu")
        self._wrapped: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def prepare(self, model: Any, optimizer: Any) -> tuple[Callable[..., Any], Any]:
        """Return how to call a function of the model, and the optimiser to use."""
        if not self.are_sharded or self._accelerator is None:
            return (lambda function, *args: function(model, *args)), optimizer
        self._wrapped, optimizer = self._accelerator.prepare(_Door(model), optimizer)
        return self._wrapped, optimizer

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """Return the context in which a forward pass of this precision runs."""
        if precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss that is this process's part of a sum over all."""
        if self.are_sharded and self._accelerator:
            self._accelerator.backward(loss * self.count)  # these libraries average
        else:
            loss.backward()

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum gradients over the processes; what no process has a gradient for stays without."""
        if self.count == 1 or self.are_sharded:
            return
        has = torch.tensor([p.grad is not None for p in parameters], device=self.device).int()
        distributed.all_reduce(has)
        used = [p for p, n in zip(parameters, has.tolist(), strict=True) if n]
        for p in used:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([p.grad.reshape(-1) for p in used if p.grad is not None])
        distributed.all_reduce(flat)
        for p, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
            p.grad = part.view_as(p)

    def clip(self, parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
        """Clip gradients to a norm; return the norm that they had."""
        if self.are_sharded and self._accelerator:
            norm = self._accelerator.clip_grad_norm_(self._wrapped.parameters(), max_norm)
            return float(norm) if norm is not None else 0.0  # DeepSpeed clips in its own step
        return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))

    def any(self, claim: bool) -> bool:
        """Return whether the claim is true in any process."""
        return claim if self.count == 1 else bool(self._reduced([float(claim)])[0])

    def sum(self, sums: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
        """Return the sums of all processes under these names."""
        values = [sums[name] for name in names]
        return dict(zip(names, values if self.count == 1 else self._reduced(values), strict=True))

    def add_up(self, parts: list[Tensor]) -> list[Tensor]:
        """Return the sum over all processes of each of these tensors."""
        if self.count == 1 or not parts:
            return parts
        flat = torch.cat(parts).to(self.device)
        distributed.all_reduce(flat)
        return list(flat.cpu().split([len(part) for part in parts]))

    def missing(self, passes: int) -> int:
        """Return how many passes this process has to add so that all make as many.

        Sharded weights are gathered by all processes together, in every pass.
        """
        if not self.are_sharded:
            return 0
        most = torch.tensor(passes, device=self.device)
        distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
        return int(most) - passes

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self._accelerator:
            self._accelerator.wait_for_everyone()

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Return all weights of sharded models by name; None where the model holds them itself."""
        if not self.are_sharded or self._accelerator is None:
            return None
        weights = self._accelerator.get_state_dict(self._wrapped)
        return {name.removeprefix("model."): value for name, value in weights.items()}

    def _reduced(self, values: Sequence[float]) -> list[float]:
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(together)
        found: list[float] = together.tolist()
        return found


def join(device: str = "auto") -> Processes:
    """Join the fellows that `accelerate launch` started; alone, take the GPU if there is one.

    With `device` "cpu" all stay on the CPU.

    Raises:
        TrainingStopped: they do not find each other, and each would train alone.
    """
    return _join(device == "cpu")


@cache
def _join(is_on_cpu: bool) -> Processes:
    is_launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if not is_launched and (is_on_cpu or not torch.cuda.is_available()):
        return Processes()
    found = Processes(Accelerator(cpu=is_on_cpu))
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if found.count != wanted:
        raise TrainingStopped(
            f"{wanted} processes were started and do not find each other",
            "check the accelerate configuration, for CPUs with use_cpu: true",
        )
    return found


def leave() -> None:
    """Part from the fellows, at the end of this process.

    One that simply goes takes down others that are not quite done: they abort while they let go of
    a connection that is no longer there.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


class _Door(torch.nn.Module):
    """Runs a function of the model inside a forward pass, where sharded weights are whole."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._no_split_modules = whole._no_split_modules  # what accelerate shards one by one

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)
