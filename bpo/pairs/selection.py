"""Which candidates become the rejected answers of a positive, and which are dropped, and why.

Pure functions over one line of candidates. They judge texts and the scores that lie beside them;
what a model has to say of a candidate is computed elsewhere and read from candidate["scores"].
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bpo.evaluation import metrics
from bpo.params import PairGeneration
from bpo.study import seeds

# (line, text) -> whether the text is in truth right; None where the truth is not known
Right = Callable[[Mapping[str, Any], str], bool | None]
SCORES = {
    "similarity": "share of the words that candidate and annotation have in common, in order; 0..1",
    "length": "1 - difference in words / words of the longer one; 1 is the same length",
    "image": "mean log-prob a token under the weakened image minus under the clean one, in nats: "
             "high is what the prior likes and the image does not show",
}


class Choice(NamedTuple):
    """What `choose` made of a line's candidates.

    kept, unselected: candidates as they came, group by group (a group is a source, a mode and a
    step) in the order of making; kept has the best first, unselected the first made.
    dropped: {id, category, source, mode, text, reason} of every candidate that is not in kept.
    """

    kept: list[dict[str, Any]]
    unselected: list[dict[str, Any]]
    dropped: list[dict[str, Any]]


def useless(text: str, chosen: str) -> str | None:
    """Why an answer would train on nothing beside the chosen one; None where it can be used."""
    if not metrics.normalised(text):
        return "empty"
    if text == chosen:
        return "equal to the annotation"
    if metrics.normalised(text) == metrics.normalised(chosen):
        return "equal but for case and punctuation"
    return None


def score(candidate: Mapping[str, Any], chosen: str) -> dict[str, float]:
    """The scores of a candidate by name, as SCORES says; a model's are absent if it gave none.

    Words are those of `metrics.words`: case and punctuation do not count.
    """
    words, other = metrics.words(candidate["text"]), metrics.words(chosen)
    scores = {"similarity": difflib.SequenceMatcher(None, words, other, False).ratio(),
              "length": 1 - abs(len(words) - len(other)) / max(len(words), len(other), 1)}
    given = candidate.get("scores", {})
    if {"logp_clean", "logp_noisy"} <= given.keys():
        scores["image"] = given["logp_noisy"] - given["logp_clean"]
    return scores


def choose(p: PairGeneration, line: Mapping[str, Any], right: Right) -> Choice:
    """The `keep` best usable candidates of each group, and as many drawn at random as a control.

    Usable is what is an answer ("fault" says why a reply is none), not useless, not in truth right
    (only where drop_right is set) and not a repeat, but for case and punctuation, of an earlier
    one in its group. The best have the highest sum of scores, weighted by `select`; equal ones, and
    all of them where it is empty, come in the order of making. Unselected ones are drawn uniformly
    from all usable ones, so they may be among the kept; the draw depends on this line alone.
    """
    groups: dict[tuple[str, str, int], list[dict]] = {}
    for candidate in line["candidates"]:
        groups.setdefault((candidate["source"], candidate["mode"], candidate.get("step", 0)),
                          []).append(candidate)
    choice = Choice([], [], [])
    for (source, mode, _), made in groups.items():
        reasons, seen, totals = [], set(), {}
        for n, candidate in enumerate(made):
            text, same = candidate["text"], metrics.normalised(candidate["text"])
            reason = candidate.get("fault") or useless(text, line["chosen"])
            if not reason and p.drop_right and right(line, text):
                reason = "in truth right"
            if not reason and same in seen:
                reason = "repeats another candidate"
            reasons.append(reason)
            if not reason:
                seen.add(same)
                # Without weights there is nothing to rank by, and similarity takes its time.
                scores = score(candidate, line["chosen"]) if p.select else {}
                totals[n] = sum(weight * scores[name] for name, weight in p.select.items())
        best = sorted(totals, key=lambda n: -totals[n])[:p.keep]  # sorted() leaves ties in order
        rng = seeds.numpy_generator(p.seed, "unselected", line["id"], source, mode)
        drawn = sorted(rng.choice(list(totals), size=len(best), replace=False)) if totals else []
        choice.kept.extend(made[n] for n in best)
        choice.unselected.extend(made[n] for n in drawn)
        choice.dropped.extend(
            {"id": line["id"], "category": line["category"], "source": source, "mode": mode,
             "text": made[n]["text"], "reason": reason or "not selected"}
            for n, reason in enumerate(reasons) if n not in best)
    return choice


def difficulty(margins: Sequence[float]) -> list[float]:
    """Weights of pairs by their margin, the log-prob a token of chosen minus rejected before
    training: sigmoid(-z) of the standardised margin, over its mean. Easy pairs weigh less, as
    DA-DPO asks (arXiv 2601.00623); its own scores are those of two other models."""
    x = np.asarray(margins, dtype=float)
    weight = 1 / (1 + np.exp((x - x.mean()) / max(x.std(), 1e-12)))
    return [round(float(w), 6) for w in weight / weight.mean()]


def ches(chosen_mean: Any, rejected_mean: Any) -> float:
    """How much a rejected answer's states look like the chosen one's: a sign that DPO on the pair
    may lower the chosen answer too (likelihood displacement).

    Razin et al. 2024 (arXiv 2410.08847): CHES = <sum_k h_w,k , sum_k h_l,k> - ||sum_k h_w,k||^2,
    with h_k the last hidden state from which token k is predicted; here the length-normalised
    <mean h_w, mean h_l> - ||mean h_w||^2, which does not grow with the number of tokens.
    chosen_mean, rejected_mean: (D,) mean states, torch or numpy.
    The paper ranks pairs by the score and proves no threshold. That this kit counts pairs above 0
    is a warning level of its own: there the rejected answer's mean state reaches as far along the
    chosen one's direction as the chosen one itself does.
    """
    chosen, rejected = (torch.as_tensor(mean).detach().double()
                        for mean in (chosen_mean, rejected_mean))
    return float(torch.dot(chosen, rejected) - torch.dot(chosen, chosen))
