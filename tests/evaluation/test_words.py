"""Object phrases and the files that list them, COCO's own list among them."""

import random
import re

import pytest

from bpo.evaluation import words as vocabulary
from bpo.params import Refusal

COCO = vocabulary.lexicon(vocabulary.read(vocabulary.COCO))


def written(tmp_path, text):
    file = tmp_path / "words.txt"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file_is_read_as_classes_with_their_forms(tmp_path):
    file = written(tmp_path, "\ufeffdog, dogs,puppy\n\n  hot dog ,hot dogs\ncat\n")
    assert vocabulary.read(file) == {"dog": ["dog", "dogs", "puppy"],
                                     "hot dog": ["hot dog", "hot dogs"], "cat": ["cat"]}


def test_empty_cells_and_repeats_within_a_class_are_no_error(tmp_path):
    assert vocabulary.read(written(tmp_path, "dog, , dogs,\ndog, puppy, Dogs\n")) == {
        "dog": ["dog", "dogs", "dog", "puppy", "Dogs"]}


def test_a_line_that_begins_with_a_comma_lists_what_is_no_object(tmp_path):
    lexicon = vocabulary.lexicon(vocabulary.read(written(
        tmp_path, "train, trains\ncar\n, train track, train tracks\n")))
    assert lexicon.objects("a train on train tracks, one train track, a car") == ["train", "car"]
    assert lexicon.classes == {"train", "car"}


@pytest.mark.parametrize("text, said", [
    ("dog, puppy\ncat, Puppy\n", r"line 2: 'Puppy' stands for 'cat' and in line 1 for 'dog'"),
    ("train\n, train\n", "line 2: 'train' stands for no object and in line 1 for 'train'"),
    ("hot dog\nsnack, hot-dog", "'hot-dog' stands for 'snack'"),
    ("", "no object class"), ("\n \n", "no object class"), (", track\n", "no object class")])
def test_files_that_cannot_be_meant_are_refused(tmp_path, text, said):
    with pytest.raises(Refusal, match=said):
        vocabulary.read(written(tmp_path, text))


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(Refusal, match="missing or no UTF-8"):
        vocabulary.read(tmp_path / "none.txt")
    (tmp_path / "bytes.txt").write_bytes(b"dog, \xff\xfe\n")
    with pytest.raises(Refusal, match="missing or no UTF-8"):
        vocabulary.read(tmp_path / "bytes.txt")


def test_a_vocabulary_is_compiled_once():
    words = {"dog": ["dog"], "cat": ["cat", "cats"]}
    assert vocabulary.lexicon(words) is vocabulary.lexicon({k: tuple(v) for k, v in words.items()})
    assert vocabulary.lexicon({**words, "cat": ["cat"]}).objects("cats") == []


def test_a_changed_vocabulary_is_compiled_anew():
    words = {"dog": ["dog"]}
    assert vocabulary.lexicon(words).objects("a puppy") == []
    words["dog"].append("puppy")
    assert vocabulary.lexicon(words).objects("a puppy") == ["dog"]


def test_mentions_say_where_the_phrase_stands():
    lexicon = vocabulary.lexicon({"hot dog": ["hot dog"], "dog": ["dog"],
                                  "stand": ["hot dog stand"]})
    tokens = "a hot dog and a dog at a hot dog stand".split()
    assert lexicon.mentions(tokens) == [("hot dog", 1, 3), ("dog", 5, 6), ("stand", 8, 11)]


def test_coco_has_its_eighty_classes_with_singular_and_plural():
    assert len(COCO.classes) == 80
    for name in COCO.classes:
        assert COCO.objects(f"the {name} here") == [name]


@pytest.mark.parametrize("text, found", [
    ("a toilet seat", ["toilet"]), ("the seat of the toilet", ["toilet"]), ("a seat", ["chair"]),
    ("a bow tie", ["tie"]), ("a baby zebra with an adult zebra", ["zebra", "zebra"]),
    ("a baby", ["person"]), ("a motor bike", ["motorcycle"]), ("a passenger train", ["train"]),
    ("a passenger", ["person"]), ("on the train tracks", []), ("home plate", []),
    ("a hot dog", ["hot dog"]), ("a dog", ["dog"]), ("a toy dog", []), ("a stuffed bear",
                                                                        ["teddy bear"]),
    ("teddy bears", ["teddy bear"]), ("a fire truck", ["truck"]), ("the bus stop", []),
    ("a bus driver", ["person"]), ("an orange shirt", []), ("an orange", ["orange"]),
    ("a carrot cake", ["cake"]), ("a computer mouse and a computer keyboard",
                                  ["mouse", "keyboard"]),
    ("a glass of wine", ["wine glass"]), ("microwave oven", ["microwave"]),
    ("a clock tower", ["clock"]), ("a ski lift", []), ("two skis", ["skis"]),
    ("a man's hand", ["person"]), ("a remote village", []), ("a remote control", ["remote"]),
    ("a catcher's mitt", ["baseball glove"]), ("a DVD player", []), ("players", ["person"])])
def test_coco_s_phrases_name_what_they_mean(text, found):
    assert COCO.objects(text) == found


@pytest.mark.parametrize("text, found", [
    ("an orange kite", ["kite"]), ("Orange kites fly.", ["kite"]),
    ("an orange and white cat", ["cat"]), ("a blue and orange bus", ["bus"]),
    ("the kite is orange", ["kite"]), ("The bus is bright orange.", ["bus"]),
    ("a man in orange", ["person"]), ("an orange striped cat", ["cat"]), ("an orange-red sky", []),
    ("orange, black and white", []), ("the orange life jacket", []), ("a dark orange one", []),
    ("an orange", ["orange"]), ("An orange lies on a table", ["orange", "dining table"]),
    ("an apple, an orange, and a banana", ["apple", "orange", "banana"]),
    ("apple, orange, banana", ["apple", "orange", "banana"]), ("an orange and an apple",
                                                               ["orange", "apple"]),
    ("the orange on the plate", ["orange"]), ("orange slices", ["orange"]), ("oranges", ["orange"]),
    ("a peeled orange.", ["orange"]), ("orange juice", []), ("is there an orange?", ["orange"])])
def test_a_colour_s_word_is_an_object_where_it_is_one(text, found):
    assert COCO.objects(text) == found


def test_the_longest_phrase_wins_as_in_one_regular_expression():
    """1,000 texts of the list's own words against a match by alternatives, longest first."""
    rng = random.Random(5)
    forms = sorted(COCO.phrases, key=len, reverse=True)
    pattern = re.compile(r"(?<!\S)(?:" + "|".join(re.escape(" ".join(f)) for f in forms)
                         + r")(?!\S)")
    pieces = [w for f in forms for w in f if w != "orange"] + ["the", "red", "of", "and"] * 200
    for _ in range(1000):
        text = " ".join(rng.choices(pieces, k=30))
        slow = [COCO.phrases[tuple(m.group().split())] for m in pattern.finditer(text)]
        assert COCO.objects(text) == [name for name in slow if name]
