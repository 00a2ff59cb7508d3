"""Where the prior comes from: levels that are what they say, worlds that go on where a killed study
was, and effects computed by hand."""

import json
import os
import re
import shutil
import subprocess

import nbformat
import pandas
import pytest
from helpers import warm

from bpo import params
from bpo.__main__ import main
from bpo.reports import page as report
from bpo.tiny import dose, language, prior, tables, training, world

pytestmark = pytest.mark.study  # worlds are made and models trained

LITTLE = {"text_documents": 700, "alignment_images": 16, "tower_steps": 2, "text_steps": 4,
          "caption_steps": 2, "mixed_steps": 2, "images": 8, "noise_steps": [0, 999], "repeats": 1,
          "resamples": 200, "image_levels": {"uniform": [0.125, 0.106], "biased": [0.77, 0.55]}}
NOTEBOOK = params.PriorOrigin.notebook


def little(study: str, **changes) -> params.PriorOrigin:
    return params.PriorOrigin(study=study, **LITTLE | changes)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A folder of outputs for this module's studies."""
    root = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPO_OUTPUTS", str(root))
        yield root


@pytest.fixture(scope="module")
def work():
    """How often the study called each phase of the build."""
    return {}


@pytest.fixture(scope="module")
def study(outputs, work):
    with pytest.MonkeyPatch.context() as patch:
        calls = {n: counted(patch, n) for n in ("seeing_model", "text_model", "align")}
        result = prior.run(little("whole"))
    work |= {n: len(c) for n, c in calls.items()}
    return result


def worlds(result) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in (result.folder / "worlds").iterdir()}


def counted(monkeypatch, name: str) -> list:
    """Lets a phase of the training do its work and notes each call."""
    real, calls = getattr(training, name), []
    monkeypatch.setattr(training, name, lambda *a: (calls.append(name), real(*a))[1])
    return calls


def shares(scenes: list[list[tuple[str, str]]]) -> tuple[float, float, float]:
    """Over all objects of scenes of (colour, object): share of typical colours, of present
    partners, and of the presence of an average object that is not the partner."""
    seen = [(colour, name, {n for _, n in facts}) for facts in scenes for colour, name in facts]
    typical = sum(colour == world.TYPICAL[name] for colour, name, _ in seen)
    partner = sum(world.PARTNER[name] in names for _, name, names in seen)
    others = sum(len(names - {name, world.PARTNER[name]}) / 8 for _, name, names in seen)
    return typical / len(seen), partner / len(seen), others / len(seen)


def test_uniform_images_have_no_statistics():
    p = params.PriorOrigin(alignment_images=5000, images=6)
    scenes = [s.facts for s in prior.draw_images(p, 0)[0]["uniform"]]
    typical, partner, others = shares(scenes)
    assert abs(typical - prior.CHANCE) < 0.012
    assert abs(partner - others) < 0.012
    for name in world.OBJECTS:
        own = [colour for facts in scenes for colour, n in facts if n == name]
        for colour in world.COLOURS:
            assert abs(own.count(colour) / len(own) - prior.CHANCE) < 0.05


@pytest.mark.parametrize(("level", "expected"), [("half", (0.4475, 0.328)),
                                                 ("biased", (0.77, 0.55))])
def test_other_levels_have_their_shares(level, expected):
    p = params.PriorOrigin(alignment_images=3000, images=6)
    scenes = [s.facts for s in prior.draw_images(p, 0)[0][level]]
    assert shares(scenes)[:2] == pytest.approx(expected, abs=0.025)


def test_the_biased_levels_are_the_tiny_studys_and_half_is_half_way():
    p, tiny = params.PriorOrigin(), params.TinyWorld()
    levels = p.image_levels
    middle = [(a + b) / 2 for a, b in zip(levels["uniform"], levels["biased"], strict=True)]
    assert levels["half"] == pytest.approx(middle)
    assert p.text_levels["biased"] == [tiny.text_typical, tiny.text_partner]
    assert p.image_levels["biased"] == [tiny.image_typical, tiny.image_partner]
    for name in ("text_documents", "alignment_images", "tower_steps", "text_steps",
                 "caption_steps", "mixed_steps"):
        assert getattr(p, name) == getattr(tiny, name)


def test_a_uniform_text_says_nothing_of_typical_colours():
    documents = prior.corpus(params.PriorOrigin(text_documents=12000), "uniform", 0)
    scenes = [language.parse_caption(d["assistant"]) for d in documents
              if d["kind"] in ("caption", "described")]
    typical, partner, others = shares(scenes)
    assert abs(typical - prior.CHANCE) < 0.02
    assert abs(partner - others) < 0.02
    answers = [(d["assistant"], next(w for w in reversed(d["user"].split()) if w in world.OBJECTS))
               for d in documents if d["kind"] in ("colour", "known colour")]
    said = sum(colour == world.TYPICAL[name] for colour, name in answers) / len(answers)
    assert abs(said - prior.CHANCE) < 0.03
    assert {d["kind"] for d in documents} == {"caption", "described", "known colour", "colour",
                                              "presence"}


def test_seeds_and_levels_differ_and_evaluation_images_are_new():
    p = params.PriorOrigin(alignment_images=60, images=40, text_documents=700)
    aligned, asked = prior.draw_images(p, 0)
    others, asked_of_others = prior.draw_images(p, 1)
    assert not set(asked) & set(asked_of_others)
    assert not set(asked) & {s for scenes in aligned.values() for s in scenes}
    assert list(aligned) == ["uniform", "half", "biased"]
    assert aligned["uniform"] != others["uniform"] and aligned["uniform"] != aligned["biased"]
    assert prior.corpus(p, "uniform", 0) != prior.corpus(p, "uniform", 1)
    for scene in asked:
        assert all(t.colour != world.TYPICAL[t.name] for t in scene.things)


def test_levels_are_ordered_by_their_shares_not_by_the_file():
    levels = {"much": [0.9, 0.5], "none": [0.1, 0.1], "some": [0.5, 0.3]}
    assert prior.ordered(levels) == ["none", "some", "much"]
    with pytest.raises(params.Refusal, match="two levels have the same share of typical colours"):
        params.validate(params.PriorOrigin, {"text_levels": {"a": [0.5, 0.1], "b": [0.5, 0.9]}},
                        where="here")


def test_the_study_holds_every_world_with_its_intervals(study):
    assert sorted(worlds(study)) == ["0-biased-biased.json", "0-biased-uniform.json",
                                     "0-uniform-biased.json", "0-uniform-uniform.json"]
    assert len({json.loads(w)["captions"][0]["image"] for w in worlds(study).values()}) == 1
    assert len({str(json.loads(w)["looks"]) for w in worlds(study).values()}) == 4
    assert [(c["text"], c["images"]) for c in study.metrics["cells"]] == [
        ("uniform", "uniform"), ("uniform", "biased"), ("biased", "uniform"), ("biased", "biased")]
    for cell in study.metrics["cells"]:
        for kind in ("p_true", "p_prior"):
            assert len(cell["curve"][kind]) == 2 and cell["clean"][kind] == cell["curve"][kind][0]
        for e in (*cell["curve"]["p_prior"], cell["rise"]):
            assert e["low"] <= e["value"] <= e["high"] and e["n"] == 8
        first, last = (e["value"] for e in cell["curve"]["p_prior"])
        assert cell["rise"]["value"] == pytest.approx(last - first, abs=2e-6)
    gate, = study.metrics["gates"]
    assert f"names {gate['value']:.1%} of" in tables.towers(study.metrics).plain
    assert "required 95%. Gate NOT passed" in tables.towers(study.metrics).plain
    assert gate["passed"] is False  # two steps teach nothing


def test_the_worlds_of_a_seed_share_tower_and_text_models(study, work):
    assert work == {"seeing_model": 1, "text_model": 2, "align": 4}
    held = [json.loads(w) for w in worlds(study).values()]
    assert len({str(w["tower"]) for w in held}) == 1
    assert len({str(w["text_model"]) for w in held}) == 2


def test_an_interrupted_study_goes_on_by_world(study, monkeypatch):
    """Worlds that are there are kept, and one built alone has the bytes of one built in turn."""
    real, calls = prior.answers, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prior, "answers", killed)
        with pytest.raises(KeyboardInterrupt):
            prior.run(little("killed"))
    folder = params.outputs_root() / "killed" / NOTEBOOK
    assert [f.name for f in (folder / "worlds").iterdir()] == ["0-uniform-uniform.json"]
    before = (folder / "worlds" / "0-uniform-uniform.json").stat().st_mtime_ns
    (folder / "worlds" / "0-biased-uniform.json").write_bytes(
        worlds(study)["0-biased-uniform.json"])
    aligned = counted(monkeypatch, "align")
    result = prior.run(little("killed"))
    assert len(aligned) == 2
    assert "interrupted" in result.done
    assert (folder / "worlds" / "0-uniform-uniform.json").stat().st_mtime_ns == before
    assert worlds(result) == worlds(study)
    assert result.metrics == study.metrics


def made(seed: int, text: str, images: str, clean: list[float], last: list[list[float]]) -> dict:
    """A world with P(prior) of each image, clean and at the last step under each of two draws."""
    looks = [{"image": f"{i}", "step": 0, "draw": 0, "p_true": 0.5, "p_prior": p}
             for i, p in enumerate(clean)]
    looks += [{"image": f"{i}", "step": 999, "draw": d, "p_true": 0.1, "p_prior": p}
              for i, draws in enumerate(last) for d, p in enumerate(draws)]
    return {"seed": seed, "text": text, "images": images, "looks": looks}


def test_effects_by_hand():
    """One seed, two images. Text: +.1 clean; with biased images also +.2 of rise. Images: +.3 and
    +.5 clean, image by image."""
    p = little("hand", images=2, seed=7)
    metrics = {"effects": prior.effects([
        made(7, "uniform", "uniform", [0.1, 0.1], [[0.1, 0.3], [0.2, 0.2]]),
        made(7, "uniform", "biased", [0.4, 0.6], [[0.5, 0.5], [0.7, 0.7]]),
        made(7, "biased", "uniform", [0.2, 0.2], [[0.3, 0.3], [0.3, 0.3]]),
        made(7, "biased", "biased", [0.5, 0.7], [[0.8, 0.8], [1.0, 1.0]])], p)}
    expected = {("text", "clean"): (0.1, 0.1, 0.1), ("images", "clean"): (0.4, 0.4, 0.4),
                ("text", "rise"): (0.0, 0.2, 0.1), ("images", "rise"): (0.0, 0.2, 0.1)}
    for (factor, name), values in expected.items():
        for at, value in zip(("uniform", "biased", "all"), values, strict=True):
            change = tables.effect(metrics, factor, name, at)
            assert change["mean"] == change["least"] == change["most"] == pytest.approx(value)
    pictures = tables.effect(metrics, "images", "clean")
    assert (pictures["seeds"][0]["low"], pictures["seeds"][0]["high"]) == (0.3, 0.5)  # either image
    assert tables.verdict(pictures) == "raises"
    assert tables.larger(metrics, "clean") == "the alignment images move it more"


def change(*seeds: tuple[float, float, float]) -> dict:
    """An effect with the (value, low, high) of each seed."""
    names = ("value", "low", "high")
    return {"mean": sum(values[0] for values in seeds) / len(seeds),
            "seeds": [{"seed": n} | dict(zip(names, s, strict=True)) for n, s in enumerate(seeds)]}


UNSEEN = "is not seen to move"


@pytest.mark.parametrize("seeds, verdict", [
    ([(0.1, 0.05, 0.2), (0.2, 0.1, 0.3)], "raises"),
    ([(-0.1, -0.2, -0.05), (-0.2, -0.3, -0.1)], "lowers"),
    ([(0.1, 0.05, 0.2), (-0.2, -0.3, -0.1)], UNSEEN),
    ([(0.1, 0.05, 0.2), (0.02, -0.01, 0.05)], UNSEEN)])
def test_a_verdict_needs_every_seed(seeds, verdict):
    assert tables.verdict(change(*seeds)) == verdict


def test_numbers_are_those_of_each_seed_or_the_interval_of_one():
    assert tables.numbers(change((0.1, 0, 0), (-0.04, 0, 0))) == "+0.030 (+0.100, −0.040)"
    assert tables.numbers(change((0.3, 0.2, 0.4))) == "+0.300 [+0.200, +0.400]"


@pytest.mark.parametrize("text, images, says", [
    ((0.3, -0.2), (0.1, 0.1), "the text moves it more, on every seed"),
    ((0.3, 0.1), (0.1, 0.2), "which moves it more differs by seed")])
def test_the_larger_factor_is_named_only_where_all_seeds_agree(text, images, says):
    metrics = {"effects": [change(*((v, v, v) for v in values))
                           | {"factor": factor, "measure": "rise", "at": "all"}
                           for factor, values in (("text", text), ("images", images))]}
    assert tables.larger(metrics, "rise") == says


def test_what_the_notebook_shows(study):
    assert len(tables.levels(little("whole"))) == 4
    cells = tables.cells(study.metrics)
    assert list(cells["text"]) == ["uniform"] * 2 + ["biased"] * 2
    assert list(cells["images"]) == ["uniform", "biased"] * 2
    effects = tables.effects(study.metrics, "text")
    assert list(effects["images"]) == ["uniform", "biased", "all"] * 2
    said = str(tables.prior_headline(study.metrics))
    assert said.startswith("In this tiny world, over 1 seed, ")
    for factor in ("text", "images"):
        for measure in ("clean", "rise"):
            assert tables.numbers(tables.effect(study.metrics, factor, measure)) in said


def test_its_section_is_written_from_what_is_stored(study, outputs):
    shutil.copytree(study.folder, outputs / "tiny-prior" / NOTEBOOK)
    assert main(["results", "tiny-prior"]) == 0
    first = (outputs / "README.md").read_text(encoding="utf-8")
    for factor in ("text", "images"):
        assert tables.numbers(tables.effect(study.metrics, factor, "rise")).replace(
            "-", "−") in first
    assert len(re.findall(r"^\| (?:uniform|biased) \|", first, re.MULTILINE)) == 4
    picture = outputs / re.search(r"\]\((.*\.svg)\)", first)[1]
    drawn = picture.read_bytes()
    shutil.rmtree(outputs / "tiny-prior")  # what is stored is enough
    picture.unlink()
    assert main(["results", "tiny-prior"]) == 0
    assert (outputs / "README.md").read_text(encoding="utf-8") == first
    assert picture.read_bytes() == drawn


def test_the_figure_draws_every_seed_and_the_mean():
    def cell(text: str, images: str, seed: int) -> dict:
        first, last = {"value": 0.1 * seed}, {"value": 0.2 * seed}
        return {"text": text, "images": images, "seed": seed, "text_prior": 0.5, "rise": first,
                "clean": {"p_true": last, "p_prior": first}, "chair_i": first, "cover": last,
                "curve": {"p_prior": [first, last]}}

    fig = tables.prior_worlds(tables.worlds({"cells": [
        cell(t, i, s) for t in ("uniform", "biased") for i in ("uniform", "half", "biased")
        for s in (1, 2)]}), [0, 999])
    above = [a for a in fig.axes if a.get_xlabel()]
    assert [a.get_title(loc="left") for a in above] == ["text: uniform", "text: biased"]
    for panel in above:
        drawn = [tuple(line.get_ydata()) for line in panel.lines if len(line.get_xdata()) == 2]
        for curve in ((0.1, 0.2), (0.2, 0.4), (0.15, 0.3)):
            assert sum(d == pytest.approx(curve) for d in drawn) == 3


def test_the_dose_figure_draws_every_seed_the_mean_and_the_base_as_a_band():
    frame = pandas.DataFrame([
        {"seed": seed, "dose": dose, "method": method, "split": "counterfactual", "metric": metric,
         "value": dose * seed if method == "bpo" else 0.1 * seed}
        for seed in (1, 2) for dose in (0.5, 0.0) for method in ("base", "bpo")
        for metric in ("cover", "p_prior", "words")])
    prior, cover = dose.dose_curves(frame, own_share=0.77).axes
    assert prior.get_title(loc="left").startswith("P(prior's answer)")
    base, *seeds, mean, own = cover.lines
    assert [list(line.get_ydata()) for line in (*seeds, mean)] == [[0, 0.5], [0, 1], [0, 0.75]]
    assert base.get_ydata()[0] == pytest.approx(0.15) and list(own.get_xdata()) == [0.77, 0.77]
    band = cover.patches[0].get_extents().transformed(cover.transData.inverted())
    assert (band.y0, band.y1) == pytest.approx((0.1, 0.2))


@pytest.mark.slow
def test_the_notebook_runs_headless(tmp_path):
    given = json.dumps(LITTLE | {"repeats": 2})
    done = subprocess.run(
        [warm.python(), "-m", "papermill", "--no-progress-bar",
         str(params.ROOT / "notebooks" / f"{NOTEBOOK}.ipynb"), str(tmp_path / "out.ipynb"),
         "-y", given], cwd=tmp_path, text=True, capture_output=True,
        env={**os.environ, "BPO_OUTPUTS": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "tiny-prior" / NOTEBOOK / "manifest.json").read_text())
    assert len(manifest["metrics"]["cells"]) == 8
    assert {c["seed"] for c in manifest["metrics"]["cells"]} == {0, 1}
    executed = nbformat.read(tmp_path / "out.ipynb", 4)
    assert report.failure_message(tmp_path / "out.ipynb") is None
    assert report.headline(tmp_path / "out.ipynb").startswith("In this tiny world, over 2 seeds")
    assert sum("<figure>" in o.get("data", {}).get("text/html", "") for c in executed.cells
               if c.cell_type == "code" for o in c.outputs) == 1
