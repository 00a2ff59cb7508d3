"""The packed step's self-check: one pair computed packed and unpacked, log-probs and gradients
compared, and one answer changed while the other is watched; where prompts share an image, also two
pairs in one tree, in which branches hang on branches.

A family whose attention or positions packing does not fit gives no error but wrong gradients. A
pair is enough, and no more memory than a step: what is compared is log p(chosen) - log p(rejected),
whose gradient is that of every preference loss but for a factor.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from trl.models.utils import disable_gradient_checkpointing

from bpo.models import mixing, prefix
from bpo.training.packed import collation

# What float rounding leaves between packed and unpacked, relative, in float32. A wrong position or
# a leak between branches moves the gradient by 0.9 % and more.
FLOAT32 = 1e-3
# In bfloat16 right packing shows 0.5 to 0.9 % in small models and more in deep ones: allowed is
# this much, or three times what moving the inputs in their last place does.
HALF = 0.01


class Computed(NamedTuple):
    """log p of all answer tokens, pair by pair, and the gradients of the weights."""

    logps: torch.Tensor
    gradients: list[torch.Tensor]


def try_rows(trainer: Any, rows: Sequence[dict[str, Any]],
             model: torch.nn.Module | None = None) -> None:
    """Tries the longest of some rows, if it is longer than any that was tried, and two that share a
    tree, if none were. Leaves the trainer unpacked where packing is wrong for its model, and says
    so; once it is, nothing more is tried. model: the wrapped one, where the weights are spread over
    processes."""
    collator = trainer.data_collator
    if not collator.packing:
        return
    rows = [{n: v for n, v in r.items() if n not in ("row", "damaged_images", "weight")}
            for r in rows]
    with _bare(collator):
        batch = collator(rows)
    length, number = collation.longest(batch)
    if length > (collator.window or math.inf) or collator.seen(batch, rows):
        return
    branching = [] if collator.branched else collation.mates(batch, number)
    rows = [rows[n] for n in dict.fromkeys([number, *branching])]
    with trainer.memory():
        why = choose(trainer, rows) if model is None else compare_logps(trainer, model, rows)
    collator.packing = not why
    collator.branched |= bool(branching)
    pictured = collation.pictured(rows)
    collator.tried[pictured] = max(length, collator.tried[pictured])
    if why:
        trainer.accelerator.print(f"The batches cannot be packed with this model ({why}): the run "
                                  "goes on unpacked, which is slower and right.")


def choose(trainer: Any, rows: Sequence[dict[str, Any]]) -> str:
    """Leaves the trainer's batches packed with branch attention, else with a dense mask: the first
    that agrees with unpacked on these pairs; why neither does, or empty. The adapters are as they
    were afterwards."""
    bases = trainer.bases
    with _tried(trainer), trainer.accelerator.autocast():
        with mixing.watched(trainer.base) as reasons:
            plain = _unpacked(trainer, rows)
        if reasons:
            return reasons[0]
        bound, still = FLOAT32, FLOAT32
        if (half := _half(trainer)) is not None:
            with _rounded_anew(trainer.base, half):
                moved = _unpacked(trainer, rows)
            bound, still = max(HALF, 3 * apart(plain, moved)), _gap(plain.logps, moved.logps)

        def off() -> float:
            trainer.data_collator.dense = not all(map(prefix.in_use, bases))
            batch = _batch(trainer, rows, packing=True)
            packed = _compute(trainer, batch)
            if _leak(trainer, batch) > still:
                raise ValueError("another answer's words move an answer's log-probs")
            return apart(plain, packed)

        return prefix.settle(bases, off, bound=bound,
                             words="its log-probs or gradients would be off by {:.1%}")


def compare_logps(trainer: Any, model: torch.nn.Module, rows: Sequence[dict[str, Any]]) -> str:
    """The check where no process holds all weights (FSDP, DeepSpeed): log-probs alone, through the
    wrapped model, on all processes at once. Why packing is wrong, or empty."""
    with _tried(trainer), torch.no_grad():
        with mixing.watched(trainer.base) as reasons:
            plain = trainer.answer_tokens(model, _batch(trainer, rows, packing=False))
        packed = trainer.answer_tokens(model, _batch(trainer, rows, packing=True))
    gap = torch.tensor(_gap(plain, packed), device=trainer.accelerator.device)
    off = trainer.accelerator.gather(gap).max().item()
    if reasons:
        return reasons[0]
    bound = FLOAT32 if _half(trainer) is None else 0.1  # nats a token
    return "" if off <= bound else f"log-probs would differ by {off:.2g}"


def apart(first: Computed, second: Computed) -> float:
    """The larger of the relative differences (L2) of log-probs and of gradients."""
    pairs = [(first.logps, second.logps)], list(zip(first.gradients, second.gradients, strict=True))
    distances = []
    for both in pairs:
        gap = sum((a - b).square().sum().item() for a, b in both)
        size = sum(a.square().sum().item() for a, _ in both)
        distances.append((gap / size) ** 0.5 if size else gap)
    return max(distances)


def _half(trainer: Any) -> torch.dtype | None:
    """The half-precision format that the trainer computes in, if it does."""
    if trainer.base.dtype != torch.float32:
        return trainer.base.dtype
    return torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else None


def _gap(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second).abs().max().item()


def _batch(trainer: Any, rows: Sequence[dict[str, Any]], *, packing: bool) -> dict[str, Any]:
    trainer.data_collator.packing = packing
    return trainer._prepare_inputs(trainer.data_collator(rows))


def _unpacked(trainer: Any, rows: Sequence[dict[str, Any]]) -> Computed:
    """Each pair in a batch of its own: no more memory than TRL's step of it."""
    parts = [_compute(trainer, _batch(trainer, [row], packing=False)) for row in rows]
    return Computed(torch.cat([p.logps for p in parts]), [
        sum(g) for g in zip(*(p.gradients for p in parts), strict=True)])


def _compute(trainer: Any, batch: dict[str, Any]) -> Computed:
    """Gradients that reach no weight: others may have been accumulated there, or wait to be shared
    with other processes."""
    how = trainer.args.gradient_checkpointing_kwargs or {}
    moving = [w for w in trainer.model.parameters() if w.requires_grad]
    with (disable_gradient_checkpointing(trainer.model, how) if how.get("use_reentrant")
          else nullcontext()):  # the reentrant kind knows backward() alone
        logps = trainer.answer_tokens(trainer.model, batch)
        chosen, rejected = logps.sum(1).chunk(2)
        gradients = torch.autograd.grad((chosen - rejected).sum(), moving, allow_unused=True)
    trainer.forget()
    answered = batch["completion_mask"][:, 1:].bool()
    pairs = [logps[n::len(logps) // 2][answered[n::len(logps) // 2]]
             for n in range(len(logps) // 2)]
    return Computed(torch.cat(pairs).detach().float(), [
        torch.zeros(()) if g is None else g.float().cpu() for g in gradients])


@torch.no_grad()
def _leak(trainer: Any, batch: dict[str, Any]) -> float:
    """How far answers' log-probs move, in nats, when those words of another one are changed that
    are its own: no other sequence has the place where they stand."""
    before = trainer.answer_tokens(trainer.model, batch)
    answered, places = batch["completion_mask"].bool(), batch["packed"]["places"]
    count, furthest = len(answered), 0.0
    for one in range(count):
        others = [n for n in range(count) if n != one]
        own = answered[one] & (places[one] >= 0) & ~torch.isin(places[one], places[others])
        other = (one + count // 2) % count
        words = batch["input_ids"][other][answered[other]]
        ids = batch["input_ids"].clone()
        ids[one, own] = words[torch.arange(int(own.sum()), device=words.device) % len(words)]
        after = trainer.answer_tokens(trainer.model, {**batch, "input_ids": ids})
        furthest = max(furthest, _gap(before[others], after[others]))
    trainer.forget()
    return furthest


@contextmanager
def _rounded_anew(base: torch.nn.Module, half: torch.dtype) -> Iterator[None]:
    """The model with its input embeddings moved by about one unit in the last place of `half`: what
    comes out differs as two right orders of the same sums do."""
    draw = torch.Generator().manual_seed(0)

    def move(_: torch.nn.Module, args: Sequence[Any], out: torch.Tensor) -> torch.Tensor:
        sign = torch.randint(0, 2, out.shape, generator=draw).to(out) * 2 - 1
        return out + out * sign * torch.finfo(half).eps / 2

    hook = base.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _bare(collator: Any) -> Iterator[None]:
    """The collator without what a check needs not: keys and damaged images."""
    settings = collator.keyed, collator.damaged
    collator.keyed, collator.damaged = False, False
    try:
        yield
    finally:
        collator.keyed, collator.damaged = settings


@contextmanager
def _tried(trainer: Any) -> Iterator[None]:
    """The trainer as in a step of which nothing stays: no dropout, and adapters that start at zero
    (LoRA's B) moved off it, since there half of the gradients would be zero."""
    model, training = trainer.model, trainer.model.training
    model.train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.eval()
    zero = [w for w in model.parameters() if w.requires_grad and not w.detach().any()]
    draw = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for w in zero:
                w.copy_(torch.randn(w.shape, generator=draw) * 0.02)
        with _bare(trainer.data_collator):
            yield
    finally:
        with torch.no_grad():
            for w in zero:
                w.zero_()
        model.train(training)


@torch.no_grad()
def not_finite(trainer: Any, model: torch.nn.Module, inputs: dict[str, Any]) -> Sequence[Any]:
    """The rows of a batch whose log-probs are no numbers; all where it is their sum. Each is
    computed alone, if it is known which they are: in a tree one spoils the others."""
    rows = inputs.get("row")
    with trainer.unpacked():
        batches = [inputs] if rows is None else (
            trainer.data_collator([trainer.train_dataset[r]]) for r in rows)
        tokens = [trainer.answer_tokens(model, trainer._prepare_inputs(b)) for b in batches]
    bad = [b for t in tokens for b in (~torch.isfinite(t)).any(1).view(2, -1).any(0).tolist()]
    rows = rows or [f"{i} of this batch" for i in range(len(bad))]
    return [r for r, wrong in zip(rows, bad, strict=True) if wrong] or rows


def lower(args: Any) -> str:
    """What to change when memory runs out."""
    lower = "max_length, which leaves out the longest rows"
    if args.per_device_train_batch_size > 1:
        lower = (f"per_device_train_batch_size (it is {args.per_device_train_batch_size}; raise "
                 f"gradient_accumulation_steps by as much), or {lower}")
    checkpointing = "" if args.gradient_checkpointing else " or set gradient_checkpointing"
    return f"the memory does not hold a step: lower {lower}{checkpointing}"
