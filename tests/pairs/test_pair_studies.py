"""The studies beside the tiny one that the README reports, run whole with little of everything."""

import json
import shutil
import subprocess

import pytest
from helpers.study import FEW_ROWS, LITTLE, command, environment, without_a_kernel

from bpo import __main__, params
from bpo.models.weakening import WEAKENINGS


@pytest.mark.slow
@pytest.mark.parametrize("name", (
    "tiny-weakening", "tiny-selection", "tiny-controls", "tiny-axes", "tiny-difficulty",
    "tiny-length", "tiny-length-prior"))
def test_a_study_of_pairs_runs_whole(name, outputs, little_study, monkeypatch):
    # The tiny world is the same in all of them: it is read again.
    shutil.copytree(little_study / "0_tiny_world", outputs / name / "0_tiny_world")
    # Many methods: few questions to each, small steps.
    little = LITTLE | FEW_ROWS | {"batch_pairs": 8, "device_batch": 8, "steps": 1}
    overrides = [x for n, v in little.items() for x in ("-p", n, str(v))
                 if n not in ("noise_steps", "probe_rows")]
    if name.startswith("tiny-length"):  # what they change is in notebook 2
        overrides += ["-p", "methods", '["bpo"]']
    variants = params.read_study(name)["3_dpo_training"].variants
    overrides += ["-p", "variants", json.dumps({n: v | {"steps": 1}
                                                for n, v in variants.items()})]
    if name == "tiny-selection":  # its pages show what no other study's do
        done = subprocess.run(command("run", name, *overrides), env=environment(outputs), text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        monkeypatch.setattr(__main__, "_execute", without_a_kernel)
        assert __main__.main(["run", name, *overrides]) == 0
    assert not list(outputs.glob("*/*.old-*"))
    read = params.read_study(name)
    found = {n: json.loads((outputs / name / n / "manifest.json").read_text())["metrics"]
             for n in read}
    methods = (["bpo"] if name.startswith("tiny-length") else
               list(read["3_dpo_training"].runs()))
    assert list(found["3_dpo_training"]["methods"]) == methods
    compared = found["4_qualitative_comparison"]
    assert list(compared["counterfactual"]) == ["base", *methods]
    pairs = [json.loads(x) for x in
             (outputs / name / "2_pair_generation" / "pairs.jsonl").read_text().splitlines()]
    if name == "tiny-selection":
        assert "bpo_unselected" in compared["differences"]["counterfactual"]
        assert all(len(k["rejected"]) == len(k["unselected"]) for k in pairs)
        rows = found["3_dpo_training"]["methods"]
        assert rows["bpo"]["rows"] == rows["bpo_unselected"]["rows"]
        assert found["2_pair_generation"]["weakened"]["dropped"]["not selected"] > 0
    if name == "tiny-controls":
        facts = found["3_dpo_training"]["methods"]
        assert all(facts[m]["matched"] for m in methods if m.startswith("bpo"))
        assert "sft_matched_reversed" in compared["differences"]["counterfactual"]
    if name == "tiny-difficulty":
        weights = [r["weight"] for k in pairs for r in k["rejected"]]
        assert sum(weights) / len(weights) == pytest.approx(1, abs=1e-4) and len(set(weights)) > 9
    if name == "tiny-axes":
        assert {r["step"] for k in pairs for r in k["rejected"] if "step" in r} == {
            500, 600, 700, 800, 900, 999}
    if name == "tiny-weakening":
        assert "bpo_noisy" in compared["differences"]["counterfactual"]
        modes = {r["mode"] for k in pairs for r in k["rejected"]}
        assert modes == set(WEAKENINGS)


@pytest.mark.slow
@pytest.mark.parametrize("name, world", (
    ("tiny-orders", "tiny"), ("tiny-alignment-orders", "tiny-alignment-rows")))
def test_a_study_of_orders_trains_on_another_study_s_pairs(name, world, outputs, little_study,
                                                           monkeypatch, capsys):
    for stage in ("0_tiny_world", "2_pair_generation"):
        shutil.copytree(little_study / stage, outputs / world / stage)
    monkeypatch.setattr(__main__, "_execute", without_a_kernel)
    assert __main__.main(["run", name, "-p", "steps", "1", "-p", "lora_rank", "4"]) == 0
    facts = json.loads((outputs / name / "3_dpo_training/manifest.json").read_text()
                       )["metrics"]["methods"]
    assert list(facts) == ["bpo", *params.read_study(name)["3_dpo_training"].variants]
    work = {n: m["flops_per_step"] for n, m in facts.items()}
    assert work["bpo_images"] < work["bpo"] < work["bpo_rows"]
    assert 1.2 < work["bpo_equal_cost"] / work["bpo"] < 1.8  # 48 rows a step, not 32
    kept = outputs / name / "3_dpo_training/reference"
    assert {f.name for f in kept.glob("*/*") if f.is_dir()} == {"row", "image"}  # beside bpo's own
    assert "computed anew" not in capsys.readouterr().out
    assert (outputs / name / "4_qualitative_comparison/results.csv").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ("tiny-alignment-rows", "tiny-large", "tiny-aligned-2x"))
def test_a_study_beside_the_tiny_one_runs_whole(name, outputs, little_study, monkeypatch):
    shutil.copytree(little_study, outputs / "tiny")  # whose methods tiny-large sets beside a rival
    monkeypatch.setattr(__main__, "_execute", without_a_kernel)
    read = params.read_study(name)
    fields = {n for p in read.values() for n in type(p).model_fields}
    little = LITTLE | FEW_ROWS | (
        {"text_width": 64} if name == "tiny-large" else {"batch_pairs": 8, "device_batch": 8})
    overrides = [x for n, v in little.items() if n in fields for x in ("-p", n, str(v))]
    assert __main__.main(["run", name, *overrides]) == 0
    found = {n: json.loads((outputs / name / n / "manifest.json").read_text())["metrics"]
             for n in read}
    compared = found["4_qualitative_comparison"]["counterfactual"]
    assert ("rival" in compared) == (name == "tiny-large")
    if name != "tiny-aligned-2x":
        assert ("rival" in found["5_benchmarks"]["benchmarks"]["pope"]) == (name == "tiny-large")
    rows = json.loads((outputs / name / "0_tiny_world" / "preference" / "rows.json").read_text())
    assert len(rows) == 60 * (3 if name == "tiny-alignment-rows" else 2)
