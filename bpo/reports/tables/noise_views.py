"""Noise: notebook 1's picture under more and more of it, chosen by a rule, and notebook 4's with
what the methods answer; notebook 1's curves after training."""

import json
import math
from collections.abc import Sequence
from typing import Any

from pandas import DataFrame

from bpo.data.rows import Row
from bpo.evaluation import probe, under_noise
from bpo.models import checkpoint as checkpoints
from bpo.models import generate
from bpo.models.generate import Request
from bpo.models.weakening import View
from bpo.params import NoiseProbability, QualitativeComparison
from bpo.reports import cards, figures, page, seen
from bpo.reports.cards import Shown
from bpo.reports.tables import score_tables
from bpo.study import stage as stages
from bpo.study.files import read_lines
from bpo.study.text import joined


def example(p: NoiseProbability, result: stages.Result) -> dict[str, Any]:
    """The row of notebook 1 that stands for all by `seen.typical`: {row, question, true, prior,
    known: whether the prior's answers are, courses: from what to what all rows' answers go}, and at
    each step {images, chances: of the true and the prior's answer, p_true: of the first true one},
    first draw; other_ways: way -> {images, chances, steps}."""
    lines, candidates = probe.load(result)
    known = probe.knows_prior(result.manifest)
    chosen, courses = seen.typical(lines, known=known)
    row = probe.asked(p, next(r for r in probe.listed(p)[0] if r.id == chosen))
    looks = {x["step"]: x for x in lines if x["row"] == chosen and x["draw"] == 0}
    processor = checkpoints.load_processor(p.path(p.model))
    return {"row": row, "images": probe.frames(p, processor, row, p.noise_steps),
            "question": row.question, **candidates[row.id], "known": known, "courses": courses,
            "chances": [_chances(looks[step]) for step in p.noise_steps],
            "other_ways": {way: _other(p, result, processor, row, way) for way in p.other_ways},
            "p_true": [math.exp(looks[step]["answers"][0]["logp"]) for step in p.noise_steps]}


def _other(p: NoiseProbability, result: stages.Result, processor: Any, row: Row, way: str
           ) -> dict[str, Any]:
    lines = read_lines(result.folder / f"looks-{way}.jsonl")
    chances = {x["step"]: _chances(x) for x in lines if (x["row"], x["draw"]) == (row.id, 0)}
    request = Request(row.id, row.prompt, row.image)
    return {"images": [generate.view_picture(processor, request, View(way, step), seed=p.seed,
                                             transform=p.image_transform) for step in chances],
            "chances": list(chances.values()), "steps": list(chances)}


def _chances(line: dict) -> list[float]:
    return [probe.value(line, probe.MEASURES[0], kind) for kind in probe.KINDS]


def fate(found: dict[str, Any]) -> Shown:
    """The question of the example, and how many rows' answers go which way."""
    go, first, stay, other = seen.fates(found["courses"])
    return page.say(
        "**{q}** What is there: {t}. The prior's answer: {u}. Of {n} images, **{g} go from the "
        "true answer to the prior's** under noise, {f} have the prior's first on the clean image, "
        "{s} stay with the true one and {o} do otherwise. Shown is the median of {w} by how much P "
        "moves.", q=joined(found["question"]), t=" or ".join(found["true"]),
        u=" or ".join(found["prior"]), n=found["courses"].total(), g=go, f=first, s=stay, o=other,
        w="those that go" if go else "all")


def slider(p: NoiseProbability, found: dict[str, Any]) -> Shown:
    """The example at each step of the noise."""
    return cards.slider(
        [{"step": step, "image": image, "chances": {"untuned model": chances}}
         for step, image, chances in zip(p.noise_steps, found["images"], found["chances"],
                                         strict=True)],
        [" or ".join(found[kind]) for kind in probe.KINDS], "noise step", known=found["known"])


def other_strip(found: dict[str, Any], way: str) -> Shown:
    """The example at each step of another way, and whether the model saw."""
    shown = found["other_ways"][way]
    kinds = [cards.by_kind(c, known=found["known"]) for c in shown["chances"]]
    said = [cards.SAYS[cards.leading(k)] for k in kinds]
    return page.figure(
        figures.noise_strip(shown["images"], shown["steps"], said),
        alt=f"One image at each step of {way} and whether the model saw",
        caption=f"The same image from step {shown['steps'][0]} of {way} to the last; below, which "
                "answer is likeliest.")


def slider_under_noise(p: QualitativeComparison, result: stages.Result, names: Sequence[str]
                       ) -> Shown:
    """The picture that stands for the base's answers under noise, by `seen.typical`, at each step,
    with what each of the named methods answers."""
    file = result.folder / "answers-under_noise.jsonl"
    if not file.is_file():
        return page.say("No picture was asked about under noise.")
    q, lines = under_noise.probing(p), read_lines(file)
    known = bool(q.category)
    name = "p" if known else "logp"  # of the whole answer, or a token's
    looks = [{**x, "answers": [
        {"kind": k, "tokens": 1, "logp": math.log(max(x[f"p_{k}"][names[0]], 1e-9)) if known
         else x[f"logp_{k}"][names[0]]} for k in probe.KINDS]} for x in lines]
    chosen, _ = seen.typical(looks, known=known)
    row = next(r for r in probe.listed(q)[0] if r.id == chosen)
    shown = [x for x in lines if x["row"] == chosen]
    pictures = probe.frames(q, checkpoints.load_processor(p.path(p.model)), row,
                            [x["step"] for x in shown])
    stills = [{"step": x["step"], "image": picture, "chances": {
        m: [x[f"{name}_{k}"][m] if known else math.exp(x[f"{name}_{k}"][m]) for k in probe.KINDS]
        for m in names}} for x, picture in zip(shown, pictures, strict=True)]
    words = json.loads((result.folder / probe.CANDIDATES).read_text(encoding="utf-8"))[chosen]
    return cards.slider(stills, [" or ".join(words[k]) for k in probe.KINDS],
                         f"{joined(row.question)} Noise step", known=known)


def curves_under_noise(frame: DataFrame, against: Sequence[str]) -> Shown:
    """Notebook 1's curves after training: P(true answer) and P(prior's answer) against the noise
    step, a line for the page's method and for each of what it is compared with."""
    rows = frame.query("category == 'noise' and against == ''")
    names = [*against, score_tables.main_method(frame)]
    rows = rows[rows["method"].isin(names) & rows["value"].notna()]
    where = rows["metric"].str.extract(r"^(?P<measure>p_true|p_prior)_at_(?P<step>\d+)")
    rows = rows.assign(measure=where["measure"], step=where["step"].astype(float)).dropna(
        subset="measure")
    if rows.empty:
        return page.say("This run did not ask under noise (noise_rows is 0, or nobody knows what "
                          "to weigh).")
    panels = {under_noise.LABELS[measure]: {
        name: [mine[c] for c in ("step", "value", "low", "high")]
        for name in names if len(mine := of[of["method"] == name])}
        for measure, of in rows.groupby("measure", sort=False)}
    return page.figure(
        figures.bands(panels, xlabel="noise step (0 is the clean image)", ylabel="probability"),
        alt=f"P(true answer) and P(prior's answer) against the noise step, of {', '.join(names)}",
        caption=f"{rows['split_or_benchmark'].iloc[0]} images, {rows['n'].iloc[0]:.0f} "
                f"questions, the same at each step; bands are {score_tables.INTERVALS}.")
