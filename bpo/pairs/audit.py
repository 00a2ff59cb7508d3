"""What rejected answers are like before and after selection, and what gives them away.

Measures over lines that hold "candidates" (as they were made) and "rejected" (what was kept), each
beside the line's chosen answer. Nothing is judged or dropped here: the numbers are for people.
Every interval is a bootstrap over images.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
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
BY_CATEGORY = ("length_gap", "longer", "is_prior")  # what is told of each category of question

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


def audit(lines: Sequence[Line], *, seed: int, right: Right, prior: Right,
          noise_words: Collection[str]) -> dict[str, Any]:
    """What the pairs are like, by source; only sources with a candidate are named.

    sources_agree: of the lines that keep answers of several sources, the share where two sources
    say the same. Of a source {candidates, kept} of
    - length_gap: words (`text.pieces`) more than the chosen answer, mean; longer: share with more;
    - characters_gap, type_token_gap, commas_gap: the same of characters, different words (fewer in
      longer answers) and commas a word; sentences_gap: of sentences;
    - near_duplicates: share with NEAR_DUPLICATE or more of the chosen answer's words in order;
    - equal: share that says the same as the chosen answer; none of the kept does;
    - truth_right: share in truth right, of those whose truth is known: they teach the wrong thing;
    - is_prior: share that is the prior's answer and not the chosen one, of questions for which the
      truth names the prior's;
    - of_noise: share with a phrase of noise_words that the chosen answer lacks; None without any;
    - displacement: of scored answers, the mean CHES (`selection.ches`), the share above 0 and the
      95th percentile (a plain number).
    All but the last also by `ways`, of weakened answers {mode-step: the same}, and those of
    BY_CATEGORY by `categories`.
    An estimate is {value, low, high, n} over images, and None where there is nothing to measure.
    """
    said = [{(a["source"], metrics.normalised(a["text"])) for a in k["rejected"]} for k in lines]
    several = [texts for texts in said if len({source for source, _ in texts}) > 1]
    agreeing = sum(len({text for _, text in texts}) < len(texts) for texts in several)
    out: dict[str, Any] = {"sources_agree": round(agreeing / max(len(several), 1), 6)}
    phrases = [f" {text} " for text in map(metrics.normalised, noise_words) if text]
    mean = _intervals(seed, "audit interval")
    for source, sides in _by_source(lines).items():
        rows = [{"side": side, "image": k["image"], "categories": k["category"], "ways": way(a),
                 **_checked(k, a, right, prior, phrases)}
                for side, pairs in sides.items() for k, a in pairs]

        def by(part: str, names: Collection[str]) -> dict[str, Any]:
            return {value: _measured([r for r in rows if r[part] == value], names, mean)
                    for value in dict.fromkeys(r[part] for r in rows)}

        out[source] = {**_measured(rows, MEASURES, mean), "displacement": _displacement(rows, mean),
                       "categories": by("categories", BY_CATEGORY),
                       "ways": by("ways", MEASURES) if source == "weakened" else {}}
    return out


def way(answer: Mapping[str, Any]) -> str:
    """How a rejected answer was made: its mode, and its step where it has one."""
    return f"{answer['mode']}-{answer['step']}" if "step" in answer else answer["mode"]


def _by_source(lines: Sequence[Line]) -> dict[str, dict[str, list[Pair]]]:
    """source -> side -> pairs, for every source that has a candidate; what a text model replied in
    place of an answer is in none."""
    made = {c["source"] for k in lines for c in k["candidates"]}
    return {s: {side: [(k, a) for k in lines for a in k[key]
                       if a["source"] == s and "fault" not in a] for side, key in SIDES.items()}
            for s in SOURCES if s in made}


def tidy(found: Mapping[str, Any]) -> list[Result]:
    """The stage's metrics as results. Splits: candidates, kept. A method is a source of rejected
    answers, or one with its way ("weakened noisy-800"); a category is "audit", or with that of the
    question "audit caption". `shortcut_text`, `shortcut_length` are a classifier's accuracy."""
    out: list[Result] = []

    def add(side: str, method: str, metric: str, estimate: Estimate, category: str = "") -> None:
        if estimate:
            out.append(Result(side, f"audit {category}".strip(), method, "", metric,
                              results.Estimate(**estimate)))

    for source in filter(found.__contains__, SOURCES):
        of = found[source]
        add("kept", source, "share_kept", {"value": of["share_kept"]})
        parts = [(source, "", of), *((f"{source} {w}", "", m) for w, m in of["ways"].items()),
                 *((source, c, m) for c, m in of["categories"].items())]
        for method, category, measures in parts:
            for metric in filter(measures.__contains__, MEASURES):
                for side, estimate in measures[metric].items():
                    add(side, method, metric, estimate, category)
        for side, ches in of["displacement"].items():
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


MEASURES = (*STYLE, "longer", "near_duplicates", "equal", "truth_right", "is_prior", "of_noise")


def _checked(line: Line, answer: Mapping[str, Any], right: Right, prior: Right,
             phrases: Sequence[str]) -> dict[str, float | bool | None]:
    """Everything that is measured of an answer, None where it cannot be told; phrases: normalised,
    between spaces."""
    text, chosen = answer["text"], line["chosen"]
    said, shown = (f" {metrics.normalised(t)} " for t in (text, chosen))
    gaps, ches = {n: gap(n, text, chosen) for n in STYLE}, answer.get("scores", {}).get("ches")
    return gaps | {
        "longer": gaps["length_gap"] > 0, "near_duplicates": _near(text, chosen),
        "equal": said == shown, "truth_right": right(line, text),
        "is_prior": prior(line, text) and said != shown,
        "of_noise": any(p in said and p not in shown for p in phrases) if phrases else None,
        "ches": ches, "above_zero": None if ches is None else ches > 0}


def _measured(rows: Sequence[Mapping[str, Any]], names: Collection[str],
              mean: Callable[[Sequence], Estimate]) -> dict[str, dict[str, Estimate]]:
    """measure -> side -> its estimate; rows: `_checked` answers, each with side and image."""
    found: dict[str, dict[str, Estimate]] = {name: {} for name in names}
    for side in SIDES:
        for name in names:
            found[name][side] = mean([(r["image"], (float(r[name]), 1)) for r in rows
                                      if r["side"] == side and r[name] is not None])
    return found


def _displacement(rows: Sequence[Mapping[str, Any]], mean: Callable[[Sequence], Estimate]
                  ) -> dict[str, Any]:
    found = _measured(rows, ("ches", "above_zero"), mean)
    return {side: {"mean": of_side, "above_zero": found["above_zero"][side],
                   "percentile_95": round(float(np.percentile(
                       [r["ches"] for r in rows if r["side"] == side and r["ches"] is not None],
                       95)), 6)} if of_side else None for side, of_side in found["ches"].items()}


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
