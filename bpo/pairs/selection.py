"""Which candidates become the rejected answers of a positive, and which are dropped, and why.

Pure functions over one line of candidates. They judge texts and the scores that lie beside them;
what a model has to say of a candidate is computed elsewhere and read from candidate["scores"].
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from bpo.evaluation import metrics
from bpo.study import seeds

SCORES = {
    "similarity": "share of the words that candidate and annotation have in common, in order; 0..1",
    "length": "1 - difference in words / words of the longer one; 1 is the same length",
    "image": "mean log-prob a token under the weakened image minus under the clean one, in nats: "
             "high is what the prior likes and the image does not show",
}


class Choice(NamedTuple):
    """What `choose` made of a line's candidates.

    kept, unselected: candidates as they came, group by group (a group is a source and a mode) in
    the order of making; kept has the best first, unselected the first made.
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
    mine, other = metrics.words(candidate["text"]), metrics.words(chosen)
    scores = {"similarity": difflib.SequenceMatcher(None, mine, other, False).ratio(),
              "length": 1 - abs(len(mine) - len(other)) / max(len(mine), len(other), 1)}
    given = candidate.get("scores", {})
    if {"logp_clean", "logp_noisy"} <= given.keys():
        scores["image"] = given["logp_noisy"] - given["logp_clean"]
    return scores


def choose(line: Mapping[str, Any], *, weights: Mapping[str, float], keep: int, drop_right: bool,
           right: Callable[[str], bool | None], seed: int) -> Choice:
    """The `keep` best usable candidates of each group, and as many drawn at random as a control.

    Usable is what is not useless, not in truth right (only where drop_right is set; `right` says
    None where the truth is not known) and not a repeat, but for case and punctuation, of an earlier
    one in its group. The best have the highest weighted sum of scores; equal ones, and all of them
    where weights is empty, come in the order of making. Unselected ones are drawn uniformly from
    all usable ones, so they may be among the kept; the draw depends on this line alone.
    Raises ValueError when a weight's score is unknown or a usable candidate lacks it.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for candidate in line["candidates"]:
        groups.setdefault((candidate["source"], candidate["mode"]), []).append(candidate)
    choice = Choice([], [], [])
    for (source, mode), made in groups.items():
        usable, reasons = _usable(made, line["chosen"], right if drop_right else None)
        totals = {n: _total(made[n], line, weights) for n in usable}
        best = sorted(usable, key=lambda n: -totals[n])[:keep]  # sorted() leaves ties in order
        rng = seeds.numpy_generator(seed, "unselected", line["id"], source, mode)
        drawn = sorted(rng.choice(usable, size=len(best), replace=False)) if usable else []
        choice.kept.extend(made[n] for n in best)
        choice.unselected.extend(made[n] for n in drawn)
        choice.dropped.extend(
            {"id": line["id"], "category": line["category"], "source": source, "mode": mode,
             "text": candidate["text"], "reason": reasons.get(n, "not selected")}
            for n, candidate in enumerate(made) if n not in best)
    return choice


def _usable(made: Sequence[Mapping], chosen: str,
            right: Callable[[str], bool | None] | None) -> tuple[list[int], dict[int, str]]:
    """Which of a group's candidates can be used, by their place, and why the others cannot."""
    usable, reasons, seen = [], {}, set()
    for n, candidate in enumerate(made):
        text = candidate["text"]
        same = metrics.normalised(text)
        if reason := useless(text, chosen):
            reasons[n] = reason
        elif right and right(text):
            reasons[n] = "in truth right"
        elif same in seen:
            reasons[n] = "repeats another candidate"
        else:
            usable.append(n)
            seen.add(same)
    return usable, reasons


def _total(candidate: Mapping[str, Any], line: Mapping[str, Any],
           weights: Mapping[str, float]) -> float:
    if not weights:
        return 0.0  # nothing to rank by: similarity is not worth its time
    scores = score(candidate, line["chosen"])
    missing = [name for name in weights if name not in scores]
    if missing:
        raise ValueError(f"{line['id']}: a {candidate['source']} candidate ({candidate['mode']}) "
                         f"has no score {missing[0]}; it has {', '.join(scores)}: weigh those, or "
                         "score the candidates first")
    return sum(weight * scores[name] for name, weight in weights.items())


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
