"""Notebook 2's work: for every annotated answer, answers that the model should not prefer to it.

Rows are taken stock of (`readers`), candidates are made and weighed (`candidates`), some become
rejected (`selection`), and the lot is audited (`audit`). What comes out is pairs.jsonl, one line a
positive with its list of rejected answers. No step holds the rows in memory, only their places.
"""

import heapq
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bpo.data import check, images
from bpo.data import rows as data_rows
from bpo.data.rows import Row
from bpo.evaluation import metrics
from bpo.models import checkpoint as checkpoints
from bpo.models import generate
from bpo.pairs import audit, candidates, selection
from bpo.pairs.candidates import Candidates
from bpo.params import SOURCES, PairGeneration
from bpo.study import launch, processes, results, seeds
from bpo.study import stage as stages
from bpo.study.files import LineFile, to_json, whole


def run(p: PairGeneration) -> stages.Result:
    """The stage of notebook 2: rows.jsonl, rejected_rows.jsonl, weakened-*.jsonl, injected.jsonl,
    scores.jsonl, candidates.jsonl, dropped.jsonl and pairs.jsonl."""
    launch.start(p)
    inputs = {"model": p.path(p.model)}
    inputs |= {"data" if len(data_files(p)) == 1 else f"data {file.name}": file
               for file in data_files(p)}
    if "injected" in p.sources:
        inputs |= {"describe_prompt": p.path(p.describe_prompt),
                   "question_prompt": p.path(p.question_prompt)}
        if p.text_model and not p.endpoint:
            inputs["text_model"] = p.path(p.text_model)
    if len(data_files(p)) == 1 and (truth := data_rows.truth_file(next(iter(data_files(p))))):
        inputs["truth"] = truth
    return stages.stage(p, lambda folder: _work(p, folder), inputs=inputs)


def data_files(p: PairGeneration) -> dict[Path, str]:
    """The annotated files or folders, and the folder below image_folder that each starts from."""
    if isinstance(p.data, str):
        return {p.path(p.data): ""}
    return {p.path(file): below for file, below in p.data.items()}


def image_root(p: PairGeneration) -> Path:
    """The folder that the image names of rows.jsonl and pairs.jsonl start from."""
    first = next(iter(data_files(p)))
    return p.optional_path(p.image_folder) or (first if first.is_dir() else first.parent)


def _truth(p: PairGeneration) -> dict[str, Any]:
    files = list(data_files(p))
    if len(files) > 1:  # ids get the file's name in front, so no truth file fits them
        return {"vocabulary": {}, "images": {}, "rows": {}}
    return data_rows.read_truth(files[0])


def _work(p: PairGeneration, folder: Path) -> dict[str, Any]:
    processes.first(lambda: _take_stock(p, folder))
    rows = LineFile(folder / "rows.jsonl")
    candidates.make(p, rows, image_root(p), folder)
    return processes.first(lambda: _choose(p, rows, folder))


def _take_stock(p: PairGeneration, folder: Path) -> None:
    if (folder / "rows.jsonl").is_file():
        return  # written before an interruption

    def too_long(row: Row) -> str | None:
        words = len(row.answer.split())
        return f"answer longer than {p.max_words} words" if words > p.max_words else None

    check.take_stock(data_files(p), p.optional_path(p.image_folder), folder, keep=too_long,
                     count=p.rows, seed=p.seed, purpose="pair rows",
                     max_bad_share=p.max_bad_share)


def _choose(p: PairGeneration, rows: LineFile, folder: Path) -> dict[str, Any]:
    """Candidates into rejected answers, a line a positive, and the counts and measures of the lot.

    A rejected answer that says the same as the annotation would train on nothing, so it is dropped;
    a positive may be left with none. With `select`, as many candidates drawn at random stand beside
    the selected ones ("unselected"), the control for what selection does.
    """
    truth, counts = _truth(p), _Counts()
    with ExitStack() as files:
        to_candidates, to_dropped, to_pairs = (
            files.enter_context(whole(folder / f"{name}.jsonl"))
            for name in ("candidates", "dropped", "pairs"))
        for line in Candidates(p, rows, folder):
            choice = selection.choose(line, weights=p.select, keep=p.keep, seed=p.seed,
                                      drop_right=p.drop_right,
                                      right=lambda text, line=line: is_right(line, text, truth))
            pair = {n: line[n] for n in ("id", "image", "category", "prompt", "chosen")}
            pair["rejected"] = choice.kept
            if p.select:
                pair["unselected"] = choice.unselected
            to_candidates.write(f"{to_json(line)}\n")
            to_pairs.write(f"{to_json(pair)}\n")
            to_dropped.writelines(f"{to_json(d)}\n" for d in choice.dropped)
            counts.add(line, choice)
    skipped = Counter(line["reason"] for line in LineFile(folder / "rejected_rows.jsonl"))
    audited = _audited(p, folder)
    found = audit.audit(audited, seed=p.seed, right=lambda k, text: is_right(k, text, truth))
    for source, exact in counts.by_source().items():
        found[source] = found.get(source, {}) | exact
    found["shortcut"] = audit.shortcut(audited, seed=p.seed)
    results.write(folder, audit.tidy(found))
    return found | {"rows": len(rows), "rows_skipped": dict(sorted(skipped.items())),
                    "pairs": counts.pairs, "positives": counts.positives, "audited": len(audited)}


class _Counts:
    """Exact counts over all positives, which the audit may only sample."""

    def __init__(self) -> None:
        self.pairs = self.positives = self.rows = 0
        self.made, self.kept, self.with_one = Counter(), Counter(), Counter()
        self.dropped, self.categories, self.kept_in = Counter(), Counter(), Counter()

    def add(self, line: dict[str, Any], choice: selection.Choice) -> None:
        self.rows += 1
        self.pairs += len(choice.kept)
        self.positives += bool(choice.kept)
        self.categories[line["category"]] += 1
        self.made.update(c["source"] for c in line["candidates"])
        self.kept.update(c["source"] for c in choice.kept)
        self.with_one.update({c["source"] for c in choice.kept})
        self.kept_in.update((c["source"], line["category"]) for c in choice.kept)
        self.dropped.update((d["source"], d["reason"]) for d in choice.dropped)

    def by_source(self) -> dict[str, dict[str, Any]]:
        return {s: {"candidates": self.made[s], "kept": self.kept[s],
                    "positives": self.with_one[s],
                    "share_kept": round(self.with_one[s] / self.rows, 6),
                    "dropped": {r: n for (of, r), n in sorted(self.dropped.items()) if of == s},
                    "by_category": {c: {"rows": n, "kept": self.kept_in[s, c]}
                                    for c, n in sorted(self.categories.items())}}
                for s in SOURCES if self.made[s]}


def _audited(p: PairGeneration, folder: Path) -> list[dict[str, Any]]:
    """The positives that the audit reads in full, drawn by seed, in their order."""
    pairs, made = LineFile(folder / "pairs.jsonl"), LineFile(folder / "candidates.jsonl")
    places = np.arange(len(pairs))
    if len(pairs) > p.audit_positives:
        draws = np.array([seeds.seed_for(p.seed, "audit", k["id"]) for k in pairs])
        places = np.sort(np.argsort(draws, kind="stable")[:p.audit_positives])
    return [made[i] | {"rejected": pairs[i]["rejected"]} for i in places.tolist()]


def is_right(pair: dict, text: str, truth: dict[str, Any]) -> bool | None:
    """Whether a rejected answer is in truth right; None where the truth is not known."""
    known = truth["rows"].get(pair["id"])
    if known is None:
        return None
    if known["category"] != "caption":
        return metrics.normalised(text) in map(metrics.normalised, known["true"])
    known = truth["vocabulary"]
    return metrics.caption_is_right(text, known["objects"], known["colours"],
                                    truth["images"][pair["image"]]["objects"])










def examples(p: PairGeneration, result: stages.Result) -> list[dict[str, Any]]:
    """Positives with the most rejected answers of their category for the gallery, drawn by seed and
    by turns of the categories, with the clean image and the weakened one of the first view."""
    view, root = candidates.views(p)[0], image_root(p)
    processor = checkpoints.load_processor(p.path(p.model))
    pairs, rows = (LineFile(result.folder / f"{n}.jsonl") for n in ("pairs", "rows"))
    best: dict[str, list[tuple[int, int, int]]] = {}
    for place, pair in enumerate(pairs):
        if pair["rejected"]:
            draw = seeds.seed_for(p.seed, "pair gallery", pair["id"])
            mine = best.setdefault(pair["category"], [])
            heapq.heappush(mine, (len(pair["rejected"]), -draw, place))
            if len(mine) > p.gallery:
                heapq.heappop(mine)
    ranked = [sorted(best[c], reverse=True) for c in sorted(best)]
    turns = [mine[n][2] for n in range(p.gallery) for mine in ranked if n < len(mine)]
    out = []
    for place in turns[:p.gallery]:
        pair, asked = pairs[place], candidates.request(p, rows, root, place, view)
        out.append({"image": images.load(asked.image), "chosen": pair["chosen"],
                    "question": pair["prompt"][-1]["content"], "category": pair["category"],
                    "weakened": generate.view_picture(
                        processor, asked, view, transform=p.image_transform, seed=p.seed),
                    "rejected": pair["rejected"]})
    return out
