"""A study of the user's own model and pictures: what is decided, written and refused, and that it
runs."""

import csv
import json
import os
import shutil
import subprocess

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from helpers.data import COLOURS, THINGS, conversation, picture
from helpers.qwen import write_qwen
from helpers.study import command

from bpo import new, params
from bpo.__main__ import main
from bpo.data import rows as data_rows
from bpo.models import checkpoint as checkpoints
from bpo.params import Refusal

NOTEBOOKS = ["1_noise_probability", "2_pair_generation", "3_dpo_training",
             "4_qualitative_comparison"]


@pytest.fixture(autouse=True)
def studies(tmp_path, outputs, monkeypatch):
    """Folders of parameters and outputs of the test's own: the project's are not touched."""
    monkeypatch.setenv("BPO_PARAMS", str(tmp_path / "params"))
    return tmp_path / "params"


def entries(count=10):
    """So many pictures, by name, each with a question and an answer."""
    for n in range(count):
        thing, colour = THINGS[n % 4], list(COLOURS)[n // 4 % 4]
        yield f"{n}.png", f"what colour is the {thing} ?", colour, picture(
            thing, colour, n, (40 + n, 60 - n))


def pictures(folder, count=10):
    """A folder of pictures and the CSV beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "answers.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Image", "Question", "Answer"])
        for name, question, answer, image in entries(count):
            image.save(folder / name)
            table.writerow([name, question, answer])
    return folder / "answers.csv"


@pytest.fixture
def ten(tmp_path):
    return pictures(tmp_path / "pictures")


def rows_of(study):
    """The rows to train on and the held-out ones, as the notebooks would read them."""
    read = params.read_study(study)
    made, compared = read["2_pair_generation"], read["4_qualitative_comparison"]
    (split,) = compared.splits.values()
    return [data_rows.list_rows(p.path(data), p.optional_path(p.image_folder))[0]
            for p, data in ((made, made.data), (compared, split))]


def plain(rows):
    """Rows in an order of their own, to be compared."""
    return sorted((r.id, str(r.image), r.prompt[-1]["content"], len(r.prompt), r.answer, r.category,
                   r.given) for r in rows)


@pytest.mark.slow
def test_ten_pictures_become_a_report(tmp_path, ten, model_folder, outputs):
    def bpo(*arguments):
        done = subprocess.run(command(*arguments), cwd=tmp_path, text=True,
                              capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = bpo("new", "ten", "--model", os.path.relpath(model_folder, tmp_path), "--data",
               "pictures/answers.csv")
    assert "10 rows can be used" in said and "MISSING" not in said
    count = len(params.DPOTraining.model_fields)
    assert f"{count} parameters are good" in said and said.endswith("next: python -m bpo run ten\n")
    bpo("check", "ten")
    bpo("run", "ten")
    assert (outputs / "ten" / "index.html").is_file()
    assert (outputs / "ten" / "4_qualitative_comparison.html").is_file()
    found = {n: json.loads((outputs / "ten" / n / "manifest.json").read_text())["metrics"]
             for n in NOTEBOOKS}
    assert list(found["3_dpo_training"]["methods"]) == ["sft", "sft_matched", "bpo"]
    assert list(found["4_qualitative_comparison"]["held_out"]) == ["base", "sft", "sft_matched",
                                                                   "bpo"]
    lines = {n: [json.loads(x) for x in (outputs / "ten" / n).read_text().splitlines()] for n in
             ("2_pair_generation/rows.jsonl", "4_qualitative_comparison/answers-held_out.jsonl")}
    trained, asked = ({x["image"] for x in found} for found in lines.values())
    assert (len(trained), len(asked)) == (8, 2) and not trained & asked


def test_each_file_names_every_parameter_with_its_meaning(ten, model_folder, studies):
    new.make("mine", model_folder, ten)
    assert sorted(f.stem for f in studies.glob("mine/*.yaml")) == NOTEBOOKS
    for name in NOTEBOOKS:
        text = (studies / "mine" / f"{name}.yaml").read_text()
        fields = params.SCHEMAS[name].model_fields
        assert list(yaml.safe_load(text)) == list(fields)
        for line, field in zip(text.splitlines(), fields.values(), strict=True):
            assert line.endswith(f"  # {field.description}")
    train = params.read_study("mine")["3_dpo_training"]
    assert (train.study, train.learning_rate, train.lora_rank) == ("mine", 2e-5, 32)


def test_relative_paths_start_where_the_user_stands(ten, model_folder, monkeypatch):
    monkeypatch.chdir(ten.parent)
    new.make("mine", model_folder, new.Path("answers.csv"), image_folder=new.Path("../pictures"))
    monkeypatch.chdir("/")
    read = params.read_study("mine")
    assert read["1_noise_probability"].path(read["1_noise_probability"].data) == ten.resolve()
    assert all(p.path(p.image_folder) == ten.parent.resolve() for p in read.values())
    assert [len(rows) for rows in rows_of("mine")] == [8, 2]


def test_an_interrupted_write_leaves_nothing(ten, model_folder, studies, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(new, "write_lines", stop)
        with pytest.raises(KeyboardInterrupt):
            new.make("mine", model_folder, ten)
    assert not list(studies.iterdir())
    new.make("mine", model_folder, ten)


# --- the split ----------------------------------------------------------------------------------

def test_a_picture_is_trained_on_or_held_out_with_all_its_rows(data_file, model_folder, studies):
    new.make("mine", model_folder, data_file)
    trained, held = rows_of("mine")
    assert {r.image_name for r in trained}.isdisjoint(r.image_name for r in held)
    every, _ = data_rows.list_rows(data_file)
    assert plain(trained + held) == plain(every)
    assert (len(trained), len(held)) == (6, 6)
    assert (studies / "mine" / "truth.json").read_bytes() == (
        data_file.parent / "truth.json").read_bytes()


def test_the_same_picture_under_two_names_is_on_one_side(tmp_path, model_folder):
    data = pictures(tmp_path / "twice", 6)
    with data.open("a") as file:
        for n in range(6):
            shutil.copy(data.parent / f"{n}.png", data.parent / f"copy-{n}.png")
            file.write(f"copy-{n}.png,is there a cat ?,no\n")
    new.make("mine", model_folder, data)
    sides = [{r.image_name.removeprefix("copy-") for r in rows} for rows in rows_of("mine")]
    assert [len(s) for s in sides] == [4, 2] and not sides[0] & sides[1]
    assert [len(rows) for rows in rows_of("mine")] == [8, 4]


def test_the_split_is_the_same_again(ten, model_folder):
    new.make("one", model_folder, ten)
    new.make("two", model_folder, ten)
    assert [[r.id for r in side] for side in rows_of("one")] == [
        [r.id for r in side] for side in rows_of("two")]


def png(image, file):
    image.save(file)
    return file.read_bytes()


def entry_of(name, question, answer, image, layout):
    asked = [{"role": "user", "content": question}]
    return {
        "LLaVA": {k: v for k, v in conversation("", name, question, answer).items() if k != "id"},
        "BPO": {"id": f"no {name}", "image": name, "prompt": question, "completions": [
            {"score": 0.75, "response": answer, "type": "gt"},
            {"score": 0.25, "response": "grey", "type": "llm-hal"}]},
        "RLHF-V": {"idx": 4, "image": {"path": name}, "text": json.dumps(
            {"question": question, "chosen": answer, "rejected": "grey"})},
        "TRL": {"images": [name], "prompt": asked, "rejected": "grey",
                "chosen": [{"role": "assistant", "content": f"{answer} \ud83d"}]},
        "answers": {"image_path": name, "caption": f"a {answer} thing"},
        "MiniGPT-4": {"image_id": name.removesuffix(".png"), "caption": answer}}[layout]


@pytest.mark.parametrize("layout, kind", [("BPO", "parquet"), *((layout, kind) for layout in (
    "LLaVA", "BPO", "RLHF-V", "TRL", "answers", "MiniGPT-4") for kind in ("list", "lines"))])
def test_no_row_of_any_layout_is_changed_by_the_split(tmp_path, model_folder, layout, kind):
    folder = tmp_path / "set"
    folder.mkdir()
    found = [entry_of(*entry, layout) for entry in entries(6)]
    for name, *_, image in entries(6):
        image.save(folder / (name if layout != "MiniGPT-4" else f"{name[:-4]}.jpg"))
    data = folder / "set.json"
    if kind == "parquet":
        inside = [{"bytes": png(image, folder / name), "path": name}
                  for name, *_, image in entries(6)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(
            [{**e, "image": i} for e, i in zip(found, inside, strict=True)]),
            folder / "train-0.parquet", row_group_size=2)
        data = folder
    elif kind == "list":
        data.write_text(json.dumps(found if layout != "MiniGPT-4" else {"annotations": found}))
    else:
        data.write_text("".join(f"{json.dumps(e)}\n" for e in found))
    new.make("mine", model_folder, data)
    trained, held = rows_of("mine")
    every, _ = data_rows.list_rows(data)
    assert plain(trained + held) == plain(every) and len(held) == 2 and len(every) == 6
    given = ["given"] if layout in ("BPO", "RLHF-V", "TRL") else []
    assert params.read_study("mine")["2_pair_generation"].sources == ["weakened", "injected",
                                                                      *given]


def test_rows_about_held_out_pictures_of_the_user_are_not_trained_on(tmp_path, ten, model_folder,
                                                                     studies):
    other = pictures(tmp_path / "other", 12)
    lines = other.read_text().splitlines()
    other.write_text("\n".join([lines[0], *lines[8:]]))  # pictures 7 to 11; the data has 0 to 9
    new.make("mine", model_folder, ten, held_out=other)
    training, held = rows_of("mine")
    assert {r.image_name for r in training} == {f"{n}.png" for n in range(7)}
    assert {r.image for r in held} == {other.parent.resolve() / f"{n}.png" for n in range(7, 12)}
    assert not (studies / "mine" / "held_out.jsonl").exists()
    with pytest.raises(Refusal, match="none is left to train on"):
        new.make("none", model_folder, ten, held_out=ten)


def test_rows_that_cannot_be_used_are_named_and_left_out(ten, model_folder, studies):
    (ten.parent / "3.png").write_bytes((ten.parent / "3.png").read_bytes()[:60])
    (ten.parent / "4.png").unlink()
    said = "\n".join(new.make("mine", model_folder, ten))
    assert "8 rows can be used; left out: " in said and "1 image is cut off or damaged" in said
    lines = [json.loads(x) for x in
             (studies / "mine" / "rejected_rows.jsonl").read_text().splitlines()]
    assert lines == [{"id": "3", "where": "answers.csv, row 4",
                      "reason": "image is cut off or damaged", "detail": "3.png"},
                     {"id": "4", "where": "answers.csv, row 5", "reason": "image file is missing",
                      "detail": "4.png"}]
    training, held = rows_of("mine")
    assert {r.image_name for r in training + held} == {f"{n}.png" for n in range(10)
                                                       if n not in (3, 4)}


# --- what is refused ----------------------------------------------------------------------------

@pytest.fixture
def broken(model_folder, tmp_path):
    """A copy of the checkpoint to break."""
    return shutil.copytree(model_folder, tmp_path / "broken")


def refused(*arguments):
    with pytest.raises(Refusal) as caught:
        new.make(*arguments)
    assert not params.params_root().exists() or not list(params.params_root().iterdir())
    return str(caught.value)


@pytest.mark.parametrize("name", ["../mine", "a/b", "", ".hidden", "my study", "-x"])
def test_a_name_that_is_no_folder_name_is_refused(name, ten, model_folder):
    assert "a study's name is that of a folder" in refused(name, model_folder, ten)


def test_nothing_that_is_there_is_written_over(ten, model_folder, studies, outputs):
    new.make("mine", model_folder, ten)
    before = {f: f.read_bytes() for f in (studies / "mine").iterdir()}
    (outputs / "old").mkdir(parents=True)
    for name in ("mine", "old"):
        with pytest.raises(Refusal, match="is there already; choose another name, or delete it"):
            new.make(name, model_folder, ten)
    assert {f: f.read_bytes() for f in (studies / "mine").iterdir()} == before


def test_a_folder_that_is_no_whole_checkpoint_is_refused(ten, text_folder, broken):
    assert "config.json is missing" in refused("mine", ten.parent, ten)
    assert "not that of a vision-language model" in refused("mine", text_folder, ten)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "model.safetensors: the weights are cut off" in refused("mine", broken, ten)
    file.unlink()
    assert "no weights as safetensors" in refused("mine", broken, ten)


def test_code_of_a_checkpoint_is_refused_and_not_run(ten, broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "code.py").write_text("raise SystemExit('this was run')\n")
    (broken / "config.json").write_text(json.dumps(
        config | {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}))
    assert "custom code" in refused("mine", broken, ten)


def test_a_checkpoint_without_its_processor_is_refused(ten, broken):
    (broken / "chat_template.jinja").unlink()
    assert "has no chat template" in refused("mine", broken, ten)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (broken / name).unlink(missing_ok=True)
    assert "processor" in refused("mine", broken, ten)


def test_data_that_cannot_make_a_study_is_refused(ten, tmp_path, model_folder):
    assert "there is no such data file" in refused("mine", model_folder, tmp_path / "none.csv")
    text = refused("mine", model_folder, pictures(tmp_path / "three", 3))
    assert "3 pictures can be used, and 4 are needed" in text and "--held-out" in text
    shutil.copy(ten, tmp_path / "moved.csv")
    text = refused("mine", model_folder, tmp_path / "moved.csv")
    assert "10 image file is missing" in text and "--image-folder" in text
    (tmp_path / "other.csv").write_text("picture,label\n0.png,red\n")
    assert "fields picture, label" in refused("mine", model_folder, tmp_path / "other.csv")


# --- what is decided ----------------------------------------------------------------------------

@pytest.mark.parametrize("pairs, batch, epochs, rate", [
    (2, 2, 10, 2e-5), (16, 2, 5, 2e-5), (80, 8, 4, 2e-5), (320, 32, 4, 2e-5),
    (336_000, 32, 2, 2e-6)])
def test_steps_fit_the_number_of_pairs(pairs, batch, epochs, rate):
    values = new.schedule(pairs)
    params.DPOTraining(**values)
    assert (values["batch_pairs"], values["epochs"], values["learning_rate"]) == (
        batch, epochs, rate)


@pytest.mark.parametrize("card, sizes", [
    (80e9, (32768, 4)), (30e9, (16384, 2)), (22e9, (8192, 1)), (15e9, (2048, 1))])
def test_a_small_card_gets_small_batches(seven_billion, card, sizes, monkeypatch):
    monkeypatch.delenv("BPO_PARAMS")
    monkeypatch.setattr(new, "CARD", card)
    monkeypatch.setattr(new.torch.cuda, "is_available", lambda: False)
    read = params.read_study("llava-1.5-7b")
    new.fit(checkpoints.skeleton(seven_billion), read)
    assert sizes == (read["2_pair_generation"].batch_tokens, read["3_dpo_training"].device_batch)


def test_answers_have_room_and_few_rows_get_several_candidates(ten, model_folder):
    with ten.open("a") as file:
        file.write(f"0.png,describe the picture,{' '.join(['red'] * 400)}\n")
    new.make("mine", model_folder, ten)
    read = params.read_study("mine")
    made, train = read["2_pair_generation"], read["3_dpo_training"]
    assert (made.max_words, made.weaken_samples, made.score_candidates) == (400, 4, True)
    assert read["4_qualitative_comparison"].max_new_tokens == 1024
    assert read["1_noise_probability"].max_new_tokens == 64
    assert train.max_tokens == 512  # as many as the model has positions
    assert (train.precision, train.image_transform) == ("float32", "pad")


@pytest.mark.study
def test_large_pictures_make_room_for_their_tokens(tmp_path, ten):
    qwen = tmp_path / "qwen"
    qwen.mkdir()
    write_qwen(qwen)
    picture("disc", "red", 0).resize((1500, 2250)).save(ten.parent / "0.png")  # 4,320 tokens
    new.make("mine", qwen, ten)
    train = params.read_study("mine")["3_dpo_training"]
    assert (train.precision, train.image_transform) == ("bfloat16", "processor")
    assert train.max_tokens == 4608


def test_the_command_says_refusals_without_a_trace(ten, model_folder, capsys):
    assert main(["new", "../mine", "--model", str(model_folder), "--data", str(ten)]) == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "a study's name is that of a folder" in text
