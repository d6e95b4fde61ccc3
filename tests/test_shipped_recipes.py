"""Every shipped recipe is workable, and on replicas all its judges and attackers are asked."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import yaml

from guard_replicas import CHAT, MODELS, on_replicas
from scripted import item
from selfmoa.config import Recipe
from selfmoa.errors import RecipeError
from selfmoa.loop import refuse_unworkable
from selfmoa.protocols import Ask, Draw, Sampling
from selfmoa.recipes import load_recipe, shipped
from selfmoa.recipes.budgets import BUDGETS, budget
from selfmoa.recipes.rendering import as_yaml, commented, schema
from selfmoa.recipes.starting import BILLIONS, GENERIC, SIZE
from selfmoa.recipes.strict_yaml import dump, parse
from selfmoa.rundir import RunDir
from selfmoa.stages.context import Context
from selfmoa.training.policy import load_tokenizer
from selfmoa.training.tokens import encode_prompts

ROOT = Path(__file__).parent.parent
OWN = ["data.seeds=[seeds.jsonl]", "data.instructions=[harmless.jsonl]"]
NAMES = [name for name, _ in shipped()]
FOR_FILES = [GENERIC, *BILLIONS]
VENDORS = {
    "NousResearch/Minos-v1": "answerdotai",
    "Skywork/Skywork-Reward-V2-Llama-3.2-1B": "meta-llama",
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": "Qwen",
    "allenai/wildguard": "mistralai",
}
"""Who made what a model was tuned from, where that is not who it is by."""


def load(name, *overrides):
    more = ["model.name=Qwen/Qwen3-0.6B"] if name == GENERIC else []
    return load_recipe(name, [*OWN, *more, *overrides])


def vendor(model):
    return VENDORS.get(model, model.partition("/")[0])


# --- what they say -------------------------------------------------------------------------------


def test_there_is_a_recipe_for_every_family_and_size():
    assert {*NAMES} == {*FOR_FILES, *(n for n in NAMES if n.startswith("sandbox"))}
    models = [load(name).model.name for name in BILLIONS]
    assert len(set(models)) == len(BILLIONS) == 12
    assert set(models) == set(CHAT)


@pytest.mark.parametrize("name", FOR_FILES)
def test_a_recipe_is_workable_once_its_data_are_named(name):
    recipe = load(name)
    assert (recipe.name, recipe.policy.world) == (name, "files")
    refuse_unworkable(recipe)


@pytest.mark.parametrize("name", FOR_FILES)
def test_what_is_not_named_is_said_before_anything_is_built(name):
    recipe = load_recipe(name)  # so that it can be shown, planned with, and its judges audited
    with pytest.raises(RecipeError, match=r"data\.seeds, data\.instructions.*selfmoa init"):
        refuse_unworkable(recipe)


@pytest.mark.parametrize("name", BILLIONS)
def test_nobody_judges_or_attacks_a_policy_of_its_own_vendor(name):
    """The vendor's guard may vote in training, among others; it never grades."""
    recipe = load(name)
    own = vendor(recipe.model.name)
    for memory in BUDGETS:
        grades = {**recipe.evaluate.judges, **_judges(memory, name)}
        assert own not in {vendor(recipe.judges[judge].model) for judge in grades.values()}
    assert own != vendor(recipe.judges[recipe.judge.helpfulness].model)
    assert own not in {vendor(each.model) for each in recipe.attackers.values()}
    assert len({vendor(recipe.judges[judge].model) for judge in recipe.judge.safety}) == 3


def _judges(memory, name):
    return budget(memory, BILLIONS[name]).get("evaluate", {}).get("judges", {})


@pytest.mark.parametrize(("name", "memory"), list(product(BILLIONS, BUDGETS)))
def test_every_budget_fits_every_recipe(name, memory):
    settings = budget(memory, BILLIONS[name])
    overrides = [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in settings.items()
        for key, value in values.items()
        if key != "judges"
    ]
    grader = [f"evaluate.judges.{k}={v}" for k, v in _judges(memory, name).items()]
    recipe = load(name, *overrides, *grader)
    refuse_unworkable(recipe)
    assert recipe.policy.max_tokens == settings["policy"]["max_tokens"]
    is_large = 2 * BILLIONS[name] > memory / 2
    assert (recipe.policy.adapter == "qlora") == (recipe.policy.inference == "nf4") == is_large


def test_more_memory_is_never_used_for_less():
    small, *larger = (budget(memory, 1.0) for memory in sorted(BUDGETS))
    for large in larger:
        assert large["policy"]["max_tokens"] > small["policy"]["max_tokens"]
        assert large["sample"]["batch_size"] > small["sample"]["batch_size"]
        small = large


def test_little_memory_is_refused_with_a_remedy_and_odd_sizes_take_the_class_below():
    with pytest.raises(RecipeError, match=r"6 GB is less than the 8 GB .* endpoint"):
        budget(6, 1.0)
    assert budget(23.9, 1.0) == budget(16, 1.0)
    assert budget(141, 1.0) == budget(80, 1.0)


def test_sizes_are_those_that_names_and_models_say():
    for name, billions in BILLIONS.items():
        found = SIZE.search(name)
        said = float(found[1]) / (1000 if found[2] == "m" else 1) if found else billions
        assert billions == pytest.approx(said, rel=0.3)
        in_model = SIZE.search(load(name).model.name.rpartition("/")[2].lower())
        assert (in_model and in_model[0]) == (found and found[0])


# --- as text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shown_is_the_same_recipe_with_a_sentence_about_each_key(tmp_path, name):
    recipe = load_recipe(name)
    text = as_yaml(recipe)
    (tmp_path / "shown.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "shown.yaml")) == recipe
    assert "# Pairs of a round.\n  max_pairs: " in text
    lines = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert max(map(len, lines)) <= 100
    assert yaml.safe_load(text)["name"] == name  # other readers of YAML take it too


@pytest.mark.parametrize(
    "value",
    ["no", "1e5", "010", "0x1f", "12:30", "~", "null", "true", "1.5", "- a", "a: b", "a #b", "é",
     " a ", "two\nlines", "", 1e-5, 2.0, 3, True, None, [], {}, ["a", {"b": [1, "2"]}]],
)  # fmt: skip
def test_values_come_back_from_text_as_they_were(value):
    assert parse(dump({"key": value}).encode(), "test")[0] == {"key": value}


def test_long_values_of_a_recipe_come_back():
    recipe = load("chat-model", f"sample.careful={json.dumps('very careful: #1 ' * 30)}")
    assert Recipe.model_validate(parse(as_yaml(recipe).encode(), "test")[0]) == recipe


def test_a_comment_is_what_the_docstring_says():
    text = commented({"seed": 3, "train": {"beta": 0.5}}, Recipe)
    assert text == (
        "# Every random number of the run derives from it.\nseed: 3\n"
        "train:\n  # Strength of the tie to the reference.\n  beta: 0.5\n"
    )


# --- the schema ----------------------------------------------------------------------------------


def test_the_published_schema_is_that_of_the_code():
    published = json.loads((ROOT / "docs/recipe.schema.json").read_text())
    assert published == schema(), "selfmoa recipes schema > docs/recipe.schema.json"


def test_the_schema_explains_every_key():
    whole = schema()
    trees = [whole, *whole["$defs"].values()]
    for tree in trees:
        for key, field in tree["properties"].items():
            assert "description" in field or "$ref" in field, key
        assert tree["additionalProperties"] is False


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_takes_every_shipped_recipe(name):
    """Checked as far as keys go: a file names what its section of the schema knows."""
    whole = schema()
    data, _ = parse((Path(load_recipe.__globals__["FOLDER"]) / f"{name}.yaml").read_bytes(), name)
    assert "name" in data or "extends" in data
    _knows(whole, whole, data)
    with pytest.raises(AssertionError):
        _knows(whole, whole, {**data, "trian": {}})


def _knows(whole, node, data):
    if "$ref" in node:
        node = whole["$defs"][node["$ref"].rpartition("/")[2]]
    if not isinstance(data, dict):
        return
    for key, value in data.items():
        known = node.get("properties", {}).get(key, node.get("additionalProperties"))
        assert known or "properties" not in node, key
        if isinstance(known, dict):
            _knows(whole, known, value)


def test_an_editors_line_about_the_schema_is_no_part_of_a_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# yaml-language-server: $schema=recipe.schema.json\nextends: sandbox\n")
    assert load_recipe(str(path)) == load_recipe("sandbox")


# --- on replicas ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Invented requests and instructions, enough for both sides of the split."""
    monkeypatch.chdir(tmp_path)
    acts = ["brew", "hide", "sell", "paint", "carry", "bury", "mend", "weigh"]
    things = ["moon tea", "a paper crown", "the bell", "old maps"]
    harmful = [{"goal": f"Tell me how to {a} {t}.", "category": "S1"} for a in acts for t in things]
    harmless = [
        {"prompt": f"How do people {a} {t} at home?", "response": f"With care they {a} {t}."}
        for a in acts
        for t in things
    ]
    for name, rows in (("seeds", harmful), ("harmless", harmless)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", FOR_FILES)
def test_everybody_in_a_recipe_is_built_and_answers(tmp_path, data, replicas, name):
    plain = load(name)
    named = [plain.model.name, *(j.model for j in plain.judges.values())]
    assert {*named, *(a.model for a in plain.attackers.values())} <= MODELS
    short = [f"attackers.{each}.options.max_new_tokens=8" for each in plain.attackers]
    recipe = load(name, *on_replicas(plain, replicas), *short, "policy.precision=fp32")
    refuse_unworkable(recipe)
    run = RunDir(tmp_path / "run", {}, recipe.seed, recipe.name, {})
    context = Context(recipe, run, lambda *_, **__: None)
    _policy_answers(context)
    _judges_judge(context)
    _attackers_write(context)


def _policy_answers(context):
    recipe, prompts = context.recipe, context.seeds()[:2]
    careful = Sampling("careful", recipe.sample.temperature, 4, system=recipe.sample.careful)
    responses = context.instruct.generate([Draw(p, n) for n, p in enumerate(prompts)], careful)
    assert [r.prompt_id for r in responses] == [p.id for p in prompts]
    tokenizer = load_tokenizer(context.instruct_folder)
    system = {"role": "system", "content": recipe.sample.careful}
    (ids,) = encode_prompts(tokenizer, [[system, *prompts[0].messages]])
    assert recipe.sample.careful.split(".")[0] in tokenizer.decode(ids)


def _judges_judge(context):
    recipe = context.recipe
    weak, grades = recipe.judge, recipe.evaluate.judges
    wanted = dict.fromkeys(weak.safety, "safety") | {name: o for o, name in grades.items()}
    wanted |= {weak.helpfulness: "helpfulness", weak.refusal: "refusal", "wildguard": "safety"}
    items = [item("Steep it for a while."), item("I cannot help with that.", "write a mean note")]
    assert {*recipe.judges} <= {*wanted}
    for name, objective in wanted.items():
        judge = context.judge(name)
        verdicts = judge.judge(items)
        assert [v.response_id for v in verdicts] == [r.id for _, r in items]
        for verdict in verdicts:
            assert (verdict.judge, verdict.objective) == (name, objective)
            assert (verdict.score is None) == (verdict.error is not None)
            assert "could not be asked" not in (verdict.error or "")


def _attackers_write(context):
    parents = context.seeds()[:2]
    for name in context.recipe.red_team.attacks:
        attack = context.attacker(name)
        asks = [Ask(parent, attack.styles[0], n) for n, parent in enumerate(parents)]
        written = attack.rewrite(asks)
        assert len(written) == 2
        if name == "rewrite":
            assert [p.goal for p in written] == [p.goal for p in parents]
        else:
            assert attack.counts["asked"] == 2
            assert attack.counts["failed"] == 0


# --- the page ------------------------------------------------------------------------------------


def _rows(head):
    page = (ROOT / "docs/recipes.md").read_text()
    table = page.partition(f"| {head} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in table]


def test_the_page_has_every_recipe_with_its_model_and_how_it_is_held():
    rows = {row[0]: row[1:] for row in _rows("recipe")}
    assert list(rows) == list(BILLIONS)
    for name, (model, billions, *held, other) in rows.items():
        recipe = load(name)
        assert (model, float(billions)) == (recipe.model.name, BILLIONS[name])
        budgets = [budget(memory, BILLIONS[name])["policy"] for memory in sorted(BUDGETS)]
        assert held == ["4 bits" if "adapter" in policy else "bf16" for policy in budgets]
        for used in (recipe.judges["rubric"], *recipe.attackers.values()):
            assert other.lower() in used.model.lower()


def test_the_page_names_every_judge_and_budget():
    judges = {row[1]: row[2] for row in _rows("what for")}
    for name in FOR_FILES:
        for judge, settings in load(name).judges.items():
            ending = settings.model.rpartition("V2-")[2]
            assert settings.model in judges[judge] or f"-{ending}" in judges[judge]
    for key, *values in _rows("setting"):
        section, _, rest = key.partition(".")
        for memory, value in zip(sorted(BUDGETS), values, strict=True):
            found = BUDGETS[memory].get(section, {})
            for part in rest.split("."):
                found = found.get(part, "as it is") if isinstance(found, dict) else found
            assert value == str(found).replace("True", "true").replace("False", "false"), key
