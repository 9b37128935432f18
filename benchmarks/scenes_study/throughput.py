"""CPU time of reinforcement on Scenes, part by part, and what the tokens of an answer are unsure of:

    python benchmarks/scenes_study/throughput.py --model bundled --steps 3
    python benchmarks/scenes_study/throughput.py --model runs/scenes-study/start-cold/segmentation --steps 20

Counts CPU seconds of this process, which other processes on the machine hardly change. The settings are those of the
second part of the study (PROTOCOL_SECOND.md) without choosing groups; one step is left out to warm up.
"""

import argparse
import tempfile
import time
from collections import defaultdict

import numpy as np
import torch
from second_settings import GRPO

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor, bundled_checkpoint
from segcompass_hf.data import scenes
from segcompass_hf.training import SegCompassGRPOConfig, SegCompassGRPOTrainer

PARTS = {"sampling": "_generate", "judging": "_judge_rollouts", "training": "training_step"}


class Timed(SegCompassGRPOTrainer):
    """Adds up CPU seconds, and the entropies of tokens before and from `</think>` on."""

    def __init__(self, *args, **kwargs):
        self.seconds, self.entropies = defaultdict(float), {"reasoning": [], "after it": []}
        super().__init__(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        ids, written = input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:].bool()
        after = (ids == self.core.config.think_end_token_id).cumsum(1) > 0
        for name, where in (("reasoning", written & ~after), ("after it", written & after)):
            self.entropies[name] += found[1][where].detach().tolist()
        return found


def _timed(name: str):
    def method(self, *args, **kwargs):
        start = time.process_time()
        try:
            return getattr(super(Timed, self), name)(*args, **kwargs)
        finally:
            self.seconds[name] += time.process_time() - start

    return method


for part in PARTS.values():
    setattr(Timed, part, _timed(part))


def measure(model: str, steps: int) -> None:
    path = bundled_checkpoint() if model == "bundled" else model
    rows = scenes.build("train", (steps + 1) * 16, seed=900)
    with tempfile.TemporaryDirectory() as folder:
        settings = {**GRPO, "max_steps": steps + 1, "learning_rate": 0.0, "beta": 0.0}
        arguments = SegCompassGRPOConfig(
            folder, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, **settings
        )
        policy = SegCompassForReasoningSegmentation.from_pretrained(path, dtype=torch.float32)
        policy.vlm.set_attn_implementation("eager")
        trainer = Timed(policy, arguments, rows, processing_class=SegCompassProcessor.from_pretrained(path))
        marks = []
        trainer.create_optimizer().register_step_post_hook(
            lambda *_: marks.append((time.process_time(), dict(trainer.seconds)))
        )
        trainer.train()
    completions = steps * arguments.generation_batch_size
    (first, before), (last, after) = marks[0], marks[-1]
    print(
        f"{model}: {steps} steps of {arguments.generation_batch_size} completions, {torch.get_num_threads()} thread(s)"
    )
    inside = {name: after[part] - before[part] for name, part in PARTS.items()}
    inside["training"] -= inside["sampling"] + inside["judging"]  # `training_step` makes its own inputs
    for name, seconds in inside.items():
        print(f"  {name:10} {seconds / steps:7.2f} CPU s per step, {completions / seconds:6.1f} completions per CPU s")
    print(f"  {'all':10} {(last - first) / steps:7.2f} CPU s per step, {completions / (last - first):6.1f} per CPU s")
    for name, values in trainer.entropies.items():
        print(
            f"  entropy of tokens, {name}: mean {np.mean(values):.4f}, 95th percentile {np.quantile(values, 0.95):.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    measure(given.model, given.steps)


if __name__ == "__main__":
    main()
