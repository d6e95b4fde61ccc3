"""The state of a training in memory, as named tensors and JSON, and back: what checkpoints hold.

It is the trainable parameters, the optimiser's state and the states of torch's generators, all by
name, so that neither the order of parameters nor that of groups matters. Nothing here touches a
file.

Left out on purpose: frozen parameters and buffers (they are those of the model that training began
with; no buffer is expected to change), Python's and numpy's global generators (training draws from
seeds and from torch alone), schedulers (rates follow from the step), gradients (a step is over
when it is saved), parameters sharded over processes (gather them first).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor
    from torch.nn import Module, Parameter
    from torch.optim import Optimizer

    Tensors = Mapping[str, Tensor]
    Names = Sequence[Sequence[str]]

MODEL, OPTIMIZER, RNG = "model.safetensors", "optimizer.safetensors", "rng.safetensors"

CHUNK = 1 << 24
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As the safetensors format calls them."""


class Unusable(Exception):  # noqa: N818 - a reason, not an accident
    """Why a checkpoint is passed over: the rest of a sentence that begins with its name."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a training.

    Attributes:
        tensors: those of each file by name; an optimiser's are called PARAMETER/KEY.
        settings: the rest of the optimiser's state, as JSON.
    """

    tensors: Mapping[str, Tensors]
    settings: Mapping[str, Any]


def take(model: Module, optimizer: Optimizer) -> Snapshot:
    """Return the state of a training: a view, not a copy.

    Raises:
        RuntimeError: the optimiser holds a parameter that the model does not train.
    """
    parameters = _trainable(model)
    names = _grouped_names(optimizer, parameters)
    order, packed = list(chain(*names)), optimizer.state_dict()
    state = {
        f"{name}/{key}": value
        for index, name in sorted(enumerate(order), key=lambda each: each[1])
        for key, value in sorted(packed["state"].get(index, {}).items())
    }
    tensors = {where: value for where, value in state.items() if isinstance(value, torch.Tensor)}
    groups = zip(packed["param_groups"], names, strict=True)
    settings = {
        "groups": [{**group, "params": list(each)} for group, each in groups],
        "values": {where: value for where, value in state.items() if where not in tensors},
        "tensors": _layout(tensors),
    }
    return Snapshot({MODEL: parameters, OPTIMIZER: tensors, RNG: _generators(model)}, settings)


def prepare(snapshot: Snapshot, model: Module, optimizer: Optimizer) -> Callable[[], None]:
    """Return how to put a snapshot back; until that is called, nothing is changed.

    Raises:
        Unusable: it does not fit the model, the optimiser or this program.
        RuntimeError: the optimiser holds a parameter that the model does not train.
    """
    parameters, saved = _trainable(model), snapshot.tensors
    names = _grouped_names(optimizer, parameters)
    _compare(MODEL, _layout(parameters), _layout(saved[MODEL]))
    _compare(OPTIMIZER, snapshot.settings["tensors"], _layout(saved[OPTIMIZER]))
    generators = _usable_generators(saved[RNG], _generators(model))
    state = _optimizer_state(snapshot, optimizer, names, parameters)

    @torch.no_grad()
    def put_back() -> None:
        optimizer.load_state_dict(state)
        for name, parameter in parameters.items():
            parameter.copy_(saved[MODEL][name])
        torch.set_rng_state(generators["cpu"])
        for name, device in _cuda_devices(model).items():
            if name in generators:
                torch.cuda.set_rng_state(generators[name], device)

    return put_back


def safetensors_bytes(tensors: Tensors) -> Iterator[bytes]:
    """Yield the bytes of a safetensors file with these tensors, 16 MiB at a time.

    The library's `save_file` wants all of them in host memory, leaves the digest to a second
    reading, and says "disk full" in words only.
    """
    # Wide types first, as the library has it: then every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, start = {}, 0
    for name, tensor in ordered:
        end = start + tensor.numel() * tensor.element_size()
        about = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**about, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for part in flat.split(CHUNK):
            yield part.cpu().numpy().tobytes()


def _trainable(model: Module) -> dict[str, Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _grouped_names(optimizer: Optimizer, parameters: Mapping[str, Parameter]) -> list[list[str]]:
    """Return the names of the parameters in each group of an optimiser."""
    names = {id(p): name for name, p in parameters.items()}
    try:
        return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    except KeyError as error:
        text = "the optimiser holds a parameter that the model does not train"
        raise RuntimeError(text) from error


def _layout(tensors: Tensors) -> dict[str, str]:
    """Return type and shape of tensors, for people to read."""
    return {n: f"{str(x.dtype).removeprefix('torch.')} {[*x.shape]}" for n, x in tensors.items()}


def _compare(file: str, wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compare names, types and shapes of tensors."""
    for name in sorted({*wanted, *found}):
        if name not in found:
            raise Unusable(f"{file} lacks '{name}'")
        if name not in wanted:
            raise Unusable(f"{file} has '{name}', which has no place")
        if wanted[name] != found[name]:
            raise Unusable(f"{file} has '{name}' as {found[name]}, not {wanted[name]}")


def _optimizer_state(
    snapshot: Snapshot, optimizer: Optimizer, names: Names, parameters: Tensors
) -> dict[str, Any]:
    """Return what `load_state_dict` of this optimiser takes."""
    settings = snapshot.settings
    if [sorted(group["params"]) for group in settings["groups"]] != [sorted(g) for g in names]:
        raise Unusable("its optimiser has other groups of parameters")
    index = {name: i for i, name in enumerate(chain(*names))}
    tensors = {
        where: _own_copy(tensor, parameters[where.rpartition("/")[0]])
        for where, tensor in snapshot.tensors[OPTIMIZER].items()
    }
    state: dict[int, dict[str, Any]] = {}
    for where, value in {**settings["values"], **tensors}.items():
        name, _, key = where.rpartition("/")
        state.setdefault(index[name], {})[key] = value
    groups = [
        {key: _like(value, live.get(key)) for key, value in saved.items()}
        | {"params": [index[name] for name in each]}
        for saved, live, each in zip(settings["groups"], optimizer.param_groups, names, strict=True)
    ]
    return {"state": state, "param_groups": groups}


def _like(value: Any, live: Any) -> Any:
    """Return a setting as the tuple that JSON made a list of."""
    return tuple(value) if isinstance(live, tuple) else value


def _own_copy(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a copy that no longer lives in a file, laid out in memory as its parameter.

    Fused optimisers walk a parameter and its state side by side.
    """
    if tensor.shape != parameter.shape:
        return tensor.clone()
    return torch.empty_like(parameter, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _cuda_devices(model: Module) -> dict[str, torch.device]:
    """Return the GPUs that hold parts of a model: named by order, as each process has others."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    ordered = sorted(devices, key=lambda device: device.index)
    return {f"cuda-{n}": device for n, device in enumerate(ordered)}


def _generators(model: Module) -> dict[str, Tensor]:
    """Return the states of torch's generators: the CPU's, and those of the model's GPUs."""
    cuda = {name: torch.cuda.get_rng_state(d) for name, d in _cuda_devices(model).items()}
    return {"cpu": torch.get_rng_state(), **cuda}


def _usable_generators(saved: Tensors, now: Tensors) -> dict[str, Tensor]:
    """Return those that can be put back: a training may go on with another number of GPUs."""
    common = {"cpu"} | (saved.keys() & now.keys())
    found = {name: saved[name].clone() for name in common & saved.keys()}
    _compare(RNG, _layout({name: now[name] for name in common}), _layout(found))
    try:
        torch.Generator().set_state(found["cpu"])
    except RuntimeError as error:
        raise Unusable(f"{RNG} is broken") from error
    return found
