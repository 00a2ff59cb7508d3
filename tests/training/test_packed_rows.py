"""Which preference rows are trained on, which belong together, and in which order they come."""

import itertools
import random
from collections import Counter

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers.data import picture, row, said
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

from bpo.models import checkpoint as checkpoints
from bpo.models import encoding
from bpo.training.packed import rows as packed_rows

# Positives


def positives(dataset):
    """The positives, of which each is a family of its own."""
    families = packed_rows.families(dataset, "prompt")
    assert all(len(family) == 1 for family in families)
    return [positive for positive, in families]


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
    assert positives(dataset) == [[0, 2, 6], [1, 5], [3], [4]]


def test_rows_of_messages_and_lists_of_images_are_grouped(rows):
    assert positives(Dataset.from_list(rows)) == [[0, 1], [2], [3], [4]]
    one, two = picture("disc", "red", 1), picture("disc", "red", 2)
    lists = [[one, two], [one], [one, two], [two, one]]
    dataset = Dataset.from_list([{**row(one), "images": i} for i in lists])
    assert positives(dataset) == [[0, 2], [1], [3]]


def test_rows_of_text_are_grouped_with_their_tokens_beside_them_and_those_of_sft_by_completion():
    pairs = [("a", "yes", "no"), ("b", "yes", "no"), ("a", "yes", "hot"), ("a", "no", "yes")]
    dataset = Dataset.from_list([
        {"prompt": p, "chosen": c, "rejected": r, "prompt_ids": [len(p)], "chosen_ids": [len(c)],
         "rejected_ids": [len(r), 1]} for p, c, r in pairs])
    completions = Dataset.from_list([{"prompt": p, "completion": c} for p, c, _ in pairs])
    tokens = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    assert positives(tokens) == [[0, 1, 2], [3]]
    for some in (dataset, completions):
        assert positives(some) == [[0, 2], [1], [3]]


@pytest.mark.parametrize("change, reason", [
    ({"rejected": said("assistant", "red")}, "the rejected answer is the chosen one"),
    ({"rejected": said("assistant", " ")}, "the rejected answer is empty"),
    ({"rejected": said("assistant", None)}, "the rejected answer is empty"),
    ({"rejected": None}, "the rejected answer is empty"),
    ({"chosen": []}, "the chosen answer is empty"),
    ({"prompt": [{"role": "user", "content": [{"type": "image", "text": None},
                                              {"type": "text", "text": "\n"}]}]},
     "the question is empty"),
    ({"images": None}, "the picture is missing")])
@pytest.mark.parametrize("stream", [False, True])
def test_rows_that_teach_nothing_are_left_out_and_counted(change, reason, stream, capsys):
    given = row(picture("disc", "red", 1))
    if isinstance(change.get("prompt", [{}])[0].get("content"), list):  # one type a column
        given["prompt"] = [{"role": "user", "content": [
            {"type": "image", "text": None}, {"type": "text", "text": "what ?"}]}]
    some = [given, {**given, **change}, given]
    dataset = IterableDataset.from_generator(lambda: iter(some)) if stream else (
        Dataset.from_list(some))
    dropped = Counter()
    left = packed_rows.without(dataset, packed_rows.flaw, dropped)
    assert len(list(left)) == 2 and dropped == {reason: 1}
    assert reason in capsys.readouterr().out


def test_messages_of_many_forms_are_read_as_the_json_that_a_data_set_keeps():
    call = '{"role": "assistant", "content": null, "tool_calls": [{"name": "look"}]}'
    empty = '{"role": "assistant", "content": ""}'
    dataset = Dataset.from_list([{"prompt": said("user", "what ?"), "chosen": [call],
                                  "rejected": [r]} for r in (empty, call.replace("look", "go"))])
    dropped = Counter()
    assert len(packed_rows.without(dataset, packed_rows.flaw, dropped)) == 1
    assert dropped == {"the rejected answer is empty": 1}


def test_an_answer_that_calls_a_tool_is_one_and_a_row_without_pictures_has_a_use():
    call = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}]
    assert packed_rows.flaw({"prompt": said("user", "what ?"), "chosen": call,
                             "rejected": said("assistant", "no"), "images": []}) == ""


@pytest.mark.parametrize("pictures", [{"image": None}, {"images": ["disc.png", None]},
                                      {"images": [{"bytes": None, "path": None}]}])
def test_a_picture_that_is_none_is_missing(pictures):
    given = {"prompt": "what ?", "chosen": "red", "rejected": "no", **pictures}
    assert packed_rows.flaw(given) == "the picture is missing"


def test_a_data_set_of_which_nothing_is_left_is_refused():
    dataset = Dataset.from_list([row(picture("disc", "red", 1), "no", "no")] * 2)
    with pytest.raises(ValueError, match="no row is left to train on: 2 of 2 rows"):
        packed_rows.without(dataset, packed_rows.flaw, Counter())


# The order of rows


def sampled(groups, **settings):
    return packed_rows.PositiveSampler([[g] for g in groups], **settings)


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
    order = list(sampled(groups, batch=batch, seed=seed))
    assert sorted(order) == list(range(len(order)))
    assert len(order) == len(sampled(groups, batch=batch, seed=seed))
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
    order = list(sampled(groups, batch=4, seed=0))
    assert all(a // 2 == b // 2 for a, b in zip(order[::2], order[1::2], strict=True))


def test_an_epoch_changes_the_order_and_a_seed_repeats_it():
    groups = ragged(30, 1)
    sampler = sampled(groups, batch=4, seed=7)
    first = list(sampler)
    assert list(sampler) == first
    assert list(sampled(groups, batch=4, seed=7)) == first
    assert list(sampled(groups, batch=4, seed=8)) != first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert sorted(second) == sorted(first)
    sampler.set_epoch(0)
    assert list(sampler) == first


@pytest.mark.parametrize("seed", range(4))
def test_a_positive_larger_than_a_batch_is_spread_over_several(seed):
    groups = [[0, 1, 2, 3, 4], [5], [6, 7], [8, 9, 10, 11, 12, 13, 14], [15, 16, 17]]
    sampler = sampled(groups, batch=3, seed=seed)
    order = list(itertools.islice(sampler, 100))
    assert sorted(order) == list(range(18))


def test_one_that_waits_goes_into_the_next_batch(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda number, generator: torch.arange(number))
    groups = [[0, 1, 2], [3, 4], [5, 6], [7], [8, 9, 10, 11, 12], [13, 14, 15], [16], [17]]
    order = list(sampled(groups, batch=4, seed=0))
    # The five rows have the third batch to begin in; the one row after them fills the fourth.
    assert order == [0, 1, 2, 7, 3, 4, 5, 6, *range(8, 18)]


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
def test_rows_that_are_longer_than_the_limit_are_left_out(processor, rows, sized):
    rows[3:] = [row(picture("box", "blue", 2, (64, 32)), "blue", "red"),
                row(picture("box", "red", 3, (64, 96)), "a red box", "a hot yellow cat")]
    rows[:3] = [{**r, "images": [picture("disc", "red", 1, (32, 32))]} for r in rows[:3]]
    if sized:  # images are not cropped to one size, so that larger ones are more tokens
        processor.image_processor.do_resize = processor.image_processor.do_center_crop = False
    expected = lengths(processor, rows)
    assert len(set(expected)) > 1
    dataset = Dataset.from_list(rows)
    for limit in range(min(expected), max(expected) + 2):
        dropped = Counter()
        survey = packed_rows.survey(dataset, dropped, processor, limit, None)
        kept = [i for i, n in enumerate(expected) if n <= limit]
        assert [r["chosen"] for r in survey.rows] == [rows[i]["chosen"] for i in kept]
        assert dropped.total() == len(rows) - len(kept)
        [longest], = survey.tried
        assert expected[kept[longest]] == max(expected[i] for i in kept)
        too_long = packed_rows.too_long(processor, limit)
        assert [i for i, r in enumerate(rows) if not too_long(r)] == kept
    with pytest.raises(ValueError, match="no row is left"):
        packed_rows.survey(dataset, Counter(), processor, min(expected) - 1, None)
    assert packed_rows.survey(dataset, Counter(), processor, None, None).rows is dataset


def test_rows_of_tokens_are_measured_by_their_longer_answer():
    dataset = Dataset.from_list([
        {"prompt_ids": [1] * p, "chosen_ids": [2] * c, "rejected_ids": [3] * r}
        for p, c, r in ((2, 1, 3), (2, 3, 1), (3, 3, 3), (1, 1, 1))])
    for limit, kept in ((5, [2, 2, 1]), (4, [1]), (None, [2, 2, 3, 1])):
        survey = packed_rows.survey(dataset, Counter(), None, limit, None)
        assert [len(p) for p in survey.rows["prompt_ids"]] == kept
    # Of those that the window holds.
    assert packed_rows.survey(dataset, Counter(), None, None, 5).tried == [[0]]


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
