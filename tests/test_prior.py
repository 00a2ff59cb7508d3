"""Where the prior comes from: levels that are what they say, worlds that go on where a killed study
was, and effects computed by hand."""

import json
import os
import subprocess
import sys

import nbformat
import pytest

from bpo import params
from bpo.reports import page as report
from bpo.tiny import build, language, prior, prior_tables, world

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
        calls = {n: counted(patch, build, n) for n in ("seeing_model", "text_model", "align")}
        result = prior.run(little("whole"))
    work |= {n: len(c) for n, c in calls.items()}
    return result


def worlds(result) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in (result.folder / "worlds").iterdir()}


def counted(monkeypatch, module, name: str) -> list:
    """Lets `name` do its work and notes each call."""
    real, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *a, **k: (calls.append(name), real(*a, **k))[1])
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
    scenes = [language.scene_facts(s) for s in prior.draw_images(p, 0)[0]["uniform"]]
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
    found = shares([language.scene_facts(s) for s in prior.draw_images(p, 0)[0][level]])
    assert found[:2] == pytest.approx(expected, abs=0.025)


def test_half_is_half_way():
    levels = params.PriorOrigin().image_levels
    middle = [(a + b) / 2 for a, b in zip(levels["uniform"], levels["biased"], strict=True)]
    assert levels["half"] == pytest.approx(middle)


def test_the_biased_levels_are_the_tiny_studys():
    p, tiny = params.PriorOrigin(), params.TinyWorld()
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
    assert gate["passed"] is False  # two steps teach nothing


def test_the_worlds_of_a_seed_share_tower_and_text_models(study, work):
    assert work == {"seeing_model": 1, "text_model": 2, "align": 4}
    held = [json.loads(w) for w in worlds(study).values()]
    assert len({str(w["tower"]) for w in held}) == 1
    assert len({str(w["text_model"]) for w in held}) == 2


def test_an_interrupted_study_goes_on_by_world(study, monkeypatch):
    """Worlds that are there are kept, and one built alone has the bytes of one built in turn."""
    real, asked = prior._asked, []

    def killed(*arguments):
        asked.append(arguments)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prior, "_asked", killed)
        with pytest.raises(KeyboardInterrupt):
            prior.run(little("killed"))
    folder = params.outputs_root() / "killed" / NOTEBOOK
    assert [f.name for f in (folder / "worlds").iterdir()] == ["0-uniform-uniform.json"]
    before = (folder / "worlds" / "0-uniform-uniform.json").stat().st_mtime_ns
    (folder / "worlds" / "0-biased-uniform.json").write_bytes(
        worlds(study)["0-biased-uniform.json"])
    aligned = counted(monkeypatch, build, "align")
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


@pytest.fixture
def by_hand():
    """One seed, two images. Text: +.1 clean; with biased images also +.2 of rise. Images: +.3 and
    +.5 clean, image by image."""
    return [made(7, "uniform", "uniform", [0.1, 0.1], [[0.1, 0.3], [0.2, 0.2]]),
            made(7, "uniform", "biased", [0.4, 0.6], [[0.5, 0.5], [0.7, 0.7]]),
            made(7, "biased", "uniform", [0.2, 0.2], [[0.3, 0.3], [0.3, 0.3]]),
            made(7, "biased", "biased", [0.5, 0.7], [[0.8, 0.8], [1.0, 1.0]])]


def test_effects_by_hand(by_hand):
    p = little("hand", images=2, seed=7)
    found = {"effects": prior.effects(by_hand, p)}
    expected = {("text", "clean"): (0.1, 0.1, 0.1), ("images", "clean"): (0.4, 0.4, 0.4),
                ("text", "rise"): (0.0, 0.2, 0.1), ("images", "rise"): (0.0, 0.2, 0.1)}
    for (factor, name), values in expected.items():
        for at, value in zip(("uniform", "biased", "all"), values, strict=True):
            change = prior_tables.effect(found, factor, name, at)
            assert change["mean"] == change["least"] == change["most"] == pytest.approx(value)
    pictures = prior_tables.effect(found, "images", "clean")["seeds"][0]
    assert (pictures["low"], pictures["high"]) == (0.3, 0.5)  # either image alone
    assert prior_tables.verdict(prior_tables.effect(found, "images", "clean")) == "raises"
    assert prior_tables.larger(found, "clean") == "the alignment images move it more"


def change(*seeds: tuple[float, float, float]) -> dict:
    values = [v for v, _, _ in seeds]
    names = ("value", "low", "high")
    return {"mean": sum(values) / len(values),
            "seeds": [{"seed": n} | dict(zip(names, s, strict=True)) for n, s in enumerate(seeds)]}


def test_a_verdict_needs_every_seed():
    assert prior_tables.verdict(change((0.1, 0.05, 0.2), (0.2, 0.1, 0.3))) == "raises"
    assert prior_tables.verdict(change((-0.1, -0.2, -0.05), (-0.2, -0.3, -0.1))) == "lowers"
    untold = "cannot be told to move"
    assert prior_tables.verdict(change((0.1, 0.05, 0.2), (-0.2, -0.3, -0.1))) == untold
    assert prior_tables.verdict(change((0.1, 0.05, 0.2), (0.02, -0.01, 0.05))) == untold
    assert prior_tables.told(change((0.1, 0, 0), (-0.04, 0, 0))) == "+0.030 (+0.100, -0.040)"


def test_the_larger_factor_is_named_only_where_all_seeds_agree():
    def found(text, pictures):
        return {"effects": [change(*((v, v, v) for v in values))
                            | {"factor": factor, "measure": "rise", "at": "all"}
                            for factor, values in (("text", text), ("images", pictures))]}

    assert prior_tables.larger(found((0.3, -0.2), (0.1, 0.1)), "rise") == (
        "the text moves it more, on every seed")
    assert "cannot be told" in prior_tables.larger(found((0.3, 0.1), (0.1, 0.2)), "rise")


def test_what_the_notebook_shows(study):
    p, found = little("whole"), study.metrics
    assert len(prior_tables.level_rows(p)) == 4
    assert [r["text"] for r in prior_tables.cell_rows(found)] == ["uniform"] * 2 + ["biased"] * 2
    assert [r["images"] for r in prior_tables.effect_rows(found, p, "text")] == [
        "uniform", "biased", "all"] * 2
    assert "BELOW the bound" in prior_tables.gates_told(found)
    said = prior_tables.headline(found)
    assert said["seeds"] == "1 seed"
    assert said["tcn"] == prior_tables.told(prior_tables.effect(found, "text", "clean"))
    assert prior_tables.told(change((0.3, 0.2, 0.4))) == "+0.300 [+0.200, +0.400]"
    both = prior_tables.together(found, p)
    assert both["clean_high"] == prior_tables.told(
        prior_tables.effect(found, "images", "clean", "biased"))
    assert both["rise_low"] == prior_tables.told(
        prior_tables.effect(found, "text", "rise", "uniform"))
    assert said["irn"] == prior_tables.told(prior_tables.effect(found, "images", "rise"))


def test_the_figure_draws_every_seed_and_the_mean():
    cells = [{"text": t, "images": i, "seed": s, "curve": [0.1 * s, 0.2 * s], "clean": 0.1 * s,
              "rise": 0.1 * s} for t in ("uniform", "biased") for i in ("uniform", "half", "biased")
             for s in (1, 2)]
    fig = prior_tables.prior_worlds(cells, [0, 999], 1 / 8)
    above = [a for a in fig.findobj(lambda a: a.__class__.__name__ == "Axes") if a.get_xlabel()]
    assert [a.get_title(loc="left") for a in above] == ["text: uniform", "text: biased"]
    for panel in above:
        drawn = [tuple(line.get_ydata()) for line in panel.lines if len(line.get_xdata()) == 2]
        for curve in ((0.1, 0.2), (0.2, 0.4), (0.15, 0.3)):
            assert sum(d == pytest.approx(curve) for d in drawn) == 3


@pytest.mark.slow
def test_the_notebook_runs_headless(tmp_path):
    given = json.dumps(LITTLE | {"repeats": 2})
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "--no-progress-bar",
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
