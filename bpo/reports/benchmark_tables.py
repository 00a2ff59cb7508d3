"""What finished benchmarks allow to say: tables, figures and sentences of notebook 5, from its
results.csv and answers; and of notebook 4, whether a method knows more or is only more certain.
"""

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
from bpo.reports.figures import QUIET, WIDTH
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
    """How tuning moves the annotated answers' log-probability with the right and with the wrong
    image, by kind of token; nothing where no answers were weighed."""
    method = tables.main_method(frame)
    names = {f"{view}_{kind}": (view, kind) for view in ("right", "swapped")
             for kind in diagnostics.KINDS}
    rows = frame.query("split_or_benchmark == 'image' and against == 'base' and metric in @names "
                       f"and method in {(method, tables.control(frame))}").dropna(subset="value")
    if rows.empty:
        return []
    rows = rows.assign(view=[names[m][0] for m in rows["metric"]],
                       kind=[names[m][1] for m in rows["metric"]])
    out = [report.figure(
        draw_image_gains(rows), alt="Change of the annotated answers' log-probability by token",
        caption="Annotated answers by category of question, minus base. Filled: with the right "
                "image; further right is better for colours and objects. Hollow: with another "
                f"row's image; {tables.PAIRED}.")]
    for category, mine in rows.query("method == @method").groupby("category", sort=False):
        parts = []
        for view, of in (("right", "right image"), ("swapped", "wrong image")):
            changes = mine[mine["view"] == view].set_index("kind")["value"]
            kinds = ", ".join(f"{diagnostics.KINDS[k]} {x:+.2f}" for k, x in changes.items())
            parts.append(f"{of} {changes.sum():+.2f} ({kinds})")
        out.append(report.say("{c}, {m} minus base in nats an answer: {r}.", c=category, m=method,
                              r="; ".join(parts)))
    return out


def sharpening(frame: DataFrame, split: str) -> list[Shown]:
    """Each method's probabilities beside those of the base at the temperature that makes it as
    confident, and how much of the page's method's gain both have; nothing without calibration."""
    rows = frame.query("split_or_benchmark == @split and category == 'sharpening'")
    level = rows.query("against == ''").set_index(["metric", "method"])["value"]
    if rows.empty:
        return []
    shown = [("P(true answer)", "p_true"), ("log P(true answer)", "logp_true"),
             ("P(prior's answer)", "p_prior")]
    table = DataFrame([
        {"method": m, "P(likeliest candidate)": f"{level['confidence', m]:.3f}",
         "base's temperature": f"{level['temperature', m]:.2f}",
         **{label: f"{level[f'among_{n}', m]:.3f} [{level[f'matched_{n}', m]:.3f}]"
            for label, n in shown}} for m in level["confidence"].index])
    method = tables.main_method(frame)
    beyond = rows.query("method == @method and against == @diagnostics.SHARPENED")
    rest = results.estimate(beyond.query("metric == 'p_true'").iloc[0].to_dict())
    before, after, matched = (level[name, m] for name, m in (
        ("among_p_true", "base"), ("among_p_true", method), ("matched_p_true", method)))
    return [report.table(
        table, f"Knowing more or only more certain, {split} images",
        f"{rest.n} colour questions, as probabilities among the candidate answers; in brackets the "
        "base at the temperature that makes it as confident as the method"),
        report.say("P(true answer), {m} minus base: {g}. The base made as confident as {m} changes "
                   "by {s}, which is sharpening; beyond that {m} changes by **{r}**{t}.", m=method,
                   g=f"{after - before:+.3f}", s=f"{matched - before:+.3f}",
                   r=rest.text(sign="+"),
                   t="" if rest.excludes_zero() else ", no difference seen")]


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
    styles = figures.styles(frame["method"].unique())
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
    for (method, mine), style in zip(bins.items(), figures.styles(bins).values(), strict=True):
        p = [b["p"] for b in mine]
        upper.plot(p, [b["share"] for b in mine], label=visible(method), **style)
        lower.plot(p, [b["n"] for b in mine], **style)
    upper.set(ylabel="share where yes is right", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    lower.set(xlabel="P(yes) among yes and no", ylabel="questions")
    figures.legend_above(fig, upper)
    return fig


def draw_image_gains(frame: DataFrame) -> Figure:
    """A panel a category of question, a row a kind of token: the change of the answers'
    log-probability with the right image (filled) and with another one (hollow), a colour a method.

    frame: {category, kind, view, method, value, low, high}, in nats an answer.
    """
    methods, categories = frame["method"].unique(), frame["category"].unique()
    order = [k for k in diagnostics.KINDS if k in set(frame["kind"])]
    looks = [(m, view, style) for m, style in figures.styles(methods).items()
             for view in ("right", "swapped")]
    fig, panels = figures.grid(1, len(categories), width=WIDTH,
                               height=1.3 + 0.2 * len(looks) * len(order))
    for column, (panel, category) in enumerate(zip(panels, categories, strict=True)):
        for number, (method, view, style) in enumerate(looks):
            rows = frame.query("category == @category and method == @method and view == @view")
            places = [order.index(k) + 0.16 * (number - (len(looks) - 1) / 2)
                      for k in rows["kind"]]
            panel.hlines(places, rows["low"], rows["high"], color=style["color"], linewidth=1.4)
            panel.plot(rows["value"], places, style["marker"], color=style["color"], markersize=5.5,
                       markerfacecolor=style["color"] if view == "right" else "white",
                       label=f"{visible(method)}, {'right' if view == 'right' else 'wrong'} image")
        figures.rows_of(panel, [diagnostics.KINDS[k] for k in order])
        panel.tick_params(axis="y", labelleft=column == 0)
        panel.axvline(0, color="#303030", linewidth=1)
        panel.set(title=f"{category} answers", xlabel="nats an answer, minus base")
    figures.legend_above(fig, panels[0])
    return fig
