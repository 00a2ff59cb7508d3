"""The judge-free benchmarks read from their official files: questions, and what an answer counts.

A benchmark's folder holds the files under the names they are published with; nothing is fetched.
`synonyms.txt` in the folder replaces COCO's word list, and `questions.json` in CHAIR's names the
images to caption and how they are asked for. The rules of counting: `hallucination`.
"""

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpo.data import files as entries
from bpo.evaluation import hallucination
from bpo.evaluation import words as vocabulary
from bpo.evaluation.words import Lexicon
from bpo.params import Refusal

Counts = Mapping[str, tuple[float, float]]  # metric -> (counted, out of)
DESCRIBE = "Describe this image."
SYNONYMS, QUESTIONS = "synonyms.txt", "questions.json"
OPTIONAL = (SYNONYMS, QUESTIONS)  # files that a folder may hold


@dataclass(frozen=True)
class Metric:
    """more: whether more is better, worse (False) or neither (None)."""

    label: str
    more: bool | None


@dataclass(frozen=True)
class Question:
    """image: path below the benchmark's image folder.  kind: the part of the benchmark that it
    belongs to.  label: the true "yes" or "no", or the reference answer."""

    id: str
    image: str
    text: str
    kind: str = ""
    label: str = ""


@dataclass(frozen=True)
class Loaded:
    questions: tuple[Question, ...]
    counts: Callable[[Question, str], Counts]


@dataclass(frozen=True)
class Combined:
    """A number made of several metrics; rule: their values, numbers or arrays -> its own."""

    label: str
    parts: tuple[str, ...]
    rule: Callable[..., Any]


@dataclass(frozen=True)
class Benchmark:
    """files: role -> path below the benchmark's folder.  images: the folder below it.
    fetch: what to get, by the name of its project.  combined: numbers made of the metrics.
    embedded: the question file holds the images, which `unpack` writes where they are missing."""

    name: str
    title: str
    about: str
    files: Mapping[str, str]
    images: str
    fetch: str
    licence: str
    metrics: Mapping[str, Metric]
    load: Callable[[Path], Loaded]
    max_new_tokens: int
    combined: Mapping[str, "Combined"] = field(default_factory=dict)
    embedded: bool = False

    @property
    def all_metrics(self) -> dict[str, Metric]:
        """The metrics, and the numbers that are made of several, which are better when more."""
        return {**self.metrics, **{n: Metric(c.label, True) for n, c in self.combined.items()}}

    @property
    def made(self) -> dict[str, tuple[tuple[str, ...], Callable[..., Any]]]:
        """The combined numbers as `metrics.estimates` takes them."""
        return {n: (c.parts, c.rule) for n, c in self.combined.items()}


def missing(benchmark: Benchmark, folder: Path) -> list[str]:
    """The files and the image folder that a benchmark's folder lacks."""
    lost = [f for f in benchmark.files.values() if not (folder / f).is_file()]
    if not benchmark.embedded and not (folder / benchmark.images).is_dir():
        lost.append(f"{benchmark.images}/")
    return lost


def require(benchmark: Benchmark, folder: Path) -> None:
    """Raises one Refusal that lists all that is missing."""
    if lost := missing(benchmark, folder):
        raise Refusal(f"{folder}: {benchmark.title} needs {', '.join(lost)} there; "
                      f"{benchmark.fetch}")


def read_lexicon(folder: Path) -> Lexicon:
    own = folder / SYNONYMS
    return vocabulary.lexicon(vocabulary.read(own if own.is_file() else vocabulary.COCO))


def rows(file: Path, needed: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The entries of a JSON list or of JSON lines."""
    for where, entry in entries.read(file, file.parent):
        yield vocabulary.checked(entry, needed, f"{file.parent / where}")


def _label(entry: Mapping[str, Any], key: str, where: Path) -> str:
    label = str(entry[key]).strip().lower()
    if label not in ("yes", "no"):
        raise Refusal(f"{where}: {entry[key]!r} is no truth of a yes/no question; write yes or no")
    return label


# --- CHAIR and Object HalBench ------------------------------------------------------------------

ANNOTATIONS = {"instances": "annotations/instances_val2014.json",
               "captions": "annotations/captions_val2014.json"}


def read_scenes(folder: Path, lexicon: Lexicon) -> dict[str, vocabulary.Scene]:
    """The scenes of a folder's annotations; those of train2014 too, where they lie beside."""
    both = (sorted(folder.glob(f"annotations/{n}_*2014.json")) for n in ("instances", "captions"))
    return vocabulary.read_annotations(*both, lexicon)


def _chair(folder: Path) -> Loaded:
    lexicon = read_lexicon(folder)
    scenes = read_scenes(folder, lexicon)
    asked = folder / QUESTIONS
    if asked.is_file():
        questions = [Question(vocabulary.image_key(q["image"]), q["image"], q["text"])
                     for q in rows(asked, ("image", "text"))]
        ids = [q.id for q in questions]
        if twice := sorted({i for i in ids if ids.count(i) > 1}):
            raise Refusal(f"{asked}: asks twice for image {twice[0]}; CHAIR has one caption an "
                          "image")
    else:
        questions = [Question(key, scene.file, DESCRIBE) for key, scene in scenes.items()]
    _all_annotated(questions, scenes, asked)
    return Loaded(tuple(questions), lambda q, text: hallucination.chair(
        text, scenes[vocabulary.image_key(q.image)].present, lexicon))


HALBENCH = "obj_halbench_300_with_image.jsonl"


def _object_halbench(folder: Path) -> Loaded:
    lexicon = read_lexicon(folder)
    scenes = read_scenes(folder, lexicon)
    questions = []
    for number, row in enumerate(rows(folder / HALBENCH, ("image_id", "question")), start=1):
        key = vocabulary.image_key(row["image_id"])
        inside = f"{key}.jpg" if row.get("image") else None
        questions.append(Question(str(number), inside or getattr(scenes.get(key), "file", key),
                                  row["question"]))
    _all_annotated(questions, scenes, folder / HALBENCH)
    unpack(folder)
    return Loaded(tuple(questions), lambda q, text: hallucination.object_halbench(
        text, scenes[vocabulary.image_key(q.image)].present, lexicon))


def unpack(folder: Path) -> None:
    """Writes the images inside Object HalBench's question file to images/ID.jpg where they are not
    yet. Raises Refusal where they cannot be decoded or written."""
    images = folder / "images"
    for row in rows(folder / HALBENCH, ("image_id",)):
        file = images / f"{vocabulary.image_key(row['image_id'])}.jpg"
        if not row.get("image") or file.is_file():
            continue
        try:
            picture = base64.b64decode(row["image"], validate=True)
            images.mkdir(exist_ok=True)
            temporary = file.with_name(f".{file.name}.tmp")
            temporary.write_bytes(picture)
            temporary.replace(file)
        except (ValueError, OSError) as error:
            raise Refusal(f"{folder / HALBENCH}: the image {row['image_id']} inside cannot be "
                          f"written to {file} ({error}); get the whole file, in a folder that can "
                          "be written") from None


def _all_annotated(questions: Sequence[Question], scenes: Mapping[str, vocabulary.Scene], file: Path
                   ) -> None:
    lost = sorted({q.image for q in questions if vocabulary.image_key(q.image) not in scenes})
    if lost:
        raise Refusal(f"{file}: {len(lost)} of its images are not in the annotations ({lost[0]} is "
                      "one); put the instances and captions files of their part of COCO into "
                      "annotations/ too")


# --- POPE and AMBER -----------------------------------------------------------------------------

POPE_KINDS = ("random", "popular", "adversarial")
AMBER_KINDS = {"discriminative-hallucination": "existence",
               "discriminative-attribute-state": "attribute",
               "discriminative-attribute-number": "attribute",
               "discriminative-attribute-action": "attribute",
               "discriminative-relation": "relation", "relation": "relation"}
GENERATIVE = "generative"


def pope_questions(files: Mapping[str, Path]) -> list[Question]:
    """The questions of POPE's files, kind -> file, with ids KIND-NUMBER."""
    return [Question(f"{kind}-{q['question_id']}", q["image"], q["text"], kind,
                     _label(q, "label", file))
            for kind, file in files.items()
            for q in rows(file, ("question_id", "image", "text", "label"))]


def yes_no_counts(question: Question, text: str, *, positive: str) -> Counts:
    """The counts of one answer, and of its kind: accuracy_KIND, f1_KIND."""
    counts = hallucination.yes_no(text, question.label, positive=positive)
    return counts | {f"{n}_{question.kind}": counts[n] for n in ("accuracy", "f1")}


def _pope(folder: Path) -> Loaded:
    files = {kind: folder / BENCHMARKS["pope"].files[kind] for kind in POPE_KINDS}
    return Loaded(tuple(pope_questions(files)),
                  lambda q, text: yes_no_counts(q, text, positive="yes"))


@dataclass(frozen=True)
class AmberTruth:
    """labels: id -> (kind, truth of its question).  scenes: id -> (truth, hallu) of its caption."""

    labels: Mapping[str, tuple[str, str]]
    scenes: Mapping[str, tuple[list[str], list[str]]]
    association: Mapping[str, Sequence[str]]
    safe_words: frozenset[str]

    def counts(self, question: Question, text: str) -> Counts:
        if question.kind == GENERATIVE:
            return hallucination.amber(text, *self.scenes[question.id], self.association,
                                       self.safe_words)
        return yes_no_counts(question, text, positive="no")


def read_amber(folder: Path) -> AmberTruth:
    """annotations.json, relation.json and safe_words.txt of AMBER's folder."""
    file, labels, scenes = folder / "annotations.json", {}, {}
    for entry in rows(file, ("id", "type", "truth")):
        if entry["type"] == GENERATIVE:
            vocabulary.checked(entry, ("hallu",), str(file))
            scenes[str(entry["id"])] = (entry["truth"], entry["hallu"])
        elif entry["type"] in AMBER_KINDS:
            labels[str(entry["id"])] = (AMBER_KINDS[entry["type"]], _label(entry, "truth", file))
        else:
            raise Refusal(f"{file}: {entry['type']!r} is no type of AMBER's questions; give the "
                          "official file")
    try:
        association = json.loads((folder / "relation.json").read_text(encoding="utf-8"))
        safe = (folder / "safe_words.txt").read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise Refusal(f"{folder}: relation.json or safe_words.txt is missing or broken ({error}); "
                      "give AMBER's official files") from None
    return AmberTruth(labels, scenes, association, frozenset(safe))


def _amber(folder: Path) -> Loaded:
    truth, questions = read_amber(folder), []
    for role in ("generative", "discriminative"):
        file = folder / BENCHMARKS["amber"].files[role]
        for entry in rows(file, ("id", "image", "query")):
            number = str(entry["id"])
            if number not in (truth.scenes if role == GENERATIVE else truth.labels):
                raise Refusal(f"{file}: question {number} is not in annotations.json; give files "
                              "of one release")
            kind, label = truth.labels.get(number, (GENERATIVE, ""))
            questions.append(Question(number, entry["image"], entry["query"], kind, label))
    return Loaded(tuple(questions), truth.counts)


YES_NO = {"accuracy": Metric("accuracy", True), "precision": Metric("precision", True),
          "recall": Metric("recall", True), "f1": Metric("F1", True),
          "yes_ratio": Metric("yes answers", None),
          "unanswered": Metric("neither yes nor no", False)}
LENGTHS = {"objects": Metric("objects an answer", None), "words": Metric("words an answer", None)}


def _by_kind(kinds: Sequence[str]) -> dict[str, Metric]:
    return {f"{n}_{k}": Metric(f"{label} {k}", True)
            for k in kinds for n, label in (("accuracy", "accuracy"), ("f1", "F1"))}


_COCO_IMAGES = "images of COCO under their own terms (Flickr)"
BENCHMARKS = {b.name: b for b in (
    Benchmark(
        "chair", "CHAIR", "Wrong objects in captions of COCO images (arXiv 1809.02156).",
        ANNOTATIONS, "val2014", "get COCO 2014's train/val annotations and its val images",
        f"annotations CC BY 4.0, {_COCO_IMAGES}",
        {"chair_s": Metric("CHAIRs", False), "chair_i": Metric("CHAIRi", False),
         "cover": Metric("cover", True), **LENGTHS}, _chair, 512),
    Benchmark(
        "object-halbench", "Object HalBench",
        "Wrong objects in detailed descriptions, against answers with an object (arXiv 2312.00849; "
        "rule-based, without GPT-3.5).",
        {"questions": HALBENCH, **ANNOTATIONS}, "images",
        "get the question file of RLAIF-V and COCO 2014's train/val annotations",
        f"questions CC BY-NC 4.0, annotations CC BY 4.0, {_COCO_IMAGES}",
        {"response": Metric("response", False), "mention": Metric("mention", False),
         "cover": Metric("cover", True), **LENGTHS}, _object_halbench, 512, embedded=True),
    Benchmark(
        "pope", "POPE", "Yes/no questions about what is there (arXiv 2305.10355).",
        {kind: f"coco_pope_{kind}.json" for kind in POPE_KINDS}, "val2014",
        "get the question files of POPE and COCO 2014's val images",
        f"questions MIT, {_COCO_IMAGES}", {**YES_NO, **_by_kind(POPE_KINDS)}, _pope, 32),
    Benchmark(
        "amber", "AMBER",
        "Descriptions and yes/no questions, annotated by hand (arXiv 2311.07397; nouns by rule).",
        {"generative": "query/query_generative.json",
         "discriminative": "query/query_discriminative.json", "annotations": "annotations.json",
         "relation": "relation.json", "safe words": "safe_words.txt"}, "image",
        "get the data folder and the images of AMBER", "Apache-2.0",
        {"chair": Metric("CHAIR", False), "cover": Metric("cover", True),
         "hal": Metric("Hal", False), "cog": Metric("Cog", False),
         "words": Metric("words a description", None), **YES_NO,
         **_by_kind(("existence", "attribute", "relation"))}, _amber, 512,
        {"amber_score": Combined("AMBER score", ("chair", "f1"),
                                 lambda chair, f1: (1 - chair + f1) / 2)}),
)}
