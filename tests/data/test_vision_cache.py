# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The vision encoder's outputs on disk: the same values, once per image, or said why not."""

import pytest
import torch
from tiny import FAMILIES, tiny_image, tiny_model, tiny_processor
from torch import nn

from segcompass_hf.data.vision_cache import VisionCache
from segcompass_hf.training.vision import vision_encoder
from segcompass_hf.vlm_inputs_segcompass import sequence_inputs


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr("segcompass_hf.data.vision_cache.logger.warning", said.append)
    return said


class Encoder(nn.Module):
    """A row of 3 -> a row of 2; counts the rows that it is given."""

    def __init__(self, *more):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 2), *more)
        self.rows = 0
        self.requires_grad_(False).train()

    def forward(self, pixel_values):
        self.rows += len(pixel_values)
        return (self.layers(pixel_values),)


def settled(encoder, folder, pixels, times=2):
    """A cache that has met `pixels` and what is read of an output, then left."""
    with VisionCache(folder, encoder) as cache:
        for _ in range(times):
            (output,) = encoder(pixels)
            assert torch.equal(output + 0, encoder.layers(pixels)) or encoder.training
    return cache


PIXELS = torch.arange(12.0).view(4, 3) / 10


class TestFamilies:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("bf16", [False, True])
    def test_a_pass_gives_the_same_to_the_bit(self, family, bf16, tmp_path):
        """Loss and gradients below and above the projector; the second run takes all from the folder."""
        vlm, processor = tiny_model(family).vlm.train(), tiny_processor(family)
        encoder = vision_encoder(vlm)
        encoder.requires_grad_(False)
        inputs = processor(images=[tiny_image(i) for i in range(3)], instruction=["a"] * 3, return_tensors="pt")
        named = (
            "input_ids",
            "attention_mask",
            "pixel_values",
            "image_grid_thw",
            "mm_token_type_ids",
            "token_type_ids",
        )
        inputs = {name: inputs[name] for name in named if name in inputs}

        def step():
            vlm.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = vlm(**sequence_inputs(vlm, inputs)).logits.float().pow(2).mean()
            loss.backward()
            return loss, {name: p.grad for name, p in vlm.named_parameters() if p.grad is not None}

        expected, gradients = step()
        assert gradients
        for number in (3, 0):
            with VisionCache(tmp_path, encoder) as cache:
                results = [step() for _ in range(3)]
            assert cache.num_computed == number
            for loss, got in results:
                assert torch.equal(loss, expected) and got.keys() == gradients.keys()
                assert all(torch.equal(got[name], gradients[name]) for name in gradients)
        assert "forward" not in encoder.__dict__


class TestStore:
    def test_every_image_once_whatever_batch_it_comes_in(self, tmp_path):
        encoder = Encoder()
        with VisionCache(tmp_path, encoder) as cache:
            encoder(PIXELS[:1])[0].sum()  # shows what is read
            encoder.rows = 0
            for rows in ([0, 1], [1, 0, 1], [2, 1], [2, 2, 0]):
                assert torch.allclose(encoder(PIXELS[rows])[0], encoder.layers(PIXELS[rows]), atol=1e-6)
        assert encoder.rows == cache.num_computed == 3

    def test_two_at_once_read_each_other(self, tmp_path):
        one, two = Encoder(), Encoder()
        with VisionCache(tmp_path, one, shard_bytes=1) as first, VisionCache(tmp_path, two, shard_bytes=1) as second:
            for encoder in (one, two):
                encoder(PIXELS)[0].sum()
            a, b = one(PIXELS[:2])[0], two(PIXELS[1:])[0]
            assert torch.equal(one(PIXELS)[0][1:], b) and torch.equal(two(PIXELS)[0][:2], a)
        assert (first.num_computed, second.num_computed) == (
            2,
            2,
        )  # of four images; the second read one of the first's

    def test_a_file_that_is_cut_short_is_computed_again(self, tmp_path):
        settled(Encoder(), tmp_path, PIXELS)
        (file,) = tmp_path.rglob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-20])
        assert settled(Encoder(), tmp_path, PIXELS).num_computed == 4
        assert settled(Encoder(), tmp_path, PIXELS).num_computed == 0

    def test_other_weights_find_nothing(self, tmp_path, warnings):
        settled(Encoder(), tmp_path, PIXELS)
        other = Encoder()
        other.layers[0].weight.mul_(2)
        assert settled(other, tmp_path, PIXELS).num_computed == 4
        encoder = Encoder()
        with VisionCache(tmp_path, encoder) as cache:
            encoder(PIXELS)[0].sum()
            encoder(PIXELS)
            assert cache.num_computed == 0 and not warnings
            encoder.layers[0].bias.add_(1)  # within
            assert torch.equal(encoder(PIXELS)[0], encoder.layers(PIXELS)) and cache.num_computed == 4
        assert "vision encoder changed" in warnings[0]

    def test_a_disk_too_small(self, tmp_path, warnings, monkeypatch):
        encoder = Encoder()
        with VisionCache(tmp_path, encoder) as cache:
            with pytest.raises(OSError, match="GiB too little, with 1.00 GiB left free. Use another folder"):
                cache.announce(10**6, 2**40)
            assert not warnings
            cache.announce(2, 2**20)
            assert "up to 2.00 MiB more for 2 images (1.00 MiB each, 0.00 MiB are there)" in warnings[0]
        # one that fills up meanwhile stops nothing
        monkeypatch.setattr("segcompass_hf.data.tensor_shards.free_space", lambda folder: 0)
        with VisionCache(tmp_path, encoder, shard_bytes=1):
            for _ in range(3):
                assert torch.equal(encoder(PIXELS)[0] + 0, encoder.layers(PIXELS))
        assert "nothing more is stored" in warnings[1] and len(warnings) == 2


class TestLeftAlone:
    def said(self, encoder, tmp_path, warnings, *args, message):
        with VisionCache(tmp_path, encoder) as cache:
            torch.manual_seed(3)
            results = [encoder(*(args or (PIXELS,)))[0] for _ in range(3)]
        torch.manual_seed(3)
        expected = [encoder(*(args or (PIXELS,)))[0] for _ in range(3)]
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))  # random numbers too
        assert cache.num_computed == 0 and not list(tmp_path.rglob("*.safetensors"))
        assert len(warnings) == 1 and message in warnings[0]

    def test_it_trains(self, tmp_path, warnings):
        self.said(Encoder().requires_grad_(True), tmp_path, warnings, message="because it trains")

    def test_dropout(self, tmp_path, warnings):
        self.said(Encoder(nn.Dropout(0.01)), tmp_path, warnings, message="draws random numbers in training")
        assert settled(Encoder(nn.Dropout(0.5)).eval(), tmp_path, PIXELS).num_computed == 4  # none in evaluation
        assert settled(Encoder(nn.Dropout(0.0)), tmp_path, PIXELS).num_computed == 0  # nor of nothing

    def test_batch_norm(self, tmp_path, warnings):
        """By the statistics of the batch, which add to those that are stored."""
        encoder = Encoder(nn.BatchNorm1d(2, momentum=None))
        before = encoder.layers[1].running_mean.clone()
        with VisionCache(tmp_path, encoder) as cache:
            assert torch.equal(encoder(PIXELS)[0].mean(0).round(decimals=5), torch.zeros(2)) and not cache.num_computed
        assert "changes its buffers in training" in warnings[0]
        assert encoder.layers[1].num_batches_tracked == 1  # the pass itself, not its trials
        assert not torch.equal(encoder.layers[1].running_mean, before)

    def test_images_that_see_each_other(self, tmp_path, warnings):
        class Mixing(Encoder):
            def forward(self, pixel_values):
                return (self.layers(pixel_values - pixel_values.mean(0)),)

        self.said(Mixing(), tmp_path, warnings, message="depends on other images")

    def test_packed_outputs(self, tmp_path, warnings):
        class Packing(Encoder):
            def forward(self, pixel_values):
                return (self.layers(pixel_values)[None],)

        self.said(Packing(), tmp_path, warnings, message="depends on other images")

    def test_an_output_that_is_no_image_s(self, tmp_path, warnings):
        class Tabling(Encoder):
            def forward(self, pixel_values):
                return super().forward(pixel_values) + (self.layers[0].weight[None],)

        encoder = Tabling()
        self.said(encoder, tmp_path, warnings, message="stands in no row")
        with VisionCache(tmp_path, encoder):
            for _ in range(2):
                assert torch.equal(encoder(PIXELS)[1] + 0, encoder.layers[0].weight[None])

    def test_inputs_without_a_row_per_image(self, tmp_path, warnings):
        class Scaling(Encoder):
            def forward(self, pixel_values, scale):
                return (self.layers(pixel_values) * scale,)

        scale = torch.tensor(2.0)
        self.said(Scaling(), tmp_path, warnings, PIXELS, scale, message="inputs cannot be told apart by image")
