"""What rejected answers are like before and after selection, and what gives them away.

Measures over lines that hold "candidates" (as they were made) and "rejected" (what was kept), each
beside the line's chosen answer. Nothing is judged or dropped here: the numbers are for people.
Every interval is a bootstrap over images.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from bpo.evaluation import metrics
from bpo.params import SOURCES
from bpo.study import results, seeds
from bpo.study.results import Result

NEAR_DUPLICATE = 0.9  # share of matching words from which two answers count as nearly the same
SIDES = {"candidates": "candidates", "kept": "rejected"}  # what the audit says -> a line's key
FOLDS, FEWEST_PAIRS, FEWEST_IMAGES = 5, 20, 5  # of the classifier; fewer tell nothing
RESAMPLES = 1000  # of the images, for an interval
MOST_TERMS = 50_000  # words and word pairs that it looks at, the most frequent ones

Line = Mapping[str, Any]
Pair = tuple[Line, Mapping[str, Any]]  # a line and one of its answers
Estimate = dict[str, Any] | None  # as `metrics.estimate`; None where there is nothing to measure


def audit(lines: Sequence[Line], *, seed: int,
          right: Callable[[Line, str], bool | None]) -> dict[str, Any]:
    """What the pairs are like, by source; only sources with a candidate are named.

    right: (line, text) -> whether the text is in truth right, None where that is not known.
    pairs: kept answers; positives: lines that keep one; sources_agree: of the lines that keep
    answers of several sources, the share where two sources say the same.
    Of a source: candidates and kept (answers), positives and share_kept (lines that keep one of
    it), by_category {category: {rows: lines, kept: answers}}, and {candidates, kept} of
    - length_gap: words (between spaces) more than the chosen answer, mean;
    - characters_gap, type_token_gap, sentences_gap, commas_gap: the same of characters a word,
      different words a word (it falls with length: read it beside length_gap), sentences, and
      commas a word;
    - near_duplicates: share with NEAR_DUPLICATE or more of the chosen answer's words in order;
    - truth_right: share in truth right, of those whose truth is known: they teach the wrong thing;
    - displacement: of scored answers, the mean CHES (`selection.ches`), the share above 0, which is
      this kit's warning level and not a theorem, and the 95th percentile (a plain number).
    An estimate is {value, low, high, n} over images, and None where there is nothing to measure.
    """
    rejected = [k["rejected"] for k in lines]
    several = [texts for texts in map(_texts_by_source, rejected) if len(texts) > 1]
    agree = sum(len(set().union(*t.values())) < sum(map(len, t.values())) for t in several)
    out: dict[str, Any] = {"pairs": sum(map(len, rejected)), "positives": sum(map(bool, rejected)),
                           "sources_agree": round(agree / max(len(several), 1), 6)}
    for source, sides in _by_source(lines).items():
        kept = Counter(k["category"] for k, _ in sides["kept"])
        positives = sum(any(r["source"] == source for r in answers) for answers in rejected)
        found = {side: _measure(pairs, seed, right) for side, pairs in sides.items()}
        out[source] = {
            "candidates": len(sides["candidates"]), "kept": len(sides["kept"]),
            "positives": positives, "share_kept": round(positives / len(lines), 6),
            "by_category": {c: {"rows": n, "kept": kept[c]} for c, n in
                            sorted(Counter(k["category"] for k in lines).items())},
            **{name: {side: found[side][name] for side in SIDES} for name in found["kept"]}}
    return out


def _texts_by_source(answers: Sequence[Mapping]) -> dict[str, set[str]]:
    texts: dict[str, set[str]] = {}
    for answer in answers:
        texts.setdefault(answer["source"], set()).add(metrics.normalised(answer["text"]))
    return texts


def _by_source(lines: Sequence[Line]) -> dict[str, dict[str, list[Pair]]]:
    """source -> side -> pairs, for every source that has a candidate."""
    pairs = {s: {side: [(k, a) for k in lines for a in k[key] if a["source"] == s]
                 for side, key in SIDES.items()} for s in SOURCES}
    return {source: sides for source, sides in pairs.items() if sides["candidates"]}


# --- one source, one side -----------------------------------------------------------------------

def _per_word(count: float, text: str) -> float | None:
    words = metrics.words(text)
    return count / len(words) if words else None


STYLE: dict[str, Callable[[str], float | None]] = {
    "length_gap": lambda text: len(text.split()),
    "characters_gap": lambda text: _per_word(sum(map(len, metrics.words(text))), text),
    "type_token_gap": lambda text: _per_word(len(set(metrics.words(text))), text),
    "sentences_gap": lambda text: max(len(re.findall(r"[.!?]+(?=\s|$)", text)), 1),
    "commas_gap": lambda text: _per_word(text.count(","), text),
}


def tidy(audited: Mapping[str, Any]) -> list[Result]:
    """The audit as results: a method is a source of rejected answers, a split is all candidates or
    the kept ones; `shortcut_text` and `shortcut_length` are a classifier's accuracy."""
    out = []
    for source, measures in audited.items():
        if source in SOURCES:
            out.append(Result("kept", "audit", source, "", "share_kept",
                              results.Estimate(measures["share_kept"])))
            for metric, sides in measures.items():
                for side in SIDES if isinstance(sides, dict) and set(sides) == set(SIDES) else ():
                    parts = sides[side]
                    if parts is not None and "value" not in parts:  # displacement has two
                        parts = {f"{metric}_{n}": parts[n] for n in ("mean", "above_zero")}
                    else:
                        parts = {metric: parts}
                    out += [_result(side, source, n, e) for n, e in parts.items() if e]
    for source, sides in audited.get("shortcut", {}).items():
        out += [_result(side, source, f"shortcut_{n}", found[n]) for side, found in sides.items()
                if found for n in ("text", "length")]
    return out


def _result(side: str, source: str, metric: str, e: Mapping[str, Any]) -> Result:
    return Result(side, "audit", source, "", metric, results.Estimate(**e))


def _measure(pairs: Sequence[Pair], seed: int,
             right: Callable[[Line, str], bool | None]) -> dict[str, Any]:
    """Every measure of one source and side. A gap is left out where an answer has no words."""
    interval = _intervals(seed, "audit interval")

    def mean(values: Sequence[float | bool | None]) -> Estimate:
        return interval([(line["image"], (float(v), 1))
                         for (line, _), v in zip(pairs, values, strict=True) if v is not None])

    found: dict[str, Any] = {name: mean([_gap(style, answer["text"], line["chosen"])
                                         for line, answer in pairs])
                             for name, style in STYLE.items()}
    found["near_duplicates"] = mean([_near(a["text"], k["chosen"]) for k, a in pairs])
    found["truth_right"] = mean([right(k, a["text"]) for k, a in pairs])
    ches = [a.get("scores", {}).get("ches") for _, a in pairs]
    scored = [c for c in ches if c is not None]
    found["displacement"] = {
        "mean": mean(ches), "above_zero": mean([None if c is None else c > 0 for c in ches]),
        "percentile_95": round(float(np.percentile(scored, 95)), 6)} if scored else None
    return found


def _gap(style: Callable[[str], float | None], text: str, chosen: str) -> float | None:
    mine, other = style(text), style(chosen)
    return None if mine is None or other is None else mine - other


def _near(text: str, other: str) -> bool:
    matcher = difflib.SequenceMatcher(None, metrics.words(text), metrics.words(other), False)
    # Two cheap upper bounds come first: most answers need no more.
    return all(ratio() >= NEAR_DUPLICATE
               for ratio in (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio))


def _intervals(seed: int, purpose: str) -> Callable[[Sequence], Estimate]:
    """A function from (image, (counted, out of)) to an estimate; None where there are no counts.

    Every call with as many images has the same draws, whatever was asked before it.
    """
    drawn: dict[int, np.ndarray] = {}

    def interval(counts: Sequence[tuple[str, tuple[float, float]]]) -> Estimate:
        ratios = metrics.by_image(counts)
        if ratios and len(ratios) not in drawn:
            drawn.clear()  # one table at a time: it has a column an image
            rng = seeds.numpy_generator(seed, purpose)
            drawn[len(ratios)] = metrics.bootstrap_weights(len(ratios), RESAMPLES, rng)
        return metrics.estimate(ratios, drawn[len(ratios)]) if ratios else None

    return interval


# --- what gives a rejected answer away ----------------------------------------------------------

def shortcut(lines: Sequence[Line], *, seed: int) -> dict[str, Any]:
    """How well chosen and rejected are told apart without image and question, by source and side.

    {source: {candidates | kept: {pairs, images, text, length, by_category} or None}}: text and
    length are accuracies with their intervals; by_category holds the same of a classifier for each
    category alone. None where there are fewer than FEWEST_PAIRS pairs or FEWEST_IMAGES images.
    A pair gives two examples, its chosen and its rejected answer, so chance is .5. text: logistic
    regression on TF-IDF of single words and word pairs (case and punctuation marks count) and the
    number of words. length: on the number of words alone. Each is fitted on four fifths of the
    images and asked about the last, so nothing of an image is in both.
    The interval resamples images over these answers as they are; the spread that fitting again
    would bring is not in it. Values a little below .5 are not a finding: where the classes are
    balanced, what a word leans to in four folds is the opposite of its lean in the fifth.
    """
    return {source: {side: _tell_apart(pairs, seed, categories=True)
                     for side, pairs in sides.items()}
            for source, sides in _by_source(lines).items()}


def _tell_apart(pairs: Sequence[Pair], seed: int, *, categories: bool) -> dict[str, Any] | None:
    images = sorted({line["image"] for line, _ in pairs})
    if len(pairs) < FEWEST_PAIRS or len(images) < FEWEST_IMAGES:
        return None
    shuffled = seeds.numpy_generator(seed, "shortcut folds").permutation(images)
    fold_of = dict(zip(shuffled.tolist(), cycle(range(FOLDS))))
    folds = np.array([fold_of[line["image"]] for line, _ in pairs])
    texts = [(line["chosen"], answer["text"]) for line, answer in pairs]
    interval = _intervals(seed, "shortcut interval")
    found: dict[str, Any] = {"pairs": len(pairs), "images": len(images)}
    for name in ("text", "length"):
        hits = _out_of_fold(texts, folds, words=name == "text")
        found[name] = interval([(line["image"], (float(h), 2))
                                for (line, _), h in zip(pairs, hits, strict=True)])
    if categories:
        found["by_category"] = {
            c: _tell_apart([p for p in pairs if p[0]["category"] == c], seed, categories=False)
            for c in sorted({line["category"] for line, _ in pairs})}
    return found


def _out_of_fold(texts: Sequence[tuple[str, str]], folds: np.ndarray, *,
                 words: bool) -> np.ndarray:
    """(N,) how many of a pair's two answers are put in their class by a classifier that was fitted
    on the other folds. texts: (chosen, rejected). words: with TF-IDF, else the length alone."""
    # Here and not above: scikit-learn takes a second to import, and only this needs it.
    from scipy.sparse import csr_array, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    answers = np.array([text for pair in texts for text in pair], dtype=object)
    labels, at = np.tile([0, 1], len(texts)), np.repeat(folds, 2)
    lengths = np.array([[len(text.split())] for text in answers], dtype=float)
    right = np.zeros(len(answers))
    for fold in range(FOLDS):
        fit, ask = at != fold, at == fold
        scaler = StandardScaler().fit(lengths[fit])
        seen, asked = (csr_array(scaler.transform(lengths[part])) for part in (fit, ask))
        if words:
            tfidf = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]",
                                    lowercase=False, max_features=MOST_TERMS)
            seen = hstack([tfidf.fit_transform(answers[fit]), seen], format="csr")
            asked = hstack([tfidf.transform(answers[ask]), asked], format="csr")
        model = LogisticRegression(max_iter=1000).fit(seen, labels[fit])
        right[ask] = model.predict(asked) == labels[ask]
    return right.reshape(-1, 2).sum(1)
