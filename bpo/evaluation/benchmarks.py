"""Notebook 5's work: the field's benchmarks from their official files, put to the model before and
after each method and scored by their rules or by a judge; and what an answer owes to its image.

What each benchmark is, is in `official` (scored by rules) and `judged` (scored by a judge). A
judge's replies are kept beside the studies, so that no reply is paid for twice.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bpo import params
from bpo.data import files, images, turns
from bpo.data import rows as data_rows
from bpo.evaluation import comparison, diagnostics, judged, metrics, official, words
from bpo.evaluation.judged import KNOWN, Judged, JudgedQuestion
from bpo.evaluation.official import Benchmark, Question
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, logprobs, tuned
from bpo.models.checkpoint import Checkpoint
from bpo.models.endpoint import Endpoint
from bpo.models.generate import Request
from bpo.params import Benchmarks, Refusal
from bpo.study import progress, results, seeds, shards, sources
from bpo.study import stage as stages
from bpo.study.files import read_lines
from bpo.study.results import Result

if TYPE_CHECKING:
    from pandas import DataFrame

PROBED = "probed.jsonl"
REPLIES = "judge_replies"  # the folder of them, beside the studies
FEWEST = 20  # captions that a place needs

CALIBRATION: results.Metrics = {"brier": ("Brier score", "calibration", False),
                                "ece": ("calibration error", "calibration", False),
                                "mean_p_yes": ("mean P(yes)", "calibration", None)}


def run(p: Benchmarks) -> stages.Result:
    """The stage of notebook 5: answers-<benchmark>.jsonl, a line a question with all answers, and
    probed.jsonl, the annotated answers weighed with other images."""
    inputs = tuned.checkpoint_folders(p)
    for name, benchmark in chosen(p).items():
        folder = p.path(p.folders[name])
        if sources.owning_stage(folder) is None:  # else the stage tells better what is missing
            official.require(benchmark, folder)
        needed = {**benchmark.files, **{o: o for o in official.OPTIONAL if (folder / o).is_file()}}
        inputs |= {f"{name} {role}": folder / file for role, file in needed.items()}
        if p.judge and isinstance(benchmark, Judged):
            inputs[f"{name} judge's prompt"] = benchmark.template
    roots = {f"answers-{n}.jsonl": p.path(p.folders[n]) / b.images for n, b in chosen(p).items()}
    if p.probe_data:
        inputs["probe data"] = p.path(p.probe_data)
        if truth := data_rows.truth_file(inputs["probe data"]):
            inputs["probe truth"] = truth
        roots[PROBED] = p.optional_path(p.probe_image_folder) or files.home(inputs["probe data"])
    return stages.stage(p, lambda f: _work(p, f), inputs=inputs, pictures=lambda f: images.named(
        {f / file: root for file, root in roots.items()}))


def chosen(p: Benchmarks) -> dict[str, Benchmark | Judged]:
    """The benchmarks of a study by name, those that rules score first."""
    return {n: benchmark for n, benchmark in KNOWN.items() if n in p.folders}


def _work(p: Benchmarks, folder: Path) -> dict[str, Any]:
    loaded = {name: b.load(p.path(p.folders[name])) for name, b in chosen(p).items()}
    questions = {n: _questions(p, n, getattr(x, "questions", x)) for n, x in loaded.items()}
    progress.announce([(f"{KNOWN[n].title} questions", len(x)) for n, x in questions.items()]
                      + [("answers weighed", p.probe_rows * bool(p.probe_data))])
    found: dict[str, Any] = {"benchmarks": {}, "differences": {}, "settings": {}}

    def ask(checkpoint: Checkpoint, methods: list[str], stem: str) -> dict[str, list[dict]]:
        lines = {name: _answers(p, folder, checkpoint, methods, KNOWN[name], asked, stem=stem)
                 for name, asked in questions.items()}
        if stem == tuned.RIVAL:
            return lines
        probed = _probed(p, folder, checkpoint, methods)
        # last: it may leave the model in another number format
        found["noise_floor"] = diagnostics.noise_floor(
            checkpoint, lines, lambda name, sample, stem, size: _answers(
                p, folder, checkpoint, ["base"], KNOWN[name], sample, stem=stem, size=size),
            batch_size=p.batch_size, seed=p.seed)
        return {**lines, PROBED: probed}

    methods, lines = tuned.answered(p, ask)
    found["image"] = _gained(p, lines.pop(PROBED), [m for m in methods if m != tuned.RIVAL])
    for name, benchmark in chosen(p).items():
        asked = questions[name]
        found["settings"][name] = {
            "questions": len(asked), "images": len({q.image for q in asked}),
            "max_new_tokens": p.max_new_tokens, "temperature": p.temperature, "top_p": p.top_p}
        if not isinstance(benchmark, Judged):
            counted = {m: [(q.image, loaded[name].counts(q, line["answers"][m]))
                           for q, line in zip(asked, lines[name], strict=True)] for m in methods}
        elif p.judge:
            counted, found["settings"][name]["judge"] = _judged(
                p, benchmark, asked, lines[name], methods)
        else:
            continue
        found["benchmarks"][name], found["differences"][name] = comparison.scored(
            counted, benchmark.metrics, seed=p.seed, resamples=p.resamples, made=benchmark.combined,
            matched=tuned.matched(p))
    found["calibration"] = _calibrated(p, lines, methods)
    results.write(folder, tidy(found))
    return found


def _questions(p: Benchmarks, name: str, listed: Sequence[Question]) -> list[Question]:
    """As many of a benchmark's questions as are asked; Refusal where one holds a special token."""
    drawn = data_rows.draw_rows(listed, p.questions, p.seed, purpose=f"{name} questions")
    special = encoding.special_in(p.path(p.model))
    for q in drawn:
        if reason := turns.strange(q.text, special):
            raise Refusal(f"{p.path(p.folders[name])}: question {q.id} has {reason}, which the "
                          "checkpoint does not read as text; take it out of the question")
    return drawn


def described(name: str) -> results.Metrics:
    """The metrics of a benchmark: those of one kind of question, such as accuracy_random, have the
    category "kind", those of `official.READING` "reading"."""
    benchmark = KNOWN[name]
    return {n: (m.label, "reading" if n in official.READING else "kind"
                if n.rpartition("_")[0] in benchmark.metrics else "all", m.more)
            for n, m in benchmark.metrics.items()}


def title(where: str) -> str:
    """A benchmark's title; a split's own name."""
    return KNOWN[where].title if where in KNOWN else where


def label(where: str, metric: str) -> str:
    """A metric's name on a page; where: a split or a benchmark's name."""
    metrics = described(where) if where in KNOWN else {}
    return {**comparison.METRICS, **CALIBRATION, **metrics}.get(metric, (metric,))[0]


def labels(frame: "DataFrame") -> list[str]:
    return list(map(label, frame["split_or_benchmark"], frame["metric"]))


def tidy(found: Mapping[str, Any]) -> list[Result]:
    """Everything measured as results."""
    out = []
    for name, values in found["benchmarks"].items():
        out += results.compared(name, values, found["differences"][name], described(name))
    for name, both in found["calibration"].items():
        out += results.compared(name, both["values"], both["differences"], CALIBRATION)
    for category, both in found["image"].items():
        gains = {n: (text, category, more) for n, (text, more) in diagnostics.GAINS.items()}
        out += results.compared("image", both["values"], both["differences"], gains)
    return out


def _answers(p: Benchmarks, folder: Path, checkpoint: Checkpoint, methods: Sequence[str],
             benchmark: Benchmark | Judged, questions: Sequence[Question], *,
             stem: str, size: int = 0) -> list[dict]:
    """<stem>-<benchmark>.jsonl: a line a question, {id, image, kind, label, question, answers,
    p_yes}, the last two by method; p_yes is P(yes) among yes and no, for yes/no questions."""
    place = p.path(p.folders[benchmark.name]) / benchmark.images
    asked = {q.id: q for q in questions}
    requests = [Request(q.id, ({"role": "user", "content": q.text},), place / q.image)
                for q in questions]
    yes_no = {q.id: (p.yes_no, (), ()) for q in questions
              if q.label in ("yes", "no") and not isinstance(q, JudgedQuestion)}
    scorer = diagnostics.scorer(checkpoint, requests, yes_no)
    return shards.run_on(folder / f"{stem}-{benchmark.name}.jsonl", requests, size or p.batch_size,
                         functools.partial(_ask, p, checkpoint, methods, asked, yes_no, scorer),
                         label=f"{benchmark.title} questions{f', {stem}' * (stem != 'answers')}")


@torch.no_grad()
def _ask(p: Benchmarks, checkpoint: Checkpoint, methods: Sequence[str],
         asked: Mapping[str, Question], yes_no: Mapping[str, diagnostics.Candidates],
         scorer: logprobs.Scorer, batch: Sequence[Request]) -> list[dict]:
    """One line a question; the images are prepared once for all methods."""
    inputs = generate.encode_batch(checkpoint, batch)
    weighed = diagnostics.weigh_candidates(checkpoint, methods, yes_no, scorer, batch, inputs)
    lines = [{"id": q.id, "image": q.image, "kind": q.kind, "label": q.label, "question": q.text,
              "answers": {}, "p_yes": {m: round(diagnostics.yes_share(logps), 6)
                                       for m, logps in of_row["logps"].items()}}
             for q, of_row in zip((asked[r.id] for r in batch), weighed, strict=True)]
    for method in methods:
        with checkpoints.using(checkpoint, method):
            texts = generate.sample_answers(
                checkpoint, batch, inputs, None, seed=p.seed, purpose="benchmark answers",
                temperature=p.temperature, top_p=p.top_p, samples=1,
                max_new_tokens=p.max_new_tokens)
        for line, [text] in zip(lines, texts, strict=True):
            line["answers"][method] = text
    return lines


def _judged(p: Benchmarks, benchmark: Judged, questions: Sequence[Question],
            lines: Sequence[Mapping[str, Any]], methods: Sequence[str]
            ) -> tuple[dict[str, list], dict[str, Any]]:
    """What each answer counts by the judge's scores, as `comparison.scored` takes it, and what
    stands beside the numbers."""
    endpoint = Endpoint(p.judge, p.judge_model, p.judge_key_variable, p.judge_requests,
                        p.judge_retries, p.judge_timeout)
    settings = {"temperature": p.judge_temperature, "repeats": p.judge_repeats,
                "attempts": p.judge_attempts}
    prompts = [benchmark.prompt(q, line["answers"][m]) for m in methods
               for q, line in zip(questions, lines, strict=True)]
    names = [(q.id, m) for m in methods for q in questions]
    found = judged.ask(endpoint, params.outputs_root() / REPLIES, benchmark, prompts, names=names,
                       **settings)
    counted: dict[str, list] = {m: [] for m in methods}
    for (_, m), q, (scores, _) in zip(names, questions * len(methods), found, strict=True):
        counted[m].append((q.image, benchmark.counts(q, scores)))
    unscored = {m: Counter(why for (_, of), (_, why) in zip(names, found, strict=True)
                           if why and of == m) for m in methods}
    return counted, {
        "unscored": {m: dict(sorted(reasons.items())) for m, reasons in unscored.items()},
        "judge": endpoint.model, "prompt": benchmark.template.name,
        "prompt_sha256": hashlib.sha256(benchmark.template.read_bytes()).hexdigest(), **settings,
        "max_new_tokens": benchmark.reply_tokens, "top_p": judged.TOP_P}


def _calibrated(p: Benchmarks, lines: Mapping[str, Sequence[dict]], methods: Sequence[str]
                ) -> dict[str, Any]:
    """Of every benchmark with yes/no questions: Brier score and mean P(yes), their differences, and
    expected calibration error with its bins."""
    out = {}
    for name, mine in lines.items():
        asked = [line for line in mine if line["p_yes"]]
        if not asked:
            continue
        values, differences = comparison.scored(
            {m: [(x["image"], diagnostics.yes_no_counts(x["p_yes"][m], x["label"] == "yes"))
                 for x in asked] for m in methods},
            ("brier", "mean_p_yes"), seed=p.seed, resamples=p.resamples,
            matched=tuned.matched(p))
        weights = metrics.bootstrap_weights(
            len({x["image"] for x in asked}), p.resamples,
            seeds.numpy_generator(p.seed, "comparison interval"))
        for m in methods:
            values[m] |= metrics.calibration(
                [(x["image"], x["p_yes"][m], x["label"] == "yes") for x in asked], weights)
        out[name] = {"values": values, "differences": differences}
    return out


def _probed(p: Benchmarks, folder: Path, checkpoint: Checkpoint, methods: Sequence[str]
            ) -> list[dict]:
    """probed.jsonl: the annotated answers weighed with other images; none without probe_data."""
    if not p.probe_data:
        return []
    data = p.path(p.probe_data)
    rows, _ = data_rows.read_rows(data, p.optional_path(p.probe_image_folder), count=p.probe_rows,
                                  seed=p.seed, purpose="probed rows",
                                  special=encoding.special_in(p.path(p.model)))
    work = functools.partial(diagnostics.weigh, checkpoint, methods, {r.id: r for r in rows},
                             step=p.probe_step, seed=p.seed,
                             vocabulary=data_rows.read_truth(data)["vocabulary"])
    return shards.run_on(folder / PROBED, diagnostics.requests(rows, seed=p.seed), p.batch_size,
                         work, label="answers weighed")


def _gained(p: Benchmarks, lines: Sequence[dict], methods: Sequence[str]) -> dict[str, Any]:
    """How much the annotated answers owe to their image, by category of question."""
    out = {}
    for category in dict.fromkeys(line["category"] for line in lines):
        mine = [line for line in lines if line["category"] == category]
        kinds = {kind for line in mine for kind in line["kinds"]}
        names = [n for n in diagnostics.GAINS if n == "right" or n.startswith("over_")
                 or n.partition("_")[2] in kinds]
        values, differences = comparison.scored(
            {m: [(x["image"], diagnostics.gains(x, m)) for x in mine] for m in methods},
            names, seed=p.seed, resamples=p.resamples, matched=tuned.matched(p))
        out[category] = {"values": values, "differences": differences}
    return out


def answers(result: stages.Result, name: str) -> list[dict[str, Any]]:
    """The lines of a benchmark's answers of a finished stage."""
    return read_lines(result.folder / f"answers-{name}.jsonl")


def by_place(p: Benchmarks, result: stages.Result, name: str, methods: Sequence[str], *,
             least: int = FEWEST) -> "DataFrame":
    """{method, place, value, low, high, n}: of the objects that captions name first, second, ...,
    the share that is not in the image, at the places that `least` captions have or more. A model
    that says less has fewer late ones, and late ones are wrong more often."""
    from pandas import DataFrame

    folder = p.path(p.folders[name])
    lexicon = official.read_lexicon(folder)
    scenes = official.read_scenes(folder, lexicon)
    counted: dict[str, list] = {m: [] for m in methods}
    for line in answers(result, name):
        present = scenes[words.image_key(line["image"])].present
        for m in methods:
            named = enumerate(lexicon.objects(line["answers"][m]), start=1)
            counted[m].append((line["image"], {k: (float(o not in present), 1) for k, o in named}))
    places = sorted({k for of_method in counted.values() for _, wrong in of_method for k in wrong})
    values, _ = comparison.scored(counted, places, seed=p.seed, resamples=p.resamples)
    # Few questions may have no such place: the columns are there all the same.
    rows = [{"method": m, "place": k, **e} for m, of_method in values.items()
            for k, e in of_method.items() if e["n"] >= least]
    return DataFrame(rows, columns=["method", "place", "value", "low", "high", "n"])
