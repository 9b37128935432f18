# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The paper's claims about interpretability, measured sample by sample; `claims_figures` makes figures of it.

(a) More features are active on tokens of the instance and of the reasoning than on the question and the background.
(b) The image tokens with the strongest activations cover the instance better than random ones.
(c) Where the SAE reconstructs badly, masks are bad. (d) Where heatmaps are right, masks are right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch

from ...data.collator import SegmentationCollator
from ...data.schema import decode_masks
from ...images_segcompass import fit_objects_to_slots
from ...losses_segcompass import segmentation_loss
from ...metrics import score_sample
from ...modeling_concepts import MAX_CHUNK_ELEMENTS
from ...patch_coverage_segcompass import PatchCoverage
from ...text_stack_segcompass import HiddenStateCapture
from ...token_kinds import TokenKind, token_kinds

TOP_PERCENT = (5, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100)  # of the image tokens
INSTANCE_COVERAGE = 0.5  # a patch counts as instance from this covered share of it
BACKGROUND_COVERAGE = 0.05  # and as background below this share
TEXT_PLACES: tuple[TokenKind, ...] = ("question", "reasoning", "reference")
SPECIAL: TokenKind = "special"
IMAGE_PLACES = ("instance", "others", "background", "boundary")


@dataclass
class ClaimRecord:
    """What one sample says about the claims; numbers, lists and dicts only.

    Args:
        sample_id, kind (`str`, *optional*): The row's.
        iou (`float`): Of the answer's masks with the target's, unions compared, in [0, 1].
        tokens (`dict[str, int]`): Tokens of each place: `instance`, `others` (other known objects), `background` and
            `boundary` (partly covered) patches, `question`, `reasoning`, `reference`, `special`.
        features (`dict[str, int]`): Active features of the place's tokens, summed over them.
        coverage (`dict[str, list[float]]`, *optional*): Share of the instance's pixels in [0, 1] inside the top
            `TOP_PERCENT` of the image tokens, ranked by `activation` (the sum of a token's activations) or `features`
            (their number), and of a `random` choice of as many (its expectation). `others`: the share of other
            objects' pixels that the first choice covers, `None` without such. `None` where the VLM sees no instance.
        sae_error (`dict[str, float]`): `sum |x - x'|^2 / sum |x|^2` over `all` tokens but special ones, over `image`
            and over `text` tokens, x as the SAE normalises it.
        dice_loss (`float`, *optional*): Of mask logits, mean over the objects, in [0, 1]; `None` without target.
        objects (`list[dict]`): Per object its matched slot's `heatmap_iou` (probability over 0.5) and `mask_iou` at
            the image's size, and whether the slot was `kept`.
    """

    sample_id: str | None
    kind: str | None
    iou: float
    tokens: dict[str, int]
    features: dict[str, int]
    coverage: dict[str, list[float] | None] | None
    sae_error: dict[str, float]
    dice_loss: float | None = None
    objects: list[dict[str, Any]] = field(default_factory=list)


@torch.no_grad()
def measure_claims(
    model: Any,
    processor: Any,
    rows: Iterable[dict[str, Any]],
    batch_size: int = 16,
    reasoning: Literal["full", "short", "none"] = "full",
    max_new_tokens: int | None = None,
) -> Iterator[ClaimRecord]:
    """Answer rows greedily, with the model's own reasoning, and look at what was active.

    Slots are matched to objects as in training; more objects than slots: the smallest are united.

    Args:
        model ([`SegCompassForReasoningSegmentation`]): The model.
        processor (`SegCompassProcessor`): Its processor.
        rows (`Iterable[dict]`): In the row schema.
        batch_size (`int`, defaults to 16): Rows at a time; it changes no record.
        reasoning (`str`, defaults to `"full"`): As for `segment`.
        max_new_tokens (`int`, *optional*): As for `segment`.

    Yields:
        [`ClaimRecord`], one per row, in their order.

    Raises:
        UnknownPlacesError: the places of this VLM's image tokens in the picture are not known, which the measures of
            image tokens need.
        ValueError: a row cannot be read, or the model reads its completion twice (`concept_input="duplicated"`).
    """
    if model.config.concept_input == "duplicated":
        raise ValueError(
            'with concept_input="duplicated" words of the answer are read twice and no token has one set of features; '
            'set model.config.concept_input = "once" to measure this model.'
        )
    coverage = PatchCoverage(processor)
    collate = SegmentationCollator.for_evaluation(processor, with_masks=True)
    rows = iter(rows)
    while batch_rows := list(islice(rows, batch_size)):
        batch = collate(batch_rows)
        references = batch.pop("references")
        batch = {name: value.to(model.device) for name, value in batch.items()}
        with HiddenStateCapture(model.vlm, model.config.sae_layer) as capture:
            output = model.segment(
                **batch, reasoning=reasoning, max_new_tokens=max_new_tokens, output_concepts=True, do_sample=False
            )
        measured = _Batch(model, processor, batch, output, capture.states()[0], coverage)
        for index, (row, reference) in enumerate(zip(batch_rows, references, strict=True)):
            yield measured.record(index, row, reference)


class _Batch:
    """One batch of answers and what leads to their records."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        inputs: dict,
        output: Any,
        layer_states: torch.Tensor,
        coverage: PatchCoverage,
    ):
        self.coverage = coverage
        self.model, self.processor, self.inputs, self.output = model, processor, inputs, output
        self.layer_states = layer_states  # (batch_size, sequence_length, hidden_size)
        shape = output.sequences.shape
        self.counts = output.concepts.counts().cpu().numpy()  # (batch_size, sequence_length)
        sums = output.concepts.values.new_zeros(shape.numel(), dtype=torch.float32)
        sums.index_add_(0, output.concepts.token_index, output.concepts.values.float())
        self.activations = sums.view(shape).cpu().numpy()  # (batch_size, sequence_length)
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        self.answers = processor.post_process_segmentation(output, *sizes, output_heatmaps=False)
        self.slots = processor.post_process_slots(output, *sizes)

    def record(self, index: int, row: dict[str, Any], reference: dict[str, Any]) -> ClaimRecord:
        size = tuple(self.inputs["original_sizes"][index].tolist())
        targets, ignore = reference["masks"], reference["ignore"]
        kinds = token_kinds(self.processor, self.output, row["instruction"], row=index)
        patches = np.array(kinds.positions("image"), dtype=int)
        others = decode_masks(row.get("distractor_masks"), size)
        covered = [self._coverage(masks, len(patches)) for masks in (targets, others)]
        places: dict[str, list[int]] = {kind: kinds.positions(kind) for kind in (*TEXT_PLACES, SPECIAL)}
        parts = zip(IMAGE_PLACES, _parts_of_image(*covered), strict=True)
        places |= {name: patches[inside].tolist() for name, inside in parts}
        loss, objects = self._objects(index, targets, ignore)
        return ClaimRecord(
            sample_id=row.get("sample_id"),
            kind=row.get("kind"),
            iou=score_sample(self.answers[index]["masks"].numpy(), targets, ignore).iou,
            tokens={name: len(tokens) for name, tokens in places.items()},
            features={name: int(self.counts[index, tokens].sum()) for name, tokens in places.items()},
            coverage=_coverage_curves(self.activations[index, patches], self.counts[index, patches], *covered),
            sae_error=self._sae_errors(index, places),
            dice_loss=loss,
            objects=objects,
        )

    def _coverage(self, masks: np.ndarray, num_patches: int) -> np.ndarray:
        """Share of each image token that the union of `masks` `(n, H, W)` covers: `(num_patches,)`."""
        if not masks.any() or not num_patches:
            return np.zeros(num_patches)
        return self.coverage(np.any(masks, 0)[None], num_patches)[0].double().numpy()

    def _sae_errors(self, index: int, places: dict[str, list[int]]) -> dict[str, float]:
        text, image = (sum((places[name] for name in names), []) for names in (TEXT_PLACES, IMAGE_PLACES))
        tokens = torch.tensor(text + image, device=self.layer_states.device)
        modality_ids = self.model.modality_ids(self.output.sequences[index, tokens])
        errors, norms = squared_errors(self.model.sae, self.layer_states[index, tokens], modality_ids)
        groups = {"all": slice(None), "text": slice(len(text)), "image": slice(len(text), None)}
        shares = {name: (errors[part].sum(), norms[part].sum()) for name, part in groups.items()}
        return {name: float(error / norm) if norm > 0 else 0.0 for name, (error, norm) in shares.items()}

    def _objects(
        self, index: int, targets: np.ndarray, ignore: np.ndarray | None
    ) -> tuple[float | None, list[dict[str, Any]]]:
        """Dice loss of the sample's masks, and the IoUs of every object with the maps of the slot matched to it."""
        if not len(targets):
            return None, []
        one, config = slice(index, index + 1), self.model.config
        sizes = self.inputs["reshaped_input_sizes"][one]
        loss = segmentation_loss(
            self.output.heatmap_logits[one],
            self.output.pred_masks[one],
            self.output.slot_logits[one],
            self.inputs["mask_labels"][one],
            self.inputs["num_objects"][one],
            self.model.mask_stage.valid_area(sizes),
            match_confidence_weight=config.match_confidence_weight,
            match_valid_area_only=config.valid_area_only,
        )
        targets = fit_objects_to_slots(torch.as_tensor(targets), config.num_slots, "merge", "sample").numpy()
        maps_of, (slots, matched) = self.slots[index], loss["assignments"][0]
        objects = []
        for slot, target in zip(slots.tolist(), matched.tolist(), strict=True):
            maps = {"heatmap_iou": maps_of["heatmaps"][slot] > 0.5, "mask_iou": maps_of["masks"][slot]}
            ious = {name: score_sample(mask.numpy(), targets[target], ignore).iou for name, mask in maps.items()}
            kept = bool(self.output.slot_logits[index, slot] > self.output.slot_logit_threshold)
            objects.append({**ious, "kept": kept})
        return float(loss["mask_dice"]), objects


def squared_errors(
    sae: Any, states: torch.Tensor, modality_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the SAE misses of each state, in the space that it normalises to.

    Args:
        sae ([`SegCompassSae`]): The autoencoder.
        states (`torch.Tensor` of shape `(tokens, d_in)`): Hidden states at its layer.
        modality_ids (`torch.LongTensor` of shape `(tokens,)`, *optional*): 0 text, 1 image; for `per_modality`.

    Returns:
        `tuple`: `|x - x'|^2` and `|x|^2`, each `(tokens,)` in float32.
    """
    errors, norms = [states.new_zeros(0, dtype=torch.float32)], [states.new_zeros(0, dtype=torch.float32)]
    for chunk in torch.arange(len(states), device=states.device).split(max(1, MAX_CHUNK_ELEMENTS // sae.config.d_sae)):
        modalities = None if modality_ids is None else modality_ids[chunk]
        normalized, _ = sae.normalize(states[chunk], modalities)  # (chunk, d_in)
        reconstruction = sae.decode(sae.encode(states[chunk], modalities))
        errors.append((reconstruction - normalized).float().pow(2).sum(-1))
        norms.append(normalized.float().pow(2).sum(-1))
    return torch.cat(errors), torch.cat(norms)


def _parts_of_image(instance: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Which image tokens are `IMAGE_PLACES`, given how much of each is covered: bool, `(num_patches,)` each."""
    is_instance = instance >= INSTANCE_COVERAGE
    is_other = ~is_instance & (others >= INSTANCE_COVERAGE)
    is_background = (instance < BACKGROUND_COVERAGE) & (others < BACKGROUND_COVERAGE)
    return is_instance, is_other, is_background, ~(is_instance | is_other | is_background)


def _coverage_curves(
    activations: np.ndarray, counts: np.ndarray, instance: np.ndarray, others: np.ndarray
) -> dict[str, list[float] | None] | None:
    if not instance.any():
        return None
    number = len(instance)
    sizes = [max(1, round(number * percent / 100)) for percent in TOP_PERCENT]
    return {
        "activation": top_coverage(activations, instance, sizes),
        "features": top_coverage(counts, instance, sizes),
        "random": [size / number for size in sizes],
        "others": top_coverage(activations, others, sizes) if others.any() else None,
    }


def top_coverage(scores: np.ndarray, coverage: np.ndarray, sizes: list[int]) -> list[float]:
    """Share of a region that lies in the highest-scoring tokens; tokens of equal score stand for each other.

    Args:
        scores (`np.ndarray` of shape `(tokens,)`): What tokens are ranked by, highest first.
        coverage (`np.ndarray` of shape `(tokens,)`): How much of each token the region covers; not all 0.
        sizes (`list[int]`): Numbers of tokens to take.

    Returns:
        `list[float]`: one share in [0, 1] per size.

    ```python
    >>> top_coverage(np.array([3.0, 0.0, 1.0, 1.0]), np.array([0.0, 0.25, 0.75, 0.0]), [1, 2, 3])
    [0.0, 0.375, 0.75]
    ```
    """
    _, rank, size = np.unique(-scores, return_inverse=True, return_counts=True)
    mean = np.bincount(rank, weights=coverage) / size  # of the tokens of one score
    shares = np.cumsum(np.repeat(mean, size)) / coverage.sum()
    return [float(shares[number - 1]) for number in sizes]


__all__ = ["TOP_PERCENT", "ClaimRecord", "measure_claims", "squared_errors", "top_coverage"]
