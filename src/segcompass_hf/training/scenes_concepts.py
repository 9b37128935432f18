# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What makes the concepts of scenes-tiny shared between words and patches, as options of its warm-up."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .scenes_batches import ATTRIBUTES


class ConceptWords:
    """Loss that lets states at the SAE layer point at the words for what they mean, patches and words alike.

    A patch points at the color, shape and size that it shows, the word `red` at `red`: at the directions that these
    words have in the embeddings. `PatchWords` asks this of the patches before the first layer, whose writes are forty
    times as long. Without this loss color makes up half a percent of what varies among patches at the SAE layer, no
    SAE has a feature for it, and there is nothing to share.

    The logit of word w is `scale * cos(z, E_w)`, among the words of its attribute. The smaller the scale, the more of
    the state these directions must take up.
    """

    def __init__(self, tokenizer, scale: float = 4.0):
        index = tokenizer.convert_tokens_to_ids
        self.words = {name: torch.tensor(index(list(values))) for name, values in ATTRIBUTES.items()}
        self.image, self.scale = index("<image>"), scale

    def __call__(self, states, input_ids, embeddings, labels) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss, and how often the nearest word is the right one.

        Args:
            states (`torch.Tensor` of shape `(batch, tokens, hidden)`): At the SAE layer.
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`): Theirs.
            embeddings (`torch.Tensor` of shape `(words, hidden)`): The input embeddings.
            labels (`dict`): From `patch_labels`.
        """
        directions = F.normalize(states.float(), dim=-1)
        patches = directions[input_ids == self.image].view(*labels["centre"].shape, -1)  # (batch, 64, hidden)
        loss, seen = 0.0, {}
        for name, words in self.words.items():
            words = words.to(input_ids.device)
            anchors = F.normalize(embeddings[words].float(), dim=-1)
            shown = labels[name] >= 0
            weight = torch.where(labels["centre"], 2.0, 1.0)[shown]
            scores, right = patches[shown] @ anchors.t(), labels[name][shown]
            error = F.cross_entropy(self.scale * scores, right, reduction="none")
            loss = loss + (error * weight).sum() / weight.sum().clamp(min=1)
            seen[f"{name}_shown"] = (scores.argmax(-1) == right).float().mean()
            is_word = torch.isin(input_ids, words)
            scores = directions[is_word] @ anchors.t()
            right = (input_ids[is_word][:, None] == words).long().argmax(-1)
            loss = loss + F.cross_entropy(self.scale * scores, right)
            seen[f"{name}_said"] = (scores.argmax(-1) == right).float().mean()
        return loss, seen
