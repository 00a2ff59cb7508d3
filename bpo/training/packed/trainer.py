"""TRL's DPOTrainer with the rows of one positive packed into one sequence.

Stock DPO on images encodes an image four times a pair and runs the prompt once for every answer,
and again for the reference. Here a positive with its K rejected answers is one row [prompt | chosen
| rejected 1 | ... | rejected K] (`prefix`): the image is encoded once, the prompt runs once, and
answers alone go through the output layer. The log-probs go back into TRL's layout, so that its own
losses and metrics run on them unchanged. Reference log-probs are kept (`reference`).
"""

import contextlib
import copy
import inspect
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference
from trl.trainer.utils import use_adapter

from bpo.models import prefix
from bpo.training import objectives
from bpo.training.packed import check as packed_check
from bpo.training.packed import collation, reference
from bpo.training.packed.forward import read_packed

# What this trainer, its check and its objectives use of TRL's DPOTrainer, and of transformers'
# Trainer below it, that neither promises to keep. A test looks for each in the TRL installed.
TRL_PRIVATE = ("_compute_loss", "_get_dataloader", "_get_train_sampler", "_metrics",
               "_prepare_inputs", "_set_signature_columns_if_needed", "_signature_columns",
               "_total_train_tokens", "_train_batch_size", "aux_loss_enabled", "beta",
               "f_divergence_type", "ld_alpha", "loss_types", "loss_weights",
               "precompute_ref_logps", "ref_model")
COLLATORS = DataCollatorForPreference | DataCollatorForVisionPreference


class NotFinite(FloatingPointError):
    """A loss that is no number, at a step on rows of the training data."""

    def __init__(self, step: int, loss: float, rows: Sequence[Any]):
        super().__init__(f"step {step}: the loss is {loss} on rows {', '.join(map(str, rows))} of "
                         "the training data; lower the learning rate or use float32")
        self.step, self.rows = step, rows


class PackedDPOTrainer(DPOTrainer):
    """A drop-in for TRL's DPOTrainer: same arguments, columns, losses, logs and checkpoints.

    Rows that share image, prompt and chosen answer are found by themselves and kept in one batch;
    `per_device_train_batch_size` counts rows (pairs), as in TRL. Differences:

    packing: "auto" computes the first batch packed and unpacked and compares loss and gradients; on
        disagreement it says so and goes on unpacked. "always" and "never" force it.
    reference_folder: where reference log-probs are kept when `args.precompute_ref_log_probs`, which
        works for images too: computed when an answer first comes up, each process its share, then
        read; by default reference/ below the output folder. reference_from: further such folders.
    max_length: rows that are longer are dropped and counted (`dropped`), never cut.
    loss_type: also those of `objectives`; some want a column `damaged_images`.

    Raises ValueError for a row whose rejected answer is the chosen one, NotFinite with the rows
    when a loss is no number, MemoryError with what to lower when memory runs out.
    """

    def __init__(self, *args: Any, packing: str = "auto", reference_folder: Path | None = None,
                 reference_from: Iterable[Path] = (), **kwargs: Any):
        if packing not in ("auto", "always", "never"):
            raise ValueError(f"packing must be auto, always or never, is {packing!r}")
        given = inspect.signature(DPOTrainer.__init__).bind(None, *args, **kwargs).arguments
        given.pop("self")
        config = given.get("args")
        precomputed = config is not None and config.precompute_ref_log_probs
        if precomputed:  # ours in place of TRL's, which refuses images
            if config.sync_ref_model:
                raise ValueError("sync_ref_model moves the reference, so its log-probs cannot be "
                                 "kept: turn precompute_ref_log_probs off")
            given["args"] = copy.copy(config)
            given["args"].precompute_ref_log_probs = False
        super().__init__(**given)
        self.added_losses = objectives.split(self)
        self.dropped, self.cache, self._groups, self._features = 0, None, [], []
        why = self._why_not()
        if why and packing != "never":
            self.accelerator.print(f"The batches are not packed: {why}.")
        self._checked = packing == "always"
        if not isinstance(self.data_collator, COLLATORS):
            if precomputed:
                self.accelerator.print("Reference log-probs are not kept but computed in every "
                                       "step: that wants TRL's own collators.")
            return
        self.data_collator = collation.PackedCollator(self.data_collator)
        self.data_collator.packing = packing != "never" and not why
        self.data_collator.damaged = objectives.damages(n for n, _ in self.added_losses)
        if isinstance(self.train_dataset, Dataset):
            self._keep_what_fits()
            self._groups = collation.positives(self.train_dataset)
        self._features = [read_packed(self._bare(m)) for m in (self.model, self.ref_model)
                          if m is not None]
        if self.data_collator.packing:
            prefix.use_attention(self.base)
            self.data_collator.dense = not prefix.in_use(self.base)
        if precomputed:
            self._keep_references(reference_folder, reference_from)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model that is trained, under accelerate's wrappers and PEFT's."""
        return self._bare(self.model)

    def _bare(self, model: Any) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if is_peft_model(model) else model

    def _why_not(self) -> str:
        """Why batches cannot be packed whatever the model computes; empty if they can."""
        if not isinstance(self.data_collator, COLLATORS):
            return "a data_collator of your own makes them"
        if self.compute_metrics is not None:
            return "compute_metrics wants the logits of whole sequences"
        if self.aux_loss_enabled:
            return "the load-balancing loss of a mixture of experts counts every token"
        if is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            return "prompt learning puts tokens in front of every sequence"
        return ""

    def _keep_what_fits(self) -> None:
        rows, limit = self.train_dataset, self.args.max_length
        fitting = collation.fitting(rows, self.data_collator, limit)
        self.dropped = len(rows) - len(fitting)
        if not fitting:
            raise ValueError(f"no row fits into max_length = {limit} tokens")
        if self.dropped:
            self.accelerator.print(
                f"{self.dropped} of {len(rows)} rows are longer than max_length = {limit} tokens "
                "and are left out: a cut answer trains on nothing")
            self.train_dataset = rows.select(fitting)

    def _keep_references(self, folder: Path | None, others: Iterable[Path]) -> None:
        model = self.accelerator.unwrap_model(self.ref_model or self.model)
        self.cache = reference.Cache(Path(folder or Path(self.args.output_dir) / "reference"),
                                     reference.model_key(model))
        self.cache.read(others)
        if self.cache.others:
            self.accelerator.print(
                f"{self.cache.others} reference log-probs in {self.cache.folder} are those of "
                "another model: they are computed anew for this one")
        self.data_collator.keyed = True
        self.add_callback(reference.Keeper(self.cache, self.accelerator))

    # Batches

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [n for n in ("row", "damaged_images")
                                    if n not in self._signature_columns]

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        order = collation.sampler(self._groups, self.args, batch=self._train_batch_size)
        return order or super()._get_train_sampler(train_dataset)

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int,
                        sampler_fn: Any = None, **kwargs: Any) -> Any:
        packs = isinstance(self.data_collator, collation.PackedCollator)
        if packs and isinstance(dataset, Dataset):
            dataset = collation.Numbered(dataset)
        if packs and not self._checked and self.data_collator.packing and not self._sharded:
            with torch.random.fork_rng():  # the run draws what it would draw without the check
                sampler = sampler_fn(dataset) if sampler_fn else None
                order = dataset if sampler is None else (dataset[i] for i in sampler)
                self._check(list(itertools.islice(order, batch_size)))
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, **kwargs)

    @property
    def _sharded(self) -> bool:
        """Whether a process holds a part of the weights only."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _check(self, rows: Sequence[dict[str, Any]], model: torch.nn.Module | None = None) -> None:
        """Goes on unpacked where packing is wrong for this model, and says so. model: the wrapped
        one where the weights are spread over processes."""
        self._checked = True
        try:
            why = (packed_check.choose(self, rows) if model is None
                   else packed_check.compare_losses(self, model, rows))
        except torch.OutOfMemoryError as error:
            raise MemoryError(_lower(self.args)) from error
        self.data_collator.packing = not why
        if why:
            self.accelerator.print(f"The batches cannot be packed with this model ({why}): the run "
                                   "goes on unpacked, which is slower and right.")

    # A step

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any,
                      **kwargs: Any) -> torch.Tensor:
        rows = inputs.get("row")
        if "packed" in inputs and self._sharded and not self._checked and rows:
            self._check([self.train_dataset[i] for i in rows], model)
        if "packed" in inputs and not self.data_collator.packing:  # collated before the check
            inputs = self.data_collator(
                collation.Numbered(self.train_dataset).__getitems__(rows))
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except RuntimeError as error:
            if "out of memory" in str(error) or "can't allocate memory" in str(error):
                raise MemoryError(_lower(self.args)) from error
            raise
        if not torch.isfinite(loss):
            raise NotFinite(self.state.global_step + 1, loss.item(),
                            self._bad(model, inputs, rows))
        return loss

    def _bad(self, model: torch.nn.Module, inputs: dict[str, Any], rows: Sequence[int] | None
             ) -> Sequence[Any]:
        """The rows whose log-probs are no numbers; all of the batch where it is their sum."""
        with torch.no_grad():
            tokens = self.answer_tokens(model, self._prepare_inputs(inputs))
        pairs = (~torch.isfinite(tokens)).any(1).view(2, -1).any(0).tolist()
        rows = rows or [f"{i} of this batch" for i in range(len(pairs))]
        return [r for r, bad in zip(rows, pairs, strict=True) if bad] or rows

    def answer_tokens(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """(N, S - 1) log p of every answer token in TRL's layout, 0 elsewhere."""
        not_the_model_s = ("row", "keys", "damaged", "completion_mask", "ref_chosen_logps",
                           "ref_rejected_logps")
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return model(**{n: v for n, v in inputs.items() if n not in not_the_model_s},
                     use_cache=False, labels=labels, fused_lm_head=True).log_probs

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any],
                      return_outputs: bool) -> Any:
        inputs = dict(inputs)
        _, keys, damaged = (inputs.pop(n, None) for n in ("row", "keys", "damaged"))
        outputs = []

        def watched(**kwargs: Any) -> Any:
            outputs.append(model(**kwargs))
            return outputs[-1]

        try:
            if keys is not None or self.added_losses:
                inputs |= self._references(inputs, keys)
                self.precompute_ref_logps = True
            out = super()._compute_loss(watched, inputs, return_outputs)
            if self.added_losses:
                added = objectives.loss(self, model, inputs, outputs[0].log_probs, damaged)
                out = (out[0] + added, out[1]) if return_outputs else out + added
            return out
        finally:
            self.precompute_ref_logps = False
            for memo in self._features:
                memo.clear()

    # The reference

    def _references(self, inputs: dict[str, Any], keys: Sequence[str] | None
                    ) -> dict[str, torch.Tensor]:
        """ref_chosen_logps and ref_rejected_logps (B,), kept ones where all are."""
        tokens = self.reference_tokens(inputs, keys)
        if self.ld_alpha is not None:  # LD-DPO: what is beyond the shorter answer counts less
            pairs = zip(tokens[:len(tokens) // 2], tokens[len(tokens) // 2:], strict=True)
            short = [min(len(c), len(r)) for c, r in pairs]
            tokens = [torch.cat([t[:s], self.ld_alpha * t[s:]])
                      for t, s in zip(tokens, short * 2, strict=True)]
        sums = torch.stack([t.sum() for t in tokens]).to(inputs["input_ids"].device)
        return dict(zip(("ref_chosen_logps", "ref_rejected_logps"), sums.chunk(2), strict=True))

    def reference_tokens(self, inputs: dict[str, Any], keys: Sequence[str] | None
                         ) -> list[torch.Tensor]:
        """log p of every sequence's answer tokens under the reference, kept ones where all are."""
        missing = keys is None or not self.cache.answers.keys() >= set(keys)
        if self._sharded:  # all processes run the model, or none
            flag = torch.tensor(int(missing), device=self.accelerator.device)
            missing = bool(self.accelerator.gather(flag).max())
        if not missing:
            return [self.cache.answers[k] for k in keys]
        without = contextlib.nullcontext()
        if self.ref_model is None:
            bare = self.accelerator.unwrap_model(self.model)
            without = use_adapter(bare, adapter_name="ref" if "ref" in bare.peft_config else None)
        with torch.no_grad(), without, disable_gradient_checkpointing(
                self.model, self.args.gradient_checkpointing_kwargs):
            tokens = self.answer_tokens(self.ref_model or self.model, inputs)
        answers = [t[m].float().cpu() for t, m in zip(
            tokens, inputs["completion_mask"][:, 1:].bool(), strict=True)]
        if keys is not None:
            self.cache.add(dict(zip(keys, answers, strict=True)))
        return answers


def _lower(args: Any) -> str:
    """What to change when memory runs out."""
    lower = "max_length, which leaves out the longest rows"
    if args.per_device_train_batch_size > 1:
        lower = (f"per_device_train_batch_size (it is {args.per_device_train_batch_size}; raise "
                 f"gradient_accumulation_steps by as much), or {lower}")
    checkpointing = "" if args.gradient_checkpointing else " or set gradient_checkpointing"
    return f"the memory does not hold a step: lower {lower}{checkpointing}"
