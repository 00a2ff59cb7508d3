"""Rows of one image as one tree: TRL's own loss, gradients and runs, and a self-check that notices
what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from helpers import warm
from helpers.data import picture
from helpers.trainers import dpo_trainer
from helpers.trees import FAULTS, SHAPES, ancestor_forgotten, questions
from trl import DPOTrainer

from bpo.models import checkpoint as checkpoints
from bpo.models import prefix, trees
from bpo.study import processes
from bpo.training.packed import check as packed_check
from bpo.training.packed import collation
from bpo.training.packed import rows as packed_rows
from bpo.training.packed.trainer import PackedDPOTrainer

pytestmark = pytest.mark.study

TESTS = Path(__file__).resolve().parents[1]
LOGGED = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen")
LOSSES = {"sigmoid": [1.0], "sigmoid sft": [1.0, 0.3], "ipo": [1.0]}


def made(kind, folder, rows, out, **settings):
    own = {n: settings.pop(n) for n in ("packing", "reference_folder") & settings.keys()}
    if kind is PackedDPOTrainer:
        own |= {"share": "image"}
    return dpo_trainer(kind, checkpoints.load(folder), Dataset.from_list(rows), out, own=own, **{
        "num_train_epochs": 2, "train_sampling_strategy": "sequential", **settings})


def step(trainer):
    """Loss and gradients of all rows, and their batch."""
    trainer.model.zero_grad()
    trainer.model.train()
    rows = [dict(trainer.train_dataset[n]) for n in range(len(trainer.train_dataset))]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return packed_check.Computed(loss.detach()[None], [
        w.grad.clone() for w in trainer.model.parameters() if w.requires_grad]), batch


def logs(trainer):
    trainer.train()
    return [{n: h[n] for n in LOGGED} for h in trainer.state.log_history if "loss" in h]


def agree(expected, found):
    assert len(expected) == len(found) > 1
    for one, other in zip(expected, found, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_gradients_are_those_of_trl(name, loss, model_folder, tmp_path):
    rows = SHAPES[name]
    settings = {"loss_type": loss.split(), "loss_weights": LOSSES[loss]}
    stock, padded = step(made(DPOTrainer, model_folder, rows, tmp_path, **settings))
    trainer = made(PackedDPOTrainer, model_folder, rows, tmp_path, packing="always", **settings)
    found, batch = step(trainer)
    assert packed_check.apart(stock, found) < 1e-5
    images = len({id(row["images"]) for row in rows})
    assert len(batch["packed"]["first"]) == images
    assert len(batch["pixel_values"]) == sum(
        len(shown) for shown in {id(r["images"]): r["images"] for r in rows}.values())
    begins = {(owner[0], *ids[:n]) for owner, ids in zip(batch["packed"]["rows"] * 2, (
        ids[mask.bool()].tolist() for ids, mask in zip(
            padded["input_ids"], padded["attention_mask"], strict=True)), strict=True)
        for n in range(1, len(ids))}
    assert batch["packed"]["source"].shape == (1, len(begins))  # no token stands twice
    prefix.use_mask(trainer.base)
    trainer.data_collator.dense = True
    assert packed_check.apart(stock, step(trainer)[0]) < 1e-5


@pytest.mark.parametrize("name", ("three questions, two rejected", "four turns"))
def test_bfloat16_agrees_within_its_rounding(name, model_folder, tmp_path):
    stock, _ = step(made(DPOTrainer, model_folder, SHAPES[name], tmp_path, bf16=True))
    trainer = made(PackedDPOTrainer, model_folder, SHAPES[name], tmp_path, bf16=True)
    assert packed_check.apart(stock, step(trainer)[0]) < 0.03
    trainer.get_train_dataloader()  # which tries packing
    assert trainer.data_collator.packing and trainer.data_collator.branched


def test_a_tree_that_is_cut_is_right_too(model_folder, tmp_path, monkeypatch):
    rows = SHAPES["turns of two images"]
    stock, _ = step(made(DPOTrainer, model_folder, rows, tmp_path))
    trainer = made(PackedDPOTrainer, model_folder, rows, tmp_path, packing="always")
    monkeypatch.setattr(collation, "TREE_TOKENS", 40)
    found, batch = step(trainer)
    assert len(batch["pixel_values"]) == len(batch["packed"]["first"]) > 2
    assert packed_check.apart(stock, found) < 1e-5


def test_questions_in_front_of_an_image_and_further_images_are_trees_of_their_own(
        model_folder, tmp_path):
    one, two = picture("disc", "red", 1), picture("box", "blue", 2)
    base = {"chosen": "red</s>", "rejected": "blue</s>"}
    rows = [{**base, "images": images, "prompt": f"<s>user: {text} assistant: "}
            for images, text in (([one], "<image> what ?"), ([one], "<image> describe it"),
                                 ([one], "what ? <image>"), ([one], "describe it <image>"),
                                 ([one, two], "<image> what ? <image> describe"),
                                 ([one, two], "<image> what ? <image> the disc"), ([], "what ?"))]
    stock, _ = step(made(DPOTrainer, model_folder, rows, tmp_path))
    found, batch = step(made(PackedDPOTrainer, model_folder, rows, tmp_path, packing="always"))
    assert packed_check.apart(stock, found) < 1e-5
    assert len(batch["packed"]["first"]) == 5
    assert [tree for tree, _ in batch["packed"]["rows"]] == [0, 0, 1, 2, 3, 3, 4]


@pytest.mark.parametrize("shape", ["three questions, two rejected", "four turns"])
@pytest.mark.parametrize("fault", [*FAULTS, "ancestor_forgotten"])
def test_a_fault_shows_in_the_gradients_and_the_self_check_notices(shape, fault, model_folder,
                                                                   tmp_path, monkeypatch, capsys):
    rows = SHAPES[shape]
    if fault == "ancestor_forgotten" and shape == "four turns":
        rows = questions((2, 2))  # of turns, all branches hang on one chain
    stock, _ = step(made(DPOTrainer, model_folder, rows, tmp_path))
    right, broken = trees.layout, {**FAULTS, "ancestor_forgotten": ancestor_forgotten}[fault]
    monkeypatch.setattr(trees, "layout", lambda *a, **k: broken(right(*a, **k)))
    forced = made(PackedDPOTrainer, model_folder, rows, tmp_path, packing="always")
    assert packed_check.apart(stock, step(forced)[0]) > 3e-3
    trainer = made(PackedDPOTrainer, model_folder, rows, tmp_path)
    trainer.get_train_dataloader()
    assert not trainer.data_collator.packing
    assert "cannot be packed with this model" in capsys.readouterr().out
    assert packed_check.apart(stock, step(trainer)[0]) < 1e-5


def test_two_prompts_in_a_tree_are_tried_when_they_first_come(model_folder, tmp_path, monkeypatch,
                                                              capsys):
    """A stream whose first batches have an image each: there is no branch on a branch yet."""
    rows = [r for n in range(4) for r in questions((1,), number=n)] + questions((2, 2), number=5)
    right = trees.layout
    monkeypatch.setattr(trees, "layout", lambda *a, **k: ancestor_forgotten(right(*a, **k)))
    given = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    trainer = dpo_trainer(PackedDPOTrainer, checkpoints.load(model_folder),
                          Dataset.from_list(rows).to_iterable_dataset(), tmp_path,
                          own={"share": "image"}, **given)
    found = logs(trainer)
    assert not trainer.data_collator.packing
    assert "another answer's words" not in (said := capsys.readouterr().out)
    assert "log-probs or gradients would be off" in said
    agree(logs(dpo_trainer(DPOTrainer, checkpoints.load(model_folder), Dataset.from_list(rows),
                           tmp_path, **given)), found)


RUNS = {"as it comes": {}, "kept references": {"precompute_ref_log_probs": True},
        "accumulated": {"gradient_accumulation_steps": 2},
        "checkpointed": {"gradient_checkpointing": True}, "workers": {"dataloader_num_workers": 1}}


def eight_rows():
    return [*questions((2, 2), turns=True), *questions((1, 2), number=1),
            *questions((1,), number=2)]


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run_is_trl_s(name, model_folder, tmp_path):
    settings = RUNS[name]
    known = {n: v for n, v in settings.items() if n != "precompute_ref_log_probs"}
    trainer = made(PackedDPOTrainer, model_folder, eight_rows(), tmp_path, **settings)
    agree(logs(made(DPOTrainer, model_folder, eight_rows(), tmp_path, **known)), logs(trainer))
    assert trainer.data_collator.packing and trainer.data_collator.branched


@pytest.mark.slow
def test_two_processes_train_as_one(model_folder, tmp_path):
    done = subprocess.run(
        [warm.python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         __file__, str(model_folder), str(tmp_path / "out")], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(TESTS)])})
    assert done.returncode == 0, done.stderr[-3000:]
    expected = logs(made(DPOTrainer, model_folder, eight_rows(), tmp_path))
    agree(expected, json.loads((tmp_path / "out.json").read_text()))


def test_references_of_another_order_of_rows_are_not_read(model_folder, tmp_path, monkeypatch,
                                                          capsys):
    kept = {"reference_folder": tmp_path / "kept", "precompute_ref_log_probs": True}
    made(PackedDPOTrainer, model_folder, eight_rows(), tmp_path, **kept).train()
    assert made(PackedDPOTrainer, model_folder, eight_rows(), tmp_path, **kept).cache.answers
    other = dpo_trainer(PackedDPOTrainer, checkpoints.load(model_folder),
                        Dataset.from_list(eight_rows()), tmp_path, precompute_ref_log_probs=True,
                        own={"reference_folder": tmp_path / "kept"})
    assert not other.cache.answers and "order of rows" in capsys.readouterr().out
    monkeypatch.setattr(trees, "VERSION", trees.VERSION + 1)
    assert not made(PackedDPOTrainer, model_folder, eight_rows(), tmp_path, **kept).cache.answers


def test_mdpo_is_its_own_unpacked_and_shares_an_image_s_damage(model_folder, tmp_path):
    rows = SHAPES["turns of two images"]
    damaged = {id(r["images"]): [picture("box", "blue", n)] for n, r in enumerate(rows)}
    rows = [{**r, "damaged_images": damaged[id(r["images"])]} for r in rows]
    plain, packed = (step(made(PackedDPOTrainer, model_folder, rows, tmp_path, packing=p,
                               loss_type=["mdpo"])) for p in ("never", "always"))
    assert packed_check.apart(plain[0], packed[0]) < 1e-5
    assert len(packed[1]["damaged"]["packed"]["first"]) == 2


def test_a_model_loaded_with_flash_attention_is_packed_and_gets_it_back(model_folder, tmp_path,
                                                                        monkeypatch):
    rows = SHAPES["three questions, two rejected"]
    stock, _ = step(made(DPOTrainer, model_folder, rows, tmp_path))
    load = checkpoints.load

    def flash(folder):
        checkpoint = load(folder)
        checkpoint.base.get_decoder().config._attn_implementation = "flash_attention_2"
        return checkpoint

    monkeypatch.setattr(checkpoints, "load", flash)
    trainer = made(PackedDPOTrainer, model_folder, rows, tmp_path)
    trainer.get_train_dataloader()
    assert trainer.data_collator.packing
    assert packed_check.apart(stock, step(trainer)[0]) < 1e-5
    decoder = trainer.base.get_decoder()
    monkeypatch.setattr(  # the package itself is not here
        type(decoder), "set_attn_implementation",
        lambda self, name: setattr(self.config, "_attn_implementation", name))
    assert prefix.settle([trainer.base], lambda: 1.0, bound=0.5, words="off by {:.1f}") == (
        "off by 1.0")
    assert decoder.config._attn_implementation == "flash_attention_2"


# The order of rows


def test_the_positives_of_an_image_are_a_family_and_those_without_stand_alone():
    rows = [*questions((2, 1)), *questions((1,), number=1), *questions((1,))]
    rows[-1] = {**rows[-1], "images": []}
    assert packed_rows.families(Dataset.from_list(rows), "image") == [
        [[0, 1], [2]], [[3]], [[4]]]
    again = [*rows, {**rows[2], "images": [picture("disc", "red", 0, (32, 32))]}]
    assert packed_rows.families(Dataset.from_list(again), "image") == [
        [[0, 1], [2, 5]], [[3]], [[4]]]


@pytest.mark.parametrize("batch", [4, 6, 8])
def test_an_image_is_cut_at_the_end_of_a_batch_alone(batch):
    families = [[[n, n + 1], [n + 2], [n + 3, n + 4]] for n in range(0, 500, 5)]
    order, alone = (list(packed_rows.PositiveSampler(some, batch=batch, seed=1)) for some in (
        families, [[positive] for family in families for positive in family]))
    assert sorted(order) == list(range(500))

    def batches(rows):
        """The image of each row, batch by batch."""
        return [[n // 5 for n in rows[at:at + batch]] for at in range(0, 500, batch)]

    for images in batches(order)[:-1]:
        runs = [image for n, image in enumerate(images) if n == 0 or images[n - 1] != image]
        assert len(runs) == len(set(runs))
    together, apart = (sum(len(set(images)) for images in batches(o)) for o in (order, alone))
    assert together < 0.8 * apart
    place = {n: at // batch for at, n in enumerate(order)}
    whole = [place[a] == place[b] for family in families for a, b in (family[0], family[2])]
    assert sum(whole) >= len(whole) - 1  # what is left over at the end may be cut


if __name__ == "__main__":  # one of two processes
    folder, out = sys.argv[1:]
    found = logs(made(PackedDPOTrainer, Path(folder), eight_rows(), Path(out),
                      per_device_train_batch_size=2))
    if processes.rank() == 0:
        Path(f"{out}.json").write_text(json.dumps(found))
    processes.leave()
