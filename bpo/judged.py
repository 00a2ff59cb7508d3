"""The benchmarks whose answers a judge scores, from their official files: MM-Vet, LLaVA-Bench (in
the Wild) and MMHal-Bench. What a judge is told, how its replies are read, what they count as.

The prompts are this project's own words, so that even with the judge of a paper the numbers are not
those of its table. Who is asked, and how it is kept, is `judge`'s. A question without a score that
can be read counts as unscored and in no mean: the official evaluations count 0 or -1 for it.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from bpo.official import Benchmark, Counts, Metric, Question
from bpo.params import Refusal

Score = tuple[float, ...]  # a reply's: one number, or the reference's and the answer's

PROMPTS = Path(__file__).parent / "prompts"
ABILITIES = {"rec": "recognition", "ocr": "OCR", "know": "knowledge",
             "gen": "language generation", "spat": "spatial awareness", "math": "math"}
CATEGORIES = {"conv": "conversation", "detail": "description", "complex": "reasoning"}
TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment",
         "holistic", "other")
HALLUCINATED_BELOW = 3  # of MMHal-Bench's ratings 0 .. 6

NUMBER = r"(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+)(?:\.0)?)?"  # and what it is out of, as in 4/6
ENDS = r"(?!\w|[.,]\d|\s*[-–/]\s*\d)"  # behind it: no longer number, no range, no other fraction


@dataclass(frozen=True)
class JudgedQuestion(Question):
    """A question with its reference answer as label.

    context: what the judge is told of the image, which it does not see.
    """

    context: str = ""


@dataclass(frozen=True, kw_only=True)
class Judged(Benchmark):
    """A benchmark whose answers are scored by a judge.

    load: folder -> its questions; raises Refusal where a file is not as the official one.
    template: the judge's prompt, with {question}, {reference}, {answer} and {context}.
    reply_tokens: enough for a judge's reply in the form asked for.
    parse: a judge's reply -> its score, None if there is no single one in it.
    counts: a question and its scores, one a repeat that could be read -> (counted, out of) of each
        metric. Repeats count as their mean.
    """

    load: Callable[[Path], tuple[JudgedQuestion, ...]]
    template: Path
    reply_tokens: int
    parse: Callable[[str], Score | None]
    counts: Callable[[Question, Sequence[Score]], Counts]

    def prompt(self, question: JudgedQuestion, answer: str) -> tuple[dict[str, str], ...]:
        """The messages that ask for a judgement; other braces of the template stay as they are."""
        said = {"question": question.text, "reference": question.label, "answer": answer,
                "context": question.context}
        text = re.sub(r"\{(question|reference|answer|context)\}", lambda place: said[place[1]],
                      self.template.read_text(encoding="utf-8"))
        return ({"role": "user", "content": text.strip()},)


# --- replies -------------------------------------------------------------------------------------

def _verdict(reply: str) -> str:
    """A reply without emphasis and without the thoughts that some models write before it; nothing
    where it ends amid them."""
    if "</think>" not in reply and "<think>" in reply:
        return ""
    return re.sub(r"[*`]", "", reply.rpartition("</think>")[2]).strip()


def _number(value: str, out_of: str | None, *, low: float, high: float) -> float | None:
    inside = low <= float(value) <= high and out_of in (None, f"{high:g}")
    return float(value) if inside else None


def one_score(reply: str, *, label: str, low: float, high: float, whole: bool = False
              ) -> Score | None:
    """The number behind "<label>:", or that the first line consists of; None where there is none,
    where there are several, or where it is out of bounds. whole: only whole numbers count."""
    text = _verdict(reply)
    found = (re.findall(rf"(?i)\b{label}\s*[:=]\s*{NUMBER}{ENDS}", text)
             or re.findall(rf"\A{NUMBER}\.?\s*(?:\n|\Z)", text))
    scores = {_number(value, out_of or None, low=low, high=high) for value, out_of in found}
    score = scores.pop() if len(scores) == 1 else None
    return None if score is None or whole and score % 1 else (score,)


def two_scores(reply: str, *, low: float, high: float) -> Score | None:
    """The two numbers that the first line consists of: the reference's and the answer's."""
    first = _verdict(reply).partition("\n")[0].strip()
    found = re.fullmatch(rf"(?i)(?:scores?\s*[:=]\s*)?{NUMBER}[\s,;]+{NUMBER}\.?", first)
    if found is None:
        return None
    scores = tuple(_number(found[n], found[n + 1], low=low, high=high) for n in (1, 3))
    return None if None in scores else scores


# --- official files ------------------------------------------------------------------------------

def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Refusal(f"{file}: is no text; fetch the official file again") from None


def _json(text: str, where: object, kind: type) -> Any:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, kind):
        raise Refusal(f"{where}: is not the JSON of the official file; fetch it again")
    return found


def _lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where it stands, record) of every line that is not empty."""
    lines = ((f"{file}, line {n}", line) for n, line in enumerate(_text(file).split("\n"), start=1))
    return [(where, _json(line, where, dict)) for where, line in lines if line.strip()]


def _part(record: Any, name: str, where: str, kind: type = str) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise Refusal(f"{where}: {name!r} is missing or is not as in the official file; fetch the "
                      "file again")
    return value


def _known(value: str, names: Sequence[str], where: str) -> str:
    if value not in names:
        raise Refusal(f"{where}: {value!r} is none of {', '.join(names)}; fetch the official file "
                      "again")
    return value


def _all(questions: Sequence[JudgedQuestion], file: Path) -> tuple[JudgedQuestion, ...]:
    if not questions or len({q.id for q in questions}) < len(questions):
        raise Refusal(f"{file}: has no question, or one twice; fetch the official file again")
    return tuple(questions)


def _mm_vet_questions(folder: Path) -> tuple[JudgedQuestion, ...]:
    file = folder / MM_VET.files["questions"]
    questions = []
    for name, record in _json(_text(file), file, dict).items():
        where = f"{file}, {name}"
        abilities = [_known(a, tuple(ABILITIES), where)
                     for a in _part(record, "capability", where, list)]
        questions.append(JudgedQuestion(
            name, _part(record, "imagename", where), _part(record, "question", where),
            kind=" ".join(a for a in ABILITIES if a in abilities),
            label=re.sub(r"\s*<(AND|OR)>\s*", r" <\1> ", _part(record, "answer", where))))
    return _all(questions, file)


def _llava_bench_questions(folder: Path) -> tuple[JudgedQuestion, ...]:
    files = {role: folder / path for role, path in LLAVA_BENCH.files.items()}
    # Official readers go by line; by number, a file in another order is no danger.
    references = {_part(r, "question_id", where, int): _part(r, "text", where)
                  for where, r in _lines(files["references"])}
    contexts = {_part(r, "image", where): _part(r, "caption", where)
                for where, r in _lines(files["contexts"])}
    questions = []
    for where, record in _lines(files["questions"]):
        number, image = _part(record, "question_id", where, int), _part(record, "image", where)
        for part, held, key in (("references", references, number), ("contexts", contexts, image)):
            if key not in held:
                raise Refusal(f"{where}: {files[part]} has nothing for {key!r}; fetch both files "
                              "again")
        questions.append(JudgedQuestion(
            str(number), image, _part(record, "text", where),
            kind=_known(_part(record, "category", where), tuple(CATEGORIES), where),
            label=references[number], context=contexts[image]))
    return _all(questions, files["questions"])


def _mmhal_questions(folder: Path) -> tuple[JudgedQuestion, ...]:
    file = folder / MMHAL.files["questions"]
    questions = []
    for number, record in enumerate(_json(_text(file), file, list), start=1):
        where = f"{file}, question {number}"
        questions.append(JudgedQuestion(
            _part(record, "image_id", where), _part(record, "image_src", where).rpartition("/")[2],
            _part(record, "question", where),
            kind=_known(_part(record, "question_type", where), TYPES, where),
            label=_part(record, "gt_answer", where),
            context=", ".join(map(str, _part(record, "image_content", where, list)))))
    return _all(questions, file)


# --- what scores count as ------------------------------------------------------------------------

def _mm_vet_counts(question: Question, scores: Sequence[Score]) -> Counts:
    """Mean mark, over all questions and over those that need an ability."""
    if not scores:
        return {"unscored": (1, 1)}
    mark = fmean(s for s, in scores)
    return {"unscored": (0, 1), **{n: (mark, 1) for n in ("total", *question.kind.split())}}


def _llava_bench_counts(question: Question, scores: Sequence[Score]) -> Counts:
    """Sum of the answers' scores over the sum of the references', and the mean of each."""
    if not scores:
        return {"unscored": (1, 1)}
    reference, answer = map(fmean, zip(*scores, strict=True))
    return {"unscored": (0, 1), "total": (answer, reference), question.kind: (answer, reference),
            "answer_score": (answer, 1), "reference_score": (reference, 1)}


def _mmhal_counts(question: Question, scores: Sequence[Score]) -> Counts:
    """Mean rating, in all and of a type of question, and the share of ratings below 3."""
    if not scores:
        return {"unscored": (1, 1)}
    rating = fmean(s for s, in scores)
    below = fmean(s < HALLUCINATED_BELOW for s, in scores)
    return {"unscored": (0, 1), "rating": (rating, 1), "hallucination": (below, 1),
            question.kind: (rating, 1)}


UNSCORED = {"unscored": Metric("questions without a score", False)}

MM_VET = Judged(
    name="mm-vet", title="MM-Vet",
    about="218 questions that need up to six abilities at once; a judge marks each answer from 0 "
          "to 1 (arXiv 2308.02490).",
    files={"questions": "mm-vet.json"}, images="images",
    fetch="get mm-vet.zip of the MM-Vet project, which holds mm-vet.json and images/",
    licence="CC BY-NC 4.0", max_new_tokens=1024, reply_tokens=64,
    template=PROMPTS / "judge_mm_vet.txt",
    metrics={"total": Metric("MM-Vet", True),
             **{n: Metric(label, True) for n, label in ABILITIES.items()}, **UNSCORED},
    load=_mm_vet_questions, parse=partial(one_score, label="score", low=0, high=1),
    counts=_mm_vet_counts)

LLAVA_BENCH = Judged(
    name="llava-bench", title="LLaVA-Bench (in the Wild)",
    about="60 questions about 24 images; a judge rates GPT-4's answer, which was written from a "
          "description of the image, and the model's from 1 to 10 (arXiv 2304.08485).",
    files={"questions": "questions.jsonl", "references": "answers_gpt4.jsonl",
           "contexts": "context.jsonl"}, images="images",
    fetch="get the data set llava-bench-in-the-wild of the LLaVA project, all of it",
    licence="not stated in its files: see the data set's page",
    max_new_tokens=1024, reply_tokens=1024, template=PROMPTS / "judge_llava_bench.txt",
    metrics={"total": Metric("LLaVA-Bench", True),
             **{n: Metric(label, True) for n, label in CATEGORIES.items()},
             "answer_score": Metric("score of the answers, 1 to 10", True),
             "reference_score": Metric("score of GPT-4's answers, 1 to 10", None), **UNSCORED},
    load=_llava_bench_questions, parse=partial(two_scores, low=1, high=10),
    counts=_llava_bench_counts)

MMHAL = Judged(
    name="mmhal", title="MMHal-Bench",
    about="96 questions of eight types that invite hallucination; a judge rates each answer from 0 "
          "to 6, below 3 if it hallucinates (arXiv 2309.14525).",
    files={"questions": "response_template.json"}, images="images",
    fetch="get response_template.json and images/ of the data set MMHal-Bench (rename the file "
          "where it is called mmhal-bench_answer_template.json)",
    licence="Apache-2.0, without the images", max_new_tokens=1024, reply_tokens=1024,
    template=PROMPTS / "judge_mmhal.txt",
    metrics={"rating": Metric("rating, 0 to 6", True),
             "hallucination": Metric("answers that hallucinate", False),
             **{n: Metric(f"rating, {n}", True) for n in TYPES}, **UNSCORED},
    load=_mmhal_questions,
    parse=partial(one_score, label="rating", low=0, high=6, whole=True), counts=_mmhal_counts)

JUDGED = {b.name: b for b in (MM_VET, LLAVA_BENCH, MMHAL)}
