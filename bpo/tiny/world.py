"""The embedded world: ten everyday objects, eight colours, and how they occur together.

A scene is a list of things on a 2x2 grid. Its statistics are two shares: how often an object has
its typical colour, and how often an object's partner is in the scene as well.
"""

import random
from dataclasses import dataclass

from bpo.study.seeds import seed_for

TYPICAL = {"cup": "blue", "plate": "white", "banana": "yellow", "apple": "red", "fork": "gray",
           "knife": "gray", "leaf": "green", "flower": "pink", "keyboard": "black",
           "mouse": "white"}
OBJECTS = list(TYPICAL)
PAIRS = [("cup", "plate"), ("banana", "apple"), ("fork", "knife"), ("leaf", "flower"),
         ("keyboard", "mouse")]
PAIR_WEIGHTS = [1.6, 1.3, 1.0, 0.8, 0.7]  # how often a pair is drawn: "popular" needs a meaning
PARTNER = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
POPULARITY = {name: weight for pair, weight in zip(PAIRS, PAIR_WEIGHTS) for name in pair}
COLOURS = ["red", "yellow", "green", "blue", "pink", "gray", "black", "white"]
PLURALS = {"knife": "knives", "leaf": "leaves", "mouse": "mice"}  # those that do not end in s
OBJECT_WORDS = {name: [name, PLURALS.get(name, f"{name}s")] for name in OBJECTS}
CELLS = 4  # a 2x2 grid in reading order
SIZES = [24, 26, 28, 30, 32]  # pixels of a 32-pixel cell
SHADES = [0.88, 0.94, 1.0, 1.06, 1.12]
BACKGROUNDS = 6


@dataclass(frozen=True)
class Thing:
    """An object in a cell; `size` and `shade` are indices, `shift` is pixels from the centre."""

    name: str
    colour: str
    cell: int
    size: int
    shade: int
    shift: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]  # in reading order
    background: int

    @property
    def names(self) -> list[str]:
        return [thing.name for thing in self.things]

    @property
    def facts(self) -> list[tuple[str, str]]:
        return [(thing.colour, thing.name) for thing in self.things]

    @property
    def absent(self) -> list[str]:
        return [name for name in OBJECTS if name not in self.names]


def python_generator(seed: int, *purpose: object) -> random.Random:
    """A generator for the many small draws of a scene, where NumPy's is slow."""
    return random.Random(seed_for(seed, *purpose))


def other_colour(colour: str, rng: random.Random) -> str:
    return rng.choice([other for other in COLOURS if other != colour])


def draw_names(partner: float, rng: random.Random) -> list[str]:
    """One or two groups of objects: an object alone, or one with its partner.

    `partner` is the share of objects whose partner is in the scene too. A pair adds two such
    objects and a lone object none, so a group is a pair with probability s / (2 - s).
    """
    groups = rng.choice([1, 2, 2])
    pairs = []
    while len(pairs) < groups:
        pair = rng.choices(PAIRS, PAIR_WEIGHTS)[0]
        if pair not in pairs:
            pairs.append(pair)
    return [name for pair in pairs for name in
            (pair if rng.random() < partner / (2 - partner) else [rng.choice(pair)])]


def arrange(names: list[str], colours: list[str], rng: random.Random) -> Scene:
    """Place the named objects in different cells, with a size, a shade and a jitter each."""
    things = []
    for name, colour, cell in zip(names, colours, rng.sample(range(CELLS), len(names))):
        size = rng.randrange(len(SIZES))
        room = (32 - SIZES[size]) // 2
        shift = (rng.randint(-room, room), rng.randint(-room, room))
        things.append(Thing(name, colour, cell, size, rng.randrange(len(SHADES)), shift))
    return Scene(tuple(sorted(things, key=lambda thing: thing.cell)), rng.randrange(BACKGROUNDS))


def natural_scene(rng: random.Random, *, typical: float, partner: float) -> Scene:
    """A scene with the given share of typical colours and of partners that are present."""
    names = draw_names(partner, rng)
    colours = [TYPICAL[name] if rng.random() < typical else other_colour(TYPICAL[name], rng)
               for name in names]
    return arrange(names, colours, rng)


def counterfactual_scene(rng: random.Random, *, partner: float) -> Scene:
    """As many objects as a natural scene with this `partner` share has, but no typical colour and
    no partner."""
    count = len(draw_names(partner, rng))
    names: list[str] = []
    while len(names) < count:
        name = rng.choice(rng.choices(PAIRS, PAIR_WEIGHTS)[0])
        if name not in names and PARTNER[name] not in names:
            names.append(name)
    return arrange(names, [other_colour(TYPICAL[name], rng) for name in names], rng)


def uniform_scene(rng: random.Random) -> Scene:
    """A scene without statistics: any objects, any colours. The vision tower learns from these."""
    names = rng.sample(OBJECTS, rng.randint(1, CELLS))
    return arrange(names, [rng.choice(COLOURS) for _ in names], rng)
