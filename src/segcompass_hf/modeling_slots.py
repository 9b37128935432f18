# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Concept embeddings and learnable slot queries -> concept slots (step 3 of the method)."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import ModelOutput


@dataclass
class SlotEncoderOutput(ModelOutput):
    """
    Output of the slot encoder.

    Args:
        slots (`torch.Tensor` of shape `(batch_size, num_slots, d_slot)`):
            Concept slots, after the final LayerNorm.
        attentions (`tuple[torch.Tensor]`, *optional*, one per layer, each of shape
            `(batch_size, num_heads, num_slots, num_slots + sequence_length)`):
            Where the slots look: attention of the slot rows over slots (first `num_slots` columns) and tokens. Each
            row sums to 1 and is 0 on padding. Returned with `output_attentions=True`.
    """

    slots: torch.Tensor | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class SlotQueries(nn.Module):
    """Learnable queries of the slots; a module of its own so that `_init_weights` can find it by type."""

    def __init__(self, num_slots: int, d_slot: int, std: float):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(1, num_slots, d_slot))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the queries with standard deviation `std`; with 0.02 slots start alike and swap objects in training."""
        init.normal_(self.weight, mean=0.0, std=self.std)

    def forward(self, batch_size: int) -> torch.Tensor:
        return self.weight.expand(batch_size, -1, -1)  # (batch_size, num_slots, d_slot)


class SlotEncoderLayer(nn.Module):
    """Pre-norm Transformer encoder layer: `x + Attn(LN(x))`, then `x + W_2 GELU(W_1 LN(x))`."""

    def __init__(self, d_slot: int, num_heads: int, ff_mult: int, dropout: float):
        super().__init__()
        if d_slot % num_heads:
            raise ValueError(
                f"d_slot is {d_slot} and slot_encoder_heads is {num_heads}: the heads must divide d_slot evenly; "
                "choose another number of heads."
            )
        self.num_heads = num_heads
        self.head_dim = d_slot // num_heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(d_slot)
        self.qkv_proj = nn.Linear(d_slot, 3 * d_slot)
        self.out_proj = nn.Linear(d_slot, d_slot)
        self.feed_forward_norm = nn.LayerNorm(d_slot)
        self.fc1 = nn.Linear(d_slot, ff_mult * d_slot)
        self.fc2 = nn.Linear(ff_mult * d_slot, d_slot)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_mask: torch.Tensor,
        num_queries: int | None = None,
        num_attention_rows: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, length, d_slot)`):
                Slots followed by tokens.
            key_mask (`torch.BoolTensor` of shape `(batch_size, 1, 1, length)`):
                True where a position may be attended to.
            num_queries (`int`, *optional*):
                Compute only the first `num_queries` positions (the last layer needs the slots alone).
            num_attention_rows (`int`, *optional*, defaults to 0):
                Return the attention weights of this many first positions.

        Returns:
            `tuple`: hidden states `(batch_size, num_queries or length, d_slot)` and, when asked for, attention weights
            `(batch_size, num_heads, num_attention_rows, length)`.
        """
        batch_size, length, d_slot = hidden_states.shape
        qkv = self.qkv_proj(self.attention_norm(hidden_states))
        qkv = qkv.view(batch_size, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # each (batch_size, num_heads, length, head_dim)
        query, residual = query[:, :, :num_queries], hidden_states[:, :num_queries]
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask, dropout_p=dropout)
        context = context.transpose(1, 2).reshape(batch_size, -1, d_slot)
        hidden_states = residual + F.dropout(self.out_proj(context), dropout)

        update = F.dropout(F.gelu(self.fc1(self.feed_forward_norm(hidden_states))), dropout)
        hidden_states = hidden_states + F.dropout(self.fc2(update), dropout)

        weights = None
        if num_attention_rows:
            scores = query[:, :, :num_attention_rows] @ key.transpose(-1, -2) / self.head_dim**0.5
            weights = scores.float().masked_fill(~key_mask, float("-inf")).softmax(-1).to(value.dtype)
        return hidden_states, weights


class SlotEncoder(nn.Module):
    """
    Mix slot queries with the concept embeddings of all tokens and read the slots off.

    Slots are the first K rows of `LN(Encoder([queries ; tokens]))`: a pre-norm Transformer encoder without positional
    encoding, so the slots do not depend on the order of the tokens nor on where padding stands.

    Args:
        config (`SegCompassConfig`):
            Reads `num_slots`, `d_slot`, `slot_encoder_layers`, `slot_encoder_heads`, `slot_encoder_ff_mult`,
            `slot_encoder_dropout` and `slot_init_std`.
    """

    def __init__(self, config):
        super().__init__()
        self.num_slots = config.num_slots
        self.d_slot = config.d_slot
        self.slot_queries = SlotQueries(config.num_slots, config.d_slot, config.slot_init_std)
        self.layers = nn.ModuleList(
            SlotEncoderLayer(
                config.d_slot, config.slot_encoder_heads, config.slot_encoder_ff_mult, config.slot_encoder_dropout
            )
            for _ in range(config.slot_encoder_layers)
        )
        self.final_norm = nn.LayerNorm(config.d_slot)

    def forward(
        self,
        concept_embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> SlotEncoderOutput:
        """
        Args:
            concept_embeddings (`torch.Tensor` of shape `(batch_size, sequence_length, d_slot)`):
                Codebook sums of every token's active concepts.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 on tokens, 0 on padding; all tokens when missing.
            output_attentions (`bool`, *optional*, defaults to `False`):
                Also return where each slot looks in each layer.

        Returns:
            [`SlotEncoderOutput`]
        """
        batch_size, sequence_length, d_slot = concept_embeddings.shape
        if d_slot != self.d_slot:
            raise ValueError(
                f"concept_embeddings have {d_slot} channels, the slot encoder expects d_slot={self.d_slot}; "
                "use a codebook of the same d_slot."
            )
        queries = self.slot_queries(batch_size)
        slots_mask = torch.ones(batch_size, self.num_slots, dtype=torch.bool, device=concept_embeddings.device)
        if attention_mask is None:
            token_mask = slots_mask.new_ones(batch_size, sequence_length)
        elif attention_mask.shape == (batch_size, sequence_length):
            token_mask = attention_mask.to(device=slots_mask.device, dtype=torch.bool)
        else:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(batch_size, sequence_length)} to "
                "go with the concept embeddings; pass one flag per token."
            )
        key_mask = torch.cat([slots_mask, token_mask], dim=1)[:, None, None]  # (batch_size, 1, 1, K + tokens)
        hidden_states = torch.cat([queries, concept_embeddings.to(queries.dtype)], dim=1)

        attentions: tuple[torch.Tensor, ...] = ()
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            hidden_states, weights = layer(
                hidden_states,
                key_mask,
                num_queries=self.num_slots if last else None,
                num_attention_rows=self.num_slots if output_attentions else 0,
            )
            attentions += (weights,)
        slots = self.final_norm(hidden_states[:, : self.num_slots])  # (batch_size, num_slots, d_slot)
        return SlotEncoderOutput(slots=slots, attentions=attentions if output_attentions else None)
