# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Where image tokens lie: derived from what each family's image processor is known to do."""

import pickle

import pytest
import torch
from tiny import FAMILIES, tiny_image, tiny_processor

from segcompass_hf import SegCompassProcessor
from segcompass_hf.token_grids_segcompass import UnknownPlacesError


@pytest.mark.parametrize("family", FAMILIES)
def test_one_grid_per_image_and_a_place_for_each_token(family):
    processor = tiny_processor(family, image_token_grids=True)
    images = [tiny_image(0, (80, 60)), tiny_image(1, (50, 90))]
    made = processor(images=images, instruction=["red", "a longer instruction, so that there is padding"])
    grids = made["image_token_grids"]
    assert grids.shape == (2, 6) and grids.dtype == torch.int64
    counts = (made["input_ids"] == processor.image_token_id).sum(1)
    assert torch.equal(grids[:, :2].prod(1), counts)
    assert grids[0].tolist() == processor.token_grid(60, 80).as_row()
    assert "image_token_grids" in processor.model_input_names
    plain = tiny_processor(family)
    assert "image_token_grids" not in plain(images=images, instruction="red") | {"": plain.model_input_names}


def test_llava_sees_the_square_in_the_middle():
    # 600 x 400 pixels (width x height): the short side becomes 28, the long one 42; the 28 in its middle stay.
    grid = tiny_processor("llava").token_grid(400, 600)
    assert grid[:2] == (2, 2)
    assert grid[2:] == pytest.approx((0, 1, 1 / 6, 5 / 6), abs=0.003)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_others_see_all_of_the_image(family):
    grid = tiny_processor(family).token_grid(400, 600)
    assert grid[2:] == pytest.approx((0, 1, 0, 1), abs=0.003)
    if family == "qwen2_5_vl":  # as many tokens as its largest image has, in the image's own proportions
        assert grid.rows < grid.columns


def test_a_size_is_measured_once_and_anew_for_another_image_processor(monkeypatch):
    processor, calls = tiny_processor("qwen2_5_vl"), []
    inner = SegCompassProcessor._vlm_inputs
    monkeypatch.setattr(SegCompassProcessor, "_vlm_inputs", lambda *args, **kw: calls.append(1) or inner(*args, **kw))
    first = processor.token_grid(60, 80)
    assert len(calls) == 4 and processor.token_grid(60, 80) is first and len(calls) == 4
    assert pickle.loads(pickle.dumps(processor)).token_grid(60, 80) == first
    processor.image_processor = tiny_processor("qwen2_5_vl").image_processor
    before = len(calls)
    assert processor.token_grid(60, 80) == first and len(calls) > before


def test_the_switch_is_stored_with_the_processor_and_goes_to_one_made_of_it(tmp_path):
    processor = tiny_processor(image_token_grids=True)
    processor(images=tiny_image(), instruction="red")
    processor.save_pretrained(tmp_path)
    loaded = SegCompassProcessor.from_pretrained(tmp_path)
    assert loaded.image_token_grids is True and "_grids" not in loaded.to_dict()
    assert SegCompassProcessor.from_parts(loaded, 64).image_token_grids is True
    assert SegCompassProcessor.from_parts(tiny_processor(), 64).image_token_grids is False


def test_tiles_have_no_grid(monkeypatch):
    import segcompass_hf.token_grids_segcompass as token_grids

    def tiles(processor, picture, num_patches, resample):  # several crops of one image, as in LLaVA-NeXT
        return {"pixel_values": torch.zeros(1, 5, 3, 28, 28)}

    monkeypatch.setattr(token_grids, "picture_as_seen", tiles)
    processor = tiny_processor()
    with pytest.raises(UnknownPlacesError, match=r"shape \(1, 5, 3, 28, 28\).*heatmap_concepts=False"):
        processor.use_image_token_grids(True)
    assert processor.image_token_grids is False
    processor.use_image_token_grids(False)  # asks for no places
