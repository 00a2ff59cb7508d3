"""Every layout and kind of file that users hold becomes the same rows, or is refused."""

import csv
import io
import json
import tracemalloc

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers.data import conversation, picture

from bpo.data import images, layouts
from bpo.data import rows as data_rows
from bpo.data.rows import Rejected, Row
from bpo.params import Refusal

ASKED = ({"role": "user", "content": "what colour ?"},)
DESCRIBED = ({"role": "user", "content": layouts.DESCRIBE},)


@pytest.fixture
def folder(tmp_path):
    picture("disc", "red", 0).save(tmp_path / "a.png")
    picture("disc", "red", 0).save(tmp_path / "7.jpg")
    return tmp_path


def written(folder, entries, name="rows.json"):
    file = folder / name
    if name.endswith("l"):
        file.write_text("".join(f"{json.dumps(e)}\n" for e in entries))
    else:
        file.write_text(json.dumps(entries))
    return file


def png(colour="red"):
    stream = io.BytesIO()
    picture("disc", colour, 0).save(stream, "PNG")
    return stream.getvalue()


def message(role, content):
    return [{"role": role, "content": content}]


# --- layouts ------------------------------------------------------------------------------------

TRIO = {"question": "what colour ? <image>", "chosen": "red", "rejected": "blue"}
TYPED = [{"type": "image", "text": None}, {"type": "text", "text": "what colour ?"}]
ENTRIES = {  # layout: entries that say the same
    "LLaVA": [conversation("r", "a.png", "what colour ?", " red ")],
    "BPO": [{"id": "r", "image_path": "a.png", "prompt": "<image>\nwhat colour ?", "completions": [
        {"score": 0.5, "response": "blue", "type": "llm-hal"},
        {"score": 0.9, "response": "reddish", "type": "gt"},
        {"score": 1, "response": "red", "type": "gt"},
        {"score": 0, "response": "green", "type": "mllm-hal"}]}],
    "RLHF-V": [{"id": "r", "image": "a.png", **TRIO},
               {"id": "r", "image": {"path": "a.png"}, **TRIO},
               {"id": "r", "image": "a.png", "text": json.dumps(TRIO)}],
    "TRL": [{"id": "r", "images": ["a.png"], "prompt": message("user", TYPED),
             "chosen": message("assistant", "red"),
             "rejected": message("assistant", [{"type": "text", "text": "blue"}])},
            {"id": "r", "image": "a.png", "prompt": "what colour ?", "chosen": "red",
             "rejected": "blue"}],
    "answers": [{"id": "r", "image": "a.png", "question": "what colour ?", "answer": "red"},
                {"id": "r", "image": "a.png", "prompt": "what colour ?", "caption": "red"}],
    "MiniGPT-4": [{"image_id": "7", "caption": "red"}]}
GIVEN = {"BPO": ("blue", "green"), "RLHF-V": ("blue",), "TRL": ("blue",)}


@pytest.mark.parametrize("name, number",
                         [(n, i) for n, e in ENTRIES.items() for i in range(len(e))])
@pytest.mark.parametrize("file", ("rows.json", "rows.jsonl"))
def test_each_layout_is_told_by_its_content_and_read(folder, name, number, file):
    data = written(folder, [ENTRIES[name][number]], file)
    assert data_rows.layout(data) == name
    first = "7" if name == "MiniGPT-4" else "r"
    image = "7.jpg" if name == "MiniGPT-4" else "a.png"
    prompt = DESCRIBED if name == "MiniGPT-4" else ASKED
    assert list(data_rows.stream(data)) == [
        Row(first, folder / image, image, prompt, "red", "question", GIVEN.get(name, ()))]


def test_captions_under_annotations_are_read(folder):
    data = written(folder, {"info": {"annotations": []}, "annotations": [
        {"image_id": 7, "caption": "red"}, {"image_id": 8, "caption": "red"}]})
    assert data_rows.layout(data) == "MiniGPT-4"
    row, missing = data_rows.stream(data)
    assert (row.id, row.image_name, row.prompt) == ("7", "7.jpg", DESCRIBED)
    assert missing == Rejected("8", "rows.json, row 2", "image file is missing")


def test_every_assistant_turn_is_a_row_with_its_history(folder):
    entry = {"id": "t", "image": "a.png", "conversations": [
        {"from": "human", "value": "first ?\n<image>"}, {"from": "gpt", "value": "one"},
        {"from": "human", "value": "second ?"}, {"from": "gpt", "value": "two"}]}
    first, second = data_rows.stream(written(folder, [entry]))
    assert (first.id, second.id) == ("t#0", "t#1")
    assert (first.answer, second.answer) == ("one", "two")
    assert first.prompt == ({"role": "user", "content": "first ?"},)
    assert second.prompt == (*first.prompt, {"role": "assistant", "content": "one"},
                             {"role": "user", "content": "second ?"})
    assert second.question == "second ?"


def test_rows_without_an_id_are_known_by_their_place(folder):
    entries = [conversation("x", "a.png", "q", "a"), conversation(None, "a.png", "q ?", "red")]
    assert [r.id for r in data_rows.stream(written(folder, entries))] == ["x", "1"]


def test_half_a_surrogate_pair_does_not_stop_a_run(folder):
    data = folder / "rows.jsonl"
    data.write_text(r'{"id": "\ud83d", "image": "a.png", "question": "q", "answer": "a\ud83d"}')
    row, = data_rows.stream(data)
    assert (row.id, row.answer) == ("?", "a?")


# --- kinds of files -----------------------------------------------------------------------------

@pytest.mark.parametrize("delimiter", (",", ";", "\t", "|"))
def test_a_folder_of_images_with_a_csv_is_read(folder, delimiter):
    with (folder / "rows.csv").open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows(
            [["Image", "Caption"], ["a.png", 'a "red", round;\nthing'], ["none.png", "x"],
             ["a.png"]])
    for data in (folder, folder / "rows.csv"):
        assert data_rows.layout(data) == "answers"
        row, missing, short = data_rows.stream(data)
        assert (row.id, row.prompt, row.answer) == ("0", DESCRIBED, 'a "red", round;\nthing')
        assert row.image == folder / "a.png"
        assert missing == Rejected("1", "rows.csv, row 2", "image file is missing")
        assert short == Rejected("2", "rows.csv, row 3", "more or fewer cells than the header")


def test_a_csv_with_questions_and_ids_is_read(folder):
    (folder / "rows.csv").write_text("id,image,question,answer\nr,a.png,what colour ?,red\n")
    assert list(data_rows.stream(folder)) == [
        Row("r", folder / "a.png", "a.png", ASKED, "red", "question")]


def hub_folder(folder):
    """As the hub keeps data sets: two shards below data/, images inside."""
    (folder / "data").mkdir(parents=True)
    for shard, colours in enumerate((("red", "green"), ("blue",))):
        datasets.Dataset.from_dict(
            {"image": [{"bytes": png(c), "path": None} for c in colours],
             "question": ["what colour ?"] * len(colours), "chosen": list(colours),
             "rejected": ["pink"] * len(colours)},
            features=datasets.Features(
                {"image": datasets.Image(),
                 **{n: datasets.Value("string") for n in ("question", "chosen", "rejected")}})
        ).to_parquet(folder / "data" / f"train-{shard:05}-of-00002.parquet")
    return folder


def test_a_data_set_folder_of_the_hub_is_read_with_its_images(tmp_path):
    data = hub_folder(tmp_path / "set")
    assert data_rows.layout(data) == "RLHF-V"
    rows = list(data_rows.stream(data))
    first, second = (f"data/train-0000{n}-of-00002.parquet" for n in range(2))
    assert [r.image_name for r in rows] == [f"{first}#0", f"{first}#1", f"{second}#0"]
    assert [(r.id, r.answer, r.given) for r in rows] == [
        ("0", "red", ("pink",)), ("1", "green", ("pink",)), ("2", "blue", ("pink",))]
    for row in rows:
        assert images.load(row.image).tobytes() == picture("disc", row.answer, 0).tobytes()
    alone = list(data_rows.stream(data / first))
    assert [r.image for r in alone] == [r.image for r in rows[:2]]
    within = list(data_rows.stream(data, tmp_path))
    assert within[2].image_name == f"set/{second}#0" and within[2].image == rows[2].image


def test_links_to_parquet_files_are_followed_as_the_hubs_cache_has_them(tmp_path):
    real = hub_folder(tmp_path / "blobs")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.parquet").symlink_to(real / "data/train-00001-of-00002.parquet")
    row, = data_rows.stream(tmp_path / "set")
    assert images.problem(row.image) is None


def test_images_inside_parquet_must_lie_in_the_image_folder(tmp_path):
    data = hub_folder(tmp_path / "set")
    (tmp_path / "other").mkdir()
    with pytest.raises(Refusal, match="leave image_folder empty"):
        list(data_rows.stream(data, tmp_path / "other"))


def test_conversations_and_several_images_inside_parquet_are_read(tmp_path):
    rows = [("one", [png()]), ("two", [png(), png()]), ("none", []), ("null", None)]
    kind = pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))
    pyarrow.parquet.write_table(pyarrow.table({
        "images": pyarrow.array(
            [b and [{"bytes": x, "path": None} for x in b] for _, b in rows], kind),
        "prompt": [message("user", TYPED) for _ in rows],
        "chosen": [message("assistant", n) for n, _ in rows],
        "rejected": [message("assistant", "x") for _ in rows]}), tmp_path / "t.parquet")
    row, *bad = data_rows.stream(tmp_path / "t.parquet")
    assert (row.prompt, row.answer, row.given) == (ASKED, "one", ("x",))
    assert [b.reason for b in bad] == ["more than one image", "no image", "no image"]
    assert bad[0].where == "t.parquet, row 2"


def test_image_names_in_parquet_are_found_in_the_folder(folder):
    entry = ENTRIES["LLaVA"][0]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([entry]), folder / "t.parquet")
    assert list(data_rows.stream(folder / "t.parquet")) == list(
        data_rows.stream(written(folder, [entry])))


def test_image_bytes_are_not_read_while_streaming(tmp_path, monkeypatch):
    data, asked = hub_folder(tmp_path / "set"), []
    whole = pyarrow.parquet.ParquetFile.iter_batches

    def watched(self, *args, columns, **kwargs):
        asked.extend(columns)
        return whole(self, *args, columns=columns, **kwargs)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", watched)
    assert len(list(data_rows.stream(data))) == 3
    assert "image.path" in asked and "image.bytes" not in asked


# --- what is refused ----------------------------------------------------------------------------

@pytest.mark.parametrize("text, told", [
    ('[{"id": 1, "picture": "a.png"}]', "fields id, picture; .*LLaVA.*TRL.*MiniGPT-4"),
    ('{"id": 1, "image": "a.png"}', "fields id, image;"), ("[1, 2]", "no named fields"),
    ("[]", "holds no entry"), ("", "is empty"), ("not json", "begins with b'not json'"),
    ('"text, more"', "holds no entry"), ("image,label\na.png,red", "fields image, label;")])
def test_what_is_of_no_known_layout_is_refused_with_what_was_seen(tmp_path, text, told):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(Refusal, match=told):
        data_rows.read_rows(tmp_path / "rows.json")


def test_a_missing_file_is_refused(folder):
    with pytest.raises(Refusal, match="no such data file"):
        data_rows.read_rows(folder / "none.json")
    with pytest.raises(Refusal, match="no such folder of images"):
        data_rows.read_rows(written(folder, ENTRIES["LLaVA"]), folder / "none")


def test_json_that_breaks_off_is_refused_with_its_place(folder):
    data = written(folder, [conversation(str(n), "a.png", "q", "a") for n in range(300)])
    (folder / "cut.json").write_text(data.read_text()[:-40])
    with pytest.raises(Refusal, match="cut.json: the JSON breaks off .*after row 299, before byte"):
        data_rows.read_rows(folder / "cut.json")


def test_a_broken_line_of_json_lines_is_one_bad_row(folder):
    data = written(folder, ENTRIES["LLaVA"], "rows.jsonl")
    with data.open("ab") as stream:
        stream.write(b'\n{"id": "s", "image":\n\xff\n[1]\n')
    row, *bad = data_rows.stream(data)
    encoded = "not UTF-8 text: save the file as UTF-8"
    assert bad == [Rejected(str(n), f"rows.jsonl, row {n + 2}", reason)
                   for n, reason in ((1, "not a row"), (2, encoded), (3, "not a row"))]


def test_damaged_parquet_is_refused(tmp_path):
    data = hub_folder(tmp_path / "set") / "data/train-00001-of-00002.parquet"
    data.write_bytes(data.read_bytes()[:-30])
    with pytest.raises(Refusal, match="parquet file is cut off or damaged"):
        list(data_rows.stream(tmp_path / "set"))


def test_a_folder_saved_to_disk_is_refused_with_the_way_to_convert(tmp_path):
    datasets.Dataset.from_dict({"question": ["q"]}).save_to_disk(tmp_path / "set")
    for data in (tmp_path / "set", next((tmp_path / "set").glob("*.arrow"))):
        with pytest.raises(Refusal, match="to_parquet"):
            data_rows.layout(data)


def test_parts_of_a_data_set_are_not_mixed(tmp_path):
    data = hub_folder(tmp_path / "set") / "data"
    (data / "train-00001-of-00002.parquet").rename(data / "test-00000-of-00001.parquet")
    with pytest.raises(Refusal, match=r"several parts \(data/test, data/train\)"):
        data_rows.layout(tmp_path / "set")


def test_a_folder_with_nothing_to_read_is_refused(folder):
    with pytest.raises(Refusal, match="exactly one CSV file, there are 0"):
        data_rows.layout(folder)


# --- rows that cannot be used -------------------------------------------------------------------

def bad_entries(folder):
    """reason -> entries that are rejected for it."""
    (folder.parent / "outside.png").write_bytes(png())
    whole = conversation("r", "a.png", "q ?", "red")

    def without(name):
        return {k: v for k, v in whole.items() if k != name}

    return {
        "not a row": [7, ["r"], None],
        "no image": [{**whole, "image": ""}, {**whole, "image": []}, without("image")],
        "more than one image": [{**whole, "image": ["a.png", "a.png"]}],
        "image file is missing": [{**whole, "image": n} for n in ("none.png", ".", "a\0.png")],
        "image path leaves the image folder": [{**whole, "image": n} for n in (
            "../outside.png", str(folder.parent / "outside.png"), str(folder / "a.png"))],
        "empty answer": [conversation("r", "a.png", "q ?", "  ")],
        "no conversation": [
            without("conversations"), {**whole, "conversations": "q"},
            {**whole, "conversations": [{"from": "human"}]}, {**whole, "conversations": []},
            {**whole, "conversations": whole["conversations"][:1]}]}


REASONS = {"not a row": 3, "no image": 3, "more than one image": 1, "image file is missing": 3,
           "image path leaves the image folder": 3, "empty answer": 1, "no conversation": 5}


@pytest.mark.parametrize("reason, number", [(r, i) for r, n in REASONS.items() for i in range(n)])
def test_a_row_that_cannot_be_used_is_skipped_and_counted(folder, reason, number):
    bad = bad_entries(folder)[reason][number]
    rows, skipped = data_rows.read_rows(
        written(folder, [bad, conversation("good", "a.png", "q ?", "red")]))
    assert [r.id for r in rows] == ["good"]
    assert skipped == {reason: 1}


NOT_TEXT = "not a text: numbers and truth values must be written as one"


@pytest.mark.parametrize("name, change, reason", [
    ("BPO", {"completions": [{"score": 1, "response": "x", "type": "llm-hal"}]},
     "no annotated answer"),
    ("BPO", {"completions": None}, "no annotated answer"), ("BPO", {"completions": 3}, "not a row"),
    ("RLHF-V", {"question": ""}, "empty question"), ("RLHF-V", {"chosen": None}, "empty answer"),
    ("TRL", {"prompt": message("assistant", "q")}, "the assistant speaks first"),
    ("TRL", {"prompt": ["q"]}, "no conversation"),
    ("TRL", {"images": ["a.png"] * 2}, "more than one image"),
    ("TRL", {"prompt": message("user", TYPED + TYPED)},
     "<image> more often than there are images"),
    ("TRL", {"chosen": message("user", "q") + message("assistant", "a")},
     "an answer of several turns"),
    ("answers", {"answer": {"text": "red"}}, NOT_TEXT)])
def test_bad_rows_of_other_layouts_are_rejected(folder, name, change, reason):
    good = ENTRIES[name][0]
    bad = {**good, "id": "bad", **change}
    assert [getattr(r, "reason", "") for r in data_rows.stream(written(folder, [good, bad]))] == [
        "", reason]


def test_a_repeated_row_is_skipped_and_a_repeated_id_gets_a_number(folder):
    same_id = [conversation("r", "a.png", "q ?", a) for a in ("first", "second", "first", "third")]
    rows, skipped = data_rows.read_rows(written(folder, same_id))
    assert [(r.id, r.answer) for r in rows] == [("r", "first"), ("r~2", "second"), ("r~3", "third")]
    assert skipped == {"repeated row": 1}


def test_a_file_of_unusable_rows_alone_is_refused_with_the_counts(folder):
    data = written(folder, [conversation("r", "none.png", "q", "a")] * 2)
    with pytest.raises(Refusal, match="none of its 2 rows can be used: 2 image file is missing"):
        data_rows.read_rows(data)


# --- lists for held-out sets --------------------------------------------------------------------

def test_images_are_found_from_another_folder(folder, tmp_path_factory):
    data = written(tmp_path_factory.mktemp("elsewhere"), [conversation("r", "a.png", "q", "a")])
    with pytest.raises(Refusal, match="image file is missing"):
        data_rows.read_rows(data)
    rows, _ = data_rows.read_rows(data, folder)
    assert rows[0].image == folder / "a.png"


def test_the_truth_file_gives_the_category(data_file):
    rows, _ = data_rows.read_rows(data_file)
    assert {r.id.split("-")[0]: r.category for r in rows} == {
        "caption": "caption", "attribute": "attribute", "presence": "presence"}


def test_only_images_of_drawn_rows_are_opened(folder, monkeypatch):
    for n in range(20):
        (folder / f"{n}.png").write_bytes(png() if n % 2 else b"")
    data = written(folder, [conversation(f"r{n}", f"{n}.png", "q", "a") for n in range(20)])
    listed = data_rows.list_rows(data)[0]
    drawn = data_rows.draw_rows(listed, 6, 3, purpose="x")
    opened, look = [], images.problem
    monkeypatch.setattr(images, "problem", lambda file: opened.append(file) or look(file))
    rows, skipped = data_rows.read_rows(data, count=6, seed=3, purpose="x")
    assert sorted(opened) == sorted(r.image for r in drawn)
    assert rows == [r for r in drawn if r.image.stat().st_size]
    assert skipped == {"image file is empty": 6 - len(rows)}


@pytest.mark.study
def test_streaming_does_not_hold_the_rows(folder):
    peaks = {}
    for count in (250, 2000):
        data = written(folder, [conversation(str(n), "a.png", f"q {n} ?", "word " * 800)
                                for n in range(count)], f"{count}.json")
        tracemalloc.start()
        assert sum(isinstance(r, Row) for r in data_rows.stream(data)) == count
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (folder / "2000.json").stat().st_size > 8_000_000
    assert peaks[2000] - peaks[250] < 2000 * 250  # two hashes a row, not texts of 2000
    assert peaks[2000] < 3_000_000
