"""The log-probs of several answers to one prompt: all in one pass over it, where the model allows
(`branches`), or each in a pass of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bpo.models import prefix
from bpo.models.checkpoint import Checkpoint


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
    Not exact for every family; see `choose`, which tries on the data at hand.
    """
    prompt, longest = batch["input_ids"], max(len(a) for row in answers for a in row)
    begins = (prompt.shape[1] - batch["attention_mask"].sum(1)).tolist()
    rows, spans, owners, tails = [], [], [], []
    for b, mine in enumerate(answers):
        for k, answer in enumerate(mine):
            rows.append(b)
            owners.append((b, k))
            spans.append((begins[b], prompt.shape[1], prompt.shape[1] + len(answer)))
            tails.append([*answer, *[0] * (longest - len(answer))])
    width = prompt.shape[1] + longest
    placed = prefix.layout(spans, owners, width=width,
                           rows=not prefix.in_use(checkpoint.base))
    placed = {n: v.to(checkpoint.device) if isinstance(v, torch.Tensor) else v
              for n, v in placed.items()}
    tails = torch.tensor(tails, device=checkpoint.device)
    padded = {n: torch.nn.functional.pad(v[rows], (0, longest), value=int(n == "attention_mask"))
              if v.shape == prompt.shape else v for n, v in batch.items()}
    padded["input_ids"][:, prompt.shape[1]:] = tails
    hidden = checkpoint.base.base_model(
        **prefix.inputs(checkpoint.base, placed, padded), use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1)[placed["answers"]]
    weighed = iter(_weighed(checkpoint, hidden, [a for row in answers for a in row]))
    return [[next(weighed) for _ in row] for row in answers]


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
    bound = 1e-3 if checkpoint.base.dtype == torch.float32 else 0.1
    plain = weigh_unpacked(checkpoint, batch, answers)

    def off() -> float:
        packed = weigh(checkpoint, batch, answers)
        return max((x.logprobs - y.logprobs).abs().max().item()
                   for row, other in zip(packed, plain, strict=True)
                   for x, y in zip(row, other, strict=True))

    why = prefix.settle(checkpoint.base, off, bound=bound, words="log-probs differ by {:.2g}")
    if not why:
        return weigh
    print(f"Answers cannot share their prompt's pass with this model ({why}): "
          "each gets a pass of its own, which is slower and right.")
    return weigh_unpacked


def _weighed(checkpoint: Checkpoint, hidden: torch.Tensor,
             answers: Sequence[Sequence[int]]) -> list[Weighed]:
    """Answers from the hidden states that predict their tokens, end to end (only those go through
    the output layer)."""
    sizes = [len(a) for a in answers]
    hidden = hidden[:sum(sizes)]
    logits = checkpoint.base.get_output_embeddings()(hidden).float()
    targets = torch.tensor([t for a in answers for t in a], device=logits.device)
    chains = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0].cpu()
    return [Weighed(c, h.mean(0)) for c, h in zip(chains.split(sizes),
                                                  hidden.float().cpu().split(sizes), strict=True)]
