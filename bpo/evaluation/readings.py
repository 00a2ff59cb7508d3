"""What a finished comparison allows to say: tables, readings and examples of notebook 4.

Everything here is read from the metrics and answers of `held_out`; nothing is computed anew.
"""

from typing import Any

from bpo.data import images
from bpo.evaluation import comparison, metrics
from bpo.evaluation.comparison import BASELINES, METRICS
from bpo.params import QualitativeComparison
from bpo.study import seeds
from bpo.study import stage as stages
from bpo.study import text as texts
from bpo.study.files import read_lines

CONTROLS = ("sft_matched", "sft", "sft_compute")  # the sharpest control first


def main_split(found: dict[str, Any]) -> str:
    """The split that the page is about: counterfactual where there is one."""
    splits = [s for s in found if s != "differences"]
    return "counterfactual" if "counterfactual" in splits else splits[0]


def main_method(found: dict[str, Any]) -> str:
    """The method that the page is about: bpo where it was trained, else the last one."""
    methods = list(found[main_split(found)])
    return "bpo" if "bpo" in methods else methods[-1]


def baselines(found: dict[str, Any], split: str) -> list[str]:
    return [b for b in BASELINES if b in found[split] and b != main_method(found)]


def control(found: dict[str, Any], split: str) -> str:
    """The baseline that tells most about the contrast, of those that were trained."""
    return next((c for c in CONTROLS if c in found[split]), "base")


def categories(found: dict[str, Any], split: str) -> list[str]:
    """The kinds of question that a split has metrics for."""
    measured = {METRICS[n][1] for n, e in found[split]["base"].items() if e["value"] is not None}
    return [c for c in ("caption", "attribute", "presence", "any") if c in measured]


def shown_metrics(found: dict[str, Any], split: str) -> list[str]:
    """The metrics worth a figure: those with a better and a worse, or all where there is none."""
    measured = [n for n, e in found[split]["base"].items() if e["value"] is not None]
    return [n for n in measured if METRICS[n][2] is not None] or measured


def table(found: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """[{method, metric, value, low, high}] of a split, metrics by their labels, for the figure."""
    return [{"method": method, "metric": METRICS[name][0], **estimate}
            for method, mine in found[split].items() for name, estimate in mine.items()
            if estimate["value"] is not None]


def wide_table(found: dict[str, Any], split: str, category: str) -> list[dict[str, str]]:
    """One row a method, one column a metric of the category, "value [low, high]"."""
    names = [n for n, e in found[split]["base"].items()
             if METRICS[n][1] == category and e["value"] is not None]
    return [{"method": method} | {METRICS[n][0]: shown_estimate(mine[n]) for n in names}
            for method, mine in found[split].items()]


def counts_note(found: dict[str, Any], split: str, category: str) -> str:
    """What each metric of a category is out of, in one line."""
    parts = [f"{METRICS[n][0]} {e['n']}" for n, e in found[split]["base"].items()
             if METRICS[n][1] == category and e["value"] is not None]
    return "95 % bootstrap intervals over images; out of (base): " + ", ".join(parts)


def shown_estimate(e: dict[str, Any]) -> str:
    """"value [low, high]", or "none"."""
    if e["value"] is None:
        return "none"
    return texts.estimate(e["value"], e["low"], e["high"])


def differences(found: dict[str, Any], split: str, method: str, against: str
                ) -> list[dict[str, Any]]:
    """Every shown metric's paired difference between two methods, with what its interval allows to
    say: "better", "worse", "cannot be told", or "" where neither more nor less is good."""
    out = []
    for name in shown_metrics(found, split):
        d = found["differences"][split].get(against, {}).get(method, {}).get(name)
        if d is None or d["value"] is None:
            continue
        label, _, more = METRICS[name]
        if d["low"] <= 0 <= d["high"]:
            reading = "cannot be told"
        else:
            reading = "better" if (d["low"] > 0) == more else "worse"
        out.append({"method": method, "against": against, "metric": label, **d,
                    "reading": "" if more is None else reading})
    return out


def reading(found: dict[str, Any], split: str, method: str, against: str) -> str:
    """In which metrics a method is better or worse than another, and how many cannot be told."""
    rows = [r for r in differences(found, split, method, against) if r["reading"]]
    if not rows:
        return "not to be judged without a truth file"
    parts = []
    for kind in ("better", "worse"):
        names = [r["metric"] for r in rows if r["reading"] == kind]
        parts.append(f"{kind} in {', '.join(names) or 'nothing'}")
    open_ones = sum(r["reading"] == "cannot be told" for r in rows)
    return f"{', '.join(parts)}; {open_ones} of {len(rows)} metrics cannot be told apart"


def change_table(found: dict[str, Any], split: str, method: str) -> list[dict[str, str]]:
    """One row a metric, one column a baseline: the paired difference and its reading."""
    table: dict[str, dict[str, str]] = {}
    for against in baselines(found, split):
        for r in differences(found, split, method, against):
            row = table.setdefault(r["metric"], {"metric": r["metric"]})
            reading = f" {r['reading']}" if r["reading"] in ("better", "worse") else ""
            row[f"minus {against}"] = texts.estimate(r["value"], r["low"], r["high"],
                                                      sign="+") + reading
    return list(table.values())


def gallery(p: QualitativeComparison, result: stages.Result, *, split: str, method: str,
            against: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Cards for the gallery, and how often each verdict occurs among all questions of the split.

    As many wins, losses and ties as far as there are any, each drawn by seed.
    """
    rows, truth = comparison.read_split(p, split)
    files = {r.id: r.image for r in rows}
    verdicts: dict[str, list[dict]] = {"win": [], "loss": [], "tie": []}
    for line in read_lines(result.folder / f"answers-{split}.jsonl"):
        mine, other = (comparison.quality(line, m, truth) or 0.0 for m in (method, against))
        verdicts["win" if mine > other else "loss" if mine < other else "tie"].append(line)
    drawn = [[(name, x) for x in sorted(found, key=lambda x: seeds.seed_for(
        p.seed, "comparison gallery", x["id"]))] for name, found in verdicts.items()]
    mixed = [d[i] for i in range(p.gallery) for d in drawn if i < len(d)][:p.gallery]
    cards = [{"image": images.load(files[x["id"]]), "question": x["question"],
              "truth": x["annotated"], "verdict": name,
              "answers": {m: (text, wrong_words(x, m, truth)) for m, text in x["answers"].items()}}
             for name, x in mixed]
    return cards, {n: len(v) for n, v in verdicts.items()}


def wrong_words(line: dict, method: str, truth: dict[str, Any]) -> set[str]:
    """The words of an answer to mark: hallucinated objects of a caption, a wrong answer whole."""
    known, text = truth["rows"].get(line["id"]), line["answers"][method]
    if known is None:
        return set()
    if known["category"] == "caption":
        present = {o["name"] for o in truth["images"][line["image"]]["objects"]}
        return metrics.wrong_object_words(text, truth["vocabulary"]["objects"], present)
    return set() if comparison.quality(line, method, truth) else set(metrics.words(text))
