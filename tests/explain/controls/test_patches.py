"""Causal patches: a planted concept that fires beside what makes it fire is told from one that fires on it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from segcompass_hf import SparseConcepts
from segcompass_hf.explain.controls import patches
from segcompass_hf.explain.controls.patches import causal_patches

SIDE, CELLS = 4, 4  # pixels of a patch, patches of a row
FEATURE = 7


class Processor:
    """Sixteen patches, each seen as its mean red."""

    def __call__(self, images, instruction, return_tensors):
        red = torch.tensor(np.stack([np.asarray(image)[..., 0] for image in images])).float()
        cells = red.view(-1, CELLS, SIDE, CELLS, SIDE).mean((2, 4)).flatten(1)  # (pictures, 16)
        ids = torch.tensor([[0] + [1] * CELLS**2]).expand(len(images), -1)
        return BatchFeature({"input_ids": ids, "pixel_values": cells, "sam_pixel_values": cells})


class Model:
    """The concept fires on the patch `shift` places before a red one."""

    device = torch.device("cpu")

    def __init__(self, shift: int):
        self.shift = shift

    def modality_ids(self, ids):
        return ids

    def __call__(self, input_ids, pixel_values, slots_alone, output_concepts):
        fires = (pixel_values.roll(-self.shift, 1) > 200).nonzero()
        token = fires[:, 0] * input_ids.shape[1] + 1 + fires[:, 1]
        features = torch.full((len(token),), FEATURE)
        return SimpleNamespace(concepts=SparseConcepts(features, torch.ones(len(token)), token, *input_ids.shape))


@pytest.fixture
def picture(monkeypatch):
    """Black but for the red patch 5."""
    boxes = [(x, y, x + SIDE, y + SIDE) for y in range(0, 16, SIDE) for x in range(0, 16, SIDE)]
    monkeypatch.setattr(patches, "patch_boxes", lambda processor, size, number: boxes)
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[4:8, 4:8, 0] = 255
    return Image.fromarray(pixels)


def test_a_concept_that_fires_on_its_cause(picture):
    found = causal_patches(Model(0), Processor(), picture, "red", FEATURE)
    assert (found.blocks, found.firing) == (16, 1)
    assert found.effect_inside == 1.0  # no other patch takes anything from it
    assert (found.without_firing, found.without_causal, found.without_random) == (0.0, 0.0, 1.0)


def test_a_concept_that_fires_beside_its_cause(picture):
    found = causal_patches(Model(1), Processor(), picture, "red", FEATURE)  # on patch 4, for patch 5 is red
    assert found.effect_inside == 0.0
    assert found.without_firing == 1.0 and found.without_causal == 0.0


def test_a_concept_that_does_not_fire_on_the_picture(picture):
    assert causal_patches(Model(0), Processor(), picture, "red", FEATURE + 1) is None


def test_fine_grids_are_joined():
    boxes = [(x, y, x + 1, y + 1) for y in range(16) for x in range(16)] + [None]
    blocks = patches._blocks(boxes, (16, 16))
    assert len(blocks) == 64 and sorted(sum(blocks, [])) == list(range(256))
    assert blocks[0] == [0, 1, 16, 17]  # a square of two by two
