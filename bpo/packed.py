"""Several answers to one prompt in one forward pass: the prefix once, each answer a branch.

A row is [prompt without its last token | last prompt token + answer 1 | last prompt token +
answer 2 | ...]. Each branch restarts at the position of the last prompt token and sees the prefix
and itself, through a 4-D mask that transformers hands on untouched. Repeating the last prompt
token makes every answer an ordinary next-token chain.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bpo.models import Checkpoint


@dataclass(frozen=True)
class Weighed:
    """One answer under one prompt, float32 on the CPU.

    logprobs: (tokens,) log p(token | image, prompt, earlier tokens).
    state: (H,) mean over its tokens of the last hidden state that predicts each.
    """

    logprobs: torch.Tensor
    state: torch.Tensor


# (checkpoint, left-padded prompts, answers' token ids [b][k]) -> [b][k]
Scorer = Callable[..., list[list[Weighed]]]


def weigh(checkpoint: Checkpoint, batch: dict[str, torch.Tensor],
          answers: Sequence[Sequence[Sequence[int]]]) -> list[list[Weighed]]:
    """Every answer of every row, all answers of a row in one pass over its prompt.

    batch: left-padded prompts (B, S) as `encoding.collate` gives them.
    answers[b]: token ids of each answer to prompt b; rows may have different numbers of answers.
    Exact for models whose attention takes a plain 4-D mask and 1-D positions (LLaVA and its kin);
    see `choose`, which tries on the data at hand.
    """
    prompt, mask = batch["input_ids"], batch["attention_mask"].bool()
    rows = [_branches(prompt[b, -1].item(), answers[b]) for b in range(len(answers))]
    length = max(len(tokens) for tokens, _, _ in rows)
    count, start = prompt.shape[0], prompt.shape[1] - 1
    width = start + length
    ids = torch.full((count, width), checkpoint.tokenizer.pad_token_id)
    branch = torch.full((count, width), -1)
    offset = torch.zeros((count, width), dtype=torch.long)
    ids[:, :start] = prompt[:, :-1].cpu()
    branch[:, :start] = torch.where(mask[:, :-1].cpu(), 0, -1)
    for b, (tokens, numbers, steps) in enumerate(rows):
        ids[b, start:start + len(tokens)] = torch.tensor(tokens)
        branch[b, start:start + len(tokens)] = torch.tensor(numbers)
        offset[b, start:start + len(tokens)] = torch.tensor(steps)
    last = mask.sum(1).cpu() - 1  # position of the last prompt token
    position = torch.where(torch.arange(width) < start,
                           (branch == 0).cumsum(1) - 1, last[:, None] + offset).clamp_min(0)
    hidden = _hidden(checkpoint, batch, ids, position, _allowed(branch))
    return [_weighed(checkpoint, hidden[b, start:], answers[b]) for b in range(count)]


def weigh_unpacked(checkpoint: Checkpoint, batch: dict[str, torch.Tensor],
                   answers: Sequence[Sequence[Sequence[int]]]) -> list[list[Weighed]]:
    """The same numbers with each answer in a pass of its own: right for all families, slower."""
    out: list[list[Weighed]] = [[] for _ in answers]
    for k in range(max(map(len, answers))):
        # Rows with fewer answers repeat their last one, so that the images stay a whole batch.
        tokens = [a[min(k, len(a) - 1)] for a in answers]
        longest = max(map(len, tokens))
        tail = torch.full((len(tokens), longest), checkpoint.tokenizer.pad_token_id)
        seen = torch.zeros_like(tail)
        for b, answer in enumerate(tokens):
            tail[b, :len(answer)], seen[b, :len(answer)] = torch.tensor(answer), 1
        ids = torch.cat([batch["input_ids"], tail.to(checkpoint.device)], dim=1)
        mask = torch.cat([batch["attention_mask"], seen.to(checkpoint.device)], dim=1)
        others = {n: torch.nn.functional.pad(v, (0, longest)) if v.shape == batch["input_ids"].shape
                  else v for n, v in batch.items() if n not in ("input_ids", "attention_mask")}
        hidden = checkpoint.base.base_model(
            input_ids=ids, attention_mask=mask, use_cache=False, **others).last_hidden_state
        hidden = hidden[:, batch["input_ids"].shape[1] - 1:-1]
        for b, answer in enumerate(answers):
            if k < len(answer):
                out[b] += _weighed(checkpoint, hidden[b], [answer[k]])
    return out


def choose(checkpoint: Checkpoint, batch: dict[str, torch.Tensor],
           answers: Sequence[Sequence[Sequence[int]]]) -> Scorer:
    """`weigh` if it is exact for this model on this batch, else the unpacked way, said.

    The bound is what float rounding leaves: 1e-3 nats a token in float32, 0.1 in bfloat16.
    """
    more = [n for n, v in batch.items() if n not in ("input_ids", "attention_mask")
            and v.shape == batch["input_ids"].shape]
    if more:  # such as the kinds of tokens that 3-D positions are counted from
        print(f"Answers do not share their prompt's pass with this model (its prompts come with "
              f"{', '.join(more)}): each gets a pass of its own, which is slower and right.")
        return weigh_unpacked
    bound = 1e-3 if checkpoint.base.dtype == torch.float32 else 0.1
    plain = weigh_unpacked(checkpoint, batch, answers)
    try:
        packed = weigh(checkpoint, batch, answers)
        off = max((x.logprobs - y.logprobs).abs().max().item()
                  for row, other in zip(packed, plain, strict=True)
                  for x, y in zip(row, other, strict=True))
        if off <= bound:
            return weigh
        why = f"log-probs differ by {off:.2g}"
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        why = str(error).splitlines()[0]
    print(f"Answers cannot share their prompt's pass with this model ({why}): "
          "each gets a pass of its own, which is slower and right.")
    return weigh_unpacked


def _branches(last: int, answers: Sequence[Sequence[int]]
              ) -> tuple[list[int], list[int], list[int]]:
    """The tokens behind the prefix, the branch (1, 2, ...) of each, and its place in the branch."""
    tokens, numbers, steps = [], [], []
    for number, answer in enumerate(answers, start=1):
        tokens += [last, *answer[:-1]]  # the last token of an answer predicts nothing that counts
        numbers += [number] * len(answer)
        steps += range(len(answer))
    return tokens, numbers, steps


def _allowed(branch: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, S) bool: a position sees what is before it in the prefix (0) or its own branch.

    Padding (-1) sees itself alone, so that no row of the softmax is empty.
    """
    size = branch.shape[1]
    earlier = torch.ones(size, size, dtype=torch.bool).tril()
    query, key = branch[:, :, None], branch[:, None, :]
    seen = earlier & ((key == 0) | (key == query)) & (key >= 0) & (query >= 0)
    return (seen | torch.eye(size, dtype=torch.bool))[:, None]


def _hidden(checkpoint: Checkpoint, batch: dict[str, torch.Tensor], ids: torch.Tensor,
            position: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Last hidden states (B, S, H) of packed rows."""
    dtype, device = checkpoint.base.dtype, checkpoint.device
    # A float mask is right under every attention implementation; eager misreads a bool one.
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
    others = {n: v for n, v in batch.items() if n not in ("input_ids", "attention_mask")}
    return checkpoint.base.base_model(
        input_ids=ids.to(device), attention_mask=mask.to(device),
        position_ids=position.to(device), use_cache=False, **others).last_hidden_state


def _weighed(checkpoint: Checkpoint, hidden: torch.Tensor,
             answers: Sequence[Sequence[int]]) -> list[Weighed]:
    """A row's answers from the hidden states behind the prefix (only those positions go through the
    output layer)."""
    sizes = [len(a) for a in answers]
    hidden = hidden[:sum(sizes)]
    logits = checkpoint.base.get_output_embeddings()(hidden).float()
    targets = torch.tensor([t for a in answers for t in a], device=logits.device)
    chains = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0].cpu()
    return [Weighed(c, h.mean(0)) for c, h in zip(chains.split(sizes),
                                                  hidden.float().cpu().split(sizes), strict=True)]
