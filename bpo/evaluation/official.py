"""The judge-free benchmarks read from their official files: questions, and what an answer counts.

A benchmark's folder holds the files under the names they are published with; nothing is fetched.
`synonyms.txt` in the folder replaces COCO's word list, and `questions.json` in CHAIR's names the
images to caption and how they are asked for. The rules of counting: `hallucination`.
"""

import base64
import json
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bpo.data import files as entries
from bpo.evaluation import hallucination
from bpo.evaluation import words as vocabulary
from bpo.evaluation.words import Lexicon
from bpo.models.replies import without_thoughts
from bpo.params import Refusal

Counts = Mapping[str, tuple[float, float]]  # metric -> (counted, out of)
SYNONYMS, QUESTIONS = OPTIONAL = ("synonyms.txt", "questions.json")  # that a folder may hold
HALBENCH = "obj_halbench_300_with_image.jsonl"
ANNOTATIONS = {"instances": "annotations/instances_val2014.json",
               "captions": "annotations/captions_val2014.json"}
POPE_KINDS = ("random", "popular", "adversarial")
AMBER_KINDS = {"discriminative-hallucination": "existence",
               "discriminative-attribute-state": "attribute",
               "discriminative-attribute-number": "attribute",
               "discriminative-attribute-action": "attribute",
               "discriminative-relation": "relation", "relation": "relation"}
GENERATIVE = "generative"


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
class Benchmark:
    """files: role -> path below the benchmark's folder.  images: the folder below it.
    fetch: what to get, by the name of its project.  combined: the metrics that are made of others,
    as `metrics.estimates` takes them.  embedded: the question file holds the images.
    count: of benchmarks of descriptions, (text, objects of the image, lexicon) -> counts. Others
    count by what `load` returns; `bpo score` uses the same functions."""

    name: str
    title: str
    files: Mapping[str, str]
    images: str
    fetch: str
    licence: str
    metrics: Mapping[str, Metric]
    load: Callable[[Path], Loaded]
    combined: Mapping[str, tuple[tuple[str, ...], Callable[..., Any]]] = field(default_factory=dict)
    embedded: bool = False
    count: Callable[..., Counts] | None = None


def missing(benchmark: Benchmark, folder: Path) -> list[str]:
    """The files and the image folder that a benchmark's folder lacks."""
    lacking = [f for f in benchmark.files.values() if not (folder / f).is_file()]
    if not benchmark.embedded and not (folder / benchmark.images).is_dir():
        lacking.append(f"{benchmark.images}/")
    return lacking


def require(benchmark: Benchmark, folder: Path) -> None:
    """Raises one Refusal that lists all that is missing."""
    if lacking := missing(benchmark, folder):
        raise Refusal(f"{folder}: {benchmark.title} needs {', '.join(lacking)} there; "
                      f"{benchmark.fetch}")


def read_lexicon(folder: Path) -> Lexicon:
    file = folder / SYNONYMS
    return vocabulary.lexicon(vocabulary.read(file if file.is_file() else vocabulary.COCO))


def rows(file: Path, *needed: str, **kinds: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each entry of a JSON list or of JSON lines stands, and the entry with these fields."""
    for place, entry in entries.read(file, file.parent):
        where = str(file.parent / place)
        yield where, vocabulary.checked(entry, where, *needed, **kinds)


def _label(entry: Mapping[str, Any], key: str, where: str) -> str:
    label = str(entry[key]).strip().lower()
    if label not in ("yes", "no"):
        raise Refusal(f"{where}: {entry[key]!r} is no truth of a yes/no question; write yes or no")
    return label


# --- CHAIR and Object HalBench ------------------------------------------------------------------

def read_scenes(folder: Path, lexicon: Lexicon) -> dict[str, vocabulary.Scene]:
    """The scenes of a folder's annotations; those of train2014 too, where they lie beside."""
    both = (sorted(folder.glob(f"annotations/{n}_*2014.json")) for n in ANNOTATIONS)
    return vocabulary.read_annotations(*both, lexicon)


def described(count: Callable[..., Counts], questions: Sequence[Question],
              scenes: Mapping[str, vocabulary.Scene], lexicon: Lexicon, file: Path) -> Loaded:
    """Questions of `file` whose answers name objects of scenes."""
    unknown = sorted({q.image for q in questions if vocabulary.image_key(q.image) not in scenes})
    if unknown:
        raise Refusal(f"{file}: {len(unknown)} of its images are not in the annotations "
                      f"({unknown[0]} is one); put the instances and captions files of their part "
                      "of COCO into annotations/ too")
    return Loaded(tuple(questions), lambda q, text: count(
        without_thoughts(text), scenes[vocabulary.image_key(q.image)].present, lexicon))


def _chair(folder: Path) -> Loaded:
    lexicon, file = read_lexicon(folder), folder / QUESTIONS
    scenes = read_scenes(folder, lexicon)
    questions = [Question(key, scene.file, "Describe this image.") for key, scene in scenes.items()]
    if file.is_file():
        questions = [Question(vocabulary.image_key(q["image"]), q["image"], q["text"])
                     for _, q in rows(file, "image", "text")]
    twice = sorted(i for i, times in Counter(q.id for q in questions).items() if times > 1)
    if twice:
        raise Refusal(f"{file}: asks twice for image {twice[0]}; CHAIR has one caption an image")
    return described(BENCHMARKS["chair"].count, questions, scenes, lexicon, file)


def _object_halbench(folder: Path) -> Loaded:
    """Also writes the images inside the question file to images/ID.jpg where they are not yet."""
    lexicon, file = read_lexicon(folder), folder / HALBENCH
    scenes = read_scenes(folder, lexicon)
    questions = []
    for number, (_, row) in enumerate(rows(file, "image_id", "question"), start=1):
        image = key = vocabulary.image_key(row["image_id"])
        if row.get("image"):
            image = f"{key}.jpg"
            _unpack(row, folder / "images" / image, file)
        elif key in scenes:
            image = scenes[key].file
        questions.append(Question(str(number), image, row["question"]))
    return described(BENCHMARKS["object-halbench"].count, questions, scenes, lexicon, file)


def _unpack(row: Mapping[str, Any], image: Path, file: Path) -> None:
    if image.is_file():
        return
    try:
        picture = base64.b64decode(row["image"], validate=True)
        image.parent.mkdir(exist_ok=True)
        temporary = image.with_name(f".{image.name}.tmp")
        temporary.write_bytes(picture)
        temporary.replace(image)
    except (ValueError, OSError) as error:
        raise Refusal(f"{file}: the image {row['image_id']} inside cannot be written to {image} "
                      f"({error}); get the whole file, in a folder that can be written") from None


# --- POPE and AMBER -----------------------------------------------------------------------------

def yes_no_counts(question: Question, text: str, *, positive: str) -> Counts:
    """The counts of one answer, and of its kind: accuracy_KIND, f1_KIND."""
    counts = hallucination.yes_no(text, question.label, positive=positive, question=question.text)
    return counts | {f"{n}_{question.kind}": counts[n] for n in ("accuracy", "f1")}


def read_pope(files: Mapping[str, Path]) -> Loaded:
    """The questions of POPE's files, kind -> file, with ids KIND-NUMBER."""
    questions = tuple(Question(f"{kind}-{q['question_id']}", q["image"], q["text"], kind,
                               _label(q, "label", where))
                      for kind, file in files.items()
                      for where, q in rows(file, "question_id", "image", "text", "label"))
    return Loaded(questions, lambda q, text: yes_no_counts(q, text, positive="yes"))


def _pope(folder: Path) -> Loaded:
    return read_pope({kind: folder / BENCHMARKS["pope"].files[kind] for kind in POPE_KINDS})


def read_amber(folder: Path) -> Loaded:
    """annotations.json, relation.json and safe_words.txt of AMBER's folder. They give neither the
    questions' texts nor their images: an id stands for the image."""
    file, questions, objects = folder / "annotations.json", {}, {}
    for where, entry in rows(file, "id", "type", "truth"):
        name, kind = str(entry["id"]), entry["type"]
        if kind == GENERATIVE:
            vocabulary.checked(entry, where, "hallu")
            objects[name] = (entry["truth"], entry["hallu"])
            questions[name] = Question(name, name, "", GENERATIVE)
        elif kind in AMBER_KINDS:
            questions[name] = Question(name, name, "", AMBER_KINDS[kind],
                                       _label(entry, "truth", where))
        else:
            raise Refusal(f"{where}: {kind!r} is no type of AMBER's questions; give the official "
                          "file")
    try:
        association = json.loads((folder / "relation.json").read_text(encoding="utf-8"))
        safe_words = set((folder / "safe_words.txt").read_text(encoding="utf-8").split())
    except (OSError, ValueError) as error:
        raise Refusal(f"{folder}: relation.json or safe_words.txt is missing or broken ({error}); "
                      "give AMBER's official files") from None

    def counts(question: Question, text: str) -> Counts:
        if question.kind == GENERATIVE:
            return hallucination.amber(without_thoughts(text), *objects[question.id],
                                       association, safe_words)
        return yes_no_counts(question, text, positive="no")

    return Loaded(tuple(questions.values()), counts)


def _amber(folder: Path) -> Loaded:
    loaded, questions = read_amber(folder), []
    annotated = {(q.id, q.kind == GENERATIVE): q for q in loaded.questions}
    for role in (GENERATIVE, "discriminative"):
        file = folder / BENCHMARKS["amber"].files[role]
        for where, entry in rows(file, "id", "image", "query"):
            question = annotated.get((str(entry["id"]), role == GENERATIVE))
            if question is None:
                raise Refusal(f"{where}: question {entry['id']} is not in annotations.json; give "
                              "files of one release")
            questions.append(replace(question, image=entry["image"], text=entry["query"]))
    return Loaded(tuple(questions), loaded.counts)


# Precision, recall, F1 and AMBER's score follow how often a model says yes, to where a benchmark
# counts yes as positive one way and to where it counts no the other way: none is better or worse.
YES_NO = {"accuracy": Metric("accuracy", True), "precision": Metric("precision", None),
          "recall": Metric("recall", None), "f1": Metric("F1", None),
          "yes_ratio": Metric("yes answers", None),
          "unanswered": Metric("neither yes nor no", False)}
# How answers were read and what they look like: no results to compare methods by.
READING = {"official_accuracy": Metric("accuracy, read by the official script", None),
           "official_f1": Metric("F1, read by the official script", None),
           "official_difference": Metric("accuracy minus the official script's", None),
           "read_otherwise": Metric("read otherwise by the script", None),
           "bare": Metric("answers of one word", None)}
DIFFERENCE = {"official_difference": (("accuracy", "official_accuracy"), operator.sub)}
NAMED = {"cover": Metric("cover", True), "objects": Metric("objects an answer", None),
         "words": Metric("words an answer", None)}


def _by_kind(kinds: Sequence[str]) -> dict[str, Metric]:
    return {f"{n}_{kind}": Metric(f"{YES_NO[n].label} {kind}", YES_NO[n].more)
            for kind in kinds for n in ("accuracy", "f1")}


_COCO_IMAGES = "images of COCO under their own terms (Flickr)"
BENCHMARKS = {b.name: b for b in (
    # Wrong objects in captions of COCO images (arXiv 1809.02156).
    Benchmark(
        "chair", "CHAIR", ANNOTATIONS, "val2014",
        "get COCO 2014's train/val annotations and its val images",
        f"annotations CC BY 4.0, {_COCO_IMAGES}",
        {"chair_s": Metric("CHAIRs", False), "chair_i": Metric("CHAIRi", False), **NAMED}, _chair,
        count=hallucination.chair),
    # Wrong objects in detailed descriptions, against answers with an object (arXiv 2312.00849),
    # rule-based, without GPT-3.5.
    Benchmark(
        "object-halbench", "Object HalBench", {"questions": HALBENCH, **ANNOTATIONS}, "images",
        "get the question file of RLAIF-V and COCO 2014's train/val annotations",
        f"questions CC BY-NC 4.0, annotations CC BY 4.0, {_COCO_IMAGES}",
        {"response": Metric("response", False), "mention": Metric("mention", False), **NAMED},
        _object_halbench, embedded=True, count=hallucination.object_halbench),
    # Yes/no questions about what is there (arXiv 2305.10355).
    Benchmark(
        "pope", "POPE", {kind: f"coco_pope_{kind}.json" for kind in POPE_KINDS}, "val2014",
        "get the question files of POPE and COCO 2014's val images",
        f"questions MIT, {_COCO_IMAGES}", {**YES_NO, **_by_kind(POPE_KINDS), **READING}, _pope,
        DIFFERENCE),
    # Descriptions and yes/no questions, annotated by hand (arXiv 2311.07397); nouns by rule.
    Benchmark(
        "amber", "AMBER",
        {"generative": "query/query_generative.json",
         "discriminative": "query/query_discriminative.json", "annotations": "annotations.json",
         "relation": "relation.json", "safe words": "safe_words.txt"}, "image",
        "get the data folder and the images of AMBER", "Apache-2.0",
        {"chair": Metric("CHAIR", False), "cover": Metric("cover", True),
         "hal": Metric("Hal", False), "cog": Metric("Cog", False),
         "words": Metric("words a description", None), **YES_NO,
         **_by_kind(("existence", "attribute", "relation")),
         "amber_score": Metric("AMBER score", None), **READING}, _amber,
        {"amber_score": (("chair", "f1"), lambda chair, f1: (1 - chair + f1) / 2), **DIFFERENCE}))}
