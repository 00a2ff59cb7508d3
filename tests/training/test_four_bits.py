"""A base in 4 bits (precision nf4): notebooks 1 to 3 and the merge of what was trained on it."""

import importlib.util
import json

import pytest
import torch
from datasets import Dataset
from helpers.models import SIDE
from helpers.trainers import dpo_trainer
from PIL import Image
from transformers import AutoModelForImageTextToText

from bpo import check
from bpo.evaluation import probe
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding
from bpo.pairs import stage as pairs
from bpo.params import DPOTraining, NoiseProbability, PairGeneration, Refusal
from bpo.training import merge
from bpo.training import stage as train
from bpo.training.packed import PackedDPOTrainer

four_bits = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install -e '.[nf4]'")


@four_bits
@torch.no_grad()
def test_the_decoder_is_in_four_bits_and_nothing_else(model_folder, text_folder):
    for load, folder in ((checkpoints.load, model_folder),
                         (checkpoints.load_text_model, text_folder)):
        model, whole = load(folder, precision="nf4").model, load(folder).model
        _, small = checkpoints.linear_layers(model)
        assert {m.weight.dtype for m in small.values()} == {torch.uint8}
        others = [w for n, w in model.named_parameters() if w.dtype != torch.uint8]
        assert {w.dtype for w in others} == {torch.bfloat16}
        assert sum(m.in_features * m.out_features for m in small.values()) + sum(
            w.numel() for w in others) == sum(w.numel() for w in whole.parameters())
        known = sum(w.numel() * w.element_size() for w in model.parameters())
        known += sum(len(m.weight.quant_state.absmax) for m in small.values())  # a byte each
        assert check.weights_bytes(whole, "nf4") == pytest.approx(known, rel=1e-3)


@four_bits
def test_notebooks_1_to_3_run_on_it_and_merging_keeps_its_answers(model_folder, data_file, outputs,
                                                                  prompt_files):
    common = dict(study="s", model=str(model_folder), precision="nf4")
    looked = probe.run(NoiseProbability(**common, data=str(data_file), noise_steps=[0, 999],
                                        draws=1, sampled_answers=1, other_ways=[]))
    assert looked.manifest["versions"]["bitsandbytes"]
    made = pairs.run(PairGeneration(**common, data=str(data_file), text_model="", max_new_tokens=6,
                                    **prompt_files))
    assert made.metrics["pairs"] > 0
    p = DPOTraining(**common, image_folder=str(data_file.parent), methods=["sft_matched", "bpo"],
                    variants={"bpo_on": {"method": "bpo", "reference": "sft"}}, steps=3,
                    batch_pairs=4, device_batch=2, lora_rank=4, learning_rate=1e-4, save_every=2)
    result = train.run(p)
    facts = result.metrics["methods"]
    assert facts["bpo"]["packed"] and facts["bpo_on"]["packed"]
    # A pair's first loss is that of no margin: the reference is the same base.
    first = train.histories(result)["bpo"][0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)
    adapter = result.folder / "bpo" / "adapter"
    merged = merge.write("s", method="bpo")
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    base = checkpoints.load(model_folder, precision="nf4")
    tuned = checkpoints.load_adapters(base, {"bpo": adapter}).model
    moved = [w for n, w in tuned.named_parameters() if "lora_B" in n]
    assert {w.dtype for w in moved} == {torch.float32} and all(w.any() for w in moved)
    question = [{"role": "user", "content": "what colour is the disc ?"}]
    inputs = encoding.collate(base, [encoding.encode(
        base, encoding.prompt_text(base, question, image=True), Image.new("RGB", (SIDE, SIDE)))])
    plain = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        logits = [m(**inputs).logits.float() for m in (tuned, plain, checkpoints.load(
            model_folder, precision="bfloat16").model)]
    rounded, quantised = ((logits[0] - x).abs().max().item() for x in logits[1:])
    assert rounded < quantised / 3


@four_bits
def test_what_cannot_work_is_refused(model_folder, rows, tmp_path, outputs, monkeypatch):
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        dpo_trainer(PackedDPOTrainer, checkpoints.load(model_folder, precision="nf4"),
                    Dataset.from_list(rows), tmp_path, adapters=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(Refusal, match="nf4 weights cannot be spread by FSDP"):
        (tmp_path / "pairs.jsonl").touch()
        train.run(DPOTraining(study="s", model=str(model_folder), precision="nf4",
                              pairs=str(tmp_path / "pairs.jsonl"), image_folder=str(tmp_path)))


def test_without_bitsandbytes_the_extra_is_named(model_folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(Refusal, match=r"nf4 needs bitsandbytes.*pip install -e '.\[nf4\]'"):
        checkpoints.load(model_folder, precision="nf4")
