"""The packed trainer where TRL's stands: the data sets, columns, settings and calls that TRL takes,
and the numbers that TRL gives on the rows that both train on."""

import random

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers.data import picture, said
from helpers.trainers import dpo_trainer, peak
from PIL import Image, ImageFile
from trl import DPOTrainer

from bpo.models import checkpoint as checkpoints
from bpo.models import prefix
from bpo.training.packed.trainer import PackedDPOTrainer

pytestmark = pytest.mark.study


def made_rows(number=8, *, images=True, long=()):
    """Pairs on pictures of several sizes; those in `long` ask a long question."""
    draw = random.Random(1)
    return [{**({"images": [picture("disc", "red", n, (32, 32 + 8 * (n % 3)))]} if images else {}),
             "prompt": said("user", "what colour is the disc ? " * (12 if n in long else 1)),
             "chosen": said("assistant", " ".join(draw.choices(("red", "a box"), k=2 + n % 3))),
             "rejected": said("assistant", " ".join(draw.choices(("blue", "no"), k=1 + n % 4)))}
            for n in range(number)]


def made(kind, folder, rows, out, *, own=None, **settings):
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return dpo_trainer(kind, checkpoints.load(folder), rows, out, own=own, **{
        "train_sampling_strategy": "sequential", **settings})


def both(folder, rows, out, *, given=None, **settings):
    return [made(kind, folder, rows, out / kind.__name__, own=given, **settings)
            for kind in (DPOTrainer, PackedDPOTrainer)]


def evaluation(trainer, **kwargs):
    return {n: v for n, v in trainer.evaluate(**kwargs).items()
            if not any(t in n for t in ("time", "per_second"))}


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("streamed", [False, True])
def test_evaluation_leaves_out_what_is_too_long_and_else_gives_trl_s_numbers(
        model_folder, tmp_path, streamed):
    rows, long = made_rows(), made_rows(long=(1, 4))
    short = [r for n, r in enumerate(long) if n not in (1, 4)]
    stock = made(DPOTrainer, model_folder, rows, tmp_path, own={
        "eval_dataset": Dataset.from_list(short)})
    given = stream(long) if streamed else {"one": Dataset.from_list(long)}
    trainer = made(PackedDPOTrainer, model_folder, rows, tmp_path, max_length=60, own={
        "eval_dataset": given})
    expected = evaluation(stock)
    found = evaluation(trainer)
    for name, value in expected.items():
        named = name if streamed else name.replace("eval_", "eval_one_")
        assert found.get(named, found.get(name)) == pytest.approx(value, abs=1e-5), name
    assert trainer.dropped["longer than max_length = 60 tokens"] == 2
    # One that is given later is treated alike.
    assert evaluation(trainer, eval_dataset=Dataset.from_list(long))["eval_loss"] == (
        pytest.approx(expected["eval_loss"], abs=1e-5))


def test_training_on_a_stream_leaves_out_the_same_rows(model_folder, tmp_path):
    long = made_rows(long=(1, 4))
    settings = {"max_steps": 3, "max_length": 60, "per_device_train_batch_size": 2}
    losses = []
    for rows in (Dataset.from_list(long), stream(long)):
        trainer = made(PackedDPOTrainer, model_folder, rows, tmp_path, **settings)
        trainer.train()
        losses.append([h["loss"] for h in trainer.state.log_history if "loss" in h])
        assert trainer.dropped.total() == 2 and trainer.data_collator.packing
    assert losses[0] == losses[1]


def test_predict_gives_trl_s_logits(model_folder, tmp_path):
    stock, trainer = both(model_folder, made_rows(), tmp_path)
    rows = Dataset.from_list(made_rows(4))
    expected, found = (t.predict(rows).predictions for t in (stock, trainer))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=0)
    assert trainer.data_collator.packing


def test_dispatched_batches_are_not_cut(model_folder, tmp_path):
    given = {"eval_dataset": stream(made_rows(6))}
    settings = {"accelerator_config": {"dispatch_batches": True}}
    stock, trainer = both(model_folder, made_rows(), tmp_path, given=given, **settings)
    assert evaluation(trainer)["eval_loss"] == pytest.approx(evaluation(stock)["eval_loss"],
                                                             abs=1e-5)


@pytest.mark.parametrize("column", ["images", "image"])
def test_pictures_may_be_paths(model_folder, tmp_path, column):
    rows = made_rows(4)
    for n, row in enumerate(rows):
        file = tmp_path / f"{n}.png"
        row.pop("images")[0].save(file)
        row[column] = [str(file)] if column == "images" else str(file)
    stock, trainer = both(model_folder, rows, tmp_path, max_length=1024)
    assert not trainer.dropped
    batches = [t._prepare_inputs(t.data_collator(list(t.train_dataset))) for t in (stock, trainer)]
    losses = [t.compute_loss(t.model, b).item()
              for t, b in zip((stock, trainer), batches, strict=True)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_no_picture_is_decoded_before_the_first_batch_but_those_that_are_tried(
        model_folder, tmp_path, monkeypatch):
    rows = Dataset.from_list(made_rows(40, long=(7,)))
    decoded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load",
                        lambda image: (decoded.append(image), load(image))[1])
    trainer = made(PackedDPOTrainer, model_folder, rows, tmp_path, max_length=1024)
    trainer.get_train_dataloader()
    # The first row's, at which TRL looks, and the longest row's, some of them several times.
    assert len({id(image) for image in decoded}) < 8


def test_out_of_memory_reaches_who_looks_for_a_batch_size(model_folder, tmp_path, monkeypatch):
    trainer = made(PackedDPOTrainer, model_folder, made_rows(), tmp_path, auto_find_batch_size=True,
                   per_device_train_batch_size=8)
    step = trainer._compute_loss

    def full(model, inputs, *args):
        if len(inputs["input_ids"]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(model, inputs, *args)

    monkeypatch.setattr(trainer, "_compute_loss", full)
    trainer.train()
    assert trainer.state.global_step > 0 and trainer._train_batch_size < 8


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_trl_s_own_orders_read_their_column(model_folder, tmp_path, strategy):
    rows = [{**r, "length": 5 + 3 * n} for n, r in enumerate(made_rows())]
    losses = []
    for kind in (DPOTrainer, PackedDPOTrainer):
        trainer = made(kind, model_folder, rows, tmp_path, train_sampling_strategy=strategy,
                       length_column_name="length", max_steps=2, remove_unused_columns=False)
        trainer.train()
        losses.append([h["loss"] for h in trainer.state.log_history if "loss" in h])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_data_set_that_is_put_in_later_is_the_one_that_is_trained_on(model_folder, tmp_path):
    stock, trainer = both(model_folder, made_rows(8), tmp_path, per_device_train_batch_size=2,
                          train_sampling_strategy="random")
    losses = []
    for t in (stock, trainer):
        t.train_dataset = t.train_dataset.select(range(2, 4))
        t.train()
        assert t.state.global_step == 3  # one batch an epoch
        losses.append(sorted(h["loss"] for h in t.state.log_history if "loss" in h))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_full_fine_tuning_keeps_references_without_a_second_model(model_folder, tmp_path, capsys):
    """A model in memory has no path that a second one could be loaded from."""
    def full(**settings):
        checkpoint = checkpoints.load(model_folder)
        checkpoint.base.config._name_or_path = ""
        return dpo_trainer(PackedDPOTrainer, checkpoint, Dataset.from_list(made_rows()),
                           tmp_path / "out", adapters=False, precompute_ref_log_probs=True,
                           train_sampling_strategy="sequential", num_train_epochs=2, **settings)

    capsys.readouterr()
    trainer = full(own={"eval_dataset": Dataset.from_list(made_rows(3))})
    assert "reference" not in capsys.readouterr().err  # a notebook shows that in red, and keeps it
    assert trainer.ref_model is None
    answers = dict(trainer.cache.answers)
    with pytest.raises(ValueError, match="not supported with IterableDataset"):
        trainer.evaluate(eval_dataset=stream(made_rows(3)))
    trainer.train()
    assert trainer.cache.answers.keys() == answers.keys() and trainer.evaluate()
    fly = dpo_trainer(DPOTrainer, checkpoints.load(model_folder), Dataset.from_list(made_rows()),
                      tmp_path / "stock", adapters=False, num_train_epochs=2,
                      train_sampling_strategy="sequential",
                      own={"ref_model": checkpoints.load(model_folder).model})
    fly.train()
    losses = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (fly, trainer)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[0][-1] < losses[0][0]
    with pytest.raises(ValueError, match="after training has started"):
        trainer.evaluate(eval_dataset=Dataset.from_list(made_rows(5, long=(2,))))
    with pytest.raises(ValueError, match="not supported with IterableDataset"):
        full(own={"eval_dataset": stream(made_rows(3))})


def test_a_reference_of_its_own_gets_branch_attention_too(model_folder, tmp_path):
    own = {"ref_model": checkpoints.load(model_folder).model}
    trainer = dpo_trainer(PackedDPOTrainer, checkpoints.load(model_folder),
                          Dataset.from_list(made_rows()), tmp_path, adapters=False, own=own)
    trainer.get_train_dataloader()
    assert len(trainer.bases) == 2 and all(map(prefix.in_use, trainer.bases))


def test_kept_references_know_the_number_format_of_the_run(model_folder, tmp_path, capsys):
    for bf16 in (False, True):
        trainer = made(PackedDPOTrainer, model_folder, made_rows(4), tmp_path, bf16=bf16,
                       own={"reference_folder": tmp_path / "kept"}, precompute_ref_log_probs=True)
        assert not trainer.cache.answers
        trainer.train()
    assert "another model, number format or order" in capsys.readouterr().out


def test_what_the_first_rows_do_not_show_is_tried_when_it_comes(model_folder, tmp_path, monkeypatch,
                                                               capsys):
    """Positions that are wrong from the 40th token on: the first rows are shorter."""
    right = prefix.inputs

    def wrong(base, placed, padded):
        out = right(base, placed, padded)
        out["position_ids"] = out["position_ids"] + (out["position_ids"] > 40) * 3
        return out

    monkeypatch.setattr(prefix, "inputs", wrong)
    rows = made_rows(6, long=(4, 5))
    stock = made(DPOTrainer, model_folder, rows, tmp_path, per_device_train_batch_size=2)
    stock.train()
    expected = [h["loss"] for h in stock.state.log_history if "loss" in h]
    for given in (Dataset.from_list(rows), stream(rows)):
        streamed = isinstance(given, IterableDataset)
        trainer = made(PackedDPOTrainer, model_folder, given, tmp_path,
                       per_device_train_batch_size=2, **({"max_steps": 9} if streamed else {}))
        capsys.readouterr()
        trainer.train()
        found = [h["loss"] for h in trainer.state.log_history if "loss" in h]
        assert found == pytest.approx(expected, abs=1e-5)
        assert not trainer.data_collator.packing
        assert "cannot be packed with this model" in capsys.readouterr().out


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_a_check_between_accumulated_steps_leaves_their_gradients(model_folder, tmp_path,
                                                                  checkpointing):
    """Each row is longer than the one before, so that every one of them is tried."""
    rows = [{**r, "prompt": said("user", "what is there ? " * (n + 1))}
            for n, r in enumerate(made_rows(6))]
    how = {} if checkpointing is None else {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    losses = []
    for kind in (DPOTrainer, PackedDPOTrainer):
        trainer = made(kind, model_folder, stream(rows), tmp_path, max_steps=2,
                       per_device_train_batch_size=1, gradient_accumulation_steps=3, **how)
        trainer.train()
        losses.append([(h["loss"], h["grad_norm"]) for h in trainer.state.log_history
                       if "loss" in h])
    assert trainer.data_collator.packing
    assert losses[1] == [pytest.approx(x, abs=1e-4) for x in losses[0]]


TEMPLATE_WITH_A_SWITCH = (
    "{{ '<s>' }}{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if tone is defined and tone and message['role'] == 'user' %}{{ tone + ' ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '</s>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")


def test_prompts_are_told_apart_by_what_the_template_makes_of_them(model_folder, tmp_path):
    """Rows of the same messages and picture whose template is told something else."""
    rows = [{**made_rows(1)[0], "rejected": said("assistant", "blue"),
             "chat_template_kwargs": {"tone": tone}} for tone in ("big", "small big", None)]
    losses = []
    for kind in (DPOTrainer, PackedDPOTrainer):
        trainer = made(kind, model_folder, rows, tmp_path)
        trainer.processing_class.chat_template = TEMPLATE_WITH_A_SWITCH
        batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert len(batch["packed"]["first"]) == 3


def test_pictures_turned_by_their_exif_block_are_measured_as_they_are_shown(model_folder, tmp_path):
    """Sizes are read from headers; a picture on its side has its width and height exchanged."""
    checkpoint = checkpoints.load(model_folder)
    checkpoint.processor.image_processor.do_resize = False
    checkpoint.processor.image_processor.do_center_crop = False
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = made_rows(2)
    for n, row in enumerate(rows):
        file = tmp_path / f"{n}.jpg"
        Image.new("RGB", (32, 96 if n else 64)).save(file, exif=exif)
        row["images"] = [str(file)]
    trainer = dpo_trainer(PackedDPOTrainer, checkpoint, Dataset.from_list(rows), tmp_path,
                          max_length=1024)
    survey = trainer._surveys[trainer.train_dataset._fingerprint]
    assert survey.tried == [[1]]


def test_the_self_check_holds_little_more_than_a_step(model_folder, tmp_path):
    rows = [{**r, "rejected": said("assistant", text)} for r in made_rows(4)
            for text in ("blue", "a green cat", "no")]
    trainer = made(PackedDPOTrainer, model_folder, rows, tmp_path, per_device_train_batch_size=12)
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    trainer.data_collator.tried = {True: 0, False: 0}
    checked = peak(trainer.get_train_dataloader)
    assert trainer.data_collator.tried[True] > 0 and trainer.data_collator.packing
    trainer.model.train()
    step = peak(lambda: trainer.compute_loss(trainer.model, batch).backward())
    assert checked <= 1.3 * step, (checked, step)
