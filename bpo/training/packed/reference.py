"""Log-probs of answers under the untouched model, computed once and kept in files.

A file holds those of some answers under one model. What was kept under another model, or for other
tokens, pixels or image preparation, has another key and is not found.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import dpo_trainer
from trl.trainer.utils import use_adapter

from bpo.models import trees
from bpo.study import progress

SUFFIX = ".safetensors"


def model_key(model: torch.nn.Module) -> str:
    """sha256 over names, types and values of all weights that no training moves.

    Adapters that train are left out: the reference is the model with them off.
    """
    digest = hashlib.sha256()
    adapted = hasattr(model, "peft_config")
    for name, weight in sorted(model.state_dict(keep_vars=True).items()):
        if adapted and weight.requires_grad:
            continue
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Cache:
    """Answer's key -> log p of each of its tokens, under the model with `key`, below `folder`."""

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        self.answers: dict[str, torch.Tensor] = {}
        self.new: dict[str, torch.Tensor] = {}
        self.others = 0  # answers found that are another model's
        self._seen: set[Path] = set()

    def read(self, folders: Iterable[Path] = ()) -> None:
        """Takes in what the folder holds, and further ones that are only read."""
        for file in [f for folder in (self.folder, *folders)
                     for f in sorted(folder.glob(f"*{SUFFIX}")) if f not in self._seen]:
            self._seen.add(file)
            with safe_open(file, "pt") as stored:
                if (stored.metadata() or {}).get("model") == self.key:
                    self.answers |= {n: stored.get_tensor(n) for n in stored.keys()}
                else:
                    self.others += len(stored.keys())

    def add(self, answers: Mapping[str, torch.Tensor]) -> None:
        """Takes in answers just computed; one that is known stays as it is."""
        new = {n: v for n, v in answers.items() if n not in self.answers}
        self.new |= new
        self.answers |= new

    def write(self) -> None:
        """Keeps what was added since, in a file of its own, whole or not at all."""
        if not self.new:
            return
        name = hashlib.sha256("".join([self.key, *self.new]).encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        # Two processes may have come to the same answers.
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        file = self.folder / f"{name}{SUFFIX}"
        save_file(self.new, temporary, metadata={"model": self.key})
        temporary.replace(file)
        self._seen.add(file)
        self.new = {}


class Keeper(TrainerCallback):
    """Writes what each process computed, and shares it at the end of an epoch."""

    def __init__(self, cache: Cache, accelerator: Accelerator):
        self.cache, self.accelerator = cache, accelerator

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.cache.write()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.cache.write()
        self.accelerator.wait_for_everyone()
        self.cache.read()


class KeepsReferences(DPOTrainer):
    """The part of the packed trainer that computes reference log-probs, and keeps them."""

    @contextlib.contextmanager
    def no_second_model(self) -> Iterator[None]:
        """While TRL sets itself up: with full fine-tuning it would load the reference, which kept
        log-probs spare, and which a model made in memory has no path for. Weights that are spread
        over processes cannot run before training starts: there it is loaded."""
        load = dpo_trainer.create_model_from_path

        def policy_alone(*args: Any, **kwargs: Any) -> Any:
            begun = hasattr(self, "accelerator")  # the policy is loaded before
            return None if begun and not self._sharded else load(*args, **kwargs)

        dpo_trainer.create_model_from_path = policy_alone
        try:
            yield
        finally:
            dpo_trainer.create_model_from_path = load

    @property
    def _moves(self) -> bool:
        """Whether training moves the reference itself: full fine-tuning without a second model."""
        return self.ref_model is None and not is_peft_model(self.model)

    def keep_references(self, folder: Path | None, others: Iterable[Path]) -> None:
        """Reads log-probs that were kept, and keeps what is computed; all at once where training
        moves the reference."""
        model = self.accelerator.unwrap_model(self.ref_model or self.model)
        # What runs in half precision under float32 weights has other log-probs; what shares a tree
        # with other rows has other last bits.
        key = (f"{model_key(model)} {self.accelerator.mixed_precision} {self.share} "
               f"{trees.VERSION}")
        self.cache = Cache(Path(folder or Path(self.args.output_dir) / "reference"), key)
        self.cache.read(others)
        if self.cache.others:
            self.accelerator.print(
                f"{self.cache.others} reference log-probs in {self.cache.folder} are those of "
                "another model, number format or order of rows: they are computed anew")
        self.data_collator.keyed = True
        self.add_callback(Keeper(self.cache, self.accelerator))
        if not self._moves:
            return
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {
            "evaluation": self.eval_dataset}
        for name, dataset in {"training": self.train_dataset, **evaluated}.items():
            if dataset is not None:
                self.refuse_stream(dataset)
                self._compute_all(dataset, name)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """What a checkpoint's steps computed is kept before it is whole: a run that goes on from it
        would compute that again beside other rows, to other last bits."""
        if self.cache is not None:
            self.cache.write()
            self.accelerator.wait_for_everyone()
        super()._save_checkpoint(*args, **kwargs)

    def refuse_stream(self, dataset: Any) -> None:
        """Raises ValueError for a stream whose reference cannot be computed before training."""
        if self.cache is not None and self._moves and isinstance(dataset, IterableDataset):
            raise ValueError("`precompute_ref_log_probs=True` is not supported with "
                             "IterableDataset where all weights are trained: turn it off, or "
                             "give a ref_model")

    def _compute_all(self, dataset: Any, name: str) -> None:
        batches = self._get_dataloader(
            dataset, name, self.args.precompute_ref_batch_size or self._train_batch_size)
        with progress.part(f"reference log-probs, {name}", len(batches), unit="batches") as advance:
            for batch in batches:
                with self.accelerator.autocast():
                    batch = self._inputs(self.model, self._prepare_inputs(batch))
                    self.reference_tokens(batch, batch["keys"])
                    if "damaged" in batch:
                        self.reference_tokens(batch["damaged"], batch["damaged"]["keys"])
                self.forget()
                advance(1)
        self.cache.write()
        self.accelerator.wait_for_everyone()
        self.cache.read()

    def references(self, inputs: dict[str, Any], keys: Sequence[str] | None
                   ) -> dict[str, torch.Tensor]:
        """ref_chosen_logps and ref_rejected_logps (B,), of each answer as it was kept first."""
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
        """log p of every sequence's answer tokens under the reference, as each was kept first.

        Raises ValueError where training has moved what is missing.
        """
        missing = keys is None or not self.cache.answers.keys() >= set(keys)
        if self._sharded:  # all processes run the model, or none
            flag = torch.tensor(int(missing), device=self.accelerator.device)
            missing = bool(self.accelerator.gather(flag).max())
        if not missing:
            return [self.cache.answers[k] for k in keys]
        if self._moves and self.state.global_step > 0:
            raise ValueError("Cannot compute reference log-probs for a dataset passed to "
                             "`evaluate()` after training has started: the reference was the model "
                             "itself; give these rows as eval_dataset when the trainer is made, or "
                             "give it a ref_model")
        without = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            bare = self.accelerator.unwrap_model(self.model)
            without = use_adapter(bare, adapter_name="ref" if "ref" in bare.peft_config else None)
        with torch.no_grad(), without, disable_gradient_checkpointing(
                self.model, self.args.gradient_checkpointing_kwargs):
            tokens = self.answer_tokens(self.ref_model or self.model, inputs)
        answers = [t[m].float().cpu() for t, m in zip(
            tokens, inputs["completion_mask"][:, 1:].bool(), strict=True)]
        if keys is None:
            return answers
        self.cache.add(dict(zip(keys, answers, strict=True)))
        # A run that goes on may find more kept than the one that was killed had here, and what was
        # computed first, beside other rows, has other last bits.
        return [self.cache.answers[k] for k in keys]
