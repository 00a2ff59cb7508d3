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
    ("There is no dog, cat or bus.", 0), ("There are no dogs, cats, or buses.", 0),
    ("No dogs, big cats and other buses.", 0), ("There is no dog, cat, bus.", 0),
    ("Without any dogs, cats or a bus.", 0), ("It isn't a dog, a cat or a bus.", 0),
    ("I don't see any dogs, cats or buses.", 0), ("It does not show a dog.", 0),
    ("I cannot see a dog or a cat.", 0), ("No dog, no cat, and no bus.", 0),
    ("There is no dog, but a cat.", 1), ("No dog, only a cat there.", 1),
    ("No dogs, just cats and buses.", 2), ("No dog, cat or bus, but a man.", 1),
    ("No dog, and two cats there.", 1), ("No dog, people are there.", 1),
    ("There is no dog, the cat or bus hides it.", 2), ("There is no dog, it is a cat.", 1),
    ("No dog, cat or bus. A man sits.", 1), ("No dogs, people and cats are there.", 2),
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
    tokens = vocabulary.words("No dog, it's a cat — 2 cats; isn't a bus.\nMen!", vocabulary.MARKS)
    assert len(vocabulary.denied(tokens)) == len(tokens)


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
    counts = amber("The sky, people on the ground, a boat, a dog, dogs, a tree, an orange here.")
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

ASKED = "Is there a dog in the image?"
# Each as a careful person reads it who asked for a dog.
READINGS = {"yes": [
    "Ye", "Y", "Yeah, of course.", "No doubt, a dog is there.", "No.1 answer: yes",
    "The dog is not the only one; a cat is there.", "A dog is there.", "I don't see why not.",
    "It doesn't seem that there is no dog.", "Yes, there is no doubt.", "Yes, there is.",
    "Yes, there is a dog, not a cat.", "Not really, but yes", "Да.", "sí", "Sí, hay un perro.",
    "ja", "是", "有", "图中有一只狗。", "はい、います。", "犬がいます。", "네", "हाँ", "जी हाँ", "نعم", "มี", "Sim.",
    "There are two dogs.", "A dog is lying on the floor.", "The dog is not black.",
    "A dog with no collar.", "A dog without a leash",
    "The dog sits on grass. There are no people.", "I'm not sure, but I think there is a dog.",
    "Absolutely.", "Sure, there is a dog.", "Definitely.", "True", "yep", "Yup!",
    "Is there a dog in the image? Yes", "Final answer: yes", "A. Yes", "either yes or no: yes",
    "<think>no dog</think>\n\nYes", "no dog here</think>Yes", "I don't think there is no dog.",
    "no one is there, but a dog is", "Without a doubt, yes", "Without a doubt.",
    "There is no question that a dog is there", "dog", "ＹＥＳ", "I'd say yes", "Well, yes.",
    "yes yes", "Why not?", "There are no fewer than two dogs.", "Probably yes", "Correct.",
    "Yes, I'm not sure why."], "no": [
    "The answer is: no", "Answer: C. No", "**NO**", "<think>Is it no? Or yes</think>Nope",
    "No, it isn't, but yes, it is a cat.", "there arent any", "The photo lacks a dog.",
    "There weren't any.", "They ask whether yes a dog is there; none is.",
    "I can not find a dog.", "Yes or no? My answer is no.", "Yes, there is no dog.",
    "Yes there isn't any dog", "not yet", "cannot", "none", "nope.", "Nah", "wasn't",
    "Нет, собаки нет.", "На изображении нет собаки.", "No hay ningún perro.", "Nein, kein Hund.",
    "Es gibt keinen Hund.", "Non.", "Il n'y a pas de chien.", "不", "图中没有狗。", "有没有狗？没有。", "いいえ",
    "犬はいません。", "아니요, 없습니다.", "नहीं", "जी नहीं", "لا", "ไม่มี", "não", "I don't see a dog.",
    "I don't see one", "I do not see any dogs in this picture.", "There's no dog",
    "There are no dogs.", "The dog isn't visible.", "A man without a dog.",
    "I see a cat, but no dog.", "There is a cat but I can't see a dog.",
    "The image shows a street. There isn't a dog.", "The image shows a street. There is no dog.",
    "I'm not sure, but no.", "Absolutely not.", "Of course not", "Sure! No, there is not.",
    "False.", "N", "n.", "Is there a dog? No.", "No?", "\\boxed{No}", "<answer>No</answer>",
    "{\"answer\": \"no\"}", "The answer is no.", "I thought yes. Answer: no", "(B) No",
    "I don't think there is a dog.", "I don't think so.", "There is nothing.", "no no no",
    "NO!!!", "It's a no.", "Not a dog", "Not at all.", "It is absent.", "The dog is absent",
    "A dog is missing from the image.", "It doesn't appear so.",
    "The animal is a cat, not a dog.", "Neither a dog nor a cat is there.",
    "No, but there is a cat.", "There wasnt any dog", "It is hard to tell, but there is no dog.",
    "Hmm, no", "Maybe not.", "Likely no", "Incorrect.", "I say no to dogs; there are none",
    "No, I am sure."], None: [
    "perhaps", "unsure", "I am not completely sure.", "I'm not 90% certain.", "It isn't clear",
    "yes/no", "It's difficult to say; the photo is not clear enough.",
    "Not possible to say if it is", "da", "No sé.", "Ich weiß nicht.", "Je ne sais pas.",
    "是不是狗不确定", "对不起，我无法判断。", "There is a cat.", "The image shows a street. It is not raining.",
    "I cannot see the image.", "I'm sorry, but I can't view images.",
    "I'm unable to determine that.", "I can't tell.", "Unclear", "Yes/No", "yes or no",
    "<think>there is no dog and it", "I doubt it", "There is no way to know.", "No idea", "🐶",
    "👍", "...", "Nо", "don't know", "I do not know if there is a dog.",
    "It's unclear whether a dog is there.", "Non-existent"]}


@pytest.mark.parametrize("text, said", [(t, said) for said, of in READINGS.items() for t in of])
def test_an_answer_is_read_as_a_careful_person_reads_it(text, said):
    assert hallucination.yes_or_no(text, ASKED) == said


@pytest.mark.parametrize("text, question, said", [
    ("Yes, it does not show a dog.", ASKED, "no"), ("Yes and no", ASKED, None),
    ("There is.", ASKED, "yes"), ("There isn't.", ASKED, "no"), ("I see nothing.", ASKED, "no"),
    ("As an AI I cannot see images.", ASKED, None), ("看不清楚", ASKED, None),
    ("Не уверен", ASKED, None), ("Tak", ASKED, "yes"), ("不存在", ASKED, "no"),
    ("There is a dog.", "", None), ("There is no dog.", "", "no"), ("No. Yes.", "", "no"),
    ("Nothing. Yesterday", "", None), ("It is big. It is not red.", "", None),
    ("The sky is not clear.", "Is the sky clear?", "no"), ("The dog is black.", "Is the dog black?",
                                                           "yes"),
    ("The dog is white.", "Is the dog black?", None), ("The dog is not black.", "Is the dog black?",
                                                       "no"),
    ("The dog does not appear to be black.", "Is the dog black?", "no"),
    ("Two men are playing.", "Is the man playing?", "yes"),
    ("有", "图中有狗吗？", "yes"), ("没有狗", "图中有狗吗？", "no")])
def test_a_statement_is_read_by_what_is_asked_for(text, question, said):
    assert hallucination.yes_or_no(text, question) == said


@pytest.mark.parametrize("text, pope, amber_says", [
    ("Yes", "yes", "yes"), ("No", "no", "no"), ("Yes.", "yes", None), ("no, it isn't", "no", None),
    ("Nope", "yes", None), ("I am not sure", "no", None), ("Yes. There is no cat.", "yes", None),
    ("", "yes", None)])
def test_the_official_scripts_read_by_rules_of_their_own(text, pope, amber_says):
    assert hallucination.as_official(text, positive="yes") == pope
    assert hallucination.as_official(text, positive="no") == amber_says


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
        "yes_ratio": (3, 7), "unanswered": (2, 7),
        # POPE's script reads both "perhaps" as yes: TP 3, FP 2, FN 1.
        "official_accuracy": (4, 7), "official_f1": (6, 9), "read_otherwise": (2, 7),
        "bare": (6, 7)}


def test_golden_answers_with_no_positive():
    # TP 1 (no, no), FP 1 (no, yes), FN 2 (yes and perhaps to a no).
    assert summed(GOLDEN, "no") == {
        "accuracy": (3, 7), "precision": (1, 2), "recall": (1, 3), "f1": (2, 5),
        "yes_ratio": (3, 7), "unanswered": (2, 7),
        # AMBER's script takes "Yes" and "No" alone, as they are written.
        "official_accuracy": (0, 7), "official_f1": (0, 3), "read_otherwise": (5, 7),
        "bare": (6, 7)}
