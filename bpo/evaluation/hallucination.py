"""Hallucination as the judge-free benchmarks count it: what one answer adds to each metric.

Every metric is (counted, out of), so that sums over answers give the published ratio. Words alone
decide; a function says where its official script asks a language model or word vectors.
"""

import functools
import re
from collections.abc import Collection, Mapping, Sequence

import regex

from bpo.evaluation.words import MARKS, Lexicon, denied, is_colour
from bpo.models.replies import without_thoughts
from bpo.study.text import folded, normalised, pieces, words

Counts = dict[str, tuple[float, float]]

SHORT = 3  # words: an answer up to this long counts as one without an object (Object HalBench)
HYPHEN = re.compile(r"(?<=\w)-(?=\w)")

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
    tokens = words(text, MARKS)
    mentions = [] if len(pieces(text)) <= SHORT else lexicon.mentions(tokens)
    refused = denied(tokens)
    named = {_singular(tokens[a:b], lexicon): name for name, a, b in mentions if not refused[a]}
    wrong = sum(name not in present for name in named.values())
    return {"response": (float(wrong > 0), float(bool(named))), "mention": (wrong, len(named)),
            "cover": (len(set(present) & set(named.values())), len(set(present))),
            "objects": (len(named), 1), "words": (len(words(text)), 1)}


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
    tokens = [word.removesuffix("'s") for word in words(HYPHEN.sub("", text), MARKS)]
    nouns = []
    for at, token in enumerate(tokens):
        noun = next((base for base in _bases(token) if base in listed), None)
        doubtful = token in ALSO_VERBS and (not at or tokens[at - 1] not in BEFORE_A_NOUN)
        if noun is not None and not doubtful and not is_colour(tokens, at):
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


# --- yes and no ---------------------------------------------------------------------------------

# Phrases in which a no or not denies nothing, and both words named at once; markup.
_IDIOMS = regex.compile(
    r"\b(?:no|without(?: a)?|not a) (?:doubt|question|problem|wonder)\b|\bno\.(?=\d)|\bnon-"
    r"|\bno (?:more|fewer|less) than\b|\bnot (?:only|just|alone|the only)\b|</?\w+>|\*|_|\\\w+"
    r"|[对對]不起|不好意思|\b(?:yes ?(?:or|and|/|_) ?no|no ?(?:or|/|_) ?yes)\b")
_WHY_NOT = regex.compile(r"\b(?:(?:don't|do not|can't|cannot) see |no reason )?why not\b")
_UNSURE = regex.compile(
    r"(?:\bnot|n't)(?: [\w%]+){0,2}? (sure|certain|clear|sharp|possible|obvious|enough)\b"
    r"|(?:\bcan't|\bcannot|\bcan not|\bcould(?:n't| not)|\b(?:not able|unable|hard|difficult"
    r"|impossible|no way) to)(?: \w+)? (?:tell|say|know|determine|judge|answer|confirm|verify"
    r"|be (?:sure|certain)|view|access|process|help|assist|see (?:\w+ )?(?:image|picture|photo)s?\b"
    r"(?! of))|\b(?:don't|do not|dont) know\b|\bno idea\b|\bun(?:sure|certain|clear|known)\b"
    r"|\bне (?:уверен|знаю|ясно|могу)|\bje ne sais pas|\bpas sûre?|\bno (?:lo )?sé\b"
    r"|\bno estoy segur|\bnicht sicher|\bweiss (?:es )?nicht|\bnão sei|\bnon (?:lo )?so\b"
    r"|不(?:确定|確定|清楚|知道|能)"
    r"|无法|無法|わかりません|모르|ไม่แน่ใจ")
_ASKS = regex.compile(r"\b(?:asks?|asked|asking|question|whether)\b")
_YES = regex.compile(
    r"\b(?:yes|yeah|yep|yup|yea)\b|\A(?:(?:y|ye|true|(?:there|it|they) (?:is|are|does|do))\Z"
    r"|(?:oui|sí|si|sì|ja|да|sim|tak|ναι|evet|نعم"
    r"|(?:जी )?हा[ँं]|네|예|affirmative)\b|はい|存在|是(?![不否])|有(?![没沒])|[对對](?![于於])|ใช่)")
_NO = regex.compile(
    r"\b(?:no|nope|nah|nein|нет)\Z|\A(?:(?:n|false)\Z|no (?:sir|way|it|there|i|you|he|she|they|we"
    r"|the|this|that|a|not)\b|(?:nope|nah|nein|нет|non|nee|nej|não|nie|όχι|hayır|لا|(?:जी )?नहीं"
    r"|아니요?|아니오"
    r"|negative|incorrect)\b|いいえ|[不没沒否无無]|ไม่)")
_OF_COURSE = regex.compile(
    r"\A\s*(?:sure|certainly|of course|absolutely|definitely|indeed|correct)\b"
    r"|\b(?:no|without(?: a)?) doubt\b|\bundoubtedly\b")
_NONE_THERE = regex.compile(r"\bthere(?: is| are| was| were|'s)?(?:n't| not| no)\b")
_FLIP = regex.compile(r"(?:n't|\bnot|\bcannot|\bdont|\bdoesnt) (?:think|believe|suppose|look like"
                      r"|seem|appear)\b(?! so\b)(.+)")
_DENIES = regex.compile(
    r"\b(?:no|not|cannot|none|nobody|without|neither|nor|lacks?|lacking|absent|missing|nichts?"
    r"|(?:is|are|was|were|do|does|did|ca|wo|have|has)nt|нет|не|pas|keine?[rnms]?|não|nessun\w*|ليس"
    r"|नहीं)\b|n't\b|\b(?:there(?: is|'s)|see) nothing\b|[没沒不无無]|ません|ない|없|ไม่")
_OF_VERBS = frozenset("not cannot none lacks lack lacking absent missing".split())
_EXISTS = regex.compile(r"\b(?:there|see|any|none|visible|present|contains?|shows?|find|absent"
                        r"|lacks?|missing)\b|[没沒]|ません|없")
_AFFIRMS = regex.compile(r"有|いる|います|あります|있|มี")
_PRESENCE = frozenset("visible there present shown seen here depicted image picture photo scene "
                      "any one it exist appear found".split())
_NOT_ASKED = _PRESENCE | frozenset(
    "is are was were a an the in on of this that these those photograph do does did you see can "
    "some to at by with have has contain contains show shows please answer yes or no not using use "
    "single word phrase question and be".split())


@functools.lru_cache(maxsize=2**16)  # the same answers come again and again
def yes_or_no(text: str, question: str = "") -> str | None:
    """What an answer says, as a careful person reads it: "yes", "no", or None for neither.

    Thoughts, questions and what is said not to be known are passed over; what stands behind
    "answer:" comes first. Sentence by sentence, the first of these decides: a yes or no of a dozen
    languages (but "Yes, there is no dog" says no), or a statement with all that an English question
    asks for, affirmed or denied; then any denial, in later sentences only one of what is there.
    """
    asked = set(words(question)) - _NOT_ASKED
    plain = folded(without_thoughts(text))
    of_course = _OF_COURSE.search(plain)
    plain = _WHY_NOT.sub(" yes ", _IDIOMS.sub(" ", plain))
    for part in reversed(regex.split(r"\banswer\W{0,2}(?: is\b\W?|:)", plain)):
        sentences = [s for s in regex.findall(r"[^.!?。\n]+[.!?。\n]?", part) if s.strip(" .!?。\n")]
        sentences = [s for s in sentences if not s.endswith("?")] or sentences
        for number, sentence in enumerate(sentences):
            if said := _sentence(sentence, asked, first=not number):
                return said
    return "yes" if of_course else None


def _sentence(sentence: str, asked: set[str], *, first: bool) -> str | None:
    clauses = [c for part in regex.split(r"[,;:،、—]|\b(?:but|although|though|however|because|so)\b",
                                         sentence)
               if (c := part.strip(" .!?。\n\"'()[]{}-"))]
    clauses = [c for c in clauses if not _ASKS.search(c)
               and (not (unsure := _UNSURE.search(c)) or unsure[1] in asked)]
    for clause, after in zip(clauses, [*clauses[1:], ""]):
        if _YES.search(clause):
            denies = _NONE_THERE.search(f"{clause} {after}") or _states(after, asked) == "no"
            return "no" if denies else "yes"
        if _NO.search(clause):
            return "no"
        if flip := _FLIP.search(clause):
            return "yes" if _DENIES.search(flip[1]) else "no"
        if said := _states(clause, asked):
            return said
    for clause in clauses:
        if _DENIES.search(clause) and (first or _EXISTS.search(clause)):
            return "no"
        if _AFFIRMS.search(clause):
            return "yes"
    return None


def _states(clause: str, asked: set[str]) -> str | None:
    """Whether a clause affirms or denies all that is asked for; None where it lacks some of it."""
    tokens = words(clause)
    bases = [set(_bases(token)) for token in tokens]
    places = [{n for n, of in enumerate(bases) if of & set(_bases(word))} for word in asked]
    if not places or not all(places):
        return None
    flags = denied(tokens)
    if any(flags[n] for there in places for n in there):
        return "no"
    for at, token in enumerate(tokens):
        if token in _OF_VERBS or token.endswith("n't") or regex.fullmatch(
                r"(?:is|are|was|were|do|does|did|ca)nt", token):
            rest = set(tokens[at + 1:])
            if not rest or rest & _PRESENCE or any(n > at for there in places for n in there):
                return "no"
    return "yes"


def as_official(text: str, *, positive: str) -> str | None:
    """What the official script reads. POPE's (positive "yes", arXiv 2305.10355): any no or not in
    the first sentence means no, everything else yes; AMBER's takes "Yes" and "No" alone."""
    if positive == "no":
        return {"Yes": "yes", "No": "no"}.get(text)
    first = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(first) else "yes"


def yes_no(text: str, truth: str, *, positive: str, question: str = "") -> Counts:
    """What one answer to a yes/no question adds to each metric.

    truth: "yes" or "no".  positive: the answer that precision and recall are about, "yes" in POPE,
    "no" in AMBER, which asks about what is not there. precision: right / given positives. recall:
    right / true positives. f1: 2 TP / (2 TP + FP + FN), a ratio of sums too. yes_ratio: answers
    that say yes / ANSWERS. unanswered: answers that say neither; they are wrong and no positive.
    official_*: the same as the official script reads the answers; read_otherwise: where it reads
    something else. bare: answers of a single word.
    """
    answer, official = yes_or_no(text, question), as_official(text, positive=positive)
    given, theirs, true = (float(said == positive) for said in (answer, official, truth))
    return {"accuracy": (float(answer == truth), 1), "precision": (given * true, given),
            "recall": (given * true, true), "f1": (2 * given * true, given + true),
            "yes_ratio": (float(answer == "yes"), 1), "unanswered": (float(answer is None), 1),
            "official_accuracy": (float(official == truth), 1),
            "official_f1": (2 * theirs * true, theirs + true),
            "read_otherwise": (float(official != answer), 1),
            "bare": (float(len(text.split()) == 1 and len(words(text)) < 3), 1)}
