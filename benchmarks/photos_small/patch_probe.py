"""What stands in the way of a concept for every category: how well anything linear reads categories off patches.

    python benchmarks/photos_small/patch_probe.py CHECKPOINT --rows runs/photos-small/rows \\
        --output benchmarks/results/photos_small/patch_probe

A patch shows a category whose objects cover it by half or more, as in `concepts.py`. A logistic regression per
category reads it off (a) what the vision encoder gives the VLM, (b) the VLM's states that the SAE reads and (c) the
SAE's codes, all features together. It is trained on the photographs of the split `train` (without the parts of
photographs, for memory); a fifth of them is kept aside, on which its weight decay and every category's threshold are
chosen. F1 is measured on the split `held_out`. A single feature cannot be expected where no probe reads the category.
Writes OUTPUT.json and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from concepts import HALF, TARGET_F1, whole_photographs  # the sibling file
from seen import is_place, named_objects
from torch.nn.functional import binary_cross_entropy_with_logits
from words import CATEGORIES

from segcompass_hf.data.collator import language_inputs
from segcompass_hf.evaluation import load_dataset_of
from segcompass_hf.files import write_whole
from segcompass_hf.images_segcompass import to_rgb_image
from segcompass_hf.pages import markdown_table
from segcompass_hf.patch_coverage_segcompass import PatchCoverage
from segcompass_hf.training.sae.activations import layer_states

NUMBERS = {name: number for number, name in enumerate(CATEGORIES)}
Patches = tuple[torch.Tensor, torch.Tensor]  # inputs (n, width), and labels (n, num_categories), bool
DECAYS = (1e-4, 1e-3, 1e-2)  # of the weights, for standardised inputs
STEPS = 60  # of L-BFGS
SOURCES = {
    "encoder": "the vision encoder's features",
    "states": "the states that the SAE reads",
    "codes": "the SAE's codes, all features together",
}


@torch.no_grad()
def read(model: Any, processor: Any, rows: Any, batch_size: int) -> Iterator[tuple[dict[str, torch.Tensor], Any]]:
    """Of every photograph its patches as every source has them `(num_patches, width)`, and what they show.

    What they show is bool `(num_patches, num_categories)`.
    """
    coverage, seen = PatchCoverage(processor), []
    hook = model.vlm.model.multi_modal_projector.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        for start in range(0, len(rows), batch_size):
            batch = [rows[place] for place in range(start, min(start + batch_size, len(rows)))]
            images = [to_rgb_image(row["image"], row["sample_id"]) for row in batch]
            inputs = language_inputs(processor, images, [row["instruction"] for row in batch], [""] * len(batch))
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
            states = layer_states(model.vlm, model.config.sae_layer, inputs)
            kinds = model.modality_ids(ids)
            concepts = model.encode_concepts(states, mask, kinds)
            codes = torch.zeros(ids.numel(), model.config.sae_config.d_sae)
            codes[concepts.token_index, concepts.features] = concepts.values.float()
            is_image = kinds.bool() & mask.bool()
            encoded = seen.pop().flatten(0, -2).float().split(is_image.sum(1).tolist())
            for place, row in enumerate(batch):
                tokens = is_image[place]
                found = {"encoder": encoded[place], "states": states[place][tokens].float()}
                found["codes"] = codes.view(*ids.shape, -1)[place][tokens]
                yield found, shown(row, coverage, int(tokens.sum()))
            print(f"{start + len(batch)} of {len(rows)}", file=sys.stderr, flush=True)
    finally:
        hook.remove()


def shown(row: dict[str, Any], coverage: PatchCoverage, count: int) -> torch.Tensor:
    masks: dict[int, Any] = {}
    for words, mask, _ in named_objects(row):
        category = " ".join(word for word in words if not is_place(word))
        if category in NUMBERS:
            masks[NUMBERS[category]] = masks.get(NUMBERS[category], False) | mask
    found = torch.zeros(count, len(NUMBERS), dtype=torch.bool)
    for number, mask in masks.items():
        found[:, number] = coverage(mask[None], count)[0] >= HALF
    return found


class Probe:
    """Logistic regressions, one a category, on standardised inputs `(n, width)`."""

    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor, decay: float):
        self.mean, self.scale = inputs.mean(0), inputs.std(0).clamp(min=1e-4)
        inputs, labels = self._standardised(inputs), labels.float()
        share = labels.mean(0).clamp(1e-6, 1 - 1e-6)
        self.weight = torch.zeros(inputs.shape[1], labels.shape[1], requires_grad=True)
        self.bias = torch.logit(share).requires_grad_()
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=STEPS, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            scores = inputs @ self.weight + self.bias
            of_labels = binary_cross_entropy_with_logits(scores, labels, reduction="sum") / len(inputs)
            loss = of_labels + decay * self.weight.pow(2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    def _standardised(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs - self.mean) / self.scale

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._standardised(inputs) @ self.weight + self.bias


def f1_at(scores: torch.Tensor, labels: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """F1 `(num_categories,)`; nan where nothing has the label."""
    fires = scores >= thresholds
    f1 = 2 * (fires & labels).sum(0) / (fires.sum(0) + labels.sum(0))
    return f1.where(labels.any(0), torch.nan)


def best_thresholds(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every category the threshold with the highest F1 (never reached where nothing has the label), and that F1."""
    order = scores.sort(0, descending=True)
    hits = labels.gather(0, order.indices).cumsum(0)
    f1 = 2 * hits / (torch.arange(1, len(scores) + 1)[:, None] + labels.sum(0))
    best = f1.max(0)
    thresholds = order.values.gather(0, best.indices[None])[0]
    return thresholds.where(labels.any(0), torch.inf), best.values.where(labels.any(0), torch.nan)


def probe(train: Patches, aside: Patches, held_out: Patches) -> dict[str, Any]:
    """F1 of every category on `held_out`; thresholds and decay are chosen on `aside`."""
    tried = []
    for decay in DECAYS:
        fitted = Probe(*train, decay)
        thresholds, f1 = best_thresholds(fitted(aside[0]), aside[1])
        tried.append((f1.nanmean().item(), decay, fitted, thresholds))
    _, decay, fitted, thresholds = max(tried, key=lambda each: each[0])
    measured = f1_at(fitted(held_out[0]), held_out[1], thresholds)
    possible = best_thresholds(fitted(held_out[0]), held_out[1])[1]
    return {
        "decay": decay,
        "f1": {name: _rounded(measured[number]) for name, number in NUMBERS.items()},
        "f1 at the best threshold": {name: _rounded(possible[number]) for name, number in NUMBERS.items()},
    }


def _rounded(value: torch.Tensor) -> float | None:
    return None if value.isnan() else round(value.item(), 3)


def markdown(result: dict[str, Any]) -> str:
    reached = {key: [_count(result[source][key]) for source in SOURCES] for key in ("f1", "f1 at the best threshold")}
    known = [name for name, value in result["states"]["f1"].items() if value is not None]
    read = result["read"]
    lines = [
        "# How well anything linear reads categories off patches",
        "",
        f"`{result['command']}`",
        "",
        f"{result['model']}; {read['train']} photographs to train on, {read['held_out']} held out, in which "
        f"{len(known)} categories have patches that they cover by half. A concept is asked for an F1 of {TARGET_F1}; "
        "so many categories reach it by a logistic regression on",
        "",
        markdown_table(
            ["", *SOURCES.values()],
            [
                ["threshold chosen on training photographs", *reached["f1"]],
                ["best threshold for the photographs held out", *reached["f1 at the best threshold"]],
            ],
        ),
        "",
        markdown_table(
            ["category", *SOURCES.values()],
            [[name, *(f"{result[source]['f1'][name]:.2f}" for source in SOURCES)] for name in known],
        ),
    ]
    return "\n".join(lines) + "\n"


def _count(values: dict[str, float | None]) -> int:
    return sum(value is not None and value >= TARGET_F1 for value in values.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint's folder")
    parser.add_argument("--rows", default="runs/photos-small/rows", help="folder with the splits")
    parser.add_argument("--num-photographs", type=int, help="of each split, all when left out")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True, help="path of the results without ending")
    given = parser.parse_args()
    from transformers import AutoModel

    from segcompass_hf import SegCompassProcessor

    model, processor = AutoModel.from_pretrained(given.model).eval(), SegCompassProcessor.from_pretrained(given.model)
    photographs: dict[str, list] = {}
    for split in ("train", "held_out"):
        rows, _ = whole_photographs(load_dataset_of(f"{given.rows}:{split}").dataset)
        rows = rows.select([place for place, name in enumerate(rows["image_id"]) if "-" not in name])
        rows = rows.select(range(min(len(rows), given.num_photographs or len(rows))))
        photographs[split] = list(read(model, processor, rows, given.batch_size))
    num_aside = max(len(photographs["train"]) // 5, 1)
    parts = photographs["train"][num_aside:], photographs["train"][:num_aside], photographs["held_out"]
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "model": Path(given.model).name,
        "read": {split: len(found) for split, found in photographs.items()},
    }
    for source in SOURCES:
        of_source = [
            (torch.cat([found[source] for found, _ in part]), torch.cat([labels for _, labels in part]))
            for part in parts
        ]
        result[source] = probe(*of_source)
        print(f"{source}: {_count(result[source]['f1'])} categories", file=sys.stderr, flush=True)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(given.output.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    write_whole(given.output.with_suffix(".md"), markdown(result))


if __name__ == "__main__":
    main()
