"""Yes/no questions, as POPE and AMBER's discriminative task count them: one answer's counts."""

import re

from bpo.vocabulary import words

Counts = dict[str, tuple[float, float]]
_DENIALS = frozenset(("not", "isn't", "aren't", "doesn't", "don't"))
_UNSURE = re.compile(r"\b(not|isn't|don't) (sure|certain|clear|know|possible)\b")


def said(text: str) -> str | None:
    """What an answer says: "yes", "no", or None where it says neither.

    The first yes or no decides. Where there is none, a not (or isn't, aren't, doesn't, don't) in
    the first sentence means no ("There is not a dog"), unless it is about knowing ("I am not
    sure"). The script of POPE (arXiv 2305.10355) differs: it reads the first sentence alone, where
    any no or not means no and everything else yes; that of AMBER takes "Yes" and "No" alone.
    """
    plain = text.replace("’", "'")
    first = next((w for w in words(plain) if w in ("yes", "no")), None)
    if first is not None:
        return first
    sentence = re.split(r"[.!?\n]", plain.strip().lower())[0]
    denies = _DENIALS & set(words(sentence)) and not _UNSURE.search(sentence)
    return "no" if denies else None


def counts(text: str, truth: str, *, positive: str = "yes") -> Counts:
    """What one answer to a yes/no question adds to each metric.

    truth: "yes" or "no".  positive: the answer that precision and recall are about, "yes" in POPE,
    "no" in AMBER, which asks about what is not there. precision: right / given positives. recall:
    right / true positives. f1: 2 TP / (2 TP + FP + FN), a ratio of sums too. yes_ratio: answers
    that say yes / ANSWERS. unanswered: answers that say neither; they are wrong and no positive.
    """
    answer = said(text)
    given, true = float(answer == positive), float(truth == positive)
    hit = given * true
    return {"accuracy": (float(answer == truth), 1), "precision": (hit, given),
            "recall": (hit, true), "f1": (2 * hit, given + true),
            "yes_ratio": (float(answer == "yes"), 1), "unanswered": (float(answer is None), 1)}
