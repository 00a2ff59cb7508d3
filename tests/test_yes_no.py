"""Yes/no questions: how an answer is read, and counts whose sums are the published metrics."""

import random

import pytest

from bpo import yes_no


@pytest.mark.parametrize("text, said", [
    ("Yes.", "yes"), ("no", "no"), ("Yes, there is no doubt.", "yes"), ("No. Yes.", "no"),
    ("The answer is: yes", "yes"), ("There is a dog.", None), ("", None),
    ("Nothing. Yesterday", None),
    ("There is not a dog.", "no"), ("It is big. It is not red.", None), ("There isn’t any", "no"),
    ("I don't see one", "no"), ("I am not sure", None), ("It's not possible to tell.", None),
    ("I don't know", None), ("Not really, but yes", "yes")])
def test_an_answer_is_read_by_the_rules_that_are_stated(text, said):
    assert yes_no.said(text) == said


def summed(answers, positive):
    totals = {}
    for text, truth in answers:
        for name, (top, bottom) in yes_no.counts(text, truth, positive=positive).items():
            old = totals.get(name, (0, 0))
            totals[name] = (old[0] + top, old[1] + bottom)
    return totals


GOLDEN = [("yes", "yes"), ("Yes it is", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"),
          ("perhaps", "yes"), ("perhaps", "no")]


def test_golden_answers_with_yes_positive():
    # TP 2, FP 1, TN 1, FN 2 (one said no, one nothing); of 7 answers 3 say yes, 2 neither.
    assert summed(GOLDEN, "yes") == {
        "accuracy": (3, 7), "precision": (2, 3), "recall": (2, 4), "f1": (4, 7),
        "yes_ratio": (3, 7), "unanswered": (2, 7)}


def test_golden_answers_with_no_positive():
    # TP 1 (no, no), FP 1 (no, yes), FN 2 (yes and perhaps to a no).
    assert summed(GOLDEN, "no") == {
        "accuracy": (3, 7), "precision": (1, 2), "recall": (1, 3), "f1": (2, 5),
        "yes_ratio": (3, 7), "unanswered": (2, 7)}


@pytest.mark.parametrize("positive", ("yes", "no"))
def test_a_thousand_answers_give_what_a_confusion_matrix_gives(positive):
    rng = random.Random(2)
    answers = [(rng.choice(["Yes.", "No.", "no, none", "yes, a red one", "a dog"]),
                rng.choice(["yes", "no"])) for _ in range(1000)]
    tp = fp = tn = fn = yes = 0
    for text, truth in answers:
        first = text.lower().replace(",", " ").replace(".", " ").split()[0]
        yes += first == "yes"
        if first == positive and truth == positive:
            tp += 1
        elif first == positive:
            fp += 1
        elif truth == positive:
            fn += 1
        elif first in ("yes", "no"):
            tn += 1
    found = {n: top / bottom for n, (top, bottom) in summed(answers, positive).items()}
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    assert found["precision"] == pytest.approx(precision)
    assert found["recall"] == pytest.approx(recall)
    assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["accuracy"] == pytest.approx((tp + tn) / 1000)
    assert found["yes_ratio"] == pytest.approx(yes / 1000)
