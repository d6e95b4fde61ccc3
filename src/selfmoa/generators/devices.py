"""Which device models answer on, in which precision, and who leaves when its memory gets short.

    device = Device("auto", inference="auto")
    weights = Weights(device, load, n_bytes)
    model = weights.use(lambda: working_bytes)    loaded if it is not; others leave if they must

What leaves is dropped and read again when it is next used: nothing here ever changes weights, and
the system's file cache holds them for as long as there is room. Where nothing bounds the memory
(CPU, MPS) nobody leaves, and nothing is estimated.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from selfmoa.errors import SelfmoaError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BYTES = {"fp32": 4, "bf16": 2}


class NoDevice(SelfmoaError):  # noqa: N818
    """The recipe names a device that this machine does not have."""

    exit_code = 13

    def __init__(self, kind: str) -> None:
        super().__init__(
            f"policy.device is '{kind}', and torch {torch.__version__} finds none here; set "
            "policy.device=auto, or install a torch that is built for it."
        )


class DoesNotFit(SelfmoaError):  # noqa: N818
    """The weights of one model are larger than all the memory of the device."""

    exit_code = 3

    def __init__(self, name: str, n_bytes: int, room: int) -> None:
        super().__init__(
            f"{name} has {n_bytes / 1e9:.2f} GB of weights, and the device has room for "
            f"{room / 1e9:.2f} GB; set policy.inference=nf4 or policy.device=cpu, or take a "
            "smaller model."
        )


def choose_device(kind: str = "auto") -> torch.device:
    """Return the device of this name; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        NoDevice: it is not there.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if kind == "auto":
        kind = next(name for name, is_there in there.items() if is_there)
    if not there[kind]:
        raise NoDevice(kind)
    return torch.device(kind)


def choose_precision(inference: str, device: torch.device) -> str:
    """Return "fp32", "bf16" or "nf4"; "auto" is bf16 on an accelerator that computes with it."""
    if inference != "auto":
        return inference
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "mps" else "fp32"


def stored_weights(folder: Path) -> int:
    """Return the number of weights in a folder's safetensors files; only headers are read."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it has no iterator
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


class Device:
    """A device and the models on it, of which the least recently used leaves first."""

    def __init__(
        self, kind: str = "auto", inference: str = "auto", budget: int | None = None
    ) -> None:
        """Choose it.

        Args:
            kind: "auto", "cpu", "cuda" or "mps".
            inference: how weights are held: "auto", "fp32", "bf16" or "nf4".
            budget: bytes that models and their work may take; without one, what is free on CUDA,
                and no bound elsewhere.

        Raises:
            NoDevice: it is not there.
        """
        self.torch = choose_device(kind)
        self.held = choose_precision(inference, self.torch)
        self.shared: dict[Any, Any] = {}
        """What models have in common, by their own keys: bases of adapters, engines."""
        self._budget = budget
        self._loaded: list[Weights] = []

    @property
    def is_bounded(self) -> bool:
        """Whether anything ever has to leave."""
        return self._budget is not None or self.torch.type == "cuda"

    def label(self, digest: str) -> str:
        """Return the name of weights by what they hold: other precisions answer otherwise."""
        name = digest.removeprefix("sha256:")[:12]
        return name if self.held == "fp32" else f"{name}-{self.held}"

    def enter(self, weights: Weights, working: Callable[[], int] | None) -> None:
        """Make room for a model and its work, by letting others go.

        Raises:
            DoesNotFit: the weights alone are too large for the empty device.
        """
        others = [w for w in self._loaded if w is not weights]
        self._loaded = [*others, weights]
        if not self.is_bounded:
            return
        missing = 0 if weights.is_loaded else weights.n_bytes
        wanted = missing + (working() if working else 0)
        while others and self._room() < wanted:
            others.pop(0).drop()
        self._loaded = [*others, weights]
        if self._room() < missing:
            raise DoesNotFit(weights.name, weights.n_bytes, self._room())

    def leave(self, weights: Weights) -> None:
        """Forget a model that was dropped."""
        self._loaded = [w for w in self._loaded if w is not weights]

    def free(self) -> None:
        """Drop all models; each is read again when it is next used."""
        for weights in list(self._loaded):
            weights.drop()

    def _room(self) -> int:
        if self._budget is not None:
            return self._budget - sum(w.n_bytes for w in self._loaded if w.is_loaded)
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


class Weights:
    """The weights of one model: on their device while they are used, and no longer than they may.

    `load` reads them, `n_bytes` is their size and `name` what errors call them.
    """

    def __init__(
        self, device: Device, load: Callable[[], Any], n_bytes: Callable[[], int], name: str
    ) -> None:
        self.device, self.name = device, name
        self._load, self._count = load, n_bytes
        self._bytes: int | None = None
        self._model: Any = None

    @property
    def is_loaded(self) -> bool:
        """Whether they are on the device now."""
        return self._model is not None

    @property
    def n_bytes(self) -> int:
        """Their size; counted once."""
        if self._bytes is None:
            self._bytes = self._count()
        return self._bytes

    def use(self, working: Callable[[], int] | None = None) -> Any:
        """Return the model, loaded; `working` tells how many bytes its work takes on top."""
        self.device.enter(self, working)
        if self._model is None:
            self._model = self._load()
        return self._model

    def drop(self) -> None:
        """Give the memory back."""
        self._model = None
        self.device.leave(self)
        gc.collect()  # modules are full of cycles
        if self.device.torch.type == "cuda":
            torch.cuda.empty_cache()
