"""The judge-free benchmarks from small files in their official layouts."""

import base64
import io
import json

import pytest
from PIL import Image

from bpo.evaluation import official
from bpo.evaluation import words as vocabulary
from bpo.evaluation.official import BENCHMARKS
from bpo.params import Refusal

CATEGORIES = [{"id": 1, "name": "person", "supercategory": "person"}, {"id": 18, "name": "dog"},
              {"id": 62, "name": "chair"}]
SCENES = {"images": [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg", "height": 9},
                     {"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}],
          "annotations": [{"image_id": 42, "category_id": 18, "segmentation": [[1.5, 2, 3]]},
                          {"image_id": 42, "category_id": 18}, {"image_id": 7, "category_id": 1}],
          "categories": CATEGORIES}
CAPTIONS = {"annotations": [{"image_id": 42, "id": 1, "caption": "A man with his puppy"},
                            {"image_id": 99, "caption": "a cat of no image"}]}


def picture(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def put(folder, name, content):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        file.write_text(content, encoding="utf-8")
    elif name.endswith("jsonl") or name.startswith("coco_pope"):
        file.write_text("".join(json.dumps(x) + "\n" for x in content))
    else:
        file.write_text(json.dumps(content))


@pytest.fixture
def annotated(tmp_path):
    put(tmp_path, "annotations/instances_val2014.json", SCENES)
    put(tmp_path, "annotations/captions_val2014.json", CAPTIONS)
    return tmp_path


# --- folders ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", BENCHMARKS)
def test_all_that_is_missing_is_said_at_once(tmp_path, name):
    benchmark = BENCHMARKS[name]
    lost = official.missing(benchmark, tmp_path)
    assert set(benchmark.files.values()) <= set(lost)
    assert (f"{benchmark.images}/" in lost) == (name != "object-halbench")
    with pytest.raises(Refusal) as refusal:
        official.require(benchmark, tmp_path)
    assert all(f in str(refusal.value) for f in [*lost, benchmark.fetch, benchmark.title])
    assert "\n" not in str(refusal.value)


def test_a_whole_folder_lacks_nothing(annotated):
    (annotated / "val2014").mkdir()
    official.require(BENCHMARKS["chair"], annotated)


def test_every_metric_of_an_answer_has_a_label_and_every_label_an_answer(halbench, pope, amber,
                                                                         annotated):
    for name, folder in (("chair", annotated), ("object-halbench", halbench), ("pope", pope),
                         ("amber", amber)):
        loaded = BENCHMARKS[name].load(folder)
        named = {m for q in loaded.questions for m in loaded.counts(q, "Yes, a dog is there.")}
        assert named | BENCHMARKS[name].combined.keys() == BENCHMARKS[name].metrics.keys()
        assert BENCHMARKS[name].name == name


@pytest.mark.parametrize("name, key", [
    (310196, "310196"), ("310196", "310196"), ("COCO_val2014_000000310196.jpg", "310196"),
    ("val2014/COCO_val2014_000000310196.jpg", "310196"), ("COCO_train2014_000000000009", "9"),
    ("000012.png", "12"), (0, "0"), ("000.png", "0"), ("AMBER_1.jpg", "AMBER_1.jpg"),
    ("room 12.png", "room 12.png"), ("a\\b\\5.jpg", "5")])
def test_an_image_is_the_same_however_its_number_is_written(name, key):
    assert vocabulary.image_key(name) == key


# --- COCO's annotations -------------------------------------------------------------------------

def test_truth_is_instances_and_objects_of_the_captions(annotated):
    loaded = BENCHMARKS["chair"].load(annotated)
    assert [(q.id, q.image, q.text) for q in loaded.questions] == [
        ("42", "COCO_val2014_000000000042.jpg", "Describe this image."),
        ("7", "COCO_val2014_000000000007.jpg", "Describe this image.")]
    dog, person = loaded.questions
    assert loaded.counts(dog, "A man, a dog and a chair.") == {
        "chair_s": (1, 1), "chair_i": (1, 3), "cover": (2, 2), "objects": (3, 1), "words": (7, 1)}
    assert loaded.counts(person, "A man and a dog.")["chair_i"] == (1, 2)


def test_chair_asks_what_questions_json_names(annotated):
    put(annotated, "questions.json", [{"image": "COCO_val2014_000000000007.jpg",
                                       "text": "describe the image"}])
    loaded = BENCHMARKS["chair"].load(annotated)
    assert [(q.id, q.text) for q in loaded.questions] == [("7", "describe the image")]


@pytest.mark.parametrize("asked, said", [
    ([{"image": "8.jpg", "text": "?"}], "1 of its images are not in the annotations"),
    ([{"image": "7.jpg", "text": "?"}, {"image": "007.jpg", "text": "!"}], "asks twice"),
    ([{"image": "7.jpg"}], "lacks text"), (["7.jpg"], "lacks image, text")])
def test_questions_that_do_not_fit_are_refused(annotated, asked, said):
    put(annotated, "questions.json", asked)
    with pytest.raises(Refusal, match=said):
        BENCHMARKS["chair"].load(annotated)


def test_own_synonyms_replace_coco_s(annotated):
    put(annotated, "synonyms.txt", "person, man\ndog, hound\nchair\n")
    loaded = BENCHMARKS["chair"].load(annotated)
    # Neither "puppy" nor "woman" is an object word now.
    assert loaded.counts(loaded.questions[0], "A hound, a puppy, a woman.")["objects"] == (1, 1)


@pytest.mark.parametrize("scenes, said", [
    ({**SCENES, "categories": [*CATEGORIES, {"id": 63, "name": "unicorn"}]},
     "no synonyms are known for 'unicorn'"),
    ({**SCENES, "categories": CATEGORIES[:1]}, "image 42 and category 18"),
    ({**SCENES, "images": SCENES["images"][:1]}, "image 7 and category 1"),
    ({**SCENES, "images": []}, "lists no images"), ({}, "lists no categories"),
    ({**SCENES, "annotations": [{"image_id": 42}]}, "lacks category_id"),
    (json.dumps(SCENES)[:150], "no whole JSON")])
def test_annotations_that_do_not_hold_together_are_refused(annotated, scenes, said):
    put(annotated, "annotations/instances_val2014.json", scenes)
    with pytest.raises(Refusal, match=said):
        BENCHMARKS["chair"].load(annotated)


def test_an_image_without_objects_is_one(annotated):
    put(annotated, "annotations/instances_val2014.json", {**SCENES, "annotations": []})
    put(annotated, "annotations/captions_val2014.json", {"annotations": []})
    lexicon = vocabulary.lexicon(vocabulary.read(vocabulary.COCO))
    scenes = vocabulary.read_annotations([annotated / official.ANNOTATIONS["instances"]],
                                         [annotated / official.ANNOTATIONS["captions"]], lexicon)
    assert {key: s.present for key, s in scenes.items()} == {"42": set(), "7": set()}


# --- Object HalBench ----------------------------------------------------------------------------

@pytest.fixture
def halbench(annotated):
    put(annotated, official.HALBENCH, [
        {"image_id": 42, "question": "Describe it in detail.", "image": picture("red")},
        {"image_id": "7", "question": "What is to be seen?", "image": picture("blue")},
        {"image_id": 42, "question": "And here?", "image": picture("red")}])
    return annotated


def test_images_inside_the_question_file_are_unpacked_once(halbench):
    loaded = BENCHMARKS["object-halbench"].load(halbench)
    assert [(q.id, q.image) for q in loaded.questions] == [("1", "42.jpg"), ("2", "7.jpg"),
                                                           ("3", "42.jpg")]
    assert {f.name for f in (halbench / "images").iterdir()} == {"42.jpg", "7.jpg"}
    for name, colour in (("42.jpg", (255, 0, 0)), ("7.jpg", (0, 0, 255))):
        assert Image.open(halbench / "images" / name).getpixel((0, 0)) == colour
    counts = loaded.counts(loaded.questions[0], "A man, a dog, a dog and a chair; no cat.")
    assert counts["response"] == (1, 1) and counts["mention"] == (1, 3)
    put(halbench, "images/42.jpg", "mine")
    BENCHMARKS["object-halbench"].load(halbench)
    assert (halbench / "images/42.jpg").read_text() == "mine"


def test_without_images_inside_the_file_names_of_coco_are_used(annotated):
    put(annotated, official.HALBENCH, [{"image_id": 42, "question": "Describe it."}])
    loaded = BENCHMARKS["object-halbench"].load(annotated)
    assert loaded.questions[0].image == "COCO_val2014_000000000042.jpg"
    assert not (annotated / "images").exists()


@pytest.mark.parametrize("row, said", [
    ({"image_id": 42, "question": "?", "image": "no base64!"}, "image 42 inside cannot be"),
    ({"image_id": 5, "question": "?"}, "not in the annotations"),
    ({"question": "?"}, "row 1: an entry lacks image_id")])
def test_a_broken_question_file_is_refused(annotated, row, said):
    put(annotated, official.HALBENCH, [row])
    with pytest.raises(Refusal, match=said):
        BENCHMARKS["object-halbench"].load(annotated)


def test_annotations_of_the_training_part_are_read_where_they_are(annotated):
    put(annotated, "annotations/instances_train2014.json",
        {"images": [{"id": 5, "file_name": "COCO_train2014_000000000005.jpg"}],
         "annotations": [{"image_id": 5, "category_id": 62}], "categories": CATEGORIES})
    put(annotated, official.HALBENCH, [{"image_id": 5, "question": "?"}])
    loaded = BENCHMARKS["object-halbench"].load(annotated)
    assert loaded.counts(loaded.questions[0], "It is a chair.")["response"] == (0, 1)


# --- POPE ---------------------------------------------------------------------------------------

@pytest.fixture
def pope(tmp_path):
    for kind in official.POPE_KINDS:
        put(tmp_path, f"coco_pope_{kind}.json", [
            {"question_id": n, "image": "COCO_val2014_000000000042.jpg",
             "text": f"Is there a {what} in the image?", "label": label}
            for n, (what, label) in enumerate([("dog", "yes"), ("fork", "no")], start=1)])
    return tmp_path


def test_pope_s_questions_keep_their_kind_and_truth(pope):
    loaded = BENCHMARKS["pope"].load(pope)
    assert [(q.id, q.kind, q.label) for q in loaded.questions] == [
        (f"{k}-{n}", k, label) for k in ("random", "popular", "adversarial")
        for n, label in ((1, "yes"), (2, "no"))]
    assert loaded.counts(loaded.questions[3], "Yes") == {
        "accuracy": (0, 1), "precision": (0, 1), "recall": (0, 0), "f1": (0, 1),
        "yes_ratio": (1, 1), "unanswered": (0, 1), "accuracy_popular": (0, 1),
        "f1_popular": (0, 1), "official_accuracy": (0, 1), "official_f1": (0, 1),
        "read_otherwise": (0, 1), "bare": (1, 1)}


def test_a_truth_that_is_neither_is_refused(pope):
    put(pope, "coco_pope_random.json", [{"question_id": 1, "image": "1.jpg", "text": "Is it?",
                                         "label": "maybe"}])
    with pytest.raises(Refusal, match="'maybe' is no truth of a yes/no question"):
        BENCHMARKS["pope"].load(pope)


# --- AMBER --------------------------------------------------------------------------------------

TYPES = ["discriminative-hallucination", "discriminative-attribute-state",
         "discriminative-attribute-number", "discriminative-attribute-action",
         "discriminative-relation", "relation"]


@pytest.fixture
def amber(tmp_path):
    put(tmp_path, "annotations.json", [
        {"id": 1, "type": "generative", "truth": ["sky", "man"], "hallu": ["dog"]},
        *({"id": n, "type": t, "truth": "no"} for n, t in enumerate(TYPES, start=2))])
    put(tmp_path, "relation.json", {"sky": [], "man": ["person"], "dog": []})
    put(tmp_path, "safe_words.txt", "orange\nline\n")
    put(tmp_path, "query/query_generative.json",
        [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}])
    put(tmp_path, "query/query_discriminative.json",
        [{"id": n, "image": "AMBER_1.jpg", "query": "Is there a dog?"} for n in range(2, 8)])
    return tmp_path


def test_amber_s_two_tasks_are_one_benchmark(amber):
    loaded = BENCHMARKS["amber"].load(amber)
    assert [q.kind for q in loaded.questions] == [
        "generative", "existence", "attribute", "attribute", "attribute", "relation", "relation"]
    assert loaded.counts(loaded.questions[0], "A person and a dog.") == {
        "chair": (1, 2), "cover": (1, 2), "hal": (1, 1), "cog": (1, 1), "words": (5, 1)}
    # "no" is what precision and recall are about.
    assert loaded.counts(loaded.questions[1], "No.") == {
        "accuracy": (1, 1), "precision": (1, 1), "recall": (1, 1), "f1": (2, 2),
        "yes_ratio": (0, 1), "unanswered": (0, 1), "accuracy_existence": (1, 1),
        "f1_existence": (2, 2), "official_accuracy": (0, 1), "official_f1": (0, 1),
        "read_otherwise": (1, 1), "bare": (1, 1)}


def test_amber_s_score_is_made_of_chair_and_f1():
    parts, rule = BENCHMARKS["amber"].combined["amber_score"]
    # 100 - 8 and an F1 of 75: (92 + 75) / 2.
    assert parts == ("chair", "f1") and rule(0.08, 0.75) == pytest.approx(0.835)


@pytest.mark.parametrize("name, content, said", [
    ("query/query_generative.json", [{"id": 9, "image": "a", "query": "?"}], "question 9 is not"),
    ("query/query_discriminative.json", [{"id": 1, "image": "a", "query": "?"}], "question 1 is"),
    ("annotations.json", [{"id": 1, "type": "other", "truth": "no"}], "'other' is no type"),
    ("annotations.json", [{"id": 1, "type": "generative", "truth": []}], "lacks hallu"),
    ("annotations.json", [{"id": 1, "type": "relation", "truth": "x"}], "'x' is no truth"),
    ("relation.json", "{", "missing or broken")])
def test_files_of_amber_that_do_not_fit_are_refused(amber, name, content, said):
    put(amber, name, content)
    with pytest.raises(Refusal, match=said):
        BENCHMARKS["amber"].load(amber)
