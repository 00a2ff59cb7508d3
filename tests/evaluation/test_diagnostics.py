"""What an answer owes to its image, and whether yes can be believed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bpo.data import rows as data_rows
from bpo.evaluation import diagnostics, metrics
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate
from bpo.params import Refusal


@pytest.fixture(scope="module")
def rows(data_file):
    return data_rows.read_rows(data_file)[0]


@pytest.fixture(scope="module")
def weighed(rows, model_folder, adapters):
    tuned = checkpoints.load_adapters(checkpoints.load(model_folder),
                                      {"bpo": adapters / "bpo" / "adapter"})
    lines = diagnostics.weigh(tuned, ["base", "bpo"], {r.id: r for r in rows},
                              diagnostics.requests(rows, seed=3), step=999, seed=3,
                              vocabulary={"colours": ["blue"], "objects": {"disc": ["disc"]}})
    return {line["id"]: line for line in lines}


def test_every_row_gets_another_row_s_image_whatever_the_order(rows):
    given = {r.id: r.other for r in diagnostics.requests(rows, seed=3)}
    assert given == {r.id: r.other for r in diagnostics.requests(rows[::-1], seed=3)}
    assert given != {r.id: r.other for r in diagnostics.requests(rows, seed=4)}
    for row in rows:
        assert given[row.id] != row.image and given[row.id] in {r.image for r in rows}


def test_rows_of_one_image_cannot_be_swapped(rows):
    with pytest.raises(Refusal, match="all its rows are about one image"):
        diagnostics.requests([replace(r, image_name="one") for r in rows], seed=0)


def test_log_probs_are_those_of_the_whole_answer_in_plain_passes(weighed, rows, checkpoint,
                                                                 tmp_path):
    row = next(r for r in rows if r.id == "attribute-2")
    request = next(r for r in diagnostics.requests(rows, seed=3) if r.id == row.id)
    ids = encoding.answer_tokens(checkpoint, row.prompt, row.answer)
    other = Image.open(request.other).convert("RGB").resize(Image.open(request.image).size)
    other.save(tmp_path / "other.png")
    pictures = {"right": request, "swapped": replace(request, image=tmp_path / "other.png"),
                "none": replace(request, image=None)}
    for view, asked in pictures.items():
        batch = generate.encode_batch(checkpoint, [asked])
        whole = torch.cat([batch.pop("input_ids"), torch.tensor([ids])], dim=1)
        batch["attention_mask"] = torch.ones_like(whole)
        with torch.no_grad():
            logits = checkpoint.model(input_ids=whole, **batch).logits[0, -len(ids) - 1:-1]
        chain = torch.log_softmax(logits, dim=-1)[range(len(ids)), ids]
        assert weighed[row.id]["logprobs"]["base"][view] == pytest.approx(chain.tolist(), abs=1e-3)
    assert weighed[row.id]["tokens"] == ["blue", "</s>"]


def test_images_and_adapters_change_the_numbers(weighed):
    for line in weighed.values():
        for method in ("base", "bpo"):
            assert len({tuple(x) for x in line["logprobs"][method].values()}) == 4
        assert line["logprobs"]["base"] != line["logprobs"]["bpo"]


def test_gains_are_differences_of_sums_and_sums_over_kinds():
    line = {"kinds": ["colour", "stop"], "logprobs": {"m": {
        "right": [-1.0, -2.0], "swapped": [-1.5, -4.0], "none": [-3.0, -3.0],
        "noisy": [-1.0, -1.5]}}}
    gains = diagnostics.gains(line, "m")
    assert {n: value for n, (value, _) in gains.items() if value} == {
        "right": -3.0, "over_swapped": 2.5, "over_none": 3.0, "over_noisy": -0.5,
        "right_colour": -1.0, "right_stop": -2.0, "swapped_colour": -1.5, "swapped_stop": -4.0}
    assert {out_of for _, out_of in gains.values()} == {1}


VOCABULARY = {"colours": ["red"], "objects": {"mouse": ["mouse", "mice"],
                                              "light": ["traffic light", "traffic lights"]}}


@pytest.mark.parametrize("pieces, vocabulary, kinds", [
    (["red", " mice", " ,", " Traffic", " lights", ".", "<end>"], VOCABULARY,
     "colour object stop object object stop stop"),
    (["There", " is", " a", " red", "dish", " mou", "se", "-", "hole", "\n", "<end>"], VOCABULARY,
     "function function function content content object object stop content stop stop"),
    # without a vocabulary words are content or function words; the end may be the word's own piece
    (["the", " red", " mice", "!", "<end>"], {}, "function content content stop stop"),
    (["no", "<end>"], {}, "content stop"), (["<end>"], VOCABULARY, "stop")])
def test_a_token_is_of_the_kind_of_its_word(pieces, vocabulary, kinds):
    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return "".join(pieces[i] for i in ids).replace("<end>", "")

    assert diagnostics.kinds(Tokenizer(), range(len(pieces)), vocabulary) == kinds.split()


def test_the_kinds_of_an_answer_s_tokens_stand_beside_them(weighed):
    line = weighed["attribute-2"]
    assert (line["tokens"], line["kinds"]) == (["blue", "</s>"], ["colour", "stop"])
    assert all(len(x["kinds"]) == len(x["tokens"]) for x in weighed.values())


# --- sharpening ---------------------------------------------------------------------------------

def of_colours(row, image, **logps):
    """A line of a question whose candidates are one true answer, the prior's and a third one."""
    return {"id": row, "image": image, "candidates": [["a"], ["b"], ["c"]],
            "logps": {m: np.log(p).tolist() for m, p in logps.items()}}


def squared(p):
    return [x * x / sum(y * y for y in p) for x in p]


BASE = ([0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.6, 0.2, 0.2], [0.3, 0.3, 0.4])


def test_a_method_that_is_only_more_certain_gains_nothing_beyond_sharpening():
    # "sharp" is the base at temperature 1/2; "sees" gives the prior's share to the true answer
    lines = [of_colours(str(k), f"{k % 3}.png", base=p, sharp=squared(p),
                        sees=[p[0] + p[1] / 2, p[1] / 2, p[2]]) for k, p in enumerate(BASE)]
    temperatures = diagnostics.matched_temperatures(lines, ["base", "sharp", "sees"])
    assert temperatures["base"] == pytest.approx(1) and 0.5 == pytest.approx(temperatures["sharp"])
    found = diagnostics.sharpen(lines, temperatures, seed=0, resamples=200)
    first = lines[0]["sharpened"]["sharp"]
    assert first["among_p_true"] == pytest.approx(0.25 / 0.38)
    assert first["matched_p_true"] == pytest.approx(0.25 / 0.38, abs=1e-5)
    assert first["among_logp_true"] == pytest.approx(np.log(0.25 / 0.38))
    assert first["among_p_prior"] == pytest.approx(0.09 / 0.38) == pytest.approx(
        first["confidence"] * 0.09 / 0.25)
    beyond = found[diagnostics.SHARPENED]
    assert list(beyond) == ["sharp", "sees"]
    assert beyond["sharp"]["p_true"]["value"] == pytest.approx(0, abs=1e-5)
    seen = [np.mean([line["sharpened"]["sees"][f"{side}_p_true"] for line in lines])
            for side in ("among", "matched")]
    assert beyond["sees"]["p_true"]["value"] == pytest.approx(seen[0] - seen[1], abs=1e-6) != 0
    assert beyond["sees"]["p_prior"]["high"] < 0 and beyond["sees"]["p_true"]["n"] == 4
    # candidates need not add up to one: what matters is their share
    assert metrics.among(np.log([0.2, 0.1, 0.1]), 1, 1)["p_true"] == pytest.approx(0.5)


@pytest.mark.parametrize("goal, temperature", [(1.0, 0.01), (1 / 3, 100)])
def test_a_confidence_out_of_reach_gets_the_nearest_temperature(goal, temperature):
    logps = np.log([[0.5, 0.3, 0.2]])
    assert metrics.temperature(logps, goal + (goal - 0.5) * 1e-2) == pytest.approx(temperature)


def test_without_calibration_nothing_is_sharpened():
    lines = [of_colours("0", "0.png", base=BASE[0], sees=BASE[1])]
    assert diagnostics.matched_temperatures([], ["base", "sees"]) == {}
    assert diagnostics.sharpen(lines, {}, seed=0, resamples=200) == {}
    assert "sharpened" not in lines[0]


@pytest.mark.parametrize("known, candidates", [
    ({"category": "attribute", "true": ["red"], "prior": ["blue"]}, (["red"], ["blue"], ["pink"])),
    ({"category": "attribute", "true": ["red"], "prior": ["red", "teal"]},
     (["red"], ["teal"], ["blue", "pink"])),
    ({"category": "attribute", "true": ["red"], "prior": ["red"]}, ()),
    ({"category": "presence", "true": ["no"], "prior": ["yes"]}, ())])
def test_the_candidates_are_truth_prior_and_the_other_colours(known, candidates):
    truth = {"rows": {"x": known}, "vocabulary": {"colours": ["red", "blue", "pink"]}}
    assert diagnostics.candidates(truth, "x") == candidates
    assert diagnostics.candidates(truth, "y") == ()


def test_the_share_of_yes_is_a_softmax_over_the_two():
    assert diagnostics.yes_share([np.log(0.3), np.log(0.1)]) == pytest.approx(0.75)
    assert diagnostics.yes_share([-900.0, -900.0]) == pytest.approx(0.5)


ASKED = [("a", 0.05, False), ("a", 0.15, True), ("b", 0.16, False), ("b", 1.0, True)]


def test_calibration_by_hand():
    found = metrics.calibration(ASKED, np.array([[1, 1], [2, 0], [0, 2]]))
    # bins: .05 -> 0; .15 and .16 -> half of them yes; 1.0 -> 1
    assert [(b["low"], b["n"], b["share"]) for b in found["bins"]] == [
        (0.0, 1, 0.0), (0.1, 2, 0.5), (0.9, 1, 1.0)]
    assert found["bins"][1]["p"] == pytest.approx(0.155)
    assert found["ece"]["value"] == pytest.approx((0.05 + 2 * abs(0.5 - 0.155)) / 4)
    # image a alone: .05 and .85 off; image b alone: .16 and 0
    assert found["ece"]["low"] >= 0.08 and found["ece"]["high"] <= 0.45 and found["ece"]["n"] == 4


def test_calibration_error_agrees_with_a_plain_loop():
    rng = np.random.default_rng(0)
    asked = [(str(k % 40), float(p), bool(rng.random() < p ** 2))
             for k, p in enumerate(rng.random(400))]
    weights = metrics.bootstrap_weights(40, 50, rng)
    total = 0.0
    for k in range(10):
        mine = [a for a in asked if k / 10 <= a[1] < (k + 1) / 10]
        total += abs(sum(a[2] for a in mine) - sum(a[1] for a in mine))
    found = metrics.calibration(asked, weights)
    assert found["ece"]["value"] == pytest.approx(total / 400, abs=1e-6)
    assert found["ece"]["low"] < found["ece"]["high"]


def test_a_yes_no_answer_counts_its_squared_error():
    assert diagnostics.yes_no_counts(0.25, True) == {"brier": (0.5625, 1), "mean_p_yes": (0.25, 1)}
