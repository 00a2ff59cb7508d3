"""What came out of training: notebook 3's tables, and in notebook 4 what noise does after it."""

from collections.abc import Sequence
from typing import Any

from pandas import DataFrame

from bpo.evaluation import under_noise
from bpo.params import DPOTraining
from bpo.reports import figures, pair_tables, tables
from bpo.reports import page as report
from bpo.reports.cards import Shown
from bpo.study import stage as stages
from bpo.study.text import number


def budgets(p: DPOTraining, result: stages.Result) -> Shown:
    """A row a method: its rows, steps and floating point operations."""
    rows = DataFrame([
        {"method": method, "rows": m["rows"], "steps": m["steps"],
         "packed": {True: "yes", False: "no"}.get(m.get("packed"), "–"),
         "GFLOP a step": f"{m['flops_per_step'] / 1e9:.1f}",
         "TFLOP in all": f"{m['flops'] / 1e12:.2f}",
         "seconds": f"{result.timings[method]:.0f}" if method in result.timings else ""}
        for method, m in result.metrics["methods"].items()])
    return report.table(
        rows, "What each method was given",
        f"{p.batch_pairs} rows a step; floating point operations counted over the first steps, "
        "forward and backward, the reference apart and once for each row; seconds on the machine "
        "named in the facts at the top")


ENDS = {"loss_first": ("loss, first step", 2, ""), "loss_last": ("loss, end", 2, ""),
        "margin_last": ("margin, end", 2, ""), "accuracy_last": ("accuracy, end", 2, ""),
        "chosen_change": ("chosen log-prob", 1, "+"),
        "rejected_change": ("rejected log-prob", 1, "+")}


def training_ends(result: stages.Result) -> Shown:
    """A row a method: where its curves ended; SFT has a loss alone."""
    rows = DataFrame([
        {"method": method} | {label: number(m[name], digits, sign) if name in m else "–"
                              for name, (label, digits, sign) in ENDS.items()}
        for method, m in result.metrics["methods"].items()])
    return report.table(
        rows, "Where each method ended", "end and change: mean of the last tenth of the steps; "
        "accuracy: share of training pairs whose chosen answer gained more than the rejected one, "
        "chance is one half; change against the reference, in nats an answer, on training rows")


def training_headline(p: DPOTraining, methods: dict[str, dict[str, Any]]) -> Shown:
    """How well each DPO method learnt its pairs, by which objective, and whether it raised the
    chosen answer or only lowered the rejected one. methods: the stage's metrics of each."""
    dpo = {m: f for m, f in methods.items() if "chosen_change" in f}
    far = [m for m, f in dpo.items() if f["chosen_change"] < -p.fall_warning]
    warning = (
        " **Warning:** in {far} the chosen answer fell by more than {bound} nats on average: there "
        "the margin was won by making the right answer unlikely too. Add sft, anchor or dpop to "
        "loss, or raise beta.") if far else ""
    learnt = "; ".join(
        f"{m} ({pair_tables.objective(p, m)}) prefers the chosen answer in "
        f"{f['accuracy_last']:.0%} of its training pairs: chosen "
        f"{number(f['chosen_change'], 1, '+')}, rejected {number(f['rejected_change'], 1, '+')} "
        "nats an answer" for m, f in dpo.items())
    return report.say(
        "**The pairs were learnt**, mostly by making rejected answers unlikely: {l}." + warning
        if dpo and all(abs(f["rejected_change"]) > abs(f["chosen_change"]) for f in dpo.values())
        else "After training, {l}." + warning if dpo else
        "{n} adapters trained, none of them on pairs.", n=len(methods), l=learnt,
        far=", ".join(far), bound=p.fall_warning)


def curves_under_noise(frame: DataFrame, against: Sequence[str]) -> Shown:
    """Notebook 1's curves after training: P(true answer) and P(prior's answer) against the noise
    step, a line for the page's method and for each of what it is compared with."""
    rows = frame.query("category == 'noise' and against == ''")
    names = [*against, tables.main_method(frame)]
    rows = rows[rows["method"].isin(names) & rows["value"].notna()]
    where = rows["metric"].str.extract(r"^(?P<measure>p_true|p_prior)_at_(?P<step>\d+)")
    rows = rows.assign(measure=where["measure"], step=where["step"].astype(float)).dropna(
        subset="measure")
    if rows.empty:
        return report.say("This run did not ask under noise (noise_rows is 0, or nobody knows what "
                          "to weigh).")
    panels = {under_noise.LABELS[measure]: {
        name: [mine[c] for c in ("step", "value", "low", "high")]
        for name in names if len(mine := of[of["method"] == name])}
        for measure, of in rows.groupby("measure", sort=False)}
    return report.figure(
        figures.bands(panels, xlabel="noise step (0 is the clean image)", ylabel="probability"),
        alt=f"P(true answer) and P(prior's answer) against the noise step, of {', '.join(names)}",
        caption=f"{rows['split_or_benchmark'].iloc[0]} images, {rows['n'].iloc[0]:.0f} "
                f"questions, the same at each step; bands are {tables.INTERVALS}.")
