# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What explaining costs: `explain` (its own segmentation, attribution, 5 ablations per mask) against `segment` alone;
and how much of what it explains it has measured concept by concept.

Both run on every sample in turn, in one process and on one thread; images are prepared by the processor in both. Time
is CPU time of the process, which other load hardly distorts (wall time on a GPU).

    python benchmarks/explain_cost.py --num-samples 40 --output benchmarks/results/explain/cost

Writes OUTPUT.json and OUTPUT.md.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from timing import clock, clock_name

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor, bundled_checkpoint
from segcompass_hf.data import scenes
from segcompass_hf.explain import explain
from segcompass_hf.metrics.intervals import bootstrap_interval


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a checkpoint's folder; the bundled one when left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-samples", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of Scenes; 0 is the data set that is published")
    parser.add_argument("--output", default="explain_cost", help="path of the results without ending")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    source = arguments.model or bundled_checkpoint()
    model = SegCompassForReasoningSegmentation.from_pretrained(source).eval().to(arguments.device)
    processor = SegCompassProcessor.from_pretrained(source)

    def timed(function) -> tuple[float, object]:
        start = clock(arguments.device)
        result = function()
        return clock(arguments.device) - start, result

    def segment(row):
        inputs = processor(images=row["image"], instruction=row["instruction"]).to(arguments.device)
        output = model.segment(**inputs)
        return processor.post_process_segmentation(output, inputs["original_sizes"], inputs["reshaped_input_sizes"])

    times, shared_out = [], []
    rows = list(scenes.iterate("val", arguments.num_samples + 1, seed=arguments.seed))
    for number, row in enumerate([rows[-1], *rows[:-1]]):  # the first warms up
        alone, _ = timed(lambda row=row: segment(row))
        whole, explanation = timed(lambda row=row: explain(model, processor, row["image"], row["instruction"]))
        if number:
            times.append((alone, whole, len(explanation.masks)))
            shared_out += [mask.quadrature_error for mask in explanation.masks if mask.kept]
    alone, whole, masks = np.array(times).T
    summary = {
        "num_samples": len(times),
        "masks_per_image": float(masks.mean()),
        "clock": clock_name(arguments.device).removesuffix(" time").lower(),
        "segment_seconds": bootstrap_interval(alone),
        "explain_seconds": bootstrap_interval(whole),
        "ratio_of_means": float(whole.mean() / alone.mean()),
        "ratio": {f"p{q}": float(np.quantile(whole / alone, q / 100)) for q in (10, 50, 90)},
        "quadrature_error": {f"p{q}": float(np.quantile(shared_out, q / 100)) for q in (25, 50, 75, 90)},
    }
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    quarters = summary["quadrature_error"]
    text = (
        f"`explain` (attribution and 5 ablations per mask, {masks.mean():.2f} masks per image) takes "
        f"{summary['ratio_of_means']:.2f} times as long as `segment`: {whole.mean():.3f} s against "
        f"{alone.mean():.3f} s of {summary['clock']} time, means of {len(times)} samples, one thread. Ratio per "
        f"sample: median {summary['ratio']['p50']:.2f}, 90 % of samples below {summary['ratio']['p90']:.2f}.\n"
        f"Contributions that were measured of many concepts together only are in size {quarters['p50']:.0%} of the "
        f"change of a mask (median of {len(shared_out)} masks; 75 % of masks below {quarters['p75']:.0%}).\n"
        f"`python benchmarks/explain_cost.py --num-samples {arguments.num_samples} --seed {arguments.seed} --device "
        f"{arguments.device}`\n"
    )
    output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
