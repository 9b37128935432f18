# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A picture that several rows in succession show is encoded once."""

import pytest
import torch
from model_inputs import inputs_of
from tiny import tiny_model

from segcompass_hf import ImageFeatures
from segcompass_hf.image_features_segcompass import encode_different


@pytest.mark.parametrize("extra", [(), (torch.tensor([10.0]),)])
def test_rows_of_one_picture(extra):
    seen = []

    def encode(pixels):
        """The mean of each picture; a segmenter with levels also gives ten times as much."""
        seen.append(len(pixels))
        means = pixels.mean((1, 2, 3))[:, None]
        return ImageFeatures(means, tuple(means * factor for factor in extra)) if extra else means

    red, blue = torch.full((3, 2, 2), 1.0), torch.full((3, 2, 2), 2.0)
    found = encode_different(encode, torch.stack([red, red, blue, red, red]))
    parts = found.parts if extra else (found,)
    assert seen == [3]  # red, blue, and red again
    assert parts[0].flatten().tolist() == [1, 1, 2, 1, 1]
    assert not extra or parts[1].flatten().tolist() == [10, 10, 20, 10, 10]
    nearly = red.clone()
    nearly[0, 0, 0] += 1e-6
    assert len(encode_different(encode, torch.stack([red, nearly]))) == 2 and seen[-1] == 2


def test_questions_about_one_picture_pay_for_it_once():
    model = tiny_model()
    one = inputs_of(rows=(0,))
    two = {name: torch.cat([value, value]) for name, value in one.items()}
    encoded = []
    model.sam.vision_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    alone = model.segment(**one, max_new_tokens=12)
    both = model.segment(**two, max_new_tokens=12)
    assert encoded == [1, 1]
    for row in (0, 1):
        assert torch.equal(both.sequences[row], alone.sequences[0])
        torch.testing.assert_close(both.pred_masks[row], alone.pred_masks[0], atol=1e-4, rtol=1e-4)
