"""`selfmoa init` and `selfmoa recipes`: a first recipe that loads, and what is shipped."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from selfmoa import cli
from selfmoa.errors import CannotWrite, MissingFile, OutputTaken, RecipeError
from selfmoa.loop import refuse_unworkable
from selfmoa.recipes import load_recipe, shipped
from selfmoa.recipes.rendering import schema
from selfmoa.recipes.starting import Answers, begin, nearest


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bad.jsonl", "good, or so.jsonl"):
        Path(name).write_text("{}\n")


def answers(model="Qwen/Qwen2.5-0.5B-Instruct", memory=16, **more):
    return Answers(model, memory, ("bad.jsonl",), ("good, or so.jsonl",), **more)


# --- which recipe --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "recipe", "billions"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m", 0.135),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "smollm2-1.7b", 1.7),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b", 0.5),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-1.5b", 7.0),
        ("Qwen/Qwen2.5-Coder-1.5B-Instruct", "qwen2.5-1.5b", 1.5),
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b", 0.6),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-1.7b", 4.0),
        ("meta-llama/Llama-3.2-3B-Instruct", "llama-3.2-3b", 3.0),
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "llama-3.2-1b", 1.0),
        ("google/gemma-3-1b-it", "gemma-3-1b", 1.0),
        ("google/gemma-3n-E2B-it", "chat-model", None),
        ("microsoft/Phi-4-mini-instruct", "phi-4-mini", 3.8),
        ("ibm-granite/granite-3.3-2b-instruct", "granite-3-2b", 2.0),
        ("models/my-llama-3.2-1b-tuned/", "llama-3.2-1b", 1.0),
        ("Qwen/Qwen3Guard-Gen-0.6B", "chat-model", 0.6),
        ("mistralai/Mistral-7B-Instruct-v0.3", "chat-model", 7.0),
        ("my-qwen3", "chat-model", None),
        ("meta-llama/Llama-3.1-8B-Instruct", "chat-model", 8.0),
    ],
)
def test_a_model_gets_the_recipe_of_its_family_and_nearest_size(model, recipe, billions):
    assert nearest(model) == (recipe, billions)


def test_every_model_of_a_recipe_gets_that_recipe():
    for name, _ in shipped():
        if model := load_recipe(name).model.name:
            assert nearest(model)[0] == name


# --- what is written -----------------------------------------------------------------------------


def test_the_recipe_says_what_was_answered_and_extends_a_shipped_one():
    told = begin(answers())
    assert told == {
        "recipe": "qwen2.5-0.5b-instruct.yaml",
        "extends": "qwen2.5-0.5b",
        "memory_gb": 16,
        "next": [f"selfmoa {c} qwen2.5-0.5b-instruct.yaml" for c in ("doctor", "plan", "run")],
    }
    recipe, base = load_recipe("qwen2.5-0.5b-instruct.yaml"), load_recipe("qwen2.5-0.5b")
    assert recipe.name == "qwen2.5-0.5b-instruct"
    assert recipe.model.name == "Qwen/Qwen2.5-0.5B-Instruct"
    assert (recipe.data.seeds, recipe.data.instructions) == (("bad.jsonl",), ("good, or so.jsonl",))
    assert (recipe.policy.max_tokens, recipe.sample.batch_size) == (4096, 32)
    for part in ("judges", "judge", "attackers", "train", "pair", "evaluate", "endpoints"):
        assert getattr(recipe, part) == getattr(base, part)
    refuse_unworkable(recipe)


def test_the_recipe_is_short_and_explains_what_it_sets():
    text = Path(begin(answers())["recipe"]).read_text()
    lines = text.splitlines()
    assert len(lines) < 45
    assert "selfmoa recipes show qwen2.5-0.5b" in text
    assert lines[lines.index("  max_tokens: 4096") - 1].startswith("  # Tokens, padding included")
    assert lines.index("extends: qwen2.5-0.5b") == 2


@pytest.mark.parametrize(
    ("model", "memory", "adapter", "inference", "grader"),
    [
        ("microsoft/Phi-4-mini-instruct", 8, "qlora", "nf4", "shieldgemma"),
        ("microsoft/Phi-4-mini-instruct", 16, "lora", "auto", "shieldgemma"),
        ("Qwen/Qwen3-1.7B", 8, "lora", "auto", "shieldgemma"),
        ("Qwen/Qwen3-1.7B", 24, "lora", "auto", "wildguard"),
        ("mistralai/Mistral-7B-Instruct-v0.3", 24, "qlora", "nf4", "wildguard"),
        ("my-own-model", 80, "lora", "auto", "wildguard"),
    ],
)
def test_memory_and_size_choose_how_weights_are_held_and_who_grades(
    model, memory, adapter, inference, grader
):
    recipe = load_recipe(begin(answers(model, memory), Path("mine.yaml"))["recipe"])
    assert (recipe.policy.adapter, recipe.policy.inference) == (adapter, inference)
    assert recipe.evaluate.judges["safety"] == grader
    refuse_unworkable(recipe)


def test_behind_an_endpoint_are_all_that_write_but_not_the_policy_or_classifiers():
    url = "http://127.0.0.1:8000/v1"
    recipe = load_recipe(begin(answers(memory=24, endpoint=url))["recipe"])
    assert recipe.endpoints["judges"].url == url
    served = {name for name, judge in recipe.judges.items() if judge.endpoint == "judges"}
    assert served == {"qwen3guard", "llamaguard", "granite-guardian", "rubric", "wildguard"}
    assert {a.endpoint for a in recipe.attackers.values()} == {"judges"}
    assert recipe.model.endpoint is None
    refuse_unworkable(recipe)


@pytest.mark.parametrize(
    "model", ["Wörter & Co", "../..", "x" * 200, "'quoted': #1", "a: b", "a\x07b", "\udcff"]
)
def test_odd_names_make_a_recipe_that_loads(model):
    assert load_recipe(begin(answers(model), Path("odd.yaml"))["recipe"]).model.name == model


def test_a_name_that_is_no_path_is_still_taken_for_one():
    told = begin(answers(), Path("sandbox"))
    assert told["next"][2] == "selfmoa run ./sandbox"
    assert load_recipe("./sandbox").model.name == "Qwen/Qwen2.5-0.5B-Instruct"


def test_nothing_is_written_over():
    Path("mine.yaml").write_text("precious\n")
    with pytest.raises(OutputTaken, match=r"mine\.yaml is there already; give --out"):
        begin(answers(), Path("mine.yaml"))
    assert Path("mine.yaml").read_text() == "precious\n"


def test_what_cannot_be_done_leaves_no_file():
    before = sorted(Path().iterdir())
    with pytest.raises(MissingFile, match=r"file of data 'gone\.jsonl' does not exist"):
        begin(Answers("m", 16, ("bad.jsonl",), ("gone.jsonl",)))
    with pytest.raises(RecipeError, match="4 GB is less than the 8 GB"):
        begin(answers(memory=4))
    with pytest.raises(CannotWrite, match=r"no/where\.yaml"):
        begin(answers(), Path("no/where.yaml"))
    assert sorted(Path().iterdir()) == before


# --- the commands --------------------------------------------------------------------------------


def at_a_terminal(monkeypatch, text):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(text))


GIVEN = ["--model", "Qwen/Qwen3-0.6B", "--memory", "16", "--seeds", "bad.jsonl"]


def test_options_answer_everything(capsys):
    assert cli.main(["init", *GIVEN, "--instructions", "good, or so.jsonl"]) == 0
    out, err = capsys.readouterr()
    assert out == (
        "Recipe: qwen3-0.6b.yaml (extends qwen3-0.6b). Next:\n  selfmoa doctor qwen3-0.6b.yaml\n"
        "  selfmoa plan qwen3-0.6b.yaml\n  selfmoa run qwen3-0.6b.yaml\n"
    )
    assert err == ""
    assert load_recipe("qwen3-0.6b.yaml").data.instructions == ("good, or so.jsonl",)
    assert cli.main(["init", *GIVEN, "--instructions", "good, or so.jsonl"]) == 4
    assert "is there already" in capsys.readouterr().err


def test_three_questions_are_asked_and_the_answers_used(monkeypatch, capsys):
    at_a_terminal(monkeypatch, "google/gemma-3-1b-it\nmuch\n24\nbad.jsonl, good, or so.jsonl\n")
    assert cli.main(["init", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["extends"] == "gemma-3-1b"  # questions do not stand among results
    assert err.count("Memory of the accelerator") == 2  # "much" is no number
    recipe = load_recipe("gemma-3-1b-it.yaml")
    assert (recipe.data.seeds, recipe.data.instructions) == (("bad.jsonl",), ("good, or so.jsonl",))
    assert recipe.sample.batch_size == 64


@pytest.mark.parametrize(
    ("given", "said"),
    [(0, "give --model"), (2, "give --memory"), (4, "give --seeds and --instructions")],
)
def test_without_a_terminal_what_is_missing_is_named(monkeypatch, capsys, given, said):
    monkeypatch.setattr(sys, "stdin", io.StringIO("never read\n"))
    assert cli.main(["init", *GIVEN[:given]]) == 2
    assert said in capsys.readouterr().err


def test_recipes_are_listed_shown_and_described(capsys):
    assert cli.main(["recipes", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == dict(shipped())
    assert cli.main(["recipes", "list"]) == 0
    assert "\nqwen3-0.6b  " in capsys.readouterr().out
    assert cli.main(["recipes", "show", "qwen3-0.6b", "train.beta=0.25"]) == 0
    text = capsys.readouterr().out
    Path("shown.yaml").write_text(text)
    assert load_recipe("shown.yaml") == load_recipe("qwen3-0.6b", ["train.beta=0.25"])
    assert cli.main(["recipes", "show", "qwen3-0.6b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "Qwen/Qwen3-0.6B"
    assert cli.main(["recipes", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()
    assert cli.main(["recipes", "show", "qwen3-06b"]) == 8
    assert "Did you mean 'qwen3-0.6b'?" in capsys.readouterr().err


def test_a_recipe_without_data_is_refused_by_a_run_in_one_sentence(capsys):
    assert cli.main(["run", "qwen3-0.6b"]) == 3
    err = capsys.readouterr().err
    assert "it needs data.seeds, data.instructions" in err
    assert "selfmoa init" in err
    assert not Path("runs/qwen3-0.6b").exists()


def test_writing_a_recipe_loads_no_model_library():
    code = (
        "import sys; from selfmoa.cli import main; main(['init', '--model', 'm-1b', '--memory', "
        "'8', '--seeds', 'bad.jsonl', '--instructions', 'bad.jsonl']); "
        "print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n"), done.stdout
