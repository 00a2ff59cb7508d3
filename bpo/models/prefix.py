"""Sequences that begin alike in one row: the common prefix once, each continuation a branch of it.

A row is [prompt without its last token | last prompt token + answer 1 | last prompt token +
answer 2 | ...]. Each branch restarts at the position of the last prompt token and sees the prefix
and itself. Repeating the last prompt token makes every answer an ordinary next-token chain, and the
last token of an answer, which predicts nothing that counts, is left out.

Two ways to keep branches apart: branch attention, where each branch's queries meet only the keys
that they may see, and a dense 4-D mask, which any attention takes that honours one. transformers
hands either on untouched. Neither is right for every family (Gemma 3 puts a mask of its own over an
image's tokens): who packs asks `mixing` and compares with the unpacked way first.
"""

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bpo.study import environment

ATTENTION = "branches"  # the name that branch attention has among transformers' attentions

Span = tuple[int, int, int]  # columns of a sequence: its begin, the end of its prompt, its end


def layout(spans: Sequence[Span], owners: Sequence[tuple[int, Hashable]], *, width: int,
           rows: bool = False) -> dict[str, Any]:
    """Where every token of N padded sequences goes when they are packed.

    spans[n]: the columns of sequence n in the padded (N, width) layout.
    owners[n]: its group (0, 1, ... in order of appearance; the sequences of a group have the same
    prompt) and a name for its answer (equal names in a group: equal answers, computed once).
    rows: every group in a row of its own, padded, for a dense mask; else all in one row, unpadded.

    Returns index tensors, all into flattened layouts:
    source (R, W): the padded token that stands at each packed place.
    anchor, step (R, W): its position is that of the padded token `anchor` plus `step`.
    alive (R, W): False at padding.
    first (G,): the first sequence of each group. answers (M,): the packed places that predict an
    answer's token. targets (M,): the padded tokens that they predict.
    slots (N, width - 1): for every padded place the entry among the M that predicts its next token,
    or M where none does.
    table: a tuple a branch, (row, begin and end of its prefix, begin and end of the branch).
    """
    groups: dict[int, dict[Hashable, list[int]]] = {}
    for n, (group, name) in enumerate(owners):
        groups.setdefault(group, {}).setdefault(name, []).append(n)
    # The column that predicts an answer's first token: its prompt's last, if there is a prompt.
    lasts = [max(prompt - 1, begin) for begin, prompt, _ in spans]
    packed: list[list[tuple[int, int, int]]] = []  # of each row (source, anchor, step)
    answers, targets, table = [], [], []  # answers as (row, column)
    slots = torch.full((len(spans), max(width - 1, 0)), -1)
    for branches in groups.values():
        if rows or not packed:
            packed.append([])
        row, start = packed[-1], len(packed[-1])
        head = next(iter(branches.values()))[0]
        row += [(head * width + c, head * width + c, 0) for c in range(spans[head][0], lasts[head])]
        prefix = len(row)
        for members in branches.values():
            n, at = members[0], len(row)
            length = max(spans[n][2] - 1 - lasts[n], 0)
            row += [(n * width + lasts[n] + i, head * width + lasts[head], i)
                    for i in range(length)]
            if length or not table or table[-1][1] != start:  # a branch of nothing is none
                table.append((len(packed) - 1, start, prefix, at, at + length))
            for m in members:
                slots[m, lasts[m]:lasts[m] + length] = torch.arange(length) + len(answers)
            answers += [(len(packed) - 1, at + i) for i in range(length)]
            targets += [n * width + lasts[n] + 1 + i for i in range(length)]
    cells = pad_sequence([torch.tensor(row, dtype=torch.long).view(-1, 3) for row in packed],
                         batch_first=True)
    longest = cells.shape[1]
    source, anchor, step = cells.unbind(-1)
    return {"source": source, "anchor": anchor, "step": step, "table": table,
            "alive": torch.arange(longest) < torch.tensor([len(r) for r in packed])[:, None],
            "first": torch.tensor([next(iter(b.values()))[0] for b in groups.values()]),
            "answers": torch.tensor([r * longest + c for r, c in answers], dtype=torch.long),
            "targets": torch.tensor(targets, dtype=torch.long),
            "slots": torch.where(slots < 0, len(answers), slots)}


def inputs(base: PreTrainedModel, placed: Mapping[str, Any],
           padded: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model is called with to read packed rows.

    padded: the padded layout, input_ids and attention_mask (N, S), whatever else has a value a
    token, and images of the groups (each once, in their order) as the processor made them.
    """
    ids, out = padded["input_ids"], dict(padded)
    for name, values in padded.items():
        if isinstance(values, torch.Tensor) and values.shape == ids.shape:
            moved = values.flatten()[placed["source"]]
            out[name] = moved.masked_fill(~placed["alive"], 0)
    out["position_ids"] = _positions(base, placed, padded)
    if in_use(base):
        environment.attention.add(ATTENTION)
        # The table itself, where a 4-D mask would be. It stays on the CPU: it is read by hand.
        out["attention_mask"] = torch.tensor(placed["table"])[None, None]
    else:  # a float mask is right under every attention; eager attention misreads a bool one
        hidden = ~dense(placed).to(ids.device)
        out["attention_mask"] = torch.zeros_like(hidden, dtype=base.dtype).masked_fill_(
            hidden, torch.finfo(base.dtype).min)
    return out


def _positions(base: PreTrainedModel, placed: Mapping[str, Any],
               padded: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(R, W), or (3, R, W) for a model that counts positions in time, height and width."""
    ids, mask = padded["input_ids"], padded["attention_mask"]
    where, width = placed["first"], ids.shape[1]
    positions = (mask[where].cumsum(1) - 1).clamp_min(0)[None]
    index = getattr(base.base_model, "get_rope_index", None)
    if index is not None and padded.get("image_grid_thw") is not None:
        names = inspect.signature(index).parameters
        positions, _ = index(**{
            n: v[where] if isinstance(v, torch.Tensor) and v.shape == ids.shape else v
            for n, v in padded.items() if n in names and v is not None})
    # Rows of `first` lie closer together than the padded ones: sequence n is number rank[n] there.
    rank = torch.zeros(len(ids), dtype=torch.long, device=where.device)
    rank[where] = torch.arange(len(where), device=where.device)
    anchor = rank[placed["anchor"] // width] * width + placed["anchor"] % width
    positions = positions.flatten(1)[:, anchor] + placed["step"]
    return positions if len(positions) > 1 else positions[0]


def dense(placed: Mapping[str, Any]) -> torch.Tensor:
    """(R, 1, W, W) bool: what each packed place may see. Padding sees itself alone, so that no row
    of the softmax is empty."""
    count, width = placed["alive"].shape
    seen = torch.eye(width, dtype=torch.bool).repeat(count, 1, 1)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    for row, begin, prefix, start, end in placed["table"]:
        seen[row, begin:prefix, begin:prefix] = causal[begin:prefix, begin:prefix]
        seen[row, start:end, begin:prefix] = True
        seen[row, start:end, start:end] = causal[start:end, start:end]
    return seen[:, None]


def attend(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
           attention_mask: torch.Tensor | None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Branch attention behind transformers' attention interface: no mask over all pairs of tokens.

    query, key, value (R, heads, W, d); a table (1, 1, branches, 5) of integers for a mask, else the
    call is plain SDPA's. A group's prefix and first branch are one causal call; each other branch's
    queries meet [prefix, own keys]. Raises ValueError where a sliding window would cut a branch
    from its prefix.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows: list[list[torch.Tensor]] = [[] for _ in query]
    window = kwargs.get("sliding_window")
    for r, begin, prefix, start, end in attention_mask[0, 0].tolist():
        if window and prefix - begin + end - start > window:
            raise ValueError(f"a sliding window of {window} tokens cuts branches off")
        first, mask = begin, None
        keys, values = (x[r:r + 1, :, begin:end] for x in (key, value))
        if start != prefix:
            first = start
            keys, values = (torch.cat([x[r:r + 1, :, begin:prefix], x[r:r + 1, :, start:end]],
                                      dim=2) for x in (key, value))
            mask = torch.ones(end - start, keys.shape[2], dtype=torch.bool,
                              device=query.device).tril(prefix - begin)[None, None]
        if first < end:
            rows[r].append(sdpa_attention_forward(
                module, query[r:r + 1, :, first:end], keys, values, mask,
                **{**kwargs, "is_causal": True})[0])
    out = [torch.cat(parts, dim=1) for parts in rows]
    return torch.cat([torch.nn.functional.pad(o, (0, 0, 0, 0, 0, query.shape[2] - o.shape[1]))
                      for o in out]), None


def in_use(base: PreTrainedModel) -> bool:
    """Whether the language model has branch attention."""
    return base.get_decoder().config._attn_implementation == ATTENTION


def use_attention(base: PreTrainedModel) -> None:
    """Gives the language model branch attention, if it runs on SDPA.

    Calls without a table are SDPA's as before, so it may stay: a checkpointed layer is computed
    again in the backward pass and must then find the same attention.
    """
    decoder = base.get_decoder()
    if decoder.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, attend)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        decoder.set_attn_implementation(ATTENTION)


def use_mask(base: PreTrainedModel) -> None:
    """Takes branch attention away again: packed rows come with a dense mask."""
    if in_use(base):
        base.get_decoder().set_attn_implementation("sdpa")


def settle(bases: Sequence[PreTrainedModel], off: Callable[[], float], *, bound: float, words: str
           ) -> str:
    """Leaves the models with branch attention, else with the dense mask: the first with which what
    `off` computes packed is at most `bound` off. Why neither is, or empty.

    bases: the model, and its reference where that is another one. words: says how far off it is, a
    format of one number.
    """
    why = ""
    for prepare in (use_attention, use_mask):
        for base in bases:
            prepare(base)
        try:
            gap = off()
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            why = str(error).splitlines()[0]
            continue
        if gap <= bound:
            return ""
        why = words.format(gap)
    return why
