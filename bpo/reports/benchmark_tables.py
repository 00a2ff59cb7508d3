"""What finished benchmarks allow to say: tables, figures and sentences of notebook 5, from its
results.csv and answers.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from pandas import DataFrame

from bpo.evaluation import benchmarks, diagnostics, judged
from bpo.evaluation.judged import Judged
from bpo.params import Benchmarks
from bpo.reports import figures, tables
from bpo.reports import page as report
from bpo.reports.cards import Shown
from bpo.reports.figures import COLOURS, QUIET, WIDTH
from bpo.study import results
from bpo.study import stage as stages
from bpo.study.results import DECIDED
from bpo.study.text import visible

# Hallucination by benchmark; it is to be read beside cover.
TRADE = {"chair": ["chair_s", "chair_i"], "object-halbench": ["response", "mention"],
         "amber": ["chair", "hal"]}


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
    return list(dict.fromkeys(("base", tables.control(frame), tables.main_method(frame))))


def trade_offs(frame: DataFrame) -> list[Shown]:
    """A figure a benchmark of captions: cover against hallucination of each method."""
    out = []
    for name, measures in TRADE.items():
        rows = frame.query("split_or_benchmark == @name and against == ''").dropna(subset="value")
        rows = rows.assign(label=benchmarks.labels(rows))
        # few questions, drawn, may hold none that asks for a description
        up = [m for m in measures if {m, "cover"} <= set(rows["metric"])]
        if up:
            title = benchmarks.title(name)
            out.append(report.figure(
                draw_trade_off(rows, "cover", up),
                alt=f"Hallucination against cover, {title}",
                caption=f"{title}: crosses are {tables.INTERVALS}."))
    return out


def by_place(p: Benchmarks, result: stages.Result, frame: DataFrame) -> list[Shown]:
    """Wrong objects by their place in CHAIR's captions, where that was asked."""
    if "chair" not in p.folders:
        return []
    return [report.figure(
        draw_by_place(benchmarks.by_place(p, result, "chair", few(frame))),
        alt="Wrong objects by place in the caption",
        caption="CHAIR's captions: share of wrong ones among the objects named first, second, ...; "
                f"{tables.INTERVALS}, places with {benchmarks.FEWEST} captions or more.")]


def difference_tables(frame: DataFrame) -> list[Shown]:
    """The page's method against the base and against the control: a table and a figure each."""
    method, out = tables.main_method(frame), []
    for against in dict.fromkeys(("base", tables.control(frame))):
        rows = tables.differences(frame.query("category == 'all'")).query("against == @against")
        if rows.empty:
            continue
        table = DataFrame({
            "benchmark": rows["title"], "metric": rows["label"],
            "difference": results.texts(rows), "p": rows["p"].map("{:.4f}".format),
            "p, Holm": rows["p_holm"].map("{:.4f}".format)}).reset_index(drop=True)
        out.append(report.table(table, f"{method} minus {against}",
                                f"{tables.PAIRED}; better or worse: zero is excluded"))
        # two benchmarks may have a metric of one name
        named = [r.label if r.label.startswith(r.title) else f"{r.title}: {r.label}"
                 for r in rows.itertuples()]
        out.append(report.figure(
            figures.differences({f"{method} − {against}": rows.assign(label=named)}),
            alt=f"Differences of {method} to {against}",
            caption=f"{method} minus {against}; filled where the 95 % interval excludes zero."))
    return out


def reading(frame: DataFrame, against: str) -> str:
    """How many differences are better and worse by their own interval, and which are left when all
    are looked at together."""
    rows = tables.differences(frame.query("category == 'all'")).query("against == @against")
    if rows.empty:
        return "nothing was scored"
    better, worse = ((rows["reading"] == kind).sum() for kind in DECIDED)
    left = rows[(rows["p_holm"] < 0.05) & rows["reading"].isin(DECIDED)]
    names = ", ".join(f"{r.title} {r.label} ({r.reading})" for r in left.itertuples())
    return (f"better in {better}, worse in {worse} of {len(rows)} differences; corrected for all "
            f"{len(rows)} (Holm, 5 %) there remain: {names or 'none'}")


def readings(frame: DataFrame) -> list[Shown]:
    return [report.say("{m} against {a}: {r}.", m=tables.main_method(frame), a=against,
                       r=reading(frame, against)) for against in tables.baselines(frame)]


def image_gains(frame: DataFrame) -> list[Shown]:
    """What the right image adds to an answer's log-probability, where answers were weighed; and
    whether it adds more than to the base's answers."""
    rows = frame[(frame["split_or_benchmark"] == "image") & (frame["metric"] != "right")]
    if rows.empty:
        return []
    rows = rows.assign(label=[diagnostics.GAINS[m][0] for m in rows["metric"]])
    method = tables.main_method(frame)
    gains = rows.query("method == @method and against == 'base' and metric == 'over_swapped'")
    parts = [f"{category} {gain.text(2, '+')}"
             + ("" if gain.excludes_zero() else ", cannot be told from none")
             for category, gain in zip(gains["category"], results.estimates(gains), strict=True)]
    return [report.figure(draw_image_gains(rows.query("against == ''")),
                          alt="What the right image adds to the annotated answer",
                          caption=f"By category of question; {tables.INTERVALS}."),
            report.say("Right over swapped image, {m} minus base, in nats: {r}.", m=method,
                       r="; ".join(parts) or "nothing was weighed")]


def token_gaps(p: Benchmarks, result: stages.Result, frame: DataFrame) -> list[Shown]:
    """What the clean image adds to each token of the first weighed captions, `p.gallery` of them.
    """
    lines = benchmarks.probed(result)
    captions = [line for line in lines if line["category"] == "caption"] or lines
    return [report.figure(
        draw_token_gaps(DataFrame(
            {m: diagnostics.token_gaps(line, m) for m in ("base", tables.main_method(frame))},
            index=line["tokens"])),
        alt=f"Gain from the clean image by token: {line['answer']}",
        caption=f"{line['id']}: log-probability with the clean image minus at step "
                f"{p.probe_step}.") for line in captions[:p.gallery]]


def yes_and_no(result: stages.Result, frame: DataFrame) -> list[Shown]:
    """A table a benchmark of how answers were read, how many are one word before and after, and
    how many answers of the base turn round where nothing but their decoding differs."""
    rows = frame.query("category == 'reading'")
    out = tables.level_tables(rows)
    method = tables.main_method(frame)
    for name, ways in result.metrics["noise_floor"].items():
        bare = rows.query("split_or_benchmark == @name and metric == 'bare' and against == ''")
        shares = bare.set_index("method")["value"]
        flips = ", ".join(f"{n['flips']} of {n['questions']} in {way}" for way, n in ways.items())
        out.append(report.say(
            "{b}: answers of one word are {x:.1%} of the base's and {y:.1%} of {m}'s. Asked again, "
            "the base's answers that turn round: {f}.", b=benchmarks.title(name), x=shares["base"],
            y=shares[method], m=method, f=flips))
    return out


def calibrations(result: stages.Result, frame: DataFrame) -> list[Shown]:
    """A table and a figure a benchmark of yes/no questions."""
    out = []
    for name, rows in tables.levels(frame.query("category == 'calibration'")).groupby(
            "split_or_benchmark", sort=False):
        title = benchmarks.title(name)
        values = result.metrics["calibration"][name]["values"]
        order = tables.pivoted(rows, "method", "label")[
            ["method", *(label for label, _, _ in benchmarks.CALIBRATION.values())]]
        out += [report.table(order, f"{title}: calibration", tables.INTERVALS),
                report.figure(
                    draw_reliability({m: values[m]["bins"] for m in few(frame)}),
                    alt=f"Reliability, {title}",
                    caption=f"{title}: ten bins of equal width; below, questions in each.")]
    return out


# --- figures ------------------------------------------------------------------------------------

def draw_trade_off(frame: DataFrame, across: str, up: Sequence[str]) -> Figure:
    """A panel a measure of hallucination, against how much is said: a cross of two intervals a
    method. Down and to the right is better.

    frame: {method, metric, label, value, low, high}; across, up: the metrics.
    """
    fig, panels = figures.grid(1, len(up), width=WIDTH, height=3.9)
    styles = dict(zip(frame["method"].unique(), figures.line_styles(), strict=False))
    for panel, metric in zip(panels, up, strict=True):
        rows = frame[frame["metric"] == metric]
        panel.set(title=rows["label"].iloc[0], xlabel=across)
        both = rows.merge(frame[frame["metric"] == across], on="method", suffixes=("", "_across"))
        for row in both.itertuples():
            style = styles[row.method]
            panel.errorbar(
                row.value_across, row.value, color=style["color"], marker=style["marker"],
                markersize=7, elinewidth=1.1, linestyle="", label=visible(row.method),
                xerr=[[row.value_across - row.low_across], [row.high_across - row.value_across]],
                yerr=[[row.value - row.low], [row.high - row.value]])
    figures.legend_above(fig, panels[0])
    return fig


def draw_by_place(frame: DataFrame) -> Figure:
    """A line a method: the share of wrong ones among the objects that are named first, second, ...

    frame: {method, place, value, low, high}, a row a method and place.
    """
    lines = {method: (c["place"], c["value"], c["low"], c["high"])
             for method, c in frame.groupby("method", sort=False)}
    fig = figures.bands({"": lines}, xlabel="place of the object in its caption",
                        ylabel="share that is not in the image")
    fig.axes[0].locator_params(axis="x", integer=True)
    return fig


def draw_reliability(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """How often yes is right against P(yes), a line a method, and how the questions spread over it.

    bins: method -> {"p", "share", "n"}, as `diagnostics.calibration` gives them.
    """
    fig, [upper, lower] = figures.grid(2, 1, width=WIDTH * 0.85, height=4.6, sharex=True,
                                       height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (2, 2)))
    for (method, mine), style in zip(bins.items(), figures.line_styles(), strict=False):
        p = [b["p"] for b in mine]
        upper.plot(p, [b["share"] for b in mine], label=visible(method), **style)
        lower.plot(p, [b["n"] for b in mine], **style)
    upper.set(ylabel="share where yes is right", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    lower.set(xlabel="P(yes) among yes and no", ylabel="questions")
    figures.legend_above(fig, upper)
    return fig


def draw_image_gains(frame: DataFrame) -> Figure:
    """A panel a category of question: what the right image adds to an answer's log-probability over
    another, none and a noised one, a row a method.

    frame: {category, label, method, value, low, high}, in nats an answer; label: over what.
    """
    methods, overs = frame["method"].unique().tolist(), frame["label"].unique()
    categories = frame["category"].unique()
    fig, panels = figures.grid(1, len(categories), width=WIDTH, height=1.4 + 0.5 * len(methods))
    for column, (panel, category) in enumerate(zip(panels, categories, strict=True)):
        for number, (over, style) in enumerate(zip(overs, figures.line_styles(), strict=False)):
            rows = frame[(frame["category"] == category) & (frame["label"] == over)]
            places = [methods.index(m) + 0.22 * (number - (len(overs) - 1) / 2)
                      for m in rows["method"]]
            panel.hlines(places, rows["low"], rows["high"], color=style["color"], linewidth=1.6)
            panel.plot(rows["value"], places, style["marker"], color=style["color"],
                       markersize=5.5, label=over)
        figures.rows_of(panel, [visible(m) for m in methods])
        panel.tick_params(axis="y", labelleft=column == 0)
        panel.axvline(0, color="#303030", linewidth=1)
        panel.set(title=category, xlabel="nats an answer")
    figures.legend_above(fig, panels[0])
    return fig


def draw_token_gaps(frame: DataFrame) -> Figure:
    """A bar a token of one answer, a group a method: what the clean image adds to its
    log-probability over the noised one, in nats.

    frame: a row a token, in its order, a column a method; the index holds the tokens.
    """
    rows = math.ceil(len(frame) / 16)
    columns = math.ceil(len(frame) / rows)
    fig, panels = figures.grid(rows, 1, width=WIDTH, height=1.1 + 2.0 * rows, sharey=True)
    for row, panel in enumerate(panels):
        part = frame.iloc[row * columns:(row + 1) * columns].rename(
            index=visible, columns=visible)
        part.plot.bar(ax=panel, width=0.8, color=COLOURS, edgecolor="white", legend=False,
                      rot=0 if columns <= 12 else 35)
        figures.hatched(panel)
        panel.axhline(0, color="#303030", linewidth=1)
        panel.set(xlabel="", ylabel="nats", xlim=(-0.6, columns - 0.4))
        panel.grid(visible=False, axis="x")
    figures.legend_above(fig, panels[0])
    return fig
