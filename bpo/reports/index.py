"""What the folders of studies hold, as their indexes say it: which notebooks ran, what came out in
numbers with intervals, and the facts that let a reader trust them. Nothing here computes a result.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bpo.params import SCHEMAS
from bpo.reports import page as report
from bpo.reports import verify
from bpo.reports.cards import Shown
from bpo.study import stage as stages
from bpo.study import text as texts
from bpo.study.results import Estimate, behind

TITLES = {"0_tiny_world": "Tiny world", "1_noise_probability": "Noise and probability",
          "2_pair_generation": "Pair generation", "3_dpo_training": "DPO training",
          "4_qualitative_comparison": "Qualitative comparison", "5_benchmarks": "Benchmarks",
          "6_where_the_prior_comes_from": "Where the prior comes from",
          "7_replication": "Replication"}
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
    parts = []
    if noise := noise_sentence(known):
        parts.append(noise)
    if rows := numbers(known):
        from pandas import DataFrame  # takes a second to import

        parts.append(report.table(
            DataFrame(rows), "What training changed",
            "95 % bootstrap intervals over images; differences are paired, on the same questions. "
            "Better and worse are said where the interval excludes zero; it is not corrected for "
            "the number of rows."))
    if known:
        parts.append(facts(known))
    written = report.index_page(folder, entries(folder, known), parts)
    verify.write(folder, known)
    all_studies(folder.parent)
    return written


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
        "commit": one["commit"],
        "anyone can check": f"sha256sum -c {verify.SUMS}"})


def noise_sentence(known: Manifests) -> Shown | None:
    """What noise does to the probabilities, with intervals; None where notebook 1 has not run."""
    found = known.get("1_noise_probability", {}).get("metrics")
    if not found:
        return None
    last, true, prior = found["noise_steps"][-1], found["change_true"], found["change_prior"]
    return report.say(
        "From the clean image to noise step {last}, the probability of the true answer changes by "
        "**{t}**, that of the prior's answer by **{p}** ({n} images, 95 % intervals).", last=last,
        t=signed(true), p=signed(prior), n=found["images"])


def numbers(known: Manifests) -> list[dict[str, str]]:
    """One row a headline number of notebooks 4 and 5: base, the study's method, and its paired
    differences to base and to the sharpest control."""
    from bpo.evaluation import benchmarks, comparison
    from bpo.reports import benchmark_tables, tables

    rows = []
    if found := known.get("4_qualitative_comparison", {}).get("metrics"):
        split, method = tables.main_split(found), tables.main_method(found)
        control = tables.control(found, split)
        for name in COMPARED:
            label, _, more = comparison.METRICS[name]
            rows += _row(f"{label}, {split} images", found[split], found["differences"][split],
                         name, (method, control), more=more)
    if found := known.get("5_benchmarks", {}).get("metrics"):
        method, control = benchmark_tables.main_method(found), benchmark_tables.control(found)
        described = benchmarks.KNOWN
        for name, values in found["benchmarks"].items():
            metric = SHOWN.get(name, next(iter(described[name].metrics)))
            label, title = described[name].metrics[metric].label, described[name].title
            rows += _row(f"{title}: {label}", values, found["differences"][name], metric,
                         (method, control), more=described[name].metrics[metric].more)
    return rows


def _row(label: str, values: Mapping[str, Any], apart: Mapping[str, Any], name: str,
         methods: tuple[str, str], *, more: bool | None) -> list[dict[str, str]]:
    method, control = methods
    if values["base"].get(name, {}).get("value") is None or method not in values:
        return []
    row = {"measure": label, "base": plain(values["base"][name]),
           method: plain(values[method][name])}
    for against in dict.fromkeys(("base", control)):
        d = apart.get(against, {}).get(method, {}).get(name)
        row[f"{method} − {against}"] = "–"
        if d:
            estimate = Estimate(**d, more_is_better=more)
            row[f"{method} − {against}"] = signed(d) + behind(estimate.reading())
    return [row]


def plain(e: Mapping[str, Any]) -> str:
    return "–" if e["value"] is None else Estimate(e["value"], e["low"], e["high"]).text()


def signed(e: Mapping[str, Any]) -> str:
    """A difference with its interval, with signs; "–" where there is none."""
    if e["value"] is None:
        return "–"
    value, low, high = (texts.signed(e[k]) for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


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
    if found := known.get("1_noise_probability", {}).get("metrics"):
        parts.append(f"under noise P(prior's answer) {signed(found['change_prior'])}")
    for row in numbers(known)[:1]:
        measure, _, method, minus, *_ = row
        parts.append(f"{row[measure]}: {method} {row[method]}, {minus} {row[minus]}")
    executed = folder / f"{list(known)[-1]}.ipynb"  # a stage may have been computed without it
    if len(parts) == 1 and executed.is_file():
        parts.append(report.headline(executed))
    return "; ".join(filter(None, parts))
