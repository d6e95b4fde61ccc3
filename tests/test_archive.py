"""The attack archive and the bandit: what is kept, whose turn it is, and that rows go round."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest

from selfmoa.attacks.archive import Archive, Bandit
from selfmoa.records import Prompt


def prompt(name, category="make dust", style="plain"):
    return Prompt.make(
        [{"role": "user", "content": name}],
        goal=name,
        intent="harmful",
        category=category,
        style=style,
        source="test",
    )


def names(prompts):
    return [p.goal for p in prompts]


def kept(archive):
    return {p.goal: score for p, score in archive.prompts()}


# Cells


def test_a_cell_keeps_its_best_and_says_whether_it_kept_what_was_offered():
    archive = Archive(cell_size=2)
    assert archive.put(prompt("a"), 0.6)
    assert archive.put(prompt("b"), 0.8)
    assert not archive.put(prompt("c"), 0.5)
    assert kept(archive) == {"a": 0.6, "b": 0.8}
    assert archive.put(prompt("d"), 0.7)
    assert kept(archive) == {"b": 0.8, "d": 0.7}


def test_cells_are_categories_times_styles():
    archive = Archive(cell_size=1)
    for category in ("make dust", "take lamp"):
        for style in ("plain", "urgent"):
            assert archive.put(prompt(f"{category} {style}", category, style), 0.6)
    assert archive.filled() == 4
    assert len(archive.prompts()) == 4
    assert archive.put(prompt("better", "take lamp", "urgent"), 0.9)
    assert archive.filled() == 4
    assert len(archive.prompts()) == 4


def test_a_prompt_seen_again_takes_its_new_score_and_no_second_place():
    archive = Archive(cell_size=2)
    archive.put(prompt("a"), 0.9)
    archive.put(prompt("b"), 0.8)
    assert archive.put(prompt("a"), 0.55)
    assert kept(archive) == {"a": 0.55, "b": 0.8}
    archive.put(prompt("c"), 0.6)
    assert kept(archive) == {"b": 0.8, "c": 0.6}


@pytest.mark.parametrize("order", ["abcd", "dcba", "bdac"])
def test_what_is_kept_does_not_depend_on_the_order_of_offers_even_on_ties(order):
    scores = {"a": 0.7, "b": 0.7, "c": 0.7, "d": 0.6}
    archive, reference = Archive(cell_size=2), Archive(cell_size=2)
    for name in order:
        archive.put(prompt(name), scores[name])
    for name in "abcd":
        reference.put(prompt(name), scores[name])
    assert archive.prompts() == reference.prompts()
    assert "d" not in kept(archive)


def test_forgetting_empties_a_cell_and_forgives_strangers():
    archive = Archive(cell_size=2)
    archive.put(prompt("a"), 0.9)
    archive.forget(prompt("stranger"))
    archive.forget(prompt("stranger", "no such", "cell"))
    assert kept(archive) == {"a": 0.9}
    archive.forget(prompt("a", style="urgent"))  # another cell, another prompt
    assert kept(archive) == {"a": 0.9}
    archive.forget(prompt("a"))
    archive.forget(prompt("a"))
    assert archive.prompts() == []
    assert archive.filled() == 0
    assert archive.put(prompt("b"), 0.1)


def test_two_archives_share_nothing():
    one, other = Archive(2), Archive(2)
    one.put(prompt("a"), 0.9)
    assert other.prompts() == []


def test_prompts_come_in_the_order_of_cells_and_ids():
    archive, other = Archive(9), Archive(9)
    offers = [
        (prompt(f"{i}", category, style), i / 100)
        for i, (category, style) in enumerate((c, s) for c in "ba" for s in "yx" for _ in range(3))
    ]
    for p, score in offers:
        archive.put(p, score)
    for p, score in reversed(offers):
        other.put(p, score)
    assert archive.prompts() == other.prompts()
    keys = [(p.category, p.style, p.id) for p, _ in archive.prompts()]
    assert keys == sorted(keys)


# Handing on


def test_cells_take_turns_and_the_surest_of_a_cell_goes_first():
    archive = Archive(cell_size=9)
    for name, score in {"a1": 0.6, "a2": 0.9, "a3": 0.7}.items():
        archive.put(prompt(name, "a"), score)
    archive.put(prompt("b1", "b"), 0.99)
    for name, score in {"c1": 0.8, "c2": 0.85}.items():
        archive.put(prompt(name, "c"), score)
    everything = {p.id for p, _ in archive.prompts()}
    order = ["a2", "b1", "c2", "a3", "c1", "a1"]
    for limit in range(8):
        assert names(archive.spread(limit, everything)) == order[:limit]


def test_only_prompts_that_were_tried_are_handed_on():
    archive = Archive(cell_size=9)
    for name, score in {"old": 0.99, "new": 0.6, "newer": 0.7}.items():
        archive.put(prompt(name), score)
    tried = {prompt("new").id, prompt("newer").id, prompt("never kept").id}
    assert names(archive.spread(9, tried)) == ["newer", "new"]
    assert archive.spread(9, set()) == []
    assert Archive(9).spread(9, tried) == []


def test_equally_sure_prompts_come_in_the_order_of_their_ids():
    archive = Archive(cell_size=9)
    for name in "dbca":
        archive.put(prompt(name), 0.7)
    ids = [p.id for p in archive.spread(9, {prompt(n).id for n in "abcd"})]
    assert ids == sorted(ids)


# Parents


def test_without_kept_prompts_parents_are_seeds():
    seeds = [prompt(f"seed {i}") for i in range(3)]
    archive, rng = Archive(2), Random(0)
    archive.put(prompt("gone"), 0.9)
    archive.forget(prompt("gone"))
    drawn = Counter(names(archive.draw_parent(seeds, rng) for _ in range(600)))
    assert set(drawn) == set(names(seeds))
    assert min(drawn.values()) > 150


def test_full_cells_are_not_drawn_more_than_others_and_seeds_stay_in_play():
    seeds = [prompt("seed")]
    archive = Archive(cell_size=10)
    for i in range(10):
        archive.put(prompt(f"crowd {i}", "crowded"), 0.9)
    for cell in ("b", "c", "d"):
        archive.put(prompt(cell, cell), 0.6)
    rng, n = Random(1), 6000
    drawn = Counter(archive.draw_parent(seeds, rng).goal for _ in range(n))
    # Four filled cells: a seed is drawn 1 time in 1 + sqrt(4).
    assert drawn["seed"] / n == pytest.approx(1 / 3, abs=0.03)
    crowd = sum(drawn[f"crowd {i}"] for i in range(10))
    for count in (crowd, drawn["b"], drawn["c"], drawn["d"]):
        assert count / n == pytest.approx(2 / 3 / 4, abs=0.025)
    assert min(drawn[f"crowd {i}"] for i in range(10)) > 0


def test_parents_depend_on_the_generator_and_not_on_the_order_of_offers():
    offers = [(prompt(f"{c} {i}", c), 0.6 + i / 100) for c in "abc" for i in range(3)]
    one, other = Archive(5), Archive(5)
    for p, score in offers:
        one.put(p, score)
    for p, score in reversed(offers):
        other.put(p, score)
    seeds = [prompt("seed")]

    def draws(archive, seed):
        rng = Random(seed)
        return names(archive.draw_parent(seeds, rng) for _ in range(50))

    assert draws(one, 3) == draws(other, 3)
    assert draws(one, 3) != draws(one, 4)


# Rows


def test_rows_go_to_json_and_come_back():
    archive = Archive(cell_size=3)
    for i, cell in enumerate(["a", "a", "a", "b", "c"]):
        archive.put(prompt(f"{cell} {i}", cell), 0.51 + i / 10)
    rows = json.loads(json.dumps(archive.to_rows()))
    again = Archive.from_rows(rows, cell_size=3)
    assert again.prompts() == archive.prompts()
    assert again.to_rows() == archive.to_rows()
    assert again.cell_size == 3
    assert {row["p_unsafe"] for row in rows} == {0.51, 0.61, 0.71, 0.81, 0.91}
    assert Archive.from_rows([], 3).prompts() == []


def test_scores_are_written_to_six_digits():
    archive = Archive(1)
    archive.put(prompt("a"), 1 / 3)
    assert [row["p_unsafe"] for row in archive.to_rows()] == [0.333333]


def test_smaller_cells_keep_the_best_of_the_rows():
    archive = Archive(cell_size=4)
    for i in range(4):
        archive.put(prompt(str(i)), 0.6 + i / 10)
    assert set(kept(Archive.from_rows(archive.to_rows(), cell_size=2))) == {"2", "3"}


@pytest.mark.parametrize("broken", [{"p_unsafe": 0.5}, {}])
def test_a_row_that_is_no_prompt_is_refused(broken):
    with pytest.raises((ValueError, KeyError)):
        Archive.from_rows([broken], 1)


# The bandit


def test_the_bandit_learns_which_arm_works_and_goes_on_trying():
    rates, bandit, rng = {"poor": 0.1, "good": 0.7, "fair": 0.4}, Bandit(), Random(0)
    chosen = []
    for _ in range(600):
        arm = bandit.choose(rates, rng)
        bandit.learn(arm, float(rng.random() < rates[arm]))
        chosen.append(arm)
    assert set(chosen[:60]) == set(rates)
    assert Counter(chosen[-200:])["good"] > 150
    tries = {a: bandit.wins[a] + bandit.losses[a] for a in rates}
    assert tries == pytest.approx(Counter(chosen))
    assert bandit.wins["good"] / tries["good"] == pytest.approx(0.7, abs=0.1)


def test_a_success_may_be_a_probability():
    bandit = Bandit()
    bandit.learn("a", 0.25)
    bandit.learn("a", 1.0)
    bandit.learn("b", 0.0)
    assert bandit.wins == {"a": 1.25, "b": 0.0}
    assert bandit.losses == {"a": 0.75, "b": 1.0}


def test_untried_arms_are_drawn_alike_and_proven_ones_almost_always():
    rng = Random(1)
    fresh = Counter(Bandit().choose("abcd", rng) for _ in range(2000))
    assert all(count / 2000 == pytest.approx(0.25, abs=0.04) for count in fresh.values())
    proven = Bandit(wins={"a": 200.0}, losses={"b": 200.0, "c": 200.0})
    assert Counter(proven.choose("abc", rng) for _ in range(200)) == {"a": 200}
    # An arm that nobody tried may still surpass one that works half of the time.
    half = Bandit(wins={"a": 50.0}, losses={"a": 50.0})
    assert 0.35 < Counter(half.choose("ab", rng) for _ in range(2000))["b"] / 2000 < 0.65


def test_equal_generators_and_histories_choose_equally():
    def history(seed):
        bandit, rng, chosen = Bandit(), Random(seed), []
        for _ in range(50):
            chosen.append(bandit.choose(["a", "b", "c"], rng))
            bandit.learn(chosen[-1], rng.random())
        return chosen, bandit

    assert history(5) == history(5)
    assert history(5)[0] != history(6)[0]
