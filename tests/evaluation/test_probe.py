"""The noise analysis: its looks, its candidates, its curves, on a small random model."""

import json
import math
import re

import pytest

from bpo.data import rows as data_rows
from bpo.evaluation import probe
from bpo.models import encoding, generate, logprobs
from bpo.models.weakening import View
from bpo.params import NoiseProbability, Refusal
from bpo.reports import explorer
from bpo.reports.tables import noise_views
from bpo.study import results
from bpo.study.files import read_lines
from bpo.study.results import Estimate

STEPS = [0, 500, 999]


@pytest.fixture(scope="module")
def parameters(model_folder, data_file):
    return NoiseProbability(study="s", model=str(model_folder), data=str(data_file), rows=0,
                            noise_steps=STEPS, draws=2, sampled_answers=2, max_new_tokens=5,
                            batch_size=6)


def changed(p, **values):
    return type(p)(**p.model_dump() | values)


@pytest.fixture(scope="module")
def result(parameters, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BPO_OUTPUTS", str(tmp_path_factory.mktemp("probe")))
        found = probe.run(parameters)
        assert probe.run(parameters).metrics == found.metrics, "read again, the numbers differ"
    return found


# --- the stage ----------------------------------------------------------------------------------

def test_every_image_is_looked_at_at_every_step_and_once_without_noise(result):
    lines, _ = probe.load(result)
    looks = {}
    for line in lines:
        looks.setdefault((line["row"], line["step"]), []).append(line["draw"])
    assert len(looks) == 4 * len(STEPS)
    assert all(sorted(draws) == ([0] if step == 0 else [0, 1])
               for (_, step), draws in looks.items())
    assert result.metrics["images"] == 4


def test_candidates_are_those_of_the_truth_file(result, data_file):
    _, candidates = probe.load(result)
    truth = data_rows.read_truth(data_file)["rows"]
    assert candidates == {i: {k: truth[i][k] for k in probe.KINDS}
                          for i in truth if i.startswith("attribute")}


def test_probabilities_are_probabilities(result):
    lines, _ = probe.load(result)
    for line in lines:
        for answer in line["answers"]:
            assert answer["tokens"] == 2  # a colour and the end
            assert answer["logp"] <= answer["logp_first"] + 1e-5 <= 1e-5


@pytest.mark.parametrize("name", [f"{m}_{k}{f}" for m, f in (("p", ""), ("p", "_first"),
                                                             ("logp", ""))
                                  for k in ("true", "prior")])
def test_every_curve_has_a_point_and_an_interval_a_step(result, name):
    points, intervals = result.metrics[name], result.metrics[f"{name}_interval"]
    assert len(points) == len(intervals) == len(STEPS)
    assert all(low <= value <= high for value, (low, high) in zip(points, intervals, strict=True))
    if name.startswith("p_"):
        assert all(0 <= value <= 1 for value in points)
    else:
        assert all(value <= 0 for value in points)


def test_the_curves_are_means_of_the_looks(result):
    lines, _ = probe.load(result)
    for step, value in zip(STEPS, result.metrics["p_true"], strict=True):
        by_image = {}
        for line in lines:
            if line["step"] == step:
                by_image.setdefault(line["image"], []).append(math.exp(line["answers"][0]["logp"]))
        means = [sum(v) / len(v) for v in by_image.values()]
        assert value == pytest.approx(sum(means) / len(means), abs=2e-6)


def test_noise_changes_what_the_model_believes(result):
    lines, _ = probe.load(result)
    first = {(x["step"], x["draw"]): x["answers"][0]["logp"] for x in lines
             if x["row"] == "attribute-0"}
    assert len(set(first.values())) == len(first)


def test_answers_are_sampled_for_the_chosen_images_and_first_draws_alone(result):
    lines, _ = probe.load(result)
    sampled = [x for x in lines if x["sampled"] is not None]
    assert {x["draw"] for x in sampled} == {0}
    assert len({x["row"] for x in sampled}) == 2
    assert len(sampled) == 2 * len(STEPS)
    shares = result.metrics["sampled"]
    assert all(sum(shares[k][i] for k in shares) == pytest.approx(1) for i in range(len(STEPS)))


def test_the_prompt_s_pass_is_shared_here_and_the_numbers_are_the_same_without(
        result, parameters, outputs, monkeypatch):
    assert result.metrics["prefix_shared"] is True
    monkeypatch.setattr(logprobs, "choose", lambda *args: logprobs.weigh_unpacked)
    alone = probe.run(parameters)
    assert alone.metrics["prefix_shared"] is False
    assert alone.metrics["p_true"] == pytest.approx(result.metrics["p_true"], abs=1e-4)


def test_an_interrupted_analysis_goes_on_to_the_same_bytes(result, parameters, outputs,
                                                           monkeypatch):
    right, calls = probe.look, []

    def killed(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(probe, "look", killed)
        probe.run(parameters)
    again = probe.run(parameters)
    for name in ("looks.jsonl", "looks-fade.jsonl", "candidates.json"):
        assert (again.folder / name).read_bytes() == (result.folder / name).read_bytes()
    assert again.metrics == result.metrics


def test_the_example_is_chosen_by_a_rule_and_all_courses_are_counted(result, parameters):
    example = noise_views.example(parameters, result)
    assert len(example["images"]) == len(example["chances"]) == len(STEPS)
    assert example["chances"][0][0] == pytest.approx(example["p_true"][0])
    said = noise_views.fate(example).plain
    assert example["question"].startswith("what colour is the") and example["true"][0] in said
    counts = [int(n) for n in re.findall(r"(\d+) (?:go from|have the|stay with|do other)", said)]
    assert len(counts) == 4 and f"Of {sum(counts)} images" in said
    slider = noise_views.slider(parameters, example).html
    assert slider.count('type="radio"') == slider.count("<img") == len(STEPS)
    assert slider.count(" checked") == 1 and "<script" not in slider


def test_the_image_fades_at_the_same_steps_and_its_clean_look_is_shared(result, parameters):
    lines, _ = probe.load(result)
    faded = read_lines(result.folder / "looks-fade.jsonl")
    assert {(x["row"], x["step"], x["draw"]) for x in faded} == {
        (x["row"], x["step"], 0) for x in lines if x["step"]}
    curves = result.metrics["other_ways"]["fade"]
    for name in ("p_true", "p_prior", "logp_true"):
        assert curves[name][0] == result.metrics[name][0]
        assert curves[name][1:] != result.metrics[name][1:]
    for step, value in zip(STEPS[1:], curves["p_true"][1:], strict=True):
        ps = [math.exp(x["answers"][0]["logp"]) for x in faded if x["step"] == step]
        assert value == pytest.approx(sum(ps) / 4, abs=2e-6)
    rows = results.read(result.folder)
    assert rows["category"].unique().tolist() == ["noise", "fade"]
    assert len(rows.query("category == 'fade'")) == len(rows) / 2
    shown = noise_views.example(parameters, result)["other_ways"]["fade"]
    assert shown["steps"] == STEPS[1:] and len(shown["images"]) == len(shown["chances"]) == 2


def test_a_faded_look_is_what_the_model_says_of_the_faded_picture(result, checkpoint, data_file):
    line = read_lines(result.folder / "looks-fade.jsonl")[0]
    row = next(r for r in data_rows.read_rows(data_file)[0] if r.id == line["row"])
    inputs = generate.encode_batch(checkpoint, [generate.Request(row.id, row.prompt, row.image)],
                                   View("fade", line["step"]))
    ids = [[encoding.answer_tokens(checkpoint, row.prompt, a["text"]) for a in line["answers"]]]
    [weighed] = logprobs.weigh_unpacked(checkpoint, inputs, ids)
    assert [w.logprobs.sum().item() for w in weighed] == pytest.approx(
        [a["logp"] for a in line["answers"]], abs=1e-4)


# --- where the candidates come from -------------------------------------------------------------

def test_one_question_is_asked_of_every_image_with_the_user_s_answers(parameters, outputs):
    p = changed(parameters, question="is there a dog ?", true_answers=["yes", "a dog"],
                prior_answers=["no"], category="")
    found = probe.run(p)
    lines, candidates = probe.load(found)
    assert found.metrics["images"] == len({x["image"] for x in lines}) == 4
    assert all(c == {"true": ["yes", "a dog"], "prior": ["no"]} for c in candidates.values())
    for line in lines:
        assert [(a["kind"], a["text"]) for a in line["answers"]] == [
            ("true", "yes"), ("true", "a dog"), ("prior", "no")]
    assert noise_views.example(p, found)["question"] == "is there a dog ?"


def test_without_a_truth_file_the_prior_s_answer_is_what_the_model_says_blindly(
        parameters, untold_file, data_file, outputs, checkpoint):
    p = changed(parameters, data=str(untold_file), image_folder=str(data_file.parent), category="",
                noise_steps=[0, 999], draws=1)
    found = probe.run(p)
    _, candidates = probe.load(found)
    rows = {r.id: r for r in data_rows.read_rows(untold_file, data_file.parent)[0]}
    assert "truth" not in found.manifest["inputs"]
    assert len(candidates) + sum(found.metrics["rows_skipped"].values()) == len(rows)
    assert len(candidates) > 6
    for row_id, known in candidates.items():
        assert known["true"] == [rows[row_id].answer]
        request = generate.Request(row_id, rows[row_id].prompt, rows[row_id].image)
        blind = generate.encode_batch(checkpoint, [request], View("noisy", 999), seed=p.seed)
        assert known["prior"] == generate.decode(checkpoint, blind, max_new_tokens=5)


def test_rows_whose_prior_has_no_answer_are_counted(parameters, outputs):
    found = probe.run(changed(parameters, category="", noise_steps=[0, 999], draws=1))
    assert found.metrics["rows_skipped"] == {"the prior has no answer": 4}  # the captions


def test_a_category_without_rows_is_refused(parameters, outputs):
    with pytest.raises(Refusal, match="no row of the category 'number'"):
        probe.run(changed(parameters, category="number"))


# --- the summary, by hand -----------------------------------------------------------------------

def look(image, step, true, prior, *, draw=0, sampled=None, tokens=2):
    """A line whose whole answers have these probabilities and first tokens twice as much."""
    def answer(kind, text, p, token):
        return {"kind": kind, "text": text, "logp": math.log(p), "logp_first": math.log(2 * p),
                "first_token": token, "tokens": tokens}

    return {"id": f"{image}|{step}|{draw}", "row": image, "image": image, "step": step,
            "draw": draw, "sampled": sampled,
            "answers": [answer("true", "red", true, 1), answer("prior", "blue", prior, 2)]}


LOOKS = [
    look("a", 0, 0.4, 0.1, sampled="Red."), look("b", 0, 0.2, 0.1, sampled="red"),
    look("a", 900, 0.1, 0.3, sampled="blue"), look("a", 900, 0.3, 0.1, draw=1),
    look("b", 900, 0.1, 0.3, sampled="dog"), look("b", 900, 0.1, 0.3, draw=1)]


def test_draws_are_averaged_before_images():
    found = probe.summary(LOOKS, [0, 900], seed=0)
    assert found["noise_steps"] == [0, 900]
    assert found["p_true"] == pytest.approx([0.3, 0.15], abs=1e-6)
    assert found["p_prior"] == pytest.approx([0.1, 0.25], abs=1e-6)
    assert found["p_true_first"] == pytest.approx([0.6, 0.3], abs=1e-6)
    assert found["logp_true"][0] == pytest.approx((math.log(0.4) + math.log(0.2)) / 4, abs=1e-6)


def test_the_change_is_paired_by_image_from_the_clean_image_to_the_last_step():
    change = probe.summary(LOOKS, [0, 900], seed=0)["change_true"]
    # By image: 0.2 - 0.4 and 0.1 - 0.2.
    assert change["value"] == pytest.approx(-0.15, abs=1e-6)
    assert (change["low"], change["high"]) == pytest.approx((-0.2, -0.1), abs=1e-6)


def test_sampled_answers_are_counted_by_kind():
    assert probe.summary(LOOKS, [0, 900], seed=0)["sampled"] == {
        "true": [1, 0], "prior": [0, 0.5], "other": [0, 0.5]}


def test_candidates_of_a_kind_are_summed_and_a_shared_first_token_counts_once():
    line = look("a", 0, 0.2, 0.1, sampled="red")
    line["answers"].append({**line["answers"][0], "text": "red one", "logp": math.log(0.05),
                            "tokens": 4})
    found = probe.summary([line], [0], seed=0)
    assert found["p_true"] == [pytest.approx(0.25, abs=1e-6)]
    assert found["p_true_first"] == [pytest.approx(0.4, abs=1e-6)]
    assert found["logp_true"] == [pytest.approx(math.log(0.05) / 4, abs=1e-6)]


def test_curves_are_named_for_people():
    found = json.loads(json.dumps(probe.summary(LOOKS, [0, 900], seed=0)))
    for measure in ("p", "p_first", "logp"):
        curves = explorer.curves(found, measure)
        assert list(curves) == ["true answer", "prior's answer"]
        assert all(len(c[k]) == 2 for c in curves.values() for k in ("mean", "low", "high"))
    assert explorer.curves(found, "p_first")["true answer"]["mean"] == found["p_true_first"]


@pytest.mark.parametrize("low, high, words", [
    (0.1, 0.2, "rises"), (-0.2, -0.1, "falls"), (-0.1, 0.1, "does not clearly move"),
    (0, 0.1, "does not clearly move")])
def test_a_direction_is_said_only_where_the_interval_allows_it(low, high, words):
    assert explorer.direction(Estimate(0.05, low, high)) == words


def test_the_headline_says_under_what_the_prior_comes_out(parameters):
    def found(true, prior):
        return {f"change_{kind}": {"value": sum(x) / 2, "low": x[0], "high": x[1]}
                for kind, x in (("true", true), ("prior", prior))}

    noise = found((-0.4, -0.2), (0.1, 0.3)) | {"images": 4}
    fade = found((-0.4, -0.2), (-0.1, 0.1))
    words = explorer.noise_headline(parameters, noise | {"other_ways": {"fade": fade}}).plain
    assert "under noise. From the clean image to step 999: under noise P(true answer)" in words
    assert "under fade P(true answer) falls (−0.300 [−0.400, −0.200]) and P(prior's answer) " \
        "does not clearly move" in words
    both = explorer.noise_headline(parameters, noise | {"other_ways": {"fade": noise}}).plain
    assert "under noise and fade." in both
    none = explorer.noise_headline(parameters, fade | {"images": 4, "other_ways": {}}).plain
    assert "under nothing that was tried." in none
