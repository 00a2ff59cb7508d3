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
import pyarrow.parquet
import pytest
import torch
from helpers.data import picture
from transformers import AutoProcessor, LlavaForConditionalGeneration
from trl import DPOConfig, DPOTrainer

from bpo import __main__
from bpo.data import rows as data_rows
from bpo.pairs import export
from bpo.params import PairGeneration, Refusal
from bpo.study import stage as stages
from bpo.study.files import read_lines, write_lines

HOSTILE = "<script>alert(1)</script> | $x^2$ `a` [b](http://c.d)\n# e \u202egnihton \u05d0\u05d1"
HISTORY = [{"role": "user", "content": "what is this ?"},
           {"role": "assistant", "content": "a dog"},
           {"role": "user", "content": "what colour is the dog ?"}]
SHARE = {"value": 0.0312, "low": 0.01, "high": 0.05, "n": 160}


def line(row_id, image, prompt, chosen, *rejected, category="attribute"):
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return {"id": row_id, "image": image, "category": category, "prompt": prompt,
            "chosen": chosen, "rejected": [
                {"source": s, "text": t} | ({"mode": "noisy"} if s == "weakened" else {})
                for s, t in rejected]}


LINES = [
    line("hostile", "a/0.png", f"say {HOSTILE}", f"chosen {HOSTILE}",
         ("injected", f"rejected {HOSTILE}"), category=f"cat|{HOSTILE}"),
    line("plain", "a/0.png", "what colour is the disc ?", "red", ("weakened", "green"),
         ("injected", "blue"), category="presence"),
    line("turns", "b/0.png", HISTORY, "blue", ("weakened", "red")),
    line("parquet", "in.parquet#1", "what colour is the box ?", "blue", ("given", "green")),
    line("grey", "grey", "what is this ?", "a cat", ("weakened", "a box")),
    line("alone", "a/0.png", "is there a cat ?", "no"),
    line("two users", "a/0.png", [HISTORY[0], HISTORY[2]], "no", ("injected", "yes")),
    line("tagged", "a/0.png", "what is this ?", "a dog", ("injected", "<image> a cat"),
         ("weakened", "a box")),
    line("tagged question", "a/0.png", "see <video> ?", "no", ("injected", "yes")),
    line("equal", "a/0.png", "is there a box ?", "no", ("injected", "no")),
]
PAIRS = [(n, a["text"]) for n in LINES[:5] + LINES[6:8] for a in n["rejected"]
         if "<image>" not in a["text"]]
ALTERNATING = [(n, text) for n, text in PAIRS if n["id"] != "two users"]


@pytest.fixture(scope="module")
def image_bytes():
    """image name -> its bytes: two of one name, a JPEG without an ending, one inside parquet."""
    def saved(colour, kind, mode="RGB"):
        buffer = io.BytesIO()
        picture("box", colour, 7).convert(mode).save(buffer, format=kind)
        return buffer.getvalue()

    return {"a/0.png": saved("red", "PNG"), "b/0.png": saved("blue", "PNG"),
            "grey": saved("blue", "JPEG", "L"), "in.parquet#1": saved("green", "PNG")}


def write_stage(root, image_bytes, lines, study="study"):
    """A complete notebook 2 as runs.stage leaves it, and its images in root's folder `pictures`."""
    for name, data in image_bytes.items():
        file = root / "pictures" / name.split("#")[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        if "#" in name:
            pyarrow.parquet.write_table(pyarrow.table({"image": [
                {"bytes": d, "path": None} for d in (image_bytes["grey"], data)]}), file)
        else:
            file.write_bytes(data)
    stage = root / study / "2_pair_generation"
    stage.mkdir(parents=True)
    write_lines(stage / "pairs.jsonl", lines)
    p = PairGeneration(study=study, model="/home/someone/private/llava", endpoint_model="m|<b>",
                       endpoint="http://name:secret@127.0.0.1:1/v1?key=k",
                       image_folder=str(root / "pictures"))
    (stage / "manifest.json").write_text(json.dumps({
        "stage": p.notebook, "parameters": p.shaping(), "inputs": {"data": "da7a" * 16},
        "metrics": {"pairs": 0, "injected": {"truth_right": None},
                    "weakened": {"truth_right": {"kept": SHARE}}},
        "outputs": {"pairs.jsonl": stages.file_hash(stage / "pairs.jsonl")},
        "versions": {"torch": "2.13.0"}, "device": "CPU", "commit": "0123456789ab",
        "finished": "2031-02-03 04:05 UTC", "seconds": 61.5}))
    return stage


@pytest.fixture(scope="module")
def made(image_bytes, tmp_path_factory):
    """layout -> its export, of one stage."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPO_OUTPUTS", str(root))
        write_stage(root, image_bytes, LINES)
        return {to: export.export("study", to) for to in export.LAYOUTS}


def parquet_rows(folder, cache):
    return datasets.load_dataset("parquet", data_files=str(folder / "train.parquet"),
                                 split="train", cache_dir=str(cache))


def stored_bytes(folder):
    return [(i["images"][0] if "images" in i else i["image"])["bytes"]
            for i in pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()]


def test_trl_s_dpo_trainer_takes_the_export_as_it_stands(made, model_folder, image_bytes, tmp_path):
    rows = parquet_rows(made["trl"], tmp_path / "cache")
    assert stored_bytes(made["trl"]) == [image_bytes[n["image"]] for n, _ in PAIRS]
    for row, (pair, rejected) in zip(rows, PAIRS, strict=True):
        assert row["images"][0].size == (40, 40) and row["prompt"] == pair["prompt"]
        assert row["chosen"] == [{"role": "assistant", "content": pair["chosen"]}]
        assert row["rejected"] == [{"role": "assistant", "content": rejected}]
    trainer = DPOTrainer(
        LlavaForConditionalGeneration.from_pretrained(model_folder),
        ref_model=LlavaForConditionalGeneration.from_pretrained(model_folder),
        args=DPOConfig(output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, bf16=False,
                       per_device_train_batch_size=len(rows), max_length=None, report_to=[],
                       gradient_checkpointing=False, logging_steps=1, save_strategy="no"),
        processing_class=AutoProcessor.from_pretrained(model_folder), train_dataset=rows)
    # Model and reference are one at the first step: -log sigmoid(0).
    assert trainer.train().training_loss == pytest.approx(torch.log(torch.tensor(2.0)).item(),
                                                          abs=1e-3)


def test_flat_parquet_holds_a_row_a_pair(made, image_bytes, tmp_path):
    rows = parquet_rows(made["parquet"], tmp_path)
    assert stored_bytes(made["parquet"]) == [image_bytes[n["image"]] for n, _ in PAIRS]
    assert [r["id"] for r in rows] == ["hostile/0", "plain/0", "plain/1", "turns/0", "parquet/0",
                                       "grey/0", "two users/0", "tagged/0"]
    row = rows[3]
    assert row.pop("image").size == (40, 40)
    assert row == {"id": "turns/0", "question": HISTORY[2]["content"], "history": HISTORY[:2],
                   "chosen": "blue", "rejected": "red", "source": "weakened", "mode": "noisy",
                   "category": "attribute"}


def test_the_release_s_layout_holds_scored_answers_and_lone_positives(made, image_bytes):
    rows = json.loads((made["bpo"] / "pairs.json").read_text(encoding="utf-8"))
    assert [r["id"] for r in rows] == [n["id"] for n in LINES if n["id"] != "tagged question"]
    assert [(made["bpo"] / r.pop("image")).read_bytes() for r in rows] == [
        image_bytes[n["image"]] for n in LINES if n["id"] != "tagged question"]
    assert rows[1] == {"id": "plain", "prompt": "<image>\nwhat colour is the disc ?",
                       "completions": [{"score": 1, "response": "red", "type": "gt"},
                                       {"score": 0, "response": "green", "type": "mllm-hal"},
                                       {"score": 0, "response": "blue", "type": "llm-hal"}]}
    assert rows[2]["prompt"] == ("<image>\nUSER: what is this ?\nASSISTANT: a dog\n"
                                 "USER: what colour is the dog ?")
    assert len(rows[5]["completions"]) == 1


@pytest.mark.parametrize("to", export.LAYOUTS)
def test_the_kit_reads_its_exports_back(made, to):
    read = list(data_rows.stream(made[to] / export.LAYOUTS[to][0], made[to]))
    rows = [r for r in read if isinstance(r, data_rows.Row)]
    wanted = PAIRS if to == "bpo" else ALTERNATING  # the release has the turns as one text
    if to != "bpo":
        assert [list(r.prompt) for r in rows for _ in r.given] == [n["prompt"] for n, _ in wanted]
    assert [(r.answer, text) for r in rows for text in r.given] == [
        (n["chosen"], text) for n, text in wanted]
    assert {r.reason for r in read if isinstance(r, data_rows.Rejected)} <= {
        "turns do not alternate"}


def test_llama_factory_s_rules_hold(made, image_bytes):
    folder = made["llama-factory"]
    assert json.loads((folder / "dataset_info.json").read_text()) == {"pairs": {
        "file_name": "pairs.json", "formatting": "sharegpt", "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected",
                    "images": "images"}}}
    rows = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    for row, (pair, rejected) in zip(rows, ALTERNATING, strict=True):
        turns = [m["content"] for m in pair["prompt"]]
        assert row["conversations"] == [
            {"from": f, "value": "<image>" * (n == 0) + t}
            for n, (f, t) in enumerate(zip(("human", "gpt", "human"), turns, strict=False))]
        assert row["chosen"] == {"from": "gpt", "value": pair["chosen"]}
        assert row["rejected"] == {"from": "gpt", "value": rejected}
        assert [(folder / i).read_bytes() for i in row["images"]] == [image_bytes[pair["image"]]]


def test_ms_swift_s_rules_hold(made, image_bytes):
    folder = made["ms-swift"]
    rows = read_lines(folder / "pairs.jsonl")
    for row, (pair, rejected) in zip(rows, ALTERNATING, strict=True):
        first, *rest = pair["prompt"]
        assert row["messages"] == [{"role": "user", "content": "<image>" + first["content"]}, *rest,
                                   {"role": "assistant", "content": pair["chosen"]}]
        assert row["rejected_response"] == rejected
        assert [(folder / i).read_bytes() for i in row["images"]] == [image_bytes[pair["image"]]]


@pytest.mark.parametrize("prompt, fits", [
    (HISTORY, True), ([{"role": "system", "content": ""}, *HISTORY], True), (HISTORY[:2], False),
    (HISTORY[1:], False), ([], False),
    ([HISTORY[0], {"role": "assistant", "content": " "}, HISTORY[2]], False)])
def test_turns_alternate_from_user_to_user(prompt, fits):
    assert export.alternates(prompt) is fits


def test_images_are_copied_once_with_their_sums_and_the_ending_of_their_kind(made):
    names = sorted(f.name for f in (made["bpo"] / "images").iterdir())
    assert [re.sub(r"-[0-9a-f]{16}", "", n) for n in names] == ["0.png", "0.png", "grey.jpg",
                                                                "in.png"]
    done = subprocess.run(["sha256sum", "-c", "images.sha256"], cwd=made["bpo"], check=True,
                          capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.parametrize("limit, value, groups", [("GROUP_ROWS", 4, [4, 4, 2]),
                                                  ("GROUP_BYTES", 30_000, [3, 3, 3, 1])])
def test_a_row_group_ends_at_its_rows_or_bytes(tmp_path, monkeypatch, limit, value, groups):
    monkeypatch.setattr(export, limit, value)
    row = {"image": {"bytes": bytes(10_000), "path": "x"}}
    file = tmp_path / "x.parquet"
    export.write_parquet(file, [row] * 10, pyarrow.schema(
        {"image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})}))
    found = pyarrow.parquet.ParquetFile(file)
    assert [found.metadata.row_group(g).num_rows for g in range(found.num_row_groups)] == groups


@pytest.mark.parametrize("to", export.LAYOUTS)
def test_the_card_is_what_hubs_read_counts_what_is_there_and_runs(made, to, monkeypatch, tmp_path):
    folder = made[to]
    card = huggingface_hub.DatasetCard.load(folder / "README.md")
    assert (card.data.license, card.data.size_categories) == ("unknown", ["n<1K"])
    assert card.data.configs[0]["data_files"] == [{"split": "train",
                                                   "path": export.LAYOUTS[to][0]}]
    alternating = to in ("llama-factory", "ms-swift")
    positives = {"bpo": 9, "trl": 7, "parquet": 7}.get(to, 6)
    assert f"{8 - alternating} pairs from {positives} of 10 annotated answers." in card.text
    listed = dict(re.findall(r"^\| `(\S+)` \| `([0-9a-f]{64})` \|$",
                             card.text.split("## Files")[1], re.MULTILINE))
    files = {f.name for f in folder.iterdir() if f.is_file()} - {"README.md"}
    assert listed == {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in files}
    left_out = re.findall(r"^- (positives|rejected answers) (.*): (\d)$", card.text, re.MULTILINE)
    assert left_out == [r for r in (
        ("positives", f"whose text has {export.TAGGED}", "1"),
        ("positives", "whose turns do not alternate", "1" * alternating),
        ("positives", "without a rejected answer", "2" * (to != "bpo")),
        ("rejected answers", "that equal the chosen one", "1"),
        ("rejected answers", f"that have {export.TAGGED}", "1")) if r[2]]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    snippet, = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_card_lists_the_hash_of_the_manifest_for_a_large_file(tmp_path):
    size = 256 * 2**20 + 1  # just too large to be hashed in full
    with (tmp_path / "train.parquet").open("wb") as stream:
        stream.truncate(size)
    tally = export.Tally(example=LINES[0])
    manifest = {"metrics": {}, "versions": {}, "parameters": {}, "inputs": {}, "commit": "none",
                "device": "CPU"}
    text = export.card("study", manifest, tally, "trl", tmp_path).text
    found = re.search(r"\| `train\.parquet` \| `(\w+)` \|", text)[1]
    assert found == stages.file_hash(tmp_path / "train.parquet")
    assert found == hashlib.sha256(str(size).encode() + bytes(64 * 2**20)).hexdigest()


def test_the_card_shows_foreign_text_as_text_and_nothing_private(made):
    body = huggingface_hub.DatasetCard.load(made["trl"] / "README.md").text
    assert "<script" not in body and "$x" not in body and "http://c" not in body
    assert "\u202e" not in body and "m|<b>" not in body
    for table in re.findall(r"(?:^\|.*\n?)+", body, re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1
    shown = html.unescape(body)
    assert "\\u202e" in shown and "m|<b>" in shown
    assert ".../llava" in shown and "http://127.0.0.1:1/v1" in shown
    for private in ("someone", "secret", "key=k", str(made["trl"].parents[1]), "2031", "61.5"):
        assert private not in shown
    assert "3.1% are in truth right" in shown and "Of the injected answers" not in shown
    assert "da7a" * 16 in shown and "0123456789ab" in shown
    for name in PairGeneration(study="s").shaping():
        assert f"| `{name}` |" in body


@pytest.mark.parametrize("value", ["a", "*b*", "_c_", "[d](e)", "![f](g)", "&amp;", "<!--", "`h`",
                                   "~~i~~", "$$j$$", "k|l", "m\nn", "www.o.p", "q@r.s", "# t"])
def test_literal_text_comes_back_and_has_no_sign_in_it(value):
    shown = export.literal(value)
    inner = re.fullmatch(r"<code>(.*)</code>|`([^`|$<>&\n]*)`", shown)
    assert html.unescape(inner[1] or inner[2]) == value.replace("\n", " ")
    assert inner[2] or re.fullmatch(r"([a-z ,-]|&#\d+;)*", inner[1])


def tree(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("to", export.LAYOUTS)
def test_the_same_pairs_give_the_same_bytes_in_place_of_an_older_export(
        made, image_bytes, outputs, to):
    write_stage(outputs, image_bytes, LINES)
    older = outputs / "study" / "exports" / to
    older.mkdir(parents=True)
    (older / "left over.txt").write_text("x")
    assert __main__.main(["export", "study", "--to", to]) == 0
    assert tree(older) == tree(made[to])
    assert [f.name for f in older.parent.iterdir()] == [to]


def test_a_refused_export_leaves_the_older_one_and_nothing_half_written(image_bytes, outputs):
    write_stage(outputs, image_bytes, LINES)
    folder = export.export("study", "bpo")
    before = tree(folder)
    (outputs / "pictures" / "grey").unlink()
    with pytest.raises(Refusal, match="pictures/grey: image file is missing"):
        export.export("study", "bpo")
    assert tree(folder) == before and [f.name for f in folder.parent.iterdir()] == ["bpo"]


def test_what_cannot_be_exported_is_refused_with_the_reason(image_bytes, outputs):
    with pytest.raises(Refusal, match=r"is not complete: .*python -m bpo run other --only 2"):
        export.export("other", "trl")
    write_stage(outputs, image_bytes, [LINES[5], LINES[8]], study="empty")
    for to in export.LAYOUTS:
        with pytest.raises(Refusal, match=r"no pair to export \(positives whose text .*: 1"):
            export.export("empty", to)
    write_stage(outputs, image_bytes, [{**LINES[0], "image": "../secret.png"}], study="outside")
    with pytest.raises(Refusal, match="leaves the image folder"):
        export.export("outside", "bpo")
    write_lines(write_stage(outputs, image_bytes, LINES) / "pairs.jsonl", LINES[:1])
    with pytest.raises(Refusal, match=r"pairs\.jsonl was changed after the stage"):
        export.export("study", "trl")


def test_an_unknown_layout_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["export", "study", "--to", "llamafactory"])
    assert "'trl', 'bpo', 'llama-factory', 'ms-swift', 'parquet'" in capsys.readouterr().err
