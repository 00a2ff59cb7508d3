"""Objectives beyond TRL's: their values by hand, and the same loss packed and unpacked."""

from math import exp, log
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers.data import picture, said
from helpers.trainers import dpo_trainer

from bpo.models import checkpoint as checkpoints
from bpo.params import DPOTraining, validate
from bpo.training import objectives
from bpo.training.objectives import OBJECTIVES, Objective
from bpo.training.packed.trainer import PackedDPOTrainer

OURS = [n for n, o in OBJECTIVES.items() if o.function is not None]
# Two pairs. In the second the chosen answer has become less likely than under the reference.
CHOSEN, REJECTED, DAMAGED = [0.5, -0.02], [-1.0, 0.4], [0.2, -1.5]


def values(name):
    h = objectives.LogRatios(*torch.tensor([CHOSEN, REJECTED, DAMAGED], dtype=torch.float64))
    return OBJECTIVES[name].function(h, 0.1).tolist()


def test_dpop_adds_fifty_times_what_the_chosen_answer_lost():
    # -log sigma(x) = log(1 + exp(-x)); x = 0.1 (0.5 + 1.0 - 0), then 0.1 (-0.02 - 0.4 - 50 * 0.02)
    assert values("dpop") == pytest.approx(
        [log(1 + exp(-0.1 * (0.5 + 1.0))), log(1 + exp(-0.1 * (-0.02 - 0.4 - 50 * 0.02)))],
        rel=1e-12)


def test_anchor_asks_for_more_of_the_chosen_answer():
    assert values("anchor") == pytest.approx(
        [log(1 + exp(-0.1 * 0.5)), log(1 + exp(-0.1 * -0.02))], rel=1e-12)


def test_mdpo_is_dpo_and_the_image_and_the_anchor():
    first = log(1 + exp(-0.1 * (0.5 + 1.0)))  # chosen against rejected
    first += log(1 + exp(-0.1 * (0.5 - 0.2)))  # image against damaged image
    first += log(1 + exp(-0.1 * 0.5))  # anchor
    second = log(1 + exp(-0.1 * (-0.02 - 0.4)))
    second += log(1 + exp(-0.1 * (-0.02 + 1.5)))
    second += log(1 + exp(-0.1 * -0.02))
    assert values("mdpo") == pytest.approx([first, second], rel=1e-12)


ANSWERS = [("red", ["green box", "a blue disc on the mat"]), ("a cat", ["no"]),
           ("this shows a big red dog", ["a hot yellow cat", "yes"])]


@pytest.fixture(scope="module")
def rows():
    """Five pairs of three positives, with a damaged image for each."""
    made = []
    for number, (chosen, wrong) in enumerate(ANSWERS):
        image = picture("disc", "red", number, (40, 40 + 8 * number))
        damaged = picture("box", "blue", 10 + number, (40, 40 + 8 * number))
        made += [{"images": [image], "damaged_images": [damaged],
                  "prompt": said("user", "what colour is the disc ?"),
                  "chosen": said("assistant", chosen), "rejected": said("assistant", r)}
                 for r in wrong]
    return Dataset.from_list(made)


@pytest.fixture
def trainer(model_folder, rows, tmp_path):
    """Makes trainers whose adapters have already moved, all the same way."""
    def make(packing="always", dataset=rows, **settings):
        return dpo_trainer(
            PackedDPOTrainer, checkpoints.load(model_folder), dataset, tmp_path,
            own={"packing": packing}, moved=5,
            **{"per_device_train_batch_size": 5, "seed": 0, "max_steps": 2, **settings})
    return make


def loss_of(trainer, numbers):
    """The loss on rows of the training data, and the metrics that come with it."""
    batch = trainer.data_collator([trainer.train_dataset[n] for n in numbers])
    trainer._metrics["train"].clear()
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model.train(), trainer._prepare_inputs(batch), False)
    return loss.item(), {n: v[-1] for n, v in trainer._metrics["train"].items() if v}


@pytest.mark.parametrize("name", OURS)
def test_an_objective_has_the_same_loss_packed_and_unpacked_and_trains(trainer, name):
    losses, logs = [], []
    for packing in ("always", "never"):
        made = trainer(packing, loss_type=[name])
        assert made.data_collator.packing == (packing == "always")
        before = {n: w.clone() for n, w in made.model.named_parameters() if w.requires_grad}
        losses.append(loss_of(made, range(5))[0])
        made.train()
        assert made.state.global_step == 2
        after = dict(made.model.named_parameters())
        assert any(not torch.equal(after[n], w) for n, w in before.items())
        logs.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(logs[0]) == 2
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)


@pytest.mark.parametrize("packing", ["always", "never"])
@pytest.mark.parametrize("name", OURS)
def test_an_objective_is_that_of_the_rewards_that_are_logged(trainer, name, packing):
    made = trainer(packing, loss_type=[name])
    rewards = []
    for number in range(5):
        loss, metrics = loss_of(made, [number])
        w, r = metrics["rewards/chosen"], metrics["rewards/rejected"]
        d = metrics.get("rewards/damaged", 0.0)
        assert w != 0
        assert (d != 0) == (name == "mdpo")
        expected = {
            "dpop": log(1 + exp(-(w - r - 50 * max(0.0, -w)))), "anchor": log(1 + exp(-w)),
            "mdpo": log(1 + exp(r - w)) + log(1 + exp(d - w)) + log(1 + exp(-w))}[name]
        assert loss == pytest.approx(expected, rel=1e-5)
        rewards.append(w)
    assert min(rewards) < 0 < max(rewards)  # both sides of what dpop tells apart


def test_trl_s_sigmoid_is_dpo_as_the_paper_writes_it(trainer):
    made = trainer(loss_type=["sigmoid"])
    for number in range(5):
        loss, metrics = loss_of(made, [number])
        h = objectives.LogRatios(*(torch.tensor([metrics[f"rewards/{n}"] / 0.1])
                                   for n in ("chosen", "rejected")))
        assert loss == pytest.approx(objectives.dpo(h, 0.1).item(), rel=1e-5)


def test_a_new_objective_is_one_entry(trainer, monkeypatch):
    """By its name alone: the parameters take it, and it trains."""
    monkeypatch.setitem(OBJECTIVES, "square", Objective(
        "square", "a margin of beta", lambda h, beta: (h.chosen - h.rejected - beta) ** 2))
    p = validate(DPOTraining, {"loss": ["square"], "loss_weights": [2.0]}, where="here")
    made = trainer(loss_type=p.loss, loss_weights=p.loss_weights, max_steps=1)
    loss, metrics = loss_of(made, [0])
    gap = (metrics["rewards/chosen"] - metrics["rewards/rejected"]) / 0.1
    assert loss == pytest.approx(2 * (gap - 0.1) ** 2, rel=1e-4)
    before = {n: w.clone() for n, w in made.model.named_parameters() if w.requires_grad}
    made.train()
    after = dict(made.model.named_parameters())
    assert any(not torch.equal(after[n], w) for n, w in before.items())


def test_weights_add_objectives_of_both_kinds(trainer):
    alone = {n: loss_of(trainer(loss_type=[n]), range(5))[0] for n in ("sigmoid", "dpop", "anchor")}
    both = trainer(loss_type=["dpop", "sigmoid", "anchor"], loss_weights=[0.5, 2.0, 0.25])
    assert loss_of(both, range(5))[0] == pytest.approx(
        0.5 * alone["dpop"] + 2 * alone["sigmoid"] + 0.25 * alone["anchor"], rel=1e-5)


def test_mdpo_compares_with_the_damaged_image_of_the_row(trainer, rows):
    same = rows.remove_columns("damaged_images").add_column(
        "damaged_images", rows.data.column("images").to_pylist(), feature=rows.features["images"])
    metrics = loss_of(trainer(dataset=same, loss_type=["mdpo"]), range(5))[1]
    assert metrics["rewards/damaged"] == pytest.approx(metrics["rewards/chosen"], rel=1e-4)
    other = loss_of(trainer(loss_type=["mdpo"]), range(5))[1]
    assert abs(other["rewards/damaged"] - metrics["rewards/damaged"]) > 1e-3


def test_mdpo_without_damaged_images_is_refused(trainer, rows):
    made = trainer("never", rows.remove_columns("damaged_images"), loss_type=["mdpo"])
    with pytest.raises(ValueError, match="damaged_images"):
        made.train()


def test_a_divergence_of_another_kind_is_refused_with_an_objective_and_left_to_trl_alone():
    def losses(*names, **settings):
        return SimpleNamespace(**{"loss_types": list(names), "loss_weights": [1.0] * len(names),
                                  "ld_alpha": None, "f_divergence_type": "reverse_kl",
                                  "weighted": False, **settings})

    for settings in ({"ld_alpha": 0.5}, {"f_divergence_type": "js_divergence"}):
        alone = losses("sigmoid", "sft", **settings)
        assert objectives.split(alone) == []
        assert alone.loss_types == ["sigmoid", "sft"]
        with pytest.raises(ValueError, match="dpop goes with neither"):
            objectives.split(losses("sigmoid", "dpop", **settings))


def test_one_objective_of_several_is_enough_to_want_damaged_images():
    assert objectives.damages(["dpop", "mdpo"])
    assert not objectives.damages(["dpop", "anchor", "sigmoid", "one that a later TRL has"])


def test_mdpo_is_evaluated_as_it_is_trained(trainer):
    made = trainer(loss_type=["mdpo"])
    wanted, metrics = loss_of(made, range(5))
    batch = made.data_collator([made.train_dataset[n] for n in range(5)])
    with torch.no_grad():
        loss = made._compute_loss(made.model.eval(), made._prepare_inputs(batch), False)
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    [found] = made._metrics["eval"]["rewards/damaged"]
    assert found == pytest.approx(metrics["rewards/damaged"], rel=1e-5)


def test_the_reference_of_damaged_images_is_kept(trainer):
    made = trainer(loss_type=["mdpo"], precompute_ref_log_probs=True)
    batch = made.data_collator([made.train_dataset[n] for n in range(5)])
    assert not set(batch["keys"]) & set(batch["damaged"]["keys"])
    loss_of(made, range(5))
    assert {*batch["keys"], *batch["damaged"]["keys"]} == made.cache.answers.keys()
