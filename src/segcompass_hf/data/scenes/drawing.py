"""Scenes, first half: symbolic layouts of coloured shapes, and their pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 112  # pixels
GRID = 8  # places are cells of an 8 x 8 grid, a1 (top left) to h8 (bottom right)
CELL = IMAGE_SIZE // GRID  # pixels

COLORS = {
    "red": (205, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 215),
    "yellow": (230, 215, 50),
    "purple": (145, 50, 180),
    "white": (238, 238, 238),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": (8.0, 9.5), "large": (14.0, 16.5)}  # radius, pixels
MIN_VISIBLE = 0.6  # of each object's own area

# Never drawn in `train` and `val`. Pairs are (color, shape); triples are (size, color, shape).
HELD_OUT_PAIRS = frozenset({("red", "triangle"), ("green", "ring"), ("blue", "cross"), ("yellow", "circle")})
HELD_OUT_TRIPLES = frozenset(
    {
        ("small", "red", "circle"),
        ("large", "red", "square"),
        ("large", "green", "triangle"),
        ("small", "green", "cross"),
        ("large", "blue", "ring"),
        ("small", "blue", "square"),
        ("large", "yellow", "cross"),
        ("small", "yellow", "triangle"),
        ("small", "purple", "ring"),
        ("large", "white", "circle"),
    }
)


@dataclass(frozen=True)
class SceneObject:
    """One shape. Lengths and positions in pixels, `angle` in radians."""

    size: str
    color: str
    shape: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def column(self) -> int:
        return int(self.x) // CELL

    @property
    def row(self) -> int:
        return int(self.y) // CELL

    @property
    def cell(self) -> str:
        """Grid cell of the centre, `a1` to `h8`: column letter from the left, row number from the top."""
        return "abcdefgh"[self.column] + str(self.row + 1)

    @property
    def triple(self) -> tuple[str, str, str]:
        return self.size, self.color, self.shape

    def is_held_out(self, held_out: str) -> bool:
        return (self.color, self.shape) in HELD_OUT_PAIRS if held_out == "pairs" else self.triple in HELD_OUT_TRIPLES


_ALL_TRIPLES = tuple((size, color, shape) for size in SIZES for color in COLORS for shape in SHAPES)
_POOLS = {
    "none": tuple(t for t in _ALL_TRIPLES if t not in HELD_OUT_TRIPLES and t[1:] not in HELD_OUT_PAIRS),
    "triples": tuple(sorted(HELD_OUT_TRIPLES)),
    "pairs": tuple(t for t in _ALL_TRIPLES if t[1:] in HELD_OUT_PAIRS),
}


def sample_layout(
    rng: np.random.Generator, num_objects: tuple[int, int] = (3, 7), held_out: str = "none"
) -> list[SceneObject]:
    """Place objects at random, in raster order of their cells.

    Attributes are correlated (one is often copied from an earlier object), so that relations exist. With `held_out`
    `"triples"` or `"pairs"` the first two objects are of held-out combinations; the others never are.

    Returns an empty list where the objects did not fit; try again.
    """
    wanted = int(rng.integers(num_objects[0], num_objects[1] + 1))
    objects: list[SceneObject] = []
    for _ in range(40 * wanted):
        if len(objects) == wanted:
            break
        pool = _POOLS[held_out if held_out != "none" and len(objects) < 2 else "none"]
        triple = pool[rng.integers(len(pool))]
        if objects and rng.random() < 0.45:
            like, which = objects[rng.integers(len(objects))].triple, rng.integers(3)
            mixed = tuple(like[i] if i == which else triple[i] for i in range(3))
            triple = mixed if mixed in pool else triple
        if any(o.triple == triple for o in objects) and rng.random() < 0.7:
            continue
        radius = float(rng.uniform(*SIZES[triple[0]]))
        x, y = rng.uniform(0.9 * radius, IMAGE_SIZE - 0.9 * radius, size=2)
        # Centres keep off the borders of their cells, so that naming a cell is never a matter of one pixel.
        if min(x % CELL, y % CELL) < 1.5 or max(x % CELL, y % CELL) > CELL - 1.5:
            continue
        new = SceneObject(*triple, float(x), float(y), radius, float(rng.uniform(-0.25, 0.25)))
        if any(new.cell == o.cell for o in objects):
            continue
        if any((new.x - o.x) ** 2 + (new.y - o.y) ** 2 < (0.78 * (new.radius + o.radius)) ** 2 for o in objects):
            continue
        objects.append(new)
    if len(objects) < wanted:
        return []
    return sorted(objects, key=lambda o: (o.row, o.column))


def _shape_mask(shape: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Pixels inside a shape, from coordinates relative to its centre and along its axes."""
    if shape == "circle":
        return u * u + v * v < radius**2
    if shape == "square":
        return (np.abs(u) < 0.86 * radius) & (np.abs(v) < 0.86 * radius)
    if shape == "triangle":
        v = v + 0.15 * radius
        return (v < 0.8 * radius) & (v > 1.9 * np.abs(u) - 1.05 * radius)
    if shape == "cross":
        arm, length = 0.36 * radius, 1.02 * radius
        return ((np.abs(u) < arm) & (np.abs(v) < length)) | ((np.abs(v) < arm) & (np.abs(u) < length))
    distance = u * u + v * v
    return (distance < 1.08 * radius**2) & (distance > (0.52 * radius) ** 2)  # ring


def _background(rng: np.random.Generator) -> np.ndarray:
    """Textured background of shape `(IMAGE_SIZE, IMAGE_SIZE, 3)`: smooth patches, often stripes."""
    cells = int(rng.integers(3, 7))
    low = rng.normal(0, 1, (cells, cells, 3)).astype(np.float32)
    low = 0.4 * low + 0.8 * low.mean(-1, keepdims=True)
    steps = np.linspace(0, cells - 1.001, IMAGE_SIZE).astype(np.float32)
    index, fraction = steps.astype(int), (steps - steps.astype(int))
    rows = low[index] * (1 - fraction)[:, None, None] + low[index + 1] * fraction[:, None, None]
    smooth = rows[:, index] * (1 - fraction)[None, :, None] + rows[:, index + 1] * fraction[None, :, None]
    image = rng.uniform(60, 150) + rng.normal(0, 8, 3).astype(np.float32) + smooth * rng.uniform(8, 20)
    if rng.random() < 0.4:
        direction, frequency = rng.uniform(0, np.pi), rng.uniform(0.25, 0.9)
        axis = np.arange(IMAGE_SIZE, dtype=np.float32)
        phase = (axis[None] * np.cos(direction) + axis[:, None] * np.sin(direction)) * frequency
        image = image + (np.sin(phase) * rng.uniform(4, 14))[..., None]
    return image.astype(np.float32)


def draw(rng: np.random.Generator, objects: list[SceneObject]) -> tuple[np.ndarray, np.ndarray] | None:
    """Draw a layout.

    Returns:
        `(image, ids)`: `(IMAGE_SIZE, IMAGE_SIZE, 3)` uint8 pixels and `(IMAGE_SIZE, IMAGE_SIZE)` uint8 with 0 for
        background and 1 + index for each object's visible pixels; `None` where an object is less than
        `MIN_VISIBLE` visible.
    """
    image, ids = _background(rng), np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    areas = np.zeros(len(objects))
    for index in rng.permutation(len(objects)):
        o = objects[index]
        reach = 1.1 * o.radius + 2
        top, left = max(0, int(o.y - reach)), max(0, int(o.x - reach))
        box = np.s_[top : int(o.y + reach) + 1, left : int(o.x + reach) + 1]
        region = image[box]  # (height, width, 3), a view
        dx = np.arange(left, left + region.shape[1], dtype=np.float32)[None] + 0.5 - o.x
        dy = np.arange(top, top + region.shape[0], dtype=np.float32)[:, None] + 0.5 - o.y
        cos, sin = np.cos(o.angle), np.sin(o.angle)
        inside = _shape_mask(o.shape, dx * cos + dy * sin, dy * cos - dx * sin, o.radius)
        color = np.array(COLORS[o.color], np.float32) * rng.uniform(0.82, 1.08) + rng.normal(0, 8, 3)
        shading = 1 + rng.uniform(-0.012, 0.012) * dx + rng.uniform(-0.012, 0.012) * dy
        region[inside] = (color * shading[..., None])[inside]
        ids[box][inside] = index + 1
        areas[index] = inside.sum()
    visible = np.bincount(ids.ravel(), minlength=len(objects) + 1)[1:]
    if (visible < MIN_VISIBLE * areas).any():
        return None
    image += rng.normal(0, rng.uniform(2, 8), image.shape)
    return image.clip(0, 255).astype(np.uint8), ids
