# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What calibration and leaving out doubles change on held-out Scenes, before and after, of a calibrated checkpoint:

python benchmarks/scenes_calibration.py --checkpoint src/segcompass_hf/checkpoints/scenes-tiny --num-samples 500

Both are of the same answers. Before: plain confidences of all slots above the threshold. After: what users get.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from transformers import AutoModel, AutoProcessor

import segcompass_hf
from segcompass_hf.data import scenes
from segcompass_hf.data.schema import decode_masks
from segcompass_hf.evaluation import ModelPredictor
from segcompass_hf.files import write_whole
from segcompass_hf.metrics import best_ious, calibration_figures, count_duplicates, score_sample
from segcompass_hf.pages import markdown_table

SPLITS = ("val", "test_pairs", "test_crowded")
COLUMNS = ("masks", "right", "mean score", "calibration error", "ranking", "duplicates", "gIoU")


def measure(predictor: ModelPredictor, rows: list[dict], batch_size: int) -> dict[str, dict[str, float]]:
    """Figures of the answers to rows, `before` and `after`."""
    found: dict[str, list[tuple]] = {"before": [], "after": []}
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        output, sizes, after = predictor.segment(batch)
        original = [row["image"].size[::-1] for row in batch]
        plain = predictor.processor.post_process_segmentation(
            output, original, sizes, duplicate_iou_threshold=2.0, output_heatmaps=False
        )
        for index, row in enumerate(batch):
            targets = decode_masks(row["masks"], original[index])
            confidences = output.slot_logits[index].float().sigmoid()
            for name, answer in (("before", plain[index]), ("after", after[index])):
                masks = answer["masks"].numpy()
                scores = confidences[answer["slots"]] if name == "before" else answer["scores"]
                counts = count_duplicates(masks), score_sample(masks, targets).iou
                found[name].append((scores.tolist(), best_ious(masks, targets), *counts))
    return {name: _figures(answers) for name, answers in found.items()}


def _figures(answers: list[tuple]) -> dict[str, float]:
    scores, ious, duplicates, overlaps = zip(*answers, strict=True)
    figures = calibration_figures(sum(scores, []), sum(ious, []))
    return {**figures, "duplicates": sum(duplicates), "gIoU": float(np.mean(overlaps))}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """One line per split and side."""
    lines = []
    for split, sides in results.items():
        for side, figures in sides.items():
            shown = [f"{figures[n]:.3f}" for n in ("right", "mean_score", "expected_calibration_error", "ranking")]
            lines.append([split, side, figures["num_masks"], *shown, figures["duplicates"], f"{figures['gIoU']:.4f}"])
    return markdown_table(["split", "", *COLUMNS], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(segcompass_hf.bundled_checkpoint()), help="a calibrated one")
    parser.add_argument("--num-samples", type=int, default=500, help="per split")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scenes_calibration"))
    arguments = parser.parse_args()
    model = AutoModel.from_pretrained(arguments.checkpoint).eval()
    calibration = model.config.score_calibration
    if calibration is None:
        parser.error(f"{arguments.checkpoint} is not calibrated; run `segcompass calibrate` on it first.")
    predictor = ModelPredictor(model, AutoProcessor.from_pretrained(arguments.checkpoint))
    results = {}
    for split in SPLITS:
        rows = list(scenes.iterate(split, arguments.num_samples))
        results[split] = measure(predictor, rows, arguments.batch_size)
        print(split, json.dumps(results[split]))
    command = f"python benchmarks/scenes_calibration.py --num-samples {arguments.num_samples}"
    weights = ", ".join(f"{name} {entry['weight']:+.2f}" for name, entry in calibration["features"].items())
    fit = calibration.get("fit") or {}
    text = (
        f"# Scores of scenes-tiny, before and after calibration\n\n{table(results)}\n\n"
        f"{arguments.num_samples} scenes of each split, seed 0. Before: plain confidences, doubles kept. After: what "
        "users get. Right: IoU of 0.5 or more with an object asked for. Calibration error: expected calibration "
        "error, 15 bins of equal width. Ranking: area under the ROC curve, 0.5 says nothing. Duplicates: masks whose "
        "IoU with another of their answer is 0.5 or more.\n\n"
        f"Fitted on {fit.get('num_masks')} masks of {fit.get('dataset')}, which no figure here is of. Weights of the "
        f"standardised features: {weights}.\n\nMade by `{command}`.\n"
    )
    write_whole(arguments.output.with_suffix(".md"), text)
    content = {"results": results, "calibration": calibration}
    write_whole(arguments.output.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
