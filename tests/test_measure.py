"""What a short run of each stage says of the whole study, on the little study and by hand; on a
checkpoint of the hub's cache it is in test_real_path."""

import re
import shutil

import pytest
from helpers.study import LITTLE

from bpo.__main__ import main
from bpo.params import DPOTraining
from bpo.reports import measure
from bpo.study.files import file_hash


def contents(root):
    return {f: file_hash(f) for f in root.rglob("*") if f.is_file()}


def check(**changed):
    """The exit code of measuring the little study with some parameters changed."""
    given = LITTLE | {"study": "little", "batch_pairs": 80, "device_batch": 80} | changed
    return main(["check", "tiny", "--measure",
                 *(x for n, v in given.items() for x in ("-p", n, str(v)))])


def test_every_stage_of_the_little_study_is_measured_beside_it(little_study, outputs, capsys,
                                                               warm_launches):
    shutil.copytree(little_study, outputs / "little")
    before = contents(outputs)
    assert check() == 0
    text = capsys.readouterr().out.partition("measured in one process on ")[2]
    assert contents(outputs) == before and [f.name for f in outputs.iterdir()] == ["little"]
    stages = re.findall(r"^(\d_\w+) +\d.* [\d.,]+ [MG]B +[\d.,]+ [MG]B  (.*)$", text, re.MULTILINE)
    assert [name for name, _ in stages] == [
        "1_noise_probability", "2_pair_generation", "3_dpo_training", "4_qualitative_comparison",
        "5_benchmarks"]
    of = [x for _, x in stages]
    assert of[0] == "20 of 20 rows, as long as these"
    assert of[1] == "80 of 120 rows, as long as these"  # a step of notebook 3 takes 80 pairs
    assert of[2].startswith("3 batches of 80 pairs a method") and "4 steps of 80" in of[2]
    assert of[3].startswith("80 of 100 rows of counterfactual, 60 of 60 rows of natural, ")
    assert of[4].startswith("8 questions a benchmark of 208 in all")
    for value in ("true", "false"):
        assert re.search(rf"checkpointing {value}: [\d.,]+ [MG]B, [\d.e-]+ s for a batch", text)
    assert re.search(r"set gradient_checkpointing (true|false): the faster", text)


def test_what_another_notebook_writes_must_be_there(outputs, capsys):
    assert check() == 1
    assert "0_tiny_world/model is not there yet, and measuring needs it: python -m bpo run" in (
        capsys.readouterr().err)
    assert list(outputs.glob("*")) == []


def test_nothing_is_measured_where_something_is_missing(outputs, capsys):
    assert check(model="not/there") == 1
    assert "MISSING" in capsys.readouterr().out and not outputs.exists()


def report(parts, **more):
    return {"once": 100.0, "parts": parts, "memory": 10**9, "room": 10**10, "disk": 10**9,
            "disk_rows": 10**8} | more


def test_steps_are_multiplied_and_what_happens_once_is_not():
    p = DPOTraining(methods=["bpo", "sft_matched"], variants={}, steps=0, epochs=2.0,
                    batch_pairs=32, device_batch=4)
    short = DPOTraining(**measure.shortened(p.model_copy(update={
        "pairs": "p", "image_folder": "i", "model": "m"}), [], 8))
    assert (short.steps, short.batch_pairs, short.save_every) == (3, 4, 1)
    took = report({"bpo": (2, 4.0), "sft_matched": (2, 2.0)}, metrics={"methods": {
        "bpo": {"rows": 16, "steps": 3}, "sft_matched": {"rows": 16, "steps": 3}}})
    # 160 pairs, twice, are 10 steps of 8 batches; a batch takes 2 s and 1 s.
    text = measure.line(p, short, took, {"pairs": 10.0})
    assert text.split()[:12] == ["3_dpo_training", *"5 min 40 s 1 min 40 s 1.0 GB".split(),
                                 "2.0"]
    assert "3 batches of 4 pairs a method" in text and "up to 10 steps of 32" in text


@pytest.mark.parametrize("room, chosen", [(60, "set gradient_checkpointing false"),
                                          (50, "set gradient_checkpointing true"),
                                          (20, "neither leaves a tenth of the device's 20.0 GB")])
def test_the_faster_that_fits_is_advised(room, chosen):
    p = DPOTraining(gradient_checkpointing=True, batch_pairs=32, device_batch=32)
    ran = {value: report({"bpo": (2, seconds)}, memory=memory * 10**9, room=room * 10**9)
           for value, seconds, memory in ((True, 4.0, 20), (False, 2.0, 50))}
    lines = measure.advice(p, ran)
    assert lines[0].endswith("true: 20.0 GB, 2 s for a batch of 32 pairs")
    assert len(lines) == 3 and chosen in lines[2]
    lines = measure.advice(p, ran | {False: {"failed": "the memory does not hold a step"}})
    assert "false: the memory does not hold a step" in lines[1]
