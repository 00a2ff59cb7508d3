"""The layouts of annotated answers: what an entry says of its image, its questions and answers.

An entry is an object of a JSON list, a line, a CSV row or a parquet row (`files`); every layout may
come in any of these. Nothing is opened or looked up here.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

DESCRIBE = "Describe the image in detail."  # asked where a data set has captions without questions
IMAGE_FIELDS = ("image", "images", "image_path")
ROLES = ("system", "user", "assistant")

Entry = Mapping[str, Any]
Messages = tuple[dict[str, str], ...]
# Of an annotated answer: its id, the turns before it, its text, and the data set's rejected ones.
Answer = tuple[str, Messages, str, tuple[str, ...]]


class Unusable(Exception):
    """An entry that no row can be made of; its text is the reason, in a few stable words."""


@dataclass(frozen=True)
class Layout:
    """shape: its fields, for people.  fits: whether an entry has them.  read: (entry, id) -> its
    answers; raises Unusable.  plain: an entry with its id, image and texts under the usual names.
    """

    shape: str
    fits: Callable[[Entry], bool]
    read: Callable[[Entry, str], list[Answer]]
    plain: Callable[[Entry], Entry] = dict


def detect(entry: Any) -> str | None:
    """The name of the layout that an entry is in, or None."""
    return next((name for name, layout in LAYOUTS.items()
                 if isinstance(entry, Mapping) and layout.fits(entry)), None)


def entry_id(entry: Any, number: int) -> str:
    """The entry's own id; without one, its number in the file, from 0."""
    given = entry.get("id") if isinstance(entry, Mapping) else None
    return str(number) if given in (None, "") else _sound(str(given))


def image_name(entry: Any) -> str:
    """The name of an entry's one image as the data set wrote it; raises Unusable."""
    if not isinstance(entry, Mapping):
        raise Unusable("not a row")
    value = next((entry[k] for k in IMAGE_FIELDS if entry.get(k)), None)
    if isinstance(value, list):
        if len(value) > 1:
            raise Unusable("more than one image")
        value = value[0]
    if isinstance(value, Mapping):  # {bytes, path} in JSON
        value = value.get("path")
    if not value:
        raise Unusable("no image")
    return _sound(str(value))


def _conversation(entry: Entry, base: str) -> list[Answer]:
    """Every assistant turn with the turns before it; ids `base#n` where there are several."""
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not all(
            isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns):
        raise Unusable("no conversation")
    messages = tuple({"role": "assistant" if t.get("from") == "gpt" else "user",
                      "content": _clean(t["value"])} for t in turns)
    places = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    if not any(places):  # an answer in the first place has no question
        raise Unusable("no conversation")
    return [(f"{base}#{n // 2}" if len(places) > 1 else base, messages[:n], messages[n]["content"],
             ()) for n in places if n]


def _completions(entry: Entry, base: str) -> list[Answer]:
    """The annotated completion of the highest score, against all that are not annotated."""
    completions = entry.get("completions") or []
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise Unusable("not a row")
    annotated = [c for c in completions if c.get("type") == "gt"]
    if not annotated:
        raise Unusable("no annotated answer")
    best = max(annotated, key=_score)
    return [(base, _question(entry.get("prompt")), _answer(best.get("response")),
             _given(c.get("response") for c in completions if c.get("type") != "gt"))]


def _score(completion: Entry) -> float:
    try:
        return float(completion["score"])
    except (KeyError, TypeError, ValueError):
        return float("-inf")


def _preference(entry: Entry, base: str) -> list[Answer]:
    question = entry["question"] if "question" in entry else entry.get("prompt")
    return [(base, _question(question), _answer(entry.get("chosen")),
             _given([entry.get("rejected")]))]


def _with_trio(entry: Entry) -> Entry:
    """The entry with the question, chosen and rejected answer that the release of RLHF-V keeps as
    JSON in a column of text."""
    try:
        trio = {} if "chosen" in entry else json.loads(entry["text"])
    except (KeyError, TypeError, ValueError):
        return entry
    return {**trio, **entry} if isinstance(trio, dict) else entry


def _with_image(entry: Entry) -> Entry:
    """MiniGPT-4's entry with the image that its image_id stands for."""
    number = entry.get("image_id")
    return entry if number in (None, "") else {"id": number, "image": f"{number}.jpg", **entry}


def _plain(entry: Entry, base: str) -> list[Answer]:
    question = entry.get("question") or entry.get("prompt") or DESCRIBE
    answer = entry["answer"] if "answer" in entry else entry.get("caption")
    return [(base, _question(question), _answer(answer), ())]


def _question(value: Any) -> Messages:
    """A question as text, or the messages of a conversation that ends with one."""
    messages = value if isinstance(value, list) else [{"role": "user", "content": value}]
    if not all(isinstance(m, dict) and m.get("role") in ROLES for m in messages):
        raise Unusable("not a row")
    out = tuple({"role": m["role"], "content": _content(m.get("content"))} for m in messages)
    if not out or out[-1]["role"] != "user" or not out[-1]["content"]:
        raise Unusable("no conversation")
    return out


def _answer(value: Any) -> str:
    """An answer as text, or as a conversation of one assistant's message."""
    if not isinstance(value, list):
        return _content(value)
    if [m.get("role") if isinstance(m, dict) else None for m in value] != ["assistant"]:
        raise Unusable("no conversation")
    return _content(value[0].get("content"))


def _content(value: Any) -> str:
    """Text, a number as text, or the texts of a message's typed parts."""
    if isinstance(value, list):
        if not all(isinstance(part, dict) for part in value):
            raise Unusable("not a row")
        if sum(part.get("type") == "image" for part in value) > 1:
            raise Unusable("more than one image")
        return "\n".join(filter(None, (_content(part.get("text")) for part in value)))
    if isinstance(value, (Mapping, tuple)):
        raise Unusable("not a row")
    return "" if value is None else _clean(str(value))


def _clean(text: str) -> str:
    """The text without image placeholders: where the image goes is the chat template's business."""
    return _sound(text.replace("<image>", "").strip())


def _sound(text: str) -> str:
    """Half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes a question mark."""
    return text.encode(errors="replace").decode()


def _given(answers: Iterable[Any]) -> tuple[str, ...]:
    return tuple(filter(None, map(_answer, answers)))


def _has(*fields: str) -> Callable[[Entry], bool]:
    return lambda entry: all(field in entry for field in fields)


def _has_answer(entry: Entry) -> bool:
    return bool(entry.keys() & {"answer", "caption"} and entry.keys() & set(IMAGE_FIELDS))


# An entry is in the first layout that it fits.
LAYOUTS = {
    "LLaVA": Layout("id, image, conversations: [{from: human | gpt, value}]",
                    _has("conversations"), _conversation),
    "BPO": Layout("id, image, prompt, completions: [{score, response, type}]",
                  _has("prompt", "completions"), _completions),
    "RLHF-V": Layout("image, question, chosen, rejected",
                     lambda e: (_has("question", "chosen", "rejected")(e)
                                or "chosen" not in e and "chosen" in _with_trio(e)),
                     _preference, _with_trio),
    "TRL": Layout("images, prompt, chosen, rejected",
                  _has("prompt", "chosen", "rejected"), _preference),
    "answers": Layout("image, answer or caption, question (may be left out)", _has_answer, _plain),
    "MiniGPT-4": Layout("annotations: [{image_id, caption}]", _has("image_id", "caption"), _plain,
                        _with_image),
}
