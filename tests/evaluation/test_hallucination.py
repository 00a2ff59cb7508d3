"""What answers add to CHAIR, Object HalBench and AMBER, worked out by hand."""

import pytest

from bpo.evaluation import hallucination
from bpo.evaluation import words as vocabulary

LEXICON = vocabulary.lexicon({
    "dog": ["dog", "dogs", "puppy", "puppies"], "hot dog": ["hot dog", "hot dogs"],
    "cat": ["cat", "cats"], "person": ["person", "people", "man", "men", "woman"],
    "bus": ["bus", "buses"], "knife": ["knife", "knives"], "train": ["train", "trains"],
    "": ["train track", "train tracks"]})


def chair(text, *present):
    return hallucination.chair(text, present, LEXICON)


def halbench(text, *present):
    return hallucination.object_halbench(text, present, LEXICON)


# --- CHAIR against Object HalBench --------------------------------------------------------------

def test_repeats_count_in_chair_and_once_in_object_halbench():
    text = "A dog, two dogs, and one more dog, and a cat beside the cat."
    assert chair(text, "cat")["chair_i"] == (3, 5)
    assert chair(text, "cat")["objects"] == (5, 1)
    assert halbench(text, "cat")["mention"] == (1, 2)
    assert halbench(text, "cat")["objects"] == (2, 1)


def test_two_words_of_one_class_are_two_mentions():
    text = "A man and a woman and men with a puppy and a dog."
    # man (men is its plural), woman; puppy, dog.
    assert halbench(text, "dog")["mention"] == (2, 4)
    assert halbench(text, "dog")["cover"] == (1, 1)


@pytest.mark.parametrize("text", [
    "a bus and all the buses", "a knife between two knives", "the puppy of the puppies",
    "a man among men", "one hot dog or two hot dogs"])
def test_singular_and_plural_are_one_mention(text):
    assert halbench(text)["mention"] == (1, 1)


def test_a_plural_of_another_class_s_word_is_a_mention_of_its_own():
    lexicon = vocabulary.lexicon({"spectacles": ["glasses"], "cup": ["glass"]})
    counts = hallucination.object_halbench("my glasses beside a glass", {"cup"}, lexicon)
    assert counts["mention"] == (1, 2)


def test_answers_without_an_object_count_in_chair_alone():
    text = "A sunny day in the mountains."
    assert chair(text, "dog")["chair_s"] == (0, 1) and chair(text, "dog")["chair_i"] == (0, 0)
    assert halbench(text, "dog")["response"] == (0, 0)
    assert halbench(text, "dog")["mention"] == (0, 0)
    assert halbench(text, "dog")["cover"] == (0, 1)


@pytest.mark.parametrize("text, wrong", [("It is a dog.", (1, 1)), ("A dog sits.", (0, 0)),
                                         ("dog", (0, 0)), ("A  big   dog", (0, 0))])
def test_answers_of_three_words_have_no_object_in_object_halbench(text, wrong):
    assert halbench(text, "cat")["response"] == wrong
    assert chair(text, "cat")["chair_s"] == (1, 1)


@pytest.mark.parametrize("text, present, chair_s", [
    ("he eats a hot dog today", {"hot dog"}, 0), ("he eats a hot dog today", {"dog"}, 1),
    ("he has a dog today", {"dog"}, 0), ("he has a dog today", {"hot dog"}, 1),
    ("along the train tracks today", set(), 0), ("along the train today", set(), 1)])
def test_a_longer_phrase_is_not_the_object_in_it(text, present, chair_s):
    assert hallucination.chair(text, present, LEXICON)["chair_s"] == (chair_s, 1)
    assert hallucination.object_halbench(text, present, LEXICON)["response"][0] == chair_s


@pytest.mark.parametrize("text, mentions", [
    ("There is no dog here at all.", 0), ("There are no dogs or cats in sight.", 0),
    ("A street without people or dogs.", 0), ("It is not a dog.", 0),
    ("There isn't any dog in it.", 0), ("There aren’t any dogs in it.", 0),
    ("Neither dog nor cat is there.", 0),
    ("There is no dog, a cat sits there.", 1), ("There is no dog but a cat there.", 1),
    ("There is no dog and a cat sits.", 1), ("There are no dogs and cats there.", 0),
    ("There is no dog. A cat sits there.", 1), ("The dog is not sleeping at all.", 1),
    ("The man is not only tall there.", 1), ("Not the dog of that man.", 2)])
def test_denied_objects_count_in_chair_alone(text, mentions):
    assert halbench(text)["mention"][1] == mentions
    assert chair(text)["chair_i"][1] >= max(mentions, 1)


def test_a_denied_object_is_no_error_but_a_claimed_one_beside_is():
    text = "There is no dog in the picture, and a dog is in the bus."
    assert halbench(text, "bus")["mention"] == (1, 2)
    assert chair(text, "bus")["chair_i"] == (2, 3)


def test_each_word_has_its_own_flag():
    text = "No dog, it's a cat — 2 cats; isn't a bus.\nMen!"
    assert len(hallucination.denied(text)) == len(vocabulary.words(text))


def test_cover_and_length_are_those_by_hand():
    counts = chair("A man with a dog and a dog.", "person", "dog", "cat", "bus")
    assert counts["cover"] == (2, 4) and counts["words"] == (8, 1)
    counts = halbench("A man with a dog and a dog.", "person", "dog", "cat", "bus")
    assert counts["cover"] == (2, 4) and counts["words"] == (8, 1)


# --- AMBER --------------------------------------------------------------------------------------

ASSOCIATION = {"sky": [], "grass": ["ground"], "man": ["person", "people"], "person": ["people"],
               "dog": [], "cloud": [], "ship": ["boat"], "tree": ["leave", "bush"], "can": [],
               "TV": [], "orange": [], "knife": [], "air-conditioning": [], "slippers": []}
TRUTH, HALLU = ["sky", "grass", "man", "ship", "ship"], ["dog", "cloud"]


def amber(text, truth=TRUTH, hallu=HALLU):
    return hallucination.amber(text, truth, hallu, ASSOCIATION, ("orange",))


def test_amber_s_golden_answer():
    # Nouns: sky, people, ground, boat, dog, dog, tree, orange; wrong: dog twice, tree.
    counts = amber("The sky, people on the ground, a boat, a dog, dogs, a tree, an orange mood.")
    assert counts == {"chair": (3, 8), "cover": (4, 5), "hal": (1, 1), "cog": (1, 2),
                      "words": (16, 1)}


def test_amber_s_answer_without_an_error():
    assert amber("A man below the sky, nothing else.") == {
        "chair": (0, 2), "cover": (2, 5), "hal": (0, 1), "cog": (0, 2), "words": (7, 1)}


def test_amber_s_answer_without_a_noun():
    assert amber("Lovely!") == {"chair": (0, 0), "cover": (0, 5), "hal": (0, 1), "cog": (0, 2),
                                "words": (1, 1)}


def test_a_double_object_is_covered_once():
    assert amber("a ship and a ship")["cover"] == (1, 5)


def test_a_noun_stands_for_the_first_object_that_is_associated_with_it():
    assert amber("people and a person", ["person", "man"])["cover"] == (2, 2)
    assert amber("people", ["person", "man"])["cover"] == (1, 2)
    assert amber("a person", ["person", "man"])["cover"] == (1, 2)  # by way of man


def test_an_association_goes_one_way():
    assert amber("a man", ["person"])["chair"] == (1, 1)
    assert amber("a person", ["man"])["chair"] == (0, 1)


@pytest.mark.parametrize("text, nouns", [
    ("it can be seen", 0), ("a can", 1), ("the cans", 1), ("they can dog", 1), ("leaves", 1),
    ("the leave", 1), ("to leave", 0), ("knives", 1), ("a TV", 1), ("tv", 1), ("a man's boat", 2),
    ("air-conditioning", 1), ("man-made", 0), ("slippers", 1), ("skyline", 0), ("Skies", 1)])
def test_listed_words_are_nouns(text, nouns):
    assert amber(text)["chair"][1] == nouns


# --- POPE's and AMBER's yes/no questions ---------------------------------------------------------

@pytest.mark.parametrize("text, said", [
    ("Yes.", "yes"), ("no", "no"), ("Yes, there is no doubt.", "yes"), ("No. Yes.", "no"),
    ("The answer is: yes", "yes"), ("There is a dog.", None), ("", None),
    ("Nothing. Yesterday", None),
    ("There is not a dog.", "no"), ("It is big. It is not red.", None), ("There isn’t any", "no"),
    ("I don't see one", "no"), ("I am not sure", None), ("It's not possible to tell.", None),
    ("I don't know", None), ("Not really, but yes", "yes")])
def test_an_answer_is_read_by_the_rules_that_are_stated(text, said):
    assert hallucination.yes_or_no(text) == said


def summed(answers, positive):
    totals = {}
    for text, truth in answers:
        for name, (top, bottom) in hallucination.yes_no(text, truth, positive=positive).items():
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
