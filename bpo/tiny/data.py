"""The tiny world's data sets: pictures, rows in the LLaVA instruction layout, the exact truth."""

import hashlib
import json
import random
from pathlib import Path

from bpo.tiny.drawing import draw_scene
from bpo.tiny.language import (
    DESCRIBE,
    absent_object,
    caption,
    colour_question,
    presence_question,
    scene_facts,
)
from bpo.tiny.world import (
    COLOURS,
    OBJECTS,
    PARTNER,
    PLURALS,
    POPULARITY,
    TYPICAL,
    Scene,
    Thing,
    python_generator,
)

KINDS = ("random", "popular", "adversarial")  # of absent objects, as POPE asks for them


def draw_scenes(make_scene, count: int, *, seed: int, purpose: str, seen: set[str]) -> list[Scene]:
    """`count` scenes from `make_scene(generator)` whose pictures are not yet in `seen`, a set of
    pixel hashes that they are added to."""
    rng = python_generator(seed, "scenes", purpose)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = make_scene(rng)
        pixels = hashlib.sha256(draw_scene(scene).tobytes()).hexdigest()
        if pixels not in seen:
            seen.add(pixels)
            scenes.append(scene)
    return scenes


def caption_row(scene: Scene) -> dict:
    return {"category": "caption", "question": DESCRIBE, "answer": caption(scene_facts(scene)),
            "prior": [], "kind": None}


def colour_row(thing: Thing) -> dict:
    return {"category": "attribute", "question": colour_question(thing.name),
            "answer": thing.colour, "prior": [TYPICAL[thing.name]], "kind": None}


def presence_row(name: str, scene: Scene, kind: str | None) -> dict:
    """A yes/no question; the prior's answer to an adversarial negative is yes."""
    present = name in scene.names
    return {"category": "presence", "question": presence_question(name),
            "answer": "yes" if present else "no",
            "prior": ["yes"] if kind == "adversarial" and not present else [], "kind": kind}


def absent_of_kind(kind: str, scene: Scene, rng: random.Random) -> str:
    """An object that is not there: any, the most frequent, or the one that belongs there most."""
    if kind == "random":
        return absent_object(scene, rng)
    absent = [name for name in OBJECTS if name not in scene.names]
    partners = [name for name in absent if PARTNER[name] in scene.names]
    if kind == "adversarial" and partners:
        absent = partners
    most = max(POPULARITY[name] for name in absent)
    return rng.choice([name for name in absent if POPULARITY[name] == most])


def training_rows(scene: Scene, index: int, rng: random.Random) -> list[dict]:
    """A caption, a colour and a presence question; every other image's presence answer is yes."""
    thing = rng.choice(scene.things)
    asked = rng.choice(scene.names) if index % 2 == 0 else absent_object(scene, rng)
    return [caption_row(scene), colour_row(thing), presence_row(asked, scene, None)]


def more_rows(scene: Scene, rng: random.Random, *, colours: int, presences: int) -> list[dict]:
    """Further rows for the alignment: colours of different things, as many yes as no."""
    things = rng.sample(scene.things, min(colours, len(scene.things)))
    absent = [name for name in OBJECTS if name not in scene.names]
    asked = rng.choices(scene.names, k=presences) + rng.sample(absent, presences)
    return ([colour_row(thing) for thing in things]
            + [presence_row(name, scene, None) for name in asked])


def evaluation_rows(scene: Scene, index: int, rng: random.Random) -> list[dict]:
    """A caption, a colour, and one presence question of each kind; over the images, half of each
    kind's answers are yes."""
    rows = [caption_row(scene), colour_row(rng.choice(scene.things))]
    for number, kind in enumerate(KINDS):
        yes = (index + number) % 2 == 0
        name = rng.choice(scene.names) if yes else absent_of_kind(kind, scene, rng)
        rows.append(presence_row(name, scene, kind))
    return rows


def image_name(index: int) -> str:
    return f"images/{index + 1:05d}.png"


def row_id(split: str, index: int, row: dict) -> str:
    return f"{split}-{index + 1:05d}-{row['kind'] or row['category']}"


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def vocabulary_truth() -> dict:
    return {"objects": {name: [name, PLURALS[name]] for name in OBJECTS}, "colours": COLOURS,
            "typical": TYPICAL, "partner": PARTNER}


def write_split(folder: Path, scenes: list[Scene], rows: list[list[dict]]) -> None:
    """`folder`/rows.json, truth.json and images/; `rows[i]` belong to `scenes[i]`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    instructions, images, truths = [], {}, {}
    for index, (scene, own) in enumerate(zip(scenes, rows)):
        name = image_name(index)
        draw_scene(scene).save(folder / name)
        images[name] = {"objects": [{"name": t.name, "colour": t.colour, "cell": t.cell}
                                    for t in scene.things]}
        for row in own:
            key = row_id(folder.name, index, row)
            instructions.append({"id": key, "image": name, "conversations": [
                {"from": "human", "value": f"<image>\n{row['question']}"},
                {"from": "gpt", "value": row["answer"]}]})
            truths[key] = {"category": row["category"], "true": [row["answer"]],
                           "prior": row["prior"], "kind": row["kind"]}
    write_json(folder / "rows.json", instructions)
    write_json(folder / "truth.json", {"vocabulary": vocabulary_truth(), "images": images,
                                       "rows": truths})
