# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Real photographs, kept outside the repository, through processor and random models.

`SEGCOMPASS_SAMPLES_DIR` names the folder that holds `images/`; else `shared/data/real_samples` beside the checkout.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageDraw, ImageOps
from places import SAMPLES

PHOTOGRAPHS = sorted((SAMPLES / "images").glob("*.jpg"))

pytestmark = pytest.mark.skipif(
    not PHOTOGRAPHS, reason="no photographs; set SEGCOMPASS_SAMPLES_DIR to the folder that holds images/"
)


def own_size(path: Path) -> tuple[int, int]:
    """(height, width) as a viewer shows the photograph."""
    return ImageOps.exif_transpose(Image.open(path)).size[::-1]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_masks_come_back_at_each_photograph_s_own_size(family):
    processor, model = tiny.tiny_processor(family), tiny.tiny_model(family)
    sizes = [own_size(path) for path in PHOTOGRAPHS]
    assert len(set(sizes)) > 1
    inputs = processor(images=PHOTOGRAPHS, instruction="the animal nearest to the camera", return_tensors="pt")
    assert [tuple(size) for size in inputs["original_sizes"].tolist()] == sizes
    with torch.no_grad():
        outputs = model.segment(**inputs, max_new_tokens=10)
    results = processor.post_process_slots(  # random weights may draw nothing, which is no segment
        outputs, original_sizes=inputs["original_sizes"], reshaped_input_sizes=inputs["reshaped_input_sizes"]
    )
    assert [tuple(result["masks"].shape) for result in results] == [(4, *size) for size in sizes]
    pictures = torch.stack([output.std() for output in outputs.pred_masks])
    assert (pictures > 1e-3).all()  # not one constant
    assert not torch.allclose(outputs.pred_masks[0], outputs.pred_masks[1], atol=1e-4)  # the photograph matters


def test_annotations_become_targets_of_the_right_area():
    """REFER layout: polygons of the photograph's own pixels."""
    annotations = json.loads((SAMPLES / "refcoco" / "instances.json").read_text())
    names = {image["id"]: image["file_name"] for image in annotations["images"]}
    processor = tiny.tiny_processor("llava")
    checked = 0
    for annotation in annotations["annotations"]:
        polygons = annotation["segmentation"]
        if not isinstance(polygons, list):
            continue
        path = SAMPLES / "images" / names[annotation["image_id"]]
        height, width = own_size(path)
        canvas = Image.new("L", (width, height))
        for polygon in polygons:
            ImageDraw.Draw(canvas).polygon(polygon, fill=1)
        mask = np.asarray(canvas, bool)
        inputs = processor(images=path, instruction="it", masks=[mask[None]])
        cell = max(height, width) / 32  # pixels per side of a map cell
        assert inputs["num_objects"].tolist() == [1]
        covered = inputs["mask_labels"].sum().item() * cell**2
        assert covered == pytest.approx(mask.sum(), rel=0.05, abs=2 * cell**2)
        checked += 1
    assert checked >= 5
