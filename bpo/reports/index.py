"""What the folders of studies hold, as their indexes say it: which notebooks ran, what came out in
numbers with intervals, and the facts that let a reader trust them. Nothing here computes a result.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo.params import SCHEMAS, Refusal, outputs_root
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
COMPARED = ("p_true", "p_prior", "chair_i", "cover", "pope_adversarial")  # of notebook 4
INPUTS = 8  # inputs that a study's box names
AGAINST = "against-"  # begins the name of a page that compares with another study

PREVIEW = "preview.png"  # what a forwarded link shows
ABOUT = (
    "Bootstrapped Preference Optimization (BPO, arXiv 2403.08730) trains a model to prefer "
    "annotated answers to what it says itself when noise drowns its picture, and to the answers "
    "with mistakes put in.")

Manifests = Mapping[str, Mapping[str, Any]]


def manifests(folder: Path) -> dict[str, dict[str, Any]]:
    """notebook -> the manifest of its complete stage, in the notebooks' order."""
    return {n: stages.read_manifest(folder / n)
            for n in SCHEMAS if (folder / n / stages.MANIFEST).is_file()}


def index(folder: Path, *, address: str = "") -> Path:
    """Writes the study's index.html with its preview, the hashes of its files and the list of all
    studies beside it; the path of the first. address: that of the folder on the web, if known."""
    known = manifests(folder)
    try:
        shown, preview = screen(folder.name, known)
    except Refusal as refusal:  # an older version of the kit computed it
        shown, preview = {"parts": [report.say("{r}", r=refusal)]}, None
    (folder / PREVIEW).unlink(missing_ok=True)
    if preview:
        (folder / PREVIEW).write_bytes(preview)
        shown["image"] = f"{address}/{PREVIEW}" if address else PREVIEW
    written = report.index_page(folder, entries(folder, known), **shown,
                                facts=facts(known) if known else None)
    verify.write(folder, known)
    all_studies(folder.parent)
    return written


def screen(study: str, known: Manifests) -> tuple[dict[str, Any], bytes | None]:
    """What an index says before its notebooks, as far as that was computed: {question, about, word,
    sentence, sure, change: texts; left, right, parts: what is shown}, and the preview, a PNG."""
    # here, since torch comes with them
    from bpo.evaluation import claims, comparison, replication
    from bpo.reports import seen
    from bpo.reports.tables import summary

    frame, seeds = claims.measured(study), seeds_of(study)
    if len(seeds) >= replication.FEWEST:
        over = replication.read(seeds)
    elif frame.empty and replication.stored_file(study).is_file():
        over = replication.stored(study)  # its seeds are elsewhere
    elif frame.empty:
        return {}, None
    else:
        over = None
    mean = None if over is None else replication.over_seeds(over)
    table = frame if over is None else mean
    first = over["study"].iloc[0] if frame.empty else study
    known, main = known or manifests(outputs_root() / first), comparison.main_split(table)
    decided = summary.on_main(
        claims.decided(frame) if over is None else replication.claims_over(over), main)
    whose = (f"seed {seed_of(known)}" if over is None
             else f"mean of {over['seed'].nunique()} seeds")
    example = seen.example(first)
    eyes = [seen.eye(one) for one in ([study] if over is None else over["study"].unique())]
    shares = seen.shares(table, None if None in eyes else sum(eyes) / len(eyes))
    left = [seen.strip(example)] if example else []
    if shares:
        left.append(seen.bars(shares, f"{seen.population(table)}, {whose}."))
    shown = {"left": left, "right": [summary.matrix(decided)] if len(decided) else [],
             "parts": came_out(table, whose)}
    word, sentence = summary.answer(decided)
    if not word:
        return shown, None
    shown |= {"question": summary.QUESTION, "about": ABOUT + objective(known), "word": word,
              "sentence": sentence, "replication": replicated(study),
              "sure": f"{how_sure(study, known, over)} {claims.ruler(table)}".strip(),
              "change": would_change(table, main, known)}
    return shown, seen.saved(seen.drawing(
        shares, title=summary.QUESTION, words=f"{word}. {sentence}", found=example), "png")


def seeds_of(study: str) -> dict[int, str]:
    """seed -> study, of the replication that a study belongs to, as far as it has come."""
    from bpo.evaluation import replication
    from bpo.params import QualitativeComparison, Replication

    base = re.sub(r"-seed\d+$", "", study)
    for names in ([], [f.name for f in sorted(outputs_root().glob(f"{base}*"))
                       if re.fullmatch(rf"{re.escape(base)}(-seed\d+)?", f.name)
                       and (f / QualitativeComparison.notebook / stages.MANIFEST).is_file()]):
        try:
            return replication.by_seed(Replication(study=base, studies=names))
        except Refusal:  # one is not done, or two have one seed
            continue
    return {}


def seed_of(known: Manifests) -> int:
    return next(iter(known.values()))["parameters"]["seed"]


def objective(known: Manifests) -> str:
    """What the methods of a study minimise, where that is not the paper's."""
    loss = known.get("3_dpo_training", {}).get("parameters", {}).get("loss", ["sigmoid"])
    trained = " + ".join({"sigmoid": "DPO", "sft": "SFT"}.get(name, name) for name in loss)
    return f" Here bpo trains {trained}; the paper trains DPO alone." if trained != "DPO" else ""


def how_sure(study: str, known: Manifests, over: "DataFrame | None") -> str:
    """What a verdict is out of."""
    if over is not None:
        count = over["seed"].nunique()
        return (f"{count} training runs, seeds {over['seed'].min()} to {over['seed'].max()}; "
                "verdicts are by 95 % intervals over seeds.")
    return (f"One training run, seed {seed_of(known)}: verdicts are by 95 % intervals over images, "
            "and another seed can turn a verdict round. python -m bpo replicate "
            f"{re.sub(r'-seed[0-9]+$', '', study)} --seeds 100-111 tells.")


def replicated(study: str) -> str:
    """Where the page of a study's replication is, from its index; "" where there is none."""
    base = re.sub(r"-seed\d+$", "", study)
    page = outputs_root() / base / "7_replication.html"
    return os.path.relpath(page, outputs_root() / study) if page.is_file() else ""


def would_change(frame: "DataFrame", main: str, known: Manifests) -> list[str]:
    """What hides in the intervals, which verdict is the nearest to turning, and whose it is."""
    from bpo.evaluation import benchmarks, claims

    rows = frame[(frame["split_or_benchmark"] == main) & (frame["method"] == claims.METHOD)
                 & (frame["against"] == "base") & frame["metric"].isin(COMPARED)]
    rows = rows.dropna(subset=["value", "low"])
    found = list(zip(benchmarks.labels(rows), results.estimates(rows), strict=True))
    hidden = [f"{label} below ±{(e.high - e.low) / 2:.3f}" for label, e in found
              if not e.excludes_zero()]
    sure = sorted((min(abs(e.low), abs(e.high)) / (e.high - e.low), label, e.text(sign="+"))
                  for label, e in found if e.excludes_zero() and e.high > e.low)
    return [*([f"A true difference in {', '.join(hidden)} would not be seen with so many images "
               "and seeds."] if hidden else []),
            *(f"Nearest to turning round: {label}, {text}." for _, label, text in sure[:1]),
            *(["This is a drawn world of ten objects: it shows how the method works, not what it "
               "does to a 7B model."] if "0_tiny_world" in known else [])]


def came_out(frame: "DataFrame", whose: str) -> list[Shown]:
    """What training changed, as far as that was computed."""
    rows = numbers(frame)
    over = "t intervals over seeds" if "seeds" in frame else "bootstrap intervals over images"
    return [report.table(
        rows, f"What training changed, {whose}",
        f"↑ more is better, ↓ less is better; n: what the base's number is out of. 95 % {over}; "
        "differences are paired, on the same questions. Better and worse are said where the "
        "interval excludes zero; it is not corrected for the number of rows.")] if len(rows) else []


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


def numbers(frame: "DataFrame") -> "DataFrame":
    """A row a headline number of notebooks 4 and 5: the paired differences of the study's method to
    the base and to the sharpest control, then both levels. Benchmarks have the number that decides
    their claim."""
    # here, since torch comes with them
    import pandas

    from bpo.evaluation import benchmarks, claims, comparison
    from bpo.reports.tables import score_tables

    main = comparison.main_split(frame)
    frame = frame.query("notebook in ('4_qualitative_comparison', '5_benchmarks')")
    method, control = score_tables.main_method(frame), score_tables.control(frame)
    wanted = [(main, metric, f"{main} images") for metric in COMPARED]
    for name in frame["split_or_benchmark"].unique():
        if name in benchmarks.KNOWN:
            wanted.append((name, claims.deciding(name)[0], benchmarks.title(name)))
    against = list(dict.fromkeys(("base", control)))
    # The differences decide: intervals of the levels are on the notebooks' own pages.
    levels = score_tables.levels(frame).query("method in ('base', @method)")
    rows = pandas.concat([score_tables.differences(frame).query("against in @against"),
                          levels.assign(low=None, high=None)])
    keys = ["split_or_benchmark", "metric"]
    rows = pandas.DataFrame(wanted, columns=[*keys, "of"]).merge(
        rows.dropna(subset="value"), on=keys)
    out_of = rows[rows["method"] == "base"].set_index(keys).get("n", {})
    rows["measure"] = [
        f"{benchmarks.label(r.split_or_benchmark, r.metric)} "
        f"{score_tables.ARROWS.get(r.more_is_better, '')}, "
        + r.of + (f", n {out_of[place]:.0f}" if (
            place := (r.split_or_benchmark, r.metric)) in out_of else "")
        for r in rows.itertuples()]
    rows = rows.assign(column=results.names(rows), text=results.texts(rows))
    return rows.set_index(["measure", "column"])["text"].unstack(sort=False).reindex(
        columns=[*(f"{method} − {b}" for b in against), "base", method]).fillna("–").reset_index()


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
    for row in numbers(frame).head(1).to_dict("records"):
        measure, minus, *_, method = row
        parts.append(f"{row[measure]}: {method} {row[method]}, {minus} {row[minus]}")
    executed = folder / f"{list(known)[-1]}.ipynb"  # a stage may have been computed without it
    if len(parts) == 1 and executed.is_file():
        parts.append(report.headline(executed))
    return "; ".join(filter(None, parts))
