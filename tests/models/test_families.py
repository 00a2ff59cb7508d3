"""What the kit does with a checkpoint before and after training, in every family at hand: it loads
from a folder, weighs answers, answers a noised image, and merges. (Packed training:
tests/training/test_packed_families.py.)"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers.data import picture
from helpers.families import WRITERS
from peft import get_peft_model
from safetensors.torch import save_file

from bpo import check
from bpo.models import checkpoint as checkpoints
from bpo.models import encoding, generate, logprobs
from bpo.models.generate import Request
from bpo.models.weakening import View
from bpo.params import Refusal

pytestmark = pytest.mark.study  # a model of each family

NOISY = View("noisy", 900)
ANSWERS = ("Dark red", "A cat looks past the camera")


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    """Pictures of three shapes, which some families cut into tiles or patches of other numbers."""
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for n, (size, question) in enumerate((((64, 32), "What colour is it?"),
                                          ((56, 84), "Describe this picture."),
                                          ((36, 36), "What stands on the table?"))):
        picture("disc", ("red", "blue", "green")[n], n, size).save(folder / f"{n}.png")
        made.append(Request(str(n), ({"role": "user", "content": question},), folder / f"{n}.png"))
    return made


@torch.no_grad()
def weighed(checkpoint, requests, view=None):
    """The log-probs of every token of ANSWERS to each request, end to end."""
    batch = generate.encode_batch(checkpoint, requests, view)
    tokens = [[encoding.answer_tokens(checkpoint, r.messages, a) for a in ANSWERS]
              for r in requests]
    weigh = logprobs.choose(checkpoint, batch, tokens)
    return [torch.cat([w.logprobs for w in row]) for row in weigh(checkpoint, batch, tokens)]


@pytest.mark.parametrize("family", WRITERS)
def test_answers_are_weighed_alike_alone_and_beside_images_of_other_shapes(
        family, families, requests):
    checkpoint = checkpoints.load(families(family))
    for view in (None, NOISY):
        together = weighed(checkpoint, requests, view)
        for row, request in zip(together, requests, strict=True):
            assert (row < 0).all()
            assert torch.allclose(row, weighed(checkpoint, [request], view)[0], atol=1e-4)
    assert (together[0] - weighed(checkpoint, requests)[0]).abs().max() > 1e-4  # noise is seen


@pytest.mark.parametrize("family", WRITERS)
def test_a_noised_image_is_answered_alike_alone_and_beside_others(family, families, requests):
    checkpoint = checkpoints.load(families(family))

    def answers(some, **sampling):
        return generate.sample_replies(
            checkpoint, some, generate.encode_branches(checkpoint, some, NOISY, seed=0), NOISY,
            seed=0, purpose="candidates", top_p=1.0, max_new_tokens=8, **sampling)

    together = answers(requests, temperature=1.0, samples=2)
    assert [first for first, _ in together] == [
        answers([r], temperature=1.0, samples=1)[0][0] for r in requests]
    assert any(first.text != second.text for first, second in together)


@torch.no_grad()
@pytest.mark.parametrize("family", WRITERS)
def test_both_branches_of_a_contrast_read_their_own_images(family, families, requests):
    checkpoint = checkpoints.load(families(family))

    def likely(batch):
        return checkpoint.base(**batch).logits[:, -1].log_softmax(-1)

    both = likely(generate.encode_branches(
        checkpoint, requests, View("reverse_contrast", 900), seed=0))
    clean, noisy = (likely(generate.encode_batch(checkpoint, requests, view))
                    for view in (None, NOISY))
    assert torch.allclose(both, torch.cat([clean, noisy]), atol=1e-4)
    assert (clean - noisy).abs().max() > 1e-2


@pytest.mark.parametrize("family", WRITERS)
def test_adapters_lie_on_the_linear_layers_of_the_language_model_alone(family, families):
    model = checkpoints.load(families(family)).model
    prefix, layers = checkpoints.linear_layers(model)
    tuned = get_peft_model(model, checkpoints.adapter_config(model, rank=2, alpha=4, dropout=0.0))
    assert {n.split(".lora_A")[0] for n, _ in tuned.named_modules() if n.endswith(".lora_A")} == {
        f"base_model.model.{prefix}.{n}" for n in layers}
    assert check.adapter_weights(checkpoints.skeleton(families(family)), 2) == sum(
        w.numel() for w in tuned.parameters() if w.requires_grad)


@pytest.mark.parametrize("family", WRITERS)
def test_a_merged_checkpoint_has_the_log_probs_of_the_adapter(family, families, requests, tmp_path):
    folder = families(family)
    checkpoint = checkpoints.load(folder)
    before = weighed(checkpoint, requests[:1])[0]
    tuned = get_peft_model(checkpoint.model, checkpoints.adapter_config(
        checkpoint.model, rank=2, alpha=4, dropout=0.0))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    tuned.save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    checkpoints.merge(folder, tmp_path / "adapter", tmp_path / "merged")
    laid = weighed(checkpoints.load_adapters(
        checkpoints.load(folder), {"tuned": tmp_path / "adapter"}), requests[:1])[0]
    whole = weighed(checkpoints.load(tmp_path / "merged"), requests[:1])[0]
    assert torch.allclose(whole, laid, atol=1e-4)
    assert (laid - before).abs().max() > 1e-2


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
@pytest.mark.parametrize("load", [checkpoints.load, checkpoints.skeleton])
def test_a_package_that_a_tower_needs_is_named_with_the_extra(load, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "gemma3n", "vision_config": {"label_names": ["cat"]}}))
    save_file({}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refusal, match=r"requires the timm library.*pip install -e '.\[families\]'"):
        load(tmp_path)
