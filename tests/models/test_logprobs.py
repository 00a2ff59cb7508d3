"""Answers that share their prompt's pass have the log-probs that they have alone."""

import pytest
import torch
from helpers.trees import FAULTS

from bpo.data import rows as data_rows
from bpo.models import encoding, generate, logprobs, prefix, trees
from bpo.models.generate import Request
from bpo.models.logprobs import Weighed

ANSWERS = [["red", "this shows a green cat on the mat", "blue"],
           ["this shows a big big yellow dog"],
           ["no", "yes there is a box", "a", "the cat lies on the mat with a dog"],
           ["yes", "no"]]


@pytest.fixture(scope="module")
def asked(data_file, checkpoint):
    """Prompts of unequal length with different images, and unequal numbers of answers."""
    rows = data_rows.read_rows(data_file)[0]
    rows = [rows[i] for i in (0, 4, 8, 10)]
    requests = [Request(r.id, r.prompt, r.image) for r in rows]
    batch = generate.encode_batch(checkpoint, requests)
    answers = [[encoding.answer_tokens(checkpoint, r.prompt, text) for text in texts]
               for r, texts in zip(rows, ANSWERS, strict=True)]
    assert (batch["attention_mask"] == 0).any(), "the prompts must need padding"
    return requests, batch, answers


def largest_gap(first, second):
    """The largest difference between log-probs, and between mean states."""
    assert [[w.logprobs.shape for w in r] for r in first] == [[w.logprobs.shape for w in r]
                                                              for r in second]
    return max((getattr(a, name) - getattr(b, name)).abs().max().item()
               for row, other in zip(first, second, strict=True)
               for a, b in zip(row, other, strict=True) for name in ("logprobs", "state"))


@torch.no_grad()
def by_hand(checkpoint, request, answer):
    """One prompt with one answer behind it, alone, in a plain forward pass."""
    inputs = generate.encode_batch(checkpoint, [request])
    ids = torch.cat([inputs.pop("input_ids"), torch.tensor([answer])], dim=1)
    inputs["attention_mask"] = torch.ones_like(ids)
    out = checkpoint.model(input_ids=ids, output_hidden_states=True, **inputs)
    predicting = slice(-len(answer) - 1, -1)
    logps = torch.log_softmax(out.logits[0, predicting].float(), dim=-1)
    return Weighed(logps[range(len(answer)), answer], out.hidden_states[-1][0, predicting].mean(0))


@torch.no_grad()
@pytest.mark.parametrize("score", (logprobs.weigh, logprobs.weigh_unpacked))
def test_both_ways_agree_with_a_plain_forward_pass_of_each_answer(asked, checkpoint, score):
    requests, batch, answers = asked
    plain = [[by_hand(checkpoint, r, a) for a in mine]
             for r, mine in zip(requests, answers, strict=True)]
    assert largest_gap(score(checkpoint, batch, answers), plain) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("score", (logprobs.weigh, logprobs.weigh_unpacked))
def test_an_answer_s_log_probs_do_not_depend_on_its_company(asked, checkpoint, score):
    _, batch, answers = asked
    whole = score(checkpoint, batch, answers)
    first = score(checkpoint, batch, [row[:1] for row in answers])
    assert largest_gap(first, [row[:1] for row in whole]) < 1e-4
    turned = score(checkpoint, batch, [row[::-1] for row in answers])
    assert largest_gap([row[::-1] for row in turned], whole) < 1e-4


@torch.no_grad()
def test_the_image_counts(asked, checkpoint):
    _, batch, answers = asked
    other = batch | {"pixel_values": batch["pixel_values"].flip(0)}
    assert largest_gap(logprobs.weigh(checkpoint, batch, answers),
                       logprobs.weigh(checkpoint, other, answers)) > 0.01


@torch.no_grad()
def test_a_text_model_is_packed_too(text_checkpoint):
    prompts = [({"role": "user", "content": t},) for t in ("what is this ?", "describe the mat")]
    batch = generate.encode_batch(text_checkpoint, [Request(str(i), p, None)
                                                    for i, p in enumerate(prompts)])
    answers = [[[5, 6, 7], [8]], [[9, 10]]]
    assert largest_gap(logprobs.weigh(text_checkpoint, batch, answers),
                       logprobs.weigh_unpacked(text_checkpoint, batch, answers)) < 1e-4


@torch.no_grad()
def test_the_packed_way_is_chosen_where_it_is_exact(asked, checkpoint, capsys):
    _, batch, answers = asked
    assert logprobs.choose(checkpoint, batch, answers) is logprobs.weigh
    assert capsys.readouterr().out == ""


def faulty(fault):
    def broken(monkeypatch):
        right = trees.layout
        monkeypatch.setattr(trees, "layout", lambda *a, **k: fault(right(*a, **k)))

    return broken


def the_mask_is_refused(monkeypatch):
    def inputs(*args):
        raise ValueError("this model takes no such mask\nat all")

    monkeypatch.setattr(prefix, "inputs", inputs)


@torch.no_grad()
@pytest.mark.parametrize("broken, why", [
    *((faulty(f), "log-probs differ by") for f in FAULTS.values()),
    (the_mask_is_refused, "this model takes no such mask")])
def test_where_packing_is_not_exact_each_answer_gets_its_own_pass(asked, checkpoint, monkeypatch,
                                                                  capsys, broken, why):
    _, batch, answers = asked
    broken(monkeypatch)
    assert logprobs.choose(checkpoint, batch, answers) is logprobs.weigh_unpacked
    said = capsys.readouterr().out
    assert why in said and said.count("\n") == 1


@torch.no_grad()
def gap_between_attentions(asked, checkpoint, weigh):
    """How far log-probs with branch attention are from those without; it is off afterwards."""
    _, batch, answers = asked
    prefix.use_mask(checkpoint.base)
    masked = weigh(checkpoint, batch, answers)
    prefix.use_attention(checkpoint.base)
    assert prefix.in_use(checkpoint.base)
    gap = largest_gap(weigh(checkpoint, batch, answers), masked)
    prefix.use_mask(checkpoint.base)
    assert not prefix.in_use(checkpoint.base)
    return gap


def test_branch_attention_and_the_dense_mask_weigh_alike(asked, checkpoint):
    assert gap_between_attentions(asked, checkpoint, logprobs.weigh) < 1e-4


def test_what_has_no_table_is_attended_as_before(asked, checkpoint):
    assert gap_between_attentions(asked, checkpoint, logprobs.weigh_unpacked) == 0
