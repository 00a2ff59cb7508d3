"""The words of a text, in any language."""

import itertools
import random

import pytest

from bpo.study.text import normalised, pieces, words


@pytest.mark.parametrize("text, found", [
    ("It's a 'dog', the dogs' isn’t", ["it's", "a", "dog", "the", "dogs", "isn't"]),
    ("**No** `dog` | yes_no", ["no", "dog", "yes", "no"]),
    ("没有", ["没", "有"]), ("一只狗。", ["一", "只", "狗"]),
    ("コーヒーを飲む", ["コーヒー", "を", "飲", "む"]),
    ("ไม่มี", ["ไ", "ม่", "มี"]), ("한국어 텍스트", ["한국어", "텍스트"]), ("Нет!", ["нет"]),
    ("यह किताब है।", ["यह", "किताब", "है"]),
    ("مَرْحَبًا", ["مَرْحَبًا"]), ("می\u200cخواهم", ["میخواهم"]),
    ("sí, café", ["sí", "café"]), ("Straße", ["strasse"]),
    ("x−3 and −3 or 3-5", ["x", "3", "and", "-3", "or", "3", "5"]),
    ("a 🐶 < $5", ["a", "🐶", "<", "$", "5"]), ("...", ["..."]), (" ?! ", ["?!"]), ("", []),
    (" \n\u200b\ufeff", []), ("\ud800", ["\ud800"])])
def test_words_are_those_of_any_script(text, found):
    assert words(text) == found


@pytest.mark.parametrize("one, other", [
    ("Yes.", "yes"), ("café", "cafe\u0301"), ("ＹＥＳ", "yes"), ("ﬁsh", "FISH"), ("ΣΑΣ", "σας"),
    ("ｱｲｽ", "アイス"), ("isn’t", "isn't"), ("❤️", "❤"), ("一只狗。", "一只狗"), ("«да»", "Да!"),
    ("co\u00adop", "coop"), ("한국", "\u1112\u1161\u11ab\u1100\u116e\u11a8")])
def test_texts_that_differ_in_form_alone_are_the_same(one, other):
    assert normalised(one) == normalised(other) != ""


def test_answers_that_differ_are_told_apart():
    answers = ["", "no", "-3", "3", "白色", "红色", "红", "没有", "有", "да", "нет", "नहीं", "नही", "हाँ",
               "لا", "نعم", "👍", "👎", "👍🏽", "🇫🇷", "🇩🇪", "...", "?", "$5", "€5", "x < 3", "x > 3",
               "¿", "sí", "si", "ไม่มี", "มี", "はい", "いいえ", "c'est", "\U000378aa", "\U000378ab",
               "\U0001f3f4\U000e0067\U000e0062\U000e007f", "\U0001f3f4"]
    for one, other in itertools.combinations(answers, 2):
        assert normalised(one) != normalised(other), (one, other)


def test_marks_that_are_asked_for_stand_between_the_words():
    assert words("No dog, a cat!", ",.!") == ["no", "dog", ",", "a", "cat", "!"]
    assert words("No dog; a cat") == [w for w in words("No dog; a cat", ";") if w != ";"]


@pytest.mark.parametrize("letters", ["".join(map(chr, range(128))), "aZ0'-`9$ <_.\n\x1c~"])
def test_ascii_text_has_the_words_that_it_has_beside_what_is_not_seen(letters):
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices(letters, k=draw.randint(0, 14)))
        for marks in ("", ".,;:!?\n()", "^]-\\"):
            assert words(text, marks) == words(text + "\u200b", marks), (text, marks)


@pytest.mark.parametrize("text, length", [
    ("a well-lit room , really", 5), ("一只狗。", 4), ("A狗 b", 3), ("", 0), ("यह किताब है", 3)])
def test_a_text_is_as_long_as_its_words_or_characters(text, length):
    assert len(pieces(text)) == length
