"""One class of equal configurations: however the same pairs are trained on, the run is the same.

The committed trajectory is that of TRL's own trainer on one process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from helpers import warm
from helpers.data import picture, said
from helpers.trainers import dpo_trainer
from trl import DPOTrainer

from bpo.models import checkpoint as checkpoints
from bpo.study import processes
from bpo.training.packed.trainer import PackedDPOTrainer

pytestmark = pytest.mark.study

TESTS = Path(__file__).resolve().parents[1]
TRAJECTORY = TESTS / "golden" / "dpo.json"
LOGGED = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen")
TURNS = (("red", "blue", "a big green box"), ("a box", "no", "yes"), ("the cat", "a hot dog", "no"),
         ("a small disc on the mat", "green", "this shows a yellow cat"))


def pairs() -> Dataset:
    return Dataset.from_list([
        {"images": [picture("disc", "red", n)],
         "prompt": said("user", "what is there ? " * (1 + n)),
         "chosen": said("assistant", chosen), "rejected": said("assistant", rejected)}
        for n, (chosen, *answers) in enumerate(TURNS) for rejected in answers])


def trajectory(kind, folder, out, *, own=None, **settings) -> list[dict[str, float]]:
    trainer = dpo_trainer(kind, checkpoints.load(folder), pairs(), out, own=own, **{
        "num_train_epochs": 2, "train_sampling_strategy": "sequential", **settings})
    trainer.train()
    return [{n: h[n] for n in LOGGED} for h in trainer.state.log_history if "loss" in h]


HALVES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
EQUAL = {
    "trl": (DPOTrainer, {}),
    "trl, accumulated": (DPOTrainer, HALVES),
    "packed": (PackedDPOTrainer, {"own": {"packing": "always"}}),
    "checked": (PackedDPOTrainer, {}),
    "unpacked": (PackedDPOTrainer, {"own": {"packing": "never"}}),
    "kept references": (PackedDPOTrainer, {"precompute_ref_log_probs": True}),
    "accumulated": (PackedDPOTrainer, HALVES),
    "accumulated, kept": (PackedDPOTrainer, {**HALVES, "precompute_ref_log_probs": True}),
    "evaluated": (PackedDPOTrainer, EVALUATED),
    "checkpointed": (PackedDPOTrainer, {"gradient_checkpointing": True}),
    "workers": (PackedDPOTrainer, {"dataloader_num_workers": 1}),
}


def equal(found: list[dict[str, float]]) -> None:
    expected = json.loads(TRAJECTORY.read_text())
    assert len(found) == len(expected) == 4
    for step, other in zip(expected, found, strict=True):
        for name in step:
            assert other[name] == pytest.approx(step[name], abs=1e-4, rel=1e-4), name


@pytest.mark.parametrize("name", EQUAL)
def test_a_run_is_the_committed_one(name, model_folder, tmp_path):
    kind, settings = EQUAL[name]
    if "eval_strategy" in settings:
        settings = {**settings, "own": {"eval_dataset": pairs().select(range(3))}}
    equal(trajectory(kind, model_folder, tmp_path, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two processes", "two processes, kept references"])
def test_a_run_on_two_processes_is_the_committed_one(name, model_folder, tmp_path):
    done = subprocess.run(
        [warm.python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         __file__, str(model_folder), str(tmp_path / "out"), str("kept" in name)],
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(TESTS)])})
    assert done.returncode == 0, done.stderr[-3000:]
    equal(json.loads((tmp_path / "out.json").read_text()))


if __name__ == "__main__":  # one of two processes
    folder, out, kept = sys.argv[1:]
    found = trajectory(PackedDPOTrainer, Path(folder), Path(out), per_device_train_batch_size=2,
                       precompute_ref_log_probs=kept == "True")
    if processes.rank() == 0:
        Path(f"{out}.json").write_text(json.dumps(found, indent=1) + "\n")
    processes.leave()
