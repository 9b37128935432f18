# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Supervised segmentation: the losses of the core under teacher forcing, on reference answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer, set_seed
from transformers.utils import logging

from ...data.collator import SegmentationCollator
from ...data.vlm_texts import RowTextCheck
from ...freezing_segcompass import parameter_groups
from ...losses_segcompass import SlotAssignments, confidence_loss
from ...processing_segcompass import SegCompassProcessor
from ...reading_segcompass import MaskTargets
from ..alignment.object_patches import ObjectPatches
from ..inputs import check_segcompass, load_model, load_processor
from ..loop.counts import WindowCounts, WindowCountsMixin
from ..loop.first_rows import FirstRows
from ..loop.means import MetricMeansMixin
from ..loop.resume import RobustTrainerMixin
from ..warmup.language_loss import language_loss_sums, logits_to_keep
from .caches import use_caches
from .config import LOSS_WEIGHTS, SegmentationConfig
from .evaluation import segment_and_score, segmentation_report
from .slot_pull import SlotPull, SlotPullCallback, slot_pull_loss

logger = logging.get_logger(__name__)

LOSS_TERMS = ("segmentation_loss", "heatmap_bce", "heatmap_dice", "mask_dice", "mask_focal")
_OF_MASKS = ("sam_pixel_values", "image_embeddings", "mask_labels")  # inputs that slots alone do without


class SegmentationTrainer(MetricMeansMixin, RobustTrainerMixin, WindowCountsMixin, Trainer):
    r"""[`~transformers.Trainer`] of `SegCompassForReasoningSegmentation` on rows in the row schema.

    Different from its parent: freezes what the method freezes (SAE, decoder layers below it, SAM's image encoder),
    gives every part its learning rate, averages every loss over the whole accumulation window and all processes
    (`window_counts`), logs the single losses, gIoU and kept slots, and evaluates by segmenting greedily.

    Logged beside `loss`, as means since the last line: `language_loss`, `token_accuracy`, `segmentation/loss`,
    `segmentation/heatmap_bce`, `.../heatmap_dice`, `.../mask_dice`, `.../mask_focal`, `.../confidence_loss`,
    `.../kept_slots`; further `.../giou` (of low-resolution masks, on the logged step, whose unmatched slots are
    decoded for it), and `dropped_objects` (so far). With a `slot_pull_weight` also `segmentation/slot_pull` and
    `.../slot_pull_right`, the share of slots that point at a token of their object. Evaluation adds `eval_gIoU`,
    `eval_cIoU`, `eval_N-acc`, `eval_T-acc`, `eval_kept_slots`.

    Args:
        model (`SegCompassForReasoningSegmentation` or `str`): Trained in place; or its folder or id.
        args ([`SegmentationConfig`], *optional*): Settings.
        train_dataset, eval_dataset: Rows in the row schema.
        processing_class (`SegCompassProcessor`, *optional*): Loaded from where the model comes from when left out.
        peft_config (`peft.PeftConfig`, *optional*): Trains adapters in place of the decoder layers, and the heads:
            `training.adapters.lora_config(model)`. `train_token_rows` is then up to it; a warning names what differs.
        data_collator (`Callable`, *optional*): In place of a [`SegmentationCollator`].
        kwargs: For [`~transformers.Trainer`].
    """

    slot_pull: SlotPull | None = None  # beside the model, with a `slot_pull_weight`

    def __init__(
        self,
        model: nn.Module | str,
        args: SegmentationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        args = SegmentationConfig("segmentation") if args is None else args
        set_seed(args.seed)  # before new weights are drawn, such as adapters'
        model = load_model(model)
        check_segcompass(model)
        processing_class = load_processor(processing_class, model, SegCompassProcessor)
        self.eval_collator = data_collator
        if data_collator is None:
            self.check_text = RowTextCheck(processing_class)
            options = {"missing_reasoning": args.missing_reasoning}
            patches = ObjectPatches(processing_class, args.overflow) if args.slot_pull_weight else None
            data_collator = SegmentationCollator(processing_class, overflow=args.overflow, extra=patches, **options)
            self.eval_collator = SegmentationCollator(processing_class, overflow="merge", **options)
        model_config = model.config
        if args.codebook_init == "sae_decoder":
            init_codebook_from_sae(model)
        if peft_config is None:
            model.freeze_for_training(args.train_token_rows, args.trainable)
        elif args.trainable == "masks":
            raise ValueError('trainable="masks" leaves the VLM as it is; leave the adapters (peft_config) out.')
        else:
            model = _with_adapters(model, peft_config, args.train_token_rows)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # Adapters hide the model's own signature from Trainer; rows of a slot cache have no language targets.
        self.label_names = ["mask_labels"]
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            from ..fsdp import FinishShardingCallback

            self.add_callback(FinishShardingCallback())
        self._eval_processor = use_caches(self)
        self._model_weights = {name: getattr(model_config, name) for name in LOSS_WEIGHTS}
        if args.slot_pull_weight or args.heads_only_share:
            self._prepare_first_stages()
        if args.slots_alone_share or args.drop_references_share:
            self.segcompass.slot_mapper.register_forward_pre_hook(self._drop_references)

    def _prepare_first_stages(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "slot_pull_weight and heads_only_share break off the VLM's pass and train a head beside the model, "
                "which sharded weights do not allow; train the heads without FSDP and DeepSpeed first."
            )
        if self.args.slot_pull_weight:
            with torch.random.fork_rng():
                torch.manual_seed(self.args.seed)  # the same on every process
                self.slot_pull = SlotPull(self.segcompass.config.d_slot).to(self.args.device)
            self.add_callback(SlotPullCallback(self.slot_pull, self.accelerator))

    @property
    def segcompass(self) -> nn.Module:
        """The model itself, without wrappers of processes and adapters."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def reads_images(self) -> tuple[nn.Module, Any]:
        return self.segcompass.vlm, self.processing_class

    # Losses

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None
    ) -> Any:
        counts, scale = self.window_counts(inputs, num_items_in_batch), self.loss_scale(num_items_in_batch)
        weights = self._set_loss_weights()
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)  # the VLM's own loss would be a mean per micro-batch
        patches = {name: inputs.pop(name, None) for name in ("object_patches", "patch_places")}
        stage, with_pull = self._stage(model.training), model.training and self.slot_pull is not None
        if with_pull and patches["object_patches"] is None:
            raise ValueError(
                f"slot_pull_weight={self.args.slot_pull_weight} needs `object_patches` in every batch; give your data "
                "collator `extra=ObjectPatches(processor, overflow)`."
            )
        if stage == "slots":
            loss, output = self._slots_loss(model, inputs, patches, counts)
        else:
            pulled: list[torch.Tensor] = []

            def match_by_pull(output: Any) -> SlotAssignments:
                loss, assignments = self._pull(output, inputs, patches, counts)
                pulled.append(loss)
                return assignments

            shows_giou = model.training and self._is_logged_step()
            targets = MaskTargets(
                inputs["mask_labels"],
                inputs["num_objects"],
                num_items=counts.segmentation_items,
                num_samples=counts.samples,
                assignments=match_by_pull if with_pull else None,
                decode="all" if shows_giou else "auto",
            )
            output = model(**inputs, **self._of_stage(stage, labels), targets=targets)
            loss = output.losses.loss + sum(pulled)
            if model.training:
                self._report(output, inputs, counts)
        if stage == "all":
            language_loss, num_tokens, num_right = language_loss_sums(output.logits, labels)
            # Also at weight 0: DistributedDataParallel waits for a gradient of the head's rows.
            loss = loss + weights["lm_loss_weight"] * language_loss / counts.tokens
            if model.training:
                self.means.add("language_loss", language_loss, num_tokens)
                self.means.add("token_accuracy", num_right, num_tokens)
        loss = loss * scale
        return (loss, output) if return_outputs else loss

    def _of_stage(self, stage: str, labels: torch.Tensor | None) -> dict[str, Any]:
        """Arguments of the model that spare it what a stage has no use for."""
        if stage == "heads":
            return {"slots_alone": True}
        if labels is None:  # slots of a cache
            return {}
        return logits_to_keep(self.segcompass.vlm, torch.full_like(labels, -100) if stage == "masks" else labels)

    def _stage(self, training: bool) -> Literal["slots", "heads", "masks", "all"]:
        """What trains at this step."""
        if self.args.trainable == "masks":
            return "masks"
        step, steps = self.state.global_step, self.state.max_steps
        if training and step < self.args.slots_first_share * steps:
            return "slots"
        return "heads" if training and step < self.args.heads_only_share * steps else "all"

    def _slots_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], targets: dict[str, torch.Tensor], counts: WindowCounts
    ) -> tuple[torch.Tensor, Any]:
        """Slot pull and confidence, of a pass without SAM and without the layers above the SAE."""
        seen = {name: value for name, value in inputs.items() if name not in _OF_MASKS}
        output = model(**seen, slots_alone=True, output_concept_embeddings=True)
        loss, assignments = self._pull(output, inputs, targets, counts)
        shares = torch.full_like(output.slot_logits[:, 0], 1 / counts.samples, dtype=torch.float32)
        confidence = confidence_loss(output.slot_logits, assignments, shares)
        self._report_slots(output, confidence, counts)
        return loss + self.segcompass.config.conf_loss_weight * confidence, output

    def _pull(
        self,
        output: Any,
        inputs: dict[str, torch.Tensor],
        targets: dict[str, torch.Tensor],
        counts: WindowCounts,
    ) -> tuple[torch.Tensor, SlotAssignments]:
        """The weighted slot pull as a share of the window's mean, and the slots it matches to objects."""
        is_image = self.segcompass.modality_ids(inputs["input_ids"]).bool()
        scores = self.slot_pull(
            output.slots.float(), output.concept_embeddings.float(), targets["patch_places"], is_image
        )
        pull = slot_pull_loss(scores, targets["object_patches"], inputs["num_objects"])
        if self.model.training:
            self.means.add("segmentation/slot_pull", pull.loss, (inputs["num_objects"] > 0).sum())
            self.means.add("segmentation/slot_pull_right", pull.right, pull.num_pairs)
        return self.args.slot_pull_weight * pull.loss / counts.segmentation_items, pull.assignments

    def _report_slots(self, output: Any, confidence: torch.Tensor, counts: WindowCounts) -> None:
        num_samples = len(output.slot_logits)
        self.means.add("segmentation/confidence_loss", confidence * counts.samples, num_samples)
        kept = output.slot_logits > self.segcompass.config.slot_logit_threshold  # (batch_size, num_slots)
        self.means.add("segmentation/kept_slots", kept.sum(), num_samples)

    def _report(self, output: Any, inputs: Mapping[str, torch.Tensor], counts: WindowCounts) -> None:
        """Add a micro-batch to the means. Losses are shares of the window's mean; times the count they are sums."""
        num_samples = len(output.slot_logits)
        everything = self.segcompass.config.empty_samples == "zero"
        num_items = num_samples if everything else (inputs["num_objects"] > 0).sum()
        for name in LOSS_TERMS:
            label = "segmentation/loss" if name == "segmentation_loss" else f"segmentation/{name}"
            self.means.add(label, getattr(output.losses, name) * counts.segmentation_items, num_items)
        self._report_slots(output, output.confidence_loss, counts)
        if output.pred_masks is not None:
            kept = output.slot_logits > self.segcompass.config.slot_logit_threshold  # (batch_size, num_slots)
            threshold = self.segcompass.config.mask_logit_threshold
            iou = union_iou(output.pred_masks > threshold, kept, inputs["mask_labels"] > 0.5)
            self.means.add("segmentation/giou", iou.sum(), num_samples)

    def _is_logged_step(self) -> bool:
        step, every = self.state.global_step + 1, self.state.logging_steps
        return bool(every) and (step % every == 0 or (step == 1 and self.args.logging_first_step))

    def _set_loss_weights(self) -> dict[str, float]:
        weights = self.args.loss_weights(self._model_weights, self.state.global_step)
        for name, value in weights.items():
            setattr(self.segcompass.config, name, value)
        return weights

    def _drop_references(self, slot_mapper: nn.Module, inputs: tuple) -> tuple | None:
        """Zero the reference states of a share of the samples, so that the slots must carry the answer."""
        if not slot_mapper.training:
            return None
        states, *others = inputs
        alone = self.state.global_step < self.args.slots_alone_share * self.state.max_steps
        share = 1.0 if alone else self.args.drop_references_share
        keep = torch.rand(len(states), 1, 1, device=states.device) >= share
        return states * keep, *others

    def extra_logs(self) -> dict[str, float]:
        dropped = torch.tensor(getattr(self.data_collator, "dropped_objects", 0), device=self.args.device)
        dropped = int(self.accelerator.reduce(dropped, reduction="sum"))
        return {"dropped_objects": dropped} if dropped else {}

    def loop_state(self) -> dict:
        state = super().loop_state()
        return state if self.slot_pull is None else {**state, "slot_pull": self.slot_pull.state_dict()}

    def load_loop_state(self, state: dict) -> None:
        super().load_loop_state(state)
        if self.slot_pull is not None and "slot_pull" in state:
            self.slot_pull.load_state_dict(state["slot_pull"])

    # Optimizer

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is not None:
            return self.optimizer
        args, model = self.args, self.model if model is None else model
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        factors = args.learning_rate_factors()
        pull = self.slot_pull
        if args.optimizer == "muon":
            from ..loop.muon import muon_with_factors

            named = list(model.named_parameters())
            if pull is not None:  # at the rate of the slot encoder, whose slots it reads
                named += [(f"slot_encoder.pull.{name}", parameter) for name, parameter in pull.named_parameters()]
            self.optimizer = muon_with_factors(named, args.learning_rate, args.weight_decay, factors)
        else:
            groups = parameter_groups(model, args.learning_rate, args.weight_decay, factors)
            if pull is not None:
                rate = args.learning_rate * args.codebook_lr_factor
                groups.append({"params": list(pull.parameters()), "lr": rate, "weight_decay": 0.0})
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Evaluation merges surplus objects instead of dropping them."""
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    def evaluation_loop(
        self, dataloader: Any, description: Any, *args: Any, metric_key_prefix: Any = "eval", **kwargs: Any
    ) -> Any:
        """The loss on reference answers, and the metrics of greedy segmentation on the first rows of the data set."""
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.args.num_eval_segmentations:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                logger.warning_once(
                    "evaluation does not segment: processes that share weights would have to write answers of one "
                    "length; evaluate a saved checkpoint instead, and set num_eval_segmentations=0."
                )
                return output
            figures = self.segment_rows(dataloader.dataset, self.args.num_eval_segmentations)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def segment_rows(self, rows: Any, num_rows: int = -1) -> dict[str, float]:
        """Metrics of greedy segmentation of the first `num_rows` (-1: all) rows, shared among the processes."""
        from accelerate.utils import gather_object

        limit = self.args.eval_max_new_tokens
        scored = segment_and_score(
            self.segcompass,
            self._eval_processor,
            FirstRows(rows, num_rows, self.accelerator.process_index, self.accelerator.num_processes),
            self.args.per_device_eval_batch_size,
            **({} if limit is None else {"max_new_tokens": limit}),
        )
        return segmentation_report(gather_object(scored))


def _with_adapters(model: nn.Module, peft_config: Any, train_token_rows: str | None) -> nn.Module:
    from peft import get_peft_model

    from ..adapters import check_peft_config, warn_of_other_settings

    check_peft_config(model, peft_config)
    adapted = get_peft_model(model, peft_config)
    warn_of_other_settings(model, train_token_rows)
    return adapted


def union_iou(masks: torch.Tensor, kept: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """IoU of the union of the kept masks with the union of the targets; 1 where both are empty.

    Args:
        masks (`torch.BoolTensor` of shape `(batch_size, num_slots, h, w)`): Of all slots.
        kept (`torch.BoolTensor` of shape `(batch_size, num_slots)`): Slots that count.
        targets (`torch.BoolTensor` of shape `(batch_size, num_masks, h, w)`): Objects; empty ones are filling.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, in [0, 1].
    """
    predicted = (masks & kept[..., None, None]).any(1)  # (batch_size, h, w)
    wanted = targets.any(1)
    union = (predicted | wanted).sum((1, 2))
    return torch.where(union > 0, (predicted & wanted).sum((1, 2)) / union.clamp(min=1), 1.0)


@torch.no_grad()
def init_codebook_from_sae(model: nn.Module) -> None:
    """Start the codebook from the SAE's decoder: `C = W_dec V`, V the leading right singular vectors of `W_dec`.

    With `d_slot = d_in` the decoder itself; with a smaller `d_slot` its best projection of that rank (lengths and
    angles of concepts are kept as far as they can be); with a larger one the rest is zero.

    Args:
        model (`SegCompassForReasoningSegmentation`): Its `codebook` is overwritten.
    """
    decoder, codebook = model.sae.W_dec.float(), model.codebook.weight  # (d_sae, d_in), (d_sae, d_slot)
    d_in, d_slot = decoder.shape[1], codebook.shape[1]
    if d_slot < d_in:
        _, vectors = torch.linalg.eigh(decoder.T @ decoder)  # ascending
        decoder = decoder @ vectors[:, -d_slot:]
    codebook.zero_()
    codebook[:, : decoder.shape[1]] = decoder.to(codebook.dtype)
