"""What is to be seen in a photograph, by its annotations: objects, places, an order, and the list that reasoning
begins with."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from words import CATEGORIES, COLORS

from segcompass_hf.data.builders.build_report import RowProblem
from segcompass_hf.data.builders.coco_instances import CocoInstances
from segcompass_hf.data.schema import decode_mask
from segcompass_hf.token_places import Name

GRID = 6  # columns a to f and rows 1 to 6 of the places
TOO_SMALL = 0.0008  # share of the picture: a fifth of an image token's; such objects are not listed
MOST_PLACES = 16  # in a list, of all categories together
MANY = "many"
_PLACE = re.compile(r"[a-f][1-6]|\+\d+")
MOST_OF_A_CATEGORY = 5  # places of a category in a list
COLOR_SHARE = 0.5  # of an object's pixels that have its colour
BLACK, BROWN, WHITE, PALE = 55, 150, 190, 45  # of 255: brightness below, below, above; saturation below
_HUES = ((15, "orange"), (40, "yellow"), (68, "green"), (165, "blue"), (255, "purple"), (290, "pink"), (335, "red"))


def is_place(word: str) -> bool:
    """Whether a word of a list is a place, `c4`, or how many more there are, `+2`."""
    return _PLACE.fullmatch(word) is not None


def place_of(x: float, y: float) -> str:
    """The cell of a point in [0, 1] of the picture's sides: `c4` is the third column, the fourth row."""
    column, row = (min(GRID - 1, int(GRID * value)) for value in (x, y))
    return f"{chr(ord('a') + column)}{row + 1}"


@dataclass
class Thing:
    """One annotated object.

    Args:
        category (`str`): Of the 80.
        rle (`dict`): Its mask as COCO RLE.
        mask (`np.ndarray` of shape `(height, width)`): Bool.
    """

    category: str
    rle: dict[str, Any]
    mask: np.ndarray
    is_crowd: bool = False
    area: float = field(init=False)  # share of the picture
    center: tuple[float, float] = field(init=False)  # (x, y) in [0, 1] of the picture's sides

    def __post_init__(self):
        rows, columns = np.nonzero(self.mask)
        height, width = self.mask.shape
        self.area = len(rows) / (height * width)
        self.center = (float(columns.mean() + 0.5) / width, float(rows.mean() + 0.5) / height)

    @property
    def place(self) -> str:
        """The cell of its centre."""
        return place_of(*self.center)


@dataclass
class Seen:
    """The objects of a photograph in the order in which the rows of photos-small number them.

    Of every listed category, in the order of COCO: those whose place is said, from left to right, then the others;
    behind all of them the objects of categories too small to be listed.

    Args:
        things (`list[Thing]`): All that is annotated, no crowds.
        crowds (`list[Thing]`): Regions with many of a category.
    """

    things: list[Thing]
    crowds: list[Thing]
    said: dict[str, int] = field(init=False)  # listed category -> how many of its objects have their place said

    def __post_init__(self):
        visible = {name: [t for t in self.of(name) if t.area >= TOO_SMALL] for name in CATEGORIES}
        crowded = {crowd.category for crowd in self.crowds}
        listed = [name for name in CATEGORIES if visible[name] or name in crowded]
        most = MOST_OF_A_CATEGORY
        while most > 1 and sum(min(most, len(visible[name])) for name in listed) > MOST_PLACES:
            most -= 1
        self.said, ordered = {}, []
        for name in listed:
            largest = sorted(visible[name], key=lambda thing: -thing.area)[:most]
            ordered += sorted(largest, key=lambda thing: thing.center)
            ordered += [thing for thing in self.of(name) if not any(thing is one for one in largest)]
            self.said[name] = len(largest)
        self.things = ordered + [thing for thing in self.things if thing.category not in self.said]

    def of(self, *categories: str) -> list[Thing]:
        return [thing for thing in self.things if thing.category in categories]

    def told_apart(self, category: str) -> list[Thing]:
        """All objects of a category, if each has its place said; else none: they cannot be compared or counted."""
        found = self.of(category)
        whole = self.said.get(category) == len(found) and category not in {crowd.category for crowd in self.crowds}
        return found if whole else []

    def present(self) -> set[str]:
        """Categories with anything annotated, however small."""
        return {thing.category for thing in (*self.things, *self.crowds)}

    def listing(self) -> str:
        """`person b3 d2 +4, cup a5`: listed categories, places, how many more; `many` stands for a crowd."""
        entries = []
        for name, count in self.said.items():
            places = [thing.place for thing in self.of(name)[:count]]
            places += [f"+{more}"] if (more := len(self.of(name)) - count) else []
            places += [MANY] if name in {crowd.category for crowd in self.crowds} else []
            entries.append(" ".join([name, *places]))
        return ", ".join(entries) or "nothing"


def read_seen(instances: CocoInstances, image_id: int | str, names: dict[Any, str]) -> Seen | None:
    """The objects of a photograph; `None` where one of them has no mask, or none that can be used.

    Args:
        names (`dict`): Category id -> name.
    """
    things: list[Thing] = []
    for number in instances.of_image.get(image_id, ()):
        try:
            rle = instances.rle(number, image_id)
            crowd = instances.is_crowd(number)
        except RowProblem:
            return None
        things.append(Thing(names[instances.annotations[number]["category_id"]], rle, decode_mask(rle), crowd))
    return Seen([t for t in things if not t.is_crowd], [t for t in things if t.is_crowd])


def color_of(image: Image.Image, thing: Thing) -> str | None:
    """The colour that at least half of an object's pixels have; `None` where there is none."""
    hue, saturation, value = (channel[thing.mask] for channel in np.moveaxis(np.asarray(image.convert("HSV")), 2, 0))
    degrees = hue.astype(float) * 360 / 256
    names = np.full(len(degrees), COLORS.index("red"))
    for start, name in _HUES:
        names[degrees >= start] = COLORS.index(name)
    names[(degrees >= 10) & (degrees < 45) & (value < BROWN)] = COLORS.index("brown")
    names[saturation < PALE] = COLORS.index("gray")
    names[(saturation < PALE) & (value > WHITE)] = COLORS.index("white")
    names[value < BLACK] = COLORS.index("black")
    counts = np.bincount(names, minlength=len(COLORS))
    return COLORS[counts.argmax()] if counts.max() >= COLOR_SHARE * counts.sum() else None


def named_objects(row: dict[str, Any]) -> list[tuple[list[str], np.ndarray, tuple[str, ...]]]:
    """Every object of a row for a concept dictionary: words that name it, its mask and its role.

    What is too small to be listed has no words. Regions with many of a category are no objects; see [`is_crowded`].
    """
    words: dict[int, list[str]] = {}
    for name in sorted(named_words(row), key=lambda name: is_place(name.words)):  # the category before the place
        for number in name.objects:
            words.setdefault(number, []).extend(name.words.split())
    masks = [*row["masks"], *(row.get("distractor_masks") or [])]
    roles = [("answer",)] * len(row["masks"]) + [()] * (len(masks) - len(row["masks"]))
    return [
        (words.get(i, []), decode_mask(mask), role) for i, (mask, role) in enumerate(zip(masks, roles, strict=True))
    ]


def is_crowded(row: dict[str, Any]) -> bool:
    """Whether its photograph has a region with many of a category, of which rows do not hold the mask."""
    return MANY in re.split(r"[ ,]+", (row.get("reasoning") or "").split(".")[0])


def named_words(row: dict[str, Any]) -> list[Name]:
    """Names of a row's objects, read from the list that its reasoning begins with: categories, and places.

    The n-th object of the list is object n of `instance_ids`; the distractors are the others in their order.
    """
    ids = list(row["instance_ids"])
    total = len(row["masks"]) + len(row.get("distractor_masks") or [])
    ids += [number for number in range(1, total + 1) if number not in ids]
    objects: dict[str, list[int]] = {}
    number = 0
    listed = (row.get("reasoning") or "").split(".")[0]
    for entry in listed.split(", ") if total else ():
        words = entry.split()
        places = [word for word in words if is_place(word)]
        name = " ".join(word for word in words if word not in (*places, MANY))
        for place in places:
            for _ in range(int(place) if place.startswith("+") else 1):
                number += 1
                objects.setdefault(name, []).append(ids.index(number))
                if not place.startswith("+"):
                    objects.setdefault(place, []).append(ids.index(number))
    return [Name(words, tuple(found)) for words, found in objects.items()]
