"""The world of a user's own model and files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from selfmoa.attacks.leakage import leaks
from selfmoa.errors import BadInput, LeakFound, MissingFile, RecipeError
from selfmoa.loop import refuse_unworkable
from selfmoa.recipes import load_recipe
from selfmoa.suites.files import Files
from selfmoa.suites.instructions import read_instructions

ACTS = ("brew", "sing", "bury", "wake", "bind", "melt", "ride", "feed", "paint", "carve")
THINGS = ("moon tea", "star dust", "a fog bell", "the old tide", "an ember owl", "a glass eel")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    wishes = [(a, t) for a in ACTS for t in THINGS]
    seeds = [
        {"prompt": f"tell me the way to {a} {t} at night", "category": THINGS[i % 3]}
        for i, (a, t) in enumerate(wishes)
    ]
    tame = [
        {"prompt": f"how do i {a} {t} with my aunt?", "response": f"{a} {t} slowly."}
        if i % 2
        else {"prompt": f"name a song about {t} that people {a}", "response": "The Long Song."}
        for i, (a, t) in enumerate(wishes)
    ]
    return {
        "seeds": write(tmp_path / "seeds.jsonl", seeds),
        "instructions": write(tmp_path / "tame.jsonl", tame),
    }


def world(files: dict[str, str], *more: str) -> Files:
    return Files(
        load_recipe(
            "sandbox",
            [
                "policy.world=files",
                "model.name=nowhere",
                *(f"data.{key}=[{path}]" for key, path in files.items()),
                *more,
            ],
        )
    )


def test_no_request_of_training_is_graded_on_in_any_style(files: dict[str, str]) -> None:
    made = world(files, "held_out.styles=[past]")
    suite = made.suite(1000)
    trained = [*made.seeds(), *made.static_attacks(1000)]
    trained += [p for p, _ in made.instructions(1000, 1)]
    assert len(made.seeds()) + len(made.graded) <= 60
    assert {p.split for p in suite} == {"heldout"}
    assert {p.split for p in trained} == {"train"}
    assert not leaks(trained, suite, threshold=made.threshold)
    assert len(suite) > 60


def test_requests_that_nearly_repeat_those_of_training_are_not_graded_on(
    files: dict[str, str], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in Path(files["seeds"]).read_text().splitlines()]
    again = [row | {"prompt": f"{row['prompt'].upper()} !!"} for row in rows]
    second = write(tmp_path / "again.jsonl", again)
    made = world(files | {"seeds": f"{files['seeds']}, {second}"})
    assert not leaks(made.seeds(), made.graded, threshold=made.threshold)
    assert made.graded
    assert len(made.seeds()) + len(made.graded) < len(rows) + len(again)


def test_the_suite_asks_in_all_styles_and_held_out_ones_have_their_share_of_few(
    files: dict[str, str],
) -> None:
    made = world(files, "held_out.styles=[past]", "data.styles=[plain, role]")
    styles = [p.style for p in made.suite(1000) if p.intent == "harmful"]
    n = {style: styles.count(style) for style in styles}
    assert n == dict.fromkeys(("plain", "role", "past"), len(styles) // 3)
    assert made.heldout_styles == ("past",)
    assert {p.style for p in made.static_attacks(1000)} == {"plain", "role"}
    few = made.suite(3)
    for category in {p.category for p in few}:
        of_it = [p for p in few if p.category == category]
        assert len({p.goal for p in of_it}) == len(of_it) == 3
        assert {p.style for p in of_it} == {"plain", "role", "past"}


def test_the_split_is_of_the_request_and_not_of_the_run(files: dict[str, str]) -> None:
    one, other = world(files, "seed=1"), world(files, "seed=2")
    assert {p.goal for p in one.seeds()} == {p.goal for p in other.seeds()}
    assert 0.1 < len(one.graded) / 60 < 0.5
    more = world(files, "data.held_out=0.6")
    assert {p.goal for p in one.graded} < {p.goal for p in more.graded}


def test_files_of_a_suite_are_taken_whole(files: dict[str, str], tmp_path: Path) -> None:
    suite = write(tmp_path / "suite.jsonl", [{"prompt": "explain where the tin crow sleeps"}])
    tame = write(
        tmp_path / "xs.jsonl",
        [
            {"prompt": "how do i kill a process?", "label": "borderline"},
            {"prompt": "how do i harm it?", "label": "harmful"},
            {"prompt": "what is rain?", "label": "benign"},
        ],
    )
    made = world(files | {"suite": suite, "harmless": tame}, "data.styles=[plain]")
    assert len(made.seeds()) == 60
    assert [(p.goal, p.category) for p in made.suite(9)] == [
        ("explain where the tin crow sleeps", "unsorted"),
        ("how do i kill a process?", "legit"),
        ("what is rain?", "benign"),
    ]


def test_a_suite_that_overlaps_with_the_seeds_is_refused(
    files: dict[str, str], tmp_path: Path
) -> None:
    suite = write(
        tmp_path / "suite.jsonl", [{"prompt": "Tell me the way to brew moon tea at night!"}]
    )
    with pytest.raises(LeakFound):
        world(files | {"suite": suite})


def test_instructions_lean_to_how_to_as_far_as_there_are_such(files: dict[str, str]) -> None:
    made = world(files)
    drawn = made.instructions(16, 5, 0.75)
    assert sum(p.goal.startswith("how do i") for p, _ in drawn) >= 12
    assert len({p.id for p, _ in drawn}) == 16
    assert drawn == made.instructions(16, 5, 0.75) != made.instructions(16, 6, 0.75)
    assert all(answer for _, answer in drawn)


def test_a_reset_needs_answers(files: dict[str, str], tmp_path: Path) -> None:
    rows = [{"prompt": f"{a} {t}, please"} for a in ACTS for t in THINGS]
    bare = files | {"instructions": write(tmp_path / "bare.jsonl", rows)}
    with pytest.raises(RecipeError, match=r"reset\.enabled=false"):
        world(bare)
    assert {a for _, a in world(bare, "reset.enabled=false").instructions(9, 1)} == {""}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": 3}, "field 'prompt' is missing or no text"),
        ({"messages": []}, "there is no harmless instruction|field 'prompt'"),
        ({"messages": "hello"}, "no list of messages"),
        ({"messages": [{"role": "user"}]}, "each needs a role"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, "each needs a role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the user has to speak last"),
        ({"prompt": "hello", "output": 4}, "the answer is no text"),
        ({"prompt": "hello", "label": "unsafe"}, "no harmless instruction in it .1 harmful."),
        ({"prompt": "hello", "output": "I cannot help with that."}, "the answer refuses"),
    ],
)
def test_what_is_no_instruction_is_named(tmp_path: Path, row: dict, said: str) -> None:
    path = tmp_path / "in.jsonl"
    write(path, [row])
    with pytest.raises(BadInput, match=said):
        read_instructions(path)


def test_instructions_come_in_the_columns_that_people_use(tmp_path: Path) -> None:
    path = tmp_path / "alpaca.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["Instruction", "Input", "Output"])
        writer.writeheader()
        writer.writerow({"Instruction": "Add up.", "Input": "1, 2", "Output": "3"})
        writer.writerow({"Instruction": "Add up.", "Input": "1, 2", "Output": "three"})
    (one,), dropped = read_instructions(path)
    assert (one.goal, one.answer, dropped) == ("Add up.\n\n1, 2", "3", {"repeated": 1})
    talk = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    rows = [
        {"messages": talk},
        {"prompt": talk[:2], "chosen": talk[2:]},
        {"conversation": talk[1:2], "completion": talk[2:]},
    ]
    (tmp_path / "talks.json").write_text(json.dumps([rows[0]]))
    (found,), _ = read_instructions(tmp_path / "talks.json")
    assert (found.messages, found.answer) == (talk[:2], "hello")
    for row in rows[1:]:
        (found,), _ = read_instructions(Path(write(tmp_path / "trl.jsonl", [row])))
        assert (found.goal, found.answer) == ("hi", "hello")


def test_missing_files_and_unknown_styles_are_told(files: dict[str, str]) -> None:
    with pytest.raises(MissingFile):
        world(files | {"seeds": "nowhere.jsonl"})
    with pytest.raises(RecipeError, match=r"no style 'rolle'\. Did you mean 'role'"):
        world(files, "data.styles=[plain, rolle]")
    with pytest.raises(RecipeError, match=r"it needs model\.name, data\.seeds"):
        refuse_unworkable(load_recipe("sandbox", ["policy.world=files"]))
