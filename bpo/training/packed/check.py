"""The packed step's self-check: a batch computed packed and unpacked, loss and gradients compared.

A family whose attention or positions packing does not fit gives no error but wrong gradients, so
the first batch of every run is tried.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bpo.models import prefix

# What float rounding leaves between packed and unpacked, relative; a wrong position or a leak
# between branches moves the gradient by 0.9 % and more.
BOUNDS = {"float32": 1e-3, "half": 0.05}

LossAndGradients = tuple[float, list[torch.Tensor]]


def choose(trainer: Any, rows: Sequence[dict[str, Any]]) -> str:
    """Leaves the trainer's batches packed with branch attention, else with a dense mask: the first
    that agrees with unpacked on these rows, or on half of them where memory does not hold all; why
    neither does, or empty. The adapters are as they were afterwards."""
    half = trainer.args.bf16 or trainer.args.fp16 or trainer.base.dtype != torch.float32
    with _tried(trainer):
        try:
            plain = _gradients(trainer, rows, packing=False)
        except torch.OutOfMemoryError:
            if len(rows) < 2:
                raise
            return choose(trainer, rows[:len(rows) // 2])

        def off() -> float:
            trainer.data_collator.dense = not prefix.in_use(trainer.base)
            return apart(plain, _gradients(trainer, rows, packing=True))

        return prefix.settle(trainer.base, off, bound=BOUNDS["half" if half else "float32"],
                             words="its loss or gradients would be off by {:.1%}")


def compare_losses(trainer: Any, model: torch.nn.Module, rows: Sequence[dict[str, Any]]) -> str:
    """The check where no process holds all weights (FSDP, DeepSpeed): the loss alone, through the
    wrapped model, on all processes at once. Why packing is wrong, or empty."""
    losses = []
    with _tried(trainer), torch.no_grad():
        for packing in (False, True):
            trainer.data_collator.packing = packing
            batch = trainer._prepare_inputs(trainer.data_collator(rows))
            losses.append(trainer._compute_loss(model, batch, False).item())
    gap = torch.tensor(abs(losses[0] - losses[1]), device=trainer.accelerator.device)
    off = trainer.accelerator.gather(gap).max().item() / max(1.0, abs(losses[0]))
    return "" if off <= BOUNDS["half"] else f"its loss would be off by {off:.1%}"


def apart(first: LossAndGradients, second: LossAndGradients) -> float:
    """The larger of the relative differences of two losses and of their gradients (L2)."""
    gap = sum((a - b).square().sum().item() for a, b in zip(first[1], second[1], strict=True))
    size = sum(a.square().sum().item() for a in first[1])
    gradient = (gap / size) ** 0.5 if size else gap
    return max(abs(first[0] - second[0]) / max(1.0, abs(first[0])), gradient)


def _gradients(trainer: Any, rows: Sequence[dict[str, Any]], *, packing: bool
               ) -> LossAndGradients:
    trainer.data_collator.packing = packing
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    try:
        with trainer.accelerator.autocast():
            loss = trainer._compute_loss(trainer.model, inputs, False)
        loss.backward()
        return loss.item(), [torch.zeros(()) if w.grad is None else w.grad.float().cpu()
                             for w in trainer.model.parameters() if w.requires_grad]
    finally:
        trainer.model.zero_grad(set_to_none=True)


@contextmanager
def _tried(trainer: Any) -> Iterator[None]:
    """The trainer as in a step of which nothing stays: no dropout, no reference kept, and adapters
    that start at zero (LoRA's B) moved off it, since there half of the gradients would be zero."""
    model, training = trainer.model, trainer.model.training
    model.train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.eval()
    zero = [w for w in model.parameters() if w.requires_grad and not w.detach().any()]
    draw = torch.Generator().manual_seed(0)
    collator, metrics, tokens = trainer.data_collator, trainer._metrics, trainer._total_train_tokens
    trainer._metrics = {mode: defaultdict(list) for mode in metrics}
    keyed, collator.keyed = collator.keyed, False
    try:
        with torch.no_grad():
            for w in zero:
                w.copy_(torch.randn(w.shape, generator=draw) * 0.02)
        yield
    finally:
        with torch.no_grad():
            for w in zero:
                w.zero_()
        collator.keyed, trainer._metrics, trainer._total_train_tokens = keyed, metrics, tokens
        model.train(training)
