"""Decoding: seeded by row, the same alone as in a batch, from images weakened in every way."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.generation import configuration_utils

from bpo.data import images
from bpo.data import rows as data_rows
from bpo.models import encoding, generate
from bpo.models.generate import Request, SeededSampling
from bpo.models.noise import add_noise
from bpo.models.weakening import WEAKENINGS, Draw, View, Weakening
from bpo.study.seeds import torch_generator

# --- sampling -----------------------------------------------------------------------------------

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])


def sampled(count, *, temperature=1.0, top_p=1.0, seed=0):
    """How often each token of LOGITS is drawn."""
    draws = SeededSampling([torch_generator(seed, "x")], temperature=temperature, top_p=top_p)
    tokens = [draws(None, LOGITS[None]).argmax().item() for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=len(LOGITS)).double()


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0))
def test_tokens_are_drawn_from_the_softmax(temperature):
    count = 4000
    wanted = count * torch.softmax(LOGITS.double() / temperature, dim=-1)
    found = sampled(count, temperature=temperature)
    # Chi-square with four degrees of freedom: above 25 in one of 20 000 seeds.
    assert ((found - wanted) ** 2 / wanted).sum() < 25


def test_the_nucleus_alone_is_drawn_from_and_keeps_its_proportions():
    shares = torch.softmax(LOGITS, dim=-1)  # 0.56, 0.21, 0.08, 0.03, 0.13
    found = sampled(3000, top_p=0.7)
    assert found[[2, 3, 4]].sum() == 0
    assert found[0] / 3000 == pytest.approx((shares[0] / shares[:2].sum()).item(), abs=0.03)


def test_the_nucleus_is_that_of_the_temperature():
    # At temperature 0.2 the first token has 99 % and is the nucleus alone.
    assert sampled(200, temperature=0.2, top_p=0.9)[0] == 200


def test_a_row_s_draws_do_not_depend_on_the_other_rows():
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))

    def draws(rows):
        sampling = SeededSampling([torch_generator(1, r) for r in rows], temperature=0.7, top_p=0.9)
        steps = [sampling(None, scores[rows]) for _ in range(4)]
        return {r: torch.stack([s[i] for s in steps]) for i, r in enumerate(rows)}

    together = draws([0, 1, 2])
    for rows in ([2, 0, 1], [1], [0, 2]):
        assert all(torch.equal(x, together[r]) for r, x in draws(rows).items())
    assert not torch.equal(draws([0])[0].argmax(-1), SeededSampling(
        [torch_generator(2, 0)], temperature=0.7, top_p=0.9)(None, scores[:1]).argmax(-1))


# --- with a model -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def requests(data_file):
    return [Request(r.id, r.prompt, r.image, len(r.answer.split()))
            for r in data_rows.read_rows(data_file)[0]]


def pixels(checkpoint, requests, view=None, seed=0):
    return generate.encode_batch(checkpoint, requests, view, seed=seed)["pixel_values"]


def answers(checkpoint, requests):
    return generate.decode(checkpoint, generate.encode_batch(checkpoint, requests),
                           max_new_tokens=6)


def test_prompts_are_padded_on_the_left(checkpoint, requests):
    batch = generate.encode_batch(checkpoint, [requests[0], requests[1]])
    short = generate.encode_batch(checkpoint, [requests[0]])["input_ids"]
    pad = checkpoint.tokenizer.pad_token_id
    width = batch["input_ids"].shape[1] - short.shape[1]
    assert width > 0
    assert batch["input_ids"][0].tolist() == [pad] * width + short[0].tolist()
    assert batch["attention_mask"][0].tolist() == [0] * width + [1] * short.shape[1]


def test_every_token_of_a_prompt_is_known(checkpoint, requests):
    ids = generate.encode_batch(checkpoint, requests)["input_ids"]
    assert (ids != checkpoint.tokenizer.unk_token_id).all()
    image = checkpoint.tokenizer.convert_tokens_to_ids("<image>")
    assert ((ids == image).sum(1) == 4).all()


@pytest.mark.parametrize("step", (0, 700))
def test_a_row_s_pixels_are_the_same_alone_as_in_a_batch(checkpoint, requests, step):
    view = View("noisy", step)
    batch = pixels(checkpoint, requests, view)
    for i in (0, 5, len(requests) - 1):
        assert torch.equal(pixels(checkpoint, [requests[i]], view)[0], batch[i])


def test_each_row_has_its_own_draw_of_noise(checkpoint, requests):
    same_image, view = requests[:2], View("noisy", 500)
    assert same_image[0].image == same_image[1].image
    clean, noised = (pixels(checkpoint, same_image, v, seed=3) for v in (None, view))
    assert torch.equal(clean[0], clean[1]) and not torch.allclose(noised[0], noised[1])
    draw = torch_generator(3, "noise", same_image[0].id, 500, 0)
    assert torch.equal(noised[0], add_noise(clean[:1], 500, draw)[0])
    assert not torch.allclose(noised, pixels(checkpoint, same_image, view, seed=4))


def test_greedy_answers_are_the_same_every_time_and_alone(checkpoint, requests):
    together = answers(checkpoint, requests)
    assert together == answers(checkpoint, requests)
    assert together == [answers(checkpoint, [r])[0] for r in requests]
    assert len(set(together)) > 1, "a model that always says the same tests nothing"


def test_a_checkpoint_s_own_sampling_neither_warns_nor_counts(checkpoint, requests, monkeypatch):
    plain, said = answers(checkpoint, requests), []
    own = checkpoint.base.generation_config
    for name, value in (("temperature", 0.2), ("top_p", 0.6), ("top_k", 1), ("do_sample", True)):
        monkeypatch.setattr(own, name, value)
    monkeypatch.setattr(configuration_utils.logger, "warning_once", said.append)
    assert (answers(checkpoint, requests), said) == (plain, [])


def test_greedy_answers_depend_on_the_image(checkpoint, requests):
    pictures = {r.image for r in requests}
    told = {answers(checkpoint, [replace(requests[0], image=i)])[0] for i in pictures}
    assert len(told) > 1


def test_answers_stop_at_the_longest_length_and_hold_no_special_tokens(checkpoint, requests):
    for text in answers(checkpoint, requests):
        assert len(text.split()) <= 6
        assert "<" not in text and text == text.strip()


def options(**changes):
    return dict(seed=0, purpose="weakened", temperature=1.0, top_p=1.0, samples=1,
                max_new_tokens=6) | changes


NOISY = View("noisy", 600)


def said(checkpoint, requests, view=NOISY, **changes):
    asked = options(**changes)
    inputs = generate.encode_branches(checkpoint, requests, view, seed=asked["seed"])
    return generate.sample_answers(checkpoint, requests, inputs, view, **asked)


def test_sampled_answers_are_reproducible_in_any_order_and_batch(checkpoint, requests):
    first = said(checkpoint, requests)
    assert said(checkpoint, requests[::-1])[::-1] == first
    assert [said(checkpoint, [r])[0] for r in requests] == first
    for changes in ({"seed": 1}, {"purpose": "other"}):
        assert said(checkpoint, requests, **changes) != first


@pytest.mark.parametrize("end", ["</s>", "hot", "cat"])
def test_an_answer_ends_at_the_tokenizer_s_end_and_at_those_of_the_generation_config(
        end, checkpoint, requests, monkeypatch):
    """So does a server's."""
    listed, token = (checkpoint.tokenizer.convert_tokens_to_ids(t) for t in (["hot", "cat"], end))
    monkeypatch.setattr(checkpoint.base.generation_config, "eos_token_id", listed)

    def one_token(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([token]), 0.0)

    replies = generate.replies(checkpoint, generate.encode_batch(checkpoint, requests),
                               max_new_tokens=3, sampling=one_token)
    assert {(r.text, r.finish) for r in replies} == {("" if end == "</s>" else end, "stop")}


def test_several_samples_of_a_row_differ_and_the_first_is_the_only_one_s(checkpoint, requests):
    three = said(checkpoint, requests, samples=3)
    assert [len(x) for x in three] == [3] * len(requests)
    assert [x[:1] for x in three] == said(checkpoint, requests)
    assert any(len(set(x)) > 1 for x in three)


def test_an_image_is_encoded_once_for_all_its_samples(checkpoint, requests):
    encoded = []
    tower = next(m for n, m in checkpoint.model.named_modules() if n.endswith("vision_tower"))
    hook = tower.register_forward_hook(lambda module, args, kwargs, out: encoded.append(
        len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True)
    said(checkpoint, requests[:3], samples=4)
    hook.remove()
    assert encoded == [3]


def test_a_text_model_answers_without_an_image(text_checkpoint):
    asked = [Request(str(i), ({"role": "user", "content": t},), None)
             for i, t in enumerate(("what is this ?", "describe the big cat"))]
    found = said(text_checkpoint, asked, None)
    assert len(found) == 2 and all(isinstance(x[0], str) for x in found)


# --- weakening ----------------------------------------------------------------------------------

def test_every_mode_weakens_the_image_in_its_own_way(checkpoint, requests):
    asked = [replace(requests[0], other=requests[3].image)]
    clean = pixels(checkpoint, asked, None)
    seen = {v.name: pixels(checkpoint, asked, v) for v in (
        View("noisy", 500), View("noisy", 900), View("noisy", 500, 1), View("crop", crop_share=0.5),
        View("crop", 0, 1, 0.5), View("blank"), View("swapped"), View("fade", 500),
        View("fade", 900))}
    assert len(seen) == 9
    everything = [clean, *seen.values()]
    for i, one in enumerate(everything):
        assert not any(torch.allclose(one, other) for other in everything[:i])
    assert (seen["blank"] == 0).all()
    # What is told to a contrast is the noised branch of the same draw.
    for mode in ("contrast", "reverse_contrast"):
        assert torch.equal(pixels(checkpoint, asked, View(mode, 500)), seen["noisy-500-0"])


def test_the_swapped_image_is_the_other_row_s(checkpoint, requests):
    other = requests[3]
    assert other.image != requests[0].image
    swapped = pixels(checkpoint, [replace(requests[0], other=other.image)], View("swapped"))
    with images.load(other.image) as picture:
        size = images.load(requests[0].image).size
        own = encoding.encode(checkpoint, encoding.prompt_text(
            checkpoint, requests[0].messages, image=True), picture.resize(size))["pixel_values"]
    assert torch.equal(swapped, own)


def test_a_crop_is_a_piece_of_the_image_in_its_size():
    image = Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10))
    pieces = [np.asarray(WEAKENINGS["crop"].picture(image, Draw(
        View("crop", crop_share=0.5), str(i), 0, None))) for i in range(20)]
    piece = pieces[0]
    assert piece.shape == (10, 10)
    # Four rows of ten and four columns lie between its corners; smoothing adds a little.
    assert piece.max() - piece.min() <= 48
    assert len({p.tobytes() for p in pieces}) > 5


def test_a_fading_image_turns_into_its_own_blur_by_the_step_s_share():
    halves = np.zeros((40, 60, 3), dtype=np.uint8)
    halves[:, 30:] = 200
    image = Image.fromarray(halves)
    clean, third, blurred = (np.asarray(WEAKENINGS["fade"].picture(image, Draw(
        View("fade", step), "0", 0, None)), dtype=float) for step in (0, 333, 999))
    assert (clean == halves).all()
    # a third of the way from each pixel to the blurred one, to the level
    assert np.abs(third - (2.0 * halves + blurred) / 3).max() <= 1
    # Nearly the mean colour: neither the edge of the halves nor their places can be seen.
    assert np.abs(blurred - 100).max() < 20 and np.abs(np.diff(blurred, axis=1)).max() <= 1


def test_a_new_way_of_weakening_is_one_entry(checkpoint, requests, monkeypatch):
    """By its name alone: its pixels, its file, its answers, and the picture that people see."""
    monkeypatch.setitem(WEAKENINGS, "mirrored", Weakening(
        "mirrored", "left and right", picture=lambda image, draw: ImageOps.mirror(image)))
    monkeypatch.setitem(WEAKENINGS, "dimmed", Weakening(
        "dimmed", "pixels nearer to grey", pixels=lambda x, draw: x / draw.view.step, stepped=True))
    clean = pixels(checkpoint, requests[:2], None)
    mirrored, dimmed = View("mirrored"), View("dimmed", 2)
    assert (mirrored.name, dimmed.name) == ("mirrored-0", "dimmed-2-0")
    assert torch.allclose(pixels(checkpoint, requests[:2], mirrored), clean.flip(-1), atol=0.1)
    assert torch.equal(pixels(checkpoint, requests[:2], dimmed), clean / 2)
    shown = [generate.view_picture(checkpoint.processor, requests[0], view, transform="processor",
                                   seed=0) for view in (mirrored, dimmed)]
    assert shown[0].tobytes() == ImageOps.mirror(images.load(requests[0].image)).tobytes()
    assert shown[1].size == (32, 32)
    assert all(said(checkpoint, requests[:2], view) for view in (mirrored, dimmed))


def test_contrasts_are_the_stated_arithmetic():
    clean = torch.log_softmax(torch.tensor([[2.0, 1.0, 0.0, -3.0]]), dim=-1)
    noisy = torch.log_softmax(torch.tensor([[0.0, 1.0, 2.0, 0.0]]), dim=-1)
    both = torch.cat([clean, noisy])
    less = generate.Contrast("contrast", strength=0.5, cutoff=0.2)(None, both)
    # p_clean: .66 .24 .09 .004; a fifth of the likeliest is .13, so two tokens are left.
    wanted = 1.5 * clean - 0.5 * noisy
    assert torch.allclose(less[0, :2], wanted[0, :2]) and less[0, 2:].tolist() == [-torch.inf] * 2
    more = generate.Contrast("reverse_contrast", strength=0.5, cutoff=0.2)(None, both)
    assert torch.allclose(more[0], (1.5 * noisy - 0.5 * clean)[0])
    assert torch.equal(less[0], less[1]) and torch.equal(more[0], more[1])


@pytest.mark.parametrize("mode", ("contrast", "reverse_contrast"))
def test_both_branches_of_a_contrast_stay_apart_beyond_the_first_token(checkpoint, requests,
                                                                       monkeypatch, mode):
    gaps, right = [], generate.Contrast.__call__

    def watched(self, input_ids, scores):
        clean, weakened = scores.float().chunk(2)
        gaps.append((clean - weakened).abs().amax(1))
        return right(self, input_ids, scores)

    monkeypatch.setattr(generate.Contrast, "__call__", watched)
    asked = requests[:4]
    texts = said(checkpoint, asked, View(mode, 900))
    assert len(gaps) > 2 and len(texts) == 4
    # A cache that noise reaches at the first token only would make later gaps vanish.
    assert all((g > 1e-3).all() for g in gaps[:3])


@torch.no_grad()
def test_a_contrast_decodes_what_two_plain_forward_passes_a_token_give(checkpoint, requests):
    asked, view, steps = requests[:3], View("reverse_contrast", 900), 6
    clean = generate.encode_batch(checkpoint, asked, None, seed=0)
    dull = generate.encode_batch(checkpoint, asked, view, seed=0)
    both = {n: torch.cat([clean[n], v]) for n, v in dull.items()}
    found = generate.decode(checkpoint, both, max_new_tokens=steps, contrast=generate.Contrast(
        "reverse_contrast", strength=1.0, cutoff=0.1))
    for i, text in enumerate(found):
        rows = [generate.encode_batch(checkpoint, [asked[i]], v, seed=0) for v in (None, view)]
        ids = rows[0]["input_ids"]
        for _ in range(steps):
            sharp, noised = (torch.log_softmax(checkpoint.model(
                input_ids=ids, attention_mask=torch.ones_like(ids),
                pixel_values=r["pixel_values"]).logits[:, -1], dim=-1) for r in rows)
            ids = torch.cat([ids, (2 * noised - sharp).argmax(1, keepdim=True)], dim=1)
            if ids[0, -1] == checkpoint.tokenizer.eos_token_id:
                break
        answer = ids[0, rows[0]["input_ids"].shape[1]:]
        assert text == checkpoint.tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.parametrize("size", ((40, 20), (20, 40)))
def test_image_transforms_keep_all_of_the_image_or_its_middle(checkpoint, size):
    image = Image.new("RGB", size, "red")
    padded = encoding.transformed(image, "pad", checkpoint.processor)
    cut = encoding.transformed(image, "crop", checkpoint.processor)
    assert padded.size == (40, 40) and cut.size == (20, 20)
    assert np.asarray(padded).tolist().count([[255, 0, 0]] * 40) == (20 if size == (40, 20) else 0)
    assert padded.getpixel((0, 0)) == encoding.mean_colour(checkpoint.processor)
    assert encoding.transformed(image, "processor", checkpoint.processor) is image


def test_a_vision_model_answers_without_an_image_too(checkpoint):
    text = encoding.prompt_text(checkpoint, ({"role": "user", "content": "what is this ?"},),
                                image=False)
    assert "<image>" not in text
    asked = Request("0", ({"role": "user", "content": "what is this ?"},), None)
    assert isinstance(answers(checkpoint, [asked])[0], str)


@pytest.mark.parametrize("count", (1, 2, 7))
def test_prompts_encoded_together_are_those_encoded_alone(checkpoint, requests, count):
    asked = requests[:count]
    texts = [encoding.prompt_text(checkpoint, r.messages, image=True) for r in asked]
    pictures = [images.load(r.image) for r in asked]
    together = encoding.encode_all(checkpoint, texts, pictures)
    for row, text, picture in zip(together, texts, pictures, strict=True):
        alone = encoding.encode(checkpoint, text, picture)
        assert row.keys() == alone.keys()
        assert all(torch.equal(row[n], alone[n]) for n in alone)
