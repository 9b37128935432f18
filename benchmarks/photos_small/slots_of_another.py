"""What a sample's own slots are worth: gIoU with them, and with those of a sample of another photograph.

    python benchmarks/photos_small/slots_of_another.py CHECKPOINT --dataset runs/photos-small/rows:held_out \\
        --output benchmarks/results/photos_small/slots_of_another

The model reasons for itself, greedy, once for every sample. Then its masks are made again of the same picture (and
the concepts on its patches, where heatmaps read them) with the slots of another sample, with the states at `<REF_POS>`
of another, with both, and with slots of zeros. Intervals, also of the difference, are over photographs. Writes
OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor

from segcompass_hf.evaluation import ModelPredictor, load_dataset_of
from segcompass_hf.evaluation.rows import EvaluationRow, EvaluationRows
from segcompass_hf.files import write_whole
from segcompass_hf.metrics import score_sample
from segcompass_hf.metrics.intervals import bootstrap_interval
from segcompass_hf.pages import markdown_table

VARIANTS = ("own", "slots of another", "states of another", "both of another", "slots of zeros")


def another(rows: list[EvaluationRow]) -> list[int]:
    """For every row of a batch the place of the next one, from half of the batch on, that asks about another image."""
    count, images = len(rows), [row.columns["image_id"] for row in rows]
    found = []
    for place, image in enumerate(images):
        order = ((place + count // 2 + step) % count for step in range(count))
        found.append(next((other for other in order if images[other] != image), place))
    if found == list(range(count)):
        raise SystemExit("a batch holds one photograph alone; take a larger --batch-size.")
    return found


def variants(model: Any, inputs: dict[str, torch.Tensor], others: list[int]) -> Iterator[tuple[str, Any]]:
    """Outputs of `segment` with the parts of `VARIANTS`, each made of the picture's own and those of `others`."""
    own = model.segment(**inputs, do_sample=False, output_image_embeddings=True, output_concepts=True)
    is_image = model.modality_ids(own.sequences) * own.attention_mask
    image = own.image_embeddings, inputs["reshaped_input_sizes"]
    grid = model.concept_grid(model.codebook(own.concepts), is_image, inputs.get("image_token_grids"), *image)
    states, slots = own.reference_states, own.slots
    pairs = (states, slots), (states, slots[others]), (states[others], slots), (states[others], slots[others])
    for name, pair in zip(VARIANTS, (*pairs, (states, torch.zeros_like(slots))), strict=True):
        made = model.predict_masks(*pair, *image, concept_grid=grid)
        maps = {field: made[field] for field in ("heatmap_logits", "slot_logits", "pred_masks")}
        scores = model.score_slots(made.slot_logits, made.pred_masks, own.reasoning_surprisal, image[1])
        yield name, type(own)(**(dict(own) | maps | {"slot_scores": scores}))


def measure(predictor: ModelPredictor, rows: list[EvaluationRow]) -> list[dict[str, Any]]:
    """A record per sample: its kind, photograph, and IoU of every variant."""
    processor, columns = predictor.processor, [row.columns for row in rows]
    inputs = processor(
        images=[row["image"] for row in columns], instruction=[row["instruction"] for row in columns]
    ).to(predictor.model.device)
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    records = [{"kind": row["kind"], "image": row["image_id"], "has target": bool(row["masks"])} for row in columns]
    for name, output in variants(predictor.model, inputs, another(rows)):
        answers = processor.post_process_segmentation(output, *sizes, output_heatmaps=False)
        for record, row, answer in zip(records, rows, answers, strict=True):
            record[name] = score_sample(answer["masks"].numpy(), row.targets, row.ignore).iou
    return records


def figures_of(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """gIoU of every variant and what it loses to `own`, over all samples, those with a target, and by kind."""
    groups = {"all": records, "with target": [record for record in records if record["has target"]]}
    for kind in sorted({record["kind"] for record in records}):
        groups[f"kind: {kind}"] = [record for record in records if record["kind"] == kind]
    found: dict[str, dict[str, Any]] = {}
    for group, own in groups.items():
        images = np.unique([record["image"] for record in own], return_inverse=True)[1]
        found[group] = {"samples": len(own), "photographs": int(images.max(initial=-1)) + 1}
        for name in VARIANTS:
            values = np.array([record[name] for record in own])
            lost = np.array([record["own"] for record in own]) - values
            found[group][name] = {"gIoU": interval(values, images), "lost": interval(lost, images)}
    return found


def interval(values: np.ndarray, images: np.ndarray) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), bootstrap_interval(values, images), strict=True))


def markdown(result: dict[str, Any]) -> str:
    def cell(figure: dict[str, float], form: str = ".3f") -> str:
        return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"

    rows = []
    for group, of in result["figures"].items():
        cells = [cell(of[name]["gIoU"]) for name in VARIANTS]
        rows.append([group, of["samples"], of["photographs"], *cells, cell(of["slots of another"]["lost"], "+.3f")])
    text = (
        f"# Slots of another sample\n\n`{result['command']}`\n\n{result['model']} on {result['dataset']}: gIoU with "
        "the model's own reasoning, and with parts of the answer taken from a sample of another photograph. `lost`: "
        "own less slots of another. Brackets: 95 % intervals over photographs.\n\n"
    )
    return text + markdown_table(["", "samples", "photographs", *VARIANTS, "lost"], rows) + "\n"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint's folder")
    parser.add_argument("--dataset", default="runs/photos-small/rows:held_out", help="as for `segcompass evaluate`")
    parser.add_argument("--num-samples", type=int, help="the first so many, all when left out")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True, help="path of the results without ending")
    given = parser.parse_args()
    model, processor = AutoModel.from_pretrained(given.model).eval(), AutoProcessor.from_pretrained(given.model)
    predictor, named = ModelPredictor(model, processor), load_dataset_of(given.dataset, given.num_samples)
    rows = EvaluationRows(named.dataset, given.num_samples)
    records = []
    for part in np.array_split(np.arange(len(rows)), max(1, len(rows) // given.batch_size)):
        records += measure(predictor, [rows[int(index)] for index in part])
        print(f"{len(records)} of {len(rows)}", file=sys.stderr, flush=True)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "model": Path(given.model).name,
        "dataset": named.name,
        "figures": figures_of(records),
        "records": records,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(given.output.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    write_whole(given.output.with_suffix(".md"), markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
