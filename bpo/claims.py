"""The paper's claims (arXiv 2403.08730), each with the test that decides it on one study.

Read from the manifests of notebooks 1, 4 and 5 and the answers of notebook 4; no model is loaded.
A claim is a dict {claim, against, says, verdict, because, lines}; a line {name, role, decides,
verdict, note, measures} is one question put to the data, decided by the measure that it names; a
measure {where, name, metric, claimed, value, low, high, n, p, holm, side} is one comparison that
was looked at.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bpo import compare, held_out, judged, metrics, official, records, report, runs, seeds
from bpo.params import QualitativeComparison

METHOD = "bpo"  # whom the claims are about
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
RULE = (
    "Holds: the 95 % interval of the deciding difference excludes zero on the claimed side. Does "
    "not hold: it excludes zero on the other side, or hallucination fell but cover fell with it. "
    "Otherwise it cannot be told. A claim of several lines holds when all lines that must gain do "
    "and none is on the wrong side, and does not hold when one of its lines does not.")
# category of notebook 4: what decides, what must not be lost with it
DECIDES = {"caption": ("chair_i", "cover"), "attribute": ("colour_accuracy", None),
           "presence": ("pope_adversarial", None)}
# The same for a benchmark of notebook 5, and whether it is one of hallucination. Judged ones are
# decided by their first metric.
BENCHMARKS = {"chair": ("chair_i", "cover", True), "object-halbench": ("response", "cover", True),
              "pope": ("accuracy", None, False), "amber": ("hal", "cover", True)}
SFT = {"sft": "SFT on all positives",
       "sft_matched": "SFT on the same positives for as many steps",
       "sft_compute": "SFT on the same positives with the same compute"}

Claim = dict[str, Any]
Line = dict[str, Any]
Measure = dict[str, Any]


def table(study: str) -> list[Claim]:
    """All claims on a study, with what was measured for each; notebooks that did not run leave
    theirs open. Holm's correction is over the measures that decide, which were named beforehand;
    over all that are shown beside them, no number of resamples that is usual could survive it."""
    compared = _metrics(study, "4_qualitative_comparison")
    benchmarks = _metrics(study, "5_benchmarks")
    claims = [_noise(study), _gains(compared, benchmarks)]
    claims += [_against_sft(compared, benchmarks, control) for control in SFT]
    claims.append(_claim(4, "A 7B model with BPO passes the untuned 13B on most tasks", [],
                         because="a study of one model size cannot tell"))
    claims.append(_visible(study, compared))
    family = deciding(claims)
    for measure, adjusted in zip(family, metrics.holm([m["p"] for m in family]), strict=True):
        measure["holm"] = adjusted
    return claims


def measures(claims: Sequence[Claim]) -> list[Measure]:
    """Every comparison of a table: all that were looked at and have a claimed side."""
    return [m for c in claims for line in c["lines"] for m in line["measures"]]


def deciding(claims: Sequence[Claim]) -> list[Measure]:
    """Those that decide a line: the family of Holm's correction."""
    return [m for c in claims for line in c["lines"] for m in line["measures"]
            if m["name"] == line["decides"]]


def side(difference: Mapping[str, Any], claimed: bool) -> str:
    """Where an interval lies: on the "right" side of zero, the "wrong" one, or "open" around it.

    claimed: whether the claim is that the difference is above zero.
    """
    if difference["low"] <= 0 <= difference["high"]:
        return "open"
    return "right" if (difference["low"] > 0) == claimed else "wrong"


def verdict(decisive: Measure | None, kept: Measure | None, *, needs_kept: bool
            ) -> tuple[str, str]:
    """The verdict on one line and a note to it.

    kept: the measure that must not be lost with a gain (cover, which falls when a model says less);
    needs_kept: whether a gain without it counts for nothing.
    """
    if decisive is None:
        return OPEN, "not measured"
    if decisive["side"] == "wrong":
        return FAILS, ""
    if decisive["side"] == "open":
        return OPEN, ""
    if needs_kept and kept is None:
        return OPEN, "gained, but cover was not measured beside it"
    if kept is not None and kept["side"] == "wrong":
        return FAILS, f"gained, but {kept['metric']} was lost"
    return HOLDS, ""


def _metrics(study: str, notebook: str) -> dict[str, Any] | None:
    file = runs.stage_folder(study, notebook) / runs.MANIFEST
    return json.loads(file.read_text(encoding="utf-8"))["metrics"] if file.is_file() else None


def _measure(where: str, name: str, metric: str, difference: Mapping[str, Any], claimed: bool
             ) -> Measure:
    return {"where": where, "name": name, "metric": metric, "claimed": claimed,
            **{k: difference[k] for k in ("value", "low", "high", "n")},
            # manifests from before there were p values have none
            "p": difference.get("p"), "holm": None, "side": side(difference, claimed)}


def _line(name: str, found: Sequence[Measure], decides: str, kept: str | None = None, *,
          role: str = "gain") -> Line:
    """role: "gain", which the claim needs to hold, or "guard", which it needs not to fail."""
    by_name = {m["name"]: m for m in found}
    word, note = verdict(by_name.get(decides), by_name.get(kept or ""), needs_kept=bool(kept))
    order = [decides, kept, *by_name]
    return {"name": name, "role": role, "decides": decides, "verdict": word, "note": note,
            "measures": sorted(found, key=lambda m: order.index(m["name"]))}


def _claim(number: int, says: str, lines: Sequence[Line], *, against: str = "", because: str = ""
           ) -> Claim:
    words = [x["verdict"] for x in lines]
    gains = [x["verdict"] for x in lines if x["role"] == "gain"]
    if FAILS in words:
        word = FAILS
    else:
        word = HOLDS if gains and set(gains) == {HOLDS} else OPEN
    told = "; ".join(f"{x['name']}: {x['verdict']}" + (f" ({x['note']})" if x["note"] else "")
                     for x in lines)
    return {"claim": number, "against": against, "says": says, "verdict": word,
            "because": because or told or "not measured", "lines": list(lines)}


def _noise(study: str) -> Claim:
    """Claim 1: from the clean image to the last noise step P(true) falls and P(prior) rises."""
    says = "As noise drowns the image, the true answer gets less likely, the prior's answer more"
    file = runs.stage_folder(study, "1_noise_probability") / runs.MANIFEST
    if not file.is_file():
        return _claim(1, says, [], because="notebook 1 has not run")
    manifest = json.loads(file.read_text(encoding="utf-8"))
    found, where = manifest["metrics"], f"step {manifest['metrics']['noise_steps'][-1]}"
    true = _measure(where, "p_true", "P(true answer)", found["change_true"], False)
    prior = _measure(where, "p_prior", "P(prior's answer)", found["change_prior"], True)
    lines = [_line("P(true answer) falls", [true], "p_true"),
             _line("P(prior's answer) rises", [prior], "p_prior")]
    if "truth" not in manifest["inputs"] and not manifest["parameters"]["question"]:
        lines[1] |= {"verdict": OPEN, "note": "the prior's answers are what the model said at the "
                     "last step, so they rise by construction"}
    return _claim(1, says, lines, against="clean image")


def _gains(compared: Mapping[str, Any] | None, benchmarks: Mapping[str, Any] | None) -> Claim:
    """Claim 2: less hallucination than the untuned model, nothing else worse, on any split."""
    lines = _categories(compared, "base") + _benchmarks(benchmarks, "base")
    for line in lines:
        line["role"] = "gain" if line["main"] and line["hallucination"] else "guard"
    return _claim(2, "BPO hallucinates less than the untuned model and loses nowhere", lines,
                  against="base")


def _against_sft(compared: Mapping[str, Any] | None, benchmarks: Mapping[str, Any] | None,
                 control: str) -> Claim:
    """Claim 3, against one of the SFT baselines, category by category on the main split."""
    lines = [x for x in _categories(compared, control) + _benchmarks(benchmarks, control)
             if x["main"]]
    return _claim(3, f"BPO beats {SFT[control]}, by category", lines, against=control)


def _categories(compared: Mapping[str, Any] | None, against: str) -> list[Line]:
    """A line a split and category of notebook 4; the main split's are marked."""
    lines = []
    for split, found in ((compared or {}).get("differences") or {}).items():
        mine = found.get(against, {}).get(METHOD, {})
        for category, (decides, kept) in DECIDES.items():
            measured = [_measure(split, n, label, mine[n], more)
                        for n, (label, of, more) in held_out.METRICS.items()
                        if of == category and more is not None and n in mine
                        and mine[n]["value"] is not None]
            if measured:
                line = _line(f"{split} {category}", measured, decides, kept)
                lines.append(line | {"main": split == compare.main_split(compared),
                                     "hallucination": category == "caption"})
    return lines


def benchmark(name: str) -> tuple[str, dict[str, tuple[str, bool | None]]]:
    """The title of a benchmark of notebook 5, and its metrics with label and whether more is
    better, those that are made of others last."""
    known = {**official.BENCHMARKS, **judged.JUDGED}[name]
    return known.title, {n: (m.label, m.more) for n, m in known.all_metrics.items()}


def _benchmarks(found: Mapping[str, Any] | None, against: str) -> list[Line]:
    """A line a benchmark of notebook 5."""
    lines = []
    for name, differences in ((found or {}).get("differences") or {}).items():
        title, known = benchmark(name)
        decides, kept, hallucination = BENCHMARKS.get(name, (next(iter(known)), None, False))
        mine = differences.get(against, {}).get(METHOD, {})
        measured = [_measure(title, n, label, mine[n], more)
                    for n, (label, more) in known.items()
                    if more is not None and n in mine and mine[n]["value"] is not None]
        if measured:
            lines.append(_line(title, measured, decides, kept)
                         | {"main": True, "hallucination": hallucination})
    return lines


def _visible(study: str, compared: Mapping[str, Any] | None) -> Claim:
    """Claim 5: more answers better than the untuned model's than worse, as `compare.quality`
    weighs them; wins minus losses a question, with its interval over images."""
    says = "Answers are visibly more faithful: more of them better than worse"
    stage = runs.stage_folder(study, QualitativeComparison.notebook)
    split = compare.main_split(compared) if compared else ""
    file = stage / f"answers-{split}.jsonl"
    if not file.is_file():
        return _claim(5, says, [], against="base", because="notebook 4 has not run")
    known = json.loads((stage / runs.MANIFEST).read_text(encoding="utf-8"))["parameters"]
    p = QualitativeComparison(study=study, **known)
    won = wins(records.read_lines(file), records.read_truth(p.path(p.splits[split])), METHOD,
               seed=p.seed, resamples=p.resamples)
    if won is None:
        return _claim(5, says, [], against="base",
                      because="nothing tells wins from losses: there is no truth file, or no BPO")
    measure = _measure(split, "wins", "wins − losses, a question", won, True)
    return _claim(5, says, [_line(f"{split}, all questions", [measure], "wins")], against="base")


def wins(lines: Sequence[dict], truth: dict[str, Any], method: str, *, seed: int, resamples: int
         ) -> dict[str, Any] | None:
    """{value, low, high, n, p}: the share of questions that a method answers better than the base,
    less the share that it answers worse; bootstrap over images. None where nothing can be judged.
    """
    won, lost = [], []
    for line in lines:
        if method in line["answers"]:
            mine, base = (compare.quality(line, m, truth) for m in (method, "base"))
            if mine is not None and base is not None:
                won.append((line["image"], (float(mine > base), 1)))
                lost.append((line["image"], (float(mine < base), 1)))
    if not won:
        return None
    ratios = [metrics.by_image(counted) for counted in (won, lost)]
    weights = metrics.bootstrap_weights(len(ratios[0]), resamples,
                                        seeds.numpy_generator(seed, "claims interval"))
    return metrics.difference(*ratios, weights)


def summary(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """One row a claim for a page."""
    return [{"claim": c["claim"], "says": c["says"], "against": c["against"] or "–",
             "verdict": c["verdict"], "because": c["because"]} for c in claims]


def detail(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """One row a comparison for a page; "decides" marks those that make a line's verdict."""
    rows = []
    for c in claims:
        for line in c["lines"]:
            for m in line["measures"]:
                rows.append({
                    "claim": c["claim"], "against": c["against"], "where": m["where"],
                    "measure": m["metric"], "claimed": "more" if m["claimed"] else "less",
                    "difference": report.estimate(m["value"], m["low"], m["high"], sign="+"),
                    "side": m["side"], "p": m["p"], "Holm": m["holm"],
                    "decides": line["verdict"] if m["name"] == line["decides"] else ""})
    return rows


def looks(claims: Sequence[Claim]) -> dict[str, Any]:
    """How much was looked at: {looked, apart, decide, decide_apart, survive}. The comparisons and
    those whose interval excludes zero, of all and of the deciding ones, and how many deciding ones
    survive Holm's correction at 0.05 (None where manifests hold no p values)."""
    every, family = measures(claims), deciding(claims)
    known = all(m["p"] is not None for m in family)
    return {"looked": len(every), "apart": sum(m["side"] != "open" for m in every),
            "decide": len(family), "decide_apart": sum(m["side"] != "open" for m in family),
            "survive": sum(m["holm"] <= 0.05 for m in family) if known else None}


def told(claims: Sequence[Claim]) -> str:
    """`looks` in a sentence, with the names of what survives."""
    found = looks(claims)
    text = (f"{found['looked']} comparisons were looked at, {found['apart']} intervals exclude "
            f"zero; of the {found['decide']} that decide a verdict {found['decide_apart']} do")
    if found["survive"] is None:
        return f"{text}. Without p values there is no Holm's correction: run the study again"
    kept = [f"{m['where']} {m['metric']}" + (f" against {c['against']}" if c["against"] else "")
            for c in claims for m in deciding([c]) if m["holm"] <= 0.05]
    return (f"{text}, and {found['survive']} survive Holm's correction at 0.05"
            + (f": {', '.join(kept)}" if kept else ""))
