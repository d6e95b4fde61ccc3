"""Journals, atomic files and digests: what is on the disk after anything went wrong."""

from __future__ import annotations

import errno
import hashlib
import os

import pytest

from selfmoa.errors import BadInput, CannotWrite, MissingFile
from selfmoa.records import StageRecord, Verdict
from selfmoa.rundir import (
    Journal,
    digest_file,
    digest_tree,
    read_jsonl,
    write_atomic,
    write_jsonl,
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


# --- journals ------------------------------------------------------------------------------------


def test_a_journal_keeps_rows_and_skips_keys_that_are_done(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    assert journal.path.read_bytes() == b""
    assert (
        journal.append([{"text": "é", "id": "a"}, {"id": "b"}, {"id": "a", "text": "again"}]) == 2
    )
    assert journal.append([{"id": "b", "text": "again"}]) == 0
    assert journal.path.read_bytes() == '{"id":"a","text":"é"}\n{"id":"b"}\n'.encode()
    again = Journal(tmp_path / "j.jsonl")
    assert again.rows == journal.rows == [{"id": "a", "text": "é"}, {"id": "b"}]
    assert again.keys == journal.keys == {"a", "b"}
    assert journal.path.stat().st_mode & 0o777 == 0o600


def test_a_journal_takes_records_and_a_function_as_key(tmp_path):
    verdicts = [Verdict("r1", "safety", judge, 0.5, "safe", "", None) for judge in "xyx"]
    journal = Journal(tmp_path / "j.jsonl", key=lambda row: f"{row['response_id']}:{row['judge']}")
    journal.append(verdicts)
    assert journal.keys == {"r1:x", "r1:y"}
    assert read_jsonl(journal.path, Verdict) == verdicts[:2]


def test_rows_in_memory_are_the_rows_a_resumed_run_reads(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append([{"id": "a", "pair": (1, 2), "map": {3: None}}])
    assert (
        journal.rows
        == Journal(journal.path).rows
        == [{"id": "a", "pair": [1, 2], "map": {"3": None}}]
    )


def test_a_tail_torn_at_any_byte_is_cut_off(tmp_path):
    path = tmp_path / "j.jsonl"
    rows = [{"id": f"row-{n}", "text": 'é "\\ \n'} for n in range(3)]
    Journal(path).append(rows)
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        journal = Journal(path)
        assert journal.rows == rows[:2]
        assert path.read_bytes() == whole[:start]
        journal.append(rows)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "tail", [b"\0" * 50, b"\xff\xfe\n", b'{"id": "c"', b'{"id": NaN}\n', b"\n"]
)
def test_a_tail_of_garbage_is_cut_off(tmp_path, tail):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"id":"a"}\n' + tail)
    assert Journal(path).keys == {"a"}
    assert path.read_bytes() == b'{"id":"a"}\n'


@pytest.mark.parametrize(
    ("data", "row", "problem"),
    [
        (b'{"id":"a"}\n{"id"\n{"id":"c"}\n', 2, "it is not JSON"),
        (b'{"id"\n{"id":"c"}\n', 1, "it is not JSON"),
        (b'{"id":"a"}\nbroken\n{"id":"c"', 2, "it is not JSON"),
        (b'{"id":"a"}\n\n{"id":"c"}\n', 2, "it is not JSON"),
        (b'{"id":"a"}\n' + b"[" * 100_000 + b'\n{"id":"c"}\n', 2, "it is not JSON"),
        (b'{"id":"a"}\n["id"]\n{"id":"c"}\n', 2, "it is not a JSON object"),
        (b'{"id":"a"}\n{"name":"c"}\n', 2, "field 'id' is missing"),
        (b'{"id":"a"}\n{"id":"b"}\n{"id":"a"}\n', 3, "key 'a' is there twice"),
    ],
)
def test_a_broken_line_before_the_tail_is_an_error_that_changes_nothing(
    tmp_path, data, row, problem
):
    path = tmp_path / "j.jsonl"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=f"j.jsonl, row {row}: {problem}"):
        Journal(path)
    assert path.read_bytes() == data


@pytest.mark.parametrize("bad", [float("nan"), "\ud800", {1, 2}, b"bytes"])
def test_a_batch_with_a_row_that_is_not_json_is_not_written_at_all(tmp_path, bad):
    journal = Journal(tmp_path / "j.jsonl")
    with pytest.raises(BadInput, match="row 2: it cannot be written as JSON"):
        journal.append([{"id": "a"}, {"id": "b", "value": bad}])
    assert journal.path.read_bytes() == b""
    assert not journal.rows


def test_a_journal_notices_another_writer(tmp_path):
    one, two = Journal(tmp_path / "j.jsonl"), Journal(tmp_path / "j.jsonl")
    two.append([{"id": "b"}])
    with pytest.raises(CannotWrite, match="changed by another hand"):
        one.append([{"id": "a"}])
    assert Journal(one.path).keys == {"b"}


# --- files ---------------------------------------------------------------------------------------


def test_an_atomic_write_replaces_links_and_leftovers_and_follows_neither(tmp_path):
    outside, path = tmp_path / "outside", tmp_path / "file"
    outside.write_text("mine")
    path.symlink_to(outside)
    (tmp_path / ".file.tmp").symlink_to(outside)
    write_atomic(path, "new é")
    assert outside.read_text() == "mine"
    assert path.read_text(encoding="utf-8") == "new é"
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "outside"]


def test_a_journal_does_not_follow_a_link(tmp_path):
    (tmp_path / "outside").write_bytes(b'{"id":"a"}\ntorn')
    (tmp_path / "j.jsonl").symlink_to(tmp_path / "outside")
    with pytest.raises(CannotWrite, match="it is a symbolic link"):
        Journal(tmp_path / "j.jsonl")
    assert (tmp_path / "outside").read_bytes() == b'{"id":"a"}\ntorn'


def test_data_is_durable_before_its_name_is(tmp_path, monkeypatch):
    steps = []
    replace = os.replace

    def note(fd):
        inode = os.fstat(fd).st_ino
        steps.append(
            next(str(p) for p in (*tmp_path.iterdir(), tmp_path) if p.stat().st_ino == inode)
        )

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("replace"), replace(*names)))
    write_atomic(tmp_path / "file", "data")
    assert steps == [str(tmp_path / ".file.tmp"), "replace", str(tmp_path)]
    steps.clear()
    journal = Journal(tmp_path / "j.jsonl")
    assert steps == [str(tmp_path)]
    journal.append([{"id": "a"}])
    assert steps == [str(tmp_path), str(tmp_path / "j.jsonl")]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_failed_atomic_write_keeps_the_old_file(tmp_path, monkeypatch, call, code):
    path = tmp_path / "file"
    write_atomic(path, "old")
    monkeypatch.setattr(os, call, lambda *_: (_ for _ in ()).throw(OSError(code, "no")))
    reasons = "disk is full|permission denied|read-only|input/output"
    with pytest.raises(CannotWrite, match=reasons) as caught:
        write_atomic(path, "new")
    monkeypatch.undo()
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_jsonl_files_are_read_as_rows_or_records(tmp_path):
    path = tmp_path / "v.jsonl"
    verdicts = [Verdict("r1", "safety", "x", 1.0, None, "", None)]
    write_jsonl(path, verdicts)
    path.write_bytes(b"\n" + path.read_bytes().rstrip() + b"\r\n\n")
    assert read_jsonl(path) == [verdicts[0].to_json()]
    assert read_jsonl(path, Verdict) == verdicts
    with pytest.raises(MissingFile, match=r"data file '.*none.jsonl' does not exist"):
        read_jsonl(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"judge": None}, "field 'judge' should be str"),
        ({"score": "1"}, r"field 'score' should be float \| None"),
        ({"score": True}, r"field 'score' should be float \| None"),
        ({"label": "fine"}, "field 'label' should be"),
        ({"scroe": 1}, "field 'scroe' is not one of a Verdict"),
        ({"error": "both"}, "a verdict has either a score or an error"),
    ],
)
def test_a_bad_field_is_named_with_its_row(tmp_path, change, problem):
    good = Verdict("r1", "safety", "x", 1, "safe", "", None).to_json()
    write_jsonl(tmp_path / "v.jsonl", [good, good | change])
    with pytest.raises(BadInput, match=f"row 2: {problem}"):
        read_jsonl(tmp_path / "v.jsonl", Verdict)


def test_nested_fields_are_checked(tmp_path):
    record = StageRecord("pair", 1, "f", {}, {"a": "b"}, {}).to_json()
    write_jsonl(tmp_path / "s.jsonl", [record, record | {"inputs": {"a": 1}}])
    with pytest.raises(BadInput, match="row 2: field 'inputs' should be dict"):
        read_jsonl(tmp_path / "s.jsonl", StageRecord)


def test_digests_depend_on_names_and_contents_only(tmp_path):
    def tree(name, files):
        for each, text in files:
            write_atomic(_made(tmp_path / name / each), text)
        return digest_tree(tmp_path / name)

    files = [("b/c.txt", "1"), ("a.txt", "2")]
    first = tree("one", files)
    assert first == tree(
        "two", [*reversed(files), (".hidden", "x"), ("b/.git/x", "x"), ("x.tmp", "")]
    )
    assert first != tree("three", [("b/c.txt", "1"), ("a2.txt", "2")])
    assert first != tree("four", [("b/c.txt", "1"), ("a.txt", "3")])
    assert first != tree("five", [*files, ("b/d.txt", "")])
    names = (f"{name}\0{digest_file(tmp_path / 'one' / name)}\n" for name in ("a.txt", "b/c.txt"))
    assert first == "sha256:" + hashlib.sha256("".join(names).encode()).hexdigest()
    empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest_file(tmp_path / "five/b/d.txt") == empty
    with pytest.raises(MissingFile):
        digest_tree(tmp_path / "none")


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_a_write_may_be_taken_in_pieces(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data[:7])))
    Journal(tmp_path / "j.jsonl").append([{"id": "a", "text": "x" * 100}])
    assert len(Journal(tmp_path / "j.jsonl").rows[0]["text"]) == 100
