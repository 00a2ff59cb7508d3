"""Preference objectives, a registry: one entry in OBJECTIVES adds a name to `loss`.

With h(y | m) = log pi(y | m, x) - log pi_ref(y | m, x), the log-ratio of an answer y to question x
about image m: h_w of the chosen answer, h_l of the rejected one, h_w' of the chosen one with a
damaged image. TRL computes its own objectives; those with a function here are added to them.
Parameters are checked against the names here, so this module loads without torch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

LAMBDA = 50.0  # of DPO-Positive: the paper's setting


class LogRatios(NamedTuple):
    """h_w, h_l and h_w' of a batch of B pairs, (B,) each, nats. nll: -log pi(y_w | m, x) over the
    batch's mean number of tokens of a chosen answer."""

    chosen: "Tensor"
    rejected: "Tensor"
    damaged: "Tensor | None" = None
    nll: "Tensor | None" = None


@dataclass(frozen=True)
class Objective:
    """A name in `loss`. meaning: one line for people. function: (LogRatios, beta) -> (B,) losses of
    the pairs; None: TRL computes it. damaged: whether it wants h_w'. weighed: the function where
    pairs have weights, of those that TRL computes."""

    name: str
    meaning: str
    function: "Callable[[LogRatios, float], Tensor] | None" = None
    damaged: bool = False
    weighed: "Callable[[LogRatios, float], Tensor] | None" = None


def dpo(h: LogRatios, beta: float) -> "Tensor":
    """Direct Preference Optimization, which TRL calls sigmoid: (B,) losses from (B,) log-ratios."""
    return -_log_sigmoid(beta * (h.chosen - h.rejected))  # arXiv 2305.18290, eq. 7


def dpop(h: LogRatios, beta: float) -> "Tensor":
    """DPO-Positive: (B,) losses; a chosen answer less likely than under the reference costs more.
    """
    lost = (-h.chosen).clamp_min(0)
    return -_log_sigmoid(beta * (h.chosen - h.rejected - LAMBDA * lost))  # arXiv 2402.13228, eq. 3


def anchor(h: LogRatios, beta: float) -> "Tensor":
    """mDPO's anchor: (B,) losses that ask for chosen answers likelier than under the reference."""
    return -_log_sigmoid(beta * h.chosen)  # arXiv 2406.11839


def mdpo(h: LogRatios, beta: float) -> "Tensor":
    """mDPO: (B,) losses, DPO between answers, DPO between images and the anchor."""
    images = LogRatios(h.chosen, h.damaged)
    return dpo(h, beta) + dpo(images, beta) + anchor(h, beta)  # arXiv 2406.11839


def sft(h: LogRatios, beta: float) -> "Tensor":
    """The chosen answer's negative log-likelihood: (B,) losses whose mean is one over tokens."""
    return h.nll


def _log_sigmoid(x: "Tensor") -> "Tensor":
    from torch.nn.functional import logsigmoid  # here: names are read without torch

    return logsigmoid(x)


OBJECTIVES = {o.name: o for o in (
    Objective("sigmoid", "−log σ(β (h_w − h_l)): DPO, the paper's objective, "
                         "arXiv 2305.18290, eq. 7", weighed=dpo),
    Objective("sft", "−log π(y_w | m, x), a mean over tokens: the likelihood of the chosen answer",
              weighed=sft),
    Objective("dpop", "−log σ(β (h_w − h_l − 50 max(0, −h_w))): DPO-Positive, "
                      "arXiv 2402.13228, eq. 3", dpop),
    Objective("anchor", "−log σ(β h_w): mDPO's anchor, arXiv 2406.11839", anchor),
    Objective("mdpo", "sigmoid + anchor − log σ(β (h_w − h_w')): mDPO, compares with the damaged "
                      "image m' (damage), arXiv 2406.11839", mdpo, damaged=True),
    Objective("sigmoid_norm", "sigmoid on log-ratios divided by the answers' lengths"),
    Objective("hinge", "max(0, 1 − β (h_w − h_l)): a margin, no pull beyond it, arXiv 2309.06657"),
    Objective("ipo", "(h_w − h_l − 1 / 2β)², a mean over tokens: IPO, a margin to meet and not to "
                     "pass, arXiv 2310.12036"),
    Objective("exo_pair", "EXO: the reverse KL to the preference, arXiv 2402.00856"),
    Objective("nca_pair", "NCA: also keeps the chosen answer's likelihood up, arXiv 2402.05369"),
    Objective("robust", "DPO corrected for labels that may be wrong, arXiv 2403.00409"),
    Objective("bco_pair", "−log σ(β h_w) − log σ(−β h_l): each answer on its own, "
                          "arXiv 2404.04656"),
    Objective("sppo_hard", "(h_w − 1 / 2β)² + (h_l + 1 / 2β)²: self-play, arXiv 2405.00675"),
    Objective("aot", "DPO on the batch's sorted log-ratios: distributions compared, "
                     "arXiv 2406.05882"),
    Objective("aot_unpaired", "aot with chosen and rejected sorted apart"),
    Objective("apo_zero", "raises the chosen answer, lowers the rejected one, "
                          "arXiv 2408.06266, eq. 7"),
    Objective("apo_down", "lowers both, the rejected answer more, arXiv 2408.06266, eq. 8"),
    Objective("discopop", "a blend of logistic and exponential loss that a language model found, "
                          "arXiv 2406.08414"))}


def split(trainer: Any) -> list[tuple[str, float]]:
    """Takes the names that are not TRL's, or that are weighed by pair, out of the trainer's losses:
    (name, weight) of each."""
    ours, trl = [], []
    for name, weight in zip(trainer.loss_types, trainer.loss_weights, strict=True):
        (ours if name in OBJECTIVES and function(trainer, name) else trl).append((name, weight))
    if trainer.weighted and trl:
        weighable = ", ".join(n for n, o in OBJECTIVES.items() if o.function or o.weighed)
        raise ValueError(f"{trl[0][0]} cannot weigh pairs: drop the column weight, or use "
                         f"{weighable}")
    if ours and (trainer.ld_alpha is not None or trainer.f_divergence_type != "reverse_kl"):
        raise ValueError(f"{ours[0][0]} goes with neither ld_alpha nor another f-divergence")
    trainer.loss_types, trainer.loss_weights = [n for n, _ in trl], [w for _, w in trl]
    return ours


def function(trainer: Any, name: str) -> "Callable[[LogRatios, float], Tensor] | None":
    """What computes an objective's losses here; None where TRL does."""
    objective = OBJECTIVES[name]
    return objective.function or (objective.weighed if trainer.weighted else None)


def damages(names: Iterable[str]) -> bool:
    """Whether one of the objectives compares the image with a damaged one."""
    return any(n in OBJECTIVES and OBJECTIVES[n].damaged for n in names)


def loss(trainer: Any, model: "Module", inputs: dict[str, Any], tokens: "Tensor",
         damaged: dict[str, Any] | None, weight: "Tensor | None" = None) -> "Tensor":
    """The weighted sum of the trainer's own objectives, each the mean over the batch's pairs.

    tokens (2B, S - 1): the policy's log p of every answer token. damaged: the batch of the chosen
    answers with damaged images, in TRL's layout. weight (B,): of each pair's losses.
    """
    chosen, rejected = tokens[:, -inputs["completion_mask"].shape[1] + 1:].sum(1).chunk(2)
    lengths = inputs["completion_mask"][:, 1:].sum(1).chunk(2)[0]
    h = LogRatios(chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"],
                  nll=-chosen / lengths.float().mean())
    if damaged is not None:
        reference = trainer.references(damaged, damaged.get("keys"))["ref_chosen_logps"]
        now = trainer.answer_tokens(model, damaged).sum(1).chunk(2)[0]
        h = h._replace(damaged=now - reference)
        mode = "train" if trainer.model.training else "eval"
        mean = trainer.accelerator.gather(h.damaged.detach()).mean().item()
        trainer._metrics[mode]["rewards/damaged"].append(trainer.beta * mean)
    weight = 1.0 if weight is None else weight.to(chosen.device)
    return sum(w * (weight * function(trainer, n)(h, trainer.beta)).mean()
               for n, w in trainer.added_losses)
