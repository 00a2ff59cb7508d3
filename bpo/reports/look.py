"""How every figure looks: its theme, a method's colour, marker and dash, and its colours on a dark
page. Imports no library that draws: those take seconds."""

import hashlib
import math
from collections.abc import Iterable
from typing import Any

# seaborn's "colorblind" palette, without the two that are too faint on white
COLOURS = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#949494", "#56b4e9", "#ca9161"]
MARKERS = ["o", "s", "D", "^", "v", "P", "X", "<", "h", ">", "p", "*"]
LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2))]
# name -> its places in the three lists; names that are not here get theirs by their hash
LOOKS = {"base": (5, 0, 0), "sft": (2, 6, 3), "sft_matched": (1, 1, 1),
         "sft_matched_weaken": (7, 3, 4), "sft_compute": (6, 5, 6), "bpo": (0, 2, 0),
         "bpo_weaken": (3, 4, 2), "bpo_dpo_alone": (4, 8, 5),
         "bpo_images": (6, 4, 2), "bpo_images_equal_cost": (4, 1, 2),  # by hash as two others
         "true answer": (0, 0, 0), "prior's answer": (1, 1, 1)}
QUIET = "#6b7178"
# What is not a method's colour, on a dark page; SVG that is a picture follows its page.
DARK = {"#ffffff": "#16181a", "#262626": "#e2e3e0", "#202428": "#e2e3e0", "#303030": "#c9ccce",
        "#3c4147": "#b9bec3", "#6b7178": "#949ba1", "#e6e7e8": "#2c3034", "#d5d8da": "#3a3f44"}
IN_THE_DARK = "<style>@media (prefers-color-scheme: dark) {" + "".join(
    f'[style*="{kind}: {light}"] {{ {kind}: {dark} !important }}'
    for light, dark in DARK.items() for kind in ("fill", "stroke")) + "}</style>"


def theme() -> None:
    """Set the look of every figure drawn from here on."""
    import seaborn  # takes seconds to import, so it is not done where this module is

    seaborn.set_theme(style="ticks", palette=COLOURS, rc={
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10,
        "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.labelsize": 9.5, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
        "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": QUIET, "axes.linewidth": 0.8, "xtick.color": "#3c4147",
        "ytick.color": "#3c4147", "xtick.major.width": 0.8, "ytick.major.width": 0.8,
        "xtick.major.size": 3.5, "ytick.major.size": 3.5, "axes.grid": True,
        "grid.color": "#e6e7e8", "grid.linewidth": 0.8, "axes.axisbelow": True,
        "lines.linewidth": 1.8, "lines.markersize": 5, "hatch.linewidth": 0.8,
        "axes.autolimit_mode": "round_numbers", "axes.xmargin": 0, "axes.ymargin": 0,
        "text.parse_math": False, "figure.facecolor": "white",
    })


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """name -> {"color", "marker", "linestyle"}: of its name alone, unless two unnamed in `LOOKS`
    would look alike, of which the later takes the next free look."""
    sizes, taken = (len(COLOURS), len(MARKERS), len(LINES)), set(LOOKS.values())
    looks = {}
    for name in names:
        if not (look := LOOKS.get(name)):
            start = int(hashlib.sha1(name.encode("utf-8", "surrogatepass")).hexdigest(), 16)
            free = (tuple((start + n) // math.prod(sizes[:k]) % sizes[k] for k in range(3))
                    for n in range(math.prod(sizes)))
            look = next((x for x in free if x not in taken), (0, 0, 0))
            taken.add(look)
        looks[name] = {kind: values[place] for kind, values, place in zip(
            ("color", "marker", "linestyle"), (COLOURS, MARKERS, LINES), look, strict=True)}
    return looks


def colour(method: str) -> str:
    """The colour of a method on every page."""
    return styles([method])[method]["color"]
