"""Iterated BPO: later rounds of pairs and training, each from the model that the last one tuned.

A later round is a study of its own, <study>.round-<number>, made by notebooks 2 to 4 of the same
parameter files on a merged checkpoint: its reference is the model before it. Here is what a round
is given and the table over rounds; `__main__` runs the notebooks.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from bpo import records, report, runs
from bpo.galleries import Shown
from bpo.params import SOURCES, Parameters, Refusal, outputs_root

METHOD = "bpo"  # whose adapter is merged, and who is followed over the rounds
NOTEBOOKS = ("2_pair_generation", "3_dpo_training", "4_qualitative_comparison")
# The path parameters that name what an earlier notebook of the same round makes.
MADE = {"pairs": "2_pair_generation", "adapters": "3_dpo_training"}
MODEL = "outputs/{study}/model"
TABLE, PAGE = "rounds.json", "rounds.html"

Read = Mapping[str, Parameters]


class MergedModel(Parameters):
    """The model of a later round: the one of the round before with its adapter merged."""

    notebook: ClassVar[str] = "model"

    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="number format of the saved weights")


def study_of(study: str, number: int) -> str:
    """The study that holds a round of a study; the first round is the study itself."""
    return study if number == 1 else f"{study}.round-{number}"


def planned(read: Read) -> list[dict[str, Parameters]]:
    """The parameters of rounds 2, 3, ... by notebook; empty where a study has one round.

    read: the study's parameters, as `params.read_study` gives them. Raises Refusal when a later
    round could not start from what the study makes.
    """
    training = read.get("3_dpo_training")
    if training is None or training.rounds == 1:
        return []
    study, wanted = training.study, f"rounds = {training.rounds}"
    missing = [n for n in NOTEBOOKS if n not in read]
    if missing:
        raise Refusal(f"{wanted}: each round makes pairs, trains and compares, and study {study} "
                      f"has no {missing[0]}.yaml; write one or set rounds to 1")
    if METHOD not in training.methods:
        raise Refusal(f"{wanted}: each round starts from the model that {METHOD} tuned in the last "
                      f"one, and methods does not name it; add {METHOD} or set rounds to 1")
    for field, notebook in MADE.items():
        p = next(p for p in read.values() if hasattr(p, field))
        if not p.path(getattr(p, field)).is_relative_to(runs.stage_folder(study, notebook)):
            raise Refusal(f"{wanted}: each round makes its own {field}, and {p.notebook} takes "
                          f"{getattr(p, field)}; let {field} name what {notebook} makes or set "
                          "rounds to 1")
    return [{n: in_round(read[n], number) for n in NOTEBOOKS}
            for number in range(2, training.rounds + 1)]


def in_round(p: Parameters, number: int) -> Parameters:
    """A notebook's parameters as a later round runs it: its own study and model, the rest as it is.

    `{study}` in what the round makes itself is the round's study, elsewhere still the first one.
    """
    values = _named(p.model_dump(), p.study)
    for field in MADE.keys() & values.keys():
        inside = p.path(getattr(p, field)).relative_to(outputs_root() / p.study)
        values[field] = f"outputs/{{study}}/{inside.as_posix()}"
    return type(p)(**values | {"study": study_of(p.study, number), "model": MODEL})


def _named(value: Any, study: str) -> Any:
    if isinstance(value, str):
        return value.replace("{study}", study)
    if isinstance(value, dict):
        return {_named(k, study): _named(v, study) for k, v in value.items()}
    return value


def merge(before: Read, after: Read) -> runs.Result:
    """The checkpoint of a round: the model of the round before, with what `METHOD` learnt in it.

    A plain checkpoint with a manifest, in the folder model/ of the round's study. As any stage, it
    is made again only when the model or the adapter that it comes from changed.
    """
    from bpo import models  # brings transformers, which a study of one round does not need here

    training, to = before["3_dpo_training"], after["3_dpo_training"]
    base = training.path(training.model)
    adapter = runs.stage_folder(training.study, training.notebook) / METHOD / "adapter"

    def work(folder: Path) -> dict[str, Any]:
        models.merge(base, adapter, folder, precision=training.precision)
        return {"method": METHOD, "tuned_in": training.study}

    return runs.stage(MergedModel(study=to.study, precision=to.precision), work,
                      inputs={"model": base, "adapter": adapter}, modules=[models])


def _manifest(study: str, notebook: str) -> Path:
    return runs.stage_folder(study, notebook) / runs.MANIFEST


def _found(study: str, number: int, notebook: str) -> dict[str, Any]:
    file = _manifest(study_of(study, number), notebook)
    if not file.is_file():
        raise Refusal(f"{file}: round {number} of study {study} is not complete; run the study "
                      "again with the same parameters")
    return json.loads(file.read_text(encoding="utf-8"))["metrics"]


def table(study: str, *, rounds: int) -> list[dict[str, Any]]:
    """One row a split, metric and round, read from the manifests of notebook 4: {split, metric,
    round, value, low, high, n, change}. Round 0 is the model before the first round.

    change: {value, low, high, reading}, the paired difference to the model before the round; None
    in round 0. Raises Refusal when a round is not complete.
    """
    from bpo import compare  # brings transformers

    found = [_found(study, r, "4_qualitative_comparison") for r in range(1, rounds + 1)]
    rows = []
    for split in (s for s in found[0] if s != "differences"):
        changes = [{d["metric"]: {n: d[n] for n in ("value", "low", "high", "reading")}
                    for d in compare.differences(f, split, METHOD, "base")} for f in found]
        for name in compare.shown_metrics(found[0], split):
            label = compare.METRICS[name][0]
            series = [found[0][split]["base"], *(f[split][METHOD] for f in found)]
            rows += [{"split": split, "metric": label, "round": r, **estimates[name],
                      "change": changes[r - 1].get(label) if r else None}
                     for r, estimates in enumerate(series)]
    return rows


def merging_moved(study: str, *, rounds: int) -> float:
    """The largest difference of any measure between a tuned model and its merged checkpoint, which
    is the base of the next round: what rounding did, since the two are meant to be one model."""
    found = [_found(study, r, "4_qualitative_comparison") for r in range(1, rounds + 1)]
    moved = [abs(after[split]["base"][name]["value"] - estimate["value"])
             for before, after in zip(found, found[1:], strict=False)
             for split in before if split != "differences"
             for name, estimate in before[split][METHOD].items()
             # that one is counted against the round's own base
             if name != "changed" and None not in (estimate["value"],
                                                   after[split]["base"][name]["value"])]
    return max(moved, default=0.0)


def pair_counts(study: str, *, rounds: int) -> list[dict[str, Any]]:
    """One row a round: annotated rows, positives with a rejected answer, pairs, the candidates of
    each source and how many were kept, and the steps that `METHOD` trained."""
    out = []
    for r in range(1, rounds + 1):
        found, trained = (_found(study, r, n) for n in NOTEBOOKS[:2])
        out.append({"round": r, **{n: found[n] for n in ("rows", "positives", "pairs")},
                    **{s: {n: found[s][n] for n in ("candidates", "kept")}
                       for s in SOURCES if s in found},
                    "steps": trained["methods"][METHOD]["steps"]})
    return out


def write(study: str, *, rounds: int) -> list[Shown]:
    """Writes rounds.json and rounds.html into the study's folder; the page's parts, which a
    terminal shows as plain text."""
    held = {"study": study, "rounds": rounds, "measures": table(study, rounds=rounds),
            "pairs": pair_counts(study, rounds=rounds),
            "merging_moved": merging_moved(study, rounds=rounds),
            "comparisons": {s: runs.file_hash(_manifest(s, "4_qualitative_comparison"))
                            for s in (study_of(study, r) for r in range(1, rounds + 1))}}
    parts = _parts(held)
    folder = outputs_root() / study
    records.write_whole(folder / TABLE, records.to_json(held, indent=1) + "\n")
    report.results_page(folder / PAGE, f"Rounds of study {study}", parts)
    return parts


def written(study: str) -> dict[str, Any] | None:
    """What rounds.json holds, or None where there is none or a comparison has changed since."""
    file = outputs_root() / study / TABLE
    if not file.is_file():
        return None
    held = json.loads(file.read_text(encoding="utf-8"))
    known = {_manifest(s, "4_qualitative_comparison"): h for s, h in held["comparisons"].items()}
    return held if all(m.is_file() and runs.file_hash(m) == h for m, h in known.items()) else None


def headline(held: Mapping[str, Any]) -> str:
    return (f"{held['rounds']} rounds; pairs made in each: "
            + ", ".join(str(k["pairs"]) for k in held["pairs"]))


def _parts(held: Mapping[str, Any]) -> list[Shown]:
    from pandas import DataFrame

    parts = [
        report.say("**{rounds} rounds.** Each makes its negatives anew, the weakened ones by the "
                   "model that the round before tuned, and trains against that model as its "
                   "reference. The parameters are the same in each; where epochs sets the steps, "
                   "fewer pairs mean fewer steps.", rounds=held["rounds"]),
        report.say("Rounds are compared without a correction for multiple looks: of many "
                   "differences some exclude zero by chance, and the best round of several looks "
                   "better than it is. All rounds share one seed."),
        report.say("A round starts from a merged checkpoint. Merging moved no measure by more than "
                   "{moved:.4f}.", moved=held["merging_moved"]),
        report.table(DataFrame(_pair_lines(held["pairs"])), "Pairs of each round",
                     "Kept: not empty, not the annotation, chosen among the candidates.")]
    for split in dict.fromkeys(r["split"] for r in held["measures"]):
        mine = [r for r in held["measures"] if r["split"] == split]
        out_of = ", ".join(f"{r['metric']} {r['n']}" for r in mine if r["round"] == 0)
        parts += [
            report.table(DataFrame(_lines(mine, _value)), f"{split}: the model after each round",
                         f"95 % bootstrap intervals over images; out of (base): {out_of}"),
            report.table(DataFrame(_lines([r for r in mine if r["round"]], _change)),
                         f"{split}: each round against the model before it",
                         "Paired differences. Better and worse: the 95 % interval excludes zero.")]
    return parts


def _pair_lines(counts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"round": k["round"], "rows": k["rows"], "with a rejected answer": k["positives"],
             "pairs": k["pairs"], **{f"{s}, kept": f"{k[s]['kept']} of {k[s]['candidates']}"
                                     for s in SOURCES if s in k}, "steps": k["steps"]}
            for k in counts]


def _lines(rows: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any]], str]
           ) -> list[dict[str, str]]:
    """One line a metric, one column a round."""
    lines: dict[str, dict[str, str]] = {}
    for r in rows:
        line = lines.setdefault(r["metric"], {"metric": r["metric"]})
        line[f"round {r['round']}" if r["round"] else "base"] = cell(r)
    return list(lines.values())


def _value(row: Mapping[str, Any]) -> str:
    return "–" if row["value"] is None else report.estimate(row["value"], row["low"], row["high"])


def _change(row: Mapping[str, Any]) -> str:
    d = row["change"]
    if d is None:
        return "–"
    reading = f" {d['reading']}" if d["reading"] in ("better", "worse") else ""
    return report.estimate(d["value"], d["low"], d["high"], sign="+") + reading
