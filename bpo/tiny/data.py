"""The tiny world's data sets: pictures, rows in the LLaVA instruction layout, the exact truth."""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

from bpo.study.files import to_json, write_whole
from bpo.tiny import language, world
from bpo.tiny.drawing import draw_scene
from bpo.tiny.world import PARTNER, TYPICAL, Scene, Thing, python_generator

KINDS = ("random", "popular", "adversarial")  # of absent objects, as POPE asks for them


def draw_scenes(make_scene: Callable[[random.Random], Scene], count: int, *, seed: int,
                purpose: str, seen: set[str]) -> list[Scene]:
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
    return {"category": "caption", "question": language.DESCRIBE,
            "answer": language.caption(scene.facts), "prior": [], "kind": None}


def colour_row(thing: Thing) -> dict:
    return {"category": "attribute", "question": language.colour_question(thing.name),
            "answer": thing.colour, "prior": [TYPICAL[thing.name]], "kind": None}


def presence_row(name: str, scene: Scene, kind: str | None = None) -> dict:
    """A yes/no question; the prior's answer to an adversarial negative is yes."""
    present = name in scene.names
    return {"category": "presence", "question": language.presence_question(name),
            "answer": "yes" if present else "no",
            "prior": ["yes"] if kind == "adversarial" and not present else [], "kind": kind}


def absent_of_kind(kind: str, scene: Scene, rng: random.Random) -> str:
    """An object that is not there: any, the most frequent, or the one that belongs there most."""
    if kind == "random":
        return rng.choice(scene.absent)
    partners = [name for name in scene.absent if PARTNER[name] in scene.names]
    absent = partners if kind == "adversarial" and partners else scene.absent
    most = max(world.POPULARITY[name] for name in absent)
    return rng.choice([name for name in absent if world.POPULARITY[name] == most])


def training_rows(scene: Scene, index: int, rng: random.Random) -> list[dict]:
    """A caption, a colour and a presence question; every other image's presence answer is yes."""
    thing = rng.choice(scene.things)
    name = rng.choice(scene.absent if index % 2 else scene.names)
    return [caption_row(scene), colour_row(thing), presence_row(name, scene)]


def more_rows(scene: Scene, rng: random.Random, *, colours: int, presences: int) -> list[dict]:
    """Further rows for the alignment: colours of different things, as many yes as no."""
    things = rng.sample(scene.things, min(colours, len(scene.things)))
    names = rng.choices(scene.names, k=presences) + rng.sample(scene.absent, presences)
    return [*map(colour_row, things), *(presence_row(name, scene) for name in names)]


def evaluation_rows(scene: Scene, index: int, rng: random.Random) -> list[dict]:
    """A caption, a colour, and one presence question of each kind; over the images, half of each
    kind's answers are yes."""
    rows = [caption_row(scene), colour_row(rng.choice(scene.things))]
    for number, kind in enumerate(KINDS):
        yes = (index + number) % 2 == 0
        name = rng.choice(scene.names) if yes else absent_of_kind(kind, scene, rng)
        rows.append(presence_row(name, scene, kind))
    return rows


def split_rows(scenes: list[Scene], name: str, seed: int) -> list[list[dict]]:
    """Each scene's rows: three for training, five for an evaluation split."""
    rng = python_generator(seed, "rows", name)
    make = training_rows if name.startswith(("alignment", "preference")) else evaluation_rows
    return [make(scene, index, rng) for index, scene in enumerate(scenes)]


def without_presence(rows: list[list[dict]]) -> list[list[dict]]:
    """The rows of each scene but its yes/no questions."""
    return [[row for row in of_scene if row["category"] != "presence"] for of_scene in rows]


def dosed(typical: float) -> str:
    """The name of the preference rows with a share of typical colours."""
    return f"preference-{typical:g}"


def image_name(index: int) -> str:
    return f"images/{index + 1:05d}.png"


def write_json(file: Path, content: object) -> None:
    write_whole(file, to_json(content, indent=1) + "\n")


def write_split(folder: Path, scenes: list[Scene], rows: list[list[dict]]) -> None:
    """`folder`/rows.json, truth.json and images/; `rows[i]` belong to `scenes[i]`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    instructions, images, truths = [], {}, {}
    for index, (scene, of_scene) in enumerate(zip(scenes, rows, strict=True)):
        name = image_name(index)
        draw_scene(scene).save(folder / name)
        images[name] = {"objects": [{"name": thing.name, "colour": thing.colour, "cell": thing.cell}
                                    for thing in scene.things]}
        for row in of_scene:
            key = f"{folder.name}-{index + 1:05d}-{row['kind'] or row['category']}"
            instructions.append({"id": key, "image": name, "conversations": [
                {"from": "human", "value": f"<image>\n{row['question']}"},
                {"from": "gpt", "value": row["answer"]}]})
            truths[key] = {"category": row["category"], "true": [row["answer"]],
                           "prior": row["prior"], "kind": row["kind"]}
    write_json(folder / "rows.json", instructions)
    write_json(folder / "truth.json", {
        "vocabulary": {"objects": world.OBJECT_WORDS, "colours": world.COLOURS, "typical": TYPICAL,
                       "partner": PARTNER}, "images": images, "rows": truths})
