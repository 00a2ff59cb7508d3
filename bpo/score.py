"""Answers that were made elsewhere, scored as the judge-free benchmarks do: `python -m bpo score`.

A file of answers and the benchmark's truth give each metric with its interval over images, and
against a second file the paired difference. No model and no image is read.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bpo import answers, metrics, records, seeds
from bpo.official import BENCHMARKS, Benchmark, Counts
from bpo.params import Refusal

COUNTS_OF_WORDS = ("objects", "words")  # means, not shares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--answers", type=Path, required=True, metavar="FILE",
                        help=f"JSON lines or a JSON list with {'|'.join(answers.NAMES)} "
                        f"and {'|'.join(answers.TEXTS)}")
    parser.add_argument("--truth", type=Path, required=True, nargs="+", metavar="FILE",
                        help="image -> classes or COCO's instances file; POPE's question files; "
                        "AMBER's annotations.json")
    parser.add_argument("--synonyms", type=Path, metavar="FILE",
                        help="a class a line with its words (default: COCO's 80 classes)")
    parser.add_argument("--against", type=Path, metavar="FILE", help="answers to compare with")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")


def run(options: argparse.Namespace) -> int:
    """Prints what the answers score; raises Refusal for files that do not fit together."""
    if options.resamples < 1:
        raise Refusal(f"--resamples: must be 1 or more, is {options.resamples}")
    benchmark = BENCHMARKS[options.benchmark]
    truth = answers.read_truth(benchmark, options.truth, options.synonyms)
    mine = answers.match(options.answers, truth)
    result = {"benchmark": benchmark.name, "answers": answers.summary(mine, truth)}
    result["metrics"] = estimates(benchmark, mine.counts, resamples=options.resamples,
                                  seed=options.seed)
    if options.against:
        other = answers.match(options.against, truth)
        shared = mine.counts.keys() & other.counts.keys()
        if not shared:
            raise Refusal(f"{options.against}: answers none of the questions that "
                          f"{options.answers} answers; give answers to the same questions")
        result["against"] = answers.summary(other, truth) | {
            "matched": len(shared), "without_partner": len(mine.counts) - len(shared),
            "without_partner_against": len(other.counts) - len(shared)}
        result["differences"] = differences(
            benchmark, *({k: side.counts[k] for k in shared} for side in (mine, other)),
            resamples=options.resamples, seed=options.seed)
    print(records.to_json(result, indent=2) if options.json else
          "\n".join(table(benchmark, result)))
    return 0


def _weights(ratios: Mapping[str, metrics.Ratios], *, resamples: int, seed: int) -> np.ndarray:
    images = len(next(iter(ratios.values())))
    return metrics.bootstrap_weights(images, resamples, seeds.numpy_generator(seed, "score"))


def estimates(benchmark: Benchmark, counts: Mapping[Any, tuple[str, Counts]], *, resamples: int,
              seed: int) -> dict[str, dict[str, Any]]:
    """metric -> {label, value, low, high, n}."""
    ratios = metrics.tabled(list(counts.values()), benchmark.metrics)
    weights = _weights(ratios, resamples=resamples, seed=seed)
    return {n: {"label": benchmark.all_metrics[n].label, **e}
            for n, e in metrics.estimates(ratios, weights, benchmark.made).items()}


def differences(benchmark: Benchmark, mine: Mapping[Any, tuple[str, Counts]],
                other: Mapping[Any, tuple[str, Counts]], *, resamples: int, seed: int
                ) -> dict[str, dict[str, Any]]:
    """metric -> {label, value, low, high, n, p} of mine minus other, on the same questions."""
    ours, theirs = (metrics.tabled(list(c.values()), benchmark.metrics) for c in (mine, other))
    weights = _weights(ours, resamples=resamples, seed=seed)
    found = metrics.differences(ours, theirs, weights, benchmark.made)
    return {n: {"label": benchmark.all_metrics[n].label, **d} for n, d in found.items()}


def table(benchmark: Benchmark, result: Mapping[str, Any]) -> list[str]:
    """The lines for the terminal; rates in per cent."""
    told = result["answers"]
    lines = [f"{benchmark.title}: {told['scored']} of {told['read']} answers scored, "
             f"{told['without_truth']} without truth; {told['truth_without_answer']} of "
             f"{told['truth']} in the truth have no answer"]
    lines += [told["note"]] * bool(told["note"])
    lines += ["", f"{'metric':28}{'value':>9}   {'95 % interval':18}{'out of':>8}"]
    lines += [_row(n, e) + f"{e['n']:>8}" for n, e in result["metrics"].items()]
    if "differences" in result:
        pair = result["against"]
        lines += ["", f"minus the other file: {pair['matched']} answers matched, "
                  f"{pair['without_partner']} here and {pair['without_partner_against']} there "
                  f"lack a partner; {pair['without_truth']} there without truth",
                  f"{'difference':28}{'value':>9}   {'95 % interval':18}{'p':>8}"]
        lines += [_row(n, e, sign="+") + ("" if e["p"] is None else f"{e['p']:>8.4f}")
                  for n, e in result["differences"].items()]
    return lines


def _row(name: str, e: Mapping[str, Any], *, sign: str = "") -> str:
    if e["value"] is None:
        return f"{e['label']:28}{'none':>9}   {'':18}"
    times, unit = (1, "") if name in COUNTS_OF_WORDS else (100, " %")
    value, low, high = (f"{times * e[k]:{sign}.1f}" for k in ("value", "low", "high"))
    return f"{e['label']:28}{value + unit:>9}   {f'[{low}, {high}]':18}"
