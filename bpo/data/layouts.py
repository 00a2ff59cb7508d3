"""The layouts of annotated answers: what an entry says of its image, its questions and answers.

An entry is an object of a JSON file, a line, a CSV row or a parquet row (`files`); every layout may
come in any of these. Nothing is opened or looked up here. What a text or a turn may be: `turns`.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bpo.data.turns import (
    Messages,
    Unusable,
    as_answers,
    as_list,
    as_text,
    as_turns,
    missing,
    ordered,
    sound,
)

DESCRIBE = "Describe the image in detail."  # asked where a data set has captions without questions
IMAGE_FIELDS = ("image", "images", "image_path", "img_path", "img", "image_file", "file_name",
                "filename", "image_name", "jpg", "jpeg", "png", "webp")
# The name that is used here -> the names that data sets give it, in lower case; the first counts.
NAMES = {
    "image": IMAGE_FIELDS,
    "image_id": ("image_id", "imageid"),
    "turns": ("conversations", "messages", "conversation"),
    "question": ("question", "prompt", "query", "instruction"),
    "answer": ("answer", "caption", "captions", "response", "output", "text", "txt"),
    "rejected": ("rejected", "rejected_response"),
    "rejected_turns": ("rejected_conversations", "rejected_messages"),
    "video": ("video", "videos")}
FIELDS = frozenset(itertools.chain(*NAMES.values(), (
    "id", "question_id", "completions", "chosen", "system", "history", "input", "label",
    "kto_tag")))

Entry = Mapping[str, Any]
# Of an annotated answer: its id, the turns before it, its text, and the data set's rejected ones.
Answer = tuple[str, Messages, str, tuple[str, ...]]


@dataclass(frozen=True)
class Broken:
    """What stands in the place of an entry whose text cannot be read."""

    reason: str


@dataclass(frozen=True)
class Layout:
    """shape: its fields, for people.  fits: whether a plain entry has them.  read: (plain entry,
    id) -> its answers; raises Unusable."""

    shape: str
    fits: Callable[[Entry], bool]
    read: Callable[[Entry, str], list[Answer]]


def plain(entry: Any) -> Entry:
    """The entry with its fields also under the names that are used here; raises Unusable."""
    if not isinstance(entry, Mapping):
        raise Unusable(entry.reason if isinstance(entry, Broken) else "not a row")
    given = {str(n).strip().lower(): v for n, v in entry.items()}
    if "chosen" not in given and isinstance(given.get("text"), str):
        # The release of RLHF-V keeps question, chosen and rejected as JSON in a column of text.
        try:
            trio = json.loads(given["text"])
        except ValueError:
            trio = {}
        given |= trio if isinstance(trio, dict) and "chosen" in trio else {}
    out = dict(given)
    for name, names in NAMES.items():
        values = [given[n] for n in names if n in given]
        if values:
            out[name] = next((v for v in values if not missing(v) and v != []), values[0])
    for name in ("turns", "rejected_turns", "completions", "chosen", "rejected", "history"):
        if name in out:
            out[name] = as_list(out[name])
    if not missing(number := out.get("image_id")):
        out = {"id": number, "image": f"{number}.jpg"} | out
    return out


def detect(entry: Any) -> str | None:
    """The name of the layout that an entry is in, or None."""
    try:
        entry = plain(entry)
    except Unusable:
        return None
    return next((name for name, layout in LAYOUTS.items() if layout.fits(entry)), None)


def entry_id(entry: Any, number: int) -> str:
    """The entry's own id; without one, its number in the file, from 0."""
    given = entry.get("id") if isinstance(entry, Mapping) else None
    return str(number) if missing(given) else sound(str(given))


def image_name(entry: Entry) -> str:
    """The name of a plain entry's one image as the data set wrote it; raises Unusable."""
    if not missing(video := entry.get("video")) and video != []:
        raise Unusable("a video", str(video)[:100])
    value = entry.get("image")
    if missing(value):  # TRL also takes images within messages
        parts = [p for turns in (entry.get(n) for n in ("turns", "question", "chosen"))
                 for t in (turns if isinstance(turns, list) else ()) if isinstance(t, Mapping)
                 for p in (t["content"] if isinstance(t.get("content"), list) else ())]
        # An answer that repeats its question names the image again.
        value = list(dict.fromkeys(filter(None, map(_picture, parts))))
    if isinstance(value, list):
        if len(value) > 1:
            raise Unusable("more than one image")
        value = value[0] if value else None
    if isinstance(value, Mapping):  # {bytes, path} in JSON
        value = value.get("path")
    if missing(value):
        raise Unusable("no image")
    name = sound(str(value))
    if re.match("https?://", name):
        raise Unusable("image is a URL: download it", name[:100])
    if name.startswith("data:") or re.fullmatch(r"[A-Za-z0-9+/]{200,}={0,2}", name):
        raise Unusable("image is base64 text: write it to a file and name that", name[:20])
    return name


def _picture(part: Any) -> str | None:
    """The name of the image in a typed part of a message."""
    if not isinstance(part, Mapping) or "image" not in str(part.get("type")):
        return None
    value = next((part[n] for n in ("image", "image_url", "path", "url") if part.get(n)), None)
    value = value.get("url", value.get("path")) if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None


# --- questions and answers ----------------------------------------------------------------------

def _conversation(entry: Entry, base: str) -> list[Answer]:
    """Every assistant turn with the turns before it; ids `base#n` where there are several. Where
    answers are rejected, to the last turn or in a conversation beside it, those turns alone."""
    if False in (entry.get("label"), entry.get("kto_tag")):
        raise Unusable("an answer that is labelled as bad")
    messages = _messages(entry)
    first = int(messages[0]["role"] == "system")
    places = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    rejected: dict[int, tuple[str, ...]] = {}
    if "rejected_turns" in entry:
        beside = as_turns(entry["rejected_turns"], entry.get("system"))[:len(messages)]
        beside = messages[:-1] + beside if len(beside) == 1 else beside
        if [m["role"] for m in beside] != [m["role"] for m in messages]:
            raise Unusable("the rejected turns are not those of the conversation")
        rejected = {n: (beside[n]["content"],) for n in places
                    if beside[n]["content"] not in ("", messages[n]["content"])}
        if not rejected:
            raise Unusable("the rejected answer equals the chosen one")
    elif "rejected" in entry:
        rejected = {places[-1]: _given(entry["rejected"], messages[-1]["content"])}
    places = list(rejected) or places
    return [(f"{base}#{(n - first) // 2}" if len(places) > 1 else base, messages[:n],
             messages[n]["content"], rejected.get(n, ())) for n in places]


def _preference(entry: Entry, base: str) -> list[Answer]:
    """A chosen answer and rejected ones to a question, or to the turns before them, or to what both
    begin with (TRL's implicit prompts)."""
    chosen, rejected = entry.get("chosen"), entry.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and len(chosen) > 1:
        common = len([*itertools.takewhile(lambda two: two[0] == two[1], zip(
            chosen, rejected, strict=False))])
        prompt = chosen[:common]
        chosen, rejected = chosen[common:], rejected[common:]
    elif "turns" in entry:
        prompt = entry["turns"]
    elif "question" in entry:
        prompt = entry["question"]
    else:
        raise Unusable("no question")
    answers = as_answers(chosen)
    if len(answers) != 1:
        raise Unusable("more than one chosen answer")
    return [(base, _prompt(prompt, entry), answers[0], _given(rejected, answers[0]))]


def _completions(entry: Entry, base: str) -> list[Answer]:
    """The annotated completion of the highest score, against all that are not annotated; without
    annotated ones the best rated completion against those rated lower (VLFeedback)."""
    completions = entry.get("completions") or []
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise Unusable("not a row")
    annotated = [c for c in completions if c.get("type") == "gt"]
    if annotated:
        best = max(annotated, key=_score)
        others = [c for c in completions if c.get("type") != "gt"]
    else:
        rated = [c for c in completions if "annotations" in c and _score(c) > float("-inf")]
        best = max(rated, key=_score, default=None)
        others = [c for c in rated if _score(c) < _score(best)]
        if not others:
            raise Unusable("no annotated answer")
    chosen = as_text(best.get("response"))
    given = [c.get("response") for c in others]
    return [(base, _prompt(entry.get("question"), entry), chosen,
             tuple(text for c in given if (text := as_text(c))))]


def _score(completion: Entry) -> float:
    """The score, or the mean of the ratings; minus infinity where there is none."""
    ratings = completion.get("annotations")
    values = ([a.get("Rating", a.get("rating")) for a in ratings.values() if isinstance(a, Mapping)]
              if isinstance(ratings, Mapping) else [completion.get("score")])
    try:
        return sum(map(float, values)) / len(values)
    except (TypeError, ValueError, ZeroDivisionError):
        return float("-inf")


def _plain(entry: Entry, base: str) -> list[Answer]:
    """One or several answers to a question, which captions may lack."""
    question = entry["question"] if "question" in entry else DESCRIBE
    answers = as_answers(entry.get("answer"))
    prompt = _prompt(question, entry)
    given = (_given(entry["rejected"], answers[0]) if "rejected" in entry else ())
    return [(f"{base}#{n}" if len(answers) > 1 else base, prompt, text, given)
            for n, text in enumerate(answers)]


def _prompt(value: Any, entry: Entry) -> Messages:
    """A question as text, or the messages of a conversation that ends with one."""
    turns = value if isinstance(value, list) else [*_history(entry),
                                                   {"role": "user", "content": value}]
    if isinstance(value, str) and not missing(more := entry.get("input")):
        turns[-1]["content"] = f"{value}\n{as_text(more)}"
    messages = ordered(as_turns(turns, entry.get("system")))
    if messages[-1]["role"] != "user":
        raise Unusable("no question before the answer")
    return messages


def _history(entry: Entry) -> list[Entry]:
    """The turns before a question: messages, or pairs of a question and its answer."""
    history = entry.get("history")
    return [turn for t in (history if isinstance(history, list) else ()) for turn in (
        [{"role": r, "content": text} for r, text in zip(("user", "assistant"), t, strict=True)]
        if isinstance(t, list) and len(t) == 2 else [t])]


def _messages(entry: Entry) -> Messages:
    """The checked turns of a conversation up to its last answer."""
    messages = as_turns(entry.get("turns"), entry.get("system"))
    ends = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    if not ends:
        raise Unusable("no conversation")
    return ordered(messages[:ends[-1] + 1])


def _given(value: Any, chosen: str) -> tuple[str, ...]:
    """Rejected answers; Unusable where none differs from the chosen one. Of several all are
    returned: notebook 2 counts those that it drops."""
    texts = as_answers(value)
    if not any(texts):
        raise Unusable("empty rejected answer")
    if chosen and set(texts) <= {"", chosen}:
        raise Unusable("the rejected answer equals the chosen one")
    return tuple(texts)


def _has(*fields: str) -> Callable[[Entry], bool]:
    return lambda entry: all(field in entry for field in fields)


def _has_answer(entry: Entry) -> bool:
    """An answer without its question is a caption; a numbered question has its text elsewhere, and
    a text with a label is no answer."""
    return ("image" in entry and "answer" in entry
            and ("question" in entry or not entry.keys() & {"question_id", "label"}))


# An entry is in the first layout that it fits.
LAYOUTS = {
    "LLaMA-Factory": Layout("images, conversations, chosen, rejected",
                            _has("turns", "chosen", "rejected"), _preference),
    "LLaVA": Layout("id, image, conversations or messages: [{from: human | gpt, value}] or [{role, "
                    "content}], rejected_response or rejected_conversations (may be left out)",
                    _has("turns"), _conversation),
    "BPO": Layout("id, image, prompt, completions: [{score, response, type}] or [{response, "
                  "annotations: ratings}]", _has("question", "completions"), _completions),
    "RLHF-V": Layout("image, question, chosen, rejected",
                     lambda e: _has("question", "chosen", "rejected")(e) and "prompt" not in e,
                     _preference),
    "TRL": Layout("images, prompt (may be the beginning of both), chosen, rejected",
                  _has("chosen", "rejected"), _preference),
    "MiniGPT-4": Layout("annotations: [{image_id, caption}]",
                        lambda e: _has_answer(e) and "image_id" in e and "question" not in e,
                        _plain),
    "answers": Layout("image or file_name, answer or caption or text, question (may be left out)",
                      _has_answer, _plain),
}
# What is no layout, by a field of it -> what to do.
ADVICE = {
    "multiple_choice_answer": "VQA keeps its questions in a file of their own: join both by "
                              "question_id",
    "qas": "Visual Genome has the questions of an image in a list: write one a row",
    "regions": "Visual Genome has the regions of an image in a list: write one a row",
    "answers": "the answers are in a list: write the one to be learnt as answer",
    "0": "columns stand one behind the other: write rows, in pandas with orient='records'"}
