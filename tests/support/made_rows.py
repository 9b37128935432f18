"""Small rows and a predictor that costs nothing; as a script, an evaluation of them for the tests to start and kill.

python made_rows.py OUTPUT SECONDS_PER_BATCH
"""

import sys
import time

import numpy as np
from PIL import Image

from segcompass_hf.data.schema import encode_mask
from segcompass_hf.evaluation import Prediction, evaluate_dataset
from segcompass_hf.evaluation.processes import Processes

NUM_ROWS, BATCH_SIZE = 26, 3  # nine batches, the last one of two rows
HEIGHT, WIDTH = 6, 10


def box(left, width, height=HEIGHT):
    """A mask `(HEIGHT, WIDTH)` of `width` columns and `height` rows."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[:height, left : left + width] = True
    return mask


def make_row(index, masks, ignore=None, kind="box", source="made"):
    pixels = np.full((HEIGHT, WIDTH, 3), index % 256, dtype=np.uint8)
    return {
        "image": Image.fromarray(pixels),
        "instruction": f"box {index}",
        "masks": [encode_mask(mask) for mask in masks],
        "distractor_masks": None,
        "ignore": None if ignore is None else encode_mask(ignore),
        "instance_ids": list(range(len(masks))),
        "sample_id": f"made-{index}",
        "image_id": str(index),
        "source": source,
        "split": "val",
        "kind": kind,
        "is_reasoning": False,
        "reasoning": None,
    }


def make_rows(count=NUM_ROWS):
    """Rows with none to six objects, of two kinds and sources."""
    rows = []
    for index in range(count):
        masks = [box(left, 1, height=1 + index % HEIGHT) for left in range(index % 7)]
        rows.append(make_row(index, masks, kind=("many", "few")[index % 2], source=("made", "found")[index % 3 == 0]))
    return rows


class SeededBoxes:
    """A random box per row, drawn from its `sample_id`; remembers the batches it has seen."""

    name = "seeded boxes"

    def __init__(self, seconds=0.0, **settings):
        self.seconds, self.settings, self.batches = seconds, settings, []

    def predict(self, rows):
        self.batches.append([row["sample_id"] for row in rows])
        time.sleep(self.seconds)
        return [self._answer(row) for row in rows]

    @staticmethod
    def _answer(row):
        rng = np.random.default_rng(list(row["sample_id"].encode()))
        masks = np.stack([box(*rng.integers(1, 5, size=3).tolist()) for _ in range(2)])[: rng.integers(3)]
        return Prediction(masks, rng.random(len(masks)).tolist(), reasoning="I see “boxes”.", text="boxes")


if __name__ == "__main__":
    summary = evaluate_dataset(
        SeededBoxes(seconds=float(sys.argv[2])), make_rows(), sys.argv[1], batch_size=BATCH_SIZE, page_samples=0
    )
    assert summary.figures["counts"]["samples"] == NUM_ROWS  # in every process
    Processes.current().finish()
