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
                              diagnostics.requests(rows, seed=3), step=999, seed=3)
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


def test_gains_are_differences_of_sums():
    line = {"tokens": ["a", "b"], "logprobs": {"m": {
        "right": [-1.0, -2.0], "swapped": [-1.5, -4.0], "none": [-3.0, -3.0],
        "noisy": [-1.0, -1.5]}}}
    assert diagnostics.gains(line, "m") == {"right": (-3.0, 1), "over_swapped": (2.5, 1),
                                            "over_none": (3.0, 1), "over_noisy": (-0.5, 1)}
    assert diagnostics.token_gaps(line, "m") == [0.0, -0.5]


def test_the_share_of_yes_is_a_softmax_over_the_two():
    assert diagnostics.yes_share([np.log(0.3), np.log(0.1)]) == pytest.approx(0.75)
    assert diagnostics.yes_share([-900.0, -900.0]) == pytest.approx(0.5)


ASKED = [("a", 0.05, False), ("a", 0.15, True), ("b", 0.16, False), ("b", 1.0, True)]


def test_calibration_by_hand():
    found = diagnostics.calibration(ASKED, np.array([[1, 1], [2, 0], [0, 2]]))
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
    found = diagnostics.calibration(asked, weights)
    assert found["ece"]["value"] == pytest.approx(total / 400, abs=1e-6)
    assert found["ece"]["low"] < found["ece"]["high"]


def test_a_yes_no_answer_counts_its_squared_error():
    assert diagnostics.yes_no_counts(0.25, True) == {"brier": (0.5625, 1), "mean_p_yes": (0.25, 1)}
