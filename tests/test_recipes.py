"""Recipes: what is read, what is refused, and whether the sentence says what to mend."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from selfmoa import recipes
from selfmoa.errors import CannotRead, MissingFile, RecipeError, UnknownPlugin
from selfmoa.recipes import adjust, find, load, load_recipe, shipped


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sampling(Section):
    temperature: float = Field(1.0, ge=0)
    max_new_tokens: int = 64


class Sample(Section):
    k: int = Field(2, ge=1)
    words: str = ""
    sampling: Sampling = Sampling()


class Rules(Section):
    kind: Literal["rules"]
    threshold: float = 0.5


class Guard(Section):
    kind: Literal["guard"]
    model: str


class Tiny(Section):
    name: str
    sample: Sample = Sample()
    judges: list[Annotated[Rules | Guard, Field(discriminator="kind")]] = []
    weights: dict[str, float] = {}
    pair: Sample | None = None

    @model_validator(mode="after")
    def _named(self):
        if self.name == "nobody":
            raise ValueError("name and sample do not go together")
        return self


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The shipped recipes are those that a test writes."""
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    return tmp_path


def read(folder, text, *overrides):
    path = folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(Tiny, "mine", overrides)


def problem(folder, text, *overrides):
    with pytest.raises(RecipeError) as caught:
        read(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "")


# --- reading -------------------------------------------------------------------------------------


def test_a_recipe_is_found_by_name_or_path(folder):
    (folder / "demo.yaml").write_text("# The quick one.\nname: demo\n")
    (folder / "full.yaml").write_text("name: full\n")
    assert load(Tiny, "demo").name == "demo"
    assert load(Tiny, str(folder / "full.yaml")).name == "full"
    assert find("demo") == folder / "demo.yaml"
    assert shipped() == [("demo", "The quick one."), ("full", "")]


@pytest.mark.parametrize("name", ["dmeo", "demo.yml2", "..", "", "demo\0", "DEMO"])
def test_an_unknown_name_is_answered_with_the_shipped_ones(folder, name):
    (folder / "demo.yaml").write_text("name: demo\n")
    with pytest.raises(UnknownPlugin, match=r"there is no recipe '(?s:.*)Known: demo$"):
        find(name)


@pytest.mark.parametrize("path", ["none.yaml", "./demo", "a\\b", "a\0/b", "./"])
def test_a_missing_path_is_named(folder, path):
    (folder / "demo.yaml").write_text("name: demo\n")
    with pytest.raises(MissingFile, match=r"recipe '(?s:.*)' does not exist; shipped .* demo"):
        find(path)


def test_a_path_is_relative_to_where_the_user_is(folder, monkeypatch):
    (folder / "demo.yaml").write_text("name: demo\n")
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    assert load(Tiny, "../demo.yaml").name == "demo"


def test_words_and_numbers_are_those_of_yaml_1_2(folder):
    text = "name: no\nsample: {words: 010}\nweights: {a: 1e-5, b: .5, c: -2, d: 1.5E+3, e: 0}\n"
    recipe = read(folder, text)
    assert (recipe.name, recipe.sample.words) == ("no", "010")
    assert recipe.weights == {"a": 1e-5, "b": 0.5, "c": -2, "d": 1500, "e": 0}
    for word in ("on", "yes", "12:30", "2020-01-01", "0x10", "1e", "off", "1_000", "infinity"):
        assert read(folder, f"name: {word}").name == word
    for value in ("~", "null", "", "true", "1", "1.0"):
        assert "name (mine.yaml, line 1) is" in problem(folder, f"name: {value}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nsample:\n  k: 1\n  k: 2\n", "line 4: key 'k' is there twice"),
        ("name: a\nname: a\n", "line 2: key 'name' is there twice"),
        ("name: a\nweights:\n  a: .nan\n", "line 3: .nan is not a finite number"),
        ("name: a\nweights: {a: -.inf}\n", "line 2: -.inf is not a finite number"),
        ("name: a\nweights: {a: 1e999}\n", "line 2: 1e999 is not a finite number"),
        ("name: a\nweights: {a: !!float nan}\n", "mine.yaml"),
        ("name: a\nweights:\n  a: nan\n", "weights.a (mine.yaml, line 3) is not finite"),
        ("a: &a [x]\nb: [*a, *a]\n", "line 1: anchors and aliases are not for recipes"),
        ("name: a\nsample: *a\n", "line 2: anchors and aliases are not for recipes"),
        ("name: a\nb: " + "[" * 20 + "]" * 20, "line 2: it is nested deeper than 20"),
        ("name: " + "{a: " * 5000, "line 1: it is nested deeper than 20"),
        ("name: a\nb: " + "- " * 5000, "mine.yaml, line 2:"),
        ("name: a\n? [x]\n: 1\n", "line 2: a key should be a word"),
        ("name: a\n1: 2\n", "line 2: a key should be a word"),
        ("name: a\nnull: 2\n", "line 2: a key should be a word"),
        ("name: !!python/object/apply:os.system [ls]\n", "line 1: could not determine"),
        ("name: !mine x\n", "line 1: could not determine"),
        ("name: a\n---\nname: b\n", "line 2: but found another document"),
        ("name: 'a\n", "line 2: found unexpected end of stream"),
        ("name: a\n\tsample: 1\n", "mine.yaml, line 2:"),
        (b"name: \xff\n", "mine.yaml: it is not YAML text"),
        ("name: a\x1b[0m\n", "mine.yaml: it is not YAML text"),
        ("name: " + "1" * 5000, "mine.yaml: it is not YAML text"),
        ("- name\n", "mine.yaml: a recipe is a mapping"),
        ("", "mine.yaml: a recipe is a mapping"),
        ("# " + "x" * 1_000_000, "mine.yaml: it is larger than 1 MB"),
    ],
)
def test_what_has_no_business_in_a_recipe_is_refused(folder, text, said):
    assert said in problem(folder, text)


def test_an_alias_bomb_costs_nothing(folder):
    bomb = "a: &a [x]\n" + "".join(f"{new}: &{new} [{f'*{old},' * 9}]\n" for old, new in _steps())
    assert "line 1: anchors" in problem(folder, bomb)


def _steps():
    return zip("abcdefghi", "bcdefghij", strict=True)


def test_the_widest_recipe_allowed_is_read(folder):
    depth_20 = "name: a\nweights: " + "[" * 18 + "1" + "]" * 18
    assert "weights (mine.yaml, line 2): " in problem(folder, depth_20)
    assert read(folder, "name: a\n#" + "x" * 999_000).name == "a"


def test_an_unreadable_recipe_is_named(folder, monkeypatch):
    path = folder / "mine.yaml"
    path.write_text("name: a")
    monkeypatch.setattr(type(path), "open", lambda *_: (_ for _ in ()).throw(OSError(13, "")))
    with pytest.raises(CannotRead, match=r"mine.yaml: permission denied"):
        load(Tiny, "mine")


# --- extends -------------------------------------------------------------------------------------


def test_a_recipe_extends_another_key_by_key(folder):
    base = "name: base\nsample: {k: 3, words: w, sampling: {temperature: 0.5}}\nweights: {a: 1}\n"
    (folder / "base.yaml").write_text(base + "judges: [{kind: rules}, {kind: rules}]\n")
    (folder / "middle.yaml").write_text("extends: base\nsample: {sampling: {max_new_tokens: 8}}\n")
    judges = "judges:\n  - {kind: guard, model: m}\n"
    recipe = read(folder, "extends: ./middle.yaml\nname: mine\nweights: {b: 2}\n" + judges)
    assert recipe == Tiny(
        name="mine",
        sample=Sample(k=3, words="w", sampling=Sampling(temperature=0.5, max_new_tokens=8)),
        weights={"a": 1, "b": 2},
        judges=[Guard(kind="guard", model="m")],
    )
    assert read(folder, "extends: base\npair: {k: 1}\nsample:\n  k: 4").sample.k == 4
    said = problem(folder, "extends: base\nsample: {words: x}\nweights: {a: b}", "sample.k=0")
    assert "sample.k (override 'sample.k=0') is 0" in said
    assert "weights.a (mine.yaml, line 3) is 'b'" in said
    (folder / "base.yaml").write_text(base.replace("k: 3", "k: -3"))
    said = problem(folder, "extends: base\nsample: {words: x}")
    assert said.startswith("mine.yaml: sample.k (base.yaml, line 2) is -3; it should be greater")


def test_extends_in_a_circle_or_to_nowhere_is_refused(folder):
    (folder / "one.yaml").write_text("extends: two\n")
    (folder / "two.yaml").write_text("extends: one.yaml\n")
    said = problem(folder, "extends: one\n")
    assert "in a circle: mine.yaml -> one.yaml -> two.yaml -> one.yaml" in said
    assert "in a circle: mine.yaml -> mine.yaml" in problem(folder, "extends: mine\n")
    assert "line 2: extends should be the name" in problem(folder, "name: a\nextends: [one, two]\n")
    with pytest.raises(UnknownPlugin, match=r"no recipe 'tow'\. Did you mean 'two'"):
        read(folder, "extends: tow\n")
    with pytest.raises(MissingFile, match=r"none\.yaml"):
        read(folder, "extends: ./none.yaml\n")


# --- overrides -----------------------------------------------------------------------------------


def test_overrides_are_yaml_and_the_last_one_counts(folder):
    recipe = read(
        folder,
        "name: a\nsample: {k: 3}\npair:\n",
        "sample.k=1",
        "sample.sampling.temperature=1e-1",
        "sample.k=5",
        "judges=[{kind: rules, threshold: 0.1}]",
        "sample.words=a=b, c",
        "weights.new=2",
    )
    assert (recipe.sample.k, recipe.sample.sampling.temperature) == (5, 0.1)
    assert (recipe.sample.words, recipe.weights) == ("a=b, c", {"new": 2})
    assert recipe.judges == [Rules(kind="rules", threshold=0.1)]
    assert read(folder, "name: a", "pair=").pair is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sample.k", "override 'sample.k': an override looks like section.key=value"),
        ("=3", "an override looks like"),
        ("sample..k=3", "an override looks like"),
        ("sample.k=[", "override 'sample.k=[', line 1: "),
        ("weights.a=.inf", "line 1: .inf is not a finite number"),
        ("sample={k: 1, k: 2}", "key 'k' is there twice"),
        ("name.x=1", "override 'name.x=1': name is not a section; set name as a whole"),
        ("judges.0.kind=guard", "judges is not a section; set judges as a whole"),
        ("sample.q=1", "sample.q (override 'sample.q=1') is not a known key"),
        ("sample={k: 0}", "sample.k (override 'sample={k: 0}') is 0; it should be greater"),
    ],
)
def test_a_bad_override_is_named(folder, override, said):
    assert said in problem(folder, "name: a\nsample: {k: 1}\njudges: [{kind: rules}]", override)


# --- without a recipe ----------------------------------------------------------------------------


def test_a_tree_is_adjusted_from_defaults_of_a_caller():
    defaults = {"name": "a", "sample": {"k": 7}, "weights": {"a": 1.0}}
    made = adjust(Tiny, defaults, ["sample.words=x", "weights.b=2", "judges=[{kind: rules}]"])
    assert made == Tiny(
        name="a",
        sample=Sample(k=7, words="x"),
        weights={"a": 1.0, "b": 2.0},
        judges=[Rules(kind="rules")],
    )
    assert adjust(Tiny, defaults, ["weights={b: 2}"]).weights == {"b": 2.0}
    assert defaults == {"name": "a", "sample": {"k": 7}, "weights": {"a": 1.0}}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("smaple.k=1", "the settings: smaple is not a known key. Did you mean 'sample'?"),
        ("sample.q=1", "the settings: sample.q (override 'sample.q=1') is not a known key"),
        ("sample.k=0", "the settings: sample.k (override 'sample.k=0') is 0; it should be greater"),
        ("weights.a=nan", "the settings: weights.a (override 'weights.a=nan') is not finite"),
        ("sample", "override 'sample': an override looks like section.key=value"),
        ("name=", "the settings: name (override 'name=') is None; it should be a valid string"),
    ],
)
def test_what_is_wrong_with_an_adjustment_is_named(override, said):
    with pytest.raises(RecipeError) as caught:
        adjust(Tiny, {"name": "a"}, [override])
    assert str(caught.value).startswith(said)


def test_defaults_that_lack_a_key_are_named():
    with pytest.raises(RecipeError, match="the settings: name is required"):
        adjust(Tiny, {}, [])


def test_the_defaults_of_a_training_are_within_its_rules(monkeypatch):
    config = pytest.importorskip("selfmoa.config")
    made = adjust(config.Training, config.ONE_TRAINING, ["train.loss=dpo", "policy.lora_rank=8"])
    assert (made.train.loss, made.policy.lora_rank) == ("dpo", 8)
    assert made.policy.adapter == "lora"
    assert made.train.weights == {"preference": 1.0}
    assert set(config.ONE_TRAINING["train"]) <= set(config.Train.model_fields)
    assert set(config.ONE_TRAINING["policy"]) <= set(config.Policy.model_fields)


# --- sentences -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "name: a\nsmaple: {}",
            "smaple (mine.yaml, line 2) is not a known key. Did you mean 'sample'?",
        ),
        ("name: a\nqqqq: 1", "qqqq (mine.yaml, line 2) is not a known key"),
        (
            "name: a\nsample:\n  sampling:\n    temprature: 1",
            "temprature (mine.yaml, line 4) is not a known key. Did you mean 'temperature'?",
        ),
        (
            "name: a\npair: {wrods: x}",
            "pair.wrods (mine.yaml, line 2) is not a known key. Did you mean 'words'?",
        ),
        (
            "name: a\njudges:\n  - kind: rules\n    treshold: 1",
            "judges.0.treshold (mine.yaml, line 4) is not a known key. Did you mean 'threshold'?",
        ),
        ("name: a\njudges:\n  - kind: guard", "judges.0.model (mine.yaml, line 3) is required"),
        ("sample: {}", "name is required"),
        (
            "name: a\nsample:\n  k: 0",
            "sample.k (mine.yaml, line 3) is 0; it should be greater than or equal to 1",
        ),
        (
            "name: a\nsample:\n  k: many",
            "sample.k (mine.yaml, line 3) is 'many'; it should be a valid integer, unable to parse",
        ),
        ("name: a\nsample: 3", "sample (mine.yaml, line 2) is 3; it should be a valid dictionary"),
        ("name: a\nsample: {words: [1]}", "sample.words (mine.yaml, line 2): it should be a valid"),
        ("name: nobody", "mine.yaml: name and sample do not go together"),
        ('name: a\n"q\\e[1m": 1', "'q\\x1b[1m' (mine.yaml, line 2) is not a known key"),
        (f"name: a\nsample: {{k: {'x' * 500}}}", "'" + "x" * 75 + " ...; it should be"),
    ],
)
def test_a_problem_is_one_sentence_with_its_place(folder, text, said):
    sentence = problem(folder, text)
    assert said in sentence
    assert "\n" not in sentence


def test_all_problems_are_told_at_once(folder):
    assert problem(folder, "sample: {k: 0, wrods: x}\nnmae: a\n").splitlines() == [
        "mine.yaml: 4 problems",
        "  name is required",
        "  sample.k (mine.yaml, line 1) is 0; it should be greater than or equal to 1",
        "  sample.wrods (mine.yaml, line 1) is not a known key. Did you mean 'words'?",
        "  nmae (mine.yaml, line 2) is not a known key. Did you mean 'name'?",
    ]


# --- what is shipped -----------------------------------------------------------------------------


def test_every_shipped_recipe_loads_and_says_what_it_is_for(monkeypatch):
    config = pytest.importorskip("selfmoa.config")
    monkeypatch.undo()
    for name, description in shipped():
        assert isinstance(load_recipe(name), config.Recipe)
        assert description


def test_importing_is_cheap():
    heavy = "import sys, selfmoa.recipes; print({'pydantic', 'yaml', 'torch'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", heavy], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"
