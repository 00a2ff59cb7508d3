"""What notebooks 0 and 6 show of finished stages: tables, sentences, the figure of the worlds.

Everything is read from metrics and from what the stages wrote; nothing is computed anew.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pandas import DataFrame, Series

from bpo.params import PriorOrigin, TinyWorld
from bpo.reports import cards, figures, page, readme
from bpo.study import stage as stages
from bpo.study.results import Estimate
from bpo.study.text import signed, visible
from bpo.tiny import prior
from bpo.tiny.drawing import draw_scene
from bpo.tiny.world import TYPICAL, Scene, Thing

Metrics = Mapping[str, Any]

BASE = {"colour_accuracy": "colour accuracy ↑", "p_true": "P(true colour) ↑",
        "p_prior": "P(typical colour)", "pope_random": "presence, random ↑",
        "pope_popular": "presence, popular ↑", "pope_adversarial": "presence, adversarial ↑",
        "chair_i": "CHAIRi of captions ↓", "cover": "cover ↑"}
FACTORS = {"text": "text", "images": "alignment images"}
DRAWN = ("P(prior) against the noise step for each text and image level; below, its clean value "
         "and its rise")
MEASURES = {"clean": "P(prior), clean", "rise": "its rise"}

# Notebook 0


def overview(result: stages.Result) -> dict[str, Any]:
    """{statistics, samples, documents, answers} of the world, as the stage wrote them."""
    return json.loads((result.folder / "overview.json").read_text(encoding="utf-8"))


SOURCES = {
    "text": ("1. What the text says", "Read before any picture was seen: here the habit is made."),
    "alignment images": ("2. What the alignment shows", "Pictures teach the model to use its eye. "
                         "Mostly they agree with the habit."),
    "preference images": ("3. What the preference rows add", "Their annotated answers are the "
                          "chosen ones: how often they contradict the habit is the dose."),
    "counterfactual images": ("4. What the test asks", "Picture and habit always disagree: who "
                              "follows the habit is wrong.")}
AGAIN = " The first of them are those of the alignment."


def sources(shown: Metrics) -> cards.Shown:
    """A strip a source of the model's habits: its share of typical colours and its first examples.
    """
    strips, samples = [], shown["samples"]
    for source, (title, note) in SOURCES.items():
        shares = shown["statistics"][source]
        again = source == "preference images" and samples[source] == samples["alignment images"]
        scenes = [None if source == "text" else _scene(x) for x in samples[source]]
        facts = samples[source] if source == "text" else [scene.facts for scene in scenes]
        strips.append({
            "title": title, "share": shares["typical"], "note": note + AGAIN * again,
            "of": "of the objects have their typical colour; "
                  f"{shares['partner']:.0%} have their partner beside them",
            "examples": [{"image": None if scene is None else draw_scene(scene),
                          "parts": [(f"{c} {name}", c == TYPICAL[name]) for c, name in of_example]}
                         for scene, of_example in zip(scenes, facts, strict=True)]})
    return cards.strips(strips, "an object in its typical colour")


def _scene(stored: Metrics) -> Scene:
    things = (Thing(**t | {"shift": tuple(t["shift"])}) for t in stored["things"])
    return Scene(tuple(things), stored["background"])


def samples(result: stages.Result, split: str, *, count: int = 4) -> cards.Shown:
    """The first images of a split with their questions and annotated answers."""
    rows = json.loads((result.folder / split / "rows.json").read_text(encoding="utf-8"))
    by_image = itertools.groupby(rows, key=lambda row: row["image"])
    return cards.sample_gallery([
        {"image": result.folder / split / image, "lines": [
            " → ".join(turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
            for row in of_image]} for image, of_image in itertools.islice(by_image, count)])


def sight(p: TinyWorld, metrics: Metrics) -> cards.Shown:
    """What the vision tower sees, and what the untuned model answers, as shares."""
    eye = metrics["tower"]["colour_accuracy"]
    rows = {"the eye: vision tower, colour of each object of held-out images":
            {"true": eye, "other": 1 - eye}}
    for split, count in (("natural", p.natural_images), ("development", p.development_images)):
        base = metrics["base"][split]
        right, usual = base["colour_accuracy"], base["prior_rate"]
        images = "counterfactual development" if split == "development" else split
        rows[f"the untuned model: colour questions, {count} {images} images"] = {
            "true": right, "prior": usual, "other": 1 - right - usual}
    return cards.stacked_bars(rows, {"true": "what is there", "prior": "what is usual, and wrong",
                                     "other": "something else"})


def gate(metrics: Metrics) -> cards.Shown:
    gates = metrics["gates"]
    return page.say(
        "The eye must see well, or mistakes would be bad sight and not habit: objects named right "
        "by patch on held-out images **{value:.3f}**, required {bound}. Gate **{verdict}**.",
        value=gates["tower_value"], bound=gates["tower_bound"],
        verdict="passed" if gates["tower"] else "NOT passed: mistakes below are partly bad sight")


def base(p: TinyWorld, metrics: Metrics) -> DataFrame:
    """The untuned model's metrics: a row a metric, a column a split."""
    frame = DataFrame(metrics["base"]).loc[list(BASE), ["natural", "development"]]
    frame.columns = [f"natural, {p.natural_images} images",
                     f"counterfactual, {p.development_images} development images"]
    return frame.rename(index=BASE).rename_axis("measure").reset_index()


def answers(shown: Metrics) -> cards.Shown:
    """The untuned model's answers to the colour questions of the first counterfactual images."""
    pictures = map(_scene, shown["samples"]["counterfactual images"])
    return cards.comparison_gallery([
        {"image": draw_scene(scene), "question": a["question"], "origin": "counterfactual",
         "truth": a["true"], "usual": " or ".join(a["prior"]), "answers": {"untuned model": {
             "text": a["answer"], "wrong": {a["answer"]} - {a["true"]},
             "kind": ("true" if a["answer"] == a["true"]
                      else "prior" if a["answer"] in a["prior"] else "other"),
             "chances": (a["p_true"], a["p_prior"])}}}
        for scene, a in zip(pictures, shown["answers"], strict=True)])


def world_headline(metrics: Metrics) -> cards.Shown:
    return page.say(
        "The eye gets the colour right in **{eye:.1%}** of objects. Asked about images that break "
        "the habit, the untuned model says the true colour in **{colour_accuracy:.0%}** and the "
        "usual one, which is wrong, in **{prior_rate:.0%}**: that is what there is to unlearn.",
        eye=metrics["tower"]["colour_accuracy"], **metrics["base"]["development"])


# Notebook 6


def levels(p: PriorOrigin) -> DataFrame:
    """The levels of both factors with their shares, in per cent."""
    return DataFrame([
        {"factor": FACTORS[factor], "level": name, "typical colour": f"{typical:.1%}",
         "partner present": f"{partner:.1%}"}
        for factor, of_factor in (("text", p.text_levels), ("images", p.image_levels))
        for name, (typical, partner) in sorted(of_factor.items(), key=lambda item: item[1])])


def worlds(metrics: Metrics) -> DataFrame:
    """A row a world: its levels and seed, its numbers, and its curve of P(prior)."""
    return DataFrame([{
        "text": c["text"], "images": c["images"], "seed": c["seed"], "no image": c["text_prior"],
        "P(true)": c["clean"]["p_true"]["value"], "P(prior)": c["clean"]["p_prior"]["value"],
        "rise": c["rise"]["value"], "CHAIRi": c["chair_i"]["value"], "cover": c["cover"]["value"],
        "curve": [e["value"] for e in c["curve"]["p_prior"]]} for c in metrics["cells"]])


def cells(metrics: Metrics) -> DataFrame:
    """A row a pair of levels: mean, lowest and highest over seeds."""
    by_levels = worlds(metrics).drop(columns=["seed", "curve"]).groupby(["text", "images"],
                                                                        sort=False)
    return by_levels.agg(_spread).reset_index()


def _spread(values: Series) -> str:
    """Mean [lowest, highest]; "–" where a world has no such number."""
    if values.isna().any():
        return "–"
    if len(values) == 1:
        return f"{values.iloc[0]:.3f}"
    return f"{values.mean():.2f} [{values.min():.2f}, {values.max():.2f}]"


def effect(metrics: Metrics, factor: str, measure: str, at: str = prior.ALL) -> dict[str, Any]:
    return next(e for e in metrics["effects"]
                if (e["factor"], e["measure"], e["at"]) == (factor, measure, at))


def effects(metrics: Metrics, factor: str) -> DataFrame:
    """A factor's effects: a row a measure and level of the other factor."""
    other = "images" if factor == "text" else "text"
    return DataFrame([
        {"of": MEASURES[e["measure"]], other: e["at"], "mean": signed(e['mean'])}
        | {f"seed {s['seed']}": Estimate(s["value"], s["low"], s["high"]).text(2, "+")
           for s in e["seeds"]} | {f"biased {factor}": verdict(e)}
        for e in metrics["effects"] if e["factor"] == factor])


def verdict(change: Metrics) -> str:
    """What the seeds allow to say: every one's interval leaves zero out on the same side, or
    it is not seen to move."""
    if all(s["low"] > 0 for s in change["seeds"]):
        return "raises"
    if all(s["high"] < 0 for s in change["seeds"]):
        return "lowers"
    return "is not seen to move"


def numbers(change: Metrics) -> str:
    """The mean over seeds with each seed's own value: "+0.301 (+0.288, +0.310, +0.305)"; of one
    seed its value with its interval."""
    if len(change["seeds"]) == 1:
        only = change["seeds"][0]
        return Estimate(only["value"], only["low"], only["high"]).text(sign="+")
    each = ", ".join(signed(s["value"]) for s in change["seeds"])
    return f"{signed(change['mean'])} ({each})"


def larger(metrics: Metrics, measure: str) -> str:
    """The factor whose effect is the larger one, in size, on every seed."""
    text, images = (effect(metrics, factor, measure)["seeds"] for factor in FACTORS)
    more = {abs(t["value"]) > abs(i["value"]) for t, i in zip(text, images, strict=True)}
    if len(more) > 1:
        return "which moves it more differs by seed"
    mover = "the text moves" if more.pop() else "the alignment images move"
    return f"{mover} it more{', on every seed' if len(text) > 1 else ''}"


def towers(metrics: Metrics) -> cards.Shown:
    """Whether each seed's eye sees well; one that does not makes mistakes that are no prior."""
    return page.say(
        "The eye names {values} of the objects right, a number a seed; required {bound:.0%}. Gate "
        "**{verdict}**.", values=", ".join(f"{g['value']:.1%}" for g in metrics["gates"]),
        bound=metrics["gates"][0]["bound"],
        verdict="passed" if all(g["passed"] for g in metrics["gates"]) else
        "NOT passed: mistakes above are partly bad sight")


def prior_headline(metrics: Metrics) -> cards.Shown:
    """What each factor does to each measure, averaged over the other factor's levels."""
    said = {f"{factor}_{measure}_{part.__name__}": part(effect(metrics, factor, measure))
            for factor in FACTORS for measure in MEASURES for part in (verdict, numbers)}
    seeds = len(metrics["gates"])
    return page.say(
        "In this tiny world, over {seeds}, each factor averaged over the other's levels. The "
        "prior on clean images: the text's bias **{text_clean_verdict}** it, "
        "{text_clean_numbers}; the alignment images' bias **{images_clean_verdict}** it, "
        "{images_clean_numbers}; {more_clean}. Its rise under noise: the text's bias "
        "**{text_rise_verdict}** it, {text_rise_numbers}; the alignment images' bias "
        "**{images_rise_verdict}** it, {images_rise_numbers}; {more_rise}.",
        seeds=f"{seeds} seed{'s' if seeds > 1 else ''}", more_clean=larger(metrics, "clean"),
        more_rise=larger(metrics, "rise"), **said)


def write_results(study: str) -> Path:
    """Stores notebook 6's metrics of a finished study, and writes the section `results STUDY` of
    outputs/README.md from what is stored."""
    metrics = readme.kept_metrics(study, PriorOrigin.notebook)
    fig = prior_worlds(worlds(metrics), metrics["noise_steps"])
    return readme.write_section(f"results {study}", "\n\n".join([
        prior_headline(metrics).plain, readme.picture(study, fig, DRAWN),
        readme.markdown(cells(metrics))]))


def worlds_figure(metrics: Metrics, p: PriorOrigin) -> cards.Shown:
    return page.figure(
        prior_worlds(worlds(metrics), metrics["noise_steps"]), alt=DRAWN, caption="Probability "
        f"of the typical colour on {p.images} counterfactual images a seed, which never show it. "
        f"Thin lines and open markers: single seeds ({p.repeats}); thick lines and bars: their "
        "mean.")


def prior_worlds(frame: DataFrame, steps: Sequence[int]) -> Figure:
    """Above, a panel a text level: P(prior) against the noise step, a line an image level. Below,
    its value on clean images and its rise to the last step. Every seed is thin or small."""
    figures.theme()
    texts = list(frame["text"].unique())
    styles = figures.styles(frame["images"].unique())
    fig = Figure(figsize=(figures.WIDTH, 6.6), layout="constrained")
    fig.get_layout_engine().set(h_pad=0.09)
    panels = fig.subplot_mosaic([[number // 2 for number in range(2 * len(texts))],
                                 ["P(prior)"] * len(texts) + ["rise"] * len(texts)])
    for number, text in enumerate(texts):
        panels[number].sharey(panels[0])
        panels[number].tick_params(labelleft=number == 0)
        panels[number].set(title=visible(f"text: {text}"), xlim=(-20, 1020),
                           xticks=range(0, 1001, 250), xlabel="noise step (0 is the clean image)")
        for level, style in styles.items():
            same = (frame["text"] == text) & (frame["images"] == level)
            curves = np.array(frame.loc[same, "curve"].tolist())  # (seeds, steps)
            panels[number].plot(steps, curves.T, color=style["color"], linewidth=0.8, alpha=0.55)
            panels[number].plot(steps, curves.mean(0), **style | {"linewidth": 2.2},
                                label=visible(f"alignment images: {level}"))
        panels[number].axhline(prior.CHANCE, color=figures.QUIET, linewidth=1,
                               linestyle=(0, (2, 2)), label="chance")
    panels[0].set_ylabel("P(prior's answer)")
    for column, title in (("P(prior)", "P(prior) on clean images"),
                          ("rise", "Rise to the last step")):
        panel = panels[column]
        for number, (level, style) in enumerate(styles.items()):
            of_level = frame[frame["images"] == level]
            places = np.arange(len(texts)) + (number - (len(styles) - 1) / 2) * 0.22
            panel.plot(places[of_level["text"].map(texts.index)], of_level[column], style["marker"],
                       color=style["color"], markersize=4.5, markerfacecolor="white")
            means = of_level.groupby("text", sort=False)[column].mean().loc[texts]
            panel.hlines(means, places - 0.08, places + 0.08, color=style["color"], linewidth=2.2)
        panel.axhline(0, color="#303030", linewidth=0.8)
        panel.set_xticks(range(len(texts)), [visible(f"text: {text}") for text in texts])
        panel.set(title=title, xlim=(-0.5, len(texts) - 0.5))
        panel.grid(visible=False, axis="x")
    figures.legend_above(fig, panels[0])
    return fig
