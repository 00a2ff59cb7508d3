"""DPO trainers in small."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from bpo.models import checkpoint as checkpoints
from bpo.models.checkpoint import Checkpoint


def dpo_trainer(kind: type[DPOTrainer], checkpoint: Checkpoint, rows: Dataset, out: Any, *,
                own: dict[str, Any] | None = None, moved: int = 1, adapters: bool = True,
                **settings: Any) -> DPOTrainer:
    """A trainer whose adapters do not start at zero but at a draw seeded by `moved`; or which
    trains all weights. own: what the packed one alone takes; settings: TRL's."""
    args = DPOConfig(str(out), **{**dict(
        use_cpu=True, bf16=False, report_to="none", max_length=None, save_strategy="no",
        per_device_train_batch_size=4, logging_steps=1, disable_tqdm=True, learning_rate=1e-3,
        gradient_checkpointing=False), **settings})
    peft = {"peft_config": checkpoints.adapter_config(
        checkpoint.model, rank=4, alpha=8, dropout=0.0)} if adapters else {}
    trainer = kind(checkpoint.model, args=args, train_dataset=rows,
                   processing_class=checkpoint.processor, **{**(own or {}), **peft})
    draw = torch.Generator().manual_seed(moved)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.05)
    return trainer


def peak(work: Callable[[], object]) -> int:
    """Bytes at the worst moment of a work beyond those in use before it: all that torch's allocator
    hands out and takes back, as its profiler records it, inside operations too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        work()
    used = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak
