"""Draw samples of Scenes with their instructions, targets and reference reasoning:

python examples/show_scenes.py --output docs/scenes.png
"""

import argparse
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from segcompass_hf.data import scenes
from segcompass_hf.data.schema import decode_masks


def sample_of(split: str, kind: str, seed: int) -> dict:
    return next(row for row in scenes.iterate(split, 200, seed=seed) if row["kind"] == kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="docs/scenes.png")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()

    # One kind of instruction each, the splits in turn.
    splits = ["train", "val", "test_combinations", "test_pairs", "test_compositions", "test_crowded", "val", "train"]
    kinds = ["attribute", "superlative", "relation", "same-as", "ordinal", "set", "count", "no-target"]
    figure = Figure(figsize=(13, 10.2), dpi=80)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.1, wspace=0.06, hspace=0.42)
    for axes, split, kind in zip(figure.subplots(2, 4).flat, splits, kinds, strict=True):
        row = sample_of(split, kind, arguments.seed)
        pixels = np.asarray(row["image"])
        axes.imshow(pixels, interpolation="lanczos")
        for mask in decode_masks(row["masks"], pixels.shape[:2]):
            axes.contour(mask, levels=[0.5], colors="#ffffff", linewidths=3)
            axes.contour(mask, levels=[0.5], colors="#e8910c", linewidths=1.6)
        axes.set_axis_off()
        title = f"{kind}  ({split})\n" + textwrap.fill(f"“{row['instruction']}”", 42)
        axes.set_title(title, fontsize=9.5, loc="left")
        words = textwrap.fill(row["reasoning"], 58)
        axes.text(0, -0.03, words, transform=axes.transAxes, fontsize=7.5, color="#555b66", va="top")
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
