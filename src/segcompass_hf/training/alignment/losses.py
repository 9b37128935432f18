# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Word-patch alignment: words that mean the target and the image patches inside its masks share one space.

The concepts that SegCompass reads should mean the same on text and on image tokens, which a VLM's states do not do by
themselves. Every row with masks holds pairs for free: words of the instruction on one side, patches on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ...data.schema import decode_masks
from ...patch_coverage_segcompass import PatchCoverage
from ...token_places import instruction_words, word_occurrences


@dataclass
class AlignmentTargets:
    """Marks words and patches of collated rows; `extra` of a [`SegmentationCollator`].

    Args:
        processor (`SegCompassProcessor`): Tokenizer and image processor.
        target_words (`Callable`, defaults to [`instruction_words`]): A row -> words that mean its target, as they are
            spelled in the text.
        text (`str`, defaults to `"instruction"`): Where they are looked for: `"instruction"` (the prompt after the
            image; there as often as the instruction has them, so that the template's own words do not count) or
            `"reasoning"` (the completion, every occurrence).
    """

    processor: Any
    target_words: Callable[[dict[str, Any]], list[str]] = instruction_words
    text: Literal["instruction", "reasoning"] = "instruction"

    def __post_init__(self):
        if self.text not in ("instruction", "reasoning"):
            raise ValueError(f'text={self.text!r} is not known; expected "instruction" or "reasoning".')
        self._coverage = PatchCoverage(self.processor)

    def __call__(self, rows: Sequence[dict[str, Any]], images: list, batch: Any) -> dict[str, torch.Tensor]:
        """Targets of a batch, one place per token.

        Returns:
            `dict` of tensors `(batch_size, sequence_length)`: `alignment_words` (bool, tokens of the words),
            `alignment_text` (bool, all tokens of the text they stand in) and `alignment_coverage` (float, the covered
            share of image tokens, 0 elsewhere).
        """
        ids, present = batch["input_ids"], batch["attention_mask"].bool()
        is_image = ids == self.processor.image_token_id
        completion = batch.get("completion_mask", torch.zeros_like(ids)).bool()
        if self.text == "reasoning":
            readable = completion
        else:
            after_image = is_image.flip(1).cumsum(1).flip(1) == 0  # no image token from here on
            readable = present & after_image & ~completion
        words, coverage = torch.zeros_like(present), torch.zeros(ids.shape)
        for index, (row, image) in enumerate(zip(rows, images, strict=True)):
            masks = decode_masks(row["masks"], (image.height, image.width))
            if len(masks) and bool(is_image[index].any()):
                places = is_image[index].nonzero()[:, 0]
                coverage[index, places] = self._coverage(masks.any(0)[None], len(places))[0]
            self._mark_words(row, ids[index], readable[index], words[index])
        return {"alignment_words": words, "alignment_text": readable, "alignment_coverage": coverage}

    def _mark_words(self, row: dict[str, Any], ids: torch.Tensor, readable: torch.Tensor, marks: torch.Tensor) -> None:
        """Set `marks` at the tokens of the row's words. All tensors `(sequence_length,)`."""
        places = readable.nonzero()[:, 0].tolist()
        tokens = ids[places].tolist()
        targets = self.target_words(row)
        for word in dict.fromkeys(targets):
            limit = targets.count(word) if self.text == "instruction" else len(tokens)
            for start, length in word_occurrences(self.processor.tokenizer, tokens, word)[:limit]:
                marks[places[start : start + length]] = True


def alignment_loss(
    states: torch.Tensor,
    words: torch.Tensor,
    text: torch.Tensor,
    coverage: torch.Tensor,
    is_image: torch.Tensor,
    temperature: float = 0.07,
) -> tuple[torch.Tensor, int]:
    r"""Symmetric InfoNCE between the words of a sample that mean its target and the patches of its image.

    With `s_wp = cos(z_w, z_p) / temperature` and `c_p` the coverage of patch p, divided by its maximum over the image:

        L_words   = - mean_{w in W} log( sum_p c_p exp(s_wp) / sum_p exp(s_wp) )
        L_patches = - sum_p c_p log( sum_{w in W} exp(s_wp) / sum_{t in T} exp(s_tp) ) / sum_p c_p
        L         = (L_words + L_patches) / 2

    W are the target words, T all tokens of the text they stand in, p the patches of the sample's image. Negatives are
    thus patches outside the masks and words that mean something else, all of the same sample: the loss of a sample
    does not depend on which others share its batch, and a mean over an accumulation window is exact.

    Args:
        states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Of one layer; 0: embeddings.
        words, text (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): W and T; W lies within T.
        coverage (`torch.Tensor` of shape `(batch_size, sequence_length)`): In [0, 1], 0 off the image.
        is_image (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Image tokens.
        temperature (`float`, defaults to 0.07): Smaller: only the nearest counts.

    Returns:
        `tuple`: the sum over samples that have both a word and a covered patch, and their number.
    """
    total, count = states.new_zeros((), dtype=torch.float32), 0
    usable = words.any(1) & (coverage > 0).any(1)
    for index in usable.nonzero()[:, 0].tolist():
        directions = F.normalize(states[index].float(), dim=-1)
        covered = coverage[index][is_image[index]].float()
        covered = covered / covered.max()  # (patches,)
        with torch.autocast(states.device.type, enabled=False):  # bf16 is too coarse for cosines over 0.07
            scores = directions[text[index]] @ directions[is_image[index]].T / temperature  # (tokens, patches)
        is_word = words[index][text[index]]
        with_patches = F.log_softmax(scores[is_word], dim=1) + covered.clamp(min=1e-12).log()
        with_words = F.log_softmax(scores, dim=0)[is_word]
        to_patches = -with_patches.logsumexp(1).mean()
        to_words = -(covered * with_words.logsumexp(0)).sum() / covered.sum()
        total, count = total + (to_patches + to_words) / 2, count + 1
    return total, count


def pair_alignment_loss(
    states: torch.Tensor,
    pair_words: torch.Tensor,
    pair_patches: torch.Tensor,
    is_image: torch.Tensor,
    temperature: float = 0.07,
) -> tuple[torch.Tensor, int]:
    r"""InfoNCE between every name in a sample and the patches that show what it names.

    Of name k let W_k be its word tokens, m_k their mean direction, P_k the patches that show it, P_w the patches that
    show a name of word token w, and `s_xp = cos(x, z_p) / temperature`. Several names are true of one patch (`red`,
    `ring`), so that each positive competes with negatives only:

        L_words   = - mean_{k, w in W_k, p in P_w} log( exp(s_wp) / (exp(s_wp) + sum_{q not in P_w} exp(s_wq)) )
        L_patches = - mean_{k, p in P_k} log( exp(s_kp) / (exp(s_kp) + sum_{j: p not in P_j} exp(s_jp)) )
        L         = (L_words + L_patches) / 2

    with means over k of means over w of means over p. Every word token is told from the other patches by itself: were
    the occurrences of a name averaged here too, `ring` could carry the colour of its own ring unpunished, and a
    concept of that colour fire on both words. Negatives are of the same sample, as in [`alignment_loss`].

    Args:
        states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): Of one layer; 0: embeddings.
        pair_words, pair_patches (`torch.BoolTensor` of shape `(batch_size, sequence_length, num_names)`): From
            [`~training.alignment.names.TokenPairs`].
        is_image (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Image tokens.
        temperature (`float`, defaults to 0.07): Smaller: only the nearest counts, and a small difference is enough.

    Returns:
        `tuple`: the sum over samples that have a name, and their number.
    """
    named = pair_words.any(1) & pair_patches.any(1)  # (batch_size, num_names)
    words = (pair_words & named[:, None]).float()  # (batch_size, sequence_length, num_names)
    shows = (pair_patches & named[:, None] & is_image[..., None]).mT  # (batch_size, num_names, sequence_length)
    word_shows = words @ shows.float() > 0  # (batch_size, sequence_length, sequence_length): word token, patch
    each_name = 1 / named.sum(1).clamp(min=1)[:, None]  # (batch_size, 1)
    each_word = (words / words.sum(1, keepdim=True).clamp(min=1)).sum(2) * each_name  # (batch_size, sequence_length)
    directions = F.normalize(states.float(), dim=-1)
    with torch.autocast(states.device.type, enabled=False):
        names = F.normalize(pair_words.float().mT @ directions, dim=-1)  # (batch_size, num_names, hidden_size)
        to_patches = _told_from(directions @ directions.mT / temperature, is_image[:, None] & ~word_shows, dim=2)
        to_names = _told_from(names @ directions.mT / temperature, named[..., None] & ~shows, dim=1)
    of_words = (_shares(word_shows) * to_patches).sum(2) * each_word
    of_patches = (_shares(shows) * to_names).sum(2) * each_name
    return -(of_words.sum() + of_patches.sum()) / 2, int(named.any(1).sum())


def _told_from(scores: torch.Tensor, others: torch.Tensor, dim: int) -> torch.Tensor:
    """Log-probability of every score against itself and those of `others` along `dim`, shape of `scores`."""
    among = scores.masked_fill(~others, -1e4)  # finite: there may be no others
    return scores - torch.logaddexp(scores, among.logsumexp(dim, keepdim=True))


def _shares(marks: torch.Tensor) -> torch.Tensor:
    """Weights of a mean over the last dimension's marked places; 0 where there is none."""
    return marks / marks.sum(-1, keepdim=True).clamp(min=1)
