"""Object words: which class a phrase of a text names, the files that list such phrases, and
COCO's annotation files, which name the classes in each image (150 MB and more, so they are
streamed). COCO's word list is English; `synonyms.txt` may list words of any language. What is
counted of them: `metrics`, `hallucination`.
"""

import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpo.data.json_stream import JsonStream
from bpo.params import Refusal
from bpo.study.text import words

Vocabulary = Mapping[str, Sequence[str]]  # class -> its words and plurals
COCO = Path(__file__).with_name("objects") / "coco.txt"
MARKS = ".,;:!?\n()"  # end phrases and scopes
# English words that are colours or objects; colours; what stands behind nouns, not adjectives.
COLOURS_TOO = frozenset("orange peach plum olive lime lemon cherry rose violet lavender chocolate "
                        "salmon gold silver chestnut coral cream".split())
COLOURS = frozenset("red blue green yellow white black brown grey gray pink purple tan beige teal "
                    "turquoise maroon violet lavender gold silver".split())
SAID_OF = frozenset("is are was were bright dark light pale deep vivid painted coloured colored in "
                    "mostly mainly".split())
AFTER_A_NOUN = frozenset(
    "and or nor but is are was were has have had can on in at by with without to from of for as "
    "near next beside besides behind between under over above below into inside onto against among "
    "around along across through beneath underneath alongside up down off out that which while "
    "when where there here visible present a an the this these its his her their it also too sits "
    "sitting lies lying rests resting stands hangs hanging placed seen shown cut sliced peeled "
    "floating rolling appears seems looks fruit fruits slice slices half halves peel wedge wedges "
    "segment segments".split())
NEGATORS = frozenset("no without nor neither".split())
ARTICLES = frozenset("a an any".split())  # after a "not": "not a dog", "there aren't any dogs"
SEEING = frozenset("see show have contain include depict feature find spot detect".split())
STOPS = frozenset(".;:!?\n()")
TURNS = frozenset("but while although though however except instead only just yet".split())
VERBS = frozenset("is are was were be has have sits sit stands stand lies lie can".split())
# After an "and" or a comma they begin what is no longer denied: "no dog and a cat".
STARTS = frozenset("a an the some there it he she they one two three several many".split())
NO_CLASS = ""  # phrases of this class are no object ("train track"), and hide the words in them


@dataclass(frozen=True)
class Lexicon:
    """A vocabulary ready for matching: the words of a phrase -> its class."""

    phrases: Mapping[tuple[str, ...], str]

    @functools.cached_property
    def longest(self) -> int:
        """Words of the longest phrase."""
        return max(map(len, self.phrases), default=0)

    @property
    def classes(self) -> set[str]:
        return set(self.phrases.values()) - {NO_CLASS}

    def mentions(self, tokens: Sequence[str]) -> list[tuple[str, int, int]]:
        """(class, first word, word after the last) of every object phrase among words.

        From left to right, the longest phrase at a place wins: "hot dog" is no "dog". A phrase of
        one word that is a colour there (`is_colour`) is no object.
        """
        mentions, at = [], 0
        while at < len(tokens):
            sizes = range(min(self.longest, len(tokens) - at), 0, -1)
            size = next((n for n in sizes if tuple(tokens[at:at + n]) in self.phrases), 1)
            name = self.phrases.get(tuple(tokens[at:at + size]), NO_CLASS)
            if name != NO_CLASS and not (size == 1 and is_colour(tokens, at)):
                mentions.append((name, at, at + size))
            at += size
        return mentions

    def objects(self, text: str) -> list[str]:
        """The class of every object phrase of a text, repeats kept, in order of mention."""
        return [name for name, _, _ in self.mentions(words(text, MARKS))]


def is_colour(tokens: Sequence[str], at: int) -> bool:
    """Whether an English word that may be a colour or an object ("orange") is the colour: before a
    noun, among colours, or said of something ("the kite is orange")."""
    if tokens[at] not in COLOURS_TOO:
        return False
    two, one = ["", "", *tokens[:at]][-2:]
    after, next_one = [*tokens[at + 1:at + 3], "", ""][:2]
    joints = ("and", "or", ",")
    if one in SAID_OF or (one in joints and two in COLOURS
                          or after in joints and next_one in COLOURS):
        return True
    return after not in AFTER_A_NOUN and after not in MARKS  # every string holds ""


def denied(tokens: Sequence[str]) -> list[bool]:
    """Of each of `words(text, MARKS)`, whether it stands in the scope of an English negation.

    A scope begins behind one of NEGATORS, or behind not, cannot or a word in n't before one of
    ARTICLES, one of SEEING between them or not. It ends at a punctuation mark, at one of TURNS and
    at an "and" before one of STARTS; a comma ends it unless a list goes on (`_goes_on`).
    """
    flags, inside = [], False
    for at, token in enumerate(tokens):
        after = [*tokens[at + 1:at + 3], "", ""]
        if (token in STOPS or token in TURNS or token == "and" and after[0] in STARTS
                or token == "," and not _goes_on(tokens[at + 1:])):
            inside = False
        flags.append(inside)
        behind = after[1] if after[0] in SEEING else after[0]
        if token in NEGATORS or (token in ("not", "cannot") or token.endswith("n't")
                                 ) and behind in ARTICLES:
            inside = True
    return flags


def _goes_on(rest: Sequence[str]) -> bool:
    """Whether the words behind a comma go on with a list of what is denied: "no dog, cat or bird".

    Its items are of up to three words and no clause, with an or, nor or and before the last one;
    without them the items are single words. An article stands in a list with or alone.
    """
    items: list[list[str]] = [[]]
    for at, word in enumerate(rest):
        follows = rest[at + 1:at + 4]
        if word in ("or", "nor"):
            return True
        if word == "and":
            return not (STARTS & set(follows[:1]) or VERBS & set(follows)
                        or any(ARTICLES & set(item) for item in items))
        if word in STOPS or word in TURNS:
            break
        if word == ",":
            items.append([])
            continue
        items[-1].append(word)
        if len(items[-1]) > 3 or word in VERBS or items[-1][0] in STARTS - ARTICLES:
            return False
    return all(len(item) == 1 for item in items)


def lexicon(vocabulary: Vocabulary) -> Lexicon:
    """The vocabulary, compiled once however often it is asked for; of two classes that share a
    phrase the later one gets it."""
    return _compiled(tuple((name, tuple(forms)) for name, forms in vocabulary.items()))


@functools.lru_cache(maxsize=64)
def _compiled(vocabulary: tuple[tuple[str, tuple[str, ...]], ...]) -> Lexicon:
    phrases = {tuple(words(form)): name for name, forms in vocabulary for form in forms}
    phrases.pop((), None)
    return Lexicon(phrases)


def read(file: Path) -> dict[str, list[str]]:
    """class -> forms of a synonym file: a class a line, its forms after it, commas between.

    A line that begins with a comma lists phrases that are no object. Raises Refusal for a file that
    cannot be read, that has no class, or in which two classes claim the same form.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise Refusal(f"{file}: this synonym file is missing or no UTF-8 text; give a text file "
                      "with a class a line, then a comma and its synonyms") from None
    classes: dict[str, list[str]] = {}
    first: dict[tuple[str, ...], tuple[str, int]] = {}  # phrase -> its class and line
    for number, line in enumerate(lines, start=1):
        cells = [cell.strip() for cell in line.split(",")]
        name = cells[0]
        for form in filter(words, cells):
            other, where = first.setdefault(tuple(words(form)), (name, number))
            if other != name:
                shown = [repr(n) if n != NO_CLASS else "no object" for n in (name, other)]
                raise Refusal(f"{file}, line {number}: {form!r} stands for {shown[0]} and in line "
                              f"{where} for {shown[1]}; leave it in one of them")
            classes.setdefault(name, []).append(form)
    if not classes.keys() - {NO_CLASS}:
        raise Refusal(f"{file}: holds no object class; write a class a line, then a comma and its "
                      "synonyms")
    return classes


@dataclass
class Scene:
    """An image of COCO's annotations: its file name and the classes that are there."""

    file: str
    present: set[str]


def image_key(name: Any) -> str:
    """COCO's image number without zeros, however it is written (310196, "310196",
    "val2014/COCO_val2014_000000310196.jpg"); of other names the file name itself."""
    last = str(name).replace("\\", "/").rsplit("/", 1)[-1]
    number = re.fullmatch(r"(?:COCO_\w+?_)?0*(\d+)(?:\.\w+)?", last)
    return number[1] if number else last


def read_annotations(instances: Sequence[Path], captions: Sequence[Path], lexicon: Lexicon
                     ) -> dict[str, Scene]:
    """image key -> scene: the instances' classes and the objects that reference captions name.

    Several files of a kind are joined. Raises Refusal where one breaks off, lacks a field or has a
    class without synonyms.
    """
    scenes: dict[str, Scene] = {}
    for file in instances:
        names = {c["id"]: c["name"] for c in _items(file, "categories", "id", "name")}
        known_classes(names.values(), lexicon, where=file)
        for image in _items(file, "images", "id", "file_name"):
            scenes[image_key(image["id"])] = Scene(image["file_name"], set())
        for box in _items(file, "annotations", "image_id", "category_id"):
            scene, name = scenes.get(image_key(box["image_id"])), names.get(box["category_id"])
            if scene is None or name is None:
                raise Refusal(f"{file}: an annotation is of image {box['image_id']} and category "
                              f"{box['category_id']}, which the file does not list; get the whole "
                              "file")
            scene.present.add(name)
    for file in captions:
        for caption in _items(file, "annotations", "image_id", "caption"):
            if (scene := scenes.get(image_key(caption["image_id"]))) is not None:
                scene.present.update(lexicon.objects(caption["caption"]))
    return scenes


def known_classes(names: Collection[str], lexicon: Lexicon, *, where: Path) -> set[str]:
    """The names as a set; raises Refusal for a class that the synonyms do not have."""
    if unknown := sorted(set(names) - lexicon.classes):
        raise Refusal(f"{where}: no synonyms are known for {', '.join(map(repr, unknown[:5]))}; "
                      "give a synonym file with a line for each class")
    return set(names)


def _items(file: Path, part: str, *needed: str) -> Iterator[dict[str, Any]]:
    empty = True
    try:
        with file.open(encoding="utf-8") as stream:
            values = JsonStream(stream)
            for name, item in values.members() if values.ahead() == "{" else ():
                if name == part and values.listed:
                    empty = False
                    yield checked(item, f"{file}, {part}", *needed)
    except (ValueError, OSError) as error:
        raise Refusal(f"{file}: is no whole JSON file ({getattr(error, 'msg', error)}); get it "
                      "again") from None
    if empty and part != "annotations":
        raise Refusal(f"{file}: lists no {part}; give a file in the layout of COCO's annotations")


def checked(entry: Any, where: str, *needed: str, **kinds: Any) -> dict[str, Any]:
    """The entry; raises Refusal where it is none or lacks a field. kinds: fields with their type
    or with the values that they may have."""
    lacking = [n for n in (*needed, *kinds) if not isinstance(entry, dict) or n not in entry]
    if lacking:
        raise Refusal(f"{where}: an entry lacks {', '.join(lacking)}; give the official file")
    for name, kind in kinds.items():
        value = entry[name]
        if not (isinstance(value, kind) if isinstance(kind, type) else value in tuple(kind)):
            raise Refusal(f"{where}: {name} is {str(value)[:40]!r}, not as in the official file; "
                          "fetch the file again")
    return entry
