"""The studies beside the tiny one that the README reports, run whole with little of everything."""

import json
import os
import subprocess
import sys

import pytest

from bpo import params

LITTLE = {"tower_steps": 30, "text_steps": 40, "text_documents": 800, "caption_steps": 20,
          "mixed_steps": 20, "alignment_images": 40, "preference_images": 40,
          "development_images": 6, "test_images": 12, "natural_images": 6,
          "benchmark_images": 6, "steps": 2,
          "save_every": 2, "lora_rank": 4, "resamples": 200}


@pytest.mark.slow
@pytest.mark.parametrize("name", ("tiny-weakening", "tiny-selection"))
def test_a_study_of_pairs_runs_whole(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bpo", "run", name,
         *(x for n, v in LITTLE.items() for x in ("-p", n, str(v)))],
        env={**os.environ, "BPO_OUTPUTS": str(tmp_path), "HF_HUB_OFFLINE": "1"}, text=True,
        capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    read = params.read_study(name)
    found = {n: json.loads((tmp_path / name / n / "manifest.json").read_text())["metrics"]
             for n in read}
    methods = read["3_dpo_training"].methods
    assert list(found["3_dpo_training"]["methods"]) == methods
    compared = found["4_qualitative_comparison"]
    assert list(compared["counterfactual"]) == ["base", *methods]
    pairs = [json.loads(x) for x in
             (tmp_path / name / "2_pair_generation" / "pairs.jsonl").read_text().splitlines()]
    if name == "tiny-selection":
        assert "bpo_unselected" in compared["differences"]["counterfactual"]
        assert all(len(k["rejected"]) == len(k["unselected"]) for k in pairs)
        rows = found["3_dpo_training"]["methods"]
        assert rows["bpo"]["rows"] == rows["bpo_unselected"]["rows"]
        assert found["2_pair_generation"]["weakened"]["dropped"]["not selected"] > 0
    else:
        assert "bpo_noisy" in compared["differences"]["counterfactual"]
        modes = {r["mode"] for k in pairs for r in k["rejected"]}
        assert modes == set(params.WEAKEN_MODES)
