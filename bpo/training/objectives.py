"""Preference objectives beyond TRL's own, each a name in `loss_type`, on log-probs in its layout.

With h_w = log pi(y_w | m, x) - log pi_ref(y_w | m, x) for the chosen answer, h_l for the rejected
one, image m, damaged image m':

dpop    -log sigma(beta (h_w - h_l - LAMBDA max(0, -h_w)))          DPO-Positive, eq. 3, 2402.13228
anchor  -log sigma(beta h_w)                                        mDPO's anchor, 2406.11839
mdpo    DPO + -log sigma(beta (h_w - h_w(m'))) + anchor             mDPO, 2406.11839
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.functional import logsigmoid

NAMES = ("dpop", "anchor", "mdpo")
LAMBDA = 50.0  # of DPO-Positive: the paper's setting


def split(trainer: Any) -> list[tuple[str, float]]:
    """Takes the names that are not TRL's out of the trainer's losses: (name, weight) of each."""
    losses = list(zip(trainer.loss_types, trainer.loss_weights, strict=True))
    own = [(n, w) for n, w in losses if n in NAMES]
    if own and (trainer.ld_alpha is not None or trainer.f_divergence_type != "reverse_kl"):
        raise ValueError(f"{own[0][0]} goes with neither ld_alpha nor another f-divergence")
    trainer.loss_types = [n for n, _ in losses if n not in NAMES]
    trainer.loss_weights = [w for n, w in losses if n not in NAMES]
    return own


def damages(losses: Iterable[tuple[str, float]]) -> bool:
    """Whether one of the objectives compares the image with a damaged one."""
    return any(n == "mdpo" for n, _ in losses)


def pair_losses(name: str, *, beta: float, chosen: torch.Tensor, rejected: torch.Tensor,
                damaged: torch.Tensor | None = None) -> torch.Tensor:
    """(B,) losses of pairs from their log-ratios to the reference (B,), nats.

    damaged: the chosen answer's log-ratio with the damaged image.
    """
    if name == "dpop":
        return -logsigmoid(beta * (chosen - rejected - LAMBDA * (-chosen).clamp_min(0)))
    anchor = -logsigmoid(beta * chosen)
    if name == "anchor":
        return anchor
    return -logsigmoid(beta * (chosen - rejected)) - logsigmoid(beta * (chosen - damaged)) + anchor


def loss(trainer: Any, model: torch.nn.Module, inputs: dict[str, Any], tokens: torch.Tensor,
         damaged: dict[str, Any] | None) -> torch.Tensor:
    """The weighted sum of the trainer's own objectives, each the mean over the batch's pairs.

    tokens (2B, S - 1): the policy's log p of every answer token. damaged: the batch of the chosen
    answers with damaged images, in TRL's layout.
    """
    chosen, rejected = tokens[:, -inputs["completion_mask"].shape[1] + 1:].sum(1).chunk(2)
    ratios = {"chosen": chosen - inputs["ref_chosen_logps"],
              "rejected": rejected - inputs["ref_rejected_logps"]}
    if damaged is not None:
        keys = damaged.get("keys")
        reference = torch.stack([t.sum() for t in trainer.reference_tokens(damaged, keys)])
        now = trainer.answer_tokens(model, damaged).sum(1)
        ratios["damaged"] = (now - reference.to(now.device)).chunk(2)[0]
        mode = "train" if trainer.model.training else "eval"
        mean = trainer.accelerator.gather(ratios["damaged"].detach()).mean().item()
        trainer._metrics[mode]["rewards/damaged"].append(trainer.beta * mean)
    return sum(w * pair_losses(n, beta=trainer.beta, **ratios).mean()
               for n, w in trainer.own_losses)
