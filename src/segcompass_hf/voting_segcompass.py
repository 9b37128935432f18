# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Several answers sampled in one pass vote on masks and concepts; their agreement is the confidence."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from .modeling_concepts import SparseConcepts

SAME_OBJECT_IOU = 0.5  # two masks of one image are of the same object from it on


@dataclass
class Votes:
    """What the samplings of one prompt agree on.

    Args:
        chosen (`int`): The sampling that agrees most with the others.
        shares (`torch.Tensor` of shape `(num_slots,)`): Of its slots the share of samplings, itself included, that
            have a mask of the same object; 0 where the slot holds nothing.
        voters (`torch.LongTensor` of shape `(num_slots, V)`): The slot of each sampling that shows it; -1 for none.
        concept_agreement (`float`): Mean cosine of its concepts with those of the others, in [0, 1].
    """

    chosen: int
    shares: torch.Tensor
    voters: torch.Tensor
    concept_agreement: float


def count_votes(masks: torch.Tensor, kept: torch.Tensor, concepts: torch.Tensor) -> Votes:
    """Let V samplings of one prompt vote.

    Two masks show the same object where their IoU reaches `SAME_OBJECT_IOU`. Two samplings agree by the F1 of their
    masks so matched (1 where neither has any), and by the cosine of their concepts; the sampling of the largest mean
    of both over the others is chosen.

    Args:
        masks (`torch.BoolTensor` of shape `(V, num_slots, height, width)`): V of 2 or more.
        kept (`torch.BoolTensor` of shape `(V, num_slots)`): Slots that are part of an answer.
        concepts (`torch.Tensor` of shape `(V, d_sae)`): How strongly each answer uses every concept.
    """
    num, slots = kept.shape
    flat = (masks & kept[..., None, None]).flatten(0, 1).flatten(1).float()  # (V * num_slots, pixels)
    areas, overlaps = flat.sum(1), flat @ flat.T
    ious = overlaps / (areas[:, None] + areas - overlaps).clamp(min=1)
    best, partner = ious.view(num, slots, num, slots).max(-1)  # (V, num_slots, V): with the masks of each sampling
    same = best >= SAME_OBJECT_IOU
    matched = same.sum(1)  # (V, V): masks of the first that the second has too
    counts = same.diagonal(dim1=0, dim2=2).sum(0)  # (V,): masks of each
    both = counts[:, None] + counts
    on_masks = torch.where(both > 0, (matched + matched.T) / both.clamp(min=1), 1.0)
    directions = torch.nn.functional.normalize(concepts.float(), dim=1)
    on_concepts = (directions @ directions.T).clamp(0, 1)
    others = ~torch.eye(num, dtype=torch.bool, device=masks.device)
    agreement = (((on_masks + on_concepts) / 2) * others).sum(1) / (num - 1)  # (V,)
    chosen = int(agreement.argmax())
    voters = torch.where(same[chosen], partner[chosen], -1)  # (num_slots, V)
    concept_agreement = float((on_concepts * others)[chosen].sum() / (num - 1))
    return Votes(chosen, same[chosen].float().mean(1), voters, concept_agreement)


def concept_use(concepts: SparseConcepts, completion_mask: torch.Tensor, d_sae: int) -> torch.Tensor:
    """Activations summed over the tokens that each row wrote, `(rows, d_sae)`."""
    rows = concepts.token_index // concepts.sequence_length
    written = completion_mask.flatten()[concepts.token_index] != 0
    use = concepts.values.new_zeros(concepts.batch_size * d_sae)
    index = (rows * d_sae + concepts.features)[written]
    return use.index_add(0, index, concepts.values[written]).view(concepts.batch_size, d_sae)


def check_votes(votes: int, generation: dict[str, Any]) -> dict[str, Any]:
    """What `generate` gets so that several answers are sampled.

    Args:
        votes (`int`): Samplings per prompt, 2 or more.
        generation (`dict`): What the caller asked for.

    Raises:
        ValueError: Fewer than 2, greedy decoding, or another number of answers.
    """
    if type(votes) is not int or votes < 2:
        raise ValueError(f"votes={votes!r} is a number of sampled answers; expected 2 or more, or None for one.")
    if generation.get("do_sample") is False or generation.get("num_return_sequences") not in (None, votes):
        raise ValueError(
            f"votes={votes} samples {votes} answers per prompt; leave do_sample=False and num_return_sequences out."
        )
    return {"do_sample": True, "num_return_sequences": votes}


def vote(output: Any, num_votes: int, d_sae: int, valid_area: torch.Tensor | None = None) -> Any:
    """One answer of several samplings.

    Of every prompt the sampling stays that agrees most with the others. Each of its masks becomes the mean, in logits,
    of the masks that show the same object. `slot_scores` are the means of those masks' own scores over all samplings,
    0 for one that has none: agreement, where each votes as surely as it is. `slot_logits` are the log odds, above
    `slot_logit_threshold`, of the share of samplings that have one: a mask stays that more than half of them have.

    Args:
        output (`SegCompassSegmentationOutput`): Rows `batch_size * num_votes`, those of a prompt together; with
            `concepts`.
        num_votes (`int`): Samplings per prompt.
        d_sae (`int`): Number of features.
        valid_area (`torch.BoolTensor` of shape `(rows, 1, height, width)`, *optional*): False on padding.

    Returns:
        `SegCompassSegmentationOutput`: rows `batch_size`, with `concept_agreement` `(batch_size,)`.
    """
    masks = output.pred_masks > output.mask_logit_threshold
    masks = masks if valid_area is None else masks & valid_area
    kept = (output.slot_logits > output.slot_logit_threshold) & masks.flatten(2).any(2)
    used = concept_use(output.concepts, output.completion_mask, d_sae)
    rows, agreements, slot_logits, slot_scores, pred_masks = [], [], [], [], []
    for first in range(0, len(kept), num_votes):
        group = slice(first, first + num_votes)
        votes = count_votes(masks[group], kept[group], used[group])
        row = first + votes.chosen
        shown = kept[row]
        odds = votes.shares.clamp(0.5 / num_votes, 1 - 0.5 / num_votes).logit() + output.slot_logit_threshold
        slot_logits.append(torch.where(shown, odds.to(output.slot_logits), output.slot_logits[row]))
        sureness = _mean_scores(output.slot_scores[group], votes.voters)
        slot_scores.append(torch.where(shown, sureness, output.slot_scores[row]))
        pred_masks.append(_mean_masks(output.pred_masks[group], output.pred_masks[row], votes.voters))
        rows.append(row)
        agreements.append(votes.concept_agreement)
    fields = {name: _rows_of(value, rows) for name, value in output.items()}
    fields |= {"slot_logits": torch.stack(slot_logits), "slot_scores": torch.stack(slot_scores)}
    fields |= {"pred_masks": torch.stack(pred_masks), "concept_agreement": torch.tensor(agreements)}
    return type(output)(**fields)


def _mean_scores(scores: torch.Tensor, voters: torch.Tensor) -> torch.Tensor:
    """Mean over all samplings of the scores `(V, num_slots)` of those who vote for each slot: `(num_slots,)`."""
    theirs = scores.gather(1, voters.T.clamp(min=0).to(scores.device))  # (V, num_slots)
    return (theirs * (voters.T >= 0)).mean(0)


def _mean_masks(masks: torch.Tensor, own: torch.Tensor, voters: torch.Tensor) -> torch.Tensor:
    """Mean logits `(num_slots, h, w)` over the voters of every slot, `(V, num_slots, h, w)`; `own` without any."""
    means = []
    for slot, chosen in enumerate(voters.tolist()):
        shown = [masks[sampling, other] for sampling, other in enumerate(chosen) if other >= 0]
        means.append(torch.stack(shown).mean(0) if shown else own[slot])
    return torch.stack(means)


def _rows_of(value: Any, rows: list[int]) -> Any:
    """Some rows of a field of an output."""
    if isinstance(value, SparseConcepts):
        parts = [value.for_row(row) for row in rows]
        index = [part.token_index + place * value.sequence_length for place, part in enumerate(parts)]
        features, values = (torch.cat([getattr(part, name) for part in parts]) for name in ("features", "values"))
        return replace(value, features=features, values=values, token_index=torch.cat(index), batch_size=len(rows))
    if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
        return tuple(layer[rows] for layer in value)
    return value[rows] if hasattr(value, "shape") else value


__all__ = ["Votes", "check_votes", "count_votes", "vote"]
