"""Files of answers that were made elsewhere, matched with the truth of a judge-free benchmark.

What an answer is to is told from its image or question number; nothing is dropped in silence.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson

from bpo import coco, entries, hallucination, metrics, official, vocabulary
from bpo.official import BENCHMARKS, Benchmark, Counts, Question
from bpo.params import Refusal
from bpo.vocabulary import Lexicon

# Of several fields the first that an answer has: what the image or question is, and what was said.
NAMES = ("image_id", "image", "question_id", "id")
TEXTS = ("caption", "answer", "response", "text")
ASKED = ("question", "prompt")
_PARTS_OF_COCO = ("info", "images", "licenses", "annotations", "categories", "type")


@dataclass(frozen=True)
class Answer:
    where: str
    fields: Mapping[str, Any]
    text: str


@dataclass(frozen=True)
class Truth:
    """find: the questions that an answer answers, none where it is to something else.
    total: the images or questions that there are.  once: whether a question has one answer alone.
    note: what the user must know of it."""

    find: Callable[[Answer], Sequence[Question]]
    counts: Callable[[Question, str], Counts]
    total: int
    once: bool
    note: str = ""


@dataclass(frozen=True)
class Scored:
    """counts: which question, how it was asked, the how manieth answer -> (image, its counts).
    questions: how many questions or images have an answer."""

    counts: Mapping[tuple[str, str, int], tuple[str, Counts]]
    answers: int
    without_truth: int
    questions: int


# --- truth --------------------------------------------------------------------------------------

def read_truth(benchmark: Benchmark, files: Sequence[Path], synonyms: Path | None) -> Truth:
    """The truth of a benchmark; synonyms: None for COCO's. Raises Refusal for what does not fit."""
    for file in files:
        if not file.exists():
            raise Refusal(f"{file}: there is no such truth file; {benchmark.fetch}")
    if synonyms and benchmark.name in ("pope", "amber"):
        raise Refusal(f"--synonyms: {benchmark.title} has no use for a synonym file; leave it out")
    if benchmark.name == "pope":
        return _pope(files)
    if len(files) > 1:
        raise Refusal(f"--truth: {benchmark.title} has one truth file, {len(files)} are given")
    if benchmark.name == "amber":
        return _amber(files[0])
    return _scenes(benchmark, files[0], vocabulary.lexicon(vocabulary.read(
        synonyms or vocabulary.COCO)))


def _scenes(benchmark: Benchmark, file: Path, lexicon: Lexicon) -> Truth:
    note = ""
    if _first_key(file) in _PARTS_OF_COCO:
        captions = file.with_name(file.name.replace("instances", "captions"))
        beside = [captions] if captions != file and captions.is_file() else []
        note = "" if beside else ("no captions file beside the instances: objects that reference "
                                  "captions name count as absent")
        present = {k: s.present for k, s in coco.read([file], beside, lexicon).items()}
    else:
        present = _objects(file, lexicon)
    count = hallucination.chair if benchmark.name == "chair" else hallucination.object_halbench

    def find(answer: Answer) -> list[Question]:
        key = coco.image_key(answer.fields[_field(answer.fields, NAMES)])
        asked = str(answer.fields.get(_field(answer.fields, ASKED)))
        return [Question(key, key, asked)] if key in present else []

    return Truth(find, lambda q, text: count(text, present[q.image], lexicon), len(present),
                 False, note)


def _objects(file: Path, lexicon: Lexicon) -> dict[str, set[str]]:
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refusal(f"{file}: is no JSON ({error}); give image -> classes") from None
    if not isinstance(listed, dict) or not all(isinstance(v, list) for v in listed.values()):
        raise Refusal(f"{file}: must be an object of image -> list of classes, or COCO's "
                      "instances file")
    coco.known_classes({c for v in listed.values() for c in v}, lexicon, where=file)
    return {coco.image_key(image): set(classes) for image, classes in listed.items()}


def _first_key(file: Path) -> str | None:
    try:
        with file.open("rb") as stream:
            return next((v for e, v in ijson.basic_parse(stream) if e == "map_key"), None)
    except (ijson.JSONError, OSError):
        return None


def _pope(files: Sequence[Path]) -> Truth:
    if len(files) == 1 and files[0].is_dir():
        files = sorted(files[0].glob("coco_pope_*.json")) or files
    kinds = {_kind(file): file for file in files}
    if len(kinds) < len(files):
        raise Refusal("--truth: several question files are of one kind; give one with random, one "
                      "with popular and one with adversarial in its name")
    questions = official.pope_questions(kinds)
    by_id: dict[str, list[Question]] = {}
    by_text: dict[tuple[str, str], list[Question]] = {}
    for q in questions:
        by_id.setdefault(q.id.rsplit("-", 1)[-1], []).append(q)
        by_id[q.id] = [q]
        by_text.setdefault((coco.image_key(q.image), metrics.normalised(q.text)), []).append(q)

    def find(answer: Answer) -> list[Question]:
        said, fields = _field(answer.fields, TEXTS), answer.fields
        asked = _field({f: 1 for f in fields if f != said}, (*ASKED, "text"))
        if "image" in fields and asked:
            key = (coco.image_key(fields["image"]), metrics.normalised(str(fields[asked])))
            return by_text.get(key, [])
        found = by_id.get(str(fields[_field(fields, ("question_id", "id"), answer.where)]), [])
        if len(found) > 1:
            raise Refusal(f"{answer.where}: its question number is in {len(found)} question files; "
                          "score against one file at a time, or give image and question")
        return found

    return Truth(find, lambda q, text: official.yes_no_counts(q, text, positive="yes"),
                 len(questions), True)


def _kind(file: Path) -> str:
    return next((k for k in official.POPE_KINDS if k in file.name), "")


def _amber(file: Path) -> Truth:
    folder = file if file.is_dir() else file.parent
    truth = official.read_amber(folder)
    images = {str(q["id"]): q["image"] for role in ("generative", "discriminative")
              if (asked := folder / BENCHMARKS["amber"].files[role]).is_file()
              for _, q in entries.read(asked, folder)}

    def find(answer: Answer) -> list[Question]:
        number = str(answer.fields[_field(answer.fields, ("id", "question_id"), answer.where)])
        if number not in truth.labels and number not in truth.scenes:
            return []
        kind, label = truth.labels.get(number, (official.GENERATIVE, ""))
        return [Question(number, images.get(number, number), "", kind, label)]

    note = "" if images else ("no query/ beside the annotations: which questions share an image is "
                              "not known, and the intervals are over questions")
    return Truth(find, truth.counts, len(truth.labels) + len(truth.scenes), True, note)


# --- answers ------------------------------------------------------------------------------------

def _field(fields: Mapping[str, Any], names: Sequence[str], where: str = "") -> str | None:
    """The first of the names that the fields have; with `where`, raises Refusal for none."""
    name = next((n for n in names if fields.get(n) is not None), None)
    if name is None and where:
        raise Refusal(f"{where}: the answer needs one of {', '.join(names)}")
    return name


def read_answers(file: Path) -> Iterator[Answer]:
    if not file.is_file():
        raise Refusal(f"{file}: there is no such file of answers")
    for where, entry in entries.read(file, file.parent):
        where = f"{file.parent / where}"
        if not isinstance(entry, dict):
            raise Refusal(f"{where}: is no JSON object with an answer")
        _field(entry, NAMES, where)
        text = entry[_field(entry, TEXTS, where)]
        if not isinstance(text, str):
            raise Refusal(f"{where}: the answer must be a text, is {str(text)[:40]}")
        yield Answer(where, entry, text)


def match(file: Path, truth: Truth) -> Scored:
    """Every answer of a file against the truth; raises Refusal where none of them has one.

    Several answers to an image are told apart by their question, those to the same by their order.
    """
    found: list[tuple[Question, Counts]] = []
    said: dict[str, str] = {}
    times: Counter[str] = Counter()
    answers = lost = 0
    for answer in read_answers(file):
        answers += 1
        questions = truth.find(answer)
        lost += not questions
        for q in questions:
            if truth.once and said.setdefault(q.id, answer.text) != answer.text:
                raise Refusal(f"{answer.where}: question {q.id} has another answer already; leave "
                              "one")
            if truth.once and times[q.id]:
                continue  # POPE asks the same of an image in several of its files
            times[q.id] += 1
            found.append((q, truth.counts(q, answer.text)))
    if not found:
        raise Refusal(f"{file}: none of its {answers} answers is to an image or question of the "
                      f"truth; they must share {' or '.join(NAMES)}")
    counts, seen = {}, Counter()
    for q, count in found:
        name = (q.id, q.text if times[q.id] > 1 else "")
        counts[*name, seen[name]] = (q.image, count)
        seen[name] += 1
    return Scored(counts, answers, lost, len(times))


def summary(scored: Scored, truth: Truth) -> dict[str, Any]:
    return {"read": scored.answers, "scored": scored.answers - scored.without_truth,
            "without_truth": scored.without_truth, "truth": truth.total,
            "truth_without_answer": truth.total - scored.questions, "note": truth.note}
