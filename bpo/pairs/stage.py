"""Notebook 2's work: for every annotated answer, answers that the model should not prefer to it.

Rows are checked (`data.check`), candidates are made and weighed (`candidates`), some become
rejected (`selection`), and the lot is audited (`audit`). What comes out is pairs.jsonl, one line a
positive with its list of rejected answers. No step holds the rows in memory, only their places.
"""

import heapq
import itertools
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image

from bpo.data import check, images
from bpo.data import rows as data_rows
from bpo.evaluation import metrics
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, served
from bpo.models.weakening import WEAKENINGS, View
from bpo.pairs import audit, candidates, selection
from bpo.pairs.candidates import Candidates
from bpo.params import PairGeneration, Refusal
from bpo.study import launch, processes, results, seeds
from bpo.study import stage as stages
from bpo.study.files import LineFile, to_json, whole


def run(p: PairGeneration) -> stages.Result:
    """The stage of notebook 2: rows.jsonl, rejected_rows.jsonl, weakened-*.jsonl, injected.jsonl,
    scores.jsonl, candidates.jsonl, dropped.jsonl and pairs.jsonl."""
    launch.start(p)
    files = list(check.data_files(p))
    inputs = {"model": p.path(p.model), "noise_words": p.path(p.noise_words)}
    inputs |= {"data" if len(files) == 1 else f"data {file.name}": file for file in files}
    if "injected" in p.sources:
        inputs |= {name: p.path(getattr(p, name)) for name in ("describe_prompt",
                                                               "question_prompt")}
        if p.text_model and not p.endpoint:
            inputs["text_model"] = p.path(p.text_model)
    if len(files) == 1 and (truth := data_rows.truth_file(files[0])):
        inputs["truth"] = truth
    return stages.stage(
        p, lambda folder: _work(p, folder), inputs=inputs,
        pictures=lambda folder: images.named({folder / check.ROWS: check.image_root(p)}))


def _work(p: PairGeneration, folder: Path) -> dict[str, Any]:
    # Rows that were written before an interruption are not checked again.
    made = Candidates(p, folder)
    processes.first(lambda: (folder / check.ROWS).is_file() or check.take_stock(
        p, folder, special=made.special))
    made.make()
    return processes.first(lambda: _choose(p, made))


def _choose(p: PairGeneration, made: Candidates) -> dict[str, Any]:
    """Candidates into rejected answers, a line a positive, and the counts and measures of the lot.

    A rejected answer that says the same as the annotation would train on nothing, so it is dropped;
    a positive may be left with none. With `select`, as many candidates drawn at random stand beside
    the selected ones ("unselected"), the control for what selection does.
    """
    folder, right, counts = made.folder, truth(p), audit.Counts()
    with ExitStack() as files:
        to_candidates, to_dropped, to_pairs = (
            files.enter_context(whole(folder / f"{name}.jsonl"))
            for name in ("candidates", "dropped", "pairs"))
        for line in made:
            choice = selection.choose(p, line, right)
            pair = {n: line[n] for n in ("id", "image", "category", "prompt", "chosen")}
            pair["rejected"] = choice.kept
            if p.select:
                pair["unselected"] = choice.unselected
            if "own" in line and line["own"] and right(line, line["own"]) is not False:
                pair["own"] = line["own"]
            to_candidates.write(f"{to_json(line)}\n")
            to_pairs.write(f"{to_json(pair)}\n")
            to_dropped.writelines(f"{to_json(d)}\n" for d in choice.dropped)
            counts.add(line, choice)
    if p.weights == "difficulty":
        _weigh(folder / "pairs.jsonl")
    skipped = Counter(line["reason"] for line in LineFile(folder / check.REJECTED))
    audited = _audited(p, made)
    found = audit.audit(audited, seed=p.seed, right=right, prior=prior(p),
                        noise_words=p.path(p.noise_words).read_text(
                            encoding="utf-8").split("\n"))
    for source, exact in counts.by_source().items():
        found[source] = exact | found.get(source, {})
    found["shortcut"] = audit.shortcut(audited, seed=p.seed)
    results.write(folder, audit.tidy(found))
    return found | {"rows": len(made), "rows_skipped": dict(sorted(skipped.items())),
                    "pairs": counts.kept.total(), "positives": counts.positives,
                    "audited": len(audited)} | served.engine(folder)


def _weigh(file: Path) -> None:
    """Gives every rejected answer its weight, by the difficulty of the pair in its category."""
    pairs = LineFile(file)
    margins: dict[str, list[float]] = {}
    for pair in pairs:
        margins.setdefault(pair["category"], []).extend(
            r["scores"]["margin"] for r in pair["rejected"])
    weights = {c: iter(selection.difficulty(m)) for c, m in margins.items()}
    with whole(file) as stream:
        for pair in pairs:
            for rejected in pair["rejected"]:
                rejected["weight"] = next(weights[pair["category"]])
            stream.write(f"{to_json(pair)}\n")


def _audited(p: PairGeneration, made: Candidates) -> list[dict[str, Any]]:
    """The positives that the audit reads in full, drawn by seed, in their order."""
    drawn = heapq.nsmallest(p.audit_positives, enumerate(LineFile(made.folder / "pairs.jsonl")),
                            key=lambda pair: seeds.seed_for(p.seed, "audit", pair[1]["id"]))
    return [made[number] | {"rejected": pair["rejected"]}
            for number, pair in sorted(drawn, key=lambda pair: pair[0])]


def truth(p: PairGeneration) -> selection.Right:
    """A function that says whether a line's rejected answer is in truth right; None where the truth
    is not known."""
    known = _known(p)

    def right(line: dict[str, Any], text: str) -> bool | None:
        row = known["rows"].get(line["id"])
        if row is None:
            return None
        if row["category"] != "caption":
            return metrics.normalised(text) in map(metrics.normalised, row["true"])
        return metrics.caption_is_right(
            text, known["vocabulary"]["objects"], known["vocabulary"]["colours"],
            known["images"][line["image"]]["objects"])

    return right


def prior(p: PairGeneration) -> selection.Right:
    """The same of whether it is the prior's answer; None where no such answer is known."""
    known = _known(p)["rows"]

    def is_prior(line: dict[str, Any], text: str) -> bool | None:
        answers = known.get(line["id"], {}).get("prior")
        return metrics.normalised(text) in map(metrics.normalised, answers) if answers else None

    return is_prior


def _known(p: PairGeneration) -> dict[str, Any]:
    """What the truth file says; nothing of several data files, whose ids are no longer its own."""
    files = list(check.data_files(p))
    return data_rows.read_truth(files[0]) if len(files) == 1 else {"rows": {}}


def example(p: PairGeneration, result: stages.Result) -> int:
    """The number of the first row that keeps an answer of the first view and drops a candidate; of
    the first row where there is none."""
    mode = candidates.views(p)[0].mode
    lines, pairs = (LineFile(result.folder / f"{n}.jsonl") for n in ("candidates", "pairs"))
    return next((number for number, (line, pair) in enumerate(zip(lines, pairs, strict=True))
                 if mode in (r["mode"] for r in pair["rejected"])
                 and len(pair["rejected"]) < len(line["candidates"])), 0)


def weakened_pictures(p: PairGeneration, result: stages.Result, number: int
                      ) -> dict[str, Image.Image]:
    """A row's image as the model is shown it, clean and by each way of weakening that is possible:
    another row's image needs two images in the data."""
    made, processor = Candidates(p, result.folder), checkpoints.load_processor(p.path(p.model))
    clean = images.load(made.request(number, None).image)
    pictures = {"clean": encoding.transformed(clean, p.image_transform, processor)}
    for mode in WEAKENINGS:
        view = View(mode, p.weaken_steps[0], crop_share=p.crop_share)
        try:
            pictures[mode] = generate.view_picture(processor, made.request(number, view), view,
                                                   transform=p.image_transform, seed=p.seed)
        except Refusal:
            continue
    return pictures


def examples(p: PairGeneration, result: stages.Result) -> list[dict[str, Any]]:
    """Positives with the most rejected answers of their category for the gallery, drawn by seed and
    by turns of the categories, with the clean image and the weakened one of the first view."""
    made, view = Candidates(p, result.folder), candidates.views(p)[0]
    processor = checkpoints.load_processor(p.path(p.model))
    pairs = LineFile(result.folder / "pairs.jsonl")
    best: dict[str, list[tuple[int, int, int]]] = {}
    for number, pair in enumerate(pairs):
        if pair["rejected"]:
            draw = seeds.seed_for(p.seed, "pair gallery", pair["id"])
            ranked = [*best.get(pair["category"], []), (-len(pair["rejected"]), draw, number)]
            best[pair["category"]] = heapq.nsmallest(p.gallery, ranked)
    turns = itertools.chain(*itertools.zip_longest(*(best[c] for c in sorted(best))))
    out = []
    for _, _, number in itertools.islice(filter(None, turns), p.gallery):
        pair, request = pairs[number], made.request(number, view)
        out.append({"image": images.load(request.image), "chosen": pair["chosen"],
                    "question": pair["prompt"][-1]["content"], "category": pair["category"],
                    "weakened": generate.view_picture(
                        processor, request, view, transform=p.image_transform, seed=p.seed),
                    "rejected": pair["rejected"]})
    return out
