"""The tiny world's benchmarks, in the very files that CHAIR, Object HalBench, POPE and AMBER are
published as: other pictures and other words, the same layouts.

The scenes are counterfactual and new: no other split has them. Every benchmark has its own but
POPE, which asks about CHAIR's images as both ask about COCO's.
"""

import base64
import random
from collections.abc import Callable
from pathlib import Path

from bpo.study.files import write_lines, write_whole
from bpo.tiny.data import KINDS, absent_of_kind, draw_scenes, write_json
from bpo.tiny.drawing import draw_scene
from bpo.tiny.language import DESCRIBE, caption, presence_question
from bpo.tiny.world import OBJECT_WORDS, OBJECTS, PARTNER, Scene, python_generator

QUESTIONS = 2  # of each answer, at most, about a scene; POPE asks three
COCO_NAME = "COCO_val2014_{:012d}.png"

Numbered = dict[int, Scene]


def write(folder: Path, make_scene: Callable[[random.Random], Scene], count: int, *, seed: int,
          seen: set[str]) -> None:
    """Four folders of official files below `folder`, `count` scenes in each."""
    chair, halbench, amber = (
        dict(enumerate(draw_scenes(make_scene, count, seed=seed, purpose=f"benchmark {name}",
                                   seen=seen), start=1))
        for name in ("chair", "object-halbench", "amber"))
    write_chair(folder / "chair", chair)
    write_object_halbench(folder / "object-halbench", halbench)
    write_pope(folder / "pope", chair, python_generator(seed, "benchmark pope"))
    write_amber(folder / "amber", amber, python_generator(seed, "benchmark amber"))


def write_chair(folder: Path, scenes: Numbered) -> None:
    _annotations(folder, scenes)
    _images(folder / "val2014", scenes, COCO_NAME)
    write_json(folder / "questions.json", [
        {"image": COCO_NAME.format(k), "text": DESCRIBE} for k in scenes])


def write_object_halbench(folder: Path, scenes: Numbered) -> None:
    _annotations(folder, scenes)
    # The images as a reader unpacks them, which may not write into a finished stage.
    _images(folder / "images", scenes, "{}.jpg")
    write_lines(folder / "obj_halbench_300_with_image.jsonl", (
        {"image_id": k, "question": DESCRIBE, "image": base64.b64encode(
            (folder / "images" / f"{k}.jpg").read_bytes()).decode()} for k in scenes))


def write_pope(folder: Path, scenes: Numbered, rng: random.Random) -> None:
    _images(folder / "val2014", scenes, COCO_NAME)
    for kind in KINDS:
        write_lines(folder / f"coco_pope_{kind}.json", (
            {"question_id": n, "image": COCO_NAME.format(k), "text": presence_question(name),
             "label": label} for n, (k, name, label) in _presences(scenes, kind, rng)))


def write_amber(folder: Path, scenes: Numbered, rng: random.Random) -> None:
    """Captions and existence questions; the tiny language has no question that tells AMBER's
    attributes and relations by yes or no."""
    image = "AMBER_{}.png"
    _images(folder / "image", scenes, image)
    presences = [(len(scenes) + n, *asked)
                 for n, asked in _presences(scenes, "adversarial", rng)]
    (folder / "query").mkdir(exist_ok=True)
    write_json(folder / "query" / "query_generative.json", [
        {"id": k, "image": image.format(k), "query": DESCRIBE} for k in scenes])
    write_json(folder / "query" / "query_discriminative.json", [
        {"id": n, "image": image.format(k), "query": presence_question(name)}
        for n, k, name, _ in presences])
    write_json(folder / "annotations.json", [
        {"id": k, "type": "generative", "truth": scene.names,
         "hallu": [PARTNER[name] for name in scene.names if PARTNER[name] in scene.absent]}
        for k, scene in scenes.items()] + [
        {"id": n, "type": "discriminative-hallucination", "truth": label}
        for n, _, _, label in presences])
    write_json(folder / "relation.json", {name: more for name, *more in OBJECT_WORDS.values()})
    write_whole(folder / "safe_words.txt", "")


def _presences(scenes: Numbered, kind: str, rng: random.Random
               ) -> list[tuple[int, tuple[int, str, str]]]:
    """Numbered questions (scene, object, yes or no): of each scene as many objects that are there
    as not, an object never twice."""
    questions = []
    for k, scene in scenes.items():
        there = rng.sample(scene.names, min(QUESTIONS, len(scene.names)))
        absent: list[str] = []
        while len(absent) < len(there):
            name = absent_of_kind(kind, scene, rng)
            if name in absent:  # its kind has run out: any other that is not there
                name = rng.choice([n for n in scene.absent if n not in absent])
            absent.append(name)
        questions += [*((k, name, "yes") for name in there), *((k, name, "no") for name in absent)]
    return list(enumerate(questions, start=1))


def _annotations(folder: Path, scenes: Numbered) -> None:
    """What COCO says of its images: the classes of instances, and captions; and the words for
    these classes."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    images = [{"id": k, "file_name": COCO_NAME.format(k)} for k in scenes]
    places = [(k, thing.name) for k, scene in scenes.items() for thing in scene.things]
    write_json(folder / "annotations" / "instances_val2014.json", {
        "images": images,
        "annotations": [{"id": n, "image_id": k, "category_id": OBJECTS.index(name) + 1}
                        for n, (k, name) in enumerate(places, start=1)],
        "categories": [{"id": n, "name": name} for n, name in enumerate(OBJECTS, start=1)]})
    write_json(folder / "annotations" / "captions_val2014.json", {
        "images": images,
        "annotations": [{"id": k, "image_id": k, "caption": caption(scene.facts)}
                        for k, scene in scenes.items()]})
    write_whole(folder / "synonyms.txt", "".join(
        f"{', '.join(words)}\n" for words in OBJECT_WORDS.values()))


def _images(folder: Path, scenes: Numbered, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, scene in scenes.items():
        draw_scene(scene).save(folder / name.format(k), "PNG")
