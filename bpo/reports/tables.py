"""What finished stages allow to say, as tables and figures: methods compared (notebooks 4 and 5),
training (3). Results are queries on results.csv, formatted last.
"""

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

from pandas import DataFrame

from bpo.data import images
from bpo.evaluation import benchmarks, comparison, diagnostics, metrics
from bpo.models import tuned
from bpo.params import DPOTraining, QualitativeComparison
from bpo.reports import cards, figures
from bpo.reports import page as report
from bpo.reports.cards import Shown
from bpo.study import results, seeds
from bpo.study import stage as stages
from bpo.study.files import read_lines
from bpo.study.results import DECIDED, OPEN
from bpo.study.text import words

AGAINST, DRAWN = "picture against habit", "drawn by seed"
CONTROLS = ("sft_matched", "sft", "sft_compute")  # the sharpest control first
INTERVALS = "95 % bootstrap intervals over images"
PAIRED = "paired 95 % bootstrap intervals over images"


# --- methods compared: notebooks 4 and 5 --------------------------------------------------------

def methods(frame: DataFrame) -> list[str]:
    return frame.loc[frame["against"] == "", "method"].unique().tolist()


def main_method(frame: DataFrame) -> str:
    """The method that a page is about: bpo where it was trained, else the last one."""
    names = methods(frame)
    return "bpo" if "bpo" in names or not names else names[-1]


def control(frame: DataFrame) -> str:
    """The baseline that tells most about the contrast, of those that were trained."""
    return next((c for c in CONTROLS if c in methods(frame)), "base")


def baselines(frame: DataFrame) -> list[str]:
    """What a page's method is compared with."""
    return [b for b in comparison.BASELINES if b in methods(frame) and b != main_method(frame)]


def levels(frame: DataFrame) -> DataFrame:
    """The levels of every metric that the base has a value of, with the column label. What noise
    does is drawn as curves instead (`under_noise`)."""
    keys = ["split_or_benchmark", "category", "metric"]
    rows = frame.query("against == '' and category != 'noise'")
    rows = rows.merge(rows.query("method == 'base' and value.notna()")[keys], on=keys)
    return rows.assign(label=benchmarks.labels(rows))


def differences(frame: DataFrame) -> DataFrame:
    """The measured differences of the page's method to every baseline, with the columns label,
    title (the benchmark's) and reading."""
    rows = judged(frame[(frame["method"] == main_method(frame)) & (frame["against"] != "")
                        & frame["value"].notna() & (frame["metric"] != "wins")
                        & (frame["category"] != "noise")])
    return rows.assign(label=benchmarks.labels(rows),
                       title=rows["split_or_benchmark"].map(benchmarks.title),
                       reading=[e.reading() for e in results.estimates(rows)])


def judged(rows: DataFrame) -> DataFrame:
    """The rows that have a better and a worse, or all where there is none."""
    more = rows["more_is_better"].notna()
    return rows[more] if more.any() else rows


def pivoted(rows: DataFrame, index: str, columns: str) -> DataFrame:
    """The rows' estimates as text, in the rows' order; "–" where there is none."""
    texts = rows.assign(text=results.texts(rows)).set_index([index, columns])["text"]
    return texts.unstack(sort=False).fillna("–").rename_axis(columns=None).reset_index()


def level_tables(frame: DataFrame) -> list[Shown]:
    """A table a split or benchmark and category of question: a row a method, a column a metric."""
    tables = []
    for (where, category), rows in levels(frame).groupby(["split_or_benchmark", "category"],
                                                         sort=False):
        caption = (benchmarks.title(where) if where in benchmarks.KNOWN
                   else f"{where} images, {category} questions")
        base = rows.query("method == 'base'")
        out_of = ", ".join(f"{r.label} {r.n:.0f}" for r in base.itertuples())
        tables.append(report.table(pivoted(rows, "method", "label"), caption,
                                   f"{INTERVALS}; out of (base): {out_of}"))
    return tables


def level_figure(frame: DataFrame, split: str) -> Shown:
    rows = levels(frame.query("split_or_benchmark == @split")).dropna(subset="value")
    return report.figure(figures.metric_bars(judged(rows)), alt="Metrics by method with intervals",
                         caption=f"{split} images; points with {INTERVALS}.")


def difference_figures(frame: DataFrame, split: str) -> list[Shown]:
    """The page's method against the base and against the control."""
    rows, method = frame.query("split_or_benchmark == @split"), main_method(frame)
    return [report.figure(
        figures.differences({
            f"{method} − {against}": differences(rows).query("against == @against")}),
        alt=f"Differences of {method} to {against}",
        caption=f"{method} minus {against}, {split} images, paired bootstrap over images, 95 %.")
        for against in ("base", control(frame))]


def change_tables(frame: DataFrame) -> list[Shown]:
    """A table a split: a row a metric, a column a baseline."""
    method, tables = main_method(frame), []
    for split, rows in frame.groupby("split_or_benchmark", sort=False):
        rows = differences(rows).assign(minus=lambda x: "minus " + x["against"])
        changes = pivoted(rows, "label", "minus").rename(columns={"label": "metric"})
        tables.append(report.table(
            changes, f"{method} minus each baseline, {split} images",
            f"{PAIRED}; better or worse is said where the interval excludes zero"))
    return tables


def reading(frame: DataFrame, split: str, against: str) -> str:
    """In which metrics the page's method is better or worse than another, and in how many no
    difference is seen."""
    rows = differences(frame.query("split_or_benchmark == @split")).query(
        "against == @against and reading != ''")
    if rows.empty:
        return "not to be judged without a truth file"
    better, worse = (", ".join(rows.loc[rows["reading"] == kind, "label"]) or "nothing"
                     for kind in DECIDED)
    return (f"better in {better}, worse in {worse}; {OPEN} in {(rows['reading'] == OPEN).sum()} of "
            f"{len(rows)} metrics")


def readings(frame: DataFrame) -> list[Shown]:
    return [report.say("**{m} against {a}**, {s} images: {r}.", m=main_method(frame), a=against,
                       s=split, r=reading(frame, split, against))
            for split in frame["split_or_benchmark"].unique() for against in baselines(frame)]


def side_by_side(p: QualitativeComparison, result: stages.Result, frame: DataFrame) -> list[Shown]:
    """How often base, the page's method and its control follow the habit, and `p.gallery` cards.

    Half of the cards are drawn by seed among the colour questions to which the base gives the
    prior's answer, which is wrong there; the others from each category of question in turn.
    """
    split, method = comparison.main_split(frame), main_method(frame)
    matched = tuned.matched(p).get(method, control(frame))
    methods = list(dict.fromkeys(("base", matched, method)))
    rows, truth, _ = comparison.read_split(p, split)
    files = {r.id: r.image for r in rows}
    lines = sorted(read_lines(result.folder / f"answers-{split}.jsonl"),
                   key=lambda x: seeds.seed_for(p.seed, "comparison gallery", x["id"]))
    usual = [x for x in lines if x["p_true"] and said(x, "base", truth) == "prior"]
    against = usual[:(p.gallery + 1) // 2]
    turns = zip_longest(*([x for x in lines if x["category"] == category and x not in against]
                          for category in dict.fromkeys(x["category"] for x in lines)))
    others = list(filter(None, chain.from_iterable(turns)))[:p.gallery - len(against)]
    gallery = cards.comparison_gallery([
        {"image": images.load(files[x["id"]]), "question": x["question"],
         "origin": origin, **stored(x, methods, truth)}
        for origin, drawn in ((AGAINST, against), (DRAWN, others)) for x in drawn])
    return [habit(lines, methods, truth, split), gallery]


def habit(lines: Sequence[dict], methods: Sequence[str], truth: dict[str, Any], split: str
          ) -> Shown:
    """How many answers of the base the methods mended and lost, where its habit is wrong."""
    kinds = [{m: said(x, m, truth) for m in methods} for x in lines if x["p_true"]]
    if not kinds:
        changed = sum(x["answers"][methods[-1]] != x["answers"]["base"] for x in lines)
        return report.say(
            "No truth file tells of a usual answer to the {n} {s} questions: those below are drawn "
            "by seed. {m} answers {c} of {n} otherwise than base.", n=len(lines), s=split,
            m=methods[-1], c=changed)
    usual, true = ([k for k in kinds if k["base"] == kind] for kind in ("prior", "true"))
    by_method = "; ".join(
        f"{m} now answers {sum(k[m] == 'true' for k in usual)} of those {len(usual)} truly and has "
        f"lost {sum(k[m] != 'true' for k in true)} of those {len(true)}" for m in methods[:0:-1])
    return report.say(
        "Of **{n}** colour questions on {s} images to which the usual answer is wrong, base gives "
        "the usual one to **{u}** and the true one to **{t}**; {tuned}.", n=len(kinds), s=split,
        u=len(usual), t=len(true), tuned=by_method)


def said(line: dict, method: str, truth: dict[str, Any]) -> str:
    """Whether an answer to a colour question is the "true" one, the "prior"'s, or an "other"."""
    counts = comparison.counts(line, method, truth)
    return ("true" if counts["colour_accuracy"][0] else "prior" if counts["prior_rate"][0]
            else "other")


def stored(line: dict, methods: Sequence[str], truth: dict[str, Any]) -> dict[str, Any]:
    """{truth, usual, answers} of a stored line, for a card."""
    out = {"truth": line["annotated"], "answers": {
        m: {"text": line["answers"][m], "wrong": wrong_words(line, m, truth)} for m in methods}}
    if line["p_true"]:
        true, priors, _ = diagnostics.candidates(truth, line["id"])
        out |= {"truth": " or ".join(true), "usual": " or ".join(priors)}
        for m, answer in out["answers"].items():
            answer |= {"kind": said(line, m, truth),
                       "chances": (line["p_true"][m], line["p_prior"][m])}
    return out


def wrong_words(line: dict, method: str, truth: dict[str, Any]) -> cards.Wrong:
    """What to mark in an answer: wrong objects and colours of a caption, a wrong answer whole."""
    known, text = truth["rows"].get(line["id"]), line["answers"][method]
    if known is None:
        return set()
    if known["category"] == "caption":
        return misdescribed(text, line["image"], truth)
    return set() if comparison.quality(line, method, truth) else set(words(text))


def misdescribed(text: str, image: str, truth: dict[str, Any]) -> cards.Wrong:
    """The words of a caption for objects and colours that the image does not have."""
    if image not in truth["images"]:
        return set()
    vocabulary, objects = truth["vocabulary"], truth["images"][image]["objects"]
    present = {o["name"] for o in objects}
    return metrics.wrong_object_words(text, vocabulary["objects"], present) | metrics.wrong_colours(
        text, vocabulary["objects"], vocabulary.get("colours", ()), objects)


def chair_by_hand(p: QualitativeComparison, result: stages.Result, *, split: str, method: str
                  ) -> DataFrame:
    """A row a caption of a method: {caption, in the image, object words, wrong}; no rows where no
    truth file describes the images."""
    truth = comparison.read_split(p, split)[1]
    rows = []
    for line in read_lines(result.folder / f"answers-{split}.jsonl"):
        if truth["rows"].get(line["id"], {}).get("category") == "caption":
            wrong, named = comparison.counts(line, method, truth)["chair_i"]
            present = [o["name"] for o in truth["images"][line["image"]]["objects"]]
            rows.append({"caption": line["answers"][method], "in the image": ", ".join(present),
                         "object words": named, "wrong": wrong})
    return DataFrame(rows, columns=["caption", "in the image", "object words", "wrong"])


# --- training ---------------------------------------------------------------------------------

def budgets(p: DPOTraining, result: stages.Result) -> Shown:
    """A row a method: its rows, steps and floating point operations."""
    rows = DataFrame([
        {"method": method, "rows": m["rows"], "steps": m["steps"],
         "packed": {True: "yes", False: "no"}.get(m.get("packed"), "–"),
         "GFLOP a step": round(m["flops_per_step"] / 1e9, 1),
         "TFLOP in all": round(m["flops"] / 1e12, 2),
         "seconds": result.timings.get(method, "")}
        for method, m in result.metrics["methods"].items()])
    return report.table(
        rows, "What each method was given",
        f"{p.batch_pairs} rows a step; floating point operations counted over the first steps, "
        "forward and backward, the reference apart and once for each row; seconds on the machine "
        "named above")


ENDS = {"loss_first": ("loss, first step", "{:.3f}"), "loss_last": ("loss, end", "{:.3f}"),
        "margin_last": ("margin, end", "{:.3f}"), "accuracy_last": ("accuracy, end", "{:.2f}"),
        "chosen_change": ("chosen log-prob", "{:+.2f}"),
        "rejected_change": ("rejected log-prob", "{:+.2f}")}


def training_ends(result: stages.Result) -> Shown:
    """A row a method: where its curves ended; SFT has a loss alone."""
    rows = DataFrame([
        {"method": method} | {label: form.format(m[name]) if name in m else "–"
                              for name, (label, form) in ENDS.items()}
        for method, m in result.metrics["methods"].items()])
    return report.table(rows, "Where each method ended", "end and change: mean of the last tenth "
                        "of the steps, change against the reference, in nats an answer, on "
                        "training rows")


def training_headline(p: DPOTraining, methods: dict[str, dict[str, Any]]) -> Shown:
    """How many adapters, and which made the chosen answer less likely too.

    methods: the stage's metrics of each.
    """
    dpo = {m: f for m, f in methods.items() if "chosen_change" in f}
    fell = [m for m, f in dpo.items() if f["chosen_change"] < 0]
    far = [m for m in fell if dpo[m]["chosen_change"] < -p.fall_warning]
    warning = (
        " **Warning:** in {far} by more than {bound} nats an answer on average: there the margin "
        "was won by making the right answer unlikely too. Add sft, anchor or dpop to loss, or "
        "raise beta.") if far else ""
    return report.say(
        "**{n} adapters** trained. Reward accuracy on training pairs at the end: {ends}. The "
        "chosen answer's log-probability fell in: {fell}." + warning, n=len(methods),
        ends=", ".join(f"{m} {f['accuracy_last']:.2f}" for m, f in dpo.items()) or "no DPO method",
        fell=", ".join(fell) or "none", far=", ".join(far), bound=p.fall_warning)
