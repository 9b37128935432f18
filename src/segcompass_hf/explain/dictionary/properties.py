# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What can be said of a word or a patch of a row: the properties that names of concepts are chosen from.

All of them are read off the row: its words and where they stand, its masks, and the patches that its objects cover.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from .objects import normalize_word
from .reading import RowReading, ShownObject

Family = Literal["word", "pair", "role", "place", "position", "surface", "after", "instruction"]

GRID, COLUMNS = 8, "abcdefgh"  # cells of the image along each side, for places
BLOCKS = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (1, GRID), (2, GRID), (GRID, 1), (GRID, 2), (4, GRID), (GRID, 4))
POSITIONS = 8  # words counted from either end of a part of the text
PART_NAMES = {
    "question": "the question",
    "reasoning": "the reasoning",
    "reference": "the position tokens",
    "special": "the template",
}
EDGE, INSIDE = 0.05, 0.75  # share of a patch that objects cover: less is background, more is inside


class Property(NamedTuple):
    """What a name says of a unit; `text` is how it reads, `red square` or `answer 1`."""

    family: Family
    text: str


def word_properties(reading: RowReading) -> Iterator[tuple[Property, np.ndarray]]:
    """Properties of a row's words, each with the words `(n,)` that have it."""
    words = [normalize_word(word) for word in reading.words]
    found: dict[Property, list[int]] = {}

    def say(family: Family, text: str, unit: int) -> None:
        found.setdefault(Property(family, text), []).append(unit)

    for unit, word in enumerate(words):
        say("word", word, unit)
        if unit:
            say("after", f"after “{words[unit - 1]}”", unit)
            if word[:1].isalnum() and words[unit - 1][:1].isalnum():
                say("pair", f"{words[unit - 1]} {word}", unit)
        if unit > 1:
            say("after", f"after “{words[unit - 2]} {words[unit - 1]}”", unit)
    for property_, units in _positions(reading):
        found.setdefault(property_, []).extend(units)
    for unit, number in _mentions(reading, words):
        shown = reading.objects[number]
        for property_ in _object_properties(shown):
            found.setdefault(property_, []).append(unit)
    for number, unit in enumerate(_answers(reading, words), start=1):
        say("role", f"answer {number}", unit)
    everything = np.arange(len(words))
    yield from ((property_, np.unique(units)) for property_, units in found.items())
    yield from ((property_, everything) for property_ in _instruction(reading, words))


def patch_properties(reading: RowReading) -> Iterator[tuple[Property, np.ndarray]]:
    """Properties of a row's patches, each with the patches `(n,)` that have it."""
    found: dict[Property, np.ndarray] = {}

    def say(family: Family, text: str, patches: np.ndarray) -> None:
        found[Property(family, text)] = found.get(Property(family, text), False) | patches

    words = [normalize_word(word) for word in reading.words]
    mentions = dict(_mentions(reading, words))
    order = [mentions[unit] for unit in _answers(reading, words)]
    for number, shown in enumerate(reading.objects):
        for word in shown.words:
            say("word", word, shown.patches)
        for first, second in combinations(shown.words, 2):
            say("pair", f"{first} {second}", shown.patches)
        for property_ in _roles(shown):
            say(*property_, shown.patches)
        if number in order:
            say("role", f"answer {order.index(number) + 1}", shown.patches)
    for property_, patches in _places(reading):
        say(*property_, patches)
    for property_, patches in _surface(reading):
        say(*property_, patches)
    yield from ((property_, np.flatnonzero(patches)) for property_, patches in found.items())
    everything = np.arange(len(reading.patches))
    yield from ((property_, everything) for property_ in _instruction(reading, words))


def _mentions(reading: RowReading, words: list[str]) -> Iterator[tuple[int, int]]:
    """(word, object) wherever a word names one object of the row and no other."""
    named: dict[str, set[int]] = {}
    for number, shown in enumerate(reading.objects):
        for word in shown.words:
            named.setdefault(word, set()).add(number)
    for unit, word in enumerate(words):
        if len(named.get(word, ())) == 1:
            yield unit, min(named[word])


def _answers(reading: RowReading, words: list[str]) -> list[int]:
    """The last word that names each answer, in order of the text: where the answers are given."""
    last = {number: unit for unit, number in _mentions(reading, words) if "answer" in reading.objects[number].roles}
    return sorted(last.values())


def _roles(shown: ShownObject) -> Iterator[Property]:
    for role in shown.roles:
        yield Property("role", role)


def _object_properties(shown: ShownObject) -> Iterator[Property]:
    """Of the words that name an object: what it is in the row, and where its middle lies."""
    yield from _roles(shown)
    if shown.middle is not None:
        yield from (Property("place", text) for text in _blocks(*shown.middle))


def _blocks(x: float, y: float) -> Iterator[str]:
    """Names of the blocks of cells that hold a point, given in [0, 1] of the image's sides."""
    column, row = (min(int(GRID * value), GRID - 1) for value in (x, y))
    for width, height in BLOCKS:
        for left in range(max(0, column - width + 1), min(column, GRID - width) + 1):
            for top in range(max(0, row - height + 1), min(row, GRID - height) + 1):
                yield _block_name(left, top, width, height)


def _block_name(left: int, top: int, width: int, height: int) -> str:
    """As on a chess board seen from above, a to h from the left and 1 to 8 from the top: `place e4`, `place f6–h8`."""
    right, bottom = left + width, top + height
    columns, rows = COLUMNS[left:right], [str(row + 1) for row in range(top, bottom)]
    if height == GRID:
        halves = {COLUMNS[: GRID // 2]: "left half", COLUMNS[GRID // 2 :]: "right half"}
        return halves.get(columns) or (f"columns {columns[0]}–{columns[-1]}" if width > 1 else f"column {columns}")
    if width == GRID:
        if 2 * height == GRID and top in (0, height):
            return "lower half" if top else "upper half"
        return f"rows {rows[0]}–{rows[-1]}" if height > 1 else f"row {rows[0]}"
    first, last = columns[0] + rows[0], columns[-1] + rows[-1]
    return f"place {first}" if first == last else f"place {first}–{last}"


def _places(reading: RowReading) -> Iterator[tuple[Property, np.ndarray]]:
    size = reading.image.size
    found: dict[str, list[int]] = {}
    for patch, box in enumerate(reading.patches):
        if box is None:
            continue
        x, y = (box[0] + box[2]) / 2 / size[0], (box[1] + box[3]) / 2 / size[1]
        for text in _blocks(x, y):
            found.setdefault(text, []).append(patch)
        sides = {"left": box[0] <= 0, "top": box[1] <= 0, "right": box[2] >= size[0], "bottom": box[3] >= size[1]}
        for name, at in sides.items():
            if at:
                found.setdefault(f"{name} border", []).append(patch)
        if any(sides.values()):
            found.setdefault("border of the image", []).append(patch)
    for text, units in found.items():
        mask = np.zeros(len(reading.patches), bool)
        mask[units] = True
        yield Property("place", text), mask


def _surface(reading: RowReading) -> Iterator[tuple[Property, np.ndarray]]:
    if reading.covered is None:
        return
    yield Property("surface", "background"), reading.covered < EDGE
    yield Property("surface", "edge of an object"), (reading.covered >= EDGE) & (reading.covered < INSIDE)
    yield Property("surface", "inside of an object"), reading.covered >= INSIDE
    yield Property("surface", "an object"), reading.covered >= EDGE


def _positions(reading: RowReading) -> Iterator[tuple[Property, list[int]]]:
    parts: dict[str, list[int]] = {}
    for unit, part in enumerate(reading.parts):
        parts.setdefault(part, []).append(unit)
    for part, units in parts.items():
        name = PART_NAMES[part]
        yield Property("position", f"in {name}"), units
        for place, unit in enumerate(units[:POSITIONS], start=1):
            yield Property("position", f"word {place} of {name}"), [unit]
        for place, unit in enumerate(units[: -POSITIONS - 1 : -1], start=1):
            yield Property("position", f"word {place} from the end of {name}"), [unit]
    yield from _sentences(reading, parts.get("reasoning", []))


def _sentences(reading: RowReading, units: list[int]) -> Iterator[tuple[Property, list[int]]]:
    sentences: list[list[int]] = [[]]
    for unit in units:
        sentences[-1].append(unit)
        if reading.words[unit] in ".!?":
            sentences.append([])
    sentences = [sentence for sentence in sentences if sentence]
    for number, sentence in enumerate(sentences, start=1):
        names = [f"sentence {number}"] + (["the last sentence"] if number == len(sentences) else [])
        for name in names:
            yield Property("position", f"in {name}"), sentence
            for place, unit in enumerate(sentence[:POSITIONS], start=1):
                yield Property("position", f"word {place} of {name}"), [unit]
            part, place = 1, 0
            for unit in sentence:
                place += 1
                yield Property("position", f"in part {part} of {name}"), [unit]
                yield Property("position", f"word {place} of a part of {name}"), [unit]
                if reading.words[unit] in ",;:":
                    part, place = part + 1, 0


def _instruction(reading: RowReading, words: list[str]) -> Iterator[Property]:
    question = {word for word, part in zip(words, reading.parts, strict=False) if part == "question"}
    for word in sorted(filter(str.isalnum, question)):
        yield Property("instruction", f"asked with “{word}”")
    if reading.kind:
        yield Property("instruction", f"kind {reading.kind}")
