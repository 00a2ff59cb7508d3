"""What rejected answers are like before and after selection, and what gives them away.

Measures over lines that hold "candidates" (as they were made) and "rejected" (what was kept), each
beside the line's chosen answer. Nothing is judged or dropped here: the numbers are for people.
Every interval is a bootstrap over images.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import cycle
from typing import Any

import numpy as np

from bpo.evaluation import metrics
from bpo.pairs.selection import Choice, Right
from bpo.params import SOURCES
from bpo.study import results, seeds
from bpo.study.results import Result
from bpo.study.text import pieces

NEAR_DUPLICATE = 0.9  # share of matching words from which two answers count as nearly the same
SIDES = {"candidates": "candidates", "kept": "rejected"}  # what the audit says -> a line's key
FOLDS, FEWEST_PAIRS, FEWEST_IMAGES = 5, 20, 5  # of the classifier; fewer tell nothing
RESAMPLES = 1000  # of the images, for an interval
MOST_TERMS = 50_000  # words and word pairs that it looks at, the most frequent ones

Line = Mapping[str, Any]
Pair = tuple[Line, Mapping[str, Any]]  # a line and one of its answers
Estimate = dict[str, Any] | None  # as `metrics.estimate`; None where there is nothing to measure


class Counts:
    """Exact counts over all positives, of which `audit` may read a sample."""

    def __init__(self) -> None:
        self.positives = 0
        self.made, self.with_one = Counter(), Counter()  # by source
        self.kept, self.dropped = Counter(), Counter()  # by source and category, and reason
        self.rows = Counter()  # by category

    def add(self, line: Line, choice: Choice) -> None:
        self.positives += bool(choice.kept)
        self.made.update(c["source"] for c in line["candidates"])
        self.with_one.update({c["source"] for c in choice.kept})
        self.kept.update((c["source"], line["category"]) for c in choice.kept)
        self.dropped.update((d["source"], d["reason"]) for d in choice.dropped)
        self.rows[line["category"]] += 1

    def by_source(self) -> dict[str, dict[str, Any]]:
        """Of each source: candidates and kept (answers), positives and share_kept (lines that keep
        one of it), dropped {reason: answers}, by_category {category: {rows: lines, kept: answers}}.
        """
        return {s: {"candidates": self.made[s], "kept": sum(self.kept[s, c] for c in self.rows),
                    "positives": self.with_one[s],
                    "share_kept": round(self.with_one[s] / self.rows.total(), 6),
                    "dropped": {r: n for (of, r), n in sorted(self.dropped.items()) if of == s},
                    "by_category": {c: {"rows": n, "kept": self.kept[s, c]}
                                    for c, n in sorted(self.rows.items())}}
                for s in SOURCES if self.made[s]}


def audit(lines: Sequence[Line], *, seed: int, right: Right) -> dict[str, Any]:
    """What the pairs are like, by source; only sources with a candidate are named.

    sources_agree: of the lines that keep answers of several sources, the share where two sources
    say the same. Of a source {candidates, kept} of
    - length_gap: words (`text.pieces`) more than the chosen answer, mean;
    - characters_gap, type_token_gap, sentences_gap, commas_gap: the same of characters a word,
      different words a word (it falls with length: read it beside length_gap), sentences, and
      commas a word;
    - near_duplicates: share with NEAR_DUPLICATE or more of the chosen answer's words in order;
    - truth_right: share in truth right, of those whose truth is known: they teach the wrong thing;
    - displacement: of scored answers, the mean CHES (`selection.ches`), the share above 0, which is
      this kit's warning level and not a theorem, and the 95th percentile (a plain number).
    An estimate is {value, low, high, n} over images, and None where there is nothing to measure.
    """
    several, agreeing = 0, 0
    for line in lines:
        texts = {(a["source"], metrics.normalised(a["text"])) for a in line["rejected"]}
        if len({source for source, _ in texts}) > 1:
            several += 1
            agreeing += len({text for _, text in texts}) < len(texts)
    out: dict[str, Any] = {"sources_agree": round(agreeing / max(several, 1), 6)}
    for source, sides in _by_source(lines).items():
        found = {side: _measure(pairs, seed, right) for side, pairs in sides.items()}
        out[source] = {name: {side: found[side][name] for side in SIDES} for name in found["kept"]}
    return out


def _by_source(lines: Sequence[Line]) -> dict[str, dict[str, list[Pair]]]:
    """source -> side -> pairs, for every source that has a candidate; what a text model replied in
    place of an answer is in none."""
    made = {c["source"] for k in lines for c in k["candidates"]}
    return {s: {side: [(k, a) for k in lines for a in k[key]
                       if a["source"] == s and "fault" not in a] for side, key in SIDES.items()}
            for s in SOURCES if s in made}


def tidy(found: Mapping[str, Any]) -> list[Result]:
    """The stage's metrics as results: a method is a source of rejected answers, a split is all
    candidates or the kept ones; `shortcut_text`, `shortcut_length` are a classifier's accuracy."""
    out: list[Result] = []

    def add(side: str, source: str, metric: str, estimate: Estimate) -> None:
        if estimate:
            out.append(Result(side, "audit", source, "", metric, results.Estimate(**estimate)))

    for source in filter(found.__contains__, SOURCES):
        add("kept", source, "share_kept", {"value": found[source]["share_kept"]})
        for metric in (*STYLE, "near_duplicates", "truth_right"):
            for side, estimate in found[source].get(metric, {}).items():
                add(side, source, metric, estimate)
        for side, ches in found[source].get("displacement", {}).items():
            for part in ("mean", "above_zero"):
                add(side, source, f"displacement_{part}", ches and ches[part])
    for source, sides in found["shortcut"].items():
        for side, accuracy in sides.items():
            for part in ("text", "length"):
                add(side, source, f"shortcut_{part}", accuracy and accuracy[part])
    return out


# --- one source, one side -----------------------------------------------------------------------

def _words(text: str) -> list[str]:
    """The words that have a letter or a number: what style is counted by."""
    return [w for w in metrics.words(text) if any(map(str.isalnum, w))]


def _per_word(count: float, text: str) -> float | None:
    words = _words(text)
    return count / len(words) if words else None


SENTENCE_END, COMMA = re.compile(r"[.!?؟।]+(?=\s|$)|[。！？]+"), re.compile("[,，、،]")
STYLE: dict[str, Callable[[str], float | None]] = {
    "length_gap": lambda text: len(pieces(text)),
    "characters_gap": lambda text: _per_word(sum(map(len, _words(text))), text),
    "type_token_gap": lambda text: _per_word(len(set(_words(text))), text),
    "sentences_gap": lambda text: max(len(SENTENCE_END.findall(text)), 1),
    "commas_gap": lambda text: _per_word(len(COMMA.findall(text)), text),
}


def gap(name: str, text: str, chosen: str) -> float | None:
    """A measure of STYLE of a text minus that of the chosen answer; None where one has no words."""
    values = STYLE[name](text), STYLE[name](chosen)
    return None if None in values else values[0] - values[1]


def _measure(pairs: Sequence[Pair], seed: int, right: Right) -> dict[str, Any]:
    """Every measure of one source and side."""
    interval = _intervals(seed, "audit interval")

    def mean(values: Sequence[float | bool | None]) -> Estimate:
        return interval([(line["image"], (float(v), 1))
                         for (line, _), v in zip(pairs, values, strict=True) if v is not None])

    found: dict[str, Any] = {name: mean([gap(name, a["text"], k["chosen"]) for k, a in pairs])
                             for name in STYLE}
    found["near_duplicates"] = mean([_near(a["text"], k["chosen"]) for k, a in pairs])
    found["truth_right"] = mean([right(k, a["text"]) for k, a in pairs])
    ches = [a.get("scores", {}).get("ches") for _, a in pairs]
    scored = [c for c in ches if c is not None]
    found["displacement"] = {
        "mean": mean(ches), "above_zero": mean([None if c is None else c > 0 for c in ches]),
        "percentile_95": round(float(np.percentile(scored, 95)), 6)} if scored else None
    return found


def _near(text: str, other: str) -> bool:
    matcher = difflib.SequenceMatcher(None, metrics.words(text), metrics.words(other), False)
    # Two cheap upper bounds come first: most answers need no more.
    return all(ratio() >= NEAR_DUPLICATE
               for ratio in (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio))


def _intervals(seed: int, purpose: str) -> Callable[[Sequence], Estimate]:
    """A function from (image, (counted, out of)) to an estimate; None where there are no counts.

    Every call with as many images has the same draws, whatever was asked before it.
    """
    @lru_cache(maxsize=1)  # one table at a time: it has a column an image
    def weights(images: int) -> np.ndarray:
        rng = seeds.numpy_generator(seed, purpose)
        return metrics.bootstrap_weights(images, RESAMPLES, rng)

    def interval(counts: Sequence[tuple[str, tuple[float, float]]]) -> Estimate:
        ratios = metrics.by_image(counts)
        return metrics.estimate(ratios, weights(len(ratios))) if ratios else None

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
    def of(pairs: list[Pair]) -> dict[str, Any] | None:
        whole = _told_apart(pairs, seed)
        categories = sorted({line["category"] for line, _ in pairs})
        return whole and whole | {"by_category": {
            c: _told_apart([p for p in pairs if p[0]["category"] == c], seed) for c in categories}}

    return {source: {side: of(pairs) for side, pairs in sides.items()}
            for source, sides in _by_source(lines).items()}


def _told_apart(pairs: Sequence[Pair], seed: int) -> dict[str, Any] | None:
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
    return found


def _out_of_fold(texts: Sequence[tuple[str, str]], folds: np.ndarray, *,
                 words: bool) -> np.ndarray:
    """(N,) how many of a pair's two answers are put in their class by a classifier that was fitted
    on the other folds. texts: (chosen, rejected). words: with TF-IDF, else the length alone."""
    # Here and not above: scikit-learn takes a second to import, and only this needs it.
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    answers = np.array([text for pair in texts for text in pair], dtype=object)
    labels = np.tile([0, 1], len(texts))
    length = make_pipeline(
        FunctionTransformer(lambda part: np.array([[float(len(pieces(text)))] for text in part])),
        StandardScaler(), FunctionTransformer(csr_array))
    tfidf = TfidfVectorizer(ngram_range=(1, 2), lowercase=False, max_features=MOST_TERMS,
                            token_pattern=None, tokenizer=lambda text: [
                                t for p in pieces(text) for t in re.findall(r"\w+|[^\w\s]", p)])
    model = make_pipeline(make_union(tfidf, length) if words else length,
                          LogisticRegression(max_iter=1000))
    predicted = cross_val_predict(model, answers, labels,
                                  cv=PredefinedSplit(np.repeat(folds, 2)))
    return (predicted == labels).reshape(-1, 2).sum(1)
