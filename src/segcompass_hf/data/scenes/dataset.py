"""Scenes: procedural reasoning segmentation with reference chains of thought; seeded, no downloads.

`scenes.build("val", 500)` gives a `datasets.Dataset` in the row schema; `scenes.iterate` yields the same rows alone,
and `scenes.SceneRows` makes each when it is asked for.
Sample `i` of a split depends on the split, the seed and `i` only, so any subset can be made anywhere.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..datasets_cache import named_cache
from ..schema import encode_mask, row_features
from .drawing import SceneObject, draw, sample_layout
from .instructions import KINDS, Instruction, sample_instruction


@dataclass(frozen=True)
class Split:
    stream: int  # keeps the random streams of the splits apart
    num_objects: tuple[int, int] = (3, 7)
    held_out_objects: str = "none"  # "triples" or "pairs": drawn, and always among the objects meant
    held_out_forms: bool = False


SPLITS = {
    "train": Split(0),
    "val": Split(1),
    "test_combinations": Split(2, held_out_objects="triples"),
    "test_pairs": Split(3, held_out_objects="pairs"),
    "test_compositions": Split(4, held_out_forms=True),
    "test_crowded": Split(5, num_objects=(8, 10)),
}


@dataclass(frozen=True)
class Scene:
    """One sample before encoding: pixels (112, 112, 3) uint8, object ids (112, 112) uint8 (0 = background), layout."""

    image: np.ndarray
    ids: np.ndarray
    objects: list[SceneObject]
    instruction: Instruction


def sample(split: str, index: int, seed: int = 0, kinds: Collection[str] | None = None) -> Scene:
    """Make sample `index` of a split.

    Args:
        split (`str`): one of `SPLITS`.
        index (`int`): which sample.
        seed (`int`): another seed is another data set of the same distribution.
        kinds (`Collection[str]`, *optional*): only instructions of these kinds, in the same proportion to each other.

    Raises:
        ValueError: the split or a kind does not exist, or the split has none of the kinds.
    """
    if split not in SPLITS:
        raise ValueError(f"Scenes has no split {split!r}; choose one of {', '.join(SPLITS)}.")
    _check_kinds(kinds or ())
    settings = SPLITS[split]
    rng = np.random.default_rng([seed, settings.stream, index])
    chosen = KINDS if kinds is None else kinds
    # no form of `count` is held out
    kinds = [k for k in KINDS if k in chosen and not (settings.held_out_forms and k == "count")]
    if not kinds:
        raise ValueError(f"split {split!r} has no instruction of kind {', '.join(chosen) or '(none asked for)'}.")
    shares = np.array([KINDS[kind] for kind in kinds])
    kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
    while True:
        objects = sample_layout(rng, settings.num_objects, settings.held_out_objects)
        instruction = sample_instruction(rng, objects, kind, settings.held_out_forms) if objects else None
        if instruction is None:
            continue
        if settings.held_out_objects != "none" and instruction.targets:
            if not any(objects[i].is_held_out(settings.held_out_objects) for i in instruction.targets):
                continue
        drawn = draw(rng, objects)
        if drawn is not None:
            return Scene(*drawn, objects, instruction)


def _check_kinds(kinds: Collection[str]) -> None:
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise ValueError(f"unknown kinds {sorted(unknown)}; the kinds of Scenes are {', '.join(KINDS)}.")


def to_row(scene: Scene, sample_id: str, split: str, reasoning: bool = True) -> dict[str, Any]:
    """Put a scene into the row schema; instance ids are 1 + the object's place in raster order."""
    targets = scene.instruction.targets
    others = [i for i in range(len(scene.objects)) if i not in targets]
    return {
        "image": Image.fromarray(scene.image),
        "instruction": scene.instruction.text,
        "masks": [encode_mask(scene.ids == i + 1) for i in targets],
        "distractor_masks": [encode_mask(scene.ids == i + 1) for i in others],
        "ignore": None,
        "instance_ids": [i + 1 for i in targets],
        "sample_id": sample_id,
        "image_id": sample_id,
        "source": "scenes",
        "split": split,
        "kind": scene.instruction.kind,
        "is_reasoning": scene.instruction.kind not in ("attribute", "set"),
        "reasoning": scene.instruction.reasoning if reasoning else None,
    }


class SceneRows(Sequence):
    """Rows of a split in the row schema, each made when it is asked for: hundreds of thousands need no memory.

    Row `i` is the same whenever and wherever it is made, so a resumed training sees the rows it would have seen.

    Args:
        split (`str`): one of `SPLITS`.
        num_samples (`int`): number of rows.
        seed (`int`): another seed is another data set of the same distribution.
        without_reasoning (`Collection[str]`): kinds of instruction whose reference reasoning is left out (`None`), as
            in real referring data.
    """

    def __init__(self, split: str, num_samples: int, seed: int = 0, without_reasoning: Collection[str] = ()):
        _check_kinds(without_reasoning)
        self.split, self.num_samples, self.seed = split, num_samples, seed
        self.without_reasoning = frozenset(without_reasoning)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}.")
        index %= len(self)
        scene = sample(self.split, index, self.seed)
        keep = scene.instruction.kind not in self.without_reasoning
        return to_row(scene, f"scenes-{self.split}-{self.seed}-{index:06d}", self.split, reasoning=keep)


def iterate(
    split: str, num_samples: int, seed: int = 0, without_reasoning: Collection[str] = (), start: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield rows `start` to `start + num_samples` of a split, see [`SceneRows`].

    Args:
        split, num_samples, seed, without_reasoning: as of [`SceneRows`].
        start (`int`): index of the first row.
    """
    rows = SceneRows(split, start + num_samples, seed, without_reasoning)
    for index in range(start, start + num_samples):
        yield rows[index]


@named_cache()
def build(split: str, num_samples: int, seed: int = 0, without_reasoning: Collection[str] = ()) -> Any:
    """`datasets.Dataset` with the rows of `iterate`."""
    from datasets import Dataset

    settings = {"split": split, "num_samples": num_samples, "seed": seed, "without_reasoning": list(without_reasoning)}
    return Dataset.from_generator(iterate, gen_kwargs=settings, features=row_features())
