# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Warm-up: a base VLM learns the answer's format, and to reason, from reference answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, set_seed
from transformers.utils import logging

from ...configuration_segcompass import default_sae_layer
from ...data.collator import SegmentationCollator, language_inputs
from ...data.vlm_texts import RowTextCheck
from ...freezing_segcompass import parameter_groups
from ...images_segcompass import to_rgb_image
from ...processing_segcompass import SegCompassProcessor
from ...text_stack_segcompass import decoder_layers
from ...token_places import Name, instruction_words, target_names
from ...token_rows_segcompass import num_token_rows
from ...vlm_inputs_segcompass import sequence_inputs
from ..alignment.losses import AlignmentTargets, alignment_loss, pair_alignment_loss
from ..alignment.names import TokenPairs
from ..alignment.object_patches import ObjectPatches
from ..inputs import load_model, load_processor
from ..loop.counts import WindowCountsMixin
from ..loop.first_rows import FirstRows
from ..loop.means import MetricMeansMixin
from ..loop.resume import RobustTrainerMixin
from ..rewards.rewards import format_reward
from .config import WarmupConfig
from .language_loss import language_loss_sums, logits_to_keep
from .parts import add_adapters_to_vlm, choose_trainable
from .reading import ReadingHead, ReadingHeadSteps, reading_loss

logger = logging.get_logger(__name__)

ALIGNMENT_INPUTS = ("alignment_words", "alignment_text", "alignment_coverage")  # alignment_pairs="target"
PAIR_INPUTS = ("pair_words", "pair_patches")  # alignment_pairs="names"
READING_INPUTS = ("object_patches",)
READING_HEAD = "reading_head."  # before the names of its parameters
SAM_INPUTS = (
    *("sam_pixel_values", "original_sizes", "reshaped_input_sizes", "image_token_grids", "mask_labels", "num_objects"),
    "patch_places",  # of the slot pull
)


class WarmupTrainer(MetricMeansMixin, RobustTrainerMixin, WindowCountsMixin, Trainer):
    r"""[`~transformers.Trainer`] of a VLM on reference answers, before its SAE is trained.

    Different from its parent: reads rows in the row schema, averages the language loss over the tokens of the whole
    accumulation window and all processes, can align words with patches, can make the answer readable at the layer of
    the SAE, and at evaluation writes answers freely to see how many are well-formed. Of a
    `SegCompassForReasoningSegmentation` the inner VLM is trained, in place: an SAE it already has then reads states
    that have changed, and needs training again.

    Logged beside `loss`: `language_loss`, `token_accuracy`, `alignment_loss`, `embedding_alignment_loss`,
    `reading_loss` and `reading_accuracy` (of objects, those pointed at). Evaluation adds `eval_format_share`
    (of free greedy answers, those that `format_reward` gives 1.0).

    Args:
        model (`PreTrainedModel` or `str`): Any `AutoModelForImageTextToText` whose embeddings hold the processor's
            tokens (`add_tokens`), or a `SegCompassForReasoningSegmentation`; or the folder or id of one.
        args ([`WarmupConfig`], *optional*): Settings.
        train_dataset, eval_dataset: Rows in the row schema.
        processing_class (`SegCompassProcessor`, *optional*): Loaded from where the model comes from when left out; for
            a bare VLM without one from [`SegCompassProcessor.from_parts`].
        peft_config (`peft.PeftConfig`, *optional*): Trains adapters in place of weights, and the rows of the added
            tokens. `merge_adapters` puts them into the weights afterwards.
        target_words (`Callable`, defaults to `instruction_words`): Row -> words that mean its target (alignment).
        names (`Callable`, defaults to `target_names`): Row -> its names (`alignment_pairs="names"`).
        data_collator (`Callable`, *optional*): In place of a [`SegmentationCollator`].
        kwargs: For [`~transformers.Trainer`].
    """

    def __init__(
        self,
        model: nn.Module | str,
        args: WarmupConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        target_words: Callable[[dict], list[str]] = instruction_words,
        names: Callable[[dict], list[Name]] = target_names,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        args = WarmupConfig("warmup") if args is None else args
        set_seed(args.seed)  # before new weights are drawn, such as adapters'
        model = load_model(model)
        processing_class = load_processor(processing_class, model, SegCompassProcessor)
        self.segcompass = model if hasattr(model, "vlm") else None
        self.vlm = model.vlm if self.segcompass is not None else model
        _check_tokens(self.vlm, processing_class.tokenizer)
        self.alignment_layer = _alignment_layer(model, self.vlm, args.alignment_layer)
        token_ids = [getattr(processing_class, f"{name}_token_id") for name in ("ref", "think_start", "think_end")]
        if peft_config is None:
            choose_trainable(self.vlm, args.trainable, token_ids)
            if args.trainable == "all" and args.ddp_find_unused_parameters is None:
                args.ddp_find_unused_parameters = True  # LLaVA reads its vision encoder before the last layer
        if data_collator is None:
            self.check_text = RowTextCheck(processing_class)
            data_collator = SegmentationCollator(
                processing_class,
                missing_reasoning=args.missing_reasoning,
                inputs="language",
                with_masks=False,
                extra=_state_targets(processing_class, args, target_words, names),
            )
        super().__init__(
            model=self.vlm if peft_config is None else add_adapters_to_vlm(self.vlm, peft_config, token_ids),
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.label_names = ["labels"]  # adapters hide the VLM's own signature from Trainer
        self.reading_head: ReadingHead | None = None
        if args.reading_weight:
            self._add_reading_head()

    def _add_reading_head(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "reading_weight is not 0 and FSDP or DeepSpeed shares the weights: the reading head is no part of the "
                "model that they step; train without them, or set reading_weight=0."
            )
        hidden_size = self.vlm.config.get_text_config().hidden_size
        head = ReadingHead(hidden_size, self.processing_class.num_slots, self.args.seed)
        self.reading_head = head.to(self.args.device)
        self.add_callback(ReadingHeadSteps(self))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None
    ) -> Any:
        counts, scale = self.window_counts(inputs, num_items_in_batch), self.loss_scale(num_items_in_batch)
        inputs = {name: value for name, value in inputs.items() if name not in SAM_INPUTS}
        labels, _ = inputs.pop("labels"), inputs.pop("completion_mask", None)
        names = (*ALIGNMENT_INPUTS, *PAIR_INPUTS, *READING_INPUTS)
        targets = {name: inputs.pop(name) for name in names if name in inputs}
        output = model(
            **sequence_inputs(self.vlm, {**inputs, **logits_to_keep(self.vlm, labels)}),
            output_hidden_states=bool(targets),
        )
        language_loss, num_tokens, num_right = language_loss_sums(output.logits, labels)
        loss = language_loss / counts.tokens
        if model.training:
            self.means.add("language_loss", language_loss, num_tokens)
            self.means.add("token_accuracy", num_right, num_tokens)
        if targets:
            loss = loss + self._state_losses(output.hidden_states, inputs, targets, counts, model.training)
        loss = loss * scale
        return (loss, output) if return_outputs else loss

    def _state_losses(
        self, hidden_states: Any, inputs: Mapping[str, Any], targets: dict[str, Any], counts: Any, training: bool
    ) -> torch.Tensor:
        """What is asked of the states at `alignment_layer` and before the first layer, weighted."""
        is_image = inputs["input_ids"] == self.processing_class.image_token_id
        patches, total = targets.pop("object_patches", None), 0.0
        for place, weight in self.args.alignment_weights.items() if targets else ():
            layer, label = (self.alignment_layer, "") if place == "layer" else (0, "embedding_")
            align = pair_alignment_loss if "pair_words" in targets else alignment_loss
            states = hidden_states[layer]
            aligned, num_aligned = align(states, *targets.values(), is_image, self.args.alignment_temperature)
            total = total + weight * aligned / counts.alignment_items
            if training:
                self.means.add(f"{label}alignment_loss", aligned, num_aligned)
        if patches is not None and self.reading_head is not None:
            reading = self.reading_head(hidden_states[self.alignment_layer], inputs["attention_mask"], is_image)
            missed, num_objects, num_found = reading_loss(reading, patches)
            total = total + self.args.reading_weight * missed / counts.samples
            if training:
                self.means.add("reading_loss", missed, len(patches))
                self.means.add("reading_accuracy", num_found, num_objects)
        return total

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is not None:
            return self.optimizer
        args, head = self.args, self.reading_head
        factors = dict(args.learning_rate_factors or {})
        head_factor = factors.pop(READING_HEAD.rstrip("."), 1.0)
        if args.optimizer == "muon":
            from ..loop.muon import muon_with_factors

            named = list(self.vlm.named_parameters())
            if head is not None:
                factors[READING_HEAD] = head_factor
                named += [(READING_HEAD + name, parameter) for name, parameter in head.named_parameters()]
            self.optimizer = muon_with_factors(named, args.learning_rate, args.weight_decay, factors)
        else:
            groups = parameter_groups(self.vlm, args.learning_rate, args.weight_decay, factors)
            if head is not None:
                rate = args.learning_rate * head_factor
                groups.append({"params": list(head.parameters()), "lr": rate, "weight_decay": 0.0})
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, self.vlm)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # Evaluation

    def evaluation_loop(
        self, dataloader: Any, description: Any, *args: Any, metric_key_prefix: Any = "eval", **kwargs: Any
    ) -> Any:
        """The loss on reference answers, and how many free answers are well-formed."""
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.args.num_eval_generations:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                logger.warning_once(
                    "evaluation writes no answers: processes that share weights would have to write answers of one "
                    "length; look at a saved checkpoint instead, and set num_eval_generations=0."
                )
                return output
            share = self.format_share(dataloader.dataset, self.args.num_eval_generations)
            output.metrics[f"{metric_key_prefix}_format_share"] = share
        return output

    def format_share(self, rows: Any, num_rows: int = -1) -> float:
        """Share of the first `num_rows` (-1: all) rows whose free greedy answer is well-formed."""
        from accelerate.utils import gather_object

        mine = FirstRows(rows, num_rows, self.accelerator.process_index, self.accelerator.num_processes)
        size, rewards = self.args.per_device_eval_batch_size, []
        for start in range(0, len(mine), size):
            answers = self.answer(mine[start : start + size])
            logger.info("a free answer: %s", answers[0])
            rewards += format_reward(answers, num_slots=self.processing_class.num_slots)
        rewards = gather_object(rewards)
        return sum(reward == 1.0 for reward in rewards) / len(rewards)

    @torch.no_grad()
    def answer(self, rows: list[dict[str, Any]]) -> list[str]:
        """What the VLM writes, greedily and without any help with the format, for rows in the row schema."""
        processor, model = self.processing_class, self.accelerator.unwrap_model(self.model)
        images = [to_rgb_image(row["image"]) for row in rows]
        batch = language_inputs(processor, images, [row["instruction"] for row in rows])
        inputs = {name: value.to(self.args.device) for name, value in batch.items()}
        was_training = model.training
        model.eval()  # in training mode gradient checkpointing would drop the cache
        try:
            sequences = model.generate(
                **inputs,
                max_new_tokens=self.args.eval_max_new_tokens,
                do_sample=False,
                suppress_tokens=None if processor.image_token_id is None else [processor.image_token_id],
                eos_token_id=processor.end_of_turn_token_id,
                pad_token_id=processor.tokenizer.pad_token_id,
            )
        finally:
            model.train(was_training)
        answers = sequences[:, inputs["input_ids"].shape[1] :]
        return processor.tokenizer.batch_decode(answers, skip_special_tokens=True)

    def reads_images(self) -> tuple[nn.Module, Any]:
        return self.vlm, self.processing_class

    # Saving

    def loop_state(self) -> dict[str, Any]:
        head = None if self.reading_head is None else self.reading_head.state_dict()
        return super().loop_state() | {"reading_head": head}

    def load_loop_state(self, state: dict[str, Any]) -> None:
        super().load_loop_state(state)
        if self.reading_head is not None and state.get("reading_head") is not None:
            self.reading_head.load_state_dict(state["reading_head"])

    def merge_adapters(self) -> nn.Module:
        """Put trained adapters into the weights. Returns the model that the trainer was given."""
        if hasattr(self.model, "merge_and_unload"):
            self.vlm = self.model = self.model_wrapped = self.accelerator.unwrap_model(self.model).merge_and_unload()
            if self.segcompass is not None:
                self.segcompass.vlm = self.vlm
        return self.vlm if self.segcompass is None else self.segcompass

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what the trainer was given: a bare VLM, a whole SegCompass, or (until merged) the adapters.

        Checkpoints hold what trains, the VLM; so does the result where FSDP or ZeRO shares the weights
        (`segcompass init --vlm RESULT --sam ...` puts it together again).
        """
        is_whole = self.segcompass is not None and not hasattr(self.model, "merge_and_unload")
        if not is_whole or _internal_call or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            self.segcompass.save_pretrained(output_dir)
            self.processing_class.save_pretrained(output_dir)


def _state_targets(
    processor: Any, args: WarmupConfig, target_words: Callable, names: Callable
) -> Callable[..., dict[str, torch.Tensor]] | None:
    """Collator's `extra`: what the losses on states need of a batch; `None` where there is no such loss."""
    extras: list[Callable] = []
    if args.alignment_weights and args.alignment_pairs == "names":
        extras.append(TokenPairs(processor, names))
    elif args.alignment_weights:
        extras.append(AlignmentTargets(processor, target_words, args.alignment_text))
    if args.reading_weight:
        extras.append(ObjectPatches(processor))
    return _Together(extras) if extras else None


class _Together:
    """Several `extra` of a collator as one; an object, so that it reaches data loader workers."""

    def __init__(self, extras: list[Callable]):
        self.extras = extras

    def __call__(self, *args: Any) -> dict[str, torch.Tensor]:
        return {name: value for extra in self.extras for name, value in extra(*args).items()}


def _alignment_layer(model: nn.Module, vlm: nn.Module, layer: int | None) -> int:
    """The layer asked for, or else the one that the SAE reads or will read by default."""
    if layer is None:
        layer = model.config.sae_layer if hasattr(model, "vlm") else default_sae_layer(model.config)
    depth = len(decoder_layers(vlm))
    if not 0 <= layer <= depth:
        raise ValueError(
            f"alignment_layer is an index into hidden_states, 0 (embeddings) to {depth} for this VLM, got {layer}."
        )
    return layer


def _check_tokens(vlm: nn.Module, tokenizer: Any) -> None:
    rows = num_token_rows(vlm)
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the VLM embeds {rows}; call "
            "segcompass_hf.token_rows_segcompass.add_tokens(processor.tokenizer, vlm) first."
        )
