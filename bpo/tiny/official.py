"""The tiny world's benchmarks, in the very files that CHAIR, Object HalBench, POPE and AMBER are
published as: other pictures and other words, the same layouts.

The scenes are counterfactual and new: no other split has them. Every benchmark has its own but
POPE, which asks about CHAIR's images as both ask about COCO's.
"""

import base64
import io
import random
from pathlib import Path

from bpo.study.files import write_lines, write_whole
from bpo.tiny.data import KINDS, absent_of_kind, draw_scenes, write_json
from bpo.tiny.drawing import draw_scene
from bpo.tiny.language import DESCRIBE, caption, presence_question, scene_facts
from bpo.tiny.world import OBJECTS, PARTNER, PLURALS, Scene, python_generator

ASKED = 2  # questions of each answer, at most, about a scene; POPE asks three
COCO_NAME = "COCO_val2014_{:012d}.png"


def write(folder: Path, make_scene, count: int, *, seed: int, seen: set[str]) -> None:
    """Four folders of official files below `folder`, `count` scenes in each."""
    own = {name: draw_scenes(make_scene, count, seed=seed, purpose=f"benchmark {name}", seen=seen)
           for name in ("chair", "object-halbench", "amber")}
    write_chair(folder / "chair", own["chair"])
    write_object_halbench(folder / "object-halbench", own["object-halbench"])
    write_pope(folder / "pope", own["chair"], python_generator(seed, "benchmark pope"))
    write_amber(folder / "amber", own["amber"], python_generator(seed, "benchmark amber"))


def write_chair(folder: Path, scenes: list[Scene]) -> None:
    _coco_annotations(folder, scenes)
    _coco_images(folder / "val2014", scenes)
    write_json(folder / "questions.json", [
        {"image": COCO_NAME.format(k), "text": DESCRIBE} for k in range(1, len(scenes) + 1)])


def write_object_halbench(folder: Path, scenes: list[Scene]) -> None:
    _coco_annotations(folder, scenes)
    write_lines(folder / "obj_halbench_300_with_image.jsonl", (
        {"image_id": number, "question": DESCRIBE,
         "image": base64.b64encode(_png(scene)).decode()}
        for number, scene in enumerate(scenes, start=1)))
    # The images as a reader unpacks them, which may not write into a finished stage.
    (folder / "images").mkdir(exist_ok=True)
    for number, scene in enumerate(scenes, start=1):
        (folder / "images" / f"{number}.jpg").write_bytes(_png(scene))


def write_pope(folder: Path, scenes: list[Scene], rng: random.Random) -> None:
    _coco_images(folder / "val2014", scenes)
    for kind in KINDS:
        asked = [(number, name, label) for number, scene in enumerate(scenes, start=1)
                 for name, label in _presences(scene, kind, rng)]
        write_lines(folder / f"coco_pope_{kind}.json", (
            {"question_id": k, "image": COCO_NAME.format(number), "text": presence_question(name),
             "label": label} for k, (number, name, label) in enumerate(asked, start=1)))


def write_amber(folder: Path, scenes: list[Scene], rng: random.Random) -> None:
    """Captions and existence questions; the tiny language has no question that tells AMBER's
    attributes and relations by yes or no."""
    generative, discriminative, annotations = [], [], []
    (folder / "image").mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes, start=1):
        image = f"AMBER_{number}.png"
        (folder / "image" / image).write_bytes(_png(scene))
        generative.append({"id": number, "image": image, "query": DESCRIBE})
        likely = [PARTNER[name] for name in scene.names if PARTNER[name] not in scene.names]
        annotations.append({"id": number, "type": "generative", "truth": scene.names,
                            "hallu": likely})
    for number, scene in enumerate(scenes, start=1):
        for name, label in _presences(scene, "adversarial", rng):
            key = len(scenes) + len(discriminative) + 1
            discriminative.append({"id": key, "image": f"AMBER_{number}.png",
                                   "query": presence_question(name)})
            annotations.append({"id": key, "type": "discriminative-hallucination", "truth": label})
    (folder / "query").mkdir(exist_ok=True)
    write_json(folder / "query" / "query_generative.json", generative)
    write_json(folder / "query" / "query_discriminative.json", discriminative)
    write_json(folder / "annotations.json", annotations)
    write_json(folder / "relation.json", {name: [PLURALS[name]] for name in OBJECTS})
    write_whole(folder / "safe_words.txt", "")


def _presences(scene: Scene, kind: str, rng: random.Random) -> list[tuple[str, str]]:
    """Objects to ask for, as many that are there as not, an object never twice."""
    there = rng.sample(scene.names, min(ASKED, len(scene.names)))
    absent: list[str] = []
    while len(absent) < len(there):
        name = absent_of_kind(kind, scene, rng)
        if name in absent:  # its kind has run out: any other that is not there
            name = rng.choice([n for n in OBJECTS if n not in (*scene.names, *absent)])
        absent.append(name)
    return [(n, "yes") for n in there] + [(n, "no") for n in absent]


def _coco_annotations(folder: Path, scenes: list[Scene]) -> None:
    """What COCO says of its images: the classes of instances, and captions; and the words for
    these classes."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    images = [{"id": k, "file_name": COCO_NAME.format(k)} for k in range(1, len(scenes) + 1)]
    places = [(k, thing.name) for k, scene in enumerate(scenes, start=1) for thing in scene.things]
    write_json(folder / "annotations" / "instances_val2014.json", {
        "images": images,
        "annotations": [{"id": n, "image_id": k, "category_id": OBJECTS.index(name) + 1}
                        for n, (k, name) in enumerate(places, start=1)],
        "categories": [{"id": n, "name": name} for n, name in enumerate(OBJECTS, start=1)]})
    write_json(folder / "annotations" / "captions_val2014.json", {
        "images": images,
        "annotations": [{"id": k, "image_id": k, "caption": caption(scene_facts(scene))}
                        for k, scene in enumerate(scenes, start=1)]})
    write_whole(folder / "synonyms.txt", "".join(
        f"{name}, {PLURALS[name]}\n" for name in OBJECTS))


def _coco_images(folder: Path, scenes: list[Scene]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes, start=1):
        (folder / COCO_NAME.format(number)).write_bytes(_png(scene))


def _png(scene: Scene) -> bytes:
    stream = io.BytesIO()
    draw_scene(scene).save(stream, "PNG")
    return stream.getvalue()
