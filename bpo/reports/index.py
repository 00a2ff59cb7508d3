"""What the folders of studies hold, as their indexes say it: which notebooks ran, what came out in
numbers with intervals, and the facts that let a reader trust them. Nothing here computes a result.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo.params import SCHEMAS, Refusal
from bpo.reports import page as report
from bpo.reports.cards import Shown
from bpo.study import environment, results, verify
from bpo.study import stage as stages

if TYPE_CHECKING:
    from pandas import DataFrame

TITLES = {"0_tiny_world": "Tiny world", "1_noise_probability": "Noise and probability",
          "2_pair_generation": "Pair generation", "3_dpo_training": "DPO training",
          "4_qualitative_comparison": "Qualitative comparison", "5_benchmarks": "Benchmarks",
          "6_where_the_prior_comes_from": "Where the prior comes from",
          "7_replication": "Replication", "8_dose_and_response": "Dose and response"}
COMPARED = ("chair_i", "cover", "p_true", "p_prior", "pope_adversarial")  # of notebook 4
# The number of each benchmark that an index shows; of another benchmark its first.
SHOWN = {"chair": "chair_i", "object-halbench": "response", "pope": "f1", "amber": "amber_score"}
INPUTS = 8  # inputs that a study's box names
AGAINST = "against-"  # begins the name of a page that compares with another study

Manifests = Mapping[str, Mapping[str, Any]]


def manifests(folder: Path) -> dict[str, dict[str, Any]]:
    """notebook -> the manifest of its complete stage, in the notebooks' order."""
    return {n: stages.read_manifest(folder / n)
            for n in SCHEMAS if (folder / n / stages.MANIFEST).is_file()}


def index(folder: Path) -> Path:
    """Writes the study's index.html, the hashes of its files and the list of all studies beside it;
    the path of the first."""
    known = manifests(folder)
    parts = [*came_out(folder.name), facts(known)] if known else []
    written = report.index_page(folder, entries(folder, known), parts)
    verify.write(folder, known)
    all_studies(folder.parent)
    return written


def came_out(study: str) -> list[Shown]:
    """What noise does to the probabilities and what training changed, as far as that was computed.
    """
    try:
        frame = results.of_study(study)
    except Refusal as refusal:  # an older version of the kit computed it
        return [report.say("{r}", r=refusal)]
    parts = []
    if change := noise(frame):
        parts.append(report.say(
            "From the clean image to noise {last}, the probability of the true answer changes by "
            "**{p_true}**, that of the prior's answer by **{p_prior}** ({n:.0f} images, 95 % "
            "intervals).", **change))
    rows = numbers(frame)
    if len(rows):
        parts.append(report.table(
            rows, "What training changed",
            "95 % bootstrap intervals over images; differences are paired, on the same questions. "
            "Better and worse are said where the interval excludes zero; it is not corrected for "
            "the number of rows."))
    return parts


def entries(folder: Path, known: Manifests) -> list[dict[str, Any]]:
    """What `report.index_page` lists of a study: its executed notebooks and the pages made of
    several."""
    found = []
    for name in SCHEMAS:
        executed = folder / f"{name}.ipynb"
        if not executed.is_file():
            continue
        failure = report.failure_message(executed)
        found.append({
            "name": name, "title": TITLES[name], "status": "failed" if failure else "complete",
            "headline": "" if failure else report.headline(executed),
            "seconds": known[name]["seconds"] if name in known else None,
            "message": failure or "", "html": f"{name}.html", "ipynb": executed.name,
            "manifest": f"{name}/{stages.MANIFEST}" if name in known else None})
    for page in sorted(folder.glob(f"{AGAINST}*.html")):
        other = page.stem.removeprefix(AGAINST)
        found.append({"name": page.name, "title": f"Against {other}", "status": "complete",
                      "headline": f"What differs from study {other}: parameters, versions, results",
                      "html": page.name})
    return found


def facts(known: Manifests) -> Shown:
    """The box of a study: what all of its stages share, and what differs from the defaults."""
    one = {key: ", ".join(dict.fromkeys(str(m[key]) for m in known.values()))
           for key in ("study", "device", "commit")}
    changed = {n: v for m in known.values() for n, v in stages.changed(m).items()}
    seeds = ", ".join(dict.fromkeys(str(m["parameters"]["seed"]) for m in known.values()))
    inputs = list(dict.fromkeys(f"{n} {h[:8]}" for m in known.values()
                                for n, h in m["inputs"].items()))
    more = f", and {len(inputs) - INPUTS} more in the manifests" if len(inputs) > INPUTS else ""
    first = next(iter(known.values()))
    return report.facts({
        "study": one["study"], "seed": seeds,
        "computed": f"up to {max(m['finished'] for m in known.values())}, "
                    f"{sum(m['seconds'] for m in known.values()):.0f} s in all, on {one['device']}",
        "differs from the defaults": ", ".join(f"{n} = {v}" for n, v in changed.items())
                                     or "nothing",
        "inputs": ", ".join(inputs[:INPUTS]) + more if inputs else "none",
        "versions": ", ".join(f"{k} {v}" for k, v in first["versions"].items()),
        "kernels": environment.kernels(known.values()), "commit": one["commit"],
        "anyone can check": f"sha256sum -c {verify.SUMS}"})


def noise(frame: "DataFrame") -> dict[str, Any]:
    """{last: "step N", n: images, p_true, p_prior}: how the last noise step changes both
    probabilities; {} where notebook 1 has not run."""
    rows = frame.query("notebook == '1_noise_probability' and category == 'noise'")
    rows = rows.drop(columns="more_is_better")
    changes = rows[rows["against"] != ""]
    if changes.empty:
        return {}
    return {"last": changes["split_or_benchmark"].iloc[0], "n": rows["n"].iloc[0],
            **dict(zip(changes["metric"], results.texts(changes), strict=True))}


def numbers(frame: "DataFrame") -> "DataFrame":
    """A row a headline number of notebooks 4 and 5: base, the study's method, and its paired
    differences to base and to the sharpest control."""
    # here, since torch comes with them
    import pandas

    from bpo.evaluation import benchmarks, comparison
    from bpo.reports import tables

    main = comparison.main_split(frame)
    frame = frame.query("notebook in ('4_qualitative_comparison', '5_benchmarks')")
    method, control = tables.main_method(frame), tables.control(frame)
    wanted = [(main, metric, f"{benchmarks.label(main, metric)}, {main} images")
              for metric in COMPARED]
    for name in frame["split_or_benchmark"].unique():
        if name in benchmarks.KNOWN:
            metric = SHOWN.get(name, next(iter(benchmarks.described(name))))
            label = f"{benchmarks.title(name)}: {benchmarks.label(name, metric)}"
            wanted.append((name, metric, label))
    against = list(dict.fromkeys(("base", control)))
    rows = pandas.concat([tables.levels(frame).query("method in ('base', @method)"),
                          tables.differences(frame).query("against in @against")])
    keys = ["split_or_benchmark", "metric"]
    rows = pandas.DataFrame(wanted, columns=[*keys, "measure"]).merge(
        rows.dropna(subset="value"), on=keys)
    rows = rows.assign(column=results.names(rows), text=results.texts(rows))
    return rows.set_index(["measure", "column"])["text"].unstack(sort=False).reindex(
        columns=["base", method, *(f"{method} − {b}" for b in against)]).fillna("–").reset_index()


def all_studies(root: Path) -> Path:
    """Writes outputs/index.html: every study that was run, its state and its first numbers."""
    listed = []
    for folder in sorted(f for f in root.iterdir() if (f / "index.html").is_file()):
        known = manifests(folder)
        failed = [e["title"] for e in entries(folder, known) if e["status"] == "failed"]
        listed.append({
            "title": folder.name, "status": "failed" if failed else "complete",
            "headline": _first_numbers(folder, known) if known else "",
            "html": f"{folder.name}/index.html",
            "seconds": sum(m["seconds"] for m in known.values()),
            "message": "failed: " + ", ".join(failed) if failed else ""})
    return report.studies_page(root, listed)


def _first_numbers(folder: Path, known: Manifests) -> str:
    seed = next(iter(known.values()))["parameters"]["seed"]
    parts = [f"seed {seed}; notebooks {', '.join(n.split('_')[0] for n in known)}"]
    try:
        frame = results.of_study(folder.name)
    except Refusal as refusal:
        return f"{parts[0]}; {refusal}"
    if change := noise(frame):
        parts.append(f"under noise P(prior's answer) {change['p_prior']}")
    for row in numbers(frame).head(1).to_dict("records"):
        measure, _, method, minus, *_ = row
        parts.append(f"{row[measure]}: {method} {row[method]}, {minus} {row[minus]}")
    executed = folder / f"{list(known)[-1]}.ipynb"  # a stage may have been computed without it
    if len(parts) == 1 and executed.is_file():
        parts.append(report.headline(executed))
    return "; ".join(filter(None, parts))
