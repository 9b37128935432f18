# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The model's maps -> the masks of an answer at the image's size, without empty and double ones, and its text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from .images_segcompass import restore_map
from .judging_segcompass import judge_masks
from .patch_coverage_segcompass import PatchCoverage
from .token_grids_segcompass import UnknownPlacesError

# Of a model that says nothing else, as in its configuration.
_DEFAULT_THRESHOLDS = {"slot_logit_threshold": 0.0, "mask_logit_threshold": 0.0, "duplicate_iou_threshold": 0.5}
REF_TOKEN, THINK_START, THINK_END = "<REF_POS>", "<think>", "</think>"


class PostProcessingMixin:
    """Outputs of [`SegCompassProcessor`]; needs of its heir the tokenizer, a token id and the canvas."""

    tokenizer: PreTrainedTokenizerBase
    _coverage: PatchCoverage | None

    if TYPE_CHECKING:  # properties of its heir

        @property
        def image_token_id(self) -> int | None: ...

        @property
        def think_start_token_id(self) -> int: ...

        @property
        def canvas_size(self) -> int: ...

    def post_process_segmentation(
        self,
        outputs: Any,
        original_sizes: torch.Tensor | Sequence[Sequence[int]],
        reshaped_input_sizes: torch.Tensor | Sequence[Sequence[int]],
        slot_logit_threshold: float | None = None,
        mask_logit_threshold: float | None = None,
        duplicate_iou_threshold: float | None = None,
        output_heatmaps: bool = True,
    ) -> list[dict]:
        """Masks at each image's own size, and the reasoning.

        A mask without a single pixel is left out, and so is one that shows the same object as a better one, and one
        that breaks a guardrail of the outputs (`forbid`, `require` of `segment`).

        Args:
            outputs (`SegCompassSegmentationOutput` or `SegCompassOutput`):
                With `pred_masks`, `heatmap_logits` `(B, K, h, w)`, `slot_logits` `(B, K)` and, for the text,
                `sequences`.
            original_sizes, reshaped_input_sizes (of shape `(B, 2)`): (height, width), as the processor returned them.
            slot_logit_threshold (`float`, *optional*):
                Slots with a logit above it are kept; the model's own, from `outputs`, where not given (0 for a
                `SegCompassOutput`, which does not hold it: pass the configuration's).
            mask_logit_threshold (`float`, *optional*):
                Pixels with a logit above it belong to the mask; likewise.
            duplicate_iou_threshold (`float`, *optional*):
                A mask whose IoU with one of a higher score reaches it is left out, above 1 none; likewise (0.5).
            output_heatmaps (`bool`, defaults to `True`): Return `heatmaps`.

        Returns:
            `list[dict]`: per image, on the CPU and in slot order, `masks` `(n, H, W)` bool, `scores` `(n,)` in [0, 1]
            (the `slot_scores` of `outputs`, for a `SegCompassOutput` the plain confidences), `slots` `(n,)`,
            `heatmaps` `(n, H, W)` in [0, 1], `reasoning` (inside the think block), `text` (the whole answer), and
            what was left out: `duplicates` and `empty`, lists of slots, and of outputs with guardrails also
            `guardrails`, a list of what broke which rule and why, see [`judge_masks`].
        """
        original, reshaped = self._sizes(outputs, original_sizes, reshaped_input_sizes)
        slot_logit_threshold = _threshold(outputs, "slot_logit_threshold", slot_logit_threshold)
        mask_logit_threshold = _threshold(outputs, "mask_logit_threshold", mask_logit_threshold)
        duplicate_iou_threshold = _threshold(outputs, "duplicate_iou_threshold", duplicate_iou_threshold)
        texts, results = self._answers(outputs, len(original)), []
        for row, place in enumerate(zip(reshaped, original, strict=True)):
            above = (_slot_logits(outputs, row) > slot_logit_threshold).nonzero()[:, 0]  # (n,)
            masks = self._masks(outputs, row, above.tolist(), place, mask_logit_threshold)
            has_pixels = masks.flatten(1).any(1)  # (n,)
            empty, slots, masks = above[~has_pixels], above[has_pixels], masks[has_pixels]
            left_out = {"empty": empty.tolist()}
            if getattr(outputs, "guardrails", None):
                passes, left_out["guardrails"] = self._judge(outputs, row, masks, slots.tolist())
                slots, masks = slots[passes], masks[passes]
            scores = _slot_scores(outputs, row)[slots]
            stay = distinct_masks(masks, scores, duplicate_iou_threshold)
            result = {"masks": masks[stay], "scores": scores[stay], "slots": slots[stay]}
            if output_heatmaps:
                result["heatmaps"] = self._heatmaps(outputs, row, slots[stay].tolist(), place)
            left_out["duplicates"] = sorted({*slots.tolist()} - {*slots[stay].tolist()})
            results.append(result | {"reasoning": _think_block(texts[row]), "text": texts[row]} | left_out)
        return results

    def post_process_slots(
        self,
        outputs: Any,
        original_sizes: torch.Tensor | Sequence[Sequence[int]],
        reshaped_input_sizes: torch.Tensor | Sequence[Sequence[int]],
        mask_logit_threshold: float | None = None,
    ) -> list[dict]:
        """Every slot at each image's own size, whether it is part of the answer or not.

        Args:
            outputs, original_sizes, reshaped_input_sizes, mask_logit_threshold: As for
                [`~SegCompassProcessor.post_process_segmentation`].

        Returns:
            `list[dict]`: per image `masks` `(K, H, W)` bool, `scores` `(K,)` and `heatmaps` `(K, H, W)` in [0, 1].
        """
        original, reshaped = self._sizes(outputs, original_sizes, reshaped_input_sizes)
        mask_logit_threshold, results = _threshold(outputs, "mask_logit_threshold", mask_logit_threshold), []
        for row, place in enumerate(zip(reshaped, original, strict=True)):
            slots = list(range(len(_slot_logits(outputs, row))))
            maps = {"masks": self._masks(outputs, row, slots, place, mask_logit_threshold)}
            maps["heatmaps"] = self._heatmaps(outputs, row, slots, place)
            results.append(maps | {"scores": _slot_scores(outputs, row)})
        return results

    def _judge(self, outputs: Any, row: int, masks: torch.Tensor, slots: list[int]) -> tuple[list[bool], list[dict]]:
        """Which masks `(n, H, W)` of a sample the guardrails let pass, and the log; see [`judge_masks`].

        Raises:
            ValueError: Nobody knows which part of the image an image token of this VLM shows.
        """
        is_image = (outputs.sequences[row] == self.image_token_id).cpu()
        firing = outputs.guardrail_firing[row].cpu()[:, is_image]  # (num_guardrails, num_patches)
        try:
            self._coverage = self._coverage or PatchCoverage(self)
            coverage = self._coverage(masks.numpy(), firing.shape[1])
        except UnknownPlacesError as error:
            raise ValueError(
                f"guardrails (forbid, require) cannot judge the masks of this VLM: {error.__cause__ or error}"
            ) from error
        return judge_masks(coverage, firing, outputs.guardrails, slots)

    @staticmethod
    def _sizes(outputs: Any, original_sizes: Any, reshaped_input_sizes: Any) -> tuple[list, list]:
        """Both sizes as lists, one of each per sample of the outputs."""
        original, reshaped = (torch.as_tensor(size).tolist() for size in (original_sizes, reshaped_input_sizes))
        batch_size = outputs.slot_logits.shape[0]
        if len(original) != batch_size or len(reshaped) != batch_size:
            raise ValueError(
                f"the outputs hold {batch_size} samples, original_sizes {len(original)} and reshaped_input_sizes "
                f"{len(reshaped)}; pass the sizes of the same batch."
            )
        return original, reshaped

    def _masks(self, outputs: Any, row: int, slots: list[int], place: tuple, threshold: float) -> torch.Tensor:
        """Masks `(len(slots), H, W)` bool; one map at a time, since those of a photograph are large."""
        masks = torch.zeros(len(slots), *place[1], dtype=torch.bool)
        for index, slot in enumerate(slots):
            low_resolution = outputs.pred_masks[row, slot].detach().cpu()
            masks[index] = restore_map(low_resolution, self.canvas_size, *place) > threshold
        return masks

    def _heatmaps(self, outputs: Any, row: int, slots: list[int], place: tuple) -> torch.Tensor:
        """Heatmaps `(len(slots), H, W)` in [0, 1]."""
        heatmaps = torch.zeros(len(slots), *place[1])
        for index, slot in enumerate(slots):
            low_resolution = outputs.heatmap_logits[row, slot].detach().cpu()
            heatmaps[index] = restore_map(low_resolution, self.canvas_size, *place).sigmoid()
        return heatmaps

    def _answers(self, outputs: Any, batch_size: int) -> list[str]:
        """The generated text of each row: where `completion_mask` is 1, or without it from the last think tag on."""
        sequences, mask = getattr(outputs, "sequences", None), getattr(outputs, "completion_mask", None)
        if sequences is None:
            return [""] * batch_size
        texts = []
        for row, ids in enumerate(sequences.tolist()):
            if mask is not None:
                ids = [token for token, flag in zip(ids, mask[row].tolist(), strict=True) if flag]
            elif self.think_start_token_id in ids:
                ids = ids[len(ids) - 1 - ids[::-1].index(self.think_start_token_id) :]
            texts.append(self.tokenizer.decode(ids, skip_special_tokens=True).strip())
        return texts


def distinct_masks(masks: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> list[int]:
    """Which masks stay when of several of one object only the best does.

    A mask goes where its IoU with a better one reaches the threshold. A small mask inside a large one is not a
    double: a part may be asked for beside the whole, and objects lie in front of one another.

    Args:
        masks (`torch.BoolTensor` of shape `(num_masks, height, width)`): Each with at least one pixel.
        scores (`torch.Tensor` of shape `(num_masks,)`): What is better has the higher one; of equal ones, the first.
        iou_threshold (`float`): In (0, 1]; above 1 every mask stays.

    Returns:
        `list[int]`: indices, ascending.
    """
    areas = masks.flatten(1).sum(1).tolist()  # pixels
    stay: list[int] = []
    for index in scores.argsort(descending=True, stable=True).tolist():
        overlaps = [int((masks[index] & masks[better]).sum()) for better in stay]
        ious = [
            overlap / max(areas[index] + areas[better] - overlap, 1)
            for better, overlap in zip(stay, overlaps, strict=True)
        ]
        if max(ious, default=0.0) < iou_threshold:
            stay.append(index)
    return sorted(stay)


def _threshold(outputs: Any, name: str, given: float | None) -> float:
    """A threshold as the caller gave it, else the model's own from `outputs`, else the configuration's default."""
    own = getattr(outputs, name, None) if given is None else given
    return _DEFAULT_THRESHOLDS[name] if own is None else own


def _slot_logits(outputs: Any, row: int) -> torch.Tensor:
    """Confidences `(K,)` of a sample, logits."""
    logits = outputs.slot_logits[row].detach().float().cpu()
    if not (logits.isfinite().all() and outputs.pred_masks[row].isfinite().all()):
        raise ValueError(
            f"the outputs of sample {row} hold NaN or infinity; the weights, the inputs or a dtype of too small a "
            "range (float16) are to blame."
        )
    return logits


def _slot_scores(outputs: Any, row: int) -> torch.Tensor:
    """Scores `(K,)` of a sample: those of the model where `outputs` hold them, else the plain confidences."""
    scores = getattr(outputs, "slot_scores", None)
    return outputs.slot_logits[row].detach().float().cpu().sigmoid() if scores is None else scores[row].float().cpu()


def _think_block(text: str) -> str:
    """What stands between the first think tag and its end, or else the first `<REF_POS>`, or the end of the text."""
    _, tag, rest = text.partition(THINK_START)
    return rest.split(THINK_END)[0].split(REF_TOKEN)[0].strip() if tag else ""


__all__ = ["PostProcessingMixin", "distinct_masks"]
