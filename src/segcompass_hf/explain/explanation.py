# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What an explanation holds: tokens, masks, and for every mask the ranked concepts behind it, causally tested."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .report.figure import plot
from .report.page import to_html
from .report.payload import mask_to_rle

if TYPE_CHECKING:
    from PIL import Image

TokenKind = Literal["special", "question", "image", "reasoning", "reference"]
Target = Literal["mask_logit", "mask_contrast", "slot_logit"]
MAX_SHARE = 2.0  # larger ones mean that contributions all but cancel out


@dataclass(frozen=True)
class Token:
    """One token of the sequence the model saw.

    Args:
        position (`int`): Index into the sequence, from 0; padding is left out and not counted.
        text (`str`): The token as text.
        kind (`str`): `question` (the user's words), `image` (a patch), `reasoning` (inside the think block),
            `reference` (a `<REF_POS>`) or `special` (template, tags, markers).
        patch (`tuple[int, int, int, int]`, *optional*): x0, y0, x1, y1 of an image token, in pixels of the original
            image, x1 and y1 exclusive; `None` for words, and where the image tokens form no known grid.
    """

    position: int
    text: str
    kind: TokenKind
    patch: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class TokenShare:
    """A token on which a concept was active.

    Args:
        position (`int`): Index into `Explanation.tokens`.
        activation (`float`): SAE activation, above 0.
        contribution (`float`): To the explained scalar, in its units; signed.
    """

    position: int
    activation: float
    contribution: float


@dataclass
class Ablation:
    """What the answer becomes without some concepts (or with them changed): a causal test.

    Args:
        features (`tuple[int, ...]`): The features taken away.
        masks (list of `np.ndarray` of shape `(H, W)`): bool; what each mask of `Explanation.masks` becomes.
        iou (`list[float]`): Of those to the unchanged masks, in [0, 1]; two empty masks agree (1).
        score_change (`list[float]`): Of each mask's confidence, in [-1, 1]; negative where it falls.
        iou_to_truth (`list[float]`, *optional*): Of each changed mask to its true one, where truth is known.
        reasoning (`str`, *optional*): Written anew, for interventions on the residual stream only.
    """

    features: tuple[int, ...]
    masks: list[np.ndarray] = field(repr=False)
    iou: list[float]
    score_change: list[float]
    iou_to_truth: list[float] | None = None
    reasoning: str | None = None


@dataclass
class ConceptAttribution:
    """One concept's part in one mask.

    Args:
        feature (`int`): SAE feature id.
        share (`float`): Contribution over the change that all concepts make together; signed, adds up to 1 over all
            concepts of a mask but for the completeness error. 0 where they make no change.
        contribution (`float`): In units of the explained scalar.
        direction (`str`): `for` where it raises the scalar, else `against`.
        activation (`float`): Sum of its activations over all tokens.
        measured (`bool`): Whether the contribution was read with this concept alone coming and going (`paths`, of the
            first ones); else it is this concept's part, by gradients, of what was measured of many together.
        label, purity (`str`, `float`, *optional*): From a [`ConceptDictionary`]; `None` without one.
        tokens (`list[TokenShare]`): Where it was active, largest |contribution| first.
        ablation ([`Ablation`], *optional*): For the first `num_ablations` concepts of a mask.
    """

    feature: int
    share: float
    contribution: float
    direction: Literal["for", "against"]
    activation: float = 0.0
    measured: bool = False
    label: str | None = None
    purity: float | None = None
    tokens: list[TokenShare] = field(default_factory=list, repr=False)
    ablation: Ablation | None = field(default=None, repr=False)


@dataclass
class MaskExplanation:
    """One mask and the concepts behind it.

    Args:
        slot (`int`): Which slot it comes from.
        score (`float`): Confidence in [0, 1].
        mask (`np.ndarray` of shape `(H, W)`): bool, at the image's size.
        heatmap (`np.ndarray` of shape `(H, W)`): float32 in [0, 1].
        concepts (`list[ConceptAttribution]`): By |contribution|, largest first; at most `max_concepts`.
        target (`str`): The scalar explained: `mask_logit` (mean inside the mask), `mask_contrast` (that minus the mean
            outside) or `slot_logit` (confidence).
        value, baseline_value (`float`): The scalar as it is, and without any concept.
        completeness_error (`float`): `|sum of all contributions - change| / |change|`, where
            `change = value - baseline_value`.
        quadrature_error (`float`): How large the contributions are that were not measured of a concept alone but
            shared out among many, over the size of the change; see [`Attribution`].
        num_concepts (`int`): Active concepts altogether, also those beyond `max_concepts`.
        kept (`bool`): Whether the model answers with this mask. When it keeps none, the strongest slot is explained
            by its `slot_logit`, with `kept=False`.
        iou_to_truth (`float`, *optional*): To the true mask it overlaps most, where truth is known.
    """

    slot: int
    score: float
    mask: np.ndarray = field(repr=False)
    heatmap: np.ndarray = field(repr=False)
    concepts: list[ConceptAttribution] = field(repr=False)
    target: Target
    value: float
    baseline_value: float
    completeness_error: float
    quadrature_error: float = 0.0
    num_concepts: int = 0
    kept: bool = True
    iou_to_truth: float | None = None

    @property
    def in_shares(self) -> bool:
        """Whether pages show shares: the scalar rises, and by enough for its parts to be told in shares of it."""
        return self.value > self.baseline_value and all(abs(c.share) <= MAX_SHARE for c in self.concepts)


@dataclass
class Explanation:
    """Which concepts, read from which words and patches, made which mask.

    Args:
        image (`PIL.Image.Image`): RGB.
        instruction (`str`): The user's words.
        reasoning (`str`): Inside the think block.
        text (`str`): The whole answer.
        tokens (`list[Token]`): Of prompt and answer, in order.
        masks (`list[MaskExplanation]`): In slot order; where no slot is kept, the strongest one alone (`kept=False`).
        slot_scores (`list[float]`): Confidence of all K slots, in [0, 1].
        heatmaps (`np.ndarray` of shape `(K, H, W)`): Of all slots, in [0, 1].
        model_name (`str`): Name or path of the checkpoint.
    """

    image: Image.Image
    instruction: str
    reasoning: str
    text: str
    tokens: list[Token] = field(repr=False)
    masks: list[MaskExplanation]
    slot_scores: list[float]
    heatmaps: np.ndarray = field(repr=False)
    model_name: str = ""

    @property
    def concepts(self) -> list[list[ConceptAttribution]]:
        """Ranked concepts of every mask."""
        return [mask.concepts for mask in self.masks]

    @property
    def places_known(self) -> bool:
        """Whether it is known where in the picture image tokens lie (`Token.patch`)."""
        images = [token for token in self.tokens if token.kind == "image"]
        return not images or any(token.patch is not None for token in images)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: masks as uncompressed COCO RLE, no image and no heatmaps."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("image", "heatmaps", "masks")}
        plain["tokens"] = [_plain(token) for token in self.tokens]
        plain["image_size"] = [self.image.height, self.image.width]
        plain["masks"] = [_plain(mask) for mask in self.masks]
        return plain

    def to_html(self, path: str | os.PathLike) -> None:
        """Write a self-contained page that needs no network; see [`~report.page.to_html`]."""
        to_html(self, path)

    def plot(self) -> Any:
        """A matplotlib `Figure`; see [`~report.figure.plot`]."""
        return plot(self)


def _plain(value: Any) -> Any:
    """Data classes to dicts, masks to RLE; heatmaps are left out."""
    if isinstance(value, np.ndarray):
        return mask_to_rle(value)
    if isinstance(value, Token | TokenShare):
        return asdict(value)
    if isinstance(value, MaskExplanation | ConceptAttribution | Ablation):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.name != "heatmap"}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
