# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Concepts of image tokens in the cells of a segmenter's embedding: weights against torch's own resizing, by hand."""

import numpy as np
import pytest
import torch
from tiny import tiny_processor, tiny_segmenter_config
from torch.nn import functional as F

from segcompass_hf.concept_grids_segcompass import ConceptGrid, cell_weights
from segcompass_hf.patch_coverage_segcompass import PatchCoverage
from segcompass_hf.token_grids_segcompass import TokenGrid

WHOLE = (0.0, 1.0, 0.0, 1.0)


def grid_of(embeddings, grids, size, shares=None, is_image=None):
    embeddings = torch.as_tensor(embeddings, dtype=torch.float32)
    is_image = torch.ones(embeddings.shape[:2], dtype=torch.bool) if is_image is None else is_image
    shares = torch.ones(len(embeddings), 2) if shares is None else torch.tensor(shares)
    grids = torch.tensor([TokenGrid(*grid).as_row() for grid in grids])
    return ConceptGrid.of_tokens(embeddings, is_image, grids, size, shares)


@pytest.mark.parametrize("size", [(8, 8), (4, 6), (3, 5), (2, 2)], ids=str)
@pytest.mark.parametrize("tokens", [(2, 3), (4, 6), (7, 9)], ids=str)
def test_a_whole_image_is_resized_as_torch_resizes_it(tokens, size):
    values = torch.randn(2, *tokens, 5)
    grid = grid_of(values.flatten(1, 2), [(*tokens, *WHOLE)] * 2, size)
    assert torch.equal(grid.embeddings, values)
    expected = F.interpolate(values.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True)
    torch.testing.assert_close(grid.place(grid.embeddings), expected, rtol=0, atol=1e-5)


def test_padding_shows_nothing_and_the_rest_of_the_canvas_the_image():
    # An image that takes the upper half of a canvas of 4 x 4 cells; two rows of one token each: rows 0 and 1 of cells.
    grid = grid_of([[[10.0], [20.0]]], [(2, 1, *WHOLE)], (4, 4), [(0.5, 1.0)])
    expected = torch.tensor([10.0, 20, 0, 0])[:, None].expand(4, 4)
    torch.testing.assert_close(grid.place(grid.embeddings)[0, 0], expected)
    # A cell that begins inside the image counts as image, as in `valid_area`: 5 / 8 of four cells end in the third.
    weights = cell_weights(torch.tensor([[0.0, 1.0]]), torch.tensor([2]), torch.tensor([5 / 8]), 4)
    assert weights.sum(-1).tolist() == [[1, 1, 1, 0]]


def test_what_the_vlm_does_not_see_shows_nothing():
    # The VLM sees the middle half of the width: cells 2 to 5 of eight, two for each of its two tokens.
    weights = cell_weights(torch.tensor([[0.25, 0.75]]), torch.tensor([2]), torch.ones(1), 8)[0]
    assert weights.sum(-1).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    torch.testing.assert_close(weights[2:6, 0], torch.tensor([1, 0.75, 0.25, 0]))
    # And where it sees padding around the image, the tokens of the padding reach no cell.
    weights = cell_weights(torch.tensor([[-1.0, 2.0]]), torch.tensor([3]), torch.ones(1), 2)[0]
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.75, 0], [0, 0.75, 0.25]]))


def test_images_of_one_batch_may_have_other_numbers_of_tokens():
    values, is_image = torch.randn(2, 9, 3), torch.zeros(2, 9, dtype=torch.bool)
    is_image[0, 1:7], is_image[1, 5:9] = True, True  # 2 x 3 behind one token, 4 x 1 at the end
    grids = [(2, 3, 0.1, 1.0, 0.0, 0.9), (4, 1, *WHOLE)]
    both = grid_of(values, grids, (4, 5), [(1.0, 0.6), (0.7, 1.0)], is_image)
    placed = both.place(both.embeddings)
    for row, (shape, share) in enumerate([((2, 3), (1.0, 0.6)), ((4, 1), (0.7, 1.0))]):
        alone = values[row, is_image[row]][None]
        one = grid_of(alone, grids[row : row + 1], (4, 5), [share])
        assert torch.equal(one.embeddings[0], alone[0].view(*shape, 3))
        torch.testing.assert_close(one.place(one.embeddings)[0], placed[row])


def test_grids_of_other_images_are_refused():
    with pytest.raises(ValueError, match=r"hold \[6\] image tokens, but their image_token_grids have \[4\]"):
        grid_of(torch.zeros(1, 6, 2), [(2, 2, *WHOLE)], (4, 4))
    with pytest.raises(ValueError, match=r"shape \(1, 6\), expected \(2, 6\)"):
        grid_of(torch.zeros(2, 6, 2), [(2, 3, *WHOLE)], (4, 4))


@pytest.mark.parametrize("kind", ["sam", "sam2"])  # pads, stretches
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "llava"])
def test_what_a_token_shows_lands_where_the_segmenter_sees_it(family, kind):
    """A rectangle's coverage of tokens, placed, against the rectangle on the segmenter's canvas."""
    processor = tiny_processor(family, sam_image_processor=tiny_segmenter_config(kind), image_token_grids=True)
    size, side = (180, 300), processor.geometry.embedding_size
    mask = np.zeros((1, *size), bool)
    mask[0, 90:180, 150:300] = True  # the lower right quarter
    places = processor._places([_Size(*size)])
    grid = places["image_token_grids"]
    number = int(grid[0, 0] * grid[0, 1])
    coverage = PatchCoverage(processor)(mask, number)[0]
    shares = places["reshaped_input_sizes"] / processor.canvas_size
    is_image = torch.ones(1, number, dtype=torch.bool)
    laid = ConceptGrid.of_tokens(coverage[None, :, None], is_image, grid, (side, side), shares)
    found = laid.place(laid.embeddings)[0, 0]
    target = F.interpolate(processor.geometry.soft_mask_targets(torch.from_numpy(mask))[None], (side, side))[0, 0]
    height, width = (int(np.ceil(share * side - 1e-6)) for share in shares[0].tolist())
    assert not found[height:].any() and not found[:, width:].any()
    seen = laid.column_weights[0].sum(-1) > 0.5  # LLaVA crops the sides
    assert bool(seen[:width].all()) == (family != "llava")
    upright, flipped = (
        (shown - target[:height, :width])[:, seen[:width]].abs().mean()
        for shown in (found[:height, :width], found[:height, :width].flip(0))
    )
    assert upright < 0.15 < 0.3 < flipped


class _Size:
    """What the processor reads of an image to place it."""

    def __init__(self, height, width):
        self.height, self.width = height, width
