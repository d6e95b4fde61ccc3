"""Rows that share a prompt as one batch: where each token went, and what is trained on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfmoa.training.packing import pack, pad, shared_mask, split
from selfmoa.training.tokens import Row

PAD = 0
TOKENS = st.lists(st.integers(1, 99), min_size=1, max_size=6)
ROWS = st.lists(
    st.builds(
        Row,
        prompt=TOKENS,
        completions=st.lists(TOKENS, min_size=1, max_size=4),
        weight=st.floats(0.125, 4, width=32),
    ),
    min_size=1,
    max_size=4,
)
EXAMPLE = Row((1, 2, 3), [[4, 5], [6]])


def completions_of(rows):
    """Return (row, completion) in the order in which owners are counted."""
    return [(row, c) for row in rows for c in row.completions]


def test_the_example_of_the_docstring_is_true():
    batch = pack([EXAMPLE], PAD)
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch.sources.tolist() == [2, 3, 2]
    assert batch.targets.tolist() == [4, 5, 6]
    assert batch.owners.tolist() == [0, 0, 1]
    assert batch.weights.tolist() == [1, 1, 1]
    assert batch.n_completions == 2


def test_short_rows_are_padded_on_the_right():
    batch = pack([EXAMPLE, Row([7], [[8]], weight=0.5)], 99)
    assert batch.ids.tolist()[1] == [7, 8, 99, 99, 99, 99]
    assert batch.segments.tolist()[1] == [0, 1, -1, -1, -1, -1]
    assert batch.positions.tolist()[1] == [0, 1, 0, 0, 0, 0]
    assert batch.sources.tolist() == [2, 3, 2, 6]
    assert batch.owners.tolist() == [0, 0, 1, 2]
    assert batch.weights.tolist() == [1, 1, 1, 0.5]


def test_prompt_tokens_are_trained_on_once_and_belong_to_the_first_completion():
    batch = pack([Row([7], [[8]]), Row([1, 2, 3], [[4, 5], [6]], 2.0)], PAD, prompt_weight=0.25)
    assert batch.targets.tolist() == [8, 2, 3, 4, 5, 6]
    assert batch.sources.tolist() == [0, 6, 7, 8, 9, 8]
    assert batch.owners.tolist() == [0, 1, 1, 1, 1, 2]
    assert batch.weights.tolist() == [1, 0.5, 0.5, 2, 2, 2]


@given(rows=ROWS, prompt_weight=st.sampled_from([0.0, 0.5]))
def test_every_trained_token_is_predicted_from_all_that_precedes_it_and_nothing_else(
    rows, prompt_weight
):
    batch = pack(rows, PAD, prompt_weight=prompt_weight)
    visible = shared_mask(batch, torch.float32)[:, 0] == 0
    length = batch.ids.shape[1]
    seen = []
    for source, owner in zip(batch.sources.tolist(), batch.owners.tolist(), strict=True):
        b, i = divmod(source, length)
        context = batch.ids[b][visible[b, i]].tolist()
        assert batch.positions[b][visible[b, i]].tolist() == list(range(len(context)))
        seen.append((owner, context))
    wanted = []
    for owner, (row, completion) in enumerate(completions_of(rows)):
        whole = [*row.prompt, *completion]
        trained_from = len(row.prompt)
        if prompt_weight and completion is row.completions[0]:
            trained_from = 1
        wanted += [(owner, whole[:i], whole[i]) for i in range(trained_from, len(whole))]
    assert [(o, c, t) for (o, c), t in zip(seen, batch.targets.tolist(), strict=True)] == wanted


@given(rows=ROWS, window=st.integers(1, 8))
def test_a_window_counts_positions_and_never_reaches_past_itself(rows, window):
    batch = pack(rows, PAD)
    everything = shared_mask(batch, torch.float32)[:, 0] == 0
    narrow = shared_mask(batch, torch.float32, window)[:, 0] == 0
    distance = batch.positions[:, :, None] - batch.positions[:, None, :]
    is_token = batch.segments >= 0
    assert torch.equal(narrow[is_token], (everything & (distance < window))[is_token])
    assert narrow.diagonal(dim1=1, dim2=2).all()  # also at padding: no softmax is over nothing


@given(rows=ROWS)
def test_no_token_sees_padding_or_another_completion(rows):
    batch = pack(rows, PAD)
    visible = shared_mask(batch, torch.float32)[:, 0] == 0
    for b, i in (batch.segments >= 0).nonzero().tolist():
        mine = batch.segments[b, i]
        theirs = batch.segments[b][visible[b, i]]
        assert ((theirs == 0) | (theirs == mine)).all()


def test_a_mask_is_additive_in_the_asked_type():
    mask = shared_mask(pack([EXAMPLE], PAD), torch.bfloat16)
    assert mask.shape == (1, 1, 6, 6)
    assert mask.dtype == torch.bfloat16
    assert set(mask.unique().tolist()) == {0, torch.finfo(torch.bfloat16).min}


@given(rows=ROWS)
def test_weights_are_those_of_the_rows(rows):
    batch = pack(rows, PAD)
    wanted = [row.weight for row, c in completions_of(rows) for _ in c]
    assert batch.weights.tolist() == wanted
    assert batch.n_completions == len(completions_of(rows))


@given(rows=ROWS)
def test_splitting_keeps_prompts_weights_and_the_order_of_completions(rows):
    parts = split(rows)
    wanted = [(row.prompt, [c], row.weight) for row, c in completions_of(rows)]
    assert [(p.prompt, p.completions, p.weight) for p in parts] == wanted


@pytest.mark.parametrize(
    "row", [Row([], [[1]]), Row([1], [[]]), Row([1], [[2], []]), Row([1], [])], ids=str
)
def test_a_row_without_a_prompt_or_a_completion_is_refused(row):
    with pytest.raises(ValueError, match="row 1 has an empty prompt, an empty completion or none"):
        pack([EXAMPLE, row], PAD)


def test_padding_goes_to_the_side_that_was_asked_for():
    assert pad([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad([[1, 2, 3], (4,)], 9, left=True).tolist() == [[1, 2, 3], [9, 9, 4]]


def test_all_tensors_go_to_the_device():
    batch = pack([EXAMPLE], PAD, "meta")
    tensors = [batch.ids, batch.positions, batch.segments, batch.sources, batch.targets]
    assert {t.device.type for t in [*tensors, batch.owners, batch.weights]} == {"meta"}
