"""Exports: every layout is read back as its tool reads it; what has no place is left out and
counted; the card says what is there and runs; the same pairs give the same bytes."""

import hashlib
import html
import io
import json
import re
import subprocess

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import COLOURS, picture
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from trl import DPOConfig, DPOTrainer

from bpo import card, exports, images, readers, records, runs, writers
from bpo.params import PairGeneration, Refusal

HOSTILE = "<script>alert(1)</script> | $x^2$ `a` [b](http://c.d)\n# e \u202egnihton \u05d0\u05d1"
HISTORY = [{"role": "user", "content": "what is this ?"},
           {"role": "assistant", "content": "a dog"},
           {"role": "user", "content": "what colour is the dog ?"}]
FOLDERS = {"trl": "train.parquet", "bpo": "pairs.json", "llama-factory": "pairs.json",
           "ms-swift": "pairs.jsonl", "parquet": "train.parquet"}


def made_line(row_id, image, prompt, chosen, *rejected, category="attribute"):
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {"id": row_id, "image": image, "category": category, "prompt": prompt,
            "chosen": chosen, "rejected": list(rejected)}


def weakened(text, mode="noisy"):
    return {"source": "weakened", "text": text, "mode": mode, "step": 800, "draw": 0, "sample": 0,
            "scores": {"similarity": 0.5}}


def injected(text):
    return {"source": "injected", "text": text, "sample": 0}


@pytest.fixture(scope="session")
def image_folder(data_file, tmp_path_factory):
    """The images of the data file, one that lies in parquet, one of the same name elsewhere, and a
    grey JPEG whose name has no ending."""
    root = tmp_path_factory.mktemp("export images")
    for file in (data_file.parent / "images").iterdir():
        (root / "images").mkdir(exist_ok=True)
        (root / "images" / file.name).write_bytes(file.read_bytes())
    (root / "other").mkdir()
    picture("cat", "red", 9).save(root / "other" / "0.png")
    picture("cat", "blue", 8).convert("L").save(root / "grey", format="JPEG")
    inside = [io.BytesIO() for _ in range(3)]
    for buffer, colour in zip(inside, COLOURS, strict=False):
        picture("box", colour, 7).save(buffer, format="PNG")
    pyarrow.parquet.write_table(pyarrow.table(
        {"image": [{"bytes": b.getvalue(), "path": None} for b in inside]}), root / "in.parquet")
    return root


LINES = [
    made_line("hostile", "images/1.png", f"say {HOSTILE}", f"chosen {HOSTILE}",
              injected(f"rejected {HOSTILE}"), category=f"cat|{HOSTILE}"),
    made_line("plain", "images/0.png", "what colour is the disc ?", "red", weakened("green"),
              injected("blue"), category="presence"),
    made_line("turns", "images/2.png", HISTORY, "blue", weakened("red", "crop")),
    made_line("parquet", "in.parquet#2", "what colour is the box ?", "blue",
              {"source": "given", "text": "green"}),
    made_line("same name", "other/0.png", "what is this ?", "a red cat", injected("a dog")),
    made_line("grey", "grey", "what is this ?", "a cat", weakened("a box", "blank")),
    made_line("alone", "images/3.png", "is there a cat ?", "no"),
    made_line("two users", "images/3.png", [{"role": "user", "content": "look"}, *HISTORY[2:]],
              "no", injected("yes")),
    made_line("tagged", "images/3.png", "what is this ?", "a dog", injected("<image> a cat"),
              weakened("a box")),
    made_line("tagged question", "images/3.png", "see <video> ?", "no", injected("yes")),
    made_line("equal", "images/3.png", "is there a box ?", "no", injected("no")),
]
FLAT = [(k, r) for k in LINES[:6] + LINES[7:9] for r in k["rejected"] if "<image>" not in r["text"]]
ALTERNATING = [(k, r) for k, r in FLAT if k["id"] != "two users"]


def write_stage(study, lines, **metrics):
    """A complete notebook 2 as runs.stage leaves it."""
    folder = study / "2_pair_generation"
    folder.mkdir(parents=True)
    records.write_lines(folder / "pairs.jsonl", lines)
    p = PairGeneration(study=study.name, model="/home/someone/private/llava",
                       endpoint="http://name:secret@127.0.0.1:1/v1?key=k", endpoint_model="m|<b>",
                       image_folder=str(study))
    manifest = {"stage": p.notebook, "study": p.study, "parameters": p.shaping(),
                "inputs": {"model": "m0de1" * 8, "data": "da7a" * 16}, "modules": {},
                "metrics": {"pairs": 0, **metrics},
                "outputs": {"pairs.jsonl": runs.file_hash(folder / "pairs.jsonl")},
                "versions": {"torch": "2.13.0", "trl": "1.16.0"}, "python": "3.11.7",
                "device": "CPU", "commit": "0123456789ab", "finished": "2031-02-03 04:05 UTC",
                "seconds": 61.5}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def made(image_folder, tmp_path_factory):
    """layout -> its export, of one stage."""
    root = tmp_path_factory.mktemp("made")
    share = {"value": 0.0312, "low": 0.01, "high": 0.05, "n": 160}
    stage = write_stage(root / "study", LINES, weakened={"truth_right": {"kept": share}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPO_OUTPUTS", str(root))
        return {to: exports.export(stage, to, image_folder=image_folder) for to in exports.LAYOUTS}


def parquet_rows(folder, cache):
    return datasets.load_dataset("parquet", data_files=str(folder / "train.parquet"),
                                 split="train", cache_dir=str(cache))


def pixels(image):
    return image.size, image.convert("RGB").tobytes()


def original(image_folder, name):
    """The bytes of an image as the source holds them."""
    if "#" not in name:
        return (image_folder / name).read_bytes()
    rows = pyarrow.parquet.read_table(image_folder / "in.parquet")["image"].to_pylist()
    return rows[int(name.split("#")[1])]["bytes"]


# --- the layouts, read as their tools read them -------------------------------------------------

def test_trl_s_parquet_gives_pictures_and_conversations(made, image_folder, tmp_path):
    rows = parquet_rows(made["trl"], tmp_path)
    assert rows.column_names == ["images", "prompt", "chosen", "rejected"]
    assert len(rows) == len(FLAT)
    for row, (line, answer) in zip(rows, FLAT, strict=True):
        assert row["prompt"] == line["prompt"]
        assert row["chosen"] == [{"role": "assistant", "content": line["chosen"]}]
        assert row["rejected"] == [{"role": "assistant", "content": answer["text"]}]
        assert len(row["images"]) == 1
        assert pixels(row["images"][0]) == pixels(
            Image.open(io.BytesIO(original(image_folder, line["image"]))))


def test_trl_s_dpo_trainer_takes_the_export_as_it_stands(made, model_folder, tmp_path):
    rows = parquet_rows(made["trl"], tmp_path / "cache")
    trainer = DPOTrainer(
        LlavaForConditionalGeneration.from_pretrained(model_folder),
        ref_model=LlavaForConditionalGeneration.from_pretrained(model_folder),
        args=DPOConfig(output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, bf16=False,
                       per_device_train_batch_size=len(rows), max_length=None, report_to=[],
                       gradient_checkpointing=False, logging_steps=1, save_strategy="no"),
        processing_class=AutoProcessor.from_pretrained(model_folder), train_dataset=rows)
    before = {n: w.clone() for n, w in trainer.model.named_parameters()}
    loss = trainer.train().training_loss
    # Model and reference are one at the first step: -log sigmoid(0).
    assert loss == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-3)
    assert any(not torch.equal(w, before[n]) for n, w in trainer.model.named_parameters())


def test_flat_parquet_holds_a_row_a_pair(made, tmp_path):
    rows = parquet_rows(made["parquet"], tmp_path)
    assert isinstance(rows.features["image"], datasets.Image)
    for row, (line, answer) in zip(rows, FLAT, strict=True):
        assert row.pop("image").size == (40, 40) or line["image"] in ("images/0.png",
                                                                      "images/2.png")
        number = line["rejected"].index(answer) - (line["id"] == "tagged")
        assert row == {"id": f"{line['id']}/{number}", "question": line["prompt"][-1]["content"],
                       "history": line["prompt"][:-1], "chosen": line["chosen"],
                       "rejected": answer["text"], "source": answer["source"],
                       "mode": answer.get("mode"), "category": line["category"]}


def test_the_release_s_layout_holds_scored_answers_and_lone_positives(made, image_folder):
    rows = json.loads((made["bpo"] / "pairs.json").read_text(encoding="utf-8"))
    wanted = [k for k in LINES if k["id"] != "tagged question"]
    assert [r["id"] for r in rows] == [k["id"] for k in wanted]
    types = {"weakened": "mllm-hal", "injected": "llm-hal", "given": "given"}
    for row, line in zip(rows, wanted, strict=True):
        assert set(row) == {"id", "prompt", "image", "completions"}
        kept = [r for r in line["rejected"]
                if "<image>" not in r["text"] and r["text"] != line["chosen"]]
        assert row["completions"] == [
            {"score": 1, "response": line["chosen"], "type": "gt"},
            *({"score": 0, "response": r["text"], "type": types[r["source"]]} for r in kept)]
        copied = (made["bpo"] / row["image"]).read_bytes()
        assert copied == original(image_folder, line["image"])
    prompts = {r["id"]: r["prompt"] for r in rows}
    assert prompts["plain"] == "<image>\nwhat colour is the disc ?"
    assert prompts["turns"] == ("<image>\nUSER: what is this ?\nASSISTANT: a dog\n"
                                "USER: what colour is the dog ?")


@pytest.mark.parametrize("to", ["bpo", "trl", "parquet"])
def test_the_kit_s_own_readers_give_the_positives_and_rejected_answers_back(made, to):
    rows = [r for r in readers.stream(made[to] / FOLDERS[to], made[to])
            if isinstance(r, records.Row)]
    wanted = ([(k, [r["text"] for r in k["rejected"] if "<image>" not in r["text"]
                    and r["text"] != k["chosen"]]) for k in LINES if k["id"] != "tagged question"]
              if to == "bpo" else [(k, [r["text"]]) for k, r in FLAT])
    assert [(r.answer, list(r.given)) for r in rows] == [(k["chosen"], g) for k, g in wanted]
    for row, (line, _) in zip(rows, wanted, strict=True):
        assert images.problem(row.image) is None
        if len(line["prompt"]) == 1:
            assert [dict(m) for m in row.prompt] == line["prompt"]


def test_llama_factory_s_rules_hold(made, image_folder):
    folder = made["llama-factory"]
    (name, info), = json.loads((folder / "dataset_info.json").read_text()).items()
    assert (name, info["formatting"], info["ranking"]) == ("pairs", "sharegpt", True)
    assert set(info["columns"]) == {"messages", "chosen", "rejected", "images"}
    rows = json.loads((folder / info["file_name"]).read_text(encoding="utf-8"))
    for row, (line, answer) in zip(rows, ALTERNATING, strict=True):
        assert set(info["columns"].values()) == set(row)
        turns, chosen, rejected, files = (
            row[info["columns"][c]] for c in ("messages", "chosen", "rejected", "images"))
        assert len(turns) % 2 == 1
        assert [t["from"] for t in turns] == ["human", "gpt", "human"][:len(turns)]
        texts = [t["value"] for t in (*turns, chosen, rejected)]
        assert sum(t.count("<image>") for t in texts) == len(files) == 1
        assert turns[0]["value"] == "<image>" + line["prompt"][0]["content"]
        assert chosen == {"from": "gpt", "value": line["chosen"]}
        assert rejected == {"from": "gpt", "value": answer["text"]}
        assert (folder / files[0]).read_bytes() == original(image_folder, line["image"])


def test_ms_swift_s_rules_hold(made, image_folder):
    folder = made["ms-swift"]
    rows = [json.loads(t) for t in (folder / "pairs.jsonl").read_text(encoding="utf-8").split("\n")
            if t]
    for row, (line, answer) in zip(rows, ALTERNATING, strict=True):
        assert set(row) == {"messages", "rejected_response", "images"}
        roles = [m["role"] for m in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(m["content"] for m in row["messages"])
        assert row["messages"][-1]["content"] == line["chosen"] != row["rejected_response"]
        assert row["rejected_response"] == answer["text"]
        assert [m["content"].count("<image>") for m in row["messages"]] == [1] + [0] * (
            len(roles) - 1)
        assert [(folder / i).read_bytes() for i in row["images"]] == [
            original(image_folder, line["image"])]


@pytest.mark.parametrize("prompt, fits", [
    (HISTORY, True), (HISTORY[:1], True), ([{"role": "system", "content": ""}, *HISTORY], True),
    (HISTORY[:2], False), (HISTORY[1:], False), ([], False),
    ([HISTORY[0], {"role": "assistant", "content": " "}, HISTORY[2]], False)])
def test_turns_alternate_from_user_to_user(prompt, fits):
    assert exports.alternates(prompt) is fits


# --- images -------------------------------------------------------------------------------------

@pytest.mark.parametrize("to", ["bpo", "llama-factory", "ms-swift"])
def test_images_are_copied_once_with_their_sums_and_the_ending_of_their_kind(made, to):
    names = sorted(f.name for f in (made[to] / "images").iterdir())
    assert len({re.sub(r"-[0-9a-f]{16}", "", n) for n in names}) < len(names)  # two are 0.png
    assert [n.rpartition(".")[2] for n in names if n.startswith("grey")] == ["jpg"]
    assert subprocess.run(["sha256sum", "-c", "--quiet", "images.sha256"], cwd=made[to],
                          check=False).returncode == 0
    sums = (made[to] / "images.sha256").read_text().splitlines()
    assert sorted(s.split("/")[1] for s in sums) == names


def test_an_image_of_many_rows_is_stored_once_in_a_row_group(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "GROUP_ROWS", 40)
    many = [made_line(str(n), "images/0.png", "?", "a", injected("b")) for n in range(100)]
    found = writers.Images(image_folder, tmp_path)
    writers.WRITERS["trl"](iter(many), found, tmp_path)
    file = pyarrow.parquet.ParquetFile(tmp_path / "train.parquet")
    assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == [40, 40, 20]
    size = (image_folder / "images" / "0.png").stat().st_size
    assert 3 * size < (tmp_path / "train.parquet").stat().st_size < 5 * size + 8000


def test_a_row_group_ends_where_its_images_are_large(image_folder, tmp_path, monkeypatch):
    size = (image_folder / "images" / "0.png").stat().st_size
    monkeypatch.setattr(writers, "GROUP_BYTES", 3 * size)
    many = [made_line(str(n), "images/0.png", "?", "a", injected("b")) for n in range(7)]
    writers.WRITERS["parquet"](iter(many), writers.Images(image_folder, tmp_path), tmp_path)
    file = pyarrow.parquet.ParquetFile(tmp_path / "train.parquet")
    assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == [3, 3, 1]


# --- the card -----------------------------------------------------------------------------------

@pytest.mark.parametrize("to", FOLDERS)
def test_the_card_counts_what_is_there_and_what_was_left_out(made, to):
    text = (made[to] / "README.md").read_text(encoding="utf-8")
    pairs = len(ALTERNATING if to in exports.ALTERNATING else FLAT)
    positives = {"bpo": 10, "trl": 8, "parquet": 8}.get(to, 7)
    assert f"{pairs} pairs from {positives} of 11 annotated answers." in text
    assert re.findall(r"^- (.*): (\d+)$", text, re.MULTILINE) == [r for r in (
        ("positives whose text has " + exports.TAGGED, "1"),
        ("positives whose turns do not alternate", "1" if to in exports.ALTERNATING else ""),
        ("positives without a rejected answer", "" if to == "bpo" else "2"),
        ("rejected answers that equal the chosen one", "1"),
        ("rejected answers that have " + exports.TAGGED, "1")) if r[1]]


@pytest.mark.parametrize("to", FOLDERS)
def test_the_card_s_head_is_what_hubs_read(made, to):
    read = huggingface_hub.DatasetCard.load(made[to] / "README.md")
    assert read.data.license == "unknown"
    assert read.data.task_categories == ["image-text-to-text"]
    assert read.data.size_categories == ["n<1K"]
    path = read.data.to_dict()["configs"][0]["data_files"][0]["path"]
    assert (made[to] / path).is_file() and path == FOLDERS[to]


@pytest.mark.parametrize("to", FOLDERS)
def test_the_card_lists_the_hash_of_every_data_file(made, to):
    text = (made[to] / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\S+)` \| `([0-9a-f]{64})` \|$", text.split("## Files")[1],
                             re.MULTILINE))
    files = {f.name for f in made[to].iterdir() if f.is_file()} - {"README.md"}
    assert listed == {n: hashlib.sha256((made[to] / n).read_bytes()).hexdigest() for n in files}


@pytest.mark.parametrize("to", FOLDERS)
def test_the_card_s_snippet_runs_in_its_folder(made, to, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(made[to])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    snippet, = re.findall(r"```python\n(.*?)```", (made[to] / "README.md").read_text(
        encoding="utf-8"), re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    assert "40" in capsys.readouterr().out or to == "parquet"


def test_the_card_shows_foreign_text_as_text_only(made):
    body = (made["trl"] / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)[1]
    assert "<script" not in body and "$x" not in body and "http://c" not in body
    assert "\u202e" not in body and "\\u202e" in html.unescape(body)
    assert "m|<b>" in html.unescape(body) and "m|<b>" not in body
    for table in re.findall(r"(?:^\|.*\n?)+", body, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_card_keeps_private_folders_and_passwords_to_itself(made):
    text = html.unescape((made["trl"] / "README.md").read_text(encoding="utf-8"))
    assert "someone" not in text and "secret" not in text and "key=k" not in text
    assert ".../llava" in text and "http://127.0.0.1:1/v1" in text
    assert str(made["trl"].parents[1]) not in text


def test_the_card_says_how_the_pairs_were_made_and_how_many_are_right(made):
    text = html.unescape((made["trl"] / "README.md").read_text(encoding="utf-8"))
    assert "Of the weakened answers that notebook 2 kept, 3.1% are in truth right" in text
    assert "da7a" * 16 in text and "0123456789ab" in text
    assert "2031" not in text and "61.5" not in text
    for name in PairGeneration(study="s").shaping():
        assert f"| `{name}` |" in text


@pytest.mark.parametrize("value", ["a", "*b*", "_c_", "[d](e)", "![f](g)", "&amp;", "<!--", "`h`",
                                   "~~i~~", "$$j$$", "k|l", "m\nn", "www.o.p", "q@r.s", "# t"])
def test_literal_text_comes_back_and_has_no_sign_in_it(value):
    shown = card.literal(value)
    inner = re.fullmatch(r"<code>(.*)</code>|`([^`|$<>&\n]*)`", shown)
    assert html.unescape(inner[1] or inner[2]) == value.replace("\n", " ")
    assert inner[2] or re.fullmatch(r"([a-z ,-]|&#\d+;)*", inner[1])


# --- whole or not at all ------------------------------------------------------------------------

def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*"))
            if f.is_file()}


@pytest.mark.parametrize("to", FOLDERS)
def test_the_same_pairs_give_the_same_bytes(made, image_folder, outputs, to):
    stage = write_stage(outputs / "study", LINES, weakened={"truth_right": {"kept": {
        "value": 0.0312, "low": 0.01, "high": 0.05, "n": 160}}})
    manifest = json.loads((stage / "manifest.json").read_text())
    manifest |= {"finished": "2032-01-01 00:00 UTC", "seconds": 1.0}
    manifest["parameters"]["image_folder"] = ".../study"
    (stage / "manifest.json").write_text(json.dumps(manifest))
    again = exports.export(stage, to, image_folder=image_folder)
    assert tree(again) == tree(made[to])
    assert again == outputs / "study" / "exports" / to


def test_a_newer_export_takes_the_place_of_the_older_one(image_folder, outputs):
    stage = write_stage(outputs / "study", LINES)
    folder = exports.export(stage, "ms-swift", image_folder=image_folder)
    (folder / "left over.txt").write_text("x")
    exports.export(stage, "ms-swift", image_folder=image_folder)
    assert not (folder / "left over.txt").exists()
    assert [f.name for f in folder.parent.iterdir()] == ["ms-swift"]


def test_a_refused_export_leaves_the_older_one_and_nothing_half_written(image_folder, outputs):
    stage = write_stage(outputs / "study", LINES)
    folder = exports.export(stage, "bpo", image_folder=image_folder)
    before = tree(folder)
    with pytest.raises(Refusal, match="image file is missing; name the folder"):
        exports.export(stage, "bpo", image_folder=image_folder / "images")
    assert tree(folder) == before
    assert [f.name for f in folder.parent.iterdir()] == ["bpo"]


# --- refusals -----------------------------------------------------------------------------------

def test_a_stage_that_is_not_complete_is_refused_with_what_to_run(image_folder, outputs):
    stage = write_stage(outputs / "study", LINES)
    (stage / "manifest.json").unlink()
    with pytest.raises(Refusal, match=r"is not complete: .*python -m bpo run study --only 2"):
        exports.export(stage, "trl", image_folder=image_folder)
    with pytest.raises(Refusal, match=r"python -m bpo run other --only 2"):
        exports.export(outputs / "other" / "2_pair_generation", "trl", image_folder=image_folder)


def test_edited_pairs_are_refused(image_folder, outputs):
    stage = write_stage(outputs / "study", LINES)
    records.write_lines(stage / "pairs.jsonl", LINES[:1])
    with pytest.raises(Refusal, match=r"pairs\.jsonl was changed after the stage"):
        exports.export(stage, "trl", image_folder=image_folder)


def test_an_unknown_layout_is_refused_with_the_nearest(image_folder, outputs):
    stage = write_stage(outputs / "study", LINES)
    with pytest.raises(Refusal, match=r"llamafactory: .* \(did you mean llama-factory\?\); there "
                                      "is trl, bpo, llama-factory, ms-swift, parquet"):
        exports.export(stage, "llamafactory", image_folder=image_folder)


@pytest.mark.parametrize("to", FOLDERS)
def test_no_pair_to_write_is_refused_with_the_reasons(image_folder, outputs, to):
    stage = write_stage(outputs / "study", [LINES[6], LINES[9]])
    with pytest.raises(Refusal, match=r"no pair to export \(positives whose text .*: 1"):
        exports.export(stage, to, image_folder=image_folder)
    assert not any((outputs / "study" / "exports").iterdir())


def test_an_image_outside_its_folder_is_refused(image_folder, outputs):
    stage = write_stage(outputs / "study", [{**LINES[0], "image": "../secret.png"}])
    with pytest.raises(Refusal, match="leaves the image folder"):
        exports.export(stage, "bpo", image_folder=image_folder)


@pytest.mark.parametrize("text", ["{", "[1]", '{"id": "a"}', ""])
def test_a_line_that_is_no_pair_is_refused_with_its_number(tmp_path, text):
    file = tmp_path / "pairs.jsonl"
    file.write_text(f"{json.dumps(LINES[0])}\n{text}\n")
    with pytest.raises(Refusal, match="line 2 does not hold"):
        list(exports.read_lines(file))
