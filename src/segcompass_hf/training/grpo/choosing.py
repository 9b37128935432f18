# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Groups chosen before they are trained on: those that teach nothing are guided, or others sampled in their place."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from trl.data_utils import prepare_multimodal_messages

from .chosen_groups import ChosenGroups, SampledGroup, compared_rewards, equal_groups, total_rewards
from .guidance import beginning_of, begun_answers, guidance_strength, reference_answer
from .prompt_pool import PromptPool, StratifiedRepeatSampler, choice_of_prompts
from .rollouts import RolloutMasks
from .targets import SegmentationTargets, prompt_of, segmentation_targets


class GroupChoiceMixin:
    """What chooses prompts and groups for [`SegCompassGRPOTrainer`], see its settings; behind it come
    [`RobustTrainerMixin`], [`JudgingMixin`], [`SamplingMixin`] and TRL's trainer.

    A batch of prompts is sampled and judged. Groups whose samples are all wrong are guided where a reference can be.
    Groups of exactly equal rewards are then dropped, and other prompts sampled in their place, up to
    `max_resamplings` times; those left over stay, with advantages of 0. What remains is handed to TRL, which computes
    advantages and losses of it as of any other batch.
    """

    _pool: PromptPool | None = None
    _strata: list[Any] | None = None
    _rollouts: RolloutMasks | None

    def _prepare_choice(self) -> None:
        """Look at data set and settings before the first step.

        Raises:
            ValueError: They do not fit each other.
        """
        args = self.args
        if args.guidance == "prefix" and not self._samples_here:
            raise ValueError(
                "guidance='prefix' needs a sampler that can be made to begin an answer, which vLLM, continuous "
                "batching, FSDP and DeepSpeed cannot here; use guidance='rollout'."
            )
        if args.chooses_groups and self.rollout_func is not None:
            raise ValueError(
                "max_resamplings, pass_rates and guidance sample with the model itself; a rollout_func returns what "
                "they do not keep (its env_mask and further columns). Leave one of the two out."
            )
        self._strata, self._pool = choice_of_prompts(self.train_dataset, args)
        size = args.per_device_train_batch_size * args.steps_per_generation
        if args.chooses_groups and size % self.num_generations:
            raise ValueError(
                f"each process samples {size} completions at a time (per_device_train_batch_size x "
                f"steps_per_generation), which are no whole groups of {self.num_generations}; choose a multiple: "
                "max_resamplings, pass_rates and guidance look at whole groups."
            )

    def _get_train_sampler(self, dataset: Any = None) -> torch.utils.data.Sampler:
        sampler = super()._get_train_sampler(dataset)
        if self._strata is None:
            return sampler
        names = ("mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return StratifiedRepeatSampler(
            sampler.data_source, self._strata, **{name: getattr(sampler, name) for name in names}
        )

    def loop_state(self) -> dict[str, Any]:
        return super().loop_state() | ({} if self._pool is None else {"prompt_pool": self._pool.state()})

    def load_loop_state(self, state: dict[str, Any]) -> None:
        super().load_loop_state(state)
        if self._pool is not None and "prompt_pool" in state:
            self._pool.load_state(state["prompt_pool"])

    def _generate(self, prompts: list) -> tuple:
        """As in the parent; of groups that are chosen, what was sampled of them."""
        chosen = None if self._rollouts is None else self._rollouts.chosen
        return super()._generate(prompts) if chosen is None else chosen.generated

    def _generate_single_turn(self, prompt_ids: list, images, multimodal_fields, num_generations, **kwargs) -> tuple:
        with begun_answers(self.core, self._rollouts.beginnings):
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, **kwargs)

    def _choose_groups(self, inputs: list[dict[str, Any]]) -> ChosenGroups:
        """Groups to train on, as many as `inputs` (a row per completion) has."""
        chances = random.Random(f"{self.args.seed} {self.args.process_index} {self._step}")
        rows = inputs[:: self.num_generations]
        if self._pool is not None:
            rows = self._due_rows(rows, chances)
        sampled = self._sample_groups(rows, is_first=True)
        groups, number = list(self._guided(sampled, chances)), len(sampled)
        dropped = 0
        for _ in range(self.args.max_resamplings):
            places = [place for place, group in enumerate(groups) if not self._teaches(group)]
            needed = self._most(len(places))
            if not needed:
                break
            with self._metrics_apart():
                # All processes sample equally many, since TRL gathers in the middle of it.
                replaced = (places or [0]) * needed
                fresh = self._sample_groups(self._other_rows(groups, replaced[:needed], chances))
                fresh = self._guided(fresh, chances)
            dropped, number = dropped + len(places), number + len(places)
            for place, group in zip(places, fresh, strict=False):
                groups[place] = group
        self._log_choice(sampled, groups, dropped, number)
        return ChosenGroups(groups)

    def _due_rows(self, rows: list[dict[str, Any]], chances: random.Random) -> list[dict[str, Any]]:
        """The rows, those replaced that taught nothing when last sampled."""
        pool = self._pool
        taken = {pool.index.get(row["sample_id"]) for row in rows}
        due = []
        for row in rows:
            if not pool.is_due(row["sample_id"], chances):
                taken.add(index := pool.draw(row["sample_id"], taken, chances))
                row = self.train_dataset[index]
            due.append(row)
        return due

    def _other_rows(self, groups: list[SampledGroup], places: Sequence[int], chances: random.Random) -> list[dict]:
        taken = {self._pool.index.get(group.row["sample_id"]) for group in groups}
        rows = []
        for place in places:
            taken.add(index := self._pool.draw(groups[place].row["sample_id"], taken, chances))
            rows.append(self.train_dataset[index])
        return rows

    def _sample_groups(
        self, rows: list[dict], beginnings: list[list[int]] | None = None, is_first: bool = False
    ) -> list[SampledGroup]:
        """Sample and judge a group of each row; `beginnings` are given to all of its completions."""
        size = self.num_generations
        rows = [{**row, "prompt": prompt_of(row, self.processing_class)} for row in rows for _ in range(size)]
        given = [0] * len(rows)
        rollouts = self._new_rollouts(rows, self._targets_of(rows))
        if beginnings is not None:
            rollouts.beginnings = [ids for ids in beginnings for _ in range(size)]
            given = [len(ids) for ids in rollouts.beginnings]
        prompts = [prepare_multimodal_messages(row["prompt"], images=[row["image"]]) for row in rows]
        self._rollouts = rollouts
        try:
            prompt_ids, completion_ids, _, completions, logprobs, _, images, _ = self._generate(prompts)
            columns, rewards = self._judge_rollouts(rows, prompts, completions, completion_ids)
        finally:
            self._rollouts = None
        if is_first:
            self._log_judged(rows, columns, completions, rewards, rollouts.targets)
        extra = self._taken_logs()
        own = rewards[self.accelerator.process_index * len(rows) :][: len(rows)]
        groups = []
        for start in range(0, len(rows), size):
            its = slice(start, start + size)
            groups.append(
                SampledGroup(
                    row=rows[start],
                    targets=rollouts.targets.take([start]),
                    prompt_ids=prompt_ids[start],
                    images=images[start],
                    completion_ids=completion_ids[its],
                    completions=completions[its],
                    logprobs=None if logprobs is None else logprobs[its],
                    rewards=own[its],
                    right=[column["answer_is_right"] for column in columns[its]],
                    num_given=[
                        min(number, len(ids)) for number, ids in zip(given[its], completion_ids[its], strict=True)
                    ],
                    guided=any(given[its]),
                    extra={name: values[its] for name, values in extra.items()},
                )
            )
        return groups

    def _targets_of(self, rows: list[dict[str, Any]]) -> SegmentationTargets:
        return segmentation_targets(
            rows, self._target_processor, self.core, self.accelerator.device, self.args.overflow
        )

    def _guided(self, groups: list[SampledGroup], chances: random.Random) -> list[SampledGroup]:
        """The groups, those whose samples are all wrong with a reference's help where there is one and it helps; and
        what each taught, noted."""
        args = self.args
        strength = 0.0
        if args.guidance != "none":
            strength = guidance_strength(self.state.global_step, self.state.max_steps, args.guidance_share)
        if strength > 0:
            with self._metrics_apart():
                guide = self._with_reference if args.guidance == "rollout" else self._with_beginning
                groups = guide(groups, strength, chances)
        if self._pool is not None:
            for group in groups:
                self._pool.note(group.row["sample_id"], self._teaches(group))
        return groups

    def _with_reference(
        self, groups: list[SampledGroup], strength: float, chances: random.Random
    ) -> list[SampledGroup]:
        """The reference in the place of one sample, where it is rewarded more than all of them.

        Its reward is what the model's masks behind it deserve, none is made up; its tokens are trained like others,
        with the importance ratio of the policy to itself when the batch was sampled.
        """
        answers = {
            place: answer
            for place, group in enumerate(groups)
            if not any(group.right)
            and (answer := reference_answer(group.row, self.processing_class)) is not None
            and len(answer) <= self.max_completion_length
            and chances.random() < strength
        }
        needed = self._most(len(answers))
        if not needed:
            return groups
        places = ([*answers] or [0]) * needed
        asked = [groups[place] for place in places[:needed]]
        ids = [answers.get(place, groups[place].completion_ids[0]) for place in places[:needed]]
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        rows = [group.row for group in asked]
        prompts = [prepare_multimodal_messages(row["prompt"], images=[row["image"]]) for row in rows]
        self._rollouts = RolloutMasks(SegmentationTargets.joined([group.targets for group in asked]))
        try:
            columns, rewards = self._judge_rollouts(rows, prompts, completions, ids)
        finally:
            self._rollouts = None
        extra = self._taken_logs()
        own = rewards[self.accelerator.process_index * needed :][:needed]
        guided = list(groups)
        for number, place in enumerate(answers):
            group = groups[place]
            if self._totals(own[number : number + 1])[0] > self._totals(group.rewards).max():
                guided[place] = _with_last_replaced(
                    group,
                    ids[number],
                    completions[number],
                    own[number],
                    columns[number]["answer_is_right"],
                    {name: values[number] for name, values in extra.items()},
                )
        return guided

    def _with_beginning(
        self, groups: list[SampledGroup], strength: float, chances: random.Random
    ) -> list[SampledGroup]:
        """Groups sampled again behind the first sentences of the reference, which are not trained on."""
        beginnings = {
            place: ids
            for place, group in enumerate(groups)
            if not any(group.right)
            and (ids := beginning_of(group.row, self.processing_class, strength)) is not None
            and len(ids) < self.max_completion_length
        }
        needed = self._most(len(beginnings))
        if not needed:
            return groups
        places = ([*beginnings] or [0]) * needed
        rows = [groups[place].row for place in places[:needed]]
        again = self._sample_groups(rows, [beginnings.get(place, []) for place in places[:needed]])
        guided = list(groups)
        for place, group in zip(beginnings, again, strict=False):
            if self._teaches(group):
                guided[place] = group
        return guided

    def _totals(self, rewards: torch.Tensor) -> torch.Tensor:
        return total_rewards(rewards, self.reward_weights).nan_to_num(nan=float("-inf"))

    def _equal_groups(self, rewards: torch.Tensor, group_size: int) -> torch.BoolTensor:
        values = compared_rewards(rewards, self.reward_weights, self.multi_objective_aggregation)
        return equal_groups(values, group_size)

    def _teaches(self, group: SampledGroup) -> bool:
        return not bool(self._equal_groups(group.rewards, len(group.completions))[0])

    def _most(self, number: int) -> int:
        """The largest of all processes' numbers."""
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    @contextmanager
    def _metrics_apart(self) -> Iterator[None]:
        """Metrics of what is sampled inside are not logged: curves are of the prompts whose turn it is."""
        kept = self._metrics["train"], self._pending_metrics
        self._metrics["train"], self._pending_metrics = defaultdict(list), defaultdict(list)
        try:
            yield
        finally:
            self._metrics["train"], self._pending_metrics = kept

    def _taken_logs(self) -> dict[str, list[Any]]:
        """What reward functions logged (TRL's `log_extra`) of what was just judged; it goes with the groups."""
        taken = dict(self._pending_extra_logs)
        self._pending_extra_logs.clear()
        return taken

    def _log_choice(self, sampled: list[SampledGroup], groups: list[SampledGroup], dropped: int, number: int) -> None:
        rewards = self._totals(torch.cat([group.rewards for group in sampled]))
        finite = rewards[rewards.isfinite()]
        self._log_rollouts(
            {
                "groups/dropped": (float(dropped), number),
                "groups/equal_rewards": (float(sum(not self._teaches(group) for group in groups)), len(groups)),
                "groups/guided": (float(sum(group.guided for group in groups)), len(groups)),
                "groups/reward_before_choice": (float(finite.sum()), len(finite)),
            }
        )


def _with_last_replaced(
    group: SampledGroup, ids: list[int], completion: Any, rewards: torch.Tensor, right: bool, extra: dict[str, Any]
) -> SampledGroup:
    """A group whose last sample (they are exchangeable) is another answer, which nobody sampled."""
    logprobs = group.logprobs
    if logprobs is not None:
        logprobs = [*logprobs[:-1], [None] * len(ids)]  # no sampler to correct for: TRL's ratio is then 1
    return replace(
        group,
        completion_ids=[*group.completion_ids[:-1], ids],
        completions=[*group.completions[:-1], completion],
        logprobs=logprobs,
        rewards=torch.cat([group.rewards[:-1], rewards[None]]),
        right=[*group.right[:-1], right],
        num_given=[*group.num_given[:-1], 0],
        guided=True,
        extra={name: [*values[:-1], extra.get(name)] for name, values in group.extra.items()},
    )


__all__ = ["GroupChoiceMixin"]
