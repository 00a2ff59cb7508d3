"""Decoding: resumable to the byte, seeded by row, the same alone as in a batch."""

import json
from dataclasses import replace

import pytest
import torch

from bpo import generate, models, records
from bpo.generate import Request, SeededSampling
from bpo.noise import add_noise
from bpo.seeds import torch_generator


class Killed(Exception):
    pass


def named(names, lengths=None):
    return [Request(n, (), None, (lengths or {}).get(n, 0)) for n in names]


class Work:
    """Makes a record a request; counts what it was asked for and can be killed at a batch."""

    def __init__(self, killed_at=None):
        self.killed_at, self.asked = killed_at, []

    def __call__(self, batch):
        if len(self.asked) == self.killed_at:
            raise Killed
        self.asked.append([r.id for r in batch])
        return [{"id": r.id, "text": f"ä {r.id}\u2028\r\n"} for r in batch]


# --- the plan -----------------------------------------------------------------------------------

def test_the_plan_puts_long_answers_first_and_does_not_depend_on_order():
    lengths = {"a": 1, "b": 5, "c": 3, "d": 5, "e": 2}
    batches = generate.plan(named("abcde", lengths), 2)
    assert [[r.id for r in b] for b in batches] == [["b", "d"], ["c", "e"], ["a"]]
    assert generate.plan(named("edcba", lengths), 2) == batches


# --- resuming -----------------------------------------------------------------------------------

BATCHES = generate.plan(named("abcdefg"), 3)  # abc, def, g


def whole(tmp_path):
    generate.resumable(tmp_path / "whole", BATCHES, Work(), label="x")
    return (tmp_path / "whole").read_bytes()


def test_records_come_in_the_plan_s_order_and_are_kept(tmp_path):
    work = Work()
    found = generate.resumable(tmp_path / "f", BATCHES, work, label="x")
    assert [r["id"] for r in found] == list("abcdefg")
    assert work.asked == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert records.read_lines(tmp_path / "f") == found


def test_finished_work_is_only_read(tmp_path):
    first = generate.resumable(tmp_path / "f", BATCHES, Work(), label="x")
    again = Work()
    assert generate.resumable(tmp_path / "f", BATCHES, again, label="x") == first
    assert again.asked == []


@pytest.mark.parametrize("killed_at", (0, 1, 2))
def test_a_resumed_run_writes_the_same_bytes_and_repeats_no_batch(tmp_path, killed_at):
    file = tmp_path / "f"
    with pytest.raises(Killed):
        generate.resumable(file, BATCHES, Work(killed_at), label="x")
    work = Work()
    found = generate.resumable(file, BATCHES, work, label="x")
    assert len(work.asked) == 3 - killed_at
    assert file.read_bytes() == whole(tmp_path)
    assert [r["id"] for r in found] == list("abcdefg")


@pytest.mark.parametrize("lost", (1, 5, 30))
def test_half_a_batch_at_the_end_is_cut_off_and_made_again(tmp_path, lost):
    file = tmp_path / "f"
    with pytest.raises(Killed):
        generate.resumable(file, BATCHES, Work(2), label="x")
    file.write_bytes(file.read_bytes()[:-lost])
    work = Work()
    generate.resumable(file, BATCHES, work, label="x")
    assert work.asked == [["d", "e", "f"], ["g"]]
    assert file.read_bytes() == whole(tmp_path)


@pytest.mark.parametrize("rubbish", (b'{"id": "x"}\n', b"\0\0\0\n", b"{", b'{"id": "g", "te'))
def test_what_follows_the_last_whole_batch_is_cut_off(tmp_path, rubbish):
    file = tmp_path / "f"
    with pytest.raises(Killed):
        generate.resumable(file, BATCHES, Work(1), label="x")
    with file.open("ab") as stream:
        stream.write(rubbish)
    generate.resumable(file, BATCHES, Work(), label="x")
    assert file.read_bytes() == whole(tmp_path)


def test_a_file_of_another_plan_is_not_mixed_in(tmp_path):
    file = tmp_path / "f"
    generate.resumable(file, generate.plan(named("abxdefg"), 3), Work(), label="x")
    work = Work()
    generate.resumable(file, BATCHES, work, label="x")
    assert len(work.asked) == 3
    assert file.read_bytes() == whole(tmp_path)


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
            for r in records.read_rows(data_file)[0]]


def answers(checkpoint, requests, **options):
    return generate.decode(checkpoint, generate.encode_batch(checkpoint, requests, **options),
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
    batch = generate.encode_batch(checkpoint, requests, noise_step=step, seed=3)["pixel_values"]
    for i in (0, 5, len(requests) - 1):
        alone = generate.encode_batch(checkpoint, [requests[i]], noise_step=step, seed=3)
        assert torch.equal(alone["pixel_values"][0], batch[i])


def test_each_row_has_its_own_draw_of_noise(checkpoint, requests):
    same_image = requests[:2]
    assert same_image[0].image == same_image[1].image
    clean = generate.encode_batch(checkpoint, same_image)["pixel_values"]
    assert torch.equal(clean[0], clean[1])
    noised = generate.encode_batch(checkpoint, same_image, noise_step=500, seed=3)["pixel_values"]
    assert not torch.allclose(noised[0], noised[1])
    draw = torch_generator(3, "noise", same_image[0].id, 500)
    assert torch.equal(noised[0], add_noise(clean[:1], 500, draw)[0])
    other = generate.encode_batch(checkpoint, same_image, noise_step=500, seed=4)["pixel_values"]
    assert not torch.allclose(noised, other)


def test_greedy_answers_are_the_same_every_time_and_alone(checkpoint, requests):
    together = answers(checkpoint, requests)
    assert together == answers(checkpoint, requests)
    assert together == [answers(checkpoint, [r])[0] for r in requests]
    assert len(set(together)) > 1, "a model that always says the same tests nothing"


def test_greedy_answers_depend_on_the_image(checkpoint, requests):
    images = {r.image for r in requests}
    said = {answers(checkpoint, [replace(requests[0], image=i)])[0] for i in images}
    assert len(said) > 1


def test_answers_stop_at_the_longest_length_and_hold_no_special_tokens(checkpoint, requests):
    for text in answers(checkpoint, requests):
        assert len(text.split()) <= 6
        assert "<" not in text and text == text.strip()


def options(**changes):
    return dict(noise_step=600, seed=0, purpose="weakened", temperature=1.0, top_p=1.0,
                max_new_tokens=6, batch_size=5) | changes


def test_sampled_answers_are_reproducible_in_any_order_and_batch(checkpoint, requests, tmp_path):
    first = generate.sample_answers(checkpoint, requests, tmp_path / "a", **options())
    again = generate.sample_answers(checkpoint, requests[::-1], tmp_path / "b", **options())
    assert set(first) == {r.id for r in requests}
    assert first == again
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    other = generate.sample_answers(checkpoint, requests, tmp_path / "c", **options(batch_size=2))
    assert other == first
    for changes in ({"seed": 1}, {"purpose": "other"}):
        assert generate.sample_answers(checkpoint, requests, tmp_path / json.dumps(changes),
                                       **options(**changes)) != first


def test_a_text_model_answers_without_an_image(text_checkpoint, tmp_path):
    asked = [Request(str(i), ({"role": "user", "content": t},), None)
             for i, t in enumerate(("what is this ?", "describe the big cat"))]
    found = generate.sample_answers(text_checkpoint, asked, tmp_path / "a",
                                    **options(noise_step=0))
    assert set(found) == {"0", "1"}


def test_a_vision_model_answers_without_an_image_too(checkpoint):
    text = models.prompt_text(checkpoint, ({"role": "user", "content": "what is this ?"},),
                              image=False)
    assert "<image>" not in text
    asked = Request("0", ({"role": "user", "content": "what is this ?"},), None)
    assert isinstance(answers(checkpoint, [asked])[0], str)
