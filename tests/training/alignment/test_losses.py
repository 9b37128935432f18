"""Word-patch alignment: the loss by hand, where words stand and which patches a mask covers."""

import math

import numpy as np
import pytest
import torch
from supervised import bare_vlm, tiny_row
from tiny import FAMILIES as ALL_FAMILIES
from tiny import tiny_image, tiny_processor

from segcompass_hf.data.collator import SegmentationCollator
from segcompass_hf.patch_coverage_segcompass import PatchCoverage
from segcompass_hf.token_grids_segcompass import UnknownPlacesError
from segcompass_hf.token_places import instruction_words
from segcompass_hf.training.alignment.losses import AlignmentTargets, alignment_loss, pair_alignment_loss

FAMILIES = ("llava", "qwen2_5_vl")


def test_alignment_loss_by_hand():
    # Tokens: a target word, another word, two patches. The word points at the first patch, which the mask covers whole
    # (0.8 of it in pixels: coverage counts relative to the best patch); the second patch is half as covered.
    states = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]]])
    words = torch.tensor([[True, False, False, False]])
    text = torch.tensor([[True, True, False, False]])
    is_image = torch.tensor([[False, False, True, True]])
    coverage = torch.tensor([[0.0, 0.0, 0.8, 0.4]])
    loss, count = alignment_loss(states, words, text, coverage, is_image, temperature=0.5)
    # Cosines over temperature: word -> patches (2, 0), other word -> patches (0, 2).
    e = math.exp(2)
    to_patches = -math.log((1.0 * e + 0.5 * 1) / (e + 1))
    first, second = math.log(e / (e + 1)), math.log(1 / (1 + e))  # the word among the words, seen from each patch
    to_words = -(1.0 * first + 0.5 * second) / 1.5
    assert count == 1 and loss.item() == pytest.approx((to_patches + to_words) / 2, rel=1e-5)


def test_alignment_loss_of_a_batch_is_the_sum_of_its_samples():
    torch.manual_seed(1)
    states = torch.randn(3, 6, 8)
    words, text = torch.zeros(3, 6, dtype=torch.bool), torch.zeros(3, 6, dtype=torch.bool)
    words[:, 1], text[:, :3] = True, True
    coverage, is_image = torch.zeros(3, 6), torch.zeros(3, 6, dtype=torch.bool)
    is_image[:, 3:], coverage[:2, 4] = True, 1.0  # the third sample has no target
    whole, count = alignment_loss(states, words, text, coverage, is_image)
    parts = [
        alignment_loss(states[i : i + 1], words[:1], text[:1], coverage[i : i + 1], is_image[:1]) for i in range(3)
    ]
    assert count == 2 and [n for _, n in parts] == [1, 1, 0]
    assert torch.allclose(whole, sum(loss for loss, _ in parts)) and parts[2][0] == 0


def test_instruction_words():
    row = {"instruction": "Please segment the small dark-blue ring, and all that's left of the 2nd cup!"}
    assert instruction_words(row) == ["small", "dark-blue", "ring", "that's", "left", "2nd", "cup"]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_coverage_follows_the_familys_own_image_processor(family):
    # A square image: no cropping anywhere. Its right half is the object.
    processor, mask = tiny_processor(family), np.zeros((56, 56), bool)
    mask[:, 28:] = True
    tokens = processor(images=tiny_image(0, (56, 56)), instruction="red")["input_ids"][0] == processor.image_token_id
    coverage = PatchCoverage(processor)(mask[None], int(tokens.sum()))[0]
    own = processor.vlm_processor  # which SAEs may be trained with
    if family == "gemma3":  # its image_token_id is of the text's placeholder, not of a patch
        with pytest.raises(UnknownPlacesError, match="makes 1 tokens"):
            PatchCoverage(own)(mask[None], int(tokens.sum()))
    else:
        assert torch.equal(PatchCoverage(own)(mask[None], int(tokens.sum()))[0], coverage)
    side = math.isqrt(len(coverage))
    grid = coverage.view(side, side)
    assert torch.allclose(grid[:, : side // 2], torch.zeros(1), atol=0.05)
    assert torch.allclose(grid[:, side // 2 :], torch.ones(1), atol=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_coverage_is_where_the_vlm_sees_the_object(family):
    # The image tokens whose features change when the object is painted are those that the mask covers.
    model, processor = bare_vlm(family).eval(), tiny_processor(family)
    empty = np.full((56, 56, 3), 90, np.uint8)
    mask = np.zeros((56, 56), bool)
    mask[30:54, 2:24] = True  # bottom left
    painted = np.where(mask[..., None], np.uint8(250), empty)
    states = []
    for image in (empty, painted):
        inputs = processor(images=[[image]], text=[processor.build_prompt("red")], return_tensors="pt")
        hidden = model(**inputs, output_hidden_states=True).hidden_states[0][0]
        states.append(hidden[inputs["input_ids"][0] == processor.image_token_id])
    change = (states[1] - states[0]).norm(dim=-1)
    coverage = PatchCoverage(processor)(mask[None], len(change))[0]
    assert torch.equal(coverage > 0.3, change > change.max() / 2) and (coverage > 0.3).any()


def test_coverage_of_a_cropped_image():
    # LLaVA's processor crops 56 x 28 to the middle: what is at the far left is out of sight.
    coverage = PatchCoverage(tiny_processor("llava"))
    left, middle = np.zeros((28, 56), bool), np.zeros((28, 56), bool)
    left[:, :14], middle[:, 14:28] = True, True
    assert coverage(left[None], 4).max() < 0.05
    assert torch.allclose(coverage(middle[None], 4)[0], torch.tensor([1.0, 0, 1, 0]), atol=0.1)
    with pytest.raises(ValueError, match="alignment_weight=0"):
        coverage(middle[None], 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_marked_where_they_stand(family):
    processor = tiny_processor(family)
    # "candidates" and "wrong" also stand in the template, after the instruction.
    row = tiny_row(0, 1, "a red circle", instruction="the red candidates, not red ones")
    for text, expected in (("instruction", ["red", "candidates", "red", "ones"]), ("reasoning", ["red"])):
        collator = SegmentationCollator(processor, extra=AlignmentTargets(processor, text=text))
        batch = collator([row, tiny_row(1, 0, "a much longer reasoning, so that there is padding")])
        marked = batch["input_ids"][0][batch["alignment_words"][0]]
        found = processor.tokenizer.decode(marked).split()
        assert [word for word in found if word not in ("not", "ones")] == [w for w in expected if w != "ones"]
        assert (batch["alignment_words"] <= batch["alignment_text"]).all()
        is_image = batch["input_ids"] == processor.image_token_id
        assert not (batch["alignment_text"] & is_image).any() and (batch["alignment_coverage"][~is_image] == 0).all()
        assert batch["alignment_coverage"][0].max() > 0.9 and batch["alignment_coverage"][1].max() == 0
        assert not (batch["alignment_text"] & (batch["attention_mask"] == 0)).any()


def test_alignment_text_is_checked():
    with pytest.raises(ValueError, match="text='image'"):
        AlignmentTargets(tiny_processor(), text="image")


def test_pair_alignment_by_hand():
    # Tokens: `red`, `ring`, three patches. Patch 0 is a red ring, patch 1 red and no ring, patch 2 background.
    states = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.5]]])
    is_image = torch.tensor([[False, False, True, True, True]])
    words, patches = torch.zeros(1, 5, 3, dtype=torch.bool), torch.zeros(1, 5, 3, dtype=torch.bool)
    words[0, 0, 0] = words[0, 1, 1] = True  # the third name has no token: it does not count
    patches[0, [2, 3], 0] = patches[0, 2, 1] = patches[0, 4, 2] = True
    loss, count = pair_alignment_loss(states, words, patches, is_image, temperature=0.5)
    # Cosines over temperature: red (sqrt 2, 2, 0), ring (sqrt 2, 0, 2).
    root, two = math.exp(math.sqrt(2)), math.exp(2)
    red_0, red_1 = math.log(root / (root + 1)), math.log(two / (two + 1))  # against patch 2
    ring_0 = math.log(root / (root + 1 + two))  # against patches 1 and 2
    names_0, names_1 = 0.0, math.log(two / (two + 1))  # both names are true of patch 0; of patch 1 ring is not
    expected = -((red_0 + red_1) / 2 + ring_0) / 2 - ((names_0 + names_1) / 2 + names_0) / 2
    assert count == 1 and loss.item() == pytest.approx(expected / 2, rel=1e-5)


def test_pair_alignment_contrasts_every_word_token_by_itself():
    # `red` stands twice; its second token looks like patch 1, which is not red. Patch 0 is.
    states = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    is_image = torch.tensor([[False, False, True, True]])
    words, patches = torch.zeros(1, 4, 1, dtype=torch.bool), torch.zeros(1, 4, 1, dtype=torch.bool)
    words[0, :2, 0] = patches[0, 2, 0] = True
    loss, _ = pair_alignment_loss(states, words, patches, is_image, temperature=0.5)
    e = math.exp(2)
    assert loss.item() == pytest.approx(-(math.log(e / (e + 1)) + math.log(1 / (1 + e))) / 2 / 2, rel=1e-5)


def test_pair_alignment_adds_up_and_has_a_finite_gradient():
    torch.manual_seed(0)
    states = torch.randn(3, 6, 8, requires_grad=True)
    is_image = torch.tensor([[False, False, True, True, True, True]] * 3)
    words, patches = torch.zeros(3, 6, 2, dtype=torch.bool), torch.zeros(3, 6, 2, dtype=torch.bool)
    words[:2, :2, 0], patches[0, 2:, 0], patches[1, 3, 0] = True, True, True  # every patch of the first sample
    whole, count = pair_alignment_loss(states, words, patches, is_image)
    parts = [pair_alignment_loss(*(t[i : i + 1] for t in (states, words, patches, is_image))) for i in range(3)]
    assert count == 2 and torch.allclose(whole, sum(loss for loss, _ in parts)) and parts[0][0] == 0
    whole.backward()
    assert states.grad.isfinite().all() and states.grad[1, :4].norm() > 0 and states.grad[2].norm() == 0
