"""Selection: what is dropped and why, what is kept, and the control drawn beside it."""

from collections import Counter

import numpy as np
import pytest
import torch

from bpo import params
from bpo.pairs import selection
from bpo.params import PairGeneration

CHOSEN = "a red dog on a mat"


def candidate(text, *, source="weakened", mode="noisy", **scores):
    made = {"source": source, "mode": mode, "step": 800, "draw": 0, "sample": 0, "text": text}
    return made | ({"scores": scores} if scores else {})


def line(*candidates, row_id="a", chosen=CHOSEN):
    return {"id": row_id, "image": "0.png", "category": "caption", "prompt": [], "chosen": chosen,
            "candidates": list(candidates)}


def choose(*candidates, weights=(), keep=1, drop_right=False, right=lambda text: None, seed=0,
           row_id="a"):
    p = PairGeneration(select=dict(weights), keep=keep, drop_right=drop_right, seed=seed)
    return selection.choose(p, line(*candidates, row_id=row_id), lambda line, text: right(text))


def texts(candidates):
    return [c["text"] for c in candidates]


def reasons(choice):
    return [(d["text"], d["reason"]) for d in choice.dropped]


# --- what is dropped ----------------------------------------------------------------------------

@pytest.mark.parametrize("text, reason", [
    (CHOSEN, "equal to the annotation"), ("A red dog, on a mat.",
                                          "equal but for case and punctuation"),
    ("", "empty"), (" \u200b\n", "empty"), (" ... ", None), ("🐶", None), ("一只狗", None),
    ("a red cat", None)])
def test_an_answer_that_would_train_on_nothing_is_useless(text, reason):
    assert selection.useless(text, CHOSEN) == reason
    choice = choose(candidate(text), candidate("a blue dog"))
    assert choice.dropped == [
        {"id": "a", "category": "caption", "source": "weakened", "mode": "noisy",
         "text": text if reason else "a blue dog", "reason": reason or "not selected"}]


def test_a_repeat_is_kept_once_in_a_group_and_again_in_another():
    choice = choose(candidate("A cat."), candidate("a cat"), candidate("a fox"),
                    candidate("a cat", mode="blank"), candidate("a cat", source="injected",
                                                                mode="model"), keep=3)
    assert [(c["source"], c["mode"], c["text"]) for c in choice.kept] == [
        ("weakened", "noisy", "A cat."), ("weakened", "noisy", "a fox"),
        ("weakened", "blank", "a cat"), ("injected", "model", "a cat")]
    assert reasons(choice) == [("a cat", "repeats another candidate")]


def test_answers_that_are_right_are_dropped_only_when_asked_and_known():
    truth = {"a dog": True, "a fox": False, "A dog.": True}
    made = [candidate(t) for t in ("a dog", "A dog.", "a fox", "a gnu")]
    choice = choose(*made, keep=4, drop_right=True, right=truth.get)
    assert texts(choice.kept) == ["a fox", "a gnu"]  # nothing is known of the gnu
    assert reasons(choice) == [("a dog", "in truth right"), ("A dog.", "in truth right")]
    choice = choose(*made, keep=4, right=truth.get)
    assert texts(choice.kept) == ["a dog", "a fox", "a gnu"]


def test_every_candidate_is_kept_or_dropped_once():
    made = [candidate(t) for t in ("a cat", "", CHOSEN, "a CAT", "a fox", "a gnu")]
    choice = choose(*made, keep=2)
    assert sorted(texts(choice.kept) + texts(choice.dropped)) == sorted(texts(made))
    assert Counter(d["reason"] for d in choice.dropped) == {
        "empty": 1, "equal to the annotation": 1, "repeats another candidate": 1,
        "not selected": 1}


def test_a_line_without_a_usable_candidate_keeps_none():
    choice = choose(candidate(""), candidate(CHOSEN))
    assert (choice.kept, choice.unselected, len(choice.dropped)) == ([], [], 2)
    assert choose() == ([], [], [])


# --- scores -------------------------------------------------------------------------------------

def test_the_scores_are_those_by_hand():
    # Four of six and three words match in order: 2 * 3 / 9; lengths 6 and 3.
    made = candidate("A red mat!", logp_clean=-3.0, logp_noisy=-1.25, ches=9.0)
    assert selection.score(made, CHOSEN) == pytest.approx(
        {"similarity": 2 / 3, "length": 0.5, "image": 1.75})
    assert selection.score(candidate(CHOSEN.upper()), CHOSEN) == {"similarity": 1, "length": 1}
    assert selection.score(candidate("zebras", ches=1.0), CHOSEN) == {
        "similarity": 0, "length": pytest.approx(1 / 6)}
    assert selection.score(candidate("one two three four"), "six")["length"] == 0.25


def test_every_score_has_its_meaning_and_a_parameter_s_name():
    assert tuple(selection.SCORES) == params.SCORES
    scored = selection.score(candidate("a", logp_clean=0.0, logp_noisy=0.0), CHOSEN)
    assert scored.keys() == selection.SCORES.keys()


def test_without_weights_the_first_made_are_kept():
    choice = choose(*(candidate(t) for t in ("zebras", "a red dog", "a cat")), keep=2)
    assert texts(choice.kept) == ["zebras", "a red dog"]


@pytest.mark.parametrize("weights, kept", [
    ({"similarity": 1}, "a red cat on a mat"), ({"similarity": -1}, "zebras"),
    ({"length": 1}, "six other words stand right here"), ({"image": 1}, "zebras"),
    ({"image": 1, "similarity": 3}, "a red cat on a mat"),
    ({"image": 1, "similarity": 2}, "zebras")])
def test_the_weighted_sum_of_scores_chooses(weights, kept):
    # similarity 0, 0 and 10/12; length 1/6, 1 and 1; image 2, -1 and 0.
    choice = choose(candidate("zebras", logp_clean=-3.0, logp_noisy=-1.0),
                    candidate("six other words stand right here", logp_clean=-1.0, logp_noisy=-2.0),
                    candidate("a red cat on a mat", logp_clean=-1.0, logp_noisy=-1.0),
                    weights=weights)
    assert texts(choice.kept) == [kept]


def test_the_best_come_first_and_ties_in_the_order_of_making():
    made = [candidate(t) for t in ("zebras", "lions here", "lynxes here", "tigers there now")]
    choice = choose(*made, weights={"length": 1}, keep=3)
    assert texts(choice.kept) == ["tigers there now", "lions here", "lynxes here"]
    assert reasons(choice) == [("zebras", "not selected")]


def test_each_group_has_its_own_best():
    choice = choose(candidate("a cat"), candidate("a red cat on a mat"),
                    candidate("a fox", mode="crop"), weights={"similarity": 1})
    assert texts(choice.kept) == ["a red cat on a mat", "a fox"]


def test_each_noise_step_has_its_own_best():
    made = [candidate(text) | {"step": step} for step, text in (
        (500, "a cat"), (500, "a fox"), (800, "a cat"), (999, "a cow"))]
    assert [(c["step"], c["text"]) for c in choose(*made).kept] == [
        (500, "a cat"), (800, "a cat"), (999, "a cow")]


def test_a_useless_candidate_needs_no_scores():
    choice = choose(candidate(""), candidate("a cat", logp_clean=0.0, logp_noisy=0.0),
                    weights={"image": 1})
    assert texts(choice.kept) == ["a cat"]


# --- the control --------------------------------------------------------------------------------

MADE = [candidate(t) for t in ("a cat", "a fox", "a gnu")]


@pytest.mark.parametrize("keep", (1, 2, 3, 9))
def test_the_control_has_as_many_candidates_of_each_group_as_are_kept(keep):
    made = [*MADE, candidate(""), candidate("a fox", mode="crop"), candidate("A CAT")]
    choice = choose(*made, keep=keep, weights={"length": 1})
    budget = Counter((c["source"], c["mode"]) for c in choice.kept)
    assert budget == {("weakened", "noisy"): min(keep, 3), ("weakened", "crop"): 1}
    assert Counter((c["source"], c["mode"]) for c in choice.unselected) == budget
    drawn = texts(c for c in choice.unselected if c["mode"] == "noisy")
    assert len(set(drawn)) == len(drawn) and set(drawn) <= {"a cat", "a fox", "a gnu"}


def test_the_control_is_drawn_uniformly_from_all_usable_ones():
    drawn = Counter()
    for n in range(900):
        choice = choose(*MADE, candidate("a dog"), row_id=str(n), drop_right=True,
                        right=lambda text: text == "a dog")
        assert texts(choice.kept) == ["a cat"]
        drawn.update(texts(choice.unselected))
    assert drawn.keys() == {"a cat", "a fox", "a gnu"}
    assert all(250 < count < 350 for count in drawn.values()), drawn  # 300 +- 3.5 deviations


def test_the_control_depends_on_the_seed_and_the_line_alone():
    def drawn(*more, seed=0):
        return [texts(c for c in choose(*MADE, *more, row_id=str(n), seed=seed).unselected
                      if c["mode"] == "noisy") for n in range(20)]

    assert drawn() == drawn() == drawn(candidate("a gnu", mode="crop"))
    assert drawn() != drawn(seed=1)
    assert len({tuple(d) for d in drawn()}) > 1, "every line has the same draw"


def test_weights_do_not_move_the_control():
    def unselected(weights):
        return [choose(*MADE, row_id=str(n), weights=weights).unselected for n in range(20)]

    assert unselected({}) == unselected({"length": 1, "similarity": -2})


def test_what_comes_in_is_left_as_it_was():
    given = line(*MADE)
    choice = selection.choose(PairGeneration(), given, lambda line, text: None)
    assert given == line(*MADE)
    assert choice.kept == [MADE[0]]


# --- displacement -------------------------------------------------------------------------------

@pytest.mark.parametrize("rejected, value", [
    ([3.0, 1.0], 0.0),  # <(1, 2), (3, 1)> = 5 = ||(1, 2)||^2: as far along the chosen's direction
    ([1.0, 2.0], 0.0), ([0.0, 0.0], -5.0), ([-1.0, -2.0], -10.0), ([3.0, 4.0], 6.0)])
def test_ches_is_the_one_by_hand(rejected, value):
    assert selection.ches(np.array([1.0, 2.0]), np.array(rejected)) == value
    assert selection.ches(torch.tensor([1, 2], dtype=torch.bfloat16),
                          torch.tensor(rejected, dtype=torch.bfloat16)) == value


def test_ches_does_not_lose_a_difference_to_half_precision():
    # 256 * 256 + 1 * 1 - 256 * 256: in bfloat16 the sum would be 65536 and the difference 0.
    chosen, rejected = torch.tensor([256, 1.0]), torch.tensor([256, 2.0])
    assert selection.ches(chosen.bfloat16(), rejected.bfloat16()) == 1.0
