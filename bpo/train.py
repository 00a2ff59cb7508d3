"""Notebook 3's work: DPO on the pairs and its SFT baselines, by TRL, one adapter a method.

The reference is the model before training, exactly: nothing outside the adapters can move, and the
reference's log-probs are the same weights with the adapters off. All methods start from the same
adapter, with the same optimizer, batch and steps; what differs is the objective and the rows.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from bpo import encoding, images, metrics, models, pairs, records, runs, seeds
from bpo.models import Checkpoint
from bpo.params import DPOTraining, Refusal

LOGGED = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected",
          "logps/chosen", "logps/rejected", "grad_norm", "learning_rate")
COUNTED_STEPS = 8


def run(p: DPOTraining) -> runs.Result:
    """The stage of notebook 3: for every method adapter/, history.json and compute.json."""
    inputs = {"model": p.path(p.model), "pairs": p.path(p.pairs)}
    return runs.stage(p, lambda folder: _work(p, folder), inputs=inputs,
                      modules=[seeds, records, images, models, encoding, metrics, pairs,
                               sys.modules[__name__]])


def _work(p: DPOTraining, folder: Path) -> dict[str, Any]:
    checkpoint = models.load(p.path(p.model), precision=p.precision,
                             transform=p.image_transform)
    image_folder = p.path(p.image_folder)
    lines, skipped = usable(checkpoint, pairs.read_pairs(p.path(p.pairs)), image_folder,
                            max_tokens=p.max_tokens)
    rows = {m: method_rows(m, lines, image_folder) for m in p.methods}
    steps = p.steps or math.ceil(
        p.epochs * len(method_rows("bpo", lines, image_folder)) / p.batch_pairs)
    out = {}
    # sft_compute is last: it is sft_matched for as long as it takes to spend what bpo spent.
    for method in sorted(p.methods, key="sft_compute".__eq__):
        if not rows[method]:
            raise Refusal(f"{p.path(p.pairs)}: there is no row to train {method} on")
        if method == "sft_compute":
            wanted = round(out["bpo"]["flops"] / out["sft_matched"]["flops_per_step"])
        else:
            wanted = steps
        history = train_method(p, method, rows[method], folder / method, steps=max(wanted, 1))
        out[method] = _facts(p, rows[method], folder / method, history, steps=max(wanted, 1))
    return {"methods": {m: out[m] for m in p.methods}, "rows_dropped": skipped}


def method_rows(method: str, lines: Sequence[dict], image_folder: Path) -> list[dict]:
    """The rows that a method trains on, in TRL's layout.

    sft: every positive once. sft_matched and sft_compute: the positives of bpo's pairs, in bpo's
    order and as often, so that what bpo adds to them is the contrast alone.
    """
    if method == "sft":
        return pairs.to_completions([
            {"images": [str(image_folder / k["image"])], "prompt": k["prompt"],
             "chosen": [{"role": "assistant", "content": k["chosen"]}]} for k in lines])
    if learns_pairs(method):
        return pairs.to_preferences(lines, image_folder, method=method)
    return pairs.to_completions(pairs.to_preferences(lines, image_folder))


def learns_pairs(method: str) -> bool:
    """Whether a method learns from pairs (DPO); the others from positives alone (SFT)."""
    return method.startswith("bpo")


def usable(checkpoint: Checkpoint, lines: Sequence[dict], image_folder: Path, *,
           max_tokens: int) -> tuple[list[dict], dict[str, int]]:
    """Lines whose prompt and longest answer fit, and how many were dropped by reason.

    Cutting is worse than dropping: a cut answer trains on nothing, a cut image fails.
    """
    kept, dropped, placeholders = [], {}, {}
    for line in lines:
        file = image_folder / line["image"]
        if not images.exists(file):
            raise Refusal(f"{file}: the image of pair {line['id']} is missing; set image_folder to "
                          "the folder that the pairs' image names start from")
        texts = [line["chosen"], *(r["text"] for r in (*line["rejected"],
                                                       *line.get("unselected", ())))]
        if any(metrics.normalised(t) == metrics.normalised(line["chosen"]) for t in texts[1:]):
            raise Refusal(f"pair {line['id']}: a rejected answer equals the chosen one, "
                          "which would train on nothing")
        image = images.load(file)
        prompt = encoding.prompt_text(checkpoint, line["prompt"], image=True)
        text_tokens = len(encoding.answer_ids(checkpoint, prompt))
        if image.size not in placeholders:  # an image's tokens depend on its size alone
            whole = encoding.encode(checkpoint, prompt, image)["input_ids"].shape[1]
            placeholders[image.size] = whole - text_tokens
        answer = max(len(encoding.answer_tokens(checkpoint, line["prompt"], t)) for t in texts)
        if placeholders[image.size] + text_tokens + answer > max_tokens:
            reason = f"longer than {max_tokens} tokens"
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            kept.append(line)
    return kept, dropped


def _rendered(checkpoint: Checkpoint, row: dict, answers: Sequence[str]) -> dict[str, Any]:
    """A row with its images opened and its texts as the model reads them. The row is not changed:
    TRL's collators write into what they are given."""
    out = {"images": [encoding.transformed(images.load(Path(i)), checkpoint.transform,
                                         checkpoint.processor) for i in row["images"]],
           "prompt": encoding.prompt_text(checkpoint, row["prompt"], image=True)}
    for name in answers:
        out[name] = encoding.answer_text(checkpoint, row["prompt"], row[name][0]["content"],
                                       image=True)
    return out


def collator(checkpoint: Checkpoint, *, preference: bool) -> Callable[[list[dict]], dict]:
    """TRL's vision collator behind the kit's own rendering of prompts, which ends every answer with
    the end token whatever the chat template does."""
    if preference:
        inner = DataCollatorForVisionPreference(checkpoint.processor)
        answers = ("chosen", "rejected")
    else:
        inner = DataCollatorForVisionLanguageModeling(checkpoint.processor,
                                                      completion_only_loss=True)
        answers = ("completion",)
    return lambda rows: inner([_rendered(checkpoint, r, answers) for r in rows])


class _Counted:
    """Counts the floating point operations of a run's first steps, forward and backward.

    The first steps alone, since counting is slow; several, since padding differs between batches.
    A run that starts over counts anew, one that resumes behind them finds the file.
    """

    compute_file: Path
    counted_steps: int

    def training_step(self, model: torch.nn.Module, inputs: dict, *args: Any) -> torch.Tensor:
        if self.state.global_step >= self.counted_steps:
            return super().training_step(model, inputs, *args)
        with FlopCounterMode(display=False) as counter:
            loss = super().training_step(model, inputs, *args)
        flops, batches = getattr(self, "_counted", (0, 0))
        self._counted = flops + counter.get_total_flops(), batches + 1
        if self.is_world_process_zero():
            records.write_whole(self.compute_file, records.to_json(
                dict(zip(("flops", "batches"), self._counted, strict=True))))
        return loss


class CountedDPOTrainer(_Counted, DPOTrainer):
    """TRL's DPOTrainer that measures its compute."""


class CountedSFTTrainer(_Counted, SFTTrainer):
    """TRL's SFTTrainer that measures its compute."""


class _Progress(TrainerCallback):
    """One bar a method, gone when it is done, in place of the trainer's printed lines."""

    def __init__(self, label: str):
        self.label, self.bar = label, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.label,
                        unit="step", leave=False)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def make_trainer(p: DPOTraining, method: str, rows: Sequence[dict], folder: Path, *,
                 steps: int) -> DPOTrainer | SFTTrainer:
    """The TRL trainer of a method on a freshly loaded model with a fresh adapter."""
    # The adapter's first values are drawn here: the same for every method.
    set_seed(seeds.seed_for(p.seed, "adapter") % 2**32)
    checkpoint = models.load(p.path(p.model), precision=p.precision,
                             transform=p.image_transform)
    preference = learns_pairs(method)
    common = dict(
        output_dir=str(folder / "checkpoints"), max_steps=steps, seed=p.seed, data_seed=p.seed,
        per_device_train_batch_size=p.device_batch,
        gradient_accumulation_steps=p.batch_pairs // p.device_batch,
        learning_rate=p.learning_rate, lr_scheduler_type="cosine", weight_decay=0.0,
        warmup_steps=round(p.warmup_ratio * steps), max_length=None,
        gradient_checkpointing=p.gradient_checkpointing, bf16=p.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1, logging_first_step=True, logging_nan_inf_filter=False,
        save_strategy="steps", save_steps=p.save_every,
        save_total_limit=2, report_to="none", disable_tqdm=True, remove_unused_columns=False)
    if preference:
        losses = ["sigmoid", "sft"] if p.nll_weight else ["sigmoid"]
        weights = [1.0, p.nll_weight] if p.nll_weight else [1.0]
        args = DPOConfig(**common, beta=p.beta, loss_type=losses, loss_weights=weights)
        trainer_class = CountedDPOTrainer
    else:
        args, trainer_class = SFTConfig(**common, completion_only_loss=True), CountedSFTTrainer
    trainer = trainer_class(
        checkpoint.model, args=args, train_dataset=Dataset.from_list(list(rows)),
        processing_class=checkpoint.processor,
        data_collator=collator(checkpoint, preference=preference),
        peft_config=models.adapter_config(checkpoint.model, rank=p.lora_rank, alpha=p.lora_alpha,
                                          dropout=p.lora_dropout),
        callbacks=[_Progress(method)])
    trainer.remove_callback(PrinterCallback)
    trainer.compute_file = folder / "compute.json"
    trainer.counted_steps = min(COUNTED_STEPS, p.save_every)
    moving = [n for n, w in trainer.model.named_parameters()
              if w.requires_grad and "lora_" not in n]
    if moving:
        raise RuntimeError(f"{moving[0]} would be trained: the reference would move with it")
    return trainer


def train_method(p: DPOTraining, method: str, rows: Sequence[dict], folder: Path, *,
                 steps: int) -> list[dict]:
    """Trains a method, from its last checkpoint if it has one, and returns its history: a record
    {step, loss, ...} an optimizer step. A method that is done is only read."""
    history_file = folder / "history.json"
    if history_file.is_file():
        return json.loads(history_file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with models.quietly():
        trainer = make_trainer(p, method, rows, folder, steps=steps)
        trainer.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints"))
    history = [{"step": h["step"], **{k: round(h[k], 8) for k in LOGGED if k in h}}
               for h in trainer.state.log_history if "loss" in h]
    bad = [(h["step"], name) for h in history for name, value in h.items()
           if not math.isfinite(value)]
    if bad:
        raise Refusal(f"{method}: the {bad[0][1]} is not a number from step {bad[0][0]} on; "
                      "lower learning_rate or use precision float32")
    trainer.model.save_pretrained(folder / "adapter")
    _add_seconds(folder.parent / runs.TIMINGS, method, time.monotonic() - began)
    records.write_whole(history_file, records.to_json(history))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only there to resume from
    return history


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; a kill while one is written leaves it without its last file."""
    whole = [c for c in folder.glob("checkpoint-*") if _readable(c / "trainer_state.json")]
    return str(max(whole, key=lambda c: int(c.name.split("-")[1]))) if whole else None


def _readable(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text()))
    except (OSError, ValueError):
        return False


def _add_seconds(file: Path, method: str, seconds: float) -> None:
    known = json.loads(file.read_text()) if file.is_file() else {}
    records.write_whole(file, records.to_json({**known, method: round(seconds, 1)}))


def _flops(p: DPOTraining, folder: Path) -> float:
    """FLOPs of one optimizer step of a method, the mean of the counted ones."""
    counted = json.loads((folder / "compute.json").read_text())
    return counted["flops"] / counted["batches"] * p.batch_pairs / p.device_batch


def _facts(p: DPOTraining, rows: Sequence[dict], folder: Path, history: Sequence[dict], *,
           steps: int) -> dict[str, Any]:
    first, last = history[0], history[-1]
    step_flops = _flops(p, folder)
    facts = {"rows": len(rows), "steps": steps, "flops_per_step": step_flops,
             "flops": step_flops * steps, "loss_first": first["loss"], "loss_last": last["loss"]}
    # One batch is noisy: the end is the mean of the last tenth of the run.
    tenth = max(len(history) // 10, 1)

    def mean(part: Sequence[dict], key: str) -> float:
        return round(sum(h[key] for h in part) / len(part), 6)

    if "logps/chosen" in last:
        for name, key in (("margin", "rewards/margins"), ("accuracy", "rewards/accuracies")):
            facts[f"{name}_last"] = mean(history[-tenth:], key)
        for name in ("chosen", "rejected"):
            # The reward is beta times the log-ratio to the reference, so dividing by beta gives
            # the change of the answer's log-probability without the noise of which rows came up.
            facts[f"{name}_change"] = round(
                mean(history[-tenth:], f"rewards/{name}") / p.beta, 6)
    return facts


def histories(result: runs.Result) -> dict[str, list[dict]]:
    """method -> a record {step, loss, ...} an optimizer step. DPO methods also have "chosen"
    and "rejected": the mean change of the answers' log-probability against the reference, nats."""
    beta = result.manifest["parameters"]["beta"]
    out = {}
    for method in result.metrics["methods"]:
        history = json.loads((result.folder / method / "history.json").read_text())
        out[method] = [{**h, **{n: h[f"rewards/{n}"] / beta for n in ("chosen", "rejected")
                                if f"rewards/{n}" in h}} for h in history]
    return out
