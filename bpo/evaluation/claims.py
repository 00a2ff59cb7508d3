"""The paper's claims on a study. Which measure decides each was fixed beforehand; a verdict is a
query on the study's results. What a claim says of other seeds is `replication`'s.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bpo.evaluation import benchmarks, comparison
from bpo.study import results
from bpo.study import stage as stages
from bpo.study.results import BETTER, OPEN, WORSE, Estimate

if TYPE_CHECKING:
    from pandas import DataFrame

METHOD = "bpo"  # the method that the claims are about
HOLDS, FAILS = "holds", "does not hold"
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
COMPARISON, BENCHMARK = "4_qualitative_comparison", "5_benchmarks"


@dataclass(frozen=True)
class Line:
    """One thing that a claim hangs on: a category or a benchmark.

    measures: metric -> difference, every one that was looked at; decides: the metric of the
    verdict. role: "gain", which the claim needs to hold, or "guard", which must not fail.
    """

    name: str
    where: str
    decides: str
    measures: Mapping[str, Estimate]
    verdict: str
    note: str = ""
    role: str = "gain"
    main: bool = True
    hallucination: bool = False


@dataclass(frozen=True)
class Claim:
    number: int
    says: str
    against: str
    verdict: str
    because: str
    lines: Sequence[Line]


def table(study: str) -> list[Claim]:
    """All claims on a study; notebooks that did not run leave theirs open."""
    frame = results.of_study(study)
    claims = [_noise(study, frame), _gains(frame)]
    claims += [_against_sft(frame, control) for control in SFT]
    claims.append(_claim(4, "A 7B model with BPO passes the untuned 13B on most tasks", [],
                         because="a study of one model size cannot tell"))
    return [*claims, _visible(frame)]


def verdict(decisive: Estimate | None, kept: Estimate | None, *, needs_kept: bool
            ) -> tuple[str, str]:
    """The verdict on one line and a note to it.

    kept: the measure that must not be lost with a gain (cover, which falls when a model says less);
    needs_kept: whether a gain without it counts for nothing.
    """
    if decisive is None:
        return OPEN, "not measured"
    if decisive.reading() != BETTER:
        return (FAILS if decisive.reading() == WORSE else OPEN), ""
    if needs_kept and kept is None:
        return OPEN, "gained, but cover was not measured beside it"
    if kept is not None and kept.reading() == WORSE:
        return FAILS, "gained, but cover was lost"
    return HOLDS, ""


def _line(name: str, where: str, measures: Mapping[str, Estimate], decides: str,
          kept: str | None = None, **rest: object) -> Line:
    word, note = verdict(measures.get(decides), measures.get(kept or ""), needs_kept=bool(kept))
    return Line(name, where, decides, measures, word, note, **rest)


def _claim(number: int, says: str, lines: Sequence[Line], *, against: str = "", because: str = ""
           ) -> Claim:
    verdicts = [x.verdict for x in lines]
    gains = {x.verdict for x in lines if x.role == "gain"}
    word = FAILS if FAILS in verdicts else HOLDS if gains == {HOLDS} else OPEN
    reasons = "; ".join(f"{x.name}: {x.verdict}" + (f" ({x.note})" if x.note else "")
                        for x in lines)
    return Claim(number, says, against, word, because or reasons or "not measured", lines)


def _noise(study: str, frame: "DataFrame") -> Claim:
    """Claim 1: from the clean image to the last noise step P(true) falls and P(prior) rises."""
    says = "As noise drowns the image, the true answer gets less likely, the prior's answer more"
    rows = frame.query("notebook == '1_noise_probability' and against != ''")
    if rows.empty:
        return _claim(1, says, [], because="notebook 1 has not run")
    changes = {row["metric"]: results.estimate(row) for _, row in rows.iterrows()}
    where = rows.iloc[0]["split_or_benchmark"]
    lines = [_line(f"{label} {moves}", where, {n: replace(changes[n], more_is_better=up)}, n)
             for n, label, moves, up in (("p_true", "P(true answer)", "falls", False),
                                         ("p_prior", "P(prior's answer)", "rises", True))]
    manifest = stages.read_manifest(stages.stage_folder(study, "1_noise_probability"))
    if "truth" not in manifest["inputs"] and not manifest["parameters"]["question"]:
        lines[1] = replace(lines[1], verdict=OPEN, note="the prior's answers are what the model "
                           "said at the last step, so they rise by construction")
    return _claim(1, says, lines, against="clean image")


def _gains(frame: "DataFrame") -> Claim:
    """Claim 2: less hallucination than the untuned model, nothing else worse, on any split."""
    lines = [replace(x, role="gain" if x.main and x.hallucination else "guard")
             for x in _lines(frame, "base")]
    return _claim(2, "BPO hallucinates less than the untuned model and loses nowhere", lines,
                  against="base")


def _against_sft(frame: "DataFrame", control: str) -> Claim:
    """Claim 3, against one of the SFT baselines, category by category on the main split."""
    return _claim(3, f"BPO beats {SFT[control]}, by category",
                  [x for x in _lines(frame, control) if x.main], against=control)


def _lines(frame: "DataFrame", against: str) -> list[Line]:
    """A line a split and category of notebook 4 and a benchmark of notebook 5."""
    rows = frame[(frame["method"] == METHOD) & (frame["against"] == against)
                 & frame["value"].notna() & frame["more_is_better"].notna()]
    out = []
    compared = rows[rows["notebook"] == COMPARISON]
    main = main_split(frame)
    for split in dict.fromkeys(compared["split_or_benchmark"]):
        for category, (decides, kept) in DECIDES.items():
            measures = _measures(compared, split, [category], comparison.METRICS)
            if measures:
                out.append(_line(f"{split} {category}", split, measures, decides, kept,
                                 main=split == main, hallucination=category == "caption"))
    scored = rows[rows["notebook"] == BENCHMARK]
    for name in dict.fromkeys(scored["split_or_benchmark"]):
        if name in benchmarks.KNOWN:
            title, known = benchmark(name)
            decides, kept, halluc = BENCHMARKS.get(name, (next(iter(known)), None, False))
            measures = _measures(scored, name, ["all", "kind"], known)
            out.append(_line(title, title, measures, decides, kept, hallucination=halluc))
    return out


def _measures(rows: "DataFrame", where: str, categories: Sequence[str], order: Iterable[str]
              ) -> dict[str, Estimate]:
    rows = rows[(rows["split_or_benchmark"] == where) & rows["category"].isin(categories)]
    found = {row["metric"]: results.estimate(row) for _, row in rows.iterrows()}
    return {n: found[n] for n in order if n in found}


def _visible(frame: "DataFrame") -> Claim:
    """Claim 5: more answers better than the untuned model's than worse; wins minus losses a
    question, with its interval over images."""
    says = "Answers are visibly more faithful: more of them better than worse"
    compared = frame[frame["notebook"] == COMPARISON]
    if compared.empty:
        return _claim(5, says, [], against="base", because="notebook 4 has not run")
    split = main_split(frame)
    rows = compared.query("metric == 'wins' and method == @METHOD and "
                          "split_or_benchmark == @split").dropna(subset="value")
    if rows.empty:
        return _claim(5, says, [], against="base",
                      because="nothing tells wins from losses: there is no truth file, or no BPO")
    line = _line(f"{split}, all questions", split, {"wins": results.estimate(rows.iloc[0])}, "wins")
    return _claim(5, says, [line], against="base")


def main_split(frame: "DataFrame") -> str:
    """`comparison.main_split` of a study's results."""
    splits = frame.loc[frame["notebook"] == COMPARISON, "split_or_benchmark"]
    return comparison.main_split(splits.unique().tolist())


def benchmark(name: str) -> tuple[str, dict[str, tuple[str, bool | None]]]:
    """The title of a benchmark of notebook 5, and its metrics with label and whether more is
    better, those that are made of others last."""
    known = benchmarks.KNOWN[name]
    return known.title, {n: (m.label, m.more) for n, m in known.metrics.items()}


def label(where: str, metric: str) -> str:
    """A metric's name on a page; where: a split or a benchmark's name."""
    if where in benchmarks.KNOWN and metric in benchmark(where)[1]:
        return benchmark(where)[1][metric][0]
    return comparison.METRICS[metric][0] if metric in comparison.METRICS else metric


def summary(claims: Sequence[Claim]) -> "DataFrame":
    """One row a claim for a page."""
    from pandas import DataFrame

    return DataFrame([{"claim": c.number, "says": c.says, "against": c.against or "–",
                       "verdict": c.verdict, "because": c.because} for c in claims])


def looks(claims: Sequence[Claim]) -> dict[str, int]:
    """How much was looked at: {looked, apart, decide, decide_apart, survive}. The comparisons and
    those whose interval excludes zero, of all and of the deciding ones, and how many deciding ones
    survive Holm's correction at 0.05. The correction is over the measures that decide, which were
    named beforehand; over all that are shown beside them no usual number of resamples could
    survive it."""
    every = [e for c in claims for x in c.lines for e in x.measures.values()]
    family = _deciding(claims)
    return {"looked": len(every), "apart": sum(e.excludes_zero() for e in every),
            "decide": len(family), "decide_apart": sum(e.excludes_zero() for _, e in family),
            "survive": len(_survivors(claims))}


def _survivors(claims: Sequence[Claim]) -> list[str]:
    """The names of the deciding measures that survive Holm's correction at 0.05."""
    family = _deciding(claims)
    corrected = results.holm([e.p for _, e in family])
    return [name for (name, _), p in zip(family, corrected, strict=True)
            if p is not None and p <= 0.05]


def _deciding(claims: Sequence[Claim]) -> list[tuple[str, Estimate]]:
    return [(f"{x.name}" + (f" against {c.against}" if c.against else ""), x.measures[x.decides])
            for c in claims for x in c.lines if x.decides in x.measures]


def looks_text(claims: Sequence[Claim]) -> str:
    """`looks` in a sentence, with the names of what survives."""
    count, names = looks(claims), _survivors(claims)
    return (f"{count['looked']} comparisons were looked at, {count['apart']} intervals exclude "
            f"zero; of the {count['decide']} that decide a verdict {count['decide_apart']} do, and "
            f"{count['survive']} survive Holm's correction at 0.05"
            + (f": {', '.join(names)}" if names else ""))
