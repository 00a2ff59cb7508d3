"""The tiny world: its rules, its files, its models. One very short build serves all tests."""

import hashlib
import json
import random

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from bpo.tiny import data, language, model, overview, training, world
from bpo.tiny.build import build
from bpo.tiny.drawing import draw_scene, scene_array

pytestmark = pytest.mark.study  # small worlds are made and models trained

SPLITS = ("preference", "development", "counterfactual", "natural")
SHORT = {
    "tower_steps": 3, "text_documents": 700, "text_steps": 3, "caption_steps": 2, "mixed_steps": 2,
    "alignment_images": 24, "preference_images": 20, "development_images": 8, "test_images": 12,
    "natural_images": 8,
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "world"
    return folder, build(folder, seed=3, **SHORT)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def digests(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_natural_scenes_have_the_asked_shares():
    rng = random.Random(0)
    scenes = [world.natural_scene(rng, typical=0.8, partner=0.6) for _ in range(4000)]
    table = world.statistics([language.scene_facts(scene) for scene in scenes])
    for row in table:
        assert abs(row["typical_share"] - 0.8) < 0.05
        assert abs(row["partner_share"] - 0.6) < 0.07


def test_counterfactual_scenes_are_never_typical():
    rng = random.Random(0)
    for _ in range(1000):
        scene = world.counterfactual_scene(rng, partner=0.6)
        assert 1 <= len(scene.things) <= world.CELLS
        assert len({thing.cell for thing in scene.things}) == len(scene.things)
        for thing in scene.things:
            assert thing.colour != world.TYPICAL[thing.name]
            assert world.PARTNER[thing.name] not in scene.names


def test_captions_parse_back_and_count_mistakes():
    rng = random.Random(1)
    for _ in range(300):
        facts = language.scene_facts(world.uniform_scene(rng))
        assert language.parse_caption(language.caption(facts)) == facts
        assert language.count_mistakes(facts, facts) == 0
        assert language.count_mistakes(facts, language.wrong_caption(facts, rng)) == 1
    assert language.parse_caption("red cup blue") is None
    assert language.count_mistakes([("red", "cup")], []) == 1


def test_every_word_is_known():
    tokenizer = model.build_tokenizer()
    for document in language.text_corpus(1, 300, typical=0.9, partner=0.9):
        assert tokenizer.unk_token_id not in tokenizer(document["user"]).input_ids
        assert tokenizer.unk_token_id not in tokenizer(document["assistant"]).input_ids


def test_objects_look_different():
    """Each object in each colour has a drawing of its own."""
    pictures = set()
    for name in world.OBJECTS:
        for colour in world.COLOURS:
            thing = world.Thing(name, colour, cell=0, size=2, shade=2, shift=(0, 0))
            pictures.add(draw_scene(world.Scene((thing,), 0)).tobytes())
    assert len(pictures) == len(world.OBJECTS) * len(world.COLOURS)


def test_branches_equal_separate_sequences():
    """The shared-prefix batch gives the same loss as one sequence a row."""
    tokenizer = model.build_tokenizer()
    processor = model.build_processor(tokenizer)
    text = model.text_config(tokenizer, width=32, layers=2)
    tiny = model.build_multimodal_model(tokenizer, text=text, vision_width=32, vision_layers=2,
                                        seed=1).eval()
    rng = random.Random(2)
    scene = world.natural_scene(rng, typical=0.8, partner=0.6)
    rows = data.training_rows(scene, 0, rng)
    weights = {"caption": 1.0, "attribute": 1.0, "presence": 1.0}
    prefix = tokenizer("<s>user: " + model.IMAGE_TOKEN * model.IMAGE_TOKENS).input_ids
    features = training.all_features(tiny, processor, [scene])
    together = training.branched_batch([training.encode_branches(tokenizer, rows, weights)], prefix)
    loss = training.alignment_loss(tiny, features, together)
    total = count = 0.0
    for row in rows:
        prompt = model.image_prompt(row["question"])
        inputs = tokenizer(f"{prompt} {row['answer']}</s>", return_tensors="pt")
        asked = len(tokenizer(prompt).input_ids)
        labels = inputs["input_ids"].clone()
        labels[:, :asked] = -100
        pixels = model.pixel_values(processor, scene_array([scene]))
        answered = labels.shape[1] - asked
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
            asked = next((word for word in human.split() if word in world.OBJECTS), None)
            if about["category"] == "caption":
                assert language.parse_caption(answer) == [
                    (item["colour"], item["name"]) for item in objects]
            elif about["category"] == "attribute":
                assert answer == colours[asked]
                assert about["prior"] == [truth["vocabulary"]["typical"][asked]]
                if split in ("development", "counterfactual"):
                    assert answer not in about["prior"]
            else:
                assert answer == ("yes" if asked in colours else "no")
                misled = about["kind"] == "adversarial" and answer == "no"
                assert about["prior"] == (["yes"] if misled else [])
                if misled and split in ("development", "counterfactual"):
                    assert truth["vocabulary"]["partner"][asked] in colours


def test_presence_is_balanced(built):
    folder, _ = built
    for split in SPLITS:
        truths = read(folder / split / "truth.json")["rows"].values()
        kinds = {about["kind"] for about in truths if about["category"] == "presence"}
        assert kinds == ({None} if split == "preference" else set(data.KINDS))
        for kind in kinds:
            said = [about["true"] == ["yes"] for about in truths
                    if about["category"] == "presence" and about["kind"] == kind]
            assert sum(said) * 2 == len(said)


def test_checkpoint_loads_and_answers(built):
    folder, _ = built
    processor = AutoProcessor.from_pretrained(folder / "model")
    multimodal = AutoModelForImageTextToText.from_pretrained(folder / "model")
    assert processor.tokenizer.padding_side == "left"
    turn = {"role": "user", "content": [{"type": "image"},
                                        {"type": "text", "text": "what color is the cup ?"}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    assert prompt == "<s>user: <image>\nwhat color is the cup ?\nassistant:"
    picture = Image.open(folder / "natural/images/00001.png")
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    trained_on = processor.tokenizer(model.image_prompt("what color is the cup ?")).input_ids
    assert inputs["input_ids"][0].tolist() == trained_on
    placeholders = inputs["input_ids"] == multimodal.config.image_token_id
    features = multimodal.get_image_features(inputs["pixel_values"]).pooler_output
    assert int(placeholders.sum()) == features[0].shape[0] == model.IMAGE_TOKENS
    assert multimodal.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    expected = model.pixel_values(processor, scene_array([world.uniform_scene(random.Random(0))]))
    picture = draw_scene(world.uniform_scene(random.Random(0)))
    assert torch.equal(processor(images=picture, text=prompt, return_tensors="pt").pixel_values,
                       expected)
    alone = processor.apply_chat_template([{"role": "user", "content": "is there a cup ?"}],
                                          add_generation_prompt=True)
    text_only = processor(text=alone, return_tensors="pt")
    assert multimodal.generate(**text_only, max_new_tokens=3).shape[0] == 1
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        assert getattr(multimodal.generation_config, name) == getattr(processor.tokenizer, name)


@pytest.mark.parametrize("content", [
    "is there a cup ?", [{"type": "image"}, {"type": "text", "text": "is there a cup ?"}]])
def test_prompt_is_a_prefix_of_the_conversation(built, content):
    folder, _ = built
    processor = AutoProcessor.from_pretrained(folder / "model")
    user = {"role": "user", "content": content}
    prompt = processor.apply_chat_template([user], add_generation_prompt=True)
    for answer in ("yes", [{"type": "text", "text": "yes"}]):
        full = processor.apply_chat_template([user, {"role": "assistant", "content": answer}])
        assert full.startswith(prompt)
        assert full.endswith(processor.tokenizer.eos_token)
        ids, prompt_ids = processor.tokenizer(full).input_ids, processor.tokenizer(prompt).input_ids
        assert ids[:len(prompt_ids)] == prompt_ids


def test_text_model_loads_and_rewrites(built):
    folder, _ = built
    tokenizer = AutoTokenizer.from_pretrained(folder / "language_model")
    text_model = AutoModelForCausalLM.from_pretrained(folder / "language_model")
    for name in ("describe", "question"):
        template = (folder / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
        assert "{question}" in template and "{answer}" in template
        message = template.replace("{question}", "is there a cup ?").replace("{answer}", "yes")
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": message}],
                                               add_generation_prompt=True, tokenize=False)
        assert prompt == f"<s>user: {message}\nassistant:"
        inputs = tokenizer(prompt, return_tensors="pt")
        assert tokenizer.unk_token_id not in inputs["input_ids"]
        assert text_model.generate(**inputs, max_new_tokens=3).shape[0] == 1


def test_metrics_and_overview_are_plain(built):
    folder, metrics = built
    assert json.loads(json.dumps(metrics)).keys() == metrics.keys()
    assert metrics["gates"]["tower"] is False  # three steps teach nothing
    shown = read(folder / "overview.json")
    assert set(shown["statistics"]) == {"text", "alignment", "counterfactual"}
    assert {d["kind"] for d in shown["documents"]} == set(language.DOCUMENT_KINDS)
    for examples in shown["examples"].values():
        assert len(examples) == 4 and all((folder / e["image"]).is_file() for e in examples)
    questions = [r["question"] for e in shown["examples"]["counterfactual"] for r in e["rows"]
                 if r["category"] == "attribute"]
    assert [answer["question"] for answer in shown["answers"]] == questions


def test_the_untuned_model_s_metrics(monkeypatch):
    def things(*named):
        return world.Scene(tuple(world.Thing(name, colour, cell=i, size=2, shade=2, shift=(0, 0))
                                 for i, (colour, name) in enumerate(named)), 0)

    scenes = [things(("red", "banana"), ("blue", "cup")), things(("green", "fork"))]
    monkeypatch.setattr(overview, "captions", lambda *_: ["red banana , red apple .",
                                                          "green fork ."])
    monkeypatch.setattr(overview, "short_answers", lambda *_: [
        {"kind": kind, "true": true, "answer": answer, "p_true": p_true, "p_prior": p_prior}
        for kind, true, answer, p_true, p_prior in (
            (None, "red", "red", 0.6, 0.3), (None, "green", "white", 0.2, 0.5),
            ("random", "no", "no", 0.9, 0.0), ("adversarial", "no", "yes", 0.1, 0.9))])
    assert overview.base_metrics(None, None, scenes, []) == {
        "chair_i": 0.3333, "cover": 0.6667, "colour_accuracy": 0.5, "p_true": 0.4, "p_prior": 0.4,
        "pope_random": 1.0, "pope_adversarial": 0.0}


def test_same_seed_same_bytes(built, tmp_path):
    folder, metrics = built
    again = build(tmp_path / "again", seed=3, **SHORT)
    assert digests(tmp_path / "again") == digests(folder)
    assert again | {"seconds": 0} == metrics | {"seconds": 0}


def test_other_seed_and_fresh_rows(built, tmp_path):
    folder, _ = built
    build(tmp_path / "fresh", seed=4, **SHORT | {"preference_rows": "fresh"})
    pictures = digests(folder / "natural/images").values()
    assert not set(pictures) & set(digests(tmp_path / "fresh/natural/images").values())


def test_too_few_alignment_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="preference_images"):
        build(tmp_path, seed=1, alignment_images=5, preference_images=6)
