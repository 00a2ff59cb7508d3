"""Rows and what is known of them, the draw of rows, and files that are whole or not there."""

import _pyio
import io
import json
import os
from pathlib import Path

import pytest

from bpo.data import rows as data_rows
from bpo.study import files
from bpo.study.files import LineFile, read_lines, to_json, write_lines, write_whole


def test_a_row_comes_back_from_its_line():
    row = data_rows.Row("r", Path("/images/a/b.png"), "a/b.png",
                        ({"role": "user", "content": "q ?"},), "red", "question", ("blue", "green"))
    line = json.loads(to_json(row.line()))
    assert list(line) == ["id", "image", "category", "prompt", "answer", "given"]
    assert data_rows.Row.from_line(line, Path("/images")) == row
    del line["given"]
    plain = data_rows.Row.from_line(line, Path("/images"))
    assert plain.given == () and "given" not in plain.line()


def test_the_truth_file_gives_the_rows_truth(data_file):
    assert data_rows.read_truth(data_file)["rows"]["attribute-0"]["true"] == ["red"]
    assert data_rows.read_truth(data_file.parent) == data_rows.read_truth(data_file)


def test_without_a_truth_file_nothing_is_known(tmp_path):
    assert data_rows.read_truth(tmp_path / "rows.json") == {"vocabulary": {}, "images": {},
                                                            "rows": {}}


@pytest.mark.parametrize("answer, category", [
    ("Yes.", "presence"), ("no, there is none", "presence"), ("red", "question"),
    ("nothing", "question"), (" ".join(["word"] * 20), "caption"),
    (" ".join(["word"] * 19), "question")])
def test_the_category_is_guessed_from_the_answer(answer, category):
    assert data_rows.guess_category(answer) == category


# --- drawing rows -------------------------------------------------------------------------------

def some_rows(ids):
    return [data_rows.Row(i, None, "", (), "", "") for i in ids]


def test_the_rows_drawn_do_not_depend_on_their_order():
    rows = some_rows("abcdefghij")
    drawn = data_rows.draw_rows(rows, 4, 0, purpose="x")
    assert len(drawn) == 4
    assert drawn == [r for r in rows if r in drawn]
    backwards = data_rows.draw_rows(rows[::-1], 4, 0, purpose="x")
    assert {r.id for r in backwards} == {r.id for r in drawn}


def test_more_rows_do_not_reshuffle_the_draw():
    few = {r.id for r in data_rows.draw_rows(some_rows("abcdefgh"), 3, 0, purpose="x")}
    more = {r.id for r in data_rows.draw_rows(some_rows("abcdefghij"), 3, 0, purpose="x")}
    assert few - more <= few and more - few <= set("ij")


def test_another_seed_or_purpose_draws_other_rows():
    rows = some_rows(map(str, range(50)))
    drawn = [{r.id for r in data_rows.draw_rows(rows, 10, s, purpose=x)}
             for s, x in ((0, "x"), (1, "x"), (0, "y"))]
    assert drawn[0] != drawn[1] and drawn[0] != drawn[2]


@pytest.mark.parametrize("count", (0, 3, 9))
def test_zero_or_too_many_means_all(count):
    rows = some_rows("cab")
    assert data_rows.draw_rows(rows, count, 0, purpose="x") == rows


# --- files --------------------------------------------------------------------------------------

def test_a_file_is_written_whole(tmp_path):
    write_whole(tmp_path / "x", "old")
    write_whole(tmp_path / "x", "new ü")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "new ü"
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_lines_end_alike_on_every_system(tmp_path, monkeypatch):
    """Python's own text layer, which asks `os.linesep`, in place of the one in C, which knows."""
    monkeypatch.setattr(io, "open", _pyio.open)
    monkeypatch.setattr(os, "linesep", "\r\n")
    (tmp_path / "plain").write_text("a\n")
    assert (tmp_path / "plain").read_bytes() == b"a\r\n"
    write_whole(tmp_path / "x", "a\n")
    assert (tmp_path / "x").read_bytes() == b"a\n"


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    write_whole(tmp_path / "x", "old")

    def killed(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"


def test_lines_are_read_as_they_were_written(tmp_path):
    lines = [{"text": 'a "quoted"\nline\u2028more', "n": 1}, {"text": "ü", "n": None}]
    write_lines(tmp_path / "x.jsonl", lines)
    assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 2
    assert read_lines(tmp_path / "x.jsonl") == lines


def test_what_is_no_number_is_not_written():
    with pytest.raises(ValueError):
        to_json({"loss": float("nan")})


def test_what_fails_while_lines_are_written_leaves_nothing(tmp_path):
    write_lines(tmp_path / "x.jsonl", [{"n": 1}])

    def lines():
        yield {"n": 2}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_lines(tmp_path / "x.jsonl", lines())
    assert read_lines(tmp_path / "x.jsonl") == [{"n": 1}]
    assert [f.name for f in tmp_path.iterdir()] == ["x.jsonl"]


def test_lines_are_read_by_number(tmp_path):
    lines = [{"n": n, "text": "ü\n" * n} for n in range(5)]
    write_lines(tmp_path / "x.jsonl", lines)
    file = LineFile(tmp_path / "x.jsonl")
    assert len(file) == 5 and list(file) == lines
    assert [file[i] for i in (3, 0, 4, -1)] == [lines[i] for i in (3, 0, 4, -1)]
    for number in (5, -6):
        with pytest.raises(IndexError, match="has 5 lines"):
            file[number]


def test_a_file_without_lines_has_none(tmp_path):
    (tmp_path / "x.jsonl").write_text("")
    assert list(LineFile(tmp_path / "x.jsonl")) == []
    assert len(LineFile(tmp_path / "x.jsonl")) == 0
