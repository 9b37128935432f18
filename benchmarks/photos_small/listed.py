"""What a model of photos-small sees: the categories that its reasoning lists against those that are there.

    python benchmarks/photos_small/listed.py MODEL --rows runs/photos-small/rows:held_out

MODEL is a folder that the warm-up or a later stage has saved. The first row of every photograph is asked. Precision,
recall and F1 are over pairs of photograph and category, with 95 % intervals over photographs. A category whose objects
are all below 0.08 % of the picture counts as not there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "photos_small"))
from seen import MANY, is_place  # noqa: E402
from words import CATEGORIES  # noqa: E402

from segcompass_hf.evaluation import load_dataset_of  # noqa: E402
from segcompass_hf.metrics.intervals import bootstrap_statistic  # noqa: E402


def listed_categories(reasoning: str) -> set[str]:
    """Categories in the list that a reasoning begins with; what is no category counts for none."""
    found = set()
    for entry in reasoning.removeprefix("<think>").split(".")[0].split(", "):
        found.add(" ".join(word for word in entry.split() if not is_place(word) and word != MANY))
    return found & set(CATEGORIES)


def questions_of(dataset: Any) -> Any:
    """The first row of every photograph, of a `datasets.Dataset`; no picture is read for it."""
    first: dict[str, int] = {}
    for place, image_id in enumerate(dataset["image_id"]):
        first.setdefault(image_id, place)
    return dataset.select(first.values())


class Writer:
    """Answers of a VLM that the warm-up saved, or of a whole model's."""

    def __init__(self, folder: str, max_new_tokens: int = 128):
        from transformers import AutoModelForImageTextToText

        from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor

        self.processor = SegCompassProcessor.from_pretrained(folder)
        whole = json.loads((Path(folder) / "config.json").read_text())["model_type"] == "segcompass"
        self.vlm = SegCompassForReasoningSegmentation.from_pretrained(folder).vlm if whole else None
        self.vlm = self.vlm or AutoModelForImageTextToText.from_pretrained(folder)
        self.vlm.eval()
        self.max_new_tokens = max_new_tokens

    @torch.no_grad()
    def __call__(self, rows: list[dict[str, Any]]) -> list[str]:
        from segcompass_hf.data.collator import language_inputs
        from segcompass_hf.images_segcompass import to_rgb_image

        images = [to_rgb_image(row["image"]) for row in rows]
        batch = language_inputs(self.processor, images, [row["instruction"] for row in rows])
        settings = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        tokenizer = self.processor.tokenizer
        ends = {"eos_token_id": self.processor.end_of_turn_token_id, "pad_token_id": tokenizer.pad_token_id}
        sequences = self.vlm.generate(**batch, **settings, **ends)
        return tokenizer.batch_decode(sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def scores(listed: list[set[str]], there: list[set[str]]) -> dict[str, Any]:
    """Precision, recall and F1 over all pairs, with intervals, and F1 of each category."""
    pairs = list(zip(listed, there, strict=True))
    counts = np.array([(len(a & b), len(a), len(b)) for a, b in pairs])

    def f1(draw: np.ndarray) -> float:
        right, said, present = counts[draw].sum(0)
        return 2 * right / max(1, said + present)

    right, num_listed, num_there = counts.sum(0)
    interval = bootstrap_statistic(f1, len(pairs))
    said, there = (Counter(name for found in sets for name in found) for sets in (listed, there))
    both = Counter(name for one, other in pairs for name in one & other)
    of_category = {name: round(2 * both[name] / (said[name] + there[name]), 3) for name in CATEGORIES if there[name]}
    return {
        "photographs": len(pairs),
        "f1": interval,
        "precision": float(right / max(1, num_listed)),
        "recall": float(right / max(1, num_there)),
        "f1_of_category": of_category,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", default="runs/photos-small/rows:held_out")
    parser.add_argument("--num-photographs", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, help="a JSON file for figures and answers")
    given = parser.parse_args()
    rows = list(questions_of(load_dataset_of(given.rows).dataset))[: given.num_photographs]
    writer, answers, begun = Writer(given.model), [], time.perf_counter()
    for start in range(0, len(rows), given.batch_size):
        answers += writer(rows[start : start + given.batch_size])
    figures = scores([listed_categories(a) for a in answers], [listed_categories(r["reasoning"]) for r in rows])
    figures["seconds"] = round(time.perf_counter() - begun, 1)
    if given.output:
        pairs = [
            {"image": r["image_id"], "asked": r["instruction"], "reference": r["reasoning"], "answer": a}
            for r, a in zip(rows, answers, strict=True)
        ]
        given.output.write_text(json.dumps(figures | {"answers": pairs}, indent=1))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
