"""Names in the text and the patches of what they name."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from supervised import tiny_row
from tiny import tiny_processor

from segcompass_hf.data.collator import SegmentationCollator
from segcompass_hf.data.scenes.dataset import sample, to_row
from segcompass_hf.data.scenes.names import listed_names, placed_names
from segcompass_hf.data.schema import decode_masks, encode_mask
from segcompass_hf.token_places import Name, target_names
from segcompass_hf.training.alignment.names import TokenPairs


def test_target_names():
    row = tiny_row(0, 2, instruction="segment the red circle and the red ring")
    assert target_names(row) == [Name("red", (0, 1)), Name("circle", (0, 1)), Name("ring", (0, 1))]
    assert target_names(tiny_row(0, 0)) == []


def test_listed_names_by_hand():
    row = {"reasoning": "c2 large red ring no, e4 small red cross yes, a7 large blue ring no. answer 1 e4."}
    # Objects: the target (the second in the list), then the distractors, which are the first and the third.
    assert listed_names(row | {"instance_ids": [2]}) == [
        Name("large", (1, 2)),
        Name("red", (0, 1)),
        Name("ring", (1, 2)),
        Name("small", (0,)),
        Name("cross", (0,)),
        Name("blue", (2,)),
    ]
    assert listed_names({"reasoning": None, "instance_ids": []}) == []
    placed = placed_names(row | {"instance_ids": [2]})
    assert [name for name in placed if name not in listed_names(row | {"instance_ids": [2]})] == [
        Name("c2", (1,)),
        Name("e4", (0,)),
        Name("a7", (2,)),
    ]
    assert len(placed) == 9 and placed_names({"reasoning": None, "instance_ids": []}) == []


def test_listed_names_are_true_of_the_pixels_of_scenes():
    for index in range(6):
        scene = sample("train", index)
        row = to_row(scene, "s", "train")
        masks = [*decode_masks(row["masks"], (112, 112)), *decode_masks(row["distractor_masks"], (112, 112))]
        names = dict(listed_names(row))
        assert set(names) == {word for o in scene.objects for word in o.triple}
        for place, o in enumerate(scene.objects):
            mine = [i for i, mask in enumerate(masks) if np.array_equal(mask, scene.ids == place + 1)]
            assert len(mine) == 1 and all((mine[0] in names[word]) == (word in o.triple) for word in names)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_words_and_patches_are_marked(family):
    processor = tiny_processor(family)
    left, right = np.zeros((56, 56), bool), np.zeros((56, 56), bool)
    left[:, :28], right[:, 28:] = True, True
    picture = Image.fromarray(np.zeros((56, 56, 3), np.uint8))
    row = tiny_row(0, instruction="the red circle", reasoning="red circle, red ring") | {
        "image": picture,
        "masks": [encode_mask(left)],
        "distractor_masks": [encode_mask(right)],
    }
    # "candidates" stands in the template but not in the row; nothing is "square"; "ring" here names no object.
    names = {"red": (0, 1), "red ring": (1,), "circle": (0,), "square": (1,), "candidates": (0,), "ring": ()}
    pairs = TokenPairs(processor, lambda row: [Name(*name) for name in names.items()] if row["masks"] else [])
    rows = [row, tiny_row(1, 0, "a longer reasoning, so that the first row is padded")]
    batch = SegmentationCollator(processor, extra=pairs, inputs="language", with_masks=False)(rows)
    words, patches, ids = batch["pair_words"], batch["pair_patches"], batch["input_ids"]
    assert words.shape == patches.shape == (*ids.shape, 3) and not words[1].any() and not patches[1].any()
    said = [processor.tokenizer.decode(ids[0, words[0, :, name]]).replace(" ", "") for name in range(3)]
    assert said == ["redredred", "redring", "circlecircle"]
    is_image = ids[0] == processor.image_token_id
    side = math.isqrt(int(is_image.sum()))
    grids = patches[0][is_image].T.view(3, side, side)
    assert grids[0].all() and not patches[0][~is_image].any()
    assert grids[1, :, side // 2 :].all() and not grids[1, :, : side // 2].any()
    assert torch.equal(grids[2], ~grids[1])


def test_a_small_object_has_the_patch_that_shows_most_of_it():
    processor = tiny_processor("llava")
    mask = np.zeros((56, 56), bool)
    mask[3:6, 3:6] = True  # far less than half of any patch
    row = tiny_row(0) | {"image": Image.new("RGB", (56, 56)), "masks": [encode_mask(mask)]}
    batch = SegmentationCollator(processor, extra=TokenPairs(processor), inputs="language", with_masks=False)([row])
    image_tokens = (batch["input_ids"][0] == processor.image_token_id).nonzero()[:, 0]
    assert batch["pair_patches"][0].nonzero().tolist() == [[int(image_tokens[0]), 0], [int(image_tokens[0]), 1]]
