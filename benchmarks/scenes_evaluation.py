# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Held-out figures on Scenes for one checkpoint, with baselines, ablations and where the loss comes from.

    python benchmarks/scenes_evaluation.py --model bundled --num-samples 500 --output benchmarks/results/scenes.json

Greedy decoding, slots chosen by confidence only, masks at the original image size, union of the predicted masks
against union of the targets. The JSON is written after every split; a second run of the same command on the same
checkpoint and samples continues after the last finished split. A table stands beside it, in a `.md` of the same name.
"""

import argparse
import hashlib
import json
import logging
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scenes_evaluation_report import markdown_report, summarize  # the sibling file

import segcompass_hf
from segcompass_hf.data import scenes
from segcompass_hf.data.schema import decode_masks
from segcompass_hf.files import write_whole
from segcompass_hf.metrics import SampleScore, score_sample

logger = logging.getLogger("scenes_evaluation")

DEFAULT_SPLITS = ["val", "test_combinations", "test_pairs", "test_compositions", "test_crowded"]


def read_steps(reasoning: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """What a chain of thought says it sees, and what it answers.

    Args:
        reasoning (`str`): `c2 large blue square yes, e4 small red square no. ... answer 1 c2.`

    Returns:
        `(objects, answer)`: the objects of the first step without their verdicts, and the words of the answer.
    """
    text = reasoning.lower()
    first = text.split(".")[0]
    objects = frozenset(" ".join(part.split()[:4]) for part in first.split(",") if part.strip())
    _, found, answer = text.rpartition("answer")
    words = answer.split(".")[0].replace(",", " ").replace(":", " ").split()
    return objects, tuple(words) if found else ("no answer",)


def is_well_formed(completion: list[int], tokenizer: Any, num_slots: int, end_ids: set[int]) -> bool:
    """Whether generated ids are `<think>` reasoning `</think>`, exactly `num_slots` `<REF_POS>`, and the end."""
    think, close, ref = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<REF_POS>"])
    ends = [position for position, token in enumerate(completion) if token in end_ids]
    if not ends or completion[0] != think or close not in completion:
        return False
    closing = completion.index(close)
    reasoning = completion[1:closing]
    return (
        completion[closing + 1 : ends[0]] == [ref] * num_slots
        and not {think, ref} & set(reasoning)
        and bool(tokenizer.decode(reasoning).strip())
    )


class ScenesEvaluator:
    """Every figure of one split, batch by batch.

    Args:
        model (`SegCompassForReasoningSegmentation`): The checkpoint.
        processor (`SegCompassProcessor`): Its processor.
        max_new_tokens (`int`): Limit of a completion, in tokens.
        seed (`int`): Draws the random object of the baseline.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int = 200, seed: int = 0):
        self.model, self.processor = model.eval(), processor
        self.max_new_tokens, self.seed = max_new_tokens, seed
        end = model.generation_config.eos_token_id
        self.end_ids = set(end) if isinstance(end, (list, tuple)) else {end}
        self.end_ids.add(processor.tokenizer.eos_token_id)

    def evaluate(self, rows: list[dict[str, Any]], batch_size: int = 32) -> dict[str, Any]:
        """Figures over `rows` (Scenes rows with their reference reasoning)."""
        return summarize(self.evaluate_records(rows, batch_size))

    @torch.inference_mode()
    def evaluate_records(self, rows: list[dict[str, Any]], batch_size: int = 32) -> list[dict[str, Any]]:
        """What every sample contributes: scores of all variants, and whether its text was right and well-formed."""
        records = []
        num_batches = max(1, min(-(-len(rows) // batch_size), len(rows) // 2))  # no batch of one: nothing to shuffle
        for number, indices in enumerate(np.array_split(np.arange(len(rows)), num_batches)):
            records += self._evaluate_batch([rows[i] for i in indices], int(indices[0]))
            logger.info("batch %d of %d", number + 1, num_batches)
        return records

    def _evaluate_batch(self, rows: list[dict[str, Any]], first_index: int) -> list[dict[str, Any]]:
        sizes = [row["image"].size[::-1] for row in rows]
        targets = [decode_masks(row["masks"], size) for row, size in zip(rows, sizes, strict=True)]
        others = [decode_masks(row["distractor_masks"], size) for row, size in zip(rows, sizes, strict=True)]
        records = [
            {"kind": row["kind"], "scores": self._baselines(target, other, first_index + offset)}
            for offset, (row, target, other) in enumerate(zip(rows, targets, others, strict=True))
        ]
        inputs = self._inputs(rows)
        own = self.model.segment(**inputs, max_new_tokens=self.max_new_tokens, output_image_embeddings=True)
        free = self.model.segment(
            **self._without_image_encoding(inputs, own),
            max_new_tokens=self.max_new_tokens,
            constrain_format=False,
        )
        results = self._post_process(own, inputs)
        prompt_length = inputs["input_ids"].shape[1]
        for index, (record, row) in enumerate(zip(records, rows, strict=True)):
            (seen, answer), (true_seen, true_answer) = map(read_steps, (results[index]["reasoning"], row["reasoning"]))
            record["objects_right"], record["answer_right"] = seen == true_seen, answer == true_answer
            completion = free.sequences[index, prompt_length:].tolist()
            slots = self.model.config.num_slots
            record["well_formed"] = is_well_formed(completion, self.processor.tokenizer, slots, self.end_ids)
        variants = {"own reasoning": results}
        for name, output in self._variants(rows, targets, inputs, own):
            variants[name] = self._post_process(output, inputs)
        for name, results in variants.items():
            for record, result, target in zip(records, results, targets, strict=True):
                record["scores"][name] = score_sample(np.asarray(result["masks"]), target)
        return records

    def _baselines(self, targets: np.ndarray, others: np.ndarray, index: int) -> dict[str, SampleScore]:
        """Scores of answers that need no model."""
        objects = np.concatenate([targets, others])
        chosen = np.random.default_rng([self.seed, index]).integers(len(objects))
        guesses = {
            "everything": np.ones_like(objects[0]),
            "all objects": objects,
            "one random object": objects[chosen],
        }
        return {name: score_sample(guess, targets) for name, guess in guesses.items()}

    def _variants(self, rows, targets, inputs, own) -> Iterator[tuple[str, Any]]:
        """Ablations of the same checkpoint on the states of its own reasoning, and two upper bounds."""
        emb, area = own.image_embeddings, inputs["reshaped_input_sizes"]
        states, slots = own.reference_states, own.slots

        def from_states(reference_states: torch.Tensor, slots: torch.Tensor) -> Any:
            out = self.model.predict_masks(reference_states, slots, emb, area)
            return replace(
                own, heatmap_logits=out.heatmap_logits, slot_logits=out.slot_logits, pred_masks=out.pred_masks
            )

        # Another sample's slots, from half a batch away.
        yield "slots shuffled", from_states(states, slots.roll(max(1, len(rows) // 2), dims=0))
        yield "slots zeroed", from_states(states, torch.zeros_like(slots))
        yield "reference states zeroed", from_states(torch.zeros_like(states), slots)

        reference = self._inputs(rows, reasoning=[row["reasoning"] for row in rows])
        out = self.model(**self._without_image_encoding(reference, own, drop=("labels",)))
        yield (
            "reference reasoning",
            replace(own, heatmap_logits=out.heatmap_logits, slot_logits=out.slot_logits, pred_masks=out.pred_masks),
        )
        labels = self._inputs(rows, masks=targets, overflow="merge")
        soft = labels["mask_labels"].clamp(0.02, 0.98)
        exists = torch.arange(soft.shape[1], device=soft.device) < labels["num_objects"][:, None]
        slot_logits = torch.where(exists, 100.0, -100.0)
        yield (
            "ideal masks",
            replace(own, heatmap_logits=soft.logit(), slot_logits=slot_logits, pred_masks=soft.logit()),
        )

    def _inputs(self, rows: list[dict[str, Any]], **kwargs: Any) -> dict[str, torch.Tensor]:
        inputs = self.processor(
            images=[row["image"] for row in rows],
            instruction=[row["instruction"] for row in rows],
            return_tensors="pt",
            **kwargs,
        )
        return {key: value.to(self.model.device) for key, value in inputs.items()}

    @staticmethod
    def _without_image_encoding(inputs, own, drop: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
        """The inputs with the SAM features of `own` in place of its pixels, so that images are encoded once."""
        kept = {key: value for key, value in inputs.items() if key not in ("sam_pixel_values", *drop)}
        return kept | {"image_embeddings": own.image_embeddings}

    def _post_process(self, output: Any, inputs: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        return self.processor.post_process_segmentation(
            output, original_sizes=inputs["original_sizes"], reshaped_input_sizes=inputs["reshaped_input_sizes"]
        )


def replace(output: Any, **fields: Any) -> Any:
    """A copy of a `ModelOutput` with other values for some fields."""
    return type(output)(**(dict(output) | fields))


def checkpoint_digest(path: Path) -> str:
    """Changes with any file of a checkpoint that decides what it does."""
    hasher = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*.json")]):
        hasher.update(file.name.encode() + file.read_bytes())
    return hasher.hexdigest()


def samples_digest(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Changes with the samples or the settings."""
    hasher = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for row in rows:
        hasher.update(row["image"].tobytes() + repr((row["instruction"], row["masks"], row["reasoning"])).encode())
    return hasher.hexdigest()


def finished_splits(output: Path, checkpoint: str) -> dict[str, Any]:
    """Splits that an earlier run on the same checkpoint finished."""
    if not output.is_file():
        return {}
    report = json.loads(output.read_text(encoding="utf-8"))
    return report["splits"] if report["checkpoint"] == checkpoint else {}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bundled", help="folder of a checkpoint, or `bundled` for scenes-tiny")
    parser.add_argument("--splits", nargs="+", default=DEFAULT_SPLITS, choices=list(scenes.SPLITS))
    parser.add_argument("--num-samples", type=int, default=500, help="samples per split")
    parser.add_argument("--batch-size", type=int, default=32, help="at least 2: slots are shuffled within a batch")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="limit of a completion, in tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the random-object baseline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scenes.json"))
    options = parser.parse_args(arguments)
    if min(options.batch_size, options.num_samples) < 2:
        parser.error("--batch-size and --num-samples must be at least 2: slots are shuffled between samples")
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Evaluate what the command line asks for; returns the report that was written."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = parse_arguments(arguments)
    path = Path(segcompass_hf.bundled_checkpoint() if options.model == "bundled" else options.model)
    model = transformers.AutoModel.from_pretrained(path).to(options.device)
    processor = transformers.AutoProcessor.from_pretrained(path)
    evaluator = ScenesEvaluator(model, processor, options.max_new_tokens, options.seed)
    checkpoint = checkpoint_digest(path)
    report = {
        "command": shlex.join(["python", "benchmarks/scenes_evaluation.py", *(arguments or sys.argv[1:])]),
        "model": options.model,
        "checkpoint": checkpoint,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "segcompass_hf": segcompass_hf.__version__,
        },
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "splits": finished_splits(options.output, checkpoint),
    }
    for split in options.splits:
        settings = {name: getattr(options, name) for name in ("num_samples", "batch_size", "max_new_tokens", "seed")}
        rows = list(scenes.iterate(split, options.num_samples, seed=options.seed))
        key = samples_digest(rows, settings)
        if report["splits"].get(split, {}).get("digest") == key:
            logger.info("%s: finished before, kept", split)
            continue
        start = time.perf_counter()
        figures = evaluator.evaluate(rows, options.batch_size)
        figures |= {"settings": settings, "digest": key, "seconds": round(time.perf_counter() - start, 1)}
        report["splits"][split] = figures
        write_whole(options.output, json.dumps(report, indent=1) + "\n")
        giou = figures["metrics"]["own reasoning"]["gIoU"]
        logger.info("%s: gIoU %.3f [%.3f, %.3f]", split, giou["value"], giou["low"], giou["high"])
    write_whole(options.output, json.dumps(report, indent=1) + "\n")
    write_whole(options.output.with_suffix(".md"), markdown_report(report))
    return report


if __name__ == "__main__":
    main()
