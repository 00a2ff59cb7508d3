"""A study over several seeds: what each seed gave, the mean with its interval, and on how many
seeds each claim holds. A page that no notebook holds; `__main__` runs the studies.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bpo import records, replication_page, report, runs
from bpo.galleries import Shown
from bpo.params import Refusal, outputs_root

TABLE, PAGE = "replication.json", "replication.html"
WORLD, NOISE, COMPARISON, BENCHMARKS = ("0_tiny_world", "1_noise_probability",
                                        "4_qualitative_comparison", "5_benchmarks")
METHODS = ("base", "sft", "sft_matched", "sft_compute", "bpo")
AGAINST = METHODS[:-1]
METRICS = ("chair_i", "cover", "p_true", "p_prior", "pope_random", "pope_popular",
           "pope_adversarial")
FEWEST = 3  # seeds: two give an interval that says nothing

Studies = Mapping[int, str]  # seed -> study
Series = dict[str, Any]


def studies(study: str, *, seed: int, count: int) -> dict[int, str]:
    """seed -> study of a replication: the study itself under its own seed, then the seeds after
    it, each in a study of its own."""
    return {s: study if s == seed else f"{study}-seed{s}" for s in range(seed, seed + count)}


def over_seeds(found: Mapping[int, Mapping[str, Any]]) -> Series:
    """{seeds, mean, low, high} of one number over seeds.

    seeds: a {seed, value, low, high} each, with the interval over images that it came with, if any.
    low, high: mean -/+ t(0.975, k - 1) s / sqrt(k), the 95 % interval over k seeds (s: standard
    deviation between them); None below `FEWEST` seeds. It takes seeds as draws from a normal
    distribution and says how far the mean over seeds is known, not how far one seed lies from it.
    """
    from scipy import stats  # a second to import, and only those who write a page need it

    values = [e["value"] for e in found.values()]
    mean, low, high = sum(values) / len(values), None, None
    if len(values) >= FEWEST:
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        half = stats.t.ppf(0.975, len(values) - 1) * deviation / math.sqrt(len(values))
        low, high = round(mean - half, 6), round(mean + half, 6)
    return {"seeds": [{"seed": s, **{k: e.get(k) for k in ("value", "low", "high")}}
                      for s, e in found.items()],
            "mean": round(mean, 6), "low": low, "high": high}


def noise(studies: Studies) -> list[Series]:
    """A series a measure and noise step, and of the paired change from the clean image to the last
    step (step None): {name, metric, step, ...}. Empty where notebook 1 has not run for every seed
    with the same steps."""
    found = _metrics(studies, NOISE)
    steps = {tuple(m["noise_steps"]) for m in found.values()}
    if len(steps) != 1:
        return []
    rows = []
    for name, metric in (("true", "P(true answer)"), ("prior", "P(prior's answer)")):
        row = {"name": f"p_{name}", "metric": metric}
        for place, step in enumerate(*steps):
            rows += _series(row | {"step": step}, {
                s: {"value": m[f"p_{name}"][place],
                    **dict(zip(("low", "high"), m[f"p_{name}_interval"][place], strict=True))}
                for s, m in found.items()})
        rows += _series(row | {"step": None}, {s: m[f"change_{name}"] for s, m in found.items()})
    return rows


def levels(studies: Studies) -> list[Series]:
    """A series a split or benchmark, method and metric: {where, method, name, metric, more, ...}.

    Only what every seed measured; hallucination stands beside cover.
    """
    rows = []
    for where, found, known in _places(studies):
        for method in METHODS:
            for name, (metric, more) in known.items():
                rows += _series(
                    {"where": where, "method": method, "name": name, "metric": metric,
                     "more": more},
                    {s: m[0].get(method, {}).get(name) for s, m in found.items()})
    return rows


def differences(studies: Studies) -> list[Series]:
    """A series a split or benchmark, baseline and metric, of BPO minus the baseline: {where,
    against, name, metric, more, ...}. The seeds' intervals are those of paired differences."""
    rows = []
    for where, found, known in _places(studies):
        for against in AGAINST:
            for name, (metric, more) in known.items():
                rows += _series(
                    {"where": where, "against": against, "name": name, "metric": metric,
                     "more": more},
                    {s: m[1].get(against, {}).get(METHODS[-1], {}).get(name)
                     for s, m in found.items()})
    return rows


def own_worlds(studies: Studies) -> bool:
    """Whether every seed built its own model and data, which notebook 0 does."""
    return all((runs.stage_folder(its, WORLD) / runs.MANIFEST).is_file()
               for its in studies.values())


def _series(row: dict[str, Any], found: Mapping[int, Mapping[str, Any] | None]) -> list[Series]:
    whole = found and all(e is not None and e["value"] is not None for e in found.values())
    return [row | over_seeds(found)] if whole else []


def _places(studies: Studies) -> list[tuple[str, dict[int, tuple[dict, dict]], dict]]:
    """(name, seed -> (levels by method, differences by baseline), metrics) of every split of
    notebook 4 and every benchmark of notebook 5 that all seeds have."""
    from bpo import claims  # brings transformers
    from bpo.held_out import METRICS as COMPARED

    places = []
    compared, measured = _metrics(studies, COMPARISON), _metrics(studies, BENCHMARKS)
    known = {n: (COMPARED[n][0], COMPARED[n][2]) for n in METRICS}
    for split in _shared([{k for k in m if k != "differences"} for m in compared.values()]):
        places.append((split, {s: (m[split], m["differences"][split])
                               for s, m in compared.items()}, known))
    for name in _shared([set(m["benchmarks"]) for m in measured.values()]):
        title, known = claims.benchmark(name)
        places.append((title, {s: (m["benchmarks"][name], m["differences"][name])
                               for s, m in measured.items()}, known))
    return places


def _shared(names: Sequence[set[str]]) -> list[str]:
    return sorted(set.intersection(*names)) if names else []


def claims_over(studies: Studies) -> dict[str, Any]:
    """{rule, claims, lines, looks}. A row a claim and a row a line of a claim (a category, a
    benchmark): {claim, against, says or name, verdicts: a {seed, verdict, note} each, holds,
    fails}; a row a seed with how much was looked at for them."""
    from bpo import claims  # brings transformers

    tables = {s: claims.table(study) for s, study in studies.items()}

    def counted(row: dict[str, Any], found: Sequence[tuple[int, str, str]]) -> dict[str, Any]:
        words = [word for _, word, _ in found]
        return {**row, "verdicts": [{"seed": s, "verdict": w, "note": n} for s, w, n in found],
                "holds": words.count(claims.HOLDS), "fails": words.count(claims.FAILS)}

    whole, lines = [], []
    for of_seeds in zip(*tables.values(), strict=True):
        named = {k: of_seeds[0][k] for k in ("claim", "against")}
        whole.append(counted(named | {"says": of_seeds[0]["says"]},
                             [(s, c["verdict"], c["because"])
                              for s, c in zip(tables, of_seeds, strict=True)]))
        for name in dict.fromkeys(x["name"] for c in of_seeds for x in c["lines"]):
            lines.append(counted(named | {"name": name},
                                 [(s, x["verdict"], x["note"])
                                  for s, c in zip(tables, of_seeds, strict=True)
                                  for x in c["lines"] if x["name"] == name]))
    return {"rule": claims.RULE, "claims": whole, "lines": lines,
            "looks": [{"seed": s, **claims.looks(t)} for s, t in tables.items()]}


def _metrics(studies: Studies, notebook: str) -> dict[int, dict[str, Any]]:
    """seed -> metrics of a notebook; empty where it has not run for every seed."""
    files = {s: runs.stage_folder(study, notebook) / runs.MANIFEST for s, study in studies.items()}
    if not all(f.is_file() for f in files.values()):
        return {}
    return {s: json.loads(f.read_text(encoding="utf-8"))["metrics"] for s, f in files.items()}


def write(study: str, studies: Studies) -> list[Shown]:
    """Writes replication.json and replication.html into the study's folder; the page's parts, which
    a terminal shows as plain text. Raises Refusal when a seed has no comparison."""
    for s, its in studies.items():
        file = runs.stage_folder(its, COMPARISON) / runs.MANIFEST
        if not file.is_file():
            raise Refusal(f"{file}: seed {s} has no finished comparison; "
                          f"python -m bpo replicate {study} runs what is missing")
    held = {"study": study, "seeds": {str(s): its for s, its in studies.items()},
            "own_worlds": own_worlds(studies), **claims_over(studies), "noise": noise(studies),
            "levels": levels(studies), "differences": differences(studies),
            "manifests": _hashes(studies)}
    parts = replication_page.parts(held)
    folder = outputs_root() / study
    records.write_whole(folder / TABLE, records.to_json(held, indent=1) + "\n")
    report.results_page(folder / PAGE, f"Study {study} over {len(studies)} seeds", parts)
    return parts


def _hashes(studies: Studies) -> dict[str, dict[str, str]]:
    """study -> notebook -> sha256 of the manifest that was read, of those that are there."""
    files = {its: {n: runs.stage_folder(its, n) / runs.MANIFEST
                   for n in (NOISE, COMPARISON, BENCHMARKS)} for its in studies.values()}
    return {its: {n: runs.file_hash(f) for n, f in mine.items() if f.is_file()}
            for its, mine in files.items()}


def written(study: str) -> dict[str, Any] | None:
    """What replication.json holds, or None where there is none or a seed has changed since."""
    file = outputs_root() / study / TABLE
    if not file.is_file():
        return None
    held = json.loads(file.read_text(encoding="utf-8"))
    return held if _hashes(seeds_of(held)) == held["manifests"] else None


def seeds_of(held: Mapping[str, Any]) -> dict[int, str]:
    return {int(s): its for s, its in held["seeds"].items()}


def headline(held: Mapping[str, Any]) -> str:
    count = len(held["seeds"])
    told = [f"{c['claim']}{' against ' + c['against'] if c['claim'] == 3 else ''} on {c['holds']}"
            for c in held["claims"] if c["claim"] != 4]
    return f"Of {count} seeds, claims hold: {', '.join(told)}"
