"""The words of a text in any language, and text of models and data shown as text and nothing else.

Text may hold HTML, Markdown, TeX, control and right-to-left characters, and be longer than anyone
reads: the first `LONGEST` characters are shown, and how many more there are.
"""

import functools
import html
import re
import unicodedata

import regex
from markupsafe import Markup

LONGEST, LONGEST_ALT = 4000, 300  # characters; 4000 are about 1000 tokens
# control characters but tab and newline, overrides of the writing direction, lone surrogates
HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# Scripts written without spaces: a character is a word (UAX 29); katakana comes in runs.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Line_Break=SA}]\p{M}*|[\p{Katakana}ー]+"
_LETTERS = r"[[\p{L}\p{M}\p{N}]--[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Line_Break=SA}]]+"
_SYMBOL = r"[[\p{S}\p{Co}\p{Cn}]--[`^|~]][\U000e0020-\U000e007f]*"
_WORD = (rf"(?V1){_LETTERS}(?:'{_LETTERS})*|{_UNSPACED}|{_SYMBOL}"
         rf"|(?<![\p{{L}}\p{{M}}\p{{N}}])-(?=\p{{N}}){_LETTERS}")
# The same words of ASCII text, which most answers are, several times faster
_ASCII_WORD = r"[a-z0-9]+(?:'[a-z0-9]+)*|[$+<=>]|(?<![a-z0-9])-(?=[0-9])[a-z0-9]+"
_PIECE = regex.compile(rf"(?V1){_UNSPACED}|(?:(?!{_UNSPACED})\S)+")
_QUOTES = dict.fromkeys(map(ord, "’‘ʼ´`"), "'") | {ord("−"): "-"}
# what joins, hyphenates, directs or varies characters, and is not seen itself
_UNSEEN = re.compile(r"[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"
                     r"\ufe00-\ufe0f\ufeff]")


def folded(text: str) -> str:
    """A text after NFKC and casefold, apostrophes and minus signs of one form, without what is not
    seen, such as joiners and marks of the writing direction."""
    plain = unicodedata.normalize("NFKC", text.translate(_QUOTES)).casefold()
    return _UNSEEN.sub("", unicodedata.normalize("NFKC", plain))


def words(text: str, marks: str = "") -> list[str]:
    """A text's words in any language, after NFKC and casefold, without punctuation.

    A word is a run of letters, combining marks and digits, with apostrophes inside ("isn't", also
    written with ’) and a minus before digits. A character of a script without spaces (Chinese,
    kana, Thai) is a word, and so is a symbol: an emoji, a currency's or a mathematical sign. A text
    of nothing but punctuation is one word, its marks; only one without anything to see has none.
    marks: punctuation that is kept, each as a word of its own.
    """
    plain = text.lower().replace("`", "'") if text.isascii() else folded(text)
    found = _word_or_mark(marks, text.isascii()).findall(plain)
    return found if found or marks else list(filter(None, ["".join(plain.split())]))


@functools.cache
def _word_or_mark(marks: str, ascii_text: bool) -> re.Pattern | regex.Pattern:
    kind, word = (re, _ASCII_WORD) if ascii_text else (regex, _WORD)
    return kind.compile(f"{word}|[{kind.escape(marks)}]" if marks else word)


def normalised(text: str) -> str:
    """A text as its words alone: two answers are the same if this is."""
    return " ".join(words(text))


def pieces(text: str) -> list[str]:
    """A text split at spaces and around each character of a script without spaces: its length."""
    return _PIECE.findall(text)


def visible(text: object) -> str:
    """str(text) with what a page would swallow or obey spelt out, as in `\\x1b`."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(),
                      str(text).replace("\r\n", "\n"))


def shortened(value: object, longest: int = LONGEST) -> str:
    """str(value), its end replaced by how long it is where it has over `longest` characters."""
    head, rest = cut(str(value), longest)
    return head + rest


def cut(text: str, longest: int = LONGEST) -> tuple[str, str]:
    """What is shown of a text, and the note of how much is not ("" where all is)."""
    more = len(text) - longest
    return (text[:longest], f" … {more:,} more characters") if more > 0 else (text, "")


def joined(text: str) -> str:
    """A text without the spaces that some tokenizers leave before punctuation."""
    return re.sub(r"(?<=\w) +(?=[.,;:?!](\s|$))", "", text)


def as_text(value: object) -> Markup:
    """HTML in which `value` is text only and keeps its writing direction to itself.

    What `mark_words` and `mark_differences` return is escaped already and kept.
    """
    if not isinstance(value, Markup):
        value = html.escape(visible(shortened(joined(str(value)))))
    return Markup(f"<bdi>{value}</bdi>")


def number(value: float, digits: int = 3, sign: str = "") -> str:
    """A number for readers, its minus sign U+2212; sign "+": one of both, as a difference has. What
    rounds to nothing has none."""
    shown = f"{value:{sign},.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"
    return shown.replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    return number(value, digits, "+")


def duration(seconds: float) -> str:
    """"34 s", "2 min 5 s", "1 h 4 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
