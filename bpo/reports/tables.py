"""What finished stages allow to say, as tables for people: noise (notebook 1), pairs (2), answers
compared (4). Everything is read from metrics and answers; nothing is computed anew.
"""

from typing import TYPE_CHECKING, Any

from bpo.data import images
from bpo.evaluation import comparison, metrics
from bpo.evaluation.comparison import BASELINES, METRICS
from bpo.models.weakening import WEAKENINGS
from bpo.pairs import selection
from bpo.params import SOURCES, QualitativeComparison
from bpo.study import seeds
from bpo.study import stage as stages
from bpo.study.files import read_lines
from bpo.study.results import DECIDED, OPEN, Estimate, behind
from bpo.training.objectives import OBJECTIVES

if TYPE_CHECKING:
    from pandas import DataFrame

CONTROLS = ("sft_matched", "sft", "sft_compute")  # the sharpest control first


def main_split(found: dict[str, Any]) -> str:
    """The split that the page is about: counterfactual where there is one."""
    return comparison.main_split([s for s in found if s != "differences"])


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
    return [{"method": method} | {METRICS[n][0]: Estimate(**mine[n]).text() for n in names}
            for method, mine in found[split].items()]


def counts_note(found: dict[str, Any], split: str, category: str) -> str:
    """What each metric of a category is out of, in one line."""
    parts = [f"{METRICS[n][0]} {e['n']}" for n, e in found[split]["base"].items()
             if METRICS[n][1] == category and e["value"] is not None]
    return "95 % bootstrap intervals over images; out of (base): " + ", ".join(parts)


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
        out.append({"method": method, "against": against, "metric": label, **d,
                    "reading": Estimate(**d, more_is_better=more).reading()})
    return out


def reading(found: dict[str, Any], split: str, method: str, against: str) -> str:
    """In which metrics a method is better or worse than another, and how many cannot be told."""
    rows = [r for r in differences(found, split, method, against) if r["reading"]]
    if not rows:
        return "not to be judged without a truth file"
    parts = []
    for kind in DECIDED:
        names = [r["metric"] for r in rows if r["reading"] == kind]
        parts.append(f"{kind} in {', '.join(names) or 'nothing'}")
    open_ones = sum(r["reading"] == OPEN for r in rows)
    return f"{', '.join(parts)}; {open_ones} of {len(rows)} metrics cannot be told apart"


def change_table(found: dict[str, Any], split: str, method: str) -> list[dict[str, str]]:
    """One row a metric, one column a baseline: the paired difference and its reading."""
    table: dict[str, dict[str, str]] = {}
    for against in baselines(found, split):
        for r in differences(found, split, method, against):
            row = table.setdefault(r["metric"], {"metric": r["metric"]})
            difference = Estimate(r["value"], r["low"], r["high"]).text(sign="+")
            row[f"minus {against}"] = difference + behind(r["reading"])
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


def chair_by_hand(p: QualitativeComparison, result: stages.Result, *, split: str, method: str
                  ) -> "DataFrame":
    """A row a caption of a method: {caption, in the image, object words, wrong}; no rows where no
    truth file describes the images."""
    from pandas import DataFrame

    truth = comparison.read_split(p, split)[1]
    rows = []
    for line in read_lines(result.folder / f"answers-{split}.jsonl"):
        if truth["rows"].get(line["id"], {}).get("category") == "caption":
            wrong, named = comparison.counts(line, method, truth)["chair_i"]
            present = [o["name"] for o in truth["images"][line["image"]]["objects"]]
            rows.append({"caption": line["answers"][method], "in the image": ", ".join(present),
                         "object words": named, "wrong": wrong})
    return DataFrame(rows, columns=["caption", "in the image", "object words", "wrong"])


# --- pairs --------------------------------------------------------------------------------------

CHECKS = {"truth_right": "share in truth right",
          "near_duplicates": "share nearly equal to the chosen answer",
          "length_gap": "words more than the chosen answer",
          "sentences_gap": "sentences more",
          "characters_gap": "characters a word more",
          "commas_gap": "commas a word more",
          "type_token_gap": "type-token ratio (different words a word) more"}
SIDES = {"candidates": "as made", "kept": "as kept"}

Found = dict[str, Any]
Table = list[dict[str, Any]]


def sources(found: Found) -> list[str]:
    """The sources that candidates came from, in the kit's order."""
    return [s for s in SOURCES if s in found]


def kept(found: Found) -> Table:
    """One row a source and category: how many annotated rows, and how many rejected answers."""
    return [{"source": source, "category": category, "rows": n["rows"], "kept": n["kept"],
             "kept a row": f"{n['kept'] / n['rows']:.2f}"}
            for source in sources(found)
            for category, n in found[source]["by_category"].items()]


def dropped(found: Found) -> Table:
    """One row a reason: candidates that were dropped, rows that could not be used."""
    out = [{"what": f"{s} candidate", "reason": reason, "how many": n} for s in sources(found)
           for reason, n in found[s]["dropped"].items()]
    return out + [{"what": "row of the data", "reason": reason, "how many": n}
                  for reason, n in found["rows_skipped"].items()]


def checks(found: Found) -> Table:
    """One row a measure, two columns a source: the candidates as made, and those kept."""
    return [{"measure": label} | {f"{s}, {words}": _text(found[s].get(name, {}).get(side))
                                  for s in sources(found) for side, words in SIDES.items()}
            for name, label in CHECKS.items()]


def agreement(found: Found) -> str:
    """How often sources gave the same answer; empty where there is only one."""
    if len(sources(found)) < 2:
        return ""
    return (f" Two sources gave the same answer in {found['sources_agree']:.0%} of the positives "
            "that have answers of several.")


def shortcuts(found: Found) -> Table:
    """One row a source and category: how well a text-only classifier tells chosen from rejected."""
    out = []
    for source in sources(found):
        for side, words in SIDES.items():
            whole = (found["shortcut"].get(source) or {}).get(side)
            parts = {"all": whole, **((whole or {}).get("by_category") or {})}
            out += [{"source": source, "answers": words, "category": category,
                     "pairs": part["pairs"] if part else "–",
                     "accuracy from the text": _text(part and part["text"]),
                     "from its length alone": _text(part and part["length"])}
                    for category, part in parts.items()]
    return out


def displacement(found: Found) -> Table:
    """One row a source: CHES of the kept pairs; empty where candidates were not scored."""
    out = []
    for source in sources(found):
        ches = found[source].get("displacement", {}).get("kept")
        if ches:
            out.append({"source": source, "mean CHES": _text(ches["mean"]),
                        "share above 0": _text(ches["above_zero"]),
                        "95th percentile": f"{ches['percentile_95']:.2f}"})
    return out


def scores() -> Table:
    """The scores that `select` may weigh, and what each means."""
    return [{"score": name, "meaning": meaning} for name, meaning in selection.SCORES.items()]


def weakenings() -> Table:
    """The ways of weakening an image, from their registry."""
    return [{"mode": name, "the model answers from": way.meaning,
             "takes a step": "yes" if way.stepped else "no",
             "branches": 1 if way.mix is None else 2} for name, way in WEAKENINGS.items()]


def objectives() -> Table:
    """The objectives of pairs, from their registry."""
    return [{"name": name, "term of a pair": o.meaning,
             "damaged image": "yes" if o.damaged else "no",
             "computed by": "TRL" if o.function is None else "bpo"}
            for name, o in OBJECTIVES.items()]


def _text(e: dict[str, Any] | None) -> str:
    if e is None or e["value"] is None:
        return "not known"
    return Estimate(e["value"], e["low"], e["high"]).text()


# --- noise ------------------------------------------------------------------------------------

def curves(found: dict[str, Any], measure: str) -> dict[str, dict[str, list[float]]]:
    """The true and the prior's curve of a measure ("p", "p_first", "logp") for the figure."""
    stem, _, first = measure.partition("_")
    out = {}
    for kind, label in (("true", "true answer"), ("prior", "prior's answer")):
        name = f"{stem}_{kind}" + (f"_{first}" if first else "")
        low, high = zip(*found[f"{name}_interval"], strict=True)
        out[label] = {"mean": found[name], "low": list(low), "high": list(high)}
    return out


def direction(change: dict[str, Any]) -> str:
    """What an interval allows to say of a change between clean image and last step."""
    if not Estimate(**change).excludes_zero():
        return "does not clearly move"
    return "rises" if change["low"] > 0 else "falls"
