# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Calls of an encoder by image, outputs by tensor."""

import inspect

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from segcompass_hf.data.encoder_calls import AwaitedTensor, EncoderInputs, OutputLayout, split_rows


def inputs_of(*args, **kwargs):
    def forward(pixel_values, grid_thw=None, **options): ...

    return EncoderInputs.of(inspect.signature(forward).bind(*args, **kwargs))


class TestInputs:
    def test_rows_of_a_batch(self):
        pixels, mask = torch.rand(3, 2, 4, 4), torch.ones(3, 4, dtype=torch.bool)
        inputs = inputs_of(pixels, patch_mask=mask, return_dict=True, nothing=None)
        assert inputs.sizes == [1, 1, 1] and inputs.settings == {"return_dict": True}
        taken = inputs.take([2, 0]).arguments()
        assert torch.equal(taken["pixel_values"], pixels[[2, 0]]) and taken["patch_mask"].shape == (2, 4)
        assert taken["return_dict"] is True

    def test_packed_patches(self):
        patches = torch.rand(4 + 8, 5)
        inputs = inputs_of(patches, grid_thw=torch.tensor([[1, 2, 2], [1, 2, 4]]))
        assert inputs.sizes == [4, 8] and torch.equal(inputs.images[1]["pixel_values"], patches[4:])
        assert torch.equal(inputs.arguments()["pixel_values"], patches)

    def test_what_cannot_be_told_apart(self):
        pixels = torch.rand(3, 2)
        assert inputs_of(pixels, sizes=torch.ones(2)) is None  # of how many images?
        assert inputs_of(pixels, scale=torch.tensor(1.0)) is None
        assert inputs_of(pixels, callback=print) is None  # says nothing of itself that holds tomorrow
        assert inputs_of(pixels, grid_thw=torch.tensor([[1, 2, 2]])) is None  # 3 patches are not 4
        assert inputs_of(pixels[:0]) is None

    def test_keys_say_what_decides_an_image(self):
        pixels = torch.rand(2, 3)
        one, two = inputs_of(pixels).keys()
        assert one != two and inputs_of(pixels[1:]).keys() == [two]
        assert inputs_of(pixels, return_dict=True, output_hidden_states=-2).keys() == [one, two]  # no value changes
        assert inputs_of(pixels, interpolate=True).keys()[0] != one
        assert inputs_of(pixels.double()).keys()[0] != one and inputs_of(pixels.view(2, 3, 1)).keys()[0] != one
        with torch.autocast("cpu", torch.bfloat16):
            assert inputs_of(pixels).keys()[0] != one


def test_merged_patches_are_split_like_patches():
    assert [len(part) for part in split_rows(torch.rand(3, 2), [4, 8])] == [1, 2]
    assert split_rows(torch.rand(12, 2), [4, 8])[1].shape == (8, 2)
    assert split_rows(torch.rand(1, 2), [1, 1]) is None  # one row for both
    assert split_rows(torch.rand(2, 2), [4, 8]) is None  # half of a row


class TestOutputs:
    def test_only_what_is_read_is_computed_and_known_as_read(self):
        states = (torch.zeros(2, 1), torch.ones(2, 1))
        output = BaseModelOutputWithPooling(last_hidden_state=torch.full((2, 1), 2.0), hidden_states=states)
        layout, computed = OutputLayout(output, []), []

        def compute():
            computed.append(1)
            return output

        given = layout.outputs({}, compute)
        assert isinstance(given, BaseModelOutputWithPooling) and given.pooler_output is None
        given.pooler_output = [given.last_hidden_state]  # held, not asked
        assert not computed and layout.read == []
        assert given.hidden_states[1].shape == (2, 1)  # a question is enough
        assert torch.equal(torch.cat([given.hidden_states[1], states[0]]), torch.tensor([[1.0], [1], [0], [0]]))
        assert computed == [1] and layout.read == ["/hidden_states/1"]
        known = layout.outputs({"/hidden_states/1": states[1]}, compute)
        assert type(known.hidden_states[1]) is torch.Tensor and computed == [1]

    def test_an_awaited_tensor_answers_like_the_real_one(self):
        real = torch.arange(6.0).view(2, 3)
        awaited = AwaitedTensor.of(lambda: real)
        weight = torch.eye(3, requires_grad=True)
        torch.nn.functional.linear(awaited, weight).sum().backward()
        assert torch.equal(weight.grad, real.sum(0).expand(3, 3))
        assert type(awaited + 1) is torch.Tensor and awaited[0, 1] == 1 and len(awaited) == 2
        assert awaited.dtype == torch.float32 and torch.equal(torch.stack([awaited, real]).sum(0), 2 * real)
