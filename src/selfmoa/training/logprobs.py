"""Log-probabilities of tokens from last hidden states, without ever holding the logits.

For N tokens and V words the logits [N, V] are by far the largest tensor of a training step: 623 MB
in fp32 for 1,024 tokens of a 152k vocabulary, several times over. Here they exist one tile of the
vocabulary at a time. With the logits z = softcap(scale (W h + b)),

    (1)  log p(y) = z_y - log sum_v exp z_v
    (2)  d log p(y) / dh = scale (c_y W_y - sum_v p_v c_v W_v)     c_v = 1 - (z_v / softcap)^2
    (3)  d log p(y) / dW_v = scale ([v = y] - p_v) c_v h
    (4)  KL = sum_v q_v (log q_v - log p_v)                        q is the reference
    (5)  d KL / dh = scale sum_v (p_v - q_v) c_v W_v

All sums over v are collected tile by tile in forward, those of the gradients too: (2) and (5) lack
only one factor a token, so backward is a product of N x H numbers. With a frozen head (LoRA) that
is two matrix products in all; dense logits need as many, and many passes over [N, V]. A trained
head costs a third for (3), and a fourth for tiles whose probabilities were not kept.

Left out on purpose: `torch.nn.functional.linear_cross_entropy`, which sums over tokens while here
every token has a factor of its own, and Triton kernels, as this must also run on a laptop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


TILE = 4096
"""Words of a tile; N x TILE logits are all the scratch memory. 2,048 and 8,192 are no faster."""
BLOCK = 2**18
"""Logits exponentiated at a time on a CPU: 1 MB in fp32, which its second cache holds."""
KEEP_BYTES = 2**28
"""Most of the probabilities kept for (3). Keeping all takes a fifth off a step in fp32."""
FUSED_WIDTH = 512
"""Widest hidden state for `_attend_to_words`; at 1,024, separate products are 1.6x as fast."""
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Head:
    """The output projection: logits = softcap(scale * (hidden @ weight.T + bias)).

    `weight` [V, H] may carry a graph (LoRA on the head); `bias` is [V]; `softcap` c > 0 turns a
    logit z into c tanh(z / c).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def token_logps(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Return log p(target) of every token, [N], with gradients to the hidden states and the head.

    Matrix products run in the head's dtype, or in autocast's under autocast; sums, exponentials
    and the result are fp32 (fp64 for a head in fp64).

    Args:
        hidden: [N, H], the last hidden states that predict the targets.
        targets: [N] long, ids of the tokens, 0 <= id < V.
        head: what makes logits of hidden states.

    Raises:
        ValueError: there are not as many targets as hidden states.
    """
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"{list(targets.shape)} targets for {list(hidden.shape)} hidden states")
    logps: Tensor = _TokenLogps.apply(hidden, head.weight, head.bias, targets, _plan(hidden, head))
    return logps


def token_kl(hidden: Tensor, head: Head, reference_hidden: Tensor, reference_head: Head) -> Tensor:
    """Return KL(reference || policy) of the next word (4), [N], with gradients to the policy only.

    Args:
        hidden: [N, H] of the policy.
        head: of the policy.
        reference_hidden: [N, H'] of the reference, at the same positions of the same texts.
        reference_head: over the same vocabulary.

    Raises:
        ValueError: the two differ in their number of tokens or words.
    """
    seen = (len(hidden), len(head.weight)), (len(reference_hidden), len(reference_head.weight))
    if seen[0] != seen[1]:
        raise ValueError(f"policy and reference have {seen[0]} and {seen[1]} tokens and words")
    divergence: Tensor = _TokenKL.apply(
        hidden,
        head.weight,
        head.bias,
        _plan(hidden, head),
        reference_hidden.detach(),
        reference_head,
    )
    return divergence


def sum_logps(logps: Tensor, owners: Tensor, n: int) -> Tensor:
    """Return for each of n completions the sum of the log-probabilities [N] it owns, [n]."""
    return logps.new_zeros(n).index_add(0, owners, logps)


def head_of(model: Any) -> Head:
    """Return the head of a causal language model of transformers, as it is now.

    PEFT may be around it: LoRA on the head counts while it is active, with its graph and without
    its dropout; a copy of the head that is trained and saved whole takes the head's place.

    What a family does to its logits is read from its config: scales (cohere, falcon_h1, granite,
    hyperclovax, minicpm3) and soft caps (gemma 2 to 4, nanochat, recurrent_gemma, xlstm). Not
    covered: heads of several layers (bert), of several vocabularies (musicgen), that cut words off
    (inkling). `layouts.choose_layout` compares with the model's own logits.

    Raises:
        ValueError: the head, or an adapter on it, cannot be written as one matrix.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    module = model.get_output_embeddings()
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"the head of {type(model).__name__} is no plain matrix: {module}")
    for addition in _adapters_on(module):
        weight = weight + addition.to(weight.dtype)
    return Head(weight, getattr(module, "bias", None), *_shape_of_logits(model.config))


def _adapters_on(module: Any) -> list[Tensor]:
    """Return what PEFT adds to the weight of a layer, [V, H] each."""
    if hasattr(module, "token_adapter"):
        raise ValueError("an adapter trains single rows of the head, which is not supported")
    if not hasattr(module, "lora_A") or module.disable_adapters or module.merged:
        return []
    active = [name for name in module.active_adapters if name in module.lora_A]
    if any(name in module.lora_variant or module.lora_bias[name] for name in active):
        raise ValueError("the adapter on the head is no plain LoRA, which is not supported")
    return [module.get_delta_weight(name) for name in active]


def _shape_of_logits(config: Any) -> tuple[float, float | None]:
    """Return scale and softcap; the same name means different things in different families."""
    text = config.get_text_config()
    found = {
        name: float(getattr(text, name, None) or 1)
        for name in ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
        if text.model_type != "mpt"  # has a logit_scale and does not use it
    }
    divisor = found.pop("logits_scaling", 1.0)
    scale = math.prod(found.values())
    scale = scale * divisor if text.model_type == "hyperclovax" else scale / divisor
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return scale, next(filter(None, (getattr(text, name, None) for name in names)), None)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is known before the first product: the shape of logits, and how to compute them."""

    scale: float
    softcap: float | None
    dtype: torch.dtype
    is_fused: bool
    has_gradients: bool

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        return Head(weight, bias, self.scale, self.softcap)


def _plan(hidden: Tensor, head: Head) -> _Plan:
    kind = hidden.device.type
    is_autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if is_autocast else head.weight.dtype
    can_attend = kind == "cpu" and dtype in HALF and head.softcap is None
    # The kernel ends the whole process (SIGFPE) when it gets no queries.
    is_fused = can_attend and hidden.shape[1] <= FUSED_WIDTH and len(hidden) > 0
    # Inside a Function gradients are always off, so it cannot tell what its caller wants.
    return _Plan(head.scale, head.softcap, dtype, is_fused, torch.is_grad_enabled())


class _TokenLogps(torch.autograd.Function):
    """(1), with the gradients (2) and (3)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, plan: _Plan
    ) -> Tensor:
        needs_hidden, *needs_head = (plan.has_gradients and n for n in ctx.needs_input_grad[:3])
        keep_bytes = KEEP_BYTES if any(needs_head) else 0
        with torch.autocast(hidden.device.type, enabled=False):
            head, work = plan.head(weight, bias), hidden.to(plan.dtype).contiguous()
            kept: list[Tensor] = []
            if plan.is_fused:
                words = _attend_to_words(work, head)
            else:
                words, kept = _see_words(work, head, needs_hidden, keep_bytes)
            rows = weight[targets].to(plan.dtype).to(words.lse.dtype)
            own = replace(head, bias=None if bias is None else bias[targets])
            raw = torch.linalg.vecdot(work.to(rows.dtype), rows)
            z, slopes = _logits_(raw.clone(), own)
            lse = words.lse
            if plan.dtype in HALF and not plan.is_fused:
                lse = _unrounded(lse, z, _logits_(raw.to(plan.dtype).to(raw.dtype), own)[0])
            pull = None
            if needs_hidden:  # (2)
                rows = rows if slopes is None else rows * slopes[:, None]
                pull = plan.scale * (rows - words.means[0])
        ctx.save_for_backward(hidden, weight, bias, targets, pull, slopes, words.lse, *kept)
        ctx.plan = plan
        return z - lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, pull, slopes, lse, *kept = ctx.saved_tensors
        by_hidden = None if pull is None else (grad[:, None] * pull).to(hidden.dtype)
        if not any(ctx.needs_input_grad[1:3]):
            return by_hidden, None, None, None, None
        with torch.autocast(hidden.device.type, enabled=False):
            head, work = ctx.plan.head(weight, bias), hidden.to(ctx.plan.dtype).contiguous()
            push = head.scale * grad
            pushes = ((part, [(tile, -push, lse)]) for part, tile in _tiles_again(work, head, kept))
            by_weight, by_bias = _head_gradients(head, work, pushes)
            push = push if slopes is None else push * slopes
            _add_rows_(by_weight, targets, push[:, None] * work)
            if by_bias is not None:
                _add_rows_(by_bias, targets, push)
        return by_hidden, by_weight, by_bias, None, None


class _TokenKL(torch.autograd.Function):
    """(4), with the gradient (5) and that of the head; p is the policy, q the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: _Plan,
        q_hidden: Tensor,
        q_head: Head,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            head, work = plan.head(weight, bias), hidden.to(plan.dtype).contiguous()
            p = _Softmax(work, [work.shape[1]])
            q = _Softmax(work, [work.shape[1], 1])
            for part, p_tile, q_tile, gap in _tile_pairs(work, head, q_hidden, q_head):
                p.see(p_tile.lse(), [p_tile.mean(part.weight)])
                q.see(q_tile.lse(), [q_tile.mean(part.weight), gap[:, None]])
        pull = plan.scale * (p.means[0] - q.means[0])
        ctx.save_for_backward(hidden, weight, bias, pull, p.lse, q.lse, q_hidden)
        ctx.plan, ctx.q_head = plan, q_head
        return q.means[1][:, 0] - q.lse + p.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, pull, p_lse, q_lse, q_hidden = ctx.saved_tensors
        by_hidden = (grad[:, None] * pull).to(hidden.dtype)
        by_weight = by_bias = None
        if any(ctx.needs_input_grad[1:3]):
            with torch.autocast(hidden.device.type, enabled=False):
                head, work = ctx.plan.head(weight, bias), hidden.to(ctx.plan.dtype).contiguous()
                push = head.scale * grad
                pushes = (
                    (part, [(p_tile, push, p_lse), (q_tile, -push, q_lse)])
                    for part, p_tile, q_tile, _ in _tile_pairs(work, head, q_hidden, ctx.q_head)
                )
                by_weight, by_bias = _head_gradients(head, work, pushes)
        return by_hidden, by_weight, by_bias, None, None, None


class _Softmax:
    """A softmax over all words, which come tile by tile: its `lse` [N], and averages under it."""

    def __init__(self, work: Tensor, widths: list[int]) -> None:
        wide = _wide(work.dtype)
        self.lse = work.new_full((len(work),), -torch.inf, dtype=wide)
        self.means = [work.new_zeros(len(work), width, dtype=wide) for width in widths]

    def see(self, lse: Tensor, means: list[Tensor]) -> None:
        """Take in a tile: its lse [N], and averages [N, width] under a softmax over it alone."""
        share = (lse - self.lse).sigmoid_()[:, None]
        for mean, tile_mean in zip(self.means, means, strict=True):
            mean.lerp_(tile_mean, share)
        self.lse = torch.logaddexp(self.lse, lse)


@dataclass(frozen=True, slots=True)
class _Tile:
    """What N tokens make of T words with logits z.

    `values` [N, T] are c exp(z - shift) in the dtype of products, with c as in (2); `shift` [N] is
    the largest logit; `total` [N] is the sum of exp(z - shift).
    """

    values: Tensor
    shift: Tensor
    total: Tensor

    def lse(self) -> Tensor:
        """Return log sum_v exp z_v over the tile, [N]."""
        return self.shift + self.total.log()

    def mean(self, weight: Tensor) -> Tensor:
        """Return sum_v p_v c_v W_v, [N, H], with p summing to one over the tile."""
        return (self.values @ weight).to(self.total.dtype).div_(self.total[:, None])

    def push(self, factor: Tensor, lse: Tensor, work: Tensor) -> Tensor:
        """Return sum_n factor_n p_nv c_nv work_n, [T, H], with p normalised by `lse` [N]."""
        weighted = (factor * (self.shift - lse).exp())[:, None] * work
        return self.values.t() @ weighted.to(self.values.dtype)


@dataclass(frozen=True, slots=True)
class _Part:
    """A tile's words: which they are, and what of the head is theirs, in the dtypes of use."""

    words: slice
    weight: Tensor
    bias: Tensor | None


def _parts(head: Head, dtype: torch.dtype) -> Iterator[_Part]:
    for start in range(0, len(head.weight), TILE):
        words = slice(start, start + TILE)
        bias = None if head.bias is None else head.bias[words].to(_wide(dtype))
        yield _Part(words, head.weight[words].to(dtype).contiguous(), bias)


def _see_words(
    work: Tensor, head: Head, wants_mean: bool, keep_bytes: int
) -> tuple[_Softmax, list[Tensor]]:
    """Return the softmax over all words, and as many of its tiles as may be kept."""
    softmax = _Softmax(work, [work.shape[1]] if wants_mean else [])
    kept: list[Tensor] = []
    n_kept = keep_bytes // max(1, len(work) * TILE * work.element_size())
    scratch = _scratch(work, head)
    for i, part in enumerate(_parts(head, work.dtype)):
        tile = _tile(work, part, head, None if i < n_kept else scratch)
        if i < n_kept:
            kept += [tile.values, tile.shift, tile.total]
        softmax.see(tile.lse(), [tile.mean(part.weight)] if wants_mean else [])
    return softmax, kept


def _attend_to_words(work: Tensor, head: Head) -> _Softmax:
    """Return the softmax over all words, by attention.

    The hidden states are its queries, and the weight is both its keys and its values. On a CPU
    this kernel sees logits in fp32, while a product of bf16 matrices rounds them; and it is the
    fastest way as well, up to `FUSED_WIDTH`. It takes contiguous rows for granted: given others,
    it reads other numbers without a word.
    """
    softmax = _Softmax(work, [work.shape[1]])
    for part in _parts(head, work.dtype):
        keys = part.weight[None, None]
        mask = None if part.bias is None else (head.scale * part.bias)[None, None, None]
        mean, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            work[None, None], keys, keys, attn_mask=mask, scale=head.scale
        )
        softmax.see(lse[0, 0], [mean[0, 0].to(lse.dtype)])
    return softmax


def _tiles_again(work: Tensor, head: Head, kept: list[Tensor]) -> Iterator[tuple[_Part, _Tile]]:
    scratch = _scratch(work, head)
    for i, part in enumerate(_parts(head, work.dtype)):
        old = kept[3 * i : 3 * i + 3]
        yield part, _Tile(*old) if old else _tile(work, part, head, scratch)


def _head_gradients(
    head: Head, work: Tensor, pushes: Iterable[tuple[_Part, list[tuple[_Tile, Tensor, Tensor]]]]
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of weight and bias: in every part, the sum of what its tiles push."""
    by_weight = torch.empty_like(head.weight)
    by_bias = None if head.bias is None else torch.empty_like(head.bias)
    ones = torch.ones_like(work[:, :1])
    for part, tiles in pushes:
        by_weight[part.words] = reduce(torch.add, (t.push(f, lse, work) for t, f, lse in tiles))
        if by_bias is not None:
            total = reduce(torch.add, (t.push(f, lse, ones) for t, f, lse in tiles))
            by_bias[part.words] = total[:, 0]
    return by_weight, by_bias


def _add_rows_(out: Tensor, targets: Tensor, rows: Tensor) -> None:
    """Add rows[n] to out[targets[n]]; summed up in fp32, as in bf16 long sums stop growing."""
    words, where = targets.unique(return_inverse=True)
    sums = rows.new_zeros(len(words), *rows.shape[1:]).index_add_(0, where, rows)
    out.index_add_(0, words, sums.to(out.dtype))


def _tile(work: Tensor, part: _Part, head: Head, scratch: Tensor | None) -> _Tile:
    values = _product(work, part.weight, scratch)
    shift, total = work.new_empty(2, len(work), dtype=_wide(work.dtype))
    for rows in _blocks(values):
        x, slopes = _logits_(values[rows].to(total.dtype), replace(head, bias=part.bias))
        _exponentiate_(x, shift[rows], total[rows])
        _write(x, slopes, values[rows])
    return _Tile(values, shift, total)


def _tile_pairs(
    work: Tensor, head: Head, q_hidden: Tensor, q_head: Head
) -> Iterator[tuple[_Part, _Tile, _Tile, Tensor]]:
    """Yield the tiles of policy and reference, and the average of z_q - z_p under q's softmax.

    The reference's tiles carry the policy's c, as (5) wants it.
    """
    q_work = q_hidden.to(work.dtype).contiguous()
    wide = _wide(work.dtype)
    scratch, q_scratch = _scratch(work, head), _scratch(work, head)
    parts = zip(_parts(head, work.dtype), _parts(q_head, work.dtype), strict=True)
    for part, q_part in parts:
        values = _product(work, part.weight, scratch)
        q_values = _product(q_work, q_part.weight, q_scratch)
        shift, total, q_shift, q_total, gap = work.new_empty(5, len(work), dtype=wide)
        for rows in _blocks(values):
            x, slopes = _logits_(values[rows].to(wide), replace(head, bias=part.bias))
            y, _ = _logits_(q_values[rows].to(wide), replace(q_head, bias=q_part.bias))
            apart = y - x
            _exponentiate_(x, shift[rows], total[rows])
            _exponentiate_(y, q_shift[rows], q_total[rows])
            gap[rows] = torch.linalg.vecdot(apart, y) / q_total[rows]
            _write(x, slopes, values[rows])
            _write(y, slopes, q_values[rows])
        yield part, _Tile(values, shift, total), _Tile(q_values, q_shift, q_total), gap


def _scratch(work: Tensor, head: Head) -> Tensor:
    """Return room for a tile: allocating one of many megabytes anew costs more than filling it."""
    return work.new_empty(len(work) * min(TILE, len(head.weight)))


def _product(work: Tensor, weight: Tensor, scratch: Tensor | None) -> Tensor:
    shape = len(work), len(weight)
    out = work.new_empty(shape) if scratch is None else scratch[: math.prod(shape)].view(shape)
    return torch.mm(work, weight.t(), out=out)


def _blocks(values: Tensor) -> Iterator[slice]:
    """Yield the rows to exponentiate together: all, except that a CPU is faster in its cache."""
    n_rows, width = values.shape
    step = max(1, BLOCK // width) if values.device.type == "cpu" else max(1, n_rows)
    return (slice(start, start + step) for start in range(0, n_rows, step))


def _logits_(raw: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """Return the logits of the products `raw`, in their place, and c of (2) unless it is 1."""
    if head.bias is not None:
        raw.add_(head.bias)
    if head.scale != 1:
        raw.mul_(head.scale)
    if head.softcap is None:
        return raw, None
    ratio = raw.div_(head.softcap).tanh_()
    slopes = 1 - ratio * ratio
    return ratio.mul_(head.softcap), slopes


def _exponentiate_(z: Tensor, shift: Tensor, total: Tensor) -> None:
    """Put exp(z - shift) in place of z, and write its largest value before and its sum after."""
    torch.amax(z, -1, out=shift)
    torch.sum(z.sub_(shift[:, None]).exp_(), -1, out=total)


def _write(x: Tensor, slopes: Tensor | None, out: Tensor) -> None:
    if slopes is not None:
        x.mul_(slopes)
    if x.dtype != out.dtype:
        out.copy_(x)


def _unrounded(lse: Tensor, z: Tensor, rounded: Tensor) -> Tensor:
    """Return `lse` with the target's logit z [N] in it instead of the `rounded` one in the tile.

    z itself is known in fp32. With only one of the two rounded, a certain token would be as far
    from log p = 0 as rounding goes (0.06 at z = 20), or above it.
    """
    return lse + torch.log1p((rounded - lse).exp() * torch.expm1(z - rounded))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and exponentials."""
    return torch.promote_types(dtype, torch.float32)
