"""Batches of preference rows: which belong together, and that a batch is TRL's to the value."""

import copy
import itertools
import random

import pytest
import torch
from datasets import Dataset
from helpers.data import picture
from PIL import Image
from trl.data_utils import apply_chat_template, prepare_multimodal_messages
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

from bpo.models import checkpoint as checkpoints
from bpo.models import encoding
from bpo.training.packed import collation

TRL_TOKENS = ("input_ids", "attention_mask", "completion_mask")


def said(role, text):
    return [{"role": role, "content": text}]


def row(image, chosen="red", rejected="blue", question="what colour is the disc ?"):
    return {"images": [image], "prompt": said("user", question),
            "chosen": said("assistant", chosen), "rejected": said("assistant", rejected)}


@pytest.fixture
def rows():
    """Five pairs on two images of different sizes; the third asks something else of the first."""
    one, two = picture("disc", "red", 1), picture("box", "blue", 2, (64, 40))
    return [row(one, "red", "a big green box"), row(one, "red", "no"),
            row(one, "there is a disc on the mat", "yes", "describe the picture"),
            row(two, "blue", "red"), row(two, "a blue box", "a hot yellow cat with a dog")]


@pytest.fixture
def processor(model_folder):
    """One of its own for every test: some change it."""
    return checkpoints.load(model_folder).processor


@pytest.fixture
def stock(processor):
    return DataCollatorForVisionPreference(processor)


# Positives


def with_image(image, prompt, chosen, rejected):
    return {"image": image, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_rows_that_share_image_prompt_and_chosen_answer_are_a_positive():
    one, two = picture("disc", "red", 1), picture("disc", "red", 2)
    dataset = Dataset.from_list([
        with_image(one, "what ?", "red", "green"),
        with_image(two, "what ?", "red", "green"),  # another image
        with_image(one, "what ?", "red", "blue"),
        with_image(one, "there ?", "red", "blue"),  # another prompt
        with_image(one, "what ?", "a red", "blue"),  # another chosen answer
        with_image(two, "what ?", "red", "yellow"),
        with_image(one.copy(), "what ?", "red", "no")])
    assert collation.positives(dataset) == [[0, 2, 6], [1, 5], [3], [4]]


def test_rows_of_messages_and_lists_of_images_are_grouped(rows):
    assert collation.positives(Dataset.from_list(rows)) == [[0, 1], [2], [3], [4]]
    one, two = picture("disc", "red", 1), picture("disc", "red", 2)
    lists = [[one, two], [one], [one, two], [two, one]]
    dataset = Dataset.from_list([{**row(one), "images": i} for i in lists])
    assert collation.positives(dataset) == [[0, 2], [1], [3]]


def test_rows_of_text_are_grouped_with_their_tokens_beside_them_and_those_of_sft_by_completion():
    pairs = [("a", "yes", "no"), ("b", "yes", "no"), ("a", "yes", "hot"), ("a", "no", "yes")]
    dataset = Dataset.from_list([
        {"prompt": p, "chosen": c, "rejected": r, "prompt_ids": [len(p)], "chosen_ids": [len(c)],
         "rejected_ids": [len(r), 1]} for p, c, r in pairs])
    completions = Dataset.from_list([{"prompt": p, "completion": c} for p, c, _ in pairs])
    assert collation.positives(dataset) == [[0, 2], [1], [3]] == collation.positives(completions)


def test_a_row_whose_rejected_answer_is_the_chosen_one_is_refused_by_its_number():
    dataset = Dataset.from_list([
        with_image(picture("disc", "red", 1), "what ?", "red", r) for r in ("green", "no", "red")])
    with pytest.raises(ValueError, match=r"\brow 2\b"):
        collation.positives(dataset)


# The order of rows


def ragged(number, seed, largest=3):
    """Positives of one to `largest` rows each, which lie anywhere in the data."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, largest) for _ in range(number)]
    order = rng.sample(range(sum(sizes)), sum(sizes))
    ends = list(itertools.accumulate(sizes))
    return [order[end - size:end] for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch", [3, 4, 6, 8])
def test_rows_of_a_positive_stay_in_one_batch_but_for_what_is_left_over(batch, seed):
    groups = ragged(200, seed)
    order = list(collation.PositiveSampler(groups, batch=batch, seed=seed))
    assert sorted(order) == list(range(len(order)))
    assert len(order) == len(collation.PositiveSampler(groups, batch=batch, seed=seed))
    place = {r: i for i, r in enumerate(order)}
    spread = [g for g in groups if place[g[0]] // batch != place[g[-1]] // batch]
    for group in groups:
        assert [place[r] for r in group] == list(range(place[group[0]],
                                                       place[group[0]] + len(group)))
    if spread:
        # Not one of what follows the first that is spread would have fitted in its place.
        first = min(place[g[0]] for g in spread)
        room = batch - first % batch
        after = [g for g in groups if place[g[0]] >= first]
        assert all(len(g) > room for g in after)


def test_positives_of_half_a_batch_are_never_spread():
    groups = [[2 * i, 2 * i + 1] for i in range(50)]
    order = list(collation.PositiveSampler(groups, batch=4, seed=0))
    assert all(a // 2 == b // 2 for a, b in zip(order[::2], order[1::2], strict=True))


def test_an_epoch_changes_the_order_and_a_seed_repeats_it():
    groups = ragged(30, 1)
    sampler = collation.PositiveSampler(groups, batch=4, seed=7)
    first = list(sampler)
    assert list(sampler) == first
    assert list(collation.PositiveSampler(groups, batch=4, seed=7)) == first
    assert list(collation.PositiveSampler(groups, batch=4, seed=8)) != first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert sorted(second) == sorted(first)
    sampler.set_epoch(0)
    assert list(sampler) == first


@pytest.mark.parametrize("seed", range(4))
def test_a_positive_larger_than_a_batch_is_spread_over_several(seed):
    groups = [[0, 1, 2, 3, 4], [5], [6, 7], [8, 9, 10, 11, 12, 13, 14], [15, 16, 17]]
    sampler = collation.PositiveSampler(groups, batch=3, seed=seed)
    order = list(itertools.islice(sampler, 100))
    assert sorted(order) == list(range(18))


def test_one_that_waits_goes_into_the_next_batch(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda number, generator: torch.arange(number))
    groups = [[0, 1, 2], [3, 4], [5, 6], [7], [8, 9, 10, 11, 12], [13, 14, 15], [16], [17]]
    order = list(collation.PositiveSampler(groups, batch=4, seed=0))
    # The five rows have the third batch to begin in; the one row after them fills the fourth.
    assert order == [0, 1, 2, 7, 3, 4, 5, 6, *range(8, 18)]


def test_rows_know_their_number(rows):
    numbered = collation.Numbered(Dataset.from_list(rows))
    assert len(numbered) == 5
    assert numbered[3]["row"] == 3 and numbered[3]["chosen"] == rows[3]["chosen"]
    some = numbered.__getitems__([4, 1])
    assert [r["row"] for r in some] == [4, 1]
    assert [r["rejected"] for r in some] == [rows[4]["rejected"], rows[1]["rejected"]]


# Batches


def test_an_unpacked_batch_is_the_stock_one(stock, rows):
    expected = stock(copy.deepcopy(rows))
    collator = collation.PackedCollator(stock)
    collator.packing = False
    batch = collator(rows)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[n], v) for n, v in expected.items())


def test_a_packed_batch_is_the_stock_one_with_pixels_once_a_prompt_and_image(stock, rows):
    expected = stock(copy.deepcopy(rows))
    batch = collation.PackedCollator(stock)(rows)
    assert batch.keys() == {*expected, "packed"}
    for name in TRL_TOKENS:
        assert torch.equal(batch[name], expected[name])
    # Prompts: "what colour" of one (rows 0 and 1), "describe" of one, "what colour" of two.
    assert torch.equal(batch["pixel_values"], expected["pixel_values"][[0, 2, 3]])


def test_prompts_that_differ_in_an_earlier_turn_or_a_further_image_are_packed_apart(stock, rows):
    one, two = (r["images"][0] for r in rows[2:4])
    turns = [[*said("user", q), *said("assistant", "no"), *said("user", "describe it")]
             for q in ("what ?", "is this red ?")]
    given = [{**row(one), "prompt": turns[0]}, {**row(one), "prompt": turns[1]},
             {**row(one), "images": [one, one]}, {**row(one), "images": [one, two]}]
    expected = stock(copy.deepcopy(given))
    batch = collation.PackedCollator(stock)(given)
    assert all(torch.equal(batch[n], expected[n]) for n in TRL_TOKENS)
    assert torch.equal(batch["pixel_values"], expected["pixel_values"][:6])
    assert len(batch["packed"]["first"]) == 4


def test_for_a_dense_mask_every_prompt_has_a_row_of_its_own(stock, rows):
    collator = collation.PackedCollator(stock)
    assert len(collator(rows)["packed"]["source"]) == 1
    collator.dense = True
    assert len(collator(rows)["packed"]["source"]) == 3


def test_a_row_with_a_single_image_is_one_with_a_list_of_it(stock, rows):
    single = [{n if n != "images" else "image": v if n != "images" else v[0]
               for n, v in r.items()} for r in rows]
    collator = collation.PackedCollator(stock)
    one, many = collator(single), collator(rows)
    for name in (*TRL_TOKENS, "pixel_values"):
        assert torch.equal(one[name], many[name])


def test_a_batch_of_tokens_is_the_stock_one(processor):
    given = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in (
        ([1, 7, 8], [9, 2], [10, 11, 2]), ([1, 7, 8], [9, 2], [12, 2]),
        ([1, 9], [8, 8, 2], [7, 2]))]
    plain = DataCollatorForPreference(processor.tokenizer.pad_token_id)
    expected = plain(copy.deepcopy(given))
    collator = collation.PackedCollator(plain)
    batch = collator(given)
    assert batch.keys() == {*expected, "packed"}
    assert all(torch.equal(batch[n], v) for n, v in expected.items())
    collator.packing = False
    batch = collator(given)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[n], v) for n, v in expected.items())


@pytest.mark.parametrize("packing", [True, False])
def test_nothing_is_cut(packing):
    given = [{"prompt_ids": [1, 7, 8], "chosen_ids": [9, 2], "rejected_ids": [10, 11, 2]}]
    expected = DataCollatorForPreference(0)(copy.deepcopy(given))
    collator = collation.PackedCollator(DataCollatorForPreference(0, max_length=4))
    collator.packing = packing
    batch = collator(given)
    assert all(torch.equal(batch[n], v) for n, v in expected.items())


def test_an_answer_of_no_tokens_has_none_to_predict():
    given = [{"prompt_ids": [1, 7, 8], "chosen_ids": [], "rejected_ids": [10, 2]}]
    placed = collation.PackedCollator(DataCollatorForPreference(0))(given)["packed"]
    assert len(placed["targets"]) == len(placed["answers"]) == 2


@pytest.mark.parametrize("packing", [True, False])
def test_rows_that_were_given_are_not_changed(stock, rows, packing):
    given = [{**{n: v for n, v in r.items() if n != "images"}, "image": r["images"][0],
              "damaged_images": r["images"], "row": i} for i, r in enumerate(rows)]
    before = copy.deepcopy(given)
    collator = collation.PackedCollator(stock)
    collator.packing, collator.keyed, collator.damaged = packing, True, True
    batch = collator(given)
    assert given == before
    assert batch["row"] == [0, 1, 2, 3, 4]


def test_a_damaged_batch_is_the_chosen_answers_with_the_damaged_images(stock, rows):
    damaged = picture("cat", "green", 9)
    expected = stock([{**r, "images": [damaged], "rejected": r["chosen"]}
                      for r in copy.deepcopy(rows)])
    collator = collation.PackedCollator(stock)
    collator.packing, collator.damaged = False, True
    batch = collator([{**r, "damaged_images": [damaged]} for r in rows])["damaged"]
    assert all(torch.equal(batch[n], v) for n, v in expected.items())
    single = [{**{n: v for n, v in r.items() if n != "images"}, "image": r["images"][0],
               "damaged_images": [damaged]} for r in rows]
    batch = collator(single)["damaged"]
    assert all(torch.equal(batch[n], v) for n, v in expected.items())
    for given in (rows, [*single[:1], *rows[1:]]):
        with pytest.raises(ValueError, match="damaged_images"):
            collator(given)


# Keys


def keys(stock, rows, *, packing=True):
    collator = collation.PackedCollator(stock)
    collator.packing, collator.keyed = packing, True
    return collator(rows)["keys"]


def test_equal_answers_have_equal_keys_whatever_they_are_batched_with(stock, rows):
    known = keys(stock, rows)
    assert len(known) == 10
    assert known[0] == known[1]  # one chosen answer to one prompt
    assert len(set(known)) == 9
    assert keys(stock, rows, packing=False) == known
    assert keys(stock, copy.deepcopy(rows)) == known
    again = keys(stock, rows[3:4])  # padded less
    assert again == [known[3], known[8]]


def test_a_pixel_changes_the_keys_of_its_image(stock, rows):
    known = keys(stock, rows)
    image = rows[3]["images"][0].copy()
    red, green, blue = image.getpixel((0, 0))
    image.putpixel((0, 0), (red ^ 1, green, blue))
    rows[3] = {**rows[3], "images": [image]}
    now = keys(stock, rows)
    assert [i for i in range(10) if now[i] != known[i]] == [3, 8]


def test_a_token_of_an_answer_changes_its_key_alone(stock, rows):
    known = keys(stock, rows)
    rows[4] = {**rows[4], "rejected": said("assistant", "a hot yellow cat with a box")}
    now = keys(stock, rows)
    assert [i for i in range(10) if now[i] != known[i]] == [9]


def test_settings_of_the_image_processor_change_all_keys(stock, rows):
    known = keys(stock, rows)
    mean = stock.processor.image_processor.image_mean
    stock.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert not set(keys(stock, rows)) & set(known)
    stock.processor.image_processor.image_mean = mean
    assert keys(stock, rows) == known


def test_an_image_is_known_by_its_colours_its_size_and_its_mode():
    wide, high = (Image.frombytes("L", s, bytes(range(24))) for s in ((6, 4), (4, 6)))
    coloured = Image.frombytes("YCbCr", (4, 2), bytes(range(24)))
    other = Image.frombytes("RGB", (4, 2), bytes(range(24)))
    palettes = [Image.new("P", (2, 2), 0) for _ in range(2)]
    for image, colour in zip(palettes, ([255, 0, 0], [0, 0, 255]), strict=True):
        image.putpalette(colour)
    images = [wide, high, coloured, other, *palettes]
    assert len({collation._picture(i) for i in images}) == len(images)
    assert [collation._picture(i.copy()) for i in images] == [
        collation._picture(i) for i in images]


# What fits


def lengths(processor, rows):
    """The tokens of each row's prompt, images and longer answer by the processor itself."""
    found = []
    for r in rows:
        text = apply_chat_template(
            {"prompt": prepare_multimodal_messages(r["prompt"], images=r["images"]),
             **{n: prepare_multimodal_messages(r[n]) for n in ("chosen", "rejected")}}, processor)
        found.append(max(
            len(processor(images=[r["images"]], text=[text["prompt"] + text[n]],
                          add_special_tokens=False)["input_ids"][0])
            for n in ("chosen", "rejected")))
    return found


@pytest.mark.parametrize("sized", [False, True])
def test_rows_that_are_longer_than_the_limit_are_left_out(processor, stock, rows, sized):
    rows[3:] = [row(picture("box", "blue", 2, (64, 32)), "blue", "red"),
                row(picture("box", "red", 3, (64, 96)), "a red box", "a hot yellow cat")]
    rows[:3] = [{**r, "images": [picture("disc", "red", 1, (32, 32))]} for r in rows[:3]]
    if sized:  # images are not cropped to one size, so that larger ones are more tokens
        processor.image_processor.do_resize = processor.image_processor.do_center_crop = False
    expected = lengths(processor, rows)
    assert len(set(expected)) > 1
    dataset, collator = Dataset.from_list(rows), collation.PackedCollator(stock)
    for limit in range(min(expected) - 1, max(expected) + 2):
        kept = collation.fitting(dataset, collator, limit)
        assert kept == [i for i, n in enumerate(expected) if n <= limit]
    assert collation.fitting(dataset, collator, None) == [0, 1, 2, 3, 4]


def test_rows_of_tokens_are_measured_by_their_longer_answer():
    dataset = Dataset.from_list([
        {"prompt_ids": [1] * p, "chosen_ids": [2] * c, "rejected_ids": [3] * r}
        for p, c, r in ((2, 1, 3), (2, 3, 1), (3, 3, 3), (1, 1, 1))])
    collator = collation.PackedCollator(DataCollatorForPreference(0))
    assert collation.fitting(dataset, collator, 5) == [0, 1, 3]
    assert collation.fitting(dataset, collator, 4) == [3]


def test_text_with_any_number_of_images_is_measured(processor):
    one, two = picture("disc", "red", 1), picture("box", "blue", 2)
    some = [{"images": i, "prompt": "<image>" * len(i) + "what ?", "chosen": "red",
             "rejected": " a big box"} for i in ([], [one], [one, two])]
    expected = [len(processor(**{"images": [r["images"]]} if r["images"] else {},
                              text=[r["prompt"] + r["rejected"]],
                              add_special_tokens=False)["input_ids"][0]) for r in some]
    measured = encoding.Lengths(checkpoints.Checkpoint(None, processor))
    assert [measured(r["prompt"], [i.size for i in r["images"]], [r["chosen"], r["rejected"]])
            for r in some] == expected
    assert expected[0] < expected[1] < expected[2]
    assert () not in measured.added  # some processors take no batch without an image
