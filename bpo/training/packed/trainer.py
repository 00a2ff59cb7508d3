"""TRL's DPOTrainer with the rows of one positive, or of one image, packed into one tree.

Stock DPO on images encodes an image four times a pair and runs the prompt once for every answer,
and again for the reference. Here answers are branches of their prompt, and prompts of their image
(`trees`): each token runs once, and answers alone go through the output layer. The log-probs go
back into TRL's layout: its losses run on them unchanged. Those of the reference are kept.
"""

import contextlib
import copy
import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

from bpo.models import mixing, prefix
from bpo.training import objectives
from bpo.training.packed import check as packed_check
from bpo.training.packed import collation
from bpo.training.packed import rows as packed_rows
from bpo.training.packed.forward import read_packed
from bpo.training.packed.reference import KeepsReferences

# What this trainer, its check and its objectives use of TRL's DPOTrainer, and of transformers'
# Trainer below it, that neither promises to keep. A test looks for each in the TRL installed.
TRL_PRIVATE = ("_compute_loss", "_get_dataloader", "_get_train_sampler", "_metrics",
               "_prepare_inputs", "_save_checkpoint", "_set_signature_columns_if_needed",
               "_signature_columns", "_train_batch_size", "aux_loss_enabled", "beta",
               "f_divergence_type", "ld_alpha", "loss_types", "loss_weights",
               "precompute_ref_logps", "ref_model")
COLLATORS = (DataCollatorForPreference, DataCollatorForVisionPreference)


class NotFinite(FloatingPointError):
    """A loss that is no number, at a step on rows of the training data."""

    def __init__(self, step: int, loss: float, rows: Sequence[Any]):
        super().__init__(f"step {step}: the loss is {loss} on rows {', '.join(map(str, rows))} of "
                         "the training data; lower the learning rate or use float32")
        self.step, self.rows = step, rows


class PackedDPOTrainer(KeepsReferences):
    """A drop-in for TRL's DPOTrainer: same arguments, columns, losses, logs and checkpoints.

    `per_device_train_batch_size` counts rows (pairs), as in TRL. Differences:

    packing: "auto" looks at the decoder and computes the longest pair, with pictures and without,
        packed and unpacked, and two pairs in one tree; where packing is wrong it says so and goes
        on unpacked. A later pair that is longer is tried likewise. "always" and "never" force it.
        A batch with a sequence beyond the decoder's window is computed unpacked.
    share: "prompt": rows that share image, prompt and chosen answer are found by themselves and
        kept in one batch, and those of one image and prompt make a tree; "image": all rows of an
        image make one, and are drawn together (`collation.TREE_TOKENS` at most; a batch should
        hold several); "row": rows come in the trainer's own random order.
    reference_folder: where reference log-probs are kept when `args.precompute_ref_log_probs`, which
        works for images too. With adapters they are computed when an answer first comes up, each
        process its share, then read; with full fine-tuning before the first step, without a second
        model. By default reference/ below the output folder. reference_from: further such folders.
    max_length: rows that are longer are left out, never cut, in training and in evaluation.
    Rows that can teach nothing (an empty answer or question, no picture, a rejected answer that is
        the chosen one) are left out. `dropped` counts rows left out by reason.
    loss_type: also those of `objectives`; some want a column `damaged_images`. A column `weight`
        of floats multiplies each pair's losses, of those that `objectives` can weigh.

    Raises ValueError where no row is left or recomputing would give wrong gradients, NotFinite
    with the rows when a loss is no number, MemoryError with what to lower when memory runs out
    (not with `auto_find_batch_size`).
    """

    def __init__(self, *args: Any, packing: str = "auto", share: str = "prompt",
                 reference_folder: Path | None = None, reference_from: Iterable[Path] = (),
                 **kwargs: Any):
        for name, value, known in (("packing", packing, ("auto", "always", "never")),
                                   ("share", share, ("row", "prompt", "image"))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, is {value!r}")
        self.share = share
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
        if config is not None:
            # Dispatching cuts a batch's tensors among processes: the layout's are no rows.
            config.accelerator_config.dispatch_batches = False
        self.dropped: Counter[str] = Counter()
        for name in {"train_dataset", "eval_dataset"} & given.keys():
            given[name] = self._usable(given[name])
        packs = isinstance(given.get("data_collator"), (*COLLATORS, type(None)))
        with self.no_second_model() if precomputed and packs else contextlib.nullcontext():
            super().__init__(**given)
        recomputing = self.args.gradient_checkpointing and self.args.gradient_checkpointing_kwargs
        if (recomputing or {}).get("use_reentrant") and mixing.shares_keys(self.base.config):
            raise ValueError("gradient_checkpointing with use_reentrant gives wrong gradients where "
                             "layers share keys and values: set use_reentrant=False, or turn it off")
        self.weighted = packed_rows.weighted(self.train_dataset)
        self.added_losses = objectives.split(self)
        self.cache, self._surveys, self._features = None, {}, []
        why = self._why_not()
        if why and packing != "never":
            self.accelerator.print(f"The batches are not packed: {why}.")
        if not packs:
            if precomputed:
                self.accelerator.print("Reference log-probs are not kept but computed in every "
                                       "step: that wants TRL's own collators.")
            return
        self.data_collator = collation.PackedCollator(self.data_collator, share)
        self.data_collator.packing = packing != "never" and not why
        self.data_collator.window = mixing.window(self.base)
        if packing == "auto":
            self.data_collator.tried, self.data_collator.branched = {False: 0, True: 0}, False
        self.data_collator.damaged = objectives.damages(n for n, _ in self.added_losses)
        if isinstance(self.train_dataset, Dataset):
            self.train_dataset = self._fitting(self.train_dataset)
        self._features = [read_packed(b) for b in self.bases]
        if self.data_collator.packing:
            for base in self.bases:
                prefix.use_attention(base)
            self.data_collator.dense = not all(map(prefix.in_use, self.bases))
        if precomputed:
            self.keep_references(reference_folder, reference_from)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model that is trained, under accelerate's wrappers and PEFT's."""
        return self.bases[0]

    @property
    def bases(self) -> list[PreTrainedModel]:
        """The model that is trained, and its reference where that is a model of its own."""
        models = [self.accelerator.unwrap_model(m) for m in (self.model, self.ref_model)
                  if m is not None]
        return [m.get_base_model() if is_peft_model(m) else m for m in models]

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
        return mixing.why_not(self.base)

    # Rows and batches

    def _usable(self, dataset: Any) -> Any:
        """The rows of a data set, or of several by name, that can teach something."""
        if isinstance(dataset, dict):
            return type(dataset)({n: self._usable(d) for n, d in dataset.items()})
        if not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset
        return packed_rows.without(dataset, packed_rows.flaw, self.dropped)

    def _fitting(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """The rows of at most `max_length` tokens; a data set is surveyed once."""
        limit, collator = self.args.max_length, self.data_collator
        processor = collator.stock.processor if collator.vision else None
        if isinstance(dataset, IterableDataset):
            self.refuse_stream(dataset)
            return dataset if limit is None else packed_rows.without(
                dataset, packed_rows.too_long(processor, limit), self.dropped)
        survey = self._surveys.get(dataset._fingerprint) or packed_rows.survey(
            dataset, self.dropped, processor, limit, collator.window, self.share)
        self._surveys |= dict.fromkeys((dataset._fingerprint, survey.rows._fingerprint), survey)
        return survey.rows

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [n for n in ("row", "damaged_images", "weight")
                                    if n not in self._signature_columns]

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        survey = self._surveys.get(getattr(dataset, "_fingerprint", None))
        order = survey and packed_rows.sampler(survey.families, self.args,
                                               batch=self._train_batch_size)
        return order or super()._get_train_sampler(train_dataset)

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int,
                        sampler_fn: Any = None, **kwargs: Any) -> Any:
        if not isinstance(self.data_collator, collation.PackedCollator):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, **kwargs)
        dataset = self._fitting(dataset)
        if isinstance(dataset, Dataset):
            if self.data_collator.packing and not self._sharded:
                for numbers in self._surveys[dataset._fingerprint].tried:
                    packed_check.try_rows(self, [dataset[n] for n in numbers])
            order, rows = sampler_fn, dataset
            sampler_fn = order and (lambda numbered: order(rows))  # it looks at columns
            dataset = collation.Numbered(dataset)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, **kwargs)

    @property
    def _sharded(self) -> bool:
        """Whether a process holds a part of the weights only."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    # A step

    def _inputs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch with which packing was seen to be right, or the same unpacked."""
        rows, collator = inputs.pop("examples", None), self.data_collator
        if rows is None:
            return inputs
        if not (self._sharded and any(collator.tried.values())):
            packed_check.try_rows(self, rows, model if self._sharded else None)
        if collator.packing and collator.seen(inputs, rows):
            return inputs
        with self.unpacked():
            return self._prepare_inputs(collator(rows))

    @contextlib.contextmanager
    def unpacked(self) -> Iterator[None]:
        collator = self.data_collator
        packing, collator.packing = getattr(collator, "packing", False), False
        try:
            yield
        finally:
            collator.packing = packing

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any,
                      **kwargs: Any) -> torch.Tensor:
        inputs = self._inputs(model, inputs)
        with self.memory():
            loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise NotFinite(self.state.global_step + 1, loss.item(),
                            packed_check.not_finite(self, model, inputs))
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, self._inputs(model, inputs), *args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's: the logits of whole sequences, which packed rows have not."""
        with self.unpacked():
            return super().predict(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        return super().evaluate(self._usable(eval_dataset), *args, **kwargs)

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        """Says what to lower when memory runs out. `auto_find_batch_size` is to see that itself."""
        try:
            yield
        except RuntimeError as error:
            full = "out of memory" in str(error) or "can't allocate memory" in str(error)
            if not full or self.args.auto_find_batch_size:
                raise
            raise MemoryError(packed_check.lower(self.args)) from error

    def answer_tokens(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """(N, S - 1) log p of every answer token in TRL's layout, 0 elsewhere."""
        not_the_model_s = ("row", "keys", "damaged", "examples", "weight", "completion_mask",
                           "ref_chosen_logps", "ref_rejected_logps")
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return model(**{n: v for n, v in inputs.items() if n not in not_the_model_s},
                     use_cache=False, labels=labels, fused_lm_head=True).log_probs

    def forget(self) -> None:
        """Lets go of the image features of the batch computed last."""
        for memo in self._features:
            memo.clear()

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any],
                      return_outputs: bool) -> Any:
        inputs = dict(inputs)
        _, _, keys, damaged, weight = (
            inputs.pop(n, None) for n in ("row", "examples", "keys", "damaged", "weight"))
        if weight is not None and not self.weighted:
            raise ValueError("a batch has weights, and the training data set has no column weight")
        outputs = []

        def watched(**kwargs: Any) -> Any:
            outputs.append(model(**kwargs))
            return outputs[-1]

        try:
            if keys is not None or self.added_losses:
                inputs |= self.references(inputs, keys)
                self.precompute_ref_logps = True
            out = super()._compute_loss(watched, inputs, return_outputs)
            if self.added_losses:
                added = objectives.loss(self, model, inputs, outputs[0].log_probs, damaged,
                                        weight)
                out = (out[0] + added, out[1]) if return_outputs else out + added
            return out
        finally:
            self.precompute_ref_logps = False
            self.forget()
