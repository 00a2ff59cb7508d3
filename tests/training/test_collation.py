"""Batches of preference rows: which belong together, and that a batch is TRL's to the value."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers.data import picture, row, said
from PIL import Image
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

from bpo.training.packed import collation

TRL_TOKENS = ("input_ids", "attention_mask", "completion_mask")


@pytest.fixture
def stock(processor):
    return DataCollatorForVisionPreference(processor)


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
