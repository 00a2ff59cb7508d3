"""`merge` writes a checkpoint that transformers alone loads and that answers as the adapter does;
it refuses what it cannot stand behind, before anything is written."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from bpo.__main__ import main
from bpo.models import checkpoint as checkpoints
from bpo.params import Refusal
from bpo.study import stage as stages


@pytest.fixture
def trained(model_folder, outputs):
    """A study whose notebook 3 left a random adapter with a large change."""
    stage = stages.stage_folder("mine", "3_dpo_training")
    adapter = stage / "bpo" / "adapter"
    base = checkpoints.load(model_folder).model
    torch.manual_seed(5)
    tuned = get_peft_model(base, checkpoints.adapter_config(base, rank=4, alpha=8, dropout=0.0))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:  # starts at zero: an adapter that changes nothing
                weight.normal_(0, 0.1)
    tuned.save_pretrained(adapter)
    finished(stage, model_folder)
    return adapter


def finished(stage, model):
    files = [f for f in stage.rglob("*") if f.is_file() and f.name != stages.MANIFEST]
    (stage / stages.MANIFEST).write_text(json.dumps({
        "parameters": {"seed": 0, "model": str(model), "precision": "float32"},
        "inputs": {"model": stages.fingerprint(model)},
        "metrics": {"methods": {"sft": {}, "bpo": {}}},
        "outputs": {str(f.relative_to(stage)): stages.file_hash(f) for f in files}}))


def asked(processor, data_file):
    asked = {"type": "text", "text": "what colour is the disc ?"}
    messages = [{"role": "user", "content": [{"type": "image"}, asked]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    with Image.open(data_file.parent / "images/0.png") as image:
        return processor(images=image.convert("RGB"), text=text, return_tensors="pt",
                         add_special_tokens=False)


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


def test_a_merged_checkpoint_answers_as_the_adapter_through_transformers_alone(
        trained, model_folder, data_file, outputs, capsys):
    assert main(["merge", "mine", "--method", "bpo"]) == 0
    folder = outputs / "mine/merged/bpo"
    assert str(folder) in capsys.readouterr().out
    inputs = asked(AutoProcessor.from_pretrained(folder), data_file)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    base = AutoModelForImageTextToText.from_pretrained(model_folder)
    before = logits(base, inputs)
    tuned = logits(PeftModel.from_pretrained(base, trained), inputs)
    assert torch.allclose(logits(plain, inputs), tuned, atol=1e-5)
    assert (tuned - before).abs().max() > 0.1
    assert not list(folder.glob("adapter*")) and not (folder / ".merging").exists()


LOADED = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, picture = sys.argv[1:]
processor, model = (a.from_pretrained(folder) for a in (AutoProcessor, AutoModelForImageTextToText))
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=Image.open(picture).convert("RGB"), text=text, return_tensors="pt")
made = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
print(made.shape[1] - inputs["input_ids"].shape[1], "peft" in sys.modules, "bpo" in sys.modules)
"""


def test_it_generates_in_a_process_that_knows_neither_this_kit_nor_an_adapter(
        trained, data_file, tmp_path):
    assert main(["merge", "mine", "--method", "bpo", "--to", str(tmp_path / "plain")]) == 0
    done = subprocess.run([sys.executable, "-c", LOADED, str(tmp_path / "plain"),
                           str(data_file.parent / "images/0.png")], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.stdout.split() == ["4", "False", "False"], done.stderr


def test_it_says_what_it_was_made_of_and_an_interrupted_one_is_finished(
        trained, model_folder, tmp_path, capsys):
    folder = tmp_path / "plain"
    assert main(["merge", "mine", "--method", "bpo", "--to", str(folder)]) == 0
    made_of = json.loads((folder / "merged.json").read_text())
    assert made_of == {"study": "mine", "method": "bpo", "precision": "float32",
                       "model": stages.fingerprint(model_folder),
                       "adapter": stages.fingerprint(trained)}
    weights = (folder / "model.safetensors").read_bytes()
    for lost in ("config.json", "model.safetensors"):
        (folder / lost).unlink()
    (folder / ".merging").mkdir()
    assert main(["merge", "mine", "--method", "bpo", "--to", str(folder)]) == 0
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "config.json").is_file() and not (folder / ".merging").exists()


def test_the_number_format_is_that_of_the_training(trained, outputs):
    file = trained.parents[1] / stages.MANIFEST
    manifest = json.loads(file.read_text())
    manifest["parameters"]["precision"] = "bfloat16"
    file.write_text(json.dumps(manifest))
    assert main(["merge", "mine", "--method", "bpo"]) == 0
    config = json.loads((outputs / "mine/merged/bpo/config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("arguments, words", [
    (["mine", "--method", "dpo"], "no method dpo was trained here; there is sft, bpo"),
    (["other", "--method", "bpo"], "no training has finished here; python -m bpo run other"),
    (["mine", "--method", "sft"], "the stage 3_dpo_training did not write this"),
])
def test_refusals_write_nothing(arguments, words, trained, outputs, capsys):
    assert main(["merge", *arguments]) == 1
    assert words in capsys.readouterr().err
    assert not list(outputs.glob("*/merged"))


def test_a_folder_that_holds_other_things_is_left_as_it_is(trained, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["merge", "mine", "--method", "bpo", "--to", str(tmp_path)]) == 1
    assert "holds other things (notes.txt" in capsys.readouterr().err
    assert not (tmp_path / "config.json").exists()
    assert main(["merge", "mine", "--method", "bpo", "--to", str(tmp_path / "notes.txt")]) == 1
    assert "is a file; name a folder" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_merge_of_an_earlier_training_is_refused_and_then_merged_anew(
        trained, model_folder, outputs, capsys):
    assert main(["merge", "mine", "--method", "bpo"]) == 0
    folder = outputs / "mine/merged/bpo"
    checkpoints.load_without_weights(folder)
    weights = load_file(trained / "adapter_model.safetensors")
    save_file({n: 2 * w for n, w in weights.items()}, trained / "adapter_model.safetensors")
    finished(trained.parents[1], model_folder)
    for load in (checkpoints.load, checkpoints.load_without_weights):
        with pytest.raises(Refusal, match="bpo of mine was trained again after it was merged "
                                          "here; python -m bpo merge mine --method bpo"):
            load(folder)
    before = (folder / "model.safetensors").read_bytes()
    (folder / "model-00001-of-00002.safetensors").write_text("of a save in two files")
    assert main(["merge", "mine", "--method", "bpo"]) == 0
    checkpoints.load(folder)
    assert (folder / "model.safetensors").read_bytes() != before
    assert not (folder / "model-00001-of-00002.safetensors").exists()


@pytest.mark.parametrize("other", ({"study": "yours"}, {"method": "sft"}))
def test_the_merge_of_another_study_or_method_is_not_written_over(trained, tmp_path, capsys, other):
    folder = tmp_path / "plain"
    assert main(["merge", "mine", "--method", "bpo", "--to", str(folder)]) == 0
    made_of = json.loads((folder / "merged.json").read_text())
    (folder / "merged.json").write_text(json.dumps(made_of | other))
    assert main(["merge", "mine", "--method", "bpo", "--to", str(folder)]) == 1
    assert "holds other things" in capsys.readouterr().err
    assert (folder / "config.json").is_file()


def test_an_edited_adapter_and_a_changed_model_are_refused(trained, model_folder, tmp_path, capsys):
    manifest = trained.parents[1] / stages.MANIFEST
    held = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(held | {"inputs": {"model": "another"}}))
    assert main(["merge", "mine", "--method", "bpo", "--to", str(tmp_path / "x")]) == 1
    assert "the model was changed after mine was trained on it" in capsys.readouterr().err
    manifest.write_text(json.dumps(held))
    (trained / "adapter_config.json").write_text("{}")
    assert main(["merge", "mine", "--method", "bpo", "--to", str(tmp_path / "x")]) == 1
    assert "was changed after the stage that wrote it had finished" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_second_round_makes_pairs_and_trains_on_the_merged_checkpoint(little_study, outputs,
                                                                        capsys):
    for stage in ("0_tiny_world", "3_dpo_training"):
        shutil.copytree(little_study / stage, outputs / "tiny" / stage)
    assert main(["merge", "tiny", "--method", "bpo"]) == 0
    merged = outputs / "tiny/merged/bpo"
    few = [x for n, v in {"rows": 12, "steps": 2, "methods": "[bpo]", "lora_rank": 4}.items()
           for x in ("-p", n, str(v))]
    for number, stage in (("2", "2_pair_generation"), ("3", "3_dpo_training")):
        assert main(["stage", "tiny-round-2", number, *few]) == 0
        manifest = stages.read_manifest(outputs / "tiny-round-2" / stage)
        assert manifest["inputs"]["model"] == stages.fingerprint(merged)
    assert manifest["metrics"]["methods"]["bpo"]["steps"] == 2
    assert (outputs / "tiny-round-2/3_dpo_training/bpo/adapter").is_dir()
    assert main(["stage", "tiny-round-2", "2", *few]) == 0
    assert "up to date, read again" in capsys.readouterr().out
    weights = load_file(merged / "model.safetensors")
    next(iter(weights.values())).add_(1)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    assert main(["stage", "tiny-round-2", "2", *few]) == 0
    assert "input model changed" in capsys.readouterr().out
