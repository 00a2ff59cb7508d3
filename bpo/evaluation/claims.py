"""The paper's claims, one a row, each with the measure that decides it: it was named before any
study ran. A verdict is a query on results, of one study or of means over seeds (`replication`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bpo.evaluation import benchmarks, comparison, probe
from bpo.params import Worlds
from bpo.study import results
from bpo.study import stage as stages
from bpo.study.results import BETTER, OPEN, WORSE, Estimate

if TYPE_CHECKING:
    from pandas import DataFrame

METHOD = "bpo"  # the method that the claims are about
WEAKENED = "bpo_weaken"  # the same with weakened answers alone, against its own matched SFT
RIVAL, SHARPENED = "rival", "base_sharpened"  # what notebook 4 compares with beside methods
HARM = "harm"
HOLDS, FAILS, UNMEASURED = "holds", "does not hold", "not measured"
SIGNS = {HOLDS: "+", OPEN: "o", FAILS: "−", UNMEASURED: "·"}
RULE = (
    "Claims by the paper's number: 1 noise brings out the prior, 2 against the untuned model, 3 "
    "against SFT (sft_matched: on the method's own rows, which leaves the contrast alone), 4 "
    "against a larger model, 5 visibly better; then harm. One measure decides each row; it was "
    "named beforehand, and no row decides another. Holds: the 95 % interval of its difference lies "
    "on the claimed side of zero. Does not hold: on the other side. Else: "
    f"{OPEN}, which is all that one can wish of a row of harm, and of \"says as much\". The larger "
    "model is passed when bpo is better, beyond its interval, on more than half of the tasks, and "
    "not when it is worse on half of them or more.")
# What decides a benchmark, what may not be lost with it, and whether it counts hallucination;
# others: `deciding`.
BENCHMARKS = {"chair": ("chair_i", "cover", True), "object-halbench": ("response", "cover", True),
              "pope": ("accuracy", None, False), "amber": ("hal", "cover", True)}
TASKS = ("chair_i", "colour_accuracy", "pope_adversarial")  # of the main split, against the rival
CONTROLS = ("sft_matched", "sft", "sft_compute")  # the first leaves the contrast alone
PROBE, COMPARISON, BENCHMARK = "1_noise_probability", "4_qualitative_comparison", "5_benchmarks"
KEYS = ["claim", "says", "method", "against", "decides"]
COLUMNS = [*KEYS, "n", "difference", "verdict", "p"]


@dataclass(frozen=True)
class Claim:
    """A row: what is said of a method's difference to `against`, and the measure that decides.

    claim: the paper's claim by number, or `HARM`; where: split or benchmark; more: whether the
    measure is to rise, None: it is to stay.
    """

    claim: str
    says: str
    where: str
    metric: str
    more: bool | None
    against: str = "base"
    method: str = METHOD


def deciding(name: str) -> tuple[str, str | None, bool]:
    """The entry of `BENCHMARKS`; those that a judge scores are decided by their first metric."""
    return BENCHMARKS.get(name) or (next(iter(benchmarks.described(name))), None, False)


def measured(study: str) -> "DataFrame":
    """The results of a study. What noise does to P(prior's answer) is left out where the prior's
    answers are those that the model gave at the last step: it rises by construction. So are slopes
    and effects over several worlds, which are no differences between models."""
    frame = results.of_study(study)
    frame = frame[~frame["notebook"].isin([w.notebook for w in Worlds.__subclasses__()])]
    # The claim is about noise; notebook 1 may look at other ways of weakening too.
    frame = frame[(frame["notebook"] != PROBE) | (frame["category"] == "noise")]
    if not (frame["notebook"] == PROBE).any():
        return frame
    if probe.knows_prior(stages.read_manifest(stages.stage_folder(study, PROBE))):
        return frame
    return frame[(frame["notebook"] != PROBE) | (frame["metric"] != "p_prior")
                 | (frame["against"] == "")]


def stated(frame: "DataFrame") -> Iterator[Claim]:
    """Every row but the fourth claim's, which counts tasks. Benchmarks and further splits have
    rows where the frame has them."""
    probed = frame.query("notebook == @PROBE and against != ''")
    last, first = ([*probed[c], ""][0] for c in ("split_or_benchmark", "against"))
    yield Claim("1", "Noise lowers P(true answer)", last, "p_true", False, first, "base")
    yield Claim("1", "Noise raises P(prior's answer)", last, "p_prior", True, first, "base")

    main, scored, others = _places(frame)
    spoken = [(main, "chair_i")] + [(n, deciding(n)[0]) for n in scored if deciding(n)[2]]
    colours = [("Raises P(true answer)", main, "p_true", True),
               ("Lowers P(prior's answer)", main, "p_prior", False)]
    for where, metric in spoken:
        yield Claim("2", "Hallucinates less", where, metric, False)
        yield Claim("2", "Says as much", where, "cover", True)
    for says, *measure in colours:
        yield Claim("2", says, *measure)
    yield Claim("2", "Gains more than sharpening", main, "p_true", True,
                SHARPENED)

    has = set(zip(frame["split_or_benchmark"], frame["metric"], strict=True))
    where, metric = next((x for x in spoken if x in has), spoken[0])
    for method, control in (*((METHOD, c) for c in CONTROLS), (WEAKENED, matched(WEAKENED))):
        yield Claim("3", "Hallucinates less", where, metric, False, control, method)
        for says, *measure in colours:
            yield Claim("3", says, *measure, control, method)

    yield Claim("5", "Answers are visibly better", main, "wins", True)

    for metric in ("pope_adversarial", "pope_random"):
        yield Claim(HARM, "Yes and no are no worse", main, metric, True)
    for split in others:
        for says, metric, more in (("Hallucinates no more", "chair_i", False),
                                   ("Says as much", "cover", True),
                                   ("Colours are no worse", "colour_accuracy", True)):
            yield Claim(HARM, says, split, metric, more)
    for name in scored:
        decides, _, spoken_of = deciding(name)
        if not spoken_of:
            yield Claim(HARM, "Scores no worse", name, decides, True)
    yield Claim(HARM, "P(yes) is as honest", "pope", "brier", False)
    yield Claim(HARM, "Captions keep their length", main, "words", None)


def decided(frame: "DataFrame") -> "DataFrame":
    """A row a claim: {claim, says, method, against, decides, n, difference, verdict, p}, of one
    study's results or of means over seeds. n: what the difference is out of; difference: as text;
    p: its own; NaN without one."""
    from pandas import DataFrame

    rows = frame.dropna(subset="value")
    found = dict(zip(zip(rows["split_or_benchmark"], rows["method"], rows["against"],
                         rows["metric"], strict=True), results.estimates(rows), strict=True))
    table = []
    for c in stated(frame):
        estimate = found.get((c.where, c.method, c.against, c.metric)) if c.against else None
        table.append([c.claim, c.says, c.method, c.against or "–", label(c.where, c.metric),
                      estimate and estimate.n, estimate.text(sign="+") if estimate else "–",
                      verdict(estimate, c.more), estimate and estimate.p])
    table.append(_passes(frame, found))
    return DataFrame(table, columns=COLUMNS).sort_values(
        "claim", kind="stable", ignore_index=True)


def table(study: str) -> "DataFrame":
    """`decided` of a study, with rows that say so of what was not measured."""
    return decided(measured(study))


def verdict(estimate: Estimate | None, more: bool | None) -> str:
    """What the interval of a difference says of a claim that it lies above zero (more), below, or,
    None, at it."""
    if estimate is None:
        return UNMEASURED
    word = replace(estimate, more_is_better=bool(more)).reading()
    if more is None and word != OPEN:
        return FAILS
    return {BETTER: HOLDS, WORSE: FAILS}.get(word, word)


def matched(method: str) -> str:
    """The SFT that has a method's own positives, by name."""
    return method.replace(METHOD, "sft_matched", 1)


def ruler(frame: "DataFrame") -> str:
    """Whether training on pairs whose sides are swapped moves the measures the other way: where it
    does not, they may be too blunt to show anything. "" where it was not trained."""
    main, swapped = comparison.main_split(frame), METHOD + "_reversed"
    rows = frame[(frame["split_or_benchmark"] == main) & (frame["method"] == swapped)
                 & (frame["against"] == "base") & frame["metric"].isin(("chair_i", "p_true"))]
    if rows.empty:
        return ""
    estimates = results.estimates(rows)
    moved = all(e.reading() == WORSE for e in estimates)
    texts = ", ".join(f"{label('', metric)} {e.text(sign='+')}"
                      for metric, e in zip(rows["metric"], estimates, strict=True))
    return (f"{swapped}, trained on the same pairs with their sides swapped, "
            f"{'moves' if moved else 'does not move'} the measures the other way ({texts}, minus "
            "base): " + ("they can show what such training does." if moved else
                         f"they may be too blunt, so read no \"{OPEN}\" as no difference."))


def _places(frame: "DataFrame") -> tuple[str, list[str], list[str]]:
    """The main split, the benchmarks that were scored, the other splits."""
    main = comparison.main_split(frame)
    scored = frame.query("notebook == @BENCHMARK")["split_or_benchmark"].unique()
    splits = frame.query("notebook == @COMPARISON")["split_or_benchmark"].unique()
    return main, [n for n in scored if n in benchmarks.KNOWN], [s for s in splits if s != main]


def _passes(frame: "DataFrame", found: dict[tuple[str, ...], Estimate]) -> list[Any]:
    """The row of claim 4: on how many tasks the method is better than an untuned larger model."""
    main, scored, _ = _places(frame)
    tasks = [*((main, metric) for metric in TASKS),
             *((n, deciding(n)[0]) for n in scored)]
    readings = [found[key].reading() for where, metric in tasks
                if (key := (where, METHOD, RIVAL, metric)) in found]
    better, worse, of = readings.count(BETTER), readings.count(WORSE), len(readings)
    word = (UNMEASURED if not of else HOLDS if 2 * better > of else FAILS if 2 * worse >= of
            else OPEN)
    return ["4", "Passes an untuned model of twice the size", METHOD, RIVAL, "tasks won", None,
            f"better on {better}, worse on {worse} of {of} tasks" if of else "–", word, None]


def label(where: str, metric: str) -> str:
    """What decides, on a page; where "": the metric alone."""
    words = {"wins": "wins − losses", "words": "length in words"}
    return (f"{benchmarks.title(where)}: " if where else "") + (
        words.get(metric) or benchmarks.label(where, metric))


def looks(claims: "DataFrame") -> str:
    """How much was looked at, in a sentence with the names of what survives Holm's correction at
    0.05, which is over the differences that decide; they were named beforehand."""
    tested = claims.dropna(subset="p")
    survive = [f"{row.decides} of {row.method} against {row.against}"
               for row, p in zip(tested.itertuples(), results.holm(tested["p"].tolist()),
                                 strict=True) if p <= 0.05]
    sure = tested["verdict"].isin([HOLDS, FAILS]).sum()
    return (f"{len(tested)} differences decide a row, {sure} of their intervals exclude zero, and "
            f"{len(survive)} survive Holm's correction at 0.05"
            + (f": {'; '.join(survive)}" if survive else ""))
