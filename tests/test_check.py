"""What a study takes, by calculation: numbers worked out by hand; and what check says of paths."""

import json
import re

import pytest
from helpers.server import free_port
from peft import get_peft_model
from transformers import AutoModelForImageTextToText

from bpo import check, params
from bpo.__main__ import main
from bpo.models import checkpoint as checkpoints
from bpo.params import DPOTraining, PairGeneration, Refusal


def test_the_sizes_of_llava_7b_are_those_worked_out_by_hand(seven_billion):
    model = checkpoints.skeleton(seven_billion)
    assert model.num_parameters() == 7_063_427_072
    assert check.adapter_weights(model, 32) == 32 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    cached = 2 * 32 * 32 * 128 * 2  # keys and values of 32 layers and heads, 2 bytes each
    p = PairGeneration(precision="bfloat16", batch_tokens=1000)
    assert check.generation_bytes(model, p) == 14_126_854_144 + 1000 * cached
    small = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)  # in 4 bits, with a byte for each 64
    four_bits = PairGeneration(precision="nf4", batch_tokens=1000)
    assert check.generation_bytes(model, four_bits) == (
        2 * (7_063_427_072 - small) + small // 2 + small // 64 + small // 4096 + 1000 * cached)


def test_a_training_step_is_weights_adapter_activations_and_logits(seven_billion):
    model = checkpoints.skeleton(seven_billion)
    p = DPOTraining(precision="bfloat16", lora_rank=32, batch_pairs=1, device_batch=1,
                    max_tokens=100, gradient_checkpointing=True)
    layer = 2 * (12 * 4096 + 4 * 11008) + 8 * (6 * 4096 + 11008)
    token = 32 * 2 * 4096 + layer + 8 * 32064
    assert check.training_bytes(model, p) == (14_126_854_144 + 16 * 79_953_920 + 200 * token)
    whole = p.model_copy(update={"gradient_checkpointing": False})
    assert check.training_bytes(model, whole) == (
        14_126_854_144 + 16 * 79_953_920 + 200 * (32 * layer + 8 * 32064))
    assert check.disk_bytes(model, p) == 4 * 79_953_920 * (len(p.methods) + 6)


def test_weights_are_counted_as_the_model_itself_counts_them(model_folder):
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    skeleton = checkpoints.skeleton(model_folder)
    assert skeleton.num_parameters() == sum(w.numel() for w in model.parameters())
    adapted = get_peft_model(model, checkpoints.adapter_config(model, rank=3, alpha=6, dropout=0.0))
    trained = sum(w.numel() for w in adapted.parameters() if w.requires_grad)
    assert check.adapter_weights(skeleton, 3) == trained


@pytest.mark.study
def test_a_config_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(Refusal, match="is not that of a vision-language model"):
        checkpoints.skeleton(tmp_path)


def test_check_tells_memory_and_a_command_that_measures_time(model_folder, outputs, capsys):
    assert main(["check", "tiny", "-p", "model", str(model_folder)]) == 0
    text = capsys.readouterr().out
    assert "weights" in text and "of GPU memory" in text
    command = re.search(r"time +python -m bpo (.*?) runs", text)[1]
    with pytest.raises(SystemExit):  # it is read as a command before its last word is
        main([*command.split(), "--help"])
    assert "3 steps of each stage" in " ".join(capsys.readouterr().out.split())


def test_what_a_notebook_of_the_study_writes_is_not_missing(outputs, capsys):
    assert main(["check", "tiny"]) == 0
    text = capsys.readouterr().out
    assert "written by 0_tiny_world" in text and "MISSING" not in text


def test_missing_paths_are_named_with_the_command_that_writes_them(outputs, capsys):
    assert main(["check", "tiny-round-2"]) == 1
    both = capsys.readouterr()
    assert "MISSING: python -m bpo merge tiny --method bpo" in both.out
    assert "of the paths are missing" in both.err


def test_what_the_first_rows_of_data_hold_is_said(tmp_path, data_file, model_folder, outputs,
                                                  monkeypatch, capsys):
    monkeypatch.setenv("BPO_PARAMS", str(tmp_path / "params"))
    (tmp_path / "params" / "mine").mkdir(parents=True)
    study = tmp_path / "params" / "mine" / "1_noise_probability.yaml"

    def said(data, **more):
        lines = {"study": "mine", "model": str(model_folder), "data": str(data)} | more
        study.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in lines.items()))
        return main(["check", "mine"]), capsys.readouterr().out

    code, text = said(data_file)
    assert code == 0 and "layout LLaVA: 12 of the first 12 rows can be used\n" in text
    rows = json.loads(data_file.read_text())
    rows[0]["image"] = "none.png"
    rows[1]["conversations"][1]["value"] = "red<pad>"
    rows[2]["conversations"][1]["value"] = "<tag> red"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(rows))
    code, text = said(other, image_folder=str(data_file.parent))
    assert code == 0 and "10 of the first 12 rows can be used; left out: " in text
    assert "1 <pad> in a text (first: other.json, row 2)" in text
    assert f"(first: other.json, row 1: {data_file.parent}/none.png)" in text
    code, text = said(other)
    assert code == 1 and "0 of the first 12 rows" in text and "set image_folder to" in text
    other.write_text(json.dumps(rows)[:-9])
    code, text = said(other)
    assert code == 1 and "CANNOT BE READ: " in text and "get the whole file" in text


def test_paths_are_resolved_and_empty_ones_left_out():
    p = params.read_study("tiny")["2_pair_generation"]
    named = dict(check.paths(p))
    assert "image_folder" not in named and p.path(named["model"]).is_absolute()


def test_a_decoder_is_asked_what_it_serves(server, model_folder, capsys):
    p = params.PairGeneration(model=str(model_folder), decoder=server.url, score_candidates=False)
    text, lost = check.decoder(p)
    assert text.startswith("vllm 0.0 serves /m, which is to be ") and not lost
    text, lost = check.decoder(p.model_copy(update={"decoder": f"http://127.0.0.1:{free_port()}/v1",
                                                    "endpoint_retries": 0}))
    assert text.startswith("CANNOT BE USED: http://127.0.0.1:") and lost
