r"""What reinforcement could learn from: how far the samples of one prompt differ, per kind and temperature.

    python benchmarks/scenes_study/explore.py --model runs/scenes-study/start-cold/segmentation --temperatures 1 1.5 2
    python benchmarks/scenes_study/explore.py --model runs/scenes-study/start-cold/segmentation --num-prompts 96 \
        --output FILE

`flat`: share of the prompts whose samples all have the same IoU (standard deviation below 0.02), which teach nothing.
`right`: share of the samples whose written answer is the reference's; `mixed`: share of the prompts with right and
wrong ones, where rewards tell reasoning from reasoning and not only mask from mask.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from runs import commit, counted
from settings import RUNS

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor
from segcompass_hf.data import scenes
from segcompass_hf.data.schema import decode_masks
from segcompass_hf.metrics.segmentation import score_sample
from segcompass_hf.training import format_reward

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scenes_evaluation import read_steps  # noqa: E402

PROMPTS_AT_ONCE = 12


def sample(model, processor, rows: list[dict], temperature: float, samples: int) -> tuple[dict, list[float]]:
    """IoU of every sample and whether its answer is right, by kind `(prompts, 2, samples)`; every format reward."""
    by_kind, formats = defaultdict(list), []
    for start in range(0, len(rows), PROMPTS_AT_ONCE):
        prompts = rows[start : start + PROMPTS_AT_ONCE]
        copies = [row for row in prompts for _ in range(samples)]
        images, instructions = [row["image"] for row in copies], [row["instruction"] for row in copies]
        inputs = processor(images=images, instruction=instructions, return_tensors="pt").to(model.device)
        free = {"do_sample": True, "temperature": temperature, "constrain_format": False, "max_new_tokens": 120}
        answers = processor.post_process_segmentation(
            model.segment(**inputs, **free),
            original_sizes=inputs["original_sizes"],
            reshaped_input_sizes=inputs["reshaped_input_sizes"],
        )
        formats += format_reward([answer["text"] for answer in answers])
        ious = [
            score_sample(answer["masks"], decode_masks(row["masks"], row["image"].size[::-1])).iou
            for row, answer in zip(copies, answers, strict=True)
        ]
        right = [
            read_steps(answer["text"])[1] == read_steps(row["reasoning"])[1]
            for row, answer in zip(copies, answers, strict=True)
        ]
        for index, row in enumerate(prompts):
            its = slice(index * samples, (index + 1) * samples)
            by_kind[row["kind"]].append((ious[its], right[its]))
    return by_kind, formats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0])
    parser.add_argument("--num-prompts", type=int, default=48)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--output", type=Path, help="what is printed, as a text file, too")
    given = parser.parse_args()
    with counted(RUNS / "explore", {key: str(value) for key, value in vars(given).items()}):
        lines = explore(given)
    print("\n".join(lines))
    if given.output:
        given.output.write_text("\n".join([*lines, ""]))


def explore(given: argparse.Namespace) -> list[str]:
    """What is printed, line by line."""
    model = SegCompassForReasoningSegmentation.from_pretrained(given.model)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    processor = SegCompassProcessor.from_pretrained(given.model)
    rows = list(scenes.iterate("val", given.num_prompts, seed=3))
    lines = [f"{given.model}, {given.num_prompts} prompts, {given.samples} samples of each, commit {commit()}"]
    for temperature in given.temperatures:
        torch.manual_seed(0)
        by_kind, formats = sample(model, processor, rows, temperature, given.samples)
        lines.append(f"temperature {temperature}: well-formed {np.mean(np.array(formats) > 0):.2f}")
        for kind, values in sorted(by_kind.items()):
            ious, right = np.moveaxis(np.array(values, float), 1, 0)
            flat, best = (ious.std(1) < 0.02).mean(), ious.max(1).mean()
            mixed = (right.min(1) != right.max(1)).mean()
            lines.append(
                f"  {kind:12} {len(ious):3} prompts, IoU mean {ious.mean():.2f}, best {best:.2f}, flat {flat:.2f}; "
                f"answers right {right.mean():.2f}, mixed {mixed:.2f}"
            )
    return lines


if __name__ == "__main__":
    main()
