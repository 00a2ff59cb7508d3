"""The tiny world: its rules, its files, its models. One very short build serves all tests."""

import base64
import hashlib
import io
import json
import random
import re
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from bpo import params
from bpo.study.stage import Result
from bpo.tiny import data, language, model, overview, stage, tables, training, world
from bpo.tiny.drawing import draw_scene
from bpo.tiny.stage import build

pytestmark = pytest.mark.study  # small worlds are made and models trained

SPLITS = ("preference", "development", "counterfactual", "natural")
SHORT = {
    "tower_steps": 3, "text_documents": 700, "text_steps": 3, "caption_steps": 2, "mixed_steps": 2,
    "alignment_images": 24, "preference_images": 20, "development_images": 8, "test_images": 12,
    "natural_images": 8, "benchmark_images": 8, "preference_presence": True}


def short(seed: int, **changes) -> params.TinyWorld:
    return params.TinyWorld(seed=seed, **SHORT | changes)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder and the metrics of a short build."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, build(folder, short(3))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def digests(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.stem != "timings"}


def scene_of(*things):
    """A scene of (colour, object)."""
    return world.Scene(tuple(world.Thing(name, colour, cell=i, size=2, shade=2, shift=(0, 0))
                             for i, (colour, name) in enumerate(things)), 0)


def test_natural_scenes_have_their_shares():
    rng = random.Random(0)
    scenes = [world.natural_scene(rng, typical=0.8, partner=0.6) for _ in range(4000)]
    shares = overview.statistics(scene.facts for scene in scenes)
    assert shares == pytest.approx({"typical": 0.8, "partner": 0.6}, abs=0.02)
    # by hand: two of three in their colour, two of three beside their partner
    facts = [[("yellow", "banana"), ("blue", "apple")], [("blue", "cup")]]
    assert overview.statistics(facts) == {"typical": 0.6667, "partner": 0.6667}


def test_counterfactual_scenes_are_never_typical():
    rng = random.Random(0)
    for _ in range(1000):
        scene = world.counterfactual_scene(rng, partner=0.6)
        assert 1 <= len(scene.things) <= world.CELLS
        assert len({thing.cell for thing in scene.things}) == len(scene.things)
        for thing in scene.things:
            assert thing.colour != world.TYPICAL[thing.name]
            assert world.PARTNER[thing.name] not in scene.names


def test_captions_parse_back_and_wrong_ones_have_one_mistake():
    rng = random.Random(1)
    for _ in range(300):
        facts = world.uniform_scene(rng).facts
        assert language.parse_caption(language.caption(facts)) == facts
        wrong = language.wrong_caption(facts, rng)
        assert sum(a != b for a, b in zip_longest(facts, wrong)) == 1


def test_the_tokenizer_has_every_word():
    tokenizer = model.build_processor().tokenizer
    for document in language.text_corpus(1, 300, typical=0.9, partner=0.9):
        assert tokenizer.unk_token_id not in tokenizer(document["user"]).input_ids
        assert tokenizer.unk_token_id not in tokenizer(document["assistant"]).input_ids


def test_each_object_in_each_colour_looks_different():
    pictures = {draw_scene(scene_of((colour, name))).tobytes()
                for name in world.OBJECTS for colour in world.COLOURS}
    assert len(pictures) == len(world.OBJECTS) * len(world.COLOURS)


def test_branches_equal_separate_sequences():
    """The shared-prefix batch gives the same loss as one sequence a row."""
    processor = model.build_processor()
    tokenizer = processor.tokenizer
    tiny = model.build_multimodal_model(tokenizer, short(
        1, text_width=32, text_layers=2, vision_width=32, vision_layers=2)).eval()
    rng = random.Random(2)
    scene = world.natural_scene(rng, typical=0.8, partner=0.6)
    rows = data.training_rows(scene, 0, rng)
    weights = {"caption": 1.0, "attribute": 1.0, "presence": 1.0}
    prefix = tokenizer("<s>user: " + model.IMAGE_TOKEN * model.IMAGE_TOKENS).input_ids
    features = training.tower_features(tiny, processor, [scene])
    together = training.branched_batch([training.encode_branches(tokenizer, rows, weights)], prefix)
    loss = training.alignment_loss(tiny, features, together)
    total = count = 0.0
    for row in rows:
        prompt = model.image_prompt(row["question"])
        inputs = tokenizer(f"{prompt} {row['answer']}</s>", return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, :len(tokenizer(prompt).input_ids)] = -100
        answered = (labels != -100).sum()
        pixels = model.pixel_values(processor, [scene])
        total += tiny(**inputs, pixel_values=pixels, labels=labels).loss * answered
        count += answered
    assert torch.allclose(loss, total / count, atol=1e-5)


def test_splits_share_no_picture(built):
    folder, _ = built
    seen = [hashlib.sha256(Image.open(path).tobytes()).hexdigest()
            for split in SPLITS for path in (folder / split / "images").glob("*.png")]
    assert len(seen) == len(set(seen)) == 20 + 8 + 12 + 8


def test_truth_agrees_with_rows(built):
    folder, _ = built
    for split in SPLITS:
        truth = read(folder / split / "truth.json")
        rows = read(folder / split / "rows.json")
        assert {row["id"] for row in rows} == set(truth["rows"])
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            objects = truth["images"][row["image"]]["objects"]
            colours = {item["name"]: item["colour"] for item in objects}
            about = truth["rows"][row["id"]]
            human, answer = (turn["value"] for turn in row["conversations"])
            assert human.startswith("<image>\n")
            assert about["true"] == [answer]
            name = next((word for word in human.split() if word in world.OBJECTS), None)
            if about["category"] == "caption":
                assert language.parse_caption(answer) == [
                    (item["colour"], item["name"]) for item in objects]
            elif about["category"] == "attribute":
                assert answer == colours[name]
                assert about["prior"] == [truth["vocabulary"]["typical"][name]]
                if split in ("development", "counterfactual"):
                    assert answer not in about["prior"]
            else:
                assert answer == ("yes" if name in colours else "no")
                misled = about["kind"] == "adversarial" and answer == "no"
                assert about["prior"] == (["yes"] if misled else [])
                if misled and split in ("development", "counterfactual"):
                    assert truth["vocabulary"]["partner"][name] in colours


@pytest.mark.parametrize("split", SPLITS)
def test_presence_is_balanced(built, split):
    truths = [about for about in read(built[0] / split / "truth.json")["rows"].values()
              if about["category"] == "presence"]
    kinds = {about["kind"] for about in truths}
    assert kinds == ({None} if split == "preference" else set(data.KINDS))
    for kind in kinds:
        yes = [about["true"] == ["yes"] for about in truths if about["kind"] == kind]
        assert sum(yes) * 2 == len(yes)


def test_checkpoint_loads_and_answers(built):
    folder, _ = built
    processor = AutoProcessor.from_pretrained(folder / "model")
    multimodal = AutoModelForImageTextToText.from_pretrained(folder / "model")
    assert processor.tokenizer.padding_side == "left"
    turn = {"role": "user", "content": [{"type": "image"},
                                        {"type": "text", "text": "what color is the cup ?"}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    assert prompt == "<s>user: <image>\nwhat color is the cup ?\nassistant:"
    scene = world.uniform_scene(random.Random(0))
    inputs = processor(images=draw_scene(scene), text=prompt, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], model.pixel_values(processor, [scene]))
    trained_on = processor.tokenizer(model.image_prompt("what color is the cup ?")).input_ids
    assert inputs["input_ids"][0].tolist() == trained_on
    placeholders = inputs["input_ids"] == multimodal.config.image_token_id
    features = multimodal.get_image_features(inputs["pixel_values"]).pooler_output
    assert int(placeholders.sum()) == features[0].shape[0] == model.IMAGE_TOKENS
    assert multimodal.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    alone = processor.apply_chat_template([{"role": "user", "content": "is there a cup ?"}],
                                          add_generation_prompt=True)
    text_only = processor(text=alone, return_tensors="pt")
    assert multimodal.generate(**text_only, max_new_tokens=3).shape[0] == 1
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        assert getattr(multimodal.generation_config, name) == getattr(processor.tokenizer, name)


@pytest.mark.parametrize("content", [
    "is there a cup ?", [{"type": "image"}, {"type": "text", "text": "is there a cup ?"}]])
def test_prompt_is_a_prefix_of_the_conversation(built, content):
    processor = AutoProcessor.from_pretrained(built[0] / "model")
    user = {"role": "user", "content": content}
    prompt = processor.apply_chat_template([user], add_generation_prompt=True)
    for answer in ("yes", [{"type": "text", "text": "yes"}]):
        full = processor.apply_chat_template([user, {"role": "assistant", "content": answer}])
        assert full.startswith(prompt)
        assert full.endswith(processor.tokenizer.eos_token)
        ids, prompt_ids = processor.tokenizer(full).input_ids, processor.tokenizer(prompt).input_ids
        assert ids[:len(prompt_ids)] == prompt_ids


@pytest.mark.parametrize("name", ["describe", "question"])
def test_text_model_loads_and_rewrites(built, name):
    folder, _ = built
    tokenizer = AutoTokenizer.from_pretrained(folder / "language_model")
    text_model = AutoModelForCausalLM.from_pretrained(folder / "language_model")
    template = (folder / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    assert "{question}" in template and "{answer}" in template
    message = template.replace("{question}", "is there a cup ?").replace("{answer}", "yes")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": message}],
                                           add_generation_prompt=True, tokenize=False)
    assert prompt == f"<s>user: {message}\nassistant:"
    inputs = tokenizer(prompt, return_tensors="pt")
    assert tokenizer.unk_token_id not in inputs["input_ids"]
    assert text_model.generate(**inputs, max_new_tokens=3).shape[0] == 1


def test_what_the_notebook_shows(built):
    folder, metrics = built
    result = Result(folder, {"metrics": metrics}, "")
    shown = tables.overview(result)
    assert {d["kind"] for d in shown["documents"]} == set(language.DOCUMENT_KINDS)
    assert list(shown["statistics"]) == list(tables.SOURCES)
    assert shown["statistics"]["counterfactual images"] == {"typical": 0, "partner": 0}
    strips = tables.sources(shown).html
    assert strips.count('class="strip"') == 4 and strips.count("<img") == 12
    drawn = Image.open(io.BytesIO(base64.b64decode(re.findall("base64,([^\"]+)", strips)[-4])))
    first = Image.open(folder / "counterfactual/images/00001.png")
    assert drawn.convert("RGB").resize(first.size, Image.NEAREST).tobytes() == first.tobytes()
    shown["samples"]["preference images"] = shown["samples"]["alignment images"]
    assert tables.AGAIN not in strips and tables.AGAIN in tables.sources(shown).html
    assert tables.answers(shown).html.count("what color is the") == 8  # and as alternative texts
    p = short(3)
    assert f"{p.natural_images} natural images" in tables.sight(p, metrics).plain
    assert "that is what there is to unlearn" in tables.world_headline(metrics).plain
    gallery = tables.samples(result, "counterfactual").html
    assert gallery.count("<img") == 4 and "describe the image → " in gallery
    assert "NOT passed" in str(tables.gate(metrics))  # three steps teach nothing
    assert len(tables.base(p, metrics)) == 8


def test_the_untuned_model_s_metrics(monkeypatch):
    scenes = [scene_of(("red", "banana"), ("blue", "cup")), scene_of(("green", "fork"))]
    monkeypatch.setattr(overview, "captions", lambda *_: ["red banana , red apple .",
                                                          "green fork ."])
    monkeypatch.setattr(overview, "short_answers", lambda *_: [
        {"kind": kind, "true": true, "answer": answer, "p_true": p_true, "p_prior": p_prior,
         "prior": ["red", "white"]}
        for kind, true, answer, p_true, p_prior in (
            (None, "red", "red", 0.6, 0.3), (None, "green", "white", 0.2, 0.5),
            ("random", "no", "no", 0.9, 0.0), ("adversarial", "no", "yes", 0.1, 0.9))])
    assert overview.base_metrics(None, None, scenes, []) == {
        "chair_i": 0.3333, "cover": 0.6667, "colour_accuracy": 0.5, "p_true": 0.4, "p_prior": 0.4,
        "prior_rate": 0.5,
        "pope_random": 1.0, "pope_adversarial": 0.0}


def test_same_seed_same_bytes(built, tmp_path):
    folder, metrics = built
    assert build(tmp_path, short(3)) == metrics
    assert digests(tmp_path) == digests(folder)


def test_another_seed_gives_other_pictures(built, tmp_path):
    folder, _ = built
    stage.write_data(tmp_path, short(4))
    assert not (set(digests(folder / "natural/images").values())
                & set(digests(tmp_path / "natural/images").values()))


def share_of_typical(folder: Path) -> float:
    things = [thing for image in read(folder / "truth.json")["images"].values()
              for thing in image["objects"]]
    return np.mean([world.TYPICAL[t["name"]] == t["colour"] for t in things])


def test_preference_rows_have_the_statistics_and_questions_that_were_asked_for(tmp_path):
    p = short(3, preference_images=200, preference_typical=0.3, preference_doses=[0.0, 1.0],
              preference_presence=False)
    scenes, _ = stage.write_data(tmp_path, p)
    assert share_of_typical(tmp_path / "preference") == pytest.approx(0.3, abs=0.08)
    assert share_of_typical(tmp_path / "preference-0") == 0
    assert share_of_typical(tmp_path / "preference-1") == 1
    pictures = [set(digests(tmp_path / name / "images").values()) for name in (
        "preference", "preference-0", "preference-1", "counterfactual", "natural")]
    assert len(set.union(*pictures)) == sum(map(len, pictures))  # none in two sets
    asked = {row["category"] for row in read(tmp_path / "preference/truth.json")["rows"].values()}
    assert asked == {"caption", "attribute"}
    own = short(3, preference_rows="alignment", preference_presence=True)
    scenes, rows = stage.write_data(tmp_path / "own", own)
    assert scenes["preference"] == scenes["alignment"][:20]
    assert rows["preference"] == rows["alignment"][:20]


def test_the_alignment_s_rows_are_neither_more_nor_others_than_it_has():
    with pytest.raises(ValueError, match="preference_images .25. cannot exceed"):
        short(1, preference_images=25, preference_rows="alignment")
    with pytest.raises(ValueError, match="must be image_typical and image_partner"):
        short(1, preference_typical=0.5, preference_rows="alignment")
