"""What finished benchmarks allow to say: tables, figures and sentences of notebook 5, from its
results.csv and answers.
"""

from collections import Counter

from pandas import DataFrame, concat

from bpo.evaluation import benchmarks, claims, diagnostics, judged
from bpo.evaluation.judged import Judged
from bpo.params import Benchmarks
from bpo.reports import figures
from bpo.reports import page as report
from bpo.reports.cards import Shown
from bpo.reports.tables import score_tables, summary
from bpo.study import results
from bpo.study import stage as stages
from bpo.study.results import BETTER, DECIDED, OPEN, WORSE
from bpo.study.text import signed

LEAST = 50  # questions that a share in the figure of P(yes) needs


def settings(p: Benchmarks, result: stages.Result) -> DataFrame:
    """A row a benchmark: its questions, how answers were decoded, and who scored them."""
    rows = []
    for name, benchmark in benchmarks.chosen(p).items():
        how = result.metrics["settings"][name]
        scored = "not scored: no judge" if isinstance(benchmark, Judged) else "rules"
        if judge := how.get("judge"):
            scored = (f"judge {judge['judge']}, prompt {judge['prompt_sha256'][:8]}, temperature "
                      f"{judge['temperature']:g}, replies {judge['repeats']}")
            unscored = sum(map(Counter, judge["unscored"].values()), Counter())
            answers = how["questions"] * len(judge["unscored"])
            scored += f"; unscored answers: {unscored.total()} of {answers}"
            scored += "".join(f", {why}: {n}" for why, n in sorted(unscored.items()))
            scored += (f"; raw replies, by question and method: {benchmarks.REPLIES}/"
                       f"{judged.REPLIES} beside the studies")
        decoding = f"sampled at {how['temperature']:g}, top-p {how['top_p']:g}"
        rows.append({"benchmark": benchmark.title, "questions": how["questions"],
                     "images": how["images"],
                     "decoding": f"{decoding if how['temperature'] else 'greedy'}, up to "
                                 f"{how['max_new_tokens']} tokens",
                     "scored by": scored, "licence": benchmark.licence})
    return DataFrame(rows)


def few(frame: DataFrame) -> list[str]:
    """The methods that a figure can hold: base, the control and the page's own."""
    return list(dict.fromkeys(
        ("base", score_tables.control(frame), score_tables.main_method(frame))))


# --- scores -------------------------------------------------------------------------------------

def deciding(frame: DataFrame) -> DataFrame:
    """The rows, with the column name, of the measures that were named beforehand: what decides
    each benchmark, and what may not be lost with it."""
    named = [(n, m) for n in frame["split_or_benchmark"].unique() if n in benchmarks.KNOWN
             for m in claims.deciding(n)[:2] if m]
    return DataFrame([(*key, claims.label(*key)) for key in named],
                     columns=["split_or_benchmark", "metric", "name"]).merge(
        frame.dropna(subset="value"), on=["split_or_benchmark", "metric"])


def differences(frame: DataFrame, against: str) -> DataFrame:
    """The page's method minus a baseline, of what has a better and a worse; p_holm: over these
    rows."""
    rows = score_tables.differences(frame).query("against == @against and reading != ''")
    return rows.assign(p_holm=results.holm(rows["p"].tolist()))


HOLM = "*: still when all measures are looked at together (Holm, 5 %)"


def reading(frame: DataFrame, against: str) -> str:
    """In which deciding measures the page's method is better or worse, each by its own interval;
    a star: `HOLM`."""
    rows = differences(deciding(frame), against)
    if rows.empty:
        return "nothing was scored"
    rows = rows.assign(label=rows["label"] + (rows["p_holm"] < 0.05).map({True: "*", False: ""}))
    parts = []
    for kind in DECIDED:
        names = [f"{title} ({', '.join(of['label'])})" for title, of in
                 rows[rows["reading"] == kind].groupby("title", sort=False)]
        parts += [f"{kind} in {', '.join(names)}"] if names else []
    if unseen := (rows["reading"] == OPEN).sum():
        parts.append(f"{OPEN} in {unseen} of {len(rows)} measures")
    return "; ".join(parts)


def scores(frame: DataFrame) -> list[Shown]:
    """What the measures named beforehand say of the page's method: words, a figure, levels."""
    rows, method = deciding(frame), score_tables.main_method(frame)
    panels = {b: of for b in few(frame) if len(of := differences(rows, b))}
    if not panels:
        return [report.say("Nothing was scored.")]
    out_of = {r.name: f"{r.name}, n={r.n:,.0f}" for of in panels.values() for r in of.itertuples()}
    level = rows[(rows["against"] == "") & rows["method"].isin(few(frame))].assign(
        text=lambda x: list(map(short, x["value"])))
    return [
        report.say("{r}.", r=". ".join(f"{method} against {b}: {reading(frame, b)}"
                                       for b in panels)),
        report.figure(
            figures.differences({f"{method} − {b}": of.assign(label=of["name"].map(out_of))
                                 for b, of in panels.items()}),
            alt=f"Differences of {method} to {' and '.join(panels)}",
            caption="What decides each benchmark and may not be lost with it, named beforehand; "
                    f"filled: zero is excluded; {score_tables.PAIRED}. {HOLM}."),
        report.table(level.pivot(index="method", columns="name", values="text").reindex(
            index=few(frame), columns=level["name"].unique()).reset_index(),
            "The same measures, in per cent to the digits that so few questions measure")]


def short(value: float) -> str:
    """A level to as many digits as a few hundred questions measure."""
    return f"{value:.0%}".replace("%", " %") if abs(value) <= 1 else f"{value:.2f}"


def all_differences(frame: DataFrame) -> list[Shown]:
    """A table a baseline: every difference of the page's method that has a better and a worse."""
    out = []
    for against in score_tables.baselines(frame):
        rows = differences(frame.query("category == 'all'"), against)
        if len(rows):
            out.append(report.table(DataFrame({
                "benchmark": rows["title"], "metric": rows["label"],
                "difference": results.texts(rows), "p": rows["p"].map("{:.4f}".format),
                "p, Holm": rows["p_holm"].map("{:.4f}".format)}).reset_index(drop=True),
                f"{score_tables.main_method(frame)} minus {against}",
                f"{score_tables.PAIRED}; better or worse: zero is excluded; p is two-sided, from "
                "the same bootstrap; p, Holm: with all rows of the table looked at together"))
    return out


def by_place(p: Benchmarks, result: stages.Result, frame: DataFrame) -> list[Shown]:
    """Wrong objects by their place in CHAIR's captions, where that was asked."""
    if "chair" not in p.folders:
        return []
    places = benchmarks.by_place(p, result, "chair", few(frame))
    fig = figures.bands(
        {"": {m: (c["place"], c["value"], c["low"], c["high"])
              for m, c in places.groupby("method", sort=False)}},
        xlabel="place of the object in its caption", ylabel="share that is not in the image")
    fig.axes[0].locator_params(axis="x", integer=True)
    return [report.figure(
        fig, alt="Wrong objects by place in the caption",
        caption="CHAIR's captions: share of wrong ones among the objects named first, second, ...; "
                f"{score_tables.INTERVALS}, places with {benchmarks.FEWEST} captions or more. What "
                "is named late is wrong more often: a longer caption has a higher rate without "
                "being less careful.")]


def says_yes(result: stages.Result, frame: DataFrame) -> list[Shown]:
    """How often each method says yes, beside how often that is true."""
    parts = []
    for name, rows in frame.query("metric == 'yes_ratio' and against == ''").groupby(
            "split_or_benchmark", sort=False):
        labels = [x["label"] for x in benchmarks.answers(result, name) if x["p_yes"]]
        shares = rows.set_index("method")["value"]
        parts.append(f"{benchmarks.title(name)} ({len(labels)} questions, yes is true of "
                     f"{short(labels.count('yes') / len(labels))}): "
                     + ", ".join(f"{m} {short(shares[m])}" for m in few(frame)))
    return [report.say(
        "**How often a model says yes**: {p}. Precision, recall and F1 follow from that, in AMBER, "
        "which counts no as positive, the other way round: alone none of them is better or worse.",
        p="; ".join(parts))
        ] if parts else []


def yes_and_no(result: stages.Result, frame: DataFrame) -> list[Shown]:
    """How yes/no answers were read, and how many of the base turn round where nothing but their
    decoding differs; a table where the official script reads some otherwise."""
    rows, method, out = frame.query("category == 'reading'"), score_tables.main_method(frame), []
    for name, ways in result.metrics["noise_floor"].items():
        mine = rows.query("split_or_benchmark == @name")
        level = mine.query("against == ''").set_index(["metric", "method"])["value"]
        flips = ", ".join(f"{n['flips']} of {n['questions']} in {way}" for way, n in ways.items())
        other = level["read_otherwise"].max()
        out.append(report.say(
            "{b}: answers of one word are {x} of the base's and {y} of {m}'s; the official script "
            "reads up to {o} of a method's otherwise. Asked again, the base's answers that turn "
            "round: {f}; a difference of so few says nothing.", b=benchmarks.title(name),
            x=short(level["bare", "base"]), y=short(level["bare", method]), m=method,
            o=short(other), f=flips))
        out += score_tables.level_tables(mine) if other else []
    return out


def calibrations(result: stages.Result, frame: DataFrame) -> list[Shown]:
    """A table and a figure a benchmark of yes/no questions."""
    out = []
    for name, rows in score_tables.levels(frame.query("category == 'calibration'")).groupby(
            "split_or_benchmark", sort=False):
        title = benchmarks.title(name)
        values = result.metrics["calibration"][name]["values"]
        bins = {m: kept for m in few(frame)
                if (kept := [b for b in values[m]["bins"] if b["n"] >= LEAST])}
        out.append(report.table(score_tables.pivoted(rows, "method", "label"),
                                f"{title}: can P(yes) be believed?", score_tables.INTERVALS))
        if bins:
            out.append(report.figure(
                figures.reliability(bins), alt=f"Reliability, {title}",
                caption=f"{title}: of the questions with a P(yes) near some value, that share "
                        f"should be truly yes. Of ten bins those with {LEAST} questions or more."))
    return out


# --- what the image does ------------------------------------------------------------------------

def image_gains(frame: DataFrame) -> list[Shown]:
    """How tuning moves the annotated answers' log-probability with the right and with a wrong
    image, by kind of token: words and a figure; nothing where no answers were weighed."""
    method = score_tables.main_method(frame)
    rows = frame.query("split_or_benchmark == 'image' and against == 'base' and "
                       f"method in {(method, score_tables.control(frame))}")
    rows = rows.join(rows["metric"].str.extract(
        rf"^(?P<view>right|swapped)_(?P<kind>{'|'.join(diagnostics.KINDS)})$")).dropna(
            subset=["kind", "value"])
    if rows.empty:
        return []
    rows = rows.assign(
        many=-rows.groupby("category")["kind"].transform("nunique"),
        label=[f"{r.category}, n={r.n:.0f}: {diagnostics.KINDS[r.kind]}"
               for r in rows.itertuples()]).sort_values(["many", "category"], kind="stable")
    moved = set(rows.loc[rows["value"].abs() >= 0.005, "label"])
    mine = rows.query("method == @method")
    right = mine[(mine["view"] == "right") & mine["more_is_better"].notna()]
    sure = {word: [f"{diagnostics.KINDS[r['kind']]} in {r['category']} answers ({e.text(2, '+')})"
                   for r, e in zip(right.to_dict("records"), results.estimates(right), strict=True)
                   if e.reading() == way]
            for word, way in (("likelier", BETTER), ("less likely", WORSE), (OPEN, OPEN))}
    wrong = {c: of.set_index("kind")["value"] for c, of in mine.query("view == 'swapped'").groupby(
        "category", sort=False)}
    parts = [f"{category} answers {signed(of.sum(), 1)}"
             + (f", {signed(of['stop'], 1)} of it in comma, stop and end"
                if abs(of.get("stop", 0)) >= 0.05 else "") for category, of in wrong.items()]
    return [report.say(
        "{m} minus base, nats an answer. **With the right image** {s}. **With a wrong image** {w}.",
        m=method, w="; ".join(parts), s="; ".join(
            f"{word}: {', '.join(what)}" for word, what in sure.items() if what) or "–"),
        report.figure(
            figures.two_views(rows[rows["label"].isin(moved)],
                              {"right": "right image", "swapped": "wrong image"},
                              "nats an answer, minus base"),
            alt="Change of the annotated answers' log-probability by kind of token",
            caption=f"Annotated answers, minus base; {score_tables.PAIRED}. With the right image, "
                    "right is better for colours and objects; a fall with a wrong one can be mere "
                    "certainty. The two axes differ.")]


# --- claims -------------------------------------------------------------------------------------

def claimed(verdicts: DataFrame, main: str) -> list[Shown]:
    """Claims of one study: how many hold, a row each that was measured, claims 2 and 3 on the main
    split, where it decides any, and against the sharpest control; folded, all rows with p."""
    kinds, compared = verdicts["verdict"].value_counts(), verdicts["claim"].isin(("2", "3"))
    measured = verdicts["verdict"] != claims.UNMEASURED
    harm = verdicts[(verdicts["claim"] == claims.HARM) & (verdicts["verdict"] == claims.FAILS)]
    sharpest = next((c for c in claims.CONTROLS if c in set(verdicts.loc[measured, "against"])), "")
    there = verdicts["decides"].str.startswith(f"{main}: ")
    shown = measured & ~verdicts["against"].isin(set(claims.CONTROLS) - {sharpest})
    if (compared & there & measured).any():
        shown &= there | ~compared
    table = summary.claims_table(verdicts)
    where = table["decides"].str.extract("^(?:(.*?): )?(.*)$")
    rows = table.assign(
        group=table["claim"] + " · " + table["compared"] + (", " + where[0]).fillna(""),
        decides=where[1])[shown].groupby("group", sort=False)
    rows = concat([of for _, of in rows], ignore_index=True)
    return [
        report.say("Of {n} rows **{h} hold**, {f} do not; {o} in {k}; not measured: {u}. Harm is "
                   "seen in **{harm}**.", n=len(verdicts), h=kinds.get(claims.HOLDS, 0),
                   f=kinds.get(claims.FAILS, 0), o=OPEN, k=kinds.get(OPEN, 0),
                   u=kinds.get(claims.UNMEASURED, 0), harm="; ".join(harm["decides"]) or "no row"),
        report.table(rows[["says", "decides", "difference", "verdict"]],
                     "The paper's claims and this study", groups=rows["group"]),
        report.folded("All rows: benchmarks, weaker controls, p, and how a row is decided",
                      report.table(table, "Every row", claims.RULE),
                      report.say("{t}.", t=claims.looks(verdicts)))]
