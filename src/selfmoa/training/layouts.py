"""Ways to run rows that share a prompt through a model, and which of them is exact for it.

    mask    prompt and completions in one packed row; a 4D mask keeps completions apart
    masks   the same with one mask for every kind of layer (some see only a sliding window)
    prefix  the prompt alone, then the completions on its key-value cache, gradients flowing through
    rows    every completion after a prompt of its own: nothing is shared

The fastest comes first: forward and backward of 256 + 2 x 64 tokens on one core take 1 by masks,
1.1 (fp32) to 1.2 (bf16) by prefix and 1.7 by rows; with four completions 1.0 to 1.3 and 2.5. Not
every family that cannot follow a mask fails: some are silently wrong. So `choose_layout` compares
a few rows with separate ones before anything is trained.

Only the model's body runs here. The vocabulary head is `logprobs`' business.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from selfmoa.training.logprobs import head_of, token_logps
from selfmoa.training.memory import is_out_of_memory
from selfmoa.training.packing import Batch, pack, pad, shared_mask, split

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from torch import Tensor

    from selfmoa.training.tokens import Row

LAYOUTS = ("mask", "masks", "prefix", "rows")
"""Names of the layouts, the fastest first."""
FULL, SLIDING = "full_attention", "sliding_attention"
TOLERANCE = 1e-4
ROUNDINGS = 2.0
"""Over nine families in bf16, of 2 to 24 layers, exact layouts are 0 to 0.8 roundings off and wrong
ones 3.7 or more (root mean squares; largest differences do not separate them as well)."""
N_PROBES, N_PROBED_COMPLETIONS = 4, 3
FAILURES = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What families raise on a mask or a cache that they do not know."""


def hidden_states(
    model: Any, rows: Sequence[Row], layout: str, pad_id: int, *, prompt_weight: float = 0.0
) -> tuple[Tensor, Batch]:
    """Return the last hidden states that predict the trained tokens, and what those tokens are.

    Args:
        model: a transformers causal language model, with or without PEFT around it.
        rows: at least one.
        layout: one of `LAYOUTS`; where no row has a second completion, all are "rows".
        pad_id: token id that fills short rows.
        prompt_weight: above 0 the prompts' tokens are trained tokens too (`pack`).

    Returns:
        [N, H] with gradients; and the packed batch with the N targets, owners and weights, which
        are the same in every layout.

    Raises:
        ValueError: this model cannot run in this layout, or there is none of this name.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"there is no layout '{layout}', only {', '.join(LAYOUTS)}")
    body = _body_of(model)
    device = body.get_input_embeddings().weight.device
    batch = pack(rows, pad_id, device, prompt_weight=prompt_weight)
    if layout == "rows" or batch.n_completions == len(rows):
        return _rows(body, rows, batch, pad_id), batch
    if layout == "prefix":
        return _prefix(body, rows, batch, pad_id), batch
    return _packed(body, batch, layout), batch


def _body_of(model: Any) -> Any:
    """Return the transformer without its head; adapters inside it stay as they are."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    if whole.base_model is whole:
        raise ValueError(f"{type(whole).__name__} does not say which part of it is its body")
    return whole.base_model


def _rows(body: Any, rows: Sequence[Row], batch: Batch, pad_id: int) -> Tensor:
    # The mask hides nothing: padding is on the right, where no token looks, and without a padded
    # mask attention takes its fast causal path. None at all would make some families warn.
    sequences = [[*row.prompt, *row.completions[0]] for row in split(rows)]
    ids = pad(sequences, pad_id, batch.ids.device)
    out = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    where = batch.owners * ids.shape[1] + batch.positions.flatten()[batch.sources]
    return out.last_hidden_state.flatten(0, 1).index_select(0, where)


def _packed(body: Any, batch: Batch, layout: str) -> Tensor:
    if not _takes_positions(body):
        raise ValueError("the model takes no positions")
    windows = _windows(body.config)
    if (layout == "masks") != (len(windows) > 1):
        raise ValueError(f"the model needs {len(windows)} mask(s): {', '.join(windows)}")
    dtype = _attention_dtype(body)
    masks = {kind: shared_mask(batch, dtype, window) for kind, window in windows.items()}
    out = body(
        input_ids=batch.ids,
        attention_mask=masks if layout == "masks" else next(iter(masks.values())),
        position_ids=batch.positions,
        use_cache=False,
    )
    return out.last_hidden_state.flatten(0, 1).index_select(0, batch.sources)


def _windows(config: Any) -> dict[str, int | None]:
    """Return the window of every kind of layer; None where a layer sees everything before it."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [SLIDING if window else FULL])
    if unknown := sorted(kinds - {FULL, SLIDING}):
        raise ValueError(f"the model has layers of the kind {' and '.join(unknown)}")
    return {kind: window if kind == SLIDING else None for kind in sorted(kinds)}


def _attention_dtype(body: Any) -> torch.dtype:
    weight = body.get_input_embeddings().weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _takes_positions(body: Any) -> bool:
    return "position_ids" in inspect.signature(body.forward).parameters


def _prefix(body: Any, rows: Sequence[Row], batch: Batch, pad_id: int) -> Tensor:
    # Prompts are padded on the left and completions on the right, so the two touch: distances
    # counted by place (sliding windows, ALiBi) are those of a row without padding.
    device = batch.ids.device
    prompts = pad([row.prompt for row in rows], pad_id, device, left=True)
    completions = pad([c for row in rows for c in row.completions], pad_id, device)
    row_of = torch.tensor([b for b, row in enumerate(rows) for _ in row.completions], device=device)
    lengths = torch.tensor([len(row.prompt) for row in rows], device=device)
    n_left = prompts.shape[1] - lengths
    places = torch.arange(prompts.shape[1], device=device) - n_left[:, None]
    mask = more = None
    if len({len(row.prompt) for row in rows}) > 1:
        mask = (places >= 0).long()
        more = torch.cat([mask[row_of], torch.ones_like(completions)], dim=1)
    first = _cached(body, prompts, mask, places.clamp(min=0))
    cache = _repeated(getattr(first, "past_key_values", None), prompts.shape[1], row_of)
    places = lengths[row_of, None] + torch.arange(completions.shape[1], device=device)
    second = _cached(body, completions, more, places, cache)
    row = batch.sources // batch.ids.shape[1]
    position = batch.positions.flatten()[batch.sources]
    past = position - lengths[row]
    where = torch.where(
        past < 0,
        row * prompts.shape[1] + n_left[row] + position,
        prompts.numel() + batch.owners * completions.shape[1] + past,
    )
    both = [out.last_hidden_state.flatten(0, 1) for out in (first, second)]
    return torch.cat(both).index_select(0, where)


def _cached(body: Any, ids: Tensor, mask: Tensor | None, places: Tensor, cache: Any = None) -> Any:
    more = {"position_ids": places} if _takes_positions(body) else {}
    return body(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)


def _repeated(cache: Any, length: int, row_of: Tensor) -> Any:
    """Return the prompts' cache with the keys and values of row_of[i] for the i-th completion."""
    if cache is None or cache.get_seq_length() != length:
        raise ValueError("the model kept no keys and values (gradient checkpointing drops them)")
    for layer in cache.layers:
        # A recurrent state is overwritten in place, or cannot go on for several tokens.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError("the model caches more than keys and values")
        layer.keys = layer.keys.index_select(0, row_of)
        layer.values = layer.values.index_select(0, row_of)
    return cache


@dataclass(frozen=True, slots=True)
class Choice:
    """The first layout that is exact, why, and how far each layout that ran is off.

    A difference is the root mean square, over tokens, of how far a log-probability is from the
    same token's in a row of its own (nats).
    """

    layout: str
    reason: str
    differences: dict[str, float]


@torch.no_grad()
def choose_layout(
    model: Any,
    rows: Sequence[Row],
    pad_id: int,
    *,
    allowed: Collection[str] = LAYOUTS,
    tolerance: float | None = None,
) -> Choice:
    """Return the fastest layout whose log-probabilities are those of separate rows.

    Up to four rows are tried, the longest among them, so that no sliding window goes unnoticed
    that any row would reach. Separate rows are every completion alone with its prompt, without
    padding; the shortest is also compared with the logits of the whole model, which knows best
    what its head does.

    Args:
        model: as it will be trained. While this runs it is in evaluation mode, and out of autocast
            if all its parameters are fp32, as what is exact does not depend on the precision.
        rows: those that will be trained on. Only rows with several completions tell layouts apart.
        pad_id: token id that fills short rows.
        allowed: layouts to choose from.
        tolerance: the largest difference that counts as exact. None: 1e-4, or twice what a
            rounding error in every embedding does to the separate rows, if that is more.

    Raises:
        ValueError: body and head do not give the model's own log-probabilities, or no layout that
            is allowed gives those of separate rows.
    """
    probes = _probes(rows)
    with _plainly(model):
        truth = torch.cat([_logps(model, [row], "rows", pad_id) for row in split(probes)])
        limit = _limit(model, probes, pad_id, truth) if tolerance is None else tolerance
        _check_head(model, probes[0], pad_id, limit)
        differences: dict[str, float] = {}
        failures = []
        for layout in (name for name in LAYOUTS if name in allowed):
            try:
                difference = _distance(_logps(model, probes, layout, pad_id), truth)
            except FAILURES as error:
                if is_out_of_memory(error):
                    raise
                failures.append(f"'{layout}' fails ({_first_line(error)})")
                continue
            differences[layout] = difference
            if difference <= limit:
                exact = f"exact to {difference:.1e} nats a token, {limit:.1e} allowed"
                return Choice(layout, "; ".join([exact, *failures]), differences)
            failures.append(f"'{layout}' is off by {difference:.1e}")
    raise ValueError(
        f"no layout gives the log-probabilities of separate rows: {'; '.join(failures)}"
    )


def _probes(rows: Sequence[Row]) -> list[Row]:
    """Return rows from the shortest to the longest, with their longest completions."""
    shared = [row for row in rows if len(row.completions) > 1] or list(rows)
    if not shared:
        raise ValueError("there are no rows to try layouts on")
    cut = [
        replace(row, completions=sorted(row.completions, key=len)[-N_PROBED_COMPLETIONS:])
        for row in shared
    ]
    cut.sort(key=lambda row: len(row.prompt) + len(row.completions[-1]))
    places = {round(i * (len(cut) - 1) / (N_PROBES - 1)) for i in range(N_PROBES)}
    return [cut[i] for i in sorted(places)]


@contextmanager
def _plainly(model: Any) -> Iterator[None]:
    """Be in evaluation mode, and in fp32 where that needs no other weights."""
    was_training, device = model.training, next(model.parameters()).device.type
    is_fp32 = all(p.dtype == torch.float32 for p in model.parameters())
    model.eval()
    try:
        with torch.autocast(device, enabled=False) if is_fp32 else nullcontext():
            yield
    finally:
        model.train(was_training)


def _logps(model: Any, rows: Sequence[Row], layout: str, pad_id: int) -> Tensor:
    hidden, batch = hidden_states(model, rows, layout, pad_id)
    return token_logps(hidden, batch.targets, head_of(model))


def _distance(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).square().mean().sqrt())


def _limit(model: Any, probes: Sequence[Row], pad_id: int, truth: Tensor) -> float:
    """Return `TOLERANCE`, or what `ROUNDINGS` rounding errors in every embedding do if more."""
    epsilon = max(
        # Quantised weights are integers, and what is computed with them is bf16.
        torch.finfo(p.dtype if p.is_floating_point() else torch.bfloat16).eps
        for p in model.parameters()
    )
    generator = torch.Generator().manual_seed(0)

    def round_off(_module: Any, _args: Any, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device) * 2 - 1
        return (output.float() * (1 + epsilon * signs)).to(output.dtype)

    hook = _body_of(model).get_input_embeddings().register_forward_hook(round_off)
    try:
        shaken = torch.cat([_logps(model, [row], "rows", pad_id) for row in split(probes)])
    finally:
        hook.remove()
    return max(TOLERANCE, ROUNDINGS * _distance(shaken, truth))


def _check_head(model: Any, row: Row, pad_id: int, limit: float) -> None:
    """Stop if body and head do not give the whole model's log-probabilities."""
    row = split([row])[0]
    batch = pack([row], pad_id, next(model.parameters()).device)
    out = model(input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids))
    logits = out.logits[0].index_select(0, batch.sources).float()
    truth = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    difference = _distance(_logps(model, [row], "rows", pad_id), truth)
    if not difference <= limit:
        raise ValueError(
            f"{type(model).__name__} does something to its logits that is not known here: its body "
            f"and its head alone are off by {difference:.1e} nats a token, {limit:.1e} allowed"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]
