"""The study of a real model, run whole on a random checkpoint in the same layout: 336 pixels, 576
image tokens, photographs, answers in ordinary English."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from bpo import params

# The turns of the public LLaVA-1.5 layout: no end token behind an answer, a space instead.
CHAT = ("{% for m in messages %}{{ m['role'].upper() + ': ' }}"
        "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
        "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
ROWS = [
    ("astronaut", "Who is in the picture?", "An astronaut in an orange suit, smiling."),
    ("astronaut", "Is there a flag?", "Yes"),
    ("astronaut", "What colour is the suit?", "Orange"),
    ("chelsea", "What animal is this?", "A tabby cat."),
    ("chelsea", "Describe the image.", "A close view of a tabby cat that looks past the camera "
     "with green eyes, its whiskers long and white, its fur brown and grey in stripes."),
    ("coffee", "What stands on the table?", "A cup of coffee on a saucer with a spoon."),
    ("coffee", "What colour is the cup?", "Dark red"),
    ("rocket", "What is about to fly?", "A rocket on its launch pad."),
    ("rocket", "Is it a photograph of the sea?", "No"),
    ("china", "What kind of building is this?", "A Chinese pavilion with a curved roof."),
    ("flower", "What is in the foreground?", "A flower with pink petals."),
    ("flower", "How many flowers are sharp?", "One"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A LLaVA of two thin layers with the image side of the real one."""
    folder = tmp_path_factory.mktemp("checkpoint") / "llava-random"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    core.train_from_iterator([f"{q} {a}" for _, q, a in ROWS], trainers.BpeTrainer(
        vocab_size=600, special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", extra_special_tokens={"image_token": "<image>"})
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 336},
                              crop_size={"height": 336, "width": 336}),
        tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT, image_token="<image>")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                       num_attention_heads=2, image_size=336, patch_size=14),
        text_config=LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
                                num_hidden_layers=2, num_attention_heads=2,
                                eos_token_id=tokenizer.eos_token_id,
                                pad_token_id=tokenizer.pad_token_id,
                                bos_token_id=tokenizer.bos_token_id),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2, vision_feature_select_strategy="default"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dozen rows in the LLaVA layout over the sample photographs of two libraries."""
    from skimage import data as photographs
    from sklearn.datasets import load_sample_image

    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    for name in {r[0] for r in ROWS}:
        pixels = (load_sample_image(f"{name}.jpg") if name in ("china", "flower")
                  else getattr(photographs, name)())
        Image.fromarray(np.asarray(pixels)).save(folder / "images" / f"{name}.jpg")
    (folder / "rows.json").write_text(json.dumps([
        {"id": f"photo-{i}", "image": f"{name}.jpg", "conversations": [
            {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]}
        for i, (name, question, answer) in enumerate(ROWS)]))
    return folder


@pytest.mark.slow
def test_the_whole_study_of_a_real_model_runs_on_photographs(checkpoint, data, tmp_path):
    arguments = {"model": checkpoint, "data": data / "rows.json", "image_folder": data / "images",
                 "splits": f"{{held_out: {data / 'rows.json'}}}", "max_new_tokens": 8,
                 "noise_steps": "[0, 700, 999]", "steps": 2, "device_batch": 2, "batch_pairs": 4}
    done = subprocess.run(
        [sys.executable, "-m", "bpo", "run", "llava-1.5-7b",
         *(str(x) for n, v in arguments.items() for x in ("-p", n, v))],
        env={**os.environ, "BPO_OUTPUTS": str(tmp_path), "HF_HUB_OFFLINE": "1"}, text=True,
        capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    study = tmp_path / "llava-1.5-7b"
    found = {n: json.loads((study / n / "manifest.json").read_text())["metrics"]
             for n in params.study_files("llava-1.5-7b")}
    probed = found["1_noise_probability"]
    assert len(probed["p_true"]) == 3 and probed["images"] > 0
    pairs = [json.loads(x) for x in
             (study / "2_pair_generation" / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == len(ROWS)
    assert {p["category"] for p in pairs} == {"question", "presence", "caption"}
    assert found["2_pair_generation"]["injected"]["kept"] > 0
    assert found["2_pair_generation"]["injected"]["truth_right"] is None
    for method in params.METHODS:
        adapter = json.loads((study / "3_dpo_training" / method / "adapter" /
                              "adapter_config.json").read_text())
        assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (32, 256, 0.05)
        assert "language_model" in adapter["target_modules"]
    assert set(found["4_qualitative_comparison"]["held_out"]) == {"base", *params.METHODS}
    assert "changed" in found["4_qualitative_comparison"]["held_out"]["bpo"]
    assert (study / "index.html").is_file()
