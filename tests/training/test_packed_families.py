"""Packed DPO steps of other families than LLaVA-1.5, with random checkpoints of thin layers: TRL's
own loss and gradients, or a run that notices by itself that it must not pack."""

import copy
import re

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers.data import picture
from helpers.families import REFUSED, TIMM, TORCHVISION, UNTRAINED, WRITERS
from helpers.trainers import dpo_trainer
from trl import DPOTrainer

from bpo.models import checkpoint as checkpoints
from bpo.models import prefix
from bpo.params import ROOT, DPOTraining, Refusal
from bpo.training import stage
from bpo.training.packed.rows import Sizes
from bpo.training.packed.trainer import PackedDPOTrainer

pytestmark = pytest.mark.study  # a model of each family

CLOSE = 1e-5  # what float32's rounding leaves
PACKED = [n for n in WRITERS if n not in {**REFUSED, **UNTRAINED}]


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    """Two images of different shapes, each with a chosen answer and two rejected ones."""
    return Dataset.from_list([
        {"images": [picture(thing, colour, seed, size)],
         "prompt": [{"role": "user", "content": question}],
         "chosen": [{"role": "assistant", "content": chosen}],
         "rejected": [{"role": "assistant", "content": rejected}]}
        for thing, colour, seed, size, question, chosen, answers in (
            ("disc", "red", 1, (64, 32), "What colour is it?", "Dark red",
             ("No", "Orange and green, with white stripes")),
            ("box", "blue", 2, (56, 84), "Describe this picture.", "A blue box on a table.",
             ("A cat looks past the camera", "A cup of coffee on a saucer with a spoon.")))
        for rejected in answers])


def trainer(cls, folder, rows: Dataset, out, **own):
    return dpo_trainer(cls, checkpoints.load(folder), rows, out, own=own, moved=5)


def step(made) -> tuple[float, torch.Tensor, dict]:
    """Loss, gradients and batch of all rows."""
    rows = [copy.copy(made.train_dataset[i]) for i in range(len(made.train_dataset))]
    inputs = made._prepare_inputs(made.data_collator(rows))
    loss = made._compute_loss(made.model, inputs, False)
    loss.backward()
    return loss.item(), torch.cat([w.grad.flatten() for w in made.model.parameters()
                                   if w.requires_grad]), inputs


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return ((first - second).norm() / first.norm()).item()


@pytest.mark.parametrize("dense", [False, True], ids=["branches", "mask"])
@pytest.mark.parametrize("family", PACKED)
def test_a_packed_batch_has_the_loss_and_gradients_of_trl(family, dense, families, pairs, tmp_path):
    stock = step(trainer(DPOTrainer, families(family), pairs, tmp_path))
    packing = trainer(PackedDPOTrainer, families(family), pairs, tmp_path, packing="always")
    if dense:
        prefix.use_mask(packing.base)
    packing.data_collator.dense = dense
    assert prefix.in_use(packing.base) != dense
    packed = step(packing)
    assert len(packed[2]["packed"]["first"]) == 2  # the rows of a positive share one prompt
    assert packed[2]["packed"]["source"].numel() < stock[2]["input_ids"].numel() / 2
    assert abs(stock[0] - 0.6931) > 1e-3 and stock[1].norm() > 1e-3
    assert packed[0] == pytest.approx(stock[0], abs=CLOSE)
    assert distance(stock[1], packed[1]) <= CLOSE


@pytest.mark.parametrize("family", PACKED)
def test_all_rows_of_an_image_are_a_tree_with_the_loss_and_gradients_of_trl(family, families, pairs,
                                                                            tmp_path):
    """Two questions about each image; about the first in turns."""
    rows = list(pairs)
    for n, row in enumerate(pairs):
        before = [*row["prompt"], *row["chosen"]] if n < 2 else []
        rows.append({**row, "prompt": [*before, {"role": "user", "content": "What else is there?"}],
                     "chosen": [{"role": "assistant", "content": "Nothing else."}]})
    rows = Dataset.from_list(rows)
    stock = step(trainer(DPOTrainer, families(family), rows, tmp_path))
    made = trainer(PackedDPOTrainer, families(family), rows, tmp_path, share="image")
    made.get_train_dataloader()
    assert made.data_collator.packing and made.data_collator.branched
    for dense in (False, True):
        if dense:
            prefix.use_mask(made.base)
        made.data_collator.dense = dense
        made.model.zero_grad()
        packed = step(made)
        assert len(packed[2]["packed"]["first"]) == 2
        assert packed[2]["packed"]["source"].numel() < stock[2]["input_ids"].numel() / 3
        assert packed[0] == pytest.approx(stock[0], abs=CLOSE)
        assert distance(stock[1], packed[1]) <= CLOSE


@pytest.mark.parametrize("family", PACKED)
def test_a_family_that_packs_right_is_packed_by_itself(family, families, pairs, tmp_path, capsys):
    made = trainer(PackedDPOTrainer, families(family), pairs, tmp_path)
    made.get_train_dataloader()
    assert made.data_collator.packing and prefix.in_use(made.base)
    assert "packed" not in capsys.readouterr().out


@pytest.mark.parametrize("family", PACKED)
def test_the_pixels_of_an_image_decide_its_own_pairs_alone(family, families, pairs, tmp_path):
    """Each positive's loss in one packed batch is that of a batch of its own."""
    made = trainer(PackedDPOTrainer, families(family), pairs, tmp_path, packing="always")
    rows = [made.train_dataset[i] for i in range(4)]
    with torch.no_grad():
        whole, *parts = (made._compute_loss(made.model, made._prepare_inputs(
            made.data_collator(some)), False).item() for some in (rows, rows[:2], rows[2:]))
    assert abs(parts[0] - parts[1]) > 1e-3
    assert whole == pytest.approx(sum(parts) / 2, abs=CLOSE)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_packed_is_refused_by_name_and_goes_on_as_trl(
        family, families, pairs, tmp_path, capsys):
    stock = step(trainer(DPOTrainer, families(family), pairs, tmp_path))
    capsys.readouterr()
    made = trainer(PackedDPOTrainer, families(family), pairs, tmp_path)
    made.get_train_dataloader()
    assert not made.data_collator.packing
    assert REFUSED[family] in capsys.readouterr().out
    unpacked = step(made)
    assert "packed" not in unpacked[2]
    assert unpacked[0] == pytest.approx(stock[0], abs=CLOSE)
    assert distance(stock[1], unpacked[1]) <= CLOSE


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_mask_of_its_own_is_seen_whatever_comes_first(streamed, precision, families, pairs,
                                                        tmp_path, capsys):
    """Rows of text, and an evaluation on such, before the first row with a picture."""
    text = [{**row, "images": []} for row in pairs.select(range(2))]
    rows = Dataset.from_list([*text, *pairs])
    if streamed:
        rows = IterableDataset.from_generator(lambda: iter([*text, *pairs]))
    made = dpo_trainer(PackedDPOTrainer, checkpoints.load(families("gemma3"), precision=precision),
                       rows, tmp_path, own={"eval_dataset": Dataset.from_list(text)},
                       max_steps=3, per_device_train_batch_size=2, bf16=precision == "bfloat16",
                       train_sampling_strategy="sequential")
    made.evaluate()
    assert made.data_collator.packing  # right for text
    made.train()
    assert not made.data_collator.packing
    assert "its attention looks ahead within the prompt" in capsys.readouterr().out


@pytest.mark.parametrize("family", PACKED)
def test_a_family_that_packs_right_does_so_in_bfloat16(family, families, pairs, tmp_path):
    made = dpo_trainer(PackedDPOTrainer, checkpoints.load(families(family), precision="bfloat16"),
                       pairs, tmp_path, bf16=True)
    made.get_train_dataloader()
    assert made.data_collator.packing


@pytest.mark.parametrize("family", PACKED)
def test_rows_are_measured_in_every_family(family, families, pairs, tmp_path):
    """TRL's default max_length: the longest row is the one that TRL's own batch has the most tokens
    of."""
    made = dpo_trainer(PackedDPOTrainer, checkpoints.load(families(family)), pairs, tmp_path,
                       max_length=1024)
    assert not made.dropped
    batch = made.data_collator.stock([copy.copy(row) for row in pairs])
    lengths = batch["attention_mask"].sum(1).view(2, -1).amax(0)
    size = Sizes(made.data_collator.stock.processor, 0)
    assert [size(row).length for row in pairs] == lengths.tolist()


@pytest.mark.parametrize("family", UNTRAINED)
def test_a_family_that_trl_does_not_train_still_does_not(family, families, pairs, tmp_path):
    with pytest.raises(ValueError, match="`images` are expected"):
        step(trainer(DPOTrainer, families(family), pairs, tmp_path))
    p = DPOTraining(study="s", model=str(families(family)), pairs="none.jsonl", variants={})
    with pytest.raises(Refusal, match="takes no text without an image, and TRL tokenizes answers"):
        stage._work(p, tmp_path)


def test_layers_that_share_keys_are_not_recomputed_under_deepspeed(families, tmp_path, monkeypatch):
    """With the reentrant kind, which TRL takes there, a step's gradients are not those without."""
    p = DPOTraining(study="s", model=str(families("gemma3n")), pairs="none.jsonl", variants={},
                    gradient_checkpointing=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(Refusal, match="gradient_checkpointing: .* share keys and values; turn it"):
        stage._work(p, tmp_path)


def test_the_trainer_alone_does_not_recompute_them_by_the_reentrant_kind(
        families, pairs, tmp_path):
    def made(family, reentrant):
        return dpo_trainer(PackedDPOTrainer, checkpoints.load(families(family)), pairs, tmp_path,
                           gradient_checkpointing=True,
                           gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    with pytest.raises(ValueError, match="use_reentrant gives wrong gradients where layers share"):
        made("gemma3n", True)
    assert made("gemma3n", False).data_collator.packing
    assert made("llava", True).data_collator.packing


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_that_share_keys_have_their_gradients_but_for_the_reentrant_kind(
        reentrant, families, pairs, tmp_path):
    def gradients(recomputed):
        made = trainer(DPOTrainer, families("gemma3n"), pairs.select(range(1)), tmp_path)
        made.model.train()
        if recomputed:
            made.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            made.model.enable_input_require_grads()
        return step(made)[1]

    assert (distance(gradients(False), gradients(True)) > 0.01) == reentrant


def test_the_families_of_the_readme_are_these():
    table = (ROOT / "params" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([\w.-]+) \| (packs|\w+: .*) \|$", table, re.MULTILINE))
    assert rows == {**dict.fromkeys(PACKED, "packs"),
                    **{n: f"refused: {why}" for n, why in REFUSED.items()},
                    **{n: f"untrained: {why}" for n, why in UNTRAINED.items()}}
    assert f"The processors of {', '.join(sorted(TORCHVISION))} need torchvision" in table
    assert f"the tower of {', '.join(sorted(TIMM))} needs timm" in table
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (f"of {len(WRITERS)} [families](params/README.md#families), {len(PACKED)} of which "
            "pack") in readme
