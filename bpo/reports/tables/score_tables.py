"""What notebooks 4 and 5 allow to say of methods, as tables and figures: queries on results.csv,
formatted last.
"""

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from types import MappingProxyType
from typing import Any

import pandas
from pandas import DataFrame

from bpo.data import images
from bpo.evaluation import benchmarks, claims, comparison, diagnostics, metrics
from bpo.models import tuned
from bpo.params import QualitativeComparison
from bpo.reports import cards, figures
from bpo.reports import page as report
from bpo.reports.cards import Shown
from bpo.study import results, seeds
from bpo.study import stage as stages
from bpo.study.files import read_lines
from bpo.study.results import DECIDED, OPEN
from bpo.study.text import number, signed, words

AGAINST, DRAWN = "picture against habit", "drawn by seed"
CONTROLS = ("sft_matched", "sft", "sft_compute")  # the sharpest control first
INTERVALS = "95 % bootstrap intervals over images"
PAIRED = "paired 95 % bootstrap intervals over images"
ARROWS = {True: "↑", False: "↓"}
# what the measures of notebook 4 are out of, where it is not all questions of a kind
OUT_OF = {"chair_s": "captions", "chair_i": "named objects", "cover": "objects",
          "objects": "captions", "words": "captions", **dict.fromkeys(
              ("p_true", "p_prior", "logp_true", "prior_rate"), "untypical")}


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


def counted(rows: DataFrame) -> list[str]:
    """Labels that say what the numbers of a measure are out of: "CHAIRi, 878 to 889 objects"."""
    ends = rows.groupby("metric")["n"].agg(["min", "max"]).map("{:,.0f}".format)
    return [f"{r.label}, {' to '.join(dict.fromkeys(ends.loc[r.metric]))} "
            f"{OUT_OF.get(r.metric, 'questions')}" for r in rows.itertuples()]


def rivals(frame: DataFrame, matched: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """What a page compares its method with: the base, and the SFT on the method's own chosen
    answers, or the control that tells most. matched: DPO method -> that SFT."""
    return list(dict.fromkeys(("base", matched.get(main_method(frame), control(frame)))))


def main_table(frame: DataFrame, split: str, against: Sequence[str]) -> Shown:
    """The page's method and what it is compared with: a row a measure, their levels, then the
    differences. Neither where a measure has no better and worse."""
    rows, method = frame.query("split_or_benchmark == @split"), main_method(frame)
    measured = judged(levels(rows)).query("method in @against or method == @method")
    digits = [2 if n < 100 else 3 for n in measured["n"]]
    shown = measured.assign(
        measure=[f"{label} {ARROWS.get(more, '')}".strip() for label, more in zip(
            counted(measured), measured["more_is_better"], strict=True)],
        column=measured["method"], text=list(map(number, measured["value"], digits)))
    changes = differences(rows).query("against in @against")
    changes = changes.merge(shown.query("method == @method")[["metric", "measure"]], on="metric")
    changes = changes.assign(column=f"{method} − " + changes["against"],
                             text=results.texts(changes))
    both = pandas.concat([shown, changes])[["measure", "column", "text"]]
    order = [*against, method, *(f"{method} − {a}" for a in against)]
    table = both.drop_duplicates(["measure", "column"]).pivot(
        index="measure", columns="column", values="text").reindex(
        index=shown["measure"].unique(), columns=[c for c in order if c in set(both["column"])])
    return report.table(
        table.fillna("–").rename_axis(columns=None).reset_index(), f"{split} images",
        f"↑ more is better, ↓ less is better. In brackets {PAIRED}; better or worse is said where "
        "one excludes zero. Untypical: questions whose usual answer is wrong")


def difference_figure(frame: DataFrame, split: str, against: Sequence[str]) -> Shown:
    """The page's method against each of what it is compared with, a panel each."""
    method = main_method(frame)
    rows = differences(frame.query("split_or_benchmark == @split"))
    rows = rows[~rows["metric"].str.startswith("logp")] if len(rows) > 1 else rows
    panels = {f"{method} − {a}": mine.assign(label=counted(mine)) for a in against
              if len(mine := rows.query("against == @a"))}
    if not panels:
        return report.say("No other method answered these questions.")
    return report.figure(
        figures.differences(panels), alt=f"Differences of {method} to {' and '.join(against)}",
        caption=f"{method} minus what the title names, {split} images; lines are {PAIRED}, filled "
                "where one excludes zero. Log-probabilities have another unit and are in the table "
                "alone.")


def reading(frame: DataFrame, split: str, against: str) -> str:
    """In which measures the page's method is better or worse than another, from which level to
    which, and in how many no difference is seen."""
    rows = differences(frame.query("split_or_benchmark == @split")).query(
        "against == @against and reading != ''")
    if rows.empty:
        return "not to be judged without a truth file"
    level = frame.query("split_or_benchmark == @split and against == ''").set_index(
        ["method", "metric"])["value"]
    said = {kind: [f"{r.label} ({number(level[against, r.metric], 2)} → "
                   f"{number(level[r.method, r.metric], 2)})" for r in of.itertuples()]
            for kind, of in rows.groupby("reading")}
    better, worse = (", ".join(said.get(kind, ())) or "nothing" for kind in DECIDED)
    return (f"better in {better}, worse in {worse}; {OPEN} in {(rows['reading'] == OPEN).sum()} of "
            f"{len(rows)} measures")


def readings(frame: DataFrame) -> list[Shown]:
    return [*(report.say("**{m} against {a}**, {s} images: {r}.", m=main_method(frame), a=against,
                         s=split, r=reading(frame, split, against))
              for split in frame["split_or_benchmark"].unique() for against in baselines(frame)),
            *(report.say("{r}", r=text) for text in [claims.ruler(frame)] if text)]


def side_by_side(p: QualitativeComparison, result: stages.Result, frame: DataFrame) -> list[Shown]:
    """How often base, the page's method and its control follow the habit, and `p.gallery` cards.

    Half of the cards are drawn by seed among the colour questions to which the base gives the
    prior's answer, which is wrong there; the others from each category of question in turn.
    """
    split, method = comparison.main_split(frame), main_method(frame)
    methods = [*rivals(frame, tuned.matched(p)), method]
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
         **{label: f"{number(level[f'among_{n}', m])} [{number(level[f'matched_{n}', m])}]"
            for label, n in shown}} for m in level["confidence"].index])
    method = main_method(frame)
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
                   g=signed(after - before), s=signed(matched - before),
                   r=rest.text(sign="+"),
                   t="" if rest.excludes_zero() else ", no difference seen")]
