"""Kept reference log-probs: what is found again, what is another model's, what a model is."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file

from bpo.models import checkpoint as checkpoints
from bpo.training.packed import reference

ANSWERS = {"one": torch.tensor([-0.5, -1.25, -3.0]), "two": torch.tensor([-2.0])}


def filled(folder, key, answers):
    cache = reference.Cache(folder, key)
    cache.add(answers)
    cache.write()
    return cache


def read(folder, key="model", others=()):
    cache = reference.Cache(folder, key)
    assert cache.answers == {}
    cache.read(others)
    return cache


def test_answers_that_were_written_are_read_again(tmp_path):
    filled(tmp_path / "kept", "model", ANSWERS)
    again = read(tmp_path / "kept")
    assert again.answers.keys() == ANSWERS.keys() and again.others == 0
    assert all(torch.equal(again.answers[n], v) for n, v in ANSWERS.items())


def test_further_folders_are_read_and_not_written(tmp_path):
    filled(tmp_path / "other", "model", ANSWERS)
    cache = read(tmp_path / "own", others=[tmp_path / "other"])
    assert cache.answers.keys() == ANSWERS.keys()
    cache.add({**ANSWERS, "three": torch.tensor([-4.0])})
    cache.write()
    assert len(list((tmp_path / "other").iterdir())) == 1
    assert read(tmp_path / "own").answers.keys() == {"three"}


def test_nothing_new_writes_no_file(tmp_path):
    cache = filled(tmp_path / "kept", "model", ANSWERS)
    cache.add(ANSWERS)
    cache.write()
    assert len(list((tmp_path / "kept").iterdir())) == 1
    filled(tmp_path / "empty", "model", {})
    assert not (tmp_path / "empty").exists()


def test_an_answer_that_is_known_stays_as_it_is(tmp_path):
    cache = filled(tmp_path, "model", ANSWERS)
    cache.add({"two": torch.tensor([-9.0])})
    assert cache.answers["two"].item() == -2.0
    assert cache.new == {}


def test_answers_of_another_model_or_of_none_are_counted_and_not_taken_in(tmp_path):
    filled(tmp_path, "another", ANSWERS)
    filled(tmp_path, "model", {"three": torch.tensor([-4.0])})
    save_file(ANSWERS, tmp_path / "of-no-model.safetensors")
    cache = read(tmp_path)
    assert (cache.answers.keys(), cache.others) == ({"three"}, 4)
    cache.read()
    assert cache.others == 4
    cache = read(tmp_path, "another")
    assert (cache.answers.keys(), cache.others) == (ANSWERS.keys(), 3)


def test_what_is_written_later_is_in_a_file_of_its_own(tmp_path):
    cache = filled(tmp_path, "model", ANSWERS)
    cache.add({"three": torch.tensor([-4.0])})
    cache.write()
    assert read(tmp_path).answers.keys() == {*ANSWERS, "three"}


def test_half_a_file_is_not_read(tmp_path):
    filled(tmp_path, "model", ANSWERS)
    [whole] = tmp_path.iterdir()
    (tmp_path / ".0123.tmp").write_bytes(whole.read_bytes()[:20])
    assert read(tmp_path).answers.keys() == ANSWERS.keys()


@pytest.fixture
def adapted(model_folder):
    model = checkpoints.load(model_folder).model
    torch.manual_seed(0)
    return get_peft_model(model, checkpoints.adapter_config(model, rank=2, alpha=4, dropout=0.0))


def test_a_model_is_known_by_its_weights_and_not_by_an_adapter_that_trains(adapted):
    key = reference.model_key(adapted)
    weights = dict(adapted.named_parameters())
    moved = [n for n in weights if "lora_B" in n]
    assert moved
    with torch.no_grad():
        for name in moved:
            weights[name].normal_()
    assert reference.model_key(adapted) == key
    frozen = next(n for n, w in weights.items() if not w.requires_grad)
    with torch.no_grad():
        weights[frozen].flatten()[0] += 1
    assert reference.model_key(adapted) != key


def test_an_adapter_that_does_not_train_is_part_of_the_model(adapted):
    weights = [w.requires_grad_(False) for n, w in adapted.named_parameters() if "lora_B" in n]
    key = reference.model_key(adapted)
    with torch.no_grad():
        weights[0].flatten()[0] += 1
    assert reference.model_key(adapted) != key


def test_names_types_and_shapes_of_weights_are_told_apart_and_their_order_is_not():
    def key(**weights):
        model = torch.nn.Module()
        for name, weight in weights.items():
            model.register_buffer(name, weight)
        return reference.model_key(model)

    zeros, ones = torch.zeros(2, 3), torch.ones(6)
    assert key(a=zeros, b=ones) == key(b=ones, a=zeros)
    assert len({key(a=zeros), key(b=zeros), key(a=zeros.T), key(a=zeros.int())}) == 4


def test_a_model_without_adapters_is_known_by_all_its_weights(model_folder):
    model = checkpoints.load(model_folder).model.requires_grad_(True)
    key = reference.model_key(model)
    assert reference.model_key(checkpoints.load(model_folder).model) == key
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1
    assert reference.model_key(model) != key
