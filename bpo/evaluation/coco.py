"""COCO's annotation files: which object classes are in which image, instances and captions joined.

The files of 2014 have 150 MB and more: they are streamed, and what is not needed is not kept.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson

from bpo.evaluation.words import Lexicon
from bpo.params import Refusal


@dataclass
class Scene:
    """An image of COCO's annotations: its file name and the classes that are there."""

    file: str
    present: set[str]


def image_key(name: Any) -> str:
    """COCO's image number without zeros, however it is written (310196, "310196",
    "val2014/COCO_val2014_000000310196.jpg"); of other names the file name itself."""
    last = str(name).replace("\\", "/").rsplit("/", 1)[-1]
    number = re.fullmatch(r"(?:COCO_\w+?_)?0*(\d+)(?:\.\w+)?", last)
    return number[1] if number else last


def read(instances: Sequence[Path], captions: Sequence[Path], lexicon: Lexicon
         ) -> dict[str, Scene]:
    """image key -> scene: the instances' classes and the objects that reference captions name.

    Several files of a kind are joined. Raises Refusal where one breaks off, lacks a field or has a
    class without synonyms.
    """
    scenes: dict[str, Scene] = {}
    for file in instances:
        names = {c["id"]: c["name"] for c in _items(file, "categories", ("id", "name"))}
        known_classes(names.values(), lexicon, where=file)
        for image in _items(file, "images", ("id", "file_name")):
            scenes[image_key(image["id"])] = Scene(image["file_name"], set())
        for found in _items(file, "annotations", ("image_id", "category_id")):
            scene, name = scenes.get(image_key(found["image_id"])), names.get(found["category_id"])
            if scene is None or name is None:
                raise Refusal(f"{file}: an annotation is of image {found['image_id']} and category "
                              f"{found['category_id']}, which the file does not list; get the "
                              "whole file")
            scene.present.add(name)
    for file in captions:
        for told in _items(file, "annotations", ("image_id", "caption")):
            if (scene := scenes.get(image_key(told["image_id"]))) is not None:
                scene.present.update(lexicon.objects(told["caption"]))
    return scenes


def known_classes(names: Collection[str], lexicon: Lexicon, *, where: Path) -> set[str]:
    """The names as a set; raises Refusal for a class that the synonyms do not have."""
    if strange := sorted(set(names) - lexicon.classes):
        raise Refusal(f"{where}: no synonyms are known for {', '.join(map(repr, strange[:5]))}; "
                      "give a synonym file with a line for each class")
    return set(names)


def _items(file: Path, part: str, needed: Sequence[str]) -> Iterator[dict[str, Any]]:
    empty = True
    try:
        with file.open("rb") as stream:
            for item in ijson.items(stream, f"{part}.item", use_float=True):
                empty = False
                yield checked(item, needed, f"{file}, {part}")
    except (ijson.JSONError, OSError) as error:
        raise Refusal(f"{file}: is no whole JSON file ({str(error).splitlines()[0]}); get it "
                      "again") from None
    if empty and part != "annotations":
        raise Refusal(f"{file}: lists no {part}; give a file in the layout of COCO's annotations")


def checked(entry: Any, needed: Sequence[str], where: str) -> dict[str, Any]:
    """The entry; raises Refusal where it is none or lacks a field."""
    lost = [k for k in needed if not isinstance(entry, dict) or k not in entry]
    if lost:
        raise Refusal(f"{where}: an entry lacks {', '.join(lost)}; give the official file")
    return entry
