"""The log-probs of several answers to one prompt: all in one pass over it, where the model allows
(`prefix`), or each in a pass of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bpo.models import mixing, prefix, trees
from bpo.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Weighed:
    """One answer under one prompt, float32 on the CPU.

    logprobs: (tokens,) log p(token | image, prompt, earlier tokens).
    state: (H,) mean over its tokens of the last hidden state that predicts each; None of a server.
    """

    logprobs: torch.Tensor
    state: torch.Tensor | None = None


Answers = Sequence[Sequence[Sequence[int]]]  # [b][k]: the token ids of an answer to prompt b
# (checkpoint, prompts (B, S) as `encoding.collate` gives them, answers) -> [b][k]
Scorer = Callable[[Checkpoint, dict[str, torch.Tensor], Answers], list[list[Weighed]]]


def weigh(checkpoint: Checkpoint, batch: dict[str, torch.Tensor], answers: Answers
          ) -> list[list[Weighed]]:
    """Every answer of every row, all answers of a row in one pass over its prompt; a batch beyond
    the decoder's window goes the unpacked way. Not exact for every family; see `choose`, which
    tries on the data at hand."""
    prompt = batch["input_ids"]
    reach = mixing.window(checkpoint.base)
    if reach is not None and reach < max(
            len(answer) + tokens for row, tokens in zip(
                answers, batch["attention_mask"].sum(1).tolist(), strict=True) for answer in row):
        return weigh_unpacked(checkpoint, batch, answers)
    begins = (prompt.shape[1] - batch["attention_mask"].sum(1)).tolist()
    rows, sequences = zip(*((b, answer) for b, row in enumerate(answers) for answer in row))
    longest = max(map(len, sequences))
    spans = [(begins[b], prompt.shape[1], prompt.shape[1] + len(answer))
             for b, answer in zip(rows, sequences, strict=True)]
    padded = {n: torch.nn.functional.pad(v[[*rows]], (0, longest), value=int(n == "attention_mask"))
              if v.shape == prompt.shape else v for n, v in batch.items()}
    padded["input_ids"][:, prompt.shape[1]:] = torch.tensor(
        [[*answer, *[0] * (longest - len(answer))] for answer in sequences],
        device=checkpoint.device)
    placed = trees.layout(padded["input_ids"], spans, rows,
                          rows=not prefix.in_use(checkpoint.base))
    placed = {n: v.to(checkpoint.device) if isinstance(v, torch.Tensor) else v
              for n, v in placed.items()}
    hidden = checkpoint.base.base_model(
        **prefix.inputs(checkpoint.base, placed, padded), use_cache=False).last_hidden_state
    slots = placed["slots"][placed["slots"] < len(placed["answers"])]  # answer by answer
    weighed = iter(_weighed(checkpoint, hidden.flatten(0, 1)[placed["answers"][slots]],
                            sequences))
    return [[next(weighed) for _ in row] for row in answers]


def weigh_unpacked(checkpoint: Checkpoint, batch: dict[str, torch.Tensor], answers: Answers
                   ) -> list[list[Weighed]]:
    """The same numbers with each answer in a pass of its own: right for all families, slower."""
    prompt = batch["input_ids"]
    out: list[list[Weighed]] = [[] for _ in answers]
    for k in range(max(map(len, answers))):
        # Rows with fewer answers repeat their last one, so that the images stay a whole batch.
        tokens = [a[min(k, len(a) - 1)] for a in answers]
        longest = max(map(len, tokens))
        inputs = {n: torch.nn.functional.pad(v, (0, longest)) if v.shape == prompt.shape else v
                  for n, v in batch.items()}
        inputs["input_ids"][:, prompt.shape[1]:] = checkpoint.tokenizer.pad_token_id
        for b, answer in enumerate(tokens):
            end = prompt.shape[1] + len(answer)
            inputs["input_ids"][b, prompt.shape[1]:end] = torch.tensor(
                answer, device=checkpoint.device)
            inputs["attention_mask"][b, prompt.shape[1]:end] = 1
        hidden = checkpoint.base.base_model(**inputs, use_cache=False).last_hidden_state
        hidden = hidden[:, prompt.shape[1] - 1:-1]
        for b, answer in enumerate(answers):
            if k < len(answer):
                out[b] += _weighed(checkpoint, hidden[b], [answer[k]])
    return out


def choose(checkpoint: Checkpoint, batch: dict[str, torch.Tensor], answers: Answers) -> Scorer:
    """`weigh` if it is exact for this model on this batch, else the unpacked way, said.

    The bound is what float rounding leaves: 1e-3 nats a token in float32, 0.1 in bfloat16.
    """
    bound = 1e-3 if checkpoint.base.dtype == torch.float32 else 0.1
    with mixing.watched(checkpoint.base) as reasons:
        plain = weigh_unpacked(checkpoint, batch, answers)

    def off() -> float:
        packed = weigh(checkpoint, batch, answers)
        return max((x.logprobs - y.logprobs).abs().max().item()
                   for row, other in zip(packed, plain, strict=True)
                   for x, y in zip(row, other, strict=True))

    why = mixing.why_not(checkpoint.base) or next(iter(reasons), "") or prefix.settle(
        [checkpoint.base], off, bound=bound, words="log-probs differ by {:.2g}")
    if not why:
        return weigh
    print(f"Answers cannot share their prompt's pass with this model ({why}): "
          "each gets a pass of its own, which is slower and right.")
    return weigh_unpacked


def _weighed(checkpoint: Checkpoint, hidden: torch.Tensor, answers: Sequence[Sequence[int]]
             ) -> list[Weighed]:
    """Answers from the hidden states that predict their tokens, end to end (only those go through
    the output layer)."""
    sizes = [len(a) for a in answers]
    hidden = hidden[:sum(sizes)]
    logits = checkpoint.base.get_output_embeddings()(hidden).float()
    targets = torch.tensor([t for a in answers for t in a], device=logits.device)
    logps = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0].cpu()
    return [Weighed(c, h.mean(0)) for c, h in zip(logps.split(sizes),
                                                  hidden.float().cpu().split(sizes), strict=True)]
