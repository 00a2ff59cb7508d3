"""What a study takes: counts that were worked out by hand, and FLOPs against a count of a step."""

import shutil

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from bpo import params, sizes
from bpo.models import checkpoint as checkpoints
from bpo.params import Refusal
from bpo.sizes import Shape

SMALL = Shape(parameters=1000, language=100, vision=10, adapted=50, cached=8, layers=2, hidden=4,
              intermediate=6, vocabulary=30)


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory):
    """LLaVA-1.5-7B's config.json alone, no weights."""
    folder = tmp_path_factory.mktemp("config")
    LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, image_size=336,
                                       num_hidden_layers=24, num_attention_heads=16, patch_size=14),
        text_config=LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008,
                                num_hidden_layers=32, num_attention_heads=32),
    ).save_pretrained(folder)
    return folder


def test_the_shape_of_llava_7b_is_the_one_worked_out_by_hand(seven_billion):
    found = sizes.shape(seven_billion)
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    head = 32064 * 4096
    assert found.language == 32 * layer + 4096 + head
    assert found.cached == 2 * 32 * 32 * 128
    assert found.adapted == 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert found.parameters == found.language + found.vision + head == 7_063_427_072
    assert sizes.adapter_weights(found, 32) == 79_953_920
    assert sizes.weight_bytes(found, "bfloat16") == 14_126_854_144


def test_weights_are_counted_as_the_model_itself_counts_them(model_folder):
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    found = sizes.shape(model_folder)
    assert found.parameters == sum(w.numel() for w in model.parameters())
    adapted = get_peft_model(model, checkpoints.adapter_config(model, rank=3, alpha=6, dropout=0.0))
    trained = sum(w.numel() for w in adapted.parameters() if w.requires_grad)
    assert sizes.adapter_weights(found, 3) == trained


def test_tokens_of_an_image_are_those_of_the_processor(model_folder, tmp_path):
    assert sizes.image_tokens(model_folder) == 4  # 32 pixels in patches of 16
    shutil.copy(model_folder / "config.json", tmp_path)
    with pytest.raises(Refusal, match="processor"):
        sizes.image_tokens(tmp_path)


def test_memory_follows_the_stated_formulas():
    assert sizes.generation_bytes(SMALL, "bfloat16", tokens=10) == 2 * 1000 + 10 * 8 * 2
    # 632 // (576 + 60 + 2) is no row at all, and one is decoded nevertheless.
    assert sizes.runaway_tokens(632, image=576, longest=100) == 736
    assert sizes.runaway_tokens(6380, image=576, longest=100) == 7360
    layer = 6 * (2 * (12 * 4 + 4 * 6) + 8 * (6 * 4 + 6))
    least = 2 * 1000 + 16 * 3 * 50 + 8 * 2 * 1 * 30
    step = {"rank": 3, "sequences": 2, "tokens": 3, "answers": 1}
    assert sizes.training_bytes(SMALL, "bfloat16", checkpointing=True, **step) == (
        least + 2 * 6 * 2 * 4 + layer)
    assert sizes.training_bytes(SMALL, "bfloat16", checkpointing=False, **step) == (
        least + 2 * layer)


def test_time_follows_the_stated_formulas(monkeypatch):
    monkeypatch.setattr(sizes, "CARD_FLOPS", 1000.0)
    monkeypatch.setattr(sizes, "CARD_BYTES", 100.0)
    monkeypatch.setattr(sizes, "UTILISATION", 0.5)
    # Two rows share a pass: 2 x (100 x 30 + 10 x 20) FLOP, 10 x 2 (1000 / 2 + 8 x 35) bytes.
    assert sizes.answer_seconds(SMALL, "bfloat16", image=20, prompt=10, answer=10,
                                batch_tokens=80) == pytest.approx(
        (2 * (100 * 30 + 10 * 20) / 1000 + 20 * (1000 / 2 + 8 * 35) / 100) / 0.5)
    assert sizes.pair_flops(SMALL, image=20) == 2 * (8 * 100 * 200 + 4 * 10 * 20)
    assert sizes.positive_flops(SMALL, image=20) == 6 * 100 * 200 + 2 * 10 * 20
    assert sizes.packed_flops(SMALL, image=20, rejected=2, reference=0.5) == (
        7 * 100 * 440 + 2 * 10 * 20)
    assert sizes.card_hours(1_800_000) == 1.0


def test_flops_of_a_training_step_are_those_that_are_counted(tmp_path):
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                                       num_attention_heads=2, image_size=32, patch_size=8),
        text_config=LlamaConfig(vocab_size=600, hidden_size=512, intermediate_size=1024,
                                num_hidden_layers=3, num_attention_heads=4),
        image_token_id=1, vision_feature_layer=-1))
    model.save_pretrained(tmp_path)
    found, image = sizes.shape(tmp_path), 16
    adapted = get_peft_model(model, checkpoints.adapter_config(model, rank=2, alpha=4, dropout=0.0))
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    length = image + sizes.QUESTION + sizes.ANSWER

    def forward(rows: int, length: int = length) -> torch.Tensor:
        ids = torch.full((rows, length), 7)
        ids[:, :image] = 1
        return adapted(input_ids=ids, attention_mask=torch.ones_like(ids),
                       pixel_values=torch.randn(rows, 3, 32, 32)).logits.sum()

    adapted.train()
    with FlopCounterMode(display=False) as positive:
        forward(1).backward()
    with FlopCounterMode(display=False) as pair:
        with torch.no_grad(), adapted.disable_adapter():
            forward(2)
        forward(2).backward()
    assert sizes.positive_flops(found, image=image) == pytest.approx(
        positive.get_total_flops(), rel=0.12)
    assert sizes.pair_flops(found, image=image) == pytest.approx(pair.get_total_flops(), rel=0.12)
    with FlopCounterMode(display=False) as packed:
        with torch.no_grad(), adapted.disable_adapter():
            forward(1, length + 2 * sizes.ANSWER)
        forward(1, length + 2 * sizes.ANSWER).backward()
    assert sizes.packed_flops(found, image=image, rejected=2, reference=1.0) == pytest.approx(
        packed.get_total_flops(), rel=0.12)


def test_pairs_a_row_are_at_most_one_a_way_of_making_and_kept_one():
    def made(**values):
        return sizes.pairs_a_row(params.PairGeneration(**values))

    assert made() == 2
    assert made(weaken_modes=["noisy", "blank"], keep=3) == 9
    assert made(sources=["given"]) == 1


def test_lines_say_what_a_study_takes_and_nothing_for_a_model_that_is_not_there(
        model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BPO_OUTPUTS", str(tmp_path))
    model, little = {"model": str(model_folder)}, {"rows": 1600}
    told = sizes.lines(params.read_study("llava-1.5-7b", model | little))
    assert "not measured" in told[0] and "(4 tokens)" in told[0] and "A100" in told[0]
    assert any("weights" in x and "bfloat16" in x for x in told)
    assert any("GPU hours for 1,600 rows" in x for x in told)
    # 1,600 rows, 2 pairs each, twice over, 32 a step
    assert any("200 steps a method" in x and "sft_compute" in x for x in told)
    half = sizes.lines(params.read_study("llava-1.5-7b", model | little | {"steps": 100}))
    assert any("100 steps a method" in x for x in half)
    assert sizes.lines(params.read_study("llava-1.5-7b", {"model": str(tmp_path)})) == []
    assert sizes.lines(params.read_study("tiny")) == []


def test_a_checkpoint_of_which_too_little_is_there_is_named_not_raised(model_folder, tmp_path):
    shutil.copy(model_folder / "config.json", tmp_path)
    (told,) = sizes.lines(params.read_study("llava-1.5-7b", {"model": str(tmp_path)}))
    assert "sizes are not known" in told and str(tmp_path) in told
    (tmp_path / "config.json").write_text("{}")
    (told,) = sizes.lines(params.read_study("llava-1.5-7b", {"model": str(tmp_path)}))
    assert "config.json is not that of a vision-language model" in told
