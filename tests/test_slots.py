# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Slot encoder: derived values, and that padding, batch and token order change nothing."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from segcompass_hf.modeling_slots import SlotEncoder, SlotQueries


def config(**overrides):
    fields = {
        "num_slots": 3,
        "d_slot": 16,
        "slot_encoder_layers": 2,
        "slot_encoder_heads": 4,
        "slot_encoder_ff_mult": 2,
        "slot_encoder_dropout": 0.0,
        "slot_init_std": 0.5,
    }
    return SimpleNamespace(**{**fields, **overrides})


def encoder(**overrides) -> SlotEncoder:
    return SlotEncoder(config(**overrides)).eval()


def test_uniform_attention_by_hand():
    # One layer; zero queries and keys make attention uniform, identity values and output make it a mean:
    # slot = LN(q + mean over the K queries and the unmasked tokens of LN(x)); the feed-forward adds nothing (fc2 = 0).
    model = encoder(slot_encoder_layers=1, num_slots=2)
    layer, d = model.layers[0], 16
    with torch.no_grad():
        for linear in (layer.qkv_proj, layer.out_proj, layer.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
        layer.qkv_proj.weight[2 * d :] = torch.eye(d)
        layer.out_proj.weight.copy_(torch.eye(d))
    tokens = torch.randn(1, 3, d)
    queries = model.slot_queries.weight[0]
    seen = torch.cat([queries, tokens[0, 1:]])  # the first token is padding
    expected = F.layer_norm(queries + F.layer_norm(seen, (d,)).mean(0), (d,))
    slots = model(tokens, torch.tensor([[0, 1, 1]])).slots
    torch.testing.assert_close(slots[0], expected, rtol=0, atol=1e-6)


def test_padding_changes_nothing_left_or_right():
    model, tokens = encoder(), torch.randn(2, 5, 16)
    plain = model(tokens).slots
    garbage = torch.full((2, 3, 16), 1e4)
    ones, zeros = torch.ones(2, 5), torch.zeros(2, 3)
    left = model(torch.cat([garbage, tokens], 1), torch.cat([zeros, ones], 1)).slots
    right = model(torch.cat([tokens, -garbage], 1), torch.cat([ones, zeros], 1).bool()).slots
    torch.testing.assert_close(left, plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(right, plain, rtol=0, atol=1e-6)


def test_batch_equals_singles():
    model, tokens = encoder(), torch.randn(4, 6, 16)
    mask = torch.arange(6) < torch.tensor([[6], [1], [4], [3]])
    batch = model(tokens, mask).slots
    for row in range(4):
        single = model(tokens[row : row + 1, : int(mask[row].sum())]).slots
        torch.testing.assert_close(batch[row : row + 1], single, rtol=0, atol=1e-6)


def test_order_of_tokens_does_not_matter_but_their_content_does():
    model, tokens = encoder(), torch.randn(1, 6, 16)
    slots = model(tokens).slots
    torch.testing.assert_close(model(tokens[:, torch.randperm(6)]).slots, slots, rtol=0, atol=1e-6)
    changed = tokens.clone()
    changed[0, 2, 0] += 3.0  # one channel: LayerNorm would swallow a shift of all
    assert (model(changed).slots - slots).abs().max() > 1e-3


def test_attention_on_request_is_the_attention_used():
    model, tokens = encoder(slot_encoder_layers=1), torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    output = model(tokens, mask, output_attentions=True)
    assert torch.equal(output.slots, model(tokens, mask).slots)
    assert model(tokens, mask).attentions is None
    (weights,) = output.attentions
    assert weights.shape == (2, 4, 3, 3 + 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 3))
    assert weights[1, :, :, 3:5].eq(0).all()  # padding
    # The slots recomputed from the returned weights.
    layer = model.layers[0]
    hidden = torch.cat([model.slot_queries.weight.expand(2, -1, -1), tokens], 1)
    values = layer.qkv_proj(layer.attention_norm(hidden))[..., 32:].view(2, 8, 4, 4).transpose(1, 2)
    states = hidden[:, :3] + layer.out_proj((weights @ values).transpose(1, 2).reshape(2, 3, 16))
    states = states + layer.fc2(F.gelu(layer.fc1(layer.feed_forward_norm(states))))
    torch.testing.assert_close(model.final_norm(states), output.slots, rtol=0, atol=1e-5)


def test_every_layer_reports_attention():
    output = encoder(slot_encoder_layers=3)(torch.randn(1, 4, 16), output_attentions=True)
    assert [tuple(weights.shape) for weights in output.attentions] == [(1, 4, 3, 7)] * 3


def test_gradient_reaches_every_parameter_and_tokens_but_not_padding():
    model, tokens = encoder().train(), torch.randn(2, 5, 16, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    (model(tokens, mask).slots * torch.randn(2, 3, 16)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert tokens.grad[1, :2].eq(0).all()
    assert tokens.grad[mask.bool()].abs().sum(-1).gt(0).all()


def test_a_row_of_padding_alone_stays_finite():
    slots = encoder()(torch.randn(2, 4, 16), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])).slots
    assert slots.isfinite().all()


def test_queries_start_spread_by_slot_init_std():
    # 64 x 256 draws: the sample deviation is within 2 % of the true one.
    assert SlotQueries(64, 256, std=0.5).weight.std().item() == pytest.approx(0.5, rel=0.02)
    assert SlotQueries(64, 256, std=0.02).weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_dropout_acts_in_training_only():
    model, tokens = encoder(slot_encoder_dropout=0.3), torch.randn(1, 5, 16)
    assert torch.equal(model(tokens).slots, model(tokens).slots)
    model.train()
    assert not torch.equal(model(tokens).slots, model(tokens).slots)


def test_bf16_stays_close():
    model, tokens = encoder(), torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    reference = model(tokens, mask).slots
    output = model.to(torch.bfloat16)(tokens, mask, output_attentions=True)  # float32 embeddings are cast
    assert output.slots.dtype == torch.bfloat16 and output.attentions[0].dtype == torch.bfloat16
    torch.testing.assert_close(output.slots.float(), reference, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("shape", "mask_shape", "message"),
    [
        ((2, 5, 8), (2, 5), "have 8 channels.*d_slot=16"),
        ((2, 5, 16), (2, 4), r"attention_mask has shape \(2, 4\), expected \(2, 5\)"),
    ],
)
def test_wrong_shapes_are_named(shape, mask_shape, message):
    with pytest.raises(ValueError, match=message):
        encoder()(torch.randn(shape), torch.ones(mask_shape))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="d_slot is 16 and slot_encoder_heads is 3"):
        encoder(slot_encoder_heads=3)
