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


def by_image(counts: Sequence[tuple[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """(image, (counted, out of)) of many questions summed for each image."""
    sums: dict[str, tuple[float, float]] = {}
    for image, (top, bottom) in counts:
        old = sums.get(image, (0.0, 0.0))
        sums[image] = (old[0] + top, old[1] + bottom)
    return sums


def bootstrap_weights(images: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(resamples, images) how often each image is drawn when as many are drawn with replacement."""
    return rng.multinomial(images, np.full(images, 1 / images), size=resamples)


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
