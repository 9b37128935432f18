"""Which masks are an answer: without empty and double ones, whoever asks."""

from types import SimpleNamespace

import pytest
import torch

from segcompass_hf.postprocessing_segcompass import distinct_masks

from .support import tiny

SIZES = {"original_sizes": [[32, 32]], "reshaped_input_sizes": [[64, 64]]}


def boxes(*columns: tuple[int, int], size: int = 10) -> torch.Tensor:
    """Masks of whole columns `[start, stop)` of a square."""
    masks = torch.zeros(len(columns), size, size, dtype=torch.bool)
    for mask, (start, stop) in zip(masks, columns, strict=True):
        mask[:, start:stop] = True
    return masks


class TestDistinctMasks:
    def test_the_better_of_two_stays(self):
        masks = boxes((0, 6), (0, 4), (6, 10))  # IoU of the first two: 4 / 6
        assert distinct_masks(masks, torch.tensor([0.9, 0.8, 0.1]), 0.5) == [0, 2]
        assert distinct_masks(masks, torch.tensor([0.7, 0.8, 0.1]), 0.5) == [1, 2]
        assert distinct_masks(masks, torch.tensor([0.9, 0.9, 0.9]), 0.5) == [0, 2]  # of equal ones the first

    @pytest.mark.parametrize("threshold, stay", [(0.3, [0]), (0.5, [0]), (0.51, [0, 1]), (1.5, [0, 1])])
    def test_the_threshold_is_reached(self, threshold, stay):
        assert distinct_masks(boxes((0, 4), (0, 8)), torch.tensor([0.9, 0.8]), threshold) == stay  # IoU 4 / 8

    def test_a_part_stays_beside_its_whole(self):
        assert distinct_masks(boxes((0, 10), (2, 5)), torch.tensor([0.9, 0.8]), 0.5) == [0, 1]  # IoU 3 / 10

    def test_only_what_stays_takes_others_away(self):
        # The second doubles the first (4 / 6), the third the second (3 / 5) but not the first (3 / 7): it stays.
        masks = boxes((0, 5), (1, 6), (3, 8))
        assert distinct_masks(masks, torch.tensor([0.9, 0.8, 0.7]), 0.4) == [0, 2]

    def test_the_same_mask_twice_at_any_threshold(self):
        assert distinct_masks(boxes((0, 4), (0, 4)), torch.tensor([0.1, 0.2]), 1.0) == [1]
        assert distinct_masks(boxes(), torch.zeros(0), 0.5) == []


class TestPostProcessing:
    def outputs(self, **overrides):
        """One answer: a left half, the same again, a right half, and nothing, on a canvas of 64 pixels."""
        logits = torch.full((1, 4, 32, 32), -8.0)
        logits[0, :2, :, :16] = 8.0
        logits[0, 2, :, 16:] = 8.0
        fields = {"pred_masks": logits, "heatmap_logits": logits / 4, "slot_logits": torch.tensor([[1.0, 3, 2, 4]])}
        return SimpleNamespace(**(fields | overrides))

    def test_empty_and_double_masks_are_no_segments(self):
        (result,) = tiny.tiny_processor().post_process_segmentation(self.outputs(), **SIZES)
        assert result["slots"].tolist() == [1, 2]
        assert (result["duplicates"], result["empty"]) == ([0], [3])
        assert result["masks"][0, :, :16].all() and result["masks"][1, :, 16:].all()
        assert len(result["masks"]) == len(result["scores"]) == len(result["heatmaps"]) == 2
        torch.testing.assert_close(result["scores"], torch.tensor([3.0, 2.0]).sigmoid())

    def test_the_scores_of_the_model_decide(self):
        outputs = self.outputs(slot_scores=torch.tensor([[0.6, 0.5, 0.4, 0.9]]))
        (result,) = tiny.tiny_processor().post_process_segmentation(outputs, **SIZES)
        assert result["slots"].tolist() == [0, 2] and result["scores"].tolist() == pytest.approx([0.6, 0.4])

    def test_thresholds_of_the_caller_and_of_the_model(self):
        process = tiny.tiny_processor().post_process_segmentation
        assert process(self.outputs(), **SIZES, duplicate_iou_threshold=2.0)[0]["slots"].tolist() == [0, 1, 2]
        own = self.outputs(duplicate_iou_threshold=2.0)
        assert process(own, **SIZES)[0]["slots"].tolist() == [0, 1, 2]
        assert process(own, **SIZES, duplicate_iou_threshold=0.9)[0]["duplicates"] == [0]
        nothing = process(self.outputs(), **SIZES, mask_logit_threshold=9.0)[0]
        assert nothing["masks"].shape == nothing["heatmaps"].shape == (0, 32, 32)
        assert nothing["empty"] == [0, 1, 2, 3]
        assert "heatmaps" not in process(self.outputs(), **SIZES, output_heatmaps=False)[0]

    def test_a_mask_in_the_padding_alone_is_empty(self):
        logits = torch.full((1, 1, 32, 32), -8.0)
        logits[:, :, 20:] = 8.0  # rows from 40 of the canvas; the image ends at 16
        outputs = self.outputs(pred_masks=logits, heatmap_logits=logits, slot_logits=torch.ones(1, 1))
        (result,) = tiny.tiny_processor().post_process_segmentation(outputs, [[20, 80]], [[16, 64]])
        assert result["slots"].tolist() == [] and result["empty"] == [0]

    def test_every_slot(self):
        (every,) = tiny.tiny_processor().post_process_slots(self.outputs(), **SIZES)
        assert every["masks"].shape == every["heatmaps"].shape == (4, 32, 32)
        assert not every["masks"][3].any() and torch.equal(every["masks"][0], every["masks"][1])
        torch.testing.assert_close(every["scores"], torch.tensor([1.0, 3, 2, 4]).sigmoid())
