"""Rows in the LLaVA layout, the images they name, and files that are whole or not there."""

import io
import json

import numpy as np
import pytest
from conftest import conversation, picture
from PIL import Image

from bpo import records
from bpo.params import Refusal


@pytest.fixture
def folder(tmp_path):
    picture("disc", "red", 0).save(tmp_path / "a.png")
    return tmp_path


def rows_file(folder, entries, name="rows.json"):
    file = folder / name
    file.write_text(json.dumps(entries))
    return file


def encoded(image, kind):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def test_a_question_and_its_answer_are_a_row(folder):
    entry = conversation("r1", "a.png", "what colour is the disc ?", " red ")
    rows, skipped = records.read_rows(rows_file(folder, [entry]))
    assert not skipped
    assert rows == [records.Row(
        "r1", folder / "a.png", "a.png",
        ({"role": "user", "content": "what colour is the disc ?"},), "red", "question")]
    assert rows[0].question == "what colour is the disc ?"


def test_every_assistant_turn_is_a_row_with_its_history(folder):
    entry = {"id": "t", "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nfirst ?"}, {"from": "gpt", "value": "one"},
        {"from": "human", "value": "second ?"}, {"from": "gpt", "value": "two"}]}
    rows, _ = records.read_rows(rows_file(folder, [entry]))
    assert [r.id for r in rows] == ["t#0", "t#1"]
    assert [r.answer for r in rows] == ["one", "two"]
    assert rows[0].prompt == ({"role": "user", "content": "first ?"},)
    assert rows[1].prompt == ({"role": "user", "content": "first ?"},
                              {"role": "assistant", "content": "one"},
                              {"role": "user", "content": "second ?"})
    assert rows[1].question == "second ?"


def test_rows_without_an_id_are_known_by_their_place(folder):
    entry = conversation("x", "a.png", "q ?", "red")
    del entry["id"]
    rows, _ = records.read_rows(rows_file(folder, [conversation("x", "a.png", "q", "a"), entry]))
    assert [r.id for r in rows] == ["x", "1"]


def test_images_are_found_from_another_folder(folder, tmp_path_factory):
    data = rows_file(tmp_path_factory.mktemp("elsewhere"), [conversation("r", "a.png", "q", "a")])
    with pytest.raises(Refusal, match="image file is missing"):
        records.read_rows(data)
    rows, _ = records.read_rows(data, folder)
    assert rows[0].image == folder / "a.png"


def bad_entries(folder):
    """reason -> an entry that is skipped for it."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    (folder / "cut.png").write_bytes(encoded(noise, "PNG")[:2000])
    (folder / "cut.jpg").write_bytes(encoded(noise, "JPEG")[:2000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder.parent / "outside.png").write_bytes(encoded(noise, "PNG"))
    whole = conversation("r", "a.png", "q ?", "red")
    return {
        "no image": [{**whole, "image": ""}, {k: v for k, v in whole.items() if k != "image"}],
        "image file is missing": [{**whole, "image": "none.png"}, {**whole, "image": "."}],
        "image cannot be read": [{**whole, "image": n}
                                 for n in ("cut.png", "cut.jpg", "empty.png", "text.png")],
        "image path leaves the image folder": [
            {**whole, "image": "../outside.png"},
            {**whole, "image": str(folder.parent / "outside.png")}],
        "empty answer": [conversation("r", "a.png", "q ?", "  ")],
        "no conversation": [
            {k: v for k, v in whole.items() if k != "conversations"},
            {**whole, "conversations": "q"}, {**whole, "conversations": [{"from": "human"}]},
            {**whole, "conversations": []}, {**whole, "conversations": whole["conversations"][:1]}]}


REASONS = {"no image": 2, "image file is missing": 2, "image cannot be read": 4,
           "image path leaves the image folder": 2, "empty answer": 1, "no conversation": 5}


@pytest.mark.parametrize("reason, number", [(r, i) for r, n in REASONS.items() for i in range(n)])
def test_a_row_that_cannot_be_used_is_skipped_and_counted(folder, reason, number):
    good = conversation("good", "a.png", "q ?", "red")
    bad = bad_entries(folder)[reason][number]
    rows, skipped = records.read_rows(rows_file(folder, [bad, good]))
    assert [r.id for r in rows] == ["good"]
    assert skipped == {reason: 1}


def test_a_link_out_of_the_image_folder_is_not_followed(folder):
    (folder / "in").mkdir()
    (folder / "in" / "link.png").symlink_to(folder / "a.png")
    picture("box", "blue", 1).save(folder / "in" / "b.png")
    data = rows_file(folder, [conversation("l", "link.png", "q", "a"),
                              conversation("b", "b.png", "q", "a")])
    rows, skipped = records.read_rows(data, folder / "in")
    assert [r.id for r in rows] == ["b"]
    assert skipped == {"image path leaves the image folder": 1}


def test_the_second_row_with_an_id_is_skipped(folder):
    twice = [conversation("r", "a.png", "q ?", a) for a in ("first", "second")]
    rows, skipped = records.read_rows(rows_file(folder, twice))
    assert [r.answer for r in rows] == ["first"]
    assert skipped == {"duplicate id": 1}


def test_a_file_of_unusable_rows_alone_is_refused_with_the_counts(folder):
    data = rows_file(folder, [conversation("r", "none.png", "q", "a")] * 2)
    with pytest.raises(Refusal, match="none of its 2 rows can be used: 2 image file is missing"):
        records.read_rows(data)


@pytest.mark.parametrize("text", ('{"id": 1}', "[1, 2]", "not json", '"text"'))
def test_a_file_of_another_layout_is_refused(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(Refusal, match="must be a JSON list of rows"):
        records.read_rows(tmp_path / "rows.json")
    with pytest.raises(Refusal, match="no such data file"):
        records.read_rows(tmp_path / "none.json")


def test_the_truth_file_gives_the_category(data_file):
    rows, _ = records.read_rows(data_file)
    assert {r.id.split("-")[0]: r.category for r in rows} == {
        "caption": "caption", "attribute": "attribute", "presence": "presence"}
    assert records.read_truth(data_file)["rows"]["attribute-0"]["true"] == ["red"]


def test_without_a_truth_file_nothing_is_known(tmp_path):
    assert records.read_truth(tmp_path / "rows.json") == {"vocabulary": {}, "images": {},
                                                          "rows": {}}


@pytest.mark.parametrize("answer, category", [
    ("Yes.", "presence"), ("no, there is none", "presence"), ("red", "question"),
    ("nothing", "question"), (" ".join(["word"] * 20), "caption"),
    (" ".join(["word"] * 19), "question")])
def test_the_category_is_guessed_from_the_answer(answer, category):
    assert records.guess_category(answer) == category


# --- drawing rows -------------------------------------------------------------------------------

def some_rows(ids):
    return [records.Row(i, None, "", (), "", "") for i in ids]


def test_the_rows_drawn_do_not_depend_on_their_order():
    rows = some_rows("abcdefghij")
    drawn = records.draw_rows(rows, 4, 0, purpose="x")
    assert len(drawn) == 4
    assert drawn == [r for r in rows if r in drawn]
    backwards = records.draw_rows(rows[::-1], 4, 0, purpose="x")
    assert {r.id for r in backwards} == {r.id for r in drawn}


def test_more_rows_do_not_reshuffle_the_draw():
    few = {r.id for r in records.draw_rows(some_rows("abcdefgh"), 3, 0, purpose="x")}
    more = {r.id for r in records.draw_rows(some_rows("abcdefghij"), 3, 0, purpose="x")}
    assert few - more <= few and more - few <= set("ij")


def test_another_seed_or_purpose_draws_other_rows():
    rows = some_rows(map(str, range(50)))
    drawn = [{r.id for r in records.draw_rows(rows, 10, s, purpose=x)}
             for s, x in ((0, "x"), (1, "x"), (0, "y"))]
    assert drawn[0] != drawn[1] and drawn[0] != drawn[2]


@pytest.mark.parametrize("count", (0, 3, 9))
def test_zero_or_too_many_means_all(count):
    rows = some_rows("cab")
    assert records.draw_rows(rows, count, 0, purpose="x") == rows


# --- images -------------------------------------------------------------------------------------

def test_a_palette_is_resolved(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 200, 0] + [0] * 762)
    image.save(tmp_path / "p.png")
    read = records.load_image(tmp_path / "p.png")
    assert (read.mode, read.getpixel((0, 0))) == ("RGB", (0, 200, 0))


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=100)
    read = records.load_image(tmp_path / "c.jpg")
    red, green, blue = read.getpixel((4, 4))
    assert read.mode == "RGB" and red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize("mode, colour, wanted", [
    ("L", 90, (90, 90, 90)), ("1", 1, (255, 255, 255)), ("LA", (90, 255), (90, 90, 90)),
    ("RGBA", (10, 20, 30, 255), (10, 20, 30))])
def test_grey_and_opaque_images_become_rgb(tmp_path, mode, colour, wanted):
    Image.new(mode, (4, 4), colour).save(tmp_path / "x.png")
    read = records.load_image(tmp_path / "x.png")
    assert (read.mode, read.getpixel((1, 1))) == ("RGB", wanted)


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "g.png")
    read = np.asarray(records.load_image(tmp_path / "g.png"))
    assert read.shape == (16, 16, 3)
    assert abs(read.mean() - 127.5) < 3


def test_a_photograph_taken_sideways_is_turned_upright(tmp_path):
    image = Image.new("RGB", (6, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees clockwise to look at it
    image.save(tmp_path / "e.png", exif=exif)
    read = records.load_image(tmp_path / "e.png")
    assert read.size == (4, 6)
    assert read.getpixel((3, 0)) == (255, 255, 255)


# --- files --------------------------------------------------------------------------------------

def test_a_file_is_written_whole(tmp_path):
    records.write_whole(tmp_path / "x", "old")
    records.write_whole(tmp_path / "x", "new ü")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "new ü"
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    records.write_whole(tmp_path / "x", "old")

    def killed(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        records.write_whole(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"


def test_lines_are_read_as_they_were_written(tmp_path):
    lines = [{"text": 'a "quoted"\nline\u2028more', "n": 1}, {"text": "ü", "n": None}]
    records.write_lines(tmp_path / "x.jsonl", lines)
    assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 2
    assert records.read_lines(tmp_path / "x.jsonl") == lines


def test_what_is_no_number_is_not_written():
    with pytest.raises(ValueError):
        records.to_json({"loss": float("nan")})
