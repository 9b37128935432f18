"""Coverage of image tokens by the target objects of a row: where tokens lie, order, overflow, padding."""

import numpy as np
import pytest
import torch
from PIL import Image
from supervised import tiny_row
from tiny import FAMILIES, tiny_processor

from segcompass_hf.data.collator import SegmentationCollator
from segcompass_hf.data.schema import encode_mask
from segcompass_hf.patch_coverage_segcompass import PatchCoverage
from segcompass_hf.training.alignment.object_patches import ObjectPatches


def rectangle(top: int, bottom: int, left: int, right: int, size: tuple[int, int] = (56, 56)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def row_of(masks: list[np.ndarray], index: int = 0, size: tuple[int, int] = (56, 56), **columns) -> dict:
    image = Image.fromarray(np.full((*size, 3), 90, np.uint8))
    return tiny_row(index, **columns) | {"image": image, "masks": [encode_mask(mask) for mask in masks]}


def batch_of(processor, rows: list[dict], overflow: str = "drop") -> dict:
    return SegmentationCollator(processor, overflow=overflow, extra=ObjectPatches(processor, overflow))(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_coverage_of_a_square_image_by_hand(family):
    # 56 x 56 pixels. The first object is the top left quarter; the second a quarter of the first token's row and all
    # of its columns, or what that comes to with the family's grid.
    processor = tiny_processor(family)
    batch = batch_of(processor, [row_of([rectangle(0, 28, 0, 28), rectangle(0, 7, 0, 56)])])
    is_image = batch["input_ids"][0] == processor.image_token_id
    side = int(is_image.sum()) ** 0.5
    assert batch["object_patches"].shape == (1, processor.num_slots, len(is_image)) and side == int(side)
    grids = batch["object_patches"][0][:, is_image].view(-1, int(side), int(side))
    half = int(side) // 2
    assert torch.allclose(grids[0, :half, :half], torch.tensor(1.0), atol=0.02)
    assert grids[0].sum().item() == pytest.approx(side * side / 4, abs=0.1)
    assert torch.allclose(grids[1, 0], torch.tensor(min(1.0, 7 / (56 / side))), atol=0.03)
    assert grids[1].sum().item() == pytest.approx(side * side / 8, abs=0.1)
    assert not grids[2:].any() and not batch["object_patches"][0][:, ~is_image].any()


def test_coverage_counts_only_what_a_crop_shows():
    # LLaVA's processor crops 28 x 56 (height x width) to the 28 columns in the middle, a grid of 2 x 2.
    coverage = PatchCoverage(tiny_processor("llava"))
    size = (28, 56)
    masks = np.stack([rectangle(0, 28, 0, 14, size), rectangle(0, 28, 14, 21, size), rectangle(14, 28, 0, 56, size)])
    expected = torch.tensor([[0, 0, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 1, 1]])
    assert torch.allclose(coverage(masks, 4), expected, atol=0.03)
    rows, columns = coverage.geometry(*size, 4)
    assert rows.shape == (2, 28) and columns.shape == (2, 56)
    assert torch.allclose(rows.sum(1), torch.ones(2), atol=0.02)
    assert coverage.geometry(*size, 4)[0] is rows  # measured once


def test_an_image_of_one_row_of_tokens():
    coverage = PatchCoverage(tiny_processor("qwen2_5_vl"))
    processor, size = tiny_processor("qwen2_5_vl"), (30, 120)
    ids = processor(images=Image.new("RGB", size[::-1]), instruction="red")["input_ids"][0]
    tokens = int((ids == processor.image_token_id).sum())
    rows, columns = coverage.geometry(*size, tokens)
    assert len(rows) * len(columns) == tokens
    left = coverage(rectangle(0, 30, 0, 60, size)[None], tokens).view(len(rows), len(columns))
    assert left.mean().item() == pytest.approx(0.5, abs=0.03) and left[:, 0].min() > 0.9


@pytest.mark.parametrize("overflow", ["drop", "merge"])
def test_rows_follow_mask_labels(overflow):
    # Six objects, four slots: both columns of the batch keep the same objects in the same order.
    processor = tiny_processor("llava")
    masks = [rectangle(8 * i, 8 * i + height, 0, 56) for i, height in enumerate((8, 2, 7, 3, 6, 4))]
    batch = batch_of(processor, [row_of(masks)], overflow)
    is_image = batch["input_ids"][0] == processor.image_token_id
    sides = (int(is_image.sum() ** 0.5), batch["mask_labels"].shape[-1])
    patches = batch["object_patches"][0][:, is_image].view(-1, sides[0], sides[0])
    pooled = torch.nn.functional.adaptive_avg_pool2d(batch["mask_labels"], sides[0])[0]
    assert int(batch["num_objects"]) == 4 and torch.allclose(patches, pooled, atol=0.06)


def test_batch_and_padding_change_nothing():
    processor = tiny_processor("llava")
    rows = [
        row_of([rectangle(0, 28, 0, 28)], 0, reasoning="short"),
        row_of([], 1, reasoning="a much longer reasoning, of many more words than the other", instruction="red ring"),
    ]
    together = batch_of(processor, rows)
    for index, row in enumerate(rows):
        alone, where = batch_of(processor, [row]), together["attention_mask"][index].bool()
        assert torch.equal(together["object_patches"][index][:, where], alone["object_patches"][0])
        assert not together["object_patches"][index][:, ~where].any()
    assert together["object_patches"][0].any() and not together["object_patches"][1].any()
