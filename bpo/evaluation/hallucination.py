"""Hallucination as the judge-free benchmarks count it: what one answer adds to each metric.

Every metric is (counted, out of), so that sums over answers give the published ratio. Words alone
decide; a function says where its official script asks a language model or word vectors.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from bpo.evaluation.words import Lexicon
from bpo.study.text import normalised, pieces, words

Counts = dict[str, tuple[float, float]]

SHORT = 3  # words: an answer up to this long counts as one without an object (Object HalBench)
NEGATORS = frozenset("no without nor neither".split())
ARTICLES = frozenset("a an any".split())  # after a "not": "not a dog", "there aren't any dogs"
DENIALS = frozenset("not isn't aren't doesn't don't".split())
UNSURE = re.compile(r"\b(not|isn't|don't) (sure|certain|clear|know|possible)\b")
STOPS = frozenset(".,;:!?\n")
HYPHEN = re.compile(r"(?<=\w)-(?=\w)")
TURNS = frozenset("but while although though however except instead only".split())
STARTS = frozenset("a an the some there".split())  # after an "and": "no dog and a cat"

IRREGULAR = {"men": "man", "women": "woman", "children": "child", "mice": "mouse",
             "geese": "goose", "knives": "knife", "shelves": "shelf", "leaves": "leaf",
             "calves": "calf", "scarves": "scarf", "oxen": "ox", "firemen": "fireman",
             "policemen": "policeman", "gentlemen": "gentleman", "fishermen": "fisherman",
             "businessmen": "businessman", "cameramen": "cameraman", "horsemen": "horseman"}
# Words of AMBER's list that are often no noun: they count behind a word of BEFORE_A_NOUN alone.
ALSO_VERBS = frozenset("can hot leave note sound support switch watch drink drain lock pack spray "
                       "tap warp sailing".split())
BEFORE_A_NOUN = frozenset(
    "a an the this that these those its his her their one two three four five some several many "
    "another each black white red blue green large small".split())


def chair(text: str, present: Collection[str], lexicon: Lexicon) -> Counts:
    """CHAIR (arXiv 1809.02156) of one caption.

    chair_s: captions with a wrong object / ALL captions, also those that name nothing. chair_i:
    wrong object words / all object words, repeats counted. cover: objects of the image that are
    named / objects of the image. objects, words: object words and words a caption.

    An object word is a phrase of the lexicon (`Lexicon.mentions`). "No dog" names a dog, as in the
    original.
    """
    named = lexicon.objects(text)
    wrong = sum(name not in present for name in named)
    return {"chair_s": (float(wrong > 0), 1), "chair_i": (wrong, len(named)),
            "cover": (len(set(present) & set(named)), len(set(present))),
            "objects": (len(named), 1), "words": (len(words(text)), 1)}


def object_halbench(text: str, present: Collection[str], lexicon: Lexicon) -> Counts:
    """Object HalBench (arXiv 2312.00849) of one answer.

    response: answers with a wrong object / answers WITH AN OBJECT. mention: wrong / mentioned
    objects, each word counted once an answer, singular and plural together ("a dog, two dogs" is
    one; "a man, a woman" are two of one class). cover: classes of the image that are named /
    classes of the image. objects, words: mentioned objects and words an answer.

    The official script matches the objects that GPT-3.5 lists as said to be visible; here the
    answer's own words are matched, except those that it denies (`denied`). Answers of up to 3 words
    (split at spaces) count as without an object, as there.
    """
    tokens = words(text)
    mentions = [] if len(pieces(text)) <= SHORT else lexicon.mentions(tokens)
    refused = denied(text)
    named = {_singular(tokens[a:b], lexicon): name for name, a, b in mentions if not refused[a]}
    wrong = sum(name not in present for name in named.values())
    return {"response": (float(wrong > 0), float(bool(named))), "mention": (wrong, len(named)),
            "cover": (len(set(present) & set(named.values())), len(set(present))),
            "objects": (len(named), 1), "words": (len(tokens), 1)}


def _singular(phrase: Sequence[str], lexicon: Lexicon) -> tuple[str, ...]:
    """The phrase of the lexicon that has its last word in the singular, or the phrase itself."""
    name = lexicon.phrases[tuple(phrase)]
    for base in _bases(phrase[-1]):
        shorter = (*phrase[:-1], base)
        if lexicon.phrases.get(shorter) == name:
            return shorter
    return tuple(phrase)


def _bases(word: str) -> list[str]:
    """What a word may be the plural of, the likeliest first; at the end the word itself."""
    bases = [IRREGULAR[word]] if word in IRREGULAR else []
    for ending, end in (("ies", "y"), ("es", ""), ("s", "")):
        if word.endswith(ending):
            bases.append(word.removesuffix(ending) + end)
    return [*bases, word]


def denied(text: str) -> list[bool]:
    """Of each of `words(text)`, whether it stands in the scope of a negation.

    A scope begins behind one of NEGATORS, or behind not or a word in n't before one of ARTICLES. It
    ends at a punctuation mark, at one of TURNS, and at an "and" before one of STARTS.
    """
    parts = words(text, "".join(STOPS))
    flags, inside = [], False
    for part, after in zip(parts, [*parts[1:], ""]):
        if part in STOPS:
            inside = False
            continue
        if part in TURNS or part == "and" and after in STARTS:
            inside = False
        flags.append(inside)
        if part in NEGATORS or (part == "not" or part.endswith("n't")) and after in ARTICLES:
            inside = True
    return flags


def amber(text: str, truth: Sequence[str], hallu: Sequence[str],
          association: Mapping[str, Sequence[str]], safe_words: Collection[str]) -> Counts:
    """AMBER's generative task (arXiv 2311.07397) of one answer; all four are pooled over answers.

    chair: wrong nouns / nouns, repeats counted. cover: annotated objects that are named / annotated
    objects, doubles counted. hal: answers with a wrong noun / all answers. cog: objects of `hallu`,
    those that people tend to imagine, that are named / all of them. A noun stands for the first
    object whose associations have it, else for the object that it is; safe words are never wrong.

    The official script finds nouns by a tagger and takes one for an object also where their word
    vectors are alike. Here a noun is a word of the association list, singular or plural, those that
    are often verbs only behind an article, number or the like, and that list alone says what is
    alike: chair and hal are stricter than the published ones.
    """
    listed = {_noun(w) for noun, others in association.items() for w in (noun, *others)}
    tokens = [word.removesuffix("'s") for word in words(HYPHEN.sub("", text))]
    nouns = []
    for before, token in zip(["", *tokens], tokens):
        noun = next((base for base in _bases(token) if base in listed), None)
        if noun is not None and (token not in ALSO_VERBS or before in BEFORE_A_NOUN):
            nouns.append(noun)
    safe = set(map(_noun, safe_words))
    claimed = [noun for noun in nouns if noun not in safe]
    right, imagined = _stands_for(truth, association), _stands_for(hallu, association)
    wrong = [noun for noun in claimed if noun not in right]
    covered = {right[noun] for noun in claimed if noun in right}
    dreamt = {imagined[noun] for noun in wrong if noun in imagined}
    return {"chair": (len(wrong), len(nouns)), "cover": (len(covered), len(truth)),
            "hal": (float(bool(wrong)), 1), "cog": (len(dreamt), len(hallu)),
            "words": (len(words(text)), 1)}


def _stands_for(objects: Sequence[str], association: Mapping[str, Sequence[str]]
                ) -> dict[str, int]:
    """word -> the place of the annotated object that naming it covers, the first one's."""
    places = list(enumerate(objects))[::-1]
    return ({_noun(name): place for place, name in places}
            | {_noun(w): place for place, name in places for w in association.get(name, ())})


def _noun(word: str) -> str:
    """A word of AMBER's lists as it is found in an answer: hyphens joined, one without spaces."""
    return normalised(HYPHEN.sub("", word))


def yes_or_no(text: str) -> str | None:
    """What an answer says: "yes", "no", or None where it says neither.

    The first yes or no decides. Where there is none, one of DENIALS in the first sentence means no
    ("There is not a dog"), unless it is about knowing ("I am not sure"). POPE's script (arXiv
    2305.10355) reads the first sentence alone, where any no or not means no and everything else
    yes; AMBER's takes "Yes" and "No" alone.
    """
    plain = text.replace("’", "'")
    first = next((w for w in words(plain) if w in ("yes", "no")), None)
    if first is not None:
        return first
    sentence = re.split(r"[.!?\n]", plain.strip().lower())[0]
    denies = DENIALS & set(words(sentence)) and not UNSURE.search(sentence)
    return "no" if denies else None


def yes_no(text: str, truth: str, *, positive: str) -> Counts:
    """What one answer to a yes/no question adds to each metric.

    truth: "yes" or "no".  positive: the answer that precision and recall are about, "yes" in POPE,
    "no" in AMBER, which asks about what is not there. precision: right / given positives. recall:
    right / true positives. f1: 2 TP / (2 TP + FP + FN), a ratio of sums too. yes_ratio: answers
    that say yes / ANSWERS. unanswered: answers that say neither; they are wrong and no positive.
    """
    answer = yes_or_no(text)
    given, true = float(answer == positive), float(truth == positive)
    hit = given * true
    return {"accuracy": (float(answer == truth), 1), "precision": (hit, given),
            "recall": (hit, true), "f1": (2 * hit, given + true),
            "yes_ratio": (float(answer == "yes"), 1), "unanswered": (float(answer is None), 1)}
