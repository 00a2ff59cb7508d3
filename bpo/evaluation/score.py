"""Answers that were made elsewhere, scored as the judge-free benchmarks do: `python -m bpo score`.

A file of answers and the benchmark's truth give each metric with its interval over images, and
against a second file the paired difference. An answer belongs to the image or question that it
names; answers without truth are counted, not scored. No model and no image is read.
"""

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bpo.data import answers
from bpo.evaluation import metrics, official
from bpo.evaluation import words as vocabulary
from bpo.evaluation.official import BENCHMARKS, Benchmark, Counts, Loaded, Question
from bpo.params import Refusal
from bpo.study import seeds
from bpo.study.files import to_json
from bpo.study.text import words

# Of several fields the first that an answer has: its image or question.
IMAGES = ("image_id", "image", "image_path", "image_name", "image_file", "file_name", "img_path",
          "image_source")
NAMES = (*IMAGES, "question_id", "id")
QUESTIONS = ("question", "prompt", "query", "text")
NUMBERS = ("question_id", "id")  # where questions are numbered and have one answer each
COCO_FILE = rb'\s*\{\s*"(info|images|licenses|annotations|categories|type)"'
MEANS = ("objects", "words")  # the other metrics are shares, shown in per cent
RESAMPLES = 2000

# (question, how it was asked, number among its answers) -> (image, counts)
Counted = dict[tuple[str, str, int], tuple[str, Counts]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--answers", type=Path, required=True, metavar="FILE",
                        help="JSON lines, a JSON list or CSV with image_id|image|question_id|id "
                        f"and {'|'.join(answers.TEXTS)}, or prediction|response|output|...")
    parser.add_argument("--truth", type=Path, required=True, nargs="+", metavar="FILE",
                        help="image -> classes or COCO's instances file; POPE's question files; "
                        "AMBER's annotations.json; else the folder of the official files")
    parser.add_argument("--synonyms", type=Path, metavar="FILE",
                        help="a class a line with its words (default: COCO's 80 classes)")
    parser.add_argument("--against", type=Path, metavar="FILE", help="answers to compare with")
    parser.add_argument("--field", metavar="NAME", default="",
                        help="the field of the answers, where several may be meant")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")


def run(options: argparse.Namespace) -> int:
    """Prints what the answers score; raises Refusal for files that do not fit together."""
    benchmark = BENCHMARKS[options.benchmark]
    truth, note = read_truth(benchmark, options.truth, options.synonyms)
    counts, summary = match(options.answers, benchmark, truth, field=options.field)
    if options.field not in ("", summary["field"]):
        raise Refusal(f"--field: {options.answers} has no field {options.field}, but "
                      f"{summary['field']}")
    result = {"benchmark": benchmark.name, "answers": summary | {"note": note},
              "metrics": estimates(benchmark, counts)}
    if options.against:
        other, summary = match(options.against, benchmark, truth, field=options.field)
        shared = counts.keys() & other.keys()
        if not shared:
            raise Refusal(f"{options.against}: answers none of the questions that "
                          f"{options.answers} answers; give answers to the same questions")
        result["against"] = summary | {
            "note": note, "matched": len(shared), "without_partner": len(counts) - len(shared),
            "without_partner_against": len(other) - len(shared)}
        result["differences"] = estimates(benchmark, {k: counts[k] for k in shared},
                                          {k: other[k] for k in shared})
    print(to_json(result, indent=2) if options.json else table(benchmark, result))
    return 0


def estimates(benchmark: Benchmark, *sides: Counted) -> dict[str, dict[str, Any]]:
    """metric -> {label, value, low, high, n}; of two sides the paired difference, with p."""
    ratios = [metrics.tabled(list(side.values()), benchmark.metrics) for side in sides]
    images = {image for image, _ in sides[0].values()}
    weights = metrics.bootstrap_weights(len(images), RESAMPLES, seeds.numpy_generator(0, "score"))
    estimate = metrics.estimates if len(sides) == 1 else metrics.differences
    return {n: {"label": benchmark.metrics[n].label, **e}
            for n, e in estimate(*ratios, weights, benchmark.combined).items()}


def read_truth(benchmark: Benchmark, files: Sequence[Path], synonyms: Path | None
               ) -> tuple[Loaded, str]:
    """The benchmark's questions and counts, and what the user must know of them."""
    for file in files:
        if not file.exists():
            raise Refusal(f"{file}: there is no such truth file; {benchmark.fetch}")
    if synonyms and not benchmark.count:
        raise Refusal(f"--synonyms: {benchmark.title} has no use for a synonym file; leave it out")
    if benchmark.name == "pope":
        return _pope(files), ""
    if len(files) > 1:
        raise Refusal(f"--truth: {benchmark.title} has one truth file, {len(files)} are given")
    if benchmark.name == "amber":
        return _amber(files[0] if files[0].is_dir() else files[0].parent)
    if benchmark.count:
        return _scenes(benchmark, files[0], synonyms or vocabulary.COCO)
    official.require(replace(benchmark, embedded=True), files[0])  # the images are not read
    return benchmark.load(files[0]), ""


def _scenes(benchmark: Benchmark, file: Path, synonyms: Path) -> tuple[Loaded, str]:
    lexicon, note = vocabulary.lexicon(vocabulary.read(synonyms)), ""
    with file.open("rb") as stream:
        of_coco = re.match(COCO_FILE, stream.read(200))
    if of_coco:
        captions = file.with_name(file.name.replace("instances", "captions"))
        beside = [captions] if captions != file and captions.is_file() else []
        if not beside:
            note = ("no captions file beside the instances: objects that reference captions name "
                    "count as absent")
        scenes = vocabulary.read_annotations([file], beside, lexicon)
    else:
        try:
            scenes = {vocabulary.image_key(i): vocabulary.Scene(
                i, vocabulary.known_classes(classes, lexicon, where=file))
                for i, classes in json.loads(file.read_text(encoding="utf-8")).items()}
        except (ValueError, AttributeError, TypeError):
            raise Refusal(f"{file}: must be a JSON object of image -> list of classes, or COCO's "
                          "instances file") from None
    questions = [Question(key, key, "") for key in scenes]
    return official.described(benchmark.count, questions, scenes, lexicon, file), note


def _pope(files: Sequence[Path]) -> Loaded:
    if len(files) == 1 and files[0].is_dir():
        files = sorted(files[0].glob("coco_pope_*.json")) or files
    kinds = {next((k for k in official.POPE_KINDS if k in f.name), ""): f for f in files}
    if len(kinds) < len(files):
        raise Refusal("--truth: several question files are of one kind; give one with random, one "
                      "with popular and one with adversarial in its name")
    return official.read_pope(kinds)


def _amber(folder: Path) -> tuple[Loaded, str]:
    loaded = official.read_amber(folder)
    queries = [folder / BENCHMARKS["amber"].files[r] for r in ("generative", "discriminative")]
    images = {str(q["id"]): (q["image"], str(q.get("query", "")))
              for file in queries if file.is_file() for _, q in official.rows(file, "id", "image")}
    note = "" if images else ("no query/ beside the annotations: which questions share an image is "
                              "not known, and the intervals are over questions")
    questions = tuple(replace(q, image=images.get(q.id, (q.id, ""))[0],
                              text=images.get(q.id, ("", ""))[1]) for q in loaded.questions)
    return Loaded(questions, loaded.counts), note


def match(file: Path, benchmark: Benchmark, truth: Loaded, *, field: str = ""
          ) -> tuple[Counted, dict[str, Any]]:
    """The counts of every answer that has a truth, and how many there are with and without.

    Several answers to an image are told apart by their question, those to the same by their order.
    field: where the answers are; "": where `answers.field` finds them. Raises Refusal where no
    answer has a truth, a numbered question has two, or all answers are the truth word by word.
    """
    rows = answers.read(file)
    fields = list(dict.fromkeys(name for _, entry in rows for name in entry))
    named = field in fields
    field = field if named else answers.field(file, [entry for _, entry in rows], fields)
    index: dict[Any, list[Question]] = defaultdict(list)
    for q in truth.questions:
        index[q.id].append(q)
        if benchmark.name == "pope":  # its files number their questions alike
            index[q.id.rpartition("-")[2]].append(q)
            index[vocabulary.image_key(q.image), metrics.normalised(q.text)].append(q)
    yes_no = any(q.label in ("yes", "no") for q in truth.questions)
    names = NAMES if benchmark.count else NUMBERS[::-1] if benchmark.name == "amber" else NUMBERS
    answered: list[tuple[Question, str, str]] = []
    texts: dict[str, str] = {}
    without = 0
    for where, entry in rows:
        text = answers.text(entry, field, where, yes_no=yes_no)
        asked = next((str(entry[n]) for n in QUESTIONS
                      if n != field and entry.get(n) is not None), "")
        image = next((entry[n] for n in IMAGES if entry.get(n) is not None), None)
        if benchmark.name == "pope" and asked and image is not None:
            key = vocabulary.image_key(image)
            questions = next(filter(None, (index.get((key, metrics.normalised(part)))
                                           for part in (asked, asked.partition("\n")[0]))), [])
        else:
            number = entry[_first(entry, names, where)]
            questions = index.get(str(number)) or index.get(vocabulary.image_key(number), [])
            if len(questions) > 1:
                raise Refusal(f"{where}: its question number is in {len(questions)} question "
                              "files; score against one file at a time, or give image and question")
        without += not questions
        for q in questions:  # POPE asks the same of an image in several of its files
            if benchmark.count or q.id not in texts:
                answered.append((q, asked, text))
            elif texts[q.id] != text:
                raise Refusal(f"{where}: question {q.id} has another answer already; leave one")
            texts[q.id] = text
    if not answered:
        raise Refusal(f"{file}: none of its {len(rows)} answers is to an image or question of the "
                      f"truth; they must share {' or '.join(NAMES)}")
    if not named:
        _refuse_truth(file, field, fields, answered)
    times, order, counted = Counter(q.id for q, _, _ in answered), Counter(), {}
    for q, asked, text in answered:
        name = (q.id, asked if times[q.id] > 1 else "")
        counted[*name, order[name]] = (q.image, truth.counts(q, text))
        order[name] += 1
    return counted, {"read": len(rows), "scored": len(rows) - without, "without_truth": without,
                     "field": field, "empty": sum(not words(text) for _, _, text in answered),
                     "truth": len(truth.questions),
                     "truth_without_answer": len(truth.questions) - len(times)}


def _refuse_truth(file: Path, field: str, fields: Sequence[str],
                  answered: Sequence[tuple[Question, str, str]]) -> None:
    """Raises Refusal where all answers are the questions, or all the labels and both occur."""
    same = [(metrics.normalised(text), q) for q, _, text in answered]
    labels = {q.label for _, q in same}
    what = ""
    if all(t and t == metrics.normalised(q.text) for t, q in same):
        what = "the benchmark's questions"
    elif labels == {"yes", "no"} and all(t == q.label for t, q in same):
        what = "the truth, word by word"
    if what:
        raise Refusal(f"{file}: the {len(same)} answers in {field} are all {what}; its fields are "
                      f"{', '.join(fields)}: name that of the model's answers by --field, "
                      f"{field} itself if it is")


def _first(entry: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """The first of the names that an answer has; raises Refusal for none."""
    for name in names:
        if entry.get(name) is not None:
            return name
    raise Refusal(f"{where}: the answer needs one of {', '.join(names)}")


def table(benchmark: Benchmark, result: Mapping[str, Any]) -> str:
    """The lines for the terminal; rates in per cent."""
    header = "{:28}    value   95 % interval     {:>8}"
    lines = [*counted(benchmark, result), "", header.format("metric", "out of")]
    lines += [_row(name, e) + f"{e['n']:>8}" for name, e in result["metrics"].items()]
    if "differences" in result:
        n = result["against"]
        lines += ["", (f"minus the other file: {n['matched']} answers matched, "
                       f"{n['without_partner']} here and {n['without_partner_against']} there lack "
                       f"a partner; {n['without_truth']} there without truth"),
                  header.format("difference", "p")]
        lines += [_row(name, e, sign="+") + ("" if e["p"] is None else f"{e['p']:>8.4f}")
                  for name, e in result["differences"].items()]
    return "\n".join(lines)


def counted(benchmark: Benchmark, result: Mapping[str, Any]) -> list[str]:
    """How many answers were scored, and what else is to be said of them."""
    n = result["answers"]
    return [(f"{benchmark.title}: {n['scored']} of {n['read']} answers scored, "
             f"{n['without_truth']} without truth, {n['empty']} empty, from the field "
             f"{n['field']}; {n['truth_without_answer']} of {n['truth']} in the truth have no "
             "answer"), *filter(None, [n["note"]])]


def texts(name: str, e: Mapping[str, Any], *, sign: str = "") -> tuple[str, str]:
    """An estimate and its 95 % interval, rates in per cent."""
    if e["value"] is None:
        return "none", ""
    times, unit = (1, "") if name in MEANS else (100, " %")
    value, low, high = (f"{times * e[k]:{sign}.1f}" for k in ("value", "low", "high"))
    return value + unit, f"[{low}, {high}]"


def _row(name: str, e: Mapping[str, Any], *, sign: str = "") -> str:
    value, interval = texts(name, e, sign=sign)
    return f"{e['label']:28}{value:>9}   {interval:18}"
