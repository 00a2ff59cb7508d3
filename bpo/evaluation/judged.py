"""The benchmarks whose answers a judge scores, from their official files; and asking the judge, a
model behind an endpoint, whose replies stay on disk.

A judged number belongs to its judge, prompt and temperature: it compares methods under that judge
alone, and no published number, for which GPT-4 was the judge with other prompts. A question without
a readable score counts as unscored and in no mean: the official evaluations count 0 or -1 for it.
"""

import hashlib
import json
import re
from collections import ChainMap, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from bpo.evaluation.official import BENCHMARKS, Benchmark, Counts, Metric, Question, rows
from bpo.evaluation.words import checked
from bpo.models import endpoint as endpoints
from bpo.models.endpoint import Endpoint
from bpo.models.replies import Reply, fault, without_thoughts
from bpo.params import Refusal
from bpo.study import progress
from bpo.study import stage as stages
from bpo.study.seeds import seed_for

Score = tuple[float, ...]  # of a reply: one number, or the reference's and the answer's
Messages = Sequence[Mapping[str, str]]

REPLIES = "replies.jsonl"
TOP_P = 1.0
ABILITIES = {"rec": "recognition", "ocr": "OCR", "know": "knowledge",
             "gen": "language generation", "spat": "spatial awareness", "math": "math"}
CATEGORIES = {"conv": "conversation", "detail": "description", "complex": "reasoning"}
TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment",
         "holistic", "other")


@dataclass(frozen=True)
class JudgedQuestion(Question):
    """A question with its reference answer as label; context: the image in words."""

    context: str = ""


@dataclass(frozen=True, kw_only=True)
class Judged(Benchmark):
    """A benchmark whose answers are scored by a judge.

    load: folder -> its questions; raises Refusal where a file is not as the official one.
    reply_tokens: enough for a judge's reply in the form asked for.
    parse: a judge's reply -> its score, None if there is no single one in it.
    marks: a question and its scores, one a readable repeat -> (counted, out of) of each metric.
    """

    load: Callable[[Path], tuple[JudgedQuestion, ...]]
    reply_tokens: int
    parse: Callable[[str], Score | None]
    marks: Callable[[Question, Sequence[Score]], Counts]

    @property
    def template(self) -> Path:
        """The judge's prompt, with {question}, {reference}, {answer} and {context}."""
        return Path(__file__).parent / "prompts" / f"judge_{self.name.replace('-', '_')}.txt"

    def prompt(self, question: JudgedQuestion, answer: str) -> Messages:
        """The messages that ask for a judgement; other braces of the template stay as they are."""
        parts = {"question": question.text, "reference": question.label, "answer": answer,
                 "context": question.context}
        text = re.sub(rf"\{{({'|'.join(parts)})\}}", lambda place: parts[place[1]],
                      self.template.read_text(encoding="utf-8"))
        return ({"role": "user", "content": text.strip()},)

    def counts(self, question: Question, scores: Sequence[Score]) -> Counts:
        """What an answer adds to each metric; without a score it adds to `unscored` alone."""
        marks = self.marks(question, scores) if scores else {}
        return {"unscored": (int(not scores), 1), **marks}


def ask(endpoint: Endpoint, folder: Path, benchmark: Judged, prompts: Sequence[Messages], *,
        names: Sequence[tuple[str, str]], temperature: float, repeats: int, attempts: int
        ) -> list[tuple[list[Score], str]]:
    """Of each prompt the scores of its readable repeats and, where there is none, why; only replies
    that `folder` lacks are asked for.

    names: question and method of each prompt, which are stored beside the reply.
    attempts: how often one reply is asked for until it can be read, each with a seed of its own; a
    prompt that the judge's server refuses is asked again by the next run alone.
    Each reply is on disk before the next question, so that a killed server or run costs nothing
    twice, and with all replies there no server and no key is needed. Raises Refusal as `endpoint`,
    and where every prompt was refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / REPLIES
    last: dict[tuple[int, int], Reply] = {}  # of each prompt and repeat
    scores = dict.fromkeys((n, r) for n in range(len(prompts)) for r in range(repeats))
    settings = {"temperature": float(temperature), "top_p": TOP_P,
                "max_new_tokens": benchmark.reply_tokens}
    with stages.locked(folder / ".replies.lock", f"{folder}: another process asks a judge and "
                       "writes its replies here; wait until it has ended"):
        replies = endpoints.kept(file)
        for attempt in range(attempts):
            # all that a reply depends on; not the url, where the same judge may move
            keys = {(n, r): hashlib.sha256(json.dumps({
                "model": endpoint.model, "messages": [dict(m) for m in prompts[n]], **settings,
                "repeat": r, "attempt": attempt}, sort_keys=True).encode()).hexdigest()
                for (n, r), score in scores.items()
                if score is None and ((n, r) not in last or last[n, r].status == 200)}
            # By key: a prompt that comes twice is asked once.
            askers = defaultdict(list)
            for (n, _), key in keys.items():
                if key not in replies:
                    askers[key].append(n)
            if askers:
                with progress.part("judge's replies", len(askers)) as advance:
                    endpoints.keep_answers(
                        endpoint, file, replies, {k: prompts[n] for k, (n, *_) in askers.items()},
                        seeds=[seed_for(0, "judge", key) % 2**31 for key in askers],
                        notes={k: {"benchmark": benchmark.name, "question": names[numbers[0]][0],
                                   "methods": [names[n][1] for n in numbers]}
                               for k, numbers in askers.items()}, done=advance, **settings)
            last |= {place: replies[key] for place, key in keys.items()}
            scores |= {place: benchmark.parse(last[place].text) for place in keys
                       if last[place].status == 200}
    refused = [reply for reply in last.values() if reply.status != 200]
    if refused and len(refused) == len(last):
        raise endpoint.refuses(refused[0])
    readable = [[s for r in range(repeats) if (s := scores[n, r]) is not None]
                for n in range(len(prompts))]
    return [(found, "" if found else _unread(last[n, repeats - 1]))
            for n, found in enumerate(readable)]


def _unread(reply: Reply) -> str:
    """Why a reply gives no score."""
    return fault(reply) or ("no single score in the reply" if reply.text else "empty reply")


NUMBER = r"(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+)(?:\.0)?)?"  # and what it is out of, as in 4/6
ENDS = r"(?!\w|[.,]\d|\s*[-–/]\s*\d)"  # behind it: no longer number, no range, no other fraction


def _verdict(reply: str) -> str:
    """A reply without emphasis and thoughts."""
    return re.sub(r"[*`]", "", without_thoughts(reply)).strip()


def _number(value: str, out_of: str | None, *, low: float, high: float) -> float | None:
    inside = low <= float(value) <= high and out_of in (None, "", f"{high:g}")
    return float(value) if inside else None


def one_score(reply: str, *, label: str, low: float, high: float, step: float = 0) -> Score | None:
    """The number behind "<label>:", or that the first line consists of; None where there is none,
    where there are several, or where it is out of bounds or no multiple of `step`."""
    text = _verdict(reply)
    if re.search(rf"(?i)\b{label}\s*[:=]\s*{NUMBER}\s+(?:or|to)\s+\d", text):
        return None
    numbers = (re.findall(rf"(?i)\b{label}\s*[:=]\s*{NUMBER}{ENDS}", text)
               or re.findall(rf"\A{NUMBER}\.?\s*(?:\n|\Z)", text))
    scores = {_number(*number, low=low, high=high) for number in numbers}
    score = scores.pop() if len(scores) == 1 else None
    return None if score is None or step and score % step else (score,)


def two_scores(reply: str, *, low: float, high: float) -> Score | None:
    """The two numbers that the first line consists of: the reference's and the answer's."""
    first = _verdict(reply).partition("\n")[0].strip()
    line = re.fullmatch(rf"(?i)(?:scores?\s*[:=]\s*)?{NUMBER}[\s,;]+{NUMBER}\.?", first)
    if line is None:
        return None
    scores = tuple(_number(line[n], line[n + 1], low=low, high=high) for n in (1, 3))
    return None if None in scores else scores


def _unique(questions: Sequence[JudgedQuestion], file: Path) -> tuple[JudgedQuestion, ...]:
    if not questions or len({q.id for q in questions}) < len(questions):
        raise Refusal(f"{file}: has no question, or one twice; fetch the official file again")
    return tuple(questions)


def _mm_vet_questions(folder: Path) -> tuple[JudgedQuestion, ...]:
    file, questions = folder / MM_VET.files["questions"], []
    try:
        records = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise Refusal(f"{file}: is not the JSON of the official file; fetch it again") from None
    for name, record in records.items():
        where = f"{file}, {name}"
        q = checked(record, where, imagename=str, question=str, answer=str, capability=list)
        for ability in q["capability"]:
            checked({"capability": ability}, where, capability=ABILITIES)
        questions.append(JudgedQuestion(
            name, q["imagename"], q["question"],
            kind=" ".join(a for a in ABILITIES if a in q["capability"]),
            label=re.sub(r"\s*<(AND|OR)>\s*", r" <\1> ", q["answer"])))
    return _unique(questions, file)


def _llava_bench_questions(folder: Path) -> tuple[JudgedQuestion, ...]:
    file, answered, described = (folder / path for path in LLAVA_BENCH.files.values())
    # Official readers go by line; by number, a file in another order is no danger.
    references = {r["question_id"]: r["text"] for _, r in rows(answered, question_id=int, text=str)}
    contexts = {r["image"]: r["caption"] for _, r in rows(described, image=str, caption=str)}
    questions = []
    for where, q in rows(file, question_id=int, image=str, text=str, category=CATEGORIES):
        number, image = q["question_id"], q["image"]
        if number not in references or image not in contexts:
            raise Refusal(f"{where}: {answered} has nothing for {number}, or {described} for "
                          f"{image}; fetch both files again")
        questions.append(JudgedQuestion(str(number), image, q["text"], q["category"],
                                        references[number], contexts[image]))
    return _unique(questions, file)


def _mmhal_questions(folder: Path) -> tuple[JudgedQuestion, ...]:
    file = folder / MMHAL.files["questions"]
    return _unique([JudgedQuestion(
        q["image_id"], q["image_src"].rpartition("/")[2], q["question"], q["question_type"],
        q["gt_answer"], ", ".join(map(str, q["image_content"])))
        for _, q in rows(file, image_id=str, image_src=str, question=str, question_type=TYPES,
                         gt_answer=str, image_content=list)], file)


def _mm_vet_marks(question: Question, scores: Sequence[Score]) -> Counts:
    """Mean mark, over all questions and over those that need an ability."""
    mark = fmean(s for s, in scores)
    return {name: (mark, 1) for name in ("total", *question.kind.split())}


def _llava_bench_marks(question: Question, scores: Sequence[Score]) -> Counts:
    """Sum of the answers' scores over the sum of the references', and the mean of each."""
    reference, answer = map(fmean, zip(*scores, strict=True))
    return {"total": (answer, reference), question.kind: (answer, reference),
            "answer_score": (answer, 1), "reference_score": (reference, 1)}


def _mmhal_marks(question: Question, scores: Sequence[Score]) -> Counts:
    """Mean rating, in all and of a type of question, and the share of ratings below 3."""
    rating = fmean(s for s, in scores)
    below = fmean(s < 3 for s, in scores)
    return {"rating": (rating, 1), question.kind: (rating, 1), "hallucination": (below, 1)}


UNSCORED = {"unscored": Metric("questions without a score", False)}

# 218 questions that need up to six abilities; marks from 0 to 1 (arXiv 2308.02490).
MM_VET = Judged(
    name="mm-vet", title="MM-Vet", files={"questions": "mm-vet.json"}, images="images",
    fetch="get mm-vet.zip of the MM-Vet project, which holds mm-vet.json and images/",
    licence="CC BY-NC 4.0", reply_tokens=64,
    metrics={"total": Metric("MM-Vet", True),
             **{n: Metric(label, True) for n, label in ABILITIES.items()}, **UNSCORED},
    load=_mm_vet_questions, parse=partial(one_score, label="score", low=0, high=1),
    marks=_mm_vet_marks)

# 60 questions about 24 images; ratings from 1 to 10 of GPT-4's answer, which was written from a
# description of the image, and of the model's (arXiv 2304.08485).
LLAVA_BENCH = Judged(
    name="llava-bench", title="LLaVA-Bench (in the Wild)",
    files={"questions": "questions.jsonl", "references": "answers_gpt4.jsonl",
           "contexts": "context.jsonl"}, images="images",
    fetch="get the data set llava-bench-in-the-wild of the LLaVA project, all of it",
    licence="not stated in its files: see the data set's page", reply_tokens=1024,
    metrics={"total": Metric("LLaVA-Bench", True),
             **{n: Metric(label, True) for n, label in CATEGORIES.items()},
             "answer_score": Metric("score of the answers, 1 to 10", True),
             "reference_score": Metric("score of GPT-4's answers, 1 to 10", None), **UNSCORED},
    load=_llava_bench_questions, parse=partial(two_scores, low=1, high=10),
    marks=_llava_bench_marks)

# 96 questions of eight types; ratings from 0 to 6, below 3 for hallucination (arXiv 2309.14525).
MMHAL = Judged(
    name="mmhal", title="MMHal-Bench", files={"questions": "response_template.json"},
    images="images", fetch="get response_template.json and images/ of the data set MMHal-Bench "
    "(rename the file where it is called mmhal-bench_answer_template.json)",
    licence="Apache-2.0, without the images", reply_tokens=1024,
    metrics={"rating": Metric("rating, 0 to 6", True),
             "hallucination": Metric("answers that hallucinate", False),
             **{n: Metric(f"rating, {n}", True) for n in TYPES}, **UNSCORED},
    load=_mmhal_questions,
    parse=partial(one_score, label="rating", low=0, high=6, step=1), marks=_mmhal_marks)

# The prompt of an entry is prompts/judge_NAME.txt, with _ in place of -.
JUDGED = {b.name: b for b in (MM_VET, LLAVA_BENCH, MMHAL)}
KNOWN = ChainMap(JUDGED, BENCHMARKS)  # both registries as they are now, those of rules first
