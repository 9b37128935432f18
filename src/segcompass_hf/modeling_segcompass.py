# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The composition: VLM, sparse concepts, slots, heatmaps and SAM masks in one model, with one VLM pass."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel, SamModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_segcompass import SegCompassConfig
from .delegation_segcompass import VlmDelegationMixin
from .freezing_segcompass import TokenRowsMixin, freeze_for_training, parameter_groups
from .generation_segcompass import CACHE, HiddenStateCapture
from .loading_segcompass import LoadingMixin
from .losses_segcompass import SegmentationLossOutput, SlotAssignments, segmentation_loss
from .modeling_concepts import (
    ConceptCodebook,
    Interventions,
    SparseConcepts,
    apply_interventions,
    encode_concepts,
    normalize_interventions,
    steer_hidden_states,
)
from .modeling_heatmaps import SlotMapper, SlotMapperOutput
from .modeling_masks import SamMaskStage
from .modeling_sae import SegCompassSae
from .modeling_slots import SlotEncoder, SlotEncoderOutput
from .original_inputs_segcompass import duplicate_completion, limit_image_tokens
from .segmenting_segcompass import SegCompassSegmentationOutput, SegmentingMixin


@dataclass
class SegCompassOutput(ModelOutput):
    """Output of [`SegCompassForReasoningSegmentation`]. Without an image for SAM only the language fields are set, and
    with `slots_alone` only those of the slots.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): `lm_loss_weight * language_loss` (given `labels`) plus the
            weighted segmentation losses (given `mask_labels`).
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): Of the VLM.
        heatmap_logits (`torch.Tensor` of shape `(batch_size, num_slots, 4h, 4w)`): Slot maps before SAM, padding not
            masked; `h`, `w` are the sides of SAM's image embedding.
        slot_logits (`torch.Tensor` of shape `(batch_size, num_slots)`): Confidence that a slot holds an object.
        pred_masks (`torch.Tensor` of shape `(batch_size, num_slots, 4h, 4w)`, *optional*): Mask logits; `None` where
            only matched slots were decoded (training).
        slots (`torch.Tensor` of shape `(batch_size, num_slots, d_slot)`): Concept slots.
        reference_states (`torch.Tensor` of shape `(batch_size, num_slots, hidden_size)`): Last hidden states at the
            `<REF_POS>` tokens, zeros where there are fewer than slots.
        concepts ([`SparseConcepts`], *optional*): Active concepts per token, with `output_concepts=True`.
        concept_embeddings (`torch.Tensor` of shape `(batch_size, sequence_length, d_slot)`, *optional*): What slots
            read, with `output_concept_embeddings=True`.
        slot_attentions (`tuple[torch.Tensor]`, *optional*): One per slot encoder layer, of shape
            `(batch_size, num_heads, num_slots, num_slots + sequence_length)`, with `output_slot_attentions=True`.
        image_embeddings (`torch.Tensor` of shape `(batch_size, channels, h, w)`, *optional*): SAM's, with
            `output_image_embeddings=True`.
        language_loss, segmentation_loss, confidence_loss (`torch.Tensor` of shape `()`, *optional*): Before weights.
        losses ([`SegmentationLossOutput`], *optional*): The single terms and the matched pairs.
        cache (`Cache`, *optional*): Of the VLM, with `use_cache=True`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    heatmap_logits: torch.Tensor | None = None
    slot_logits: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    reference_states: torch.Tensor | None = None
    concepts: SparseConcepts | None = None
    concept_embeddings: torch.Tensor | None = None
    slot_attentions: tuple[torch.Tensor, ...] | None = None
    image_embeddings: torch.Tensor | None = None
    language_loss: torch.Tensor | None = None
    segmentation_loss: torch.Tensor | None = None
    confidence_loss: torch.Tensor | None = None
    losses: SegmentationLossOutput | None = None
    cache: Any | None = None

    @property
    def past_key_values(self) -> Any | None:
        """`cache`, by the name it has had before transformers 5.24."""
        return self.cache


def gather_reference_states(
    last_states: torch.Tensor,
    is_reference: torch.Tensor,
    num_slots: int,
    order: Literal["earliest_first", "latest_first"] = "earliest_first",
) -> torch.Tensor:
    """States at the last `num_slots` reference tokens of each row; zeros for slots that have none.

    Args:
        last_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Last hidden states.
        is_reference (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Where the reference tokens are.
        num_slots (`int`): K.
        order (`str`): Which of them slot 0 gets.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_slots, hidden_size)`.
    """
    rank_from_end = is_reference.long().flip(1).cumsum(1).flip(1)  # 1 for the last reference token
    kept = is_reference & (rank_from_end <= num_slots)
    slot = rank_from_end - 1 if order == "latest_first" else kept.long().cumsum(1) - 1
    rows, columns = kept.nonzero(as_tuple=True)
    states = last_states.new_zeros(last_states.shape[0], num_slots, last_states.shape[-1])
    return states.index_put((rows, slot[rows, columns]), last_states[rows, columns])


class SegCompassPreTrainedModel(PreTrainedModel):
    """Weight initialisation and capabilities shared with the Auto classes."""

    config_class = SegCompassConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the segmentation loss is a mean per micro-batch: let Trainer divide by their number
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # bf16 breaks SAM's positional encoding (errors up to 0.13).
    _keep_in_fp32_modules_strict = ["shared_image_embedding", "shared_embedding"]
    # Units of sharding beside the layers of VLM and SAM: what is called as a module, so that its weights are gathered.
    _no_split_modules = ["SamVisionEncoder", "SamMaskDecoder", "ConceptCodebook", "SlotEncoder", "SlotMapper"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):
            # By fan-in, as the original: with a fixed std the heads of small models would hardly react.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif type(module).__module__ in _OWN_MODULES and hasattr(module, "reset_parameters"):
            if isinstance(module, nn.Embedding):
                init.normal_(module.weight, std=self.config.initializer_range)
            else:
                module.reset_parameters()
        else:
            super()._init_weights(module)


_OWN_MODULES = {cls.__module__ for cls in (ConceptCodebook, SlotEncoder, SlotMapper)}


class SegCompassForReasoningSegmentation(
    LoadingMixin, SegmentingMixin, TokenRowsMixin, VlmDelegationMixin, SegCompassPreTrainedModel
):
    r"""Reasoning segmentation: an image and an instruction -> reasoning in words and one mask per slot.

    One pass of the VLM yields the logits, the states after `sae_layer` layers and the last states. The former become
    sparse concepts (`sae`), concept embeddings (`codebook`) and slots (`slot_encoder`); the latter, read at the
    `<REF_POS>` tokens, join the slots in the `slot_mapper`, whose heatmaps prompt `sam`.

    Args:
        config ([`SegCompassConfig`]): The configuration.
        vlm (`PreTrainedModel`, *optional*): A loaded VLM; built from `config.vlm_config` when left out.
        sam (`SamModel`, *optional*): A loaded SAM.
        sae ([`SegCompassSae`], *optional*): A trained SAE.
    """

    def __init__(
        self,
        config: SegCompassConfig,
        vlm: PreTrainedModel | None = None,
        sam: SamModel | None = None,
        sae: SegCompassSae | None = None,
    ):
        super().__init__(config)
        self.vlm = vlm if vlm is not None else AutoModelForImageTextToText.from_config(config.vlm_config)
        self.sam = sam if sam is not None else SamModel._from_config(config.sam_config)
        self.sae = sae if sae is not None else SegCompassSae._from_config(config.sae_config)
        # The children hold copies: resizing the VLM's embeddings must show in what we save.
        config.vlm_config, config.sam_config, config.sae_config = self.vlm.config, self.sam.config, self.sae.config
        # The VLM ties its rows itself; PEFT asks the whole model, and would train two sets of rows where it says no.
        config.tie_word_embeddings = bool(getattr(self.vlm.config, "tie_word_embeddings", False))
        self._tied_weights_keys = {f"vlm.{key}": f"vlm.{of}" for key, of in self.vlm.all_tied_weights_keys.items()}
        self.codebook = ConceptCodebook(config.sae_config.d_sae, config.d_slot)
        self.slot_encoder = SlotEncoder(config)
        sam_dim = config.sam_config.mask_decoder_config.hidden_size
        self.slot_mapper = SlotMapper(config, hidden_size=config.hidden_size, sam_dim=sam_dim)
        self.post_init()
        # accelerate's FSDP refuses names of which there is no module, and VLMs name some (CLIP's text tower).
        self._no_split_modules = {type(module).__name__ for module in self.modules()} & set(self._no_split_modules)

    @property
    def mask_stage(self) -> SamMaskStage:
        """The mask decoder's interface: image -> embeddings; embeddings and heatmaps -> masks."""
        return SamMaskStage(self.sam)

    def freeze_for_training(self, train_token_rows: Literal["head", "none", "both"] | None = None):
        """Leave trainable what the method trains; see `freezing_segcompass`. Returns the model.

        Args:
            train_token_rows (`str`, *optional*): `config.train_token_rows` when left out.
        """
        freeze_for_training(self, train_token_rows or self.config.train_token_rows)
        return self

    def parameter_groups(
        self, learning_rate: float, weight_decay: float = 0.0, factors: dict[str, float] | None = None
    ) -> list[dict]:
        """Optimizer groups: learning rates by part, no decay where rows are frozen. See `freezing_segcompass`."""
        return parameter_groups(self, learning_rate, weight_decay, factors)

    # The stages, each of use on its own (ablations, attribution, trainers).

    def encode_image(self, sam_pixel_values: torch.Tensor) -> torch.Tensor:
        """SAM features `(batch_size, channels, h, w)` of `sam_pixel_values` `(batch_size, 3, canvas, canvas)`."""
        return self.mask_stage.encode_image(sam_pixel_values)

    def modality_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """1 on image (and video) tokens, 0 on text; `(batch_size, sequence_length)`."""
        ids = [i for i in (self.config.image_token_id, self.config.video_token_id) if i is not None]
        return torch.isin(input_ids, torch.tensor(ids, device=input_ids.device)).long()

    def encode_concepts(
        self,
        layer_states: torch.Tensor,
        attention_mask: torch.Tensor,
        modality_ids: torch.Tensor,
        interventions: Interventions = None,
    ) -> SparseConcepts:
        """Active concepts of states `(batch_size, sequence_length, hidden_size)`, interventions applied; no grad."""
        concepts = encode_concepts(
            self.sae,
            layer_states,
            attention_mask,
            self.config.concept_threshold,
            modality_ids,
            chunk_size=self.config.concept_chunk_size,
        )
        return apply_interventions(concepts, interventions, attention_mask, modality_ids, self.config.sae_config.d_sae)

    def encode_slots(
        self, concepts: SparseConcepts, attention_mask: torch.Tensor, output_attentions: bool = False
    ) -> SlotEncoderOutput:
        """Slots `(batch_size, num_slots, d_slot)` of sparse concepts; differentiable in `concepts.values`."""
        return self.slot_encoder(self.codebook(concepts), attention_mask, output_attentions=output_attentions)

    def find_reference_states(
        self,
        last_states: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        completion_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Last states at the last K `<REF_POS>`, searched and ordered as the configuration says.

        Without a `completion_mask` there is no completion to search: all zeros (the prompt may name the token).

        Returns:
            `torch.Tensor` of shape `(batch_size, num_slots, hidden_size)`.
        """
        if self.config.ref_token_id is None:
            raise ValueError(
                "config.ref_token_id is None, so no <REF_POS> can be found; set it to the tokenizer's id of <REF_POS>."
            )
        where = attention_mask.bool()
        if self.config.reference_search == "completion":
            where = where & (completion_mask.bool() if completion_mask is not None else False)
        is_reference = (input_ids == self.config.ref_token_id) & where
        return gather_reference_states(last_states, is_reference, self.config.num_slots, self.config.reference_order)

    def predict_masks(
        self,
        reference_states: torch.Tensor,
        slots: torch.Tensor,
        image_embeddings: torch.Tensor,
        reshaped_input_sizes: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From reference states and slots (perhaps changed by the caller) to masks.

        Args:
            reference_states (`torch.Tensor` of shape `(batch_size, num_slots, hidden_size)`): At the `<REF_POS>`.
            slots (`torch.Tensor` of shape `(batch_size, num_slots, d_slot)`): Concept slots.
            image_embeddings (`torch.Tensor` of shape `(batch_size, channels, h, w)`): SAM features.
            reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*): (height, width) in pixels of
                the image on SAM's canvas; the whole canvas counts as image when left out.

        Returns:
            `tuple`: `heatmap_logits` `(batch_size, num_slots, 4h, 4w)`, `slot_logits` `(batch_size, num_slots)`,
            `pred_masks` `(batch_size, num_slots, 4h, 4w)`.
        """
        mapped = self.slot_mapper(reference_states, slots, image_embeddings)
        area = self._valid_area(reshaped_input_sizes, image_embeddings)
        pred_masks = self.mask_stage.decode(image_embeddings, mapped.heatmap_logits, area)
        return mapped.heatmap_logits, mapped.slot_logits, pred_masks

    def _valid_area(self, sizes: torch.Tensor | None, image_embeddings: torch.Tensor) -> torch.Tensor | None:
        return None if sizes is None else self.mask_stage.valid_area(sizes.to(image_embeddings.device))

    def _image_embeddings(
        self, sam_pixel_values: torch.Tensor | None, image_embeddings: torch.Tensor | None, batch_size: int
    ) -> torch.Tensor | None:
        """SAM features, given or computed, checked against the number of rows."""
        if image_embeddings is None and sam_pixel_values is None:
            return None
        if image_embeddings is not None and sam_pixel_values is not None:
            raise ValueError("got both sam_pixel_values and image_embeddings; pass one of them.")
        if image_embeddings is None:
            image_embeddings = self.encode_image(sam_pixel_values)
        if image_embeddings.shape[0] != batch_size:
            raise ValueError(
                f"got SAM features of {image_embeddings.shape[0]} images for {batch_size} sequences; pass one image "
                "per sequence."
            )
        return image_embeddings

    # Training and inference.

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        sam_pixel_values: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        completion_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        mask_labels: torch.Tensor | None = None,
        num_objects: torch.LongTensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        reference_states: torch.Tensor | None = None,
        interventions: Interventions = None,
        output_concepts: bool = False,
        output_concept_embeddings: bool = False,
        output_slot_attentions: bool = False,
        output_image_embeddings: bool = False,
        slots_alone: bool = False,
        decode_masks: Literal["auto", "all", "matched"] = "auto",
        match_slots: Callable[[SegCompassOutput], SlotAssignments] | None = None,
        num_segmentation_items: int | torch.Tensor | None = None,
        num_samples: int | torch.Tensor | None = None,
        **vlm_kwargs,
    ) -> SegCompassOutput:
        r"""Read a whole sequence (prompt and completion) once and segment.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Prompt and completion ids.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 on tokens.
            pixel_values (`torch.Tensor`, *optional*): The VLM's own image input.
            sam_pixel_values (`torch.Tensor` of shape `(batch_size, 3, canvas, canvas)`, *optional*): SAM's input.
            image_embeddings (`torch.Tensor` of shape `(batch_size, channels, h, w)`, *optional*): SAM features, in
                place of `sam_pixel_values`. Without either only the language model runs.
            completion_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 on the completion;
                where `labels` count when left out.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Language targets, -100
                where nothing is asked.
            mask_labels (`torch.Tensor` of shape `(batch_size, num_masks, 4h, 4w)`, *optional*): Targets in [0, 1].
            num_objects (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Objects per sample.
            reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*): (height, width) in pixels of
                the image on SAM's canvas.
            original_sizes (*optional*): Accepted so that `model(**inputs)` works; not read.
            slots, reference_states (`torch.Tensor`, *optional*): Replace the computed ones (ablations).
            interventions (*optional*): See [`ConceptIntervention`]; `{feature: scale}` acts on concepts.
            output_concepts, output_concept_embeddings, output_slot_attentions, output_image_embeddings (`bool`):
                Return these too.
            slots_alone (`bool`, defaults to `False`): Leave everything to the slots, as the start of training may: the
                VLM's pass ends at the SAE's layer, without gradient, and reference states are zeros, so that there are
                no logits and no language loss. Without an image the output ends with slots and their confidences.
            decode_masks (`str`, defaults to `"auto"`): Whether `all` slots or only `matched` ones go through SAM's
                decoder; `auto` is `matched` in training with `mask_labels`.
            match_slots (`Callable`, *optional*): Matches slots to the objects of `mask_labels`, in place of their
                heatmaps; called with the output as it is before any loss.
            num_segmentation_items, num_samples (*optional*): Size of the larger batch this one is part of; see
                [`segmentation_loss`].
            vlm_kwargs: Everything else goes to the VLM.

        Returns:
            [`SegCompassOutput`]
        """
        if input_ids is None:
            raise ValueError("SegCompass finds <REF_POS> by its id and needs input_ids, got None.")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if completion_mask is None and labels is not None:
            completion_mask = labels != -100
        interventions = normalize_interventions(interventions, self.config.sae_config.d_sae)
        modality_ids = self.modality_ids(input_ids)
        vlm_inputs = {"attention_mask": attention_mask, "pixel_values": pixel_values, "use_cache": False, **vlm_kwargs}
        output = SegCompassOutput()
        if slots_alone:
            capture = self._run_to_sae(input_ids, vlm_inputs, interventions, modality_ids)
        else:
            # The language loss is left to the VLM; a weight of 0 saves its cost.
            vlm_labels = labels if self.config.lm_loss_weight else None
            with self._capture(interventions, attention_mask, modality_ids) as capture:
                vlm_output = self.vlm(
                    input_ids=input_ids,
                    labels=vlm_labels,
                    **self._with_positions({k: v for k, v in vlm_inputs.items() if v is not None}),
                )
            output.logits, output.cache = vlm_output.logits, vlm_output.get(CACHE)
            if vlm_labels is not None:
                output.language_loss = vlm_output.loss
                output.loss = self.config.lm_loss_weight * output.language_loss
        image_embeddings = self._image_embeddings(sam_pixel_values, image_embeddings, input_ids.shape[0])
        if image_embeddings is None and mask_labels is not None:
            raise ValueError("mask_labels need an image for SAM: pass sam_pixel_values or image_embeddings.")
        wants_slots = image_embeddings is not None or slots_alone
        if not wants_slots and not output_concepts:
            return output

        layer_states, last_states = (capture.layer_states[0], None) if slots_alone else capture.states()
        if reference_states is None and slots_alone:
            reference_states = layer_states.new_zeros(len(input_ids), self.config.num_slots, self.config.hidden_size)
        elif reference_states is None and wants_slots:
            reference_states = self.find_reference_states(last_states, input_ids, attention_mask, completion_mask)
        concept_inputs = layer_states, attention_mask, modality_ids
        if self.config.concept_input == "duplicated":
            concept_inputs = self._duplicated_states(input_ids, completion_mask, interventions, vlm_inputs)
        concepts = self.encode_concepts(*concept_inputs, interventions)
        output.concepts = concepts if output_concepts else None
        if not wants_slots:
            return output
        embeddings = self.codebook(concepts)  # (batch_size, sequence_length, d_slot)
        encoded = self.slot_encoder(embeddings, concept_inputs[1], output_attentions=output_slot_attentions)
        output.concept_embeddings = embeddings if output_concept_embeddings else None
        output.slots = encoded.slots if slots is None else slots
        output.reference_states, output.slot_attentions = reference_states, encoded.attentions
        if image_embeddings is None:
            output.slot_logits = self.slot_mapper(reference_states, output.slots).slot_logits
            return output
        output.image_embeddings = image_embeddings if output_image_embeddings else None

        mapped = self.slot_mapper(reference_states, output.slots, image_embeddings)
        output.heatmap_logits, output.slot_logits = mapped.heatmap_logits, mapped.slot_logits
        area = self._valid_area(reshaped_input_sizes, image_embeddings)
        decode = partial(self.mask_stage.decode, image_embeddings, mapped.heatmap_logits, area)
        only_matched = decode_masks == "matched" or (decode_masks == "auto" and self.training)
        if mask_labels is None or not only_matched:
            output.pred_masks = decode()
        if mask_labels is not None:
            masks = (lambda a: decode(pairs=a.pairs)) if output.pred_masks is None else output.pred_masks
            counts = {"num_items": num_segmentation_items, "num_samples": num_samples}
            if match_slots is not None:
                counts["assignments"] = match_slots(output)
            output.losses = self.segmentation_loss(mapped, masks, mask_labels, num_objects, area, **counts)
            output.segmentation_loss = output.losses.segmentation_loss
            output.confidence_loss = output.losses.confidence_loss
            output.loss = output.losses.loss if output.loss is None else output.loss + output.losses.loss
        return output

    def segmentation_loss(
        self,
        mapped: SlotMapperOutput,
        pred_masks,
        mask_labels: torch.Tensor,
        num_objects: torch.Tensor | None,
        valid_area: torch.Tensor | None,
        **kwargs,
    ) -> SegmentationLossOutput:
        """[`segmentation_loss`] with this model's weights."""
        config = self.config
        return segmentation_loss(
            mapped.heatmap_logits,
            pred_masks,
            mapped.slot_logits,
            mask_labels,
            num_objects,
            valid_area,
            seg_loss_weight=config.seg_loss_weight,
            conf_loss_weight=config.conf_loss_weight,
            heatmap_bce_weight=config.heatmap_bce_weight,
            heatmap_dice_weight=config.heatmap_dice_weight,
            mask_dice_weight=config.mask_dice_weight,
            mask_focal_weight=config.mask_focal_weight,
            match_confidence_weight=config.match_confidence_weight,
            match_valid_area_only=config.valid_area_only,
            empty_samples=config.empty_samples,
            **kwargs,
        )

    @torch.no_grad()
    def _run_to_sae(
        self, input_ids: torch.Tensor, vlm_inputs: dict, interventions: list, modality_ids: torch.Tensor
    ) -> HiddenStateCapture:
        """Pass a whole sequence through the layers below the SAE; what lies above is not computed."""
        inputs = {k: v for k, v in vlm_inputs.items() if v is not None and k != "logits_to_keep"}
        with self._capture(interventions, inputs["attention_mask"], modality_ids, stop=True) as capture:
            self.base_model(input_ids=input_ids, **self._with_positions(inputs))
        return capture

    def _capture(
        self, interventions: list, attention_mask: torch.Tensor, modality_ids: torch.Tensor, stop: bool = False
    ) -> HiddenStateCapture:
        """Context that reads the VLM's states and steers them where an intervention acts on the residual stream.

        Tokens after those of `attention_mask` (generated ones) are text. `stop` ends the pass at the SAE's layer.
        """
        edit = None
        if any(intervention.where == "residual" for intervention in interventions):

            def edit(states: torch.Tensor, passed: int) -> torch.Tensor:
                span = slice(passed, passed + states.shape[1])
                if passed >= attention_mask.shape[1]:
                    return steer_hidden_states(
                        self.sae, states, interventions, None, states.new_zeros(states.shape[:2], dtype=torch.long)
                    )
                copies = states.shape[0] // attention_mask.shape[0]  # num_return_sequences
                mask, modality = (x[:, span].repeat_interleave(copies, 0) for x in (attention_mask, modality_ids))
                return steer_hidden_states(self.sae, states, interventions, mask, modality)

        return HiddenStateCapture(self.base_model, self.config.sae_layer, edit, stop)

    def _with_positions(self, vlm_inputs: dict) -> dict:
        """Count positions from the first token, as generation does, so that left padding changes nothing.

        Families with multimodal rotary positions count them themselves.
        """
        if "position_ids" in vlm_inputs or hasattr(self.base_model, "get_rope_index"):
            return vlm_inputs
        positions = (vlm_inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
        return {**vlm_inputs, "position_ids": positions}

    @torch.no_grad()
    def _duplicated_states(
        self,
        input_ids: torch.Tensor,
        completion_mask: torch.Tensor | None,
        interventions: list,
        vlm_inputs: dict,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States, mask and modality of the SAE input of the original code: a second pass, for its checkpoints only."""
        if completion_mask is None:
            raise ValueError(
                'concept_input="duplicated" repeats the completion and needs a completion_mask, got None; for prompts '
                'alone use concept_input="once".'
            )
        pad = self.config.get_text_config().pad_token_id or 0
        starts = completion_mask.long().argmax(dim=1)
        start = int(starts[completion_mask.bool().any(dim=1)].min()) if bool(completion_mask.any()) else None
        ids = input_ids.masked_fill(~vlm_inputs["attention_mask"].bool(), pad)
        completion = ids[:, start:] if start is not None else ids[:, :0]
        ids, mask, positions = duplicate_completion(input_ids, vlm_inputs["attention_mask"], completion, pad)
        if self.config.image_token_id is not None:
            per_row = int((input_ids[:, :start] == self.config.image_token_id).sum(1).max())
            ids = limit_image_tokens(ids, self.config.image_token_id, per_row, pad)
        modality_ids = self.modality_ids(ids)
        vlm_inputs = {k: v for k, v in vlm_inputs.items() if v is not None and k not in ("position_ids", "use_cache")}
        vlm_inputs["attention_mask"] = mask
        if "mm_token_type_ids" in vlm_inputs:
            vlm_inputs["mm_token_type_ids"] = modality_ids
        if not hasattr(self.base_model, "get_rope_index"):
            vlm_inputs["position_ids"] = positions
        with self._capture(interventions, mask, modality_ids) as capture:
            self.base_model(input_ids=ids, use_cache=False, **vlm_inputs)
        return capture.states()[0], mask, modality_ids


SegCompassForReasoningSegmentation.register_for_auto_class("AutoModel")

__all__ = [
    "SegCompassForReasoningSegmentation",
    "SegCompassOutput",
    "SegCompassPreTrainedModel",
    "SegCompassSegmentationOutput",
]
