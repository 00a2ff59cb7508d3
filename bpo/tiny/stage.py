"""Notebook 0's work as a stage, and its results as rows for the notebook to show."""

import json
from pathlib import Path
from typing import Any

from bpo.params import TinyWorld
from bpo.study import results
from bpo.study import stage as stages
from bpo.study.files import to_json, write_whole
from bpo.tiny import build

SHARES = {"text": "text", "alignment": "alignment images",
          "counterfactual": "counterfactual images"}


def run(p: TinyWorld) -> stages.Result:
    """The stage of notebook 0: model/, language_model/, prompts/ and a folder for each data set."""
    return stages.stage(p, lambda folder: _work(p, folder), inputs={})


def _work(p: TinyWorld, folder: Path) -> dict[str, Any]:
    metrics = build.build(folder, **p.shaping())
    write_whole(folder / stages.TIMINGS, to_json(metrics.pop("seconds")))
    results.write(folder, [
        results.Result(split, "base model", "base", "", metric, results.Estimate(value))
        for split, measured in metrics["base"].items() for metric, value in measured.items()])
    return metrics


def shown(result: stages.Result) -> dict[str, Any]:
    """What the notebook shows of the world, as `build` wrote it."""
    return json.loads((result.folder / "overview.json").read_text(encoding="utf-8"))


def share_rows(seen: dict[str, Any], share: str) -> list[dict[str, Any]]:
    """One row an object: its share of `share` ("typical_share", "partner_share") in each source."""
    rows = {o["object"]: {"object": o["object"]} for o in seen["statistics"]["text"]}
    for source, label in SHARES.items():
        for o in seen["statistics"][source]:
            rows[o["object"]][label] = o[share]
    return list(rows.values())


def samples(result: stages.Result, split: str, count: int) -> list[dict[str, Any]]:
    """The first images of a split with their questions and annotated answers, as cards."""
    return [{"image": result.folder / e["image"],
             "lines": [f"{r['question']} → {r['answer']}" for r in e["rows"]]}
            for e in shown(result)["examples"][split][:count]]


def answer_rows(seen: dict[str, Any]) -> list[dict[str, Any]]:
    """The untuned model's answers to colour questions about counterfactual images, beside the truth
    and the typical colour."""
    return [{"question": a["question"], "model": a["answer"], "truth": a["true"],
             "typical": ", ".join(a["prior"]), "P(truth)": f"{a['p_true']:.2f}",
             "P(typical)": f"{a['p_prior']:.2f}"} for a in seen["answers"]]


def base_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The untuned model's measures, one row a measure, one column a split."""
    labels = {"colour_accuracy": "colour accuracy", "p_true": "P(true colour)",
              "p_prior": "P(typical colour)", "pope_random": "presence, random",
              "pope_popular": "presence, popular", "pope_adversarial": "presence, adversarial",
              "chair_i": "CHAIRi of captions", "cover": "cover: objects that captions name"}
    return [{"measure": label} | {split: f"{found['base'][split][name]:.3f}"
                                  for split in ("natural", "development")}
            for name, label in labels.items()]
