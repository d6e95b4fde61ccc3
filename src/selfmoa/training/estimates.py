"""How much memory a model needs to answer and to be trained, told before any weights are loaded.

    settings = AutoConfig.from_pretrained(folder)
    generation_bytes(settings, held="bf16", n_rows=64, prompt=300, new=200)
    training_bytes(settings, Policy(adapter="lora"), length=512)

Layers, activations, adapters and checkpointing are not written down as formulas, of which every
family would need its own: the model is built, and run once, on tensors that have a shape and no
contents, and the bytes of those that are alive are counted. What depends on contents is written
down: the head (`logprobs`), the state of the optimiser and what decoding keeps.

All figures are bytes of tensors. A process needs some on top: about 0.5 GB for CUDA and its
kernels, and what its allocator keeps between tensors (5 to 10 %).
"""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from selfmoa.training.layouts import hidden_states
from selfmoa.training.logprobs import KEEP_BYTES as KEPT_TILES
from selfmoa.training.logprobs import TILE
from selfmoa.training.policy import make_trainable
from selfmoa.training.tokens import Row
from selfmoa.training.trainer import trainable

if TYPE_CHECKING:
    from torch import Tensor

    from selfmoa.config import Policy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}
"""What computes with weights that are held so."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in nf4: half of one; a scale of 8 bits for 64 weights; of these, one in fp32
for 256 (double quantisation, arXiv 2305.14314, section 3)."""
READ_TOKENS, KEPT_BYTES, MAX_ROWS = 4096, 2 * 2**30, 256
"""Tokens of prompts that are read at once, bytes of keys and values that are kept, and rows that
are written side by side: as in `generators.batching` and `decoding`."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of weights.

    `total` counts shared weights once. `linear` are those of the layers that are held in few bits
    (all matrices but the head), `largest` those of the largest of these.
    """

    total: int
    linear: int
    largest: int


def parameters(config: Any) -> Counts:
    """Return how many weights a causal language model of this transformers config has."""
    kind: Any = type(config)
    return _parameters(config.to_json_string(use_diff=False), kind)


def weights_bytes(config: Any, held: str = "fp32") -> int:
    """Return the bytes of the weights, held as "fp32", "bf16" or "nf4"."""
    counts = parameters(config)
    if held == "nf4":
        return round(2 * (counts.total - counts.linear) + NF4_BYTES * counts.linear)
    return counts.total * DTYPES[held].itemsize


def cache_bytes(config: Any, held: str, n_rows: int, length: int) -> int:
    """Return the bytes of keys and values (or states) of `n_rows` rows of `length` tokens."""
    with _Sketch(config, DTYPES[held]) as sketch, torch.no_grad():
        cache = sketch.read(n_rows, length)
        return _bytes_of(cache)


def generation_bytes(config: Any, *, held: str, n_rows: int, prompt: int, new: int) -> int:
    """Return the largest number of bytes alive while prompts are answered, weights included.

    Args:
        config: of the model.
        held: how its weights are held, "fp32", "bf16" or "nf4".
        n_rows: answers that are asked for at once; not all may be written side by side.
        prompt: tokens of a prompt.
        new: tokens of an answer.
    """
    return weights_bytes(config, held) + working_bytes(
        config, held=held, n_rows=n_rows, prompt=prompt, new=new
    )


def working_bytes(config: Any, *, held: str, n_rows: int, prompt: int, new: int) -> int:
    """Return `generation_bytes` without the weights."""
    dtype = DTYPES[held]
    with _Sketch(config, dtype) as sketch, torch.no_grad():
        read = max(1, min(n_rows, READ_TOKENS // prompt))
        before = sketch.live.now
        kept = _bytes_of(sketch.read(read, prompt))
        reading = sketch.live.peak - before - kept
        vocabulary = sketch.model.config.get_text_config().vocab_size
        layers = sketch.model.config.get_text_config().num_hidden_layers
    each = kept / (read * prompt) * (prompt + new)
    n_rows = max(1, min(n_rows, MAX_ROWS, int(KEPT_BYTES / each)))
    cache = n_rows * each
    # Logits in the model's dtype, in fp32, divided by the temperature and exponentiated.
    choosing = n_rows * vocabulary * (dtype.itemsize + 3 * 4)
    # A batch that is put together anew is there twice, one layer at a time.
    regrouping = cache / layers
    unpacked = parameters(config).largest * dtype.itemsize if held == "nf4" else 0
    return round(cache + max(reading, choosing, regrouping) + unpacked)


def training_bytes(
    config: Any,
    policy: Policy,
    *,
    length: int,
    n_rows: int | None = None,
    trained_share: float = 1.0,
    n_completions: int = 1,
    own_reference: bool = False,
) -> int:
    """Return the largest number of bytes alive in training steps, weights included.

    Args:
        config: of the model.
        policy: what is trained and how.
        length: tokens of a row: a prompt and the completions that share it.
        n_rows: rows of a forward pass; as many as `policy.max_tokens` allows if not given.
        trained_share: of the tokens, those whose log-probability is wanted.
        n_completions: completions of a row; with 1, rows are not packed.
        own_reference: whether the reference is a model of its own, as it is of whole models and of
            adapters of other bases.
    """
    most = max(1, policy.max_tokens // length)
    is_half = policy.precision == "bf16"
    dtype = torch.bfloat16 if is_half and policy.adapter != "full" else torch.float32
    kind = "full" if policy.adapter == "full" else "lora"
    like = policy.model_copy(update={"adapter": kind, "compile": False})
    with _Sketch(config, dtype, like) as it:
        model = it.model
        rows = [_row(length, trained_share, n_completions)] * min(n_rows or most, most)
        trained = 0
        for parameter in trainable(model):  # later parts of a step come on top of the gradients
            parameter.grad = torch.empty_like(parameter)
            trained += parameter.numel()
        _forward_and_backward(model, rows, is_half)
        peak = it.live.peak
    if policy.adapter == "qlora":
        counts = parameters(config)
        saved = (dtype.itemsize - NF4_BYTES) * counts.linear
        # peft trains on the rest in fp32; a layer is unpacked to be computed with.
        rest = (4 - dtype.itemsize) * (counts.total - counts.linear)
        peak += round(rest - saved) + counts.largest * dtype.itemsize
    states = 2 * 4 * trained  # AdamW: two averages a weight, in fp32
    reference = weights_bytes(config, "fp32") if own_reference else 0
    return peak + states + reference


def _row(length: int, trained_share: float, n_completions: int) -> Row:
    each = max(1, round(length * trained_share) // n_completions)
    return Row([0] * max(1, length - each * n_completions), [[0] * each] * n_completions)


def _forward_and_backward(model: Any, rows: list[Row], is_half: bool) -> None:
    shares = len(rows[0].completions) > 1
    layout = "mask" if shares else "rows"
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        hidden, _ = hidden_states(model, rows, layout, 0)
        head = model.get_output_embeddings().weight
        losses = _HeadCost.apply(hidden, head)
    losses.sum().backward()


class _HeadCost(torch.autograd.Function):
    """Makes and keeps tensors as large as those of `logprobs.token_logps`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        is_trained = ctx.needs_input_grad[1]
        work = hidden.to(weight.dtype).contiguous()
        n, tile = len(work), min(TILE, len(weight))
        n_kept = min(len(weight) // tile, KEPT_TILES // (n * TILE * work.element_size()))
        kept = [work.new_empty(n, tile) for _ in range(n_kept if is_trained else 0)]
        scratch, part = work.new_empty(n, tile), weight[:tile].contiguous()
        means = [work.new_empty(n, work.shape[1], dtype=torch.float32) for _ in range(2)]
        ctx.save_for_backward(hidden, weight, means[0], *kept)
        del scratch, part, means
        return hidden.new_empty(n, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden, weight, pull, *_ = ctx.saved_tensors
        by_hidden = (grad[:, None] * pull).to(hidden.dtype)
        if not ctx.needs_input_grad[1]:
            return by_hidden, None
        by_weight, scratch = torch.empty_like(weight), hidden.new_empty(len(hidden), TILE)
        del scratch
        return by_hidden, by_weight


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on: those alive `now`, and the `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Sketch:
    """A model without contents, and the bytes that it would take; a context."""

    def __init__(self, config: Any, dtype: torch.dtype, policy: Policy | None = None) -> None:
        with torch.random.fork_rng([]), torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            if policy is not None:
                self.model = make_trainable(self.model, policy, seed=0).train()
        self.fake, self.live = FakeTensorMode(), LiveBytes()

    def __enter__(self) -> _Sketch:
        self.fake.__enter__()
        self.live.__enter__()
        _put_on_cpu(self.model)
        return self

    def __exit__(self, *error: Any) -> None:
        self.live.__exit__(*error)
        self.fake.__exit__(*error)

    def read(self, n_rows: int, length: int) -> Any:
        """Read prompts; return the cache that comes of it."""
        self.live.peak = self.live.now
        cache = DynamicCache(config=self.model.config)
        ids = torch.zeros(n_rows, length, dtype=torch.long)
        return self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).past_key_values


def _put_on_cpu(model: Any) -> None:
    """Replace what is on the device meta, where attention takes another way; ties stay tied."""
    made: dict[int, Any] = {}

    def on_cpu(old: Any) -> Any:
        if id(old) not in made:
            new = torch.empty(old.shape, dtype=old.dtype)
            is_weight = isinstance(old, torch.nn.Parameter)
            made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if is_weight else new
        return made[id(old)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: on_cpu(old) for name, old in held.items() if old is not None})


def _bytes_of(cache: Any) -> int:
    found = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor):
                found[id(value.untyped_storage())] = value.untyped_storage().nbytes()
    return sum(found.values())


@lru_cache(maxsize=64)
def _parameters(text: str, kind: Any) -> Counts:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind.from_dict(json.loads(text)))
    head = model.get_output_embeddings()
    sizes = [
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    total = sum(p.numel() for p in model.parameters())
    return Counts(total, sum(sizes), max(sizes, default=0))
