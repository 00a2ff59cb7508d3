"""Result tables in Markdown: the sections of outputs/README.md, and of the README beside it, that
commands write from stored replications."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from matplotlib.figure import Figure
from pandas import DataFrame

from bpo.evaluation import benchmarks, claims, comparison, replication, score
from bpo.params import Refusal, Replication, outputs_root
from bpo.reports import seen
from bpo.reports.tables import summary
from bpo.study import results
from bpo.study import stage as stages
from bpo.study.files import to_json, write_whole
from bpo.study.text import number


def write_section(name: str, text: str) -> Path:
    """Puts `text` between <!-- NAME --> and <!-- /NAME --> in outputs/README.md, at its end where
    the marks are not there yet; everything else stays as it is. Returns the file."""
    file = outputs_root() / "README.md"
    before = file.read_text(encoding="utf-8") if file.is_file() else "# Results\n"
    if not _replaced(file, name, text):
        write_whole(file, f"{before.rstrip()}\n\n{_section(name, text)}\n")
    return file


def _section(name: str, text: str) -> str:
    text = re.sub(r"(?<![\w-])-(?=[\d.])", "−", text.strip())  # the minus sign of the pages
    return f"<!-- {name} -->\n{text}\n<!-- /{name} -->"


def _replaced(file: Path, name: str, text: str) -> bool:
    """Whether a file has a section, which then is `text`."""
    if not file.is_file():
        return False
    marked = re.compile(rf"<!-- {re.escape(name)} -->.*?<!-- /{re.escape(name)} -->", re.DOTALL)
    after, count = marked.subn(lambda _: _section(name, text), file.read_text(encoding="utf-8"),
                               count=1)
    if count:
        write_whole(file, after)
    return bool(count)


def write_results(study: str) -> Path:
    """Writes the stored replication of a study, or its one run, as the section `results STUDY` of
    outputs/README.md, and, where the README beside outputs/ has such a section, what was found
    there. STUDY may also be a file outputs/results/STUDY.json that `bpo score --json` printed.
    Returns the first file."""
    if _kept_json(study).is_file():
        return _write_score(study)
    replication.store_alone(study)
    frame, p = replication.stored(study), Replication(study=study)
    seeds, alone = _seeds(frame), frame["seed"].nunique() == 1
    if alone:
        mean, verdicts = frame, claims.decided(frame).drop(columns="p")
        rule = ("A row a claim: the difference with its 95 % interval over the images of this one "
                "run, which another seed can turn round.")
    else:
        mean, verdicts = replication.over_seeds(frame), replication.claims_over(frame)
        rule = ("A row a claim; seeds in their order: + holds, o no verdict, − does not hold, · "
                "not measured; then the mean difference over seeds with its 95 % t interval, and "
                "what it says.")
        _replaced(outputs_root().parent / "README.md", f"results {study}", found(mean, seeds))
    word, sentence = summary.answer(summary.on_main(claims.decided(mean),
                                                    comparison.main_split(mean)))
    left_out = verdicts["verdict"] == claims.UNMEASURED
    unmeasured = "; ".join(
        says + f" ({', '.join(dict.fromkeys(named))})".replace(" (–)", "")
        for says, named in verdicts[left_out].groupby("says", sort=False)["against"])
    parts = [f"### `bpo {'run' if alone else 'replicate'} {study}`: {seeds}",
             *([f"**{summary.QUESTION} {word}.** {sentence}"] if word else []),
             *_picture(study, mean, "" if alone else ", means over seeds"),
             *filter(None, [claims.ruler(mean)]), f"{rule} {claims.RULE}",
             markdown(summary.claims_table(verdicts[~left_out])),
             f"{'' if alone else 'Over seeds, '}{claims.looks(claims.decided(mean))}."
             + (f" Not measured: {unmeasured}." if left_out.any() else ""),
             "Levels:" if alone else "Means over seeds:", markdown(numbers(mean, p))]
    parts += ["Every DPO method against the untuned model, and against the SFT that trained on its "
              "own positives as often:", markdown(by_method(mean))]
    if len(table := summary.steps(mean)):
        parts += ["From base to method in three steps; a change is against the row above:",
                  markdown(table)]
    try:
        parts += [] if alone else [
            f"Seeds that a true difference of {p.difference:g} needs for a power of .8:",
            markdown(summary.power(frame, p))]
    except Refusal as refusal:
        parts += [f"{refusal}."]
    return write_section(f"results {study}", "\n\n".join(parts))


def _write_score(name: str) -> Path:
    result = json.loads(_kept_json(name).read_text("utf-8"))
    rows = DataFrame([(e["label"], *score.texts(n, e), e["n"])
                      for n, e in result["metrics"].items()],
                     columns=["metric", "value", "95 % interval", "out of"])
    said = score.counted(score.BENCHMARKS[result["benchmark"]], result)
    return write_section(f"results {name}", "\n\n".join([*said, markdown(rows)]))


def _picture(study: str, mean: DataFrame, over: str) -> list[str]:
    """What the methods' answers come from, drawn into a file beside the stored replication; its
    numbers stand in the text too. Nothing where no truth file tells."""
    if not (shares := seen.shares(mean)):
        return []
    said = seen.bars(shares, "").plain.replace("\n", "; ")
    return [picture(study, seen.drawing(shares), said),
            f"*Answers in per cent of {seen.population(mean)}{over}.*"]


def picture(study: str, fig: Figure, said: str) -> str:
    """A figure in a file beside what is stored of a study, and the Markdown that shows it."""
    file = replication.stored_file(study).with_name(f"{study}.svg")
    file.write_bytes(seen.saved(fig, "svg"))
    return f"![{said}]({file.relative_to(outputs_root())})"


def kept_metrics(study: str, notebook: str) -> dict[str, Any]:
    """What a notebook of a study found, kept where the repository keeps results, once it is done.
    Raises Refusal where nothing is kept."""
    folder, file = stages.stage_folder(study, notebook), _kept_json(study)
    if (folder / stages.MANIFEST).is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, to_json(stages.read_manifest(folder)["metrics"]) + "\n")
    return replication.kept(file, f"bpo run {study}", lambda f: json.loads(f.read_text("utf-8")))


def _kept_json(name: str) -> Path:
    return replication.stored_file(name).with_name(f"{name}.json")


def write_joined(studies: Sequence[str], against: str = "") -> Path:
    """Writes the section `results FIRST OTHER ...`: the DPO methods of several stored replications
    in one table, with what the untuned model of each does. against: a method that the others are
    compared with, in place of the untuned model and their own SFT."""
    tables = []
    for study in studies:
        frame, p = replication.stored(study), Replication(study=study)
        mean, of = replication.over_seeds(frame), against or "base"
        rows = _compared(frame, mean, p, against) if against else by_method(mean)
        level = ", ".join(f"{m.split(': ')[-1]} {v}" for m, v in numbers(mean, p).set_index(
            "metric")[of].head(4).items())
        head = f"*{study}, {_seeds(frame)}: {of} {level}*"
        tables += [DataFrame({rows.columns[0]: [head]}), rows]
    table = pandas.concat(tables, ignore_index=True).fillna("")
    name = f"results {' '.join(studies)}" + (f" --against {against}" if against else "")
    return write_section(name, markdown(table))


def _compared(frame: DataFrame, mean: DataFrame, p: Replication, against: str) -> DataFrame:
    """Methods against another one, a row a metric, and above them what a step of each computes."""
    rows = numbers(replication.over_seeds(replication.against(frame, against)), p, against)
    work = mean[mean["metric"] == replication.WORK].set_index("method")["value"]
    first = DataFrame([{"metric": f"work of a step / that of {against}"} | {
        m: f"{value / work[against]:.2f}" for m, value in work.items() if m != against}])
    return pandas.concat([first, rows.drop(columns="base")])


def _seeds(frame: DataFrame) -> str:
    """"12 seeds, 100 to 111", or each named."""
    found = sorted(frame["seed"].unique())
    if len(found) == 1:
        return f"one run, seed {found[0]}"
    whole = found == list(range(found[0], found[-1] + 1))
    return f"{len(found)} seeds, " + (f"{found[0]} to {found[-1]}" if whole
                                      else ", ".join(map(str, found)))


def found(mean: DataFrame, seeds: str) -> str:
    """What a replication found, as a list for a README: its words are chosen by the intervals over
    seeds. mean: `replication.over_seeds`'s."""
    main = comparison.main_split(mean)
    if mean["low"].isna().all():
        return f"{seeds}: too few for an interval."
    stated = list(claims.stated(mean))
    noise = [c for c in stated if c.claim == "1"]
    captions = [(main, m) for m in ("chair_i", "cover")]
    colours = [(main, m) for m in ("p_true", "p_prior")]
    bpo, contrast = claims.METHOD, " (the contrast alone)"
    items = {
        "**Noise**": summary.in_words(mean, [(c.where, c.metric) for c in noise], "base",
                              noise[0].against),
        f"**{bpo} − base**": summary.in_words(mean, captions + colours, bpo, "base"),
        **{f"**{m} − {claims.matched(m)}**{contrast}": summary.in_words(
            mean, captions + colours, m, claims.matched(m)) for m in (bpo, claims.WEAKENED)},
        f"**{bpo} − the sharpened base**": summary.in_words(mean, colours[:1], bpo,
                                                           claims.SHARPENED),
        f"**Harm, {bpo} − base**": summary.in_words(
            mean, [(c.where, c.metric) for c in stated if c.claim == claims.HARM], bpo, "base",
            brief=True)}
    rival = claims.decided(mean).query("claim == '4'").iloc[0]
    if rival["verdict"] != claims.UNMEASURED:
        items[f"**{bpo} against an untuned model of twice the size**"] = rival["difference"]
    return f"Means over {seeds}, with 95 % intervals over seeds:\n\n" + "\n".join(
        f"{n}. {what}: {text}." for n, (what, text) in enumerate(
            ((what, text) for what, text in items.items() if text), 1))


def numbers(mean: DataFrame, p: Replication, against: str = "") -> DataFrame:
    """Levels of every method, or differences `against` one: a row a metric of `p.metrics` on the
    main split, and of what decides each benchmark. mean: `replication.over_seeds`'s."""
    main, keys = comparison.main_split(mean), ["split_or_benchmark", "metric"]
    shown = [(main, metric) for metric in p.metrics] + [
        (name, metric) for name in mean["split_or_benchmark"].unique()
        if name in claims.BENCHMARKS for metric in claims.BENCHMARKS[name][:2] if metric]
    rows = DataFrame(shown, columns=keys).merge(mean[mean["against"] == against], on=keys)
    rows = rows.assign(
        metric=list(map(claims.label, rows["split_or_benchmark"], rows["metric"])),
        value=results.texts(rows) if against else rows["value"].map(number))
    return rows.pivot(index="metric", columns="method", values="value").reindex(
        index=rows["metric"].unique(), columns=rows["method"].unique()).fillna("–").reset_index()


def by_method(mean: DataFrame) -> DataFrame:
    """A row a DPO method: its differences to the base and to the SFT on its own positives, which
    the contrast alone makes, and, where it is stored, by how many nats training widened the gap
    between the log-probs of chosen and rejected answers. mean: `replication.over_seeds`'s."""
    main = comparison.main_split(mean)
    rows = mean[(mean["split_or_benchmark"] == main) & (mean["against"] != "")
                & mean["metric"].isin(("chair_i", "cover", *summary.STEPS[:2]))
                & mean["method"].str.startswith(claims.METHOD)]
    others = {*comparison.BASELINES, claims.SHARPENED, claims.RIVAL} - {"base", "sft_matched"}
    rows = rows[~rows["against"].isin(others)]
    rows = rows.assign(text=results.texts(rows), number=[
        f"{benchmarks.label(main, m)}, − {'base' if a == 'base' else 'own SFT'}"
        for m, a in zip(rows["metric"], rows["against"], strict=True)])
    rows = rows.drop_duplicates(["method", "number"], keep="last")
    table = rows.pivot(index="method", columns="number", values="text").reindex(
        index=rows["method"].unique(), columns=sorted(rows["number"].unique(), key=lambda n: (
            not n.endswith("base"), n)))
    change = mean[mean["metric"].isin(replication.CHANGES)].pivot(
        index="method", columns="metric", values="value")
    if len(change):
        chosen, rejected = replication.CHANGES
        table["margin growth, nats"] = (change[chosen] - change[rejected]).map("{:.1f}".format)
    return table.fillna("–").reset_index()


def markdown(rows: DataFrame) -> str:
    lines = [list(rows), ["---"] * len(rows.columns), *rows.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
