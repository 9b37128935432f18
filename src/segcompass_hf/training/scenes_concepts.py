# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What makes the concepts of scenes-tiny shared between words and patches, as options of its warm-up and SAE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from .sae.pair_buffer import PairBlock
from .scenes_batches import ATTRIBUTES, SceneCollator, SceneSamples, patch_labels


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
            error = F.cross_entropy(self.scale * scores, right, reduction="sum")
            loss = loss + error / max(1, len(right))
            seen[f"{name}_said"] = (scores.argmax(-1) == right).float().mean()
        return loss, seen


@torch.no_grad()
def harvest_pairs(
    vlm, tokenizer, layer: int, num_scenes: int, seed: int, batch_size: int = 64, kinds: tuple[str, ...] | None = None
) -> PairBlock:
    """States of every color, shape and size word of some scenes, and of the patches in the same scene that show it."""
    vlm.eval()
    block, image = PairBlock(), tokenizer.convert_tokens_to_ids("<image>")
    names = {
        value: (attribute, number, tokenizer.convert_tokens_to_ids(value))
        for attribute, values in ATTRIBUTES.items()
        for number, value in enumerate(values)
    }
    scenes = SceneSamples(num_scenes, seed=seed, kinds=kinds)
    for batch in DataLoader(scenes, batch_size, collate_fn=SceneCollator(tokenizer)):
        inputs = {name: batch[name].to(vlm.device) for name in ("input_ids", "attention_mask", "pixel_values")}
        hidden = vlm.base_model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[layer]
        labels = patch_labels(batch["ids"], batch["objects"])
        for index, (ids, states) in enumerate(zip(batch["input_ids"], hidden.float().cpu(), strict=True)):
            patches = states[ids == image]  # (64, hidden)
            for name, (attribute, number, word) in names.items():
                shown = labels[attribute][index] == number
                if shown.any() and (ids == word).any():
                    block.add(name, states[ids == word], patches[shown])
    return block
