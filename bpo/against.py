"""Two studies held side by side: the parameters that differ, what else does (versions, inputs,
code), and the results that do. `python -m bpo compare STUDY OTHER` writes the page.

The studies may have answered different questions, so nothing is paired here: where two intervals
overlap, nothing is claimed.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpo import records, report, studies
from bpo.galleries import Shown
from bpo.params import Refusal, outputs_root, short

Manifest = Mapping[str, Any]
LISTS = ("inputs", "modules", "versions")  # of a manifest, each a name -> value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study")
    parser.add_argument("other", help="the study that it is held against")


def run(options: argparse.Namespace) -> int:
    page = write(options.study, options.other)
    print(f"the comparison is {short(page)}")
    return 0


def write(study: str, other: str) -> Path:
    """Writes against-<other>.html and .json into outputs/<study>/, and the index that names them;
    the page. Raises Refusal when either has no complete stage or they share none."""
    root = outputs_root()
    both = [_read(root / name) for name in (study, other)]
    if study == other:
        raise Refusal(f"{study} is held against itself: name two studies")
    if not both[0].keys() & both[1].keys():
        raise Refusal(f"{study} and {other} have no notebook in common: {study} has "
                      f"{', '.join(both[0])}, {other} has {', '.join(both[1])}")
    held = compared(*both) | {"numbers": _numbers(study, other, *map(studies.numbers, both))}
    folder = root / study
    page = folder / f"{studies.AGAINST}{other}.html"
    records.write_whole(page.with_suffix(".json"), records.to_json(
        {"study": study, "other": other, **held}, indent=1) + "\n")
    report.results_page(page, f"Study {study} against {other}", parts(study, other, held))
    studies.index(folder)
    return page


def _read(folder: Path) -> dict[str, Manifest]:
    known = studies.manifests(folder)
    if not known:
        raise Refusal(f"{folder}: no stage has finished here; python -m bpo run {folder.name}, or "
                      "name another study")
    return known


def compared(mine: Mapping[str, Manifest], other: Mapping[str, Manifest]) -> dict[str, Any]:
    """What differs between the stages that both studies have.

    {"notebooks", "alone": notebooks of one study only, "parameters": [{notebook, name, mine,
    other}], "circumstances": the same of versions, inputs and code, "results": [{notebook, result,
    mine, other}] where mine and other are estimates {value, low, high} or plain numbers, "same":
    how many results do not differ}.
    """
    shared = [n for n in mine if n in other]
    rows: dict[str, Any] = {"notebooks": shared,
                            "alone": sorted(mine.keys() ^ other.keys()),
                            "parameters": [], "circumstances": [], "results": [], "same": 0}
    for notebook in shared:
        a, b = mine[notebook], other[notebook]
        rows["parameters"] += _unlike(notebook, a["parameters"], b["parameters"])
        for kind in LISTS:
            rows["circumstances"] += _unlike(notebook, a[kind], b[kind], kind=kind)
        single = {k: {k: m[k] for k in ("commit", "device", "python", "processes")}
                  for k, m in (("a", a), ("b", b))}
        rows["circumstances"] += _unlike(notebook, single["a"], single["b"])
        left, right = (dict(_results(m["metrics"])) for m in (a, b))
        for name in (n for n in left if n in right):
            if left[name] == right[name]:
                rows["same"] += 1
            else:
                rows["results"].append({"notebook": notebook, "result": name,
                                        "mine": left[name], "other": right[name]})
    return rows


def _numbers(study: str, other: str, mine: list[dict[str, str]], others: list[dict[str, str]]
             ) -> list[dict[str, str]]:
    """The headline differences of both studies, one row a measure that both have."""
    known = {row["measure"]: row for row in others}
    out = []
    for row in mine:
        measure, *_ = row.values()
        if measure in known:
            out.append({"measure": measure} | {
                f"{name}: {n}": v for name, its in ((study, row), (other, known[measure]))
                for n, v in its.items() if " − base" in n})
    return out


def _unlike(notebook: str, mine: Mapping[str, Any], other: Mapping[str, Any], *, kind: str = ""
            ) -> list[dict[str, Any]]:
    return [{"notebook": notebook, "name": f"{kind}: {n}" if kind else n, "mine": mine.get(n),
             "other": other.get(n)} for n in dict.fromkeys([*mine, *other])
            if mine.get(n) != other.get(n)]


def _results(metrics: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every estimate and every plain number below a manifest's metrics, by its place in them."""
    if not isinstance(metrics, Mapping):
        if isinstance(metrics, int | float) and not isinstance(metrics, bool):
            yield " · ".join(path), metrics
    elif {"value", "low", "high"} <= metrics.keys():
        if metrics["value"] is not None:
            yield " · ".join(path), {k: metrics[k] for k in ("value", "low", "high")}
    else:
        for name, inner in metrics.items():
            yield from _results(inner, (*path, str(name)))


def parts(study: str, other: str, held: Mapping[str, Any]) -> list[Shown]:
    """The page: what was asked differently, what else differs, what came out."""
    from pandas import DataFrame

    estimates = [r for r in held["results"] if isinstance(r["mine"], Mapping)]
    apart = [r for r in estimates if _apart(r["mine"], r["other"])]
    shown = [report.say(
        "Of {n} results that both studies have, {same} are equal. Of the {e} that differ and have "
        "an interval, **{a}** have intervals that do not overlap. Nothing here is paired: answers "
        "to the same questions are compared better by python -m bpo score with --against.",
        n=held["same"] + len(held["results"]), same=held["same"], e=len(estimates), a=len(apart))]
    if held["alone"]:
        shown.append(report.say("In one study alone: {names}.", names=", ".join(held["alone"])))
    shown.append(_table_of_unlike(held["parameters"], "Parameters that differ", study, other))
    if held["numbers"]:
        shown.append(report.table(DataFrame(held["numbers"]), "What training changed, in each",
                                  "95 % bootstrap intervals over images; each difference is "
                                  "paired within its own study"))
    shown.append(_table_of_unlike(held["circumstances"], "Versions, inputs and code that differ",
                                  study, other))
    for notebook in held["notebooks"]:
        rows = [r for r in apart if r["notebook"] == notebook and _headline(r["result"])]
        if rows:
            shown.append(report.table(DataFrame(
                [{"result": r["result"], study: studies.plain(r["mine"]),
                  other: studies.plain(r["other"])} for r in rows]),
                f"{notebook}: results whose 95 % intervals are apart",
                "Of the methods base and bpo and their difference. All results are in the file of "
                "this page's name that ends in .json."))
    return shown


def _table_of_unlike(rows: Sequence[Mapping[str, Any]], title: str, study: str, other: str
                     ) -> Shown:
    """One row a difference, with all the notebooks that have it."""
    from pandas import DataFrame

    if not rows:
        return report.say("{title}: none.", title=title)
    lines: dict[tuple[str, str, str], list[str]] = {}
    for r in rows:
        lines.setdefault((r["name"], _told(r["mine"]), _told(r["other"])), []).append(
            r["notebook"].split("_")[0])
    return report.table(DataFrame([{"name": name, study: a, other: b, "notebooks": ", ".join(n)}
                                   for (name, a, b), n in lines.items()]), title)


def _headline(result: str) -> bool:
    """Whether a result is of base or bpo, or of no method at all: the page shows these."""
    words = result.split(" · ")
    if "differences" in words:
        return "base" in words and "bpo" in words
    methods = [w for w in words if w == "base" or w.startswith(("sft", "bpo"))]
    return set(methods) <= {"base", "bpo"}


def _apart(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    return a["low"] > b["high"] or b["low"] > a["high"]


def _told(value: Any) -> str:
    """A parameter or hash for people: "not there", or at most 60 characters."""
    text = "not there" if value is None else str(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= 60 else text[:59] + "…"
