"""Further views of a training photograph, its mirror image and parts of it, so that few photographs teach more."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
from PIL import Image
from seen import TOO_SMALL, Seen, Thing

from segcompass_hf.data.schema import encode_mask

SMALLEST = 0.55  # of a side: parts of a photograph
TRIES = 20
WHOLE = 0.6  # share of an object from which on it is still itself in a part


class View(NamedTuple):
    """A part of a photograph, mirrored or not; the whole photograph with `box` `(0, 0, width, height)`."""

    box: tuple[int, int, int, int]  # (x0, y0, x1, y1) in pixels of the photograph, ends excluded
    mirrored: bool

    def of_image(self, image: Image.Image) -> Image.Image:
        part = image.crop(self.box)
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else part

    def of_mask(self, mask: np.ndarray) -> np.ndarray:
        """A bool mask `(height, width)` of the photograph, in the view."""
        x0, y0, x1, y1 = self.box
        part = mask[y0:y1, x0:x1]
        return part[:, ::-1] if self.mirrored else part

    def of_seen(self, seen: Seen) -> Seen | None:
        """What the view shows; `None` where it cuts an object of which neither nearly nothing nor most is left.

        Crowds may be cut: they are ignored or listed as many wherever they are.
        """
        shown: list[Thing] = []
        for thing in (*seen.things, *seen.crowds):
            mask = self.of_mask(thing.mask)
            left = int(mask.sum())
            if left == 0:
                continue
            if not thing.is_crowd and left < WHOLE * thing.mask.sum():
                if left >= TOO_SMALL * mask.size:
                    return None
                continue
            shown.append(Thing(thing.category, encode_mask(mask), np.ascontiguousarray(mask), thing.is_crowd))
        return Seen([t for t in shown if not t.is_crowd], [t for t in shown if t.is_crowd])


def views(seen: Seen, size: tuple[int, int], count: int, dice: random.Random) -> list[tuple[View, Seen]]:
    """The photograph itself, its mirror image, then parts that cut no object in two; at most `count`.

    Args:
        size (`tuple[int, int]`): (width, height) of the photograph in pixels.
    """
    width, height = size
    whole = (0, 0, width, height)
    found = [(View(whole, False), seen)]
    if count > 1:
        mirrored = View(whole, True)
        found.append((mirrored, mirrored.of_seen(seen)))
    for _ in range(TRIES * max(0, count - 2)):
        if len(found) == count:
            break
        sides = [round(side * dice.uniform(SMALLEST, 0.9)) for side in size]
        x, y = (dice.randint(0, whole_side - side) for whole_side, side in zip(size, sides, strict=True))
        view = View((x, y, x + sides[0], y + sides[1]), dice.random() < 0.5)
        shown = view.of_seen(seen)
        if shown is not None and shown.things:
            found.append((view, shown))
    return found
