"""Text of models and data shown as text and nothing else; differences with their sign.

Text may hold HTML, Markdown, TeX, control and right-to-left characters, and be longer than anyone
reads: the first `LONGEST` characters are shown, and how many more there are.
"""

import html
import re

from markupsafe import Markup

LONGEST, LONGEST_ALT = 4000, 300  # characters; 4000 are about 1000 tokens
# control characters but tab and newline, overrides of the writing direction, lone surrogates
HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


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


def as_text(value: object) -> Markup:
    """HTML in which `value` is text only and keeps its writing direction to itself.

    What `mark_words` and `mark_differences` return is escaped already and kept.
    """
    inner = value if isinstance(value, Markup) else html.escape(visible(shortened(value)))
    return Markup(f"<bdi>{inner}</bdi>")


def signed(value: float) -> str:
    """A difference with its sign; one that rounds to nothing has none."""
    return f"{round(value, 3) or 0.0:+.3f}".replace("+0.000", "0.000")
