"""Controls, variants and weights in training: what starts from what, and what counts how much."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from trl import DPOConfig

from bpo.data import rows as data_rows
from bpo.params import DPOTraining, Refusal, validate
from bpo.study.files import write_lines
from bpo.training import stage as train
from bpo.training import trainers
from bpo.training.packed import PackedDPOTrainer
from bpo.training.packed import rows as packed_rows

WRONG = {"weakened": "a big green box", "injected": "there is a dog on this"}


@pytest.fixture(scope="module")
def parameters(model_folder, data_file, tmp_path_factory):
    """A quick study of pairs that hold everything a method may ask for."""
    lines = [{"id": r.id, "image": r.image_name, "category": r.category, "prompt": list(r.prompt),
              "chosen": r.answer, "own": "a thing", "rejected": [
                  {"source": s, "text": t, "scores": {"margin": n / 10 + len(s)}}
                  for s, t in WRONG.items()]}
             for n, r in enumerate(data_rows.read_rows(data_file)[0][:12])]
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_lines(file, lines)
    return DPOTraining(study="s", model=str(model_folder), image_folder=str(data_file.parent),
                       pairs=str(file), steps=2, batch_pairs=4, device_batch=4, lora_rank=4,
                       learning_rate=1e-2, save_every=2, variants={})


def changed(p, **values):
    return validate(DPOTraining, p.model_dump() | values, where="here")


@pytest.fixture
def run(parameters, tmp_path, monkeypatch):
    monkeypatch.setenv("BPO_OUTPUTS", str(tmp_path))
    return lambda **values: train.run(changed(parameters, **values))


def adapter(result, method):
    return load_file(result.folder / method / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return all(torch.equal(one[n], other[n]) for n in one)


def test_every_control_trains_packed_and_knows_its_own_sft(run):
    controls = [f"bpo_{n}" for n in ("reversed", "blind", "shuffled", "edited", "own", "hard")]
    result = run(methods=["sft_matched", "sft_matched_reversed", "sft_matched_blind",
                          "sft_matched_own", "bpo", *controls])
    facts = result.metrics["methods"]
    assert {m: facts[m].get("matched") for m in ("bpo", *controls)} == {
        "bpo": "sft_matched", "bpo_reversed": "sft_matched_reversed",
        "bpo_blind": "sft_matched_blind", "bpo_shuffled": "sft_matched",
        "bpo_edited": "sft_matched", "bpo_own": "sft_matched_own", "bpo_hard": None}
    assert all(facts[m]["packed"] for m in ("bpo", *controls))
    assert facts["bpo"]["rows"] == 24 and facts["bpo_hard"]["rows"] == 6  # two of each category
    assert not same(adapter(result, "sft_matched"), adapter(result, "sft_matched_blind"))


def test_a_variant_is_its_method_with_other_settings(run):
    result = run(methods=["sft", "bpo"], variants={
        "bpo_alone": {"method": "bpo", "loss": ["sigmoid"], "loss_weights": [1.0]},
        "bpo_same": {"method": "bpo"}, "bpo_long": {"method": "bpo_weaken", "steps": 3},
        "bpo_short": {"method": "bpo", "ld_alpha": 0.5}})
    facts = result.metrics["methods"]
    assert list(facts) == ["sft", "bpo", "bpo_alone", "bpo_same", "bpo_long", "bpo_short"]
    assert same(adapter(result, "bpo"), adapter(result, "bpo_same"))
    assert not same(adapter(result, "bpo"), adapter(result, "bpo_short"))
    assert facts["bpo_alone"]["loss_first"] == pytest.approx(0.693147, abs=1e-5)
    assert facts["bpo_long"]["steps"] == 3 and facts["bpo_long"]["rows"] == 12
    # How packed rows were attended to, and why, in the manifest and on the page.
    way = "branches by mask: no CUDA but cpu"
    assert way in result.manifest["attention"].split(", ") and way in result.facts()["kernels"]


@pytest.mark.parametrize("variants, words", [
    ({"bpo_x": {"beta": 0.3}}, "bpo_x names no method"),
    ({"bpo": {"method": "bpo"}}, "variants"),
    ({"bpo_blind": {"method": "bpo"}}, "bpo_blind is a method"),
    ({"sft_x": {"method": "bpo"}}, "sft_x must begin as its method bpo does"),
    ({"bpo_x": {"method": "bpo", "lora_rank": 3}}, "bpo_x cannot change lora_rank"),
    ({"bpo_x": {"method": "bpo", "beta": -1}}, "bpo_x: beta: must be greater than 0"),
    ({"bpo_x": {"method": "bpo", "loss": ["sigmoid"]}}, "bpo_x: loss_weights: give one")])
def test_a_variant_that_cannot_be_is_refused(parameters, variants, words):
    with pytest.raises(Refusal, match=words):
        changed(parameters, variants=variants)


def test_a_reference_after_sft_starts_there_and_keeps_its_copy(run):
    result = run(methods=["sft_matched", "bpo"], reference="sft", learning_rate=1e-3)
    first = json.loads((result.folder / "bpo" / "history.json").read_text())[0]
    for name in ("rewards/chosen", "rewards/rejected"):  # policy and reference agree
        assert first[name] == pytest.approx(0, abs=1e-5)
    fresh = run(methods=["sft_matched", "bpo"], learning_rate=1e-3)
    assert first["logps/chosen"] > json.loads(
        (fresh.folder / "bpo" / "history.json").read_text())[0]["logps/chosen"]
    assert adapter(result, "bpo").keys() == adapter(fresh, "bpo").keys()


def test_a_run_that_was_cut_off_goes_on_from_its_own_adapter_and_reference(run, monkeypatch):
    settings = {"methods": ["sft_matched", "bpo"], "reference": "sft", "steps": 5}
    whole = run(study="whole", **settings)

    def cut(self, args, state, control, **kwargs):
        if self.label == "bpo" and state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainers.Progress, "on_step_end", cut)
        run(study="cut", **settings)
    resumed = run(study="cut", **settings)
    histories = [(r.folder / "bpo" / "history.json").read_text() for r in (whole, resumed)]
    assert histories[0] == histories[1]
    assert same(adapter(whole, "bpo"), adapter(resumed, "bpo"))


def test_a_reference_after_sft_needs_that_sft(run):
    with pytest.raises(Refusal, match="bpo_weaken starts from .* add sft_matched_weaken"):
        run(methods=["sft_matched", "bpo_weaken"], reference="sft")


# --- weights ------------------------------------------------------------------------------------

def trainer(rows, folder, model_folder, processor, **settings):
    config = DPOConfig(str(folder), per_device_train_batch_size=len(rows), max_length=None,
                       report_to=[], use_cpu=True, **settings)
    return PackedDPOTrainer(
        AutoModelForImageTextToText.from_pretrained(model_folder), args=config,
        train_dataset=Dataset.from_list(rows), processing_class=processor,
        peft_config=LoraConfig(target_modules=r".*language_model.*\.q_proj", r=2))


def loss(made):
    [batch] = made.get_train_dataloader()
    return made._compute_loss(made.model, made._prepare_inputs(dict(batch)), False).item()


@pytest.mark.parametrize("losses", (["sigmoid", "sft"], ["sigmoid"], ["mdpo"]), ids="+".join)
def test_a_weight_multiplies_its_pair_s_losses(losses, rows, model_folder, processor, tmp_path):
    if losses == ["mdpo"]:
        rows = [r | {"damaged_images": r["images"]} for r in rows]
    settings = {"loss_type": losses, "loss_weights": [1.0] * len(losses)}

    def of(name, weights):
        given = [r | {"weight": w} for r, w in zip(rows, weights, strict=True)] if weights else rows
        return loss(trainer(given, tmp_path / name, model_folder, processor, **settings))

    ones = [1.0] * len(rows)
    assert of("ones", ones) == pytest.approx(of("none", None), rel=1e-6)
    each = [of(str(n), [float(n == k) for k in range(len(rows))]) for n in range(len(rows))]
    mixed = [0.5 + n for n in range(len(rows))]
    assert of("mixed", mixed) == pytest.approx(
        sum(w * x for w, x in zip(mixed, each, strict=True)), rel=1e-5)


def test_an_objective_that_cannot_weigh_pairs_says_which_can(rows, model_folder, processor,
                                                             tmp_path):
    weighed = [r | {"weight": 2.0} for r in rows]
    with pytest.raises(ValueError, match="hinge cannot weigh pairs: .* or use sigmoid, sft"):
        trainer(weighed, tmp_path, model_folder, processor, loss_type=["hinge"])


def test_weights_do_not_part_the_pairs_of_a_positive(rows):
    weighed = [r | {"weight": float(n)} for n, r in enumerate(rows)]
    groups = [packed_rows.families(Dataset.from_list(k), "prompt") for k in (rows, weighed)]
    assert groups[0] == groups[1] == [[[0, 1]], [[2]], [[3]], [[4]]]
