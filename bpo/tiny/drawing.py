"""Pictures of scenes, 64x64 pixels, with Pillow. Each object has one drawing, in any colour.

A drawing is made once for each (object, colour, size, shade), six times too large and then reduced,
so that edges are smooth; a scene only pastes them.
"""

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from bpo.tiny.world import SHADES, SIZES, Scene

SIDE = 64  # pixels of a picture
CELL = SIDE // 2
OVERSAMPLE = 6
RGB = {"red": (214, 48, 44), "yellow": (247, 208, 48), "green": (58, 158, 72),
       "blue": (44, 102, 208), "pink": (243, 132, 186), "gray": (136, 141, 148),
       "black": (42, 42, 48), "white": (246, 246, 242)}
BACKGROUND_RGB = [(226, 214, 194), (203, 218, 228), (211, 223, 202), (221, 209, 226),
                  (230, 219, 214), (208, 222, 220)]
BROWN = (108, 72, 40)


def shaded(rgb: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    return tuple(min(255, round(value * factor)) for value in rgb)


def arc_points(centre: tuple[float, float], radii: tuple[float, float], start: float, stop: float):
    """25 points of an ellipse from angle `start` to `stop` in degrees; y grows downwards."""
    angles = [math.radians(start + (stop - start) * i / 24) for i in range(25)]
    return [(centre[0] + radii[0] * math.cos(a), centre[1] + radii[1] * math.sin(a))
            for a in angles]


class Sketch:
    """One object, drawn by the method of its name; shapes are given in units of the drawing's side,
    filled and outlined."""

    def __init__(self, side: int, rgb: tuple[int, int, int]):
        self.image = Image.new("RGBA", (side, side), (*rgb, 0))
        self.canvas = ImageDraw.Draw(self.image)
        self.side = side
        self.fill = rgb
        # a dark object needs a lighter line inside it, a light one a darker line around it
        self.line = shaded(rgb, 0.55) if sum(rgb) > 200 else (112, 112, 122)
        self.width = max(2, side // 30)

    def scale(self, points):
        return [(x * self.side, y * self.side) for x, y in points]

    def polygon(self, points, fill=None):
        self.canvas.polygon(self.scale(points), fill or self.fill, self.line, self.width)

    def ellipse(self, box, fill=None):
        self.canvas.ellipse([v * self.side for v in box], fill or self.fill, self.line, self.width)

    def rectangle(self, box, radius=0.0, fill=None):
        self.canvas.rounded_rectangle([v * self.side for v in box], radius * self.side,
                                      fill or self.fill, self.line, self.width)

    def stroke(self, points, width, fill=None):
        self.canvas.line(self.scale(points), fill or self.line, round(width * self.side), "curve")

    def banana(self) -> None:
        outer = arc_points((0.5, 0.26), (0.47, 0.58), 8, 172)
        inner = arc_points((0.5, 0.24), (0.40, 0.24), 172, 8)
        self.polygon(outer + inner)
        self.stroke(arc_points((0.5, 0.26), (0.42, 0.42), 30, 150), 0.02)
        self.ellipse((0.01, 0.22, 0.13, 0.36), BROWN)
        self.ellipse((0.87, 0.22, 0.99, 0.36), BROWN)

    def apple(self) -> None:
        self.stroke([(0.5, 0.34), (0.52, 0.16), (0.60, 0.05)], 0.07, BROWN)
        self.polygon(arc_points((0.34, 0.58), (0.28, 0.36), 90, 300)
                     + arc_points((0.66, 0.58), (0.28, 0.36), 240, 450))
        self.stroke(arc_points((0.32, 0.52), (0.16, 0.18), 190, 250), 0.05, (255, 255, 255))

    def fork(self) -> None:
        self.rectangle((0.42, 0.46, 0.58, 0.98), 0.08)
        self.polygon([
            (0.24, 0.02), (0.33, 0.02), (0.35, 0.28), (0.40, 0.28), (0.45, 0.02), (0.55, 0.02),
            (0.60, 0.28), (0.65, 0.28), (0.67, 0.02), (0.76, 0.02), (0.76, 0.36), (0.64, 0.52),
            (0.36, 0.52), (0.24, 0.36)])

    def knife(self) -> None:
        self.polygon([(0.40, 0.60), (0.40, 0.04), (0.56, 0.10), (0.66, 0.34), (0.66, 0.60)])
        self.rectangle((0.40, 0.58, 0.62, 0.98), 0.08)
        for y in (0.70, 0.84):
            self.ellipse((0.47, y, 0.55, y + 0.08), self.line)

    def keyboard(self) -> None:
        self.rectangle((0.01, 0.24, 0.99, 0.78), 0.07)
        for row in range(3):
            for column in range(6):
                if row == 2 and column in (2, 3):
                    continue
                x, y = 0.08 + column * 0.145, 0.31 + row * 0.145
                self.rectangle((x, y, x + 0.10, y + 0.09), 0.02, self.line)
        self.rectangle((0.37, 0.60, 0.615, 0.69), 0.02, self.line)

    def mouse(self) -> None:
        self.stroke([(0.5, 0.24), (0.52, 0.12), (0.66, 0.09), (0.72, 0.01)], 0.05, (70, 70, 76))
        self.ellipse((0.20, 0.20, 0.80, 0.98))
        self.stroke([(0.21, 0.54), (0.79, 0.54)], 0.035)
        self.stroke([(0.5, 0.21), (0.5, 0.54)], 0.035)
        self.rectangle((0.45, 0.29, 0.55, 0.45), 0.05, self.line)

    def cup(self) -> None:
        self.ellipse((0.60, 0.30, 0.98, 0.74))
        self.ellipse((0.70, 0.40, 0.88, 0.64), (*self.fill, 0))
        self.polygon([(0.06, 0.20), (0.76, 0.20), (0.66, 0.94), (0.16, 0.94)])
        self.ellipse((0.06, 0.10, 0.76, 0.30), shaded(self.line, 0.8))

    def plate(self) -> None:
        self.ellipse((0.02, 0.02, 0.98, 0.98))
        self.ellipse((0.22, 0.22, 0.78, 0.78), shaded(self.fill, 0.90))

    def leaf(self) -> None:
        self.polygon([(0.04, 0.96), (0.10, 0.52), (0.30, 0.22), (0.62, 0.06), (0.97, 0.03),
                     (0.94, 0.38), (0.78, 0.70), (0.48, 0.90)])
        self.stroke([(0.05, 0.95), (0.86, 0.14)], 0.045)
        for t in (0.28, 0.48, 0.68):
            x, y = 0.05 + 0.81 * t, 0.95 - 0.81 * t
            self.stroke([(x, y), (x + 0.01, y - 0.24 * (1.2 - t))], 0.03)
            self.stroke([(x, y), (x + 0.24 * (1.2 - t), y - 0.01)], 0.03)

    def flower(self) -> None:
        for i in range(6):
            x, y = arc_points((0.5, 0.5), (0.28, 0.28), i * 60 - 90, i * 60)[0]
            self.ellipse((x - 0.21, y - 0.21, x + 0.21, y + 0.21))
        self.ellipse((0.35, 0.35, 0.65, 0.65), BROWN)


@cache
def drawing(name: str, colour: str, size: int, shade: int) -> tuple[Image.Image, Image.Image]:
    """(RGB picture, coverage) of one object; `size` and `shade` index SIZES and SHADES."""
    sketch = Sketch(SIZES[size] * OVERSAMPLE, shaded(RGB[colour], SHADES[shade]))
    getattr(sketch, name)()
    small = sketch.image.resize((SIZES[size], SIZES[size]), Image.Resampling.BOX)
    return small.convert("RGB"), small.getchannel("A")


@cache
def background(index: int) -> Image.Image:
    """A pale colour, a little darker towards the bottom."""
    rows = np.linspace(1.03, 0.95, SIDE)[:, None, None]
    pixels = np.clip(np.array(BACKGROUND_RGB[index])[None, None] * rows, 0, 255)
    return Image.fromarray(np.broadcast_to(pixels, (SIDE, SIDE, 3)).astype(np.uint8))


def draw_scene(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of 64x64 pixels."""
    picture = background(scene.background).copy()
    for thing in scene.things:
        pixels, coverage = drawing(thing.name, thing.colour, thing.size, thing.shade)
        margin = (CELL - SIZES[thing.size]) // 2
        left = thing.cell % 2 * CELL + margin + thing.shift[0]
        top = thing.cell // 2 * CELL + margin + thing.shift[1]
        picture.paste(pixels, (left, top), coverage)
    return picture
