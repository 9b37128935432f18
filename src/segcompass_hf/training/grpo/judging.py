# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Completions judged: masks read from their states, rewards of these, and what is logged of both."""

from __future__ import annotations

import torch
from torch import nn

from ...processing_segcompass import SegCompassProcessor
from ..rewards.object_reward import right_answers
from .chosen_groups import share_equal_answers
from .known_objects import known_objects
from .pictures import SamplePictureLogger, picture_sample
from .rollouts import RolloutMasks, masks_of_rollouts, rollout_metrics
from .targets import SegmentationTargets


class JudgingMixin:
    """Of a [`trl.GRPOTrainer`], how it judges completions; its heir has the model, the processor and the pictures."""

    core: nn.Module
    processing_class: SegCompassProcessor
    pictures: SamplePictureLogger
    _rollouts: RolloutMasks | None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rollouts = self._rollouts
        if rollouts.chosen is not None:
            rollouts.rewards = self.accelerator.gather(rollouts.chosen.rewards)
            self._pending_extra_logs.update(rollouts.chosen.extra)
            return rollouts.rewards
        columns, rewards = self._judge_rollouts(inputs, prompts, completions, completion_ids_list)
        self._log_judged(inputs, columns, completions, rewards, rollouts.targets)
        rollouts.rewards = rewards
        return rewards

    def _judge_rollouts(self, inputs, prompts, completions, completion_ids_list) -> tuple[list[dict], torch.Tensor]:
        """Columns that reward functions see, one per completion, and the rewards of all processes."""
        rollouts, batch_size = self._rollouts, self.args.per_device_train_batch_size
        if rollouts.states is None:
            model = self.model_wrapped if self.model.training else self.model
            outputs = masks_of_rollouts(
                model, self.processing_class, prompts, completion_ids_list, rollouts.targets, batch_size
            )
        else:
            with self.accelerator.autocast():
                outputs = rollouts.segment(self.core, batch_size)
        answers = zip(rollouts.targets.image_numbers.tolist(), inputs, completion_ids_list, strict=True)
        share_equal_answers(outputs, [(image, str(row["prompt"]), tuple(ids)) for image, row, ids in answers])
        columns = rollouts.columns(outputs, self.core.config)
        objects = known_objects(inputs, self.processing_class, self.accelerator.device)
        columns = [column | its for column, its in zip(columns, objects, strict=True)]
        for column, right in zip(columns, right_answers(columns), strict=True):
            column["answer_is_right"] = right
        inputs = [{**row, **column} for row, column in zip(inputs, columns, strict=True)]
        return columns, super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _log_judged(self, inputs, columns, completions, rewards, targets) -> None:
        """Log metrics and pictures of rollouts; `rewards` are those of all processes."""
        right = float(sum(column["answer_is_right"] for column in columns))
        self._log_rollouts({"answers_right": (right, len(columns)), **rollout_metrics(columns, completions, targets)})
        inputs = [{**row, **column} for row, column in zip(inputs, columns, strict=True)]
        self._log_pictures(inputs, completions, rewards, targets)

    def _log_rollouts(self, sums: dict[str, tuple[float, int]]) -> None:
        """Log means over all processes of `name -> (sum, count)`."""
        mode = "train" if self.model.training else "eval"
        totals = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.accelerator.device)
        for name, (total, count) in zip(sums, self.accelerator.reduce(totals, "sum").tolist(), strict=True):
            self._metrics[mode][name].append(total / count if count else float("nan"))

    def _log_pictures(
        self, inputs: list[dict], completions: list, rewards: torch.Tensor, targets: SegmentationTargets
    ) -> None:
        """Pictures of this process's first groups, one completion each; `rewards` are those of all processes."""
        if not self.model.training or not self.pictures.wants(self.state.global_step):
            return
        first = self.accelerator.process_index * len(inputs)

        def samples():
            for row in range(0, len(inputs), self.num_generations):
                scores = dict(zip(self.reward_func_names, rewards[first + row].tolist(), strict=True))
                sizes = targets.original_sizes[row], targets.reshaped_input_sizes[row]
                yield picture_sample(self.processing_class, inputs[row], completions[row], *sizes, scores)

        self.pictures.log(self.state.global_step, samples())
