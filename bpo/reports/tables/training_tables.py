"""What notebook 3 shows: methods, objectives, what each was given, and where its curves ended."""

from typing import Any

from pandas import DataFrame

from bpo.pairs import methods as registry
from bpo.params import DPOTraining
from bpo.reports import page as report
from bpo.reports.cards import Shown
from bpo.study import stage as stages
from bpo.study.text import number
from bpo.training.objectives import OBJECTIVES

SHORT = {"sigmoid": "DPO", "sft": "SFT"}


def objective(p: DPOTraining, name: str) -> str:
    """What a method of this run minimises, as "DPO + SFT"."""
    if not registry.learns_pairs(name):
        return "SFT"
    settings = p.varied(name)
    return " + ".join(f"{w:g} {SHORT.get(n, n)}".removeprefix("1 ") for n, w in zip(
        settings.loss, settings.loss_weights, strict=True))


def methods(p: DPOTraining) -> Shown:
    """A row a method of this run: what it learns from, its objective and its learning rate."""
    meanings, rows = registry.meanings(), []
    for name, method in p.runs().items():
        changes = p.variants.get(name, {})
        changed = ", ".join(f"{n} = {v}" for n, v in changes.items() if n not in (
            "method", "loss", "loss_weights", "learning_rate"))
        rows.append({"method": name, "objective": objective(p, name),
                     "learning rate": f"{p.varied(name).learning_rate:g}",
                     "what it is": f"{method} with {changed or 'this objective and rate'}"
                     if changes else meanings[method].replace("DPO on", "pairs:")})
    return report.table(DataFrame(rows), "Methods of this run",
                      "what DPO adds is measured against the SFT on the method's own positives")


def objectives(p: DPOTraining) -> Shown:
    """The objectives of pairs from their registry, those of this run marked; the others folded."""
    runs = {name: p.varied(name) for name in p.runs() if registry.learns_pairs(name)}
    users = {o: [f"{name} (× {w:g})" for name, s in runs.items() for n, w in zip(
        s.loss, s.loss_weights, strict=True) if n == o] for o in OBJECTIVES}
    rows = DataFrame([{"name": f"{name} ({SHORT[name]})" if name in SHORT else name,
                       "term of a pair": o.meaning, "in this run": ", ".join(users[name]) or "–",
                       "damaged image": "yes" if o.damaged else "no",
                       "computed by": "TRL" if o.function is None else "bpo"}
                      for name, o in OBJECTIVES.items()])
    here = rows["in this run"] != "–"
    used, others = (rows[x].reset_index(drop=True) for x in (here, ~here))
    return Shown(report.table(used, "Objectives of this run, and who minimises them").html
                 + report.folded(f"{len(others)} more that loss can name", report.table(
                     others.drop(columns="in this run"), "Further objectives")).html,
                 plain=f"Objectives of this run: {', '.join(used['name'])}")


def budgets(p: DPOTraining, result: stages.Result) -> Shown:
    """A row a method: its rows, steps and floating point operations."""
    rows = DataFrame([
        {"method": method, "rows": m["rows"], "steps": m["steps"],
         "rows a step": p.varied(method).batch_pairs,
         "packed": {True: "yes", False: "no"}.get(m.get("packed"), "–"),
         "GFLOP a step": f"{m['flops_per_step'] / 1e9:.1f}",
         "TFLOP in all": f"{m['flops'] / 1e12:.2f}",
         "seconds": f"{result.timings[method]:.0f}" if method in result.timings else ""}
        for method, m in result.metrics["methods"].items()])
    return report.table(
        rows, "What each method was given",
        "floating point operations are counted over the first steps, forward and backward, the "
        "reference apart and once for each row; seconds on the machine named in the facts at the "
        "top")


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
        f"{m} ({objective(p, m)}) prefers the chosen answer in "
        f"{f['accuracy_last']:.0%} of its training pairs: chosen "
        f"{number(f['chosen_change'], 1, '+')}, rejected {number(f['rejected_change'], 1, '+')} "
        "nats an answer" for m, f in dpo.items())
    return report.say(
        "**The pairs were learnt**, mostly by making rejected answers unlikely: {l}." + warning
        if dpo and all(abs(f["rejected_change"]) > abs(f["chosen_change"]) for f in dpo.values())
        else "After training, {l}." + warning if dpo else
        "{n} adapters trained, none of them on pairs.", n=len(methods), l=learnt,
        far=", ".join(far), bound=p.fall_warning)
