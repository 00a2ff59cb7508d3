"""Preference training on packed rows is TRL's own to rounding: loss, gradients, metrics, runs."""

import copy
import dataclasses
import random
import re
import subprocess
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import warm
from helpers.models import SIDE
from helpers.trainers import dpo_trainer
from helpers.trees import FAULTS
from PIL import Image
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from bpo.models import checkpoint as checkpoints
from bpo.models import prefix, trees
from bpo.training import objectives
from bpo.training.objectives import OBJECTIVES
from bpo.training.packed import check as packed_check
from bpo.training.packed import reference
from bpo.training.packed import trainer as packed_trainer
from bpo.training.packed.forward import FIELDS
from bpo.training.packed.trainer import PackedDPOTrainer

QUESTION = "what colour is the disc ? describe the picture and answer the question".split()
LOSSES = [n for n, o in OBJECTIVES.items() if o.function is None]


def answer(draw, words):
    return [{"role": "assistant", "content": " ".join(draw.choices(words, k=draw.randint(1, 7)))}]


def made_rows(rejected=(2, 2, 1, 2), *, pictures=1):
    """Positives of ragged lengths, each with its images and so many rejected answers."""
    draw, rows = random.Random(0), []
    for i, count in enumerate(rejected):
        images = [Image.new("RGB", (SIDE, SIDE + 8 * i), tuple(draw.randrange(256) for _ in "rgb"))
                  for _ in range(pictures)]
        prompt = [{"role": "user", "content": " ".join(QUESTION[:5 + 2 * i])}]
        chosen = answer(draw, ["red", "a", "box", "cat", "the"])
        rows += [{"images": images, "prompt": prompt, "chosen": chosen,
                  "rejected": answer(draw, ["green", "blue", "no", "hot"])} for _ in range(count)]
    return rows


def made_trainer(kind, folder, rows, out, *, text=False, own=None, **settings):
    """A trainer on a fresh copy of a checkpoint; rows come in their order, twice."""
    checkpoint = checkpoints.load_text_model(folder) if text else checkpoints.load(folder)
    return dpo_trainer(kind, checkpoint, Dataset.from_list(rows), out, own=own, **{
        "num_train_epochs": 2, "train_sampling_strategy": "sequential", **settings})


def gradients(trainer, count=None):
    """Loss and adapters' gradients of the first rows, through the trainer's own collator."""
    rows = [trainer.train_dataset[i] for i in range(count or len(trainer.train_dataset))]
    trainer.model.train()
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return packed_check.Computed(loss.detach()[None], [
        w.grad for w in trainer.model.parameters() if w.requires_grad])


def curves(trainer):
    trainer.train()
    timed = ("runtime", "per_second", "total_flos")
    return [{n: v for n, v in h.items() if not any(t in n for t in timed)}
            for h in trainer.state.log_history]


def agree(first, second, bound=1e-5):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert other[name] == pytest.approx(one[name], rel=bound, abs=bound), name


SETTINGS = {
    "one rejected a positive": (dict(rejected=(1, 1, 1, 1)), {}),
    "two rejected a positive": (dict(rejected=(2, 2)), {}),
    "one, two and three": (dict(rejected=(3, 1, 2)), {}),
    "several images a row": (dict(pictures=2), {}),
    "gradient checkpointing": ({}, dict(gradient_checkpointing=True)),
    "SFT and weights": ({}, dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3])),
    "WPO weighting": ({}, dict(use_weighting=True)),
    "LD-DPO": ({}, dict(ld_alpha=0.5)),
}


def same_step(folder, rows, out, packing="always", *, bound=1e-5, text=False, **settings):
    """A packed trainer whose loss and gradients on the rows are TRL's, and those of TRL."""
    stock = gradients(made_trainer(DPOTrainer, folder, rows, out, text=text, **settings))
    trainer = made_trainer(PackedDPOTrainer, folder, rows, out, text=text,
                           own={"packing": packing}, **settings)
    assert packed_check.apart(stock, gradients(trainer)) < bound
    return trainer, stock


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients_are_those_of_trl(model_folder, tmp_path, name):
    shape, settings = SETTINGS[name]
    trainer, stock = same_step(model_folder, made_rows(**shape), tmp_path, **settings)
    prefix.use_mask(trainer.base)
    trainer.data_collator.dense = True
    trainer.model.zero_grad()
    assert packed_check.apart(stock, gradients(trainer)) < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_of_trl_is_its_own(model_folder, tmp_path, loss):
    same_step(model_folder, made_rows(), tmp_path, "auto", loss_type=[loss], label_smoothing=0.1,
              max_steps=1)


def test_text_alone_is_packed_too(model_folder, text_folder, tmp_path):
    rows = [{n: v for n, v in r.items() if n != "images"} for r in made_rows()]
    same_step(text_folder, rows, tmp_path, text=True)
    same_step(model_folder, rows, tmp_path)


def test_rows_with_and_without_images_go_into_one_batch(model_folder, tmp_path):
    rows = made_rows()
    same_step(model_folder, [*({**r, "images": []} for r in rows[:2]), *rows[2:]], tmp_path)


def test_bfloat16_agrees_within_its_rounding(model_folder, tmp_path):
    same_step(model_folder, made_rows(), tmp_path, "auto", bound=0.03, bf16=True)


@pytest.mark.parametrize("own, settings", [
    ({"packing": "always"}, {}), ({"packing": "auto"}, {}), ({"packing": "never"}, {}),
    ({}, {"precompute_ref_log_probs": True}), ({}, {"gradient_accumulation_steps": 2})])
def test_a_whole_run_logs_what_trl_logs(model_folder, tmp_path, own, settings):
    rows = made_rows()
    known = {n: v for n, v in settings.items() if n != "precompute_ref_log_probs"}
    stock = curves(made_trainer(DPOTrainer, model_folder, rows, tmp_path / "a", **known))
    trainer = made_trainer(PackedDPOTrainer, model_folder, rows, tmp_path / "b", own=own,
                           **settings)
    agree(stock, curves(trainer))
    assert trainer.data_collator.packing == (own.get("packing") != "never")


def test_palettes_tell_images_apart_and_a_copied_collator_works(model_folder, tmp_path):
    """Two images whose bytes are the same indices into different palettes."""
    images = [Image.new("P", (SIDE, SIDE), 0) for _ in range(2)]
    for image, palette in zip(images, ([255, 0, 0], [0, 0, 255]), strict=True):
        image.putpalette(palette)
    rows = [{**made_rows()[0], "images": [image.convert("RGB")]} for image in images]
    trainer = made_trainer(PackedDPOTrainer, model_folder, rows, tmp_path)
    collator = copy.deepcopy(trainer.data_collator)
    collator.keyed = True
    batch = collator([{**r, "images": [i]} for r, i in zip(rows, images, strict=True)])
    assert len(batch["pixel_values"]) == 2 and len(set(batch["keys"])) == 4


@pytest.mark.parametrize("broken", FAULTS)
def test_a_broken_packing_shows_in_the_gradients_and_the_self_check_notices(
        model_folder, tmp_path, monkeypatch, capsys, broken):
    """Branches that see each other, and wrong positions."""
    rows = made_rows(rejected=(2, 2))
    stock = gradients(made_trainer(DPOTrainer, model_folder, rows, tmp_path / "a"))
    right = trees.layout
    monkeypatch.setattr(trees, "layout", lambda *a, **k: FAULTS[broken](right(*a, **k)))
    forced = made_trainer(PackedDPOTrainer, model_folder, rows, tmp_path / "b",
                          own={"packing": "always"})
    assert packed_check.apart(stock, gradients(forced)) > 3e-3
    whole = curves(made_trainer(DPOTrainer, model_folder, rows, tmp_path / "a"))
    capsys.readouterr()
    trainer = made_trainer(PackedDPOTrainer, model_folder, rows, tmp_path / "c")
    agree(whole, curves(trainer))
    assert not trainer.data_collator.packing
    said = [x for x in capsys.readouterr().out.splitlines() if "unpacked" in x]
    assert len(said) == 1 and "cannot be packed with this model" in said[0]


def test_the_self_check_leaves_the_run_as_it_was(model_folder, tmp_path):
    rows = made_rows()
    drawn = {"train_sampling_strategy": "random"}
    checked, unchecked = (curves(made_trainer(PackedDPOTrainer, model_folder, rows,
                                              tmp_path / p, own={"packing": p}, **drawn))
                          for p in ("auto", "always"))
    assert checked == unchecked


class Forwards:
    """Counts the reference's forward passes."""

    def __init__(self, trainer):
        self.count, tokens = 0, trainer.answer_tokens

        def counted(*args):
            self.count += 1
            return tokens(*args)

        trainer.answer_tokens = counted


def test_trl_still_has_what_is_used_of_its_private_surface(model_folder, tmp_path):
    stock = made_trainer(DPOTrainer, model_folder, made_rows(), tmp_path)
    assert [n for n in packed_trainer.TRL_PRIVATE if not hasattr(stock, n)] == []
    written = "".join(f.read_text() for f in (
        *Path(packed_trainer.__file__).parent.glob("*.py"), Path(objectives.__file__)))
    used = set(re.findall(r"(?:self|trainer|super\(\))\.(\w+)", written))
    private = {n for n in dir(stock) if n.startswith("_") and not n.startswith("__")}
    assert used & private <= set(packed_trainer.TRL_PRIVATE)
    # Another field of a value a token would stay in the packed layout.
    fields = {f.name for f in dataclasses.fields(FusedCausalLMOutput)}
    assert fields == {*FIELDS, "loss", "label_mask", "aux_loss"}


def test_reference_log_probs_are_computed_once_and_kept(model_folder, tmp_path, capsys):
    rows, kept = made_rows(), {"reference_folder": tmp_path / "kept", "packing": "always"}
    settings = {"precompute_ref_log_probs": True}
    first = made_trainer(PackedDPOTrainer, model_folder, rows, tmp_path / "a", own=kept, **settings)
    counted = Forwards(first)
    curve = curves(first)
    assert counted.count == 2  # a batch each, in the first of two epochs
    again = made_trainer(PackedDPOTrainer, model_folder, rows, tmp_path / "b", own=kept, **settings)
    counted = Forwards(again)
    agree(curve, curves(again))
    assert counted.count == 0
    # Another beta reads them too; another model does not, and says so.
    other = made_trainer(PackedDPOTrainer, model_folder, rows, tmp_path / "c", own=kept, beta=0.5,
                         **settings)
    counted = Forwards(other)
    other.train()
    assert counted.count == 0
    changed = checkpoints.load(model_folder)
    with torch.no_grad():
        changed.model.get_output_embeddings().weight.mul_(1.01)
    changed.model.save_pretrained(tmp_path / "model")
    changed.processor.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    moved = made_trainer(PackedDPOTrainer, tmp_path / "model", rows, tmp_path / "d", own=kept,
                         **settings)
    assert "are those of another model" in capsys.readouterr().out
    counted = Forwards(moved)
    moved.train()
    assert counted.count == 2


def test_kept_references_are_those_of_the_model_without_adapters(model_folder, tmp_path):
    trainer = made_trainer(PackedDPOTrainer, model_folder, made_rows(), tmp_path,
                           precompute_ref_log_probs=True)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    mine = trainer.reference_tokens(batch, batch["keys"])
    checkpoint = checkpoints.load(model_folder)
    plain = {n: batch[n] for n in ("input_ids", "attention_mask")}
    logits = checkpoint.model(**plain, pixel_values=batch["pixel_values"].repeat(2, 1, 1, 1)).logits
    chains = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    for n in range(2):
        answered = batch["completion_mask"][n, 1:].bool()
        torch.testing.assert_close(mine[n], chains[n][answered], atol=1e-5, rtol=0)
    assert reference.model_key(trainer.model) in trainer.cache.key


def test_references_are_kept_before_a_checkpoint_counts_on_them(model_folder, tmp_path,
                                                                monkeypatch):
    seen, save = [], DPOTrainer._save_checkpoint

    def noted(trainer, *args, **kwargs):
        seen.append((len(list(trainer.cache.folder.iterdir())), dict(trainer.cache.new)))
        save(trainer, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "_save_checkpoint", noted)
    trainer = made_trainer(PackedDPOTrainer, model_folder, made_rows(), tmp_path, max_steps=2,
                           precompute_ref_log_probs=True, save_strategy="steps", save_steps=1,
                           per_device_train_batch_size=2)
    trainer.train()
    assert seen == [(1, {}), (2, {})]


def test_an_answer_has_the_reference_that_was_kept_first_whatever_stands_beside_it(
        model_folder, tmp_path):
    """What a killed run had kept by then must not decide what the one that goes on takes."""
    trainer = made_trainer(PackedDPOTrainer, model_folder, made_rows(), tmp_path,
                           precompute_ref_log_probs=True)
    alone, beside = (trainer._prepare_inputs(trainer.data_collator(
        [trainer.train_dataset[n] for n in rows])) for rows in ((0,), (0, 1)))
    first = dict(zip(alone["keys"], trainer.reference_tokens(alone, alone["keys"]), strict=True))
    assert not first.keys() >= set(beside["keys"])
    trainer.cache.answers |= {k: v + 1 for k, v in first.items()}  # as other last bits would show
    found = dict(zip(beside["keys"], trainer.reference_tokens(beside, beside["keys"]), strict=True))
    assert all(torch.equal(found[k], v + 1) for k, v in first.items())
    assert found.keys() == trainer.cache.answers.keys()


def test_rows_that_are_too_long_are_left_out_and_counted(model_folder, tmp_path, capsys):
    rows = made_rows()
    rows[0] = {**rows[0], "rejected": [{"role": "assistant", "content": "green " * 300}]}
    trainer = made_trainer(PackedDPOTrainer, model_folder, rows, tmp_path, max_length=100)
    assert trainer.dropped.total() == 1 and len(trainer.train_dataset) == len(rows) - 1
    assert "1 of 7 rows are left out: longer than" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no row is left"):
        made_trainer(PackedDPOTrainer, model_folder, rows, tmp_path, max_length=3)


def test_a_loss_that_is_no_number_stops_with_the_rows(model_folder, tmp_path):
    rows = made_rows()
    rows[2] = {**rows[2], "rejected": [{"role": "assistant", "content": "a yellow box"}]}
    trainer = made_trainer(PackedDPOTrainer, model_folder, rows, tmp_path,
                           own={"packing": "always"})
    word = trainer._tokenizer.convert_tokens_to_ids("yellow")
    with torch.no_grad():
        trainer.base.get_input_embeddings().weight[word] = float("nan")
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan on rows 2 of"):
        trainer.train()


def test_out_of_memory_says_what_to_lower(model_folder, tmp_path, monkeypatch):
    trainer = made_trainer(PackedDPOTrainer, model_folder, made_rows(), tmp_path,
                           own={"packing": "always"})

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(trainer, "_compute_loss", full)
    with pytest.raises(MemoryError, match="per_device_train_batch_size .it is 4.*checkpointing"):
        trainer.train()


SHARDED = """
import sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from bpo.study import processes
sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/.."]
import test_packed as t
from helpers.trees import questions

share = sys.argv[4]
rows = {"prompt": t.made_rows((2, 2)),
        "image": [*questions((1, 1)), *questions((1, 1), number=1)]}[share]
trainer = t.made_trainer(t.PackedDPOTrainer, t.Path(sys.argv[2]), rows, t.Path(sys.argv[3]),
                         own={"packing": "always", "share": share})
rows = [trainer.train_dataset[i] for i in range(4)]
halves = rows[:2], rows[2:]


def loss(rows, packing=True):
    trainer.data_collator.packing = packing
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    assert not packing or len(batch["packed"]["first"]) == 1
    return trainer._compute_loss(trainer.model, batch, False)


wanted = [loss(half, packing=False).item() for half in halves][processes.rank()]
sum(loss(half) / 2 for half in halves).backward()
whole = {n: w.grad.clone() for n, w in trainer.model.named_parameters() if w.grad is not None}
trainer.model.zero_grad(set_to_none=True)
mesh = init_device_mesh("cpu", (2,))
for layer in trainer.base.get_decoder().layers:
    fully_shard(layer, mesh=mesh)
fully_shard(trainer.model, mesh=mesh)
mine = loss(halves[processes.rank()])
mine.backward()
assert abs(mine.item() - wanted) < 1e-5, (mine, wanted)
parts = {n: w.grad for n, w in trainer.model.named_parameters() if w.grad is not None}
assert parts.keys() == whole.keys() and all(g.to_local().numel() < whole[n].numel()
                                            for n, g in parts.items())
apart = [(g.full_tensor() - whole[n]).square().sum() for n, g in parts.items()]
size = sum(g.square().sum() for g in whole.values())
assert (sum(apart) / size).sqrt() < 1e-5
processes.leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize("share", ("prompt", "image"))
def test_a_model_in_shards_has_the_loss_and_gradients_of_the_whole(share, model_folder, tmp_path):
    """Torch's own sharding (FSDP2) in two processes: accelerate starts none without a GPU."""
    script = tmp_path / "run.py"
    script.write_text(SHARDED)
    done = subprocess.run(
        [warm.python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(script), str(Path(__file__).parent), str(model_folder), str(tmp_path / "out"), share],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_collator_of_one_s_own_keeps_no_references_and_says_so(model_folder, tmp_path, capsys):
    plain = made_trainer(DPOTrainer, model_folder, made_rows(), tmp_path).data_collator
    trainer = made_trainer(PackedDPOTrainer, model_folder, made_rows(), tmp_path,
                           own={"data_collator": lambda rows: plain(rows)},
                           precompute_ref_log_probs=True)
    said = capsys.readouterr().out
    assert "not packed: a data_collator of your own" in said and "are not kept" in said
    assert trainer.cache is None
