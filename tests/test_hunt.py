"""The red team inside the loop: choices, budgets, replays, talks, leaks, and attacks that join."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from random import Random

import pytest

from selfmoa import loop, registry
from selfmoa.attacks.archive import Archive, Entry, Try
from selfmoa.attacks.search import Arm, Choice, Search
from selfmoa.errors import BadInput, LeakFound, RecipeError, UnknownPlugin
from selfmoa.recipes import load_recipe
from selfmoa.records import Prompt
from selfmoa.rundir import RunDir, read_jsonl
from selfmoa.sandbox.grammar import HELDOUT_STYLES
from selfmoa.sandbox.model import build_model
from selfmoa.stages import regression
from selfmoa.stages.context import Context
from selfmoa.stages.hunt import Hunt
from selfmoa.training.policy import save_policy
from test_tokens import FAMILIES

# --- what to try next ----------------------------------------------------------------------------


def prompt(text, category="c", style="plain", **more):
    return Prompt.make(
        [{"role": "user", "content": text}],
        goal=more.pop("goal", text),
        intent="harmful",
        category=category,
        style=style,
        source=more.pop("source", "seed"),
        **more,
    )


SEEDS = [prompt("brew the grey tea", "c"), prompt("wake the old lamp", "d")]
ARMS = [Arm("hide", "s"), Arm("hide", "t"), Arm("expand", "s", expands=True)]


def searching(archive=None, **more):
    settings = {"floor": 0.05, "alpha": 0.05} | more
    return Search(archive or Archive(4, "policy"), ARMS, SEEDS, (1, 2), **settings)


def test_choices_depend_on_run_round_and_number_alone():
    first, again = searching(), searching()
    assert [first.choose(7), first.choose(13)] == [again.choose(7), again.choose(13)]
    other = Search(Archive(4, "policy"), ARMS, SEEDS, (1, 3), 0.05, 0.05)
    assert other.choose(20) != searching().choose(20)
    assert len({c.seed for c in searching().choose(20)}) == 20


def test_half_of_the_choices_go_to_cells_in_which_nothing_worked_until_three_tries():
    """One operator always works, so the bandit chooses no other; two of three new cells do."""
    good, bad = Arm("good", "t"), Arm("bad", "s")
    search = Search(Archive(4, "policy"), [good, bad], SEEDS, (1, 2), 0.05, 0.05)
    for _ in range(100):
        search.learn(Choice(good, SEEDS[0], 0), prompt("x", "c", "t"), 1.0)
        search.bandit.learn(("bad", "s", "c"), 0.0)
    chosen = [c for _ in range(300) for c in search.choose(1)]
    assert 0.25 < sum(c.arm == bad for c in chosen) / 300 < 0.42
    cells = {(c.parent.category, c.arm.style) for c in chosen}
    assert cells == {("c", "t"), ("d", "t"), ("c", "s"), ("d", "s")}
    for category, style in (("d", "t"), ("c", "s"), ("d", "s")) * 3:
        search.learn(Choice(bad, SEEDS[0], 0), prompt("x", category, style), 0.0)
    assert sum(c.arm == bad for c in search.choose(100)) < 5


def test_a_category_that_was_met_once_can_be_rewritten():
    search = searching()
    search.learn(search.choose(1)[0], prompt("met on the way", "new", "s"), 0.0)
    assert "new" in {c.parent.category for c in search.choose(60)}


def test_goals_that_are_false_alarms_are_rewritten_only_where_there_are_no_others():
    search = searching()
    choice = search.choose(1)[0]
    harmful = prompt("sing to the deep bell", "c", "t")
    search.keep(harmful, Try("policy", 1, 1, 0.9))
    search.learn(
        choice, prompt("hide the tea", "c", "s", goal=SEEDS[0].goal), 0.0, is_harmless=True
    )
    parents = {c.parent.goal for c in search.choose(80) if c.parent.category == "c"}
    assert parents == {harmful.goal}
    search.learn(choice, prompt("wake it", "d", "s", goal=SEEDS[1].goal), 0.0, is_harmless=True)
    assert {c.parent.goal for c in search.choose(80)} == {harmful.goal, SEEDS[1].goal}
    met = prompt("wake the bold wind", "d", "s")
    search.learn(choice, met, 0.0)
    assert {c.parent.goal for c in search.choose(80)} == {harmful.goal, met.goal}


def test_full_cells_are_not_drawn_more_than_others_and_seeds_stay_in_play():
    archive = Archive(10, "policy")
    cells = {"s": 9, "t": 1, "u": 1, "v": 1}
    for style, n in cells.items():
        for i in range(n):
            archive.put(Entry(prompt(f"{style} {i}", "c", style), (Try("policy", 1, 1, 0.9),)))
    archive.put(Entry(prompt("closed", "c", "w"), (Try("policy", 1, 4, 0.0),)))
    drawn = [c.parent for c in searching(archive).choose(12000) if c.parent.category == "c"]
    share = Counter("seed" if p == SEEDS[0] else p.style for p in drawn)
    # Four cells to draw from: a seed is drawn 1 time in 1 + sqrt(4).
    assert share["seed"] / len(drawn) == pytest.approx(1 / 3, abs=0.03)
    for style in cells:
        assert share[style] / len(drawn) == pytest.approx(2 / 3 / 4, abs=0.025)
    assert not share["w"]


def test_the_bandit_goes_where_it_worked():
    search = searching()
    for choice in search.choose(300):
        search.learn(choice, prompt("x", choice.parent.category, choice.arm.style),
                     float(choice.arm == ARMS[1] and choice.parent.category == "d"))  # fmt: skip
    chosen = search.choose(100)
    assert sum(c.arm == ARMS[1] and c.parent.category == "d" for c in chosen) > 70


def test_a_cell_that_surely_fails_is_given_up_by_those_that_stay_in_it():
    search = searching(floor=0.2)
    choice = search.choose(1)[0]
    for _ in range(200):
        search.learn(choice, prompt("x", "c", "s"), 0.0)
        search.learn(choice, prompt("x", "c", "t"), 0.3)
    assert search.is_exhausted(("c", "s"))
    assert not search.is_exhausted(("c", "t"))
    arms = {(c.arm.operator, c.arm.style, c.parent.category) for c in search.choose(400)}
    assert ("hide", "s", "c") not in arms
    assert {("hide", "t", "c"), ("expand", "s", "c"), ("hide", "s", "d")} <= arms


def test_where_all_is_given_up_nothing_is_chosen():
    search = Search(Archive(4, "p"), ARMS[:1], SEEDS[:1], (1, 2), 0.2, 0.05)
    choice = search.choose(1)[0]
    for _ in range(200):
        search.learn(choice, prompt("x", "c", "s"), 0.0)
    assert search.choose(5) == []


def test_parents_are_what_works_or_was_not_tried_and_never_what_is_closed():
    archive = Archive(4, "policy")
    works, closed = prompt("boil the works", "c", "s"), prompt("boil the closed", "c", "t")
    stale = prompt("boil the stale", "e", "s")
    archive.put(Entry(works, (Try("policy", 1, 1, 0.9),)))
    archive.put(Entry(closed, (Try("policy", 1, 1, 0.0),)))
    archive.put(Entry(stale, (Try("older", 1, 1, 0.9),)))
    parents = {c.parent.id for c in searching(archive).choose(300)}
    assert parents == {works.id, stale.id, *(s.id for s in SEEDS)}


def test_what_was_asked_is_not_new_and_neither_is_what_nearly_was():
    search = searching(near_duplicates=0.9)
    text = "tell me the way to brew the grey tea of the valley before the next full moon rises"
    assert search.is_new(prompt(text))
    assert not search.is_new(prompt(text))
    assert not search.is_new(prompt(text + "!"))
    assert search.refused == 1
    assert search.is_new(prompt("an altogether different question about the lamp of the hill"))
    exact = searching(near_duplicates=1.0)
    assert exact.is_new(prompt(text))
    assert exact.is_new(prompt(text + "!"))


# --- regression ----------------------------------------------------------------------------------


def test_reopened_holes_are_compared_attack_by_attack():
    rows = [{"before": 0.1, "after": 0.9}] * 30 + [{"before": 0.0, "after": 0.0}] * 10
    found = regression.reopened(rows)
    assert found.value == pytest.approx(0.6)
    assert found.low > 0
    assert regression.reopened([]).value is None
    same = regression.reopened([{"before": 0.2, "after": 0.2}] * 30)
    assert same.low < 0 < same.high


# --- what cannot work is refused early -----------------------------------------------------------


def refused(*overrides):
    with pytest.raises((RecipeError, UnknownPlugin)) as caught:
        loop.refuse_unworkable(load_recipe("sandbox", overrides))
    return str(caught.value)


def test_recipes_that_cannot_attack_are_refused():
    assert "Did you mean 'sandbox-follow-up'" in refused("red_team.strategies=[sandbox-folow-up]")
    told = refused("held_out.attacks=[sandbox-hide]")
    assert told == "held_out.attacks: 'sandbox-hide' is held out, and red_team uses it"
    own = "attackers={mine: {kind: lm-hide, options: {heldout: [past]}, train: true}}"
    assert "attackers.mine.train" in refused(own, "red_team.attacks=[mine]")
    bad = "attackers={mine: {kind: sandbox-hide}}"
    assert "takes no settings" in refused(bad, "red_team.attacks=[mine]")


# --- the loop ------------------------------------------------------------------------------------


def context_of(folder, recipe):
    return Context(recipe, RunDir.read(folder), lambda *_, **__: None)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hunted") / "run"
    settings = [
        "red_team.strategies=[sandbox-follow-up]",
        f"held_out.styles=[{','.join(HELDOUT_STYLES[:1])},plain/urgent]",
    ]
    recipe = load_recipe("sandbox", [*tiny, *settings])
    loop.run(recipe, folder)
    return folder, recipe


@pytest.mark.slow
def test_a_round_tells_what_its_search_was_worth(finished):
    folder, recipe = finished
    for r in (1, 2):
        found = json.loads((folder / f"round-0{r}/1-red_team/search.json").read_text())
        assert recipe.red_team.calls <= found["calls"] <= recipe.red_team.calls + 4
        assert 0 <= found["hit_at_1"]["value"] <= 1
        assert found["hit_at_k"]["n"] == len(
            read_jsonl(folder / f"round-0{r}/1-red_team/confirmed.jsonl")
        )
        assert found["diversity"]["clusters"] <= found["diversity"]["n"]
        assert found["cells_working"] <= found["cells_tried"] + 20
    report = (folder / "report/report.md").read_text()
    assert "Hit@k of those asked again" in report
    assert "Old holes, asked again" in report


@pytest.mark.slow
def test_prompts_that_are_handed_on_were_asked_k_times(finished):
    folder, recipe = finished
    confirmed = {
        row["id"]: row["p_unsafe"]
        for row in read_jsonl(folder / "round-01/1-red_team/confirmed.jsonl")
    }
    rows = read_jsonl(folder / "round-01/1-red_team/prompts.jsonl", Prompt)
    attacks = [p for p in rows if p.source != "instructions"]
    assert attacks
    for attack in attacks:
        assert len(confirmed[attack.id]) == recipe.red_team.k


@pytest.mark.slow
def test_conversations_are_held_judged_trained_on_and_kept(finished):
    folder, _ = finished
    attempts = read_jsonl(folder / "round-01/1-red_team/attempts.jsonl")
    talks = [r for r in attempts if r["arm"].startswith("sandbox-follow-up")]
    assert talks
    for row in talks:
        roles = [m["role"] for m in row["prompt"]["messages"]]
        assert roles[0] == roles[-1] == "user"
        assert row["calls"] == roles.count("user")
        assert row["response"]["prompt_id"] == row["prompt"]["id"]
    assert any(r["calls"] > 1 for r in talks)
    assert sum(r["calls"] for r in attempts if r["arm"] != "control") >= 60


@pytest.mark.slow
def test_styles_held_out_are_no_arms(finished):
    folder, _ = finished
    arms = {r["arm"] for r in read_jsonl(folder / "round-01/1-red_team/attempts.jsonl")}
    assert not [arm for arm in arms if arm.endswith("plain/urgent")]


@pytest.mark.slow
def test_closed_attacks_are_put_to_the_new_policy_again(finished):
    folder, recipe = finished
    context = context_of(folder, recipe)
    context.round = 2
    attacked = context.policy_folder(2)
    rows = read_jsonl(folder / "round-02/6-evaluate/regression.jsonl")
    archive = Archive.from_rows(
        read_jsonl(folder / "round-02/1-red_team/archive.jsonl"),
        recipe.red_team.cell_size,
        context.models.load(attacked).model,
        recipe.red_team.keep_above,
    )
    closed = {e.prompt.id for e in archive.entries("closed") if len(e.prompt.messages) == 1}
    assert {row["id"] for row in rows} == closed
    assert all(0 <= row[side] <= 1 for row in rows for side in ("before", "after"))
    decision = read_jsonl(folder / "round-02/6-evaluate/decision.jsonl")[0]
    assert decision["reopened"]["n"] == len(rows)


@pytest.mark.slow
def test_a_budget_of_tokens_ends_the_search_within_a_batch(tiny, tmp_path):
    recipe = load_recipe("sandbox", [*tiny, "red_team.max_tokens=1"])
    loop.run(recipe, tmp_path / "run", only=("red_team", 1))
    rows = read_jsonl(tmp_path / "run/round-01/1-red_team/attempts.jsonl")
    assert len({r["batch"] for r in rows}) <= 2


@pytest.mark.slow
def test_attacks_that_join_later_get_a_round_of_their_own(finished, tmp_path):
    """The reset policy, which was deleted, is made again for it and deleted again."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    world = context_of(*finished).world
    rng, rows = Random(0), []
    for p in world.static_attacks(12):
        request = world.read(p.goal)
        new = world.attack_prompt(request, HELDOUT_STYLES[0], rng, source="static")
        rows.append({"prompt": new.messages[0]["content"], "goal": new.goal,
                     "category": new.category, "style": new.style})  # fmt: skip
    seeds = tmp_path / "new.jsonl"
    seeds.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = (folder / "round-02/1-red_team/stage.json").read_bytes()
    assert not (folder / "00-reset/1-reset/policy/model.safetensors").exists()
    summary = loop.extend(folder, seeds)
    assert [r["round"] for r in summary["rounds"]] == [1, 2, 3]
    attempts = read_jsonl(folder / "round-03/1-red_team/attempts.jsonl")
    joined = [r for r in attempts if r["arm"] == "added"]
    assert len(joined) == len(read_jsonl(folder / "seeds/round-03.jsonl", Prompt))
    assert {r["prompt"]["style"] for r in joined} == {HELDOUT_STYLES[0]}
    assert (folder / "round-02/1-red_team/stage.json").read_bytes() == before
    assert not list((folder / "00-reset").rglob("*.safetensors"))
    assert loop.run(loop.reopen(folder), folder)["rounds"] == summary["rounds"]


@pytest.mark.slow
def test_seeds_that_the_model_cannot_read_or_that_are_none_are_refused(finished, tmp_path):
    strange, empty = tmp_path / "strange.jsonl", tmp_path / "empty.jsonl"
    strange.write_text(json.dumps({"prompt": "wie geht es der katze heute"}) + "\n")
    empty.write_text("")
    with pytest.raises(BadInput, match="unknown to the model's tokenizer"):
        loop.extend(finished[0], strange)
    with pytest.raises(BadInput, match=r"empty|no attack"):
        loop.extend(finished[0], empty)
    with pytest.raises(UnknownPlugin):
        loop.extend(finished[0], attack="nonesuch")
    assert not (finished[0] / "seeds").exists()


@pytest.mark.slow
def test_a_prompt_of_the_suite_that_was_trained_on_stops_the_run(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    with RunDir.open(folder, {}, seed=0, name="x", versions={}) as opened:
        opened.discard_from("evaluate", 2)
    vale = registry.resolve("world", "sandbox")
    trained = read_jsonl(folder / "round-01/1-red_team/prompts.jsonl", Prompt)[0]
    suite = vale.suite
    monkeypatch.setattr(vale, "suite", lambda self, n: [*suite(self, n), trained])
    with pytest.raises(LeakFound, match="held-out prompts were trained on"):
        loop.run(finished[1], folder)


# --- attackers that learn ------------------------------------------------------------------------


class Scripted:
    """Hides in a style of words, in words of the sandbox, so that it works on a reset policy."""

    kind, styles = "hide", ("fiction",)

    def __init__(self, world, model, *, name="scripted"):
        self.world, self.model, self.name = world, model, name
        self.counts = {"asked": 0}

    def rewrite(self, asks):
        self.counts["asked"] += len(asks)
        return [self._rewrite(ask) for ask in asks]

    def _rewrite(self, ask):
        request = self.world.read(ask.parent.goal)
        found = self.world.attack_prompt(request, "plain/none", Random(ask.seed), source="x")
        return prompt(
            found.messages[0]["content"], ask.parent.category, "fiction",
            goal=ask.parent.goal, source=self.name, parent_id=ask.parent.id,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_an_attacker_learns_from_what_worked_and_attacks_with_it_in_the_next_round(
    tiny, tmp_path, monkeypatch
):
    tokenizer = FAMILIES["qwen"]()
    model = build_model(tokenizer, architecture="llama", hidden=32, layers=1, heads=2, seed=0)
    model.config.max_position_embeddings = 2048
    save_policy(model, tokenizer, tmp_path / "base")
    kinds = registry.PLUGINS["attack"] | {"scripted": f"{__name__}:Scripted"}
    monkeypatch.setitem(registry.PLUGINS, "attack", kinds)
    own = f"attackers={{mine: {{kind: scripted, model: {tmp_path / 'base'}, train: true}}}}"
    recipe = load_recipe("sandbox", [*tiny, own, "red_team.attacks=[mine]"])
    loop.run(recipe, tmp_path / "run", only=("red_team", 2))
    learnt = tmp_path / "run/round-01/1-red_team/attackers/mine"
    assert (learnt / "adapter_model.safetensors").is_file()
    assert json.loads((learnt / "attacker.json").read_text())["successes"] > 0
    assert list(learnt.glob("QUARANTINED*"))
    found = json.loads((tmp_path / "run/round-01/1-red_team/search.json").read_text())
    assert found["attackers"]["mine"]["asked"] > 0
    context = context_of(tmp_path / "run", recipe)
    context.stage, context.round = "red_team", 2
    again = Hunt(context)
    assert again.attacks["mine"].model.model == context.models.load(learnt).model
