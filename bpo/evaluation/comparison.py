"""Notebook 4's work: the same held-out questions put to the model before and after each method.

Answers are greedy. Where a truth file lies beside the data, captions are scored for hallucinated
objects, colour questions for the true and the prior's answer, presence questions as POPE does.
Without one, only what needs no truth is measured: length, and how many answers changed.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from bpo.data import files, images
from bpo.data import rows as data_rows
from bpo.data.rows import Row
from bpo.evaluation import diagnostics, hallucination, metrics, under_noise
from bpo.evaluation import words as vocabulary
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, logprobs, tuned
from bpo.models.checkpoint import Checkpoint
from bpo.models.generate import Request
from bpo.params import QualitativeComparison, Refusal
from bpo.study import progress, results, seeds, shards
from bpo.study import stage as stages
from bpo.study.files import to_json, write_whole
from bpo.study.results import Estimate, Result

if TYPE_CHECKING:
    from pandas import DataFrame

METRICS: results.Metrics = {  # their category is that of the question
    "chair_s": ("CHAIRs", "caption", False), "chair_i": ("CHAIRi", "caption", False),
    "cover": ("cover", "caption", True), "objects": ("objects a caption", "caption", None),
    "words": ("words a caption", "caption", None),
    "colour_accuracy": ("colour accuracy", "attribute", True),
    "p_true": ("P(true answer)", "attribute", True),
    "p_prior": ("P(prior's answer)", "attribute", False),
    "logp_true": ("log P(true answer)", "attribute", True),
    "prior_rate": ("prior's answers given", "attribute", False),
    "pope_random": ("POPE random", "presence", True),
    "pope_popular": ("POPE popular", "presence", True),
    "pope_adversarial": ("POPE adversarial", "presence", True),
    "yes_rate": ("yes answers", "presence", None),
    "answer_words": ("words an answer", "any", None),
    "changed": ("answers that differ from base", "any", None),
    **diagnostics.SHARPENING,
}
# What a method is compared with, where it was trained.
BASELINES = ("base", "sft", "sft_matched", "sft_compute", "bpo_unselected", "bpo_noisy",
             tuned.RIVAL)
CALIBRATION = "calibration"
NOISED = "/"  # no split is called so


def run(p: QualitativeComparison) -> stages.Result:
    """The stage of notebook 4: answers-<split>.jsonl, a line a question with all answers."""
    inputs = tuned.checkpoint_folders(p)
    for split, data in _data(p).items():
        inputs[split] = p.path(data)
        if truth := data_rows.truth_file(inputs[split]):
            inputs[f"{split} truth"] = truth
    roots = {s: p.optional_path(p.image_folder) or files.home(inputs[s]) for s in _data(p)}
    return stages.stage(p, lambda folder: _work(p, folder), inputs=inputs,
                        pictures=lambda folder: images.named(
                            {folder / f"answers-{s}.jsonl": root for s, root in roots.items()}))


def _data(p: QualitativeComparison) -> dict[str, str]:
    """The files of all rows that are asked, by split."""
    return p.splits | ({CALIBRATION: p.calibration_data} if p.calibration_data else {})


def _work(p: QualitativeComparison, folder: Path) -> dict[str, Any]:
    splits = {split: read_split(p, split) for split in _data(p)}
    for split, (_, _, skipped) in splits.items():
        if skipped:
            write_whole(folder / f"rows_skipped-{split}.json", to_json(skipped, indent=1))
    progress.announce([*((f"answers-{s} questions", len(rows)) for s, (rows, *_) in splits.items()),
                       ("steps of noise", p.noise_rows * len(p.noise_steps))])
    methods, lines = tuned.answered(p, lambda checkpoint, names, stem: {
        NOISED: under_noise.weigh(p, folder, checkpoint, names, stem),
        **{split: _answers(p, folder / f"{stem}-{split}.jsonl", checkpoint, names, rows, truth)
           for split, (rows, truth, _) in splits.items()}})
    noised = lines.pop(NOISED)
    temperatures = diagnostics.matched_temperatures(lines.pop(CALIBRATION, []), methods)
    levels, differences, table = {}, {}, []
    for split, mine in lines.items():
        truth = splits[split][1]
        beyond = diagnostics.sharpen(mine, temperatures, seed=p.seed, resamples=p.resamples)
        levels[split], differences[split] = score(mine, truth, methods, seed=p.seed,
                                                  resamples=p.resamples, matched=tuned.matched(p))
        won = wins(mine, truth, methods[1:], seed=p.seed, resamples=p.resamples)
        table += [*results.compared(split, levels[split], differences[split], METRICS),
                  *results.compared(split, {}, beyond, diagnostics.AMONG),
                  *(Result(split, "any", m, "base", "wins", Estimate(**e, more_is_better=True))
                    for m, e in won.items()),
                  *(Result(split, "sharpening", m, "", "temperature", Estimate(t))
                    for m, t in temperatures.items())]
        differences[split] |= beyond
    if noised:
        steps = under_noise.metrics(p.noise_steps)
        table += results.compared(under_noise.main_split(p.splits), *scored(
            {m: [(x["image"], under_noise.counts(x, m)) for x in noised] for m in methods}, steps,
            seed=p.seed, resamples=p.resamples, matched=tuned.matched(p)), steps)
    results.write(folder, table)
    return {**levels, "differences": differences, "temperatures": temperatures}


def main_split(frame: "DataFrame") -> str:
    """`under_noise.main_split` of the splits that notebook 4 has results of."""
    return under_noise.main_split(frame.loc[
        frame["notebook"] == QualitativeComparison.notebook, "split_or_benchmark"])


def read_split(p: QualitativeComparison, split: str
               ) -> tuple[list[Row], dict[str, Any], dict[str, int]]:
    """A split's rows, what is known of them, and how many are left out by reason."""
    data = p.path(_data(p)[split])
    rows, skipped = data_rows.read_rows(
        data, p.optional_path(p.image_folder), count=p.rows, seed=p.seed, purpose=f"{split} rows",
        special=encoding.special_in(p.path(p.model)))
    return rows, data_rows.read_truth(data), dict(sorted(skipped.items()))


def _answers(p: QualitativeComparison, file: Path, checkpoint: Checkpoint, methods: Sequence[str],
             rows: Sequence[Row], truth: dict[str, Any]) -> list[dict]:
    """A file of answers; of the calibration data colour questions alone, which are only weighed."""
    candidates = {r.id: found for r in rows if (found := diagnostics.candidates(truth, r.id))}
    decode = not file.stem.endswith(f"-{CALIBRATION}")
    requests = [Request(r.id, r.prompt, r.image, len(r.answer.split()))
                for r in rows if decode or r.id in candidates]
    if not decode and not requests:
        raise Refusal("calibration_data: none of its rows is a colour question of a truth file "
                      "whose usual answer is a wrong one; give other rows, or leave it empty")
    scorer = diagnostics.scorer(checkpoint, requests, candidates)
    work = functools.partial(_ask, p, checkpoint, methods, {r.id: r for r in rows}, candidates,
                             scorer, decode)
    return shards.run_on(file, requests, p.batch_size, work, label=f"{file.stem} questions")


@torch.no_grad()
def _ask(p: QualitativeComparison, checkpoint: Checkpoint, methods: Sequence[str],
         rows: dict[str, Row], candidates: Mapping[str, diagnostics.Candidates],
         scorer: logprobs.Scorer, decode: bool, batch: Sequence[Request]) -> list[dict]:
    """One line a question with each method's answer, where `decode` says so, and the probabilities
    of its candidates. The images are prepared once for all methods."""
    inputs = generate.encode_batch(checkpoint, batch)
    weighed = diagnostics.weigh_candidates(checkpoint, methods, candidates, scorer, batch, inputs)
    lines = [{"id": r.id, "image": rows[r.id].image_name, "category": rows[r.id].category,
              "question": rows[r.id].question, "annotated": rows[r.id].answer, "answers": {},
              **of_row} for r, of_row in zip(batch, weighed, strict=True)]
    for method in methods if decode else ():
        with checkpoints.using(checkpoint, method):
            texts = generate.decode(checkpoint, inputs, max_new_tokens=p.max_new_tokens)
        for line, text in zip(lines, texts, strict=True):
            line["answers"][method] = text
    return lines


def counts(line: dict, method: str, truth: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """What one answer adds to each metric, as (counted, out of)."""
    text, known = line["answers"][method], truth["rows"].get(line["id"])
    out: dict[str, tuple[float, float]] = {
        "answer_words": (len(metrics.words(text)), 1),
        "changed": (float(metrics.normalised(text)
                          != metrics.normalised(line["answers"]["base"])), 1)}
    if known is None:
        return out
    if known["category"] == "caption":
        present = {o["name"] for o in truth["images"][line["image"]]["objects"]}
        return out | hallucination.chair(text, present,
                                         vocabulary.lexicon(truth["vocabulary"]["objects"]))
    right = metrics.normalised(text) in map(metrics.normalised, known["true"])
    if known["category"] == "attribute":
        out["colour_accuracy"] = (float(right), 1)
        if method in line["p_true"]:
            priors = map(metrics.normalised, diagnostics.candidates(truth, line["id"])[1])
            out["prior_rate"] = (float(metrics.normalised(text) in priors), 1)
            out |= {n: (line[n][method], 1) for n in ("p_true", "p_prior", "logp_true")}
            out |= {n: (x, 1) for n, x in line.get("sharpened", {}).get(method, {}).items()}
    if known["category"] == "presence":
        said = hallucination.yes_or_no(text, line["question"])
        out["yes_rate"] = (float(said == "yes"), 1)
        if known["kind"]:
            out[f"pope_{known['kind']}"] = (float(said == known["true"][0]), 1)
    return out


def quality(line: dict, method: str, truth: dict[str, Any]) -> float | None:
    """How good one answer is; None where nothing is known. A right answer is 1, a wrong one 0; a
    caption loses 1 for each wrong object word and gains the share of objects that it names."""
    known = truth["rows"].get(line["id"])
    if known is None:
        return None
    added = counts(line, method, truth)
    if known["category"] == "caption":
        return added["cover"][0] / max(added["cover"][1], 1) - added["chair_i"][0]
    if known["category"] == "presence":
        return float(hallucination.yes_or_no(line["answers"][method], line["question"])
                     == known["true"][0])
    return added["colour_accuracy"][0]


def wins(lines: Sequence[dict], truth: dict[str, Any], methods: Sequence[str], *, seed: int,
         resamples: int) -> dict[str, dict[str, Any]]:
    """method -> {value, low, high, n, p}: the share of questions that it answers better than the
    base, as `quality` weighs them, less the share that it answers worse; bootstrap over images.
    Empty where nothing can be judged."""
    out = {}
    for method in methods:
        pairs = [(line["image"], quality(line, method, truth), quality(line, "base", truth))
                 for line in lines if line["id"] in truth["rows"]]
        if pairs:
            won = metrics.by_image([(image, (float(q > base), 1)) for image, q, base in pairs])
            lost = metrics.by_image([(image, (float(q < base), 1)) for image, q, base in pairs])
            weights = metrics.bootstrap_weights(
                len(won), resamples, seeds.numpy_generator(seed, "claims interval"))
            out[method] = metrics.difference(won, lost, weights)
    return out


def score(lines: Sequence[dict], truth: dict[str, Any], methods: Sequence[str], *, seed: int,
          resamples: int, matched: Mapping[str, str] = MappingProxyType({})
          ) -> tuple[dict[str, Any], dict[str, Any]]:
    """[method][metric] -> estimate, and [against][method][metric] -> paired difference.

    Bootstrap over images, the same resamples for all methods.
    """
    return scored({m: [(line["image"], counts(line, m, truth)) for line in lines] for m in methods},
                  METRICS, seed=seed, resamples=resamples, matched=matched)


def scored(counted: Mapping[str, Sequence[tuple[str, Mapping[str, tuple[float, float]]]]],
           names: Collection[str], *, seed: int, resamples: int,
           made: metrics.Made = MappingProxyType({}),
           matched: Mapping[str, str] = MappingProxyType({})
           ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Estimates and paired differences, as `score` gives them, of what each answer adds: to every
    baseline, of which sft_matched is the SFT on the method's own positives where `matched` has it.

    counted: method -> an (image, {metric: (counted, out of)}) an answer, of the same images for
    every method. names: the metrics to keep, in their order, where any answer has them.
    made: further numbers, each made of some of these.
    """
    images = {image for image, _ in next(iter(counted.values()))}
    weights = metrics.bootstrap_weights(len(images), resamples,
                                        seeds.numpy_generator(seed, "comparison interval"))
    ratios = {m: metrics.tabled(answers, names) for m, answers in counted.items()}
    values = {m: metrics.estimates(mine, weights, made) for m, mine in ratios.items()}
    return values, {
        against: {m: metrics.differences(mine, ratios[against], weights, made)
                  for m, mine in ratios.items()
                  if m != against and against in (
                      matched.get(m), *(b for b in BASELINES if b != "sft_matched" or m not in
                                        matched))}
        for against in dict.fromkeys((*BASELINES, *matched.values())) if against in ratios}
