"""Data with everything that goes wrong in it becomes a file of usable rows and one of reasons."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from helpers.data import conversation, picture, png_header
from PIL import Image

from bpo.data import check, images
from bpo.data import rows as data_rows
from bpo.evaluation import comparison, probe
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding
from bpo.params import NoiseProbability, PairGeneration, QualitativeComparison, Refusal
from bpo.study.files import LineFile, read_lines
from bpo.training import stage as training


def taken(data, folder, *, root=None, words=350, count=0, seed=0, share=1.0, special=None):
    """The reasons of what was rejected, counted."""
    folder.mkdir(exist_ok=True)
    data = {str(f): below for f, below in data.items()} if isinstance(data, dict) else str(data)
    check.take_stock(PairGeneration(
        study="s", data=data, image_folder=str(root or ""), max_words=words, rows=count, seed=seed,
        max_bad_share=share), folder, special=special)
    return Counter(x["reason"] for x in rejected_in(folder))


def rows_in(folder, root):
    return [data_rows.Row.from_line(x, root) for x in LineFile(folder / check.ROWS)]


def rejected_in(folder):
    return read_lines(folder / check.REJECTED)


def written(folder, entries, name="rows.json"):
    (folder / name).write_text(json.dumps(entries))
    return folder / name


def many(folder, count, *, bad=()):
    """Rows r0 .. of two images; those with numbers in `bad` have none."""
    for name in ("0.png", "1.png"):
        picture("disc", "red", int(name[0])).save(folder / name)
    return [conversation(f"r{n}", "none.png" if n in bad else f"{n % 2}.png", "q ?",
                         "word " * (n + 1)) for n in range(count)]


def sorrows(folder):
    """A data set with all that occurs: (entries, ids that are usable, reasons of the others)."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8))
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    exif, palette = Image.Exif(), Image.new("P", (8, 8), 1)
    exif[274] = 6
    palette.putpalette([255, 0, 0, 0, 200, 0] + [0] * 762)
    noise.save(folder.parent / "outside.png")
    (folder / "sub").mkdir()
    noise.save(folder / "sub" / "rgb.png")
    palette.save(folder / "palette.png", transparency=1)
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(folder / "deep.png")
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    noise.save(folder / "sideways.jpg", exif=exif)
    good = ["sub/rgb.png", "palette.png", "cmyk.jpg", "deep.png", "moving.gif", "sideways.jpg"]
    stream = io.BytesIO()
    noise.save(stream, "JPEG")
    (folder / "cut.jpg").write_bytes(stream.getvalue()[:1500])
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    turns = [{"from": f, "value": t} for f, t in (
        ("human", "<image>\none ?"), ("gpt", "first"), ("human", "two ?"), ("gpt", "second"))]
    text_only = conversation("text", "", "q ?", "a")
    del text_only["image"]
    entries = [
        *[conversation(name, name, "q ?", "red") for name in good],
        {"id": "talk", "image": "palette.png", "conversations": turns},
        *[conversation(n, n, "q ?", "a") for n in ("cut.jpg", "empty.png", "bomb.png", "none.png",
                                                   "link.png", "../outside.png", "/outside.png")],
        conversation("palette.png", "palette.png", "q ?", "red"),
        conversation("palette.png", "palette.png", "q ?", "another"),
        conversation("silent", "palette.png", "q ?", " "), text_only, "neither"]
    return entries, [*good, "talk#0", "talk#1", "palette.png~2"], {
        "image is cut off or damaged": 1, "image file is empty": 1, "image is too large": 1,
        "image file is missing": 1, "image path leaves the image folder": 3, "repeated row": 1,
        "empty answer": 1, "no image": 1, "not a row": 1}


def test_one_folder_with_all_that_goes_wrong_gives_its_usable_rows(tmp_path):
    (tmp_path / "set").mkdir()
    entries, usable, reasons = sorrows(tmp_path / "set")
    out = tmp_path / "out"
    assert taken(written(tmp_path / "set", entries), out) == reasons
    rows = rows_in(out, tmp_path / "set")
    assert [r.id for r in rows] == usable
    assert {images.load(r.image).mode for r in rows} == {"RGB"}
    listed = rejected_in(out)
    assert Counter(x["reason"] for x in listed) == reasons
    assert listed[0] == {"id": "cut.jpg", "where": "rows.json, row 8",
                         "reason": "image is cut off or damaged",
                         "detail": "cut.jpg"}
    assert sorted(f.name for f in out.iterdir()) == [check.REJECTED, check.ROWS]


def test_the_same_data_gives_the_same_bytes(tmp_path):
    (tmp_path / "set").mkdir()
    data = written(tmp_path / "set", sorrows(tmp_path / "set")[0])
    for out in ("one", "two"):
        taken(data, tmp_path / out, count=5)
    for file in (check.ROWS, check.REJECTED):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


# --- the draw -----------------------------------------------------------------------------------

def test_the_draw_is_that_of_draw_rows_and_does_not_depend_on_the_order(tmp_path):
    entries = many(tmp_path, 60)
    for name, order in (("one", entries), ("two", entries[::-1])):
        taken(written(tmp_path, order, f"{name}.json"), tmp_path / name, count=7, seed=3)
    one, two = (rows_in(tmp_path / n, tmp_path) for n in ("one", "two"))
    assert len(one) == 7 and one == two[::-1]
    taken(tmp_path / "one.json", tmp_path / "all")
    everything = rows_in(tmp_path / "all", tmp_path)
    assert one == data_rows.draw_rows(everything, 7, 3, purpose="pair rows")
    assert len(everything) == 60


def test_rows_not_wanted_are_told_apart_from_bad_ones(tmp_path):
    data = written(tmp_path, many(tmp_path, 40, bad=range(0, 40, 10)))
    # r0 and r10 of the 20 short ones are bad, and r20, r30 of the long ones: 4 of 22 rows.
    assert taken(data, tmp_path / "out", words=20, share=0.2) == {
        "image file is missing": 4, "answer longer than 20 words": 18}
    assert len(rows_in(tmp_path / "out", tmp_path)) == 18
    taken(data, tmp_path / "few", words=20, count=5)
    assert len(rows_in(tmp_path / "few", tmp_path)) == 5


def test_a_bad_image_among_the_drawn_makes_the_rows_fewer(tmp_path):
    entries = many(tmp_path, 30)
    taken(written(tmp_path, entries), tmp_path / "out", count=10)
    drawn = [r.id for r in rows_in(tmp_path / "out", tmp_path)]
    (tmp_path / "empty.png").write_bytes(b"")
    for entry in entries:
        if entry["id"] in drawn[:2]:
            entry["image"] = "empty.png"
    assert taken(written(tmp_path, entries), tmp_path / "out", count=10) == {
        "image file is empty": 2}
    assert [r.id for r in rows_in(tmp_path / "out", tmp_path)] == drawn[2:]


# --- refusals -----------------------------------------------------------------------------------

def test_too_many_bad_rows_are_refused_with_their_reasons(tmp_path):
    data, out = written(tmp_path, many(tmp_path, 20, bad=(3, 5, 7))), tmp_path / "out"
    with pytest.raises(Refusal, match=r"3 of 20 rows cannot be used \(15.0%, more than max_bad_sh"
                                      r"are = 0.1\): 3 image file is missing "
                                      r"\(first: rows.json, row 4: "
                                      r".*/none.png\); .*rejected_rows"):
        taken(data, out, share=0.1)
    assert [x["id"] for x in rejected_in(out)] == ["r3", "r5", "r7"]
    assert [f.name for f in out.iterdir()] == [check.REJECTED]
    assert taken(data, out, share=0.15) == {"image file is missing": 3}


def test_bad_rows_that_the_draw_passes_by_do_not_count(tmp_path):
    entries = many(tmp_path, 100, bad=range(50, 60))
    data = written(tmp_path, entries)
    taken(data, tmp_path / "out", count=9, share=0.3)  # ten of nineteen would be more than half
    assert len(rows_in(tmp_path / "out", tmp_path)) == 9
    assert len(rejected_in(tmp_path / "out")) == 10


def test_data_without_a_usable_row_is_refused(tmp_path):
    data = written(tmp_path, many(tmp_path, 2, bad=(0, 1)))
    with pytest.raises(Refusal, match="none of the 2 rows can be used: 2 image file is missing"):
        taken(data, tmp_path / "out")


# --- several sources ----------------------------------------------------------------------------

def test_several_data_files_share_one_image_folder(tmp_path):
    root = tmp_path / "images"
    (root / "coco").mkdir(parents=True)
    (tmp_path / "real").mkdir()
    (root / "text").symlink_to(tmp_path / "real")  # one that the user names may be a link
    sources = {}
    for name in ("coco", "text"):
        sources[written(tmp_path, many(root / name, 3, bad=[1]), f"{name}.json")] = name
    assert taken(sources, tmp_path / "out", root=root) == {"image file is missing": 2}
    rows = rows_in(tmp_path / "out", root)
    assert [(r.id, r.image_name) for r in rows] == [
        ("coco/r0", "coco/0.png"), ("coco/r2", "coco/0.png"),
        ("text/r0", "text/0.png"), ("text/r2", "text/0.png")]
    assert all(r.image.is_file() for r in rows)
    assert [x["id"] for x in rejected_in(tmp_path / "out")] == ["coco/r1", "text/r1"]


@pytest.mark.parametrize("below", ("..", "/", "a/../../b"))
def test_images_of_a_data_file_stay_below_the_image_folder(tmp_path, below):
    data = written(tmp_path, many(tmp_path, 2))
    with pytest.raises(Refusal, match="must lie below the image folder"):
        taken({data: below}, tmp_path / "out", root=tmp_path)


def test_two_data_files_of_one_name_are_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, many(tmp_path / name, 2))
    with pytest.raises(Refusal, match="have the same name"):
        taken({tmp_path / n / "rows.json": "" for n in ("one", "two")}, tmp_path / "out",
              root=tmp_path / "one")


# --- a checkpoint's own tokens ------------------------------------------------------------------

def test_a_text_with_a_token_of_the_checkpoint_is_left_out_wherever_rows_are_read(
        tmp_path, data_file, model_folder):
    special = encoding.special(checkpoints.load_processor(model_folder))
    rows = json.loads(data_file.read_text())
    for row, token in zip(rows, ("<pad>", "<s>", "<unk>", "</s>"), strict=False):
        row["conversations"][1]["value"] += f" {token} x"
    data = written(tmp_path, rows)
    assert taken(data, tmp_path / "out", root=data_file.parent, special=special) == {
        f"{t} in a text": 1 for t in ("<pad>", "<s>", "<unk>", "</s>")}
    assert len(rows_in(tmp_path / "out", data_file.parent)) == len(rows) - 4
    p = NoiseProbability(model=str(model_folder), data=str(data),
                         image_folder=str(data_file.parent))
    assert probe.listed(p)[1]["<unk> in a text"] == 1
    split = QualitativeComparison(model=str(model_folder), splits={"s": str(data)},
                                  image_folder=str(data_file.parent))
    assert comparison.read_split(split, "s")[2]["<s> in a text"] == 1
    lines = [{"id": r["id"], "image": r["image"], "chosen": r["conversations"][1]["value"],
              "prompt": [{"role": "user", "content": "what colour ?"}],
              "rejected": [{"source": "given", "text": "nothing"}]} for r in rows]
    lines[5]["rejected"][0]["text"] = "nothing <image>"
    checkpoint = checkpoints.load_without_weights(model_folder)
    fitting, dropped = training.usable(checkpoint, lines, data_file.parent, max_tokens=10**6)
    assert len(fitting) == len(rows) - 5 and dropped["<image> in a text"] == 1
