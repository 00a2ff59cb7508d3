"""Notebook 2's work: for every annotated answer, answers that the model should not prefer to it.

Image weakening: the same model answers the same question while its image is noised. Error
injection: the text model rewrites the annotated answer with plausible mistakes. What comes out is
pairs.jsonl, one line a positive with its list of rejected answers, and an audit of the lot.
"""

import difflib
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bpo import generate, metrics, models, noise, records, runs, seeds
from bpo.generate import Request
from bpo.params import PairGeneration, Refusal
from bpo.records import Row

SOURCES = ("weakened", "injected")
NEAR_DUPLICATE = 0.9  # share of matching words from which two answers count as nearly the same


def run(p: PairGeneration) -> runs.Result:
    """The stage of notebook 2: pairs.jsonl, dropped.jsonl, weakened.jsonl, injected.jsonl."""
    inputs = {"model": p.path(p.model), "data": p.path(p.data),
              "describe_prompt": p.path(p.describe_prompt),
              "question_prompt": p.path(p.question_prompt)}
    if p.text_model:
        inputs["text_model"] = p.path(p.text_model)
    if (inputs["data"].parent / "truth.json").is_file():
        inputs["truth"] = inputs["data"].parent / "truth.json"
    return runs.stage(p, lambda folder: _work(p, folder), inputs=inputs,
                      modules=[noise, seeds, records, models, generate, metrics,
                               sys.modules[__name__]])


def read_annotated(p: PairGeneration) -> tuple[list[Row], Counter]:
    """The positives that pairs are made for, and why rows were skipped."""
    rows, skipped = records.read_rows(p.path(p.data), p.optional_path(p.image_folder))
    short = [r for r in rows if len(r.answer.split()) <= p.max_words]
    skipped[f"answer longer than {p.max_words} words"] += len(rows) - len(short)
    return records.draw_rows(short, p.rows, p.seed, purpose="pair rows"), +skipped


def _work(p: PairGeneration, folder: Path) -> dict[str, Any]:
    rows, skipped = read_annotated(p)
    if not rows:
        raise Refusal(f"{p.path(p.data)}: every answer is longer than max_words = {p.max_words}")
    made = {"weakened": _weaken(p, rows, folder), "injected": _inject(p, rows, folder)}
    lines, dropped = join(rows, made)
    records.write_lines(folder / "dropped.jsonl", dropped)
    records.write_lines(folder / "pairs.jsonl", lines)
    return {"rows": len(rows), "rows_skipped": dict(sorted(skipped.items())),
            **audit(lines, dropped, records.read_truth(p.path(p.data)), seed=p.seed)}


def _weaken(p: PairGeneration, rows: Sequence[Row], folder: Path) -> dict[str, str]:
    checkpoint = models.load(p.path(p.model), precision=p.precision)
    requests = [Request(r.id, r.prompt, r.image, len(r.answer.split())) for r in rows]
    return generate.sample_answers(
        checkpoint, requests, folder / "weakened.jsonl", noise_step=p.noise_step, seed=p.seed,
        purpose="weakened", temperature=p.weaken_temperature, top_p=p.weaken_top_p,
        max_new_tokens=p.max_new_tokens, batch_size=p.batch_size)


def _inject(p: PairGeneration, rows: Sequence[Row], folder: Path) -> dict[str, str]:
    if p.text_model:
        checkpoint = models.load_text_model(p.path(p.text_model), precision=p.precision)
    else:
        checkpoint = models.load(p.path(p.model), precision=p.precision)
    describe = p.path(p.describe_prompt).read_text(encoding="utf-8").strip()
    question = p.path(p.question_prompt).read_text(encoding="utf-8").strip()
    requests = [
        Request(r.id, ({"role": "user", "content": fill(
            describe if r.category == "caption" else question, r)},), None, len(r.answer.split()))
        for r in rows]
    return generate.sample_answers(
        checkpoint, requests, folder / "injected.jsonl", noise_step=0, seed=p.seed,
        purpose="injected", temperature=p.inject_temperature, top_p=p.inject_top_p,
        max_new_tokens=p.max_new_tokens, batch_size=p.batch_size)


def fill(template: str, row: Row) -> str:
    """The template with {question} and {answer} filled in; other braces stay as they are."""
    return re.sub(r"\{(question|answer)\}", lambda place: getattr(row, place[1]), template)


def join(rows: Sequence[Row], made: dict[str, dict[str, str]]) -> tuple[list[dict], list[dict]]:
    """One line a positive with its usable rejected answers; every dropped answer with its reason.

    made: source -> row id -> generated answer. A rejected answer that says the same as the
    annotation would train on nothing, so it is dropped; a positive may be left with none.
    """
    lines, dropped = [], []
    for row in rows:
        rejected = []
        for source, answers in made.items():
            text = answers[row.id]
            reason = _useless(text, row.answer)
            if reason:
                dropped.append({"id": row.id, "category": row.category, "source": source,
                                "text": text, "reason": reason})
            else:
                rejected.append({"source": source, "text": text})
        lines.append({"id": row.id, "image": row.image_name, "category": row.category,
                      "prompt": list(row.prompt), "chosen": row.answer, "rejected": rejected})
    return lines, dropped


def _useless(text: str, annotated: str) -> str | None:
    if not metrics.normalised(text):
        return "empty"
    if text == annotated:
        return "equal to the annotation"
    if metrics.normalised(text) == metrics.normalised(annotated):
        return "equal but for case and punctuation"
    return None


def audit(lines: Sequence[dict], dropped: Sequence[dict], truth: dict[str, Any], *,
          seed: int) -> dict[str, Any]:
    """What the pairs are like, by source: counts, length gap in words, near-duplicates, truth.

    truth_right: share of rejected answers that are in truth right (None without a truth file):
    such pairs teach the wrong thing. Intervals are bootstrapped over images.
    """
    pairs = {s: [(k, r["text"]) for k in lines for r in k["rejected"] if r["source"] == s]
             for s in SOURCES}
    out: dict[str, Any] = {"pairs": sum(map(len, pairs.values())),
                           "positives": sum(bool(k["rejected"]) for k in lines)}
    for source, mine in pairs.items():
        reasons = Counter(d["reason"] for d in dropped if d["source"] == source)
        by_category = Counter(k["category"] for k, _ in mine)
        right = [(k["image"], (float(r), 1)) for k, text in mine
                 if (r := is_right(k, text, truth)) is not None]
        gaps = [(k["image"], (len(t.split()) - len(k["chosen"].split()), 1)) for k, t in mine]
        near = [(k["image"], (float(_similar(t, k["chosen"])), 1)) for k, t in mine]
        out[source] = {
            "kept": len(mine), "share_kept": round(len(mine) / len(lines), 6),
            "dropped": dict(sorted(reasons.items())),
            "by_category": {c: {"rows": n, "kept": by_category[c]} for c, n in
                            sorted(Counter(k["category"] for k in lines).items())},
            "length_gap": _estimate(gaps, seed), "near_duplicates": _estimate(near, seed),
            "truth_right": _estimate(right, seed)}
    both = [[r["text"] for r in k["rejected"]] for k in lines if len(k["rejected"]) == 2]
    out["sources_agree"] = round(sum(metrics.normalised(a) == metrics.normalised(b)
                                     for a, b in both) / max(len(both), 1), 6)
    return out


def is_right(pair: dict, text: str, truth: dict[str, Any]) -> bool | None:
    """Whether a rejected answer is in truth right; None where the truth is not known."""
    known = truth["rows"].get(pair["id"])
    if known is None:
        return None
    if known["category"] != "caption":
        return metrics.normalised(text) in map(metrics.normalised, known["true"])
    vocabulary = truth["vocabulary"]
    return metrics.caption_is_right(text, vocabulary["objects"], vocabulary["colours"],
                                    truth["images"][pair["image"]]["objects"])


def _similar(text: str, other: str) -> bool:
    matcher = difflib.SequenceMatcher(None, metrics.words(text), metrics.words(other), False)
    return matcher.ratio() >= NEAR_DUPLICATE


def _estimate(counts: Sequence[tuple], seed: int) -> dict[str, Any] | None:
    if not counts:
        return None
    ratios = metrics.by_image(counts)
    rng = seeds.numpy_generator(seed, "audit interval")
    return metrics.estimate(ratios, metrics.bootstrap_weights(len(ratios), 1000, rng))


def read_pairs(file: Path) -> list[dict]:
    """The lines of a pairs.jsonl; raises Refusal when the file is missing or holds none."""
    if not file.is_file():
        raise Refusal(f"{file}: there is no such file of pairs; notebooks/2_pair_generation.ipynb "
                      "writes it")
    lines = []
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                raise Refusal(f"{file}: line {number} is not JSON") from None
    usable = all(isinstance(line, dict) and {"id", "image", "prompt", "chosen",
                                             "rejected"} <= line.keys() for line in lines)
    if not lines or not usable:
        raise Refusal(f"{file}: must hold lines with id, image, prompt, chosen and rejected")
    return lines


def to_preferences(pairs: Sequence[dict], image_folder: Path, *,
                   sources: Sequence[str] = SOURCES) -> list[dict]:
    """TRL's conversational preference rows {images, prompt, chosen, rejected}, one a rejected
    answer of the named sources; images are paths, to be opened when a batch is made."""
    return [{"images": [str(image_folder / k["image"])], "prompt": k["prompt"],
             "chosen": [{"role": "assistant", "content": k["chosen"]}],
             "rejected": [{"role": "assistant", "content": r["text"]}]}
            for k in pairs for r in k["rejected"] if r["source"] in sources]


def to_completions(rows: Sequence[dict]) -> list[dict]:
    """The positives of preference rows for SFT, in the same order and as often."""
    return [{"images": r["images"], "prompt": r["prompt"], "completion": r["chosen"]} for r in rows]


def examples(p: PairGeneration, result: runs.Result) -> list[dict[str, Any]]:
    """Positives with both rejected answers for the gallery, drawn by seed, with the clean image and
    the noised one that the weakened answer came from."""
    rows = {r.id: r for r in read_annotated(p)[0]}
    both = [k for k in read_pairs(result.folder / "pairs.jsonl") if len(k["rejected"]) == 2]
    both.sort(key=lambda k: seeds.seed_for(p.seed, "pair gallery", k["id"]))
    processor = models.load_processor(p.path(p.model))
    out = []
    for pair in both[:p.gallery]:
        row = rows[pair["id"]]
        image = records.load_image(row.image)
        draw = seeds.torch_generator(p.seed, "noise", row.id, p.noise_step)
        out.append({"image": image, "question": row.question, "chosen": pair["chosen"],
                    "noised": models.noised_picture(processor, image, p.noise_step, draw),
                    "category": pair["category"], "rejected": pair["rejected"]})
    return out


def audit_table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The audit, one row a source and category, for people."""
    return [{"source": source, "category": category, "rows": n["rows"], "kept": n["kept"],
             "share kept": f"{n['kept'] / n['rows']:.2f}"}
            for source in SOURCES for category, n in found[source]["by_category"].items()]
