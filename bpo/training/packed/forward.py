"""The forward pass of a model that reads packed batches, behind TRL's fused output layer."""

import functools
import types
from typing import Any

import torch
from transformers import PreTrainedModel

from bpo.models import prefix

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def read_packed(model: PreTrainedModel) -> dict[str, Any]:
    """Lets a model with TRL's fused output layer read batches with `packed`. Returns where a step's
    image features are held, so that policy and reference encode an image once."""
    inner = model.forward

    # Keep the signature: `generate` and the trainer look at it
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, packed: dict[str, Any] | None = None,
                **kwargs: Any) -> Any:
        if packed is None:
            return inner(*args, **kwargs)
        labels = kwargs.pop("labels").flatten()[packed["targets"]][None]

        def answers_alone(_: Any, __: Any, out: Any) -> Any:
            out.last_hidden_state = out.last_hidden_state.flatten(0, 1)[packed["answers"]][None]
            return out

        hook = self.base_model.register_forward_hook(answers_alone)
        try:
            out = inner(*args, **prefix.inputs(self, packed, kwargs), shift_labels=labels)
        finally:
            hook.remove()
        for name in FIELDS:
            if (values := out.get(name)) is not None:
                nothing = values.new_zeros(1)
                out[name] = torch.cat([values[0], nothing])[packed["slots"]]
        return out

    model.forward = types.MethodType(forward, model)
    return _share_features(model)


def _share_features(model: PreTrainedModel) -> dict[str, Any]:
    memo: dict[str, Any] = {}
    encode = getattr(model.base_model, "get_image_features", None)
    language = {id(w) for part in (model.get_decoder(), model.get_output_embeddings())
                for w in part.parameters()}
    moves = any(w.requires_grad and id(w) not in language for w in model.parameters())
    if encode is not None and not moves:
        @functools.wraps(encode)
        def encoded(pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if memo.get("pixels") is not pixel_values:
                memo.update(pixels=pixel_values, features=encode(pixel_values, *args, **kwargs))
            return memo["features"]

        model.base_model.get_image_features = encoded
    return memo
