# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Joint training: GRPO on the reasoning, segmentation losses on the masks, from one forward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models import prepare_fsdp

from ...data.vlm_texts import RowTextCheck
from ...image_features_segcompass import join_rows
from ...modeling_segcompass import SegCompassForReasoningSegmentation
from ...processing_segcompass import SegCompassProcessor
from ...reading_segcompass import MaskTargets
from ..adapters import check_peft_config, restore_head_precision, trained_token_rows, warn_of_other_settings
from ..embeddings import open_embedding_cache
from ..fsdp import FinishShardingCallback
from ..inputs import base_model, check_segcompass, load_model, load_processor
from ..loop.resume import RobustTrainerMixin
from ..rewards.object_reward import object_reward
from ..rewards.rewards import format_reward, mask_reward
from .choosing import GroupChoiceMixin
from .config import DEFAULT_REWARD_WEIGHTS, SegCompassGRPOConfig
from .forward import JointCall, JointTargets, add_joint_forward
from .judging import JudgingMixin
from .one_cycle import OneCycle
from .pictures import SamplePictureLogger
from .private_methods import check_trl
from .reference import AdapterFreeReference, ReferencePolicy, copy_token_rows_to_reference
from .rollouts import RolloutMasks
from .sampling import SamplingMixin
from .targets import check_num_rows, prompt_of
from .vllm import vllm_rollouts

check_trl()

# Advantages within it are those of rewards that are their group's mean, but for what rounding leaves of it.
EQUAL_REWARDS = 1e-3


class SegCompassGRPOTrainer(GroupChoiceMixin, RobustTrainerMixin, JudgingMixin, SamplingMixin, GRPOTrainer):
    """GRPO on the reasoning together with the segmentation losses on the masks.

    `loss = L_grpo + lambda_s * L_seg + lambda_c * L_conf`, all from one forward of the trained layers.

    What differs from [`trl.GRPOTrainer`]:

    - The data set is in the row schema (`image`, `instruction`, `masks`, ...); a `prompt` column, where there is one,
      takes the place of the instruction template.
    - Masks are read from the states captured while sampling. Reward functions get them, one entry per completion, as
      `pred_masks`, `heatmap_logits`, `slot_logits`, `mask_labels`, `num_objects`, `valid_area`,
      `slot_logit_threshold`, `mask_logit_threshold`, `num_slots`, the known objects of the image as `object_masks`,
      `num_targets`, `others_known` (see [`known_objects`]), and `answer_is_right`. Without `reward_funcs` they are
      `format_reward` and `mask_reward` (or `object_reward`, see `mask_reward` of the settings) with weights 0.3 and
      0.7. They stand behind what all trainers of this package begin with.
    - Prompts and groups can be chosen for what they teach: see [`GroupChoiceMixin`]. The advantages of a group of
      exactly equal rewards are exactly 0.
    - L_seg is a mean over the samples with objects, L_conf over all samples, of the whole accumulation window over all
      processes.
    - The reference policy is a copy of the layers that train, fed with the policy's own states at the SAE layer:
      nothing frozen is stored or computed twice.
    - Learning rates per module, weight switch, one-cycle schedule, sample pictures: see [`SegCompassGRPOConfig`].
    - Steps with non-finite losses or gradients are skipped and checkpoints are whole: see [`RobustTrainerMixin`].

    Args:
        model (`str` or `PreTrainedModel` or `PeftModel`): A SegCompass model or where to load it. Frozen as the method
            says (`freeze_for_training`), unless PEFT decides what trains.
        args ([`SegCompassGRPOConfig`], *optional*): Settings.
        train_dataset, eval_dataset (`Dataset` or `IterableDataset`): In the row schema.
        processing_class ([`SegCompassProcessor`], *optional*): Loaded from where the model comes from when left out.
        peft_config (`PeftConfig`, *optional*): See `segcompass_hf.training.lora_config`.
        reward_funcs (`Callable` or `list[Callable]`, *optional*): TRL reward functions.
        quantization_config (`BitsAndBytesConfig`, *optional*): For a model given by name.
        kwargs: Everything else goes to [`trl.GRPOTrainer`].
    """

    _tag_names = ["trl", "grpo", "segcompass"]
    _name = "SegCompass GRPO"

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: SegCompassGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict | None = None,
        processing_class: SegCompassProcessor | None = None,
        peft_config: Any = None,
        reward_funcs: Callable | list[Callable] | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ):
        unknown = [name for name in ("tools", "environment_factory") if kwargs.get(name)]
        if unknown:
            raise ValueError(f"{unknown} make conversations of several turns; masks are read from a single answer.")
        args = SegCompassGRPOConfig("segcompass-grpo") if args is None else args
        if not isinstance(args, SegCompassGRPOConfig):
            got = f"got {type(args).__name__}; rewards are reward_funcs"
            raise TypeError(f"args must be a SegCompassGRPOConfig, {got}.")
        if not isinstance(model, nn.Module):
            quantized = {} if quantization_config is None else {"quantization_config": quantization_config}
            model = load_model(model, **(args.model_init_kwargs or {}), **quantized)
            args.model_init_kwargs = None
        check_segcompass(model)
        core = base_model(model)
        processing_class = load_processor(processing_class, model, SegCompassProcessor)
        if peft_config is not None:
            check_peft_config(core, peft_config)
        elif core is model:
            _freeze(core, args)
        if reward_funcs is None:
            reward_funcs = [format_reward, object_reward if args.mask_reward == "objects" else mask_reward]
            args.reward_weights = args.reward_weights or DEFAULT_REWARD_WEIGHTS
        self._rollouts: RolloutMasks | None = None
        self.check_text = RowTextCheck(processing_class, with_reasoning=False)
        beta = args.beta
        if core is model and peft_config is None:
            args.beta = 0.0  # TRL would load a whole second model as reference; ours shares what is frozen
        try:
            with vllm_rollouts(Path(args.output_dir) / "vllm") if args.use_vllm else nullcontext():
                super().__init__(
                    model,
                    reward_funcs,
                    args=args,
                    train_dataset=train_dataset,
                    eval_dataset=eval_dataset,
                    processing_class=processing_class,
                    peft_config=peft_config,
                    **kwargs,
                )
        finally:
            args.beta = beta
        self.beta = beta
        check_num_rows(self.train_dataset, args)
        self._prepare_choice()
        self._check_what_trains()
        if getattr(core, "is_quantized", False):
            restore_head_precision(self.model)
        self.pictures = SamplePictureLogger(
            Path(args.output_dir) / "samples",
            args.sample_pictures_steps,
            args.num_sample_pictures,
            self.callback_handler.callbacks,
        )
        cache = open_embedding_cache(self, self.core, self.processing_class)
        self._target_processor = (
            self.processing_class if cache is None else cache.caching_processor(self.processing_class)
        )
        add_joint_forward(self.core, self.temperature, args.cast_lm_head_to_fp32, self._make_reference())
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.add_callback(FinishShardingCallback())

    @property
    def core(self) -> SegCompassForReasoningSegmentation:
        """The SegCompass model under whatever wraps it."""
        return base_model(self.accelerator.unwrap_model(self.model))

    def reads_images(self) -> tuple[nn.Module, Any]:
        return self.core.vlm, self.processing_class

    def _check_what_trains(self) -> None:
        core, args = self.core, self.args
        if trained_token_rows(core) == "both":
            raise ValueError(
                "input rows of the added tokens are to train (train_token_rows='both' in the settings, the adapter or "
                "the model's configuration), but joint training cuts the graph at the SAE's layer, so they would get "
                "no gradient; pass train_token_rows='head' to SegCompassGRPOConfig, or to lora_config."
            )
        if core is not self.model:
            warn_of_other_settings(core, args.train_token_rows, args.train_heads)

    def _make_reference(self) -> Callable | None:
        if not self.beta:
            return None
        cast = self.args.cast_lm_head_to_fp32
        if base_model(self.model) is not self.model:
            copy_token_rows_to_reference(self.model)
            return AdapterFreeReference(self.model, self.temperature, cast, self.args.gradient_checkpointing_kwargs)
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "under DeepSpeed ZeRO-3 the weights are partitioned before a reference policy can be copied; use "
                "FSDP2, ZeRO-2, LoRA, or train without KL (beta=0)."
            )
        reference = ReferencePolicy(self.model, self.temperature, cast)
        if self.is_fsdp_enabled:
            return prepare_fsdp(reference, self.accelerator)
        return reference.to(self.accelerator.device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            rate, factors = settings.pop("lr", self.args.learning_rate), self.args.learning_rate_factors()
            core = base_model(self.accelerator.unwrap_model(model))
            groups = core.parameter_groups(rate, self.args.weight_decay, factors)
            self.optimizer = optimizer_class(groups, lr=rate, **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.args.lr_schedule == "trainer":
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = OneCycle(optimizer, num_training_steps, self.args.one_cycle_final_factor)
        return self.lr_scheduler

    # Sampling: targets beside TRL's inputs, masks from the states of the samples.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.model.training and self.args.chooses_groups:
            chosen = self._choose_groups(inputs)
            inputs, targets = chosen.rows, chosen.targets
            rollouts = RolloutMasks(targets, chosen)
        else:
            inputs = [{**row, "prompt": prompt_of(row, self.processing_class)} for row in inputs]
            targets = self._targets_of(inputs)
            rollouts = self._new_rollouts(inputs, targets)
        self._rollouts = rollouts
        # The reference is scored in the training forward, from the policy's own states.
        beta, self.beta = self.beta, 0.0
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self.beta, self._rollouts = beta, None
        size = self.num_generations if self.model.training else self.num_generations_eval
        equal = self._equal_groups(rollouts.rewards, size).repeat_interleave(size)
        equal = equal[self.accelerator.process_index * len(inputs) :][: len(inputs)]
        output["advantages"] = output["advantages"].masked_fill(equal, 0.0)
        columns = targets.columns()
        if self.model.training and self.args.segmentation_completions == "at_least_mean":
            columns["segmentation_weights"] = (output["advantages"] > -EQUAL_REWARDS).float()
        return output | columns

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As in the parent, which marks what was written with 0 in per-token inputs; families mark it in their own
        way (PaliGemma's 0 is a prefix that sees all of itself), so here the model lets those of the prompt grow."""
        for name in ("token_type_ids", "mm_token_type_ids"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][:, : input_ids.shape[1] - logits_to_keep]
        arguments = (model, input_ids, attention_mask, logits_to_keep, *args)
        return super()._get_per_token_logps_and_entropies(*arguments, **kwargs)

    # Training: one forward for all losses.

    def _count_windows(self, batches: list[dict[str, Any]]) -> None:
        """Tell every micro-batch how many samples its accumulation window has over all processes, by their weights."""
        counts = []
        for batch in batches:
            weights = batch.get("segmentation_weights", torch.ones_like(batch["num_objects"], dtype=torch.float32))
            counts.append([float(weights[batch["num_objects"] > 0].sum()), float(weights.sum())])
        counts = self.accelerator.reduce(torch.tensor(counts, device=self.accelerator.device), "sum")  # (batches, 2)
        size = self.args.gradient_accumulation_steps
        if len(batches) % size:  # windows reach over several samplings: take this one's average
            windows = (counts.sum(0) * size / len(batches)).expand(len(batches), 2)
        else:
            windows = counts.view(-1, size, 2).sum(1).repeat_interleave(size, dim=0)
        # Plain numbers: FSDP would cast tensors to bf16, which cannot count beyond 256.
        for batch, (with_objects, samples) in zip(batches, windows.tolist(), strict=True):
            every = self.core.config.empty_samples == "zero"
            batch["num_segmentation_items"] = max(samples if every else with_objects, 1)
            batch["num_samples"] = max(samples, 1)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss and the segmentation losses, of one forward: a [`JointCall`] goes to TRL in the model's place."""
        batches = self._buffered_inputs or []
        if "num_samples" not in inputs and any(inputs is batch for batch in batches):
            self._count_windows(batches)  # the first micro-batch of a sampling; in evaluation there are no windows
        masks = MaskTargets(
            torch.stack(inputs["mask_labels"]),
            inputs["num_objects"],
            num_items=inputs.get("num_segmentation_items"),
            num_samples=inputs.get("num_samples"),
            sample_weights=inputs.get("segmentation_weights"),
            loss_weights=self.args.loss_weights(self.core.config, self.state.global_step),
            decode="matched",
        )
        images = join_rows(inputs["image_embeddings"])
        places = inputs["reshaped_input_sizes"], masks, inputs.get("image_token_grids")
        targets = JointTargets(inputs["completion_mask"], images, *places, self._shared_prompts(inputs))
        call = JointCall(model, inputs, targets)
        loss, output = super().compute_loss(call, inputs, return_outputs, num_items_in_batch), call.output
        # Sums over the window's samples were divided by their number over all processes; DDP takes the mean of these.
        share = self.accelerator.num_processes if inputs.get("num_samples") is not None else 1
        self._log_losses(output.terms, share, inputs)
        if inputs.get("num_samples") is not None:  # the last window of an epoch may be shorter than those counted
            share *= self.args.gradient_accumulation_steps / self.current_gradient_accumulation_steps
        return self.args.policy_loss_weight * loss + share * output.segmentation

    def evaluation_loop(self, *args: Any, metric_key_prefix: Any = "eval", **kwargs: Any) -> Any:
        """TRL logs the metrics of several evaluation sets under the same names; here each set has its own."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if metric_key_prefix.startswith("eval_"):
            metrics, name = self._metrics["eval"], metric_key_prefix.removeprefix("eval_")
            metrics.update({f"{name}_{key}": metrics.pop(key) for key in list(metrics)})
        return output

    def _log_losses(self, terms: dict[str, torch.Tensor], share: int, inputs: dict[str, Any]) -> None:
        mode = "train" if self.model.training else "eval"
        # A micro-batch holds its part of the window's mean; the log shows the mean itself.
        steps = self.args.gradient_accumulation_steps if inputs.get("num_samples") is not None else 1
        values = self.accelerator.gather(torch.stack(list(terms.values())).float()[None]).mean(0) * share * steps
        for name, value in zip(terms, values.tolist(), strict=True):
            self._metrics[mode][f"segmentation/{name}"].append(value)


def _freeze(model: nn.Module, args: SegCompassGRPOConfig) -> None:
    model.freeze_for_training(args.train_token_rows)
    if not args.train_heads:
        for module in (model.codebook, model.slot_encoder, model.slot_mapper, model.sam):
            module.requires_grad_(False)
