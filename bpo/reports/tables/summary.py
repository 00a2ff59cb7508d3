"""Several seeds of a study, and two studies: figures and tables of notebook 7."""

import math
from collections.abc import Iterable, Sequence

from pandas import DataFrame, notna

from bpo.evaluation import benchmarks, claims, comparison, replication
from bpo.params import Refusal, Replication
from bpo.reports import figures
from bpo.reports import page as report
from bpo.reports.cards import Shown
from bpo.study import results
from bpo.study.results import OPEN
from bpo.study.text import as_text, number, signed

STEPS = ("p_true", "p_prior", "chair_i")  # metrics of the steps from base to method


def forests(frame: DataFrame, p: Replication) -> list[Shown]:
    """A figure a baseline: bpo minus it by seed and over seeds, of `p.metrics` on the main split.
    """
    where, shown = comparison.main_split(frame), []
    for baseline in p.baselines:
        panels = {benchmarks.label(where, metric): replication.seed_rows(
            frame, metric, where=where, against=baseline) for metric in p.metrics}
        shown.append(report.figure(
            figures.differences(panels, columns=3),
            alt=f"bpo minus {baseline} by seed, with the mean",
            caption=f"bpo minus {baseline}, {where} images; a row a seed, then the mean over seeds."
        ))
    return shown


def claims_table(verdicts: DataFrame) -> DataFrame:
    """Claims of one study, or `replication.claims_over`'s, for a page: what is compared in one
    column, the signs of all seeds in one, in the seeds' order, and n with what decides."""
    signs = [c for c in verdicts if c.isdigit()]
    table = verdicts.assign(compared=results.names(verdicts))
    if signs:
        table = table.rename(columns={"difference": "mean", "verdict": "over seeds"}).assign(
            seeds=verdicts[signs].agg("".join, axis=1))
    if "n" in table:
        table["decides"] += [f", n={n:,.0f}" if notna(n) else "" for n in table.pop("n")]
    first = [c for c in ("claim", "says", "compared", "decides", "seeds") if c in table]
    return table[[*first, *table.columns.drop([*first, "method", "against", *signs])]]


QUESTION = "Does BPO make the model look at the picture?"
# What a claim says -> in a sentence where it holds, where the contrary does, where neither is seen
WORDS = {"Raises P(true answer)": ("raises the true answer's probability",
                                   "lowers the true answer's probability", "the true answer"),
         "Lowers P(prior's answer)": ("lowers that of the usual, wrong answer",
                                      "raises that of the usual, wrong answer", "the usual answer"),
         "Hallucinates less": ("names fewer objects that are not there",
                               "names more objects that are not there", "objects not there"),
         "Says as much": ("names more of the objects", "names fewer of the objects",
                          "objects named")}
LOOKS = [says for says in WORDS if says != "Says as much"]  # what looking at the picture would do


def on_main(decided: DataFrame, main: str) -> DataFrame:
    """The rows of `claims.decided` or `replication.claims_over` that an index shows: measured, of
    the untuned model, of the method's own matched SFT, and of harm; of claim 2 and 3 those of the
    main split, where it decides any."""
    signs = [c for c in decided if c.isdigit()]
    seen = (decided[signs] != claims.SIGNS[claims.UNMEASURED]).any(axis=1) if signs else (
        decided["verdict"] != claims.UNMEASURED)
    rows = decided[seen & ~((decided["claim"] == "3") & (
        decided["against"] != decided["method"].map(claims.matched)))]
    compared, there = rows["claim"].isin(("2", "3")), rows["decides"].str.startswith(f"{main}: ")
    rows = rows[~compared | there] if (compared & there).any() else rows
    return rows.assign(decides=rows["decides"].str.removeprefix(f"{main}: "))


def answer(decided: DataFrame) -> tuple[str, str]:
    """Whether BPO makes the model look, in a few words, and the sentence that says why; ("", "")
    where nothing was compared. decided: `on_main` of one study's verdicts or of those over seeds.
    """
    base = decided[(decided["method"] == claims.METHOD) & (decided["claim"] == "2")
                   & decided["says"].isin(list(WORDS))]
    look = base.loc[base["says"].isin(LOOKS), "verdict"]
    if look.empty:
        return "", ""
    holds, fails = (look == claims.HOLDS).any(), (look == claims.FAILS).any()
    harm = decided[(decided["claim"] == claims.HARM) & (decided["verdict"] == claims.FAILS)
                   & (decided["decides"] != claims.label("", "words"))]  # shorter is not worse
    word = ("Mixed" if holds and fails else "Yes" if (look == claims.HOLDS).all()
            else "Partly" if holds else "No" if fails else "No difference seen")
    own = decided[(decided["method"] == claims.METHOD) & (decided["claim"] == "3")]
    parts = [f"Against the untuned model BPO {_told(base)}."]
    both = base[["says", "verdict"]].merge(own[["says", "verdict"]], on="says")
    if len(both) and (both["verdict_x"] == both["verdict_y"]).all():
        same = _listed([WORDS[says][2] for says in WORDS if says in set(both["says"])])
        parts.append(f"{CONTRAST}, the same is seen in {same}.")
    elif len(own):
        parts.append(f"{CONTRAST}, it {_told(own)}.")
    if len(harm):
        parts.append(f"Worse than before: {_listed(harm['decides'])}.")
    word += ", at a price" if holds and len(harm) else ""
    contrast = own.loc[own["says"].isin(LOOKS), "verdict"]
    if holds and len(contrast) and not (contrast == claims.HOLDS).any():
        word += f", {'and' if len(harm) else 'but'} no more than SFT"
    return word, " ".join(parts)


def _told(rows: DataFrame) -> str:
    """"makes the true answer likelier; no difference is seen in objects not there"."""
    by_verdict = {v: [says for says in WORDS if says in set(
        rows.loc[rows["verdict"] == v, "says"])] for v in (claims.HOLDS, claims.FAILS, OPEN)}
    told = [WORDS[says][place] for place, v in enumerate((claims.HOLDS, claims.FAILS))
            for says in by_verdict[v]]
    if unseen := [WORDS[says][2] for says in by_verdict[OPEN]]:
        told.append(f"shows no difference in {_listed(unseen)}")
    return _listed(told)


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


CONTRAST = "Against SFT on the same positives, which leaves the contrast alone"
GROUPS = {"1": "1 · Noise brings out the prior", "2": "2 · {method} against the untuned model",
          "3": "3 · {method} against {against}: SFT on its own positives",
          "4": "4 · Against an untuned model of twice the size", "5": "5 · Visibly better answers",
          claims.HARM: "Harm · {method} against the untuned model"}
TERMS = ("CHAIRi: share of the named objects that are not there. cover: share of the objects that "
         "are named. P(prior's answer): probability of what is usual. POPE: yes/no questions about "
         "objects. Positives: the chosen answers.")
MEANING = {"+": "holds", "o": "no difference seen", "−": "does not hold", "·": "not measured"}
KINDS = {"+": "holds", "o": "open", "−": "fails", "·": "open"}  # classes of the signs


def matrix(decided: DataFrame) -> Shown:
    """Claims by seeds: a row a claim, a sign a seed and one over seeds; of a single study its sign
    and its difference. decided: `on_main`'s."""
    seeds = [c for c in decided if c.isdigit()]
    heads = [*seeds, "all"] if seeds else ["", "difference"]
    body, before = "", ""
    for row in decided.to_dict("records"):
        group = GROUPS[row["claim"]].format(**row)
        if group != before:
            body += (f'<tr class="group"><th scope="colgroup" colspan="{1 + len(heads)}">'
                     f"{as_text(group)}</th></tr>")
            before = group
        cells = "".join(f'<td class="sign {KINDS[sign]}">{sign}</td>' for sign in (
            *(row[seed] for seed in seeds), claims.SIGNS[row["verdict"]]))
        cells += "" if seeds else f'<td class="difference">{as_text(row["difference"])}</td>'
        decides = ": ".join(x for x in row["decides"].split(": ") if x not in row["says"])
        body += (f'<tr><th scope="row">{as_text(row["says"])} '
                 f'<span class="note">{as_text(decides)}</span></th>{cells}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' if name else "<td></td>" for name in heads)
    legend = ", ".join(f"{sign} {text}" for sign, text in MEANING.items())
    if seeds:
        legend += f"; seeds {seeds[0]} to {seeds[-1]}, then all"
    return Shown(f'<table class="claims{" many" * bool(seeds)}"><caption>{legend}</caption><thead>'
                 f'<tr><th scope="col">claim</th>{head}</tr></thead><tbody>{body}</tbody></table>'
                 f'<p class="note">{as_text(TERMS)}</p>', kind="matrix",
                 plain="\n".join(f"{r['says']}, {r['decides']}, {r['method']} − {r['against']}: "
                                 f"{''.join(r[s] for s in seeds)} {r['verdict']}"
                                 for r in decided.to_dict("records")))


def headline(mean: DataFrame, seeds: int) -> Shown:
    """What changed over seeds against the untuned model and against bpo's own matched SFT."""
    main = comparison.main_split(mean)
    measures = [(main, metric) for metric in ("chair_i", "cover", *STEPS[:2])]
    parts = [f"{claims.METHOD} − {against}: {changes}"
             for against in ("base", claims.matched(claims.METHOD))
             if (changes := in_words(mean, measures, claims.METHOD, against, brief=True))]
    if mean["low"].isna().all() or not parts:
        return report.say("{n} seeds are too few for an interval, or measured no claim.", n=seeds)
    return report.say("Over {n} seeds, {t}.", n=seeds, t=". ".join(parts))


def steps(frame: DataFrame) -> DataFrame:
    """From base to method in three steps, for the methods whose matched SFT was trained: a row a
    step with levels and their changes, {step, METRIC, METRIC, change}, and, beside P(true answer),
    what lies above the base that is as certain (`claims.SHARPENED`), where that was measured.

    frame: of one study, or `replication.over_seeds`'s.
    """
    main = comparison.main_split(frame)
    rows = frame[(frame["split_or_benchmark"] == main) & frame["metric"].isin(STEPS)]
    texts = {(r.method, r.against, r.metric): e.text(sign="+") if r.against else number(e.value)
             for r, e in zip(rows.itertuples(), results.estimates(rows), strict=True)}
    chain = [("base", "base", ""), ("fresh positives", "sft", "base")]
    for method in (claims.METHOD, claims.WEAKENED):
        own = claims.matched(method)
        if (method, own, STEPS[0]) in texts:
            chain += [("its own rows", own, "sft"), ("contrast", method, own)]
    certain = any((against, of) == (claims.SHARPENED, STEPS[0]) for _, against, of in texts)
    table = []
    for step, name, before in chain if len(chain) > 2 else ():
        row = {"step": f"{step}: {name}" if before else step}
        for metric in STEPS:
            label = benchmarks.label(main, metric)
            row[label] = texts.get((name, "", metric), "–")
            row[f"{label}, change"] = texts.get((name, before, metric), "–") if before else "–"
            if certain and metric == STEPS[0]:
                row["above the base as certain"] = texts.get((name, claims.SHARPENED, metric), "–")
        table.append(row)
    return DataFrame(table)


def steps_table(frame: DataFrame, intervals: str) -> Shown:
    """`steps` on a page, or why there is none."""
    table = steps(frame)
    if table.empty:
        return report.say("No method was trained beside sft and its own matched SFT, so the steps "
                          "from base to method are not known.")
    return report.table(table, "From base to method in three steps",
                        f"{comparison.main_split(frame)} images; a change is against the row "
                        "above, of its own rows against sft; the base as certain: at the "
                        "temperature that makes it as sure as the method, which is mere "
                        f"sharpening; {intervals}")


def power(frame: DataFrame, p: Replication) -> DataFrame:
    """How many seeds `p.difference` needs, a row a metric and baseline: {metric, against, seeds,
    between seeds, of it images, power now, seeds for power .8 with 1, 2, 4 times the images}.

    Raises Refusal where fewer seeds than `replication.FEWEST` have a metric, or none was measured.
    """
    where, table = comparison.main_split(frame), []
    for metric in p.metrics:
        for against in p.baselines:
            if frame.query("metric == @metric and against == @against").empty:
                continue
            s = replication.spread(frame, metric, against=against, where=where)
            row = {"metric": benchmarks.label(where, metric), "against": against,
                   "seeds": s["seeds"], "mean": signed(s["mean"]),
                   "between seeds": f"{s['total']:.4f}", "of images": f"{s['image']:.4f}"}
            for times in (1, 2, 4):
                spread = math.sqrt(s["seed"] ** 2 + s["image"] ** 2 / times)
                if times == 1:
                    row["power now"] = f"{replication.power(p.difference, spread, s['seeds']):.2f}"
                needed = replication.seeds_needed(p.difference, spread)
                row[f"seeds, images × {times}"] = needed or f"over {replication.MOST}"
            table.append(row)
    if not table:
        raise Refusal(f"no seed of {p.study} compares {', '.join(p.metrics)} with "
                      f"{', '.join(p.baselines)}; name metrics and baselines that it has")
    return DataFrame(table)


def power_table(frame: DataFrame, p: Replication) -> Shown:
    """`power` on a page, or why there is none."""
    try:
        table = power(frame, p)
    except Refusal as refusal:
        return report.say("{r}.", r=refusal)
    return report.table(
        table, f"Seeds that a true difference of {p.difference:g} needs for a power of 0.8",
        "two-sided paired t test over seeds at 5 %; between seeds: standard deviation of the "
        "difference; of images: the part of it that more images make smaller")


def two_studies(p: Replication) -> list[Shown]:
    """What the study and the other did differently and what came out, where another was named."""
    if not p.other:
        return [report.say("No second study was named: set other, or run python -m bpo compare {s} "
                           "OTHER.", s=p.study)]
    shared, apart = replication.side_by_side(p.study, p.other, baselines=p.baselines)
    return [report.table(replication.settings_that_differ(p.study, p.other),
                         f"What {p.study} and {p.other} did differently"),
            report.table(shared, "Base and bpo in both studies",
                         f"the intervals of {apart} of {len(shared)} numbers do not meet")]


def in_words(mean: DataFrame, measures: Sequence[tuple[str, str]], method: str, against: str, *,
             brief: bool = False) -> str:
    """"CHAIRi falls (−0.012 [−0.023, −0.002]); no difference seen in cover (...)"; brief: without
    the numbers of what shows no difference; "" where nothing was measured."""
    rows = mean[(mean["method"] == method) & (mean["against"] == against)]
    sure, unseen = [], []
    for where, metric in measures:
        row = rows[(rows["split_or_benchmark"] == where) & (rows["metric"] == metric)]
        if row.empty:
            continue
        e, = results.estimates(row)
        alone = where == comparison.main_split(mean) or method == "base"
        label = claims.label("" if alone else where, metric)
        if e.excludes_zero():
            sure.append(f"{label} {'rises' if e.low > 0 else 'falls'} ({e.text(sign='+')})")
        else:
            unseen.append(label if brief else f"{label} ({e.text(sign='+')})")
    if unseen:
        sure.append(f"no difference seen in {', '.join(unseen)}")
    return "; ".join(sure)
