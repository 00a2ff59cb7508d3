"""Answers of a server that is sent image features: what is sent, what is refused before it is, and
that nothing is asked twice. The server here decodes with transformers; vLLM's has a ring of its
own (test_vllm.py)."""

import base64
import io
import json

import pytest
import torch

from bpo.models import checkpoint as checkpoints
from bpo.models import generate, served
from bpo.models.generate import Request
from bpo.models.weakening import View
from bpo.pairs import injection
from bpo.pairs import stage as pairs
from bpo.params import PairGeneration, Refusal
from bpo.study.files import read_lines


@pytest.fixture
def decoding(server, checkpoint):
    """The server decodes greedily with the checkpoint, or weighs a given answer, from the features
    that it is sent."""
    @torch.no_grad()
    def reply(number, body):
        content, *given = (m["content"] for m in body["messages"])
        if isinstance(content, str):
            return completion("rewritten: no", 5)
        image, text = content
        features = torch.load(io.BytesIO(base64.b64decode(image["image_embeds"])))
        prompt = checkpoint.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, text]}], add_generation_prompt=True)
        place = checkpoint.processor.image_token
        ids = torch.tensor([checkpoint.tokenizer(
            prompt.replace(place, place * len(features)) + "".join(given),
            add_special_tokens=False)["input_ids"]])
        embeds = checkpoint.base.get_input_embeddings()(ids)
        embeds[ids == checkpoint.base.config.image_token_id] = features
        if given:
            assert body["continue_final_message"] and not body["add_generation_prompt"]
            logps = checkpoint.base(inputs_embeds=embeds).logits[0].log_softmax(-1)
            return completion("", ids.shape[1], prompt_logprobs=[None, *(
                {str(t): {"logprob": logps[n, t].item()}} for n, t in enumerate(ids[0, 1:].tolist())
            )])
        tokens = checkpoint.base.generate(inputs_embeds=embeds, do_sample=False,
                                          max_new_tokens=body["max_tokens"])
        return completion(checkpoint.tokenizer.decode(tokens[0], skip_special_tokens=True).strip(),
                          ids.shape[1])

    server.reply = reply
    return server


def completion(text, tokens, **more):
    return 200, {}, {"id": "x", "object": "chat.completion", "created": 0, "model": "served",
                     "choices": [{"index": 0, "finish_reason": "stop",
                                  "message": {"role": "assistant", "content": text}}],
                     "usage": {"prompt_tokens": tokens, "completion_tokens": 1,
                               "total_tokens": tokens + 1}, **more}


@pytest.fixture
def parameters(model_folder, data_file, outputs):
    return PairGeneration(
        study="s", model=str(model_folder), data=str(data_file), text_model="",
        describe_prompt="bpo/pairs/prompts/describe.txt",
        question_prompt="bpo/pairs/prompts/question.txt",
        weaken_temperature=0.0, max_new_tokens=6, score_candidates=False, endpoint_requests=2,
        endpoint_retries=0, sources=["weakened"], clean_answers=True, batch_tokens=400)


def test_greedy_answers_are_those_of_transformers(parameters, decoding):
    decoded = pairs.run(parameters.model_copy(update={"study": "here"}))
    sent = pairs.run(parameters.model_copy(update={"decoder": decoding.url}))
    for name in ("weakened-noisy-800-0.jsonl", "clean.jsonl"):
        assert (sent.folder / name).read_bytes() == (decoded.folder / name).read_bytes()
    assert sent.metrics["decoder"] == {"engine": "vllm 0.0", "model": "served", "root": "/m",
                                       "max_model_len": 512, "features": "float32"}
    assert "decoder" not in decoded.metrics and decoding.most <= 2
    body = decoding.seen[0][2]
    assert (body["top_k"], body["repetition_penalty"], body["model"]) == (-1, 1.0, "served")
    assert len({b["seed"] for _, _, b in decoding.seen}) == len(decoding.seen)


def test_nothing_is_lost_or_asked_twice_when_the_server_dies(parameters, decoding):
    p, alive = parameters.model_copy(update={"decoder": decoding.url}), decoding.reply
    whole = pairs.run(p.model_copy(update={"study": "whole"})).folder
    first = len(decoding.seen)
    decoding.reply = lambda number, body: alive(number, body) if number < first + 5 else None
    with pytest.raises(Refusal, match="what was written so far is kept"):
        pairs.run(p)
    decoding.reply = alive
    lost = sum(1 for _ in decoding.seen) - first - 5
    folder = pairs.run(p).folder
    assert len(decoding.seen) == 2 * first + lost and lost <= 2
    for name in ("weakened-noisy-800-0.jsonl", "clean.jsonl", "pairs.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert not list((folder / "asked").iterdir())


def test_injected_answers_come_from_the_same_server(parameters, decoding):
    p = parameters.model_copy(update={"decoder": decoding.url, "sources": ["injected"],
                                      "clean_answers": False})
    alive = decoding.reply
    decoding.reply = lambda number, body: alive(number, body) if number < 4 else None
    with pytest.raises(Refusal, match="what was written so far is kept"):
        pairs.run(p)
    before, decoding.reply = len(decoding.seen), alive
    lines = read_lines(pairs.run(p).folder / "injected.jsonl")
    assert {r["text"] for line in lines for r in line["replies"]} == {"rewritten: no"}
    assert len(decoding.seen) - before == 1 + 12 - 3  # the check, and all but three after the first
    assert all(body["top_k"] == -1 for _, _, body in decoding.seen)


def test_candidates_are_weighed_as_transformers_weighs_them(parameters, decoding):
    p = parameters.model_copy(update={"score_candidates": True, "clean_answers": False})
    here = read_lines(pairs.run(p.model_copy(update={"study": "here"})).folder / "scores.jsonl")
    p, alive = p.model_copy(update={"decoder": decoding.url}), decoding.reply
    decoding.reply = lambda number, body: alive(number, body) if number < 20 else None
    with pytest.raises(Refusal, match="what was written so far is kept"):
        pairs.run(p)
    before, decoding.reply = len(decoding.seen), alive
    sent = read_lines(pairs.run(p).folder / "scores.jsonl")
    weighed = [s for line in sent for s in line["scores"] if s]
    assert len(decoding.seen) - before == 12 + 4 * len(weighed) - 20 and len(weighed) > 6
    for line, other in zip(sent, here, strict=True):
        for a, b in zip(line["scores"], other["scores"], strict=True):
            assert (a is None) == (b is None)
            assert a is None or a == pytest.approx({n: b[n] for n in a}, abs=1e-4)
            assert a is None or a.keys() == b.keys() - {"ches"}


def test_answers_of_another_engine_do_not_go_on(parameters, decoding, tmp_path):
    p = parameters.model_copy(update={"decoder": decoding.url})
    served.same_engine(injection.decoder(p), tmp_path, p)
    served.same_engine(injection.decoder(p), tmp_path, p)
    with pytest.raises(Refusal, match="the answers so far came from"):
        served.same_engine(injection.decoder(p), tmp_path,
                           p.model_copy(update={"precision": "bfloat16"}))
    decoding.info = {"vllm_config": {"model_config": {"dtype": "torch.bfloat16"},
                                     "parallel_config": {"tensor_parallel_size": 2}}}
    with pytest.raises(Refusal, match="computes in bfloat16, and precision is float32; serve with"):
        served.server(injection.decoder(p), p)
    said = served.server(injection.decoder(p), p.model_copy(update={"precision": "bfloat16"}))
    assert (said["dtype"], said["tensor_parallel_size"]) == ("torch.bfloat16", "2")


def test_a_server_with_another_prompt_is_refused(parameters, decoding):
    alive = decoding.reply
    def longer(number, body):
        status, headers, content = alive(number, body)
        content["usage"]["prompt_tokens"] += 1
        return status, headers, content

    decoding.reply = longer
    with pytest.raises(Refusal, match="serve the study's own checkpoint, with its chat template"):
        pairs.run(parameters.model_copy(update={"decoder": decoding.url}))


@pytest.fixture
def batch(checkpoint, data_file):
    request = Request("a", ({"role": "user", "content": "what ?"},),
                      data_file.parent / "images" / "0.png")
    return generate.encode_batch(checkpoint, [request], View("noisy", 500))


def test_features_are_those_that_the_model_merges(checkpoint, batch, model_folder):
    [(parts, prompt)] = served.features(checkpoint, batch)
    tower = checkpoints.load_tower(model_folder)
    assert torch.equal(served.features(tower, batch)[0][0]["image_embeds"], parts["image_embeds"])
    assert sum(x.numel() for x in tower.model.parameters()) < 0.8 * sum(
        x.numel() for x in checkpoint.model.parameters())
    assert prompt == batch["input_ids"][0].tolist()
    embeds = checkpoint.base.get_input_embeddings()(batch["input_ids"])
    embeds[batch["input_ids"] == checkpoint.base.config.image_token_id] = parts["image_embeds"]
    with torch.no_grad():
        right = checkpoint.base(**batch).logits
        torch.testing.assert_close(checkpoint.base(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits, right)


def test_features_that_would_spoil_other_answers_are_not_sent(checkpoint, batch):
    pixels = batch["pixel_values"].clone()
    pixels[0, 0, 0, 0] = float("nan")
    with pytest.raises(Refusal, match="not finite"):
        served.features(checkpoint, batch | {"pixel_values": pixels})
    fewer = torch.where(batch["input_ids"] == checkpoint.base.config.image_token_id,
                        0, batch["input_ids"])
    with pytest.raises(Refusal, match="gives 4 x 48 features where the prompt has places for 0"):
        served.features(checkpoint, batch | {"input_ids": fewer})


@pytest.mark.parametrize("family", ["gemma3", "cohere2_vision", "pixtral", "mistral3", "qwen3_vl"])
def test_families_that_a_server_cannot_take_are_refused_by_name(family):
    with pytest.raises(Refusal, match=f"no image features of {family} models.*Leave decoder empty"):
        served.require_family(family)


@pytest.mark.parametrize("wrong, sentence", [
    ({"weaken_modes": ["contrast"]}, "contrast mixes two branches' logits"),
    ({"weaken_modes": ["reverse_contrast"]}, "reverse_contrast mixes two branches' logits")])
def test_what_a_decoder_cannot_do_is_refused_before_anything_runs(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        PairGeneration(**{"decoder": "http://127.0.0.1:1/v1"} | wrong)


def test_an_engine_is_part_of_what_a_stage_depends_on():
    plain, url = PairGeneration(), "http://127.0.0.1:{}/v1"
    one, other = (PairGeneration(decoder=url.format(n), score_candidates=False) for n in (1, 2))
    assert "decoder" not in plain.shaping() and one.shaping() == other.shaping()
    assert one.shaping()["decoder"] == "vllm"
    assert json.dumps(one.shaping())
