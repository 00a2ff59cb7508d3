"""Sequences that begin alike in one row (`trees`): how a model is called with it.

Two ways to keep branches apart: branch attention, where each branch's queries meet only the keys
that they may see, and a dense 4-D mask, which any attention takes that honours one. transformers
hands either on untouched. Neither is right for every family (Gemma 3 puts a mask of its own over an
image's tokens): who packs asks `mixing` and compares with the unpacked way first.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bpo.models import trees
from bpo.study import environment

ATTENTION = "branches"  # the name that branch attention has among transformers' attentions
REPLACED = ("sdpa", "flash_attention_2", "flash_attention_3")  # what it can stand in for


def inputs(base: PreTrainedModel, placed: Mapping[str, Any],
           padded: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model is called with to read packed rows.

    padded: the padded layout, input_ids and attention_mask (N, S), whatever else has a value a
    token, and images of the trees (each once, in their order) as the processor made them.
    """
    ids, out = padded["input_ids"], dict(padded)
    for name, values in padded.items():
        if isinstance(values, torch.Tensor) and values.shape == ids.shape:
            moved = values.flatten()[placed["source"]]
            out[name] = moved.masked_fill(~placed["alive"], 0)
    out["position_ids"] = _positions(base, placed, padded)
    if in_use(base):
        # The table itself, where a 4-D mask would be. It stays on the CPU: it is read by hand.
        out["attention_mask"] = trees.tensor(placed["table"])
    else:  # a float mask is right under every attention; eager attention misreads a bool one
        hidden = ~trees.dense(placed).to(ids.device)
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


def attend(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
           attention_mask: torch.Tensor | None, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """Branch attention behind transformers' attention interface: no mask over all pairs of tokens.

    query, key, value (R, heads, W, d); a table (`trees.tensor`) for a mask, else the call is plain
    SDPA's. One call of flash attention over variable lengths where `why_masked` has nothing against
    it; else two a tree: its first sequence causally, and all that branches off under one mask.
    Raises ValueError where a sliding window would cut a branch off from its begin.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    table, window = trees.read(attention_mask), kwargs.get("sliding_window")
    if window and max(map(trees.path, table)) > window:
        raise ValueError(f"a sliding window of {window} tokens cuts branches off")
    why = why_masked(query, kwargs.get("dropout", 0.0))
    environment.attention.add(f"{ATTENTION} by {f'mask: {why}' if why else 'varlen_attn'}")
    if not why:
        return varlen(query, key, value, table, kwargs.get("scaling")), None
    rows: list[list[torch.Tensor]] = [[] for _ in query]
    for row, begin, middle, end, mask in trees.masks(table, query.device, query.dtype):
        for first, last, seen in ((begin, middle, None), (middle, end, mask)):
            if first < last:
                rows[row].append(sdpa_attention_forward(
                    module, query[row:row + 1, :, first:last], key[row:row + 1, :, begin:last],
                    value[row:row + 1, :, begin:last], seen, **{**kwargs, "is_causal": True})[0])
    out = [torch.cat(parts, dim=1) for parts in rows]
    return torch.cat([torch.nn.functional.pad(o, (0, 0, 0, 0, 0, query.shape[2] - o.shape[1]))
                      for o in out]), None


def why_masked(query: torch.Tensor, dropout: float = 0.0) -> str:
    """Why flash attention over variable lengths cannot take a call; "" if it can."""
    if not query.is_cuda:
        return f"no CUDA but {query.device.type}"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "the GPU is older than Ampere"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"numbers are {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] > 256 or query.shape[-1] % 8:
        return f"heads are {query.shape[-1]} wide"
    return "attention has dropout" if dropout else "several rows" if len(query) > 1 else ""


def varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: trees.Table,
           scale: float | None) -> torch.Tensor:
    """(1, W, heads, d): branch attention of a row in one call, to which each branch is a sequence
    of its own, with the keys of its path copied for it."""
    ranges = trees.ranges(table, query.device)
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    return varlen_attn(queries.contiguous(), keys[ranges.keys], values[ranges.keys],
                       *ranges[1:], scale=scale, window_size=(-1, 0),
                       enable_gqa=keys.shape[1] != queries.shape[1])[None]


def in_use(base: PreTrainedModel) -> bool:
    """Whether the language model has branch attention."""
    return base.get_decoder().config._attn_implementation == ATTENTION


def use_attention(base: PreTrainedModel) -> None:
    """Gives the language model branch attention, if it runs on one of `REPLACED`.

    Calls without a table are SDPA's, so it may stay: a checkpointed layer is computed again in the
    backward pass and must then find the same attention.
    """
    decoder = base.get_decoder()
    if decoder.config._attn_implementation in REPLACED:
        AttentionInterface.register(ATTENTION, attend)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        if not hasattr(decoder, "attention_before"):
            decoder.attention_before = decoder.config._attn_implementation
        decoder.set_attn_implementation(ATTENTION)


def use_mask(base: PreTrainedModel) -> None:
    """Takes branch attention away again: packed rows come with a dense mask, which flash attention
    would not take."""
    if in_use(base):
        base.get_decoder().set_attn_implementation("sdpa")


def use_none(base: PreTrainedModel) -> None:
    """Gives the language model back the attention that it was loaded with."""
    decoder = base.get_decoder()
    if hasattr(decoder, "attention_before"):
        decoder.set_attn_implementation(decoder.attention_before)


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
    for base in bases:
        use_none(base)
    return why
