"""Notebook 1's question after training: what each method answers while the image drowns in noise.

The rows, the candidates and the noise of an image are those of notebook 1 for the same seed and
data, so that the base's curve is the one that it drew.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bpo.data import rows as data_rows
from bpo.data.rows import Row
from bpo.evaluation import diagnostics, probe
from bpo.models import checkpoint as checkpoints
from bpo.models import generate, logprobs
from bpo.models.checkpoint import Checkpoint
from bpo.models.generate import Request
from bpo.params import NoiseProbability, QualitativeComparison
from bpo.study import results, shards
from bpo.study.files import to_json, write_whole

LABELS = {"p_true": "P(true answer)", "p_prior": "P(prior's answer)",
          "logp_true": "log-prob a token, true", "logp_prior": "log-prob a token, prior's"}
MAIN = "counterfactual"


def main_split(splits: Iterable[str]) -> str:
    """The split that pages show first: counterfactual if there is one, else the first."""
    names = list(splits)
    return MAIN if MAIN in names or not names else names[0]


def probing(p: QualitativeComparison) -> NoiseProbability:
    """Notebook 1's parameters for the main split: colour questions where there is a truth file."""
    data = p.splits[main_split(p.splits)]
    known = data_rows.truth_file(p.path(data)) is not None
    return NoiseProbability(
        study=p.study, seed=p.seed, model=p.model, precision=p.precision, data=data,
        image_transform=p.image_transform, image_folder=p.image_folder, rows=p.noise_rows,
        category="attribute" if known else "", noise_steps=p.noise_steps, draws=1, other_ways=[],
        max_new_tokens=p.max_new_tokens)


@torch.no_grad()
def ask(p: QualitativeComparison, checkpoint: Checkpoint, methods: Sequence[str], row: Row,
        truth: Mapping[str, Any], step: int) -> tuple[Image.Image, dict[str, Any]]:
    """The picture of a row at a step of the noise, and the line that notebook 4 stores of such a
    row, decoded and weighed now. The noise is notebook 1's."""
    inputs = probe.encode(probing(p), checkpoint, [probe.Look(row.id, row, step, 0)])
    answers = diagnostics.candidates(truth, row.id)
    weighed = diagnostics.weigh_candidates(
        checkpoint, methods, {row.id: answers} if answers else {}, logprobs.weigh_unpacked,
        [Request(row.id, row.prompt, row.image)], inputs)[0]
    line = {"id": row.id, "image": row.image_name, "question": row.question,
            "annotated": row.answer, "answers": {}, **weighed}
    for method in methods:
        with checkpoints.using(checkpoint, method):
            line["answers"][method] = generate.decode(checkpoint, inputs,
                                                      max_new_tokens=p.max_new_tokens)[0]
    return probe.frames(probing(p), checkpoint.processor, row, [step])[0], line


def weigh(p: QualitativeComparison, folder: Path, checkpoint: Checkpoint, methods: Sequence[str],
          stem: str) -> list[dict]:
    """A line a row and step: {id, row, image, step, p_true, p_prior, logp_true, logp_prior}, the
    last four by method as notebook 1 has them. Empty where `noise_rows` is 0, or no row has answers
    to weigh."""
    if not p.noise_rows:
        return []
    q = probing(p)
    rows, _ = probe.to_look_at(q)
    candidates = _candidates(q, folder, checkpoint, methods[0], rows)
    looks = probe.looks_at(q, [r for r in rows if r.id in candidates], probe.NOISE)
    if not looks:
        return []
    with torch.no_grad():
        score = logprobs.choose(checkpoint, probe.encode(q, checkpoint, looks[:4]),
                                probe.answer_ids(checkpoint, looks[:4], candidates))

    @torch.no_grad()
    def work(batch: Sequence[probe.Look]) -> list[dict]:
        inputs = probe.encode(q, checkpoint, batch)
        ids = probe.answer_ids(checkpoint, batch, candidates)
        lines = [{"id": x.id, "row": x.row.id, "image": x.row.image_name, "step": x.step,
                  **{name: {} for name in LABELS}} for x in batch]
        for method in methods:
            with checkpoints.using(checkpoint, method):
                weighed = score(checkpoint, inputs, ids)
            for line, x, of_row in zip(lines, batch, weighed, strict=True):
                true = len(candidates[x.row.id]["true"])
                for kind, part in (("true", of_row[:true]), ("prior", of_row[true:])):
                    sums = torch.stack([w.logprobs.sum() for w in part])
                    line[f"p_{kind}"][method] = round(sums.exp().sum().item(), 6)
                    line[f"logp_{kind}"][method] = round(
                        max(w.logprobs.mean().item() for w in part), 6)
        return lines

    return shards.run_on(folder / f"{stem}-under_noise.jsonl", looks, p.batch_size, work,
                         label="steps of noise")


def _candidates(q: NoiseProbability, folder: Path, checkpoint: Checkpoint, method: str,
                rows: Sequence[data_rows.Row]) -> dict[str, dict[str, list[str]]]:
    """Those of the first model that asks, for all: without a truth file they are its own."""
    file = folder / probe.CANDIDATES
    if not file.is_file():
        with checkpoints.using(checkpoint, method):
            found, _ = probe.candidate_answers(q, checkpoint, rows)
        write_whole(file, to_json(found, indent=1))
    return json.loads(file.read_text(encoding="utf-8"))


def counts(line: Mapping, method: str) -> dict[str, tuple[float, float]]:
    """What one line adds to each metric of `metrics`, as (counted, out of)."""
    return {f"{name}_at_{line['step']}": (line[name][method], 1) for name in LABELS}


def metrics(steps: Sequence[int]) -> results.Metrics:
    """A metric a measure and step, such as p_prior_at_800. None is better or worse: where nothing
    can be seen, the prior's answer may be the best guess."""
    return {f"{name}_at_{step}": (f"{label}, step {step}", "noise", None)
            for name, label in LABELS.items() for step in steps}
