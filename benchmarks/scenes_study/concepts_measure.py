"""How shared the concepts of a VLM's states and an SAE are, on Scenes with their reference reasoning."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from concept_metrics import (
    ConceptTokens,
    bridge_score,
    concept_jaccard,
    joint_auc,
    one_modality_share,
)
from torch import nn

from segcompass_hf.data.scenes.drawing import COLORS, SHAPES, SIZES
from segcompass_hf.data.scenes.names import listed_names
from segcompass_hf.images_segcompass import to_rgb_image
from segcompass_hf.modeling_sae import SegCompassSae
from segcompass_hf.training.alignment.names import TokenPairs
from segcompass_hf.training.sae.activations import ActivationHarvester, layer_states
from segcompass_hf.training.sae.rows import RowEncoder

ATTRIBUTES = {"color": tuple(COLORS), "shape": SHAPES, "size": tuple(SIZES)}
LEFT_OUT = -1


class NamedTokens(NamedTuple):
    """States of all counted tokens of some scenes.

    `labels` is the color, shape and size that a word names or a patch shows; -1 where it does neither, or shows two.
    """

    states: torch.Tensor  # (tokens, d_in)
    is_image: torch.Tensor  # (tokens,)
    samples: torch.Tensor  # (tokens,)
    labels: torch.Tensor  # (tokens, 3)


@torch.no_grad()
def harvest(vlm: nn.Module, processor: Any, layer: int, rows: Iterable[dict], batch_size: int = 32) -> NamedTokens:
    """States at the SAE layer with what every token names or shows."""
    harvester = ActivationHarvester(vlm, RowEncoder(processor), layer)
    places = TokenPairs(processor, listed_names).places
    parts, rows = [], enumerate(rows)
    while batch := list(itertools.islice(rows, batch_size)):
        inputs = harvester.encode(batch)
        states, keep = layer_states(vlm, layer, inputs), harvester.counted_tokens(inputs)
        labels = torch.full((*keep.shape, len(ATTRIBUTES)), LEFT_OUT)
        for index, (_, row) in enumerate(batch):
            ids, attention = inputs["input_ids"][index], inputs["attention_mask"][index]
            for name in places(row, to_rgb_image(row["image"]), ids, attention):
                column, value = _attribute(name.words)
                patches = name.patches
                taken = labels[index, patches, column] != LEFT_OUT
                labels[index, patches, column] = torch.where(taken, -2, value)
                labels[index, list(itertools.chain.from_iterable(name.occurrences)), column] = value
        samples = torch.tensor([number for number, _ in batch])[:, None].expand(keep.shape)
        labels = labels.clamp(min=LEFT_OUT)
        keep = keep.cpu()
        parts.append(
            NamedTokens(
                states.float().cpu()[keep],
                harvester.modality_ids(inputs).bool().cpu()[keep],
                samples[keep],
                labels[keep],
            )
        )
    return NamedTokens(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _attribute(word: str) -> tuple[int, int]:
    for column, values in enumerate(ATTRIBUTES.values()):
        if word in values:
            return column, values.index(word)
    raise ValueError(f"{word!r} is no color, shape or size of Scenes.")


@torch.no_grad()
def measure(sae: SegCompassSae, tokens: NamedTokens, num_resamples: int = 1000) -> dict[str, Any]:
    """Everything that one record of the study says about an SAE."""
    acts = torch.cat([part for part in _encoded(sae, tokens)])
    words, patches = acts[~tokens.is_image], acts[tokens.is_image]
    concepts = []
    for column, (attribute, values) in enumerate(ATTRIBUTES.items()):
        modalities = (
            ConceptTokens(acts[on], tokens.labels[on, column], tokens.samples[on])
            for on in (~tokens.is_image, tokens.is_image)
        )
        scores = joint_auc(*modalities, values, num_resamples=num_resamples)
        concepts += [{"attribute": attribute} | dataclasses.asdict(score) for score in scores]
    word_means, patch_means = pair_means(acts, tokens)
    bridge = bridge_score(word_means, patch_means, sae.W_dec)
    return {
        "concepts": concepts,
        "at_least_0.8": sum(concept["joint"] >= 0.8 for concept in concepts),
        "joint": sum(concept["joint"] for concept in concepts) / len(concepts),
        "bridge": {name: getattr(bridge, name) for name in ("score", "chance", "same_feature")},
        "jaccard": concept_jaccard(word_means, patch_means),
        "jaccard_of_random_pairs": concept_jaccard(word_means, patch_means.roll(len(patch_means) // 2, 0)),
        "one_modality": one_modality_share(words, patches),
        "l0": {
            "words": float((words > 0).sum(1).float().mean()),
            "patches": float((patches > 0).sum(1).float().mean()),
        },
        "dead_features": float((acts.amax(0) == 0).float().mean()),
        "explained_variance": _explained_variance(sae, tokens),
    }


def pair_means(acts: torch.Tensor, tokens: NamedTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean activations over the words and over the patches of every name in every scene, rows belonging together."""
    offsets = torch.tensor([0, *itertools.accumulate(len(values) for values in ATTRIBUTES.values())])
    sums = []
    for modality in (~tokens.is_image, tokens.is_image):
        rows, columns = (modality[:, None] & (tokens.labels >= 0)).nonzero(as_tuple=True)
        keys = tokens.samples[rows] * int(offsets[-1]) + offsets[columns] + tokens.labels[rows, columns]
        unique, place = keys.unique(return_inverse=True)
        mean = torch.zeros(len(unique), acts.shape[1]).index_add_(0, place, acts[rows])
        sums.append((unique, mean / place.bincount()[:, None]))
    (word_keys, word_means), (patch_keys, patch_means) = sums
    return word_means[torch.isin(word_keys, patch_keys)], patch_means[torch.isin(patch_keys, word_keys)]


def _encoded(sae: SegCompassSae, tokens: NamedTokens) -> Iterator[torch.Tensor]:
    for states, is_image in zip(tokens.states.split(8192), tokens.is_image.split(8192), strict=True):
        yield sae.encode(states, is_image.long())


def _explained_variance(sae: SegCompassSae, tokens: NamedTokens) -> dict[str, float]:
    """1 - FVU in the space of the VLM, so that normalisations can be compared; against the mean of each part."""
    error = torch.cat(
        [
            (sae(states, modality_ids=is_image.long()).reconstruction - states).pow(2).sum(1)
            for states, is_image in zip(tokens.states.split(8192), tokens.is_image.split(8192), strict=True)
        ]
    )
    parts = {"all": torch.ones_like(tokens.is_image), "words": ~tokens.is_image, "patches": tokens.is_image}
    return {
        name: float(1 - error[on].sum() / (tokens.states[on] - tokens.states[on].mean(0)).pow(2).sum())
        for name, on in parts.items()
    }
