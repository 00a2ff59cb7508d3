"""Packed DPO steps of other decoders, random and small, on text: TRL's own loss and gradients,
within a window and beyond it, or a refusal that names what stands against packing."""

import re

import pytest
import torch
import transformers
from datasets import Dataset
from helpers.models import TEXT_TEMPLATE, small_tokenizer
from helpers.trainers import dpo_trainer
from trl import DPOTrainer

from bpo.models.checkpoint import Checkpoint
from bpo.params import ROOT
from bpo.training.packed import check as packed_check
from bpo.training.packed.trainer import PackedDPOTrainer

pytestmark = pytest.mark.study  # a model of each family

WINDOW = 24  # tokens; the rows have 17 to 23, or 30 and more
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
          "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
SPARSE = {"num_local_experts": 2, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.0}
HEADS = {"head_dim": 16}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
# Family -> settings of its config, and why it is refused ("": it packs).
DECODERS = {
    "Llama": ({}, ""),
    "Qwen3": (HEADS, ""),
    "Mistral": ({"sliding_window": WINDOW}, ""),
    "Qwen2": ({**SLIDING, "use_sliding_window": True}, ""),
    "Phi3": ({"sliding_window": WINDOW}, ""),
    "Gemma2": ({**HEADS, **SLIDING}, ""),
    "Gemma3Text": ({**HEADS, **SLIDING}, ""),
    "Olmo3": (SLIDING, ""),
    "GptOss": ({**HEADS, **SLIDING, **SPARSE}, ""),
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, "conv"),
    "Qwen3Next": ({**HEADS, **LINEAR, "num_experts": 2, "num_experts_per_tok": 1,
                   "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
                   "router_aux_loss_coef": 0.0}, "linear_attention"),
    "Bamba": ({**MAMBA, "attn_layer_indices": [1]}, "linear_attention"),
    "FalconH1": ({**MAMBA, "mamba_d_ssm": 64}, "hybrid"),
    "Mamba": ({}, "linear_attention"),
    "Bloom": ({"n_head": 2}, "counts positions by itself"),
}


@pytest.fixture(scope="module")
def words():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    return tokenizer


def decoder(family: str, words, dtype=torch.float32) -> Checkpoint:
    settings = DECODERS[family][0]
    config = getattr(transformers, f"{family}Config")(**{
        **dict(vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
               num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
               initializer_range=0.2, pad_token_id=words.pad_token_id,
               bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id), **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Checkpoint(model, words)


def pairs(question: int) -> Dataset:
    """Two positives with two rejected answers each, on questions of so many words."""
    asked = [" ".join("what colour is the disc ? describe the picture".split()[i:] * 9)
             for i in range(2)]
    return Dataset.from_list([
        {"prompt": [{"role": "user", "content": " ".join(text.split()[:question + i])}],
         "chosen": [{"role": "assistant", "content": chosen}],
         "rejected": [{"role": "assistant", "content": rejected}]}
        for i, (text, chosen, answers) in enumerate(zip(
            asked, ("red", "a blue box"), (("green", "no hot cat"), ("yes", "a big green box")),
            strict=True)) for rejected in answers])


def made(kind, checkpoint, rows, out, **settings):
    """A trainer of all weights; its reference has no path to load from and is computed first."""
    return dpo_trainer(kind, checkpoint, rows, out, adapters=False, precompute_ref_log_probs=True,
                       train_sampling_strategy="sequential", **settings)


def step(trainer):
    """Gradients and loss of all rows, and whether their batch was packed."""
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    trainer.model.train()
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return packed_check.Computed(loss.detach()[None], [
        torch.zeros(()) if w.grad is None else w.grad.float()
        for w in trainer.model.parameters()]), "packed" in batch


@pytest.mark.parametrize("family", [n for n, (_, why) in DECODERS.items() if not why])
@pytest.mark.parametrize("question, beyond", [(12, False), (26, True)])
def test_a_decoder_that_packs_has_the_loss_and_gradients_of_trl(family, question, beyond, words,
                                                                tmp_path):
    rows = pairs(question)
    stock, _ = step(made(DPOTrainer, decoder(family, words), rows, tmp_path))
    trainer = made(PackedDPOTrainer, decoder(family, words), rows, tmp_path)
    trainer.get_train_dataloader()
    assert trainer.data_collator.packing
    found, packed = step(trainer)
    assert packed == (not beyond or trainer.data_collator.window is None)
    assert packed_check.apart(stock, found) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [n for n, (_, why) in DECODERS.items() if why])
def test_a_decoder_that_mixes_otherwise_is_refused_by_name(family, dtype, words, tmp_path, capsys):
    trainer = made(PackedDPOTrainer, decoder(family, words, dtype), pairs(12), tmp_path)
    said = [x for x in capsys.readouterr().out.splitlines() if "not packed" in x]
    assert not trainer.data_collator.packing
    assert len(said) == 1 and DECODERS[family][1] in said[0]


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral", "GptOss"])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "autocast"])
def test_half_precision_packs_what_packs_right(family, weights, words, tmp_path):
    dtype = torch.bfloat16 if weights else torch.float32
    trainer = made(PackedDPOTrainer, decoder(family, words, dtype), pairs(12), tmp_path, bf16=True)
    trainer.get_train_dataloader()
    assert trainer.data_collator.packing


def test_the_families_of_the_readme_are_these():
    table = (ROOT / "params" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+) \(text\) \| (.*) \|$", table, re.MULTILINE))
    assert rows.keys() == DECODERS.keys()
    for family, (settings, why) in DECODERS.items():
        windows = {"sliding_window", "attention_chunk_size"} & settings.keys()
        expected = f"refused: .*{why}.*" if why else "packs by window" if windows else "packs"
        assert re.fullmatch(expected, rows[family]), family
