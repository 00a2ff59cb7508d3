"""What finished benchmarks allow to say: tables, readings and series of notebook 5.

Everything here is read from the metrics and answers of `benchmarks`; nothing is asked anew.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bpo.evaluation import benchmarks, comparison, diagnostics, official, words
from bpo.params import Benchmarks
from bpo.reports import tables
from bpo.study import results
from bpo.study import stage as stages
from bpo.study.results import DECIDED, Estimate, behind

# Hallucination and what it is to be read beside, by benchmark: (cover, hallucination).
TRADE = {"chair": ("cover", ("chair_s", "chair_i")),
         "object-halbench": ("cover", ("response", "mention")),
         "amber": ("cover", ("chair", "hal"))}


def main_method(found: Mapping[str, Any]) -> str:
    """The method that the page is about: bpo where it was trained, else the last one."""
    return "bpo" if "bpo" in found["methods"] else found["methods"][-1]


def control(found: Mapping[str, Any]) -> str:
    """The baseline that tells most about the contrast, of those that were trained."""
    return next((c for c in tables.CONTROLS if c in found["methods"]), "base")


def baselines(found: Mapping[str, Any]) -> list[str]:
    """What the page's method is compared with."""
    return [b for b in comparison.BASELINES
            if b in found["methods"] and b != main_method(found)]


def few(found: Mapping[str, Any]) -> list[str]:
    """The methods that a figure can hold: base, the control and the page's own."""
    return list(dict.fromkeys(("base", control(found), main_method(found))))


def label(benchmark: Any, metric: str) -> str:
    """A metric's name on a page."""
    return benchmark.metrics[metric].label


def of_kinds(benchmark: Any, values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The metrics that are another one's for a kind of question alone, such as accuracy_random."""
    return [n for n, e in values["base"].items() if e["value"] is not None
            and n.rpartition("_")[0] in benchmark.metrics]


def settings_table(p: Benchmarks, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a benchmark: its questions, how answers were decoded, and who scored them."""
    rows = []
    for name, benchmark in benchmarks.chosen(p).items():
        how = found["settings"][name]
        judge = how.get("judge")
        scored = "rules" if name in official.BENCHMARKS else "not scored: no judge"
        if judge:
            scored = (f"judge {judge['judge']}, prompt {judge['prompt_sha256'][:8]}, temperature "
                      f"{judge['temperature']:g}, replies {judge['repeats']}")
        greedy = f"sampled at {how['temperature']:g}, top-p {how['top_p']:g}"
        rows.append({"benchmark": benchmark.title, "questions": how["questions"],
                     "images": how["images"],
                     "decoding": ("greedy" if not how["temperature"] else greedy)
                     + f", up to {how['max_new_tokens']} tokens", "scored by": scored,
                     "licence": benchmark.licence})
    return rows


def whole(benchmark: Any, values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The metrics of all questions that anything counts for."""
    apart = of_kinds(benchmark, values)
    return [n for n, e in values["base"].items() if e["value"] is not None and n not in apart]


def score_table(benchmark: Any, values: Mapping[str, Mapping[str, Any]], names: Sequence[str]
                ) -> list[dict[str, str]]:
    """One row a method, one column a metric: "value [low, high]"."""
    return [{"method": method} | {label(benchmark, n): Estimate(**mine[n]).text()
                                  for n in names} for method, mine in values.items()]


def counts_note(benchmark: Any, values: Mapping[str, Mapping[str, Any]], names: Sequence[str]
                ) -> str:
    """What each number is out of, in one line."""
    parts = [f"{label(benchmark, n)} {values['base'][n]['n']}" for n in names]
    return "95 % bootstrap intervals over images; out of (base): " + ", ".join(parts)


def differences(p: Benchmarks, found: Mapping[str, Any], method: str, against: str
                ) -> list[dict[str, Any]]:
    """Paired differences of a method to another, of every metric of all questions that has a better
    and a worse, over all benchmarks: {method, against, benchmark, metric, value, low, high, n, p,
    holm, reading}.

    holm: p adjusted for all of these differences together. reading: better, worse or cannot be
    told, by the 95 % interval of this difference alone.
    """
    rows = []
    for name, benchmark in benchmarks.chosen(p).items():
        mine = found["differences"].get(name, {}).get(against, {}).get(method, {})
        apart = of_kinds(benchmark, found["benchmarks"][name]) if mine else []
        for metric, d in mine.items():
            more = benchmark.metrics[metric].more
            if more is None or d["value"] is None or metric in apart:
                continue
            rows.append({"method": method, "against": against, "benchmark": benchmark.title,
                         "metric": label(benchmark, metric), **d,
                         "reading": Estimate(**d, more_is_better=more).reading()})
    for row, adjusted in zip(rows, results.holm([r["p"] for r in rows]), strict=True):
        row["holm"] = adjusted
    return rows


def panels(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Differences for the figure, where two benchmarks may have a metric of one name."""
    return [{**r, "metric": r["metric"] if r["metric"].startswith(r["benchmark"])
             else f"{r['benchmark']}: {r['metric']}"} for r in rows]


def difference_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [{"benchmark": r["benchmark"], "metric": r["metric"],
             "difference": Estimate(r["value"], r["low"], r["high"]).text(sign="+")
             + behind(r["reading"]),
             "p": f"{r['p']:.4f}", "p, Holm": f"{r['holm']:.4f}"} for r in rows]


def reading(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the differences say, in words: how many are better and worse by their own interval, and
    which are left when all are looked at together."""
    if not rows:
        return "nothing was scored"
    count = {kind: sum(r["reading"] == kind for r in rows) for kind in DECIDED}
    left = [f"{r['benchmark']} {r['metric']} ({r['reading']})" for r in rows
            if r["holm"] < 0.05 and r["reading"] in DECIDED]
    return (f"better in {count['better']}, worse in {count['worse']} of {len(rows)} differences; "
            f"corrected for all {len(rows)} (Holm, 5 %) there remain: "
            + (", ".join(left) or "none"))


def trade_off(found: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Points for the figure: cover against hallucination of each method that names anything."""
    across, up = TRADE[name]
    benchmark = official.BENCHMARKS[name]
    return [{"method": method, "metric": label(benchmark, n), "x": mine[across], "y": mine[n]}
            for method, mine in found["benchmarks"][name].items() for n in up
            # few questions, drawn, may hold none that asks for a description
            if {across, n} <= mine.keys()
            and None not in (mine[across]["value"], mine[n]["value"])]


def by_place(p: Benchmarks, result: stages.Result, name: str, methods: Sequence[str], *,
             least: int = 20) -> dict[str, list[dict[str, Any]]]:
    """method -> {place, value, low, high, n} a place: of the objects that captions name first,
    second, ..., the share that is not in the image. Places with fewer than `least` captions are
    left out. A model that says less has fewer late ones, and late ones are wrong more often."""
    folder = p.path(p.folders[name])
    lexicon = official.read_lexicon(folder)
    scenes = official.read_scenes(folder, lexicon)
    counted: dict[str, list] = {m: [] for m in methods}
    for line in benchmarks.answers(result, name):
        present = scenes[words.image_key(line["image"])].present
        for m in methods:
            named = lexicon.objects(line["answers"][m])
            counted[m].append((line["image"], {
                place: (float(o not in present), 1) for place, o in enumerate(named, start=1)}))
    longest = max((len(c) for mine in counted.values() for _, c in mine), default=0)
    values, _ = comparison.scored(counted, range(1, longest + 1), seed=p.seed,
                                  resamples=p.resamples)
    return {m: [{"place": place, **e} for place, e in mine.items() if e["n"] >= least]
            for m, mine in values.items()}


def calibration_table(found: Mapping[str, Any], name: str) -> list[dict[str, str]]:
    """One row a method: Brier score, calibration error, mean P(yes)."""
    titles = {"brier": "Brier score", "ece": "calibration error", "mean_p_yes": "mean P(yes)"}
    return [{"method": method} | {title: Estimate(**mine[n]).text()
                                  for n, title in titles.items()}
            for method, mine in found["calibration"][name]["values"].items()]


def reliability(found: Mapping[str, Any], name: str) -> dict[str, list[dict[str, float]]]:
    """The bins of P(yes) for the figure."""
    values = found["calibration"][name]["values"]
    return {m: values[m]["bins"] for m in few(found)}


def gain_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows for the figure: what the right image adds to an answer's log-probability."""
    return [{"category": category, "over": diagnostics.GAINS[n][0], "method": method, **mine[n]}
            for category, both in found["image"].items()
            for method, mine in both["values"].items() for n in diagnostics.GAINS if n != "right"]


def gain_reading(found: Mapping[str, Any], method: str, against: str) -> str:
    """Whether the right image adds more to an answer, over another image, than it did before."""
    parts = []
    for category, both in found["image"].items():
        d = both["differences"].get(against, {}).get(method, {}).get("over_swapped")
        if d is not None and d["value"] is not None:
            gain = Estimate(**d)
            sure = "" if gain.excludes_zero() else ", cannot be told from none"
            parts.append(f"{category} {gain.text(2, '+')}{sure}")
    return "; ".join(parts) or "nothing was weighed"


def token_gaps(line: Mapping[str, Any], methods: Sequence[str]
               ) -> dict[str, list[tuple[str, float]]]:
    """What the clean image adds to each token of a weighed answer, by method."""
    return {m: diagnostics.token_gaps(line, m) for m in methods}


def drawn_captions(p: Benchmarks, result: stages.Result) -> list[dict[str, Any]]:
    """The weighed captions whose tokens are drawn, as many as `gallery`, in the file's order."""
    lines = benchmarks.probed(result)
    captions = [line for line in lines if line["category"] == "caption"] or lines
    return captions[:p.gallery]
