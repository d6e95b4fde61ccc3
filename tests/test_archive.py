"""The attack archive: what is kept, how it stands, whose turn it is, and that rows go round."""

from __future__ import annotations

import json
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfmoa.attacks.archive import Archive, Entry, Try
from selfmoa.records import Prompt

NOW, BEFORE = "policy 2", "policy 1"


def prompt(name, category="make dust", style="plain"):
    return Prompt.make(
        [{"role": "user", "content": name}],
        goal=name,
        intent="harmful",
        category=category,
        style=style,
        source="test",
    )


def entry(name, *tries, category="make dust", style="plain"):
    """An entry with tries like (policy, unsafe, of)."""
    history = tuple(Try(policy, 1, of, unsafe, 10) for policy, unsafe, of in tries)
    return Entry(prompt(name, category, style), history)


def once(name, p_unsafe, category="make dust", style="plain"):
    return entry(name, (NOW, p_unsafe, 1), category=category, style=style)


def names(prompts):
    return [p.goal for p in prompts]


def kept(archive):
    return {e.prompt.goal for e in archive.entries()}


# Entries


def test_quality_is_the_posterior_mean_on_the_policy_under_attack():
    e = entry("a", (BEFORE, 4, 4), (NOW, 1.5, 4))
    assert e.on(NOW) == (1.5, 4)
    assert e.quality(NOW) == pytest.approx((1 + 1.5) / (1 + 3 + 4))
    assert e.quality(BEFORE) == pytest.approx(5 / 8)
    assert e.tokens() == 20


def test_tries_on_one_policy_add_up():
    e = entry("a", (NOW, 1, 4), (BEFORE, 0, 4), (NOW, 3, 4))
    assert e.on(NOW) == (4, 8)


def test_where_it_was_not_tried_the_last_policy_stands_in_and_then_the_prior():
    e = entry("a", ("older", 0, 8), (BEFORE, 4, 4))
    assert e.quality(NOW) == e.quality(BEFORE) == pytest.approx(5 / 8)
    assert entry("b").quality(NOW) == pytest.approx(1 / 4)


@pytest.mark.parametrize(("n", "n_unsafe"), [(0, 0), (2, 2.1), (2, -0.1)])
def test_a_try_that_cannot_be_is_refused(n, n_unsafe):
    with pytest.raises(ValueError, match="cannot have been unsafe"):
        Try(NOW, 1, n, n_unsafe)


def test_entries_are_working_closed_or_stale_on_the_policy_under_attack():
    archive = Archive(9, NOW, works_above=0.3)
    found = {
        "works": entry("works", (NOW, 0.31, 4)),
        "closed": entry("closed", (BEFORE, 4, 4), (NOW, 0.3, 4)),
        "stale": entry("stale", (BEFORE, 4, 4)),
        "new": entry("new"),
    }
    for each in found.values():
        archive.put(each)
    assert {k: archive.state(e) for k, e in found.items()} == {
        "works": "working",
        "closed": "closed",
        "stale": "stale",
        "new": "stale",
    }
    assert [e.prompt.goal for e in archive.entries("closed")] == ["closed"]
    assert archive.filled("working") == {("make dust", "plain")}


# Cells


def test_a_cell_keeps_its_best_and_says_whether_it_kept_what_was_offered():
    archive = Archive(2, NOW)
    assert archive.put(once("a", 0.6))
    assert archive.put(once("b", 0.8))
    assert not archive.put(once("c", 0.5))
    assert kept(archive) == {"a", "b"}
    assert archive.put(once("d", 0.7))
    assert kept(archive) == {"b", "d"}


def test_what_works_stays_longer_than_what_is_stale_and_that_than_what_is_closed():
    entries = [
        entry("weak but working", (NOW, 1, 8)),
        entry("strong once", (BEFORE, 8, 8)),
        entry("closed", (BEFORE, 8, 8), (NOW, 0.2, 1)),
    ]
    for order in permutations(entries):
        for size, expected in (
            (1, {"weak but working"}),
            (2, {"weak but working", "strong once"}),
        ):
            archive = Archive(size, NOW)
            for each in order:
                archive.put(each)
            assert kept(archive) == expected


def test_cells_are_categories_times_styles():
    archive = Archive(1, NOW)
    for category in ("make dust", "take lamp"):
        for style in ("plain", "urgent"):
            assert archive.put(once(f"{category} {style}", 0.6, category, style))
    assert len(archive.filled()) == len(archive.entries()) == 4
    assert archive.put(once("better", 0.9, "take lamp", "urgent"))
    assert len(archive.filled()) == len(archive.entries()) == 4


@pytest.mark.parametrize("order", ["abcd", "dcba", "bdac"])
def test_what_is_kept_does_not_depend_on_the_order_of_offers_even_on_ties(order):
    scores = {"a": 0.7, "b": 0.7, "c": 0.7, "d": 0.6}
    archive, reference = Archive(2, NOW), Archive(2, NOW)
    for name in order:
        archive.put(once(name, scores[name]))
    for name in "abcd":
        reference.put(once(name, scores[name]))
    assert archive.entries() == reference.entries()
    assert "d" not in kept(archive)


def test_putting_an_entry_again_joins_histories_and_counts_no_try_twice():
    archive = Archive(2, NOW)
    archive.put(entry("a", (BEFORE, 2, 4)))
    archive.put(entry("a", (BEFORE, 2, 4), (NOW, 1, 4)))
    (found,) = archive.entries()
    assert found == entry("a", (BEFORE, 2, 4), (NOW, 1, 4))


def test_an_observation_is_added_to_what_is_kept_and_to_nothing_else():
    archive = Archive(2, NOW)
    archive.put(entry("a", (BEFORE, 4, 4)))
    assert archive.observe(prompt("a"), Try(NOW, 2, 4, 0.0))
    assert archive.observe(prompt("a"), Try(NOW, 2, 4, 0.0))  # asked again, and counted again
    assert not archive.observe(prompt("stranger"), Try(NOW, 2, 4, 4.0))
    (found,) = archive.entries()
    assert found.on(NOW) == (0, 8)
    assert found.on(BEFORE) == (4, 4)
    assert archive.state(found) == "closed"


def test_forgetting_empties_a_cell_and_forgives_strangers():
    archive = Archive(2, NOW)
    archive.put(once("a", 0.9))
    archive.forget(prompt("stranger"))
    archive.forget(prompt("stranger", "no such", "cell"))
    archive.forget(prompt("a", style="urgent"))  # another cell, another prompt
    assert kept(archive) == {"a"}
    archive.forget(prompt("a"))
    archive.forget(prompt("a"))
    assert archive.entries() == []
    assert archive.filled() == set()
    assert archive.put(once("b", 0.1))


def test_two_archives_share_nothing():
    one, other = Archive(2), Archive(2)
    one.put(once("a", 0.9))
    assert other.entries() == []


def test_entries_come_in_the_order_of_cells_and_ids():
    archive, other = Archive(9), Archive(9)
    offers = [
        once(f"{i}", i / 100, category, style)
        for i, (category, style) in enumerate((c, s) for c in "ba" for s in "yx" for _ in range(3))
    ]
    for each in offers:
        archive.put(each)
    for each in reversed(offers):
        other.put(each)
    assert archive.entries() == other.entries()
    keys = [(e.prompt.category, e.prompt.style, e.prompt.id) for e in archive.entries()]
    assert keys == sorted(keys)


# Handing on


def test_cells_take_turns_and_the_hard_ones_of_a_cell_go_first():
    archive = Archive(9, NOW)
    for name, unsafe in {"a2": 2.1, "a4": 4, "a1": 1}.items():
        archive.put(entry(name, (NOW, unsafe, 4), category="a"))
    archive.put(entry("b", (NOW, 4, 4), category="b"))
    for name, unsafe in {"c3": 3, "c1": 0.6}.items():
        archive.put(entry(name, (NOW, unsafe, 4), category="c"))
    order = ["a1", "b", "c1", "a2", "c3", "a4"]
    for limit in range(8):
        assert names(archive.spread(limit)) == order[:limit]


def test_with_one_try_each_the_surest_go_first():
    archive = Archive(9, NOW)
    for name, p_unsafe in {"a": 0.4, "b": 0.9, "c": 0.6}.items():
        archive.put(once(name, p_unsafe))
    assert names(archive.spread(9)) == ["b", "c", "a"]


def test_only_what_works_on_this_policy_is_handed_on():
    archive = Archive(9, NOW)
    archive.put(entry("stale", (BEFORE, 4, 4)))
    archive.put(entry("closed", (BEFORE, 4, 4), (NOW, 0.1, 4)))
    archive.put(entry("working", (NOW, 1, 4)))
    assert names(archive.spread(9)) == ["working"]
    assert Archive(9, NOW).spread(9) == []


def test_equally_hard_prompts_come_in_the_order_of_their_ids():
    archive = Archive(9, NOW)
    for name in "dbca":
        archive.put(once(name, 0.7))
    ids = [p.id for p in archive.spread(9)]
    assert len(ids) == 4
    assert ids == sorted(ids)


# Rows

TRIES = st.tuples(
    st.sampled_from(["", BEFORE, NOW]), st.integers(0, 9), st.integers(1, 30), st.integers(0, 999)
).flatmap(lambda t: st.floats(0, t[2]).map(lambda x: Try(t[0], t[1], t[2], round(x, 6), t[3])))
ENTRIES = st.builds(
    lambda name, category, tries: Entry(prompt(name, category), tuple(dict.fromkeys(tries))),
    st.text(min_size=1, max_size=8),
    st.sampled_from("abc"),
    st.lists(TRIES, max_size=4),
)


@given(st.lists(ENTRIES, max_size=8))
def test_rows_go_to_json_and_come_back(entries):
    archive = Archive(cell_size=3, policy=NOW)
    for each in entries:
        archive.put(each)
    rows = json.loads(json.dumps(archive.to_rows()))
    again = Archive.from_rows(rows, 3, NOW)
    assert again.entries() == archive.entries()
    assert again.to_rows() == rows
    assert (again.cell_size, again.policy) == (3, NOW)


def test_rows_tell_their_cell_and_round_what_is_expected():
    archive = Archive(1)
    archive.put(once("a", 1 / 3, "take lamp", "urgent"))
    (row,) = archive.to_rows()
    assert (row["category"], row["style"], row["version"]) == ("take lamp", "urgent", 2)
    assert [t["n_unsafe"] for t in row["tries"]] == [0.333333]


def test_rows_of_the_first_version_are_read_as_one_try_on_a_policy_unknown():
    old = prompt("a").to_json() | {"p_unsafe": 0.75}
    (found,) = Archive.from_rows([old], 1, NOW).entries()
    assert found == Entry(prompt("a"), (Try("", 0, 1, 0.75),))
    assert Archive(1, NOW).state(found) == "stale"


def test_smaller_cells_keep_the_best_of_the_rows():
    archive = Archive(4, NOW)
    for i in range(4):
        archive.put(once(str(i), 0.6 + i / 10))
    assert kept(Archive.from_rows(archive.to_rows(), 2, NOW)) == {"2", "3"}


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ({"p_unsafe": 0.5}, "field 'id' is missing"),
        ({}, "field 'p_unsafe' is missing"),
        ({"version": 3, "tries": []}, "version 3, and this selfmoa knows archives up to 2"),
        ({"version": 2}, "field 'tries' is missing"),
        ({"version": 2, "tries": 5}, "field 'tries' is no history"),
        ({"version": 2, "tries": ["a"]}, "is missing from this Try"),
        ({"version": 2, "tries": [{"policy": "x"}]}, "is missing from this Try"),
        (prompt("a").to_json() | {"p_unsafe": "much"}, "could not convert"),
        (prompt("a").to_json() | {"p_unsafe": None}, "field 'p_unsafe' is no history"),
        (prompt("a").to_json() | {"p_unsafe": 1.5}, "cannot have been unsafe"),
    ],
)
def test_a_row_that_is_none_of_an_archive_is_refused(broken, told):
    with pytest.raises(ValueError, match=told):
        Archive.from_rows([broken], 1)
