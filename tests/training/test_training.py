"""Training: what moves, what does not, what the objective starts from, and resuming to the bit."""

import hashlib
import inspect
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from helpers.models import SIDE
from PIL import ImageFile
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, TrainerState
from trl import DPOTrainer

from bpo.data import rows as data_rows
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate
from bpo.models.generate import Request
from bpo.models.weakening import View
from bpo.pairs import rows as pair_rows
from bpo.params import ROOT, DPOTraining, Refusal
from bpo.reports.tables import training_tables
from bpo.study import progress
from bpo.study.files import write_lines
from bpo.training import stage as train
from bpo.training import trainers
from bpo.training.objectives import OBJECTIVES

WRONG = {"weakened": "a big green box", "injected": "there is a dog on this"}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def lines(data_file):
    """Pairs of the data set's rows; one has a single rejected answer, one has none."""
    made = [{"id": r.id, "image": r.image_name, "category": r.category, "prompt": list(r.prompt),
             "chosen": r.answer, "rejected": [{"source": s, "text": t} for s, t in WRONG.items()]}
            for r in data_rows.read_rows(data_file)[0]]
    made[2]["rejected"] = made[2]["rejected"][:1]
    made[5]["rejected"] = []
    return made


@pytest.fixture(scope="module")
def images(data_file):
    return data_file.parent


@pytest.fixture(scope="module")
def parameters(model_folder, images):
    return DPOTraining(study="s", model=str(model_folder), image_folder=str(images), steps=4,
                       variants={},
                       batch_pairs=4, device_batch=2, learning_rate=1e-2, lora_rank=4,
                       lora_alpha=8, save_every=2, loss=["sigmoid"], loss_weights=[1.0])


@pytest.fixture(scope="module")
def rows(lines, images):
    return pair_rows.training_rows("bpo", lines, images, seed=0)


def changed(p, **values):
    return type(p)(**p.model_dump() | values)


def with_pairs(p, lines, folder, **values):
    """The parameters, changed, with these pairs in a file."""
    write_lines(folder / "pairs.jsonl", lines)
    return changed(p, pairs=str(folder / "pairs.jsonl"), **values)


def made(p, method, rows, folder, *, steps):
    return trainers.make(p, method, rows, folder, steps=steps, references=folder / "reference")


def digests(model):
    """name -> sha256 of every weight but the adapters', by its name in the plain model."""
    names = {n.removeprefix("base_model.model.").replace(".base_layer", ""): w
             for n, w in model.state_dict().items() if "lora_" not in n}
    return {n: hashlib.sha256(w.contiguous().numpy().tobytes()).hexdigest()
            for n, w in names.items()}


# --- rows ---------------------------------------------------------------------------------------

def said(rows, key):
    return [r[key][0]["content"] for r in rows]


def test_bpo_trains_on_every_rejected_answer_and_its_parts_on_their_own(lines, images):
    assert len(pair_rows.training_rows("bpo", lines, images, seed=0)) == 2 * len(lines) - 3
    weaken = pair_rows.training_rows("bpo_weaken", lines, images, seed=0)
    inject = pair_rows.training_rows("bpo_inject", lines, images, seed=0)
    assert set(said(weaken, "rejected")) == {WRONG["weakened"]}
    assert set(said(inject, "rejected")) == {WRONG["injected"]}
    assert (len(weaken), len(inject)) == (len(lines) - 1, len(lines) - 2)


def test_sft_trains_on_every_positive_once(lines, images):
    rows = pair_rows.training_rows("sft", lines, images, seed=0)
    assert said(rows, "completion") == [k["chosen"] for k in lines]
    assert [r["images"] for r in rows] == [[str(images / k["image"])] for k in lines]


@pytest.mark.parametrize("method", ("sft_matched", "sft_compute"))
def test_the_matched_control_has_the_positives_of_bpo_in_its_order(lines, images, rows, method):
    matched = pair_rows.training_rows(method, lines, images, seed=0)
    assert said(matched, "completion") == said(rows, "chosen")
    assert [(r["images"], r["prompt"]) for r in matched] == [(r["images"], r["prompt"])
                                                             for r in rows]
    assert all(set(r) == {"id", "images", "prompt", "completion"} for r in matched)


def whole_length(checkpoint, line, images):
    """Tokens of a line's prompt with its image and of its longest answer."""
    request = Request(line["id"], tuple(line["prompt"]), images / line["image"])
    prompt = generate.encode_batch(checkpoint, [request])["input_ids"].shape[1]
    return prompt + max(
        len(encoding.answer_tokens(checkpoint, line["prompt"], text))
        for text in (line["chosen"], *(r["text"] for r in line["rejected"])))


def test_rows_that_are_too_long_are_dropped_and_counted(checkpoint, lines, images):
    lengths = {k["id"]: whole_length(checkpoint, k, images) for k in lines}
    limit = sorted(lengths.values())[len(lines) // 2]
    kept, dropped = train.usable(checkpoint, lines, images, max_tokens=limit)
    assert [k["id"] for k in kept] == [i for i, n in lengths.items() if n <= limit]
    assert dropped == {f"longer than {limit} tokens": len(lines) - len(kept)}
    assert 0 < len(kept) < len(lines)
    longest = max(lengths.values())
    assert train.usable(checkpoint, lines, images, max_tokens=longest) == (lines, {})


def test_counting_tokens_needs_no_weights_and_decodes_no_image(model_folder, lines, images,
                                                               monkeypatch):
    without = checkpoints.load_without_weights(model_folder)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    assert without.model is None
    assert train.usable(without, lines, images, max_tokens=2048) == (lines, {})


@pytest.mark.parametrize("text", ("red", "Red.", " RED "))
def test_a_rejected_answer_that_equals_the_chosen_one_is_refused(checkpoint, lines, images, text):
    bad = {**lines[1], "chosen": "red", "rejected": [{"source": "weakened", "text": text}]}
    with pytest.raises(Refusal, match=f"pair {bad['id']}: a rejected answer equals the chosen"):
        train.usable(checkpoint, [bad], images, max_tokens=99)


def test_a_missing_image_is_refused(checkpoint, lines, images):
    bad = {**lines[0], "image": "none.png"}
    with pytest.raises(Refusal, match=r"none\.png: the image of pair .* is missing"):
        train.usable(checkpoint, [lines[1], bad], images, max_tokens=99)


# --- batches ------------------------------------------------------------------------------------

def collated(p, rows, tmp_path, method="bpo"):
    """A batch as the trainer of a method makes it."""
    trainer = made(p, method, rows, tmp_path, steps=1)
    return trainer.data_collator([trainer.train_dataset[n] for n in range(len(rows))])


def test_preferences_are_collated_as_prompt_answer_and_end(parameters, checkpoint, rows,
                                                           tmp_path):
    batch = collated(parameters, rows[:3], tmp_path)
    ids, mask = batch["input_ids"], batch["completion_mask"].bool()
    assert ids.shape == mask.shape and ids.shape[0] == 6
    end = checkpoint.tokenizer.eos_token_id
    for i, row in enumerate([*rows[:3], *rows[:3]]):
        answer = row["chosen" if i < 3 else "rejected"][0]["content"]
        wanted = checkpoint.tokenizer(answer, add_special_tokens=False)["input_ids"] + [end]
        assert ids[i][mask[i]].tolist() == wanted
        prompt = ids[i][~mask[i] & batch["attention_mask"][i].bool()]
        request = Request("x", tuple(row["prompt"]), row["images"][0])
        assert prompt.tolist() == generate.encode_batch(checkpoint, [request])["input_ids"][
            0].tolist()


def test_completions_are_trained_on_from_the_answer_to_its_end(parameters, checkpoint, rows,
                                                               tmp_path):
    matched = pair_rows.to_completions(rows[:3])
    batch = collated(parameters, matched, tmp_path, "sft_matched")
    end = checkpoint.tokenizer.eos_token_id
    for labels, row in zip(batch["labels"], matched, strict=True):
        wanted = checkpoint.tokenizer(row["completion"][0]["content"],
                                      add_special_tokens=False)["input_ids"] + [end]
        assert labels[labels != -100].tolist() == wanted


def test_answers_end_where_the_chat_template_leaves_the_end_out(parameters, model_folder, rows):
    own = checkpoints.load(model_folder)
    ending = "{{ '</s>' if message['role'] == 'assistant' else '\n' }}"
    assert ending in own.processor.chat_template
    own.processor.chat_template = own.processor.chat_template.replace(ending, "{{ '\n' }}")
    rendered = trainers.Rendering(own, parameters).row(rows[0])
    for side in ("chosen", "rejected"):
        assert rendered[side].count(own.tokenizer.eos_token) == 1
        assert rendered[side].endswith(own.tokenizer.eos_token)


def test_pixels_are_those_of_inference(parameters, checkpoint, rows, tmp_path):
    batch = collated(parameters, rows[:2], tmp_path)
    request = Request("x", tuple(rows[0]["prompt"]), rows[0]["images"][0])
    alone = generate.encode_batch(checkpoint, [request])["pixel_values"][0]
    assert torch.equal(batch["pixel_values"][0], alone)


def test_the_losses_that_trl_has_are_known_here():
    source = inspect.getsource(DPOTrainer)
    trl = set(re.findall(r'loss_type == "(\w+)"', source))
    assert {n for n, o in OBJECTIVES.items() if o.function is None} == trl


def test_the_damaged_image_is_drawn_for_the_row_and_its_settings(parameters, checkpoint, rows):
    """A crop and a noise by the row's own name, share and step, in the transform of the images."""
    p = changed(parameters, loss=["sft", "mdpo"], loss_weights=[1.0, 1.0], share="prompt")
    checkpoint = replace(checkpoint, transform="pad")

    def damaged(row=rows[0], **values):
        out = trainers.Rendering(checkpoint, changed(p, **values)).row(row)
        image = out["damaged_images"][0]
        assert out["images"][0].size == (48, 48)
        assert image.size == ((SIDE, SIDE) if values.get("damage") == "noisy" else (48, 48))
        assert image.tobytes() != out["images"][0].tobytes()
        return image.tobytes()

    other, noisy, blank = {**rows[0], "id": "another"}, {"damage": "noisy"}, {"damage": "blank"}
    assert len({damaged(), damaged(), damaged(other), damaged(crop_share=0.6)}) == 3
    assert len({damaged(**noisy), damaged(other, **noisy), damaged(damage_step=100, **noisy),
                damaged(seed=1, **noisy)}) == 4
    assert damaged(**blank) == damaged(other, seed=1, **blank)
    assert damaged(share="image") == damaged(other, share="image") != damaged()  # once an image
    request = Request(rows[0]["id"], tuple(rows[0]["prompt"]), Path(rows[0]["images"][0]))
    shown = generate.view_picture(
        checkpoint.processor, request, View("noisy", step=p.damage_step), transform="pad",
        seed=p.seed)
    assert damaged(**noisy) == shown.tobytes()
    completion = pair_rows.to_completions(rows[:1])[0]
    for settings, row in ((p, completion), (parameters, rows[0])):
        assert "damaged_images" not in trainers.Rendering(checkpoint, settings).row(row)
    assert trainers.Rendering(checkpoint, p).checkpoint.model is None


# --- what moves ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(parameters, rows, tmp_path_factory):
    """A trainer after three steps of DPO at a high rate."""
    folder = tmp_path_factory.mktemp("dpo")
    trainer = made(parameters, "bpo", rows, folder, steps=3)
    trainer.train()
    return trainer


def test_only_the_language_model_s_linear_layers_carry_adapters(trained, checkpoint):
    adapted = {n.split(".lora_")[0].removeprefix("base_model.model.")
               for n, _ in trained.model.named_parameters() if "lora_" in n}
    linear = {n for n, m in checkpoint.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert adapted == {n for n in linear if n.startswith("model.language_model.")}
    assert len(adapted) == 2 * 7
    assert any("vision_tower" in n for n in linear) and "lm_head" in linear


def test_only_adapters_are_trained_and_they_did_move(trained):
    moving = [n for n, w in trained.model.named_parameters() if w.requires_grad]
    assert moving and all("lora_" in n for n in moving)
    second = [w for n, w in trained.model.named_parameters() if "lora_B" in n]
    assert all(w.abs().max() > 0 for w in second)


def test_every_weight_of_the_reference_is_as_it_was(trained, checkpoint):
    assert digests(trained.model) == digests(checkpoint.model)


@torch.no_grad()
def test_with_adapters_off_the_model_is_the_reference_exactly(trained, checkpoint, rows):
    requests = [Request(str(i), tuple(r["prompt"]), r["images"][0])
                for i, r in enumerate(rows[:4])]
    batch = generate.encode_batch(checkpoint, requests)
    plain = checkpoint.model(**batch).logits
    trained.model.eval()
    tuned = trained.model(**batch).logits
    with trained.model.disable_adapter():
        reference = trained.model(**batch).logits
    assert torch.equal(reference, plain)
    assert not torch.allclose(tuned, plain, atol=0.1)


def test_the_rewards_are_measured_from_the_reference(trained):
    first, last = (trained.state.log_history[i] for i in (0, 2))
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-6)
    assert last["rewards/margins"] > 0


def test_all_methods_start_from_the_same_adapter(parameters, rows, tmp_path):
    def start(method, rows):
        trainer = made(parameters, method, rows, tmp_path, steps=1)
        return {n: w for n, w in trainer.model.named_parameters() if "lora_" in n}

    first, second = start("bpo", rows), start("sft_matched", pair_rows.to_completions(rows))
    assert first.keys() == second.keys()
    assert all(torch.equal(w, second[n]) for n, w in first.items())


def test_settings_reach_the_trainer(parameters, rows, tmp_path):
    p = changed(parameters, seed=5, batch_pairs=6, warmup_ratio=0.5, beta=0.3, save_every=7,
                gradient_checkpointing=True, lora_alpha=12, lora_dropout=0.25, packing="always",
                precision="bfloat16", image_transform="pad")
    positives = pair_rows.to_completions(rows)
    bpo, sft = (made(p, method, given, tmp_path, steps=8)
                for method, given in (("bpo", rows), ("sft_matched", positives)))
    wanted = dict(
        max_steps=8, seed=5, data_seed=5, per_device_train_batch_size=2, weight_decay=0.0,
        gradient_accumulation_steps=3, learning_rate=1e-2, lr_scheduler_type="cosine",
        warmup_steps=4, gradient_checkpointing=True, bf16=True, save_steps=7, save_total_limit=2,
        logging_nan_inf_filter=False)
    for trainer in (bpo, sft):
        assert {n: getattr(trainer.args, n) for n in wanted} == wanted
        adapter = trainer.model.peft_config["default"]
        assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (4, 12, 0.25)
        assert not any(isinstance(c, PrinterCallback) for c in trainer.callback_handler.callbacks)
        assert trainer.model.get_output_embeddings().weight.dtype == torch.bfloat16
        assert trainer.train_dataset[0]["images"][0].size == (48, 48)
    assert bpo.beta == 0.3 and sft.args.completion_only_loss
    assert bpo.data_collator.tried[True] == math.inf


def test_a_weight_outside_the_adapters_that_would_be_trained_is_refused(parameters, rows, tmp_path,
                                                                        monkeypatch):
    right = checkpoints.adapter_config

    def wider(*args, **options):
        config = right(*args, **options)
        config.modules_to_save = ["lm_head"]
        return config

    monkeypatch.setattr(checkpoints, "adapter_config", wider)
    with pytest.raises(RuntimeError, match="lm_head.* would be trained"):
        made(parameters, "bpo", rows, tmp_path, steps=1)


# --- the objective ------------------------------------------------------------------------------

def history_of(p, method, rows, folder, *, steps):
    return train.train_method(p, method, rows, folder / method, steps=steps,
                              references=folder / "reference")


def test_the_nll_term_is_added_to_dpo(parameters, rows, tmp_path):
    """Step one: ln 2 + weight x the mean NLL a token of the chosen answers, whatever the weight."""
    losses = {w: history_of(changed(parameters, loss=["sigmoid", "sft"],
                                    loss_weights=[1, w], batch_pairs=2), "bpo", rows,
                            tmp_path / str(w), steps=1)[0]["loss"] for w in (0, 1, 3)}
    assert losses[1] - losses[0] > 0.5
    assert losses[3] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-4)


@pytest.mark.parametrize("method", ("bpo", "sft_matched"))
def test_the_loss_falls_on_rows_that_are_seen_again(parameters, rows, tmp_path, method):
    few = rows[:2] if method == "bpo" else pair_rows.to_completions(rows[:2])
    p = changed(parameters, batch_pairs=2, save_every=50)
    losses = [h["loss"] for h in history_of(p, method, few, tmp_path, steps=15)]
    assert len(losses) == 15
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("method, message", (
    ("bpo", r"the loss is not a number at step 1, on pairs (\S+), \1; lower learning_rate"),
    ("sft_matched", "the loss is not a number from step 1 on; lower learning_rate")))
def test_a_loss_that_is_no_number_is_refused(parameters, rows, tmp_path, monkeypatch, method,
                                             message):
    right = checkpoints.load

    def broken(*args, **options):
        checkpoint = right(*args, **options)
        with torch.no_grad():
            checkpoint.model.get_output_embeddings().weight.fill_(math.nan)
        return checkpoint

    monkeypatch.setattr(checkpoints, "load", broken)
    given = rows if method == "bpo" else pair_rows.to_completions(rows)
    with pytest.raises(Refusal, match=message):
        history_of(changed(parameters, packing="always"), method, given, tmp_path, steps=2)
    assert not (tmp_path / method / "history.json").exists()


@pytest.mark.parametrize("method", ("bpo", "sft_matched"))
def test_memory_that_runs_out_says_which_settings_to_lower(parameters, rows, tmp_path, monkeypatch,
                                                           method):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    for trainer in (trainers.CountedDPOTrainer, trainers.CountedSFTTrainer):
        monkeypatch.setattr(trainer, "compute_loss", full)
    given = rows if method == "bpo" else pair_rows.to_completions(rows)
    with pytest.raises(Refusal, match=r"lower device_batch \(it is 2\) or max_tokens"):
        history_of(parameters, method, given, tmp_path, steps=2)


# --- packing ------------------------------------------------------------------------------------

def test_packed_and_unpacked_training_have_one_loss_curve(parameters, rows, tmp_path):
    curves = {way: history_of(changed(parameters, packing=way), "bpo", rows, tmp_path / way,
                              steps=6) for way in ("auto", "never")}
    for packed, plain in zip(*curves.values(), strict=True):
        names = packed.keys() & set(train.LOGGED)
        if abs(plain["rewards/margins"]) < 1e-5:  # nothing has moved: accuracy is of rounding
            names -= {"rewards/accuracies"}
        for name in names:
            assert packed[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-5), name
    flops = [json.loads((tmp_path / way / "bpo" / "compute.json").read_text()) for way in curves]
    assert all(packed < .8 * plain for packed, plain in zip(
        *((f["flops"], f["reference"]) for f in flops), strict=True))


@pytest.mark.parametrize("share", ("row", "prompt", "image"))
@pytest.mark.parametrize("method", ("bpo", "bpo_weaken"))
def test_the_control_sees_its_rows_in_the_order_of_bpo(parameters, lines, images, tmp_path, method,
                                                       share):
    """Also where each positive has one rejected answer, so that torch's generator draws."""
    given = pair_rows.training_rows(method, lines, images, seed=0)
    orders = []
    for name, rows in ((method, given), ("sft_matched", pair_rows.to_completions(given))):
        trainer = made(changed(parameters, seed=3, share=share), name, rows, tmp_path / name,
                       steps=4)
        torch.manual_seed(0)
        orders.append(list(trainer._get_train_sampler(trainer.train_dataset)))
    assert orders[0] == orders[1] != list(range(len(given)))
    shown = [given[n]["images"][0] for n in orders[0]]
    changes = sum(a != b for a, b in zip(shown, shown[1:], strict=False))
    if method == "bpo":  # up to two rows a positive, one behind the other
        positives = [(given[n]["images"], given[n]["prompt"]) for n in orders[0]]
        repeats = sum(a == b for a, b in zip(positives, positives[1:], strict=False))
        assert (repeats == len(given) - len({str(p) for p in positives})) == (share != "row")
    if method == "bpo_weaken":  # a row a positive: none has to wait for the next batch
        assert (changes == len(set(shown)) - 1) == (share == "image")


def test_mdpo_trains_through_the_stage_s_trainer(parameters, rows, tmp_path):
    p = changed(parameters, loss=["mdpo"], loss_weights=[1.0])
    history = history_of(p, "bpo", rows, tmp_path, steps=3)
    assert history[0]["loss"] == pytest.approx(3 * math.log(2), abs=1e-5)
    assert history[0]["rewards/damaged"] == pytest.approx(0, abs=1e-6)
    assert abs(history[2]["rewards/damaged"]) > 1e-4


@pytest.mark.parametrize("share", ("prompt", "image"))
def test_damage_is_drawn_by_row_or_by_the_image_that_rows_share(parameters, rows, tmp_path, share):
    p = changed(parameters, loss=["mdpo"], loss_weights=[1.0], share=share, damage="noisy")
    trainer = made(p, "bpo", rows, tmp_path, steps=1)
    damaged = {}
    for n, row in enumerate(rows):
        [picture] = trainer.train_dataset[n]["damaged_images"]
        damaged.setdefault(row["images"][0], set()).add(picture.tobytes())
    assert len(damaged) == 4
    assert all((len(pictures) == 1) == (share == "image") for pictures in damaged.values())


# --- compute ------------------------------------------------------------------------------------

def test_attention_is_counted_by_its_products():
    query, key, value = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    with trainers.FlopCounter() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    product = 2 * 2 * 3 * 5 * 5 * 8
    assert counter.total == 2 * product
    with trainers.FlopCounter() as counter:
        out.sum().backward()
    assert counter.total == 5 * product


def test_a_step_of_the_model_counts_as_by_torch_s_own_counter(model_folder):
    model = checkpoints.load(model_folder).model
    tokens = torch.full((2, 9), 7)
    tokens[:, 1:5] = model.config.image_token_id
    pixels = torch.randn(2, 3, SIDE, SIDE)
    totals = []
    for counter in (trainers.FlopCounter(), FlopCounterMode(display=False)):
        with sdpa_kernel(SDPBackend.MATH), counter:  # its products are torch's to count
            model(input_ids=tokens, pixel_values=pixels, labels=tokens).loss.backward()
        totals.append(getattr(counter, "total", None) or counter.get_total_flops())
    assert totals[0] == totals[1] > 1e6


def counts_of(folder):
    return json.loads((folder / "bpo" / "compute.json").read_text())


def test_compute_is_that_of_the_first_steps_whatever_is_kept(parameters, rows, tmp_path,
                                                             monkeypatch):
    """Four batches in the two steps counted. Kept log-probs are found, here and elsewhere."""
    passes, right = [], trainers.CountedDPOTrainer.answer_tokens

    def counted(self, *args):
        passes.append(self.state.global_step)
        return right(self, *args)

    monkeypatch.setattr(trainers.CountedDPOTrainer, "answer_tokens", counted)
    p = changed(parameters, packing="always")
    first, again, elsewhere = (tmp_path / n for n in ("first", "again", "elsewhere"))
    for folder, kept, others in ((first, first, ()), (again, first, ()),
                                 (elsewhere, elsewhere, [first / "kept"])):
        passes.clear()
        train.train_method(p, "bpo", rows, folder / "bpo", steps=3, references=kept / "kept",
                           others=others)
        assert passes == ([0] * 4 + [1] * 4 + [2] * 2 if folder == first else [0, 0, 1, 1])
        assert counts_of(folder) == counts_of(first)
    assert counts_of(first)["batches"] == 4 and counts_of(first)["packed"] is True
    assert list((first / "kept").iterdir()) and not (elsewhere / "kept").exists()


def test_the_reference_of_damaged_images_is_counted_with_the_other(parameters, rows, tmp_path):
    counts = []
    for loss in ("sigmoid", "mdpo"):
        p = changed(parameters, loss=[loss], loss_weights=[1.0], packing="never")
        history_of(p, "bpo", rows, tmp_path / loss, steps=1)
        counts.append(counts_of(tmp_path / loss))
    assert counts[1]["reference"] > 1.5 * counts[0]["reference"]
    assert [c["packed"] for c in counts] == [False, False]


def test_what_a_batch_holds_decides_where_its_log_probs_are_kept(parameters, rows, monkeypatch):
    p = changed(parameters, batch_pairs=8)
    key = trainers.batches_key(p, [rows])
    same = ({"learning_rate": 0.5}, {"beta": 0.9}, {"lora_rank": 2}, {"loss": ["dpop"]})
    other = ({"seed": 1}, {"steps": 5}, {"epochs": 3.0}, {"batch_pairs": 4}, {"device_batch": 4},
             {"packing": "never"}, {"loss": ["mdpo"]}, {"damage": "noisy"}, {"damage_step": 1},
             {"crop_share": 0.5})
    assert {trainers.batches_key(changed(p, **v), [rows]) for v in same} == {key}
    found = [trainers.batches_key(changed(p, **v), [rows]) for v in other]
    found += [trainers.batches_key(p, r) for r in ([rows[1:]], [rows, rows], [rows[::-1]])]
    monkeypatch.setenv("WORLD_SIZE", "2")
    found.append(trainers.batches_key(p, [rows]))
    assert len({key, *found}) == 1 + len(found)


# --- resuming -----------------------------------------------------------------------------------

def test_the_last_whole_checkpoint_is_the_one_to_resume_from(tmp_path):
    assert train.last_checkpoint(tmp_path / "none") is None
    for step, state in ((2, "{}"), (4, '{"step": 4}'), (10, '{"step": 10}'), (12, '{"st'),
                        (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert train.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def killed_at(step, monkeypatch):
    right = trainers.Progress.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Killed
        right(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainers.Progress, "on_step_end", on_step_end)


@pytest.mark.parametrize("method, share", (
    ("bpo", "row"), ("bpo", "prompt"), ("bpo", "image"), ("sft_matched", "prompt"),
    ("sft_matched", "image")))
def test_interrupted_training_goes_on_to_the_same_weights(parameters, rows, tmp_path, monkeypatch,
                                                          method, share):
    p = changed(parameters, loss=["sigmoid", "sft"], loss_weights=[1.0, 1.0], lora_dropout=0.1,
                share=share)
    rows = rows if method == "bpo" else pair_rows.to_completions(rows)
    whole = history_of(p, method, rows, tmp_path / "whole", steps=5)
    folder = tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(3, patch)
        history_of(p, method, rows, folder, steps=5)
    assert train.last_checkpoint(folder / method / "checkpoints").endswith("checkpoint-2")
    assert not (folder / method / "history.json").exists()
    made = []
    right = trainers.Progress.on_step_end
    with monkeypatch.context() as patch:
        patch.setattr(trainers.Progress, "on_step_end", lambda self, args, state, control, **kw: (
            made.append(state.global_step), right(self, args, state, control, **kw))[1])
        resumed = history_of(p, method, rows, folder, steps=5)
    assert made == [3, 4, 5]
    assert resumed == whole
    first, second = weights(tmp_path / "whole" / method), weights(folder / method)
    assert first.keys() == second.keys()
    assert all(torch.equal(w, second[n]) for n, w in first.items())
    compute = [json.loads((f / method / "compute.json").read_text())
               for f in (tmp_path / "whole", folder)]
    assert compute[0] == compute[1]


def test_progress_starts_where_training_resumes_and_ends_with_it():
    bar, state = trainers.Progress("bpo"), TrainerState(max_steps=5, global_step=2)
    with progress.part("the stage"):
        bar.on_train_begin(None, state, None)
        bar.on_step_end(None, state, None)
        assert progress.line().startswith("bpo 3 of 5 steps") and progress.shares() == (0.6, 0.4)
        bar.on_train_end(None, state, None)
        assert progress.shares() == (0, 0)


def test_a_finished_method_is_only_read(parameters, rows, tmp_path, monkeypatch):
    history = history_of(parameters, "bpo", rows, tmp_path, steps=1)
    assert not (tmp_path / "bpo" / "checkpoints").exists()
    monkeypatch.setattr(trainers, "make", lambda *args, **options: pytest.fail("again"))
    assert history_of(parameters, "bpo", rows, tmp_path, steps=1) == history


# --- the stage ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stage(parameters, lines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    p = with_pairs(parameters, lines, folder, steps=2,
                   methods=["sft_compute", "bpo", "sft_matched"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPO_OUTPUTS", str(folder / "outputs"))
        result = train.run(p)
        assert train.run(p).metrics == result.metrics, "read again, the numbers differ"
    return result


def test_the_stage_leaves_an_adapter_and_a_history_a_method(stage):
    assert list(stage.metrics["methods"]) == ["sft_compute", "bpo", "sft_matched"]
    for method, history in train.histories(stage).items():
        folder = stage.folder / method
        assert (folder / "adapter" / "adapter_config.json").is_file()
        assert not (folder / "checkpoints").exists()
        assert [h["step"] for h in history] == list(
            range(1, stage.metrics["methods"][method]["steps"] + 1))
    assert set(stage.timings) == {"bpo", "sft_matched", "sft_compute"}


def test_sft_compute_spends_what_bpo_spent(stage):
    found = stage.metrics["methods"]
    assert found["bpo"]["steps"] == found["sft_matched"]["steps"] == 2
    spent = found["bpo"]["flops"]
    wanted = round(spent / found["sft_matched"]["flops_per_step"])
    assert found["sft_compute"]["steps"] == wanted
    # Its two steps saw eight of the rows, which are more: the reference ran in both.
    counted = json.loads((stage.folder / "bpo" / "compute.json").read_text())
    assert spent == pytest.approx((counted["flops"] + counted["reference"]) * 2 * 2 / counted[
        "batches"])
    assert 0 < counted["reference"] < counted["flops"]
    assert found["sft_compute"]["flops"] == pytest.approx(spent, rel=0.3)


def test_the_facts_of_a_method_follow_from_its_history(stage):
    found, history = stage.metrics["methods"]["bpo"], train.histories(stage)["bpo"]
    assert (found["loss_first"], found["loss_last"]) == (history[0]["loss"], history[-1]["loss"])
    assert set(train.LOGGED) - {"rewards/damaged"} <= set(history[0])
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["margin_last"] == pytest.approx(history[-1]["rewards/margins"], abs=1e-6)
    assert found["chosen_change"] == pytest.approx(history[-1]["rewards/chosen"] / 0.1, abs=1e-5)
    assert "margin_last" not in stage.metrics["methods"]["sft_matched"]


@pytest.mark.parametrize("loss, weights, words, plain", (
    (["sigmoid"], [1.0], "no other", math.log(2)),
    (["sft", "sigmoid"], [1.0, 0.5], "sft", math.log(2) / 2), (["ipo"], [1.0], "ipo", 0.0)))
def test_the_first_line_of_a_history_is_dpo_of_any_pair_and_the_other_objectives(
        parameters, stage, loss, weights, words, plain):
    """The stage's loss is sigmoid alone: of other objectives only the parts' names are read."""
    p = changed(parameters, pairs=stage.manifest["parameters"]["pairs"], loss=loss,
                loss_weights=weights)
    method, pair = train.example(p, stage)
    assert (method, pair["chosen"][0]["role"]) == ("bpo", "assistant")
    parts = train.first_loss(p, stage, method, dpo=math.log(2))
    values = parts["at step 1"].tolist()
    assert parts.iloc[1, 0] == words and values[0] == pytest.approx(plain)
    assert values[0] + values[1] == values[2] == train.histories(stage)["bpo"][0]["loss"]
    assert loss != ["sigmoid"] or values[1] == pytest.approx(0, abs=1e-6)


def test_the_control_s_first_steps_are_those_of_the_longer_run(stage):
    histories = train.histories(stage)
    assert histories["sft_compute"][0]["loss"] == histories["sft_matched"][0]["loss"]


def test_a_sweep_finds_the_reference_and_has_the_bytes_of_a_run_that_does_not(
        parameters, lines, tmp_path, outputs):
    p = with_pairs(parameters, lines, tmp_path, methods=["bpo", "bpo_weaken"])
    train.run(p)
    swept, fresh = (train.run(changed(p, beta=0.3, lora_rank=2, study=s)) for s in ("s", "fresh"))
    computed = [len(list(r.folder.glob("reference/*/*"))) for r in (swept, fresh)]
    assert computed[0] == 0 < computed[1]
    assert train.histories(swept) == train.histories(fresh)
    for method in p.methods:
        first, second = (weights(r.folder / method) for r in (swept, fresh))
        assert all(torch.equal(w, second[n]) for n, w in first.items())


def test_curves_go_to_tensorboard_and_one_model_is_loaded_a_method(
        parameters, lines, tmp_path, outputs, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loads, right = [], checkpoints.load
    monkeypatch.setattr(checkpoints, "load", lambda *a, **k: loads.append(a) or right(*a, **k))
    p = with_pairs(parameters, lines[:4], tmp_path, steps=2, trackers=["tensorboard"],
                   methods=["sft", "bpo"])
    result = train.run(p)
    assert len(loads) == 2
    for method in p.methods:
        curves = EventAccumulator(str(outputs / p.study / "trackers" / method)).Reload()
        losses = [h["loss"] for h in train.histories(result)[method]]
        assert [e.value for e in curves.Scalars("train/loss")] == pytest.approx(losses)
    assert not [n for n in result.manifest["outputs"] if "tfevents" in n]
    assert train.run(changed(p, trackers=[])).done.startswith("up to date")


def test_a_tracker_that_is_not_installed_is_refused(parameters, lines, tmp_path, outputs):
    p = with_pairs(parameters, lines[:4], tmp_path, trackers=["wandb"])
    with pytest.raises(Refusal, match="trackers: wandb is not installed; pip install wandb"):
        train.run(p)


def test_epochs_give_the_steps_where_none_are_set(parameters, lines, tmp_path, outputs):
    p = with_pairs(parameters, lines[:4], tmp_path, steps=0, epochs=0.5, methods=["sft"])
    seven = math.ceil(0.5 * 7 / 4)  # rows of bpo
    assert train.run(p).metrics["methods"]["sft"]["steps"] == seven


def test_a_method_without_rows_is_refused(parameters, lines, tmp_path, outputs):
    none = [{**k, "rejected": k["rejected"][:1]} for k in lines[:3]]
    p = with_pairs(parameters, none, tmp_path, methods=["bpo_inject"])
    with pytest.raises(Refusal, match="there is no row to train bpo_inject on"):
        train.run(p)


@pytest.mark.parametrize("change, warned", [(-4.9, False), (-5.1, True), (3.0, False)])
def test_the_report_warns_of_a_chosen_answer_that_falls_far(change, warned):
    facts = {"accuracy_last": 0.9, "chosen_change": change, "rejected_change": -9.0}
    said = training_tables.training_headline(DPOTraining(study="s"), {"bpo": facts}).plain
    assert ("in bpo the chosen answer fell by more than 5.0 nats" in said) == warned
    assert ("mostly by making rejected answers unlikely: bpo (DPO + SFT) prefers the chosen answer "
            "in 90% of its training pairs: chosen ") in said


# --- several processes --------------------------------------------------------------------------

TWO = ("--multi_gpu --num_machines 1 --num_processes 2 --mixed_precision no --dynamo_backend no "
       "--main_process_port 0")


@pytest.mark.slow
def test_two_launched_processes_give_the_curves_of_one(parameters, lines, tmp_path, outputs,
                                                       warm_launches):
    """In one process two batches are added up, in two each has one. Within an epoch: at its end
    accelerate fills the last batches up, so that all processes have as many."""
    p = with_pairs(parameters, lines, tmp_path, methods=["bpo", "sft_matched"],
                   loss=["sigmoid", "sft"], loss_weights=[1.0, 1.0], steps=5)
    alone = train.run(p)
    both = train.run(changed(p, study="both", launch=TWO))
    assert (alone.manifest["processes"], both.manifest["processes"]) == (1, 2)
    assert both.done == "up to date, read again"
    for method, history in train.histories(both).items():
        for found, wanted in zip(history, train.histories(alone)[method], strict=True):
            assert found == pytest.approx(wanted, rel=1e-4, abs=2e-5), method
        first, second = (weights(r.folder / method) for r in (alone, both))
        assert first.keys() == second.keys()
    for name in ("flops", "flops_per_step"):
        one, two = (r.metrics["methods"]["bpo"][name] for r in (alone, both))
        assert two == pytest.approx(one, rel=0.15)  # of the first process's batches alone


@pytest.mark.slow
@pytest.mark.parametrize("pairs, each, settings", (
    (4, 4, {"device_batch": 4}), (2, 2, {"variants": {"bpo_few": {"method": "bpo",
                                                                  "batch_pairs": 2}}})))
def test_launched_processes_that_fail_say_why(pairs, each, settings, parameters, lines, tmp_path,
                                              outputs, warm_launches):
    p = with_pairs(parameters, lines, tmp_path, methods=["bpo"], launch=TWO, **settings)
    with pytest.raises(Refusal, match=rf"exit code 1(.|\n)*batch_pairs \({pairs}\) must be a "
                                      rf"multiple of device_batch \({each}\) times the 2 processes"):
        train.run(p)
    assert not (outputs / "s" / "3_dpo_training" / "manifest.json").exists()


@pytest.mark.parametrize("file, kind", [("launch-fsdp", "FSDP"), ("launch-zero3", "DEEPSPEED")])
def test_the_launcher_s_files_load(file, kind):
    config = load_config_from_file(str(ROOT / "params" / f"{file}.yaml"))
    assert config.distributed_type == DistributedType[kind]
    assert config.num_processes == 8 and config.mixed_precision == "bf16"
