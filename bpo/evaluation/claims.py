"""The paper's claims on a study. Which measure decides each was fixed beforehand; a verdict is a
query on the study's results. What a claim says of other seeds is `replication`'s.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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
COLUMNS = ["claim", "says", "against", "line", "verdict", "because", "looked", "apart", "decides",
           "p"]
PROBE, COMPARISON, BENCHMARK = "1_noise_probability", "4_qualitative_comparison", "5_benchmarks"


@dataclass(frozen=True)
class Line:
    """One thing that a claim depends on: a category or a benchmark.

    measures: metric -> difference, all that were looked at; decides: the metric of the verdict;
    gains: whether the claim needs it to hold, else it only must not fail; main: on the main split.
    """

    name: str
    measures: Mapping[str, Estimate]
    decides: str
    verdict: str
    note: str = ""
    gains: bool = True
    main: bool = True


def table(study: str) -> "DataFrame":
    """All claims on a study, those on notebooks that did not run left open: {claim, says, against,
    line, verdict, because, looked, apart, decides, p}.

    A row with an empty `line` is a claim, the others are the lines that it depends on. Of a line,
    looked: how many differences were looked at; apart: of how many the interval excludes zero;
    decides: whether that of the deciding one does, None where it was not measured; p: its p.
    """
    from pandas import DataFrame

    frame = results.of_study(study)
    base = list(_lines(frame, "base"))
    rows = [*_noise(study, frame),
            *_claim(2, "BPO hallucinates less than the untuned model and loses nowhere", base,
                    against="base")]
    for control, training in SFT.items():
        rows += _claim(3, f"BPO beats {training}, by category",
                       [replace(x, gains=True) for x in _lines(frame, control) if x.main],
                       against=control)
    rows += _claim(4, "A 7B model with BPO passes the untuned 13B on most tasks", [],
                   because="a study of one model size cannot tell")
    return DataFrame(rows + _visible(frame), columns=COLUMNS)


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


def _line(name: str, rows: "DataFrame", decides: str, kept: str | None = None, **rest: bool
          ) -> Line:
    measures = dict(zip(rows["metric"], results.estimates(rows), strict=True))
    word, note = verdict(measures.get(decides), measures.get(kept or ""), needs_kept=bool(kept))
    return Line(name, measures, decides, word, note, **rest)


def _claim(number: int, says: str, lines: Sequence[Line], *, against: str = "", because: str = ""
           ) -> list[dict[str, Any]]:
    verdicts = [x.verdict for x in lines]
    gains = {x.verdict for x in lines if x.gains}
    word = FAILS if FAILS in verdicts else HOLDS if gains == {HOLDS} else OPEN
    reasons = "; ".join(f"{x.name}: {x.verdict}" + (f" ({x.note})" if x.note else "")
                        for x in lines)
    claim = {"claim": number, "says": says, "against": against or "–"}
    rows = [{**claim, "line": "", "verdict": word, "because": because or reasons or "not measured"}]
    for x in lines:
        decisive = x.measures.get(x.decides)
        rows.append({**claim, "line": x.name, "verdict": x.verdict, "because": x.note,
                     "looked": len(x.measures),
                     "apart": sum(e.excludes_zero() for e in x.measures.values()),
                     "decides": decisive and decisive.excludes_zero(),
                     "p": decisive and decisive.p})
    return rows


def _noise(study: str, frame: "DataFrame") -> list[dict[str, Any]]:
    """Claim 1: from the clean image to the last noise step P(true) falls and P(prior) rises."""
    says = "As noise drowns the image, the true answer gets less likely, the prior's answer more"
    rows = frame.query("notebook == @PROBE and category == 'noise' and against != ''")
    if rows.empty:
        return _claim(1, says, [], because="notebook 1 has not run")
    lines = [_line(name, rows[rows["metric"] == metric].assign(more_is_better=rises), metric)
             for metric, name, rises in (("p_true", "P(true answer) falls", False),
                                         ("p_prior", "P(prior's answer) rises", True))]
    manifest = stages.read_manifest(stages.stage_folder(study, PROBE))
    if "truth" not in manifest["inputs"] and not manifest["parameters"]["question"]:
        lines[1] = replace(lines[1], verdict=OPEN, note="the prior's answers are what the model "
                           "said at the last step, so they rise by construction")
    return _claim(1, says, lines, against="clean image")


def _lines(frame: "DataFrame", against: str) -> Iterator[Line]:
    """A line a split and category of notebook 4 and a benchmark of notebook 5; those that gain are
    on hallucination, on the main split."""
    rows = frame[(frame["method"] == METHOD) & (frame["against"] == against)
                 & frame["value"].notna() & frame["more_is_better"].notna()]
    main = comparison.main_split(frame)
    compared = rows.query("notebook == @COMPARISON and category in @DECIDES")
    for (split, category), measures in compared.groupby(["split_or_benchmark", "category"],
                                                        sort=False):
        yield _line(f"{split} {category}", measures, *DECIDES[category], main=split == main,
                    gains=split == main and category == "caption")
    scored = rows.query("notebook == @BENCHMARK and category in ('all', 'kind')")
    for name, measures in scored.groupby("split_or_benchmark", sort=False):
        first = next(iter(benchmarks.described(name)))
        decides, kept, gains = BENCHMARKS.get(name, (first, None, False))
        yield _line(benchmarks.title(name), measures, decides, kept, gains=gains)


def _visible(frame: "DataFrame") -> list[dict[str, Any]]:
    """Claim 5: more answers better than the untuned model's than worse; wins minus losses a
    question, with its interval over images."""
    says = "Answers are visibly more faithful: more of them better than worse"
    if not (frame["notebook"] == COMPARISON).any():
        return _claim(5, says, [], against="base", because="notebook 4 has not run")
    split = comparison.main_split(frame)
    rows = frame.query("notebook == @COMPARISON and metric == 'wins' and method == @METHOD and "
                       "split_or_benchmark == @split").dropna(subset="value")
    if rows.empty:
        return _claim(5, says, [], against="base",
                      because="nothing tells wins from losses: there is no truth file, or no BPO")
    return _claim(5, says, [_line(f"{split}, all questions", rows, "wins")], against="base")


def looks(claims: "DataFrame") -> str:
    """How much was looked at, in a sentence with the names of what survives Holm's correction at
    0.05. The correction is over the measures that decide, which were named beforehand; over all
    that are shown beside them no usual number of resamples could survive it."""
    decides = claims.dropna(subset="decides")
    survive = []
    tested = decides.dropna(subset="p")
    for row, p in zip(tested.itertuples(), results.holm(tested["p"].tolist()), strict=True):
        if p <= 0.05:
            survive.append(row.line if row.against == "–" else f"{row.line} against {row.against}")
    return (f"{claims['looked'].sum():.0f} comparisons were looked at, {claims['apart'].sum():.0f} "
            f"intervals exclude zero; of the {len(decides)} that decide a verdict "
            f"{decides['decides'].sum():.0f} do, and {len(survive)} survive Holm's correction at "
            "0.05" + (f": {', '.join(survive)}" if survive else ""))
