# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""From the states of sequences to masks: concepts, slots, heatmaps, masks. Every caller takes this one path."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers.utils import ModelOutput, logging

from .concept_grids_segcompass import ConceptGrid, ConceptGridsMixin
from .configuration_segcompass import SegCompassConfig
from .image_features_segcompass import ImageFeatures, parts_of
from .interventions_segcompass import Interventions, apply_interventions
from .losses_segcompass import SegmentationLossOutput, SlotAssignments, segmentation_loss
from .modeling_concepts import SparseConcepts, encode_concepts
from .modeling_masks import PADDING_LOGIT
from .modeling_sae import SegCompassSae
from .modeling_slots import SlotEncoderOutput
from .prompt_copies_segcompass import PromptCopies

logger = logging.get_logger(__name__)

# Fields of the configuration that are arguments of `segmentation_loss` by the same name.
_LOSS_OPTIONS = (
    "seg_loss_weight",
    "conf_loss_weight",
    "heatmap_bce_weight",
    "heatmap_dice_weight",
    "mask_dice_weight",
    "mask_focal_weight",
    "match_confidence_weight",
    "empty_samples",
)


@dataclass
class SegCompassOutput(ModelOutput):
    """Output of [`SegCompassForReasoningSegmentation`], its `read_masks` and its `predict_masks`.

    Language fields are those of `forward` alone; without an image for SAM it sets no others, and with `slots_alone`
    those of the slots.

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
        image_embeddings (`torch.Tensor` of shape `(batch_size, channels, h, w)` or [`ImageFeatures`], *optional*):
            The segmenter's, with `output_image_embeddings=True`; `forward` and `segment` take them back.
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
    image_embeddings: torch.Tensor | ImageFeatures | None = None
    language_loss: torch.Tensor | None = None
    segmentation_loss: torch.Tensor | None = None
    confidence_loss: torch.Tensor | None = None
    losses: SegmentationLossOutput | None = None
    cache: Any | None = None

    @property
    def past_key_values(self) -> Any | None:
        """`cache`, by the name it has had before transformers 5.24."""
        return self.cache


@dataclass
class SequenceStates:
    """What a pass of the VLM over sequences (prompt and completion) leaves for the masks.

    Args:
        layer_states (`torch.Tensor` of shape `(batch_size, concept_length, hidden_size)`): After `sae_layer` layers.
        last_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*): Last hidden
            states; where the pass ended at the SAE's layer there are none, and reference states are zeros.
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Token ids.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 on tokens.
        completion_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 on the completion.
        concept_ids, concept_mask (`torch.Tensor` of shape `(batch_size, concept_length)`, *optional*): Ids and mask of
            `layer_states`; those above when left out, others with `concept_input="duplicated"`.
        image_token_grids (`torch.LongTensor` of shape `(batch_size, 6)`, *optional*): Where the image tokens lie in
            the image, a [`TokenGrid`] each; read with `heatmap_concepts`.
        prompt_copies ([`PromptCopies`], *optional*): Which rows have the same prompt, so that its concepts are read
            once.
    """

    layer_states: torch.Tensor
    last_states: torch.Tensor | None
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor | None = None
    concept_ids: torch.Tensor | None = None
    concept_mask: torch.Tensor | None = None
    image_token_grids: torch.Tensor | None = None
    prompt_copies: PromptCopies | None = None

    def __post_init__(self) -> None:
        self.concept_ids = self.input_ids if self.concept_ids is None else self.concept_ids
        self.concept_mask = self.attention_mask if self.concept_mask is None else self.concept_mask

    @classmethod
    def of_answers(
        cls,
        states: tuple[torch.Tensor, torch.Tensor],
        sequences: torch.Tensor,
        prompt_mask: torch.Tensor,
        written: torch.Tensor,
        image_token_grids: torch.Tensor | None = None,
        prompt_copies: PromptCopies | None = None,
    ) -> "SequenceStates":
        """Of generated sequences: captured `(layer_states, last_states)`, masks of the prompts and of the answers."""
        written = written.to(prompt_mask.dtype)
        attention_mask = torch.cat([prompt_mask, written], dim=1)
        completion_mask = torch.cat([torch.zeros_like(prompt_mask), written], dim=1)
        return cls(
            *states,
            sequences,
            attention_mask,
            completion_mask,
            image_token_grids=image_token_grids,
            prompt_copies=prompt_copies,
        )

    def __getitem__(self, rows: slice) -> "SequenceStates":
        """Some rows of the batch."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(self, **{name: value[rows] for name, value in values.items() if value is not None})


@dataclass
class MaskTargets:
    """What masks are compared with, and how the losses are averaged.

    Args:
        mask_labels (`torch.Tensor` of shape `(batch_size, num_masks, 4h, 4w)`): Soft targets in [0, 1].
        num_objects (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Objects per sample, 1 when left out.
        num_items, num_samples, sample_weights (*optional*): See [`segmentation_loss`]. The first two are the size of
            the larger batch (accumulation, processes) that this one is part of.
        assignments ([`SlotAssignments`] or `Callable`, *optional*): The matched pairs; or what finds them, called by
            `read_masks` with a [`SegCompassOutput`] of `slots` and `concept_embeddings`. By heatmaps when left out.
        loss_weights (`Mapping[str, float]`): In place of the configuration's, by name (`mask_dice_weight`, ...).
        decode (`str`, defaults to `"auto"`): Whether `all` slots or only `matched` ones go through SAM's decoder;
            `auto` is `matched` in training mode.
    """

    mask_labels: torch.Tensor
    num_objects: torch.Tensor | None = None
    num_items: int | float | torch.Tensor | None = None
    num_samples: int | float | torch.Tensor | None = None
    sample_weights: torch.Tensor | None = None
    assignments: "SlotAssignments | Callable[[SegCompassOutput], SlotAssignments] | None" = None
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    decode: Literal["auto", "all", "matched"] = "auto"


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


class ReadingMixin(ConceptGridsMixin):
    """The steps from states to masks, each of use on its own (ablations, attribution, trainers), and all of them.

    Its heir is an `nn.Module` with the configuration and the modules named here.
    """

    config: SegCompassConfig
    sae: SegCompassSae
    codebook: nn.Module
    slot_encoder: nn.Module
    slot_mapper: nn.Module
    training: bool

    def encode_image(self, sam_pixel_values: torch.Tensor) -> torch.Tensor | ImageFeatures:
        """Features of `sam_pixel_values` `(batch_size, 3, canvas, canvas)`; see [`~MaskStage.encode_image`]."""
        return self.mask_stage.encode_image(sam_pixel_values)

    def modality_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """1 on image (and video) tokens, 0 on text; `(batch_size, sequence_length)`."""
        if self.config.image_token_id is None:
            logger.warning_once(
                "config.image_token_id is None, so that image tokens count as text in concepts; set it to the "
                "image_token_id of the model's processor."
            )
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
        return apply_interventions(concepts, interventions, attention_mask, modality_ids, self.sae.config.d_sae)

    def read_concepts(self, states: SequenceStates, interventions: Interventions = None) -> SparseConcepts:
        """Active concepts of the states of sequences, interventions applied; no grad."""
        modality_ids = self.modality_ids(states.concept_ids)
        return self.encode_concepts(states.layer_states, states.concept_mask, modality_ids, interventions)

    def embed_concepts(self, states: SequenceStates, interventions: Interventions = None) -> torch.Tensor:
        """Embedded concepts `(batch_size, concept_length, d_slot)`; those of a prompt that rows share, read once."""
        copies = states.prompt_copies
        if copies is None:
            return self.codebook(self.read_concepts(states, interventions))
        once = replace(states, concept_mask=copies.without_copies(states.concept_mask))
        return copies.fill(self.codebook(self.read_concepts(once, interventions)))

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
        image_embeddings: torch.Tensor | ImageFeatures | None,
        reshaped_input_sizes: torch.Tensor | None = None,
        targets: MaskTargets | None = None,
        decode_slots: Sequence[int] | None = None,
        concept_grid: ConceptGrid | None = None,
        decode_above: float | None = None,
    ) -> SegCompassOutput:
        """The last steps alone, from reference states and slots (perhaps changed by the caller) to masks.

        Args:
            reference_states (`torch.Tensor` of shape `(batch_size, num_slots, hidden_size)`): At the `<REF_POS>`.
            slots (`torch.Tensor` of shape `(batch_size, num_slots, d_slot)`): Concept slots.
            image_embeddings (`torch.Tensor` of shape `(batch_size, channels, h, w)`, [`ImageFeatures`] or `None`):
                From `encode_image`; without them only the confidences of the slots are computed.
            reshaped_input_sizes (`torch.Tensor` of shape `(batch_size, 2)`, *optional*): (height, width) in pixels of
                the image on SAM's canvas; the whole canvas counts as image when left out.
            targets ([`MaskTargets`], *optional*): Adds the losses.
            decode_slots (`Sequence[int]`, *optional*): Slots whose masks are wanted, where there are no targets; all
                when left out. `pred_masks` then has these alone, and is `None` for none.
            concept_grid ([`ConceptGrid`], *optional*): From `concept_grid`; needed with `heatmap_concepts`.
            decode_above (`float`, *optional*): In place of `decode_slots`: only slots with a logit above it go through
                SAM's decoder; `pred_masks` has all slots, those of the others -50 everywhere.

        Returns:
            [`SegCompassOutput`]: `heatmap_logits`, `slot_logits`, `pred_masks`, `slots`, `reference_states`, and with
            targets `loss`, `segmentation_loss`, `confidence_loss` and `losses`.
        """
        embeddings = None if image_embeddings is None else parts_of(image_embeddings)[0]
        mapped = self.slot_mapper(reference_states, slots, embeddings, concept_grid)
        output = SegCompassOutput(**mapped, slots=slots, reference_states=reference_states)
        if image_embeddings is None:
            return output
        area = None
        if reshaped_input_sizes is not None:
            area = self.mask_stage.valid_area(reshaped_input_sizes.to(image_embeddings.device))
        decode = partial(self.mask_stage.decode, image_embeddings, valid_area=area)
        if targets is None:
            maps = mapped.heatmap_logits if decode_slots is None else mapped.heatmap_logits[:, list(decode_slots)]
            if decode_above is not None:
                kept = (mapped.slot_logits > decode_above).nonzero(as_tuple=True)
                masks = decode(mapped.heatmap_logits, pairs=kept)  # (num_kept, 4h, 4w)
                output.pred_masks = masks.new_full(mapped.heatmap_logits.shape, PADDING_LOGIT).index_put(kept, masks)
            elif maps.shape[1]:
                output.pred_masks = decode(maps)
            return output
        if targets.decode == "all" or (targets.decode == "auto" and not self.training):
            output.pred_masks = decode(mapped.heatmap_logits)
        masks = output.pred_masks
        losses = segmentation_loss(
            mapped.heatmap_logits,
            (lambda found: decode(mapped.heatmap_logits, pairs=found.pairs)) if masks is None else masks,
            mapped.slot_logits,
            targets.mask_labels,
            targets.num_objects,
            area,
            assignments=cast(SlotAssignments | None, targets.assignments),  # `read_masks` calls a function before
            match_valid_area_only=self.config.valid_area_only,
            num_items=targets.num_items,
            num_samples=targets.num_samples,
            sample_weights=targets.sample_weights,
            **{name: getattr(self.config, name) for name in _LOSS_OPTIONS} | dict(targets.loss_weights),
        )
        output.loss, output.losses = losses.loss, losses
        output.segmentation_loss, output.confidence_loss = losses.segmentation_loss, losses.confidence_loss
        return output

    def read_masks(
        self,
        states: SequenceStates,
        image_embeddings: torch.Tensor | ImageFeatures | None,
        reshaped_input_sizes: torch.Tensor | None = None,
        targets: MaskTargets | None = None,
        interventions: Interventions = None,
        output_concepts: bool = False,
        output_concept_embeddings: bool = False,
        output_slot_attentions: bool = False,
        decode_above: float | None = None,
    ) -> SegCompassOutput:
        """All steps from the states of sequences to masks: concepts -> slots -> heatmaps -> masks, and losses.

        Training, inference and joint training all end here; gradients reach codebook, slot encoder, slot mapper, SAM's
        decoder and, through the reference states, `last_states`.

        Args:
            states ([`SequenceStates`]): From `sequence_states`, or made by the caller.
            image_embeddings, reshaped_input_sizes, targets, decode_above: As in `predict_masks`.
            interventions (*optional*): On concepts; see [`ConceptIntervention`].
            output_concepts, output_concept_embeddings, output_slot_attentions (`bool`): Return these too.

        Returns:
            [`SegCompassOutput`]: As from `predict_masks`, and what was asked for.
        """
        concepts = self.read_concepts(states, interventions) if output_concepts else None
        embeddings = self.embed_concepts(states, interventions) if concepts is None else self.codebook(concepts)
        encoded = self.slot_encoder(embeddings, states.concept_mask, output_attentions=output_slot_attentions)
        if states.last_states is None:
            shape = (len(states.input_ids), self.config.num_slots, self.config.hidden_size)
            reference_states = states.layer_states.new_zeros(shape)
        else:
            reference_states = self.find_reference_states(
                states.last_states, states.input_ids, states.attention_mask, states.completion_mask
            )
        if targets is not None and callable(targets.assignments):
            found = targets.assignments(SegCompassOutput(slots=encoded.slots, concept_embeddings=embeddings))
            targets = replace(targets, assignments=found)
        is_image = self.modality_ids(states.concept_ids) * states.concept_mask
        image = image_embeddings, reshaped_input_sizes
        grid = self.concept_grid(embeddings, is_image, states.image_token_grids, *image)
        output = self.predict_masks(
            reference_states, encoded.slots, *image, targets, concept_grid=grid, decode_above=decode_above
        )
        output.concepts, output.slot_attentions = concepts, encoded.attentions
        output.concept_embeddings = embeddings if output_concept_embeddings else None
        return output


__all__ = ["MaskTargets", "SegCompassOutput", "SequenceStates"]
