"""How a decoder mixes the tokens of a sequence: whether answers may share the pass over their
prompt (`prefix`), told from its layers and from the masks that it gives its attention.

A comparison of numbers alone does not tell: in bfloat16 what a wrong mask moves (4 %) is not far
from what rounding moves in a deep model.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def why_not(base: PreTrainedModel) -> str:
    """Why answers cannot share a prompt's pass, whatever the data; "" if nothing stands against it.
    """
    decoder = base.get_decoder()
    others = set(getattr(decoder.config, "layer_types", None) or ()) - ATTENTION
    # What Mamba and its kin carry along, and convolutions, would run from one answer into the next.
    if others or getattr(decoder, "_is_stateful", False) or any(
            isinstance(m, torch.nn.Conv1d) for m in decoder.modules()):
        kinds = " and ".join(sorted(others)) or "recurrence or convolution"
        return f"its decoder mixes tokens by {kinds}, not by attention alone"
    if getattr(decoder.config, "alibi", False) or (
            "position_ids" not in inspect.signature(base.forward).parameters):
        return "its decoder counts positions by itself"
    return ""


def window(base: PreTrainedModel) -> int | None:
    """The longest sequence, in tokens, of which every attention layer of the decoder sees all;
    None where they see all of any. Beyond it sequences must not be packed."""
    decoder = base.get_decoder()
    config, kinds = decoder.config, getattr(decoder.config, "layer_types", None)
    sizes = [getattr(m, "sliding_window", None) for m in decoder.modules()]
    if kinds is None and getattr(config, "use_sliding_window", True) or (
            kinds is not None and "sliding_attention" in kinds):
        sizes.append(getattr(config, "sliding_window", None))
    if kinds is not None and "chunked_attention" in kinds:
        sizes.append(getattr(config, "attention_chunk_size", None))
    return min((s for s in sizes if isinstance(s, int) and s > 0), default=None)


def shares_keys(config: PreTrainedConfig) -> bool:
    """Whether layers take keys and values from others: reentrant checkpointing recomputes each
    layer on copies, so that no gradient comes back through those."""
    return bool(getattr(config.get_text_config(), "num_kv_shared_layers", 0))


@contextmanager
def watched(base: PreTrainedModel) -> Iterator[list[str]]:
    """Collects how the attention of unpacked batches that run inside differs from a causal one over
    all tokens within the window."""
    reasons: list[str] = []
    reach = window(base)
    tokens: list[torch.Tensor] = []  # (N, S): 1 where there is a token, 0 at padding

    def begin(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens[:] = [kwargs["attention_mask"]]

    def look(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None:
            if not getattr(module, "is_causal", True):
                reasons.append("its attention looks ahead")
        elif mask.ndim == 4 and tokens and mask.shape[2:] == (tokens[0].shape[1],) * 2:
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            there = tokens[0].bool().to(mask.device)
            pairs = (there[:, :, None] & there[:, None, :])[:, None]
            behind = torch.ones(mask.shape[2:], dtype=torch.bool, device=mask.device).tril()
            near = behind if reach is None else behind.triu(1 - reach)
            if (seen & pairs & ~behind).any():
                reasons.append("its attention looks ahead within the prompt")
            elif (~seen & pairs & near).any():
                reasons.append("its attention leaves out tokens of the prompt")

    hooks = [base.base_model.register_forward_pre_hook(begin, with_kwargs=True)]
    hooks += [m.register_forward_pre_hook(look, with_kwargs=True)
              for m in base.get_decoder().modules()
              if hasattr(m, "layer_idx") and "attention" in type(m).__name__.lower()]
    try:
        yield reasons
    finally:
        for hook in hooks:
            hook.remove()
