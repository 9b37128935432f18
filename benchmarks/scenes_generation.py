# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Scenes made per second of one core, by split:

python benchmarks/scenes_generation.py --num-samples 500
"""

import argparse
import time
from pathlib import Path

from segcompass_hf.data import scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=500, help="per split")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scenes_generation.md"))
    arguments = parser.parse_args()
    lines = ["| split | drawn, per CPU second | as rows with RLE masks, per CPU second |", "|---|---|---|"]
    for split in scenes.SPLITS:
        start = time.process_time()
        for index in range(arguments.num_samples):
            scenes.sample(split, index)
        drawn = arguments.num_samples / (time.process_time() - start)
        start = time.process_time()
        for _ in scenes.iterate(split, arguments.num_samples):
            pass
        rows = arguments.num_samples / (time.process_time() - start)
        lines.append(f"| {split} | {drawn:.0f} | {rows:.0f} |")
    command = f"python benchmarks/scenes_generation.py --num-samples {arguments.num_samples}"
    arguments.output.write_text("\n".join([*lines, "", f"Made by `{command}`, one core.", ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
