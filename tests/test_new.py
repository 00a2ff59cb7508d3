"""A study of one's own model and pictures: what is decided, written, refused, and that it runs."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from conftest import COLOURS, THINGS, conversation, picture
from test_real_path import write_qwen

from bpo import check, new, params, survey
from bpo.__main__ import main
from bpo.data import rows as data_rows
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


# --- ten pictures become a report ---------------------------------------------------------------

@pytest.mark.slow
def test_ten_pictures_become_a_report(tmp_path, ten, model_folder, outputs):
    def bpo(*arguments):
        done = subprocess.run([sys.executable, "-m", "bpo", *arguments], cwd=tmp_path, text=True,
                              capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    told = bpo("new", "ten", "--model", os.path.relpath(model_folder, tmp_path), "--data",
               "pictures/answers.csv")
    assert "10 of 10 rows can be used, about 10 pictures" in told and "MISSING" not in told
    assert "30 parameters are good" in told and told.endswith("next: python -m bpo run ten\n")
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


# --- what is written ----------------------------------------------------------------------------

def test_each_file_names_every_parameter_with_its_meaning(ten, model_folder, studies):
    new.make("mine", model_folder, ten)
    assert sorted(f.stem for f in studies.glob("mine/*.yaml")) == NOTEBOOKS
    for name in NOTEBOOKS:
        header, *lines = (studies / "mine" / f"{name}.yaml").read_text().splitlines()
        assert header.endswith(f" — notebooks/{name}.ipynb")
        fields = params.SCHEMAS[name].model_fields
        assert [x.split(":")[0] for x in lines] == list(fields)
        for line, field in zip(lines, fields.values(), strict=True):
            assert line.endswith(f"  # {field.description}")
            value = yaml.safe_load(line)[line.split(":")[0]]
            assert value == params.validate(params.SCHEMAS[name], yaml.safe_load(
                "\n".join(lines)), where="").model_dump(mode="json")[line.split(":")[0]]
    assert params.read_study("mine")["1_noise_probability"].study == "mine"


def test_small_rates_are_numbers_in_yaml():
    for rate in (2e-6, 2.5e-6, 2e-5, 0.002):
        text = new._yaml("3_dpo_training", {"learning_rate": rate})
        assert yaml.safe_load(text) == {"learning_rate": rate}


def test_a_study_stands_in_the_folder_that_bpo_params_names(ten, model_folder, studies):
    new.make("mine", model_folder, ten)
    assert params.study_files("mine")["3_dpo_training"] == studies / "mine" / "3_dpo_training.yaml"
    assert not (params.ROOT / "params" / "mine").exists()
    assert [f.name for f in studies.iterdir()] == ["mine"]


def test_relative_paths_start_where_the_user_stands(tmp_path, ten, model_folder, monkeypatch):
    monkeypatch.chdir(ten.parent)
    new.make("mine", model_folder, new.Path("answers.csv"),
               image_folder=new.Path("../pictures"))
    monkeypatch.chdir("/")
    read = params.read_study("mine")
    assert read["1_noise_probability"].path(read["1_noise_probability"].data) == ten.resolve()
    assert all(p.path(p.image_folder) == ten.parent.resolve() for p in read.values())
    assert len(rows_of("mine")[0]) == 8


def test_paths_in_the_project_start_at_its_root_and_outputs_are_named_whole():
    root = params.ROOT
    assert new._named(root / "data" / "x", study="s") == "data/x"
    assert new._named(root / "outputs" / "x", study="s") == str(root / "outputs" / "x")
    assert new._named(root.parent / "x", study="s") == str(root.parent / "x")
    with pytest.raises(Refusal, match="stands for the study's name"):
        new._named(root / "data" / "{study}", study="s")


def test_an_interrupted_write_leaves_nothing(ten, model_folder, studies, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(new, "_write_split", stop)
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
    assert "about 6 pictures" in "\n".join(new.make("mine", model_folder, data))
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


def told(name, question, answer, image, layout):
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
    found = [told(*entry, layout) for entry in entries(6)]
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


def test_held_out_rows_of_the_user_are_used_where_they_lie(tmp_path, ten, model_folder, studies):
    other = pictures(tmp_path / "other", 12)
    lines = other.read_text().splitlines()
    other.write_text("\n".join([lines[0], *lines[8:]]))  # pictures 7 to 11; 10 are to train on
    said = "\n".join(new.make("mine", model_folder, ten, held_out=other,
                                image_folder=ten.parent))
    # Below the image folder pictures 10 and 11 are missing, but 7 to 9 are there.
    assert "3 of 5 rows can be used" in said
    assert "beware    3 of 3 held-out pictures are in the training data too" in said
    assert not list((studies / "mine").glob("*.jsonl"))
    trained, held = rows_of("mine")
    assert (len(trained), len(held)) == (10, 3)
    assert params.read_study("mine")["4_qualitative_comparison"].splits == {
        "held_out": str(other.resolve())}


def test_held_out_pictures_may_lie_beside_their_rows(tmp_path, ten, model_folder):
    other = pictures(tmp_path / "other", 14)
    lines = other.read_text().splitlines()
    other.write_text("\n".join([lines[0], *lines[11:]]))
    said = "\n".join(new.make("mine", model_folder, ten, held_out=other,
                                image_folder=ten.parent))
    assert "in the training data too" not in said
    assert {r.image.parent for r in rows_of("mine")[1]} == {other.parent.resolve()}


def test_held_out_rows_about_all_training_pictures_are_refused(ten, model_folder, studies):
    with pytest.raises(Refusal, match="nothing would be held out"):
        new.make("mine", model_folder, ten, held_out=ten)
    assert not studies.exists()


# --- what is bad --------------------------------------------------------------------------------

def test_rows_that_cannot_be_used_are_named_and_left_out(tmp_path, ten, model_folder, studies):
    (ten.parent / "3.png").write_bytes((ten.parent / "3.png").read_bytes()[:60])
    (ten.parent / "4.png").unlink()
    said = "\n".join(new.make("mine", model_folder, ten))
    assert "8 of 10 rows can be used, about 8 pictures" in said
    for bad in ("answers.csv, row 4: image is cut off or damaged",
                "answers.csv, row 5: image file is missing"):
        assert bad in said
    left = [json.loads(x) for x in
            (studies / "mine" / "rejected_rows.jsonl").read_text().splitlines()]
    assert {(x["id"], x["where"]) for x in left} == {("3", "answers.csv, row 4"),
                                                     ("4", "answers.csv, row 5")}
    trained, held = rows_of("mine")
    assert {r.image_name for r in trained + held} == {f"{n}.png" for n in range(10)
                                                      if n not in (3, 4)}


def test_what_was_found_is_told(ten, model_folder):
    said = "\n".join(new.make("mine", model_folder, ten))
    for words in ("LlavaForConditionalGeneration", "40 to 49 pixels wide, 51 to 60 high",
                  "layout answers: image, answer or caption", "10 question",
                  "0.png: 'what colour is the disc ?' answered 'red'",
                  "8 pictures (8 rows) to train on, 2 pictures (2 rows) held out",
                  "no 5_benchmarks.yaml"):
        assert words in said


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
    with pytest.raises(Refusal, match="is there already; choose another name, or delete it"):
        new.make("mine", model_folder, ten)
    (outputs / "old").mkdir(parents=True)
    with pytest.raises(Refusal, match="is there already"):
        new.make("old", model_folder, ten)
    assert {f: f.read_bytes() for f in (studies / "mine").iterdir()} == before


def test_a_folder_that_is_no_checkpoint_is_refused(ten, tmp_path, text_folder):
    assert "there is no such folder" in refused("mine", tmp_path / "none", ten)
    assert "holds no config.json" in refused("mine", ten.parent, ten)
    (ten.parent / "adapter_config.json").write_text("{}")
    assert "an adapter; merge it" in refused("mine", ten.parent, ten)
    assert "not a vision-language model" in refused("mine", text_folder, ten)


def test_weights_that_are_not_whole_safetensors_are_refused(ten, broken):
    file = broken / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:len(whole) // 2], b"version https://git-lfs\noid sha256:0\nsize 9\n"):
        file.write_bytes(content)
        assert "cut off or a pointer" in refused("mine", broken, ten)
    file.rename(broken / "pytorch_model.bin")
    assert "only pytorch_model.bin, which can run code" in refused("mine", broken, ten)
    (broken / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    assert "model-00002-of-00002.safetensors" in refused("mine", broken, ten)


def test_code_of_a_checkpoint_is_refused_and_not_run(ten, broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "code.py").write_text("raise SystemExit('this was run')\n")
    (broken / "config.json").write_text(json.dumps(
        config | {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}))
    assert "own code, and such code is never run" in refused("mine", broken, ten)
    (broken / "config.json").write_text("[")
    assert "is not a JSON object" in refused("mine", broken, ten)


def test_a_checkpoint_without_its_chat_template_is_refused(ten, broken):
    (broken / "chat_template.jinja").unlink()
    assert "has no chat template" in refused("mine", broken, ten)


def test_data_that_cannot_make_a_study_is_refused(ten, tmp_path, model_folder):
    assert "there is no such data file" in refused("mine", model_folder, tmp_path / "none.csv")
    three = pictures(tmp_path / "three", 3)
    told = refused("mine", model_folder, three)
    assert "3 pictures can be used, and 4 are needed" in told and "--held-out" in told
    elsewhere = shutil.copy(ten, tmp_path / "moved.csv")
    told = refused("mine", model_folder, tmp_path / "moved.csv")
    assert "none of its 10 rows can be used: 10 image file is missing" in told
    assert "--image-folder" in told and elsewhere.exists()
    (tmp_path / "other.csv").write_text("picture,label\n0.png,red\n")
    assert "fields picture, label" in refused("mine", model_folder, tmp_path / "other.csv")


def test_the_command_says_refusals_without_a_trace(ten, model_folder, capsys):
    assert main(["new", "../mine", "--model", str(model_folder), "--data", str(ten)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "a study's name is that of a folder" in said


# --- what is decided ----------------------------------------------------------------------------

@pytest.mark.parametrize("rows, batch, least", [
    (1, 2, 5), (8, 2, 40), (40, 8, 40), (160, 32, 20), (168000, 32, 10000)])
def test_steps_fit_the_number_of_rows(rows, batch, least):
    steps = new._steps(2 * rows)
    assert steps["batch_pairs"] == batch and 2 <= steps["epochs"] <= 10
    assert new._count(steps, range(rows), ["weakened", "injected"]) >= least
    params.DPOTraining(**steps, device_batch=min(2, batch))


def decided(model, data):
    return new.decide("s", params.params_root() / "s", model, data, None,
                        new._held_out(data))


def test_a_large_model_gets_the_settings_of_the_paper(ten, model_folder, studies):
    small, data = survey.look_at_model(model_folder), survey.look_at_data(ten, None)
    large = replace(small, weights=7_063_427_072)
    many = replace(data, rows=[(f"row {n}", n % 10, "question") for n in range(100_000)])
    train = decided(large, many)["3_dpo_training"]
    assert (train["lora_rank"], train["lora_alpha"], train["lora_dropout"]) == (32, 256, 0.05)
    assert (train["learning_rate"], train["batch_pairs"], train["epochs"]) == (2e-6, 32, 2)
    assert train["gradient_checkpointing"]
    made = decided(large, many)["2_pair_generation"]
    assert (made["weaken_samples"], made["weaken_temperature"]) == (1, 0.2)
    few = decided(large, data)
    assert few["3_dpo_training"]["learning_rate"] == 2e-5
    assert few["2_pair_generation"]["weaken_samples"] == 4
    assert not decided(small, data)["3_dpo_training"]["gradient_checkpointing"]


def test_a_small_card_gets_small_batches(ten, model_folder, seven_billion, monkeypatch):
    model, data = survey.look_at_model(model_folder), survey.look_at_data(ten, None)
    skeleton = check.skeleton(seven_billion)
    large = replace(model, weights=skeleton.num_parameters(), skeleton=skeleton,
                    precision="bfloat16", positions=4096)
    sizes = []
    for card in (80e9, 22e9, 15e9):
        monkeypatch.setattr(new, "_card", lambda card=card: card)
        values = decided(large, replace(data, rows=data.rows * 40))
        sizes.append((values["2_pair_generation"]["batch_tokens"],
                      values["3_dpo_training"]["device_batch"]))
    assert sizes == [(32768, 4), (8192, 1), (2048, 1)]


def test_answers_and_pictures_have_room(tmp_path, ten, model_folder):
    long = " ".join(["red"] * 400)
    with ten.open("a") as file:
        file.write(f"0.png,describe the picture,{long}\n")
    new.make("mine", model_folder, ten)
    read = params.read_study("mine")
    assert read["2_pair_generation"].max_words == 400
    assert read["4_qualitative_comparison"].max_new_tokens == 1024
    assert read["1_noise_probability"].max_new_tokens == 64
    assert read["3_dpo_training"].max_tokens == 512  # as many as the model has positions


def test_the_number_format_and_the_picture_are_the_checkpoint_s(ten, broken, tmp_path):
    read = survey.look_at_model(broken)
    assert (read.precision, read.reader.transform) == ("float32", "pad")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert survey.look_at_model(broken).precision == "bfloat16"
    qwen = tmp_path / "qwen"
    qwen.mkdir()
    write_qwen(qwen)
    said = "\n".join(new.make("mine", qwen, ten))
    assert "image_transform processor" in said and "precision bfloat16" in said
    assert params.read_study("mine")["3_dpo_training"].max_tokens == 2048


def test_large_pictures_make_room_for_their_tokens(tmp_path, ten):
    qwen = tmp_path / "qwen"
    qwen.mkdir()
    write_qwen(qwen)
    picture("disc", "red", 0).resize((1500, 2250)).save(ten.parent / "0.png")
    said = "\n".join(new.make("mine", qwen, ten))
    assert "4,320 tokens for the largest picture" in said
    assert params.read_study("mine")["3_dpo_training"].max_tokens == 4608


@pytest.mark.parametrize("answers, category", [(19, ""), (20, "question")])
def test_notebook_1_takes_short_answers_where_there_are_enough(tmp_path, model_folder, answers,
                                                               category):
    data = pictures(tmp_path / "set", answers)
    with data.open("a") as file:
        file.write("0.png,is there a cat ?,no\n")
    new.make("mine", model_folder, data)
    assert params.read_study("mine")["1_noise_probability"].category == category


def test_of_many_pictures_some_are_opened(ten, model_folder, monkeypatch):
    monkeypatch.setattr(survey, "OPENED", 6)
    (ten.parent / "3.png").write_bytes(b"x")
    said = "\n".join(new.make("mine", model_folder, ten))
    bad = "image format is not known" in said  # if it was among the drawn ones
    assert f"({5 if bad else 6} opened, " in said and "10 pictures" in said or bad
    assert sum(map(len, rows_of("mine"))) == (9 if bad else 10)
