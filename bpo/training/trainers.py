"""The trainer of one training method: TRL's for SFT, the packed one for DPO, each on a freshly
loaded model with a fresh adapter, on rows as the kit renders them, with its compute counted.

The reference is the model before training, exactly: nothing outside the adapters can move, and the
reference's log-probs are the same weights with the adapters off.
"""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from trl import DPOConfig, SFTConfig, SFTTrainer

from bpo.data import images
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, trees
from bpo.models.checkpoint import Checkpoint
from bpo.models.generate import Request
from bpo.models.weakening import View
from bpo.pairs.methods import learns_pairs
from bpo.params import DPOTraining
from bpo.study import processes, progress
from bpo.study.files import to_json, write_whole
from bpo.training import objectives
from bpo.training.packed import rows as packed_rows
from bpo.training.packed.trainer import PackedDPOTrainer

COUNTED_STEPS = 4
# Torch's formulas, and two that it lacks, for the CPU's own attention.
FORMULAS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda query, key, value, *_, **__: sdpa_flop_count(query.shape, key.shape, value.shape),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(
            grad.shape, query.shape, key.shape, value.shape)}


class Rendering:
    """Rows {id, images, prompt, answers} as a trainer's collator takes them: images opened and
    transformed, texts as the model reads them, every answer with the end token at its end."""

    def __init__(self, checkpoint: Checkpoint, p: DPOTraining):
        # Without the model: data sets hash what renders them.
        self.checkpoint = replace(checkpoint, model=None)
        self.seed, self.view, self.folder = p.seed, None, None
        if p.share == "image":
            self.folder = p.path(p.image_folder)
        if objectives.damages(p.loss):
            self.view = View(p.damage, step=p.damage_step, crop_share=p.crop_share)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [self.row(dict(zip(batch, values, strict=True)))
                for values in zip(*batch.values(), strict=True)]
        return {name: [r[name] for r in rows] for name in rows[0]}

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        checkpoint, files = self.checkpoint, [Path(i) for i in row["images"]]
        out = {"images": [encoding.transformed(images.load(f), checkpoint.transform,
                                               checkpoint.processor) for f in files],
               "prompt": encoding.prompt_text(checkpoint, row["prompt"], image=bool(files))}
        out |= {n: row[n] for n in {"weight"} & row.keys()}
        for name in {"chosen", "rejected", "completion"} & row.keys():
            out[name] = encoding.answer_text(checkpoint, row["prompt"], row[name][0]["content"])
        if self.view is not None and "chosen" in row:
            # The draw of the row, or of its image where rows share one: the same in every epoch, so
            # that its reference can be kept.
            out["damaged_images"] = [generate.view_picture(
                checkpoint.processor, Request(
                    row["id"] if self.folder is None else f.relative_to(self.folder).as_posix(),
                    tuple(row["prompt"]), f), self.view,
                transform=checkpoint.transform, seed=self.seed) for f in files]
        return out


class _Counted:
    """Counts the floating point operations of a run's first steps, forward and backward, and those
    of the reference apart: it runs once an answer, whatever is kept of it.

    The first steps alone, since counting is slow; several, since padding differs between batches.
    A run that starts over counts anew, one that resumes behind them finds the file.
    """

    compute_file: Path
    counted_steps: int
    _counts = {"flops": 0, "reference": 0, "batches": 0}
    _counting = False
    how: dict[str, bool] = {}

    def training_step(self, model: torch.nn.Module, inputs: dict, *args: Any) -> torch.Tensor:
        if self.state.global_step >= self.counted_steps:
            return super().training_step(model, inputs, *args)
        self._aside, self._reference, self._counting = 0, 0, True
        try:
            with FlopCounter() as counter:
                loss = super().training_step(model, inputs, *args)
        finally:
            self._counting = False
        step = {"flops": counter.total - self._aside, "reference": self._reference,
                "batches": 1}
        self._counts = {n: self._counts[n] + step[n] for n in step}
        if self.is_world_process_zero():
            write_whole(self.compute_file, to_json(self._counts | self.how))
        return loss


class FlopCounter(TorchDispatchMode):
    """Counts the floating point operations inside it in `total`, by `FORMULAS`.

    Torch's own FlopCounterMode first takes every operation apart to look for countable ones, which
    made a counted step ten times as long; with gradients nothing composite arrives here.
    """

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # torch's signature
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class CountedDPOTrainer(_Counted, PackedDPOTrainer):
    """The packed DPO trainer that measures its compute."""

    @property
    def how(self) -> dict[str, bool]:
        return {"packed": self.data_collator.packing}

    def reference_tokens(self, inputs: dict[str, Any], keys: Sequence[str] | None
                         ) -> list[torch.Tensor]:
        if not self._counting:
            return super().reference_tokens(inputs, keys)
        with FlopCounter() as aside:
            with FlopCounter() as counter:  # what it costs where nothing is kept
                tokens = super().reference_tokens(inputs, None)
            if keys is not None:
                tokens = super().reference_tokens(inputs, keys)
        self._reference += counter.total
        self._aside += aside.total
        return tokens


class CountedSFTTrainer(_Counted, SFTTrainer):
    """TRL's SFTTrainer that measures its compute and takes rows in the packed trainer's order."""

    def __init__(self, *args: Any, share: str, **kwargs: Any):
        self.share = share
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        order = packed_rows.sampler(packed_rows.families(self.train_dataset, self.share),
                                    self.args, batch=self._train_batch_size)
        return order or super()._get_train_sampler(train_dataset)


class Progress(TrainerCallback):
    """A method's steps, in place of the trainer's printed lines."""

    def __init__(self, label: str):
        self.label, self.part = label, ExitStack()

    def on_train_begin(self, args, state, control, **kwargs):
        self.advance = self.part.enter_context(progress.part(
            self.label, state.max_steps, done=state.global_step, unit="steps"))

    def on_step_end(self, args, state, control, **kwargs):
        self.advance()

    def on_save(self, args, state, control, **kwargs):
        self.advance(0)

    def on_train_end(self, args, state, control, **kwargs):
        self.part.close()


def make(p: DPOTraining, method: str, rows: Sequence[dict], folder: Path, *, steps: int,
         references: Path, others: Iterable[Path] = (), start: Path | None = None
         ) -> CountedDPOTrainer | CountedSFTTrainer:
    """The trainer of a method; its checkpoints go below `folder`. TRL seeds its draws before it
    makes the adapter, whose first values are thus the same for every method.

    references: where the reference's log-probs are kept; others: further such folders, only read.
    start: an adapter to train on from; the reference is the model with it, of which TRL keeps a
    frozen copy. None: a fresh adapter, and the model without it.
    """
    checkpoint = checkpoints.load(p.path(p.model), precision=p.precision,
                                  transform=p.image_transform)
    model, adapter, started = checkpoint.model, {}, {}
    if start is None:
        adapter["peft_config"] = checkpoints.adapter_config(
            model, rank=p.lora_rank, alpha=p.lora_alpha, dropout=p.lora_dropout)
    else:
        model = PeftModel.from_pretrained(model, start, is_trainable=True)
        started = {n: w.detach().clone() for n, w in model.named_parameters() if w.requires_grad}
    common = dict(
        output_dir=str(folder / "checkpoints"), max_steps=steps, seed=p.seed, data_seed=p.seed,
        per_device_train_batch_size=p.device_batch,
        gradient_accumulation_steps=p.batch_pairs // (p.device_batch * processes.world()),
        learning_rate=p.learning_rate, lr_scheduler_type="cosine", weight_decay=0.0,
        warmup_steps=round(p.warmup_ratio * steps), max_length=None,
        gradient_checkpointing=p.gradient_checkpointing, bf16=p.precision != "float32",
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1, logging_first_step=True, logging_nan_inf_filter=False,
        save_strategy="steps", save_steps=p.save_every,
        save_total_limit=2, report_to=list(p.trackers), run_name=f"{p.study} {method}",
        disable_tqdm=True, remove_unused_columns=False)
    given = dict(
        train_dataset=Dataset.from_list(list(rows)).with_transform(Rendering(checkpoint, p)),
        processing_class=checkpoint.processor, callbacks=[Progress(method)], **adapter)
    if learns_pairs(method):
        trainer = CountedDPOTrainer(
            model, args=DPOConfig(
                **common, beta=p.beta, loss_type=list(p.loss), loss_weights=list(p.loss_weights),
                ld_alpha=p.ld_alpha if p.ld_alpha < 1 else None, precompute_ref_log_probs=True),
            **given, packing=p.packing, share=p.share, reference_folder=references,
            reference_from=others)
    else:
        trainer = CountedSFTTrainer(
            model, args=SFTConfig(**common, completion_only_loss=True), **given, share=p.share)
    # TRL rounds adapters of a 4-bit base to bfloat16, where steps of small rates would be lost.
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            weight.data = started.get(name, weight.data).float()
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            # Beside the stage, not in it: the files hold the time of day, and a stage's are hashed.
            callback.logging_dir = str(folder.parent.parent / "trackers" / method)
    trainer.compute_file = folder / "compute.json"
    trainer.counted_steps = min(COUNTED_STEPS, p.save_every)
    moving = [n for n, w in trainer.model.named_parameters()
              if w.requires_grad and "lora_" not in n]
    if moving:
        raise RuntimeError(f"{moving[0]} would be trained: the reference would move with it")
    return trainer


def batches_key(p: DPOTraining, rows: Sequence[Sequence[dict]]) -> str:
    """A hash of what decides which rows a batch holds. Log-probs differ in their last bits with
    what else is in the batch: kept ones are those of the same batches, so that a run that reads
    them has the bytes of one that computes them."""
    decisive = [list(rows), p.seed, p.steps, p.epochs, p.batch_pairs, p.device_batch, p.packing,
                p.share, trees.VERSION, p.damage, p.damage_step, p.crop_share,
                objectives.damages(p.loss), processes.world(), p.variants]
    return hashlib.sha256(to_json(decisive).encode()).hexdigest()[:16]
