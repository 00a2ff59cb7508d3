"""Object words: which class a phrase of a text names, and the files that list such phrases.

The matching that every object metric shares. What is counted of it: `metrics`, `hallucination`.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bpo.params import Refusal

Vocabulary = Mapping[str, Sequence[str]]  # class -> its words and plurals
COCO = Path(__file__).with_name("objects") / "coco.txt"
NO_CLASS = ""  # phrases of this class are no object ("train track"), and hide the words in them


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


@dataclass(frozen=True)
class Lexicon:
    """A vocabulary ready for matching.

    phrases: the words of a phrase -> its class; sizes: a phrase's first word -> how many words the
    phrases that begin with it have, longest first.
    """

    phrases: Mapping[tuple[str, ...], str]
    sizes: Mapping[str, tuple[int, ...]]

    @property
    def classes(self) -> set[str]:
        return set(self.phrases.values()) - {NO_CLASS}

    def mentions(self, tokens: Sequence[str]) -> list[tuple[str, int, int]]:
        """(class, first word, word after the last) of every object phrase among words.

        From left to right, the longest phrase at a place wins: "hot dog" is no "dog".
        """
        found, at = [], 0
        while at < len(tokens):
            for size in self.sizes.get(tokens[at], ()):
                name = self.phrases.get(tuple(tokens[at:at + size]))
                if name is not None:
                    if name != NO_CLASS:
                        found.append((name, at, at + size))
                    at += size
                    break
            else:
                at += 1
        return found

    def objects(self, text: str) -> list[str]:
        """The class of every object phrase of a text, repeats kept, in order of mention."""
        return [name for name, _, _ in self.mentions(words(text))]


def lexicon(vocabulary: Vocabulary | Lexicon) -> Lexicon:
    """The vocabulary, compiled once however often it is asked for; of two classes that share a
    phrase the later one gets it."""
    if isinstance(vocabulary, Lexicon):
        return vocabulary
    return _compiled(tuple((name, tuple(forms)) for name, forms in vocabulary.items()))


@functools.lru_cache(maxsize=64)
def _compiled(vocabulary: tuple[tuple[str, tuple[str, ...]], ...]) -> Lexicon:
    phrases = {tuple(words(form)): name for name, forms in vocabulary for form in forms}
    phrases.pop((), None)
    sizes: dict[str, set[int]] = {}
    for phrase in phrases:
        sizes.setdefault(phrase[0], set()).add(len(phrase))
    return Lexicon(phrases, {w: tuple(sorted(s, reverse=True)) for w, s in sizes.items()})


def read(file: Path) -> dict[str, list[str]]:
    """class -> forms of a synonym file: a class a line, its forms after it, commas between.

    The class is its own first form. A line that begins with a comma lists phrases that are no
    object. Blank lines are skipped. Raises Refusal for a file that cannot be read, that has no
    class, or in which two classes claim the same form.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise Refusal(f"{file}: this synonym file is missing or no UTF-8 text; give a text file "
                      "with a class a line, then a comma and its synonyms") from None
    found: dict[str, list[str]] = {}
    owners: dict[tuple[str, ...], tuple[str, int]] = {}
    for number, line in enumerate(lines, start=1):
        cells = [cell.strip() for cell in line.split(",")]
        name = cells[0]
        for form in filter(words, cells):
            owner, where = owners.setdefault(tuple(words(form)), (name, number))
            if owner != name:
                raise Refusal(
                    f"{file}, line {number}: {form!r} stands for {_shown(name)} and in line "
                    f"{where} for {_shown(owner)}; leave it in one of them")
            found.setdefault(name, []).append(form)
    if not found.keys() - {NO_CLASS}:
        raise Refusal(f"{file}: holds no object class; write a class a line, then a comma and its "
                      "synonyms")
    return found


def _shown(name: str) -> str:
    return repr(name) if name != NO_CLASS else "no object"
