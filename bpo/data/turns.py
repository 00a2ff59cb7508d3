"""Questions and answers as texts and as turns of a conversation, under the names that data sets
give them.

One rule for all: a value that is null, NaN or blank is missing; questions and answers are texts, so
numbers and truth values are neither.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant",
         "assistant": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant"}
IMAGE = "<image>"  # where texts say that the image stands
BLANK = ("", "nan", "NaN", "<NA>")  # pandas writes a missing value so
# What a text must not hold: places of media, ends of turns of the common checkpoints, thoughts.
STRANGE = re.compile(r"<(?:image|video|audio|img)(?:[ _-]?(?:\d+|here|placeholder|pad))?>"
                     r"|<\|[^|<>\s]+\|>|</s>|</?think>", re.IGNORECASE)

Messages = tuple[dict[str, str], ...]


class Unusable(Exception):
    """An entry that no row can be made of: the reason in a few stable words and, where it helps,
    what it was found in."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


def missing(value: Any) -> bool:
    """Whether a value is no value: null, NaN or blank."""
    return (value is None or value != value
            or isinstance(value, str) and value.strip() in BLANK)


def as_list(value: Any) -> Any:
    """A list of objects out of JSON in a cell, or out of a struct of lists, as `datasets` stores a
    Sequence; all else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
        return [dict(zip(value, item, strict=False)) for item in zip(*value.values(), strict=False)]
    return value


def as_turns(turns: Any, system: Any = None) -> Messages:
    """Turns {from, value} or {role, content} as messages; `system` in front of them."""
    if not isinstance(turns, list) or not turns or not all(isinstance(t, Mapping) for t in turns):
        raise Unusable("no conversation")
    if not missing(system):
        turns = [{"role": "system", "content": system}, *turns]
    out = []
    for turn in turns:
        name = turn.get("from", turn.get("role"))
        role = ROLES.get(str(name).strip().lower())
        if role is None:
            raise Unusable("a turn of an unknown role", str(name)[:100])
        content = as_text(turn["value"] if "value" in turn else turn.get("content"))
        if content or role != "system":
            out.append({"role": role, "content": content})
    return tuple(out)


def ordered(messages: Messages) -> Messages:
    """The messages without the image's mark, which stands at an end of what the user says first:
    where the image goes is the chat template's business. Raises Unusable where turns do not take
    turns, one is empty, or the mark stands elsewhere."""
    first = int(bool(messages) and messages[0]["role"] == "system")
    roles = [m["role"] for m in messages[first:]]
    if roles[:1] == ["assistant"]:
        raise Unusable("the assistant speaks first")
    if not roles or roles != [("user", "assistant")[n % 2] for n in range(len(roles))]:
        raise Unusable("turns do not alternate")
    if sum(m["content"].count(IMAGE) for m in messages) > 1:
        raise Unusable(f"{IMAGE} more often than there are images")
    text = messages[first]["content"]
    text = (text.removeprefix(IMAGE) if text.startswith(IMAGE) else text.removesuffix(IMAGE))
    messages = (*messages[:first], {"role": "user", "content": text.strip()},
                *messages[first + 1:])
    for m in messages:
        if not m["content"] and m["role"] == "user":
            raise Unusable("empty question")
    if any(not m["content"] for m in messages[:-1]):
        raise Unusable("empty answer")
    if any(IMAGE in m["content"] for m in messages):
        raise Unusable(f"{IMAGE} in a text")
    return messages


def as_answers(value: Any) -> list[str]:
    """An answer as text, as a message, or as parts of one; several of them in a list."""
    if isinstance(value, Mapping) and value.keys() & {"value", "content"}:
        value = [value]
    if not isinstance(value, list):
        return [as_text(value)]
    if not value:
        return [""]
    if all(isinstance(v, Mapping) and "type" in v for v in value):
        return [as_text(value)]
    if all(isinstance(v, Mapping) for v in value):
        messages = as_turns(value)
        if [m["role"] for m in messages] != ["assistant"]:
            raise Unusable("an answer of several turns")
        return [messages[0]["content"]]
    return [text for v in value for text in as_answers(v)]


def as_text(value: Any) -> str:
    """A text without blanks around it, "" for a missing one; or a message's typed parts, an image
    among them as its mark. Raises Unusable for all else."""
    if missing(value):
        return ""
    if isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
        return "\n".join(filter(None, map(_part, value)))
    if not isinstance(value, str):
        raise Unusable("not a text: numbers and truth values must be written as one",
                       f"{value!r:.100}")
    return sound(value.strip())


def _part(part: Mapping[str, Any]) -> str:
    kind = str(part.get("type", "text"))
    return next((f"<{name}>" for name in ("image", "video", "audio") if name in kind),
                None) or as_text(part.get("text"))


def strange(text: str, special: re.Pattern | None = None) -> str | None:
    """Why a text would not reach the model as it is written, or None. special: the checkpoint's own
    tokens, which its tokenizer takes for themselves wherever they stand."""
    found = STRANGE.search(text) or special and special.search(text)
    return found and f"{found[0]} in a text"


def sound(text: str) -> str:
    """Half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes a question mark."""
    return text.encode(errors="replace").decode()
