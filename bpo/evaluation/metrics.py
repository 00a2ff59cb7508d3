"""What is measured: pure functions over answers and truth, and bootstrap intervals over images.

Every number is a ratio of sums over images (a mean is a ratio with ones below), so that one
bootstrap serves all of them, and a difference between two methods is resampled in pairs.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bpo.evaluation.words import MARKS, Lexicon, Vocabulary, lexicon
from bpo.study.text import normalised as normalised
from bpo.study.text import words

BINS = 10  # of probabilities, of equal width
Ratios = Mapping[str, tuple[float, float]]  # image -> (what is counted, out of how many)


def wrong_object_words(text: str, vocabulary: Vocabulary | Lexicon, present: set[str]) -> set[str]:
    """The words of a text that name objects which are not in the image."""
    tokens = words(text, MARKS)
    found = lexicon(vocabulary).mentions(tokens)
    wrong = {t for name, a, b in found if name not in present for t in tokens[a:b]}
    return wrong - {t for name, a, b in found if name in present for t in tokens[a:b]}


def wrong_colours(text: str, vocabulary: Vocabulary, colours: Sequence[str],
                  objects: Sequence[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """(colour, next word) of every colour word in front of an object of the image, none of that
    name having this colour. objects: {"name", "colour"} of everything in the image."""
    coloured = {(o["name"], o.get("colour")) for o in objects}
    names = {name for name, _ in coloured}
    tokens = words(text, MARKS)
    return {(tokens[a - 1], tokens[a]) for name, a, _ in lexicon(vocabulary).mentions(tokens)
            if a and tokens[a - 1] in colours and name in names
            and (name, tokens[a - 1]) not in coloured}


def caption_is_right(text: str, vocabulary: Vocabulary, colours: Sequence[str],
                     objects: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a caption names objects of the image only, each colour word in front of one with that
    colour. objects: as of `wrong_colours`. A caption of nothing is wrong.
    """
    named = set(lexicon(vocabulary).objects(text))
    return (bool(named) and named <= {o["name"] for o in objects}
            and not wrong_colours(text, vocabulary, colours, objects))


def among(logps: Sequence[float], true: int, prior: int, temperature: float = 1.0
          ) -> dict[str, float]:
    """{p_true, p_prior, logp_true, confidence} of a question whose only answers are its candidates,
    at a temperature; confidence: the probability of the likeliest.

    logps: of the candidates, in nats: first `true` right ones, then `prior` ones of the prior.
    """
    scores = np.asarray(logps) / temperature
    scores = scores - np.logaddexp.reduce(scores)
    right = float(np.logaddexp.reduce(scores[:true]))
    return {"p_true": float(np.exp(right)), "logp_true": right,
            "p_prior": float(np.exp(scores[true:true + prior]).sum()),
            "confidence": float(np.exp(scores.max()))}


def confidence(logps: Sequence[Sequence[float]], temperature: float = 1.0) -> float:
    """The mean over questions of the probability of the likeliest candidate."""
    return float(np.mean([among(row, 0, 0, temperature)["confidence"] for row in logps]))


def temperature(logps: Sequence[Sequence[float]], goal: float) -> float:
    """The temperature between 0.01 and 100 at which `confidence` is the goal, by bisection: the
    hotter, the less confident."""
    low, high = np.log(0.01), np.log(100)
    for _ in range(40):
        middle = (low + high) / 2
        hotter = confidence(logps, float(np.exp(middle))) > goal
        low, high = (middle, high) if hotter else (low, middle)
    return round(float(np.exp((low + high) / 2)), 6)


def by_image(counts: Sequence[tuple[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """(image, (counted, out of)) of many questions summed for each image."""
    sums: dict[str, tuple[float, float]] = {}
    for image, (top, bottom) in counts:
        old = sums.get(image, (0.0, 0.0))
        sums[image] = (old[0] + top, old[1] + bottom)
    return sums


def bootstrap_weights(images: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(resamples, images) how often each image is drawn when as many are drawn with replacement."""
    drawn = rng.multinomial(images, np.full(images, 1 / images), size=resamples)
    return drawn.astype(float)  # once, not in each product


def itself(ratio: Any) -> Any:
    """The rule of a number that is one ratio and nothing else."""
    return ratio


def estimate(ratios: Ratios, weights: np.ndarray) -> dict[str, Any]:
    """A ratio of sums with its 95 % percentile bootstrap interval over images.

    weights: (resamples, images) from `bootstrap_weights`, columns in the sorted order of images.
    Returns {value, low, high, n}: n is what the ratio is out of. None where that is nothing.
    """
    return _interval(*_resampled(itself, [ratios], weights))


def difference(ratios: Ratios, other: Ratios, weights: np.ndarray) -> dict[str, Any]:
    """`ratios` minus `other` on the same images, each resample taking the same images of both.

    Returns {value, low, high, n, p}; p is two-sided, from how many resamples lie on the other side
    of zero or on it, (1 + 2 min(those <= 0, those >= 0)) / (1 + all), at most 1.
    """
    return _difference(itself, [ratios], [other], weights)


# a number's name -> the ratios that it is made of, and the rule: those as numbers or arrays -> it
Made = Mapping[str, tuple[Sequence[str], Callable[..., Any]]]


def tabled(answers: Sequence[tuple[str, Mapping[str, tuple[float, float]]]], names: Iterable[str]
           ) -> dict[str, Ratios]:
    """metric -> ratios, of the named metrics that any answer counts for, each with every image.

    answers: the image of each answer, and what it adds to each metric as (counted, out of).
    """
    found: dict[str, list] = {}
    for image, counts in answers:
        for name, count in counts.items():
            found.setdefault(name, []).append((image, count))
    blank = [(image, (0.0, 0.0)) for image in {image for image, _ in answers}]
    return {n: by_image([*blank, *found[n]]) for n in names if n in found}


def estimates(ratios: Mapping[str, Ratios], weights: np.ndarray, made: Made
              ) -> dict[str, dict[str, Any]]:
    """The `estimate` of every metric, then of those numbers in `made` whose parts are all there,
    such as AMBER's score; their n is the least of the parts'."""
    return {name: _interval(*_resampled(rule, [ratios[part] for part in parts], weights))
            for name, (parts, rule) in _rules(ratios, made).items()}


def differences(ratios: Mapping[str, Ratios], others: Mapping[str, Ratios], weights: np.ndarray,
                made: Made) -> dict[str, dict[str, Any]]:
    """The `difference` of everything that `estimates` gives on both sides."""
    shared = [name for name in ratios if name in others]
    return {name: _difference(rule, [ratios[part] for part in parts],
                              [others[part] for part in parts], weights)
            for name, (parts, rule) in _rules(shared, made).items()}


def _rules(names: Collection[str], made: Made) -> Made:
    complete = {n: made[n] for n in made if all(part in names for part in made[n][0])}
    return {n: ((n,), itself) for n in names} | complete


def _difference(rule: Callable[..., Any], parts: Sequence[Ratios], others: Sequence[Ratios],
                weights: np.ndarray) -> dict[str, Any]:
    if any(p.keys() != parts[0].keys() for p in (*parts, *others)):
        raise ValueError("a paired difference needs the same images on both sides")
    value, drawn, count = _resampled(rule, parts, weights)
    other_value, other_drawn, other_count = _resampled(rule, others, weights)
    drawn = drawn - other_drawn
    found = _interval(value - other_value, drawn, min(count, other_count))
    if found["value"] is None:
        return found | {"p": None}
    beyond = int(min((drawn <= 0).sum(), (drawn >= 0).sum()))
    return found | {"p": round(min((1 + 2 * beyond) / (1 + int(np.isfinite(drawn).sum())), 1.0), 6)}


def _resampled(rule: Callable[..., Any], parts: Sequence[Ratios], weights: np.ndarray
               ) -> tuple[Any, np.ndarray, float]:
    """The number itself, the number in every resample, and what its smallest part is out of."""
    # (2, images) each: what is counted, and out of how many
    columns = [np.array([ratios[image] for image in sorted(ratios)], dtype=float).T
               for ratios in parts]
    value = rule(*(_ratio(top.sum(), bottom.sum()) for top, bottom in columns))
    drawn = rule(*(_ratio(weights @ top, weights @ bottom) for top, bottom in columns))
    return value, drawn, min(bottom.sum() for _, bottom in columns)


def _ratio(top: Any, bottom: Any) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.asarray(bottom) > 0, np.divide(top, bottom), np.nan)


def _interval(value: Any, drawn: np.ndarray, count: float) -> dict[str, Any]:
    if np.isnan(value):
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"value": round(float(value), 6), "low": round(float(low), 6),
            "high": round(float(high), 6), "n": int(count)}


def calibration(answers: Sequence[tuple[str, float, bool]], weights: np.ndarray) -> dict[str, Any]:
    """How P(yes) agrees with how often yes is right.

    answers: (image, P(yes) among yes and no, whether yes is right) of each question.
    weights: (resamples, images) from `bootstrap_weights`, columns in the sorted order of
    images. Returns {ece, bins}: ece is the expected calibration error (arXiv 1706.04599), the mean
    over questions of |share of yes that is right - mean P(yes)| of the bin that each lies in, with
    its bootstrap interval over images (biased upwards, as resampled errors do not cancel); bins
    are {low, high, n, p, share}.
    """
    images = {image: k for k, image in enumerate(sorted({a[0] for a in answers}))}
    place = np.array([images[a[0]] for a in answers])
    p = np.array([a[1] for a in answers])
    right = np.array([a[2] for a in answers], dtype=float)
    bin_of = np.minimum((p * BINS).astype(int), BINS - 1)
    gap, size = np.zeros((2, len(images), BINS))
    np.add.at(gap, (place, bin_of), right - p)
    np.add.at(size, (place, bin_of), 1.0)

    def error(drawn: np.ndarray) -> np.ndarray:
        return np.abs(drawn @ gap).sum(-1) / (drawn @ size).sum(-1)

    low, high = np.percentile(error(weights), [2.5, 97.5])
    bins = [{"low": k / BINS, "high": (k + 1) / BINS, "n": int((bin_of == k).sum()),
             "p": round(float(p[bin_of == k].mean()), 6),
             "share": round(float(right[bin_of == k].mean()), 6)}
            for k in range(BINS) if (bin_of == k).any()]
    return {"ece": {"value": round(float(error(np.ones(len(images)))), 6),
                    "low": round(float(low), 6), "high": round(float(high), 6),
                    "n": len(answers)}, "bins": bins}
