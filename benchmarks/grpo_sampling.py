# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Completions that joint training samples and scores on Scenes per second of CPU time, and what each saving brings.

    OMP_NUM_THREADS=1 python benchmarks/grpo_sampling.py --sizes 8x8 32x16

The bundled checkpoint samples freely for the same prompts in every formulation, in turn: every completion with a pass
over its own prompt and up to the end of the longest (as transformers does); prompts once for all of their completions;
answers that have ended left out. Sampling is `generate` with what belongs to it; the whole adds targets, masks,
rewards and TRL's second reading of the pictures. Medians over rounds. What was tried and brought nothing: a cache that
grows in place, and 64 completions at a time.
"""

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from timing import PeakMemory, clock
from transformers import TrainerCallback

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor, bundled_checkpoint
from segcompass_hf.data import scenes
from segcompass_hf.training import SegCompassGRPOConfig, SegCompassGRPOTrainer

SAMPLING = "segcompass_hf.training.grpo.sampling"
RESULTS = Path(__file__).parent / "results"
ONE_EACH = {f"{SAMPLING}.answers_in_a_row": lambda *args: 1}
TO_THE_LONGEST = {"segcompass_hf.answers_segcompass.LEFT_TO_REARRANGE": 0}
FORMULATIONS = {
    "before": ONE_EACH | TO_THE_LONGEST,
    "+ prompts once": TO_THE_LONGEST,
    "+ ended answers left out (ours)": {},
}


class TimedTrainer(SegCompassGRPOTrainer):
    """Takes the time of `generate` with what belongs to it."""

    seconds = 0.0

    def _generate_single_turn(self, *args, **kwargs):
        started = clock(self.model.device)
        completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        self.seconds = clock(self.model.device) - started
        self.lengths = [len(ids) for ids in completion_ids]
        return completion_ids, logprobs


@contextmanager
def formulation(name: str):
    with ExitStack() as stack:
        for target, value in FORMULATIONS[name].items():
            stack.enter_context(patch(target, value))
        yield


def trainer_of(
    folder: str, prompts: int, completions: int, max_completion_length: int, device: str = "cpu", micro_batch: int = 32
) -> TimedTrainer:
    """A trainer whose step samples so many completions for so many prompts, `micro_batch` at a time."""
    completions_in_all = prompts * completions
    arguments = SegCompassGRPOConfig(
        folder,
        per_device_train_batch_size=min(completions_in_all, micro_batch),
        gradient_accumulation_steps=max(completions_in_all // micro_batch, 1),
        num_generations=completions,
        max_completion_length=max_completion_length,
        beta=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=device == "cpu",
        report_to="none",
    )
    model = SegCompassForReasoningSegmentation.from_pretrained(bundled_checkpoint())
    processor = SegCompassProcessor.from_pretrained(bundled_checkpoint())
    rows = scenes.build("train", prompts, seed=5)
    return TimedTrainer(model, args=arguments, train_dataset=rows, processing_class=processor)


def measure(size: str, repeats: int, max_completion_length: int) -> dict[str, dict]:
    """Medians of one size, such as 8x8: prompts x completions."""
    prompts, completions = map(int, size.split("x"))
    runs: dict[str, list[dict]] = {name: [] for name in FORMULATIONS}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(folder, prompts, completions, max_completion_length)
        trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        for number in range(repeats):
            for name in FORMULATIONS if number % 2 == 0 else reversed(FORMULATIONS):
                torch.manual_seed(number)
                with formulation(name):
                    started = clock(trainer.model.device)
                    trainer._generate_and_score_completions(batch)
                    whole = clock(trainer.model.device) - started
                number_of = prompts * completions
                mean, longest = sum(trainer.lengths) / number_of, max(trainer.lengths)
                run = {"sampled_per_s": number_of / trainer.seconds, "scored_per_s": number_of / whole}
                runs[name].append(run | {"mean_length": mean, "longest": longest})
                print(f"{size} {number + 1}/{repeats} {name}: {run}", file=sys.stderr)
    return {name: {key: statistics.median(run[key] for run in each) for key in each[0]} for name, each in runs.items()}


class StepSeconds(TrainerCallback):
    """Seconds of every step."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, []

    def on_step_begin(self, *args, **kwargs):
        self.started = clock(self.device)

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(clock(self.device) - self.started)


def whole_steps(size: str, steps: int, max_completion_length: int, device: str, micro_batch: int) -> dict[str, float]:
    """Optimizer steps of joint training on Scenes, sampling and scoring included; the first one warms up."""
    prompts, completions = map(int, size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(folder, prompts, completions, max_completion_length, device, micro_batch)
        trainer.args.max_steps = 1 + steps
        watch = StepSeconds(trainer.model.device)
        trainer.add_callback(watch)
        with PeakMemory(device) as memory:
            trainer.train()
    seconds = statistics.median(watch.seconds[1:])
    return {
        "seconds_per_step": seconds,
        "completions_per_second": prompts * completions / seconds,
        "mean_length": sum(trainer.lengths) / len(trainer.lengths),
        "peak_bytes": memory.bytes,
    }


def to_markdown(record: dict) -> str:
    lines = ["# Sampling on Scenes", "", f"Made by `{record['command']}`, torch {record['torch']}, 1 thread."]
    for size, rows in record["sizes"].items():
        prompts, completions = size.split("x")
        lines += ["", f"## {prompts} prompts of {completions} completions", ""]
        lines += ["| formulation | sampled per CPU second | sampled and scored | gain | mean length | longest |"]
        lines += ["|---|---|---|---|---|---|"]
        base = rows["before"]
        for name, row in rows.items():
            gain = row["scored_per_s"] / base["scored_per_s"]
            rates = f"{row['sampled_per_s']:.1f} | {row['scored_per_s']:.1f} | {gain:.2f}x"
            lines.append(f"| {name} | {rates} | {row['mean_length']:.0f} | {row['longest']:.0f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["8x8", "32x16"], help="prompts x completions")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-completion-length", type=int, default=120)
    parser.add_argument("--output", type=Path, default=RESULTS / "grpo_sampling.json")
    args = parser.parse_args(arguments)
    sizes = {size: measure(size, args.repeats, args.max_completion_length) for size in args.sizes}
    command = " ".join(["python benchmarks/grpo_sampling.py", *sys.argv[1:]])
    record = {"command": command, "torch": torch.__version__, "sizes": sizes}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(to_markdown(record))


if __name__ == "__main__":
    main()
