"""Preference files of every TRL format are read alike; a bad row is named: file, row and field."""

from __future__ import annotations

import builtins
import json
import math
import subprocess
import sys

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from selfmoa.errors import BadInput, CannotRead, MissingExtra, MissingFile
from selfmoa.records import PreferencePair
from selfmoa.rundir.files import write_jsonl
from selfmoa.training.preferences import Preference, from_pairs, read_preferences

OBJECTIVES = ("safety", "helpfulness")
ASK = [{"role": "user", "content": "why ?"}]
YES, NO = ({"role": "assistant", "content": text} for text in ("yes .", "no ."))
TALK = {"prompt": ASK, "chosen": [YES], "rejected": [NO]}
TEXT = {"prompt": "why ?", "chosen": " yes .", "rejected": " no ."}
FIELDS = ("id", "prompt", "chosen", "rejected", "objective", "margins", "flip_probability")


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def read(tmp_path):
    """Return what writes rows to a file and reads them as preferences."""

    def read(*rows, objectives=OBJECTIVES):
        return read_preferences(lines(tmp_path / "pairs.jsonl", *rows), objectives)

    return read


def sides(preference):
    return preference.prompt, preference.chosen, preference.rejected


# --- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (TALK, ASK),
        ({"chosen": [*ASK, YES], "rejected": [*ASK, NO]}, ASK),
        ({"prompt": None, "chosen": [*ASK, YES], "rejected": [*ASK, NO]}, ASK),
        ({**TALK, "prompt": [*ASK, NO, *ASK]}, [*ASK, NO, *ASK]),
        ({"chosen": [*ASK, YES, *ASK, YES], "rejected": [*ASK, YES, *ASK, NO]}, [*ASK, YES, *ASK]),
        (
            {**TALK, "prompt": [{"role": "system", "content": ""}, *ASK]},
            [{"role": "system", "content": ""}, *ASK],
        ),
        ({**TALK, "prompt": [{**ASK[0], "name": "ann", "tool_calls": None}]}, ASK),
    ],
)
def test_every_conversational_format_comes_to_the_same(read, row, prompt):
    (found,) = read(row)
    assert sides(found) == (prompt, "yes .", "no .")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (TEXT, ("why ?", " yes .", " no .")),
        ({"chosen": "why ? yes .", "rejected": "why ? no ."}, ("why ?", " yes .", " no .")),
        ({"chosen": "why?\nyes", "rejected": "why?\nno"}, ("why?\n", "yes", "no")),
        ({"chosen": "why so", "rejected": "why soft"}, ("why s", "o", "oft")),
        ({"chosen": "why  a", "rejected": "why  b"}, ("why ", " a", " b")),
    ],
)
def test_every_standard_format_comes_to_the_same(read, row, expected):
    (found,) = read(row)
    assert sides(found) == expected


@pytest.mark.slow  # TRL takes seconds to import
@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    prompt=st.text("ab  \n", min_size=2), chosen=st.text("ab ", min_size=1), rejected=st.text("ab ")
)
def test_an_implicit_prompt_is_cut_where_trl_cuts_it(tmp_path, prompt, chosen, rejected):
    data_utils = pytest.importorskip("trl.data_utils")
    row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    theirs = data_utils.extract_prompt(row)
    try:
        (found,) = read_preferences(lines(tmp_path / "cut.jsonl", row), OBJECTIVES)
    except BadInput:
        assert not all(text.strip() for text in theirs.values()) or chosen == rejected
        return
    ours = dict(zip(("prompt", "chosen", "rejected"), sides(found), strict=True))
    assert ours["prompt"] + ours["chosen"] == row["chosen"]
    assert ours["prompt"] + ours["rejected"] == row["rejected"]
    short, long = sorted(row.values(), key=len)
    if not long.startswith(short):  # TRL forgets the blank where one side ends
        assert ours == theirs


def test_a_list_lines_and_parquet_give_the_same_rows(tmp_path):
    rows = [
        {**TALK, "id": "a", "objective": "helpfulness", "margins": {"safety": 1.5}, "x": [1]},
        {**TALK, "id": "b", "margins": {"helpfulness": -2.0}, "flip_probability": 0.25, "x": []},
        {**TALK, "id": "c", "chosen_safe": True, "rejected_safe": False, "x": None},
    ]
    first = read_preferences(lines(tmp_path / "a.jsonl", *rows), OBJECTIVES)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "B.JSON").write_text(json.dumps(rows))
    named = dict.fromkeys([*FIELDS, "chosen_safe", "rejected_safe", "x"])
    table = pa.Table.from_pylist([{**named, **row} for row in rows])
    parquet.write_table(table, tmp_path / "c.parquet")
    lines(tmp_path / "d.json", *rows)
    lines(tmp_path / "e.ndjson", *rows)
    for name in ("b.json", "B.JSON", "c.parquet", "d.json", "e.ndjson"):
        assert read_preferences(tmp_path / name, OBJECTIVES) == first, name
    assert first == [
        Preference("a", ASK, "yes .", "no .", "helpfulness", {"safety": 1.5}, 0.0, None),
        Preference("b", ASK, "yes .", "no .", "safety", {"helpfulness": -2.0}, 0.25, None),
        Preference("c", ASK, "yes .", "no .", "safety", {}, 0.0, (1.0, 0.0)),
    ]


def test_parquet_of_plain_texts_is_read(tmp_path):
    parquet.write_table(
        pa.Table.from_pylist([TEXT, {**TEXT, "prompt": "who ?"}]), tmp_path / "p.parquet"
    )
    found = read_preferences(tmp_path / "p.parquet", OBJECTIVES)
    assert [sides(each) for each in found] == [
        ("why ?", " yes .", " no ."),
        ("who ?", " yes .", " no ."),
    ]


def test_empty_lines_a_mark_of_byte_order_and_windows_ends_are_no_rows(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TALK).encode() + b"\r\n\r\n  \n")
    assert len(read_preferences(path, OBJECTIVES)) == 1


def test_columns_nobody_asked_for_are_ignored_even_with_nan(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({**TEXT, "score": math.nan, "margin": "wide", "truncated": False}))
    assert read_preferences(path, OBJECTIVES)[0].margins == {}


# --- what rows say beside the texts --------------------------------------------------------------


def test_a_row_that_says_nothing_is_of_the_first_objective_with_a_weight(read):
    (found,) = read(TALK)
    assert (found.objective, found.margins, found.flip_probability) == ("safety", {}, 0.0)
    assert found.safety is None
    (found,) = read(TALK, objectives={"safety": 0.0, "helpfulness": 1.0})
    assert found.objective == "helpfulness"


def test_an_objective_without_weight_may_have_margins_but_not_order_a_row(read):
    weights = {"safety": 0.0, "helpfulness": 1.0}
    (found,) = read({**TALK, "margins": {"safety": 1}}, objectives=weights)
    assert found.margins == {"safety": 1.0}
    with pytest.raises(BadInput, match="field 'objective' is 'safety', which has no weight"):
        read({**TALK, "objective": "safety"}, objectives=weights)


def test_a_margin_of_the_rows_own_objective_is_kept(read):
    (found,) = read({**TALK, "margins": {"safety": 6.0, "helpfulness": 0.5}})
    assert found.margins == {"safety": 6.0, "helpfulness": 0.5}


def test_ids_are_those_of_the_file_or_of_the_content(read):
    a, b, c, d = read(
        {**TALK, "id": "mine"}, {**TALK, "id": 7}, TALK, {**TALK, "objective": "helpfulness"}
    )
    assert (a.id, b.id) == ("mine", "7")
    assert c.id != d.id
    assert read({"chosen": [*ASK, YES], "rejected": [*ASK, NO]})[0].id == c.id
    assert len(c.id) == 16


def test_rows_that_are_there_twice_without_an_id_get_two(read):
    found = read(TALK, TALK, TEXT, TALK)
    assert len({each.id for each in found}) == 4
    assert [each.id for each in read(TALK, TALK, TEXT, TALK)] == [each.id for each in found]
    assert found[0].id == read(TALK)[0].id


def test_the_loops_own_pairs_are_the_same_from_memory_and_from_their_file(tmp_path):
    pairs = [
        PreferencePair(
            f"pair{i}", "p", ASK, [YES], [NO], objective, {"safety": 1.0, "helpfulness": 2.0},
            0.125, "r1", "r2",
        )
        for i, objective in enumerate(OBJECTIVES)
    ]  # fmt: skip
    ours = from_pairs(pairs)
    assert [each.safety for each in ours] == [(1.0, 0.0), (1.0, 1.0)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    read = read_preferences(tmp_path / "pairs.jsonl", OBJECTIVES)
    for mine, theirs in zip(ours, read, strict=True):
        assert sides(mine) == sides(theirs) == (ASK, "yes .", "no .")
        for name in ("id", "objective", "margins", "flip_probability"):
            assert getattr(mine, name) == getattr(theirs, name)


# --- bad rows ------------------------------------------------------------------------------------

HALF = "half \ud83d"
BAD = [
    # columns
    ({}, "chosen"),
    ({"prompt": "why ?"}, "chosen"),
    ({"prompt": "why ?", "chosen": "a"}, "rejected"),
    ({"prompt": "why ?", "rejected": "a"}, "chosen"),
    ({**TEXT, "chosen": None}, "chosen"),
    ({**TALK, "rejected": None}, "rejected"),
    # kinds
    ({**TEXT, "prompt": 3}, "prompt"),
    ({**TEXT, "prompt": {"role": "user", "content": "x"}}, "prompt"),
    ({"chosen": 1, "rejected": 2}, "chosen"),
    ({"chosen": True, "rejected": "x"}, "chosen"),
    ({**TEXT, "chosen": 1}, "chosen"),
    ({**TEXT, "rejected": [NO]}, "rejected"),
    ({**TALK, "prompt": "why ?"}, "chosen"),
    ({**TALK, "chosen": "yes ."}, "chosen"),
    ({**TALK, "rejected": "no ."}, "rejected"),
    ({**TALK, "rejected": NO}, "rejected"),
    ({**TEXT, "prompt": math.nan}, "prompt"),
    # texts
    ({**TEXT, "prompt": ""}, "prompt"),
    ({**TEXT, "prompt": " \n"}, "prompt"),
    ({**TEXT, "chosen": ""}, "chosen"),
    ({**TEXT, "chosen": " \t\n\u3000"}, "chosen"),
    ({**TEXT, "rejected": "  "}, "rejected"),
    ({**TEXT, "rejected": TEXT["chosen"]}, "rejected"),
    ({**TEXT, "prompt": HALF}, "prompt"),
    ({**TEXT, "chosen": HALF}, "chosen"),
    ({**TEXT, "rejected": HALF}, "rejected"),
    ({"chosen": "same", "rejected": "same"}, "rejected"),
    ({"chosen": "", "rejected": "same"}, "chosen"),
    ({"chosen": "same", "rejected": " "}, "rejected"),
    ({"chosen": "yes", "rejected": "no"}, "prompt"),
    ({"chosen": " yes", "rejected": " no"}, "prompt"),
    ({"chosen": "why ?  ", "rejected": "why ? yes"}, "chosen"),
    # conversations
    ({**TALK, "prompt": []}, "prompt"),
    ({**TALK, "chosen": []}, "chosen"),
    ({**TALK, "rejected": []}, "rejected"),
    ({**TALK, "prompt": ["why ?"]}, "prompt"),
    ({**TALK, "prompt": [{"content": "why ?"}]}, "prompt"),
    ({**TALK, "prompt": [{"role": "user"}]}, "prompt"),
    ({**TALK, "prompt": [{"role": "user", "content": None}]}, "prompt"),
    ({**TALK, "prompt": [{"role": "user", "content": ["why ?"]}]}, "prompt"),
    ({**TALK, "prompt": [{"role": "human", "content": "why ?"}]}, "prompt"),
    ({**TALK, "prompt": [{"role": "human", "content": "why ?"}, *ASK]}, "prompt"),
    ({**TALK, "prompt": [{"role": ["user"], "content": "why ?"}]}, "prompt"),
    ({**TALK, "prompt": [{"role": "user", "content": HALF}]}, "prompt"),
    ({**TALK, "prompt": [{"role": "user", "content": " "}]}, "prompt"),
    ({**TALK, "prompt": [*ASK, YES]}, "prompt"),
    ({**TALK, "prompt": [{"role": "system", "content": "be good"}]}, "prompt"),
    ({**TALK, "prompt": [*ASK, {"role": "tool", "content": "3"}]}, "prompt"),
    ({**TALK, "chosen": ASK}, "chosen"),
    ({**TALK, "rejected": ASK}, "rejected"),
    ({**TALK, "chosen": [*ASK, YES]}, "chosen"),
    ({**TALK, "rejected": [NO, *ASK, NO]}, "rejected"),
    ({**TALK, "chosen": [{**YES, "content": ""}]}, "chosen"),
    ({**TALK, "rejected": [{**NO, "content": "\n"}]}, "rejected"),
    ({**TALK, "rejected": [YES]}, "rejected"),
    ({"chosen": [YES], "rejected": [NO]}, "prompt"),
    ({"chosen": [*ASK, YES], "rejected": [*ASK, YES]}, "rejected"),
    ({"chosen": [*ASK, YES], "rejected": ASK}, "rejected"),
    ({"chosen": ASK, "rejected": [*ASK, NO]}, "chosen"),
    ({"chosen": [*ASK, YES, *ASK, YES], "rejected": [*ASK, NO, *ASK, NO]}, "chosen"),
    ({"chosen": [*ASK, YES, YES], "rejected": [*ASK, YES, NO]}, "prompt"),
    # objectives and margins
    ({**TALK, "objective": "honesty"}, "objective"),
    ({**TALK, "objective": ""}, "objective"),
    ({**TALK, "objective": 1}, "objective"),
    ({**TALK, "objective": ["safety"]}, "objective"),
    ({**TALK, "margins": 1.0}, "margins"),
    ({**TALK, "margins": [1.0]}, "margins"),
    ({**TALK, "margins": {"honesty": 1.0}}, "margins"),
    ({**TALK, "margins": {"helpfulness": 1.0, "honesty": 1.0}}, "margins"),
    ({**TALK, "margins": {"safety": 1.0}}, "margins"),
    ({**TALK, "margins": {"safety": 1.0, "helpfulness": None}}, "margins"),
    ({**TALK, "objective": "helpfulness", "margins": {"helpfulness": 1.0}}, "margins"),
    ({**TALK, "margins": {"helpfulness": math.nan}}, "margins.helpfulness"),
    ({**TALK, "margins": {"helpfulness": -math.inf}}, "margins.helpfulness"),
    ({**TALK, "margins": {"helpfulness": "1"}}, "margins.helpfulness"),
    ({**TALK, "margins": {"helpfulness": True}}, "margins.helpfulness"),
    ({**TALK, "margins": {"helpfulness": 10**400}}, "margins.helpfulness"),
    # numbers and names
    ({**TALK, "flip_probability": 1.0}, "flip_probability"),
    ({**TALK, "flip_probability": -0.001}, "flip_probability"),
    ({**TALK, "flip_probability": math.nan}, "flip_probability"),
    ({**TALK, "flip_probability": "0.1"}, "flip_probability"),
    ({**TALK, "flip_probability": False}, "flip_probability"),
    ({**TALK, "chosen_safe": 1, "rejected_safe": 0}, "chosen_safe"),
    ({**TALK, "chosen_safe": True, "rejected_safe": "no"}, "rejected_safe"),
    ({**TALK, "chosen_safe": True}, "rejected_safe"),
    ({**TALK, "rejected_safe": False}, "chosen_safe"),
    ({**TALK, "id": ""}, "id"),
    ({**TALK, "id": 1.5}, "id"),
    ({**TALK, "id": True}, "id"),
    ({**TALK, "id": ["a"]}, "id"),
    ({**TALK, "id": HALF}, "id"),
    ({**TALK, "id": "good"}, "id"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "field"), BAD)
def test_a_bad_row_is_refused_with_its_file_row_and_field(tmp_path, row, field):
    path = lines(tmp_path / "pairs.jsonl", {**TALK, "id": "good"}, row, {})
    with pytest.raises(BadInput) as caught:
        read_preferences(path, OBJECTIVES)
    assert str(caught.value).startswith(f"{path}, row 2: field '{field}' ")
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # a terminal can show it


@pytest.mark.parametrize(
    ("name", "data", "row", "said"),
    [
        ("a.jsonl", b"", 1, "there is none"),
        ("a.jsonl", b"\n \n", 1, "there is none"),
        ("a.json", b"[]", 1, "there is none"),
        ("a.jsonl", b"not json", 1, "not JSON"),
        ("a.csv", b"prompt,chosen,rejected\n", 1, "not JSON"),
        ("a.jsonl", b"[1]\n", 1, "not a JSON object"),
        ("a.jsonl", b"null\n", 1, "not a JSON object"),
        ("a.json", b'[{"prompt": ', 1, "not JSON"),
        ("a.json", b"[1]", 1, "not a JSON object"),
        ("a.json", json.dumps([TALK, "x"]).encode(), 2, "not a JSON object"),
        ("a.json", json.dumps([TALK, {**TALK, "chosen": []}]).encode(), 2, "field 'chosen'"),
        ("a.jsonl", json.dumps(TALK).encode() + b"\n\n\xff\n", 3, "not UTF-8 text (byte 1)"),
        ("a.jsonl", json.dumps(TALK).encode("utf-16"), 1, "not UTF-8 text"),
        ("a.json", b'["\xe9"]', 1, "not UTF-8 text (byte 3)"),
        ("a.jsonl", b'{"chosen": "a\n', 1, "not JSON"),
        ("a.jsonl", b'{"chosen":' * 100_000, 1, "not JSON"),
        ("a.jsonl", b'{"id": ' + b"9" * 5000 + b"}", 1, "not JSON"),
        ("a.parquet", b"", 1, "not Parquet"),
        ("a.parquet", b"PAR1 and more PAR1", 1, "not Parquet"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_row(tmp_path, name, data, row, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInput) as caught:
        read_preferences(tmp_path / name, OBJECTIVES)
    assert str(caught.value).startswith(f"{tmp_path / name}, row {row}: ")
    assert said in str(caught.value)


def test_parquet_rows_are_judged_like_others(tmp_path):
    rows = [TEXT, {**TEXT, "rejected": TEXT["chosen"]}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    with pytest.raises(BadInput, match="row 2: field 'rejected' is the same"):
        read_preferences(tmp_path / "p.parquet", OBJECTIVES)
    parquet.write_table(pa.table({"prompt": ["why ?"], "text": ["yes ."]}), tmp_path / "p.parquet")
    with pytest.raises(BadInput, match="row 1: field 'chosen' is missing"):
        read_preferences(tmp_path / "p.parquet", OBJECTIVES)


def test_an_id_that_is_there_twice_names_both_rows(read):
    with pytest.raises(BadInput, match="row 3: field 'id' is '1', as in row 1"):
        read({**TALK, "id": "1"}, {**TALK, "id": "2"}, {**TALK, "id": 1})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**TEXT, "prompt": 3}, "'prompt' should be text or a list of messages"),
        ({"chosen": 1, "rejected": 2}, "'chosen' should be text or a list of messages"),
        ({**TALK, "prompt": "why ?"}, "'chosen' should be text, like 'prompt'"),
        ({**TALK, "rejected": "no ."}, "'rejected' should be a list of messages, like 'prompt'"),
        ({**TALK, "chosen": [*ASK, YES]}, "one assistant message after the prompt, but it is 2"),
        ({**TALK, "prompt": [*ASK, YES]}, "the user's turn, but its last role is 'assistant'"),
        ({**TALK, "flip_probability": 1}, "is 1, it should be at least 0 and below 1"),
    ],
)
def test_a_refusal_says_what_was_expected(read, row, said):
    with pytest.raises(BadInput) as caught:
        read(row)
    assert said in str(caught.value)


def test_a_mistyped_objective_gets_a_suggestion(read):
    with pytest.raises(BadInput, match=r"Did you mean 'helpfulness'\? Known: safety, helpfulness"):
        read({**TALK, "margins": {"helpfullness": 1.0}})


def test_files_that_cannot_be_read_say_so(tmp_path):
    with pytest.raises(MissingFile, match="preference file"):
        read_preferences(tmp_path / "none.jsonl", OBJECTIVES)
    with pytest.raises(CannotRead, match="it is a folder"):
        read_preferences(tmp_path, OBJECTIVES)


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.Table.from_pylist([TEXT]), path)
    real = builtins.__import__

    def refuse(name, *rest):
        if name.partition(".")[0] == "pyarrow":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtra, match=r"pip install 'selfmoa\[parquet\]'"):
        read_preferences(path, OBJECTIVES)


def test_reading_loads_neither_torch_nor_pyarrow(tmp_path):
    path = lines(tmp_path / "pairs.jsonl", TALK)
    code = (
        "import sys; from selfmoa.training.preferences import read_preferences as read; "
        f"read({str(path)!r}, ['safety']); "
        "assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- any bytes at all ----------------------------------------------------------------------------

SCRAPS = st.sampled_from(
    [
        *(json.dumps(row).encode() for row, _ in BAD[:70:3]),
        *(b"\n", b"[", b"]", b",", b"{", b"}", b'"', b"\xff", b"\\ud800", b"\xef\xbb\xbf", b"\x00"),
        *(json.dumps(row).encode() + b"\n" for row in (TALK, TEXT)),
        *(b"NaN", b"1e999", b'{"chosen": ', b'"rejected"', b"null", b"PAR1"),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text()
    | st.sampled_from(["user", "assistant", "safety", "why ?", *ASK, YES]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text() | st.sampled_from(["role", "content"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def read_or_refuse(path):
    try:
        found = read_preferences(path, OBJECTIVES)
    except BadInput:
        return
    assert found
    assert len({each.id for each in found}) == len(found)
    for each in found:
        assert each.chosen.strip()
        assert each.rejected.strip()
        assert each.chosen != each.rejected
        assert 0 <= each.flip_probability < 1
        assert set(each.margins) <= set(OBJECTIVES)
        assert all(map(math.isfinite, each.margins.values()))


@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    data=st.binary() | st.lists(SCRAPS | st.binary(max_size=4), max_size=6).map(b"".join),
    suffix=st.sampled_from(["jsonl", "json", "parquet", "ndjson"]),
)
def test_any_bytes_are_rows_or_a_bad_input(tmp_path, data, suffix):
    path = tmp_path / f"pairs.{suffix}"
    path.write_bytes(data)
    read_or_refuse(path)


@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    row=st.sampled_from([TALK, TEXT]),
    changes=st.dictionaries(st.sampled_from([*FIELDS, "chosen_safe", "rejected_safe"]), VALUES),
)
def test_any_values_are_rows_or_a_bad_input(tmp_path, row, changes):
    read_or_refuse(lines(tmp_path / "pairs.jsonl", row, {**row, **changes}))


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_parquet_file_is_rows_or_a_bad_input(tmp_path, place, byte, cut):
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.Table.from_pylist([TALK, TALK]), path)
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    data[at] = byte
    path.write_bytes(data[:at] if cut else data)
    read_or_refuse(path)
