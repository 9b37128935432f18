# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""From concepts to masks again: a segmentation captured once, its last steps run as often as needed, no VLM pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..image_features_segcompass import ImageFeatures
from ..interventions_segcompass import apply_interventions, normalize_interventions
from ..modeling_concepts import SparseConcepts
from ..offloading_segcompass import weights_at_hand
from ..reading_segcompass import SegCompassOutput

# Bound on the activations kept of the rows that run together: about 64 per mask value are held for a backward pass.
MAX_ROW_ELEMENTS = 2**24
MASK_ACTIVATIONS = 64


@dataclass
class CapturedSegmentation:
    """One answer with all that leads from its concepts to its masks: a batch of one, padding cut away (T tokens).

    It can stand in for `segment`'s output in the processor's post-processing.

    Args:
        sequences (`torch.LongTensor` of shape `(1, T)`): Ids of prompt and completion.
        attention_mask (`torch.LongTensor` of shape `(1, T)`): All 1.
        completion_mask (`torch.LongTensor` of shape `(1, T)`): 1 on what the model wrote.
        concepts ([`SparseConcepts`]): Active concepts, a batch of one.
        reference_states (`torch.Tensor` of shape `(1, K, hidden_size)`): Last states at the `<REF_POS>` tokens.
        image_embeddings (`torch.Tensor` of shape `(1, channels, h, w)` or [`ImageFeatures`]): Of the image.
        heatmap_logits, pred_masks (`torch.Tensor` of shape `(1, K, 4h, 4w)`): As `segment` gave them.
        slot_logits, slot_scores (`torch.Tensor` of shape `(1, K)`): As `segment` gave them.
        reasoning_surprisal (`torch.Tensor` of shape `(1,)`): As `segment` gave it.
        slot_logit_threshold, mask_logit_threshold, duplicate_iou_threshold (`float`): The model's own.
        guardrails, guardrail_firing (*optional*): As `segment` gave them.
        reshaped_input_sizes, original_sizes (`torch.LongTensor` of shape `(1, 2)`): (height, width) on SAM's canvas
            (`None`: the whole canvas is image) and of the image.
        image_token_grids (`torch.LongTensor` of shape `(1, 6)`, *optional*): Where image tokens lie; with
            `heatmap_concepts`.
    """

    sequences: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor
    concepts: SparseConcepts
    reference_states: torch.Tensor
    image_embeddings: torch.Tensor | ImageFeatures
    heatmap_logits: torch.Tensor
    pred_masks: torch.Tensor
    slot_logits: torch.Tensor
    slot_scores: torch.Tensor
    reasoning_surprisal: torch.Tensor
    slot_logit_threshold: float
    mask_logit_threshold: float
    duplicate_iou_threshold: float
    guardrails: tuple | None = None
    guardrail_firing: torch.Tensor | None = None
    reshaped_input_sizes: torch.Tensor | None = None
    original_sizes: torch.Tensor | None = None
    image_token_grids: torch.Tensor | None = None

    @property
    def kept_slots(self) -> list[int]:
        """Slots above the threshold; post-processing leaves out those among them that are empty or double."""
        return (self.slot_logits[0] > self.slot_logit_threshold).nonzero()[:, 0].tolist()

    @property
    def features(self) -> torch.Tensor:
        """Ids of the features active anywhere, ascending: `(num_features,)`."""
        return self.concepts.features.unique()


@torch.inference_mode(False)  # gradients go through what is captured, wherever it is called
def capture(model: Any, inputs: Any, **segment_kwargs: Any) -> list[CapturedSegmentation]:
    """Segment a batch and keep what leads from concepts to masks.

    Args:
        model ([`SegCompassForReasoningSegmentation`]): The model.
        inputs (`BatchFeature` or `dict`): From the processor, on the model's device.
        segment_kwargs: For `segment`: `reasoning`, `max_new_tokens`, `interventions`, ...

    Returns:
        `list[CapturedSegmentation]`, one per row.

    Raises:
        ValueError: The model reads its completion twice (`concept_input="duplicated"`).
    """
    if model.config.concept_input == "duplicated":
        raise ValueError(
            'with concept_input="duplicated" every word of the answer has two sets of concepts, and neither is behind '
            'a mask alone; set model.config.concept_input = "once" to explain this model.'
        )
    output = model.segment(**inputs, output_concepts=True, output_image_embeddings=True, **segment_kwargs)
    sizes = {name: inputs.get(name) for name in ("reshaped_input_sizes", "original_sizes", "image_token_grids")}
    return [_captured_row(model, output, row, sizes) for row in range(output.sequences.shape[0])]


def _captured_row(model: Any, output: Any, row: int, sizes: dict[str, Any]) -> CapturedSegmentation:
    present = output.attention_mask[row].bool()  # (padded length,)
    concepts = output.concepts.for_row(row)
    place = present.long().cumsum(0) - 1  # new position of every token that stays
    one = slice(row, row + 1)
    sequences = output.sequences[one, present]
    token_index = place[concepts.token_index]
    return CapturedSegmentation(
        sequences=sequences,
        attention_mask=torch.ones_like(sequences),
        completion_mask=output.completion_mask[one, present],
        concepts=SparseConcepts(concepts.features, concepts.values, token_index, 1, sequences.shape[1]),
        reference_states=output.reference_states[one],
        image_embeddings=output.image_embeddings[one],
        heatmap_logits=output.heatmap_logits[one],
        pred_masks=output.pred_masks[one],
        slot_logits=output.slot_logits[one],
        slot_scores=output.slot_scores[one],
        reasoning_surprisal=output.reasoning_surprisal[one],
        slot_logit_threshold=output.slot_logit_threshold,
        mask_logit_threshold=output.mask_logit_threshold,
        duplicate_iou_threshold=output.duplicate_iou_threshold,
        guardrails=output.guardrails,
        guardrail_firing=None if output.guardrails is None else output.guardrail_firing[one][..., present],
        **{name: None if size is None else size[one] for name, size in sizes.items()},
    )


class Replay:
    """Runs concept embeddings -> slots -> heatmaps -> masks for one captured segmentation.

    With `heatmap_concepts` the embeddings of image tokens reach the heatmaps beside the slots too.

    Equal to `segment(interventions=...)` for interventions on concepts: what the VLM wrote and its reference states
    stay. Rows are changes of the same answer, run together.

    Args:
        model ([`SegCompassForReasoningSegmentation`]): The model, in evaluation mode.
        captured ([`CapturedSegmentation`]): From [`capture`].
    """

    @torch.inference_mode(False)
    def __init__(self, model: Any, captured: CapturedSegmentation):
        self.model, self.captured = model, captured
        with weights_at_hand(model.codebook):
            self.codes = model.codebook.weight.detach()[captured.concepts.features]  # (num_active, d_slot)
        self.sizes, self.valid_area = captured.reshaped_input_sizes, None  # (1, 2), (1, 1, 4h, 4w)
        if self.sizes is not None:
            self.valid_area = model.mask_stage.valid_area(self.sizes.to(self.codes.device))

    @property
    def chunk_size(self) -> int:
        """Rows run together, so that memory stays bounded."""
        return max(1, MAX_ROW_ELEMENTS // (MASK_ACTIVATIONS * self.captured.pred_masks[0].numel()))

    def embed(self, values: torch.Tensor) -> torch.Tensor:
        """Concept embeddings `(rows, T, d_slot)` of other values `(rows, num_active)` of the active entries."""
        concepts = self.captured.concepts
        weighted = values.to(self.codes.dtype)[:, :, None] * self.codes  # (rows, num_active, d_slot)
        empty = weighted.new_zeros(len(values), concepts.sequence_length, self.codes.shape[-1])
        return empty.index_add(1, concepts.token_index, weighted)

    def embed_interventions(self, interventions: Any) -> torch.Tensor:
        """Concept embeddings `(1, T, d_slot)` after interventions on concepts, also such that add features.

        Raises:
            ValueError: One acts on the residual stream, which changes what the VLM writes.
        """
        captured, d_sae = self.captured, self.model.config.sae_config.d_sae
        items = normalize_interventions(interventions, d_sae)
        residual = [item.feature for item in items if item.where == "residual"]
        if residual:
            raise ValueError(
                f"interventions on features {residual} act on the residual stream and so on what the VLM writes: a "
                "captured answer cannot be replayed with them; call segment() with them, or steer()."
            )
        modality_ids = self.model.modality_ids(captured.sequences)
        concepts = apply_interventions(captured.concepts, items, captured.attention_mask, modality_ids, d_sae)
        return self.model.codebook(concepts).detach()

    def maps(self, embeddings: torch.Tensor, decode_slots: Sequence[int] = ()) -> SegCompassOutput:
        """Heatmaps `(rows, K, 4h, 4w)`, slot logits `(rows, K)` and some masks of concept embeddings; differentiable.

        Args:
            embeddings (`torch.Tensor` of shape `(rows, T, d_slot)`): From [`~Replay.embed`].
            decode_slots (`Sequence[int]`): Whose masks are decoded, `(rows, len(decode_slots), 4h, 4w)`.
        """
        captured, rows = self.captured, len(embeddings)
        is_image = self.model.modality_ids(captured.sequences).expand(rows, -1)
        sizes, grids = (
            size if size is None else size.expand(rows, -1) for size in (self.sizes, captured.image_token_grids)
        )
        images = captured.image_embeddings.expand(rows, -1, -1, -1)
        return self.model.predict_masks(
            captured.reference_states.expand(rows, -1, -1),
            self.model.slot_encoder(embeddings).slots,  # (rows, K, d_slot)
            images,
            sizes,
            decode_slots=decode_slots,
            concept_grid=self.model.concept_grid(embeddings, is_image, grids, images, sizes),
        )

    def decode(self, heatmap_logits: torch.Tensor) -> torch.Tensor:
        """Mask logits of heatmaps, both `(rows, slots, 4h, 4w)`, of any slots; differentiable."""
        images = self.captured.image_embeddings.expand(len(heatmap_logits), -1, -1, -1)
        return self.model.mask_stage.decode(images, heatmap_logits, self.valid_area)

    @torch.no_grad()
    def run(self, embeddings: torch.Tensor, slots: Sequence[int]) -> SegCompassOutput:
        """As [`~Replay.maps`], `chunk_size` rows at a time and without gradients: heatmaps, slot logits and masks.

        Args:
            embeddings (`torch.Tensor` of shape `(rows, T, d_slot)`): From [`~Replay.embed`].
            slots (`Sequence[int]`): Whose masks are decoded.
        """
        parts = [self.maps(chunk, slots) for chunk in embeddings.split(self.chunk_size)]
        names = ("heatmap_logits", "slot_logits", "pred_masks")
        return SegCompassOutput(**{name: torch.cat([part[name] for part in parts]) for name in names})
