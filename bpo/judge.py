"""Asking a judge: a model behind an endpoint that scores answers, its replies kept on disk.

A judged number belongs to its judge. Another model, prompt or temperature gives other numbers for
the same answers, so what `describe` returns stands beside each of them. The numbers of a local
judge compare methods with one another, under that judge alone: they are not comparable with
published ones, for which GPT-4 was the judge, with prompts that are not these.

A reply is on the disk before the next one is asked for. What a killed server or a killed run had
been paid for is not paid for again, and what is asked twice is paid for once.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from bpo import runs
from bpo.endpoint import Endpoint
from bpo.judged import Score
from bpo.params import Refusal
from bpo.records import to_json
from bpo.seeds import seed_for

REPLIES = "replies.jsonl"
TOP_P = 1.0
SEED_BITS = 31  # endpoints read as many

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Settings:
    """How a judge is asked.

    repeats: replies a prompt; its score is their mean.
    attempts: how often one reply is asked for until it can be read. Each has a seed of its own,
        which changes nothing where the temperature is 0 and the server keeps to it.
    max_new_tokens: of a reply.
    """

    temperature: float
    repeats: int
    attempts: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.temperature < 0 or min(self.repeats, self.attempts, self.max_new_tokens) < 1:
            raise Refusal("a judge's temperature must be 0 or more, its repeats, attempts and "
                          f"max_new_tokens 1 or more; they are {self.temperature}, {self.repeats}, "
                          f"{self.attempts} and {self.max_new_tokens}")


@dataclass(frozen=True)
class Verdict:
    """What a judge said to one prompt.

    replies: the last one of each repeat.  scores: of the repeats whose reply could be read.
    """

    scores: tuple[Score, ...]
    replies: tuple[str, ...]

    @property
    def unscored(self) -> bool:
        """No reply could be read: it counts for no mean, and never as 0."""
        return not self.scores


def describe(endpoint: Endpoint, template: Path, settings: Settings) -> dict[str, Any]:
    """What stands beside a judged number.

    template: the prompt's file; prompt_sha256 is of its bytes, as sha256sum prints it.
    """
    return {"judge": endpoint.model, "prompt": template.name,
            "prompt_sha256": hashlib.sha256(template.read_bytes()).hexdigest(),
            **asdict(settings), "top_p": TOP_P}


def ask(endpoint: Endpoint, folder: Path, prompts: Sequence[Messages],
        parse: Callable[[str], Score | None], settings: Settings) -> list[Verdict]:
    """A verdict a prompt, in the prompts' order; only what `folder` does not hold is asked for.

    folder: of the replies kept, made if it is not there; it serves any judges and prompts.
    parse: what it cannot read (None) is asked for again, `attempts` times in all.
    Raises Refusal when the endpoint does, NoAnswer included. What came until then is kept, and the
    same call goes on from there; with every reply kept, no server and no key is needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with runs.locked(folder / ".replies.lock", f"{folder}: another process asks a judge and keeps "
                     "the replies here; wait until it has ended"):
        replies = _mended(folder / REPLIES)
        read = [{r: "" for r in range(settings.repeats)} for _ in prompts]
        left = [(n, r) for n in range(len(prompts)) for r in range(settings.repeats)]
        for attempt in range(settings.attempts):
            keys = {place: _key(endpoint, prompts[place[0]], settings, place[1], attempt)
                    for place in left}
            # By key: a prompt that comes twice is asked once.
            _ask_new(endpoint, folder / REPLIES, replies, settings,
                     {k: prompts[n] for (n, _), k in keys.items() if k not in replies})
            for (number, repeat), key in keys.items():
                read[number][repeat] = replies[key]
            left = [place for place in left if parse(replies[keys[place]]) is None]
    return [Verdict(tuple(s for s in map(parse, texts.values()) if s is not None),
                    tuple(texts.values())) for texts in read]


def _key(endpoint: Endpoint, prompt: Messages, settings: Settings, repeat: int, attempt: int
         ) -> str:
    """The name of a reply: sha256 of all that it depends on. Not of the url, which may change while
    the judge does not."""
    known = {"model": endpoint.model, "messages": [dict(m) for m in prompt],
             "temperature": float(settings.temperature), "top_p": TOP_P,
             "max_new_tokens": settings.max_new_tokens, "repeat": repeat, "attempt": attempt}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _ask_new(endpoint: Endpoint, file: Path, replies: dict[str, str], settings: Settings,
             new: Mapping[str, Messages]) -> None:
    """Adds the replies to `new` (key -> prompt) to the file and to `replies` as they come."""
    if not new:
        return
    keys = list(new)
    with file.open("ab") as stream, tqdm(total=len(new), desc="judge's replies", unit="reply",
                                         leave=False) as bar:
        def keep(place: int, text: str) -> None:
            _append(stream, {"key": keys[place], "model": endpoint.model, "reply": text})
            replies[keys[place]] = text
            bar.update()

        endpoint.answers(list(new.values()), temperature=settings.temperature, top_p=TOP_P,
                         max_new_tokens=settings.max_new_tokens, keep=keep,
                         seeds=[seed_for(0, "judge", k) % 2**SEED_BITS for k in keys])


def _append(stream: BinaryIO, record: dict[str, str]) -> None:
    stream.write(f"{to_json(record)}\n".encode())
    stream.flush()
    os.fsync(stream.fileno())


def _mended(file: Path) -> dict[str, str]:
    """key -> reply of a file; what a kill left of its last line is cut off."""
    if not file.is_file():
        return {}
    replies, whole = {}, 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                replies[record["key"]] = record["reply"]
            except (ValueError, TypeError, KeyError):
                raise Refusal(f"{file}, line {number}: is no reply of a judge; remove the line, "
                              "and its question is asked again") from None
            whole += len(line)
    os.truncate(file, whole)
    return replies
